"""Microscaled weights, compared entry by entry with those that the libraries dequantise."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import build_all, content_from, content_of, load_expected, reason_of, weights_of
from torch import Tensor

import wellcond as wc
from wellcond.recipes.base import Candidate, Content
from wellcond.recipes.find import find_recipes
from wellcond.recipes.mxfp4 import find_mxfp4

DATA = Path(__file__).parent / "data"
WRITTEN = ("gpt_oss", "deepseek_v4", "quark", "mxfp8")


def check(folder: Path) -> None:
    """Compares the last experts of a stack, and some or all of the other weights."""
    content, expected = content_of(folder), load_expected(folder)
    found = weights_of(content, find_mxfp4)
    assert expected.keys() <= found.keys()
    for name, one in expected.items():
        W = found[name][-len(one) :] if one.ndim == 3 else found[name]
        assert torch.equal(W, one.to(W.dtype)), name
    recipes, refused = find_recipes(content)
    assert recipes.keys() == found.keys()
    assert not refused


@pytest.mark.parametrize("name", WRITTEN)
def test_every_entry_equals_library(name: str) -> None:
    check(DATA / name)


def test_gate_and_up_of_gpt_oss_equal_plain_checkpoint(tmp_path: Path) -> None:
    """Rows of gate and up alternate in both. The biases do not belong to a weight."""
    content = content_of(DATA / "gpt_oss")
    weights = weights_of(content, find_mxfp4)
    codes, plain = tmp_path / "codes", tmp_path / "plain"
    for folder in (codes, plain):
        folder.mkdir()
        for name in ("model.safetensors", "config.json"):
            shutil.copy(DATA / "gpt_oss" / name, folder)
    parts = (".blocks", "_blocks", "_scales")
    kept = {name: content.read(name) for name in content.tensors if not name.endswith(parts)}
    save_file(kept | {n: W.contiguous() for n, W in weights.items()}, plain / "model.safetensors")
    of_codes, of_plain = (wc.audit(folder) for folder in (codes, plain))
    kappas = [{f.label: f.condition_number for f in one.findings} for one in (of_codes, of_plain)]
    assert kappas[0] == kappas[1]
    stem = "model.layers.0.mlp.experts"
    assert {f"{stem}.gate_up_proj:{one}:{i}" for one in ("gate", "up") for i in (0, 1)} < set(
        kappas[0]
    )
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        why = of_codes.coverage.skipped[f"{stem}.{name}"]
        assert why == of_plain.coverage.skipped[f"{stem}.{name}"]
        assert "bias" in str(why)


SETTINGS: dict[str, list[dict[str, int]]] = {
    "gpt_oss": [{"hidden": 96, "inner": 32, "experts": 3}, {"hidden": 32, "inner": 160}],
    "deepseek_v4": [{"hidden": 160, "inner": 96, "experts": 3}],
    "quark": [{"hidden": 96, "inner": 160}],
    "mxfp8": [{"hidden": 96, "inner": 160}],
}


@pytest.mark.slow
@pytest.mark.libraries
@pytest.mark.parametrize("name", WRITTEN)
def test_every_entry_equals_library_at_other_sizes(name: str, tmp_path: Path) -> None:
    import write_mxfp4

    for package in ("transformers", "quark" if name == "quark" else "torchao"):
        pytest.importorskip(package)
    for number, options in enumerate(SETTINGS[name]):
        folder = tmp_path / str(number)
        folder.mkdir()
        last = {"last": options["experts"]} if "experts" in options else {}
        write_mxfp4.WRITERS[name](folder, **options, **last)
        check(folder)


# --- parts that do not fit ------------------------------------------------------------------------

FP8 = {"quantization_config": {"quant_method": "fp8"}}


def of_gpt_oss(E: int = 2, m: int = 6, groups: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (E, m, groups)
    return {
        "experts.down_proj_blocks": torch.randint(256, (*shape, 16), generator=generator).byte(),
        "experts.down_proj_scales": torch.randint(110, 140, shape, generator=generator).byte(),
    }


def of_deepseek(m: int = 6, groups: int = 3, stack: tuple[int, ...] = ()) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (*stack, m, 16 * groups), generator=generator)
    scales = torch.randint(110, 140, (*stack, m, groups), generator=generator)
    name = "scale" if not stack else "weight_scale_inv"
    return {"w1.weight": codes.to(torch.int8), f"w1.{name}": scales.byte()}


def the_candidate(content: Content) -> Candidate:
    (candidate,) = find_mxfp4(content)
    return candidate


def test_order_of_entries() -> None:
    """Two values per byte, low bits first; 32 per scale; (outputs, inputs) transposed."""
    content = content_from(of_gpt_oss())
    blocks, scales = content.tensors
    codes, s = content.read(blocks).int(), content.read(scales).double()
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    W = build_all(the_candidate(content).make(), content)
    assert W.shape == (2, 96, 6)
    for expert, output, block, k in ((0, 0, 0, 0), (1, 5, 2, 31), (1, 2, 1, 6), (0, 4, 2, 15)):
        nibble = int(codes[expert, output, block, k // 2]) >> (4 * (k % 2)) & 15
        value = (-1) ** (nibble >> 3) * table[nibble & 7]
        scale = 2 ** (float(s[expert, output, block]) - 127)
        assert float(W[expert, 32 * block + k, output]) == value * scale


def test_original_files_have_outputs_first() -> None:
    tensors = of_gpt_oss()
    renamed = {
        name.replace("_blocks", ".blocks").replace("_scales", ".scales"): one
        for name, one in tensors.items()
    }
    plain, original = content_from(tensors), content_from(renamed)
    recipe = the_candidate(original).make()
    assert (recipe.label, recipe.shape, recipe.count) == ("experts.down_proj", (2, 6, 96), 2)
    W = build_all(the_candidate(plain).make(), plain)
    assert torch.equal(recipe.build(original.read, 1), W[1].mT)


def test_stack_of_int8_equals_its_matrices() -> None:
    content = content_from(of_deepseek(stack=(2,)), config=FP8)
    recipe = the_candidate(content).make()
    assert (recipe.shape, recipe.count) == ((2, 6, 96), 2)
    single = {
        name.replace("weight_scale_inv", "scale"): one[1]
        for name, one in of_deepseek(stack=(2,)).items()
    }
    one = content_from(single, config=FP8)
    assert torch.equal(recipe.build(content.read, 1), build_all(the_candidate(one).make(), one))


def test_stack_of_float8_equals_its_matrices() -> None:
    codes, scales = of_deepseek(groups=4, stack=(2,)).values()
    scales = scales[..., :2]
    content = content_from(
        {"experts.w13_weight": codes.view(torch.float8_e4m3fn), "experts.w13_weight_scale": scales},
        config={"quantization_config": {"quant_method": "mxfp8"}},
    )
    W = build_all(the_candidate(content).make(), content)
    powers = torch.exp2(scales.float() - 127).repeat_interleave(32, -1)
    expected = codes.view(torch.float8_e4m3fn).float() * powers
    torch.testing.assert_close(W, expected, rtol=0, atol=0, equal_nan=True)
    assert W.shape == (2, 6, 64)


def test_rows_are_converted_in_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    content = content_from(of_deepseek(m=11), config=FP8)
    recipe = the_candidate(content).make()
    whole = recipe.build(content.read, 0)
    monkeypatch.setattr("wellcond.recipes.codes.row_ranges.__defaults__", (4,))
    assert torch.equal(recipe.build(content.read, 0), whole)


def test_scale_of_255_is_nan() -> None:
    tensors = of_deepseek()
    tensors["w1.scale"][2, 1] = 255
    content = content_from(tensors, config=FP8)
    W = build_all(the_candidate(content).make(), content)
    assert W.isnan().sum() == 32
    assert W[2, 32:64].isnan().all()


def changed(
    make: Callable[[], dict[str, Tensor]], **by: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Changes the tensors whose names end with these words."""
    tensors = make()
    for name in tensors:
        change = next((one for end, one in by.items() if name.endswith(end)), None)
        tensors[name] = tensors[name] if change is None else change(tensors[name])
    return tensors


