"""Finds the recipes of a checkpoint in all known formats, and the reasons why a weight has none."""

from __future__ import annotations

from collections.abc import Mapping

from wellcond.recipes.awq import find_awq
from wellcond.recipes.base import Content, Finder, Recipe, RecipeError
from wellcond.recipes.bitnet import find_bitnet
from wellcond.recipes.bitsandbytes import find_bitsandbytes
from wellcond.recipes.compressed import find_compressed
from wellcond.recipes.float8 import find_float8
from wellcond.recipes.gptq import find_gptq
from wellcond.recipes.hqq import find_hqq
from wellcond.recipes.mlx import find_mlx
from wellcond.recipes.modelopt import find_modelopt
from wellcond.recipes.mxfp4 import find_mxfp4
from wellcond.recipes.others import find_others
from wellcond.recipes.parametrizations import find_parametrizations
from wellcond.recipes.quanto import find_quanto
from wellcond.recipes.torchao import find_torchao
from wellcond.weights.quantised import find_scaled

_LETTERS = 1000  # length limit of a reason, which can contain long names of tensors
# If several finders claim a tensor, the first one gets it.
FINDERS: tuple[Finder, ...] = (
    find_torchao,
    find_compressed,
    find_modelopt,
    find_bitsandbytes,
    find_others,
    find_awq,
    find_gptq,
    find_mlx,
    find_hqq,
    find_quanto,
    find_bitnet,
    find_mxfp4,
    find_float8,
    find_parametrizations,
)


def find_recipes(content: Content) -> tuple[dict[str, Recipe], dict[str, tuple[str, ...]]]:
    """Finds the recipes of weights, and the reasons why other candidates cannot be built.

    Returns:
        The recipes by the names of their weights. For every other candidate, by the name of its
        main part, a tuple of the reason and the names of its other parts.
    """
    recipes: dict[str, Recipe] = {}
    refused: dict[str, tuple[str, ...]] = {}
    taken: set[str] = set()
    for find in FINDERS:
        for candidate in find(content):
            first, *others = candidate.parts
            if candidate.label in recipes or not taken.isdisjoint(candidate.parts):
                continue
            taken.update(candidate.parts)
            try:
                label = candidate.label
                if label in content.tensors and label not in candidate.parts:
                    raise RecipeError(f"{label} is also stored")
                recipes[label] = candidate.make()
            except RecipeError as why:
                refused[first] = (str(why)[:_LETTERS], *others)
            except Exception:  # a description in a file can be anything
                refused[first] = ("its description is damaged", *others)
    for label, scale in _find_other_scales(content, recipes, taken).items():
        first, *others = recipes.pop(label).parts
        refused[first] = (
            f"{scale} is stored next to it, but is not one of its parts"[:_LETTERS],
            *others,
        )
    return recipes, refused


def _find_other_scales(
    content: Content, recipes: Mapping[str, Recipe], taken: set[str]
) -> dict[str, str]:
    """Finds weights with a scale that is not a part of any weight, perhaps of an unknown format.

    Args:
        content: the content of the checkpoint.
        recipes: the recipes by the names of their weights.
        taken: the parts of all weights.

    Returns:
        The name of the scale by the name of the weight.
    """
    labels = {recipe.parts[0]: label for label, recipe in recipes.items()}
    labels |= {label: label for label in recipes}
    return {
        labels[of]: name
        for name in content.tensors
        if name not in taken
        for of, surely in find_scaled(name)
        if surely and of in labels
    }
