"""`bench when`: every way on the same batches, limits that hold, and nets on images in colour."""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from wellcond import cli
from wellcond.experiments import bench_when, data
from wellcond.experiments.bench_when import ATTACHED, LIMITED, NONE, PROJECTED, TIKHONOV


def when(*arguments: object) -> int:
    return cli.main(["bench", "when", "--epochs", "1", *map(str, arguments)])


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    """Images of 8x8 whose red tells the label, and whose other channels say nothing."""
    source = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 300), ("test", 100)):
        y = source.integers(0, 10, count, dtype=np.uint8)
        x = source.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        x[..., 0] = 25 * y[:, None, None]
        arrays |= {f"x_{part}": x, f"y_{part}": y}
    path = tmp_path / "colour.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.slow
def test_limits_hold_and_start_from_the_same_net(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_when, "SOFT", [(ATTACHED, 1000.0), (TIKHONOV, 0.0)])
    arguments = ("--samples", 320, "--condition", "5,1e9", "--seeds", 2, "--json")
    assert when(*arguments) == 0
    document = json.loads(capsys.readouterr().out)
    runs = {(run["seed"], run["way"], run["strength"]): run for run in document["runs"]}
    assert len(runs) == len(document["runs"]) == 2 * (1 + 2 * 2 + 2)
    same = ("accuracy", "accuracy_in_noise", "kappa_worst", "kappa_square")
    for seed in range(2):
        none = runs[seed, NONE, 0.0]
        assert none["kappa_worst"] >= none["kappa_square"] > 20
        for way in (PROJECTED, LIMITED):
            assert 4.9 < runs[seed, way, 5.0]["kappa_square"] <= runs[seed, way, 5.0]["kappa_worst"]
            assert runs[seed, way, 5.0]["kappa_worst"] <= 5
        # What asks nothing leaves the net as it was trained without, on the same batches.
        for way, strength in ((PROJECTED, 1e9), (LIMITED, 1e9), (TIKHONOV, 0.0)):
            one = runs[seed, way, strength]
            assert [one[key] for key in same] == pytest.approx([none[key] for key in same])
        assert runs[seed, PROJECTED, 5.0]["cost"] > 1
        assert none["accuracy"] > none["accuracy_in_noise"] > 20  # 10 by chance
        penalised = runs[seed, ATTACHED, 1000.0]
        change = penalised["accuracy_in_noise"] - none["accuracy_in_noise"]
        assert penalised["kappa_square"] < none["kappa_square"]
        assert penalised["accuracy_in_noise_change"] == change != 0
    none, *_ = document["ways"]
    accuracies = [runs[seed, NONE, 0.0]["accuracy"] for seed in range(2)]
    assert accuracies[0] != accuracies[1]
    assert none["accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert none["accuracy"]["low"] < min(accuracies)
    assert document["settings"]["samples"] == 320


def test_the_convolutions_learn_colours_under_a_limit(
    coloured: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_when, "SOFT", [])
    arguments = ("--model", "cnn", "--data", coloured, "--condition", 3, "--epochs", 12)
    assert when(*arguments, "--json") == 0
    none, projected, limited = json.loads(capsys.readouterr().out)["runs"]
    assert none["kappa_worst"] >= none["kappa_square"] > 20
    for run in (projected, limited):
        assert run["kappa_worst"] <= 3
    assert min(none["accuracy"], limited["accuracy"]) > 30  # 10 by chance
    assert when(*arguments[:-1], 1) == 0
    table = capsys.readouterr().out
    assert "cnn on 300 images of cifar10" in table
    assert PROJECTED in table


def test_the_worst_weight_may_be_a_kernel(coloured: Path) -> None:
    arguments = argparse.Namespace(model="cnn", data=str(coloured), epochs=1, samples=9)
    task = bench_when._Task(arguments)
    net = task.model(seed=0)
    torch.nn.init.ones_(net.get_parameter("1.weight"))
    found = task.measured(net, task.noisy(seed=0))
    assert found["kappa_worst"] == math.inf
    assert 1 < found["kappa_square"] < 1e6


def test_the_square_layer_is_square() -> None:
    x, y = torch.zeros(1, 3 * 32**2), torch.zeros(1)
    images = data.Images("black", 32, x, y, x, y, channels=3)
    for name, side in (("mlp", 512), ("cnn", 1024)):
        net = bench_when.BUILD[name](images)
        assert net.get_parameter(bench_when.SQUARE[name]).shape == (side, side)
        assert net(x).shape == (1, 10)


def test_images_that_are_too_small_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y = np.zeros((4, 7, 7, 3), np.uint8), np.zeros(4, np.uint8)
    np.savez(tmp_path / "small.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    assert when("--model", "cnn", "--data", tmp_path / "small.npz") == 2
    assert "images of 8x8 at least, got side 7" in capsys.readouterr().err


def test_without_data_it_says_what_to_give(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WELLCOND_DATA", raising=False)
    assert when("--model", "cnn") == 2
    assert "CIFAR-10 is not downloaded" in capsys.readouterr().err


def test_what_is_no_limit_is_refused_before_training(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_when, "_Task", None)
    for limits in ("5,0.5", "5,a"):
        assert when("--condition", limits) == 2
    assert "must be at least 1, got 0.5" in capsys.readouterr().err
