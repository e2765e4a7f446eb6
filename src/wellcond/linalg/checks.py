"""Checks of arguments before any arithmetic: finite matrices, numbers and counts."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import torch
from torch import Tensor


def check_matrices(S: Tensor) -> None:
    """Raises unless S is a batch of real or complex matrices with rows and columns."""
    if not isinstance(S, Tensor):
        raise TypeError(f"`S` must be a torch.Tensor or a NumPy array, got {type(S).__name__}.")
    if hasattr(S, "full_tensor"):
        raise TypeError(
            "`S` must not be a DTensor. Pass S.full_tensor(), which all processes must call."
        )
    if holds_codes(S):
        raise TypeError(
            f"`S` must hold real or complex floating-point values, got {S.dtype}, which holds "
            "codes. Dequantise it first by applying its scales. If the entries are the values "
            "themselves, convert it: S.double()."
        )
    if S.layout != torch.strided:
        raise TypeError(f"`S` must be dense, got the layout {S.layout}. Pass S.to_dense().")
    if lacks_values(S):
        raise ValueError(
            f"`S` must have values, got a meta tensor of shape {tuple(S.shape)}. "
            "Load the weights first."
        )
    if S.ndim < 2:
        raise ValueError(
            f"`S` must have at least 2 dimensions, got shape {tuple(S.shape)}. "
            "A vector has no condition number; S[None] makes it a matrix of one row."
        )
    if S.shape[-1] == 0 or S.shape[-2] == 0:
        raise ValueError(f"`S` must have rows and columns, got shape {tuple(S.shape)}.")


def holds_codes(S: Tensor) -> bool:
    """Whether the entries are integers, booleans or floats of at most 8 bits.

    The meaning of such an entry depends on a scale that is stored elsewhere.
    """
    return not (S.is_complex() or (S.is_floating_point() and S.itemsize > 1))


def lacks_values(S: Tensor) -> bool:
    """Whether S is a meta tensor; a subclass may hold its values elsewhere."""
    return S.is_meta and type(S) in (Tensor, torch.nn.Parameter)


def as_matrices(S: Tensor) -> Tensor:
    """S in float64 or complex128; raises unless it is a batch of finite, non-empty matrices."""
    check_matrices(S)
    wide = to_float64(S)
    if not torch.isfinite(wide).all():
        count = int((~torch.isfinite(wide)).sum())
        raise ValueError(
            f"`S` must be finite, got {count} NaN or infinite of {S.numel()} entries. "
            "Look for the step at which they appeared."
        )
    return wide


def to_float64(S: Tensor) -> Tensor:
    """S in float64, or complex128, on the CPU if its own device has no float64."""
    dtype = torch.complex128 if S.is_complex() else torch.float64
    try:
        return S.to(dtype)
    except TypeError:  # raised on Apple's GPUs
        return S.cpu().to(dtype)


def real_form(S: Tensor) -> Tensor:
    """[[A, -B], [B, A]] for a complex S = A + iB, which has each singular value of S twice.

    A real S is returned as it is.
    """
    if not S.is_complex():
        return S
    A, B = S.real, S.imag
    rows = torch.cat([A, -B], dim=-1), torch.cat([B, A], dim=-1)
    return torch.cat(rows, dim=-2)


def as_number(value: Any, name: str, demand: str = "a number") -> float:
    """Converts a real number of Python, NumPy or torch to a Python number.

    Raises:
        TypeError: it is not a number; strings and booleans are not.
    """
    known = value.item() if getattr(value, "ndim", None) == 0 else value
    if isinstance(known, bool) or not isinstance(known, numbers.Real):
        raise TypeError(f"{name} must be {demand}, got {type(value).__name__}.")
    return known if isinstance(known, int | float) else float(known)


def as_count(value: Any, name: str) -> int:
    """Converts a positive integer of Python, NumPy or torch to an int.

    Raises:
        ValueError: it is not a positive integer.
    """
    known = value.item() if getattr(value, "ndim", None) == 0 else value
    try:
        count = 0 if isinstance(known, bool) else operator.index(known)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    return count
