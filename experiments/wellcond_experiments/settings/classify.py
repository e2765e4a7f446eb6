"""Classification of noisy images by a network trained on clean images: the paper's experiment.

A network with one hidden layer and sigmoids. The penalty applies to the first layer only. A small
spectral norm may by itself explain robustness to noise. Therefore the methods are also compared at
equal clean accuracy and at equal σ₁.
"""

from __future__ import annotations

import itertools
import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from wellcond_experiments import figures
from wellcond_experiments.data import Images, load
from wellcond_experiments.evidence import Evidence
from wellcond_experiments.grid import Cell, Measured, Swept
from wellcond_experiments.methods import condition_numbers, spectral_norms
from wellcond_experiments.paper import LOOKS, REGULARISED, PaperTraining
from wellcond_experiments.tables import Table, number

TEST_NOISES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
STRENGTHS = (1e-3, 1e-2, 0.1, 1.0)
# Adam rescales the gradient of the loss to its own step. The length of a proximal step is
# lr · strength, so at the same strengths it would have no effect here.
PROXIMAL_STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
DRAWS = 5
CLEAN, NOISY, AT = "accuracy_0", "accuracy_2", 2  # where methods are compared
FIRST = "0"
Point = tuple[str, float]  # method and strength


class Classify(Swept):
    name = "classify"
    help = "classification of noisy images"
    protocol = (
        "784-1024-10 with sigmoids, Adam 1e-4, trained on clean normalised images and tested with "
        "noise; the penalty applies to the first layer."
    )

    def __init__(self, data: str = "", quick: bool = False, seeds: int | None = None) -> None:
        super().__init__(data, quick, seeds)
        small = self.data == "digits"
        self.width, self.rates = (256, (1e-3,)) if small else (1024, (1e-4,))
        self.epochs = (5 if small else 1) if quick else 30 if small else 6
        self.methods = {"none": (0.0,)} | dict.fromkeys(REGULARISED, STRENGTHS)
        self.methods["condition"] = PROXIMAL_STRENGTHS

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "width": self.width,
            "lr": self.rates[0],
            "epochs": self.epochs,
        }

    @cached_property
    def images(self) -> Images:
        return load(self.data)

    def build(self) -> nn.Module:
        hidden = nn.Linear(self.images.pixels, self.width)
        return nn.Sequential(hidden, nn.Sigmoid(), nn.Linear(self.width, 10))

    def run(self, cell: Cell) -> Measured:
        images = self.images
        x, y = images.normalise(images.x_train), images.y_train
        by_weight = {f"{FIRST}.weight": cell.strength}
        training = PaperTraining(self.build, cell.method, by_weight, cell.lr, cell.seed)

        def loss(indices: Tensor) -> Tensor:
            return nn.functional.cross_entropy(training.model(x[indices]), y[indices])

        curves: dict[str, list[float]] = {"epochs": [], "kappas": [], "sigmas": []}
        for epochs in training.learn(loss, len(x), self.epochs, looks=1):
            curves["epochs"].append(epochs)
            curves["kappas"].append(condition_numbers(training.model)[FIRST])
            curves["sigmas"].append(spectral_norms(training.model)[FIRST])
        metrics = {"kappa": curves["kappas"][-1], "sigma_max": curves["sigmas"][-1]}
        return Measured(metrics | accuracies(training.model, images), curves)

    def points(self) -> list[Point]:
        return [(method, s) for method, strengths in self.methods.items() for s in strengths]

    def note(self, evidence: Evidence) -> str:
        return (
            f"{super().note(evidence)} The proximal step uses other strengths: its length is "
            "lr · strength, whereas Adam rescales the gradient of the loss."
        )

    def tables(self, evidence: Evidence) -> dict[str, Table]:
        rows = [
            [figures.label(method), f"{strength:g}" if strength else ""]
            + [
                str(evidence.band(metric, log=True, method=method, strength=strength))
                for metric in ("kappa", "sigma_max")
            ]
            + [
                evidence.band(f"accuracy_{n:g}", method=method, strength=strength).fixed(1)
                for n in TEST_NOISES
            ]
            for method, strength in self.points()
        ]
        header = ["method", "strength", "κ", "σ₁", *(f"% at noise {n:g}" for n in TEST_NOISES)]
        title = (
            f"Accuracy in per cent by noise on normalised pixels, mean of {DRAWS} draws; κ and "
            "σ₁ of the first layer"
        )
        return {
            "accuracy": Table(title, header, rows),
            "matched-accuracy": self.matched_accuracy(evidence),
            "matched-norm": self.matched_norm(evidence),
        }

    def matched_accuracy(self, evidence: Evidence) -> Table:
        """Tables, per method, the best noisy accuracy at a cost of at most one clean point.

        If one of two neighbouring strengths costs more and the other less, both accuracies and
        log κ are interpolated to a cost of one point, so the grid does not decide the comparison.
        """

        def measured(point: Point) -> tuple[float, float, float]:
            noisy, clean, kappa = (mean(evidence, m, point) for m in (NOISY, CLEAN, "kappa"))
            return noisy, clean, math.log(kappa)

        nothing = ("none", 0.0)
        floor = measured(nothing)[1] - 1
        rows = []
        for method in self.methods:
            path = [nothing, *(p for p in self.points() if p[0] == method != "none")]
            found = [(*measured(p), f"{p[1]:g}") for p in path if measured(p)[1] >= floor]
            for first, second in itertools.pairwise(path):
                here, there = measured(first), measured(second)
                if (here[1] - floor) * (there[1] - floor) < 0:
                    share = (here[1] - floor) / (here[1] - there[1])
                    noisy, clean, log = (
                        x + share * (y - x) for x, y in zip(here, there, strict=True)
                    )
                    found.append((noisy, clean, log, f"{first[1]:g} to {second[1]:g}"))
            noisy, clean, log, strength = max(found)
            cells = [f"{clean:.1f}", f"{noisy:.1f}", number(math.exp(log))]
            rows.append([figures.label(method), strength, *cells])
        title = (
            f"At matched clean accuracy: the best accuracy at noise {AT} that costs at most one "
            "point of clean accuracy (interpolated between strengths)"
        )
        return Table(title, ["method", "strength", "clean, %", f"noise {AT}, %", "κ"], rows)

    def matched_norm(self, evidence: Evidence) -> Table:
        """Tables the noisy accuracy of every method at the σ₁ of each Tikhonov run."""
        others = REGULARISED[1:]
        rows = []
        for strength in self.methods["tikhonov"]:
            sigma, accuracy = (
                mean(evidence, metric, ("tikhonov", strength)) for metric in ("sigma_max", NOISY)
            )
            found = [self._at_norm(evidence, method, sigma) for method in others]
            rows.append([f"{strength:g}", number(sigma), f"{accuracy:.1f}", *found])
        title = (
            f"At matched σ₁: accuracy at noise {AT} and the σ₁ of a Tikhonov run "
            "(interpolated in log σ₁; outside: no run reaches this σ₁)"
        )
        names = [f"{figures.label(method)}, %" for method in ("tikhonov", *others)]
        return Table(title, ["Tikhonov strength", "σ₁", *names], rows)

    def _at_norm(self, evidence: Evidence, method: str, sigma: float) -> str:
        path = [("none", 0.0), *((method, strength) for strength in self.methods[method])]
        points = sorted(
            (mean(evidence, "sigma_max", point), mean(evidence, NOISY, point)) for point in path
        )
        for (low, first), (high, second) in itertools.pairwise(points):
            if 0 < low <= sigma <= high:
                share = math.log(sigma / low) / math.log(high / low) if high > low else 0.0
                return f"{first + share * (second - first):.1f}"
        return "outside"

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        return {
            "classify-accuracy": self._accuracy(evidence),
            "classify-matched": self._matched(evidence),
            "classify-training": self._training(evidence),
        }

    def _shade(self, method: str, strength: float) -> float:
        """Returns the opacity of a curve, which increases with the strength."""
        strengths = self.methods[method]
        return (1 + strengths.index(strength)) / len(strengths)

    def _accuracy(self, evidence: Evidence) -> Any:
        """Draws accuracy against noise, one panel per method."""
        drawing, panels = figures.figure(columns=3, width=4.2, height=3.8)
        for panel, method in zip(panels, REGULARISED, strict=True):
            for name, strength in self.points():
                if name in ("none", method):
                    panel.plot(
                        TEST_NOISES,
                        [mean(evidence, f"accuracy_{n:g}", (name, strength)) for n in TEST_NOISES],
                        color=LOOKS[name].colour,
                        alpha=self._shade(name, strength),
                        marker=LOOKS[name].marker,
                        label="none" if name == "none" else f"{strength:g}",
                    )
            xlabel = "noise on normalised pixels"
            panel.set(title=figures.label(method), xlabel=xlabel, ylim=(0, 101))
            panel.legend(title="strength", fontsize=8, frameon=False)
        panels[0].set_ylabel("accuracy, %")
        return drawing

    def _matched(self, evidence: Evidence) -> Any:
        """Draws noisy accuracy against clean accuracy, σ₁ and κ, one line per method.

        Strong Tikhonov falls to chance. Points far below all other methods are not shown, only
        counted in the legend.
        """
        drawing, panels = figures.figure(columns=3, width=4.2, height=3.8)
        best = max(mean(evidence, NOISY, point) for point in self.points())
        worst = min(mean(evidence, NOISY, p) for p in self.points() if p[0] != "tikhonov")
        floor = worst - 0.5 * (best - worst) - 0.5
        axes = {
            CLEAN: "clean accuracy, %",
            "sigma_max": "σ₁ of the first layer",
            "kappa": "κ of the first layer",
        }
        for panel, (metric, name) in zip(panels, axes.items(), strict=True):
            for method, look in LOOKS.items():
                # Every line starts at the baseline.
                points = [p for p in self.points() if p[0] in ("none", method)]
                shown = [point for point in points if mean(evidence, NOISY, point) >= floor]
                hidden = len(points) - len(shown)
                across = [mean(evidence, metric, point) for point in shown]
                bands = [evidence.band(NOISY, method=m, strength=s) for m, s in shown]
                panel.errorbar(
                    across,
                    [band.mean for band in bands],
                    yerr=[(band.high - band.low) / 2 for band in bands],
                    color=look.colour,
                    marker=look.marker,
                    ls=look.line,
                    lw=1.2,
                    zorder=3 if method == "none" else 2,
                    label=figures.label(method)
                    + (f" ({hidden} lower, not shown)" if hidden else ""),
                )
            panel.set_xlabel(name)
        for panel in panels[1:]:
            panel.set_xscale("log")
            figures.use_logarithm(panel.xaxis)
        panels[0].set_ylabel(f"accuracy at noise {AT}, %")
        # The place that matplotlib chooses may cover error bars.
        panels[0].legend(fontsize=8, frameon=False, loc="lower left")
        return drawing

    def _training(self, evidence: Evidence) -> Any:
        """Draws κ and σ₁ of the first layer over the epochs, for the first seed."""
        drawing, (left, right) = figures.figure(columns=2)
        for method, strength in self.points():
            (run,) = evidence.where(method=method, strength=strength, seed=0).to_dict("records")
            look = LOOKS[method]
            # The legend lists each method once, for its strongest run.
            strongest = strength == self.methods[method][-1]
            style: dict[str, Any] = {
                "color": look.colour,
                "alpha": self._shade(method, strength),
                "ls": look.line,
                "label": figures.label(method) if strongest else None,
            }
            left.plot(run["epochs"], [figures.cap(k) for k in run["kappas"]], **style)
            right.plot(run["epochs"], run["sigmas"], **style)
        left.set(xlabel="epoch", ylabel="κ of the first layer")
        figures.draw_condition_numbers(left)
        right.set(xlabel="epoch", ylabel="σ₁ of the first layer", yscale="log")
        figures.use_logarithm(right.yaxis)
        left.legend(fontsize=8, frameon=False, title="darker: stronger")
        return drawing


@torch.no_grad()
def accuracies(model: nn.Module, images: Images) -> dict[str, float]:
    """Returns accuracies in per cent on the entire test set, averaged over draws of the noise."""
    x, y = images.normalise(images.x_test), images.y_test
    source = torch.Generator().manual_seed(2024)
    found = {}
    for noise in TEST_NOISES:
        draws = DRAWS if noise else 1
        right = 0
        for _ in range(draws):
            noisy = x + noise * torch.randn(x.shape, generator=source)
            right += int((model(noisy).argmax(1) == y).sum())
        found[f"accuracy_{noise:g}"] = 100 * right / (draws * len(y))
    return found


def mean(evidence: Evidence, metric: str, point: Point) -> float:
    method, strength = point
    log = metric in ("kappa", "sigma_max")
    return evidence.band(metric, log, method=method, strength=strength).mean
