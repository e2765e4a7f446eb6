"""Deep plain networks: which learning rates of Adam work?

After Wortsman et al. (arXiv 2309.14322): a method is good if it trains well over a wide range of
learning rates. The runs are a fifth of an epoch of MNIST: short enough to avoid memorisation, too
short for convergence.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from wellcond_experiments import figures
from wellcond_experiments.data import Images, load
from wellcond_experiments.early import EarlyLook
from wellcond_experiments.evidence import Column, Evidence, Verdict
from wellcond_experiments.grid import Cell, Measured, Setting, strengths_of
from wellcond_experiments.methods import (
    METHODS,
    IsometryStep,
    OrthogonalityPenalty,
    Training,
    condition_numbers,
    largest,
    spectral_norms,
)
from wellcond_experiments.tables import Table

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
DEPTHS = (10, 30, 60)
SEARCHED_DEPTH = 30  # the best strength at this depth is used at all depths
WIDTH, BATCH = 128, 64
NEAR = 2.0  # a rate works if it is within this many points of the best
COMPARED = (
    *("none", "warm-up", "l2", "weight-decay", "clipping", "layer-norm", "spectral-norm-torch"),
    *("condition", "condition-gradient", "stable-rank", "orthogonality", "isometry"),
    *("condition-limit", "upper-limit"),
)
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}
GAINS = {"tanh": 1.0, "relu": math.sqrt(2)}


OVERVIEWS = {
    "accuracy": "Accuracy on the test images, mean over the learning rates, %",
    "sensitivity": "Sensitivity: loss against the best rate, mean over the rates, points",
    "working": "Number of rates near the best of all methods",
    "cost": "CPU time of a run, relative to the baseline",
}


class IsometryEveryStep(IsometryStep):
    """At high learning rates, ten steps move the weights too far from an isometry."""

    every = 1


class OrthogonalityEveryStep(OrthogonalityPenalty):
    every = 1


OFTEN: dict[str, type[Training]] = {
    "isometry": IsometryEveryStep,
    "orthogonality": OrthogonalityEveryStep,
}


class LearningRates(Setting):
    name = "learning-rates"
    help = "deep networks: which learning rates work?"
    protocol = (
        "One epoch of 12,800 images of MNIST, batch 64, Adam at five constant learning rates: "
        "plain networks of width 128, all with orthogonal initial weights; accuracy on the test "
        "images. Weight decay applies to matrices only. IsometryStep and OrthogonalityPenalty act "
        "after every step, the other methods of wellcond at their default interval. The search "
        "chooses strengths by the mean over the rates at depth 30. Because the trainings are "
        "short, this mean favours methods that learn fast at the lowest rate."
    )
    rate_is_chosen = False

    def __init__(self, data: str = "", quick: bool = False, seeds: int | None = None) -> None:
        super().__init__(data, quick, seeds)
        self.count = 320 if quick else 12_800
        self.rates = (1e-3, 1e-2) if quick else RATES
        self.depths = (4,) if quick else DEPTHS
        self.compared = ("none", "condition-limit") if quick else COMPARED
        self.cases = tuple(f"{kind}-{n}" for kind, n in product(ACTIVATIONS, self.depths))
        depth = 4 if quick else SEARCHED_DEPTH
        self.searched_cases = tuple(f"{kind}-{depth}" for kind in ACTIVATIONS)

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "images": self.count,
            "rates": list(self.rates),
            "depths": list(self.depths),
            "ways": list(self.compared),
        }

    @cached_property
    def images(self) -> Images:
        """Returns the images, normalised once for all runs."""
        found = load(self.data)
        x_train, x_test = found.normalise(found.x_train), found.normalise(found.x_test)
        return replace(found, x_train=x_train, x_test=x_test)

    def strengths(self, case: str) -> dict[str, tuple[float, ...]]:
        """Returns the methods for a network with their strengths."""
        gain = self.gain(case)
        strengths = strengths_of(*self.compared)
        # In a network of depth 30 a factor counts to its 30th power, so values are closer to 1.
        norms = tuple(factor * gain for factor in (1.0, 1.1, 1.25, 1.5))
        closer: dict[str, tuple[float, ...]] = {
            "spectral-norm-torch": norms,
            "upper-limit": norms,
            "isometry": (0.1, 0.5, 1.0),
            "condition-limit": (1.01, 1.1, 2.0, 5.0),
        }
        strengths |= {method: closer[method] for method in closer if method in strengths}
        # Not searched, because it makes a step up to ten times slower.
        return strengths | ({} if self.quick else {"orthogonal-torch": (gain,)})

    def contest(self, case: str) -> str:
        return case.partition("-")[0]

    def gain(self, case: str) -> float:
        """Returns the scale of an isometric weight."""
        return GAINS[self.contest(case)]

    def build(self, case: str, norm: bool) -> nn.Module:
        """Builds the network, with LayerNorm if `norm`."""
        kind, _, depth = case.partition("-")
        return plain(self.images.pixels, int(depth), kind, norm)

    def run(self, cell: Cell) -> Measured:
        """Trains one network; the search tests on a held-out sixth of the training set."""
        images = self.images
        train, test = [images.x_train, images.y_train], [images.x_test, images.y_test]
        if cell.search:
            held = len(images.x_train) // 6
            train, test = [a[:-held] for a in train], [a[-held:] for a in train]
        source = torch.Generator().manual_seed(cell.seed)
        order = torch.randperm(len(train[0]), generator=source)[: self.count]
        x, y = (array[order] for array in train)
        training = OFTEN.get(cell.method, METHODS[cell.method])(
            lambda norm: self.build(cell.case, norm),
            cell.strength,
            cell.lr,
            cell.seed,
            gain=self.gain(cell.case),
            decays=lambda parameter: parameter.ndim > 1,
        )
        training.model.train()
        look = EarlyLook(training.model, math.ceil(len(x) / BATCH))
        finite = True
        for batch, labels in zip(torch.split(x, BATCH), torch.split(y, BATCH), strict=True):
            loss = cross_entropy(training.model(batch), labels)
            look(loss)
            finite = training.step(loss)
            if not finite:
                break
        training.finish()
        model = training.model.eval()  # so that spectral_norm does not update its vectors
        with torch.no_grad():
            right = sum(
                int((model(batch).argmax(1) == labels).sum())
                for batch, labels in zip(*(torch.split(a, 1000) for a in test), strict=True)
            )
        share = right / len(test[0]) if finite else 0.1  # a diverged network counts as guessing
        metrics = {
            "accuracy": 100 * share,
            "kappa_worst": largest(condition_numbers(model).values()),
            "sigma_max": largest(spectral_norms(model).values()),
        }
        return Measured(metrics | look.metrics, {})

    def tables(self, evidence: Evidence) -> dict[str, Table]:
        columns = [
            Column("accuracy", "mean over the rates, %"),
            *(Column(f"{lr:g}", f"at {lr:g}") for lr in self.rates),
            Column("sensitivity", "sensitivity, points"),
            Column("working", f"working rates, of {len(self.rates)}"),
        ]
        found = average_rates(evidence)
        tables = {name: self._overview(found, name) for name in OVERVIEWS}
        for case in self.cases:
            title = f"{describe_net(case)}: accuracy on the test images"
            table = found.ranking(title, columns, self.contest(case), case=case)
            tables[case] = table.drop("lr")  # the rate is not chosen
        return tables

    def _overview(self, found: Evidence, metric: str) -> Table:
        """Returns a table with one row per method, sorted by mean accuracy over the networks."""
        accuracies = found.runs.groupby(["method", "case"])["accuracy"].mean().groupby("method")
        few = accuracies.count() < len(self.cases)  # methods not run in every network come last
        order = (accuracies.mean() - 100 * few).sort_values(ascending=False, kind="stable").index
        rows = [
            [figures.label(method)]
            + [
                found.band(metric, case=case, method=method).fixed(1)
                if method in found.methods(case=case)
                else ""
                for case in self.cases
            ]
            for method in order
        ]
        return Table(OVERVIEWS[metric], ["method", *map(describe_net, self.cases)], rows)

    def verdicts(self, evidence: Evidence) -> dict[str, Verdict]:
        found = average_rates(evidence)
        return {
            f"{describe_net(case)}, %": found.verdict("accuracy", self.contest(case), case=case)
            for case in self.cases
        }

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        """Draws the same methods in each panel: the best by the mean over the networks."""
        found = average_rates(evidence)
        means = {m: found.band("accuracy", method=m).mean for m in found.methods()}
        shown = figures.select_lines(means)
        columns = len(self.depths)
        drawing, panels = figures.figure(columns, width=3.6, height=3.0, rows=2)
        for case, panel in zip(self.cases, panels, strict=True):
            figures.draw_rates(panel, evidence.where(case=case), shown, "accuracy")
            panel.set_ylim(0, 100)
            panel.set_title(describe_net(case), fontsize=10)
        for panel in panels[::columns]:
            panel.set_ylabel("accuracy, %")
        for panel in panels[columns:]:
            panel.set_xlabel("learning rate")
        lines = panels[0].get_legend_handles_labels()
        drawing.legend(*lines, loc="outside lower center", ncols=4, frameon=False)
        return {"learning-rates": drawing}


def describe_net(case: str) -> str:
    """Returns the name of a network, such as "ReLU, depth 30"."""
    kind, _, depth = case.partition("-")
    return f"{kind.replace('relu', 'ReLU')}, depth {depth}" if depth else case


def average_rates(evidence: Evidence) -> Evidence:
    """Returns one row per network, method and seed, over all learning rates.

    Columns: accuracy is the mean over the rates; sensitivity is the mean loss against the best rate
    (Wortsman et al., with accuracy instead of loss); working is the number of rates within `NEAR`
    of the best mean accuracy of all methods in this network; cost is the CPU time relative to the
    baseline; plus one column per rate.
    """
    rates = evidence.runs.pivot_table("accuracy", ["case", "method", "seed"], "lr", sort=False)
    best = rates.groupby(["case", "method"]).mean().max(axis=1).groupby("case").max()
    needed = best.reindex(rates.index.get_level_values("case")).to_numpy() - NEAR
    seconds = evidence.runs.groupby(["case", "method", "seed"], sort=False)["cpu_seconds"].mean()
    alone = evidence.runs[evidence.runs["method"] == "none"].groupby("case")["cpu_seconds"].mean()
    found = copy.copy(evidence)
    found.runs = (
        rates.rename(columns=lambda lr: f"{lr:g}")
        .assign(
            accuracy=rates.mean(axis=1),
            sensitivity=rates.max(axis=1) - rates.mean(axis=1),
            working=rates.ge(needed, axis=0).sum(axis=1),
            cost=seconds / alone.reindex(seconds.index.get_level_values("case")).to_numpy(),
        )
        .reset_index()
    )
    return found


def plain(inputs: int, depth: int, kind: str, norm: bool) -> nn.Module:
    """Builds `depth` hidden layers, with orthogonal weights times the gain.

    With the default initial weights of PyTorch, no method trains a network of depth 30.
    """
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(inputs, WIDTH)
        nn.init.orthogonal_(linear.weight, GAINS[kind])
        nn.init.zeros_(linear.bias)
        layers += [linear, *[nn.LayerNorm(WIDTH)] * norm, ACTIVATIONS[kind]()]
        inputs = WIDTH
    return nn.Sequential(*layers, nn.Linear(inputs, 10))
