"""Weights that HQQ quantises. Tensors next to `W_q` describe its layout.

Letters: W (m, n) a weight, reshaped to groups that are rows (g, size) or columns (size, g);
W = s (q - z) with codes q, scales s and zero points z per group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wellcond.recipes.base import Candidate, Content, Read, Recipe, RecipeError, show, zeros
from wellcond.recipes.codes import row_ranges

_STEP = 1 << 20  # entries that are converted at once
_FLOATS = ("float16", "bfloat16", "float32")
# The number of bits per code, the number of codes per word, and the dtype of a word.
_PACKINGS = {
    "8bit_u8": (8, 1, torch.uint8),
    "4bit_u8": (4, 2, torch.uint8),
    "3bit_32": (3, 10, torch.int32),
    "2bit_u8": (2, 4, torch.uint8),
    "1bit_u8": (1, 8, torch.uint8),
}
_DESCRIBING = (
    *("nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float"),
    *("quant_scale", "quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict"),
    *("stores_quant_config", "channel_wise", "optimize", "round_zero"),
)


@dataclass(frozen=True, kw_only=True)
class Hqq(Recipe):
    """W from words, each with one code from each of `per_word` equal ranges of rows.

    The code of the first range is in the highest bits.
    """

    bits: int
    per_word: int
    word: torch.dtype
    groups: tuple[int, int]  # the shape of W as rows or columns that have one scale each

    def build(self, read: Read, index: int) -> Tensor:
        rows, columns = self.groups
        codes, scales, offsets = self.parts[:3]
        s, z = (read(part).to(torch.float32) for part in (scales, offsets))
        W = zeros((rows, columns))
        words = -(-rows // self.per_word)
        for start, stop in row_ranges(words, max(1, _STEP // columns)):
            packed = read(codes, (start, stop)).contiguous().view(self.word).to(torch.int32)
            for k in range(self.per_word):
                first = k * words + start
                chunk = W[first : first + stop - start]  # shorter or empty at the end
                shift = self.bits * (self.per_word - 1 - k)
                q = (packed >> shift) & ((1 << self.bits) - 1)
                chunk[:] = q[: len(chunk)]
        for start, stop in row_ranges(rows, max(1, _STEP // columns)):
            own = slice(start, stop) if len(s) == rows else slice(None)
            W[start:stop] = (W[start:stop] - z[own]) * s[own]
        return W.reshape(self.shape)


def find_hqq(content: Content) -> Iterator[Candidate]:
    """The weights with codes in `W_q`."""
    for name in content.tensors:
        stem = name.removesuffix("W_q")
        if name.rpartition(".")[2] != "W_q":
            continue
        beside = [f"{stem}{part}" for part in ("scale", "zero", *_DESCRIBING)]
        parts = (name, *(one for one in beside if one in content.tensors))
        if len(parts) == 1:  # a projection that has this name
            continue

        def make(stem: str = stem, parts: tuple[str, ...] = parts) -> Recipe:
            return _make(content, stem, parts)

        yield Candidate(f"{stem}weight", parts, make)


def _make(content: Content, stem: str, parts: tuple[str, ...]) -> Recipe:
    method = content.quantization().get("quant_method", "hqq")
    if method != "hqq":
        raise RecipeError(f"the layout of its quant_method {show(method)} is unknown")
    if f"{stem}packing" not in content.tensors:
        raise RecipeError(
            f"the layout of its codes, {stem}packing, is missing: save the model with a newer "
            "version of hqq"
        )
    names = {part: f"{stem}{part}" for part in ("W_q", "scale", "zero")}
    shape = _read_integers(content, f"{stem}shape")
    if len(shape) != 2 or min(shape) < 1:
        raise RecipeError(f"{stem}shape is {shape}")
    packing = bytes(max(0, min(b, 255)) for b in _read_integers(content, f"{stem}packing"))
    found = _PACKINGS.get(packing.decode(errors="replace"))
    if found is None:
        raise RecipeError(f"{stem}packing is {packing.decode(errors='replace')!r}")
    bits, per_word, word = found

    def is_set(flag: str) -> bool:
        name = f"{stem}{flag}"
        return name in content.tensors and any(_read_integers(content, name))

    for flag in ("quant_scale", "quant_zero"):
        if is_set(flag):
            raise RecipeError(f"{stem}{flag} is set, and its layout is unknown")
    (axis,) = _read_integers(content, f"{stem}axis")[:1] or [-1]
    (size,) = _read_integers(content, f"{stem}group_size")[:1] or [0]
    total = math.prod(shape)
    if axis not in (0, 1) or size < 1 or total % size:
        raise RecipeError(f"its axis {axis} and group_size {size} do not fit {total} entries")
    rows, columns = (total // size, size) if axis == 1 else (size, total // size)
    if per_word in (2, 4, 8) and rows % per_word:
        raise RecipeError(f"{per_word} codes per word do not divide {rows} rows")
    told, dtype = content.shape(names["W_q"]), content.dtype(names["W_q"])
    element = getattr(torch, dtype) if is_set("view_as_float") and dtype in _FLOATS else word
    stored = (-(-rows // per_word), columns * word.itemsize // element.itemsize)
    if told != stored or dtype != str(element).removeprefix("torch."):
        raise RecipeError(
            f"{names['W_q']} has the shape {told} and the dtype {dtype}, not {stored} and "
            f"{element}".replace("torch.", "")
        )
    if columns * word.itemsize % element.itemsize:
        raise RecipeError(f"{columns} words do not fill complete entries of {dtype}")
    per_group = (rows, 1) if axis == 1 else (1, columns)
    for one in (names["scale"], names["zero"]):
        if content.shape(one) != per_group:
            raise RecipeError(f"{one} has the shape {content.shape(one)}, not {per_group}")
        if content.dtype(one) not in _FLOATS:
            raise RecipeError(f"{one} has the dtype {content.dtype(one)}")
    return Hqq(
        label=f"{stem}weight",
        parts=parts,
        shape=(shape[0], shape[1]),
        note=f"dequantised from {bits}-bit HQQ with groups of {size} entries",
        stored_as=f"int{bits}",
        dtype=content.dtype(names["scale"]),
        bits=bits,
        per_word=per_word,
        word=word,
        groups=(rows, columns),
    )


def _read_integers(content: Content, name: str) -> list[int]:
    stored = content.read_small(name)
    if stored.is_floating_point() or stored.is_complex():
        raise RecipeError(f"{name} has the dtype {content.dtype(name)}")
    return [int(value) for value in stored.flatten().tolist()]
