"""Which method should keep the critic of a WGAN Lipschitz?

The critic estimates the Wasserstein distance between samples and data only if its Lipschitz
constant is bounded (Arjovsky, Chintala & Bottou, arXiv 1701.07875). The methods bound it in
different ways. The score is the distance of the generated samples to held-out data.
"""

from __future__ import annotations

import copy
import math
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from wellcond_experiments import figures
from wellcond_experiments.data import load
from wellcond_experiments.early import EarlyLook
from wellcond_experiments.evidence import Column, Evidence, Verdict
from wellcond_experiments.grid import SEARCH, Cell, Measured, Setting
from wellcond_experiments.methods import (
    METHODS,
    GradientPenalty,
    condition_numbers,
    evaluation,
    largest,
    run_seeded,
    spectral_norms,
)
from wellcond_experiments.prediction import Case
from wellcond_experiments.tables import Table

BATCH, CRITIC_STEPS = 64, 3
BETAS = (0.0, 0.9)  # of Adam, for critic and generator
STEPS = {"ring": 800, "grid": 800, "digits": 600}  # of the generator
AVERAGED = 0.99  # decay of the average of the generator's weights; the average is tested
LOOKS, LAST = 10, 3  # number of measurements; the distance is the mean of the last three
DIRECTIONS = 128
SAMPLES = 2000  # held-out points of a mixture, equally many per mode
PAIRS = 512  # pairs of real and generated points between which the gradient is measured
RATES = (3e-4, 1e-3, 3e-3)
BOUNDS = (1.0, 2.0, 4.0)  # of each layer
STRENGTHS: dict[str, tuple[float, ...]] = {
    "none": (0.0,),
    "weight-clipping": (0.01, 0.03, 0.1, 0.3),
    "gradient-penalty": (0.1, 1.0, 10.0),
    "spectral-norm-all": BOUNDS,
    "spectral-norm-all-sort": BOUNDS,
    "torchlip": BOUNDS,
    "upper-limit": BOUNDS,
    "upper-limit-sort": BOUNDS,
}
ACTING: dict[str, tuple[float, ...]] = {
    "upper-limit-acting": BOUNDS,
    "upper-limit-acting-sort": BOUNDS,
}
TORCHLIP = "1.0.5"  # the compared version
TITLES = {"ring": "8 Gaussians on a ring", "grid": "25 Gaussians in a grid", "digits": "digits"}


