"""Weights that recipes build are audited, compared, gated, repaired and written like stored ones.

Letters: W (m, n) a weight; codes and s what a file stores of it.
"""

import json
import shutil
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
    assert (
        str(report.coverage) == "8 of 8 matrices, 99.6 % of the parameters; no matrices: 1 (vector)"
    )
    assert (
        sum(Checkpoint(path).sizes.values())
        == sum(m * n for m, n in SHAPES.values()) + 50 * 32 + 32
    )
    for pattern in ("*weight_scale_inv", "model.layers.0.self_attn.q_proj.weight_scale_inv"):
        with pytest.raises(ValueError, match=r"_proj\.weight_scale_inv is a part of "):
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


# --- what a report says ---------------------------------------------------------------------------

DATA = Path(__file__).parents[1] / "recipes" / "data"


def committed(name: str, folder: Path) -> Path:
    """A checkpoint of tests/recipes/data without the entries that are expected of it."""
    leave_out = shutil.ignore_patterns("expected.safetensors")
    return shutil.copytree(DATA / name, folder / name, ignore=leave_out)


@pytest.mark.parametrize(
    ("name", "dtypes"),
    [
        ("awq_gemm", {"int4"}),
        ("bitnet", {"ternary"}),
        ("bitsandbytes_layers", {"nf4", "fp4"}),
        ("bitsandbytes_int8", {"int8"}),
        ("compressed_floats", {"float8_e4m3fn", "float4_e2m1", "float6_e2m3"}),
        ("compressed_packed", {f"int{bits}" for bits in range(2, 9)}),
        ("gpt_oss", {"float4_e2m1"}),
        ("gptq_3_bits", {"int3"}),
        ("hqq", {"int2", "int3", "int4", "int8"}),
        ("mlx_affine", {"int3", "int4", "int6"}),
        ("mlx_mxfp8", {"float8_e4m3fn"}),
        ("torchao", {"int3", "int4", "int8", "float8_e4m3fn", "float4_e2m1"}),
    ],
)
def test_the_dtype_is_what_codes_are_stored_as(name: str, dtypes: set[str], tmp_path: Path) -> None:
    report = wc.audit(committed(name, tmp_path))
    assert {f.dtype for f in report.findings if f.parts} == dtypes


def test_the_dtype_of_what_is_computed_is_that_of_its_parameter(tmp_path: Path) -> None:
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 3)).bfloat16()
    save_file(layer.state_dict(), tmp_path / "a.safetensors")
    (one,) = wc.audit(tmp_path / "a.safetensors").findings
    assert (one.dtype, one.stored) == ("bfloat16", True)


def test_subnormal_entries_are_those_of_float32(tmp_path: Path) -> None:
    codes, _, _ = codes_of(normal(16, 16))
    path = tmp_path / "a.safetensors"
    save_file({"l.weight": codes, "l.weight_scale": torch.tensor(2.0**-134)}, path)
    report = wc.audit(path)
    assert "of its entries are subnormal in float32" in str(report)


@pytest.mark.parametrize("what", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["*.qweight", "layers.0.q_proj.qweight", "*.weight"])
def test_a_pattern_may_name_the_codes(what: str, pattern: str, tmp_path: Path) -> None:
    path = committed("gptq_3_bits", tmp_path)
    save_file({"head.weight": normal(5, 4), "l.bias": normal(3, 3)[0]}, path / "b.safetensors")
    label = "model.safetensors/layers.0.q_proj.weight"
    pattern = pattern.replace("layers.0", "model.safetensors/layers.0")
    if pattern == "*.weight" and what == "exclude":
        return  # nothing would be left
    found = {f.name for f in wc.audit(path, **{what: [pattern]}).findings}
    others = {"b.safetensors/head.weight"}
    if pattern == "*.weight":
        assert found == {label} | others
    else:
        assert found == ({label} if what == "include" else others)


