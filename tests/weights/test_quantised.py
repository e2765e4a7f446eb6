"""Codes of any dtype are never measured as weights, and count as the entries that they encode."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import wellcond as wc
from wellcond.files.checkpoint import Checkpoint
from wellcond.weights.names import find_non_weights
from wellcond.weights.quantised import count_logical_entries, read_bits
from wellcond.weights.reasons import Reason

SURE = ("weight_scale", "weight_scale_inv", "qscale", "absmax", "SCB", "weight.absmax")
UNSURE = ("scale", "scales", "weight.scales")
FORMATS = ("safetensors", "pt")


def saved(path: Path, content: dict[str, Tensor]) -> Path:
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def quantised(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes of 8 bits and one scale per row."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(96, 64, generator=generator) * torch.logspace(-3, 1, 96)[:, None]
    scale = W.abs().amax(1, keepdim=True) / 127
    return (W / scale).round().to(dtype), scale


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", SURE + UNSURE)
def test_codes_with_a_scale_are_never_measured(
    tmp_path: Path, name: str, dtype: torch.dtype, kind: str
) -> None:
    codes, scale = quantised(dtype)
    content = {"l.weight": codes, f"l.{name}": scale, "head.weight": torch.randn(6, 5)}
    path, fixed = saved(tmp_path / f"a.{kind}", content), tmp_path / f"b.{kind}"
    report = wc.audit(path)
    assert [f.name for f in report.findings] == ["head.weight"]
    assert report.coverage.parameter_share == pytest.approx(30 / (30 + 96 * 64))
    skipped = {n: why.reason for n, why in report.coverage.skipped.items()}
    surely = name not in ("scale", "scales")
    reason = Reason.quantised if surely else Reason.perhaps_codes
    assert skipped == {"l.weight": reason, f"l.{name}": Reason.scales}
    wc.repair(path, fixed, 1.1)
    after = load_file(fixed) if kind == "safetensors" else torch.load(fixed)
    assert torch.equal(after["l.weight"], codes)
    assert torch.equal(after[f"l.{name}"], scale)
    if surely:
        with pytest.raises(ValueError, match="no weight matches"):
            wc.audit(path, include=["l.weight"])
    else:  # a possible weight can be included by its exact name
        assert wc.audit(path, include=["l.weight"]).coverage.measured == 1


# HQQ and quanto do not call their codes a weight.
OF_LIBRARIES = {
    "hqq": ("l.W_q", ("l.scale", "l.zero")),
    "quanto": ("l.weight._data", ("l.weight._scale",)),
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("library", OF_LIBRARIES)
def test_codes_of_hqq_and_quanto_are_never_measured(
    tmp_path: Path, library: str, dtype: torch.dtype, kind: str
) -> None:
    name, beside = OF_LIBRARIES[library]
    codes, scale = quantised(dtype)
    content = {name: codes, "head.weight": torch.randn(6, 5)} | {s: scale.clone() for s in beside}
    path, fixed = saved(tmp_path / f"a.{kind}", content), tmp_path / f"b.{kind}"
    report = wc.audit(path)
    assert [f.name for f in report.findings] == ["head.weight"]
    skipped = {n: why.reason for n, why in report.coverage.skipped.items()}
    assert skipped == {name: Reason.quantised} | dict.fromkeys(beside, Reason.scales)
    wc.repair(path, fixed, 1.1)
    after = load_file(fixed) if kind == "safetensors" else torch.load(fixed)
    assert torch.equal(after[name], codes)
    bare = {name: codes, "head.weight": torch.randn(6, 5)}  # without a scale it is a matrix
    assert len(wc.audit(saved(tmp_path / f"c.{kind}", bare)).findings) == 2


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("name", SURE + UNSURE)
def test_scale_in_another_shard_is_found(tmp_path: Path, name: str, index: bool) -> None:
    codes, scale = quantised(torch.bfloat16)
    shards = {
        "model-00001-of-00002.safetensors": {"l.weight": codes, "m.weight": torch.randn(3, 3)},
        "model-00002-of-00002.safetensors": {f"l.{name}": scale},
    }
    for shard, content in shards.items():
        save_file(content, tmp_path / shard)
    if index:
        places = {tensor: shard for shard, content in shards.items() for tensor in content}
        text = json.dumps({"weight_map": places})
        (tmp_path / "model.safetensors.index.json").write_text(text)
    found = [one.name.rpartition("/")[2] for one in Checkpoint(tmp_path).matrices()]
    skipped = wc.audit(tmp_path).coverage.skipped
    reasons = {n.rpartition("/")[2]: why.reason for n, why in skipped.items()}
    assert reasons["l.weight"] in (Reason.quantised, Reason.perhaps_codes)
    assert reasons[f"l.{name}"] is Reason.scales
    assert "m.weight" in found


# Scales that fit the shape (8, 6), and scales that do not.
FITTING = [(8,), (8, 1), (6,), (1, 6), (4, 3), (2, 6), (8, 2), (3, 8), (1, 1)]
NOT_FITTING = [(5,), (9, 1), (5, 6), (8, 4), (2, 2, 2), (16, 6)]


@pytest.mark.parametrize("shape", FITTING + NOT_FITTING, ids=str)
def test_scale_of_unfitting_shape_is_ignored(shape: tuple[int, ...]) -> None:
    tensors = {"l.weight": ((8, 6), "float32"), "l.scales": (shape, "float32")}
    found = find_non_weights(tensors, holds_codes=lambda _: True)
    assert ("l.weight" in found) == (shape in FITTING)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("codes", ["int8", "float8_e4m3fn", "none"])
def test_values_decide_for_a_scalar_scale(tmp_path: Path, codes: str, kind: str) -> None:
    """A normalised classifier also has a scale, but its weights are not codes."""
    W = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    if codes != "none":
        W = (20 * W).to(getattr(torch, codes)).float()
    content = {"l.weight": W, "l.scale": torch.tensor(16.0), "m.weight": torch.eye(3)}
    names = {one.name for one in wc.audit(saved(tmp_path / f"a.{kind}", content)).findings}
    assert names == {"m.weight"} | ({"l.weight"} if codes == "none" else set())


def test_only_tensors_with_values_are_examined(tmp_path: Path) -> None:
    content = {
        "meta.weight": torch.empty(3, 3, device="meta"),
        "sparse.weight": torch.eye(3).to_sparse(),
        "empty.weight": torch.zeros(0, 3),
        "expanded.weight": torch.ones(1, 3).expand(3, 3),
        "complex.weight": torch.ones(3, 3, dtype=torch.complex64),
        "transposed.weight": torch.arange(12.0).view(3, 4).mT,
        "strided.weight": torch.arange(36.0).view(6, 6)[::2, 1::2],
        "l.weight": torch.eye(3) + 0.1,
    }
    scales = {name.replace("weight", "scale"): torch.tensor(2.0) for name in content}
    report = wc.audit(saved(tmp_path / "a.pt", content | scales))
    assert {f.name for f in report.findings} == {"complex.weight", "l.weight"}
    reasons = {n: why.reason for n, why in report.coverage.skipped.items()}
    assert reasons["transposed.weight"] is reasons["strided.weight"] is Reason.perhaps_codes
    assert reasons["meta.weight"] is Reason.no_values


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        ("visual.weight", "logit_scale"),
        ("block.mlp.fc.weight", "block.layer_scale.scale"),
        ("block.mlp.fc.weight", "block.norm.scale"),
        ("attn.q_proj.weight", "attn.k_scale"),
        ("fc.weight", "fc.input_scale"),
        ("fc.weight", "fc.weight_fake_quant.scale"),
        ("fc.weight", "fc.activation_post_process.scale"),
        ("conv.weight", "conv.gain"),
        ("fc.weight", "scale"),
    ],
)
def test_unrelated_scales_do_not_make_codes(weight: str, scale: str) -> None:
    for shape in ((), (8,), (8, 1)):
        tensors = {weight: ((8, 6), "float32"), scale: (shape, "float32")}
        assert weight not in find_non_weights(tensors, holds_codes=lambda _: False)


def test_experts_with_their_own_scale_are_codes() -> None:
    tensors = {
        "experts.gate_up_proj": ((4, 16, 8), "bfloat16"),
        "experts.gate_up_proj_scale": ((4, 16, 1), "float32"),
        "experts.down_proj": ((4, 8, 8), "bfloat16"),
        "experts.down_proj_scale_inv": ((4, 1, 1), "float32"),
    }
    reasons = {name: why.reason for name, why in find_non_weights(tensors).items()}
    assert reasons == {
        "experts.gate_up_proj": Reason.perhaps_codes,
        "experts.gate_up_proj_scale": Reason.scales,
        "experts.down_proj": Reason.quantised,
        "experts.down_proj_scale_inv": Reason.scales,
    }


@pytest.mark.parametrize("zeros", ["weight_zeros", "weight_zero_point", "zeros", "biases"])
def test_zeros_of_codes_are_not_a_matrix(zeros: str) -> None:
    scale = "weight_scale" if zeros.startswith("weight") else "scales"
    shapes = {"weight": (8, 6), scale: (8, 2), zeros: (8, 2), "other": (8, 2)}
    found = find_non_weights({f"l.{name}": (shape, "float16") for name, shape in shapes.items()})
    assert found[f"l.{zeros}"].reason is Reason.scales
    assert found.keys() == {"l.weight", f"l.{scale}", f"l.{zeros}"}


def test_lone_scale_is_not_a_quantised_weight() -> None:
    for name in ("l.weight_scale", "l.scale", "something"):
        for dtype in ("F8_E8M0", "float8_e8m0fnu"):
            found = find_non_weights({name: ((8, 2), dtype)})
            assert found[name].reason is Reason.scales


def test_bias_is_not_part_of_mxfp4_blocks(tmp_path: Path) -> None:
    """In gpt-oss a module contains the bias of one weight and the blocks of another."""
    content = {
        "experts.down_proj_blocks": torch.ones(3, 8, 2, 16, dtype=torch.uint8),
        "experts.down_proj_scales": torch.ones(3, 8, 2, dtype=torch.uint8),
        "experts.gate_up_proj_blocks": torch.ones(3, 8, 2, 16, dtype=torch.uint8),
        "experts.gate_up_proj_scales": torch.ones(3, 8, 2, dtype=torch.uint8),
        "experts.gate_up_proj_bias": torch.randn(3, 8).bfloat16(),
        "w": torch.eye(4),
    }
    report = wc.audit(saved(tmp_path / "a.safetensors", content))
    why = report.coverage.skipped["experts.gate_up_proj_bias"]
    assert why == wc.report.Skipped(Reason.added)
    assert "elsewhere" not in str(report)
    # 2 codes per byte, and 24 entries of the bias.
    measured = 16 + 2 * 2 * 768
    assert report.coverage.parameter_share == pytest.approx(measured / (measured + 24))


# --- the number of entries that codes encode ------------------------------------------------------

Kinds = dict[str, tuple[tuple[int, ...], str]]
STATE = torch.tensor(list(b'{"quant_type": "nf4", "shape": [512, 1024]}'), dtype=torch.uint8)
# Linear(1024 -> 512) as each library packs it; the first tensor holds the codes.
PACKED: dict[str, tuple[Kinds, dict[str, object]]] = {
    "compressed-tensors": (
        {
            "l.weight_packed": ((512, 128), "int32"),
            "l.weight_scale": ((512, 8), "bfloat16"),
            "l.weight_shape": ((2,), "int64"),
        },
        {},
    ),
    "bitsandbytes": (
        {
            "l.weight": ((262144, 1), "uint8"),
            "l.weight.absmax": ((8192,), "uint8"),
            "l.weight.quant_state.bitsandbytes__nf4": ((len(STATE),), "uint8"),
        },
        {},
    ),
    "bitsandbytes without its state": (
        {"l.weight": ((262144, 1), "uint8"), "l.weight.absmax": ((8192,), "float32")},
        {},
    ),
    "GPTQ": (
        {
            "l.qweight": ((128, 512), "int32"),
            "l.qzeros": ((8, 64), "int32"),
            "l.scales": ((8, 512), "float16"),
            "l.g_idx": ((1024,), "int32"),
        },
        {},
    ),
    "GPTQ without an index": (
        {
            "l.qweight": ((128, 512), "int32"),
            "l.qzeros": ((8, 64), "int32"),
            "l.scales": ((8, 512), "float16"),
        },
        {},
    ),
    "AWQ": (
        {
            "l.qweight": ((1024, 64), "int32"),
            "l.qzeros": ((8, 64), "int32"),
            "l.scales": ((8, 512), "float16"),
        },
        {},
    ),
    "MXFP4": (
        {"l.w_blocks": ((512, 32, 16), "uint8"), "l.w_scales": ((512, 32), "uint8")},
        {},
    ),
    "NVFP4": (
        {"l.weight": ((512, 512), "uint8"), "l.weight_scale": ((512, 64), "F8_E4M3")},
        {},
    ),
    "MLX": (
        {"l.weight": ((512, 128), "uint32"), "l.scales": ((512, 16), "float16")},
        {"quantization": {"bits": 4, "group_size": 64}},
    ),
    "int8": (
        {"l.weight": ((512, 1024), "int8"), "l.SCB": ((512,), "float32")},
        {"quantization_config": {"load_in_8bit": True, "bits": 4}},
    ),
    "float8": (
        {"l.weight": ((512, 1024), "F8_E4M3"), "l.weight_scale_inv": ((4, 8), "float32")},
        {},
    ),
}
SMALL = {
    "l.weight_shape": torch.tensor([512, 1024]),
    "l.weight.quant_state.bitsandbytes__nf4": STATE,
}


@pytest.mark.parametrize("kind", PACKED)
def test_packed_codes_count_as_unpacked_entries(kind: str) -> None:
    tensors, config = PACKED[kind]
    codes = next(iter(tensors))
    bits = read_bits(config)
    assert count_logical_entries(codes, tensors, SMALL.__getitem__, bits) == 512 * 1024
    assert find_non_weights(tensors)[codes].reason is Reason.quantised


@pytest.mark.parametrize(
    "lengths", [[512], [0, 5], [-1, 3], [2**40, 2**40], [1, 2], [10**6] * 6, []], ids=str
)
def test_damaged_shape_counts_stored_entries(lengths: list[int]) -> None:
    tensors = {"l.weight_packed": ((8, 4), "int32"), "l.weight_shape": ((2,), "int64")}
    read = {"l.weight_shape": torch.tensor(lengths, dtype=torch.int64)}
    assert count_logical_entries("l.weight_packed", tensors, read.__getitem__, 0) in (32, 512)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": 3},
        {"quantization_config": {"config_groups": [1]}},
        {"quantization": {"bits": "4"}},
        {"quantization": {"bits": 0}},
        {"quantization": {"bits": True}},
    ],
    ids=str,
)
def test_odd_configs_count_stored_entries(config: dict[str, object]) -> None:
    tensors = {"l.weight": ((8, 4), "uint32"), "l.scales": ((8, 2), "float16")}
    bits = read_bits(config)
    assert count_logical_entries("l.weight", tensors, SMALL.__getitem__, bits) == 32


def test_coverage_of_packed_file_equals_float_file(tmp_path: Path) -> None:
    content = {
        "l.weight_packed": torch.ones(512, 128, dtype=torch.int32),
        "l.weight_scale": torch.ones(512, 8),
        "l.weight_shape": torch.tensor([512, 1024]),
        "head.weight": torch.randn(16, 512),
    }
    share = wc.audit(saved(tmp_path / "a.safetensors", content)).coverage.parameter_share
    assert share == pytest.approx(16 * 512 / (16 * 512 + 512 * 1024))


def test_scale_of_another_module_is_ignored() -> None:
    """In names of Flax a slash separates modules, not files."""
    tensors = {"norm/scale": ((64,), "float32"), "dense/weight": ((64, 64), "float32")}
    assert "dense/weight" not in find_non_weights(tensors)
    beside = {"dense/scale": ((64,), "float32"), "dense/weight": ((64, 64), "float32")}
    assert find_non_weights(beside)["dense/weight"].reason is Reason.perhaps_codes
    of_files = {"a.pt/q.scale": ((64,), "float32"), "b.pt/q.weight": ((64, 64), "float32")}
    assert find_non_weights(of_files)["b.pt/q.weight"].reason is Reason.perhaps_codes


@pytest.mark.parametrize("name", ["tril", "faces", "edges", "causal_mask"])
def test_integer_tables_do_not_make_codes(name: str) -> None:
    tensors = {f"m.{name}": ((16, 16), "uint8"), "m.W": ((16, 16), "float32")}
    assert "m.W" not in find_non_weights(tensors)
