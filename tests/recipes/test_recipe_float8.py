"""FP8 weights of transformers, FBGEMM, DeepSeek and ComfyUI, compared entry by entry."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support import build_all, content_from, content_of, load_expected, reason_of, weights_of
from torch import Tensor

from wellcond.recipes.find import find_recipes
from wellcond.recipes.float8 import find_float8

DATA = Path(__file__).parent / "data"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def sample(*shape: int, dtype: torch.dtype = E4M3) -> Tensor:
    torch.manual_seed(0)
    return (torch.randn(shape) * 4).to(dtype)


def settings(**others: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "fp8", **others}}


def build(tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Tensor:
    """Builds the only weight of these tensors, all of which must belong to it."""
    content = content_from(tensors, config=config or {})
    recipes, refused = find_recipes(content)
    assert not refused
    (recipe,) = recipes.values()
    assert set(recipe.parts) == set(tensors)
    return build_all(recipe, content)


def reason(tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> str:
    content = content_from(tensors, config=config or {})
    (candidate,) = find_float8(content)
    return reason_of(candidate, content)


def by_hand(codes: Tensor, scales: Tensor, h: int, w: int) -> Tensor:
    """Dequantises entry by entry in float64: the block of (i, j) is (i // h, j // w)."""
    m, n = codes.shape
    codes, scales = codes.double(), scales.double()
    entries = [[codes[i, j] * scales[i // h, j // w] for j in range(n)] for i in range(m)]
    return torch.tensor(entries, dtype=torch.float64)


@pytest.mark.parametrize("folder", sorted(path.name for path in DATA.glob("float8_*")))
def test_every_entry_equals_library(folder: str) -> None:
    content, expected = content_of(DATA / folder), load_expected(DATA / folder)
    powers = any(dtype == "float8_e8m0fnu" for _, dtype in content.tensors.values())
    if powers and not hasattr(torch, "float8_e8m0fnu"):
        pytest.skip("this torch has no float8_e8m0fnu")
    weights = weights_of(content, find_float8)
    assert weights.keys() == expected.keys()
    for name, W in expected.items():
        torch.testing.assert_close(weights[name], W, rtol=0, atol=0)


@pytest.mark.libraries
def test_every_entry_equals_installed_library(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    pytest.importorskip("transformers")
    writer = importlib.import_module("write_float8")
    writer.write_model(tmp_path / "model")
    writer.write_stacks(tmp_path / "stacks")
    writer.write_deepseek(tmp_path / "deepseek")
    writer.write_fbgemm(tmp_path / "fbgemm")
    for folder in tmp_path.iterdir():
        weights, expected = weights_of(content_of(folder), find_float8), load_expected(folder)
        assert weights.keys() == expected.keys()
        for name, W in expected.items():
            torch.testing.assert_close(weights[name], W, rtol=0, atol=0)


@pytest.mark.libraries
@pytest.mark.parametrize("shape", [(1, 1), (9, 4), (4, 9), (8, 16), (23, 5), (2, 31)])
@pytest.mark.parametrize("block", [(1, 1), (4, 3), (3, 8), (40, 7), (5, 99)])
def test_short_blocks_equal_compressed_tensors_and_transformers(
    shape: tuple[int, int], block: tuple[int, int]
) -> None:
    pytest.importorskip("compressed_tensors")
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    converters = importlib.import_module("compressed_tensors.entrypoints.convert.converters")
    (m, n), (h, w) = shape, block
    scales = torch.rand(-(-m // h), -(-n // w)) + 0.5
    both = {"x.weight": sample(m, n), "x.weight_scale_inv": scales}
    W = build(both, settings(weight_block_size=[h, w]))
    converter = converters.FP8BlockDequantizer(weight_block_size=block, dtype=torch.float32)
    torch.testing.assert_close(W, converter.process(dict(both))["x.weight"], rtol=0, atol=0)
    # transformers multiplies by this on a GPU. When it loads on a CPU, it uses other blocks.
    there = module._dequantize_fp8_weight(both["x.weight"], scales, [h, w], torch.float32)
    torch.testing.assert_close(W, there, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 8), (300, 2), (2, 300)])
@pytest.mark.parametrize("block", [(1, 1), (1, 3), (2, 1), (3, 4), (128, 128), (1 << 39, 2)])
def test_blocks_are_counted_from_the_upper_left(
    shape: tuple[int, int], block: tuple[int, int]
) -> None:
    (m, n), (h, w) = shape, block
    scales = torch.rand(-(-m // h), -(-n // w)) + 0.5
    both = {"weight": sample(m, n), "weight_scale_inv": scales}
    W = build(both, settings(weight_block_size=[h, w]))
    assert W.dtype == torch.float32
    torch.testing.assert_close(W, by_hand(both["weight"], scales, h, w).float(), rtol=0, atol=0)


def test_large_matrix_is_converted_in_several_steps() -> None:
    m, n = 1500, 2003  # more entries than are converted at once
    codes, scales = sample(m, n), torch.rand(24, 16) + 0.5
    W = build({"weight": codes, "weight_scale": scales}, settings(weight_block_size=[64, 128]))
    rows, columns = torch.arange(m) // 64, torch.arange(n) // 128
    assert torch.equal(W, codes.float() * scales[rows][:, columns])


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize(
    ("scale", "shape"),
    [
        ("weight_scale", ()),
        ("scale_weight", (1,)),
        ("weight_scale", (1, 1)),
        ("weight_scale", (6, 1)),
        ("weight_scale", (6,)),
        ("qscale_weight", ()),
        ("weight_scale_inv", (1,)),
    ],
)
def test_one_scale_per_tensor_or_row(
    dtype: torch.dtype, scale: str, shape: tuple[int, ...]
) -> None:
    codes, scales = sample(6, 4, dtype=dtype), torch.rand(shape) + 0.5
    W = build({"fc.weight": codes, f"fc.{scale}": scales})
    assert torch.equal(W, codes.float() * scales.reshape(-1, 1))


def test_scalar_scales_the_tensor_although_config_has_blocks() -> None:
    codes = sample(300, 5)
    W = build(
        {"weight": codes, "weight_scale": torch.tensor([0.3])}, settings(weight_block_size=[2, 2])
    )
    assert torch.equal(W, codes.float() * 0.3)


def test_kernel_with_one_scale() -> None:
    codes = sample(4, 3, 2, 2)
    both = {"weight": codes, "scale_weight": torch.tensor(0.3), "scale_input": torch.tensor(2.0)}
    assert torch.equal(build(both), codes.float() * 0.3)


@pytest.mark.parametrize("shape", [(3,), (3, 1, 1), (3, 4, 1), (3, 4)])
def test_stack_with_one_scale_per_expert_or_row(shape: tuple[int, ...]) -> None:
    codes, scales = sample(3, 4, 5), torch.rand(shape) + 0.5
    W = build({"experts.down_proj": codes, "experts.down_proj_scale_inv": scales})
    assert torch.equal(W, codes.float() * scales.reshape(3, -1, 1))


def test_stack_of_one_expert() -> None:
    codes, scales = sample(1, 4, 5), torch.rand(1, 2, 3) + 0.5
    W = build(
        {"down_proj": codes, "down_proj_scale_inv": scales}, settings(weight_block_size=[2, 2])
    )
    torch.testing.assert_close(W[0], by_hand(codes[0], scales[0], 2, 2).float(), rtol=0, atol=0)


def test_scales_that_are_not_finite_propagate() -> None:
    scales = torch.tensor([[float("nan")], [float("inf")], [1.0]])
    W = build({"weight": torch.ones(3, 2).to(E4M3), "weight_scale": scales})
    assert W[0].isnan().all()
    assert W[1].isinf().all()
    assert (W[2] == 1).all()


def test_powers_of_two_from_subnormal_to_nan() -> None:
    powers = torch.tensor([[0], [1], [127], [254], [255]], dtype=torch.uint8)
    W = build({"weight": torch.ones(5, 3).to(E4M3), "scale": powers})
    assert W[:4, 0].tolist() == [2.0**-127, 2.0**-126, 1.0, 2.0**127]
    assert W[4].isnan().all()


def test_float8_without_scale_has_no_recipe() -> None:
    content = content_from({"a.weight": sample(3, 4), "b.weight": torch.ones(3, 4)})
    assert find_recipes(content) == ({}, {})


def test_vectors_and_plain_tensors_are_not_candidates() -> None:
    tensors = {"weight": sample(3), "weight_scale": torch.ones(1), "x": torch.ones(2, 2)}
    assert not list(find_float8(content_from(tensors | {"x_scale": torch.ones(1)})))


W, ONE = sample(6, 4), torch.ones(1)
BLOCKS = settings(weight_block_size=[2, 3])


@pytest.mark.parametrize(
    ("tensors", "config", "why"),
    [
        ({"weight_scale_inv": torch.ones(3, 2)}, {}, "has no weight_block_size"),
        ({"weight_scale_inv": torch.ones(3, 2)}, settings(), "has no weight_block_size"),
        ({"weight_scale_inv": torch.ones(3, 1)}, BLOCKS, "contradicts the weight_block_size"),
        ({"weight_scale_inv": torch.ones(2, 3)}, BLOCKS, "contradicts the weight_block_size"),
        ({"weight_scale_inv": torch.ones(1, 1)}, BLOCKS, "contradicts the weight_block_size"),
        ({"weight_scale_inv": torch.ones(6)}, BLOCKS, "contradicts the weight_block_size"),
        ({"weight_scale_inv": torch.ones(3, 2, 1)}, BLOCKS, "contradicts the weight_block_size"),
        ({"weight_scale": torch.ones(4)}, {}, "has no weight_block_size"),
        ({"weight_scale": torch.ones(0, 2)}, {}, "has no weight_block_size"),
        ({"weight": sample(4, 4), "scale": torch.ones(4)}, {}, "the rows or the columns"),
        ({"weight_scale": ONE, "weight_scale_inv": ONE}, {}, "both scale it"),
        ({"weight_scale": ONE, "weight_scale_2": ONE}, {}, "weight_scale_2 is stored next to it"),
        ({"weight_scale": ONE, "pre_quant_scale": ONE}, {}, "pre_quant_scale is stored next to it"),
        ({"weight_scale": ONE.to(torch.int32)}, {}, "has the dtype int32"),
        ({"weight_scale": ONE.double()}, {}, "has the dtype float64"),
        ({"weight": sample(0, 4), "weight_scale": ONE}, {}, "it has no entries"),
        ({"weight": sample(6, 4).to(torch.float8_e4m3fnuz), "scale": ONE}, {}, "float8_e4m3fnuz"),
        ({"weight": sample(2, 3, 4), "weight_scale": torch.ones(2)}, {}, "is not one number"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_give_a_reason(
    tensors: dict[str, Tensor], config: dict[str, Any], why: str
) -> None:
    assert why in reason({"weight": W} | tensors, config)


@pytest.mark.parametrize(
    "block",
    [[0, 2], [-1, 2], [2], [2, 2, 2], "2", {}, [2.0, 2], [True, 2], [1 << 64, 1], ["2", "3"]],
)
def test_invalid_block_sizes_give_a_reason(block: Any) -> None:
    scales = {"weight_scale_inv": torch.ones(3, 2)}
    assert "two positive integers" in reason(
        {"weight": W} | scales, settings(weight_block_size=block)
    )


@pytest.mark.parametrize("config", [[], "fp8", {"quantization_config": []}, {"text_config": 3}])
def test_invalid_configs_are_ignored(config: Any) -> None:
    if not isinstance(config, dict):
        config = {"quantization_config": config}
    assert "no weight_block_size" in reason({"weight": W, "scale": torch.ones(3, 2)}, config)


def test_config_of_language_model_in_multimodal_model() -> None:
    both = {"weight": W, "scale": torch.rand(3, 2)}
    assert torch.equal(build(both, {"text_config": BLOCKS}), build(both, BLOCKS))


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ((3, 3, 2), "whether up begins with a new block is unknown"),
        ((2, 3, 2), "not one per matrix"),
    ],
)
def test_blocks_over_gate_and_up_give_a_reason(shape: tuple[int, ...], why: str) -> None:
    both = {"gate_up_proj": sample(3, 6, 4), "gate_up_proj_scale_inv": torch.ones(shape)}
    assert why in reason(both, BLOCKS)


def test_experts_of_fbgemm_need_a_scale_per_output() -> None:
    both = {"down_proj": sample(3, 4, 5), "down_proj_scale": torch.ones(3, 4, 1)}
    assert "one number per column" in reason(both, settings(quant_method="fbgemm_fp8"))
