"""Weights that recipes build are audited, compared, gated, repaired and written like stored ones.

Letters: W (m, n) a weight; codes and s what a file stores of it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import wellcond as wc
from wellcond import cli
from wellcond.files.checkpoint import Checkpoint
from wellcond.weights.reasons import Reason

BLOCK = 16


def codes_of(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes in float8, scales per block, and the weight that they stand for."""
    m, n = W.shape
    rows, columns = -(-m // BLOCK), -(-n // BLOCK)
    wide = torch.zeros(rows * BLOCK, columns * BLOCK)
    wide[:m, :n] = W
    s = wide.view(rows, BLOCK, columns, BLOCK).abs().amax((1, 3)) / 448
    each = s.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:m, :n]
    codes = (W / each).to(torch.float8_e4m3fn)
    return codes, s, codes.float() * each


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(*shape, generator=generator)
    return W * torch.logspace(-1, 1, shape[-2])[:, None]


CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "head_dim": 8,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
}
SHAPES = {
    "model.layers.0.self_attn.q_proj": (32, 32),
    "model.layers.0.self_attn.k_proj": (16, 32),
    "model.layers.0.self_attn.v_proj": (16, 32),
    "model.layers.0.self_attn.o_proj": (32, 32),
    "model.layers.0.mlp.gate_up_proj": (72, 32),
    "model.layers.0.mlp.down_proj": (32, 36),
}


