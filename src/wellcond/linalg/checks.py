"""What is refused before any arithmetic: what is no finite real matrix."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import torch
from torch import Tensor


def check_matrices(S: Tensor) -> None:
    """Raises unless S is a batch of real matrices with rows and columns."""
    if not isinstance(S, Tensor):
        raise TypeError(f"`S` must be a torch.Tensor, got {type(S).__name__}.")
    if hasattr(S, "full_tensor"):
        raise TypeError(
            "`S` must be whole, got a DTensor. Give S.full_tensor(), on all processes together."
        )
    if not S.is_floating_point():
        raise TypeError(
            f"`S` must be a real floating-point tensor, got {S.dtype}. "
            "Convert it first, for instance with S.to(torch.float64)."
        )
    if S.ndim < 2:
        raise ValueError(
            f"`S` must have at least 2 dimensions, got shape {tuple(S.shape)}. "
            "A vector has no condition number; S[None] makes it a matrix of one row."
        )
    if S.shape[-1] == 0 or S.shape[-2] == 0:
        raise ValueError(f"`S` must have rows and columns, got shape {tuple(S.shape)}.")


def as_matrices(S: Tensor) -> Tensor:
    """S in float64, refused unless it is a batch of finite, real matrices with rows and columns."""
    check_matrices(S)
    wide = in_float64(S)
    if not torch.isfinite(wide).all():
        count = int((~torch.isfinite(wide)).sum())
        raise ValueError(
            f"`S` must be finite, got {count} NaN or infinite of {S.numel()} entries. "
            "Look for the step at which they appeared."
        )
    return wide


def in_float64(S: Tensor) -> Tensor:
    """S in float64, on the CPU if its own device has no float64."""
    try:
        return S.to(torch.float64)
    except TypeError:  # what Apple's GPUs answer
        return S.cpu().to(torch.float64)


def as_number(value: Any, name: str, demand: str = "a number") -> float:
    """A real number of Python, NumPy or torch as one of Python.

    Raises:
        TypeError: it is none, as text and truth values are not.
    """
    known = value.item() if getattr(value, "ndim", None) == 0 else value
    if isinstance(known, bool) or not isinstance(known, numbers.Real):
        raise TypeError(f"{name} must be {demand}, got {type(value).__name__}.")
    return known if isinstance(known, int | float) else float(known)


def as_count(value: Any, name: str) -> int:
    """A positive integer of Python, NumPy or torch as an int.

    Raises:
        ValueError: it is none.
    """
    known = value.item() if getattr(value, "ndim", None) == 0 else value
    try:
        count = 0 if isinstance(known, bool) else operator.index(known)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    return count
