"""A DTensor as a linear map: each process multiplies its own block, and skinny results are summed.

Products never gather the weight.

Letters: S (..., m, n) the weight, of which this process stores one block; U (..., m, k) and
V (..., n, k) skinny, equal on all processes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wellcond.operators.base import Gradient, LowRank, NewWeight, Rescaled
from wellcond.operators.stored import StoredMatrix
from wellcond.operators.views import (
    STORED,
    Kernel,
    Member,
    Part,
    Stored,
    Strided,
    Transposed,
    View,
    is_kernel,
    writable,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Decisions depend on placements, which are equal on all processes. Blocks differ between processes
# and can be empty.
Block = tuple[slice, ...]  # the part of a tensor in this process, one slice per dimension


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether this is a DTensor. None can exist before its module is imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def operator_of(tensor: Tensor | Any, view: View = STORED, seed: int = 0) -> StoredMatrix:
    """Returns the operator of a parameter seen through a view."""
    return (ShardedMatrix if is_sharded(tensor) else StoredMatrix)(tensor, view, seed)


class ShardedMatrix(StoredMatrix):
    """A matrix, or a stack of them, of which this process stores the block `S` at `block`."""

    def __init__(self, tensor: Any, view: View = STORED, seed: int = 0) -> None:
        self.tensor, self.whole_view = tensor.detach(), view
        view, shape, self.block = _view_of_block(view, tensor.shape, _block_of(tensor))
        # The seed depends on the block, so that processes with the same block round it alike.
        place = sum(at.start * 1_000_003**dim for dim, at in enumerate(self.block))
        super().__init__(tensor.to_local(), view, (seed + place) % 2**63)
        self.shape = shape
        self.placements = (tensor.device_mesh, tuple(tensor.placements))
        self.groups: list[ProcessGroup] = [
            tensor.device_mesh.get_group(dim)
            for dim, placement in enumerate(tensor.placements)
            if not placement.is_replicate()  # is_shard() is False for strided placements
        ]

    @property
    def kind(self) -> tuple[object, ...]:
        return *super().kind, self.placements

    @property
    def is_one_map(self) -> bool:
        return False  # its groups can be distributed over processes

    def reduce_(self, sums: Tensor) -> Tensor:
        """Sums the results of all processes for their blocks."""
        for group in self.groups:
            torch.distributed.all_reduce(sums, group=group)
        return sums

    def partial_matmat(self, V: Tensor) -> Tensor:
        """Returns the contribution of this block to S V; other rows are zero."""
        *stack, rows, columns = self.block
        image = V.new_zeros(*self.shape[:-1], V.shape[-1])
        image[(*stack, rows)] = super().partial_matmat(V[(*stack, columns)])
        return image

    def partial_rmatmat(self, U: Tensor) -> Tensor:
        """Returns the contribution of this block to S^T U; other rows are zero."""
        *stack, rows, columns = self.block
        image = U.new_zeros(*self.shape[:-2], self.shape[-1], U.shape[-1])
        image[(*stack, columns)] = super().partial_rmatmat(U[(*stack, rows)])
        return image

    def partial_squared_frobenius_norm(self, dtype: torch.dtype | None = None) -> Tensor:
        return self._place(super().partial_squared_frobenius_norm(dtype))

    def _place(self, values: Tensor) -> Tensor:
        """Returns values for all matrices, zero for those without entries in this process."""
        stack = len(self.shape) - 2
        placed = values.new_zeros((*self.shape[:-2], *values.shape[stack:]))
        placed[self.block[:-2]] = values
        return placed

    def finite(self) -> Tensor:
        if self.S.numel() == 0:  # it has no largest entry
            return self.reduce_(torch.zeros(self.shape[:-2], device=self.device)) == 0
        return self.reduce_(self._place((~super().finite()).float())) == 0

    def dense(self) -> Tensor:
        raise ValueError(
            "the rule needs the complete weight in one process, but the weight is sharded over "
            "processes. Use ConditionLimit, SingularValueLimit or a penalty, which keep it sharded."
        )

    def gather(self) -> StoredMatrix:
        """Returns a copy of the complete weight on every process; all processes must call it."""
        return self._redistribute(whole=True)[0]

    @property
    def upright(self) -> bool:
        """For a square matrix, both Gram matrices are equally small: use the sharded side's."""
        m, n = self.shape[-2:]
        return m > n or (m == n and -1 not in self._axes())

    def gram(self, dtype: torch.dtype | None = None, unit: Tensor | None = None) -> Tensor:
        """Sums over processes; it redistributes a copy if the short side is sharded."""
        if not self._short_is_whole:
            return self._redistribute()[0].gram(dtype, unit)
        gram = torch.zeros(
            *self.shape[:-2], self.nu, self.nu, dtype=dtype or self.dtype, device=self.device
        )
        if self.S.numel():
            held = self.block[:-2]
            own = None if unit is None else unit.expand(self.shape[:-2])[held]
            gram[held] = super().gram(dtype, own)
        return self.reduce_(gram)

    @property
    def _short_is_whole(self) -> bool:
        """Whether no process stores only a part of the side of the Gram matrix."""
        return (-1 if self.upright else -2) not in self._axes()

    def _axes(self) -> set[int]:
        """Returns the sharded dimensions: -2, -1, smaller numbers for those of a stack."""
        return {_axis(self.whole_view, dim, self.tensor.ndim) for dim in _sharded_dims(self.tensor)}

    @contextlib.contextmanager
    def spread(self, whole: bool = False) -> Iterator[StoredMatrix]:
        """Yields the weight with an unsharded short side, and copies changes back on exit.

        If the short side is sharded, it yields a copy that is sharded along its long side, at the
        cost of an all-to-all. If that is impossible, as for kernels, or with `whole`, it yields
        the complete weight on every process. For a stack that is sharded by matrices, it yields
        the matrices of this process. A single matrix of such a stack goes to every process.
        """
        short = -1 if self.shape[-2] > self.shape[-1] else -2
        axes = self._axes() & {-1, -2}
        if self._axes() and not axes:
            if len(self.shape) > 2:
                yield _LocalStack(self)
                return
            alone = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
            alone[self.block] = self.S.to(self.dtype)
            gathered = _Gathered(self.reduce_(alone).to(self.S.dtype), STORED, self.placements[0])
            yield gathered
            self.update_(NewWeight(gathered.S))
            return
        if not whole and (
            short not in axes or (self.shape[-2] == self.shape[-1] and len(axes) < 2)
        ):
            yield self
            return
        other, tensor = self._redistribute(whole)
        yield other
        brought = torch.empty_like(self.parameter).copy_(self._take_own_part(tensor))
        # Write only this view: other views of the parameter might have changed meanwhile.
        with writable(self.view, self.parameter) as S:
            S.copy_(self.view(brought))

    def _redistribute(self, whole: bool = False) -> tuple[StoredMatrix, Any]:
        """Returns a copy with an unsharded short side, sharded along the long side if possible."""
        long = -2 if self.shape[-2] > self.shape[-1] else -1
        tensor = None if whole else self._by_its_long_side(long)
        if tensor is not None:
            return ShardedMatrix(tensor, self.whole_view, self.seed), tensor
        full = self.tensor.full_tensor()
        return _Gathered(full, self.whole_view, self.tensor.device_mesh, self.seed), full

    def _take_own_part(self, tensor: Any) -> Tensor:
        """Returns the part of such a tensor that belongs to this process."""
        if not is_sharded(tensor):
            part: Tensor = tensor[_block_of(self.tensor)]
            return part
        local: Tensor = tensor.redistribute(placements=self.tensor.placements).to_local()
        return local

    def _by_its_long_side(self, long: int) -> Any | None:
        """Returns a copy that is sharded only over this dimension of the matrix, if possible."""
        from torch.distributed.tensor import Shard

        ndim, placements = self.tensor.ndim, self.tensor.placements
        dims = [dim for dim in range(ndim) if _axis(self.whole_view, dim, ndim) == long]
        strided = any(not (p.is_shard() or p.is_replicate()) for p in placements)
        if not dims or strided or is_kernel(self.whole_view):
            return None
        wanted = [p if p.is_replicate() else Shard(dims[0]) for p in placements]
        return self.tensor.redistribute(placements=wanted)

    def agree(self, compute: Callable[[], Sequence[Tensor]], *like: Tensor) -> list[Tensor]:
        return _broadcast_first(self.placements[0].get_all_groups(), compute, like)

    def rescale_(self, V: Tensor, d: Tensor, original: Tensor, chosen: Tensor) -> None:
        if self.S.numel():
            held = self.block[:-2]
            super().rescale_(V[held], d[held], original, chosen[held])

    def update_(self, new: NewWeight) -> None:
        if isinstance(new.form, Rescaled) and not self._short_is_whole:
            with self.spread() as S:
                S.update_(new)
            return
        super().update_(NewWeight(self._of_block(new.form)))

    def add_(self, U: Tensor, V: Tensor) -> None:
        *stack, rows, columns = self.block
        super().add_(U[(*stack, rows)], V[(*stack, columns)])

    def pullback_(self, gradient: Gradient, into: Sequence[Tensor]) -> None:
        if isinstance(gradient.form, Rescaled) and not self._short_is_whole:
            S, tensor = self._redistribute()
            G = torch.zeros_like(tensor)
            S.pullback_(gradient, [G])
            self.local(into[0]).add_(self._take_own_part(G))
            return
        super().pullback_(Gradient(self._of_block(gradient.form)), into)

    def local(self, tensor: Any) -> Tensor:
        local: Tensor = tensor.to_local()
        return local

    def _of_block(self, form: LowRank | Rescaled | Tensor) -> LowRank | Rescaled | Tensor:
        *stack, rows, columns = self.block
        if isinstance(form, Tensor):
            return form[self.block]
        c = form.c[tuple(stack)] if form.c.ndim else form.c
        if isinstance(form, Rescaled):
            return Rescaled(c, form.C[tuple(stack)])
        return LowRank(c, form.U[(*stack, rows)], form.V[(*stack, columns)])


