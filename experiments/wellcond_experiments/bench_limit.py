"""Benchmark of hard limits: what they cost, what they keep, and what they let happen in between.

All ways train side by side from the same seed, a stretch of steps each in turn, so that all see one
machine; the clock stops while condition numbers are measured. The ratios are of whole epochs.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

import wellcond as wc
from wellcond.text import dump_json
from wellcond_experiments import _run
from wellcond_experiments.bench_step import Transformer
from wellcond_experiments.data import load
from wellcond_experiments.methods import seeded
from wellcond_experiments.tables import Table

FIRST = "0.weight"
STRETCH = 25  # steps in a row of one way


def configure(benchmarks: Any) -> None:
    limit = benchmarks.add_parser(
        "limit",
        help="what a hard limit costs, and whether it holds",
        description="Training under a hard limit of the condition number, as a multiple of the "
        "time of a training without, by epoch; kappa before and after every application, and "
        "accuracy. Of a 784-2048-10 net, batch 32, Adam 1e-3, with the limit on the first layer, "
        "or of a transformer of 24 blocks at 4,096 tokens a step with the limit on all its "
        "weights.",
        epilog="example: wellcond bench limit --data mnist --condition 10,1000 --every auto,100",
    )
    limit.add_argument("--model", choices=("mlp", "transformer"), default="mlp")
    limit.add_argument("--data", default="digits", help="digits, mnist, PATH (for the mlp)")
    limit.add_argument("--condition", default="10", help="limits, as 3,10,1000 (default 10)")
    limit.add_argument("--every", default="auto", help="as auto,100,400 (default auto)")
    limit.add_argument("--epochs", type=_run.positive, default=2)
    limit.add_argument("--seeds", type=_run.positive, default=1)
    limit.add_argument("--steps", type=_run.positive, help="of an epoch; by default all samples")
    _run.add_output(limit)
    limit.set_defaults(run=run)


class _Task:
    """Data, a net and a test; one epoch is `steps` batches."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.transformer = arguments.model == "transformer"
        if self.transformer:
            source = torch.Generator().manual_seed(0)
            self.x = torch.randint(1000, (8 * 256, 16), generator=source)
            self.y = torch.randint(10, (8 * 256,), generator=source)
            self.batch, self.name = 256, "transformer of 24 blocks of width 128"
        else:
            images = load(arguments.data)
            self.x, self.y = images.normalised(images.x_train), images.y_train
            self.test = images.normalised(images.x_test), images.y_test
            self.batch, self.name = 32, f"{images.pixels}-2048-10 net on {images.name}"
        self.steps = arguments.steps or len(self.x) // self.batch

    def model(self, seed: int) -> nn.Module:
        if self.transformer:
            return seeded(lambda: Transformer(24, 128), seed)
        pixels = self.x.shape[1]
        return seeded(
            lambda: nn.Sequential(nn.Linear(pixels, 2048), nn.ReLU(), nn.Linear(2048, 10)), seed
        )

    def patterns(self, limit: wc.Limit) -> dict[str, wc.Limit | None]:
        return {"*": limit} if self.transformer else {FIRST: limit, "*": None}

    def accuracy(self, model: nn.Module) -> float:
        if self.transformer:
            return math.nan
        with torch.no_grad():
            return 100 * float((model(self.test[0]).argmax(dim=1) == self.test[1]).float().mean())


class _Way:
    """One limit and interval, with a net and an optimizer of its own."""

    def __init__(self, task: _Task, seed: int, limit: float | None, every: str) -> None:
        self.task, self.limit, self.every, self.seed = task, limit, every, seed
        self.model = task.model(seed)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3, fused=True)
        self.order = torch.Generator().manual_seed(seed)
        self.reg: wc.Regularizer | None = None
        self.applications: dict[str, int] = {}
        self.before: list[float] = []
        self.after: list[float] = []
        self.intervals: list[float] = []
        self.seconds = [0.0]  # by epoch
        if limit is not None:
            self.reg = wc.Regularizer(self.model, task.patterns(wc.ConditionLimit(limit)))
            self.reg.attach(self.optimizer, "auto" if every == "auto" else int(every))

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
            self._look()

    def _look(self) -> None:
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


