"""Weights that MLX quantises, compared entry by entry with those that it dequantises."""

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

from wellcond.recipes import mlx
from wellcond.recipes.mlx import find_mlx

DATA = Path(__file__).parent / "data"
FOLDERS = ("mlx_affine", "mlx_mxfp4", "mlx_nvfp4", "mlx_mxfp8")
NAME = "model.layers.0.q_proj"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_entry_equals_library(folder: str) -> None:
    weights = weights_of(content_of(DATA / folder), find_mlx)
    expected = load_expected(DATA / folder)
    assert weights.keys() == expected.keys()
    for label, W in weights.items():
        assert torch.equal(W, expected[label])


@pytest.mark.parametrize("folder", FOLDERS)
def test_rows_are_read_in_ranges(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = content_of(DATA / folder)
    whole = weights_of(content, find_mlx)
    monkeypatch.setattr(mlx, "_STEP", 200)
    for label, W in weights_of(content, find_mlx).items():
        assert torch.equal(W, whole[label])


def load() -> tuple[dict[str, Tensor], dict[str, Any]]:
    content = content_of(DATA / "mlx_affine")
    parts = {part: content.read(f"{NAME}.{part}") for part in ("weight", "scales", "biases")}
    return parts, {"group_size": 32, "bits": 4}


def test_metal_of_transformers_has_the_same_layout() -> None:
    tensors, settings = load()
    tensors["qbiases"] = tensors.pop("biases")
    config = {"quantization_config": settings | {"quant_method": "metal"}}
    content = content_from({f"l.{k}": one for k, one in tensors.items()}, config=config)
    (candidate,) = find_mlx(content)
    W = build_all(candidate.make(), content)
    assert torch.equal(W, load_expected(DATA / "mlx_affine")[f"{NAME}.weight"])


Change = Callable[[dict[str, Tensor], dict[str, Any]], Any]
CHANGES: list[tuple[Change, str]] = [
    (lambda t, s: s.clear(), "does not give its number of bits"),
    (lambda t, s: s.pop("bits"), "its mode affine with None bits"),
    (lambda t, s: s.pop("group_size"), "its group_size in config.json is None"),
    (lambda t, s: s.update(bits=3), "does not fit l.weight (5, 8) of 3 bits with groups of 32"),
    (lambda t, s: s.update(bits=7), "its mode affine with 7 bits"),
    (lambda t, s: s.update(bits=True), "its mode affine with True bits"),
    (lambda t, s: s.update(group_size=64), "of 4 bits with groups of 64"),
    (lambda t, s: s.update(group_size=1 << 70), "its group_size in config.json is 118"),
    (lambda t, s: s.update(mode="mxfp4"), "its mode mxfp4 does not fit its parts l.weight, l.scal"),
    (lambda t, s: s.update(mode="mxfp8"), "mxfp8 contradicts 4 bits and groups of 32"),
    (lambda t, s: s.update(mode="codebook"), "its mode codebook with 4 bits"),
    (lambda t, s: s.update(l=False), "l is not quantised according to"),
    (lambda t, s: s.update(l={"bits": 8, "group_size": 32}), "of 8 bits with groups of 32"),
    (lambda t, s: s.update(quant_method="hqq"), "the layout of its quant_method hqq"),
    (lambda t, s: t.pop("biases"), "its mode affine does not fit its parts l.weight, l.scales"),
    (lambda t, s: t.update(biases=t["biases"][:1]), "l.biases has the shape (1, 2)"),
    (lambda t, s: t.update(scales=t["scales"].int()), "l.scales has the dtype int32"),
    (lambda t, s: t.update(scales=t["scales"][:1]), "l.scales (1, 2) does not fit"),
    (lambda t, s: t.update(weight=t["weight"][:, :7]), "does not fit l.weight (5, 7)"),
    (lambda t, s: t.update(weight=t["weight"][0]), "l.weight of shape (8,) does not fit"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES)
def test_contradictory_parts_give_a_reason(change: Change, reason: str) -> None:
    tensors, settings = load()
    change(tensors, settings)
    named = {f"l.{name}": one for name, one in tensors.items()}
    content = content_from(named, config={"quantization": settings})
    (candidate,) = find_mlx(content)
    assert reason in reason_of(candidate, content)
    assert set(candidate.parts) == set(content.tensors)


@pytest.mark.parametrize("folder", FOLDERS)
@given(draw=st.data())
def test_random_changes_give_a_weight_or_a_reason(folder: str, draw: st.DataObject) -> None:
    content = content_of(DATA / folder)
    check_mutated(draw, content, {"config": dict(content.beside("config.json"))}, find_mlx)
