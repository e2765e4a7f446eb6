"""Trainings of a 784-512-10 network: accuracy of the warm-started subspace, effect of strengths.

`fidelity` trains with the warm-started subspace and with an exact decomposition in every step, from
the same seed, and compares condition numbers. `strength` trains over a grid of strengths and
limits.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import wellcond as wc
from wellcond_experiments.benchmark import Benchmark, count, option
from wellcond_experiments.command import Advance, positive
from wellcond_experiments.data import Images, load
from wellcond_experiments.methods import run_seeded

FIRST = "0.weight"
SIDE = 28  # side to which all images are scaled
GRID = {"gradient": (1e-3, 1e-2, 0.1, 1.0, 10.0), "proximal": (1.0, 10.0, 100.0, 1e3)}
LIMITS = (30.0, 10.0, 3.0)


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        how: "none", "gradient", "proximal" or "limit".
        strength: strength of the gradient or of the proximal step, or the limit.
        vectors: "warm" for the warm-started subspace of wellcond, "exact" for a decomposition in
            every step.
        block: width of the warm-started subspace; 0 without one.
        every: steps between two proximal steps; 0 with the gradient, None for the default.
        seed: seed of the initial weights and of the order of the images.
    """

    how: str
    strength: float
    vectors: str = "warm"
    block: int = 32
    every: int | None = None
    seed: int = 0

    def train(self, images: Images, epochs: int) -> dict[str, Any]:
        """Trains; returns κ of the first layer, the accuracy in per cent, and shortened steps."""
        model = run_seeded(
            lambda: nn.Sequential(nn.Linear(images.pixels, 512), nn.Sigmoid(), nn.Linear(512, 10)),
            self.seed,
        )
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        W = model.get_parameter(FIRST)
        reg = None
        if self.vectors == "warm" and self.how != "none":
            rule = wc.ConditionLimit if self.how == "limit" else wc.ConditionPenalty
            rules = {FIRST: rule(self.strength), "*": None}
            reg = wc.Regularizer(model, rules, block_size=self.block)
            if self.how != "gradient":
                reg.attach(optimizer, every=self.every)
        x, y = images.normalise(images.x_train), images.y_train
        order = torch.Generator().manual_seed(self.seed)
        for _ in range(epochs):
            for indices in torch.split(torch.randperm(len(x), generator=order), 32):
                optimizer.zero_grad()
                torch.autograd.backward(nn.functional.cross_entropy(model(x[indices]), y[indices]))
                if self.how == "gradient" and reg is not None:
                    reg.add_gradients()
                elif self.how == "gradient" and W.grad is not None:
                    W.grad.add_(exact_gradient(W.detach()), alpha=self.strength)
                optimizer.step()
                if self.how == "proximal" and reg is None:
                    with torch.no_grad():
                        W.copy_(wc.proximal_step(W, 1e-3 * self.strength))
        shortened = 0
        if reg is not None:
            reg.detach()
            reg.enforce()  # as before every checkpoint
            shortened = reg.measure()[FIRST].shortened_steps
        with torch.no_grad():
            right = model(images.normalise(images.x_test)).argmax(1) == images.y_test
        return {
            "condition_number": float(wc.condition_number(W)),
            "accuracy": 100 * float(right.double().mean()),
            "shortened_steps": shortened,
        }


def exact_gradient(S: Tensor) -> Tensor:
    """Returns `wellcond.condition_penalty_gradient` from eigenvectors of the float64 Gram matrix:
    exact up to rounding, and faster than an SVD."""
    wide = S.double() if S.shape[0] <= S.shape[1] else S.double().mT
    u = torch.linalg.eigh(wide @ wide.mT).eigenvectors[:, -1:]
    gradient: Tensor = u @ (u.mT @ wide) - wide / len(wide)
    return (gradient if S.shape[0] <= S.shape[1] else gradient.mT).to(S.dtype)


def scaled_images(source: str, side: int) -> Images:
    """Loads the images of `--data` and scales them bilinearly to this side."""
    images = load(source)
    if images.side == side:
        return images

    def scale(x: Tensor) -> Tensor:
        square = x.reshape(-1, 1, images.side, images.side)
        return nn.functional.interpolate(square, size=(side, side), mode="bilinear").flatten(1)

    name = f"{images.name} scaled to {side}x{side}"
    x_train, x_test = scale(images.x_train), scale(images.x_test)
    return replace(images, name=name, side=side, x_train=x_train, x_test=x_test)


def parse_numbers(text: str) -> list[int]:
    """Parses comma-separated positive integers."""
    return [positive(part) for part in text.split(",")]


