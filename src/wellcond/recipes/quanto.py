"""Weights that quanto quantises: `X._data` and `X._scale`, where X is the name of the weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wellcond.recipes.base import Candidate, Content, Read, Recipe, RecipeError, zeros
from wellcond.recipes.codes import row_ranges
from wellcond.weights.quantised import is_narrow, is_power

_STEP = 1 << 20  # entries that are converted at once
_FLOATS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Quanto(Recipe):
    """W = codes * s with 8-bit codes and a scale s per row."""

    def build(self, read: Read, index: int) -> Tensor:
        codes, scales = self.parts[:2]
        W = zeros(self.shape)
        s = read(scales).to(torch.float32).reshape(-1, 1).expand(len(W), 1)
        for start, stop in row_ranges(len(W), max(1, _STEP // self.shape[1])):
            W[start:stop] = read(codes, (start, stop)).to(torch.float32) * s[start:stop]
        return W


def find_quanto(content: Content) -> Iterator[Candidate]:
    """The weights with codes in `_data`."""
    for name in content.tensors:
        label, found, inner = name.partition("._data")
        if not found or inner not in ("", "._data") or f"{label}._scale" not in content.tensors:
            continue
        stem = label.rpartition(".")[0]
        beside = [f"{label}._scale", f"{label}._shift"]
        beside += [f"{stem}.{scale}" for scale in ("input_scale", "output_scale") if stem]
        parts = (name, *(one for one in beside if one in content.tensors))

        def make(label: str = label, parts: tuple[str, ...] = parts) -> Recipe:
            return _make(content, label, parts)

        yield Candidate(label, parts, make)


def _make(content: Content, label: str, parts: tuple[str, ...]) -> Recipe:
    codes, scales = parts[:2]
    if f"{label}._shift" in parts or codes.endswith("._data._data"):
        raise RecipeError(
            "quanto does not store the shape of a weight of 2 or 4 bits: dequantise the model with "
            "quanto and save it"
        )
    shape, dtype = content.shape(codes), content.dtype(codes)
    if (
        len(shape) != 2
        or 0 in shape
        or not (dtype == "int8" or is_narrow(dtype))
        or is_power(dtype)
    ):
        raise RecipeError(f"{codes} has the shape {shape} and the dtype {dtype}")
    # For a single row, quanto stores the scale as a 0-d tensor.
    fits = content.shape(scales) in ((shape[0], 1), ())
    if not fits or content.dtype(scales) not in _FLOATS:
        raise RecipeError(
            f"{scales} has the shape {content.shape(scales)} and the dtype {content.dtype(scales)}"
        )
    note = f"dequantised from {dtype} of quanto with a scale per row"
    return Quanto(label, parts, shape, note, dtype=content.dtype(scales))
