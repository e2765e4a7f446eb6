"""A DTensor as a linear map: each process multiplies its own block, and skinny factors are summed.

The weight itself is never gathered.

Letters: S (..., m, n) the weight, of which this process holds one block; U (..., m, k) and
V (..., n, k) skinny, the same on all processes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wellcond.operators.base import Gradient, LowRank, NewWeight
from wellcond.operators.stored import StoredMatrix
from wellcond.operators.views import STORED, Kernel, Member, Part, Stored, Transposed, View

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Block = tuple[slice, ...]  # what a process holds of a tensor, dimension by dimension


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor. There can be none as long as nobody has imported its module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def operator_of(tensor: Tensor | Any, view: View = STORED, seed: int = 0) -> StoredMatrix:
    """A parameter, seen through a view, as an operator."""
    return (ShardedMatrix if is_sharded(tensor) else StoredMatrix)(tensor, view, seed)


class ShardedMatrix(StoredMatrix):
    """A matrix, or a stack of them, of which this process holds the block `S` at `block`."""

    def __init__(self, tensor: Any, view: View = STORED, seed: int = 0) -> None:
        view, shape, self.block = _held(view, tensor.shape, _block_of(tensor))
        # By its place: processes that hold the same block round it alike.
        place = sum(at.start * 1_000_003**dim for dim, at in enumerate(self.block))
        super().__init__(tensor.to_local(), view, (seed + place) % 2**63)
        self.shape = shape
        self.placements = (tensor.device_mesh, tuple(tensor.placements))
        self.groups: list[ProcessGroup] = [
            tensor.device_mesh.get_group(dim)
            for dim, placement in enumerate(tensor.placements)
            if not placement.is_replicate()  # a strided one says that it is no shard
        ]

    @property
    def kind(self) -> tuple[object, ...]:
        return *super().kind, self.placements

    def reduce_(self, sums: Tensor) -> Tensor:
        """Adds what every process has found for its block."""
        for group in self.groups:
            torch.distributed.all_reduce(sums, group=group)
        return sums

    def partial_matmat(self, V: Tensor) -> Tensor:
        """The rows of S V to which this block adds, among zeros."""
        *stack, rows, columns = self.block
        image = V.new_zeros(*self.shape[:-1], V.shape[-1])
        image[(*stack, rows)] = super().partial_matmat(V[(*stack, columns)])
        return image

    def partial_rmatmat(self, U: Tensor) -> Tensor:
        """The rows of S^T U to which this block adds, among zeros."""
        *stack, rows, columns = self.block
        image = U.new_zeros(*self.shape[:-2], self.shape[-1], U.shape[-1])
        image[(*stack, columns)] = super().partial_rmatmat(U[(*stack, rows)])
        return image

    def partial_squared_frobenius_norm(self) -> Tensor:
        return self._placed(super().partial_squared_frobenius_norm())

    def _placed(self, values: Tensor) -> Tensor:
        """One number a matrix, zero for those of which nothing is held here."""
        placed = values.new_zeros(self.shape[:-2])
        placed[self.block[:-2]] = values
        return placed

    def finite(self) -> Tensor:
        if self.S.numel() == 0:  # it has no largest entry
            return self.reduce_(torch.zeros(self.shape[:-2], device=self.device)) == 0
        return self.reduce_(self._placed((~super().finite()).float())) == 0

    def dense(self) -> Tensor:
        raise ValueError(
            "a hard limit, and a measured condition number, need the whole weight in one place, "
            "but it is sharded over processes. Use Condition(strength) while training; audit or "
            "repair the checkpoint."
        )

    def gram(self, dtype: torch.dtype | None = None) -> Tensor:
        """A sum over processes: they must have the long side in parts, the short one whole."""
        m, n = self.shape[-2:]
        *stack, rows, columns = self.block
        short = columns if n <= m else rows
        if short != slice(0, self.nu) and not isinstance(self.view, _Absent):
            raise ValueError(
                f"a Gram matrix needs the {self.nu} {'columns' if n <= m else 'rows'} whole on "
                "every process, but they are sharded. Shard the other dimension."
            )
        gram = torch.zeros(
            *self.shape[:-2], self.nu, self.nu, dtype=dtype or self.dtype, device=self.device
        )
        if self.S.numel():
            gram[tuple(stack)] = super().gram(dtype)
        return self.reduce_(gram)

    def update_(self, new: NewWeight) -> None:
        super().update_(NewWeight(self._of_block(new.form)))

    def pullback_(self, gradient: Gradient, into: Sequence[Tensor]) -> None:
        super().pullback_(Gradient(self._of_block(gradient.form)), into)

    def local(self, tensor: Any) -> Tensor:
        local: Tensor = tensor.to_local()
        return local

    def _of_block(self, form: LowRank | Tensor) -> LowRank | Tensor:
        *stack, rows, columns = self.block
        if not isinstance(form, LowRank):
            return form[self.block]
        c = form.c[tuple(stack)] if form.c.ndim else form.c
        return LowRank(c, form.U[(*stack, rows)], form.V[(*stack, columns)])


def _block_of(tensor: Any) -> Block:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError("a weight must be sharded or replicated, but its placement is Partial.")
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))


def _held(view: View, shape: torch.Size, block: Block) -> tuple[View, torch.Size, Block]:
    """How a process that holds this block of a parameter sees its part of the matrix.

    The view of the local tensor, the shape of the whole, and where in it the part lies.
    """
    match view:
        case Stored():
            return view, shape, block
        case Transposed():
            *stack, m, n = shape
            *held, rows, columns = block
            return view, torch.Size([*stack, n, m]), (*held, columns, rows)
        case Kernel():
            return _kernel_held(view, shape, block)
        case Part(inner, start, length, dim):
            whole, shape, block = _held(inner, shape, block)
            at = block[dim]
            first = min(max(start, at.start), at.stop)
            last = max(min(start + length, at.stop), first)
            mine = slice(first - start, last - start) if last > first else slice(0, 0)
            view = Part(whole, first - at.start, last - first, dim)
            return view, _with(shape, dim, length), _with(block, dim, mine)
        case Member(inner, index):
            whole, shape, block = _held(inner, shape, block)
            here, rows, columns = block
            if here.start <= index < here.stop:
                return Member(whole, index - here.start), shape[1:], (rows, columns)
            # Another process holds this matrix: of it, this one has no rows.
            absent = _Absent(columns.stop - columns.start)
            return absent, shape[1:], (slice(0, 0), columns)
    raise TypeError(f"{view} is no view of a sharded parameter.")


def _kernel_held(view: Kernel, shape: torch.Size, block: Block) -> tuple[View, torch.Size, Block]:
    out, columns, g = shape[0], shape[1:].numel(), view.groups
    if any(at != slice(0, size) for at, size in zip(block[1:], shape[1:], strict=True)):
        raise ValueError(
            "a convolution kernel may be sharded over its first dimension only. Leave it out with "
            "a pattern."
        )
    rows, every = block[0], slice(0, columns)
    if g is None:
        return view, torch.Size([out, columns]), (rows, every)
    each = out // g
    if rows.start % each or rows.stop % each:
        raise ValueError(
            f"a convolution kernel of {g} groups must be sharded by whole groups of {each} rows, "
            f"but rows {rows.start} to {rows.stop} are held here. Leave it out with a pattern."
        )
    groups = slice(rows.start // each, rows.stop // each)
    view = Kernel(groups.stop - groups.start)
    return view, torch.Size([g, each, columns]), (groups, slice(0, each), every)


def _with(items: Any, at: int, item: Any) -> Any:
    """The same with another item at one place."""
    changed = list(items)
    changed[at] = item
    return type(items)(changed)


@dataclass(frozen=True)
class _Absent:
    """A matrix of which nothing is held here."""

    columns: int

    def __call__(self, parameter: Tensor) -> Tensor:
        return parameter.new_empty(0, self.columns)

    def write_(self, parameter: Tensor, matrix: Tensor) -> None:
        pass
