"""Weights that MLX quantises, and transformers for Metal in the same layout.

`X.weight` of uint32 (m, words) is stored with `X.scales` and `X.biases`, one per group of entries
in a row. Stacks of experts have one more side in front.

Letters: W (m, n) a weight, W[i, j] = s[i, g] q[i, j] + b[i, g].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wellcond.recipes.base import Candidate, Content, Read, Recipe, RecipeError, show, zeros
from wellcond.recipes.codes import FLOAT4, powers_of_two, row_ranges, unpack, unpack_stream

_STEP = 1 << 20  # entries that are converted at once
_FLOATS = ("float16", "bfloat16", "float32")
_BITS = (1, 2, 3, 4, 5, 6, 8)
# The number of bits and the group size of the modes with floating-point codes and byte scales.
_MODES = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
_STORED_AS = {4: "float4_e2m1", 8: "float8_e4m3fn"}  # by the bits of a floating-point code


@dataclass(frozen=True, kw_only=True)
class Mlx(Recipe):
    """W from integers with a scale and a bias, or from small floats with a scale."""

    mode: str
    bits: int
    group_size: int

    @property
    def count(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1

    def build(self, read: Read, index: int) -> Tensor:
        m, n = self.shape[-2:]
        W = zeros((m, n))
        for start, stop in row_ranges(m, max(1, _STEP // n)):

            def rows(part: int, start: int = start, stop: int = stop) -> Tensor:
                if len(self.shape) == 2:
                    return read(self.parts[part], (start, stop))
                return read(self.parts[part], (index, index + 1))[0, start:stop]

            words = rows(0).contiguous().view(torch.int32)
            values = self._decode(words, n).reshape(stop - start, -1, self.group_size)
            values = values * self._decode_scales(rows(1))[..., None]
            if self.mode == "affine":
                values += rows(2).to(torch.float32)[..., None]
            W[start:stop] = values.flatten(1)
        return W

    def _decode(self, words: Tensor, n: int) -> Tensor:
        if self.mode == "mxfp8":
            return words.view(torch.float8_e4m3fn).to(torch.float32)
        codes = (unpack_stream if 32 % self.bits else unpack)(words, self.bits, n)
        return codes.to(torch.float32) if self.mode == "affine" else FLOAT4[codes.to(torch.int32)]

    def _decode_scales(self, scales: Tensor) -> Tensor:
        if self.mode == "affine":
            return scales.to(torch.float32)
        if self.mode == "nvfp4":
            return scales.contiguous().view(torch.float8_e4m3fn).to(torch.float32)
        return powers_of_two(scales)


def find_mlx(content: Content) -> Iterator[Candidate]:
    """The weights of dtype uint32 with scales in the same module."""
    for name, (_, dtype) in content.tensors.items():
        stem = name.removesuffix("weight")
        if dtype != "uint32" or stem == name or f"{stem}scales" not in content.tensors:
            continue
        beside = [f"{stem}{part}" for part in ("scales", "biases", "qbiases")]
        parts = (name, *(one for one in beside if one in content.tensors))

        def make(name: str = name, parts: tuple[str, ...] = parts) -> Recipe:
            return _make(content, name, parts)

        yield Candidate(name, parts, make)


def _make(content: Content, name: str, parts: tuple[str, ...]) -> Recipe:
    mode, bits, group_size = _read_settings(content, name.removesuffix(".weight"))
    packed, scales = content.shape(name), content.shape(parts[1])
    if len(packed) not in (2, 3) or 0 in packed or len(scales) != len(packed):
        raise RecipeError(f"{name} of shape {packed} does not fit {parts[1]} of shape {scales}")
    n = group_size * scales[-1]
    if scales[:-1] != packed[:-1] or 32 * packed[-1] != bits * n:
        raise RecipeError(
            f"{parts[1]} {scales} does not fit {name} {packed} of {bits} bits with groups of "
            f"{group_size}"
        )
    affine = mode == "affine"
    if len(parts) != (3 if affine else 2):
        raise RecipeError(f"its mode {mode} does not fit its parts {', '.join(parts)}")
    for part in parts[1:]:
        if content.shape(part) != scales:
            raise RecipeError(f"{part} has the shape {content.shape(part)}, not {scales}")
        if content.dtype(part) not in (_FLOATS if affine else ("uint8",)):
            raise RecipeError(f"{part} has the dtype {content.dtype(part)}")
    what = (
        f"{bits}-bit MLX with a scale and a bias" if affine else f"MLX {mode.upper()} with a scale"
    )
    return Mlx(
        label=name,
        parts=parts,
        shape=(*packed[:-1], n),
        note=f"dequantised from {what} per group of {group_size}",
        stored_as=f"int{bits}" if affine else _STORED_AS[bits],
        dtype=content.dtype(parts[1]) if affine else "",
        mode=mode,
        bits=bits,
        group_size=group_size,
    )


def _read_settings(content: Content, layer: str) -> tuple[str, int, int]:
    """The mode, the number of bits and the group size; a layer can have its own, by its name."""
    settings = content.beside("config.json").get("quantization")
    if not isinstance(settings, Mapping):
        settings = content.quantization()
    if not settings:
        raise RecipeError("config.json does not give its number of bits and its group size")
    own: Any = settings.get(layer, settings)
    if not isinstance(own, Mapping):
        raise RecipeError(f"{layer} is not quantised according to config.json")
    method = settings.get("quant_method")
    if method not in (None, "metal"):
        raise RecipeError(f"the layout of its quant_method {show(method)} is unknown")
    mode = own.get("mode", settings.get("mode", "affine"))
    bits, group_size = own.get("bits"), own.get("group_size")
    fixed = _MODES.get(mode) if isinstance(mode, str) else None
    if fixed is not None:
        if (fixed[0] if bits is None else bits, group_size or fixed[1]) != fixed:
            raise RecipeError(
                f"{mode} contradicts {show(bits)} bits and groups of {show(group_size)} in "
                "config.json"
            )
        return mode, *fixed
    if mode != "affine" or type(bits) is not int or bits not in _BITS:
        raise RecipeError(f"its mode {show(mode)} with {show(bits)} bits is not supported")
    if type(group_size) is not int or not 0 < group_size <= 1 << 20:
        raise RecipeError(f"its group_size in config.json is {show(group_size)}")
    return mode, bits, group_size
