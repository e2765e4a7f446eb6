"""A DTensor as a linear map: each process multiplies its own block, and skinny factors are summed.

The weight itself is never gathered.

Letters: S (..., m, n) the weight, of which this process holds one block; U (..., m, k) and
V (..., n, k) skinny, the same on all processes.
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

# What may be sharded and what not is asked of placements, which are the same on all processes;
# blocks are not: a process may hold nothing.
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
        self.tensor, self.whole_view = tensor.detach(), view
        view, shape, self.block = _view_of_block(view, tensor.shape, _block_of(tensor))
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

    @property
    def is_one_map(self) -> bool:
        return False  # its groups may be spread over processes

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

    def partial_squared_frobenius_norm(self, dtype: torch.dtype | None = None) -> Tensor:
        return self._place(super().partial_squared_frobenius_norm(dtype))

    def _place(self, values: Tensor) -> Tensor:
        """What is known of each matrix, zero for those of which nothing is held here."""
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
            "it needs the whole weight in one place, but that is sharded over processes. Use "
            "ConditionLimit, SingularValueLimit or a penalty, which leave it where it is."
        )

    def gather(self) -> StoredMatrix:
        """A copy of the whole on every process, all of which must ask for it."""
        return self._redistribute(whole=True)[0]

    @property
    def upright(self) -> bool:
        """Of a square matrix both Gram matrices are as small: that of the side in parts."""
        m, n = self.shape[-2:]
        return m > n or (m == n and -1 not in self._axes())

    def gram(self, dtype: torch.dtype | None = None, unit: Tensor | None = None) -> Tensor:
        """A sum over processes; where they have the short side in parts, of a copy."""
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
        """Whether every process has all of the side that the Gram matrix is of."""
        return (-1 if self.upright else -2) not in self._axes()

    def _axes(self) -> set[int]:
        """Over which dimensions of the matrix it is sharded: -2, -1, less for those of a stack."""
        return {_axis(self.whole_view, dim, self.tensor.ndim) for dim in _sharded_dims(self.tensor)}

    @contextlib.contextmanager
    def spread(self, whole: bool = False) -> Iterator[StoredMatrix]:
        """Itself where its short side is whole; else a copy that is, carried back afterwards.

        One that has its long side in parts, at the cost of an all-to-all; where that cannot be had,
        as of kernels, or if asked for: the whole weight on every process. For a stack that
        is sharded by matrices, those that are held here; a single one goes to every process.
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
        # Not all of the parameter: other views of it may have changed meanwhile.
        with writable(self.view, self.parameter) as S:
            S.copy_(self.view(brought))

    def _redistribute(self, whole: bool = False) -> tuple[StoredMatrix, Any]:
        """A copy with its short side whole, if it can be had with its long side in parts."""
        long = -2 if self.shape[-2] > self.shape[-1] else -1
        tensor = None if whole else self._by_its_long_side(long)
        if tensor is not None:
            return ShardedMatrix(tensor, self.whole_view, self.seed), tensor
        full = self.tensor.full_tensor()
        return _Gathered(full, self.whole_view, self.tensor.device_mesh, self.seed), full

    def _take_own_part(self, tensor: Any) -> Tensor:
        """The part that is held here of a tensor that is laid out so."""
        if not is_sharded(tensor):
            part: Tensor = tensor[_block_of(self.tensor)]
            return part
        local: Tensor = tensor.redistribute(placements=self.tensor.placements).to_local()
        return local

    def _by_its_long_side(self, long: int) -> Any | None:
        """A copy of the parameter that is sharded over this dimension of the matrix alone."""
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
    """The whole of a matrix on every process of a mesh, on which they go on agreeing."""

    def __init__(self, full: Tensor, view: View, mesh: Any, seed: int = 0) -> None:
        super().__init__(full, view, seed)
        self.mesh = mesh

    def agree(self, compute: Callable[[], Sequence[Tensor]], *like: Tensor) -> list[Tensor]:
        return _broadcast_first(self.mesh.get_all_groups(), compute, like)


class _LocalStack(StoredMatrix):
    """The matrices that this process holds of a stack that is sharded by matrices."""

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
    """What the first process of the groups, which are those of a mesh, computes, handed on."""
    first = all(torch.distributed.get_rank(group) == 0 for group in groups)
    told = [one.contiguous() for one in compute()] if first else [torch.empty_like(x) for x in like]
    for group in groups:
        for one in told:
            torch.distributed.broadcast(one, torch.distributed.get_global_rank(group, 0), group)
    return told


def _sharded_dims(tensor: Any) -> set[int]:
    """The dimensions of a DTensor that are in parts; a strided placement denies that it shards."""
    pairs = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    return {placement.dim for placement, size in pairs if size > 1 and not placement.is_replicate()}


def _axis(view: View, dim: int, ndim: int) -> int:
    """The dimension of the matrix to which that of the parameter belongs, counted from the end."""
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
        raise ValueError("a weight must be sharded or replicated, but its placement is Partial.")
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))


def _view_of_block(view: View, shape: torch.Size, block: Block) -> tuple[View, torch.Size, Block]:
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
            # How many of these rows are before what is held here, before its end, and in all.
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
            # Another process holds this matrix: of it, this one has no rows.
            absent = _Absent(columns.stop - columns.start)
            return absent, shape[1:], (slice(0, 0), columns)
    raise TypeError(f"{view} is not a view of a sharded parameter.")


def _view_of_kernel_block(
    view: Kernel, shape: torch.Size, block: Block
) -> tuple[View, torch.Size, Block]:
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


def _replace_at(items: Any, at: int, item: Any) -> Any:
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
