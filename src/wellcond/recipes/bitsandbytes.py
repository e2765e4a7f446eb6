"""Weights that bitsandbytes quantises to 4 bits by a table (NF4, FP4), or to 8 bits.

With 4 bits, `X.weight` is stored with `X.weight.absmax`, `.quant_map` and a description in JSON,
`.quant_state.bitsandbytes__nf4`; with double quantisation, `absmax` contains codes. With 8 bits,
`X.weight` of int8 is stored with `X.SCB`, the largest absolute value per row.

Letters: W (m, n) or (b, m, n) a weight, whose entries are packed in order, across rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wellcond.recipes.base import Candidate, Content, Read, Recipe, RecipeError, show, zeros
from wellcond.recipes.codes import row_ranges
from wellcond.recipes.transposed import as_in_plain

# The values of the codes 0 to 15. bitsandbytes uses these values instead of the stored ones.
_NF4 = """
    -1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
    -0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725
    0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941
    0.7229568362236023 1.0
"""
_FP4 = (0, 0.0625, 8, 12, 4, 6, 2, 3)  # twelfths of the codes 0 to 7; 8 to 15 are the negatives
_TABLES = {
    "nf4": tuple(map(float, _NF4.split())),
    "fp4": tuple(sign * value / 12 for sign in (1, -1) for value in _FP4),
}
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_FLOATS = ("float16", "bfloat16", "float32")
_DESCRIPTION = ".quant_state.bitsandbytes__"
_STEP = 1 << 20  # entries that are converted at once
# The numbers that bitsandbytes stores for the layouts of its kernels; 0 is the layout by rows.
_LAYOUTS = {1: "col32", 2: "col_turing", 3: "col_ampere"}


@dataclass(frozen=True, kw_only=True)
class FourBits(Recipe):
    """Two codes per byte, the high one first, with one scale per block of `block` entries."""

    kind: str
    block: int
    storage: int  # bytes per element of the packed tensor
    nested_block: int  # 0 without double quantisation
    nested_offset: float

    @property
    def count(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1

    def build(self, read: Read, index: int) -> Tensor:
        shape = self.shape[1:] if self.count > 1 else self.shape
        size = math.prod(shape)
        begin = index * size
        table = torch.tensor(_TABLES[self.kind], dtype=torch.float32, device="cpu")
        byte = torch.arange(256, device="cpu")
        pairs = torch.stack((table[byte >> 4], table[byte & 15]), dim=1)
        W = zeros((size,))
        for start, stop in row_ranges(size, _STEP):
            first, last = (begin + start) // 2, -(-(begin + stop) // 2)
            codes = self._read_bytes(read, first, last)
            values = pairs[codes.to(torch.int64)].flatten()
            W[start:stop] = values[begin + start - 2 * first :][: stop - start]
            first, last = (begin + start) // self.block, -(-(begin + stop) // self.block)
            scales = self._read_scales(read, first, last).repeat_interleave(self.block)
            W[start:stop] *= scales[begin + start - first * self.block :][: stop - start]
        return W.reshape(shape)

    def _read_bytes(self, read: Read, first: int, last: int) -> Tensor:
        k = self.storage
        rows = read(self.parts[0], (first // k, -(-last // k)))
        return (
            rows.contiguous().view(torch.uint8).flatten()[first - first // k * k :][: last - first]
        )

    def _read_scales(self, read: Read, first: int, last: int) -> Tensor:
        scales = read(self.parts[1], (first, last))
        if not self.nested_block:
            return scales.to(torch.float32)
        of_codes, maxima = (read(part).to(torch.float32) for part in self.parts[3:5])
        codes = scales.to(torch.int64)
        if codes.numel() and int(codes.max()) >= len(of_codes):
            raise RecipeError(f"{self.parts[1]} has codes beyond its table of {len(of_codes)}")
        blocks = torch.arange(first, last, device="cpu") // self.nested_block
        return of_codes[codes] * maxima[blocks] + self.nested_offset


@dataclass(frozen=True)
class EightBits(Recipe):
    """W = codes * s / 127, with a scale s per row."""

    def build(self, read: Read, index: int) -> Tensor:
        codes, scales = self.parts[:2]
        W = zeros(self.shape)
        s = read(scales).to(torch.float64)[:, None] / 127
        for start, stop in row_ranges(len(W), max(1, _STEP // self.shape[1])):
            W[start:stop] = read(codes, (start, stop)) * s[start:stop]
        return W


def find_bitsandbytes(content: Content) -> Iterator[Candidate]:
    """The weights with 4 and with 8 bits."""
    states: dict[str, list[str]] = {}  # the descriptions by the names of their weights
    for name in content.tensors:
        weight, found, _ = name.partition(_DESCRIPTION)
        if found:
            states.setdefault(weight, []).append(name)
        elif name.endswith(".absmax") and name.removesuffix(".absmax") in content.tensors:
            states.setdefault(name.removesuffix(".absmax"), [])
    for name, described in states.items():
        yield _find_four_bits(content, name, described)
    for scales in content.tensors:
        name = f"{scales.removesuffix('SCB')}weight"
        if scales.rpartition(".")[2] == "SCB" and name in content.tensors and name not in states:
            yield _find_eight_bits(content, name, scales)


def _find_four_bits(content: Content, name: str, states: list[str]) -> Candidate:
    own = ("absmax", "quant_map", "nested_quant_map", "nested_absmax")
    names = [name, *(f"{name}.{part}" for part in own), *states]

    def make() -> Recipe:
        if len(states) != 1:
            several = f"{' and '.join(states)} describe it"
            raise RecipeError(several if states else f"no {name}{_DESCRIPTION}nf4 describes it")
        (state,) = states
        kind = state.removeprefix(name + _DESCRIPTION)
        described = _read_description(content, state)
        if kind not in _TABLES or described.get("quant_type") != kind:
            raise RecipeError(f"its type in {state} is {show(described.get('quant_type'))}")
        shape = described.get("shape")
        if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
            raise RecipeError(f"its shape in {state} is {show(shape)}")
        if not 2 <= len(shape) <= 5:
            raise RecipeError(f"its shape in {state} has {len(shape)} sides")
        size = math.prod(shape)
        stored, element = content.shape(name), getattr(torch, content.dtype(name), None)
        storage = element.itemsize if isinstance(element, torch.dtype) else 0
        # Only half a byte can be unused.
        if not storage or stored != (-(-size // 2) // storage, 1) or size > 2 * storage * stored[0]:
            raise RecipeError(
                f"{name} of shape {stored} and dtype {content.dtype(name)} does not contain "
                f"{show(size)} codes of 4 bits"
            )
        block = _read_block(described, "blocksize", state)
        _check_length(content, names[1], -(-size // block))
        nested = names[4] in content.tensors or "nested_blocksize" in described
        if nested and content.dtype(names[1]) != "uint8":
            raise RecipeError(f"{names[1]} has the dtype {content.dtype(names[1])}")
        nested_block, offset = 0, 0.0
        if nested:
            nested_block = _read_block(described, "nested_blocksize", state)
            offset = described.get("nested_offset", "")
            if type(offset) not in (int, float):
                raise RecipeError(f"the offset of its scales in {state} is {show(offset)}")
            _check_length(content, names[3], 256)
            _check_length(content, names[4], -(-size // block // nested_block))
            _check_floats(content, *names[3:5])
        else:
            _check_floats(content, names[1])
        _check_table(content, names[2], kind)
        return as_in_plain(
            FourBits(
                name,
                parts,
                tuple(shape),
                f"dequantised from {kind.upper()} of bitsandbytes with a scale per block of {block}"
                + (", itself quantised" if nested else ""),
                dtype=next((kind for kind in _FLOATS if kind == described.get("dtype")), ""),
                stored_as=kind,
                kind=kind,
                block=block,
                storage=storage,
                nested_block=nested_block,
                nested_offset=float(offset),
            ),
            content,
        )

    parts = tuple(one for one in names if one in content.tensors)
    return Candidate(name, parts, make)


def _read_description(content: Content, state: str) -> Mapping[str, Any]:
    stored = content.read_small(state).to(torch.uint8).flatten()
    try:
        described = json.loads(bytes(stored.tolist()))
    except (ValueError, RecursionError):
        described = None
    if not isinstance(described, dict):
        raise RecipeError(f"{state} is not a description in JSON")
    return described


def _read_block(described: Mapping[str, Any], key: str, state: str) -> int:
    block = described.get(key)
    if type(block) is not int or block not in _BLOCKS:
        raise RecipeError(
            f"its {key} in {state} is {show(block)}, which bitsandbytes does not support"
        )
    return block


def _check_length(content: Content, name: str, length: int) -> None:
    if content.shape(name) != (length,):
        raise RecipeError(f"{name} has the shape {content.shape(name)}, not ({length},)")


def _check_floats(content: Content, *names: str) -> None:
    for name in names:
        if content.dtype(name) not in _FLOATS:
            raise RecipeError(f"{name} has the dtype {content.dtype(name)}")


def _check_table(content: Content, name: str, kind: str) -> None:
    _check_length(content, name, 16)
    table = torch.tensor(_TABLES[kind], device="cpu")
    if not bool(((content.read_small(name).to(torch.float32) - table).abs() < 1e-3).all()):
        raise RecipeError(f"{name} does not contain the 16 values of {kind.upper()}")


def _find_eight_bits(content: Content, name: str, scales: str) -> Candidate:
    layout = f"{scales.removesuffix('SCB')}weight_format"

    def make() -> Recipe:
        shape, dtype = content.shape(name), content.dtype(name)
        if dtype != "int8" or len(shape) != 2 or 0 in shape:
            raise RecipeError(f"{name} has the dtype {dtype} and the shape {shape}")
        _check_floats(content, scales)
        _check_length(content, scales, shape[0])
        if layout in content.tensors:
            stored = content.read_small(layout).flatten().tolist()
            if stored != [0]:
                layout_name = _LAYOUTS.get(stored[0]) if len(stored) == 1 else None
                raise RecipeError(
                    f"it has the layout {layout_name or stored} of a GPU kernel: load it with "
                    "bitsandbytes 0.45.0 and save it, which stores it by rows"
                )
        note = "dequantised from INT8 of bitsandbytes with a scale per row"
        return as_in_plain(EightBits(name, parts, shape, note), content)

    parts = tuple(one for one in (name, scales, layout) if one in content.tensors)
    return Candidate(name, parts, make)
