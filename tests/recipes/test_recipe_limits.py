"""The cost of recipes grows with the number of weights plus the size of a config, not the product.

Each case took minutes when a config was read, compared or shown once per weight.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from wellcond.recipes.base import Content, RecipeError, show
from wellcond.recipes.find import find_recipes
from wellcond.recipes.settings import Settings
from wellcond.weights.quantised import count_logical_entries, read_bits

Kinds = Mapping[str, tuple[tuple[int, ...], str]]
SECONDS = 6  # far more than a busy machine needs

GPTQ: Kinds = {
    "qweight": ((4, 32), "int32"),
    "qzeros": ((1, 4), "int32"),
    "scales": ((1, 32), "float16"),
}
FLOAT8: Kinds = {"weight": ((8, 8), "float8_e4m3fn"), "weight_scale": ((1, 1), "float32")}
BYTES: Kinds = {"weight": ((8, 16), "uint8"), "weight_scale": ((8, 1), "uint8")}
MLX: Kinds = {"weight": ((8, 4), "uint32"), "scales": ((8, 1), "float16")}
PACKED: Kinds = {
    "weight_packed": ((8, 4), "int32"),
    "weight_scale": ((8, 1), "float16"),
    "weight_shape": ((2,), "int64"),
}

LONG, MANY = "x" * 900_000, [0] * 300_000
LAYERS = {str(n): {"bits": 4, "group_size": n + 1} for n in range(25_000)}
GROUPS = {
    str(n): {"weights": {"num_bits": 4, "strategy": "block", "block_structure": [n % 7 + 1, n + 1]}}
    for n in range(64)
}
ROUND = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4}

# The tensors of a layer and the settings.
COSTLY: dict[str, tuple[Kinds, dict[str, Any]]] = {
    "a long format": (GPTQ, {"bits": 4, "checkpoint_format": LONG}),
    "a long method": (GPTQ, {"quant_method": LONG}),
    "bits of a list": (GPTQ, {"bits": MANY}),
    "many writers": (GPTQ, {"bits": 4, "group_size": 32, "meta": {"quantizer": MANY}}),
    "group sizes of layers": (GPTQ, {**ROUND, "extra_config": LAYERS}),
    "a version of AWQ": (GPTQ, {"quant_method": "awq", "version": MANY}),
    "a block size": (FLOAT8, {"quant_method": "fp8", "weight_block_size": MANY}),
    "a long block size": (FLOAT8, {"quant_method": "fp8", "weight_block_size": "1x" * 400_000}),
    "an algorithm": (BYTES, {"quant_method": "modelopt", "quant_algo": MANY}),
    "settings of Quark": (BYTES, {"quant_method": "quark", "layer_quant_config": LAYERS}),
    "a mode of MLX": (MLX, {"mode": MANY, "bits": MANY}),
    "64 groups": (PACKED, {"quant_method": "compressed-tensors", "config_groups": GROUPS}),
    "a status": (
        {"weight": ((8, 8), "float16"), "weight_scale": ((8, 1), "float16")},
        {
            "quant_method": "compressed-tensors",
            "quantization_status": MANY,
            "config_groups": {"a": {"weights": {"strategy": "channel"}}},
        },
    ),
}


def content_of_layers(kinds: Kinds, count: int, settings: Mapping[str, Any]) -> Content:
    """The content of `count` layers with these tensors, and one config."""
    tensors = {f"layers.{n}.{name}": one for n in range(count) for name, one in kinds.items()}
    configs = {"config.json": {"quantization_config": settings}}

    def read(name: str, rows: tuple[int, int] | None = None) -> Tensor:
        assert name.endswith("weight_shape")
        return torch.tensor([8, 32])

    return Content(tensors, read, lambda name: configs.get(name, {}))


@pytest.mark.parametrize("case", COSTLY)
def test_a_long_config_is_read_once_for_all_weights(case: str) -> None:
    content = content_of_layers(COSTLY[case][0], 2000, COSTLY[case][1])
    start = time.monotonic()
    recipes, refused = find_recipes(content)
    assert time.monotonic() - start < SECONDS
    assert len(recipes) + len(refused) == 2000
    assert all(len(why) <= 1000 for why, *_ in refused.values())


def test_two_long_configs_are_compared_once() -> None:
    settings = {"bits": 4, "group_size": 32, "dynamic": MANY}
    content = content_of_layers(GPTQ, 2000, settings)
    both = Content(content.tensors, content.read, lambda name: {**settings, **content.beside(name)})
    start = time.monotonic()
    _, refused = find_recipes(both)
    assert time.monotonic() - start < SECONDS
    assert len(refused) == 2000


def test_bits_are_read_once_for_all_codes() -> None:
    groups = {str(n): {} for n in range(100_000)}
    bits = read_bits({"quantization_config": {"config_groups": groups}})
    tensors = content_of_layers(PACKED, 2000, {}).tensors
    start = time.monotonic()
    for name in tensors:
        count_logical_entries(name, tensors, {}.__getitem__, bits)
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize(
    "kinds", [GPTQ, FLOAT8, BYTES, MLX, PACKED], ids=lambda kinds: next(iter(kinds))
)
def test_many_tensors_take_seconds(kinds: Kinds) -> None:
    content = content_of_layers(kinds, 10_000, {"bits": 4, "group_size": 32})
    start = time.monotonic()
    recipes, refused = find_recipes(content)
    assert time.monotonic() - start < SECONDS
    assert len(recipes) + len(refused) in (0, 10_000)


def nest(levels: int) -> list[Any]:
    deep: list[Any] = []
    for _ in range(levels):
        deep = [deep]
    return deep


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (4, "4"),
        ("4", "'4'"),
        ("gptq", "gptq"),
        ("", "''"),
        (None, "None"),
        ([8, "a"], "[8, a]"),
        ([0] * 9, "a list of 9"),
        ([[1]], "a list of 1"),
        ({"a": 1}, "an object of 1 settings"),
        (nest(100_000), "a list of 1"),
        ("x" * 1000, "x" * 60),
        (10**1000, "1" + "0" * 59),
    ],
    ids=lambda value: str(value)[:20] if not isinstance(value, list) else "list",
)
def test_show_abbreviates_settings(value: Any, shown: str) -> None:
    assert show(value) == shown


def test_contradiction_is_raised_each_time() -> None:
    settings = Settings({"a.json": {"bits": 4}, "b.json": {"bits": 8}})
    for _ in range(2):
        with pytest.raises(RecipeError, match=r"bits is 4 in a\.json, and bits is 8 in b\.json"):
            settings.integer("bits")


def _contents(content: Content) -> Iterator[tuple[str, Content]]:
    """The contents with an additional plain tensor under the name of each recipe's weight."""
    for label in find_recipes(content)[0]:
        if label not in content.tensors:
            plain = {label: ((8, 8), "float32")}
            yield label, Content({**content.tensors, **plain}, content.read, content.beside)


@pytest.mark.parametrize("kinds", [GPTQ, PACKED], ids=["gptq", "packed"])
def test_stored_plain_weight_gives_a_reason(kinds: Kinds) -> None:
    group = {"weights": {"num_bits": 4, "strategy": "channel"}}
    settings = {"config_groups": {"a": group}} if kinds is PACKED else {"bits": 4, "group_size": 32}
    found = list(_contents(content_of_layers(kinds, 1, settings)))
    assert found
    for label, content in found:
        recipes, refused = find_recipes(content)
        assert not recipes
        ((why, *_),) = refused.values()
        assert why == f"{label} is also stored"
