"""NaN and infinity in the tensors of a model or a file, whether they are matrices or not."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from wellcond.text import and_more, last_part

# The entries of a tensor in parts, so that one of any size is read in little memory.
Pieces = Callable[[], Iterable[Tensor]]
_PIECE = 1 << 22  # entries
# The first and the last value of a range, which may be infinite, such as those of an observer that
# has seen nothing yet.
_BOUNDS = {"min", "max", "low", "high", "lower", "upper", "bound", "bounds", "best"}


@dataclass(frozen=True)
class NotFinite:
    """How many entries of a tensor are not finite.

    Attributes:
        nan: how many are NaN.
        infinite: how many are infinite, of either sign.
        entries: how many entries the tensor has.

    Example:
        >>> import torch, wellcond as wc
        >>> layer = torch.nn.Linear(3, 2)
        >>> layer.bias.data[0] = torch.nan
        >>> print(wc.audit(layer).not_finite["bias"])
        1 NaN of 2 entries
    """

    nan: int
    infinite: int
    entries: int

    def __str__(self) -> str:
        counts = ((self.nan, "NaN"), (self.infinite, "infinite"))
        found = " and ".join(f"{count:,} {what}" for count, what in counts if count)
        return f"{found} of {self.entries:,} entries"


def not_finite_in(
    tensors: Mapping[str, Pieces],
    masks: Collection[str] = (),
    weights: Collection[str] = (),
) -> tuple[dict[str, NotFinite], dict[str, Exception]]:
    """The tensors with NaN or infinity by name, and those that cannot be read.

    What is infinite by design is left out: -inf in a mask, which `masks` or the name itself calls
    one, and the infinite ends of a range, by name. In `weights` nothing is.
    """
    found, unread = {}, {}
    for name, pieces in tensors.items():
        try:
            counted, negative = _count(pieces())
        except Exception as error:  # whatever it is, the other tensors are still to be read
            unread[name] = error
            continue
        meant = name not in weights and not counted.nan and _is_by_design(name, negative, masks)
        if (counted.nan or counted.infinite) and not meant:
            found[name] = counted
    return found, unread


def describe_not_finite(found: Mapping[str, NotFinite]) -> str:
    """One line with the number of tensors and the first names, or "" if all are finite."""
    if not found:
        return ""
    named = and_more((f"{name} ({counts})" for name, counts in found.items()), limit=3)
    return f"{len(found)} tensor{'s hold' if len(found) > 1 else ' holds'} NaN or infinity: {named}"


def to_list(found: Mapping[str, NotFinite]) -> list[dict[str, object]]:
    """As plain data."""
    return [
        {"name": name, "nan": one.nan, "infinite": one.infinite, "entries": one.entries}
        for name, one in found.items()
    ]


def pieces_of(tensor: Tensor) -> Iterator[Tensor]:
    """The entries of a tensor in memory; none of one without floating point entries of its own."""
    floating = tensor.is_floating_point() or tensor.is_complex()
    if tensor.is_meta or not (floating and _convertible(tensor.dtype)):
        return
    if tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        tensor = tensor.values()
    elif tensor.layout is torch.sparse_coo:
        tensor = tensor._values()
    steps = zip(tensor.stride(), tensor.shape, strict=True)
    stored = 1 + sum(stride * (length - 1) for stride, length in steps)
    if stored < tensor.numel():  # entries share memory, as of what `expand` returns
        tensor = tensor.as_strided((stored,), (1,))
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        yield from (flat[start : start + _PIECE] for start in range(0, flat.numel(), _PIECE))
    else:
        yield tensor


@functools.cache
def _convertible(dtype: torch.dtype) -> bool:
    """Whether torch computes with it; it does not with pairs of float4 in a byte."""
    try:
        wide = torch.complex64 if dtype.is_complex else torch.float32
        torch.empty(1, dtype=dtype, device="cpu").to(wide)
    except (NotImplementedError, RuntimeError):
        return False
    return True


def _count(pieces: Iterable[Tensor]) -> tuple[NotFinite, bool]:
    """How many are not finite, and whether all of these are -inf."""
    nan = infinite = negative = entries = 0
    for piece in pieces:
        entries += piece.numel()
        if piece.is_complex():
            piece = torch.view_as_real(piece.resolve_conj())
        elif piece.itemsize == 1:  # torch computes nothing with float8
            piece = piece.to(torch.float32)
        if not piece.numel() or all(math.isfinite(end) for end in piece.aminmax()):
            continue
        nan += int(piece.isnan().sum())
        infinite += int(piece.isinf().sum())
        negative += int(piece.isneginf().sum())
    return NotFinite(nan, infinite, entries), nan + infinite == negative


def _is_by_design(name: str, negative: bool, masks: Collection[str]) -> bool:
    """Of a tensor without NaN; `negative` says that all that is infinite is -inf."""
    last = last_part(name.lower())
    mask = name in masks or re.search("mask|causal|attn_bias|attention_bias", last) is not None
    return (mask and negative) or not _BOUNDS.isdisjoint(last.split("_"))
