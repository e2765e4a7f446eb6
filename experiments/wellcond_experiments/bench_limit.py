"""Cost of hard limits: what they take, what they keep, and what they let happen in between.

All nets train side by side from the same seed, a stretch of steps each in turn, so that all see one
machine; the clock stops while condition numbers are measured. The ratios are of whole epochs.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import wellcond as wc
from wellcond_experiments.bench_step import FIRST, Transformer
from wellcond_experiments.benchmark import Benchmark, count, option
from wellcond_experiments.command import Advance
from wellcond_experiments.data import load
from wellcond_experiments.methods import run_seeded, without_subnormals

STRETCH = 25  # steps in a row of one net


@dataclass(frozen=True)
class Limit(Benchmark):
    name = "limit"
    help = "what a hard limit costs, and whether it holds"
    description = (
        "Training under a hard limit of the condition number, as a multiple of the time of a "
        "training without, by epoch; kappa before and after every application, and accuracy. Of a "
        "784-2048-10 net, batch 32, Adam 1e-3, with the limit on the first layer, or of a "
        "transformer of 24 blocks at 4,096 tokens per step with the limit on all its weights."
    )
    example = "--data mnist --condition 10,1000 --every auto,100"
    rows = "ways"
    columns: ClassVar = {
        "way": ("method", ""),
        "ratios": ("time by epoch", ".2f"),
        "before_median": ("κ before, median", ".4g"),
        "before_largest": ("largest", ".4g"),
        "after_largest": ("κ after, largest", ".9g"),
        "interval_median": ("steps, median", ".4g"),
        "accuracy": ("accuracy %", ".4g"),
    }

    model: str = option("mlp", choices=("mlp", "transformer"))
    data: str = option("digits", "digits, mnist, PATH (for the mlp)")
    condition: str = option("10", "limits, as 3,10,1000")
    every: str = option("auto", "as auto,100,400")
    epochs: int = count(2)
    seeds: int = count(1)
    steps: int | None = count(None, "of an epoch; by default all samples")

    @cached_property
    def task(self) -> Task:
        return draw_tokens() if self.model == "transformer" else load_images(self.data)

    @property
    def steps_per_epoch(self) -> int:
        return self.steps or len(self.task.x) // self.task.batch

    @property
    def total(self) -> int:
        return self.seeds * self.epochs * math.ceil(self.steps_per_epoch / STRETCH)

    @without_subnormals()
    def measure(self, advance: Advance) -> dict[str, Any]:
        task, steps = self.task, self.steps_per_epoch
        plan: list[tuple[float | None, str]] = [(None, "none"), (None, "none again")]
        limits = [float(limit) for limit in self.condition.split(",")]
        plan += [(limit, every) for limit in limits for every in self.every.split(",")]
        by_seed: list[list[Training]] = []
        for seed in range(self.seeds):
            trainings = [Training(task, seed, limit, every) for limit, every in plan]
            chance = random.Random(seed)
            for epoch in range(self.epochs):
                for _ in train_epoch(trainings, steps, chance):
                    advance(f"seed {seed}, epoch {epoch + 1}")
            by_seed.append(trainings)
        settings = {"net": task.name, "batch": task.batch, "steps_per_epoch": steps}
        settings |= {"epochs": self.epochs, "seeds": self.seeds}
        settings["threads"] = torch.get_num_threads()
        # The first two of a seed are those without a limit.
        rows = [
            summarise([(one, without[:2]) for one, without in zip(same, by_seed, strict=True)])
            for same in zip(*by_seed, strict=True)
        ]
        return {"settings": settings, "ways": rows}

    def title(self, document: dict[str, Any]) -> str:
        settings = document["settings"]
        return (
            f"Training a {settings['net']}, batch {settings['batch']}, Adam 1e-3, "
            f"{settings['steps_per_epoch']} steps per epoch, {self.seeds} seeds, "
            f"{settings['threads']} threads: medians of the time of each epoch as a multiple of a "
            "training without, κ before an application but the first, κ after, steps between two"
        )


@dataclass(frozen=True)
class Task:
    """Data, a net, and what limit is on which weights."""

    name: str
    x: Tensor
    y: Tensor
    test: tuple[Tensor, Tensor] | None
    batch: int
    build: Callable[[], nn.Module]
    pattern: str  # of the weights under the limit

    def accuracy(self, model: nn.Module) -> float:
        """In per cent; nan without images to test on."""
        if self.test is None:
            return math.nan
        x, y = self.test
        with torch.no_grad():
            return 100 * float((model(x).argmax(dim=1) == y).float().mean())


def draw_tokens() -> Task:
    source = torch.Generator().manual_seed(0)
    x = torch.randint(1000, (8 * 256, 16), generator=source)
    y = torch.randint(10, (8 * 256,), generator=source)
    name = "transformer of 24 blocks of width 128"
    return Task(name, x, y, None, 256, lambda: Transformer(24, 128), "*")


def load_images(source: str) -> Task:
    images = load(source)
    pixels = images.pixels

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(pixels, 2048), nn.ReLU(), nn.Linear(2048, 10))

    x, x_test = images.normalise(images.x_train), images.normalise(images.x_test)
    test = (x_test, images.y_test)
    return Task(f"{pixels}-2048-10 net on {images.name}", x, images.y_train, test, 32, build, FIRST)


class Training:
    """A net with an optimizer of its own, under one limit that is applied at one interval."""

    def __init__(self, task: Task, seed: int, limit: float | None, every: str) -> None:
        self.task, self.limit, self.every = task, limit, every
        self.model = run_seeded(task.build, seed)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3, fused=True)
        self.order = torch.Generator().manual_seed(seed)
        self.reg: wc.Regularizer | None = None
        self.applications: dict[str, int] = {}
        self.before: list[float] = []
        self.after: list[float] = []
        self.intervals: list[float] = []
        self.seconds: list[float] = []  # by epoch
        if limit is not None:
            rules: dict[str, wc.Limit | None] = {task.pattern: wc.ConditionLimit(limit)}
            rules.setdefault("*", None)
            self.reg = wc.Regularizer(self.model, rules)
            self.reg.attach(self.optimizer, every="auto" if every == "auto" else int(every))

    @property
    def label(self) -> str:
        return self.every if self.limit is None else f"κ ≤ {self.limit:g}, every={self.every}"

    def train(self, steps: int) -> None:
        for _ in range(steps):
            chosen = torch.randint(len(self.task.x), (self.task.batch,), generator=self.order)
            x, y = self.task.x[chosen], self.task.y[chosen]
            started = time.perf_counter()
            self.optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(self.model(x), y))
            self.optimizer.step()
            self.seconds[-1] += time.perf_counter() - started
            self._record()

    def _record(self) -> None:
        """After an application: kappa as stored, and what it was before; off the clock."""
        if self.reg is None:
            return
        for name, state in self.reg.state_dict().items():
            applications, _, _, kappa, interval, *_ = state["pace"].tolist()
            if applications == self.applications.get(name, 0):
                continue
            weight = self._weight(name)
            self.after.append(float(wc.condition_number(weight)))
            if self.applications.get(name, 0):  # the first says how it was made
                if kappa:  # else it was only seen to obey
                    self.before.append(kappa)
                self.intervals.append(interval)
            self.applications[name] = int(applications)

    def _weight(self, name: str) -> Tensor:
        parameter, _, view = name.partition(":")
        weight = self.model.get_parameter(parameter).detach()
        return weight if not view else weight.chunk(3)["qkv".index(view)]


def train_epoch(trainings: list[Training], steps: int, chance: random.Random) -> Iterator[None]:
    """One epoch of all, a stretch of one and then of another; comes back after each stretch."""
    for training in trainings:
        training.seconds.append(0.0)
    order = list(trainings)
    for begun in range(0, steps, STRETCH):
        chance.shuffle(order)
        for training in order:
            training.train(min(STRETCH, steps - begun))
        yield


def summarise(seeds: list[tuple[Training, list[Training]]]) -> dict[str, Any]:
    """Over the seeds: medians of ratios epoch by epoch, to the mean of the two without a limit."""
    ratios = []
    for one, without in seeds:
        means = [statistics.mean(pair) for pair in zip(*(t.seconds for t in without), strict=True)]
        ratios.append([own / mean for own, mean in zip(one.seconds, means, strict=True)])
    trainings = [one for one, _ in seeds]
    before = [kappa for one in trainings for kappa in one.before]
    after = [kappa for one in trainings for kappa in one.after]
    intervals = [steps for one in trainings for steps in one.intervals]
    accuracies = [one.task.accuracy(one.model) for one in trainings]
    return {
        "way": trainings[0].label,
        "limit": trainings[0].limit,
        "every": trainings[0].every,
        "ratios": [statistics.median(one) for one in zip(*ratios, strict=True)],
        "applications": len(after),
        "before_median": statistics.median(before) if before else None,
        "before_largest": max(before, default=None),
        "after_largest": max(after, default=None),
        "interval_median": statistics.median(intervals) if intervals else None,
        "accuracy": statistics.mean(accuracies),
        "accuracies": accuracies,
    }
