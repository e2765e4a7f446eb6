"""Processes with the same weights: each refines a share of them and sends the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wellcond.weights.discover import wrappings


class Replicas:
    """Processes with the same weights, as under DistributedDataParallel.

    Each process refines the weights that it owns and receives the results for the others byte for
    byte, so all processes remain identical even if they round differently.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank: int = torch.distributed.get_rank(group)
        self.size: int = torch.distributed.get_world_size(group)

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Assigns weights to processes: the most expensive first, each to the least busy one."""
        load = [0.0] * self.size
        owners = [0] * len(costs)
        for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owners[index] = load.index(min(load))
            load[owners[index]] += costs[index]
        return owners

    def exchange_(self, tensors: Sequence[tuple[int, Tensor]]) -> None:
        """Fills the tensors of other owners. The order is the same on all processes."""
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
        """The indices of the tensors whose bytes differ between processes."""
        sums = torch.stack([checksum(tensor) for tensor in tensors])
        low, high = sums.clone(), sums.clone()
        torch.distributed.all_reduce(low, torch.distributed.ReduceOp.MIN, group=self.group)
        torch.distributed.all_reduce(high, torch.distributed.ReduceOp.MAX, group=self.group)
        return torch.nonzero(low != high)[:, 0].tolist()


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> Tensor:
    """The sum modulo 2^64 of the entries, whose bits are read as integers."""
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
    return bits.sum(dtype=torch.int64)


def _many() -> bool:
    known = torch.distributed.is_available() and torch.distributed.is_initialized()
    return known and torch.distributed.get_world_size() > 1


def replicas_of(model: nn.Module, group: Any = None, check: bool = False) -> Replicas | None:
    """The processes with the same model: those of the group, or of DistributedDataParallel.

    Raises:
        ValueError: there are several processes to check, but the group is unknown.
    """
    for one in wrappings(model):
        if group is None and isinstance(one, nn.parallel.DistributedDataParallel):
            group = one.process_group
    if group is None and check and _many():
        raise ValueError(
            "`check_replicas` needs the group of processes that have the same model. Pass the "
            "model wrapped in DistributedDataParallel, or `process_group=`."
        )
    if group is None or torch.distributed.get_world_size(group) == 1:
        return None
    return Replicas(group)
