"""Layers of GPT-2 and its relatives, whose plain checkpoints store weights as (inputs, outputs).

Their class is the Conv1D of transformers. transformers and auto-gptq transpose such a weight before
they quantise it, so the parts give the transpose of the weight in the plain checkpoint.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from wellcond.recipes.base import Content, Read, Recipe

_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
_LAYERS = ("c_attn", "q_attn", "c_proj", "c_fc")


@dataclass(frozen=True, kw_only=True)
class Transposed(Recipe):
    """The transpose of the matrix that another recipe builds."""

    of: Recipe

    def build(self, read: Read, index: int) -> Tensor:
        return self.of.build(read, index).T.contiguous()


def as_in_plain(recipe: Recipe, content: Content) -> Recipe:
    """Returns the recipe, or its transpose if its layer is a Conv1D."""
    layer = recipe.label.removesuffix(".weight").rpartition(".")[2]
    conv1d = content.beside("config.json").get("model_type") in _MODELS and layer in _LAYERS
    if not conv1d or len(recipe.shape) != 2:
        return recipe
    known = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(Recipe)}
    return Transposed(**{**known, "shape": recipe.shape[::-1]}, of=recipe)
