"""Weights of compressed-tensors, compared entry by entry with those that it decompresses."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support import build_all, content_from, content_of, load_expected, reason_of, weights_of
from torch import Tensor

from wellcond.recipes.base import Content
from wellcond.recipes.compressed import find_compressed
from wellcond.recipes.find import find_recipes

DATA = Path(__file__).parent / "data"
FOLDERS = sorted(path.name for path in DATA.glob("compressed_*"))


def load(folder: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copies of the tensors and of the config of a folder, which a test can change."""
    content = content_of(DATA / folder)
    tensors = {name: content.read(name) for name in content.tensors}
    return tensors, copy.deepcopy(dict(content.beside("config.json")))


def check_entries(content: Content, folder: Path) -> None:
    weights, expected = weights_of(content, find_compressed), load_expected(folder)
    assert weights.keys() == expected.keys()
    for name, W in expected.items():
        # The library multiplies in the dtype of the scales, and rounds float4 weights to bfloat16.
        torch.testing.assert_close(weights[name].to(W.dtype), W, rtol=0, atol=0)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_entry_equals_library(folder: str) -> None:
    content = content_of(DATA / folder)
    check_entries(content, DATA / folder)
    recipes, refused = find_recipes(content)
    assert not refused
    assert {part for one in recipes.values() for part in one.parts} == set(content.tensors)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_stored_number_is_read(folder: str) -> None:
    """A change of any part changes the weight."""
    tensors, config = load(folder)
    before = weights_of(content_from(tensors, config=config), find_compressed)
    for name, tensor in tensors.items():
        if name.endswith(("_shape", "_g_idx")):
            continue
        changed = change(tensor)
        after = weights_of(content_from(tensors | {name: changed}, config=config), find_compressed)
        label = f"{name.rpartition('.')[0]}.weight"
        assert [one for one in before if not torch.equal(before[one], after[one])] == [label]


def change(tensor: Tensor) -> Tensor:
    """Returns other numbers; floating-point numbers change by a factor of two."""
    if tensor.dtype in (torch.float32, torch.bfloat16):
        return tensor * 2
    if tensor.dtype == torch.float8_e4m3fn:
        return (tensor.view(torch.uint8) ^ 8).view(tensor.dtype)
    return tensor ^ 1


