"""Weights of HQQ, quanto and BitNet, compared entry by entry with those of the libraries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutations import check_mutated
from support import build_all, content_from, content_of, load_expected, reason_of, weights_of
from torch import Tensor

from wellcond.recipes import bitnet, hqq, quanto
from wellcond.recipes.base import Content, Finder
from wellcond.recipes.bitnet import find_bitnet
from wellcond.recipes.find import find_recipes
from wellcond.recipes.hqq import find_hqq
from wellcond.recipes.quanto import find_quanto

DATA = Path(__file__).parent / "data"
FINDERS: dict[str, Finder] = {"hqq": find_hqq, "quanto": find_quanto, "bitnet": find_bitnet}


@pytest.mark.parametrize("folder", FINDERS)
def test_every_entry_equals_library(folder: str) -> None:
    content = content_of(DATA / folder)
    weights, expected = weights_of(content, FINDERS[folder]), load_expected(DATA / folder)
    assert weights.keys() == expected.keys()
    assert find_recipes(content) == (find_recipes(content)[0], {})
    for label, W in weights.items():
        # BitNet divides by the product with the scale of the inputs.
        rtol = 2**-22 if folder == "bitnet" else 0
        torch.testing.assert_close(W, expected[label], rtol=rtol, atol=0)


@pytest.mark.parametrize("step", [1, 30])
@pytest.mark.parametrize("folder", FINDERS)
def test_codes_are_read_in_ranges(folder: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    content = content_of(DATA / folder)
    whole = weights_of(content, FINDERS[folder])
    for module in (hqq, quanto, bitnet):
        monkeypatch.setattr(module, "_STEP", step)
    for label, W in weights_of(content, FINDERS[folder]).items():
        assert torch.equal(W, whole[label])


def test_auto_bit_linear_multiplies_by_the_scale() -> None:
    content = content_of(DATA / "bitnet")
    tensors = {name: content.read(name) for name in content.tensors}
    settings = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
    other = content_from(tensors, config={"quantization_config": settings})
    (divided,), (multiplied,) = find_bitnet(content), find_bitnet(other)
    W = build_all(divided.make(), content)
    scale = tensors["up_proj.weight_scale"]
    torch.testing.assert_close(build_all(multiplied.make(), other), W * scale**2)


Change = Callable[[dict[str, Tensor], dict[str, Any]], Any]


def check_reason(folder: str, stem: str, change: Change, reason: str) -> None:
    """Checks that a change to the parts of one weight gives this reason."""
    content = content_of(DATA / folder)
    prefix = f"{stem}."
    tensors = {
        name.removeprefix(prefix): content.read(name)
        for name in content.tensors
        if name.startswith(prefix)
    }
    settings = dict(content.quantization())
    change(tensors, settings)
    named = {f"l.{name}": one for name, one in tensors.items()}
    changed: Content = content_from(named, config={"quantization_config": settings})
    (candidate,) = FINDERS[folder](changed)
    assert reason in reason_of(candidate, changed)


HQQ: list[tuple[Change, str]] = [
    (lambda t, s: s.update(quant_method="sinq"), "the layout of its quant_method sinq is"),
    (lambda t, s: t.pop("packing"), "the layout of its codes, l.packing, is missing"),
    (lambda t, s: t.pop("scale"), "l.scale is missing"),
    (lambda t, s: t.pop("shape"), "l.shape is missing"),
    (lambda t, s: t.update(shape=torch.tensor([5, -32])), "l.shape is [5, -32]"),
    (lambda t, s: t.update(shape=torch.tensor([5.0, 32])), "l.shape has the dtype float32"),
    (lambda t, s: t.update(shape=torch.tensor([5, 64])), "l.W_q has the shape (5, 16)"),
    (lambda t, s: t.update(packing=t["packing"][1:]), "l.packing is 'bit_u8'"),
    (lambda t, s: t.update(axis=torch.tensor(2)), "its axis 2 and group_size 16 do not fit"),
    (lambda t, s: t.update(axis=torch.tensor(0)), ", not (8, 10) and uint8"),
    (lambda t, s: t.update(group_size=torch.tensor(0)), "its axis 1 and group_size 0 do not fit"),
    (lambda t, s: t.update(group_size=torch.tensor(32)), "2 codes per word do not divide 5 rows"),
    (lambda t, s: t.update(quant_scale=torch.tensor(1)), "l.quant_scale is set"),
    (lambda t, s: t.update(W_q=t["W_q"][1:]), "l.W_q has the shape (4, 16)"),
    (lambda t, s: t.update(W_q=t["W_q"].int()), "and the dtype int32"),
    (lambda t, s: t.update(zero=t["zero"][1:]), "l.zero has the shape (9, 1), not (10, 1)"),
    (lambda t, s: t.update(zero=t["zero"].int()), "l.zero has the dtype int32"),
]


@pytest.mark.parametrize(("change", "reason"), HQQ)
def test_parts_of_hqq_that_do_not_fit_give_a_reason(change: Change, reason: str) -> None:
    check_reason("hqq", "rows", change, reason)


QUANTO: list[tuple[Change, str]] = [
    (lambda t, s: t.update({"weight._shift": torch.ones(5, 1)}), "of a weight of 2 or 4 bits"),
    (lambda t, s: t.update({"weight._data._data": t.pop("weight._data")}), "of 2 or 4 bits"),
    (lambda t, s: t.update({"weight._data": t["weight._data"].int()}), "and the dtype int32"),
    (lambda t, s: t.update({"weight._data": t["weight._data"][0]}), "has the shape (12,)"),
    (lambda t, s: t.update({"weight._scale": torch.ones(1, 12)}), "has the shape (1, 12)"),
]


@pytest.mark.parametrize(("change", "reason"), QUANTO)
def test_parts_of_quanto_that_do_not_fit_give_a_reason(change: Change, reason: str) -> None:
    check_reason("quanto", "integers", change, reason)


BITNET: list[tuple[Change, str]] = [
    (lambda t, s: s.update(linear_class="other"), "its linear_class in config.json is other"),
    (lambda t, s: t.update(weight=t["weight"][0]), "l.weight has the shape (7,)"),
    (lambda t, s: t.update(weight=t["weight"] | 3), "l.weight contains the code 3"),
    (lambda t, s: t.update(weight_scale=torch.ones(2)), "l.weight_scale has the shape (2,)"),
    (lambda t, s: t.update(weight_scale=torch.tensor([1])), "and the dtype int64"),
]


@pytest.mark.parametrize(("change", "reason"), BITNET)
def test_parts_of_bitnet_that_do_not_fit_give_a_reason(change: Change, reason: str) -> None:
    check_reason("bitnet", "up_proj", change, reason)


@pytest.mark.parametrize("folder", FINDERS)
@given(draw=st.data())
def test_random_changes_give_a_weight_or_a_reason(folder: str, draw: st.DataObject) -> None:
    content = content_of(DATA / folder)
    config = {"config": dict(content.beside("config.json"))}
    check_mutated(draw, content, config, FINDERS[folder])