def model(folder: Path, config: dict[str, Any] | None = None) -> tuple[Path, dict[str, Tensor]]:
    """A folder of two shards with its weights in FP8; and these weights as they act."""
    folder.mkdir()
    plain: dict[str, Tensor] = {}
    shards: dict[str, dict[str, Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        codes, s, W = codes_of(normal(*shape, seed=seed))
        plain[f"{name}.weight"] = W
        shards["a.safetensors"][f"{name}.weight"] = codes
        shards["b.safetensors"][f"{name}.weight_scale_inv"] = s
    plain["lm_head.weight"] = shards["b.safetensors"]["lm_head.weight"] = normal(50, 32, seed=9)
    shards["a.safetensors"]["model.norm.weight"] = torch.ones(32)
    for shard, content in shards.items():
        save_file(content, folder / shard, metadata={"format": "pt"})
    places = {name: shard for shard, content in shards.items() for name in content}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    return folder, plain


def twin(folder: Path, plain: dict[str, Tensor]) -> Path:
    """The same weights as a plain checkpoint of float32."""
    folder.mkdir()
    norm = {"model.norm.weight": torch.ones(32)}
    save_file(plain | norm, folder / "model.safetensors")
    config = {key: value for key, value in CONFIG.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def numbers(report: wc.AuditReport) -> dict[str, tuple[float, float, float]]:
    return {
        f.label: (f.sigma_max, f.condition_number, f.stable_rank)
        for f in sorted(report.findings, key=lambda one: one.label)
    }


@pytest.mark.parametrize("heads", [False, True])
def test_an_audit_of_codes_is_that_of_the_plain_weights(tmp_path: Path, heads: bool) -> None:
    path, plain = model(tmp_path / "fp8")
    found = wc.audit(path, heads=heads, certify=not heads)
    expected = wc.audit(twin(tmp_path / "plain", plain), heads=heads, certify=not heads)
    assert numbers(found) == numbers(expected)
    assert "model.layers.0.mlp.gate_up_proj.weight:gate" in numbers(found)
    assert found.coverage.parameter_share == expected.coverage.parameter_share
    assert found.coverage.measured == expected.coverage.measured
    (one,) = [f for f in found.findings if f.label.endswith("down_proj.weight")]
    name = "model.layers.0.mlp.down_proj.weight"
    assert one.parts == (name, f"{name}_scale_inv")
    assert not one.stored
    assert one.to_dict()["parts"] == list(one.parts)
    assert "dequantised from FP8" in one.detail
    assert "dequantised from FP8" in found.table()
    assert "dequantised from FP8" in found.to_html()


def test_parts_are_no_weights_of_their_own(tmp_path: Path) -> None:
    path, _ = model(tmp_path / "fp8")
    report = wc.audit(path)
    skipped = report.coverage.skipped
    assert skipped.keys() == {"model.norm.weight"}
    assert str(report.coverage) == "8 of 8 matrices, 99.6 % of the parameters; no matrices: 1 (vector)"
    assert (
        sum(Checkpoint(path).sizes.values())
        == sum(m * n for m, n in SHAPES.values()) + 50 * 32 + 32
    )
    for pattern in ("*weight_scale_inv", "model.layers.0.self_attn.q_proj.weight_scale_inv"):
        with pytest.raises(ValueError, match=r"q_proj\.weight_scale_inv is a part of .*q_proj\.w"):
            wc.audit(path, include=[pattern])
    (one,) = wc.audit(path, include=["*.down_proj.weight"]).findings
    assert one.parts


def test_codes_and_plain_weights_are_compared(tmp_path: Path) -> None:
    path, plain = model(tmp_path / "fp8")
    original = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    before = twin(
        tmp_path / "plain",
        {f"{n}.weight": W for n, W in original.items()}
        | {"lm_head.weight": plain["lm_head.weight"]},
    )
    result = wc.compare(wc.audit(before), wc.audit(path))
    assert all(pair.before is not None and pair.after is not None for pair in result.pairs)
    assert len(result.pairs) == len(SHAPES) + 2


def test_a_gate_on_codes_sees_what_acts(tmp_path: Path, capsys: Any) -> None:
    path, plain = model(tmp_path / "fp8")
    worst = max(float(wc.condition_number(W)) for W in plain.values())
    assert cli.main(["audit", str(path), "--max-condition", str(1.01 * worst)]) == 0
    assert cli.main(["audit", str(path), "--max-condition", str(0.9 * worst)]) == 1
    assert cli.main(["audit", str(path), "--min-coverage", "0.99"]) == 0


def test_an_adapter_is_added_to_codes(tmp_path: Path) -> None:
    path, plain = model(tmp_path / "fp8")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    B, A = torch.randn(32, 4), torch.randn(4, 32)
    save_file(
        {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B},
        adapter / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    report = wc.audit(adapter, base=path)
    kappas = {f.label: f.condition_number for f in report.findings}
    W = plain["model.layers.0.self_attn.q_proj.weight"].double()
    expected = float(wc.condition_number(W + 2 * B.double() @ A.double()))
    (merged,) = [kappa for label, kappa in kappas.items() if label.endswith(":merged")]
    assert merged == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("part", ["weight", "weight_scale_inv"])
def test_the_part_that_is_not_finite_is_named(tmp_path: Path, part: str) -> None:
    path, _ = model(tmp_path / "fp8")
    shard = path / ("a.safetensors" if part == "weight" else "b.safetensors")
    content = load_file(shard)
    name = f"model.layers.0.mlp.down_proj.{part}"
    content[name].view(-1)[3] = torch.tensor(torch.nan).to(content[name].dtype)
    shard.unlink()
    save_file(content, shard)
    report = wc.audit(path)
    assert list(report.not_finite) == [name]
    (row,) = [f for f in report.findings if f.status.name == "not_finite"]
    assert row.name == "model.layers.0.mlp.down_proj.weight"


def test_what_cannot_be_built_says_why(tmp_path: Path) -> None:
    config = CONFIG | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [7, 7]}}
    path, _ = model(tmp_path / "fp8", config)
    report = wc.audit(path)
    assert [f.name for f in report.findings] == ["lm_head.weight"]
    why = report.coverage.skipped["model.layers.0.mlp.down_proj.weight"]
    assert why.reason is Reason.quantised
    assert "7" in why.detail
    assert report.coverage.parameter_share < 0.3
    with pytest.raises(ValueError, match="cannot be dequantised, and nothing was written"):
        wc.repair(path, tmp_path / "out", 3.0, dequantise=True)
    assert not (tmp_path / "out").exists()


# --- repair ---------------------------------------------------------------------------------------


def test_a_repair_leaves_codes_as_they_are_and_says_so(tmp_path: Path) -> None:
    path, _ = model(tmp_path / "fp8")
    report = wc.repair(path, tmp_path / "out", 3.0)
    assert {repair.name for repair in report.repairs} == {"lm_head.weight"}
    why = report.skipped["model.layers.0.mlp.down_proj.weight"]
    assert why.reason is Reason.kept
    assert (tmp_path / "out" / "a.safetensors").read_bytes() == (
        path / "a.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("limit", [float("inf"), 3.0])
def test_a_model_becomes_plain(tmp_path: Path, limit: float) -> None:
    path, plain = model(tmp_path / "fp8")
    report = wc.repair(path, tmp_path / "out", limit, dequantise=True)
    assert len(report.repairs) == len(SHAPES) + 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    content: dict[str, Tensor] = {}
    for name, shard in index["weight_map"].items():
        with safe_open(tmp_path / "out" / shard, "pt") as file:
            content[name] = file.get_tensor(name)
            assert file.metadata() == {"format": "pt"}
    assert content.keys() == plain.keys() | {"model.norm.weight"}
    size = sum(tensor.nbytes for tensor in content.values())
    assert index["metadata"]["total_size"] == size
    for name, W in plain.items():
        new = content[name]
        assert new.dtype == (torch.float32 if name == "lm_head.weight" else torch.bfloat16)
        if limit == float("inf"):
            assert torch.equal(new, W.to(new.dtype))
        else:
            rows = new.chunk(2) if "gate_up" in name else [new]
            assert all(wc.condition_number(one) <= limit for one in rows)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {key: value for key, value in CONFIG.items() if key != "quantization_config"}
    assert wc.audit(tmp_path / "out").coverage.parameter_share == pytest.approx(
        wc.audit(path).coverage.parameter_share
    )


def test_an_excluded_weight_becomes_plain_without_a_change(tmp_path: Path) -> None:
    path, plain = model(tmp_path / "fp8")
    name = "model.layers.0.mlp.down_proj.weight"
    wc.repair(path, tmp_path / "out", 2.0, dequantise=True, exclude=[name])
    new = load_file(tmp_path / "out" / "a.safetensors")[name]
    assert torch.equal(new, plain[name].bfloat16())


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_one_file_becomes_plain(tmp_path: Path, kind: str) -> None:
    codes, _, _ = codes_of(normal(20, 30))
    W = codes.float() * 0.5
    content = {"l.weight": codes, "l.weight_scale": torch.tensor(0.5), "l.bias": torch.ones(20)}
    path, out = tmp_path / f"a.{kind}", tmp_path / "out.safetensors"
    save_file(content, path) if kind == "safetensors" else torch.save(content, path)
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        wc.repair(path, tmp_path / "out.pt", 5.0, dequantise=True)
    assert cli.main(["repair", str(path), str(out), "--max-condition", "inf", "--dequantise"]) == 0
    new = load_file(out)
    assert new.keys() == {"l.weight", "l.bias"}
    assert torch.equal(new["l.weight"], W)
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, out.name}


def test_there_must_be_codes_to_dequantise(tmp_path: Path) -> None:
    save_file({"l.weight": torch.randn(5, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="`dequantise` asks for weights that are stored as codes"):
        wc.repair(tmp_path / "a.safetensors", tmp_path / "b.safetensors", 2.0, dequantise=True)


def test_a_weight_that_cannot_obey_stops_it(tmp_path: Path) -> None:
    path, _ = model(tmp_path / "fp8")
    with pytest.raises(ValueError, match="nothing was written"):
        wc.repair(path, tmp_path / "out", 1.0001, dequantise=True)  # bfloat16 rounds more
    assert not (tmp_path / "out").exists()
