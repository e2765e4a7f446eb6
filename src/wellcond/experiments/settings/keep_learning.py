"""A network that must learn one task after another: does it still learn the last one?

Permuted MNIST, online: every task has a permutation of the pixels of its own, every image is seen
once, and counts as right if the network says so before it learns from it (Dohare et al., Nature
632, 2024, which shows that Adam alone loses the ability).
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import nn

from wellcond.experiments import figures
from wellcond.experiments.data import Images, load
from wellcond.experiments.evidence import Column, Evidence, Verdict
from wellcond.experiments.grid import Cell, Measured, Setting, strengths_of
from wellcond.experiments.methods import (
    METHODS,
    WAYS,
    Training,
    condition_numbers,
    largest,
    spectral_norms,
)
from wellcond.experiments.tables import Table

WIDTH, BATCH = 100, 16
RATES = (3e-4, 1e-3, 3e-3)
CHANCE = 10.0  # per cent of a network that has diverged


class KeepLearning(Setting):
    name = "keep-learning"
    help = "one task after another: does the network still learn?"
    protocol = (
        "Permuted MNIST, online: 784-100-100-10 with ReLU, batch 16, Adam, every image once; "
        "accuracy before each step."
    )
    score = "accuracy"
    finalists = 3

    def __init__(self, data: str = "", quick: bool = False, seeds: int | None = None) -> None:
        super().__init__(data, quick, seeds)
        self.tasks = 4 if quick else 80
        self.first_round = 2 if quick else 30
        self.per_task = 160 if quick else 10_000
        self.rates = (1e-3,) if quick else RATES
        self.methods = strengths_of(*(("none", "l2", "isometry") if quick else WAYS))

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "tasks": self.tasks,
            "tasks_of_first_round": self.first_round,
            "images_per_task": self.per_task,
        }

    @cached_property
    def images(self) -> Images:
        return load(self.data)

    def build(self, norm: bool) -> nn.Module:
        layers: list[nn.Module] = []
        inputs = self.images.pixels
        for _ in range(2):
            layers += [nn.Linear(inputs, WIDTH), *[nn.LayerNorm(WIDTH)] * norm, nn.ReLU()]
            inputs = WIDTH
        return nn.Sequential(*layers, nn.Linear(inputs, 10))

    def run(self, cell: Cell) -> Measured:
        """The search has images, and permutations, of its own: a sixth of those for training."""
        images = self.images
        held = len(images.x_train) // 6
        part = slice(-held, None) if cell.search else slice(0, -held)
        x, y = images.normalised(images.x_train)[part], images.y_train[part]
        training = METHODS[cell.method](
            self.build, cell.strength, cell.lr, cell.seed, gain=math.sqrt(2)
        )
        source = torch.Generator().manual_seed(cell.seed)
        curves: dict[str, list[float]] = {"accuracies": [], "kappa": [], "sigma_max": []}
        for task in range(self.first_round if cell.search and not cell.final else self.tasks):
            if task:
                training.between_tasks()
            curves["accuracies"].append(self._learn(training, x, y, source))
            curves["kappa"].append(largest(condition_numbers(training.model).values()))
            curves["sigma_max"].append(largest(spectral_norms(training.model).values()))
        accuracies = curves["accuracies"]
        last = accuracies[-max(len(accuracies) // 10, 1) :]
        metrics = {
            "accuracy": math.fsum(last) / len(last),
            "accuracy_of_all": math.fsum(accuracies) / len(accuracies),
            "first": accuracies[0],
            "kappa_worst": curves["kappa"][-1],
        }
        return Measured(metrics, curves)

    def _learn(
        self, training: Training, x: torch.Tensor, y: torch.Tensor, source: torch.Generator
    ) -> float:
        """Learns a task; the share of the images, in per cent, that were right at first sight."""
        order = torch.randperm(len(x), generator=source)[: self.per_task]
        pixels = torch.randperm(x.shape[1], generator=source)
        x, y = x[order][:, pixels], y[order]
        right = torch.zeros((), dtype=torch.int64)
        for images, labels in zip(torch.split(x, BATCH), torch.split(y, BATCH), strict=True):
            logits = training.model(images)
            right += (logits.detach().argmax(1) == labels).sum()
            if not training.step(nn.functional.cross_entropy(logits, labels)):
                return CHANCE
        return 100 * float(right) / len(x)

    def tables(self, evidence: Evidence) -> dict[str, Table]:
        columns = [
            Column("accuracy", "last tenth, %"),
            Column("accuracy_of_all", "all tasks, %"),
            Column("first", "first task, %"),
            Column("kappa_worst", "κ of the worst weight", log=True),
        ]
        return {"accuracy": evidence.ranking("Accuracy at first sight", columns)}

    def verdicts(self, evidence: Evidence) -> dict[str, Verdict]:
        title = "accuracy at first sight, last 8 of 80 tasks of permuted MNIST, %"
        return {title: evidence.verdict("accuracy")}

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        drawing, (left, right) = figures.figure(columns=2, width=6.4, height=4.8)
        bands = {m: evidence.band("accuracy", method=m) for m in evidence.methods()}
        names = {method: figures.label(method) for method in bands}
        figures.compared(left, list(bands.items()), names)
        left.set_xlabel("accuracy at first sight in the last tenth of the tasks, %")
        shown = figures.selected({method: band.mean for method, band in bands.items()})
        curves = {m: list(evidence.where(method=m)["accuracies"]) for m in shown}
        # One task is easier than another.
        figures.over_tasks(right, curves, window=max(self.tasks // 16, 1))
        right.set_ylabel("accuracy at first sight, % (mean of five tasks)")
        right.legend(fontsize=8, frameon=False)
        return {"keep-learning": drawing}
