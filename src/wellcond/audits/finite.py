"""Searches all tensors of a model or a file for NaN and infinity."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial

import torch

from wellcond.audits.attempt import attempt
from wellcond.audits.executor import Executor
from wellcond.files.pieces import Pieces
from wellcond.report.not_finite import NotFinite
from wellcond.text import last_part

# The ends of a range, which can be infinite, such as those of an observer without any data yet.
_BOUNDS = {"min", "max", "low", "high", "lower", "upper", "bound", "bounds", "best"}


def not_finite_in(
    tensors: Mapping[str, Pieces],
    masks: Collection[str] = (),
    weights: Collection[str] = (),
    sizes: Mapping[str, int] | None = None,
    executor: Executor | None = None,
    kind: str = "search",
) -> tuple[dict[str, NotFinite], dict[str, str]]:
    """The tensors with NaN or infinity by name, and those that cannot be read.

    Values that are infinite by design are ignored: -inf in a mask, which `masks` or its name
    identifies, and the infinite ends of a range, which its name identifies. In `weights`, no value
    is ignored. `sizes`, the numbers of entries, determine how processes share the work.
    """
    names, pieces = [*tensors], [*tensors.values()]
    work = [(sizes or {}).get(name, 0) + 1.0 for name in names]

    def count(chosen: Sequence[int]) -> Iterator[tuple[int, int, int, bool] | str]:
        for index in chosen:
            yield attempt(partial(_count, pieces[index]))

    found, unread = {}, {}
    counts = (executor or Executor()).map(kind, names, work, count)
    for name, one in zip(names, counts, strict=True):
        if isinstance(one, str):
            unread[name] = str(one)
            continue
        *numbers, negative = one
        counted = NotFinite(*numbers)
        meant = name not in weights and not counted.nan and _is_by_design(name, negative, masks)
        if (counted.nan or counted.infinite) and not meant:
            found[name] = counted
    return found, unread


def _count(pieces: Pieces) -> tuple[int, int, int, bool]:
    """The numbers of NaN, of infinities and of entries, and whether only -inf is not finite."""
    nan = infinite = negative = entries = 0
    for piece in pieces():
        entries += piece.numel()
        if piece.is_complex():
            piece = torch.view_as_real(piece.resolve_conj())
        elif piece.itemsize == 1:  # torch does not compute with float8
            piece = piece.to(torch.float32)
        if not piece.numel() or all(math.isfinite(end) for end in piece.aminmax()):
            continue
        nan += int(piece.isnan().sum())
        infinite += int(piece.isinf().sum())
        negative += int(piece.isneginf().sum())
    return nan, infinite, entries, nan + infinite == negative


def _is_by_design(name: str, negative: bool, masks: Collection[str]) -> bool:
    """Whether infinities are by design; `negative` states that all of them are -inf."""
    last = last_part(name.lower())
    mask = name in masks or re.search("mask|causal|attn_bias|attention_bias", last) is not None
    return (mask and negative) or not _BOUNDS.isdisjoint(last.split("_"))
