"""Formats that are known by their names and not built: one reason each, for all their tensors."""

from __future__ import annotations

import pytest
import torch
from support import content_from

from wellcond.recipes.find import find_recipes
from wellcond.recipes.others import FORMATS, Format, find_others


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.name)
@pytest.mark.parametrize("layer", ["", "model.layers.0.up_proj."])
def test_a_format_is_known_by_its_names(one: Format, layer: str) -> None:
    names = [need.partition(":") for need in one.required.split()]
    dtypes = {name: getattr(torch, dtype or "float32") for name, _, dtype in names}
    dtypes |= dict.fromkeys(one.more.split(), torch.float32)
    tensors = {f"{layer}{name}": torch.ones(4, 4).to(dtype) for name, dtype in dtypes.items()}
    content = content_from(tensors | {"other.weight": torch.ones(3, 3)})
    recipes, refused = find_recipes(content)
    assert not recipes
    ((main, (why, *others)),) = refused.items()
    assert main == f"{layer}{names[0][0]}"
    assert {main, *others} == set(tensors)
    assert why.startswith(f"it is stored as {one.name}, which is not decoded: ")


@pytest.mark.parametrize(
    "names",
    [
        ("codes", "scales"),
        ("B", "s"),  # in float32, as other layers have them
        ("weight", "scales", "tables", "tables2"),
        ("indices", "weight"),
        ("q_weight", "k_weight"),
    ],
)
def test_other_layers_are_left_alone(names: tuple[str, ...]) -> None:
    content = content_from({f"l.{name}": torch.ones(4, 4) for name in names})
    assert not list(find_others(content))
