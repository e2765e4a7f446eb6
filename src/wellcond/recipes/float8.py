"""Weights in float8 with a scale for the whole tensor, per row, or per block.

`weight` is stored with `weight_scale_inv` (DeepSeek V3, transformers), `scale` (DeepSeek V4),
`weight_scale` (FBGEMM), `qscale_weight` (Mistral) or `scale_weight` (ComfyUI), and a stack of
experts `gate_up_proj` with `gate_up_proj_scale_inv`. All of these scales multiply the codes.

Letters: W (m, n) a weight, or one matrix of a stack (b, m, n); s its scales.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from wellcond.recipes.base import Candidate, Content, Recipe, RecipeError
from wellcond.recipes.scaled import Scaled, check_scales, sides_of
from wellcond.weights.matrices import entries

KINDS = {"float8_e4m3fn": "FP8 (E4M3)", "float8_e5m2": "FP8 (E5M2)"}
_FNUZ = ("float8_e4m3fnuz", "float8_e5m2fnuz")
_SCALES = ("{}_scale_inv", "{}_scale", "{}_weight_scale")
_SCALES_OF_WEIGHT = (*_SCALES, "scale", "scale_weight", "qscale_weight")
# Scales of activations, and ComfyUI's description of a layer: they are parts of the weight.
_OTHERS = ("{}_activation_scale", "{}_input_scale", "{}_output_scale")
_OTHERS_OF_WEIGHT = (
    *_OTHERS,
    *("input_scale", "input_scale_ub", "activation_scale", "output_scale"),
    *("scale_input", "qscale_act", "comfy_quant"),
)
# Tensors that change the weight, and that do not belong to these formats.
_UNKNOWN = ("{}_scale_2", "{}_global_scale", "{}_zero_point", "{}_g_idx")
_UNKNOWN_OF_WEIGHT = (*_UNKNOWN, "pre_quant_scale", "smooth_scale", "scales", "zeros", "qzeros")


def find_float8(content: Content) -> Iterator[Candidate]:
    """The float8 matrices and stacks with a scale in the same module."""
    for name, (shape, dtype) in content.tensors.items():
        if len(shape) < 2 or (dtype not in KINDS and dtype not in _FNUZ):
            continue
        scales = names_beside(content, name, _SCALES, _SCALES_OF_WEIGHT)
        if scales:
            others = names_beside(content, name, _OTHERS, _OTHERS_OF_WEIGHT)
            parts = (name, *scales, *others)
            yield Candidate(name, parts, partial(_make, content, parts, scales))


def names_beside(
    content: Content, name: str, patterns: tuple[str, ...], of_weight: tuple[str, ...]
) -> tuple[str, ...]:
    """The existing tensors in the module of `name`; {} in a pattern stands for its own name."""
    module, dot, own = name.rpartition(".")
    kinds = of_weight if own == "weight" else patterns
    found = (f"{module}{dot}{kind.format(own)}" for kind in kinds)
    return tuple(dict.fromkeys(one for one in found if one in content.tensors))


def _make(content: Content, parts: tuple[str, ...], scales: tuple[str, ...]) -> Recipe:
    name = parts[0]
    if len(scales) > 1:
        raise RecipeError(f"{scales[0]} and {scales[1]} both scale it")
    for unknown in names_beside(content, name, _UNKNOWN, _UNKNOWN_OF_WEIGHT):
        raise RecipeError(f"{unknown} is stored next to it, but does not belong to scaled FP8")
    return make_float8(content, parts, _find_block(content, name, scales[0]))


def make_float8(content: Content, parts: tuple[str, ...], block: tuple[int, int] | None) -> Recipe:
    """Builds the recipe of codes and scales with these blocks, or with one scale per matrix (None).

    Raises:
        RecipeError: the scales do not fit.
    """
    name, scales = parts[:2]
    shape, dtype, s = content.shape(name), content.dtype(name), content.shape(scales)
    if dtype not in KINDS:
        raise RecipeError(f"no known format has scales for codes of {dtype}")
    if 0 in shape:
        raise RecipeError(f"it has no entries: its shape is {shape}")
    check_scales(content, scales)
    stacked = is_stack(name, shape)
    recipe = Scaled(
        name,
        parts,
        shape,
        "",
        stacked=stacked,
        each=(scales,) if stacked and s and s[0] == shape[0] else (),
    )
    recipe = replace(recipe, block=block or recipe.sides).explain(KINDS[dtype])
    if entries(s) != (shape[0] if recipe.each else 1) * entries(recipe.blocks):
        raise RecipeError(
            "{} of shape {} does not fit blocks of {}x{} in {}".format(
                scales, s, *recipe.block, shape
            )
        )
    return recipe


def is_stack(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the first side counts experts. A 3-d tensor named `weight` might be a kernel."""
    return len(shape) == 3 and name.rpartition(".")[2] != "weight"


def _find_block(content: Content, name: str, scales: str) -> tuple[int, int] | None:
    """The block of a scale; None if there is one per matrix."""
    shape, s = content.shape(name), content.shape(scales)
    stacked = is_stack(name, shape)
    if len(s) < 2 and entries(s) == 1:
        return None
    if len(shape) > 2 and not stacked:
        raise RecipeError(f"{scales} of shape {s} is not one number for all of {shape}")
    m, n = shape[-2:]
    config = content.quantization()
    if config.get("quant_method") == "fbgemm_fp8" and stacked:
        # Experts are stored as (in, out) with a scale per output.
        if s in ((shape[0], 1, n), (shape[0], n, 1)):
            return m, 1
        raise RecipeError(f"{scales} of shape {s} is not one number per column of {shape}")
    own = s[1:] if stacked and s and s[0] == shape[0] else s
    if stacked and len(s) == len(own):
        raise RecipeError(f"{scales} of shape {s} is not one per matrix of {shape}")
    block = sides_of(config, "weight_block_size")
    if block and own:
        if own != (-(-m // block[0]), -(-n // block[1])):
            raise RecipeError(
                f"{scales} of shape {s} contradicts the weight_block_size {list(block)} in "
                f"config.json and the shape {shape}"
            )
        return _check_halves(content, name, block)
    if entries(own) == 1:
        return None
    if own == (m, 1) or (own == (m,) and m != n):
        return 1, n
    if own == (m,):
        raise RecipeError(f"{scales} of shape {s} might scale the rows or the columns of {shape}")
    raise RecipeError(f"the blocks of {scales} are unknown: config.json has no weight_block_size")


def _check_halves(content: Content, name: str, block: tuple[int, int]) -> tuple[int, int]:
    """Returns the block unless one might cover both gate and up, which can have separate blocks."""
    m = content.shape(name)[-2]
    if re.search(r"gate_up_proj$", name) and block[0] > 1 and (m // 2) % block[0]:
        raise RecipeError(
            f"blocks of {block[0]} rows do not divide gate and up with {m // 2} rows each: "
            "whether up begins with a new block is unknown"
        )
    return block
