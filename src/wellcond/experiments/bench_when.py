"""Benchmark of the decision: a projection at the end, a hard limit in training, or a soft penalty.

All ways train one net on the same batches from the same weights, per seed; what is projected once
is a copy of the net that trained without a penalty.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

import wellcond as wc
from wellcond.experiments import _run
from wellcond.experiments.data import Images, load
from wellcond.experiments.methods import condition_numbers, seeded
from wellcond.experiments.tables import Band, Table, interval
from wellcond.text import dump_json

NONE, PROJECTED, LIMITED = "none", "projected at the end", "limit, attach"
ADDED, ATTACHED, TIKHONOV = "Condition, add_gradients_", "Condition, attach", "Tikhonov, attach"
SOFT = [(ADDED, 0.1), (ADDED, 1.0), (ATTACHED, 100.0), (ATTACHED, 1000.0), (TIKHONOV, 1.0)]
ACCURACIES, KAPPAS = ("accuracy", "accuracy_in_noise"), ("kappa_worst", "kappa_square")
DEFAULTS: dict[str, dict[str, Any]] = {
    "mlp": {"data": "digits", "epochs": 3, "samples": 60_000},
    "cnn": {"data": "cifar10", "epochs": 4, "samples": 8_000},
}
BATCH = {"mlp": 32, "cnn": 64}
SQUARE = {"mlp": "2.weight", "cnn": "11.weight"}


def configure(benchmarks: Any) -> None:
    when = benchmarks.add_parser(
        "when",
        help="a projection at the end, a hard limit in training, or a soft penalty?",
        description="Accuracy, clean and in Gaussian noise of the deviation of the pixels, κ and "
        "CPU time of nets that are projected once, limited while they train, or penalised; on all "
        "weights, one of which is square. Of an n-512-512-10 net, or of three convolutions before "
        "n-n-256-10, with n = 1024 for images of 32x32. Adam 1e-3.",
        epilog="example: wellcond bench when --model cnn --data cifar10.npz --seeds 3",
    )
    when.add_argument("--model", choices=tuple(DEFAULTS), default="mlp")
    when.add_argument("--data", help="digits (default of mlp), mnist, cifar10 (of cnn), PATH")
    when.add_argument("--condition", default="20,5,3,2", help="limits (default 20,5,3,2)")
    when.add_argument("--epochs", type=_run.positive, help="default 3 of mlp, 4 of cnn")
    when.add_argument("--samples", type=_run.positive, help="to train on; default of cnn 8000")
    when.add_argument("--seeds", type=_run.positive, default=1)
    _run.add_output(when)
    when.set_defaults(run=run)


class _Task:
    """The data and the net."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.images = load(arguments.data, colour=True)
        self.name, self.epochs = arguments.model, arguments.epochs
        images, few = self.images, arguments.samples
        if self.name == "cnn" and images.side < 8:
            raise ValueError(f"The cnn needs images of 8x8 at least, got side {images.side}.")
        self.x, self.y = images.normalised(images.x_train[:few]), images.y_train[:few]
        self.x_test = images.normalised(images.x_test)

    def model(self, seed: int) -> nn.Module:
        return seeded(lambda: BUILD[self.name](self.images), seed)

    def train(self, way: str, strength: float, seed: int) -> tuple[nn.Module, float]:
        """The trained net, and CPU seconds."""
        model = self.model(seed)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
        rules: dict[str, Any] = {LIMITED: wc.ConditionLimit, TIKHONOV: wc.Tikhonov}
        reg = None
        if way != NONE:
            reg = wc.Regularizer(model, rules.get(way, wc.Condition)(strength))
            if way != ADDED:
                reg.attach(optimizer)
        order = torch.Generator().manual_seed(seed)
        started = time.process_time()
        for _ in range(self.epochs):
            shuffled = torch.randperm(len(self.x), generator=order)
            for indices in torch.split(shuffled, BATCH[self.name]):
                optimizer.zero_grad()
                logits = model(self.x[indices])
                torch.autograd.backward(nn.functional.cross_entropy(logits, self.y[indices]))
                if reg is not None and way == ADDED:
                    reg.add_gradients_()
                optimizer.step()
        if reg is not None:
            reg.enforce_()
        return model, time.process_time() - started

    def noisy(self, seed: int) -> Tensor:
        """The test images in noise, the same for all ways of a seed."""
        source = torch.Generator().manual_seed(seed)
        return self.x_test + torch.randn(self.x_test.shape, generator=source)

    def measured(self, model: nn.Module, noisy: Tensor) -> dict[str, float]:
        """The metrics."""
        kappas = condition_numbers(model)
        # nan if one is.
        worst = float(torch.tensor(list(kappas.values()), dtype=torch.float64).max())
        tested = (self._accuracy(model, x) for x in (self.x_test, noisy))
        square = kappas[SQUARE[self.name].removesuffix(".weight")]
        return dict(zip(ACCURACIES + KAPPAS, (*tested, worst, square), strict=True))

    def _accuracy(self, model: nn.Module, x: Tensor) -> float:
        with torch.no_grad():
            found = torch.cat([model(part).argmax(dim=1) for part in torch.split(x, 500)])
        return 100 * float((found == self.images.y_test).double().mean())


