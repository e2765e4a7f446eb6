"""Operators with their dense twins; one line in `OPERATORS` adds the tests for a new operator."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from wellcond.operators.base import Gradient, LowRank, WeightOperator
from wellcond.operators.stacked import StackedMatrices
from wellcond.operators.stored import StoredMatrix
from wellcond.operators.views import (
    STORED,
    Axes,
    Blocks,
    InputsFirst,
    Kernel,
    Member,
    Part,
    Permuted,
    Reshaped,
    Strided,
    Transposed,
    View,
)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(
        seed + sum(31 * size + i for i, size in enumerate(shape))
    )
    return torch.randn(*shape, generator=source, dtype=torch.float64).to(dtype)


@dataclass(frozen=True)
class ProductMatrix:
    """S = B A, which depends on two parameters and cannot be changed in place."""

    B: Tensor
    A: Tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self.B), self.A.shape[1]])

    @property
    def nu(self) -> int:
        return min(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.B.dtype

    @property
    def device(self) -> torch.device:
        return self.B.device

    @property
    def kind(self) -> tuple[object, ...]:
        return type(self), self.B.shape, self.A.shape, self.dtype, self.device

    def matmat(self, V: Tensor) -> Tensor:
        return self.B @ (self.A @ V)

    def rmatmat(self, U: Tensor) -> Tensor:
        return self.A.mT @ (self.B.mT @ U)

    def squared_frobenius_norm(self, dtype: torch.dtype | None = None) -> Tensor:
        B, A = self.B.to(dtype or self.dtype), self.A.to(dtype or self.dtype)
        return ((B.mT @ B) * (A @ A.mT)).sum()

    def finite(self) -> Tensor:
        return torch.isfinite(self.B).all() & torch.isfinite(self.A).all()

    def pullback_(self, gradient: Gradient, into: Sequence[Tensor]) -> None:
        G = gradient.form
        if isinstance(G, LowRank):
            G = G.c * (self.B @ self.A) + G.U @ G.V.mT
        into[0].add_(G @ self.A.mT)
        into[1].add_(self.B.mT @ G)


class Case(NamedTuple):
    """Parameters, the operator that depends on them, and S as their differentiable function."""

    parameters: Callable[[], list[Tensor]]
    operator: Callable[[Sequence[Tensor]], WeightOperator | StackedMatrices]
    twin: Callable[..., Tensor]


def seen(view: View, parameter: Callable[[], Tensor], twin: Callable[[Tensor], Tensor]) -> Case:
    return Case(lambda: [parameter()], lambda given: StoredMatrix(given[0], view), twin)


def with_gaps() -> Tensor:
    """A kernel that is part of a larger one, so it cannot be flattened without a copy."""
    return normal(8, 3, 5, 5)[:, :, :3, :3]


def flat(kernel: Tensor) -> Tensor:
    return kernel.reshape(len(kernel), -1)


def channels_last(kernel: Tensor) -> Tensor:
    """The columns in the order of memory."""
    return kernel.permute(0, 2, 3, 1).reshape(len(kernel), -1)


# Views that occur only for weights in files, not for parameters in memory.
OF_FILES = (Axes, Blocks, InputsFirst, Permuted, Reshaped)
OPERATORS: dict[str, Case] = {
    "tall": seen(STORED, lambda: normal(7, 5), lambda p: p),
    "wide": seen(STORED, lambda: normal(5, 7), lambda p: p),
    "one row": seen(STORED, lambda: normal(1, 6), lambda p: p),
    "one column": seen(STORED, lambda: normal(6, 1), lambda p: p),
    "large": seen(STORED, lambda: normal(40, 33), lambda p: p),
    "stack": seen(STORED, lambda: normal(3, 7, 5), lambda p: p),
    "stack of rows": seen(STORED, lambda: normal(2, 1, 4), lambda p: p),
    "transposed": seen(Transposed(), lambda: normal(4, 6), lambda p: p.mT),
    "kernel": seen(Kernel(), lambda: normal(8, 3, 3, 3), flat),
    "kernel, channels last": seen(
        Kernel(),
        lambda: normal(8, 3, 3, 3).contiguous(memory_format=torch.channels_last),
        channels_last,
    ),
    "kernel with gaps": seen(Kernel(), with_gaps, flat),
    "groups": seen(Kernel(4), lambda: normal(8, 3, 3, 3), lambda p: flat(p).reshape(4, 2, -1)),
    "groups with gaps": seen(Kernel(4), with_gaps, lambda p: flat(p).reshape(4, 2, -1)),
    "rows": seen(Part(STORED, 2, 3), lambda: normal(9, 4), lambda p: p[2:5]),
    "columns": seen(Part(STORED, 1, 2, dim=-1), lambda: normal(9, 4), lambda p: p[:, 1:3]),
    "columns of rows": seen(
        Part(Part(STORED, 2, 6), 1, 2, dim=-1), lambda: normal(9, 4), lambda p: p[2:8, 1:3]
    ),
    "columns of a transposed": seen(
        Part(Transposed(), 1, 2, dim=-1), lambda: normal(4, 6), lambda p: p.mT[:, 1:3]
    ),
    "rows of a kernel with gaps": seen(Part(Kernel(), 2, 3), with_gaps, lambda p: flat(p)[2:5]),
    "every second row": seen(Strided(STORED, 1, 2), lambda: normal(9, 4), lambda p: p[1::2]),
    "every second column": seen(
        Strided(Transposed(), 0, 2), lambda: normal(3, 6, 11), lambda p: p.mT[:, ::2]
    ),
    "every third row of a kernel with gaps": seen(
        Strided(Kernel(), 2, 3), with_gaps, lambda p: flat(p)[2::3]
    ),
    "inputs first": seen(InputsFirst(3), lambda: normal(3, 2, 4, 5), lambda p: p.reshape(24, 5).mT),
    "inputs first in groups": seen(
        InputsFirst(3, 2),
        lambda: normal(3, 2, 2, 6),
        lambda p: torch.stack([p[..., rows].flatten(0, 2).mT for rows in (slice(3), slice(3, 6))]),
    ),
    "axes": seen(
        Axes((0, 2), (1,)), lambda: normal(3, 4, 5), lambda p: p.transpose(1, 2).reshape(15, 4)
    ),
    "axes of a stack": seen(
        Axes((2,), (1,), (0,)), lambda: normal(3, 7, 5), lambda p: p.transpose(1, 2)
    ),
    "member": seen(Member(STORED, 1), lambda: normal(3, 7, 5), lambda p: p[1]),
    "member of groups with gaps": seen(
        Member(Kernel(2), 1), with_gaps, lambda p: flat(p).reshape(2, 4, -1)[1]
    ),
    "sides in another order": seen(
        Permuted(STORED, (2, 0, 1)), lambda: normal(7, 5, 3), lambda p: p.permute(2, 0, 1)
    ),
    "sides joined": seen(Reshaped(STORED, (7, 15)), lambda: normal(7, 5, 3), flat),
    "sides joined after a permutation": seen(
        Permuted(Reshaped(STORED, (3, 35)), (2, 0, 1)),
        lambda: normal(7, 5, 3),
        lambda p: flat(p.permute(2, 0, 1)),
    ),
    "blocks in another order": seen(
        Blocks(Transposed(), 0, ((4, 3), (0, 2))),
        lambda: normal(9, 4),
        lambda p: torch.cat([p[4:7], p[:2]]).mT,
    ),
    "product": Case(
        lambda: [normal(7, 2), normal(2, 5)], lambda given: ProductMatrix(*given), torch.matmul
    ),
    "separate": Case(
        lambda: [normal(7, 5, seed=i) for i in range(3)],
        lambda given: StackedMatrices([StoredMatrix(one) for one in given]),
        lambda *given: torch.stack(given),
    ),
    "separate products": Case(
        lambda: [normal(7, 2), normal(2, 5), normal(7, 2, seed=1), normal(2, 5, seed=1)],
        lambda given: StackedMatrices([ProductMatrix(*given[:2]), ProductMatrix(*given[2:])]),
        lambda a, b, c, d: torch.stack([a @ b, c @ d]),
    ),
}
