"""Tensors of one file that share memory: the same one twice, a part of another, or a muddle."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from wellcond.files.inert import StoredTensor
from wellcond.weights.reasons import Reason, Skipped


def repeats(tensor: StoredTensor) -> bool:
    """Whether entries share memory, as they do in what `expand` returns."""
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
    """Which tensors are another one, or a part of it; and which pairs overlap otherwise."""
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
    """Names of tensors the memory of which interleaves, several together."""
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
    """Which tensor of a cluster, from large to small, has entries of which before; whether all."""
    start = min(tensor.start for tensor in tensors)
    size = max(tensor.start + tensor.span for tensor in tensors) - start
    if tensors[0].nbytes == size:  # it has everything
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