class _Gathered(StoredMatrix):
    """A complete matrix on every process of a mesh; `agree` keeps the copies equal."""

    def __init__(self, full: Tensor, view: View, mesh: Any, seed: int = 0) -> None:
        super().__init__(full, view, seed)
        self.mesh = mesh

    def agree(self, compute: Callable[[], Sequence[Tensor]], *like: Tensor) -> list[Tensor]:
        return _broadcast_first(self.mesh.get_all_groups(), compute, like)


class _LocalStack(StoredMatrix):
    """The matrices of this process from a stack that is sharded by matrices."""

    def __init__(self, stack: ShardedMatrix) -> None:
        super().__init__(stack.parameter, stack.view, stack.seed)
        self.stack = stack

    def agree(self, compute: Callable[[], Sequence[Tensor]], *like: Tensor) -> list[Tensor]:
        mesh, placements = self.stack.placements
        alike = [mesh.get_group(dim) for dim, p in enumerate(placements) if p.is_replicate()]
        return _broadcast_first(alike, compute, like)

    def own_part(self, numbers: Tensor) -> Tensor:
        return numbers[self.stack.block[:-2]]

    def all_of(self, numbers: Tensor) -> Tensor:
        return self.stack.reduce_(self.stack._place(numbers))


def _broadcast_first(
    groups: Sequence[ProcessGroup],
    compute: Callable[[], Sequence[Tensor]],
    like: Sequence[Tensor],
) -> list[Tensor]:
    """Computes on the first process of the groups, and broadcasts the result to all."""
    first = all(torch.distributed.get_rank(group) == 0 for group in groups)
    told = [one.contiguous() for one in compute()] if first else [torch.empty_like(x) for x in like]
    for group in groups:
        for one in told:
            torch.distributed.broadcast(one, torch.distributed.get_global_rank(group, 0), group)
    return told


