"""A repair changes only the measured weights of a file; all other tensors remain bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import wellcond as wc


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# Two weights, the parts of a third, and tensors that are not weights or that a repair skips: at
# least one of each kind, with the tensors next to it that identify the kind.
ZOO: dict[str, Tensor] = {
    "layer.weight": _randn(6, 8),
    "layer.bias": _randn(6),
    "net.0.weight": _randn(12, 6, 3),
    "net.0.bias": _randn(12),
    "codes.weight": _randn(8, 8).mul(40).round().half(),
    "codes.weight_scale": torch.ones(8, 1),
    "linear8.weight": _randn(8, 8).mul(40).round(),
    "linear8.scale": torch.rand(8, 1),
    "packed.qweight": torch.arange(12, dtype=torch.int32).reshape(3, 4),
    "packed.qzeros": torch.ones(1, 4, dtype=torch.int32),
    "packed.scales": _randn(3, 4).half(),
    "float8.weight": _randn(8, 8).to(torch.float8_e4m3fn),
    "float8.weight_scale_inv": torch.ones(1, 1),
    "mixer.A_log": _randn(8, 4).abs(),
    "stft.forward_basis_buffer": _randn(18, 1, 16),
    "conv._w3j_1_1_1": _randn(3, 3, 3),
    "mel_basis": _randn(8, 17),
    "attn.masked_bias": _randn(4, 4),
    "queries": _randn(5, 8),
    "token_embedding.weight": _randn(9, 8),
    "norm.weight": _randn(6, 8),
    "norm.bias": _randn(6, 8),
    "complex.weight": torch.complex(_randn(4, 4), _randn(4, 4).mT.contiguous()),
    "q.oft_R.weight": _randn(8, 6),
    "q.hada_w1_a": _randn(8, 4),
    "k.lora_A.weight": _randn(3, 8),
    "k.lora_B.weight": _randn(8, 3),
    "v.lora_down.weight": _randn(3, 8),
    "old.weight_v": _randn(6, 8),
    "old.weight_g": torch.ones(6, 1),
    "pruned.weight_orig": _randn(6, 8),
    "pruned.weight_mask": torch.ones(6, 8),
    "number": torch.tensor(2.0),
}


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, read by the library of its format, as a flat dict."""
    content = (
        load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=False)
    )
    return {name: t.reshape(-1) for name, t in content.items() if isinstance(t, Tensor)}


def check(source: Path, target: Path) -> list[str]:
    """Asserts that all other tensors are unchanged, and returns the names of the changed ones."""
    report = wc.audit(source)
    found = [finding for finding in report.findings if finding.view != "delta"]
    stored = {finding.name: set(finding.parts) or {finding.name} for finding in found}
    repaired = wc.repair(source, target, max_condition=1.1)
    before, after = map(tensors_of, (source, target))
    assert before.keys() == after.keys()
    changed = [
        name
        for name in before
        if not torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
    ]
    assert set(changed) == set().union(*(stored[one.name] for one in repaired.changed))
    assert not {one.name for one in repaired.changed} & report.coverage.skipped.keys()
    return changed


@pytest.mark.parametrize("how", ["safetensors", "pt", "legacy", "objects"])
def test_tensors_that_are_not_weights_are_unchanged(how: str, tmp_path: Path) -> None:
    suffix = "safetensors" if how == "safetensors" else "pt"
    source, target = tmp_path / f"model.{suffix}", tmp_path / f"fixed.{suffix}"
    content: dict[str, Any] = dict(ZOO)
    if how == "safetensors":
        save_file(ZOO, source)
    else:
        if how == "legacy":  # a format in which torch cannot read float8 back
            del content["float8.weight"]
        if how == "objects":  # read without their classes, and overwritten in place
            content["model"] = nn.Identity()
        torch.save(content, source, _use_new_zipfile_serialization=how != "legacy")
    changed = {"layer.weight", "net.0.weight", "old.weight_v", "old.weight_g"}
    assert set(check(source, target)) == changed


def test_slices_of_a_sharded_tensor_are_unchanged(tmp_path: Path) -> None:
    offsets = '{"fc.weight": {"saved_offsets": [6, 0]}}'
    metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": offsets}
    tensors = {"fc.weight": _randn(6, 8), "layer.weight": _randn(6, 8)}
    save_file(tensors, tmp_path / "shard.safetensors", metadata)
    assert check(tmp_path / "shard.safetensors", tmp_path / "fixed.safetensors") == ["layer.weight"]


def test_matched_adapter_factors_are_unchanged(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    content = {
        "layer.q_proj.base_layer.weight": torch.diag(torch.tensor([9.0, 1.0, 1.0, 1.0])),
        "layer.q_proj.lora_A.default.weight": torch.randn(2, 4),
        "layer.q_proj.lora_B.default.weight": torch.randn(4, 2),
        "layer.o_proj.weight": torch.diag(torch.tensor([9.0, 1.0, 1.0, 1.0])),
    }
    for name in ("A", "B"):  # far above the limit, if it applied to them
        content[f"layer.q_proj.lora_{name}.default.weight"][0] *= 1e3
    torch.save(content, tmp_path / "a.pt")
    for number, patterns in enumerate(
        ({"exclude": "*lora_A*"}, {"include": ["*lora_B*", "*o_proj*"]}, {"exclude": "*lora*"})
    ):
        report = wc.repair(tmp_path / "a.pt", tmp_path / f"b{number}.pt", 3.0, **patterns)
        assert "layer.o_proj.weight" in {repair.name for repair in report.changed}
        after = torch.load(tmp_path / f"b{number}.pt")
        assert all(torch.equal(after[n], X) for n, X in content.items() if "lora" in n)
