"""Weights in float8 with a scale for the whole tensor, per row, or per block.

`weight` beside `weight_scale_inv` (DeepSeek V3), `scale` (V4), `weight_scale` (compressed-tensors,
ModelOpt, FBGEMM) or `scale_weight` (ComfyUI). All of these multiply, whatever they are called.

Letters: W (m, n) a weight; s its scales.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wellcond.recipes.base import Candidate, Content, Read, Recipe, RecipeError, zeros
from wellcond.recipes.codes import as_scales, multiply_blocks_, row_ranges
from wellcond.weights.quantised import is_narrow

_SCALES = ("{}_scale_inv", "{}_scale", "scale_{}")


@dataclass(frozen=True)
class Float8(Recipe):
    """W = codes * s, where each scale stands for a block of entries."""

    block: tuple[int, int] = (1, 1)

    def build(self, read: Read, index: int) -> Tensor:
        codes, scales = self.parts[:2]
        W = zeros(self.shape)
        for start, stop in row_ranges(len(W)):
            W[start:stop] = read(codes, (start, stop)).to(torch.float32)
        s = as_scales(read(scales))
        return multiply_blocks_(W, s.reshape(-1, 1) if s.ndim < 2 else s, self.block)


def find_float8(content: Content) -> Iterator[Candidate]:
    """The matrices of float8 with a scale beside them."""
    for name, (shape, dtype) in content.tensors.items():
        stem, dot, own = name.rpartition(".")
        beside = [f"{stem}{dot}{scale.format(own)}" for scale in _SCALES]
        scales = next((one for one in beside if one in content.tensors), None)
        if not is_narrow(dtype) or len(shape) != 2 or scales is None:
            continue

        def make(name: str = name, scales: str = scales) -> Recipe:
            (m, n), s = content.shape(name), content.shape(scales)
            block = _block(content, (m, n), s)
            what = re.sub(r".*_(e\d)(m\d).*", r"\1\2", content.dtype(name)).upper()
            per = {(m, n): "the tensor", (1, n): "row"}.get(block, "block of {}x{}".format(*block))
            note = f"dequantised from FP8 ({what}) with a scale per {per}".replace(
                "per the", "of the"
            )
            return Float8(name, (name, scales), (m, n), note, block=block)

        yield Candidate(name, (name, scales), make)


def _block(content: Content, shape: tuple[int, int], s: tuple[int, ...]) -> tuple[int, int]:
    m, n = shape
    if s in ((), (1,), (1, 1)):
        return m, n
    if s in ((m,), (m, 1)):
        return 1, n
    block = content.quantization().get("weight_block_size")
    if isinstance(block, list) and len(block) == 2 and all(type(side) is int for side in block):
        return block[0], block[1]
    raise RecipeError("its blocks are not known: config.json has no weight_block_size")
