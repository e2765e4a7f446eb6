"""Weights in the formats of AWQ, compared entry by entry with those that autoawq dequantises."""

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

from wellcond.recipes import awq
from wellcond.recipes.awq import find_awq
from wellcond.recipes.find import find_recipes

DATA = Path(__file__).parent / "data"
FOLDERS = ("awq_gemm", "awq_gemv")
STEM = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_entry_equals_library(folder: str) -> None:
    content = content_of(DATA / folder)
    weights, expected = weights_of(content, find_awq), load_expected(DATA / folder)
    assert weights.keys() == expected.keys()
    assert find_recipes(content)[0].keys() == expected.keys()
    for label, W in weights.items():
        # The library multiplies in the dtype of its scales.
        assert torch.equal(W.to(torch.float16), expected[label])


@pytest.mark.parametrize("step", [1, 200])
@pytest.mark.parametrize("folder", FOLDERS)
def test_codes_are_read_in_ranges(folder: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    content = content_of(DATA / folder)
    whole = weights_of(content, find_awq)
    monkeypatch.setattr(awq, "_STEP", step)
    for label, W in weights_of(content, find_awq).items():
        assert torch.equal(W, whole[label])


def load(folder: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    content = content_of(DATA / folder)
    parts = {part: content.read(f"{STEM}.{part}") for part in ("qweight", "qzeros", "scales")}
    return parts, dict(content.quantization())


def test_settings_only_in_quant_config() -> None:
    tensors, _ = load("awq_gemm")
    old = {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM"}
    content = content_from({f"l.{k}": one for k, one in tensors.items()}, quant_config=old)
    (candidate,) = find_awq(content)
    W = build_all(candidate.make(), content)
    assert torch.equal(W.half(), load_expected(DATA / "awq_gemm")[f"{STEM}.weight"])


def test_auto_round_has_the_same_layout() -> None:
    tensors, settings = load("awq_gemm")
    del settings["version"]
    settings |= {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}
    named = {f"l.{name}": one for name, one in tensors.items()}
    content = content_from(named, config={"quantization_config": settings})
    (candidate,) = find_awq(content)
    W = build_all(candidate.make(), content)
    assert torch.equal(W.half(), load_expected(DATA / "awq_gemm")[f"{STEM}.weight"])
    settings["packing_format"] = "auto_round:auto_gptq"
    assert not list(find_awq(content))


Change = Callable[[dict[str, Tensor], dict[str, Any]], Any]
CHANGES: list[tuple[Change, str]] = [
    (lambda t, s: s.update(version="gemv_fast"), "its version is gemv_fast"),
    (lambda t, s: s.update(version="marlin"), "its version is marlin"),
    (lambda t, s: s.update(version="exllama"), "its version is exllama"),
    (lambda t, s: s.update(backend="llm-awq"), "its version is llm-awq"),
    (
        lambda t, s: s.update(version="gemv"),
        "the version gemv does not support groups of 16 inputs",
    ),
    (lambda t, s: s.update(bits=8), "it has 8 bits, but the layout is known only for 4"),
    (lambda t, s: s.pop("bits"), "it has None bits, but the layout is known only"),
    (lambda t, s: s.update(group_size=32), "its group_size in the config is 32, but it has 48"),
    (lambda t, s: s.update(group_size=24), "do not fit 64 outputs and 2 groups of 24 inputs"),
    (lambda t, s: s.update(group_size=-1), "do not fit 64 outputs and 1 groups of 48 inputs"),
    (lambda t, s: s.update(group_size=0), "its group_size in the config is 0"),
    (lambda t, s: s.update(group_size=[16]), "group_size is [16] in config.json"),
    (lambda t, s: t.pop("qzeros"), "l.qzeros is missing"),
    (lambda t, s: t.pop("scales"), "l.scales is missing"),
    (lambda t, s: t.update(qweight=t["qweight"][:40]), "it has 40 inputs"),
    (lambda t, s: t.update(qweight=t["qweight"].long()), "l.qweight has the dtype int64"),
    (lambda t, s: t.update(qweight=t["qweight"][:, :0]), "l.qweight has the shape (48, 0)"),
    (lambda t, s: t.update(scales=t["scales"].T), "do not fit 64 outputs"),
    (lambda t, s: t.update(scales=t["scales"][0]), "l.scales has the shape (64,)"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES)
def test_contradictory_parts_give_a_reason(change: Change, reason: str) -> None:
    tensors, settings = load("awq_gemm")
    change(tensors, settings)
    named = {f"l.{name}": one for name, one in tensors.items()}
    content = content_from(named, config={"quantization_config": settings})
    (candidate,) = find_awq(content)
    assert reason in reason_of(candidate, content)
    assert set(candidate.parts) == set(content.tensors)


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (16, "the version gemv does not support groups of 16 inputs"),
        (48, "the version gemv does not support groups of 48 inputs"),
        (-1, "the version gemv does not support groups of 96 inputs"),
        (64, "its group_size in the config is 64, but it has 96"),
    ],
)
def test_wrong_group_size_of_gemv_gives_a_reason(size: int, reason: str) -> None:
    """The zero points are padded, so their number does not determine the group size."""
    tensors, settings = load("awq_gemv")
    named = {f"l.{name}": one for name, one in tensors.items()}
    settings["group_size"] = size
    content = content_from(named, config={"quantization_config": settings})
    (candidate,) = find_awq(content)
    assert reason in reason_of(candidate, content)


@pytest.mark.parametrize("words", [3, 8])
def test_wrong_padding_of_gemv_gives_a_reason(words: int) -> None:
    tensors, settings = load("awq_gemv")
    tensors["qzeros"] = torch.ones(24, words, dtype=torch.int32)
    tensors["scales"] = torch.ones(24, 8 * words).half()
    named = {f"l.{name}": one for name, one in tensors.items()}
    content = content_from(named, config={"quantization_config": settings})
    (candidate,) = find_awq(content)
    assert "do not fit 24 outputs and 3 groups of 32 inputs" in reason_of(candidate, content)


@pytest.mark.parametrize("folder", FOLDERS)
@given(draw=st.data())
def test_random_changes_give_a_weight_or_a_reason(folder: str, draw: st.DataObject) -> None:
    content = content_of(DATA / folder)
    check_mutated(draw, content, {"config": dict(content.beside("config.json"))}, find_awq)
