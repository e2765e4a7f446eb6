"""Ternary weights of BitNet as transformers stores them: four rows per byte, and one scale.

Letters: W (m, n) a weight; rows i, i + m/4, i + m/2 and i + 3 m/4 share the bytes of row i, with
row i in the lowest bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wellcond.recipes.base import Candidate, Content, Read, Recipe, RecipeError, show, zeros
from wellcond.recipes.codes import row_ranges

_STEP = 1 << 20  # entries that are converted at once
_FLOATS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class BitNet(Recipe):
    """W from codes 0, 1, 2 for -1, 0, 1, which the layer multiplies or divides by the scale."""

    divides: bool

    def build(self, read: Read, index: int) -> Tensor:
        codes, scale = self.parts
        W = zeros(self.shape)
        stored = self.shape[0] // 4
        for start, stop in row_ranges(stored, max(1, _STEP // self.shape[1])):
            packed = read(codes, (start, stop))
            for k in range(4):
                q = (packed >> 2 * k) & 3
                if bool((q == 3).any()):
                    raise RecipeError(f"{codes} contains the code 3, but BitNet has only 0 to 2")
                W[k * stored + start : k * stored + stop] = q.to(torch.float32) - 1
        s = read(scale).to(torch.float32).reshape(())
        return W.div_(s) if self.divides else W.mul_(s)


def find_bitnet(content: Content) -> Iterator[Candidate]:
    """The weights of dtype uint8 with a scale, if the config names BitNet as the format."""
    if content.quantization().get("quant_method") != "bitnet":
        return
    for name, (_, dtype) in content.tensors.items():
        scale = f"{name}_scale"
        if dtype == "uint8" and name.rpartition(".")[2] == "weight" and scale in content.tensors:

            def make(name: str = name, scale: str = scale) -> Recipe:
                return _make(content, name, scale)

            yield Candidate(name, (name, scale), make)


def _make(content: Content, name: str, scale: str) -> Recipe:
    kind = content.quantization().get("linear_class", "bitlinear")  # the default of transformers
    if kind not in ("bitlinear", "autobitlinear"):
        raise RecipeError(f"its linear_class in config.json is {show(kind)}, which is unknown")
    stored = content.shape(name)
    if len(stored) != 2 or 0 in stored:
        raise RecipeError(f"{name} has the shape {stored}")
    if content.shape(scale) not in ((), (1,)) or content.dtype(scale) not in _FLOATS:
        raise RecipeError(
            f"{scale} has the shape {content.shape(scale)} and the dtype {content.dtype(scale)}"
        )
    return BitNet(
        label=name,
        parts=(name, scale),
        shape=(4 * stored[0], stored[1]),
        note="dequantised from the ternary codes of BitNet with one scale",
        stored_as="ternary",
        dtype=content.dtype(scale),
        divides=kind == "bitlinear",
    )
