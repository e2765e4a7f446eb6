"""Tensors of one file that share memory: the same one twice, a part of another, or a muddle."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from wellcond.weights.reasons import Reason, Skipped


def repeats(tensor: Tensor) -> bool:
    """Whether entries share memory, as they do in what `expand` returns."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach += stride * (size - 1)
    return False


def shared_memory(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Skipped], list[tuple[str, str]]]:
    """Which tensors are another one, or a part of it; and which pairs overlap otherwise."""
    skipped: dict[str, Skipped] = {}
    overlapping: list[tuple[str, str]] = []
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        layout = list(zip(tensor.stride(), tensor.shape, strict=True))
        # The transpose of a matrix is the same weight.
        steps = tuple(sorted(layout) if tensor.ndim == 2 else layout)
        where = (tensor.data_ptr(), tensor.dtype, steps)
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


def span(tensor: Tensor) -> int:
    """How many bytes there are from the first entry to the last."""
    steps = zip(tensor.stride(), tensor.shape, strict=True)
    return (1 + sum(stride * (size - 1) for stride, size in steps)) * tensor.itemsize


def _clusters(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of tensors the memory of which interleaves, several together."""
    cluster: list[str] = []
    stop = 0
    for name in sorted(tensors, key=lambda name: tensors[name].data_ptr()):
        start = tensors[name].data_ptr()
        if start >= stop:
            if len(cluster) > 1:
                yield cluster
            cluster = []
        cluster.append(name)
        stop = max(stop, start + span(tensors[name]))
    if len(cluster) > 1:
        yield cluster


def _owners(tensors: list[Tensor]) -> Iterator[tuple[int, int, bool]]:
    """Of a cluster from large to small: which has entries of which before, and whether all."""
    start = min(tensor.data_ptr() for tensor in tensors)
    size = max(tensor.data_ptr() + span(tensor) for tensor in tensors) - start
    if tensors[0].nbytes == size:  # it has everything
        yield from ((index, 0, True) for index in range(1, len(tensors)))
        return
    unit = math.gcd(*(n for t in tensors for n in (t.itemsize, t.data_ptr() - start)))
    owner = torch.full((size // unit,), -1, dtype=torch.int32, device="cpu")
    for index, tensor in enumerate(tensors):
        wide = tensor.itemsize // unit
        shape = (*tensor.shape, wide)
        strides = (*(stride * wide for stride in tensor.stride()), 1)
        view = owner.as_strided(shape, strides, (tensor.data_ptr() - start) // unit)
        least, most = int(view.min()), int(view.max())
        if most >= 0:
            yield index, most, least == most
        if least < most or most < 0:
            view.fill_(index)
