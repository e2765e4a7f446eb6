"""Matrices of one kind in separate storages, processed as one stack.

Each matrix needs its own product. The skinny results are processed together.

Letters: S (b, ..., m, n) the stack of b weights; U (b, ..., m, k) and V (b, ..., n, k) skinny.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from wellcond.operators.base import Dense, HasGram, NewWeight, Operator, Updatable, WeightOperator
from wellcond.operators.stored import StoredMatrix


def stack(matrices: Sequence[WeightOperator]) -> Operator:
    """Returns operators of one kind as one operator; a single operator is returned unchanged."""
    return matrices[0] if len(matrices) == 1 else StackedMatrices(matrices)


def unstack(S: Operator) -> Sequence[WeightOperator]:
    """Returns the weights from which `stack` made an operator."""
    return S.matrices if isinstance(S, StackedMatrices) else [cast(WeightOperator, S)]


class StackedMatrices:
    """Operators of one kind as one operator; see `WeightOperator.kind`."""

    def __init__(self, matrices: Sequence[WeightOperator]) -> None:
        self.matrices = matrices
        first = matrices[0]
        self.shape = torch.Size([len(matrices), *first.shape])
        self.dtype, self.device, self.nu = first.dtype, first.device, first.nu

    def _each(self, product: str, *factors: Tensor) -> Tensor:
        """Multiplies every matrix; sums over processes are combined in one reduction."""
        each = list(zip(self.matrices, *factors, strict=True))
        first = self.matrices[0]
        if isinstance(first, StoredMatrix):
            parts = [getattr(S, f"partial_{product}")(*one) for S, *one in each]
            return first.reduce_(torch.stack(parts))
        return torch.stack([getattr(S, product)(*one) for S, *one in each])

    def matmat(self, V: Tensor) -> Tensor:
        return self._each("matmat", self._for_each(V))

    def rmatmat(self, U: Tensor) -> Tensor:
        return self._each("rmatmat", self._for_each(U))

    def _for_each(self, X: Tensor) -> Tensor:
        """Expands a single factor to one factor per matrix."""
        return X.expand(*self.shape[:-2], *X.shape[-2:])

    def squared_frobenius_norm(self, dtype: torch.dtype | None = None) -> Tensor:
        stored = [S.S for S in self.matrices if type(S) is StoredMatrix]
        if len(self.shape) == 3 and len(stored) == len(self.matrices):
            return torch.stack(torch._foreach_norm(stored, 2, dtype or self.dtype)).square()
        if dtype is not None:
            return torch.stack([S.squared_frobenius_norm(dtype) for S in self.matrices])
        return self._each("squared_frobenius_norm")

    def finite(self) -> Tensor:
        return torch.stack([S.finite() for S in self.matrices])

    def dense(self) -> Tensor:
        return torch.stack([cast(Dense, S).dense() for S in self.matrices])

    def gram(self, dtype: torch.dtype | None = None, unit: Tensor | None = None) -> Tensor:
        units = [None] * len(self.matrices) if unit is None else unit.expand(self.shape[:-2])
        each = zip(self.matrices, units, strict=True)
        return torch.stack([cast(HasGram, S).gram(dtype, one) for S, one in each])

    @property
    def upright(self) -> bool:
        return cast(HasGram, self.matrices[0]).upright

    def update_(self, new: NewWeight) -> None:
        parts = zip(*(tensor.unbind() for tensor in new.tensors), strict=True)
        for S, own in zip(self.matrices, parts, strict=True):
            cast(Updatable, S).update_(NewWeight.from_tensors(new.code, own))

    def agree(self, compute: Callable[[], Sequence[Tensor]], *like: Tensor) -> list[Tensor]:
        return cast(HasGram, self.matrices[0]).agree(compute, *like)
