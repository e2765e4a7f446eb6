"""Spikes, data of the search, and summaries over rates."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from wellcond.cli import main
from wellcond_experiments import grid
from wellcond_experiments.evidence import Evidence
from wellcond_experiments.grid import SEARCH, Cell
from wellcond_experiments.settings.loss_spikes import (
    BEFORE,
    JUMP,
    PLACES,
    RATES,
    LossSpikes,
    average_rates,
    count_spikes,
)

# --- spikes ---------------------------------------------------------------------------------------


def test_a_long_spike_counts_once() -> None:
    assert count_spikes([2.0] * 100) == 0
    assert count_spikes([2.0] * 50 + [3.0] * 5 + [2.0] * 45) == 1
    assert count_spikes([2.0] * 50 + [3.0, 2.0, 3.0] + [2.0] * 45) == 2
    assert count_spikes([2.0] * 50 + [2.0 + 0.99 * JUMP] + [2.0] * 49) == 0


def test_a_lasting_high_loss_ends_the_spike() -> None:
    assert count_spikes([2.0] * 60 + [4.0] * 200) == 1
    assert count_spikes([2.0] * 60 + [4.0] * BEFORE + [4.1 + JUMP] + [4.0] * 9) == 2


def test_first_steps_and_nan_are_not_spikes() -> None:
    assert count_spikes([1.0] * 5 + [9.0] + [1.0] * 4) == 0
    assert count_spikes([2.0] * 50 + [math.nan]) == 0
    assert count_spikes([2.0] * 50 + [math.inf]) == 1
    assert count_spikes([]) == 0


# --- runs -----------------------------------------------------------------------------------------


def run(method: str = "none", lr: float = 1e-3, search: bool = False, text: Any = None) -> Any:
    setting = LossSpikes(quick=True)
    if text is not None:
        setting.text = text
    cell = Cell("", method, 1.0, lr, SEARCH if search else 0, search)
    return setting.run(cell)


def test_the_search_does_not_use_the_test_text() -> None:
    text = LossSpikes().text
    tenth = len(text) // 10
    expected = run(search=True, text=text).metrics
    changed = text.clone()
    changed[-tenth:] = changed[-tenth:].flip(0)
    assert run(search=True, text=changed).metrics == expected
    changed[-2 * tenth : -tenth] = changed[-2 * tenth : -tenth].flip(0)
    found = run(search=True, text=changed).metrics
    assert found["loss"] != expected["loss"]
    assert found["early_loss"] == expected["early_loss"]
    train, test = LossSpikes(quick=True).parts(search=False)
    assert len(train) + len(test) == len(text)


def test_a_limit_holds_on_all_matrices_and_the_loss_falls() -> None:
    measured = run("upper-limit", lr=1e-2)
    assert max(measured.curves["norms"][2:]) < 1.02
    assert measured.metrics["loss"] < math.log(LossSpikes().characters)
    assert measured.metrics["diverged"] == 0
    assert len(measured.curves["losses"]) == 2


def test_diverged_model_gets_the_loss_of_guessing() -> None:
    metrics = run(lr=1e30).metrics
    assert metrics["diverged"] == 1
    assert metrics["loss"] == math.log(LossSpikes().characters)


def test_the_loss_is_that_of_the_next_character() -> None:
    """A text of one repeated character has loss 0 after a few steps."""
    text = torch.zeros(100 * PLACES, dtype=torch.int64)
    text[0] = 1
    assert run(lr=1e-2, text=text).metrics["loss"] < 0.3


# --- the summary over the rates -------------------------------------------------------------------


def evidence(losses: dict[tuple[str, int], list[float]]) -> Evidence:
    runs = [
        {"case": "", "method": way, "strength": 1.0, "lr": lr, "seed": seed, "search": False}
        | {"metrics": {"loss": loss, "spikes": 1.0, "diverged": 0.0, "logit": 9.0}}
        | {"curves": {}, "cpu_seconds": 4.0 if way == "isometry" else 2.0}
        for (way, seed), values in losses.items()
        for lr, loss in zip(RATES, values, strict=True)
    ]
    for one in runs:
        one["metrics"] |= {"sigma_max": 2.0, "kappa_worst": 3.0, "quality": 0.0}
    return Evidence({"runs": runs, "chosen": [], "seeds": 2})


def test_best_rate_is_by_the_mean_over_seeds() -> None:
    found = average_rates(
        evidence(
            {
                ("none", 0): [2.0, 2.2, 3.0, 4.0],
                ("none", 1): [2.4, 2.0, 3.0, 4.0],
                ("isometry", 0): [2.6, 2.1, 2.2, 2.2],
                ("isometry", 1): [2.6, 2.1, 2.2, 2.3],
            }
        )
    )
    none, ours = found.where(method="none"), found.where(method="isometry")
    assert list(none["best"]) == [2.2, 2.0]  # 0.003, although seed 0 is better at 0.001
    assert list(none["loss"]) == pytest.approx([2.8, 2.85])
    assert list(none["working"]) == [2, 1]  # the best is 2.1: up to 2.205
    assert list(ours["working"]) == [3, 2]
    assert list(ours["cost"]) == [2.0, 2.0]


def test_a_lower_loss_wins() -> None:
    results = evidence(
        {("none", s): [2.0, 2.0, 3.0, 4.0 + 0.1 * s] for s in range(2)}
        | {("upper-limit", s): [2.0, 1.5, 1.5, 2.0 + 0.1 * s] for s in range(2)}
    )
    setting = LossSpikes()
    first, second = setting.verdicts(results).values()
    assert (first.ours, first.rival, first.better) == ("upper-limit", "none", "wellcond")
    assert first.difference.mean == pytest.approx(-1.0)
    assert first.gain.mean == pytest.approx(100 / 2.7625)
    assert second.difference.mean == pytest.approx(-0.5)
    tables = setting.tables(results)
    assert [row[0] for row in tables["loss"].rows] == ["SingularValueLimit, upper", "baseline"]
    assert [row[0] for row in tables["highest"].rows] == ["SingularValueLimit, upper", "baseline"]


@pytest.mark.slow
def test_it_writes_tables_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "_settings", {})
    argv = ["reproduce", "loss-spikes", "--quick", "--workers", "1", "--out", str(tmp_path)]
    assert main(argv) == 0
    assert "Loss on text that was not seen" in capsys.readouterr().out
    assert (tmp_path / "loss-spikes.png").stat().st_size > 10_000
