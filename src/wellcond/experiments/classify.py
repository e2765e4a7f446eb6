"""Classification of noisy images by a network trained on clean ones: the paper's experiment.

A net of one hidden layer with sigmoids; the penalty is on the first layer only. Robustness to noise
may come from a small spectral norm alone, so the methods are also compared where their clean
accuracy, and where their sigma_1, are the same.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wellcond.experiments import _run, _training
from wellcond.experiments.data import Images, load

TEST_NOISES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
STRENGTHS = (1e-3, 1e-2, 0.1, 1.0)
# Adam rescales a gradient in the loss to its own step; a proximal step is lr * strength long as it
# stands, and at the same strengths would do nothing here.
PROXIMAL_STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
DRAWS = 5
COMPARED = 2.0  # the noise at which methods are compared
REGULARISED = _run.METHODS[1:]
FIRST = "0.weight"
Plan = list[tuple[str, float]]  # methods with their strengths


def strengths_of(method: str) -> tuple[float, ...]:
    return PROXIMAL_STRENGTHS if method == "condition-proximal" else STRENGTHS


class Setting(NamedTuple):
    """Images, width, epochs and learning rate of one experiment."""

    images: Images
    width: int
    epochs: int
    lr: float

    def build(self) -> nn.Module:
        hidden = nn.Linear(self.images.pixels, self.width)
        return nn.Sequential(hidden, nn.Sigmoid(), nn.Linear(self.width, 10))

    def recipe(self) -> _training.Recipe:
        x, y = self.images.normalised(self.images.x_train), self.images.y_train

        def loss(model: nn.Module, indices: Tensor, source: torch.Generator) -> Tensor:
            return nn.functional.cross_entropy(model(x[indices]), y[indices])

        return _training.Recipe(self.build, loss, len(x), self.epochs, self.lr)

    @torch.no_grad()
    def scores(self, model: nn.Module) -> dict[str, float]:
        """Accuracy in per cent over the whole test set, the mean of several draws of the noise."""
        x, y = self.images.normalised(self.images.x_test), self.images.y_test
        source = torch.Generator().manual_seed(2024)
        scores = {}
        for noise in TEST_NOISES:
            draws = DRAWS if noise else 1
            right = 0
            for _ in range(draws):
                noisy = x + noise * torch.randn(x.shape, generator=source)
                right += int((model(noisy).argmax(1) == y).sum())
            scores[str(noise)] = 100 * right / (draws * len(y))
        return scores


def configure(experiments: Any) -> None:
    parser: argparse.ArgumentParser = experiments.add_parser(
        "classify",
        help="classification of noisy images",
        description="Trains a classifier on clean images with each method and strength on the "
        "first layer and tests it on noisy ones.",
        epilog="example: wellcond reproduce classify --data mnist --epochs 6 --seeds 1",
    )
    _run.add_common(parser, "classify")
    parser.add_argument("--epochs", type=_run.positive, help="default 6 on MNIST, 30 on the digits")
    parser.add_argument(
        "--width", type=_run.positive, help="hidden units: default 1024 on MNIST, 256 on the digits"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    _run.prepare(arguments)
    reports = ("accuracy.png", "matched.png", "training.png")
    results = _run.Results(arguments, arguments.data, "clean training, noisy test", reports)
    images = load(arguments.data)
    results.document["data"] = images.name
    small = images.name == "digits"
    default = (10 if arguments.quick else 30) if small else (1 if arguments.quick else 6)
    setting = Setting(
        images,
        arguments.width or (256 if small else 1024),
        arguments.epochs or default,
        1e-3 if small else 1e-4,
    )
    results.settings.update(
        epochs=setting.epochs,
        width=setting.width,
        lr=setting.lr,
        strengths={method: strengths_of(method) for method in REGULARISED},
        draws=DRAWS,
    )
    plan = [("none", 0.0)] + [(method, s) for method in REGULARISED for s in strengths_of(method)]
    runs = [
        (method, strength, seed) for seed in range(arguments.seeds) for method, strength in plan
    ]
    total = len(runs) * setting.epochs
    with results.kept(), _run.progress(total, f"classify {images.name}") as advance:
        for method, strength, seed in runs:
            _finish(results, setting, method, strength, seed, advance)
    with results.kept():
        _report(results, setting, plan, arguments.json)
    return 0


def _finish(
    results: _run.Results,
    setting: Setting,
    method: str,
    strength: float,
    seed: int,
    advance: _run.Advance,
) -> None:
    started = time.perf_counter()
    history: list[dict[str, float]] = []

    def after_epoch(model: nn.Module, epoch: int) -> None:
        S = model.get_parameter(FIRST).detach()
        kappa, sigma = _training.condition_number(S), _training.spectral_norm(S)
        history.append({"epoch": epoch + 1, "condition_number": kappa, "sigma_max": sigma})
        advance(f"{method} {strength:g}, seed {seed}")

    model = _training.train(setting.recipe(), method, {FIRST: strength}, seed, after_epoch)
    results.add(
        {
            "method": method,
            "strength": strength,
            "tuned": False,
            "seed": seed,
            "condition_numbers": _training.condition_numbers(model),
            "scores": setting.scores(model),
            "seconds": time.perf_counter() - started,
            "metrics": {"sigma_max": _training.spectral_norm(model.get_parameter(FIRST).detach())},
            "history": history,
        }
    )


def _report(results: _run.Results, setting: Setting, plan: Plan, as_json: bool) -> None:
    metrics = [f"condition_number:{FIRST}", "sigma_max", *(f"score:{n}" for n in TEST_NOISES)]
    header = ["method", "strength", "kappa", "sigma_1", *(f"% at {n:g}" for n in TEST_NOISES)]
    rows = [
        [
            m,
            f"{strength:g}",
            *(_run.with_interval(results.row(m, strength, metric)) for metric in metrics),
        ]
        for m, strength in plan
    ]
    seeds = results.settings["seeds"]
    note = (
        f"Classification of noisy {setting.images.name}: {setting.images.pixels}-{setting.width}"
        f"-10, Adam {setting.lr:g}, {setting.epochs} epochs on clean images. "
        f"{_run.over_seeds(seeds)} The proximal step has strengths of its own: it is lr * strength "
        "long, where Adam rescales the gradient of a loss."
    )
    tables = [
        (
            f"Accuracy in per cent by the noise on normalised pixels, mean of {DRAWS} draws; kappa "
            "and sigma_1 of the first layer",
            header,
            rows,
        ),
        (
            f"At matched clean accuracy: the best at noise {COMPARED:g} that costs at most one "
            "point of clean accuracy (interpolated between strengths)",
            *matched_accuracy(results, plan),
        ),
        (
            f"At matched sigma_1: accuracy at noise {COMPARED:g} where sigma_1 is that of a "
            "Tikhonov run (interpolated in log sigma_1; outside: no run reaches that sigma_1)",
            *matched_norm(results),
        ),
    ]
    _run.write_tables(results, note, tables)
    _accuracy(results, plan)
    _matched(results, plan)
    _training_curves(results, plan)
    _run.finished(results, note, tables, as_json)


def matched_accuracy(results: _run.Results, plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Per method the most robust strength that costs at most one point of clean accuracy.

    Between two strengths of which only one does, both accuracies and log kappa are interpolated to
    a cost of one point: a coarse grid must not decide the comparison.
    """
    floor = results.mean("none", 0.0, "score:0.0") - 1

    def point(method: str, strength: float) -> tuple[float, float, float]:
        metrics = (f"score:{COMPARED}", "score:0.0", f"condition_number:{FIRST}")
        noisy, clean, kappa = (results.mean(method, strength, metric) for metric in metrics)
        return noisy, clean, math.log(kappa)

    rows = []
    for method in _run.METHODS:
        path = [("none", 0.0), *(p for p in plan if p[0] == method != "none")]
        found = [(*point(*p), f"{p[1]:g}") for p in path if point(*p)[1] >= floor]
        for first, second in itertools.pairwise(path):
            here, there = point(*first), point(*second)
            if (here[1] - floor) * (there[1] - floor) < 0:
                share = (here[1] - floor) / (here[1] - there[1])
                noisy, clean, log = (x + share * (y - x) for x, y in zip(here, there, strict=True))
                found.append((noisy, clean, log, f"{first[1]:g} to {second[1]:g}"))
        noisy, clean, log, strength = max(found)
        cells = [f"{clean:.1f}", f"{noisy:.1f}", _run.number(math.exp(log))]
        rows.append([method, strength, *cells])
    return ["method", "strength", "% clean", f"% at {COMPARED:g}", "kappa"], rows


