"""Arithmetic that formats of quantised weights share: scales, packed words, small floats."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 1024  # that are converted at once, so that codes need little memory beside the weight
# The 16 values of float4 (E2M1), by their code.
FLOAT4 = torch.tensor(
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0],
    device="cpu",
)
# The two of a byte, that of the low bits first.
_PAIRS = torch.stack([FLOAT4.repeat(16), FLOAT4.repeat_interleave(16)], dim=-1)


def row_ranges(rows: int, step: int = ROWS) -> Iterator[tuple[int, int]]:
    """Ranges (start, stop) that cover so many rows."""
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def powers_of_two(exponents: Tensor) -> Tensor:
    """2^(b - 127) in float32 of the bytes b of E8M0; 255 is NaN.

    A byte of 0 is 2^-127, which float32 holds as a subnormal number.
    """
    b = exponents.view(torch.uint8).to(torch.int32)
    powers = torch.ldexp(torch.ones_like(b, dtype=torch.float32), b - 127)
    return powers.masked_fill_(b == 255, torch.nan)


def as_scales(scales: Tensor) -> Tensor:
    """Scales of any dtype in float32: bytes and E8M0 are exponents of two."""
    if scales.dtype == torch.uint8 or "e8m0" in str(scales.dtype):
        return powers_of_two(scales)
    return scales.to(torch.float32)


def unpack(words: Tensor, bits: int, size: int) -> Tensor:
    """Codes of so many bits from words along the last side, the lowest bits first.

    Args:
        words: integers (..., w) of 8 or 32 bits; each holds a whole number of codes.
        bits: of a code.
        size: how many codes there are along the last side, at most all that fit.

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
    """Codes of so many bits from words of 32 bits along the last side, the lowest bits first.

    Codes run on from one word to the next: 32 codes of 3 bits take 3 words.

    Args:
        words: int32 (..., w).
        bits: of a code, at most 15.
        size: how many codes there are along the last side, at most all that fit.

    Returns:
        (..., size), int16.
    """
    wide = words.to(torch.int64) & 0xFFFFFFFF
    after = torch.nn.functional.pad(wide[..., 1:], (0, 1))
    pairs = wide | after << 32  # the sign does not matter below bit 47
    start = torch.arange(0, size * bits, bits, device=words.device)
    codes = (pairs[..., start >> 5] >> (start & 31)) & ((1 << bits) - 1)
    return codes.to(torch.int16)


def unpack_float4(codes: Tensor) -> Tensor:
    """Values of float4 in float32 from bytes (..., w): (..., 2w), that of the low bits first."""
    return _PAIRS[codes.view(torch.uint8).to(torch.int32)].flatten(-2)
