"""Layers and kinds from names: every weight has one place, in any order."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wellcond.report.layers import Place, natural, places

PARTS = st.sampled_from(
    [
        "layers",
        "blocks",
        "experts",
        "attn",
        "*",
        "0",
        "1",
        "2",
        "07",
        "10",
        "layer1",
        "h_2",
        "",
        "w",
    ]
)
VIEWS = st.sampled_from(["", ":q", ":qk0", ":qk11", ":3", ":operator", ":", "::"])
LABELS = st.sets(
    st.builds(lambda parts, view: ".".join(parts) + view, st.lists(PARTS, min_size=1), VIEWS)
    | st.text()
)


def without_numbers(name: str) -> str:
    return re.sub("[0-9]+", "*", name)


@given(LABELS)
def test_place_parts_reassemble_name(labels: set[str]) -> None:
    found = places(labels)
    assert found.keys() == labels
    for label, (stack, layer, kind) in found.items():
        assert without_numbers(stack) == without_numbers(layer)
        name, whole = (re.sub("[.:]", "", text) for text in (label, layer + kind))
        assert without_numbers(whole) == without_numbers(name)
        assert whole == name or "*" in kind


@given(LABELS, st.randoms())
def test_places_independent_of_order(labels: set[str], luck: random.Random) -> None:
    shuffled = sorted(labels)
    luck.shuffle(shuffled)
    assert places(shuffled) == places(sorted(labels))


def test_natural_sorts_by_numbers() -> None:
    assert sorted(["h.10", "h.9.b", "h.2", "h.9.a"], key=natural) == [
        "h.2",
        "h.9.a",
        "h.9.b",
        "h.10",
    ]
    assert natural("h." + "9" * 5000) > natural("h.1")  # more digits than int() accepts


def names(stem: str, counts: list[int] | int, kinds: list[str]) -> list[str]:
    """Names from a stem; `counts` gives the number of members, per stage if it is a list."""
    if isinstance(counts, int):
        return [f"{stem.format(i)}.{kind}" for i in range(counts) for kind in kinds]
    return [
        f"{stem.format(i, j)}.{kind}"
        for i, count in enumerate(counts)
        for j in range(count)
        for kind in kinds
    ]


LLAMA = ["self_attn.q_proj.weight", "mlp.up_proj.weight"]
SWIN = names("layers.{}.blocks.{}", [2, 2, 6, 2], ["attn.qkv.weight:q", "mlp.fc1.weight"])
EXPERTS = names("model.layers.{}.moe.experts.{}", [8, 8, 8], ["w1.weight", "w2.weight"])
PRUNED = names("model.layers.{}.moe.experts.{}", [8, 8, 6], ["w1.weight", "w2.weight"])
HEADS = [f"h.{i}.attn:{x}{h}" for i in range(3) for x in ("qk", "vo") for h in range(12)]


@pytest.mark.parametrize(
    ("label", "others", "expected"),
    [
        # a name without a number is in no layer, and a lone number is not a layer
        ("lm_head.weight", LLAMA, ("", "", "lm_head.weight")),
        ("weights.3", [], ("", "", "weights.3")),
        ("", [], ("", "", "")),
        # the usual case: one number, then the kind
        ("0.weight", ["2.weight"], ("*", "0", "weight")),
        ("h.11.attn.c_attn.weight:q", [], ("h.*", "h.11", "attn.c_attn.weight:q")),
        ("blocks.7:qk0", [], ("blocks.*", "blocks.7", ":qk0")),
        (
            "encoder.layers.encoder_layer_3.mlp.0.weight",
            [],
            ("encoder.layers.encoder_layer_*", "encoder.layers.encoder_layer_3", "mlp.0.weight"),
        ),
        # consecutive numbers form one: blocks of stages
        ("blocks.3.1.conv_pw.weight", [], ("blocks.*.*", "blocks.3.1", "conv_pw.weight")),
        ("layer2.0.conv1.weight", [], ("layer*.*", "layer2.0", "conv1.weight")),
        # blocks of T5 have equally many parts, which are not layers
        (
            "block.1.layer.0.q.weight",
            names("block.{}.layer.{}", [2, 2, 2], ["q.weight", "k.weight"]),
            ("block.*", "block.1", "layer.0.q.weight"),
        ),
        # stages of Swin have unequal lengths: their blocks are layers
        (
            "layers.2.blocks.5.mlp.fc1.weight",
            SWIN,
            ("layers.*.blocks.*", "layers.2.blocks.5", "mlp.fc1.weight"),
        ),
        ("layers.2.downsample.weight", SWIN, ("layers.*", "layers.2", "downsample.weight")),
        # members of a Sequential are not layers, even if their number varies
        (
            "features.1.0.block.2.weight",
            names("features.1.{}.block.{}", [3, 4], ["weight"]),
            ("features.*.*", "features.1.0", "block.2.weight"),
        ),
        # a number of many is replaced by *, of few it is not; experts, even pruned, are not layers
        (
            "model.layers.2.moe.experts.7.w1.weight",
            EXPERTS,
            ("model.layers.*", "model.layers.2", "moe.experts.*.w1.weight"),
        ),
        (
            "model.layers.0.moe.experts.7.w1.weight",
            PRUNED,
            ("model.layers.*", "model.layers.0", "moe.experts.*.w1.weight"),
        ),
        (
            "l.0.experts.3.w1.weight",
            names("l.0.experts.{}", 4, ["w1.weight"]),
            ("l.*", "l.0", "experts.3.w1.weight"),
        ),
        ("h.1.attn:qk11", HEADS, ("h.*", "h.1", "attn:qk*")),
        ("h.1.attn:vo0", HEADS, ("h.*", "h.1", "attn:vo*")),
        (
            "h.1.attn:qk1",
            [h for h in HEADS if int(h[-1]) < 4 and h[-2] in "ko"],
            ("h.*", "h.1", "attn:qk1"),
        ),
        # only the number that takes many values is replaced
        (
            "layers.0.experts.6.net.2.weight",
            [f"layers.0.experts.{i}.net.{j}.weight" for i in range(8) for j in (0, 2)],
            ("layers.*", "layers.0", "experts.*.net.2.weight"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_places_of_real_names(
    label: str, others: list[str], expected: tuple[str, str, str]
) -> None:
    assert places([label, *others])[label] == Place(*expected)
