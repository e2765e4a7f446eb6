"""Tensors that share memory, and names that fall together."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import wellcond as wc
from wellcond.files import nested
from wellcond.files.checkpoint import Checkpoint
from wellcond.weights.reasons import Reason, Skipped


def random(*shape: int) -> Tensor:
    S = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    S[0] *= 1e-3
    return S


def test_parts_are_repaired_with_the_whole(tmp_path: Path) -> None:
    qkv = random(48, 16)
    content = {"q": qkv[:16], "qkv": qkv, "k": qkv[16:32], "columns": qkv[:, ::2]}
    torch.save(content, tmp_path / "a.pt")
    report = wc.repair(tmp_path / "a.pt", tmp_path / "b.pt", 3.0)
    assert [repair.name for repair in report.changed] == ["qkv"]
    assert str(report.skipped["q"]).endswith("so not measured or repaired separately: qkv")
    assert report.skipped == {n: Skipped(Reason.part, "qkv") for n in ("q", "k", "columns")}
    after = torch.load(tmp_path / "b.pt")
    assert float(wc.condition_number(after["qkv"])) <= 3.0
    assert torch.equal(after["q"], after["qkv"][:16])
    assert float(wc.condition_number(after["q"])) > 3.0  # what its reason must not deny
    assert wc.audit(tmp_path / "b.pt").coverage.parameter_share == 1.0


def test_parts_of_a_tensor_with_gaps(tmp_path: Path) -> None:
    base = random(8, 12)
    content = {"left": base[:, :5], "within": base[2:6, :3], "right": base[:, 5:]}
    torch.save(content, tmp_path / "a.pt")
    checkpoint = Checkpoint(tmp_path / "a.pt")
    assert [one.name for one in checkpoint.matrices()] == ["left", "right"]
    assert checkpoint.skipped() == {"within": Skipped(Reason.part, "left")}
    wc.repair(tmp_path / "a.pt", tmp_path / "b.pt", 3.0)
    for one in Checkpoint(tmp_path / "b.pt").matrices():
        assert float(wc.condition_number(one.read())) <= 3.0


def test_what_overlaps_otherwise_is_measured_but_not_repaired(tmp_path: Path) -> None:
    base = random(12, 4)
    torch.save({"a": base[:8], "b": base[4:], "c": random(3, 3)}, tmp_path / "a.pt")
    assert {one.name for one in wc.audit(tmp_path / "a.pt").findings} == {"a", "b", "c"}
    with pytest.raises(ValueError, match=r"overlap.*: b and a\..*clone\(\)"):
        wc.repair(tmp_path / "a.pt", tmp_path / "b.pt", 3.0)
    with pytest.raises(ValueError, match="b and a"):
        wc.repair(tmp_path / "a.pt", tmp_path / "b.pt", 3.0, exclude=["b"])
    wc.repair(tmp_path / "a.pt", tmp_path / "b.pt", 3.0, include=["c"])


def test_parameters_in_one_flat_buffer_are_weights(tmp_path: Path) -> None:
    flat = random(64)
    torch.save({"flat": flat, "a": flat[:32].view(8, 4), "b": flat[32:].view(4, 8)}, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "a.pt")
    assert [one.name for one in Checkpoint(tmp_path / "a.pt").matrices()] == ["a", "b"]


def test_names_that_fall_together_are_told_apart(tmp_path: Path) -> None:
    content = {"a.b": random(4, 4), "a": {"b": random(3, 3)}, 1: random(2, 2), "1": random(5, 5)}
    torch.save(content, tmp_path / "a.pt")
    report = wc.repair(tmp_path / "a.pt", tmp_path / "b.pt", 3.0)
    assert {repair.name: repair.shape for repair in report.changed} == {
        "a.b": (4, 4),
        "a.b (2)": (3, 3),
        "1": (2, 2),
        "1 (2)": (5, 5),
    }
    assert float(wc.condition_number(torch.load(tmp_path / "b.pt")["a"]["b"])) <= 3.0


def test_tensors_without_values_or_with_repeated_ones_have_a_reason(tmp_path: Path) -> None:
    content = {
        "w": random(3, 3),
        "meta": torch.empty(4, 4, device="meta"),
        "expanded": torch.ones(1, 1).expand(1 << 20, 1 << 20),
        "sliding": torch.arange(5.0).as_strided((3, 3), (1, 1)),
    }
    torch.save(content, tmp_path / "a.pt")
    report = wc.audit(tmp_path / "a.pt")
    assert [one.name for one in report.findings] == ["w"]
    skipped = report.coverage.skipped
    assert skipped["meta"] == Skipped(Reason.no_values)
    assert skipped["expanded"].reason is skipped["sliding"].reason is Reason.not_dense
    assert report.coverage.parameter_share == 9 / (9 + 16)  # the meta tensor is a parameter
    wc.repair(tmp_path / "a.pt", tmp_path / "b.pt", 3.0)
    assert (tmp_path / "b.pt").stat().st_size < 10_000


def test_circles_and_shared_lists_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nested, "_CONTAINERS", 10_000)  # the test takes seconds else
    shared: list[object] = [torch.eye(2)]
    for _ in range(40):
        shared = [shared, shared]
    circle: list[object] = [torch.eye(2)]
    circle.append(circle)
    for content in (shared, circle, {"a": circle}):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ValueError, match="but contains more or is recursive"):
            Checkpoint(tmp_path / "a.pt")


def test_every_block_has_a_limit_of_its_own(tmp_path: Path) -> None:
    """Query of GPT-2, stored as (inputs, outputs); one gate of one expert; one of an LSTM."""
    torch.manual_seed(0)
    well = torch.linalg.qr(torch.randn(24, 24)).Q
    content = {
        "h.0.attn.c_attn.weight": torch.cat([well] * 3, 1),
        "h.0.attn.c_proj.weight": well.clone(),
        "experts.gate_up_proj": torch.stack([torch.cat([well, well])] * 2).contiguous(),
        "experts.down_proj": torch.stack([well] * 2),
        "lstm.weight_ih_l0": torch.cat([well] * 4),
        "lstm.weight_hh_l0": torch.cat([well] * 4),
        "attention.query_key_value.weight": torch.cat([well] * 3),
        "attention.dense.weight": well.clone(),
    }
    content["h.0.attn.c_attn.weight"][:, 3] *= 1e-3
    content["experts.gate_up_proj"][1, 27] *= 1e-3
    content["lstm.weight_hh_l0"][50] *= 1e-3
    content["attention.query_key_value.weight"][:, 7] *= 1e-3
    torch.save(content, tmp_path / "a.pt")
    report = wc.repair(tmp_path / "a.pt", tmp_path / "b.pt", 4.0)
    assert [one.label for one in report.changed] == [
        "h.0.attn.c_attn.weight:q",
        "experts.gate_up_proj:up:1",
        "lstm.weight_hh_l0:g",
        "attention.query_key_value.weight",
    ]
    assert {one.label for one in report.repairs} == {
        one.label for one in wc.audit(tmp_path / "a.pt").findings
    }
    (line,) = (line for line in str(report).splitlines() if "tells the order of its rows" in line)
    assert line.startswith("attention.query_key_value.weight: `query_key_value` is one matrix")
    found = {one.label: one.condition_number for one in wc.audit(tmp_path / "b.pt").findings}
    assert max(found.values()) <= 4.0
    assert found["h.0.attn.c_attn.weight:q"] > 3.9
    after = torch.load(tmp_path / "b.pt")
    changed = {name: torch.zeros_like(tensor).bool() for name, tensor in content.items()}
    changed["h.0.attn.c_attn.weight"][:, :24] = True
    changed["experts.gate_up_proj"][1, 24:] = True
    changed["lstm.weight_hh_l0"][48:72] = True
    changed["attention.query_key_value.weight"][:] = True
    for name, tensor in content.items():
        assert torch.equal(after[name][~changed[name]], tensor[~changed[name]]), name
        assert after[name].is_contiguous() == tensor.is_contiguous()


def test_a_projection_of_several_heads_is_repaired_by_what_config_says(tmp_path: Path) -> None:
    content = {"a.query_key_value.weight": random(20, 12), "a.dense.weight": random(12, 12)}
    torch.save(content, tmp_path / "a.pt")
    whole = wc.repair(tmp_path / "a.pt", tmp_path / "b.pt", 4.0)
    assert [one.view for one in whole.repairs] == ["", ""]
    (tmp_path / "config.json").write_text('{"multi_query": true}')
    cut = wc.repair(tmp_path / "a.pt", tmp_path / "c.pt", 4.0)
    assert [(one.view, one.shape) for one in cut.repairs] == [
        ("q", (12, 12)),
        ("k", (4, 12)),
        ("v", (4, 12)),
        ("", (12, 12)),
    ]


def test_a_repair_lists_what_it_changes_that_is_not_called_a_weight(tmp_path: Path) -> None:
    S = torch.diag(torch.tensor([100.0, 1.0]))
    names = ["a.weight", "b.kernel", "q_proj", "codes.basis", "W_out"]
    torch.save({name: S.clone() for name in names} | {"fine": torch.eye(2)}, tmp_path / "m.pt")
    report = wc.repair(tmp_path / "m.pt", tmp_path / "fixed.pt", max_condition=10)
    noted = [one.name for one in report.repairs if "is not that of a weight" in one.note]
    assert noted == ["codes.basis", "W_out"]
    assert "codes.basis, W_out: changed, although its name is not that of a weight" in str(report)


def test_a_repair_says_which_rows_of_zeros_it_fills(tmp_path: Path) -> None:
    wide, tall = torch.randn(24, 32), torch.randn(32, 24)
    wide[20] = tall[20] = 0
    torch.save(
        {"wide.weight": wide, "tall.weight": tall, "zero.weight": 0 * wide}, tmp_path / "a.pt"
    )
    report = wc.repair(tmp_path / "a.pt", tmp_path / "b.pt", 5.0)
    after = torch.load(tmp_path / "b.pt")
    assert after["wide.weight"][20].any()
    assert not after["tall.weight"][20].any()  # it has full rank without that row
    notes = {repair.name: repair.note for repair in report.repairs}
    assert notes["wide.weight"] == "rows that were zero are filled: 20"
    assert "filled" not in notes["tall.weight"] + notes["zero.weight"]
