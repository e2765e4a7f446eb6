"""Matrices in float64, divided by a unit so that squares neither overflow nor vanish."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wellcond.linalg.checks import as_matrices, to_float64

NARROW = (torch.float32, torch.float16, torch.bfloat16)  # squares neither overflow nor vanish
_PIECE = 1 << 20  # entries that are converted at once


def split_scale(S: Tensor) -> tuple[Tensor, float]:
    """S/unit in float64 or complex128, and the unit: a power of two (exact), usually 1.

    Raises:
        ValueError: an entry is NaN or infinite.
    """
    wide = to_float64(S.detach())
    largest = float(torch.linalg.vector_norm(wide, math.inf))
    if 1e-100 < largest < 1e100 or largest == 0:
        return wide, 1.0
    if not math.isfinite(largest):
        as_matrices(S)  # raises
    unit = power_of_two(largest)
    return wide / unit, unit


def power_of_two(largest: float) -> float:
    """The largest power of two that is at most `largest`."""
    return 2.0 ** (math.frexp(largest)[1] - 1)


def frobenius_norm(S: Tensor) -> float:
    """||S||_F in float64; the squares of the entries may overflow or vanish.

    Raises:
        ValueError: an entry is NaN or infinite.
    """
    if S.device.type == "cpu" and S.dtype in NARROW:  # a copy would be larger than S
        flat = S.detach().cpu().flatten()
        starts = range(0, len(flat), _PIECE)
        pieces = (flat[start : start + _PIECE].double() for start in starts)
        norm = math.hypot(*(float(torch.linalg.vector_norm(piece)) for piece in pieces))
        if math.isfinite(norm):
            return norm
    wide, unit = split_scale(S)
    return float(torch.linalg.vector_norm(wide)) * unit