def test_a_pattern_that_matches_parts_or_no_weight_says_so(tmp_path: Path) -> None:
    path = committed("gptq_3_bits", tmp_path)
    with pytest.raises(ValueError, match=r"q_proj\.scales is a part of layers\.0\.q_proj\.weight"):
        wc.audit(path, include=["*.scales"])
    save_file({"l.bias": torch.ones(3), "l.weight": normal(4, 4)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"l\.bias is left out: not a matrix: a vector"):
        wc.audit(tmp_path / "b.safetensors", include=["*.bias"])


def test_scales_of_codes_that_are_left_out_are_no_matrices(tmp_path: Path) -> None:
    path, plain = model(tmp_path / "fp8", {"dtype": "bfloat16"})  # no block size
    coverage = wc.audit(path).coverage
    text = str(coverage)
    assert text.startswith("1 of 7 matrices")
    assert "quantised, and cannot be dequantised here: the blocks of " in text
    assert "no matrices: 1 (vector), 6 (scales)" in text or "6 (scales), 1 (vector)" in text
    size = sum(W.numel() for W in plain.values()) + 32
    assert coverage.parameter_share == pytest.approx(50 * 32 / size)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (None, "int8, and no config.json in the same folder describes the layout"),
        ({"quantization_config": {"quant_method": "new"}}, "int8, in an unknown layout"),
        (
            {"llm_config": {"quantization_config": {"quant_method": "new"}}},
            "int8, in an unknown layout",
        ),
    ],
)
def test_codes_of_no_known_layout_say_what_may_be_missing(
    config: dict[str, Any] | None, why: str, tmp_path: Path
) -> None:
    codes = torch.ones(8, 8, dtype=torch.int8)
    save_file(
        {"l.weight": codes, "l.weight_scale": torch.ones(8, 2), "head.weight": normal(4, 4)},
        tmp_path / "model.safetensors",
    )
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    skipped = wc.audit(tmp_path).coverage.skipped["l.weight"]
    assert str(skipped) == f"quantised, and cannot be dequantised here: {why}"


def test_a_shard_by_itself_says_that_the_scales_are_elsewhere(tmp_path: Path) -> None:
    path, _ = model(tmp_path / "fp8")
    with pytest.raises(ValueError, match="float8_e4m3fn, and its scales are not in the file; mo"):
        wc.audit(path / "a.safetensors")


def test_a_comparison_says_why_a_side_lacks_a_weight(tmp_path: Path) -> None:
    path = committed("gptq_3_bits", tmp_path)
    plain = load_file(DATA / "gptq_3_bits" / "expected.safetensors")
    head = {"head.weight": normal(5, 4)}
    save_file(plain | head, tmp_path / "plain.safetensors")
    content = load_file(path / "model.safetensors") | head
    save_file(content, path / "model.safetensors")
    for name in ("config.json", "quantize_config.json"):
        (path / name).unlink()
    reports = wc.audit(tmp_path / "plain.safetensors"), wc.audit(path)
    for when, result in (
        ("after", wc.compare(*reports)),
        ("before", wc.compare(*reports[::-1])),
    ):
        assert f"skipped {when}: quantised, and cannot be" in result.notes["layers.0.q_proj.weight"]


# --- configs in configs ---------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [("text_config",), ("llm_config",), ("a_config", "text_config")])
def test_the_config_of_the_language_model_may_say_how(
    keys: tuple[str, ...], tmp_path: Path
) -> None:
    own = {"dtype": "float16", "quantization_config": CONFIG["quantization_config"]}
    config: dict[str, Any] = own
    for key in reversed(keys):
        config = {key: config, "vision_config": {"dtype": "float32", "quantization_config": None}}
    path, plain = model(tmp_path / "fp8", config)
    assert wc.audit(path).coverage.measured == 8
    wc.repair(path, tmp_path / "out", float("inf"), dequantise=True)
    text = (tmp_path / "out" / "config.json").read_text()
    assert "weight_block_size" not in text
    found = json.loads(text)
    for key in keys:
        assert found["vision_config"]["dtype"] == "float32"
        found = found[key]
    assert found == {"dtype": "float16"}
    name = "model.layers.0.mlp.down_proj.weight"
    new = load_file(tmp_path / "out" / "a.safetensors")[name]
    assert torch.equal(new, plain[name].half())


def test_different_settings_in_one_config_are_none(tmp_path: Path) -> None:
    one, other = ({"quant_method": "fp8", "weight_block_size": [n, n]} for n in (BLOCK, 8))
    config = {f"{n}_config": {"quantization_config": s} for n, s in (("a", one), ("b", other))}
    path, _ = model(tmp_path / "fp8", config)
    assert wc.audit(path).coverage.measured == 1
    deep: dict[str, Any] = {}
    for _ in range(400):
        deep = {"text_config": deep}
    (path / "config.json").write_text(json.dumps(deep))
    assert wc.audit(path).coverage.measured == 1


# --- what a repair says and writes ----------------------------------------------------------------


def test_a_repair_says_which_weights_stay_codes(tmp_path: Path, capsys: Any) -> None:
    path, _ = model(tmp_path / "fp8")
    report = wc.repair(path, tmp_path / "out", 3.0)
    lines = str(report).splitlines()
    assert lines[-2] == (
        "6 weights left as stored: model.layers.0.mlp.down_proj.weight, "
        "model.layers.0.mlp.gate_up_proj.weight, model.layers.0.self_attn.k_proj.weight and 3 more "
        "(stored as codes). With --dequantise (dequantise=True) the copy has plain tensors in "
        "their place, within the limit"
    )
    assert lines[-1] == "1 of 1 matrices changed, 0 left as they were; 1 other tensors copied"
    assert (
        cli.main(["repair", str(path), str(tmp_path / "b"), "--max-condition", "3", "--json"]) == 0
    )
    assert "warning: 6 weights left as stored" in capsys.readouterr().err


