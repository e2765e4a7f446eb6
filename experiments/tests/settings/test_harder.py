"""Corruptions, image sizes of the networks, and the data of the search."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from wellcond.cli import main
from wellcond_experiments import figures, grid
from wellcond_experiments.data import Images, load
from wellcond_experiments.grid import FINAL, SEARCH, Cell
from wellcond_experiments.methods import METHODS, condition_numbers, run_seeded
from wellcond_experiments.settings import harder
from wellcond_experiments.settings.harder import BatchNorm, Plain, ViT


@pytest.fixture
def x() -> Tensor:
    return torch.rand(50, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def images(side: int, channels: int) -> Images:
    x, y = torch.zeros(2, channels * side**2), torch.zeros(2)
    return Images("black", side, x, y, x, y, channels)


# --- corruptions ----------------------------------------------------------------------------------


def test_noise_has_its_deviation_and_is_reproducible(x: Tensor) -> None:
    noise = harder.add_noise(x, 0.2) - x
    assert torch.equal(harder.add_noise(x, 0.2) - x, noise)
    # 21,600 numbers: the standard errors of mean and deviation are 0.0014 and 0.001.
    assert abs(float(noise.mean())) < 0.005
    assert float(noise.std()) == pytest.approx(0.2, abs=0.004)


def test_blur_of_a_point_is_a_gaussian() -> None:
    point = torch.zeros(1, 2, 17, 17)
    point[..., 8, 8] = 1
    away = torch.arange(17) - 8
    for deviation in (1.0, 2.0):
        density = torch.exp(-(away[:, None] ** 2 + away**2) / (2 * deviation**2))
        expected = (density / density.sum()).expand_as(point)
        # The Gaussian is cut off at three deviations.
        torch.testing.assert_close(harder.blur(point, deviation), expected, atol=1e-3, rtol=0.02)


def test_blur_keeps_constant_images_and_does_not_mix_channels(x: Tensor) -> None:
    plain = x[:, :, :1, :1].expand_as(x)
    torch.testing.assert_close(harder.blur(plain, 2.0), plain)
    one = torch.stack([harder.blur(x[:, c : c + 1], 1.0)[:, 0] for c in range(3)], 1)
    torch.testing.assert_close(harder.blur(x, 1.0), one)


def test_contrast_keeps_the_mean_of_every_image(x: Tensor) -> None:
    faded = harder.fade(x, 0.3)
    torch.testing.assert_close(faded.mean((1, 2, 3)), x.mean((1, 2, 3)))
    torch.testing.assert_close(faded.std((1, 2, 3)), 0.3 * x.std((1, 2, 3)))


def test_a_shift_moves_by_an_eighth_at_most_and_mirrors_half() -> None:
    x = torch.zeros(400, 2, 16, 16)
    x[:, 0, 5, 3], x[:, 1, 5, 3] = 1, 2
    moved = harder.shift(x, torch.Generator().manual_seed(0))
    assert moved.shape == x.shape
    torch.testing.assert_close(moved.sum((2, 3)), x.sum((2, 3)))  # the channels move together
    rows, columns = (moved[:, 0] == 1).nonzero()[:, 1:].T
    assert set(rows.tolist()) == set(range(3, 8))
    assert set(columns.tolist()) == {*range(1, 6), *range(10, 15)}
    assert 150 < int((columns > 8).sum()) < 250


# --- networks and training ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Plain, BatchNorm, ViT])
def test_networks_accept_any_side_from_8_on(kind: type[harder.Harder]) -> None:
    for side, channels, norm in ((8, 1, False), (11, 3, True), (32, 3, False)):
        setting = kind(quick=True)
        setting.images = images(side, channels)
        assert setting.build(norm)(torch.zeros(2, channels, side, side)).shape == (2, 10)


def test_normalised_networks_contain_normalisation() -> None:
    counts = {}
    for kind, norm in ((Plain, False), (Plain, True), (BatchNorm, False)):
        setting = kind(quick=True)
        setting.images = images(8, 1)
        modules = list(setting.build(norm).modules())
        for layer in (nn.GroupNorm, nn.BatchNorm2d):
            counts[kind, norm, layer] = sum(isinstance(m, layer) for m in modules)
    assert list(counts.values()) == [0, 0, 8, 0, 0, 8]


def test_training_is_adam_with_a_rate_that_rises_and_falls() -> None:
    def build(norm: bool) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 10))

    source = torch.Generator().manual_seed(0)
    x, y = torch.rand(40, 1, 4, 4, generator=source), torch.arange(40) % 10
    training = METHODS["none"](build, 0.0, 0.1, 7)
    assert harder.fit(training, x, y, epochs=5, batch=10) >= 0
    assert not training.model.training
    model = run_seeded(lambda: build(False), 7)
    optimizer = torch.optim.Adam(model.parameters())
    order = torch.Generator().manual_seed(7)
    indices = [part for _ in range(5) for part in torch.randperm(40, generator=order).split(10)]
    rates = [0.05, 0.1, *(0.1 * (1 - step / 20) / 0.9 for step in range(2, 20))]
    for part, rate in zip(indices, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
    for found, expected in zip(training.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_training_with_nan_stops() -> None:
    x = torch.full((20, 1, 8, 8), math.inf)
    training = METHODS["none"](lambda norm: harder.transformer(images(8, 1)), 0.0, 0.1, 0)
    before = [p.clone() for p in training.model.parameters()]
    harder.fit(training, x, torch.zeros(20, dtype=torch.int64), epochs=1, batch=10)
    assert all(map(torch.equal, before, training.model.parameters()))
    assert math.isnan(harder.largest([1.0, math.nan, 2.0]))


# --- settings -------------------------------------------------------------------------------------


def small() -> Plain:
    setting = Plain(quick=True)
    setting.samples, setting.epochs = 128, 2
    return setting


def test_the_search_never_sees_test_images() -> None:
    cell = Cell("", "none", 0.0, 1e-3, SEARCH, search=True)
    setting = small()
    found = setting.run(cell).metrics["accuracy"]
    blind = small()
    blind.images = replace(load("digits"), x_test=torch.full((360, 64), math.nan))
    assert blind.run(cell).metrics["accuracy"] == found
    reports = [replace(cell, seed=seed, search=False) for seed in (0, 1)]
    _, (validated, _) = setting.parts(cell)
    (one, _), (tested, _) = setting.parts(reports[0])
    (other, _), _ = setting.parts(reports[1])
    assert not torch.equal(one, other)
    assert torch.equal(tested, setting.images.x_test)
    assert len(validated) == 1437 // 6
    setting.samples = 10_000
    (most, _), _ = setting.parts(reports[0])
    assert len(most) + len(validated) == 1437


def test_the_second_round_of_the_search_has_full_length(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    setting = small()
    setting.epochs = 6
    monkeypatch.setattr(harder, "fit", lambda t, x, y, epochs, *rest: lengths.append(epochs) or 0.0)
    for seed in (SEARCH, FINAL):
        setting.run(Cell("", "none", 0.0, 1e-3, seed, search=True))
    assert lengths == [2, 6]


def test_reported_curves_cover_every_layer() -> None:
    metrics, curves = small().run(Cell("", "condition-limit", 2.0, 1e-3, 0))
    assert len(curves["kappa"]) == len(curves["sigma_max"]) == 9
    assert metrics["kappa_worst"] == max(curves["kappa"]) <= 2
    kinds = [metrics[name] for name in ("noise", "blur", "contrast")]
    assert metrics["corrupted"] == pytest.approx(sum(kinds) / 3)
    assert metrics["noise"] == pytest.approx(sum(curves["noise_levels"]) / 2)


@pytest.mark.parametrize("kind", [Plain, BatchNorm, ViT])
def test_layer_names_are_in_order(kind: type[harder.Harder]) -> None:
    setting = kind(quick=True)
    setting.images = images(8, 1)
    found = list(condition_numbers(setting.build(False)))
    assert len(found) == len(setting.layers) == len(set(setting.layers))
    ends = {"up": ".0", "down": ".2"} | {part: f".{part}" for part in harder.PARTS[:4]}
    for path, layer in zip(found, setting.layers, strict=True):
        assert path.endswith(ends.get(layer.split()[0], "")), (path, layer)


def test_condition_numbers_are_drawn_per_layer() -> None:
    rows = {"isometry": [1.0, 2.0], "none": [math.inf, 1e9], "l2": [math.nan, 40.0]}
    drawing = figures.draw_layers(rows, ("first", "last"))
    panel = drawing.axes[0]
    (mesh,) = panel.collections
    values = mesh.get_array()
    assert values.shape == (3, 2)
    # The first is at the top; infinite and huge values look the same, nan is not drawn.
    assert values[2].tolist() == [1.0, 2.0]
    assert values[1, 0] == values[1, 1] == mesh.norm.vmax > figures.HUGE
    assert values.mask.tolist() == [[True, False], [False, False], [False, False]]
    assert [tick.get_text() for tick in panel.get_yticklabels()][::-1] == [
        figures.label(method) for method in rows
    ]
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["first", "last"]


@pytest.mark.slow
def test_batch_norm_learns_and_writes_all_outputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--quick", "--seeds", "1", "--workers", "1", "--out", str(tmp_path))
    assert main(["reproduce", "cifar10-batch-norm", *arguments]) == 0
    assert "eight convolutions with batch norm" in capsys.readouterr().out
    assert (tmp_path / "cifar10-batch-norm.png").is_file()
    assert (tmp_path / "cifar10-batch-norm-kappa.png").is_file()
    document = grid.read(tmp_path / "results.json")
    assert {c["method"] for c in document["chosen"]} == {"l2", "isometry"}
    reported = [run["metrics"] for run in document["runs"] if not run["search"]]
    assert len(reported) == 3
    for metrics in reported:
        assert metrics["accuracy"] > 50  # chance is 10
        assert metrics["accuracy"] > metrics["blur"]
