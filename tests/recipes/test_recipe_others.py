"""Formats that are recognised but not built: one reason for all tensors of a layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import content_from, content_of, load_expected

from wellcond.recipes.find import find_recipes
from wellcond.recipes.others import FORMATS, Format, find_others

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.name)
@pytest.mark.parametrize("layer", ["", "model.layers.0.up_proj."])
def test_format_is_recognised_by_names(one: Format, layer: str) -> None:
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
    assert why.startswith(f"it is stored as {one.name}, which wellcond does not decode: ")


@pytest.mark.parametrize(
    "names",
    [
        ("codes", "scales"),
        ("B", "s"),  # in float32, as in other layers
        ("weight", "scales", "tables", "tables2"),
        ("indices", "weight"),
        ("q_weight", "k_weight"),
    ],
)
def test_other_layers_are_not_candidates(names: tuple[str, ...]) -> None:
    content = content_from({f"l.{name}": torch.ones(4, 4) for name in names})
    assert not list(find_others(content))


@pytest.mark.parametrize(
    "folder",
    [
        *("bitsandbytes_nf4", "bitsandbytes_int8", "bitsandbytes_layers"),
        *("gptq_3_bits", "gptq_borrows", "gptq_v2", "gptq_planes", "gptq_auto_round"),
        *("awq_gemm", "awq_gemv", "mlx_affine", "mlx_mxfp4", "mlx_nvfp4", "mlx_mxfp8"),
        *("hqq", "quanto", "bitnet"),
    ],
)
def test_no_finder_claims_tensors_of_another(folder: str) -> None:
    content = content_of(DATA / folder)
    recipes, refused = find_recipes(content)
    assert recipes.keys() == load_expected(DATA / folder).keys()
    assert not refused
    assert {part for one in recipes.values() for part in one.parts} == set(content.tensors)
