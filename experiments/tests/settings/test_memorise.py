"""Random labels: new labels in every task, and separate images for the search."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wellcond.cli import main
from wellcond_experiments import figures, grid
from wellcond_experiments.grid import FINAL, SEARCH, Cell
from wellcond_experiments.methods import METHODS
from wellcond_experiments.settings.memorise import Memorise


def cell(method: str = "none", lr: float = 1e-3, seed: int = 0) -> Cell:
    return Cell("", method, 0.0, lr, seed, search=seed >= SEARCH)


def test_the_search_has_separate_images() -> None:
    setting = Memorise("digits", quick=True)
    searched = [setting.draw(cell(seed=first + s)) for first in (SEARCH, FINAL) for s in range(5)]
    reported = [setting.draw(cell(seed=s)) for s in range(20)]
    assert not set(torch.cat(searched).tolist()) & set(torch.cat(reported).tolist())
    assert all(len(set(one.tolist())) == setting.count for one in searched + reported)


def labels(monkeypatch: pytest.MonkeyPatch, seed: int) -> list[Tensor]:
    """Returns the labels that a network is trained on, one tensor per task."""
    setting = Memorise("digits", quick=True)
    setting.epochs = 2
    x = setting.images.normalise(setting.images.x_train)[setting.draw(cell(seed=seed))]
    seen: list[tuple[Tensor, Tensor]] = []
    loss = torch.nn.functional.cross_entropy

    class Watching(torch.nn.Sequential):
        def forward(self, batch: Tensor) -> Any:
            self.batch = batch
            return super().forward(batch)

    build = setting.build
    models: list[Watching] = []

    def built(norm: bool) -> Watching:
        models.append(Watching(build(norm)))
        return models[-1]

    def watched(logits: Tensor, y: Tensor) -> Tensor:
        seen.append((models[-1].batch, y))
        return loss(logits, y)

    monkeypatch.setattr(setting, "build", built)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", watched)
    setting.run(cell(seed=seed))
    monkeypatch.undo()
    told = []
    steps = len(seen) // setting.tasks
    for task in range(setting.tasks):
        parts = seen[task * steps : (task + 1) * steps]
        images, y = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        index = torch.cdist(x, images).topk(setting.epochs, largest=False).indices.sort().values
        # An image has the same label in every epoch of a task.
        assert torch.equal(y[index[:, 0]], y[index[:, 1]])
        torch.testing.assert_close(images[index[:, 0]], x)
        told.append(y[index[:, 0]])
    return told


def test_the_labels_of_every_task_and_seed_are_new(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = labels(monkeypatch, 0), labels(monkeypatch, 1)
    for one, other in [(first[0], first[1]), (first[1], first[2]), (first[0], second[0])]:
        # About 16 of 160 labels agree, with a deviation of 3.8.
        assert 1 <= int((one == other).sum()) <= 35
    assert all(torch.equal(a, b) for a, b in zip(first, labels(monkeypatch, 0), strict=True))


def test_labels_are_fitted_only_by_training() -> None:
    setting = Memorise("digits", quick=True)
    setting.tasks, setting.epochs = 1, 60
    assert setting.run(cell(lr=3e-3)).metrics["first"] > 90
    setting.epochs = 1
    assert setting.run(cell(lr=0.0)).metrics["first"] < 25


def test_the_first_round_of_the_search_is_shorter_than_the_second() -> None:
    setting = Memorise("digits", quick=True)
    lengths = [
        len(setting.run(cell(seed=seed)).curves["accuracies"]) for seed in (SEARCH, FINAL, 0)
    ]
    assert lengths == [setting.first_round, setting.tasks, setting.tasks]


def test_diverged_network_gets_chance_accuracy() -> None:
    setting = Memorise("digits", quick=True)
    setting.tasks = 2
    metrics, _ = setting.run(cell(lr=1e38))
    assert metrics["accuracy"] == 10
    assert math.isnan(metrics["kappa_worst"])


@pytest.mark.slow
def test_it_writes_a_table_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "_settings", {})
    argv = ["reproduce", "memorise", "--quick", "--workers", "1", "--out", str(tmp_path)]
    assert main(argv) == 0
    assert "Random labels" in capsys.readouterr().out
    assert (tmp_path / "memorise.png").stat().st_size > 10_000


def test_lines_have_distinct_colours_and_the_baseline_is_grey() -> None:
    shown = figures.select_lines(dict.fromkeys(METHODS, 0.0))
    colours = figures.colours(shown)
    assert len(set(colours)) == len(shown) == 7
    assert colours[shown.index("none")] == figures.NOTHING