@pytest.mark.libraries
@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_integers_of_every_width(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    writer = importlib.import_module("write_compressed")
    shapes = [(1, 1), (1, 33), (5, 32), (7, 96), (9, 10), (33, 64)]
    kinds: list[dict[str, Any]] = [
        {"strategy": "channel"},
        {"strategy": "channel", "symmetric": False},
        {"strategy": "tensor"},
        {"strategy": "block", "block_structure": [4, 6]},
    ]
    layers = {
        f"{kind}_{m}_{n}": ((m, n), {"num_bits": bits, **args})
        for kind, args in enumerate(kinds)
        for m, n in shapes
    }
    for m, n in shapes[2:]:
        size = {32: 8, 96: 24, 10: 5, 64: 64}[n]
        for symmetric in (True, False):
            args = {"strategy": "group", "group_size": size, "symmetric": symmetric}
            layers[f"group_{symmetric}_{m}_{n}"] = ((m, n), {"num_bits": bits, **args})
    if bits == 4:  # the library cannot read 4-bit zero points in a single row of words
        layers = {
            name: (shape, args)
            for name, (shape, args) in layers.items()
            if shape[0] > 8 or args.get("symmetric", True)
        }
    writer.write(tmp_path, layers, torch.float32)
    check_entries(content_of(tmp_path), tmp_path)


@pytest.mark.libraries
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_formats_in_other_shapes(dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    writer = importlib.import_module("write_compressed")
    for number, (name, settings) in enumerate(
        [("packed", writer.PACKED), ("plain", writer.PLAIN), ("floats", writer.FLOATS)]
    ):
        if dtype == torch.float16 and name == "floats":
            continue
        grown = {
            layer: ((3 * m + number, 2 * n), args) for layer, ((m, n), args) in settings.items()
        }
        writer.write(tmp_path / name, grown, dtype)
        check_entries(content_of(tmp_path / name), tmp_path / name)


@pytest.mark.libraries
def test_stacks_of_experts_equal_library() -> None:
    """The library packs tensors of three sides, slice by slice."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = importlib.import_module("compressed_tensors.quantization")
    args = {"num_bits": 3, "strategy": "group", "group_size": 8, "symmetric": False}
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=quantization.QuantizationArgs(**args)
    )
    parts = {
        "weight": torch.randn(3, 5, 40),
        "weight_scale": torch.rand(3, 5, 5) + 0.5,
        "weight_zero_point": torch.randint(-4, 4, (3, 5, 5), dtype=torch.int8),
    }
    pack = compressors.PackedQuantizationCompressor
    stored = pack.compress(parts, scheme)
    expected = pack.decompress(stored, scheme)["weight"]
    config = {"config_groups": {"a": {"targets": ["Linear"], "weights": args}}, "version": "0.20.1"}
    content = content_from(stored, config={"quantization_config": config})
    (recipe,) = find_recipes(content)[0].values()
    assert recipe.count == 3
    torch.testing.assert_close(build_all(recipe, content), expected, rtol=0, atol=0)


# --- old and new layout of packed words ----------------------------------------------------------


def test_number_of_words_determines_layout() -> None:
    """Without a version: 96 codes of 3 bits have 10 words in the old layout and 9 in the new."""
    tensors, config = load("compressed_0_9_4")
    del config["quantization_config"]["version"]
    content = content_from(tensors, config=config)
    candidates = {one.label: one for one in find_compressed(content)}
    wide = build_all(candidates["wide.weight"].make(), content)
    assert torch.equal(wide, load_expected(DATA / "compressed_0_9_4")["wide.weight"])
    assert "no version" in reason_of(candidates["three.weight"], content)


@pytest.mark.parametrize("version", ["0.20.1", "0.18.0"])
def test_version_that_contradicts_words_gives_a_reason(version: str) -> None:
    tensors, config = load("compressed_0_9_4")
    config["quantization_config"]["version"] = version
    content = content_from(tensors, config=config)
    expected = load_expected(DATA / "compressed_0_9_4")
    read = {one.label: one for one in find_compressed(content)}
    for label in ("wide.weight", "ordered.weight"):  # whose number of words determines the layout
        assert torch.equal(build_all(read.pop(label).make(), content), expected[label])
    for one in read.values():  # unused bits must be zero
        assert "bits: the unused bits are not zero" in reason_of(one, content)


def test_new_layout_with_old_version_gives_a_reason() -> None:
    tensors, config = load("compressed_0_9_4")
    tensors["wide.weight_packed"] = tensors["wide.weight_packed"][:, :9]
    content = content_from(tensors, config=config)
    candidates = {one.label: one for one in find_compressed(content)}
    assert "but the version in config.json is 0.9.4" in reason_of(
        candidates["wide.weight"], content
    )


@pytest.mark.parametrize("bits", [3, 4])
def test_nonzero_unused_bits_give_a_reason(bits: int) -> None:
    """They are zero unless the codes have another width or number."""
    tensors = packed(n=32, bits=bits)
    tensors["fc.weight_shape"][1] -= 1
    tensors["fc.weight_scale"] = tensors["fc.weight_scale"][:, :1]
    config = config_of(group(num_bits=bits, strategy="channel", group_size=-1))
    assert "bits: the unused bits are not zero" in reason(tensors, config)


def test_integers_with_too_many_bits_give_a_reason() -> None:
    tensors = {"fc.weight": torch.tensor([[-8, 7], [3, 8]], dtype=torch.int8)}
    tensors["fc.weight_scale"] = torch.ones(2, 1)
    config = config_of(group(strategy="channel", group_size=-1), format="int-quantized")
    assert reason(tensors, config) == "fc.weight ranges from -8 to 8, more than 4 bits"


# --- which group ----------------------------------------------------------------------------------


def packed(n: int = 24, m: int = 6, bits: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "fc.weight_packed": torch.randint(0, 1 << 30, (m, n * bits // 32)).int(),
        "fc.weight_scale": torch.rand(m, 3) + 0.5,
        "fc.weight_shape": torch.tensor([m, n]),
    }


def group(**weights: Any) -> dict[str, Any]:
    settings = {"num_bits": 4, "strategy": "group", "group_size": 8, "type": "int"}
    return {"targets": ["Linear"], "weights": {**settings, **weights}}


def config_of(*groups: dict[str, Any], **others: Any) -> dict[str, Any]:
    named = {f"group_{number}": one for number, one in enumerate(groups)}
    settings = {"quant_method": "compressed-tensors", "config_groups": named}
    return {"quantization_config": settings | {"format": "pack-quantized"} | others}


def reason(tensors: dict[str, Tensor], config: dict[str, Any]) -> str:
    content = content_from(tensors, config=config)
    (candidate,) = find_compressed(content)
    return reason_of(candidate, content)


def build(tensors: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    (W,) = weights_of(content_from(tensors, config=config), find_compressed).values()
    return W


def test_the_only_fitting_group_is_used() -> None:
    alone = build(packed(), config_of(group()))
    others = (group(num_bits=8), group(group_size=12), group(type="float"), {"targets": ["Conv2d"]})
    assert torch.equal(build(packed(), config_of(*others, group())), alone)
    assert torch.equal(build(packed(), config_of(group(), group(symmetric=True), *others)), alone)


def test_group_that_names_the_module_must_fit() -> None:
    named = group(num_bits=8) | {"targets": ["fc"]}
    assert "8 bits do not fit the 3 words" in reason(packed(), config_of(named, group()))


def test_two_fitting_groups_give_a_reason() -> None:
    """Several block heights give the same number of blocks."""
    tensors = packed() | {"fc.weight_scale": torch.rand(3, 3)}
    blocks = [group(strategy="block", group_size=None, block_structure=[h, 8]) for h in (2, 3)]
    assert torch.equal(
        build(tensors, config_of(blocks[0])),
        build(tensors, config_of(blocks[0], blocks[1])),
    )
    tensors["fc.weight_scale"] = torch.rand(2, 3)
    wide = [group(strategy="block", group_size=None, block_structure=[h, 8]) for h in (3, 4, 5)]
    assert "several config_groups" in reason(tensors, config_of(*wide))


def test_too_many_groups_give_a_reason() -> None:
    groups = [group(group_size=size) for size in range(1, 100)]
    assert "more than 64 different" in reason(packed(), config_of(*groups))


def test_defaults_are_those_of_the_library() -> None:
    """8 bits, integers, symmetric. Without a strategy, groups of group_size."""
    tensors = packed(bits=8)
    short = {"weights": {"group_size": 8}}
    whole = group(num_bits=8, symmetric=True)
    assert torch.equal(build(tensors, config_of(short)), build(tensors, config_of(whole)))


# --- parts that do not fit ------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["fc.weight_scale", "fc.weight_shape"])
def test_missing_part_is_named(missing: str) -> None:
    tensors = packed()
    del tensors[missing]
    assert f"{missing} is missing" in reason(tensors, config_of(group()))


SHAPE, ZEROS = "fc.weight_shape", "fc.weight_zero_point"
ASYMMETRIC, ORDERED = group(symmetric=False), group(actorder="group")
ORDER = torch.arange(24) // 8


@pytest.mark.parametrize(
    ("changes", "config", "why"),
    [
        ({}, {}, "no quantization_config of compressed-tensors"),
        ({}, {"quantization_config": {"quant_method": "gptq"}}, "no quantization_config of"),
        ({}, config_of(), "no config_groups with weights"),
        ({}, config_of({"targets": ["Linear"], "weights": None}), "no config_groups with weights"),
        ({}, config_of(group(num_bits=0)), "num_bits must be"),
        ({}, config_of(group(num_bits=9)), "num_bits must be"),
        ({}, config_of(group(num_bits=True)), "num_bits must be"),
        ({}, config_of(group(num_bits="4")), "num_bits must be"),
        ({}, config_of(group(num_bits=8)), "8 bits do not fit the 3 words"),
        ({}, config_of(group(type="complex")), "type must be"),
        ({}, config_of(group(type="float")), "does not fit 4 bits of type float"),
        ({}, config_of(group(symmetric="yes")), "symmetric must be"),
        ({}, config_of(group(strategy="token", group_size=None)), "token is unknown"),
        ({}, config_of(group(strategy="channel")), "contradicts the group_size"),
        ({}, config_of(group(strategy="block", group_size=None)), "the block_structure"),
        ({}, config_of(group(group_size=0)), "contradicts the group_size"),
        ({}, config_of(group(group_size=-3)), "must be a positive integer"),
        ({}, config_of(group(group_size=1 << 70)), "must be a positive integer"),
        ({}, config_of(group(group_size=7)), "does not divide its 24 columns"),
        ({}, config_of(group(group_size=6)), "does not fit the group strategy"),
        ({}, config_of(group(), format="int-quantized"), "int-quantized does not fit"),
        ({}, config_of(group() | {"format": "marlin-24"}), "marlin-24 does not fit"),
        ({}, config_of(group(), transform_config={"config_groups": {"a": 1}}), "transform_config"),
        ({}, config_of(group(), transform_config=[1]), "transform_config"),
        ({}, config_of(group(strategy="tensor_group")), "weight_global_scale is missing"),
        ({}, config_of(ASYMMETRIC), "weight_zero_point is missing"),
        ({}, config_of(ORDERED), "weight_g_idx is missing"),
        ({"fc.weight": torch.ones(2, 2)}, config_of(group()), "fc.weight is also stored"),
        ({"fc.weight_global_scale": torch.ones(1)}, config_of(group()), "contradicts the group"),
        ({SHAPE: torch.tensor([6, 25])}, config_of(group()), "do not fit the 3 words"),
        ({SHAPE: torch.tensor([7, 24])}, config_of(group()), "but the codes have [6] rows"),
        ({SHAPE: torch.tensor([6, -24])}, config_of(group()), "but the codes have [6] rows"),
        ({SHAPE: torch.tensor([6, 1 << 60])}, config_of(group()), "do not fit the 3 words"),
        ({SHAPE: torch.tensor([6.0, 24.0])}, config_of(group()), "but the codes have [6] rows"),
        ({SHAPE: torch.tensor([24])}, config_of(group()), "but the codes have [6] rows"),
        ({SHAPE: torch.tensor([])}, config_of(group()), "but the codes have [6] rows"),
        ({SHAPE: torch.zeros(5000).int()}, config_of(group()), "too large"),
        ({"fc.weight_packed": torch.zeros(6, 0).int()}, config_of(group()), "has the shape"),
        ({"fc.weight_packed": torch.zeros(6).int()}, config_of(group()), "has the shape"),
        ({"fc.weight_packed": torch.zeros(6, 3).long()}, config_of(group()), "does not fit 4 bits"),
        ({"fc.weight_scale": torch.ones(6, 3).int()}, config_of(group()), "has the dtype int32"),
        ({"fc.weight_scale": torch.ones(3, 6)}, config_of(group()), "does not fit the group"),
        ({"fc.weight_scale": torch.ones(18)}, config_of(group()), "does not fit the group"),
        ({ZEROS: torch.zeros(1, 2).int()}, config_of(ASYMMETRIC), "does not fit"),
        ({ZEROS: torch.zeros(2, 3).int()}, config_of(ASYMMETRIC), "does not fit 6 rows"),
        ({ZEROS: torch.zeros(1).int()}, config_of(ASYMMETRIC), "does not fit 6 rows"),
        ({ZEROS: torch.zeros(6, 3)}, config_of(ASYMMETRIC), "does not fit"),
        ({ZEROS: torch.ones(6, 3).char()}, config_of(group()), "must be zero"),
        ({"fc.weight_g_idx": ORDER[1:]}, config_of(ORDERED), "not one number per column"),
        ({"fc.weight_g_idx": ORDER.float()}, config_of(ORDERED), "not one number per column"),
        ({"fc.weight_g_idx": ORDER + 1}, config_of(ORDERED), "at least 0 and below 3"),
        ({"fc.weight_g_idx": ORDER - 1}, config_of(ORDERED), "at least 0 and below 3"),
        ({"fc.weight_g_idx": ORDER * 0}, config_of(ORDERED), "omits some"),
        ({"fc.meta": torch.ones(1)}, config_of(group()), "sparse form"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_give_a_reason(
    changes: dict[str, Tensor], config: dict[str, Any], why: str
) -> None:
    assert why in reason(packed() | changes, config)


def test_initial_order_is_that_of_the_columns() -> None:
    config = config_of(ORDERED)
    order = {"fc.weight_g_idx": torch.full((24,), -1)}
    assert torch.equal(build(packed() | order, config), build(packed(), config_of(group())))


@pytest.mark.parametrize("damage", [[], 3, "x", None, {"a": []}, {"a": {"weights": {"type": []}}}])
def test_config_groups_of_another_kind_are_refused(damage: Any) -> None:
    config = {"quantization_config": {"config_groups": damage}}
    recipes, refused = find_recipes(content_from(packed(), config=config))
    assert not recipes
    assert list(refused) == ["fc.weight_packed"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_damaged_parts_never_give_a_wrong_weight(folder: str) -> None:
    """Each part is omitted, cut, reshaped, or converted to another dtype."""
    tensors, config = load(folder)
    whole = weights_of(content_from(tensors, config=config), find_compressed)
    for name, tensor in tensors.items():
        label = f"{name.rpartition('.')[0]}.weight"
        cut = [tensor[:0], tensor[..., :-1]]
        damages = [None, *cut, tensor[None], tensor.flatten(), tensor.view(torch.uint8)]
        damages += [torch.zeros(tensor.shape, dtype=torch.bool)]
        for damage in damages:
            if damage is not None and (damage.shape, damage.dtype) == (tensor.shape, tensor.dtype):
                continue
            changed = {key: one for key, one in tensors.items() if key != name}
            if damage is not None:
                changed[name] = damage
            content = content_from(changed, config=config)
            recipes, _ = find_recipes(content)
            if label in recipes:
                W = build_all(recipes[label], content)
                # A scale of one entry can have any shape, and cut codes can belong to another W.
                other = any(damage is one for one in cut) and name.endswith(("weight", "_packed"))
                assert other or torch.equal(W, whole[label]), (name, damage)


def test_float_weight_with_scales_gives_a_reason() -> None:
    tensors = {"fc.weight": torch.ones(4, 8), "fc.weight_scale": torch.ones(4, 1)}
    settings = group(num_bits=8, strategy="channel", group_size=None)
    config = config_of(settings, quantization_status="frozen", format="dense")
    assert "quantization_status frozen" in reason(tensors, config)


def test_sparse_forms_are_refused() -> None:
    tensors = {
        "fc.compressed": torch.ones(4, 4),
        "fc.bitmask": torch.ones(4, 1, dtype=torch.uint8),
        "fc.shape": torch.tensor([4, 8]),
    }
    content = content_from(tensors, config=config_of(group()))
    recipes, refused = find_recipes(content)
    assert not recipes
    (reasons,) = refused.values()
    assert "sparse form" in reasons[0]
