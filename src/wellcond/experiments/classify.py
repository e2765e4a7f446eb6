"""Classification of noisy images by a network trained on clean ones: the paper's experiment.

A net of one hidden layer with sigmoids; the penalty is on the first layer only. Robustness to noise
may come from a small spectral norm alone, so the methods are also compared where their clean
accuracy, and where their sigma_1, are the same.
"""

from __future__ import annotations

import argparse
import itertools
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import wellcond as wc
from wellcond.experiments import _run, _training
from wellcond.experiments.data import Images, load

TEST_NOISES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
STRENGTHS = (1e-3, 1e-2, 0.1, 1.0)
# Adam rescales a gradient in the loss to its own step; a proximal step is lr * strength long as it
# stands, so that at the same strength it would do nothing here.
PROXIMAL_STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
DRAWS = 5
COMPARED = 2.0  # the noise at which methods are compared
REGULARISED = _run.METHODS[1:]
FIRST = "0.weight"


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
    _run.import_figures()
    _run.apply_threads(arguments)
    if arguments.quick:
        arguments.seeds = 1
    results = _run.Results(arguments, arguments.data, "clean training, noisy test")
    images = load(arguments.data)
    small = images.name == "digits"
    default = (10 if arguments.quick else 30) if small else (1 if arguments.quick else 6)
    setting = Setting(
        images,
        arguments.width or (256 if small else 1024),
        arguments.epochs or default,
        1e-3 if small else 1e-4,
    )
    results.settings.update(
        epochs=setting.epochs, width=setting.width, lr=setting.lr, strengths=STRENGTHS, draws=DRAWS
    )
    plan = [("none", 0.0)] + [(method, s) for method in REGULARISED for s in strengths_of(method)]
    runs = [
        (method, strength, seed) for seed in range(arguments.seeds) for method, strength in plan
    ]
    with _run.progress(len(runs), f"classify {images.name}") as advance:
        try:
            for method, strength, seed in runs:
                _finish(results, setting, method, strength, seed)
                advance(f"{method} {strength:g}, seed {seed}")
        except KeyboardInterrupt:
            raise KeyboardInterrupt(results.kept()) from None
    _report(results, setting, plan, arguments.json)
    return 0


def _finish(
    results: _run.Results, setting: Setting, method: str, strength: float, seed: int
) -> None:
    started = time.perf_counter()
    history: list[dict[str, float]] = []

    def after_epoch(model: nn.Module, epoch: int) -> None:
        S = model.get_parameter(FIRST).detach().double()
        history.append(
            {
                "epoch": epoch + 1,
                "condition_number": float(wc.condition_number(S)),
                "sigma_max": float(torch.linalg.matrix_norm(S, 2)),
            }
        )

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
            "metrics": {"sigma_max": history[-1]["sigma_max"]},
            "history": history,
        }
    )


def _report(
    results: _run.Results, setting: Setting, plan: list[tuple[str, float]], as_json: bool
) -> None:
    rows_of = {
        (row["method"], row["strength"], row["metric"]): row for row in results.document["summary"]
    }
    metrics = [f"condition_number:{FIRST}", "sigma_max", *(f"score:{n}" for n in TEST_NOISES)]
    header = ["method", "strength", "kappa", "sigma_1", *(f"% at {n:g}" for n in TEST_NOISES)]
    rows = [
        [method, f"{strength:g}", *(_run.plus_minus(rows_of[method, strength, m]) for m in metrics)]
        for method, strength in plan
    ]
    clean, norms = matched_accuracy(results, plan), matched_norm(results)
    note = (
        f"Classification of noisy {setting.images.name}: "
        f"{setting.images.pixels}-{setting.width}-10, Adam {setting.lr:g}, "
        f"{setting.epochs} epochs on clean images, "
        f"{results.settings['seeds']} seeds: mean ± 95 % interval. Accuracy in per cent at the "
        f"noise on normalised pixels, mean of {DRAWS} draws; kappa and sigma_1 of the first "
        "layer.\n\n"
    )
    text = note + _run.markdown(header, rows)
    text += f"\nThe best accuracy at noise {COMPARED:g} among strengths whose clean accuracy is "
    text += "within one point of that without a regulariser:\n\n" + _run.markdown(*clean)
    text += f"\nAccuracy at noise {COMPARED:g} where sigma_1 is the same as that of a Tikhonov run "
    text += "(interpolated in log sigma_1; outside: no run reaches that sigma_1):\n\n"
    text += _run.markdown(*norms)
    _run.write_whole(results.out / "table.md", text)
    _pictures(results, setting, plan)
    if as_json:
        print(results.path.read_text(), end="")
        return
    _run.print_table(note.strip(), header, rows)
    _run.print_table("At matched clean accuracy (within one point)", *clean)
    _run.print_table("At matched sigma_1", *norms)
    print(f"Written to {results.out}: results.json, table.md, accuracy.png, training.png")


