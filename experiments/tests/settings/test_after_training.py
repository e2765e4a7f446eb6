"""Projection after training and limit during training: limits hold, all else is equal."""

from pathlib import Path
from typing import Any

import pytest
import torch

from wellcond.cli import main
from wellcond_experiments import grid
from wellcond_experiments.data import Images
from wellcond_experiments.evidence import Evidence
from wellcond_experiments.grid import Cell
from wellcond_experiments.settings import after_training
from wellcond_experiments.settings.after_training import NETS, AfterTraining, projection_key

TESTED = ("accuracy", "in_noise", "kappa_worst")


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> AfterTraining:
    nets = {case: net._replace(batch=64) for case, net in NETS.items()}
    monkeypatch.setattr(after_training, "NETS", nets)
    setting = AfterTraining(quick=True)
    setting.limits = (1e9, 5.0)
    return setting


def run(setting: AfterTraining, case: str, method: str, strength: float) -> dict[str, float]:
    return setting.run(Cell(case, method, strength, 1e-3, 0)).metrics


@pytest.mark.slow
@pytest.mark.parametrize("case", NETS)
def test_limits_hold_and_an_inactive_limit_has_no_effect(setting: AfterTraining, case: str) -> None:
    none = run(setting, case, "none", 0.0)
    assert none["kappa_worst"] > 20
    assert none["accuracy"] > 30  # chance is 10
    assert none[projection_key("kappa_worst", 5)] <= 5
    assert none[projection_key("train_seconds", 5)] > none["train_seconds"]
    free, limited = (run(setting, case, "condition-limit", K) for K in (1e9, 5.0))
    assert 3.6 < limited["kappa_worst"] <= 5  # a watched weight is projected to 1 + (5 - 1)/1.5
    for name in TESTED:
        assert none[projection_key(name, 1e9)] == free[name] == none[name]


def test_every_network_has_its_weights_tested() -> None:
    """The largest κ can be that of a kernel, and the wide layers are square."""
    x, y = torch.zeros(2, 3 * 32**2), torch.zeros(2)
    images = Images("black", 32, x, y, x, y, channels=3)
    inputs = torch.zeros(2, 3, 32, 32)
    for case, name, side in (("mlp", "3.weight", 512), ("cnn", "10.weight", 1024)):
        net = NETS[case].build(images)
        assert net(inputs).shape == (2, 10)
        assert net.get_parameter(name).shape == (side, side)
    images = Images("black", 8, x[:, :64], y, x[:, :64], y)
    net = NETS["cnn"].build(images)
    torch.nn.init.ones_(net.get_parameter("0.weight"))
    inputs = torch.zeros(2, 1, 8, 8)
    assert after_training.measure_accuracy(net, (inputs, inputs), y)["kappa_worst"] == float("inf")


def made_up(setting: AfterTraining, kappa: float) -> Evidence:
    """Makes results: a projection to 5 costs 10 points, a limit 1 point; both end at this κ."""
    runs: list[dict[str, Any]] = []
    for cell in setting.report_cells({}):
        right = 90.0 + cell.seed
        metrics = {"accuracy": right, "in_noise": 50.0, "kappa_worst": 1e3, "train_seconds": 2.0}
        if cell.method == "none":
            for K, lost in ((1e9, 0.0), (5.0, 10.0)):
                of_copy = metrics | {"accuracy": right - lost, "kappa_worst": kappa}
                metrics |= {projection_key(k, K): v for k, v in of_copy.items() if k in of_copy}
        elif cell.method == "condition-limit":
            metrics |= {"accuracy": right - 1, "kappa_worst": kappa, "train_seconds": 4.0}
        runs.append(vars(cell) | {"metrics": metrics, "curves": {}})
    return Evidence({"runs": runs, "chosen": [], "seeds": 2})


def test_tables_pair_the_seeds_and_an_exceeded_limit_fails(setting: AfterTraining) -> None:
    setting.methods |= {"condition-limit": setting.limits}
    evidence = made_up(setting, kappa=5.0)
    assert not setting.failed(evidence)
    assert setting.failed(made_up(setting, kappa=5.1))
    tables = setting.tables(evidence)
    assert tables.keys() == NETS.keys()
    none, *_, at_5, _, limited, _, _ = tables["mlp"].rows
    assert none[0] == "baseline"
    assert at_5[:2] == ["projected after training", "5"]
    assert at_5[3] == "-10.00 ± 0.00"
    assert limited[:2] == ["limited during training", "5"]
    assert limited[3] == "-1.00 ± 0.00"
    assert limited[6] == "+9.00 ± 0.00"
    assert limited[-1] == "2"
    (drawing,) = setting.figures(evidence).values()
    assert len(drawing.axes) == 3


def test_all_cells_are_reported_without_a_search() -> None:
    setting = AfterTraining(seeds=5)
    assert setting.search_cells() == []
    assert len({cell.name for cell in setting.report_cells({})}) == 3 * (1 + 6 + 2) * 5
    assert setting.settings()["cnn_data"] == "cifar10"
    assert AfterTraining.of({"settings": setting.settings(), "seeds": 5}).data == ""


@pytest.mark.slow
def test_a_quick_run_writes_all_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(AfterTraining, "cases", ("mlp",))
    monkeypatch.setattr(grid, "_settings", {})
    arguments = ("--quick", "--seeds", "1", "--workers", "1", "--out", str(tmp_path))
    assert main(["reproduce", "after-training", *arguments]) == 0
    assert "limited during training" in capsys.readouterr().out
    assert (tmp_path / "after-training.png").is_file()
    assert len(grid.read(tmp_path / "results.json")["runs"]) == 6
