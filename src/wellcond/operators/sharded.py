"""Weights and work that are shared by the processes of a group: all that knows torch.distributed.

A `ShardedMatrix` is a DTensor as a linear map: each process multiplies its own block, and what is
summed over the group are skinny factors. The weight itself is never gathered. `Replicas` are
processes that hold the same weights: each refines a share of them and hands the results on.

Letters: S (..., m, n) the weight, of which this process holds one block; U (..., m, k) and
V (..., n, k) skinny, the same on all processes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from wellcond.operators.stored import StoredMatrix
from wellcond.operators.views import Part, View

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Block = tuple[slice, ...]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor. There can be none as long as nobody has imported its module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def refuse_flat_parameters(model: nn.Module) -> None:
    """Raises for the first FSDP, which lays all weights of a unit end to end in one vector."""
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__name__ == "FullyShardedDataParallel" and kind.__module__.startswith("torch."):
            raise ValueError(
                f'`model` must not be wrapped by FullyShardedDataParallel, but "{name}" is: '
                "its flat parameters keep no matrix. Use torch.distributed.fsdp.fully_shard, which "
                "keeps every weight as a DTensor."
            )


def operator_of(view: View, tensor: Tensor | Any, seed: int = 0) -> StoredMatrix:
    """A parameter or a gradient, seen through a view, as an operator."""
    if is_sharded(tensor):
        return ShardedMatrix(view, tensor, seed)
    return StoredMatrix(view(tensor), seed)


class ShardedMatrix(StoredMatrix):
    """A matrix, or a stack of them, of which this process holds the block `S` at `block`."""

    def __init__(self, view: View, tensor: Any, seed: int = 0) -> None:
        local, shape, self.block = _seen(view, tensor)
        # By its place: processes that hold the same block round it alike.
        place = sum(at.start * 1_000_003**dim for dim, at in enumerate(self.block))
        super().__init__(local, (seed + place) % 2**63)
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

    def partial_squared_norm(self) -> Tensor:
        return self._placed(super().partial_squared_norm())

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

    def update_(self, c: Tensor, U: Tensor, V: Tensor) -> None:
        super().update_(*self._of_block(c, U, V))

    def add_(self, c: Tensor, S: StoredMatrix, U: Tensor, V: Tensor) -> None:
        c, U, V = self._of_block(c, U, V)
        super().add_(c, S, U, V)

    def _of_block(self, c: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *stack, rows, columns = self.block
        return c[tuple(stack)] if c.ndim else c, U[(*stack, rows)], V[(*stack, columns)]


def _seen(view: View, tensor: Any) -> tuple[Tensor, torch.Size, Block]:
    """The local block of a DTensor seen through a view, the shape of the whole, and its place."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError("a weight must be sharded or replicated, but its placement is Partial.")
    if isinstance(view, Part):
        return _part(view, *_seen(view.view, tensor))
    # The views that are no parts act on a DTensor as on any tensor and communicate nothing, unless
    # they merge a dimension that is sharded.
    merges = view(torch.empty(tensor.shape, device="meta")).ndim < tensor.ndim
    if merges and any(getattr(p, "dim", 0) != 0 for p in tensor.placements):
        raise ValueError(
            "a convolution kernel may be sharded over its first dimension only, but has placements "
            f"{tensor.placements}. Leave it out with a pattern."
        )
    seen: Any = view(tensor)
    shape, offset = compute_local_shape_and_global_offset(
        seen.shape, seen.device_mesh, seen.placements
    )
    block = tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))
    return view(tensor.to_local()), seen.shape, block


def _part(part: Part, local: Tensor, shape: torch.Size, block: Block) -> tuple[Tensor, Any, Block]:
    held, rest = block[0], block[1:]
    length = 1 if part.length is None else part.length
    start = min(max(part.start, held.start), held.stop)
    stop = max(min(part.start + length, held.stop), start)
    mine = local.narrow(0, start - held.start, stop - start)
    if part.length is not None:
        at = slice(start - part.start, stop - part.start) if stop > start else slice(0, 0)
        return mine, torch.Size([part.length, *shape[1:]]), (at, *rest)
    if stop > start:
        return mine[0], shape[1:], rest
    # Another process holds this matrix: of it, this one has no rows.
    empty = local.new_empty(*local.shape[1:-2], 0, local.shape[-1])
    return empty, shape[1:], (*rest[:-2], slice(0, 0), rest[-1])


class Replicas:
    """Processes that hold the same weights, as under DistributedDataParallel.

    Every one refines the weights it owns, and receives the results for the others byte for byte,
    so that all remain identical whatever the rounding of each.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank: int = torch.distributed.get_rank(group)
        self.size: int = torch.distributed.get_world_size(group)

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Who refines which weight: the dearest first, each to the least busy process."""
        load = [0.0] * self.size
        owners = [0] * len(costs)
        for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owners[index] = load.index(min(load))
            load[owners[index]] += costs[index]
        return owners

    def exchange_(self, tensors: Sequence[tuple[int, Tensor]]) -> None:
        """Fills the tensors of other owners, given with theirs in the same order everywhere."""
        sizes = [0] * self.size
        for owner, tensor in tensors:
            sizes[owner] += _size(tensor)
        if not any(sizes):
            return
        mine = [_bytes(tensor) for owner, tensor in tensors if owner == self.rank]
        sent = torch.zeros(max(sizes), dtype=torch.uint8, device=tensors[0][1].device)
        if mine:
            torch.cat(mine, out=sent[: sizes[self.rank]])
        received = [torch.empty_like(sent) for _ in range(self.size)]
        torch.distributed.all_gather(received, sent, group=self.group)
        at = [0] * self.size
        for owner, tensor in tensors:
            start, at[owner] = at[owner], at[owner] + _size(tensor)
            if owner != self.rank:
                part = received[owner][start : at[owner]].clone()
                tensor.copy_(part.view(tensor.dtype).view(tensor.shape))

    def differing(self, tensors: Sequence[Tensor]) -> list[int]:
        """The numbers of the tensors that are not the same bytes on all processes."""
        sums = torch.stack([_checksum(tensor) for tensor in tensors])
        low, high = sums.clone(), sums.clone()
        torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN, group=self.group)
        torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX, group=self.group)
        return torch.nonzero(low != high)[:, 0].tolist()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _checksum(tensor: Tensor) -> Tensor:
    """The sum of the entries, their bits read as whole numbers, modulo 2^64."""
    return tensor.detach().view(_WHOLE[tensor.element_size()]).sum(dtype=torch.int64)


def replicas_of(model: nn.Module, group: Any = None) -> Replicas | None:
    """The processes that hold the same model: of the group, or of DistributedDataParallel."""
    if group is None and type(model).__name__ == "DistributedDataParallel":
        group = model.process_group
    if group is None or torch.distributed.get_world_size(group) == 1:
        return None
    return Replicas(group)
