"""Classification with noise: the matched comparisons, and the output of a small run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wellcond_experiments.data import Images, load
from wellcond_experiments.evidence import Evidence
from wellcond_experiments.grid import Runner
from wellcond_experiments.settings import classify
from wellcond_experiments.settings.classify import TEST_NOISES, Classify


def classified(method: str, strength: float, clean: float, noisy: float, sigma: float) -> Any:
    metrics = {"accuracy_0": clean, "accuracy_2": noisy, "sigma_max": sigma, "kappa": 2.0}
    cell = {"case": "", "method": method, "strength": strength, "lr": 0.1, "seed": 0}
    return {**cell, "search": False, "metrics": metrics, "curves": {}}


def of(runs: list[Any]) -> tuple[Classify, Evidence]:
    """Makes a setting with only these methods and strengths."""
    setting = Classify("digits")
    setting.methods = {}
    for run in runs:
        known = setting.methods.get(run["method"], ())
        setting.methods[run["method"]] = (*known, run["strength"])
    return setting, Evidence({"runs": runs, "chosen": [], "seeds": 1})


def test_matched_clean_accuracy_costs_each_method_the_same() -> None:
    setting, found = of(
        [
            classified("none", 0.0, 97.0, 50.0, 8.0),
            classified("tikhonov", 0.01, 93.0, 70.0, 1.0),
            classified("condition-gradient", 0.01, 96.5, 55.0, 4.0),
            classified("condition-gradient", 0.1, 96.2, 60.0, 2.0),
            classified("condition-gradient", 1.0, 95.8, 58.0, 1.0),
            classified("condition", 1.0, 97.0, 49.0, 8.0),
        ]
    )
    # Tikhonov reaches 96 at a quarter of the first interval. A decreasing path gives none.
    assert [row[:4] for row in setting.matched_accuracy(found).rows] == [
        ["baseline", "0", "97.0", "50.0"],
        ["Tikhonov", "0 to 0.01", "96.0", "55.0"],
        ["ConditionPenalty, in the loss", "0.1", "96.2", "60.0"],
        ["ConditionPenalty, attached", "0", "97.0", "50.0"],
    ]


def test_matched_norm_interpolates_in_log_sigma() -> None:
    setting, found = of(
        [
            classified("none", 0.0, 97.0, 50.0, 8.0),
            classified("tikhonov", 0.01, 90.0, 61.0, 4.0),
            classified("tikhonov", 0.1, 90.0, 62.0, 1.0),
            classified("condition-gradient", 0.01, 96.5, 70.0, 2.0),
            classified("condition-gradient", 0.1, 96.1, 80.0, 0.5),
            classified("condition", 1.0, 97.0, 52.0, 4.0),
            classified("condition", 10.0, 97.0, 54.0, 2.0),
        ]
    )
    # On a log scale, 4 is midway from 8 to 2, and 1 from 2 to 0.5; no proximal run reaches 1.
    rows = setting.matched_norm(found).rows
    assert [row[2:] for row in rows] == [["61.0", "60.0", "52.0"], ["62.0", "75.0", "outside"]]


class Template(nn.Module):
    """A classifier that returns the label of the nearest image."""

    def __init__(self, images: Images) -> None:
        super().__init__()
        self.x, self.y = images.normalise(images.x_test), images.y_test

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(self.y[torch.cdist(x, self.x).argmin(1)], 10).float()


def test_accuracy_is_perfect_without_noise_and_decreases_with_noise() -> None:
    images = load("digits")
    found = list(classify.accuracies(Template(images), images).values())
    assert found[0] == 100
    assert found == sorted(found, reverse=True)
    assert found[-1] > 10  # better than chance


def test_every_strength_is_reported_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = load("digits")
    x, y = digits.x_train, digits.y_train
    few = Images("digits", 8, x[:192], y[:192], x[192:256], y[192:256])
    monkeypatch.setattr(classify, "load", lambda source: few)
    init = Classify.__init__

    def smaller(self: Classify, *args: object) -> None:
        init(self, *args)  # type: ignore[arg-type]
        self.width, self.epochs = 32, 1

    monkeypatch.setattr(Classify, "__init__", smaller)
    setting = Classify("digits", True, 2)
    document = Runner(setting, tmp_path, 1, overwrite=False).results()
    assert len(document["runs"]) == 2 * (1 + 3 * 4)
    # All output comes from the document.
    monkeypatch.delattr(classify, "load")
    found, fresh = Evidence(document), Classify.of(document)
    for run in found.runs.to_dict("records"):
        assert len(run["epochs"]) == len(run["kappas"]) == len(run["sigmas"])
        assert run["kappas"][-1] == pytest.approx(run["kappa"], rel=1e-5)
        assert all(0 <= run[f"accuracy_{noise:g}"] <= 100 for noise in TEST_NOISES)
    tables = fresh.tables(found)
    assert len(tables["accuracy"].rows) == 1 + 3 * 4
    assert set(tables) == {"accuracy", "matched-accuracy", "matched-norm"}
    assert set(fresh.figures(found)) == {
        *("classify-accuracy", "classify-matched", "classify-training"),
    }