def matched_norm(results: _run.Results) -> tuple[list[str], list[list[str]]]:
    """Accuracy under noise at the sigma_1 of each Tikhonov run, for every method."""

    def curve(method: str) -> list[tuple[float, float]]:
        strengths = [0.0, *strengths_of(method)]
        points = []
        for strength in strengths:
            name = method if strength else "none"
            sigma = results.mean(name, strength, "sigma_max")
            points.append((sigma, results.mean(name, strength, f"score:{COMPARED}")))
        return sorted(points)

    def at(points: list[tuple[float, float]], sigma: float) -> str:
        for (low, first), (high, second) in itertools.pairwise(points):
            if low <= sigma <= high and low > 0:
                ratio = torch.log(torch.tensor([sigma / low, high / low], dtype=torch.float64))
                share = float(ratio[0] / ratio[1]) if high > low else 0.0
                return f"{first + share * (second - first):.1f}"
        return "outside"

    rows = []
    for strength in STRENGTHS:
        sigma = results.mean("tikhonov", strength, "sigma_max")
        accuracy = results.mean("tikhonov", strength, f"score:{COMPARED}")
        others = [at(curve(method), sigma) for method in REGULARISED[1:]]
        rows.append([f"{strength:g}", _run.number(sigma), f"{accuracy:.1f}", *others])
    return [
        "Tikhonov strength",
        "sigma_1",
        "% tikhonov",
        *(f"% {m}" for m in REGULARISED[1:]),
    ], rows


