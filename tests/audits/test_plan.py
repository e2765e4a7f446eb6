"""Rows are planned before any tensor is read, selected once, and read only as often as needed."""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import wellcond as wc
from wellcond.audits import rows
from wellcond.audits.plan import plan
from wellcond.audits.sources import source_of
from wellcond.files.safetensors import Safetensors
from wellcond.report import Reason, Skipped, Status


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the names of the tensors that are read from safetensors files."""
    names: list[str] = []
    read = Safetensors.read

    def spy(self: Safetensors, name: str) -> Tensor:
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(Safetensors, "read", spy)
    return names


def labels(model: Any, **options: Any) -> list[str]:
    return [finding.label for finding in wc.audit(model, **options).findings]


# --- planning -------------------------------------------------------------------------------------


def test_plan_reads_no_tensor(tmp_path: Path, reads: list[str]) -> None:
    content = {
        "attn.in_proj_weight": randn(24, 8),
        "attn.out_proj.weight": randn(8, 8),
        "conv.weight": randn(4, 3, 3, 3),
        "experts.gate_up_proj": randn(2, 16, 6),
        "experts.down_proj": randn(2, 6, 8),
        "fc.weight": randn(5, 8),
        "fc.bias": randn(5),
    }
    save_file(content, tmp_path / "a.safetensors")
    planned = [spec.label for spec in plan(source_of(tmp_path / "a.safetensors"))]
    assert reads == []
    experts = [f"experts.gate_up_proj:{half}:{i}" for half in ("gate", "up") for i in (0, 1)]
    assert set(planned) == {
        *(f"attn.in_proj_weight:{x}" for x in "qkv"),
        *(*experts, "experts.down_proj:0", "experts.down_proj:1"),
        *("attn.out_proj.weight", "conv.weight:kernel", "fc.weight"),
    }
    assert set(planned) == set(labels(tmp_path / "a.safetensors"))


def test_every_planned_row_is_measured() -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 4, 3, groups=1),
            "attn": nn.MultiheadAttention(8, 2),
            "gru": nn.GRU(3, 4),
            "para": nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)),
        }
    )
    planned = [spec.label for spec in plan(source_of(model), heads=True)]
    assert len(planned) == len(set(planned))
    assert set(planned) == set(labels(model, heads=True))
    assert {"attn:qk0", "attn:vo1", "attn.in_proj_weight:q", "gru.weight_hh_l0:z"} <= set(planned)


def test_tensor_is_read_once_for_all_rows(tmp_path: Path, reads: list[str]) -> None:
    save_file({"a.q_proj.weight": randn(6, 8)}, tmp_path / "base.safetensors")
    factors = {"a.q_proj.lora_A.weight": randn(2, 8), "a.q_proj.lora_B.weight": randn(6, 2)}
    save_file(factors, tmp_path / "adapter.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    found = labels(tmp_path / "adapter.safetensors", base=tmp_path / "base.safetensors")
    name = "a.q_proj.weight"
    assert set(found) == {f"{name}:merged"}
    assert reads.count(name) == 1


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({f"{i}.weight": randn(4, 5) for i in range(4)}, tmp_path / "a.safetensors")
    read = Safetensors.read
    alive: list[weakref.ref[Tensor]] = []

    def spy(self: Safetensors, name: str) -> Tensor:
        assert all(one() is None for one in alive), "the tensor before is still held"
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Safetensors, "read", spy)
    assert len(labels(tmp_path / "a.safetensors")) == len(alive) == 4


# --- curves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("curves", "decomposed"), [(0, 0), (6, 6), (99, 9)])
def test_curve_reads_its_tensor_once_more(
    curves: int,
    decomposed: int,
    tmp_path: Path,
    reads: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wellcond.linalg.spectrum._SMALL", 8)
    monkeypatch.setattr("wellcond.linalg.spectrum._LARGE", 16)
    save_file({"experts": randn(8, 20, 24), "w": torch.eye(20, 24)}, tmp_path / "a.safetensors")
    whole: list[Sequence[int]] = []
    measure = rows.compute_spectrum

    def spy(S: Tensor, all_values: bool = False) -> Any:
        whole.extend([S.shape] * all_values)
        return measure(S, all_values)

    monkeypatch.setattr(rows, "compute_spectrum", spy)
    report = wc.audit(tmp_path / "a.safetensors", include=["experts", "w"], curves=curves)
    assert len(whole) == decomposed
    assert sum(len(f.singular_values) == 20 for f in report.findings) == decomposed
    assert all(f.singular_values for f in report.findings[:decomposed])
    assert reads.count("experts") == (2 if decomposed else 1)


# --- selection ------------------------------------------------------------------------------------


def test_patterns_select_single_matrices(tmp_path: Path) -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "fc": nn.Linear(4, 4)})
    torch.save(model.state_dict(), tmp_path / "a.pt")
    q = "attn.in_proj_weight:q"
    for source in (model, tmp_path / "a.pt"):
        assert labels(source, include=q) == [q]
        report = wc.audit(source, exclude=q)
        assert q not in {finding.label for finding in report.findings}
        assert "attn.in_proj_weight:k" in {finding.label for finding in report.findings}
        assert report.coverage.skipped[q] == Skipped(Reason.excluded, f'"{q}"')
        assert "attn.in_proj_weight" not in report.coverage.skipped
    repaired = wc.repair(tmp_path / "a.pt", tmp_path / "b.pt", 1.5, include=q)
    assert [one.label for one in repaired.repairs] == [q]
    before, after = (torch.load(tmp_path / f"{x}.pt")["attn.in_proj_weight"] for x in "ab")
    assert not torch.equal(before[:8], after[:8])
    assert torch.equal(before[8:], after[8:])


def test_exact_name_selects_skipped_weight() -> None:
    model = nn.ModuleDict({"emb": nn.Embedding(5, 4), "fc": nn.Linear(4, 4)})
    assert labels(model, include=["*"]) == ["fc.weight"]
    assert set(labels(model, include=["*", "emb.weight"])) == {"fc.weight", "emb.weight"}
    assert labels(model, include="emb.weight", exclude="*.bias") == ["emb.weight"]


def test_merged_rows_are_skipped_with_their_weights(tmp_path: Path) -> None:
    name = "a.q.base_layer.weight"
    content = {name: randn(6, 8), "a.q.lora_A.weight": randn(2, 8)}
    content["a.q.lora_B.weight"] = randn(6, 2)
    save_file(content, tmp_path / "a.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    path = tmp_path / "a.safetensors"
    assert set(labels(path)) == {f"{name}:merged"}
    assert set(labels(path, exclude="*:merged")) == {name, f"{name}:delta"}
    assert labels(path, include="*:merged") == [f"{name}:merged"]


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [TypeError, AttributeError, KeyError, IndexError, AssertionError])
def test_internal_error_is_raised(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(S: Tensor, all_values: bool = False) -> Any:
        raise error("a mistake")

    monkeypatch.setattr(rows, "compute_spectrum", wrong)
    with pytest.raises(error, match="a mistake"):
        wc.audit(nn.Linear(3, 3))


class Failing(nn.Module):
    """A parametrization that works only once, when it is registered."""

    calls = 0

    def forward(self, W: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise KeyError("what is not there")
        return W


def test_failing_parametrization_is_a_reason() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Failing())
    report = wc.audit(model)
    assert [finding.label for finding in report.findings] == ["1.weight"]
    why = report.coverage.skipped["0.weight"]
    assert (why.reason, why.detail) == (
        Reason.uncomputed,
        "by its parametrization: KeyError: 'what is not there'",
    )


def test_factors_that_are_not_matrices_are_a_failed_row(tmp_path: Path) -> None:
    content = {"w": randn(3, 3), "a.lora_A.weight": randn(3), "a.lora_B.weight": randn(4)}
    torch.save(content, tmp_path / "a.pt")
    found = {one.label: one for one in wc.audit(tmp_path / "a.pt").findings}
    assert found["a.weight:delta"].status is Status.failed
    assert found["a.weight:delta"].detail == "one of its factors is a vector"


def test_codes_from_a_parametrization_are_a_failed_row() -> None:
    class Rounded(nn.Module):
        def forward(self, W: Tensor) -> Tensor:
            return (8 * W).round().to(torch.int32)

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Rounded(), unsafe=True)
    found = {one.label: one for one in wc.audit(model).findings}
    assert found["0.weight"].status is Status.failed
    assert "which holds codes" in found["0.weight"].detail
    assert found["1.weight"].status is Status.ok


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_operator_of_any_scale(scale: float) -> None:
    layer = nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular", bias=False).double()
    example = torch.zeros(1, 2, 8, dtype=torch.float64)
    (plain,) = wc.audit(layer, example=example).findings
    with torch.no_grad():
        layer.weight.mul_(scale)
    (found,) = wc.audit(layer, example=example).findings
    assert found.condition_number == pytest.approx(plain.condition_number, rel=1e-9)
    assert found.status is Status.ok
