"""Yields the entries of a tensor in pieces, so that a tensor of any size needs little memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

Pieces = Callable[[], Iterable[Tensor]]
_PIECE = 1 << 22  # entries


def pieces_of(tensor: Tensor) -> Iterator[Tensor]:
    """Yields the entries of a tensor in memory, if it stores floating point or complex entries."""
    floating = tensor.is_floating_point() or tensor.is_complex()
    if tensor.is_meta or not (floating and _convertible(tensor.dtype)):
        return
    if tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        tensor = tensor.values()
    elif tensor.layout is torch.sparse_coo:
        tensor = tensor._values()
    steps = zip(tensor.stride(), tensor.shape, strict=True)
    stored = 1 + sum(stride * (length - 1) for stride, length in steps)
    if stored < tensor.numel():  # entries share memory, as after `expand`
        tensor = tensor.as_strided((stored,), (1,))
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        yield from (flat[start : start + _PIECE] for start in range(0, flat.numel(), _PIECE))
    else:
        yield tensor


@functools.cache
def _convertible(dtype: torch.dtype) -> bool:
    """Returns whether torch computes with a dtype; it does not with pairs of float4 in a byte."""
    try:
        wide = torch.complex64 if dtype.is_complex else torch.float32
        torch.empty(1, dtype=dtype, device="cpu").to(wide)
    except (NotImplementedError, RuntimeError):
        return False
    return True
