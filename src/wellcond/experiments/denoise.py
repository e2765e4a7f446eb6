"""Denoising of images by an autoencoder: the paper's experiment with the condition regulariser.

The network is ReLU inside with a sigmoid at the end, trained by Adam at the high learning rate of
the paper, 5e-3, with a strong penalty on the outer weights and a weak one on the inner weights.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wellcond.experiments import _run, _training
from wellcond.experiments.data import Images, load

TEST_NOISES = (0.0, 0.25, 0.5, 1.0, 1.5)
OUTER, INNER = 1e-2, 1e-4
DEFAULT_LR = 5e-3
# Searched by --tuned: multiples of the strengths above, and learning rates. A proximal step is
# lr * strength long, where Adam rescales the gradient of a loss to its own step: it needs more.
SCALES = {
    "none": (1.0,),
    "tikhonov": (1e-3, 1e-2, 0.1, 1.0, 10.0),
    "condition": (1e-3, 1e-2, 0.1, 1.0, 10.0),
    "condition-proximal": (1.0, 10.0, 100.0, 1e3, 1e4),
}
RATES = (1e-3, DEFAULT_LR)
SEARCH_SEED = 10_000  # none that is reported

PROTOCOLS = {
    "paper": "noisy image in, clean normalised image as target",
    "authors-code": "clean image in, noisy normalised image as target",
    "standard": "noisy image in, clean image in [0, 1] as target",
}


class Setting(NamedTuple):
    """Images, network and protocol of one experiment."""

    images: Images
    widths: tuple[int, ...]
    protocol: str
    noise: float
    epochs: int

    def build(self) -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(self.widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1], nn.Sigmoid())

    def weights(self) -> list[str]:
        return [f"{2 * layer}.weight" for layer in range(len(self.widths) - 1)]

    def strengths(self, scale: float = 1.0) -> dict[str, float]:
        """The paper's strengths, times a common factor."""
        names = self.weights()
        outer = (names[0], names[-1])
        return {name: scale * (OUTER if name in outer else INNER) for name in names}

    def recipe(self, lr: float) -> _training.Recipe:
        clean = self.images.normalised(self.images.x_train)
        pixels = self.images.x_train

        def loss(model: nn.Module, indices: Tensor, source: torch.Generator) -> Tensor:
            x = clean[indices]
            noisy = x + self.noise * torch.randn(x.shape, generator=source)
            if self.protocol == "authors-code":
                return nn.functional.mse_loss(model(x), noisy)
            target = x if self.protocol == "paper" else pixels[indices]
            return nn.functional.mse_loss(model(noisy), target)

        return _training.Recipe(self.build, loss, len(clean), self.epochs, lr)

    def target(self) -> Tensor:
        """The clean test images as far as a sigmoid can reach them."""
        if self.protocol == "standard":
            return self.images.x_test
        return self.images.normalised(self.images.x_test).clamp(0, 1)

    @torch.no_grad()
    def scores(self, model: nn.Module) -> dict[str, float]:
        """Mean squared error on the test images at each noise; the same noise for every model."""
        clean, target = self.images.normalised(self.images.x_test), self.target()
        scores = {}
        for noise in TEST_NOISES:
            source = torch.Generator().manual_seed(2024)
            noisy = clean + noise * torch.randn(clean.shape, generator=source)
            scores[str(noise)] = float(nn.functional.mse_loss(model(noisy), target))
        return scores