def quark(**settings: Any) -> dict[str, Any]:
    spec = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
    return {
        "quantization_config": {
            "quant_method": "quark",
            "global_quant_config": {"weight": spec | settings},
        }
    }


def of_quark() -> dict[str, Tensor]:
    codes, scales = of_deepseek().values()
    return {"l.weight": codes.view(torch.uint8), "l.weight_scale": scales}


NO_WEIGHTS = {"quantization_config": {"quant_method": "quark", "layer_quant_config": 3}}
REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "blocks of another size": (
        changed(of_gpt_oss, blocks=lambda t: t[..., :15]),
        {},
        "not (experts, outputs, blocks, 16)",
    ),
    "blocks of a matrix": (changed(of_gpt_oss, blocks=lambda t: t[0]), {}, "are not (experts"),
    "no blocks": (changed(of_gpt_oss, blocks=lambda t: t[:0]), {}, "are not (experts"),
    "truncated scales": (
        changed(of_gpt_oss, scales=lambda t: t[:, :5]),
        {},
        "has the shape (2, 5, 3), not (2, 6, 3)",
    ),
    "scales of another dtype": (
        changed(of_gpt_oss, scales=lambda t: t.int()),
        {},
        "has the dtype int32, which does not store",
    ),
    "another format": (
        of_gpt_oss(),
        {"quantization_config": {"quant_method": "gptq"}},
        "quant_method in config.json is gptq, not",
    ),
    "no format": (
        of_gpt_oss(),
        {"quantization_config": {"quant_method": [1]}},
        "quant_method in config.json is [1], not",
    ),
    "int8 that no config explains": (
        of_deepseek(),
        {},
        "does not mark int8 as float4",
    ),
    "int8 that is said to be float8": (
        of_deepseek(),
        {"expert_dtype": "fp8", **FP8},
        "with expert_dtype fp4 or",
    ),
    "groups of another size": (
        changed(of_deepseek, scale=lambda t: t[:, :2]),
        FP8,
        "has the shape (6, 2), not (6, 3)",
    ),
    "scales of rows": (changed(of_deepseek, scale=lambda t: t[:, 0]), FP8, "has the shape (6,)"),
    "an odd number of inputs": (
        changed(of_deepseek, weight=lambda t: t[:, :-1]),
        FP8,
        "its 94 inputs are not a multiple of 32",
    ),
    "a vector": (changed(of_deepseek, weight=lambda t: t[0]), FP8, "are neither a matrix nor"),
    "no rows": (
        changed(of_deepseek, weight=lambda t: t[:0], scale=lambda t: t[:0]),
        FP8,
        "neither",
    ),
    "Quark, no such weights": (of_quark(), quark(dtype="int4"), "no weight in config.json has the"),
    "Quark, other groups": (
        of_quark(),
        quark(group_size=16),
        "scales in config.json are not e8m0 per 32",
    ),
    "Quark, other scales": (
        of_quark(),
        quark(scale_format="e5m3"),
        "scales in config.json are not e8m0 per 32",
    ),
    "Quark, nothing": (of_quark(), NO_WEIGHTS, "no weight"),
    "Quark, float6": (
        changed(of_quark, weight=lambda t: t.repeat(1, 2)[:, :72]),
        quark(),
        "its 144 inputs are not",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_parts_that_do_not_fit_give_a_reason(case: str) -> None:
    tensors, config, expected = REFUSED[case]
    content = content_from(tensors, config=config)
    candidate = the_candidate(content)
    assert set(candidate.parts) == set(tensors)
    reason = reason_of(candidate, content)
    assert expected in reason
    assert "\n" not in reason


@pytest.mark.parametrize("missing", [0, 1])
def test_single_part_is_not_a_candidate(missing: int) -> None:
    for tensors, config in ((of_gpt_oss(), {}), (of_deepseek(), FP8), (of_quark(), quark())):
        del tensors[list(tensors)[missing]]
        assert not list(find_mxfp4(content_from(tensors, config=config)))


@pytest.mark.parametrize(
    "tensors",
    [
        {"l.weight": torch.zeros(4, 8, dtype=torch.int8), "l.weight_scale": torch.ones(4, 1)},
        {"l.weight": torch.zeros(4, 8), "l.scale": torch.zeros(4, 1, dtype=torch.uint8)},
        {"l.weight": torch.zeros(4, 8).to(torch.float8_e4m3fn), "l.weight_scale": torch.ones(4)},
        {"l.weight": torch.zeros(4, 8).byte(), "l.weight_scale": torch.zeros(4, 1).byte()},
        {"_blocks": torch.zeros(1, 1, 1, 16).byte(), "_scales": torch.zeros(1, 1, 1).byte()},
        {"a_blocks": torch.zeros(2, 2), "a_scales": torch.zeros(2, 2)},
    ],
)
def test_other_formats_are_not_candidates(tensors: dict[str, Tensor]) -> None:
    assert not list(find_mxfp4(content_from(tensors)))


@pytest.mark.parametrize("method", [None, [], {}, 3, "x" * 10_000])
def test_invalid_configs_are_harmless(method: Any) -> None:
    config = {"quantization_config": {"quant_method": method}, "expert_dtype": [method]}
    for tensors in (of_gpt_oss(), of_deepseek(), of_quark()):
        content = content_from(tensors, config=config)
        for candidate in find_mxfp4(content):
            assert len(reason_of(candidate, content)) < 120
    for config in ({"quantization_config": [method]}, {"quantization_config": {}}):
        content = content_from(of_gpt_oss(), config=config)
        assert build_all(the_candidate(content).make(), content).shape == (2, 96, 6)
