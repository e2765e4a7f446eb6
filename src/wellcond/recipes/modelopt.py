"""Weights as NVIDIA's ModelOpt exports them: FP8, MXFP8, NVFP4 and MXFP4.

The algorithm is given in config.json or in hf_quant_config.json in the same folder. Stacks of
experts that are stored as (in, out) have float4 codes packed along the inputs, which are the rows.

Letters: W (m, n) a weight, or one matrix of a stack (b, m, n).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from wellcond.recipes.base import Candidate, Content, Recipe, RecipeError, show
from wellcond.recipes.float8 import KINDS, is_stack, make_float8, names_beside
from wellcond.recipes.scaled import Float4, check_one, check_scales

_ROWS = "FP8_PER_CHANNEL_PER_TOKEN"
_ONE = ("FP8", "FP8_PB_WO", _ROWS)
# The number of float4 codes per scale.
_FLOAT4 = {"NVFP4": 16, "W4A16_NVFP4": 16, "MXFP4": 32, "W4A8_MXFP4_FP8": 32}
_SCALES = ("{}_weight_scale",)
_OTHERS = ("{}_weight_scale_2", "{}_input_scale", "{}_output_scale")
_OTHERS_OF_WEIGHT = ("weight_scale_2", "input_scale", "output_scale", "pre_quant_scale")


def find_modelopt(content: Content) -> Iterator[Candidate]:
    """The weights and stacks of experts with scales, if a config names ModelOpt."""
    settings = _read_settings(content)
    if not settings:
        return
    for name, (shape, dtype) in content.tensors.items():
        scales = names_beside(content, name, _SCALES, ("weight_scale",))
        if len(shape) < 2 or not scales or dtype not in (*KINDS, "uint8", "int8"):
            continue
        others = names_beside(content, name, _OTHERS, _OTHERS_OF_WEIGHT)
        parts = (name, *scales, *others)
        yield Candidate(name, parts, partial(_make, content, settings, parts))


def _read_settings(content: Content) -> list[Mapping[str, Any]]:
    """The settings in the two configs, without empty ones."""
    ours = content.quantization()
    beside = content.beside("hf_quant_config.json").get("quantization")
    method = ours.get("quant_method")
    named = isinstance(method, str) and method.startswith("modelopt")
    return [one for one in (ours if named else None, beside) if isinstance(one, Mapping) and one]


def _find_algorithm(settings: list[Mapping[str, Any]], module: str) -> str:
    """The algorithm of a module, in upper case."""
    found = set()
    for one in settings:
        algorithm = one.get("quant_algo")
        layers = one.get("quantized_layers")
        if algorithm == "MIXED_PRECISION" and isinstance(layers, Mapping):
            layer = layers.get(module)
            algorithm = layer.get("quant_algo") if isinstance(layer, Mapping) else None
        found.add(show(algorithm).upper())
    if len(found) > 1:
        raise RecipeError(f"two configs name different algorithms: {', '.join(sorted(found))}")
    return found.pop()


def _make(content: Content, settings: list[Mapping[str, Any]], parts: tuple[str, ...]) -> Recipe:
    name, scales = parts[:2]
    shape, s = content.shape(name), content.shape(scales)
    module, _, own = name.rpartition(".")
    algorithm = _find_algorithm(settings, module if own == "weight" else name)
    if "pre_quant_scale" in (part.rpartition(".")[2] for part in parts):
        raise RecipeError("its layer first multiplies the inputs by pre_quant_scale")
    if content.dtype(name) == "uint8" and algorithm in _FLOAT4:
        return _make_float4(content, parts, _FLOAT4[algorithm])
    if content.dtype(name) not in KINDS or not algorithm.startswith(("FP8", "MXFP8")):
        raise RecipeError(f"codes of dtype {content.dtype(name)} do not fit {algorithm}")
    if any(part.endswith("_scale_2") for part in parts):
        raise RecipeError(f"it has a second scale, which {algorithm} does not use")
    m, n = shape[-2:]
    if algorithm == "MXFP8" and len(shape) == 2 and s == (m, -(-n // 32)):
        check_scales(content, scales, ("uint8",))
        return make_float8(content, parts, (1, 32))
    if algorithm == _ROWS and len(shape) == 2 and s in ((m,), (m, 1)):
        return make_float8(content, parts, (1, n))
    one_each = is_stack(name, shape) and s in ((shape[0],), (shape[0], 1), (shape[0], 1, 1))
    if algorithm in _ONE and (one_each or s in ((), (1,))):
        return make_float8(content, parts, None)
    raise RecipeError(f"{scales} of shape {s} does not fit {algorithm} and the shape {shape}")


def _make_float4(content: Content, parts: tuple[str, ...], size: int) -> Recipe:
    """The recipe of bytes of two codes with a scale per `size` codes; NVFP4 has a second scale."""
    name, scales = parts[:2]
    shape, s = content.shape(name), content.shape(scales)
    second = next((part for part in parts if part.endswith("weight_scale_2")), "")
    if (size == 16) != bool(second):
        raise RecipeError("NVFP4 must have a weight_scale_2, and MXFP4 must not have one")
    check_scales(content, scales, ("float8_e4m3fn" if second else "uint8",))
    stacked = is_stack(name, shape)
    if 0 in shape or len(shape) != 2 + stacked:
        raise RecipeError(f"its codes have the shape {shape}")
    *lead, m, n = shape
    along = 2 * n % size == 0 and s == (*lead, m, 2 * n // size)
    across = stacked and 2 * m % size == 0 and s == (*lead, 2 * m // size, n)
    if along == across:
        raise RecipeError(f"{scales} of shape {s} does not fit {size} codes per scale in {shape}")
    each: tuple[str, ...] = (scales,) if stacked else ()
    if second and stacked and content.shape(second) == (shape[0],):
        check_scales(content, second, ("float32",))
        each = (scales, second)
    elif second:
        check_one(content, second)
    recipe = Float4(
        name,
        parts,
        (*lead, 2 * m, n) if across else (*lead, m, 2 * n),
        "",
        block=(1, size),
        stacked=stacked,
        each=each,
        transposed=across,
        factor=second,
    )
    return recipe.explain("NVFP4" if second else "MXFP4")
