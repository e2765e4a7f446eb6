"""Weights that ModelOpt exports, compared entry by entry with those that it dequantises."""

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
from wellcond.recipes.find import find_recipes
from wellcond.recipes.modelopt import find_modelopt

DATA = Path(__file__).parent / "data"
FOLDERS = sorted(path.name for path in DATA.glob("modelopt_*"))
# ModelOpt rounds the product of the scales before it multiplies, which is one more rounding.
TWICE = 2**-23


def check_entries(content: Content, folder: Path) -> None:
    weights, expected = weights_of(content, find_modelopt), load_expected(folder)
    assert weights.keys() == expected.keys()
    for name, W in expected.items():
        torch.testing.assert_close(weights[name], W, rtol=TWICE, atol=0)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_entry_equals_library(folder: str) -> None:
    content = content_of(DATA / folder)
    check_entries(content, DATA / folder)
    recipes, refused = find_recipes(content)
    assert not refused
    assert {part for one in recipes.values() for part in one.parts} == set(content.tensors)


@pytest.mark.parametrize("kept", ["config.json", "hf_quant_config.json"])
def test_one_config_is_enough(kept: str) -> None:
    folder = DATA / "modelopt_nvfp4"
    content = content_of(folder)
    alone = Content(
        content.tensors, content.read, lambda name: content.beside(name) if name == kept else {}
    )
    check_entries(alone, folder)


@pytest.mark.libraries
def test_every_entry_equals_installed_library(tmp_path: Path) -> None:
    pytest.importorskip("modelopt")
    writer = importlib.import_module("write_modelopt")
    wide = copy.deepcopy(writer.EXPERTS)
    wide.hidden_size = 64  # a multiple of 32
    for name, config, algorithm, part in [
        ("fp8", writer.DENSE, "FP8_DEFAULT_CFG", "proj"),
        ("rows", writer.DENSE, "FP8_PER_CHANNEL_PER_TOKEN_CFG", "proj"),
        ("mxfp8", writer.DENSE, "MXFP8_DEFAULT_CFG", "proj"),
        ("nvfp4", writer.DENSE, "NVFP4_DEFAULT_CFG", "proj"),
        ("mxfp4", writer.DENSE, "MXFP4_DEFAULT_CFG", "proj"),
        ("mxfp4_fp8", writer.DENSE, "W4A8_MXFP4_FP8_CFG", "proj"),
        ("nvfp4_only", writer.DENSE, "W4A16_NVFP4_CFG", "proj"),
        ("stacks_mxfp4", wide, "MXFP4_DEFAULT_CFG", "experts.down"),
        ("stacks", writer.EXPERTS, "NVFP4_DEFAULT_CFG", "experts."),
        ("stacks_fp8", writer.EXPERTS, "FP8_DEFAULT_CFG", "experts."),
        ("stacks_rows", writer.EXPERTS, "FP8_PER_CHANNEL_PER_TOKEN_CFG", "experts."),
    ]:
        writer.write(tmp_path / name, config, algorithm, part)
        check_entries(content_of(tmp_path / name), tmp_path / name)


@pytest.mark.libraries
def test_nvfp4_equals_conversion_by_compressed_tensors() -> None:
    """The global scale of compressed-tensors is the reciprocal, and it rounds to bfloat16."""
    converters = pytest.importorskip("compressed_tensors.entrypoints.convert.converters")
    compressors = importlib.import_module("compressed_tensors.compressors")
    schemes = importlib.import_module("compressed_tensors.quantization.quant_scheme")
    content = content_of(DATA / "modelopt_nvfp4")
    weights = weights_of(content, find_modelopt)
    converted = converters.ModelOptNvfp4Converter(targets=["Linear"]).process(
        {name: content.read(name) for name in content.tensors}
    )
    scheme = schemes.preset_name_to_scheme("NVFP4", ["Linear"])
    for name, W in weights.items():
        module = name.removesuffix("weight")
        parts = {key: converted[f"{module}{key}"] for key in ("weight_packed", "weight_scale")}
        # As in its own files: it would divide by a 0-d scale in bfloat16.
        parts["weight_global_scale"] = converted[f"{module}weight_global_scale"].reshape(1)
        there = compressors.NVFP4PackedCompressor.decompress(parts, scheme)["weight"]
        torch.testing.assert_close(W.to(there.dtype), there, rtol=2**-8, atol=0)
        assert (W.to(there.dtype) != there).float().mean() < 0.01


# --- parts that do not fit ------------------------------------------------------------------------

E4M3 = torch.float8_e4m3fn


def nvfp4() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "fc.weight": torch.randint(0, 256, (6, 16), dtype=torch.uint8),
        "fc.weight_scale": (torch.rand(6, 2) + 0.5).to(E4M3),
        "fc.weight_scale_2": torch.tensor(0.01),
    }


def config_of(algorithm: Any = "NVFP4", **others: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, **others}