class Critic(Setting):
    name = "critic"
    help = "a WGAN: which method should keep its critic Lipschitz?"
    protocol = (
        "A generator with two hidden layers of 64 (digits: 128) and a critic with three hidden "
        "layers of 64 (digits: two convolutions and a linear layer) train with the WGAN loss: 800 "
        "steps of the generator (digits: 600), each after three steps of the critic, batch 64, "
        "both with Adam at the same rate, betas 0 and 0.9. The data are two-dimensional mixtures "
        "with equally many points per mode, and scikit-learn's digits scaled to [-1, 1]. The "
        "tested generator is a weight average with decay 0.99. The score is the mean of the last "
        "three of ten measurements of the sliced Wasserstein-1 distance between its samples and "
        "held-out data, over 128 fixed directions, in per cent of the distance of the data mean; "
        "lower is better. The search chooses rate and strength by the same score on other data "
        "and another seed. Critics use LeakyReLU(0.2), or GroupSort of two where stated. The "
        "strength of bounded layers is the bound per layer. σ₁ is the largest of the matrices of "
        "all layers at the last nine measurements, σ₁ as operator that of the layers as linear "
        "operators, and the gradient norm is the largest at 512 points between data and samples. "
        "A mode counts as found if at least a quarter of its share of samples is within three "
        "standard deviations. CPU time is relative to torch's spectral_norm."
    )
    score = "quality"
    default_data = quick_data = ""
    cases = ("ring", "grid", "digits")

    def __init__(self, data: str = "", quick: bool = False, seeds: int | None = None) -> None:
        super().__init__(data, quick, seeds)
        self.rates = (1e-3,) if quick else RATES
        self.looks = 2 if quick else LOOKS
        if quick:
            self.cases = ("ring", "digits")

    def steps(self, case: str) -> int:
        """Returns the number of steps of the generator."""
        return 10 if self.quick else STEPS[case]

    def settings(self) -> dict[str, Any]:
        steps = {case: self.steps(case) for case in self.cases}
        peer = {} if self.quick else {"torchlip": TORCHLIP}
        ways = {case: {m: list(s) for m, s in self.strengths(case).items()} for case in self.cases}
        return super().settings() | {"steps": steps, "ways": ways} | peer

    def strengths(self, case: str) -> dict[str, tuple[float, ...]]:
        if self.quick:
            return {"none": (0.0,), "spectral-norm-all": (1.0,), "upper-limit": (1.0, 2.0)}
        return STRENGTHS | (ACTING if case == "digits" else {})

    def run(self, cell: Cell) -> Measured:
        if not self.quick:
            check_torchlip()  # before any run, whatever its method
        train, tested = draw_data(cell.case, cell.search)
        kind = METHODS[cell.method]
        images = cell.case == "digits"
        training = kind(
            lambda norm: build_critic(images, kind.sorts), cell.strength, cell.lr, cell.seed
        )
        critic = training.model
        generator = run_seeded(lambda: build_generator(images), cell.seed)
        optimizer = torch.optim.Adam(generator.parameters(), cell.lr, BETAS, fused=True)
        for group in training.optimizer.param_groups:
            group["betas"] = BETAS
        averaged = copy.deepcopy(generator)
        weights, averages = list(generator.parameters()), list(averaged.parameters())
        looked = _Looks(critic, averaged, tested)
        untrained = looked.distance()
        steps = self.steps(cell.case)
        look = EarlyLook(critic, steps * CRITIC_STEPS)
        source = torch.Generator().manual_seed(cell.seed)
        inputs = noise_of(generator)
        seconds, finite = 0.0, True

        def generate() -> Tensor:
            fake: Tensor = generator(torch.randn(BATCH, inputs, generator=source))
            return fake

        for step in range(steps):
            began = time.process_time()
            for _ in range(CRITIC_STEPS):
                real = train[torch.randint(len(train), (BATCH,), generator=source)]
                fake = generate().detach()
                of_real, of_fake = critic(torch.cat([real, fake])).split(BATCH)
                loss = of_fake.mean() - of_real.mean()
                if isinstance(training, GradientPenalty):
                    loss = loss + training.penalty(real, fake)
                look(loss)
                finite = finite and training.step(loss)
            if finite:
                optimizer.zero_grad()
                torch.autograd.backward(-critic(generate()).mean(), inputs=weights)
                optimizer.step()
                with torch.no_grad():
                    torch._foreach_lerp_(averages, weights, 1 - AVERAGED)
            seconds += time.process_time() - began
            if (step + 1) % (steps // self.looks) == 0:
                finite = finite and all(bool(p.isfinite().all()) for p in averages)
                if finite:
                    looked.take()
            if not finite:
                break
        curves = looked.curves
        final = curves["distances"][-LAST:]
        distance = math.fsum(final) / len(final) if finite else untrained
        metrics = {
            "quality": -distance,
            "distance": distance,
            "floor": 100 * measure_floor(train, tested),
            "diverged": float(not finite),
            "kappa_worst": largest(condition_numbers(critic).values()),
            "train_seconds": seconds,
        }
        for name, curve in (
            ("sigma_max", "sigmas"),
            ("acting_max", "actings"),
            ("lipschitz", "slopes"),
        ):
            metrics[name] = largest(curves[curve][1:] or [math.nan])  # skips the first
        if not images:
            metrics["modes"] = float(count_modes(cell.case, looked.samples())) if finite else 0.0
        return Measured(metrics | look.metrics, curves)

    def note(self, evidence: Evidence) -> str:
        floors = [
            f"{TITLES[case]} {evidence.band('floor', case=case).mean:.2f} %" for case in self.cases
        ]
        return f"{super().note(evidence)} Distance between two sets of data: {', '.join(floors)}."

    def tables(self, evidence: Evidence) -> dict[str, Table]:
        runs = evidence.runs
        peer = runs[runs["method"] == "spectral-norm-all"].groupby("case")["train_seconds"].mean()
        runs["cost"] = runs["train_seconds"] / peer.reindex(runs["case"]).to_numpy()
        return {
            case: evidence.ranking(
                f"Sliced Wasserstein distance, {TITLES[case]}",
                [
                    Column("distance", "distance, %"),
                    *[Column("modes", "modes")] * (case != "digits"),
                    Column("sigma_max", "σ₁", log=True),
                    *[Column("acting_max", "σ₁ as operator", log=True)] * (case == "digits"),
                    Column("lipschitz", "gradient norm", log=True),
                    Column("cost", "CPU time"),
                ],
                contest=case,
                lower=True,
                case=case,
            )
            for case in self.cases
        }

    def verdicts(self, evidence: Evidence) -> dict[str, Verdict]:
        return {
            f"WGAN, {TITLES[case]}, %": evidence.verdict("distance", case, lower=True, case=case)
            for case in self.cases
        }

    def early(self, evidence: Evidence) -> list[Case]:
        return [Case(f"WGAN, {case}", evidence.where(case=case), self.score) for case in self.cases]

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        drawing, panels = figures.figure(columns=len(self.cases), width=5.4, height=3.6)
        for case, panel in zip(self.cases, panels, strict=True):
            methods = evidence.methods(case=case)
            bands = [(m, evidence.band("distance", case=case, method=m)) for m in methods]
            figures.draw_bands(panel, bands, {m: figures.label(m) for m in methods}, lower=True)
            panel.axvline(evidence.band("floor", case=case).mean, color="black", ls=":", lw=0.9)
            panel.set_title(TITLES[case], fontsize=10)
            panel.set_xlabel("distance, %")
            if case == "digits":  # where the baseline is far from all others
                panel.set_xscale("log")
                figures.use_logarithm(panel.xaxis)
        return {self.name: drawing}


class _Looks:
    """Periodic measurements, which do not affect the training.

    Args:
        critic: the critic to measure.
        generator: the generator whose samples are compared.
        tested: held-out data.
    """

    def __init__(self, critic: nn.Module, generator: nn.Module, tested: Tensor) -> None:
        self.critic, self.generator, self.tested = critic, generator, tested
        names = ("distances", "sigmas", "actings", "slopes")
        self.curves: dict[str, list[float]] = {name: [] for name in names}
        with evaluation(critic), torch.no_grad():
            critic(tested[:1])  # torchlip scales its convolutions in the first forward pass

    @torch.no_grad()
    def samples(self) -> Tensor:
        """Generates samples from fixed noise; their number is a multiple of the held-out points."""
        count = len(self.tested) * max(SAMPLES // len(self.tested), 1)
        source = torch.Generator().manual_seed(0)
        samples: Tensor = self.generator(
            torch.randn(count, noise_of(self.generator), generator=source)
        )
        return samples

    def distance(self) -> float:
        """Returns the distance in per cent of the distance of the data mean."""
        return 100 * measure_distance(self.samples(), self.tested)

    def take(self) -> None:
        with evaluation(self.critic):
            found = {
                "distances": self.distance(),
                "sigmas": largest(spectral_norms(self.critic).values()),
                "actings": largest(acting_norms(self.critic, self.tested.shape[1:])),
                "slopes": estimate_lipschitz(self.critic, self.tested, self.samples()),
            }
        for name, value in found.items():
            self.curves[name].append(value)


# --- networks -------------------------------------------------------------------------------------


class GroupSort2(nn.Module):
    """Sorts every pair of channels (Anil, Lucas & Grosse, arXiv 1811.05381)."""

    def forward(self, x: Tensor) -> Tensor:
        pairs = x.unflatten(1, (-1, 2))
        return torch.stack([pairs.amax(2), pairs.amin(2)], 2).flatten(1, 2)


def build_critic(images: bool, sorts: bool) -> nn.Module:
    """Builds a critic with GroupSort if `sorts`, else with LeakyReLU(0.2)."""

    def activation() -> nn.Module:
        return GroupSort2() if sorts else nn.LeakyReLU(0.2)

    if images:
        return nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), activation()),
            *(nn.Conv2d(8, 16, 4, stride=2, padding=1), activation()),
            *(nn.Flatten(), nn.Linear(256, 1)),
        )
    layers = [layer for n in (2, 64, 64) for layer in (nn.Linear(n, 64), activation())]
    return nn.Sequential(*layers, nn.Linear(64, 1))


