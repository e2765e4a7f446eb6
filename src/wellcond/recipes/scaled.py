"""Weights whose codes are multiplied by scales, one per block of entries.

Letters: W (m, n) a weight, or one matrix of a stack (b, m, n); s (p, q) its scales, one per block
(h, w) of rows and columns, counted from the upper left. The last blocks can be shorter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from wellcond.recipes.base import Content, Read, Recipe, RecipeError, show, zeros
from wellcond.recipes.codes import FLOAT4, as_scales, row_ranges
from wellcond.weights.matrices import entries

_AT_ONCE = 1 << 21  # entries to convert at once; they need little memory in addition to W
_SCALES = ("float32", "bfloat16", "float16", "float8_e8m0fnu", "uint8")
_PAIRS = torch.stack((FLOAT4.repeat(16), FLOAT4.repeat_interleave(16)), dim=1)  # by their byte
# The 32 non-negative values of float6 (E2M3) by code.
_E2M3 = [i / 8 for i in range(8)] + [(1 + i / 8) * 2**e for e in range(3) for i in range(8)]
FLOAT6 = torch.tensor(_E2M3 + [-value for value in _E2M3], device="cpu")


@dataclass(frozen=True)
class Scaled(Recipe):
    """W = (codes - zeros) * s * factor. The parts begin with the codes and the scales.

    Attributes:
        block: the sides of a block.
        stacked: whether the first side counts matrices, which are built one at a time.
        each: the names of parts, other than the codes, that have a separate value per matrix of a
            stack.
        transposed: whether codes, scales and blocks belong to the transpose of W.
        zeros: the part with the zero points, one per block, or "".
        symmetric: whether all zero points must be zero.
        order: the part with the block of columns of each column; "" if blocks are consecutive.
        factor: the part with a number by which W is multiplied, or "".
        divides: whether W is divided by the factor instead.
    """

    block: tuple[int, int] = (1, 1)
    stacked: bool = False
    each: tuple[str, ...] = ()
    transposed: bool = False
    zeros: str = ""
    symmetric: bool = False
    order: str = ""
    factor: str = ""
    divides: bool = False

    @property
    def count(self) -> int:
        return self.shape[0] if self.stacked else 1

    @property
    def sides(self) -> tuple[int, int]:
        """The sides of one stored matrix. Sides after the second are counted as columns."""
        m, *others = self.shape[1:] if self.stacked else self.shape
        n = math.prod(others)
        return (n, m) if self.transposed else (m, n)

    @property
    def blocks(self) -> tuple[int, int]:
        """The number of blocks along each side."""
        (m, n), (h, w) = self.sides, self.block
        return -(-m // h), -(-n // w)

    def explain(self, what: str) -> Self:
        """Returns a copy with a note about the codes and the extent of a scale."""
        (m, n), (h, w) = self.sides, self.block
        h, w = min(h, m), min(w, n)
        if self.transposed:
            m, n, h, w = n, m, w, h
        scales = f"a scale per block of {h}x{w}"
        if (h, w) == (m, n):
            scales = "one scale per matrix" if self.each else "one scale"
        elif (h, w) == (1, n):
            scales = "a scale per row"
        elif (h, w) == (m, 1):
            scales = "a scale per column"
        return replace(self, note=f"dequantised from {what} with {scales}")

    def decode(self, codes: Tensor) -> Tensor:
        """Converts rows of stored codes to numbers."""
        return codes

    def read_zeros(self, read: Read, index: int) -> Tensor | None:
        """The zero points (p, q) in float32; None if all of them are zero."""
        if not self.zeros:
            return None
        z = self._read_part(read, self.zeros, index).to(torch.float32)
        if self.symmetric and z.count_nonzero():
            raise RecipeError(f"{self.zeros} must be zero because the codes are symmetric")
        return None if self.symmetric else z.reshape(self.blocks)

    def build(self, read: Read, index: int) -> Tensor:
        (m, n), (h, w) = self.sides, self.block
        codes, scales = self.parts[:2]
        stack = read(codes, (index, index + 1))[0] if self.stacked else None
        s, z = as_scales(self._read_part(read, scales, index)), self.read_zeros(read, index)
        s = s.mT if self.transposed and s.ndim > 1 else s
        s = s.reshape(self.blocks)
        columns = self._read_order(read) if self.order else torch.arange(n, device="cpu") // w
        factor = self._read_factor(read, index)
        W = zeros((m, n))
        for start, stop in row_ranges(m, max(1, _AT_ONCE // n)):
            rows = torch.arange(start, stop, device="cpu") // h
            part = W[start:stop]
            if stack is None:
                part.copy_(self.decode(read(codes, (start, stop)).flatten(1)))
            else:
                part.copy_(self.decode((stack.mT if self.transposed else stack)[start:stop]))
            if z is not None:
                part -= _spread(z[rows], columns)
            part *= _spread(s[rows], columns)
        if factor is not None:
            W = W.div_(factor) if self.divides else W.mul_(factor)
        W = W.mT if self.transposed else W
        return W if self.count > 1 else W.reshape(self.shape)

    def _read_part(self, read: Read, name: str, index: int) -> Tensor:
        return read(name, (index, index + 1))[0] if name in self.each else read(name)

    def _read_factor(self, read: Read, index: int) -> Tensor | None:
        if not self.factor:
            return None
        return self._read_part(read, self.factor, index).to(torch.float32).reshape(())

    def _read_order(self, read: Read) -> Tensor:
        groups = self.blocks[1]
        order = read(self.order).flatten().to(torch.int64)
        if bool((order == -1).all()):  # the initial value
            return torch.arange(len(order), device="cpu") // self.block[1]
        if int(order.min()) < 0 or int(order.max()) >= groups:
            raise RecipeError(
                f"group numbers in {self.order} must be at least 0 and below {groups}"
            )
        if int(torch.bincount(order, minlength=groups).min()) == 0:
            raise RecipeError(f"{self.order} omits some of the {groups} groups")
        return order


def _spread(blocks: Tensor, columns: Tensor) -> Tensor:
    """Repeats the values (r, q) of blocks for every column, unless there is only one block."""
    return blocks if blocks.shape[1] == 1 else blocks.index_select(1, columns)


@dataclass(frozen=True)
class Float4(Scaled):
    """Codes of float4 (E2M1), two per byte, the lower half first."""

    stored_as: str = "float4_e2m1"

    def decode(self, codes: Tensor) -> Tensor:
        pairs = _PAIRS.index_select(0, codes.contiguous().view(torch.uint8).flatten().int())
        return pairs.view(*codes.shape[:-1], -1)


@dataclass(frozen=True)
class Float6(Scaled):
    """Codes of float6 (E2M3), four in three bytes, the lowest bits first."""

    stored_as: str = "float6_e2m3"

    def decode(self, codes: Tensor) -> Tensor:
        low, middle, high = codes.int().reshape(len(codes), -1, 3).unbind(-1)
        word = low | middle << 8 | high << 16
        shifts = torch.arange(0, 24, 6, dtype=torch.int32, device=codes.device)
        return FLOAT6[(word[..., None] >> shifts & 63).flatten(-2)]


def check_scales(content: Content, name: str, dtypes: tuple[str, ...] = _SCALES) -> None:
    """Checks that a tensor has a dtype of scales.

    Raises:
        RecipeError: the tensor has another dtype, or no tensor has this name.
    """
    content.shape(name)
    if content.dtype(name) not in dtypes:
        raise RecipeError(f"{name} has the dtype {content.dtype(name)}, which scales do not have")


def check_one(content: Content, name: str) -> None:
    """Checks that a tensor is a single floating-point number.

    Raises:
        RecipeError: it is not, or no tensor has this name.
    """
    if entries(content.shape(name)) != 1 or content.dtype(name) not in _SCALES[:3]:
        raise RecipeError(f"{name} must be one number, but has the shape {content.shape(name)}")


def sides_of(settings: Mapping[str, object], key: str) -> tuple[int, int] | None:
    """Reads two lengths from a config; None if the config does not have the key.

    Raises:
        RecipeError: the value is not two positive integers.
    """
    found = settings.get(key)
    if found is None:
        return None
    if isinstance(found, str):  # compressed-tensors writes "128x128"
        sides = re.fullmatch(r"(\d{1,9})x(\d{1,9})", found)
        found = [int(side) for side in sides.groups()] if sides else found
    if isinstance(found, list) and len(found) == 2:
        h, w = found
        if type(h) is int and type(w) is int and min(h, w) > 0 and max(h, w) < 1 << 40:
            return h, w
    raise RecipeError(f"{key} must be two positive integers, but is {show(found)}")
