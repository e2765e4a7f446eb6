"""Weights of torchao's classes: integers, float8 and smaller floats with a scale per block.

The module supports `Int8Tensor`, `IntxUnpackedToInt8Tensor`, `Float8Tensor`, `MXTensor` and
`NVFP4Tensor`, and the older `AffineQuantizedTensor`, also within a
`LinearActivationQuantizedTensor`. It refuses classes that pack codes in the order of a kernel.

Letters: W (m, n) a weight; q its codes, s their scales and z their zero points, one per block
(a, b).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wellcond.recipes.base import Candidate, Content, Read, Recipe, RecipeError, TensorClass, zeros
from wellcond.recipes.codes import as_scales, row_ranges, unpack_float4
from wellcond.weights.matrices import entries

_FLOAT4 = "float4_e2m1fn_x2"
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
_FLOAT6 = {"fp6_e2m3": (2, 3), "fp6_e3m2": (3, 2)}  # bits of exponent and mantissa, one per byte
_STORED_AS = {_FLOAT4: "float4_e2m1", "fp6_e2m3": "float6_e2m3", "fp6_e3m2": "float6_e3m2"}
_INTEGERS = ("int8", "uint8")
_REALS = ("float64", "float32", "float16", "bfloat16")
_AFFINE = "AffineQuantizedTensor"
# The parts with the codes, by the classes of `tensor_impl` that keep them in the order of the
# weight.
_CODES = {
    "PlainAQTTensorImpl": "int_data",
    "QDQTensorImpl": "int_data",
    "Float8AQTTensorImpl": "float8_data",
}
# The supported domains of zero points; in other domains they are added after scaling.
_SUBTRACTED, _NONE = ["ZeroPointDomain", 1], ["ZeroPointDomain", 3]
# Parts that act on the inputs of a layer and do not change its weight.
_OF_INPUTS = ("act_quant_scale", "act_quant_zero_point", "act_per_tensor_scale")
_TARGETS = tuple(f"int{bits}" for bits in range(1, 9))
_TILE = (128, 4)  # the tile of scales that are stored in the layout of tensor cores


@dataclass(frozen=True)
class Torchao(Recipe):
    """W = (q - z) s per block, times factors; or a stack of such matrices, built one at a time.

    Attributes:
        block: the number of entries along each side that have one scale.
        elements: "float4" for two codes per byte, or a key of `_FLOAT6`; "" for plain numbers.
        zero_points: the part with z, or "".
        factor: the part with a factor of the weight, or with one per matrix of a stack.
        columns: the part with factors of the inputs.
        tiled: whether the scales are stored in tiles.
    """

    block: tuple[int, ...] = ()
    elements: str = ""
    zero_points: str = ""
    factor: str = ""
    columns: str = ""
    tiled: bool = False

    @property
    def count(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1

    def build(self, read: Read, index: int) -> Tensor:
        codes, scales = self.parts[:2]
        (m, n), (a, b) = self.shape[-2:], self.block[-2:]
        one = read(codes, (index, index + 1))[0] if len(self.shape) == 3 else None
        s = self._per_block(as_scales(read(scales)), index)
        zero = read(self.zero_points).to(torch.float32) if self.zero_points else None
        z = None if zero is None else self._per_block(zero, index)
        W = zeros((m, n))
        for start, stop in row_ranges(m):
            rows = read(codes, (start, stop)) if one is None else one[start:stop]
            self._check_range(rows)
            W[start:stop] = _values(rows, self.elements)
            blocks = W[start:stop].view(stop - start, -1, b)
            at = torch.arange(start, stop, device=s.device) // a
            if z is not None:
                blocks -= z[at][..., None]
            blocks *= s[at][..., None]
        if self.factor:
            factor = read(self.factor).to(torch.float32).flatten()
            W *= factor[index if len(factor) > 1 else 0]
        if self.columns:
            W *= read(self.columns).to(torch.float32).flatten()
        return W

    def _check_range(self, codes: Tensor) -> None:
        """Raises if integers are outside the range of the target dtype."""
        if not self.stored_as.startswith("int"):
            return
        (low, high), bits = codes.aminmax(), int(self.stored_as.removeprefix("int"))
        if int(low) < -(1 << bits - 1) or int(high) >= 1 << bits - 1:
            name = self.parts[0]
            raise RecipeError(
                f"{name} ranges from {int(low)} to {int(high)}, more than {bits} bits"
            )

    def _per_block(self, numbers: Tensor, index: int) -> Tensor:
        """Reshapes numbers to one per block (m/a, n/b) of the matrix at this index."""
        sides = [size // each for size, each in zip(self.shape, self.block, strict=True)]
        if self.tiled:
            numbers = _untile(numbers, entries(self.shape[:-1]), sides[-1])
        numbers = numbers.reshape(sides)
        return numbers[index // self.block[0]] if len(sides) == 3 else numbers


def _values(codes: Tensor, elements: str) -> Tensor:
    if elements == "float4":
        return unpack_float4(codes)
    if elements in _FLOAT6:
        if codes.numel() and int(codes.max()) >= 64:
            raise RecipeError(f"a code of {elements} is {int(codes.max())}, more than 63")
        return _float6(*_FLOAT6[elements])[codes.to(torch.int32)]
    return codes.to(torch.float32)


def _float6(exponent: int, mantissa: int) -> Tensor:
    """The 64 values of a 6-bit float with these numbers of exponent and mantissa bits."""
    codes = torch.arange(32, device="cpu")
    e, fraction = codes >> mantissa, (codes & ((1 << mantissa) - 1)) / (1 << mantissa)
    # Subnormal numbers have no implicit leading 1, and have the smallest normal exponent.
    values = (fraction + (e > 0)) * torch.exp2(e.clamp(min=1) - (1 << (exponent - 1)) + 1.0)
    return torch.cat([values, -values])


def _untile(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """Restores a matrix (rows, columns) from its tiles of 128 x 4 entries.

    A tile is stored as (32, 16). Row 32 i + j of the tile is at (j, 4 i).
    """
    across, down = -(-rows // _TILE[0]), -(-columns // _TILE[1])
    whole = tiles.reshape(across, down, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return whole.reshape(across * _TILE[0], down * _TILE[1])[:rows, :columns]


# --- from the description of a class --------------------------------------------------------------


def find_torchao(content: Content) -> Iterator[Candidate]:
    """The weights that are stored as tensors of a foreign class."""
    for label, one in content.classes.items():
        codes_first = sorted(one.parts, key=lambda part: "data" not in part)  # qdata, int_data
        names = tuple(n for n in map(one.parts.__getitem__, codes_first) if n in content.tensors)
        if names:
            yield Candidate(label, names, partial(_make, content, label, one, names))


def _make(content: Content, label: str, one: TensorClass, names: tuple[str, ...]) -> Recipe:
    if label in content.tensors:
        raise RecipeError(f"{label} is also stored as a plain tensor")
    weight = _Description(content, one.kind, one.parts, one.attributes)
    recipe = weight.recipe(label)
    return replace(recipe, parts=(*recipe.parts, *(n for n in names if n not in recipe.parts)))


@dataclass(frozen=True)
class _Description:
    """A weight by its class, with its parts and settings."""

    content: Content
    kind: str
    parts: Mapping[str, str]
    settings: Mapping[str, Any]

    def recipe(self, label: str) -> Torchao:
        match self.kind:
            case "Int8Tensor" | "IntxUnpackedToInt8Tensor":
                return self._affine(label, "qdata", ("int8",))
            case "Float8Tensor":
                return self._affine(label, "qdata", _FLOAT8)
            case "MXTensor" | "NVFP4Tensor":
                return self._microscaled(label)
            case "AffineQuantizedTensor":
                return self._older(label)
            case "LinearActivationQuantizedTensor":
                inner = "original_weight_tensor"
                if self.settings.get(inner) == _AFFINE:
                    return self._within(inner, _AFFINE)._older(label)
        raise RecipeError(f"the layout of torchao's {self.kind} is unknown")

    def _within(self, name: str, kind: str) -> _Description:
        """The description of a tensor that is an attribute of this one."""
        start = f"{name}."
        return _Description(
            self.content,
            kind,
            {p.removeprefix(start): n for p, n in self.parts.items() if p.startswith(start)},
            {k.removeprefix(start): v for k, v in self.settings.items() if k.startswith(start)}
            | {key: self.settings[key] for key in ("shape", "dtype") if key in self.settings},
        )

    def _older(self, label: str) -> Torchao:
        kind = self.settings.get("tensor_impl")
        codes = _CODES.get(kind) if isinstance(kind, str) else None
        if codes is None:
            raise RecipeError(f"the layout of torchao's {kind!r} is unknown")
        impl = self._within("tensor_impl", self.kind)
        if impl.settings.get("transposed"):
            raise RecipeError("its codes are transposed")
        domain = self.settings.get("zero_point_domain")
        if domain not in (_SUBTRACTED, _NONE) and "zero_point" in impl.parts:
            raise RecipeError(f"the domain {domain} of its zero points is not supported")
        parts = {p: n for p, n in impl.parts.items() if p != "zero_point" or domain == _SUBTRACTED}
        settings = {**impl.settings, "block_size": self.settings.get("block_size")}
        dtypes = _FLOAT8 if codes == "float8_data" else _INTEGERS
        return replace(impl, parts=parts, settings=settings)._affine(label, codes, dtypes)

    def _affine(self, label: str, codes: str, dtypes: tuple[str, ...]) -> Torchao:
        """Codes in the shape of the weight, with scales and zero points per block."""
        self._check_parts(codes, "scale", "zero_point", "act_pre_scale")
        name, shape = self._codes(codes, dtypes)
        scale, target = self._part("scale"), self.settings.get("target_dtype")
        block = self._block_size(shape, self.content.shape(scale))
        per_block = tuple(size // each for size, each in zip(shape, block, strict=True))
        self._check(scale, per_block, *_REALS)
        zero = self.parts.get("zero_point", "")
        if zero:
            self._check(zero, per_block, *_REALS, *_INTEGERS, "int32", "int64")
        columns = self.parts.get("act_pre_scale", "")
        if columns and entries(self.content.shape(columns)) > 1:
            self._check(columns, shape[-1:], *_REALS)
        return Torchao(
            label,
            (name, scale),
            shape,
            self._note(target if target in _TARGETS else self.content.dtype(name), shape, block),
            dtype=self._dtype("dtype"),
            stored_as=target if target in _TARGETS else "",
            block=block,
            zero_points=zero,
            columns=columns,
        )

    def _microscaled(self, label: str) -> Torchao:
        """Codes of float8, float6 or float4 with a scale per block of a row."""
        nv = self.kind == "NVFP4Tensor"
        self._check_parts("qdata", "scale", *(("per_tensor_scale",) if nv else ()))
        kind = _FLOAT4 if nv else self.settings.get("elem_dtype")
        if not isinstance(kind, str) or kind not in (_FLOAT4, *_FLOAT6, *_FLOAT8):
            raise RecipeError(f"its elem_dtype {kind!r} is unknown")
        name, stored = self._codes("qdata", (kind,) if kind in _FLOAT8 else ("uint8",))
        shape = (*stored[:-1], stored[-1] * (2 if kind == _FLOAT4 else 1))
        size = self.settings.get("block_size")
        if type(size) is not int or size < 1 or shape[-1] % size:
            raise RecipeError(f"block_size = {size} does not divide {shape[-1]} inputs")
        self._check_shape(shape)
        block = (*(1 for _ in shape[:-1]), size)
        scale, tiled = self._part("scale"), self.settings.get("is_swizzled_scales") is True
        sides = (*shape[:-1], shape[-1] // size)
        if tiled:
            if len(shape) == 3 and shape[1] % _TILE[0]:
                raise RecipeError(
                    f"a tile of its scales covers several matrices of {shape[1]} rows"
                )
            sides = (*shape[:-2], 32 * -(-shape[-2] // _TILE[0]), 16 * -(-sides[-1] // _TILE[1]))
        self._check(scale, sides, *(("float8_e4m3fn",) if nv else ("float8_e8m0fnu", "uint8")))
        factor = self.parts.get("per_tensor_scale", "")
        if factor and entries(self._check(factor, None, *_REALS)) not in {1, *shape[:-2]}:
            raise RecipeError(f"{factor} does not have one factor per matrix")
        elements = "float4" if kind == _FLOAT4 else kind
        return Torchao(
            label,
            (name, scale),
            shape,
            self._note("NVFP4" if nv else f"MX, {elements}", shape, block),
            dtype=self._dtype("orig_dtype"),
            stored_as="" if kind in _FLOAT8 else _STORED_AS[kind],
            block=block,
            elements=elements if kind == _FLOAT4 or kind in _FLOAT6 else "",
            factor=factor,
            tiled=tiled,
        )

    def _check_parts(self, *known: str) -> None:
        """Raises if there are other parts, which might change the weight."""
        if unknown := [part for part in self.parts if part not in (*known, *_OF_INPUTS)]:
            raise RecipeError(f"the effect of its part {unknown[0]!r} is unknown")

    def _part(self, part: str) -> str:
        if part not in self.parts:
            raise RecipeError(f"its {part} is missing")
        return self.parts[part]

    def _codes(self, part: str, dtypes: tuple[str, ...]) -> tuple[str, tuple[int, ...]]:
        name = self._part(part)
        shape = self._check(name, None, *dtypes)
        if len(shape) not in (2, 3) or not entries(shape):
            raise RecipeError(f"codes of shape {shape} are neither a matrix nor a stack of them")
        return name, shape

    def _check(self, name: str, wanted: tuple[int, ...] | None, *dtypes: str) -> tuple[int, ...]:
        """The shape of a part. Checks its dtype, and its shape except for sides of length 1."""
        shape, dtype = self.content.shape(name), self.content.dtype(name)
        if dtype not in dtypes:
            raise RecipeError(f"{name} has the dtype {dtype}, not {' or '.join(dtypes)}")
        if wanted is not None and [n for n in shape if n != 1] != [n for n in wanted if n != 1]:
            raise RecipeError(f"{name} has the shape {shape}, not {wanted}")
        return shape

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises if the tensor has another shape than its codes, as a transposed one does."""
        said = self.settings.get("shape", list(shape))
        if said != list(shape):
            raise RecipeError(f"its codes have the shape {shape}, but its shape is {said}")

    def _block_size(self, shape: tuple[int, ...], scale: tuple[int, ...]) -> tuple[int, ...]:
        self._check_shape(shape)
        block = self.settings.get("block_size")
        if block in (None, []) and self.kind == "Float8Tensor":
            # Like torchao, derive the block from the shape of the scales.
            if entries(scale) == 1:
                return shape
            if len(scale) == len(shape) and not any(
                n < 1 or size % n for size, n in zip(shape, scale, strict=True)
            ):
                return tuple(size // n for size, n in zip(shape, scale, strict=True))
        if not isinstance(block, list) or len(block) != len(shape):
            raise RecipeError(f"block_size = {block} is not one size per side of {shape}")
        if not all(
            type(n) is int and n > 0 and size % n == 0 for size, n in zip(shape, block, strict=True)
        ):
            raise RecipeError(f"block_size = {block} does not divide the shape {shape}")
        return tuple(block)

    def _dtype(self, key: str) -> str:
        dtype = self.settings.get(key)
        return dtype if isinstance(dtype, str) and dtype in _REALS else ""

    def _note(self, what: str, shape: tuple[int, ...], block: tuple[int, ...]) -> str:
        (m, n), (a, b) = shape[-2:], block[-2:]
        per = {(m, n): "matrix", (1, n): "row"}.get((a, b), f"block of {a}x{b}")
        also = " and a factor per input" if "act_pre_scale" in self.parts else ""
        return f"dequantised from torchao's {self.kind} ({what}) with a scale per {per}{also}"
