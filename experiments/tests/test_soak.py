"""The soak benchmark counts its injected failures and detects real ones."""

import json
from typing import Any

import pytest
import torch

import wellcond as wc
from wellcond import cli
from wellcond_experiments import bench_soak


def soak(steps: int, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = cli.main(["bench", "soak", "--steps", str(steps), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_steps_are_complete_and_memory_is_constant(capsys: pytest.CaptureFixture[str]) -> None:
    code, document = soak(1500, capsys)
    assert (code, document["failures"]) == (0, [])
    assert document["settings"]["steps"] == 1500
    events = document["events"]
    assert events["skipped"] > 0
    assert events["refused"] == 1500 // bench_soak.NAN_WEIGHT
    assert events["restarts"] == 3
    assert document["steps_kept"] + events["redone"] == 1500
    counts = {(row["weight"], row["way"]): row for row in document["counts"]}
    assert set(counts) == {
        (weight, way) for weight in bench_soak.WEIGHTS for way in ("attach", "add_gradients")
    }
    for row in counts.values():
        assert row["counted"] == row["applied"] > 0
        assert row["pending"] == row["due_pending"]
    made = sum(counts["0.weight", way]["counted"] for way in ("attach", "add_gradients"))
    assert document["steps_kept"] - events["skipped"] <= made
    assert made == document["optimizer_steps"] < document["steps_kept"]
    for moment in ("start", "end"):
        assert all(document["memory"][moment][what] > 0 for what in ("bytes", "tensors"))
    kappa = document["condition_numbers"]
    for weight in bench_soak.WEIGHTS:
        assert kappa["end"][weight] < kappa["start"][weight]


def test_the_table_shows_the_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "soak", "--steps", "60"]) == 0
    printed = capsys.readouterr().out
    for part in ("refused", "steps counted, attach, 0.weight", "condition_numbers, end, 2.weight"):
        assert part in printed


def test_memory_growth_above_the_margin_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_soak, "MARGIN_TENSORS", -(10**6))
    code, document = soak(40, capsys)
    assert code == 1
    assert [failure.startswith("memory grew by") for failure in document["failures"]] == [True]
    assert cli.main(["bench", "soak", "--steps", "40"]) == 1
    assert "FAILED memory grew" in capsys.readouterr().out


def test_an_uncounted_step_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loaded state that lacks one step is detected."""
    load = wc.Regularizer.load_state_dict

    def forgetful(self: wc.Regularizer, state: dict[str, dict[str, torch.Tensor]]) -> None:
        steps = {name: {"step": (s["step"] - 1).clamp(min=0)} for name, s in state.items()}
        load(self, {name: {**s, **steps[name]} for name, s in state.items()})

    monkeypatch.setattr(wc.Regularizer, "load_state_dict", forgetful)
    code, document = soak(480, capsys)
    assert code == 1
    assert any(failure.startswith("miscounts") for failure in document["failures"])
    assert any(failure.startswith("unlike_the_file") for failure in document["failures"])


def test_an_unnoticed_nan_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wc.Regularizer, "add_gradients", lambda self: None)
    monkeypatch.setattr(bench_soak, "NAN_WEIGHT", 30)
    code, document = soak(120, capsys)
    assert code == 1
    assert document["events"]["unnoticed"]
