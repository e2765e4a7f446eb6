"""A small network learns many tasks in sequence: does it still learn the last ones?"""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn

from wellcond_experiments import figures
from wellcond_experiments.data import Images, load
from wellcond_experiments.early import PART
from wellcond_experiments.evidence import Column, Evidence, Verdict
from wellcond_experiments.grid import Cell, Measured, Setting, strengths_of
from wellcond_experiments.methods import (
    COMPARED,
    METHODS,
    Training,
    condition_numbers,
    largest,
    spectral_norms,
)
from wellcond_experiments.prediction import Case
from wellcond_experiments.tables import Table

WIDTH, BATCH = 100, 16
RATES = (3e-4, 1e-3, 3e-3)
CHANCE = 10.0  # accuracy in per cent that a diverged network gets


class Tasks(Setting):
    """784-100-100-10 with ReLU on a sequence of MNIST tasks; the score is that of the last tasks.

    A subclass gives the number of tasks (fewer in the first round of the search) and learns one.
    """

    short: ClassVar[str]  # the name in tables of all experiments
    part: ClassVar[int]  # the score is the mean over the last 1/part of the tasks
    words: ClassVar[tuple[str, str]]  # names of the score and of this part
    window: ClassVar[int] = 1  # number of tasks that the curves are averaged over

    def __init__(
        self, data: str, quick: bool, seeds: int | None, tasks: int, first_round: int
    ) -> None:
        super().__init__(data, quick, seeds)
        self.tasks, self.first_round = tasks, first_round
        self.rates = (1e-3,) if quick else RATES
        self.methods = strengths_of(*(("none", "l2", "isometry") if quick else COMPARED))

    def settings(self) -> dict[str, Any]:
        sizes = {"tasks": self.tasks, "tasks_of_first_round": self.first_round}
        return super().settings() | sizes

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

    @abstractmethod
    def material(self, cell: Cell) -> tuple[torch.Tensor, ...]:
        """Returns the data of the tasks; the search uses images reserved for it."""

    @abstractmethod
    def learn(self, training: Training, source: torch.Generator, *material: torch.Tensor) -> float:
        """Learns a new task and returns the score in per cent, `CHANCE` if it diverges."""

    def run(self, cell: Cell) -> Measured:
        material = self.material(cell)
        training = METHODS[cell.method](
            self.build, cell.strength, cell.lr, cell.seed, gain=math.sqrt(2)
        )
        source = torch.Generator().manual_seed(cell.seed)
        curves: dict[str, list[float]] = {"accuracies": [], "kappa": [], "sigma_max": []}
        for task in range(self.first_round if cell.search and not cell.final else self.tasks):
            if task:
                training.between_tasks()
            curves["accuracies"].append(self.learn(training, source, *material))
            curves["kappa"].append(largest(condition_numbers(training.model).values()))
            curves["sigma_max"].append(largest(spectral_norms(training.model).values()))
        accuracies = curves["accuracies"]
        last = accuracies[-max(len(accuracies) // self.part, 1) :]
        metrics = {
            "accuracy": math.fsum(last) / len(last),
            "accuracy_of_all": math.fsum(accuracies) / len(accuracies),
            "first": accuracies[0],
            "kappa_worst": curves["kappa"][-1],
        }
        return Measured(metrics, curves)

    def tables(self, evidence: Evidence) -> dict[str, Table]:
        score, part = self.words
        columns = [
            Column("accuracy", f"{part}, %"),
            Column("accuracy_of_all", "all tasks, %"),
            Column("first", "first task, %"),
            Column("kappa_worst", "largest κ", log=True),
        ]
        return {"accuracy": evidence.ranking(score.capitalize(), columns)}

    def verdicts(self, evidence: Evidence) -> dict[str, Verdict]:
        return {f"{self.short}, %": evidence.verdict("accuracy")}

    def early(self, evidence: Evidence) -> list[Case]:
        """Takes early values from the curves; growth is relative to the end of the first task."""
        at = max(self.tasks // PART, 1) - 1
        runs = evidence.runs
        early = {
            "early_kappa": [curve[at] for curve in runs["kappa"]],
            "early_kappa_growth": [curve[at] / curve[0] for curve in runs["kappa"]],
            "early_sigma": [curve[at] for curve in runs["sigma_max"]],
            "early_sigma_growth": [curve[at] / curve[0] for curve in runs["sigma_max"]],
            "early_loss": [100 - curve[at] for curve in runs["accuracies"]],
        }
        return [Case(self.short, runs.assign(**early), self.score)]

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        score, part = self.words
        drawing, (left, right) = figures.figure(columns=2, width=6.4, height=4.8)
        bands = {m: evidence.band("accuracy", method=m) for m in evidence.methods()}
        figures.draw_bands(left, list(bands.items()), {m: figures.label(m) for m in bands})
        left.set_xlabel(f"{score}, {part} of the tasks, %")
        shown = figures.select_lines({method: band.mean for method, band in bands.items()})
        curves = {m: list(evidence.where(method=m)["accuracies"]) for m in shown}
        window = min(self.window, self.tasks)
        figures.draw_over_tasks(right, curves, window=window)
        right.set_ylabel(f"{score}, %" + f" (mean of {window} tasks)" * (window > 1))
        right.legend(fontsize=8, frameon=False)
        return {self.name: drawing}