def matched_accuracy(
    results: _run.Results, plan: list[tuple[str, float]]
) -> tuple[list[str], list[list[str]]]:
    """Per method the most robust strength that keeps the clean accuracy within one point."""
    floor = results.mean("none", 0.0, "score:0.0") - 1
    rows = []
    for method in _run.METHODS:
        kept = [
            (results.mean(method, strength, f"score:{COMPARED}"), strength)
            for other, strength in plan
            if other == method and results.mean(method, strength, "score:0.0") >= floor
        ]
        if not kept:
            rows.append([method, "none keeps it", "", "", ""])
            continue
        noisy, strength = max(kept)
        kappa = results.mean(method, strength, f"condition_number:{FIRST}")
        clean = results.mean(method, strength, "score:0.0")
        cells = [f"{clean:.1f}", f"{noisy:.1f}", _run.number(kappa)]
        rows.append([method, f"{strength:g}", *cells])
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


def _pictures(results: _run.Results, setting: Setting, plan: list[tuple[str, float]]) -> None:
    drawing, panels = _run.figure(columns=3, width=4.2, height=3.8)
    for panel, method in zip(panels, REGULARISED, strict=True):
        for index, (name, strength) in enumerate(p for p in plan if p[0] in ("none", method)):
            accuracy = [results.mean(name, strength, f"score:{n}") for n in TEST_NOISES]
            colour = _run.COLOURS[name]
            shade = 1.0 if name == "none" else 0.25 + 0.75 * index / len(STRENGTHS)
            label = "none" if name == "none" else f"{strength:g}"
            panel.plot(
                TEST_NOISES,
                accuracy,
                color=colour,
                alpha=shade,
                marker=_run.MARKERS[name],
                label=label,
            )
        panel.set(title=_run.LABELS[method], xlabel="noise on normalised pixels", ylim=(0, 101))
        panel.legend(title="strength", fontsize=8, frameon=False)
    panels[0].set_ylabel("accuracy, %")
    drawing.savefig(results.out / "accuracy.png")

    drawing, panels = _run.figure(columns=2)
    for method, strength in plan:
        history = next(
            run["history"]
            for run in results.runs
            if (run["method"], run["strength"]) == (method, strength)
        )
        shade = (
            1.0 if method == "none" else 0.25 + 0.1875 * (1 + strengths_of(method).index(strength))
        )
        epochs = [point["epoch"] for point in history]
        # The legend names each method once, by its strongest run.
        label = f"{_run.LABELS[method]}" if strength in (0.0, strengths_of(method)[-1]) else "_"
        for panel, key in zip(panels, ("condition_number", "sigma_max"), strict=True):
            values = [min(point[key], 1e20) for point in history]
            panel.plot(epochs, values, color=_run.COLOURS[method], alpha=shade, label=label)
    for panel, name in zip(panels, ("condition number", "spectral norm sigma_1"), strict=True):
        panel.set(xlabel="epoch", ylabel=f"{name} of the first layer", yscale="log")
    panels[0].legend(fontsize=8, frameon=False, title="darker: stronger")
    drawing.savefig(results.out / "training.png")
