"""Weights in the microscaling formats MXFP4 and MXFP8: a power of two scales 32 inputs of a row.

The tensors are `X_blocks` and `X_scales` of gpt-oss in transformers, `X.blocks` and `X.scales` in
its original files, `weight` and `scale` of the experts of DeepSeek V4, `weight` and `weight_scale`
of Quark, or float8 weights with such scales. A byte contains two float4 values, the first one in
the low bits.

Letters: W (m, n) a weight, of m outputs; E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from wellcond.recipes.base import Candidate, Content, Read, Recipe, RecipeError, show, zeros
from wellcond.recipes.codes import as_scales, row_ranges, unpack_float4
from wellcond.weights.matrices import entries
from wellcond.weights.quantised import is_power

_BLOCK = 32
_FLOAT4 = ("F4", "float4_e2m1fn_x2")
_FLOAT8 = {"float8_e4m3fn": "E4M3", "float8_e5m2": "E5M2"}
_SCALES = ("{}_scale_inv", "{}_scale")


@dataclass(frozen=True)
class Microscaled(Recipe):
    """W = codes * s with a scale per 32 inputs, or a stack of E matrices, built one at a time.

    Attributes:
        float4: the codes are pairs of float4, not float8.
        transposed: the plain weight is stored as (inputs, outputs).
    """

    float4: bool = True
    transposed: bool = False

    @property
    def count(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1

    def build(self, read: Read, index: int) -> Tensor:
        stacked = len(self.shape) == 3
        m, n = reversed(self.shape[-2:]) if self.transposed else self.shape[-2:]
        codes, scales = self.parts[:2]
        one = read(codes, (index, index + 1))[0] if stacked else None
        s = as_scales(read(scales) if one is None else read(scales, (index, index + 1))[0])
        W = zeros((m, n))
        for start, stop in row_ranges(m):
            rows = read(codes, (start, stop)) if one is None else one[start:stop]
            W[start:stop] = unpack_float4(rows.flatten(1)) if self.float4 else rows
            W[start:stop].view(stop - start, -1, _BLOCK).mul_(s[start:stop, :, None])
        return W.mT if self.transposed else W


def find_mxfp4(content: Content) -> Iterator[Candidate]:
    """Weights of float4 or float8 with scales that are powers of two."""
    quark = {kind: _explain_quark(content, kind) for kind in ("fp4", "fp8")}
    for name, (shape, dtype) in content.tensors.items():
        blocks = name.endswith(("_blocks", ".blocks")) and (dtype == "uint8" or len(shape) == 4)
        scales = f"{name.removesuffix('blocks')}scales" if blocks else _find_scales(content, name)
        label = name[: -len("_blocks")] if blocks else name
        if not label or scales not in content.tensors:
            continue
        make = _of_blocks if blocks else partial(_of_codes, quark)
        yield Candidate(label, (name, scales), partial(make, content, name, scales, label))


def _find_scales(content: Content, name: str) -> str:
    """The name of the scales of codes that look like one of the formats, or ""."""
    dtype, method = content.dtype(name), content.quantization().get("quant_method")
    stem, dot, own = name.rpartition(".")
    names = [f"{stem}{dot}{scale.format(own)}" for scale in _SCALES]
    names += [f"{stem}{dot}scale"] if own == "weight" else []
    scales = next((one for one in names if one in content.tensors), "")
    kind = content.dtype(scales)
    powers = kind == "uint8" or is_power(kind)
    if dtype in _FLOAT8:
        fits = powers and method in ("mxfp8", "quark")
    elif dtype == "uint8":
        fits = powers and method == "quark"
    elif dtype == "int8":
        fits = powers or (kind == "float32" and _says_float4(content))
    else:
        fits = powers and dtype in _FLOAT4
    return scales if fits else ""


def _of_blocks(content: Content, blocks: str, scales: str, label: str) -> Recipe:
    """Experts of gpt-oss: blocks (E, m, n/32, 16) and scales (E, m, n/32)."""
    method = content.quantization().get("quant_method", "mxfp4")
    if method != "mxfp4":
        raise RecipeError(f"its quant_method in config.json is {show(method)}, not mxfp4")
    shape, s = content.shape(blocks), content.shape(scales)
    if content.dtype(blocks) != "uint8":
        raise RecipeError(f"{blocks} has the dtype {content.dtype(blocks)}, not uint8")
    if len(shape) != 4 or shape[-1] != _BLOCK // 2 or not entries(shape):
        raise RecipeError(f"blocks of shape {shape} are not (experts, outputs, blocks, 16)")
    _check_scales(content, scales, shape[:-1], "uint8")
    E, m, n = *s[:2], _BLOCK * s[2]
    transposed = blocks.endswith("_blocks")  # transformers stores (inputs, outputs)
    shape = (E, n, m) if transposed else (E, m, n)
    return Microscaled(
        label,
        (blocks, scales),
        shape,
        _describe("MXFP4"),
        stored_as="float4_e2m1",
        transposed=transposed,
    )


def _of_codes(
    quark: Mapping[str, str], content: Content, codes: str, scales: str, label: str
) -> Recipe:
    """Codes (m, n) of float8 or (m, n/2) of float4 pairs, or a stack of them; scales (m, n/32)."""
    dtype, shape = content.dtype(codes), content.shape(codes)
    float8 = dtype in _FLOAT8
    if len(shape) not in (2, 3) or not entries(shape):
        raise RecipeError(f"codes of shape {shape} are neither a matrix nor a stack of them")
    if dtype == "int8" and not _says_float4(content):
        raise RecipeError(
            "config.json does not mark int8 as float4, with expert_dtype fp4 or quant_method fp8"
        )
    if why := quark["fp8" if float8 else "fp4"]:
        raise RecipeError(why)
    shape = (*shape[:-1], shape[-1] if float8 or dtype == "F4" else 2 * shape[-1])
    if shape[-1] % _BLOCK:
        raise RecipeError(f"its {shape[-1]} inputs are not a multiple of {_BLOCK}")
    _check_scales(content, scales, (*shape[:-1], shape[-1] // _BLOCK), "uint8", "float32")
    note = _describe(f"MXFP8 ({_FLOAT8[dtype]})" if float8 else "MXFP4")
    stored_as = "" if float8 else "float4_e2m1"
    return Microscaled(label, (codes, scales), shape, note, stored_as=stored_as, float4=not float8)


def _describe(what: str) -> str:
    return f"dequantised from {what} with a scale per {_BLOCK} inputs"


def _check_scales(content: Content, scales: str, wanted: tuple[int, ...], *kinds: str) -> None:
    shape, dtype = content.shape(scales), content.dtype(scales)
    if shape != wanted:
        raise RecipeError(f"{scales} has the shape {shape}, not {wanted}")
    if dtype not in kinds and not is_power(dtype):
        raise RecipeError(f"{scales} has the dtype {dtype}, which does not store powers of two")


def _says_float4(content: Content) -> bool:
    """Whether config.json marks int8 as float4, by DeepSeek V4's expert_dtype or by quant_method.

    If quant_method is fp8, transformers reads every int8 weight as float4.
    """
    config, settings = content.beside("config.json"), content.quantization()
    said = settings.get("expert_dtype", config.get("expert_dtype"))
    return said == "fp4" or (said is None and settings.get("quant_method") == "fp8")


def _explain_quark(content: Content, wanted: str) -> str:
    """Why Quark weights of this dtype are not in a microscaling format; "" if they are."""
    settings = content.quantization()
    if settings.get("quant_method") != "quark":
        return ""
    layers = [settings.get("global_quant_config")]
    for key in ("layer_quant_config", "layer_type_quant_config"):
        group = settings.get(key)
        layers += group.values() if isinstance(group, Mapping) else ()
    specs = [
        spec
        for layer in layers
        if isinstance(layer, Mapping)
        for spec in _as_list(layer.get("weight"))
        if isinstance(spec, Mapping) and show(spec.get("dtype")).startswith(wanted)
    ]
    if not specs:
        return f"no weight in config.json has the dtype {wanted}"
    for spec in specs:
        form = {key: spec.get(key) for key in ("qscheme", "group_size", "scale_format")}
        if form != {"qscheme": "per_group", "group_size": _BLOCK, "scale_format": "e8m0"}:
            return f"its {wanted} scales in config.json are not e8m0 per {_BLOCK} inputs"
    return ""


def _as_list(one: Any) -> list[Any]:
    return one if isinstance(one, list) else [one]