def test_a_repair_of_codes_alone_names_the_way_out(tmp_path: Path) -> None:
    path = committed("gptq_3_bits", tmp_path)
    for patterns in ((), ["*.qweight"]):
        with pytest.raises(ValueError, match="nothing that can be repaired: 1 weight left as sto"):
            wc.repair(path, tmp_path / "out", 3.0, include=patterns)
    assert not (tmp_path / "out").exists()


def test_a_repair_says_which_weights_are_plain_now(tmp_path: Path) -> None:
    path, _ = model(tmp_path / "fp8")
    report = wc.repair(path, tmp_path / "out", 3.0, dequantise=True)
    names = [f"{name}.weight" for name in SHAPES]
    assert report.dequantised == dict.fromkeys(sorted(names), "bfloat16")
    assert "6 weights written as plain bfloat16: model.layers.0.mlp.down_proj.weight, " in str(
        report
    )
    assert str(report).endswith("; 1 other tensors copied\n")
    assert report.to_dict()["dequantised"][0] == {"name": sorted(names)[0], "dtype": "bfloat16"}
    assert report.skipped.keys() == {"model.norm.weight"}


def test_a_quantised_embedding_becomes_plain_too(tmp_path: Path) -> None:
    report = wc.repair(committed("mlx_affine", tmp_path), tmp_path / "out", 2.0, dequantise=True)
    assert "model.embed_tokens.weight" in report.dequantised
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_file(DATA / "mlx_affine" / "expected.safetensors")["model.embed_tokens.weight"]
    new = found["model.embed_tokens.weight"]
    torch.testing.assert_close(new, expected.to(new.dtype), rtol=1e-2, atol=0)
    assert str(report).endswith("; 0 other tensors copied\n")


def test_what_is_written_keeps_the_permissions(tmp_path: Path) -> None:
    path, _ = model(tmp_path / "fp8")
    for file in path.iterdir():
        file.chmod(0o600)
    wc.repair(path, tmp_path / "out", float("inf"), dequantise=True)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(modes, 0o600)
    codes, _, _ = codes_of(normal(16, 16))
    torch.save({"l.weight": codes, "l.weight_scale": torch.tensor(2.0)}, tmp_path / "a.pt")
    (tmp_path / "a.pt").chmod(0o640)
    wc.repair(tmp_path / "a.pt", tmp_path / "b.safetensors", 5.0, dequantise=True)
    assert (tmp_path / "b.safetensors").stat().st_mode & 0o777 == 0o640


def test_files_with_similar_names_are_copied(tmp_path: Path) -> None:
    path, _ = model(tmp_path / "fp8")
    names = ["a.safetensors.plain", "config.json.plain", "config.json.tmp"]
    for name in names:
        (path / name).write_text(name)
    wc.repair(path, tmp_path / "out", float("inf"), dequantise=True)
    for name in names:
        assert (tmp_path / "out" / name).read_text() == name
    assert {one.name for one in (tmp_path / "out").iterdir()} == {p.name for p in path.iterdir()}