def _mlp(images: Images) -> nn.Module:
    layers = [nn.Linear(images.pixels, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 10))


def _cnn(images: Images) -> nn.Module:
    shape = (images.channels, images.side, images.side)
    layers: list[nn.Module] = [nn.Unflatten(1, shape)]
    for before, after in ((images.channels, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    n = 64 * (images.side // 8) ** 2
    layers += [nn.Flatten(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 256), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, 10))


BUILD = {"mlp": _mlp, "cnn": _cnn}


def run(arguments: argparse.Namespace) -> int:
    _run.apply_threads(arguments)
    for option, value in DEFAULTS[arguments.model].items():
        setattr(arguments, option, getattr(arguments, option) or value)
    limits = [float(K) for K in arguments.condition.split(",")]
    for K in limits:
        wc.ConditionLimit(K)  # refuses what is none, before anything is trained
    task = _Task(arguments)
    plan = [(NONE, 0.0)] + [(way, K) for way in (PROJECTED, LIMITED) for K in limits] + SOFT
    runs: list[dict[str, Any]] = []
    with _run.progress(arguments.seeds * len(plan), "bench when") as advance:
        for seed in range(arguments.seeds):
            free, alone = task.train(NONE, 0.0, seed)
            noisy = task.noisy(seed)
            for way, strength in plan:
                if way == NONE:
                    model, seconds = free, alone
                elif way == PROJECTED:
                    model, started = copy.deepcopy(free), time.process_time()
                    wc.Regularizer(model, wc.ConditionLimit(strength)).enforce_()
                    seconds = alone + time.process_time() - started
                else:
                    model, seconds = task.train(way, strength, seed)
                one: dict[str, Any] = {"way": way, "strength": strength, "seed": seed}
                one |= task.measured(model, noisy) | {"seconds": seconds, "cost": seconds / alone}
                without = runs[seed * len(plan)] if way != NONE else one
                one |= {f"{key}_change": one[key] - without[key] for key in ACCURACIES}
                runs.append(one)
                advance(f"seed {seed}, {way} {strength:g}")
    ways = [_over_seeds([r for r in runs if (r["way"], r["strength"]) == one]) for one in plan]
    settings = {key: getattr(arguments, key) for key in ("model", "epochs", "seeds")}
    settings |= {"data": task.images.name, "samples": len(task.x), "batch": BATCH[task.name]}
    settings["threads"] = torch.get_num_threads()
    if arguments.json:
        document = {"benchmark": "when", "settings": settings, "versions": _run.versions()}
        print(dump_json({**document, "runs": runs, "ways": ways}), end="")
    else:
        _print(settings, ways)
    return 0


def _print(settings: dict[str, Any], ways: list[dict[str, Any]]) -> None:
    over = _run.over_seeds(settings["seeds"])
    names = [[row["way"], f"{row['strength']:g}" if row["way"] != NONE else ""] for row in ways]
    keys = [key for name in ACCURACIES for key in (name, f"{name}_change")]
    Table(
        "{model} on {samples} images of {data}, epochs: {epochs}, batch {batch}, Adam 1e-3, "
        "threads: {threads}; the way on all weights. Accuracy, clean and in Gaussian noise of the "
        "deviation of the pixels; change: of the same seed without. {}".format(over, **settings),
        ["way", "K or strength", "clean, %", "change", "in noise, %", "change"],
        [
            [*name, *(str(Band(**row[key])) for key in keys)]
            for name, row in zip(names, ways, strict=True)
        ],
    ).print()
    Table(
        "Condition numbers, and CPU seconds as a multiple of those without, median over the seeds",
        ["way", "K or strength", "κ of the worst weight", "κ of the square one", "time"],
        [
            [*name, *(str(Band(**row[key])) for key in KAPPAS), f"{row['cost']:.2f}"]
            for name, row in zip(names, ways, strict=True)
        ],
    ).print()


def _over_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    means = {
        key: interval([run[key] for run in runs], log=key in KAPPAS)._asdict()
        for key in (*ACCURACIES, *(f"{key}_change" for key in ACCURACIES), *KAPPAS)
    }
    cost = statistics.median(run["cost"] for run in runs)
    return {"way": runs[0]["way"], "strength": runs[0]["strength"], **means, "cost": cost}