def build_generator(images: bool) -> nn.Sequential:
    """Builds a generator of images (N, 1, 8, 8) in [-1, 1], or of points (N, 2)."""
    inputs, width, outputs = (16, 128, 64) if images else (2, 64, 2)
    layers = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    layers.append(nn.Linear(width, outputs))
    return nn.Sequential(*layers, *[nn.Tanh(), nn.Unflatten(1, (1, 8, 8))] * images)


def noise_of(generator: Any) -> int:
    """Returns the dimension of the input noise."""
    return int(generator[0].in_features)


# --- data -----------------------------------------------------------------------------------------


def centres(case: str) -> tuple[Tensor, float]:
    """Returns the centres of a mixture and the standard deviation of each mode."""
    if case == "ring":
        angles = torch.arange(8) * (2 * math.pi / 8)
        return torch.stack([angles.cos(), angles.sin()], 1), 0.02
    axis = torch.linspace(-1, 1, 5)
    return torch.cartesian_prod(axis, axis), 0.05


def draw_mixture(case: str, count: int, seed: int) -> Tensor:
    """Draws points (count, 2), equally many per mode."""
    means, deviation = centres(case)
    source = torch.Generator().manual_seed(seed)
    return means[torch.arange(count) % len(means)] + deviation * torch.randn(
        count, 2, generator=source
    )