def configure(experiments: Any) -> None:
    parser: argparse.ArgumentParser = experiments.add_parser(
        "denoise",
        help="denoising autoencoder",
        description="Trains the paper's denoising autoencoder without a regulariser, with Tikhonov "
        "and with the condition regulariser, in the loss and as a lazy proximal step.",
        epilog="example: wellcond reproduce denoise --data mnist --epochs 4 --noise 1",
    )
    _run.add_common(parser, "denoise")
    parser.add_argument("--epochs", type=_run.positive, help="default 4 on MNIST, 40 on the digits")
    parser.add_argument("--noise", type=float, default=1.0, help="noise in training (default 1)")
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        default="paper",
        help="; ".join(f"{name}: {text}" for name, text in PROTOCOLS.items()),
    )
    parser.add_argument(
        "--tuned",
        action="store_true",
        help="also search strength and learning rate of each method on a validation split",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    _run.prepare(arguments)
    if not (math.isfinite(arguments.noise) and arguments.noise >= 0):
        raise ValueError(f"--noise must be finite and not negative, got {arguments.noise}.")
    reports = ("images.png", "curves.png")
    results = _run.Results(arguments, arguments.data, arguments.protocol, reports)
    images = load(arguments.data)
    results.document["data"] = images.name
    small = images.name == "digits"
    epochs = arguments.epochs or (
        1 if arguments.quick and not small else 10 if arguments.quick else 40 if small else 4
    )
    widths = (64, 64, 16, 64, 64) if small else (784, 256, 32, 256, 784)
    widths = (images.pixels, *widths[1:-1], images.pixels)
    setting = Setting(images, widths, arguments.protocol, arguments.noise, epochs)
    results.settings.update(
        epochs=epochs, widths=widths, lr=DEFAULT_LR, strengths=setting.strengths()
    )
    models: dict[str, nn.Module] = {}
    plan = [(method, seed) for seed in range(arguments.seeds) for method in _run.METHODS]
    total = len(plan)
    if arguments.tuned:
        total += len(plan) + sum(map(len, SCALES.values())) * len(RATES)
    with (
        results.kept(),
        _run.progress(total * epochs, f"denoise {images.name}") as advance,
    ):
        for method, seed in plan:
            model = _finish(results, setting, method, 1.0, DEFAULT_LR, seed, False, advance)
            models.setdefault(method, model)
        for method in _run.METHODS if arguments.tuned else ():
            scale, lr = _search(results, setting, method, advance)
            for seed in range(arguments.seeds):
                _finish(results, setting, method, scale, lr, seed, True, advance)
    with results.kept():
        _report(results, setting, models, arguments.json)
    return 0


def _finish(
    results: _run.Results,
    setting: Setting,
    method: str,
    scale: float,
    lr: float,
    seed: int,
    tuned: bool,
    advance: _run.Advance,
) -> nn.Module:
    started = time.perf_counter()
    label = f"{method}{' tuned' * tuned}, seed {seed}"
    strengths = setting.strengths(scale)
    model = _training.train(
        setting.recipe(lr), method, strengths, seed, lambda model, epoch: advance(label)
    )
    results.add(
        {
            "method": method,
            "strength": 0.0 if method == "none" else scale * OUTER,
            "tuned": tuned,
            "seed": seed,
            "condition_numbers": _training.condition_numbers(model),
            "scores": setting.scores(model),
            "seconds": time.perf_counter() - started,
            "lr": lr,
        }
    )
    return model


def _search(
    results: _run.Results, setting: Setting, method: str, advance: _run.Advance
) -> tuple[float, float]:
    """The factor of the strengths and the learning rate with the least error on held-out images."""
    validation = setting._replace(images=setting.images.split(0.15))
    noise = min(TEST_NOISES, key=lambda level: abs(level - setting.noise))
    found = []
    for scale, lr in itertools.product(SCALES[method], RATES):
        label = f"{method}: strengths x {scale:g}, lr {lr:g}"
        model = _training.train(
            validation.recipe(lr),
            method,
            validation.strengths(scale),
            SEARCH_SEED,
            lambda model, epoch, label=label: advance(label),  # type: ignore[misc]
        )
        score = validation.scores(model)[str(noise)]
        found.append((score if math.isfinite(score) else math.inf, scale, lr))
    trials = [{"scale": scale, "lr": lr, "score": score} for score, scale, lr in found]
    results.settings.setdefault("search", {})[method] = trials
    _, scale, lr = min(found)
    return scale, lr


def _report(
    results: _run.Results, setting: Setting, models: dict[str, nn.Module], as_json: bool
) -> None:
    names = {f"score:{n}": f"{n:g}" for n in TEST_NOISES}
    kappas = {f"condition_number:{weight}": weight for weight in setting.weights()}
    errors: list[list[str]] = []
    conditions: list[list[str]] = []
    for (method, tuned), runs in _groups(results).items():
        strength, lr = runs[0]["strength"], runs[0]["lr"]
        key = [f"{method} (tuned)" if tuned else method, _run.number(strength), f"{lr:g}"]
        for rows, metrics in ((errors, names), (conditions, kappas)):
            bands = [results.row(method, strength, metric, tuned) for metric in metrics]
            rows.append(key + [_run.with_interval(band) for band in bands])
    seeds = results.settings["seeds"]
    note = (
        f"Denoising of {setting.images.name}, protocol {setting.protocol}: "
        f"{PROTOCOLS[setting.protocol]}; noise {setting.noise:g} in training, {setting.epochs} "
        f"epochs. {_run.over_seeds(seeds)} Strength: that of the outer weights; the inner ones "
        f"have {INNER / OUTER:g} of it."
    )
    head = ["method", "strength", "lr"]
    reach = "in [0, 1]" if setting.protocol == "standard" else "clamped to [0, 1]"
    tables = [
        (f"MSE against the clean image {reach}, by noise", [*head, *names.values()], errors),
        ("Condition number of each weight", [*head, *kappas.values()], conditions),
    ]
    _run.write_tables(results, note, tables)
    _picture(results, setting, models)
    _curves(results, setting)
    _run.finished(results, note, tables, as_json)


def _groups(results: _run.Results) -> dict[tuple[str, bool], list[dict[str, Any]]]:
    """The runs by method, first at the paper's strengths and then tuned."""
    groups: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for run in results.runs:
        groups.setdefault((run["method"], run["tuned"]), []).append(run)
    return dict(sorted(groups.items(), key=lambda item: item[0][1]))


def _picture(results: _run.Results, setting: Setting, models: dict[str, nn.Module]) -> None:
    """Rows clean, noisy and what each method makes of it, for ten test images."""
    count, side = 10, setting.images.side
    clean = setting.images.normalised(setting.images.x_test[:count])
    source = torch.Generator().manual_seed(7)
    noisy = clean + setting.noise * torch.randn(clean.shape, generator=source)
    rows = {"clean": setting.target()[:count], "noisy": noisy.clamp(0, 1)}
    with torch.no_grad():
        rows |= {_run.LABELS[method]: model(noisy) for method, model in models.items()}
    drawing, (panel,) = _run.figure(width=8.4, height=0.68 * len(rows) + 0.3)
    gap = 1
    sheet = torch.ones(len(rows) * (side + gap) - gap, count * (side + gap) - gap)
    for i, images in enumerate(rows.values()):
        for j, image in enumerate(images):
            top, left = i * (side + gap), j * (side + gap)
            sheet[top : top + side, left : left + side] = image.reshape(side, side)
    panel.imshow(sheet.numpy(), cmap="gray", vmin=0, vmax=1, aspect="equal")
    panel.grid(False)
    panel.spines[:].set_visible(False)
    panel.set_xticks([])
    panel.set_yticks([i * (side + gap) + side / 2 for i in range(len(rows))], list(rows))
    panel.tick_params(length=0)
    panel.set_title(
        f"{setting.images.name}, noise {setting.noise:g}: the same strengths for every method",
        fontsize=10,
    )
    drawing.savefig(results.out / "images.png", bbox_inches="tight")


def _curves(results: _run.Results, setting: Setting) -> None:
    """Error against noise, and the condition number of every weight."""
    drawing, (left, right) = _run.figure(columns=2)
    weights = setting.weights()
    for (method, tuned), runs in _groups(results).items():
        colour, marker = _run.COLOURS[method], _run.MARKERS[method]
        label = _run.LABELS[method] + (f", tuned (lr {runs[0]['lr']:g})" if tuned else "")
        line = ":" if tuned else _run.LINES[method]
        bands = [_run.interval([run["scores"][str(n)] for run in runs]) for n in TEST_NOISES]
        means, low, high = ([band[end] for band in bands] for end in ("mean", "low", "high"))
        left.plot(TEST_NOISES, means, label=label, color=colour, marker=marker, ls=line)
        if len(runs) > 1 and not tuned:
            left.fill_between(TEST_NOISES, low, high, color=colour, alpha=0.12, lw=0)
        if tuned:
            continue
        # Side by side: the median large, every seed small.
        shift = 0.16 * (_run.METHODS.index(method) - 1.5)
        for index, weight in enumerate(weights):
            kappas = [_run.drawable(run["condition_numbers"][weight]) for run in runs]
            style = {"color": colour, "marker": marker, "ls": ""}
            right.plot([index + shift] * len(kappas), kappas, ms=4, alpha=0.35, **style)
            right.plot([index + shift], [statistics.median(kappas)], ms=8, **style)
    left.set(xlabel="noise on the test images", ylabel="mean squared error")
    left.legend(fontsize=8, frameon=False)
    right.set(ylabel="condition number: every seed, median", xlabel="weight")
    right.set_xticks(range(len(weights)), weights)
    right.grid(False, axis="x")
    _run.draw_condition_numbers(right)
    drawing.savefig(results.out / "curves.png")
