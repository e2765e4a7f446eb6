"""Denoising of images by an autoencoder: the paper's experiment with the condition regulariser.

The network has ReLU inside and a sigmoid at the end. Adam trains it at the high learning rate of
the paper, 5e-3, with a strong penalty on the outer weights and a weak one on the inner weights. The
input is the noisy image, the target the clean normalised image, of which a sigmoid can only reach
the part in [0, 1].

SNR is the power of the normalised signal, 1, divided by the power of the noise: the standard
deviation of the noise is 1/√SNR.
"""

from __future__ import annotations

import itertools
import math
import statistics
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from wellcond_experiments import figures
from wellcond_experiments.data import Images, load
from wellcond_experiments.evidence import Evidence, Verdict
from wellcond_experiments.grid import Cell, Chosen, Measured, Setting
from wellcond_experiments.methods import TUNED, condition_numbers
from wellcond_experiments.paper import LOOKS, PaperTraining
from wellcond_experiments.tables import Table

SNR = {"snr-10": 10.0, "snr-1": 1.0, "snr-0.5": 0.5}
TEST_NOISES = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
OUTER, INNER = 1e-2, 1e-4  # the paper's strengths; tables show that of the outer weights
DEFAULT_LR = 5e-3
RATES = (3e-4, 1e-3, DEFAULT_LR)
FIXED = {
    "none": (0.0,),
    "tikhonov": (OUTER, OUTER / 100),
    "condition-gradient": (OUTER,),
    "condition": (OUTER,),
}
# The length of a proximal step is lr · strength, whereas Adam rescales the gradient of the loss.
# Therefore it needs larger strengths.
SEARCHED = {
    "none-tuned": (0.0,),
    "tikhonov-tuned": (1e-5, 1e-4, 1e-3, 1e-2),
    "condition-gradient-tuned": (1e-4, 1e-3, 1e-2, 0.1),
    "condition-tuned": (0.1, 1.0, 10.0, 100.0),
}
HELD = 0.15  # share of the training images held out for the search
LOOKS_PER_EPOCH = 4
KAPPAS = tuple(f"kappas_{i}" for i in range(4))  # names of the curves
PICTURED, IMAGES = "snr-1", 5  # the case whose restored images are kept, and their number