def _shade(method: str, strength: float) -> float:
    """The opacity of a curve: the stronger the penalty the darker."""
    if method == "none":
        return 1.0
    return 0.25 + 0.25 * strengths_of(method).index(strength)


def _accuracy(results: _run.Results, plan: Plan) -> None:
    """Accuracy against noise, a panel per method."""
    drawing, panels = _run.figure(columns=3, width=4.2, height=3.8)
    for panel, method in zip(panels, REGULARISED, strict=True):
        for name, strength in plan:
            if name in ("none", method):
                accuracy = [results.mean(name, strength, f"score:{n}") for n in TEST_NOISES]
                panel.plot(
                    TEST_NOISES,
                    accuracy,
                    color=_run.COLOURS[name],
                    alpha=_shade(name, strength),
                    marker=_run.MARKERS[name],
                    label="none" if name == "none" else f"{strength:g}",
                )
        panel.set(title=_run.LABELS[method], xlabel="noise on normalised pixels", ylim=(0, 101))
        panel.legend(title="strength", fontsize=8, frameon=False)
    panels[0].set_ylabel("accuracy, %")
    drawing.savefig(results.out / "accuracy.png")


def _matched(results: _run.Results, plan: Plan) -> None:
    """Accuracy under noise against clean accuracy, sigma_1 and kappa, a line per method.

    Strong Tikhonov falls to chance; what lies below all other methods is left out, and counted.
    """
    drawing, panels = _run.figure(columns=3, width=4.2, height=3.8)
    noisy = f"score:{COMPARED}"
    best = max(results.mean(m, s, noisy) for m, s in plan)
    worst = min(results.mean(m, s, noisy) for m, s in plan if m != "tikhonov")
    floor = worst - 0.5 * (best - worst) - 0.5
    axes = {
        "score:0.0": "clean accuracy, %",
        "sigma_max": "sigma_1 of the first layer",
        f"condition_number:{FIRST}": "condition number of the first layer",
    }
    for panel, (metric, name) in zip(panels, axes.items(), strict=True):
        for method in _run.METHODS:
            strengths = [s for m, s in plan if m == method]
            # Without a regulariser is every line's beginning.
            points = [("none", 0.0), *((method, s) for s in strengths if s)]
            shown = [point for point in points if results.mean(*point, noisy) >= floor]
            panel.plot(
                [results.mean(*point, metric) for point in shown],
                [results.mean(*point, noisy) for point in shown],
                color=_run.COLOURS[method],
                marker=_run.MARKERS[method],
                ls=_run.LINES[method],
                zorder=3 if method == "none" else 2,
                label=_run.LABELS[method]
                + (f" ({hidden} lower, not shown)" if (hidden := len(points) - len(shown)) else ""),
            )
            bands = [results.row(*point, noisy) for point in shown]
            panel.errorbar(
                [results.mean(*point, metric) for point in shown],
                [band["mean"] for band in bands],
                yerr=[(band["high"] - band["low"]) / 2 for band in bands],
                color=_run.COLOURS[method],
                alpha=0.35,
                ls="",
            )
        panel.set_xlabel(name)
    for panel in panels[1:]:
        panel.set_xscale("log")
        _run.logarithmic(panel.xaxis)
    panels[0].set_ylabel(f"accuracy at noise {COMPARED:g}, %")
    panels[0].legend(fontsize=8, frameon=False)
    drawing.savefig(results.out / "matched.png")


def _training_curves(results: _run.Results, plan: Plan) -> None:
    """kappa and sigma_1 of the first layer over the epochs, for the first seed."""
    drawing, (left, right) = _run.figure(columns=2)
    for method, strength in plan:
        history = next(
            run["history"]
            for run in results.runs
            if (run["method"], run["strength"]) == (method, strength)
        )
        epochs = [point["epoch"] for point in history]
        # The legend names each method once, by its strongest run.
        strongest = method == "none" or strength == strengths_of(method)[-1]
        style = {
            "color": _run.COLOURS[method],
            "alpha": _shade(method, strength),
            "ls": _run.LINES[method],
            "label": _run.LABELS[method] if strongest else None,
        }
        kappas = [_run.drawable(point["condition_number"]) for point in history]
        left.plot(epochs, kappas, **style)
        right.plot(epochs, [point["sigma_max"] for point in history], **style)
    left.set(xlabel="epoch", ylabel="condition number of the first layer")
    _run.draw_condition_numbers(left)
    right.set(xlabel="epoch", ylabel="spectral norm sigma_1 of the first layer", yscale="log")
    _run.logarithmic(right.yaxis)
    left.legend(fontsize=8, frameon=False, title="darker: stronger")
    drawing.savefig(results.out / "training.png")
