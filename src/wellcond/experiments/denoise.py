"""Denoising of images by an autoencoder: the paper's experiment with the condition regulariser.

The network is ReLU inside with a sigmoid at the end, trained by Adam at the high learning rate of
the paper, 5e-3, with a strong penalty on the outer weights and a weak one on the inner weights.
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

TEST_NOISES = (0.0, 0.25, 0.5, 1.0, 1.5)
OUTER, INNER = 1e-2, 1e-4
DEFAULT_LR = 5e-3
# Searched by --tuned: multiples of the strengths above, and learning rates.
SCALES = (1e-3, 1e-2, 0.1, 1.0, 10.0)
RATES = (1e-3, DEFAULT_LR)

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
    _run.import_figures()
    _run.apply_threads(arguments)
    if not (math.isfinite(arguments.noise) and arguments.noise >= 0):
        raise ValueError(f"--noise must be finite and not negative, got {arguments.noise}.")
    if arguments.quick:
        arguments.seeds = 1
    results = _run.Results(arguments, arguments.data, arguments.protocol)
    images = load(arguments.data)
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
    searched = len(_run.METHODS) - 1
    searches = (searched * len(SCALES) + 1) * len(RATES) if arguments.tuned else 0
    total = len(plan) * (2 if arguments.tuned else 1) + searches
    with _run.progress(total, f"denoise {images.name}") as advance:
        try:
            for method, seed in plan:
                model = _finish(results, setting, method, 1.0, DEFAULT_LR, seed, tuned=False)
                models.setdefault(method, model)
                advance(f"{method}, seed {seed}")
            if arguments.tuned:
                for method in _run.METHODS:
                    scale, lr = _search(setting, method, advance)
                    for seed in range(arguments.seeds):
                        _finish(results, setting, method, scale, lr, seed, tuned=True)
                        advance(f"{method} tuned, seed {seed}")
        except KeyboardInterrupt:
            raise KeyboardInterrupt(results.kept()) from None
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
) -> nn.Module:
    started = time.perf_counter()
    model = _training.train(setting.recipe(lr), method, setting.strengths(scale), seed)
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


def _search(setting: Setting, method: str, advance: Any) -> tuple[float, float]:
    """The factor of the strengths and the learning rate with the least error on held-out images."""
    validation = setting._replace(images=setting.images.split(0.15))
    noise = min(TEST_NOISES, key=lambda level: abs(level - setting.noise))
    found = []
    for scale, lr in itertools.product(SCALES if method != "none" else (1.0,), RATES):
        # A seed of its own: none that is reported.
        strengths = validation.strengths(scale)
        model = _training.train(validation.recipe(lr), method, strengths, seed=10_000)
        score = validation.scores(model)[str(noise)]
        found.append((score if math.isfinite(score) else math.inf, scale, lr))
        advance(f"{method}: strengths x {scale:g}, lr {lr:g}")
    _, scale, lr = min(found)
    return scale, lr


def _report(
    results: _run.Results, setting: Setting, models: dict[str, nn.Module], as_json: bool
) -> None:
    header = ["method", "strength", "lr", *(f"MSE at {n:g}" for n in TEST_NOISES)]
    header += [f"kappa {name}" for name in setting.weights()]
    rows = []
    for tuned in (False, True):
        for method in _run.METHODS:
            runs = [r for r in results.runs if (r["method"], r["tuned"]) == (method, tuned)]
            if not runs:
                continue
            strength = runs[0]["strength"]
            metrics = [f"score:{n}" for n in TEST_NOISES]
            metrics += [f"condition_number:{name}" for name in setting.weights()]
            cells = [
                _run.plus_minus(row)
                for metric in metrics
                for row in results.document["summary"]
                if (row["method"], row["strength"], row["tuned"], row["metric"])
                == (method, strength, tuned, metric)
            ]
            name = f"{method} (tuned)" if tuned else method
            rows.append([name, _run.number(strength), f"{runs[0]['lr']:g}", *cells])
    note = (
        f"Denoising of {setting.images.name}, protocol {setting.protocol}, noise {setting.noise:g} "
        f"in training, {setting.epochs} epochs, {results.settings['seeds']} seeds: mean ± 95 % "
        "interval. MSE on the test images against the target clamped to [0, 1]; strength: that of "
        f"the outer weights, the inner ones have {INNER / OUTER:g} of it.\n\n"
    )
    _run.write_whole(results.out / "table.md", note + _run.markdown(header, rows))
    _picture(results, setting, models)
    _curves(results, setting)
    if as_json:
        print(results.path.read_text(), end="")
        return
    _run.print_table(note.strip(), header, rows)
    print(f"Written to {results.out}: results.json, table.md, images.png, curves.png")


def _picture(results: _run.Results, setting: Setting, models: dict[str, nn.Module]) -> None:
    """Rows clean, noisy and what each method makes of it, for ten test images."""
    count, side = 10, setting.images.side
    clean = setting.images.normalised(setting.images.x_test[:count])
    source = torch.Generator().manual_seed(7)
    noisy = clean + setting.noise * torch.randn(clean.shape, generator=source)
    rows = {"clean": setting.target()[:count], "noisy": noisy.clamp(0, 1)}
    with torch.no_grad():
        rows |= {_run.LABELS[method]: model(noisy) for method, model in models.items()}
    import_figure = _run.figure
    drawing, (panel,) = import_figure(width=7.6, height=0.72 * len(rows) + 0.4)
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
    drawing.savefig(results.out / "images.png")


def _curves(results: _run.Results, setting: Setting) -> None:
    """Error against noise, and the condition number of every weight."""
    drawing, (left, right) = _run.figure(columns=2)
    for tuned, line in ((False, "-"), (True, ":")):
        for method in _run.METHODS:
            runs = [r for r in results.runs if (r["method"], r["tuned"]) == (method, tuned)]
            if not runs:
                continue
            style = {"color": _run.COLOURS[method], "marker": _run.MARKERS[method], "ls": line}
            label = _run.LABELS[method] + (", tuned" if tuned else "")
            bands = [_run.interval([run["scores"][str(n)] for run in runs]) for n in TEST_NOISES]
            left.plot(TEST_NOISES, [band["mean"] for band in bands], label=label, **style)
            if len(runs) > 1:
                low, high = ([band[end] for band in bands] for end in ("low", "high"))
                left.fill_between(TEST_NOISES, low, high, color=style["color"], alpha=0.12)
            if not tuned:
                kappa = [
                    max(1.0, min(1e40, _median([run["condition_numbers"][w] for run in runs])))
                    for w in setting.weights()
                ]
                right.plot(range(len(kappa)), kappa, label=label, **style)
    left.set(xlabel="noise on the test images", ylabel="mean squared error")
    left.legend(fontsize=8, frameon=False)
    right.set(yscale="log", ylabel="condition number (median over seeds)", xlabel="weight")
    right.set_xticks(range(len(setting.weights())), setting.weights())
    drawing.savefig(results.out / "curves.png")


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
