"""The parts of a quantised weight are not weights: they are not measured or changed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import wellcond as wc
from wellcond.files.checkpoint import Checkpoint
from wellcond.weights.reasons import Reason, Skipped

FORMATS = ["safetensors", "pt"]
# Scales of the MX formats are powers of two; older versions of torch lack them.
E8M0 = getattr(torch, "float8_e8m0fnu", torch.float8_e5m2)


def saved(folder: Path, kind: str, content: dict[str, Tensor]) -> Path:
    path = folder / f"model.{kind}"
    save_file(content, path) if kind == "safetensors" else torch.save(content, path)
    return path


def floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def codes(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


QUANTISED: dict[str, dict[str, Tensor]] = {
    "gptq": {
        "l.qweight": codes(64, 256),
        "l.qzeros": codes(8, 32),
        "l.scales": floats(8, 256).half(),
    },
    "at the root": {"qweight": codes(64, 256), "scales": floats(8, 256)},
    "fp8": {
        "l.weight": floats(8, 8).to(torch.float8_e4m3fn),
        "l.weight_scale_inv": floats(4, 4),
    },
    "scales at the root": {"weight": codes(8, 8, dtype=torch.int8), "weight_scale": floats(8, 2)},
    "bitsandbytes": {
        "l.weight": codes(32, 1, dtype=torch.uint8),
        "l.weight.absmax": floats(8, 2),
        "l.weight.quant_map": floats(2, 8),
    },
    "eight bits": {"l.weight": codes(8, 8, dtype=torch.int8), "l.SCB": floats(8, 2)},
    "mlx": {
        "l.weight": codes(8, 8, dtype=torch.int32).view(torch.uint32),
        "l.scales": floats(8, 2),
        "l.biases": floats(8, 2),
    },
    "experts": {
        "experts.up_proj_blocks": codes(4, 8, 2, dtype=torch.uint8),
        "experts.up_proj_scales": floats(4, 8),
        "experts.up_proj_bias": floats(4, 8),
    },
    "with integer scales": {
        "experts.up_proj_blocks": codes(4, 8, 2, dtype=torch.uint8),
        "experts.up_proj_scales": codes(4, 8, dtype=torch.uint8),
        "experts.up_proj_bias": floats(4, 8),
    },
    "with float8 scales": {
        "l.weight": floats(8, 8).to(torch.float8_e4m3fn),
        "l.weight_scale": floats(8, 2).to(E8M0),
    },
    "too few scales": {"l.weight": codes(8, 8, dtype=torch.int8), "l.SCB": floats(7)},
    "zeros first": {"l.qzeros": codes(8, 32), "l.qweight": codes(64, 256), "l.scales": floats(8)},
    "marlin": {"l.B": codes(8, 8), "l.s": floats(2, 8)},
    "scales alone": {"l.weight_scale": floats(4, 4), "l.weight.absmax": floats(4, 4)},
    "in a wide dtype, by ModelOpt": {
        "experts.up": floats(2, 4, 8),
        "experts.up_weight_scale": floats(2),
    },
}


WEIGHTS = {"l.qweight", "qweight", "l.weight", "weight", "experts.up_proj_blocks", "l.B"}
WEIGHTS |= {"experts.up"}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("how", QUANTISED)
def test_scales_are_unchanged(tmp_path: Path, kind: str, how: str) -> None:
    content = {"head.weight": floats(9, 6)} | QUANTISED[how]
    path, fixed = saved(tmp_path, kind, content), tmp_path / f"fixed.{kind}"
    report = wc.audit(path)
    assert [finding.name for finding in report.findings] == ["head.weight"]
    skipped = report.coverage.skipped
    matrices = {n: why.reason for n, why in skipped.items() if why.reason is not Reason.vector}
    bias = {
        "experts.up_proj_bias": Reason.added
    }  # the bias of the weight, not scales of its blocks
    assert matrices == {
        name: Reason.quantised if name in WEIGHTS else bias.get(name, Reason.scales)
        for name, tensor in QUANTISED[how].items()
        if tensor.ndim > 1
    }
    assert [one.name for one in wc.repair(path, fixed, 1.5).changed] == ["head.weight"]
    after = load_file(fixed) if kind == "safetensors" else torch.load(fixed)
    for name, tensor in QUANTISED[how].items():
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8))


def test_scales_in_another_shard_are_found(tmp_path: Path) -> None:
    save_file({"l.qweight": codes(8, 8)}, tmp_path / "a.safetensors")
    save_file({"l.scales": floats(4, 4), "m.weight": floats(4, 4)}, tmp_path / "b.safetensors")
    (tmp_path / "x.safetensors.index.json").write_text(
        '{"weight_map": {"l.qweight": "a.safetensors", "l.scales": "b.safetensors", '
        '"m.weight": "b.safetensors"}}'
    )
    checkpoint = Checkpoint(tmp_path)
    assert [one.name for one in checkpoint.matrices()] == ["m.weight"]
    assert checkpoint.skipped()["l.scales"].detail == "l.qweight"


@pytest.mark.parametrize(
    ("weight", "other"),
    [
        ("bn.weight", {"bn.num_batches_tracked": codes(1, 1, dtype=torch.int64)}),
        ("e.table", {"e.position_ids": codes(1, 512, dtype=torch.int64)}),
        ("a.table", {"a.relative_position_index": codes(4, 4)}),
        ("attn.in_proj", {"attn.mask": codes(4, 4, dtype=torch.uint8)}),
        ("attn.in_proj", {"attn.causal": codes(4, 4, dtype=torch.bool)}),
        ("l.weight", {"l.codes": codes(4, 4)}),
        ("attn.q.weight", {"attn.bias": codes(4, 4, dtype=torch.uint8), "mlp.w": codes(4, 4)}),
        ("w", {"codes": codes(4, 4)}),
        ("block.scale", {"block.steps": codes(4, dtype=torch.int32)}),
    ],
)
def test_weights_next_to_other_integers_are_weights(
    tmp_path: Path, weight: str, other: dict[str, Tensor]
) -> None:
    path = saved(tmp_path, "pt", {weight: floats(4, 4)} | other)
    assert [one.name for one in Checkpoint(path).matrices()] == [weight]


@pytest.mark.parametrize(
    ("name", "shape"), [("l.bias", (4,)), ("l.running_mean", (4,)), ("l.scale", ())]
)
def test_integers_next_to_a_vector_or_number_are_not_weights(
    tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    path = saved(tmp_path, "pt", {"l.table": codes(4, 4), name: floats(*shape)})
    assert Checkpoint(path).skipped()["l.table"] == Skipped(Reason.packed, "int32")