def test_files_that_no_index_unites_keep_the_names_of_their_tensors(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    plain = {}
    for seed, name in enumerate(("a", "b")):
        codes, s, plain[name] = codes_of(normal(20, 33, seed=seed))
        content = {"l.weight": codes, "l.weight_scale_inv": s, "l.bias": torch.ones(20)}
        save_file(content, path / f"{name}.safetensors")
    report = wc.repair(path, tmp_path / "out", float("inf"), dequantise=True)
    assert report.dequantised.keys() == {"a.safetensors/l.weight", "b.safetensors/l.weight"}
    for name, W in plain.items():
        new = load_file(tmp_path / "out" / f"{name}.safetensors")
        assert new.keys() == {"l.weight", "l.bias"}
        assert torch.equal(new["l.weight"], W.bfloat16())


def test_the_index_counts_the_entries_of_the_copy(tmp_path: Path) -> None:
    path, plain = model(tmp_path / "fp8")
    index = path / "model.safetensors.index.json"
    metadata = {"total_size": 1, "total_parameters": 1, "kept": "yes"}
    index.write_text(json.dumps(json.loads(index.read_text()) | {"metadata": metadata}))
    wc.repair(path, tmp_path / "out", float("inf"), dequantise=True)
    found = json.loads((tmp_path / "out" / index.name).read_text())["metadata"]
    assert found["total_parameters"] == sum(W.numel() for W in plain.values()) + 32
    assert found["kept"] == "yes"


def test_tensors_that_the_index_puts_elsewhere_are_not_those_of_the_copy(tmp_path: Path) -> None:
    path, plain = model(tmp_path / "fp8")
    first, down = path / "a.safetensors", "model.layers.0.mlp.down_proj.weight"
    doubled = {f"{down}_scale_inv": torch.ones(2, 3), "lm_head.weight": torch.ones(50, 32)}
    save_file(load_file(first) | doubled, first)
    expected = numbers(wc.audit(path))
    wc.repair(path, tmp_path / "plain", float("inf"), dequantise=True)
    report = wc.audit(tmp_path / "plain")
    assert numbers(report).keys() == expected.keys()
    places = json.loads((tmp_path / "plain/model.safetensors.index.json").read_text())["weight_map"]
    assert places["lm_head.weight"] == "b.safetensors"
    assert places.keys() == plain.keys() | {"model.norm.weight"}
    assert load_file(tmp_path / "plain/a.safetensors").keys() & doubled.keys() == {"lm_head.weight"}


def test_the_copy_of_torchao_does_not_describe_classes(tmp_path: Path) -> None:
    path = committed("torchao", tmp_path)
    (path / "state.pt").unlink()
    wc.repair(path, tmp_path / "out", float("inf"), dequantise=True)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names, metadata = set(file.keys()), file.metadata() or {}
    assert names == set(load_file(DATA / "torchao" / "expected.safetensors"))
    assert not {"tensor_names", *names} & metadata.keys()


def test_what_cannot_become_plain_is_said_before_anything_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, _, _ = codes_of(normal(16, 16))
    path = tmp_path / "in"
    path.mkdir()
    torch.save({"l.weight": codes, "l.weight_scale": torch.tensor(2.0)}, path / "a.pt")
    monkeypatch.setattr(Checkpoint, "copy_with", None)
    with pytest.raises(ValueError, match=r"a\.pt must be a safetensors file .* but is not"):
        wc.repair(path, tmp_path / "out", 5.0, dequantise=True)


def test_other_tensors_keep_their_dtypes(tmp_path: Path) -> None:
    codes, s, _ = codes_of(normal(16, 16))
    others = {
        "a.weight": normal(4, 4).bfloat16(),
        "b.weight": normal(4, 4).half(),
        "c.weight": normal(4, 4).double(),
        "ids": torch.arange(5),
        "tiny": torch.ones(3).to(torch.float8_e5m2),
        "flag": torch.tensor(True),
    }
    path = tmp_path / "in"
    path.mkdir()
    save_file({"l.weight": codes, "l.weight_scale_inv": s, **others}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    wc.repair(path, tmp_path / "out", float("inf"), dequantise=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.pop("l.weight").dtype is torch.bfloat16
    assert found.keys() == others.keys()
    for name, tensor in others.items():
        assert found[name].dtype is tensor.dtype
        assert torch.equal(found[name].double(), tensor.double())


# --- adapters of quantised bases ------------------------------------------------------------------


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("name", ["attn.c_proj", "mlp.c_fc", "attn.c_attn"])
def test_an_adapter_of_gpt2_is_added_the_right_way_round(
    name: str, fan_in_fan_out: bool, tmp_path: Path
) -> None:
    """Its layers are stored as (inputs, outputs), and quantised ones are layers like all others."""
    base = committed("bitsandbytes_nf4", tmp_path)
    expected = load_file(DATA / "bitsandbytes_nf4" / "expected.safetensors")
    path = f"transformer.h.0.{name}"
    W = expected[f"{path}.weight"].double().T
    B, A = normal(W.shape[0], 2, seed=1), normal(2, W.shape[1], seed=2)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    stem = f"base_model.model.{path}.lora_"
    save_file({f"{stem}A.weight": A, f"{stem}B.weight": B}, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "fan_in_fan_out": fan_in_fan_out}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    found = {f.label: f for f in wc.audit(adapter, base=base).findings}
    total = W + 3 * B.double() @ A.double()
    if name == "attn.c_attn":
        rows = dict(zip("qkv", total.chunk(3), strict=True))
        views = {f"{path}.weight:{view}:merged": one for view, one in rows.items()}
    else:
        views = {f"{path}.weight:merged": total}
    for label, one in views.items():
        assert found[label].condition_number == pytest.approx(
            float(wc.condition_number(one)), rel=1e-5
        )


def test_a_base_of_codes_that_cannot_be_built_says_why(tmp_path: Path) -> None:
    base = committed("gptq_3_bits", tmp_path)
    (base / "config.json").unlink()
    (base / "quantize_config.json").unlink()
    content = load_file(base / "model.safetensors") | {"head.weight": normal(5, 4)}
    save_file(content, base / "model.safetensors")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    stem = "base_model.model.layers.0.q_proj.lora_"
    parts = {f"{stem}A.weight": normal(2, 64), f"{stem}B.weight": normal(32, 2)}
    save_file(parts, adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"is skipped, as quantised, .*: neither config\.json nor"):
        wc.audit(adapter, base=base)
