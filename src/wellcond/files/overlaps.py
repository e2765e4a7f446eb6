"""Tensors of one file that share memory: tied tensors, parts of others, and other overlaps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from wellcond.files.inert import StoredTensor
from wellcond.weights.reasons import Reason, Skipped


def repeats(tensor: StoredTensor) -> bool:
    """Returns whether entries of a tensor share memory, as after `expand`."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride, tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach += stride * (size - 1)
    return False


def shared_memory(
    tensors: Mapping[str, StoredTensor],
) -> tuple[dict[str, Skipped], list[tuple[str, str]]]:
    """Finds tensors that are another tensor or a part of one, and pairs that overlap otherwise."""
    skipped: dict[str, Skipped] = {}
    overlapping: list[tuple[str, str]] = []
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        layout = list(zip(tensor.stride, tensor.shape, strict=True))
        # The transpose of a matrix is the same weight.
        steps = tuple(sorted(layout) if len(layout) == 2 else layout)
        where = (tensor.key, tensor.start, tensor.dtype, steps)
        if first.setdefault(where, name) != name:
            skipped[name] = Skipped(Reason.same, first[where])
    for cluster in _clusters({name: tensors[name] for name in first.values()}):
        names = sorted(cluster, key=lambda name: -tensors[name].nbytes)
        for index, owner, whole in _owners([tensors[name] for name in names]):
            if whole:
                skipped[names[index]] = Skipped(Reason.part, names[owner])
            else:
                overlapping.append((names[index], names[owner]))
    return skipped, overlapping


def _clusters(tensors: Mapping[str, StoredTensor]) -> Iterator[list[str]]:
    """Yields the names of each group of tensors with interleaved memory."""
    cluster: list[str] = []
    end = ("", 0)
    for name in sorted(tensors, key=lambda name: (tensors[name].key, tensors[name].start)):
        tensor = tensors[name]
        if (tensor.key, tensor.start) >= end:
            if len(cluster) > 1:
                yield cluster
            cluster = []
        cluster.append(name)
        end = max(end, (tensor.key, tensor.start + tensor.span))
    if len(cluster) > 1:
        yield cluster


def _owners(tensors: list[StoredTensor]) -> Iterator[tuple[int, int, bool]]:
    """Yields the tensors, sorted from large to small, that share entries with an earlier one.

    Each result contains the index of the tensor, the index of the earlier tensor, and whether this
    contains all entries of the tensor.
    """
    start = min(tensor.start for tensor in tensors)
    size = max(tensor.start + tensor.span for tensor in tensors) - start
    if tensors[0].nbytes == size:  # the largest contains all others
        yield from ((index, 0, True) for index in range(1, len(tensors)))
        return
    unit = math.gcd(*(n for t in tensors for n in (t.dtype.itemsize, t.start - start)))
    owner = torch.full((size // unit,), -1, dtype=torch.int32, device="cpu")
    for index, tensor in enumerate(tensors):
        wide = tensor.dtype.itemsize // unit
        shape = (*tensor.shape, wide)
        strides = (*(stride * wide for stride in tensor.stride), 1)
        view = owner.as_strided(shape, strides, (tensor.start - start) // unit)
        least, most = int(view.min()), int(view.max())
        if most >= 0:
            yield index, most, least == most
        if least < most or most < 0:
            view.fill_(index)