def _sharded_dims(tensor: Any) -> set[int]:
    """Returns the sharded dimensions of a DTensor, also those with strided placements."""
    pairs = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return {placement.dim for placement, size in pairs if size > 1 and not placement.is_replicate()}


def _axis(view: View, dim: int, ndim: int) -> int:
    """Returns the dimension of the matrix, from the end, for a dimension of the parameter."""
    match view:
        case Transposed():
            return {ndim - 1: -2, ndim - 2: -1}.get(dim, dim - ndim)
        case Kernel(groups):
            return -1 if dim else (-2 if groups is None else -3)
        case Part(inner, _, _, _) | Strided(inner, _, _) | Member(inner, _):
            return _axis(inner, dim, ndim)
    return dim - ndim


def _block_of(tensor: Any) -> Block:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError("the weight must be sharded or replicated, got the placement Partial.")
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))


def _view_of_block(view: View, shape: torch.Size, block: Block) -> tuple[View, torch.Size, Block]:
    """Returns the view of the local tensor, the shape of the complete matrix, and the local block.

    `block` is the part of the parameter in this process.
    """
    match view:
        case Stored():
            return view, shape, block
        case Transposed():
            *stack, m, n = shape
            *held, rows, columns = block
            return view, torch.Size([*stack, n, m]), (*held, columns, rows)
        case Kernel():
            return _view_of_kernel_block(view, shape, block)
        case Part(inner, start, length, dim):
            whole, shape, block = _view_of_block(inner, shape, block)
            at = block[dim]
            first = min(max(start, at.start), at.stop)
            last = max(min(start + length, at.stop), first)
            mine = slice(first - start, last - start) if last > first else slice(0, 0)
            view = Part(whole, first - at.start, last - first, dim)
            return view, _replace_at(shape, dim, length), _replace_at(block, dim, mine)
        case Strided(inner, start, step):
            whole, shape, block = _view_of_block(inner, shape, block)
            at = block[-2]
            # The numbers of these rows before the start of the block, before its end, and in all.
            first, last, total = (
                max(-(-(end - start) // step), 0) for end in (at.start, at.stop, shape[-2])
            )
            view = Strided(whole, start + first * step - at.start, step)
            return view, _replace_at(shape, -2, total), _replace_at(block, -2, slice(first, last))
        case Member(inner, index):
            whole, shape, block = _view_of_block(inner, shape, block)
            here, rows, columns = block
            if here.start <= index < here.stop:
                return Member(whole, index - here.start), shape[1:], (rows, columns)
            # Another process stores this matrix; this one has none of its rows.
            absent = _Absent(columns.stop - columns.start)
            return absent, shape[1:], (slice(0, 0), columns)
    raise TypeError(f"{view} is not a view of a sharded parameter.")


def _view_of_kernel_block(
    view: Kernel, shape: torch.Size, block: Block
) -> tuple[View, torch.Size, Block]:
    out, columns, g = shape[0], shape[1:].numel(), view.groups
    if any(at != slice(0, size) for at, size in zip(block[1:], shape[1:], strict=True)):
        raise ValueError(
            "a convolution kernel can be sharded over its first dimension only. Exclude it with a "
            "pattern."
        )
    rows, every = block[0], slice(0, columns)
    if g is None:
        return view, torch.Size([out, columns]), (rows, every)
    each = out // g
    if rows.start % each or rows.stop % each:
        raise ValueError(
            f"a convolution kernel with {g} groups must be sharded by complete groups of {each} "
            f"rows, got rows {rows.start} to {rows.stop}. Exclude it with a pattern."
        )
    groups = slice(rows.start // each, rows.stop // each)
    view = Kernel(groups.stop - groups.start)
    return view, torch.Size([g, each, columns]), (groups, slice(0, each), every)


def _replace_at(items: Any, at: int, item: Any) -> Any:
    """Returns a copy with another item at one position."""
    changed = list(items)
    changed[at] = item
    return type(items)(changed)


@dataclass(frozen=True)
class _Absent:
    """A matrix without entries in this process."""

    columns: int

    def __call__(self, parameter: Tensor) -> Tensor:
        return parameter.new_empty(0, self.columns)

    def write_(self, parameter: Tensor, matrix: Tensor) -> None:
        pass
