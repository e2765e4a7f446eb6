"""Arithmetic that several quantised formats share: scales, packed words, small floats."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 1024  # rows to convert at once, so that the codes need little memory next to the weight
# The 16 values of float4 (E2M1) by code.
FLOAT4 = torch.tensor(
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0],
    device="cpu",
)
# The two values of a byte, the one in the low bits first.
_PAIRS = torch.stack([FLOAT4.repeat(16), FLOAT4.repeat_interleave(16)], dim=-1)


def row_ranges(rows: int, step: int = ROWS) -> Iterator[tuple[int, int]]:
    """Ranges (start, stop) of at most `step` rows that cover all rows."""
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def powers_of_two(exponents: Tensor) -> Tensor:
    """2^(b - 127) in float32 for bytes b of E8M0; 255 is NaN.

    The byte 0 is 2^-127, a subnormal number in float32.
    """
    b = exponents.view(torch.uint8).to(torch.int32)
    powers = torch.ldexp(torch.ones_like(b, dtype=torch.float32), b - 127)
    return powers.masked_fill_(b == 255, torch.nan)


def as_scales(scales: Tensor) -> Tensor:
    """Converts scales of any dtype to float32; bytes and E8M0 are exponents of two."""
    if scales.dtype == torch.uint8 or "e8m0" in str(scales.dtype):
        return powers_of_two(scales)
    return scales.to(torch.float32)


def unpack(words: Tensor, bits: int, size: int) -> Tensor:
    """Unpacks codes from words along the last side, the lowest bits first.

    Args:
        words: integers (..., w) of 8 or 32 bits; no code crosses from one word to the next.
        bits: the number of bits per code.
        size: the number of codes along the last side, at most the number that fits.

    Returns:
        (..., size), int16.
    """
    width = 8 * words.element_size()
    per_word = width // bits
    shifts = torch.arange(0, per_word * bits, bits, dtype=torch.int32, device=words.device)
    wide = words.to(torch.int32) if width < 32 else words.view(torch.int32)
    codes = (wide[..., None] >> shifts) & ((1 << bits) - 1)
    return codes.to(torch.int16).flatten(-2)[..., :size]


def unpack_stream(words: Tensor, bits: int, size: int) -> Tensor:
    """Unpacks codes from 32-bit words along the last side, the lowest bits first.

    Codes can cross from one word to the next: 32 codes of 3 bits occupy 3 words.

    Args:
        words: int32 (..., w).
        bits: the number of bits per code, at most 15.
        size: the number of codes along the last side, at most the number that fits.

    Returns:
        (..., size), int16.
    """
    wide = words.to(torch.int64) & 0xFFFFFFFF
    after = torch.nn.functional.pad(wide[..., 1:], (0, 1))
    pairs = wide | after << 32  # the sign bit does not affect bits below 47
    start = torch.arange(0, size * bits, bits, device=words.device)
    codes = (pairs[..., start >> 5] >> (start & 31)) & ((1 << bits) - 1)
    return codes.to(torch.int16)


def unpack_float4(codes: Tensor) -> Tensor:
    """Float4 values in float32 (..., 2w) from bytes (..., w), the one in the low bits first."""
    return _PAIRS[codes.view(torch.uint8).to(torch.int32)].flatten(-2)