@cache
def draw_data(case: str, search: bool) -> tuple[Tensor, Tensor]:
    """Returns training data and held-out data; the search has its own held-out data.

    For digits, a sixth of the training set is held out for the search and never trained on.
    """
    if case != "digits":
        held = draw_mixture(case, SAMPLES, SEARCH if search else 0)
        return draw_mixture(case, 10 * SAMPLES, 1), held
    digits = load("digits")
    train, test = (2 * x.view(-1, 1, 8, 8) - 1 for x in (digits.x_train, digits.x_test))
    kept = len(train) // 6
    return train[:-kept], train[-kept:] if search else test


# --- measuring ------------------------------------------------------------------------------------


@cache
def _directions(size: int) -> Tensor:
    """Returns fixed unit vectors (DIRECTIONS, size)."""
    source = torch.Generator().manual_seed(0)
    return nn.functional.normalize(torch.randn(DIRECTIONS, size, generator=source), dim=1)


def measure_sliced(x: Tensor, y: Tensor) -> float:
    """Returns the sliced Wasserstein-1 distance between points x and y, over fixed directions.

    It is exact for these directions. The number of points of x must be a multiple of that of y.
    """
    a, b = ((_directions(z[0].numel()) @ z.flatten(1).T).sort().values for z in (x, y))
    return float((a.view(*b.shape, -1) - b.unsqueeze(2)).abs().double().mean())


def measure_distance(x: Tensor, y: Tensor) -> float:
    """Returns the sliced distance of x to y, relative to the distance of the mean of y to y."""
    return measure_sliced(x, y) / measure_sliced(y.mean(0).expand_as(y), y)


def measure_floor(x: Tensor, y: Tensor) -> float:
    """Returns the distance between the first len(y) points of x and y, both data."""
    return measure_distance(x[: len(y)], y)


def count_modes(case: str, samples: Tensor) -> int:
    """Counts the modes with at least a quarter of their share of samples within three standard
    deviations."""
    means, deviation = centres(case)
    distances = torch.cdist(samples, means)
    near = distances < 3 * deviation
    return int((near.sum(0) >= 0.25 * len(samples) / len(means)).sum())


@torch.no_grad()
def acting_norms(critic: Any, shape: torch.Size) -> list[float]:
    """Returns σ₁ of every layer as a linear operator, from its dense matrix in float64."""
    norms, x = [], torch.zeros(1, *shape)
    for layer in critic:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            points = torch.eye(x.numel()).view(-1, *x.shape[1:])
            dense = (layer(points) - layer(x)).flatten(1).double()
            norms.append(
                float(torch.linalg.matrix_norm(dense, 2)) if dense.isfinite().all() else math.nan
            )
        x = torch.zeros_like(layer(x))
    return norms


def estimate_lipschitz(critic: nn.Module, real: Tensor, fake: Tensor) -> float:
    """Returns the largest gradient norm at points between real and generated points."""
    pairs = min(PAIRS, len(real))
    part = torch.linspace(0, 1, pairs).view(-1, *[1] * (real.ndim - 1))
    between = torch.lerp(real[:pairs], fake[:pairs], part).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(between).sum(), between)
    return float(gradient.flatten(1).norm(dim=1).max())


def check_torchlip() -> None:
    """Raises a ValueError if deel-torchlip is not installed in the compared version."""
    try:
        found = version("deel-torchlip")
    except PackageNotFoundError:
        found = "none"
    if found != TORCHLIP:
        raise ValueError(
            f"the experiment critic needs deel-torchlip {TORCHLIP}; installed: {found}. "
            "Run `pip install './experiments[critic]'`, or use --quick."
        )