def content_with(tensors: dict[str, Tensor], config: Any, beside: Any = None) -> Content:
    files = {"config": {"quantization_config": config}}
    files["hf_quant_config"] = {} if beside is None else {"quantization": beside}
    return content_from(tensors, **files)


def reason(tensors: dict[str, Tensor], config: Any, beside: Any = None) -> str:
    content = content_with(tensors, config, beside)
    (candidate,) = find_modelopt(content)
    return reason_of(candidate, content)


def test_mixed_precision_names_algorithm_per_layer() -> None:
    mixed = config_of("MIXED_PRECISION", quantized_layers={"fc": {"quant_algo": "NVFP4"}})
    content, alone = content_with(nvfp4(), mixed), content_with(nvfp4(), config_of())
    (W,), (expected,) = (weights_of(one, find_modelopt).values() for one in (content, alone))
    assert torch.equal(W, expected)
    other = config_of("MIXED_PRECISION", quantized_layers={"other": {"quant_algo": "NVFP4"}})
    assert "do not fit NONE" in reason(nvfp4(), other)


def test_stack_packed_along_rows_or_columns() -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (3, 8, 16), dtype=torch.uint8)
    scales = (torch.rand(3, 1, 16) + 0.5).to(E4M3)
    rows = {"experts.down_proj": codes, "experts.down_proj_weight_scale": scales}
    rows["experts.down_proj_weight_scale_2"] = torch.rand(3)
    content = content_with(rows, config_of())
    (recipe,) = find_recipes(content)[0].values()
    assert recipe.shape == (3, 16, 16)
    columns = {name: one.mT.contiguous() if one.ndim > 1 else one for name, one in rows.items()}
    other = content_with(columns, config_of())
    (turned,) = find_recipes(other)[0].values()
    assert turned.shape == (3, 16, 16)
    assert torch.equal(build_all(turned, other).mT, build_all(recipe, content))


@pytest.mark.parametrize(
    ("changes", "config", "beside", "why"),
    [
        ({}, config_of("FP8"), None, "codes of dtype uint8 do not fit FP8"),
        ({}, config_of(None), None, "codes of dtype uint8 do not fit NONE"),
        ({}, config_of([]), None, "codes of dtype uint8 do not fit []"),
        ({}, config_of("W4A16_AWQ"), None, "uint8 do not fit W4A16_AWQ"),
        ({}, config_of("MIXED_PRECISION", quantized_layers=3), None, "do not fit MIXED_PRECISION"),
        ({}, config_of(), {"quant_algo": "FP8"}, "two configs name different algorithms"),
        ({"fc.weight_scale_2": None}, config_of(), None, "NVFP4 must have a weight_scale_2"),
        ({}, config_of("MXFP4"), None, "MXFP4 must not have one"),
        ({"fc.weight_scale_2": torch.ones(6)}, config_of(), None, "must be one number"),
        ({"fc.weight_scale_2": torch.ones(1).int()}, config_of(), None, "must be one number"),
        ({"fc.weight_scale": torch.ones(6, 2)}, config_of(), None, "has the dtype float32"),
        ({"fc.weight_scale": torch.ones(128, 4).to(E4M3)}, config_of(), None, "does not fit 16"),
        ({"fc.weight": torch.ones(6, 0).byte()}, config_of(), None, "codes have the shape"),
        ({"fc.weight": torch.ones(6, 4, 4).byte()}, config_of(), None, "codes have the shape"),
        ({"fc.pre_quant_scale": torch.ones(32)}, config_of(), None, "pre_quant_scale"),
        ({"fc.weight": torch.ones(6, 32).to(E4M3)}, config_of("FP8"), None, "a second scale"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_give_a_reason(
    changes: dict[str, Tensor | None], config: Any, beside: Any, why: str
) -> None:
    tensors = {name: one for name, one in (nvfp4() | changes).items() if one is not None}
    assert why in reason(tensors, config, beside)


@pytest.mark.parametrize(
    ("algorithm", "shape"),
    [
        *[("FP8", (6,)), ("FP8", (6, 1)), ("FP8_PER_CHANNEL_PER_TOKEN", (32,)), ("MXFP8", (6,))],
        *[("FP8_PB_WO", (1, 1, 2, 1)), ("FP8_PB_WO", (2,)), ("FP8_OTHER", ()), ("MXFP8", (6, 1))],
    ],
)
def test_scales_of_fp8_that_do_not_fit_give_a_reason(
    algorithm: str, shape: tuple[int, ...]
) -> None:
    tensors = {"fc.weight": torch.ones(6, 32).to(E4M3), "fc.weight_scale": torch.ones(shape)}
    said = reason(tensors, config_of(algorithm))
    assert "does not fit" in said or "has the dtype float32" in said


def test_no_candidates_without_config() -> None:
    assert not list(find_modelopt(content_from(nvfp4())))
    assert not list(find_modelopt(content_from(nvfp4(), hf_quant_config={"quantization": []})))
