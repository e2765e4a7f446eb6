"""Denoising: inputs and outputs, data of the search, and pictures of the results."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from wellcond_experiments.data import Images, load
from wellcond_experiments.evidence import Evidence
from wellcond_experiments.grid import Cell, Runner
from wellcond_experiments.settings import denoise
from wellcond_experiments.settings.denoise import (
    DEFAULT_LR,
    FIXED,
    IMAGES,
    OUTER,
    PICTURED,
    SNR,
    TUNED,
    Denoise,
)


def few() -> Images:
    """The digits, 192 for training and 64 for testing."""
    digits = load("digits")
    x, y = digits.x_train, digits.y_train
    return Images("digits", 8, x[:192], y[:192], x[192:256], y[192:256])


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> Images:
    images = few()
    monkeypatch.setattr(denoise, "load", lambda source: images)
    return images


class Recorder(nn.Module):
    """A model that records its inputs and returns zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return torch.zeros_like(x) + 0 * self.layers[0].weight.sum()


@pytest.mark.parametrize("case", SNR)
def test_noise_power_matches_the_signal_to_noise_ratio(
    case: str, few_images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Denoise("digits", quick=True)
    setting.epochs = 50
    recorder = Recorder()
    monkeypatch.setattr(setting, "build", lambda: recorder)
    setting.run(Cell(case, "none", 0.0, 1e-3, seed=1))
    noisy = torch.cat(recorder.seen[: 50 * 6])
    clean = few_images.normalise(few_images.x_train)
    assert float(clean.square().mean()) == pytest.approx(1, rel=1e-3)
    # The noise is independent of the signal, so the powers add, over 600,000 numbers.
    power = float(noisy.square().mean()) - float(clean.square().mean())
    assert power == pytest.approx(1 / SNR[case], rel=0.02)


def test_error_is_measured_against_the_clamped_image(few_images: Images) -> None:
    found = denoise.errors(Recorder(), few_images, sigma=0.5)
    reachable = few_images.normalise(few_images.x_test).clamp(0, 1)
    assert (
        found["error"] == found["error_at_0.5"] == pytest.approx(float(reachable.square().mean()))
    )
    assert found["psnr"] == pytest.approx(-10 * torch.tensor(found["error"]).log10().item())


def test_outer_weights_have_the_strong_penalty_of_the_paper(few_images: Images) -> None:
    setting = Denoise("digits")
    strengths = setting.by_weight(OUTER)
    assert list(strengths.values()) == pytest.approx([1e-2, 1e-4, 1e-4, 1e-2])
    weights = [name for name, p in setting.build().named_parameters() if p.ndim == 2]
    assert list(strengths) == weights


def small(monkeypatch: pytest.MonkeyPatch) -> type[Denoise]:
    """Makes the setting train for one epoch on few images."""
    init = Denoise.__init__

    def shorter(self: Denoise, *args: object) -> None:
        init(self, *args)  # type: ignore[arg-type]
        self.epochs = 1

    monkeypatch.setattr(Denoise, "__init__", shorter)
    return Denoise


def test_the_search_never_sees_the_test_images(
    few_images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested: list[Images] = []
    errors = denoise.errors

    def recorded(model: nn.Module, images: Images, sigma: float) -> dict[str, float]:
        tested.append(images)
        return errors(model, images, sigma)

    monkeypatch.setattr(denoise, "errors", recorded)
    setting = small(monkeypatch)("digits", True, 2)
    document = Runner(setting, tmp_path, 1, overwrite=False).results()
    searched = [images for images in tested if images is not few_images]
    runs = document["runs"]
    assert len(searched) == sum(run["search"] for run in runs) == 3 * 2
    assert len(tested) == len(runs)
    test = {tuple(image.tolist()) for image in few_images.x_test}
    for images in searched:
        assert len(images.x_train) + len(images.x_test) == len(few_images.x_train)
        assert test.isdisjoint(tuple(image.tolist()) for image in images.x_test)
    best = {c["method"]: c for c in document["chosen"]}
    for run in runs:
        if not run["search"] and run["method"] in best:
            assert run["strength"] == best[run["method"]]["strength"]
    for method, chosen in best.items():
        scores = [r["metrics"]["psnr"] for r in runs if r["search"] and r["method"] == method]
        assert chosen["score"] == max(scores)

    # All output comes from the document.
    monkeypatch.delattr(denoise, "load")
    fresh = Denoise.of(document)
    found = Evidence(document)
    strengths = sum(len(values) for values in FIXED.values())
    assert len(found.where(seed=0)) == strengths + 4
    for table in fresh.tables(found).values():
        assert len(table.rows) == strengths + 4
    assert set(fresh.figures(found)) == {"denoise-images", "denoise-errors", "denoise-kappa"}
    (alone,) = found.where(method="none", seed=0).to_dict("records")
    assert len(alone["clean"]) == len(alone["restored"]) == IMAGES * 64
    reachable = few_images.normalise(few_images.x_test[:IMAGES]).clamp(0, 1).flatten()
    torch.testing.assert_close(torch.tensor(alone["clean"]) / 100, reachable, atol=0.0051, rtol=0)


def test_the_full_grid_compares_every_method_at_every_ratio() -> None:
    setting = Denoise()
    reported = setting.report_cells({})
    assert {cell.case for cell in reported} == set(SNR)
    for case in SNR:
        methods = {cell.method for cell in reported if cell.case == case}
        assert methods == set(FIXED) | {method + TUNED for method in FIXED}
    fixed = {(c.method, c.strength, c.lr) for c in reported if c.method in FIXED}
    assert fixed == {(m, s, DEFAULT_LR) for m, strengths in FIXED.items() for s in strengths}
    searched = setting.search_cells()
    assert all(cell.search and cell.method.endswith(TUNED) for cell in searched)
    assert {cell.lr for cell in searched} > {DEFAULT_LR}
    assert PICTURED in SNR


@pytest.mark.slow
def test_denoising_beats_a_constant_output() -> None:
    setting = Denoise("digits")
    runs = {
        method: setting.run(Cell(PICTURED, method, strength, DEFAULT_LR, 1)).metrics
        for method, strength in (("none", 0.0), ("condition-gradient", OUTER))
    }
    # The error of the best constant output.
    reachable = setting.images.normalise(setting.images.x_test).clamp(0, 1)
    constant = float(reachable.var(0, correction=0).mean())
    for metrics in runs.values():
        assert metrics["error"] < 0.75 * constant
    assert runs["condition-gradient"]["kappa_1"] < runs["none"]["kappa_1"]