class Denoise(Setting):
    name = "denoise"
    help = "denoising autoencoder"
    protocol = (
        "The paper's denoising autoencoder: Adam 5e-3, noisy image as input, clean normalised "
        "image as target, noise of standard deviation 1/√SNR; the error is measured against the "
        "clean image clamped to [0, 1]. The strength is that of the outer weights; the inner "
        "weights have 0.01 of it. Tuned: strength and learning rate are chosen on held-out "
        "training images."
    )
    score = "psnr"
    cases: tuple[str, ...] = tuple(SNR)
    rates: tuple[float, ...] = RATES

    def __init__(self, data: str = "", quick: bool = False, seeds: int | None = None) -> None:
        super().__init__(data, quick, seeds)
        small = self.data == "digits"
        self.epochs = (5 if small else 1) if quick else 20 if small else 4
        self.inner = (64, 16, 64) if small else (256, 32, 256)
        self.methods = dict(SEARCHED)
        if quick:
            self.cases, self.rates = (PICTURED,), (DEFAULT_LR,)
            self.methods = {method: strengths[1:3] for method, strengths in SEARCHED.items()}
            self.methods["none-tuned"] = (0.0,)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"epochs": self.epochs, "inner_widths": self.inner}

    def report_cells(self, chosen: dict[tuple[str, str], Chosen]) -> list[Cell]:
        fixed = [
            Cell(case, method, strength, DEFAULT_LR, seed)
            for case, (method, strengths) in itertools.product(self.cases, FIXED.items())
            for strength, seed in itertools.product(strengths, range(self.seeds))
        ]
        return fixed + super().report_cells(chosen)

    @cached_property
    def images(self) -> Images:
        return load(self.data)

    @cached_property
    def held_out(self) -> Images:
        return self.images.split(HELD)

    def build(self) -> nn.Module:
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(
            (self.images.pixels, *self.inner, self.images.pixels)
        ):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1], nn.Sigmoid())

    def by_weight(self, strength: float) -> dict[str, float]:
        inner = strength * INNER / OUTER
        return {f"{2 * i}.weight": strength if i in (0, 3) else inner for i in range(4)}

    def run(self, cell: Cell) -> Measured:
        images = self.held_out if cell.search else self.images
        clean = images.normalise(images.x_train)
        sigma = SNR[cell.case] ** -0.5
        method = cell.method.removesuffix(TUNED)
        training = PaperTraining(
            self.build, method, self.by_weight(cell.strength), cell.lr, cell.seed
        )
        source = torch.Generator().manual_seed(cell.seed + 1_000_000)

        def loss(indices: Tensor) -> Tensor:
            x = clean[indices]
            noisy = x + sigma * torch.randn(x.shape, generator=source)
            return nn.functional.mse_loss(training.model(noisy), x)

        curves: dict[str, list[float]] = {name: [] for name in ("epochs", *KAPPAS)}
        looks = 1 if cell.search else LOOKS_PER_EPOCH
        for epochs in training.learn(loss, len(clean), self.epochs, looks):
            curves["epochs"].append(epochs)
            kappas = condition_numbers(training.model).values()
            for name, kappa in zip(KAPPAS, kappas, strict=True):
                curves[name].append(kappa)
        metrics = {f"kappa_{i}": curves[name][-1] for i, name in enumerate(KAPPAS)}
        metrics["kappa_worst"] = max(metrics.values())
        metrics |= errors(training.model, images, sigma)
        if cell.search:
            return Measured(metrics, {})
        if (cell.case, cell.method, cell.seed) == (PICTURED, method, 0):
            curves |= self.pictures(training.model, method, sigma)
        return Measured(metrics, curves)

    @torch.no_grad()
    def pictures(self, model: nn.Module, method: str, sigma: float) -> dict[str, list[float]]:
        """Returns restored test images, pixels in per cent; for the baseline also the inputs."""
        x = self.images.normalise(self.images.x_test[:IMAGES])
        noisy = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
        found = {"restored": model(noisy)}
        if method == "none":
            found |= {"clean": x, "noisy": noisy}
        return {
            name: (100 * image.clamp(0, 1)).round().flatten().tolist()
            for name, image in found.items()
        }

    def tables(self, evidence: Evidence) -> dict[str, Table]:
        head = ["SNR", "method", "strength", "lr"]
        at_noises, kappas, rows = [], [], []
        for point in self._points(evidence):
            case, method, strength, lr = point.values()
            key = [f"{SNR[case]:g}", _label(method), f"{strength:g}" if strength else "", f"{lr:g}"]
            best = evidence.choice(case, method)
            alone = "none-tuned" if method.endswith(TUNED) else "none"
            change = evidence.difference("error", point, {"case": case, "method": alone})
            rows.append(
                [
                    *key,
                    evidence.band("error", **point).fixed(4),
                    change.signed(4) if method != alone else "",
                    str(evidence.band("kappa_worst", log=True, **point)),
                    best["edge"] if best else "",
                ]
            )
            at = [evidence.band(f"error_at_{n:g}", **point).fixed(4) for n in TEST_NOISES]
            at_noises.append(key + at)
            each = [evidence.band(f"kappa_{i}", log=True, **point) for i in range(4)]
            kappas.append(key + [str(band) for band in each])
        noise = "error at training noise"
        header = [*head, noise, "vs. baseline", "largest κ", "at grid edge"]
        levels = [f"noise {n:g}" for n in TEST_NOISES]
        weights = [f"weight {i + 1}" for i in range(4)]
        return {
            "errors": Table("Mean squared error at the training noise", header, rows),
            "noises": Table("Mean squared error by noise", [*head, *levels], at_noises),
            "kappa": Table("κ of each weight", [*head, *weights], kappas),
        }

    def _points(self, evidence: Evidence, **fields: Any) -> list[dict[str, Any]]:
        """Returns case, method, strength and learning rate of all reported points."""
        names = ["case", "method", "strength", "lr"]
        rows = evidence.where(**fields)[names].drop_duplicates().to_dict("records")
        points: list[dict[str, Any]] = rows
        place = {case: i for i, case in enumerate(self.cases)}
        order = [*FIXED, *SEARCHED]
        return sorted(points, key=lambda w: (place[w["case"]], order.index(w["method"])))

    def verdicts(self, evidence: Evidence) -> dict[str, Verdict]:
        return {
            f"denoising, SNR {SNR[case]:g}, dB": evidence.verdict(
                "psnr", case, tuple(SEARCHED), case=case
            )
            for case in self.cases
        }

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        return {
            "denoise-images": self._images(evidence),
            "denoise-errors": self._errors(evidence),
            "denoise-kappa": self._kappa(evidence),
        }

    def _images(self, evidence: Evidence) -> Any:
        """Draws the first test images: clean, noisy, and restored by each method."""
        points = self._points(evidence, case=PICTURED, lr=DEFAULT_LR, seed=0)
        rows: dict[str, list[float]] = {}
        for point in (point for point in points if point["method"] in FIXED):
            (run,) = evidence.where(**point, seed=0).to_dict("records")
            if point["method"] == "none":
                rows |= {"clean": run["clean"], "noisy": run["noisy"]}
            rows[_name(point)] = run["restored"]
        side = math.isqrt(len(rows["clean"]) // IMAGES)
        gap = 1
        sheet = torch.full((len(rows) * (side + gap) - gap, IMAGES * (side + gap) - gap), 100.0)
        for i, pixels in enumerate(rows.values()):
            for j, image in enumerate(torch.tensor(pixels).reshape(IMAGES, side, side)):
                top, left = i * (side + gap), j * (side + gap)
                sheet[top : top + side, left : left + side] = image
        drawing, (panel,) = figures.figure(width=7.6, height=0.84 * len(rows))
        panel.imshow(sheet.numpy(), cmap="gray", vmin=0, vmax=100, aspect="equal")
        panel.grid(False)
        panel.spines[:].set_visible(False)
        panel.set_xticks([])
        panel.set_yticks([i * (side + gap) + side / 2 for i in range(len(rows))], list(rows))
        panel.tick_params(length=0)
        panel.set_title(f"SNR {SNR[PICTURED]:g}", fontsize=10)
        return drawing

    def _errors(self, evidence: Evidence) -> Any:
        drawing, panels = figures.figure(columns=len(self.cases), width=4.6)
        for panel, case in zip(panels, self.cases, strict=True):
            panel.sharey(panels[0])
            for point in self._points(evidence, case=case):
                bands = [evidence.band(f"error_at_{n:g}", **point) for n in TEST_NOISES]
                means, low, high = zip(*(band[:3] for band in bands), strict=True)
                style = _style(point)
                panel.plot(TEST_NOISES, means, **style)
                if point["method"] in FIXED:
                    colour = style["color"]
                    panel.fill_between(TEST_NOISES, low, high, color=colour, alpha=0.1, lw=0)
            panel.set(title=f"trained at SNR {SNR[case]:g}", xlabel="noise on the test images")
        panels[0].set(ylabel="mean squared error", ylim=(0, None))
        _legend(drawing, panels[0])
        return drawing

    def _kappa(self, evidence: Evidence) -> Any:
        """Draws κ of every weight during training at one SNR, the median over the seeds."""
        drawing, panels = figures.figure(columns=4, width=3.6, height=3.8)
        points = [
            point for point in self._points(evidence, case=PICTURED) if point["method"] in FIXED
        ]
        for name, panel in zip(KAPPAS, panels, strict=True):
            panel.sharey(panels[0])
            panel.tick_params(labelleft=panel is panels[0])
            for point in points:
                runs = evidence.where(**point)
                medians = map(statistics.median, zip(*runs[name], strict=True))
                drawn = [figures.cap(kappa) for kappa in medians]
                panel.plot(next(iter(runs["epochs"])), drawn, **(_style(point) | {"marker": ""}))
            panel.set(title=f"κ of weight {int(name[-1]) + 1}", xlabel="epoch")
        figures.draw_condition_numbers(max(panels, key=lambda panel: panel.dataLim.y1))
        _legend(drawing, panels[0])
        return drawing


@torch.no_grad()
def errors(model: nn.Module, images: Images, sigma: float) -> dict[str, float]:
    """Returns the test error at each noise level, with the same noise for every model, and PSNR."""
    clean = images.normalise(images.x_test)
    target = clean.clamp(0, 1)  # the range of a sigmoid

    def error(noise: float) -> float:
        source = torch.Generator().manual_seed(2024)
        noisy = clean + noise * torch.randn(clean.shape, generator=source)
        return float(nn.functional.mse_loss(model(noisy), target))

    found = {f"error_at_{noise:g}": error(noise) for noise in TEST_NOISES}
    own = error(sigma)
    return found | {"error": own, "psnr": -10 * math.log10(own)}


def _label(method: str) -> str:
    return figures.label(method) + (", tuned" if method.endswith(TUNED) else "")


def _name(point: dict[str, Any]) -> str:
    """Returns the label; for Tikhonov with its strength, because there are two."""
    strength = f" {point['strength']:g}" if point["method"] == "tikhonov" else ""
    return _label(point["method"]) + strength


def _legend(drawing: Any, panel: Any) -> None:
    """Draws one legend above all panels."""
    handles, labels = panel.get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside upper center", ncols=5, fontsize=8, frameon=False)


def _style(point: dict[str, Any]) -> dict[str, Any]:
    look = LOOKS[point["method"].removesuffix(TUNED)]
    weak = point["method"] == "tikhonov" and point["strength"] < OUTER
    return {
        "label": _name(point),
        "color": look.colour,
        "marker": look.marker,
        "ls": ":" if point["method"].endswith(TUNED) else "-." if weak else look.line,
        "ms": 4,
    }
