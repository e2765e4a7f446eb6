"""Computes values for many tensors: reuses those of an earlier audit, and shares out the rest."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from wellcond.audits.device import CPU
from wellcond.audits.resume import Key, Record

if TYPE_CHECKING:
    from wellcond.audits.processes import Group

T = TypeVar("T")


class Executor:
    """Computes values one after the other, with several processes and after an interruption.

    Args:
        group: the processes that share the work; None for a single process.
        record: the file that stores the computed values; None for no file.
        device: the device that computes the singular values of matrices.
    """

    def __init__(
        self,
        group: Group | None = None,
        record: Record | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.group, self.record, self.device = group, record, device
        self.known: dict[Key, Any] = {} if record is None else record.known
        if group is not None and record is not None:  # each process may see different files
            self.known = {}
            for found in group.exchange("known", record.known):
                self.known |= found

    def map(
        self,
        kind: str,
        names: Sequence[str],
        work: Sequence[float],
        compute: Callable[[Sequence[int]], Iterator[T]],
    ) -> list[T]:
        """The values of all items in order, on every process.

        Args:
            kind: the name of the computation; each kind is computed once.
            names: the names of the items.
            work: the time that each item requires, in any unit.
            compute: yields the values of the items with the given indices, in their order.
        """
        keys = [(kind, index, name) for index, name in enumerate(names)]
        values: dict[int, T] = {
            i: self.known[key] for i, key in enumerate(keys) if key in self.known
        }
        own = [index for index in range(len(keys)) if index not in values]
        if self.group is not None:
            shares = deal([work[index] for index in own], self.group.size)
            own = [own[index] for index in shares[self.group.rank]]
            with self.group.fatal():
                computed = self._compute(keys, own, compute)
            for found in self.group.exchange(kind, computed):
                values |= found
        else:
            values |= self._compute(keys, own, compute)
        return [values[index] for index in range(len(keys))]

    def _compute(
        self,
        keys: Sequence[Key],
        own: Sequence[int],
        compute: Callable[[Sequence[int]], Iterator[T]],
    ) -> dict[int, T]:
        values = {}
        for index, value in zip(own, compute(own), strict=True):
            if self.record is not None:
                self.record.add(keys[index], value)
            values[index] = value
        return values


def deal(work: Sequence[float], count: int) -> list[list[int]]:
    """Deals items to `count` processes: the largest first, to the least loaded (Graham, 1969)."""
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [(0.0, number) for number in range(count)]
    for index in sorted(range(len(work)), key=lambda index: -work[index]):
        load, number = heapq.heappop(loads)
        shares[number].append(index)
        heapq.heappush(loads, (load + work[index], number))
    return [sorted(share) for share in shares]
