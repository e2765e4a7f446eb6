"""Parts that contradict each other or their config give a reason, never a number.

Each test changes one place in the output of a library, and audits it as a user would. All other
weights keep their numbers.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import Sample
from damage import Part, file_of, parts_of
from recipe_samples import recipe_samples

import wellcond as wc
from wellcond.files.checkpoint import Checkpoint
from wellcond.report.findings import Status

PLAIN = "plain.weight"  # an extra weight that must be measured in every case

samples = cache(recipe_samples)


@dataclass
class Opened:
    """A checkpoint whose file of tensors a test changes."""

    parts: dict[str, Part]
    metadata: dict[str, str]
    configs: dict[str, Any]

    def setting(self, name: str, value: Any) -> None:
        """Changes a setting of the quantisation in all configs that contain it."""
        for config in self.configs.values():
            inner = config.get("quantization_config") or config.get("quantization") or config
            for one in (inner, config.get("quantization", {})):
                if name in one:
                    one[name] = value

    def transpose(self, name: str) -> None:
        """Exchanges the last two dimensions in the shape; a vector becomes one row."""
        shape = self.parts[name].shape
        self.parts[name].shape = [*shape[:-2], *shape[:-3:-1]] if len(shape) > 1 else [1, *shape]

    def cut(self, name: str, side: int = 0) -> None:
        """Halves a dimension, or removes its last entry."""
        part = self.parts[name]
        width = len(part.data) // math.prod(part.shape)
        part.shape[side] -= max(1, part.shape[side] // 2)
        part.data = part.data[: math.prod(part.shape) * width]

    def fill(self, name: str, data: bytes) -> None:
        """Fills every entry with the same bytes."""
        part = self.parts[name]
        part.data = data * (len(part.data) // len(data))

    def describe(self, name: str, key: str, value: Any) -> None:
        """Changes a value in the JSON that a tensor contains."""
        said = json.loads(self.parts[name].data)
        said[key] = value
        data = json.dumps(said).encode()
        self.parts[name] = Part("U8", [len(data)], data)

    def class_setting(self, label: str, key: str, value: Any) -> None:
        """Changes a setting of torchao for a weight in the metadata."""
        said = json.loads(self.metadata[label])
        said["_data"][key] = value
        self.metadata[label] = json.dumps(said)


@dataclass
class Case:
    """A change of a sample, the affected weight, and a part of the expected reason."""

    sample: str
    label: str
    change: Callable[[Opened], object]
    reason: str
    also: set[str] = field(default_factory=set)  # other affected weights


UP, Q = "layers.2.up_proj", "q_proj"
MLP = "model.layers.0.mlp"
STATE = "odd.weight.quant_state.bitsandbytes__nf4"


def gptq(change: Callable[[Opened], object], reason: str) -> Case:
    return Case("gptq_borrows", f"{Q}.weight", change, reason)


def awq(change: Callable[[Opened], object], reason: str, version: str = "awq_gemm") -> Case:
    return Case(version, f"{MLP}.up_proj.weight", change, reason)


def four_bits(change: Callable[[Opened], object], reason: str) -> Case:
    return Case("bitsandbytes_layers", "odd.weight", change, reason)


def mlx(change: Callable[[Opened], object], reason: str, *also: str) -> Case:
    return Case("mlx_affine", "model.layers.0.q_proj.weight", change, reason, {*also})


def hqq(change: Callable[[Opened], object], reason: str) -> Case:
    return Case("hqq", "rows.weight", change, reason)


CASES: dict[str, Case] = {
    "GPTQ: 8 bits of 4": gptq(lambda c: c.setting("bits", 8), "8 bits fit"),
    "GPTQ: 3 bits of 4": gptq(lambda c: c.setting("bits", 3), "3 bits fit"),
    "GPTQ: symmetric with other zeros": gptq(lambda c: c.setting("sym", True), "zero points"),
    "GPTQ: transposed scales": gptq(lambda c: c.transpose(f"{Q}.scales"), "do not fit"),
    "GPTQ: half of the scales": gptq(lambda c: c.cut(f"{Q}.scales"), "do not fit"),
    "GPTQ: zeros of fewer outputs": gptq(lambda c: c.cut(f"{Q}.qzeros", 1), "4 bits fit"),
    "GPTQ: half of the codes": gptq(lambda c: c.cut(f"{Q}.qweight"), "4 bits fit"),
    "GPTQ: groups beyond the scales": gptq(lambda c: c.fill(f"{Q}.g_idx", b"\2\0\0\0"), "groups 2"),
    "GPTQ: negative groups": gptq(lambda c: c.fill(f"{Q}.g_idx", b"\xff" * 4), "groups -1"),
    "GPTQ: without its codes": gptq(lambda c: c.parts.pop(f"{Q}.qweight"), "(by name)"),
    "GPTQ: a weight as well": gptq(
        lambda c: c.parts.update({f"{Q}.weight": Part("F32", [32, 32], bytes(4096))}),
        "is stored as well",
    ),
    "AWQ: 8 bits of 4": awq(lambda c: c.setting("bits", 8), "8 bits"),
    "AWQ: groups that do not divide": awq(lambda c: c.setting("group_size", 32), "is 32"),
    "AWQ: groups that divide otherwise": awq(lambda c: c.setting("group_size", 24), "do not fit"),
    "AWQ: the other version": awq(lambda c: c.setting("version", "gemv"), "gemv"),
    "AWQ: transposed scales": awq(lambda c: c.transpose(f"{MLP}.up_proj.scales"), "do not fit"),
    "AWQ: zeros of fewer groups": awq(lambda c: c.cut(f"{MLP}.up_proj.qzeros"), "do not fit"),
    "AWQ, gemv: groups of 48": awq(
        lambda c: c.setting("group_size", 48), "no groups of 48", "awq_gemv"
    ),
    "AWQ, gemv: the other version": awq(
        lambda c: c.setting("version", "gemm"), "with 24 inputs", "awq_gemv"
    ),
    "4 bits: a larger shape": four_bits(
        lambda c: c.describe(STATE, "shape", [7, 13]), "codes of 4"
    ),
    "4 bits: 2^40 rows": four_bits(lambda c: c.describe(STATE, "shape", [2**40, 11]), "codes of 4"),
    "4 bits: other blocks": four_bits(
        lambda c: c.describe(STATE, "blocksize", 32), "has the shape"
    ),
    "4 bits: another type": four_bits(lambda c: c.describe(STATE, "quant_type", "fp4"), "type is"),
    "4 bits: half of the scales": four_bits(lambda c: c.cut("odd.weight.absmax"), "has the shape"),
    "4 bits: scales that are codes": four_bits(
        lambda c: c.parts.update({"odd.weight.absmax": Part("I32", [2], bytes(8))}), "int32"
    ),
    "4 bits: another table": four_bits(
        lambda c: c.fill("odd.weight.quant_map", bytes(4)), "values"
    ),
    "4 bits: no JSON": four_bits(lambda c: c.fill(STATE, b"{"), "not a description"),
    "8 bits: half of the scales": Case(
        "bitsandbytes_int8",
        "transformer.h.0.mlp.c_fc.weight",
        lambda c: c.cut("transformer.h.0.mlp.c_fc.SCB"),
        "has the shape",
    ),
    "packed: more columns": Case(
        "compressed_packed",
        "four.weight",
        lambda c: c.fill(
            "four.weight_shape", (10).to_bytes(8, "little") + (40).to_bytes(8, "little")
        ),
        "do not fit",
    ),
    "packed: fewer columns in as many words": Case(
        "compressed_packed",
        "four.weight",
        lambda c: c.fill(
            "four.weight_shape", (10).to_bytes(8, "little") + (17).to_bytes(8, "little")
        ),
        "",
    ),
    "packed: transposed scales": Case(
        "compressed_packed",
        "four.weight",
        lambda c: c.transpose("four.weight_scale"),
        "does not fit",
    ),
    "packed: half of the zero points": Case(
        "compressed_packed",
        "asymmetric.weight",
        lambda c: c.cut("asymmetric.weight_zero_point"),
        "does not fit",
    ),
    "packed: no zero points": Case(
        "compressed_packed",
        "asymmetric.weight",
        lambda c: c.parts.pop("asymmetric.weight_zero_point"),
        "is missing",
    ),
    "float8: other blocks": Case(
        "float8_stacks",
        "mlp.experts.down_proj",
        lambda c: c.setting("weight_block_size", [8, 8]),
        "contradicts",
        {"mlp.experts.gate_up_proj"},
    ),
    "float8: transposed scales": Case(
        "float8_stacks",
        "mlp.experts.down_proj",
        lambda c: c.transpose("mlp.experts.down_proj_scale_inv"),
        "contradicts",
    ),
    "float8: two scales": Case(
        "float8_deepseek",
        "v3.short.weight",
        lambda c: c.parts.update(
            {"v3.short.weight_scale": replace(c.parts["v3.short.weight_scale_inv"])}
        ),
        "both scale it",
    ),
    "float8: scales of another format": Case(
        "float8_deepseek",
        "v3.short.weight",
        lambda c: c.parts.update({"v3.short.scales": Part("F32", [20], bytes(80))}),
        "is beside it",
    ),
    "MLX: 8 bits of 4": mlx(lambda c: c.setting("bits", 8), "does not fit"),
    "MLX: other groups": mlx(lambda c: c.setting("group_size", 64), "does not fit"),
    "MLX: another mode": mlx(
        lambda c: c.setting("mode", "mxfp4"),
        "",
        "model.layers.0.k_proj.weight",
        "model.layers.0.experts.up_proj.weight",
    ),
    "MLX: transposed scales": mlx(lambda c: c.transpose("model.layers.0.q_proj.scales"), "not fit"),
    "MLX: fewer biases": mlx(lambda c: c.cut("model.layers.0.q_proj.biases"), "has the shape"),
    "ModelOpt: another algorithm": Case(
        "modelopt_nvfp4",
        f"{MLP}.down_proj.weight",
        lambda c: c.setting("quant_algo", "FP8"),
        "have no recipe",
        {"model.layers.0.self_attn.k_proj.weight"},
    ),
    "ModelOpt: transposed scales": Case(
        "modelopt_nvfp4",
        f"{MLP}.down_proj.weight",
        lambda c: c.transpose(f"{MLP}.down_proj.weight_scale"),
        "does not fit",
    ),
    "ModelOpt: no second scale": Case(
        "modelopt_nvfp4",
        f"{MLP}.down_proj.weight",
        lambda c: c.parts.pop(f"{MLP}.down_proj.weight_scale_2"),
        "weight_scale_2",
    ),
    "gpt-oss: transposed scales": Case(
        "gpt_oss",
        f"{MLP}.experts.gate_up_proj",
        lambda c: c.transpose(f"{MLP}.experts.gate_up_proj_scales"),
        "has the shape",
    ),
    "gpt-oss: scales of half of the experts": Case(
        "gpt_oss",
        f"{MLP}.experts.gate_up_proj",
        lambda c: c.cut(f"{MLP}.experts.gate_up_proj_scales"),
        "has the shape",
    ),
    "DeepSeek V4: fewer blocks": Case(
        "deepseek_v4",
        "model.layers.0.ffn.experts.0.w1.weight",
        lambda c: c.cut("model.layers.0.ffn.experts.0.w1.scale", 1),
        "has the shape",
    ),
    "Quark: another scheme": Case(
        "quark",
        f"{MLP}.down_proj.weight",
        lambda c: c.setting("global_quant_config", {"weight": {"dtype": "fp4", "group_size": 16}}),
        "other scales",
        {f"{MLP}.gate_proj.weight", f"{MLP}.up_proj.weight"},
    ),
    "HQQ: more rows": hqq(lambda c: c.fill("rows.shape", (9).to_bytes(8, "little")), ""),
    "HQQ: the other axis": hqq(
        lambda c: c.fill("rows.axis", bytes(len(c.parts["rows.axis"].data))), "has the shape"
    ),
    "HQQ: transposed scales": hqq(lambda c: c.transpose("rows.scale"), "has the shape"),
    "quanto: transposed scales": Case(
        "quanto",
        "integers.weight",
        lambda c: c.transpose("integers.weight._scale"),
        "has the shape",
    ),
    "8 bits: scales of another format": Case(
        "bitsandbytes_int8",
        "transformer.h.0.mlp.c_fc.weight",
        lambda c: c.parts.update(
            {"transformer.h.0.mlp.c_fc.weight_scale_inv": Part("F32", [1, 1], bytes(4))}
        ),
        "is stored beside it, and is not one of its parts",
    ),
    "GPTQ: scales of another format": gptq(
        lambda c: c.parts.update({f"{Q}.weight_scale": Part("F32", [1], bytes(4))}),
        "is stored beside it, and is not one of its parts",
    ),
    "BitNet: codes of 3": Case(
        "bitnet", "up_proj.weight", lambda c: c.fill("up_proj.weight", b"\xff"), "codes of 3"
    ),
    "torchao: other blocks": Case(
        "torchao in safetensors",
        "int8_groups.weight",
        lambda c: c.class_setting("int8_groups.weight", "block_size", [1, 12]),
        "has the shape",
    ),
    "torchao: more than 3 bits": Case(
        "torchao in safetensors",
        "int4.weight",
        lambda c: c.class_setting(
            "int4.weight", "target_dtype", {"_type": "torch.dtype", "_data": "int3"}
        ),
        "more than 3 bits",
    ),
    "torchao: transposed scales": Case(
        "torchao in safetensors",
        "int8_groups.weight",
        lambda c: c.transpose("int8_groups._weight_scale"),
        "has the shape",
    ),
    "weight_norm: norms of columns": Case(
        "parametrized",
        "normed.weight",
        lambda c: c.parts.update(
            {"normed.parametrizations.weight.original0": Part("F32", [1, 4], bytes(16))}
        ),
        "holds no norms",
    ),
    "spectral_norm: u of the other side": Case(
        "parametrized",
        "spectral.weight",
        lambda c: c.parts.update(
            {"spectral.parametrizations.weight.0._u": Part("F32", [9], bytes(36))}
        ),
        "do not fit",
    ),
    "a mask of another shape": Case(
        "parametrized",
        "pruned.weight",
        lambda c: c.transpose("pruned.weight_mask"),
        "has the shape",
    ),
}


def open_sample(sample: Sample) -> tuple[str, Opened]:
    """Opens a sample with one file of tensors, and adds one weight."""
    (file,) = [name for name in sample.files if name.endswith(".safetensors")]
    parts, metadata = parts_of(sample.files[file])
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    parts[PLAIN] = Part("F32", [4, 3], values.numpy().tobytes())
    configs = {n: json.loads(data) for n, data in sample.files.items() if n.endswith(".json")}
    return file, Opened(parts, metadata, configs)


def write(sample: Sample, file: str, opened: Opened, folder: Path) -> Path:
    files = {name: json.dumps(config).encode() for name, config in opened.configs.items()}
    files[file] = file_of(opened.parts, opened.metadata)
    return replace(sample, files=files).write(folder)


def numbers(report: wc.AuditReport) -> dict[str, tuple[Any, ...]]:
    """Returns the measurements by label, equal for a matrix and its transpose."""
    return {
        f.label: (f"{f.sigma_max:.9g}", f"{f.sigma_min:.9g}", *sorted(f.shape))
        for f in report.findings
        if f.measured
    }


def reasons(report: wc.AuditReport, opened: Opened, label: str) -> Iterator[str]:
    """Yields why the weight, or a tensor of its layer, is not measured."""
    yield from (f.detail for f in report.findings if f.name == label and f.status is Status.failed)
    layer = label.removesuffix("weight")
    skipped = report.coverage.skipped
    yield from (str(skipped[n]) for n in opened.parts if n in skipped and n.startswith(layer))


@pytest.mark.parametrize("name", CASES)
def test_contradiction_gives_reason_not_number(tmp_path: Path, name: str) -> None:
    case, sample = CASES[name], samples()[CASES[name].sample]
    file, opened = open_sample(sample)
    before = numbers(wc.audit(write(sample, file, opened, tmp_path / "a")))
    own = {label for label in before if label.partition(":")[0] in {case.label, *case.also}}
    assert any(label.startswith(case.label) for label in own)
    case.change(opened)
    report = wc.audit(write(sample, file, opened, tmp_path / "b"))
    assert any(case.reason in why for why in reasons(report, opened, case.label))
    assert numbers(report) == {label: one for label, one in before.items() if label not in own}


def halves(opened: Opened, name: str) -> tuple[Part, Part]:
    part = opened.parts[name]
    m, half = part.shape[0] // 2, len(part.data) // part.shape[0] * (part.shape[0] // 2)
    first = Part(part.dtype, [m, *part.shape[1:]], part.data[:half])
    return first, Part(part.dtype, [part.shape[0] - m, *part.shape[1:]], part.data[half:])


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(
    ("kind", "weight", "scale"),
    [
        ("float8_deepseek", "v3.short.weight", "v3.short.weight_scale_inv"),
        ("gptq_borrows", f"{Q}.qweight", f"{Q}.scales"),
        ("mlx_affine", "model.layers.0.q_proj.weight", "model.layers.0.q_proj.scales"),
        (
            "modelopt_rows",
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.0.self_attn.q_proj.weight_scale",
        ),
    ],
)
def test_scales_split_over_two_shards_give_no_number(
    tmp_path: Path, kind: str, weight: str, scale: str, indexed: bool
) -> None:
    _, opened = open_sample(samples()[kind])
    module = weight.rpartition(".")[0]
    ours = {name: part for name, part in opened.parts.items() if name.startswith(module)}
    first, second = halves(opened, scale)
    shards = [ours | {scale: first}, {scale: second, PLAIN: opened.parts[PLAIN]}]
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    files = {name: file_of(one, {}) for name, one in zip(names, shards, strict=True)}
    files |= {name: json.dumps(config).encode() for name, config in opened.configs.items()}
    if indexed:
        places = {name: names[n] for n, one in enumerate(shards) for name in one}
        files["model.safetensors.index.json"] = json.dumps({"weight_map": places}).encode()
    report = wc.audit(Sample("", files).write(tmp_path / "a"))
    assert [label.rpartition("/")[2] for label in numbers(report)] == [PLAIN]


def test_failed_build_leaves_other_weights_measured(tmp_path: Path) -> None:
    """The parts fit in shape, but not in value; in a stack, one matrix is damaged."""
    sample = samples()["gptq_v2"]
    file, opened = open_sample(sample)
    opened.fill(f"{UP}.g_idx", b"\x09\0\0\0")
    path = write(sample, file, opened, tmp_path / "a")
    report = wc.audit(path)
    assert numbers(report).keys() == {"layers.8.up_proj.weight", PLAIN}
    (failed,) = [f for f in report.findings if f.status is Status.failed]
    assert failed.name == f"{UP}.weight"
    assert failed.detail == f"{UP}.g_idx has groups 9 to 9, and there are 2"
    assert Checkpoint(path).recipes.keys() == {f"{UP}.weight", "layers.8.up_proj.weight"}
    why = f"dequantised, and nothing was written: {UP}.weight: {UP}.g_idx has groups 9 to 9"
    with pytest.raises(ValueError, match=re.escape(why)):
        wc.repair(path, tmp_path / "b", math.inf, dequantise=True)
    assert not (tmp_path / "b").exists()


def test_repair_refuses_weight_that_cannot_be_built(tmp_path: Path) -> None:
    """spectral_norm does not store to which dimension of a square weight its u belongs."""
    parts = {
        "l.weight_orig": Part("F32", [2, 2], struct.pack("<4f", 3, 1, 0, 1)),
        "l.weight_u": Part("F32", [2], struct.pack("<2f", 1, 1)),
        "l.weight_v": Part("F32", [2], struct.pack("<2f", 1, 2)),
    }
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_of(parts, {}))
    why = "nothing was written: l.weight: spectral_norm does not store to which side"
    with pytest.raises(ValueError, match=re.escape(why)):
        wc.repair(path, tmp_path / "b.safetensors", 1.5)
    assert [one.name for one in tmp_path.iterdir()] == ["a.safetensors"]