@dataclass(frozen=True)
class _Trainings(Benchmark):
    """Common base of `fidelity` and `strength`."""

    legend: ClassVar[str]
    data: str = option("digits", "digits (scaled to 28x28), mnist, PATH")
    epochs: int = count(10)

    @cached_property
    def images(self) -> Images:
        return scaled_images(self.data, SIDE)

    def document(self, runs: list[dict[str, Any]]) -> dict[str, Any]:
        settings = {"data": self.images.name, "epochs": self.epochs, "lr": 1e-3, "batch": 32}
        return {"settings": settings, "runs": runs}

    def title(self, document: dict[str, Any]) -> str:
        return (
            f"Condition number of layer 1 after {self.epochs} epochs of Adam 1e-3, batch 32, "
            f"784-512-10 sigmoid on {self.images.name}; {self.legend}"
        )


@dataclass(frozen=True)
class Fidelity(_Trainings):
    name = "fidelity"
    help = "compares the warm-started subspace with an exact SVD in every step"
    description = (
        "Condition number of the first layer of a 784-512-10 network after training, with the "
        "warm-started subspace and with an exact decomposition in every step."
    )
    example = "--block 16,32 --every 5,10,20"
    legend = "ratio to an exact decomposition in every step"
    columns: ClassVar = {
        "how": ("method", ""),
        "strength": ("strength", "g"),
        "vectors": ("vectors", ""),
        "block": ("block", ""),
        "every": ("every", ""),
        "seed": ("seed", ""),
        "condition_number": ("kappa", ".2f"),
        "ratio": ("ratio", ".3f"),
        "accuracy": ("accuracy, %", ".1f"),
        "shortened_steps": ("shortened", ""),
    }

    seeds: int = count(1)
    block: tuple[int, ...] = option((32,), "widths, such as 16,32", type=parse_numbers)
    every: tuple[int, ...] = option((10,), "of attach, such as 5,10,20", type=parse_numbers)

    @cached_property
    def plan(self) -> list[Run]:
        runs = []
        for strength in (0.1, 1.0):
            runs += [Run("gradient", strength, "exact", 0, 0)]
            runs += [Run("gradient", strength, "warm", block, 0) for block in self.block]
        for strength in (10.0, 100.0):
            runs += [Run("proximal", strength, "exact", 0, 1)]
            runs += [
                Run("proximal", strength, "warm", block, every)
                for block in self.block
                for every in self.every
            ]
        return [replace(run, seed=seed) for run in runs for seed in range(self.seeds)]

    @property
    def total(self) -> int:
        return len(self.plan)

    def measure(self, advance: Advance) -> dict[str, Any]:
        runs = []
        exact: dict[Any, float] = {}  # exact runs come first at every strength
        for run in self.plan:
            found = run.train(self.images, self.epochs)
            kappa = exact.setdefault((run.how, run.strength, run.seed), found["condition_number"])
            runs.append(asdict(run) | found | {"ratio": found["condition_number"] / kappa})
            advance(f"{run.how} {run.strength:g} {run.vectors}")
        return self.document(runs)


@dataclass(frozen=True)
class Strength(_Trainings):
    name = "strength"
    help = "condition number by strength"
    description = (
        "Accuracy and condition number of the first layer of a 784-512-10 network after training, "
        "over a grid of strengths."
    )
    example = "--data mnist --epochs 3"
    legend = (
        "proximal and limit: attach; cost: time relative to a training without a penalty just "
        "before"
    )
    columns: ClassVar = {
        "how": ("method", ""),
        "strength": ("strength or limit", "g"),
        "condition_number": ("kappa", ".3g"),
        "accuracy": ("accuracy, %", ".1f"),
        "shortened_steps": ("shortened", ""),
        "cost": ("cost", ".1f"),
    }

    @cached_property
    def plan(self) -> list[Run]:
        limits = [Run("limit", limit) for limit in LIMITS]
        return [Run(how, s) for how, strengths in GRID.items() for s in strengths] + limits

    @property
    def total(self) -> int:
        return len(self.plan)

    def measure(self, advance: Advance) -> dict[str, Any]:
        nothing = Run("none", 0.0)
        nothing.train(self.images, epochs=1)  # warm-up, so that one-time costs count in no row
        runs: list[dict[str, Any]] = []
        for run in self.plan:
            # Alternating with a training without a penalty, so that other load affects both.
            base, found = self._timed(nothing), self._timed(run)
            runs += [found] if runs else [base | {"cost": 1.0}, found]
            found["cost"] = found["seconds"] / base["seconds"]
            advance(f"{run.how} {run.strength:g}")
        return self.document(runs)

    def _timed(self, run: Run) -> dict[str, Any]:
        started = time.perf_counter()
        found = run.train(self.images, self.epochs)
        seconds = time.perf_counter() - started
        return {"how": run.how, "strength": run.strength} | found | {"seconds": seconds}
