"""A network that must learn random labels by heart, again and again: can it still do so at the end?

Every task gives the same images new random labels, so that nothing of one task helps in the next
(Lyle et al., arXiv 2303.01486; Kumar, Marklund & Van Roy, arXiv 2308.11958).
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

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


class Memorise(Setting):
    name = "memorise"
    help = "random labels, one task after another: does the network still learn them by heart?"
    protocol = (
        "1,280 images of MNIST, new random labels in every task of 10 epochs: 784-100-100-10 with "
        "ReLU, batch 16, Adam; accuracy on these images at the end of each task."
    )
    finalists = 2

    def __init__(self, data: str = "", quick: bool = False, seeds: int | None = None) -> None:
        super().__init__(data, quick, seeds)
        self.tasks = 3 if quick else 30
        self.first_round = 2 if quick else 15
        self.count = 160 if quick else 1280
        self.epochs = 10
        self.rates = (1e-3,) if quick else RATES
        self.methods = strengths_of(*(("none", "l2", "isometry") if quick else WAYS))

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "tasks": self.tasks,
            "tasks_of_first_round": self.first_round,
            "images": self.count,
            "epochs": self.epochs,
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

    def drawn(self, cell: Cell) -> Tensor:
        """Which images it learns: in the search some of a sixth that is kept for it."""
        total = len(self.images.x_train)
        held = total // 6
        source = torch.Generator().manual_seed(cell.seed)
        if cell.search:
            return total - held + torch.randperm(held, generator=source)[: self.count]
        return torch.randperm(total - held, generator=source)[: self.count]

    def run(self, cell: Cell) -> Measured:
        x = self.images.normalised(self.images.x_train[self.drawn(cell)])
        training = METHODS[cell.method](
            self.build, cell.strength, cell.lr, cell.seed, gain=math.sqrt(2)
        )
        source = torch.Generator().manual_seed(cell.seed)
        curves: dict[str, list[float]] = {"accuracies": [], "kappa": [], "sigma_max": []}
        for task in range(self.first_round if cell.search and not cell.final else self.tasks):
            if task:
                training.between_tasks()
            curves["accuracies"].append(self._learn(training, x, source))
            curves["kappa"].append(largest(condition_numbers(training.model).values()))
            curves["sigma_max"].append(largest(spectral_norms(training.model).values()))
        accuracies = curves["accuracies"]
        last = accuracies[-max(len(accuracies) // 5, 1) :]
        metrics = {
            "accuracy": math.fsum(last) / len(last),
            "accuracy_of_all": math.fsum(accuracies) / len(accuracies),
            "first": accuracies[0],
            "kappa_worst": curves["kappa"][-1],
        }
        return Measured(metrics, curves)

    def _learn(self, training: Training, x: Tensor, source: torch.Generator) -> float:
        """Learns new labels; the share of them, in per cent, that it then knows."""
        y = torch.randint(10, (len(x),), generator=source)
        training.model.train()
        for _ in range(self.epochs):
            for index in torch.split(torch.randperm(len(x), generator=source), BATCH):
                loss = nn.functional.cross_entropy(training.model(x[index]), y[index])
                if not training.step(loss):
                    return CHANCE
        training.model.eval()  # spectral_norm of torch leaves its vectors as they are
        with torch.no_grad():
            return 100 * float((training.model(x).argmax(1) == y).float().mean())

    def tables(self, evidence: Evidence) -> dict[str, Table]:
        columns = [
            Column("accuracy", "last fifth, %"),
            Column("accuracy_of_all", "all tasks, %"),
            Column("first", "first task, %"),
            Column("kappa_worst", "κ of the worst weight", log=True),
        ]
        return {"accuracy": evidence.ranking("Random labels that are known", columns)}

    def verdicts(self, evidence: Evidence) -> dict[str, Verdict]:
        title = f"random labels known, last {self.tasks // 5} of {self.tasks} tasks, %"
        return {title: evidence.verdict("accuracy")}

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        drawing, (left, right) = figures.figure(columns=2, width=6.4, height=4.8)
        bands = {m: evidence.band("accuracy", method=m) for m in evidence.methods()}
        figures.compared(left, list(bands.items()), {m: figures.label(m) for m in bands})
        left.set_xlabel("random labels known in the last fifth of the tasks, %")
        shown = figures.selected({method: band.mean for method, band in bands.items()})
        curves = {m: list(evidence.where(method=m)["accuracies"]) for m in shown}
        figures.over_tasks(right, curves)
        right.set_ylabel("random labels known, %")
        right.legend(fontsize=8, frameon=False)
        return {"memorise": drawing}