@_run.without_subnormals()
def run(arguments: argparse.Namespace) -> int:
    _run.apply_threads(arguments)
    task = _Task(arguments)
    limits = [float(K) for K in arguments.condition.split(",")]
    plan: list[tuple[float | None, str]] = [(None, "none"), (None, "none again")]
    plan += [(K, every) for K in limits for every in arguments.every.split(",")]
    found: list[_Way] = []
    stretches = -(-task.steps // STRETCH)
    total = arguments.seeds * arguments.epochs * stretches
    with _run.progress(total, "bench limit") as advance:
        for seed in range(arguments.seeds):
            ways = [_Way(task, seed, limit, every) for limit, every in plan]
            shuffled, chance = list(ways), random.Random(seed)
            for epoch in range(arguments.epochs):
                for way in ways:
                    way.seconds += [0.0] * bool(epoch)
                for stretch in range(stretches):
                    chance.shuffle(shuffled)
                    for way in shuffled:
                        way.train(min(STRETCH, task.steps - STRETCH * stretch))
                    advance(f"seed {seed}, epoch {epoch + 1}")
            found += ways
    rows = [_row([w for w in found if (w.limit, w.every) == one], found) for one in plan]
    settings = {"net": task.name, "batch": task.batch, "steps_per_epoch": task.steps}
    settings |= {"epochs": arguments.epochs, "seeds": arguments.seeds}
    settings["threads"] = torch.get_num_threads()
    if arguments.json:
        document = {"benchmark": "limit", "settings": settings, "versions": _run.versions()}
        print(dump_json({**document, "ways": rows}), end="")
        return 0
    epochs = range(arguments.epochs)
    Table(
        f"Training a {task.name}, batch {task.batch}, Adam 1e-3, {task.steps} steps an epoch, "
        f"{arguments.seeds} seeds, {torch.get_num_threads()} threads: medians of the time as a "
        "multiple of a training without, κ before an application but the first, κ after, steps "
        "between two",
        [
            *("way", *(f"epoch {e + 1}" for e in epochs), "κ before, median", "largest"),
            *("κ after, largest", "steps, median", "accuracy %"),
        ],
        [
            [
                row["way"],
                *(f"{ratio:.2f}" for ratio in row["ratios"]),
                *(_shown(row[key]) for key in ("before_median", "before_largest")),
                _shown(row["after_largest"], 9),
                _shown(row["interval_median"]),
                _shown(row["accuracy"]),
            ]
            for row in rows
        ],
    ).print()
    return 0


def _shown(number: float | None, digits: int = 4) -> str:
    return "" if number is None or math.isnan(number) else f"{number:.{digits}g}"


def _row(ways: list[_Way], found: list[_Way]) -> dict[str, Any]:
    """Over the seeds: medians of ratios epoch by epoch, to the mean of the two without."""
    ratios = []
    for way in ways:
        without = [w for w in found if w.seed == way.seed and w.limit is None]
        means = [
            statistics.mean(times) for times in zip(*(w.seconds for w in without), strict=True)
        ]
        ratios.append([own / mean for own, mean in zip(way.seconds, means, strict=True)])
    before, after = ([x for w in ways for x in getattr(w, key)] for key in ("before", "after"))
    intervals = [x for w in ways for x in w.intervals]
    accuracies = [way.task.accuracy(way.model) for way in ways]
    return {
        "way": ways[0].label,
        "limit": ways[0].limit,
        "every": ways[0].every,
        "ratios": [statistics.median(one) for one in zip(*ratios, strict=True)],
        "applications": len(after),
        "before_median": statistics.median(before) if before else None,
        "before_largest": max(before, default=None),
        "after_largest": max(after, default=None),
        "interval_median": statistics.median(intervals) if intervals else None,
        "accuracy": statistics.mean(accuracies),
        "accuracies": accuracies,
    }
