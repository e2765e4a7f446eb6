"""Weights in the formats of GPTQ, compared entry by entry with those of the libraries."""

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

from wellcond.recipes import gptq
from wellcond.recipes.base import Content
from wellcond.recipes.gptq import find_gptq

DATA = Path(__file__).parent / "data"
FOLDERS = ("gptq_3_bits", "gptq_borrows", "gptq_v2", "gptq_planes", "gptq_auto_round")


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_entry_equals_library(folder: str) -> None:
    weights = weights_of(content_of(DATA / folder), find_gptq)
    expected = load_expected(DATA / folder)
    assert weights.keys() == expected.keys()
    for label, W in weights.items():
        # The library multiplies in the dtype of its scales.
        assert torch.equal(W.to(torch.float16), expected[label])


@pytest.mark.parametrize("folder", FOLDERS)
def test_inputs_are_read_in_ranges(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = content_of(DATA / folder)
    whole = weights_of(content, find_gptq)
    monkeypatch.setattr(gptq, "_STEP", 1)
    for label, W in weights_of(content, find_gptq).items():
        assert torch.equal(W, whole[label])


def load(folder: str, stem: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The parts of one weight, and the settings."""
    content = content_of(DATA / folder)
    names = {part: f"{stem}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
    tensors = {part: content.read(one) for part, one in names.items() if one in content.tensors}
    return tensors, dict(content.quantization())


def content_with(
    tensors: dict[str, Tensor], settings: dict[str, Any], stem: str = "l", **config: Any
) -> Content:
    named = {f"{stem}.{name}": one for name, one in tensors.items()}
    return content_from(named, config={"quantization_config": settings, **config})


def build(content: Content) -> Tensor:
    (candidate,) = find_gptq(content)
    return build_all(candidate.make(), content)


def test_consecutive_groups_need_no_g_idx() -> None:
    tensors, settings = load("gptq_v2", "layers.2.up_proj")
    del settings["dynamic"]
    settings["desc_act"] = False
    whole = build(content_with(tensors, settings))
    del tensors["g_idx"]
    assert torch.equal(build(content_with(tensors, settings)), whole)


def test_group_size_of_minus_one_is_all_inputs() -> None:
    tensors, settings = load("gptq_v2", "layers.2.up_proj")
    del settings["dynamic"], tensors["g_idx"]
    settings |= {"desc_act": False, "group_size": -1}
    for name in ("qzeros", "scales"):
        tensors[name] = tensors[name][:1]
    W = build(content_with(tensors, settings))
    expected = load_expected(DATA / "gptq_v2")["layers.2.up_proj.weight"]
    assert torch.equal(W[:, :16].half(), expected[:, :16])


def test_settings_only_in_quantize_config() -> None:
    tensors, settings = load("gptq_3_bits", "layers.0.q_proj")
    del settings["quant_method"], settings["checkpoint_format"]  # as old versions wrote it
    named = {f"l.{name}": one for name, one in tensors.items()}
    W = build(content_from(named, quantize_config=settings))
    assert torch.equal(W.half(), load_expected(DATA / "gptq_3_bits")["layers.0.q_proj.weight"])


def test_shapes_determine_bits_if_config_does_not() -> None:
    tensors, settings = load("gptq_3_bits", "layers.0.q_proj")
    whole = build(content_with(tensors, settings))
    del settings["bits"]
    assert torch.equal(build(content_with(tensors, settings)), whole)


def test_symmetric_weights_have_middle_zero_point() -> None:
    tensors, settings = load("gptq_borrows", "q_proj")
    settings |= {"sym": True, "meta": {}}
    tensors["qzeros"] = torch.full_like(tensors["qzeros"], 0x77777777)
    W = build(content_with(tensors, settings))
    codes = torch.stack([tensors["qweight"] >> 4 * i & 15 for i in range(8)], dim=1).flatten(0, 1)
    s = tensors["scales"].float()[tensors["g_idx"].long()]
    assert torch.equal(W, ((codes - 8) * s).T)


def test_conv1d_has_the_shape_of_the_plain_checkpoint() -> None:
    tensors, settings = load("gptq_3_bits", "layers.0.q_proj")
    whole = build(content_with(tensors, settings))
    stem = "transformer.h.0.attn.c_attn"
    content = content_with(tensors, settings, stem, model_type="gpt2")
    assert torch.equal(build(content), whole.T)


# --- contradictions -------------------------------------------------------------------------------

Change = Callable[[dict[str, Tensor], dict[str, Any]], Any]
CHANGES: list[tuple[Change, str]] = [
    (lambda t, s: s.clear(), "neither config.json nor quantize_config.json"),
    (
        lambda t, s: s.update(quant_method="qqq", method="qqq"),
        "the layout of its quant_method qqq is",
    ),
    (lambda t, s: s.update(quant_method="qqq"), "quant_method is qqq in config.json, and method"),
    (
        lambda t, s: s.update(quant_method="auto-round", method="auto-round"),
        "the layout of its packing_format  is unknown",
    ),
    (lambda t, s: s.update(is_marlin_format=True), "Marlin"),
    (lambda t, s: s.update(checkpoint_format="marlin"), "format is marlin in config.json"),
    (lambda t, s: s.update(checkpoint_format="bitblas", format="bitblas"), "its format is bitblas"),
    (lambda t, s: s.update(checkpoint_format=2), "checkpoint_format is 2"),
    (lambda t, s: s.update(bits=8), "l.qweight (4, 32) and l.qzeros (2, 4) do not fit 8 bits"),
    (lambda t, s: s.update(bits="4"), "bits is '4' in config.json"),
    (lambda t, s: s.update(sym=True), "has other zero points than 8"),
    (lambda t, s: s.update(checkpoint_format="gptq_v2", format="gptq_v2", sym=True), "than 8"),
    (lambda t, s: s.update(meta={}), "l.qzeros has zero points of 0, which programs store differ"),
    (lambda t, s: s.update(meta={"quantizer": ["optimum:1.20"]}), "the program that wrote it"),
    (lambda t, s: t.pop("qzeros"), "l.qzeros is missing"),
    (lambda t, s: t.pop("scales"), "l.scales is missing"),
    (lambda t, s: t.pop("g_idx"), "g_idx, the groups of its inputs, is missing"),
    (lambda t, s: t.update(g_idx=t["g_idx"] - 1), "l.g_idx has groups -1 to 0"),
    (lambda t, s: t.update(g_idx=t["g_idx"] + 1), "has groups 1 to 2, but there are 2 groups"),
    (lambda t, s: t.update(g_idx=t["g_idx"].float()), "and the dtype float32"),
    (lambda t, s: t.update(g_idx=t["g_idx"][:0]), "l.g_idx has the shape (0,)"),
    (
        lambda t, s: t.update(g_idx=t["g_idx"][:-8]),
        "do not fit 4 bits with 32 outputs and 24 inputs",
    ),
    (
        lambda t, s: t.update(qweight=t["qweight"][:-1]),
        "l.qweight (3, 32) and l.qzeros (2, 4) do not fit 4 bits",
    ),
    (lambda t, s: t.update(qweight=t["qweight"].view(torch.float32)), "has the dtype float32"),
    (lambda t, s: t.update(qweight=t["qweight"][None]), "l.qweight has the shape (1, 4, 32)"),
    (lambda t, s: t.update(scales=t["scales"][:, :-1]), "do not fit scales of 31 outputs"),
    (lambda t, s: t.update(scales=t["scales"].int()), "l.scales has the dtype int32"),
    (lambda t, s: t.update(qzeros=t["qzeros"][:1]), "do not fit scales of 32 outputs"),
    (lambda t, s: t.update(qzeros=t["qzeros"][:, :-1]), "do not fit 4 bits"),
]


@pytest.mark.parametrize(("change", "reason"), CHANGES)
def test_contradictory_parts_give_a_reason(change: Change, reason: str) -> None:
    tensors, settings = load("gptq_borrows", "q_proj")
    change(tensors, settings)
    content = content_with(tensors, settings)
    (candidate,) = find_gptq(content)
    assert reason in reason_of(candidate, content)
    assert set(candidate.parts) == set(content.tensors)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"group_size": 8}, "it has 2 groups of 32 inputs, but the group_size in the config is 8"),
        ({"group_size": 0}, "the group_size in the config is 0"),
        ({"group_size": -2}, "the group_size in the config is -2"),
        ({"group_size": None}, "the group_size in the config is None"),
        ({"group_size": 1 << 80}, "the group_size in the config is 120892"),
        ({"extra_config": {"m": {"group_size": 17}}}, "is 16, with other values for some lay"),
        ({"group_size": "16"}, "group_size is '16'"),
        ({"desc_act": True}, "g_idx, the groups of its inputs, is missing"),
    ],
)
def test_wrong_group_size_gives_a_reason(change: dict[str, Any], reason: str) -> None:
    tensors, settings = load("gptq_v2", "layers.2.up_proj")
    del settings["dynamic"], tensors["g_idx"]
    content = content_with(tensors, settings | {"desc_act": False} | change)
    (candidate,) = find_gptq(content)
    assert reason in reason_of(candidate, content)


@pytest.mark.parametrize("more", [{}, {"sym": True, "dynamic": {"+:x": {"bits": 4}}}])
def test_3_bits_of_old_gptqmodel_give_a_reason(more: dict[str, Any]) -> None:
    tensors, settings = load("gptq_3_bits", "layers.0.q_proj")
    settings |= {"meta": {"quantizer": "gptqmodel:4.2.5"}, **more}
    content = content_with(tensors, settings)
    (candidate,) = find_gptq(content)
    assert "gptqmodel 4 might have subtracted one from bits" in reason_of(candidate, content)


def test_5_bits_without_planes_give_a_reason() -> None:
    tensors, settings = load("gptq_planes", "layers.5.up_proj")
    content = content_with(tensors, settings | {"format": "gptq", "checkpoint_format": "gptq"})
    (candidate,) = find_gptq(content)
    assert "it has 5 bits, which gptqmodel stores only in" in reason_of(candidate, content)


def test_contradictory_configs_give_a_reason() -> None:
    tensors, settings = load("gptq_borrows", "q_proj")
    named = {f"l.{name}": one for name, one in tensors.items()}
    other = settings | {"checkpoint_format": "gptq_v2", "format": "gptq_v2"}
    config = {"quantization_config": settings}
    content = content_from(named, config=config, quantize_config=other)
    (candidate,) = find_gptq(content)
    assert reason_of(candidate, content) == (
        "checkpoint_format is gptq in config.json, and checkpoint_format is gptq_v2 in "
        "quantize_config.json"
    )


def test_layers_of_auto_round_can_have_own_group_sizes() -> None:
    tensors, settings = load("gptq_auto_round", "layers.5.up_proj")
    whole = build(content_with(tensors, settings))
    settings |= {"group_size": 32, "extra_config": {"l": {"group_size": 16}}}
    assert torch.equal(build(content_with(tensors, settings)), whole)


@pytest.mark.parametrize("layer", ["model.embed_tokens", "transformer.wte", "word_embeddings"])
def test_embedding_gives_a_reason(layer: str) -> None:
    tensors, settings = load("gptq_borrows", "q_proj")
    content = content_with(tensors, settings, layer)
    (candidate,) = find_gptq(content)
    assert "it is an embedding" in reason_of(candidate, content)


@pytest.mark.parametrize("folder", FOLDERS)
@given(draw=st.data())
def test_random_changes_give_a_weight_or_a_reason(folder: str, draw: st.DataObject) -> None:
    content = content_of(DATA / folder)
    names = ("config.json", "quantize_config.json")
    configs = {name.removesuffix(".json"): dict(content.beside(name)) for name in names}
    check_mutated(draw, content, configs, find_gptq)
