"""Does one projection after training suffice, or is a limit needed during training?

Three networks train without a penalty, and copies of them are projected once to each limit. The
same networks train with the same initial weights and batches under each limit, or under a penalty.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, nn

import wellcond as wc
from wellcond_experiments import figures
from wellcond_experiments.data import Images, load
from wellcond_experiments.evidence import Evidence
from wellcond_experiments.grid import Cell, Measured, Swept
from wellcond_experiments.methods import METHODS, condition_numbers, largest
from wellcond_experiments.settings.harder import accuracy, add_noise, fit, square, transformer
from wellcond_experiments.tables import Table, number

LIMITS = (100.0, 20.0, 10.0, 5.0, 3.0, 2.0)
PROJECTED, LIMITED = "projected", "condition-limit"
LABELS = {PROJECTED: "projected after training", LIMITED: "limited during training"}
TESTED = ("accuracy", "in_noise", "kappa_worst")


def perceptron(images: Images) -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(images.pixels, 512), nn.ReLU(), nn.Linear(512, 512)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(512, 10))


def convolutional(images: Images) -> nn.Module:
    """Builds three convolutions, then n-n-256-10, with n = 1024 for 32x32 images."""
    layers: list[nn.Module] = []
    for before, after in ((images.channels, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    n = 64 * (images.side // 8) ** 2
    layers += [nn.Flatten(), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, 256), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, 10))


class Net(NamedTuple):
    """A network and its training."""

    title: str
    build: Callable[[Images], nn.Module]
    data: str
    samples: int
    epochs: int
    batch: int
    noise: float  # in standard deviations of the pixels


NETS = {
    "mlp": Net("784-512-512-10 on MNIST", perceptron, "mnist", 60_000, 3, 32, 1.0),
    "cnn": Net("three convolutions on CIFAR-10", convolutional, "cifar10", 8_000, 4, 64, 0.4),
    "vit": Net("vision transformer on MNIST", transformer, "mnist", 15_000, 3, 64, 0.5),
}


class AfterTraining(Swept):
    name = "after-training"
    help = "does one projection after training suffice?"
    protocol = (
        "784-512-512-10 on MNIST (3 epochs, batch 32), three convolutions and 1024-1024-256-10 on "
        "8,000 images of CIFAR-10 (4 epochs, batch 64), a vision transformer (patches of 4, width "
        "64, four blocks) on 15,000 images of MNIST (3 epochs, batch 64); Adam 1e-3, whose rate "
        "rises and falls linearly; limits on all weights. The noise is Gaussian, of 1, 0.4 and 0.5 "
        "times the standard deviation of the pixels. Changes are relative to the baseline, paired "
        "by seed. κ is the largest of all weights, with kernels flattened to matrices. The CPU "
        "time of the training is relative to the baseline. The environment variable WELLCOND_DATA "
        "names the folder of the data."
    )
    default_data = ""  # each network has its own data
    cases = tuple(NETS)
    rates = (1e-3,)

    def __init__(self, data: str = "", quick: bool = False, seeds: int | None = None) -> None:
        super().__init__(data, quick, seeds)
        self.limits = LIMITS[::2] if quick else LIMITS
        self.methods = {
            "none": (0.0,),
            LIMITED: self.limits,
            "condition-gradient": (0.1,),
            "condition": (100.0,),
        }

    def net(self, case: str) -> Net:
        net = NETS[case]
        return net._replace(data=self.data, samples=1_024, epochs=4) if self.quick else net

    def settings(self) -> dict[str, Any]:
        nets = {case: self.net(case) for case in self.cases}
        trained = {
            f"{case}_{key}": getattr(net, key)
            for case, net in nets.items()
            for key in ("data", "samples", "epochs", "batch", "noise")
        }
        return super().settings() | {"limits": list(self.limits)} | trained

    def run(self, cell: Cell) -> Measured:
        """Trains one network; with method "none" also projects copies of it."""
        net = self.net(cell.case)
        images = _load(net.data)
        training = METHODS[cell.method](
            lambda norm: net.build(images), cell.strength, cell.lr, cell.seed
        )
        x = square(images, images.normalise(images.x_train[: net.samples]))
        seconds = fit(training, x, images.y_train[: len(x)], net.epochs, net.batch)
        x_test = square(images, images.normalise(images.x_test))
        inputs = (x_test, add_noise(x_test, net.noise)), images.y_test
        metrics = measure_accuracy(training.model, *inputs) | {"train_seconds": seconds}
        for K in self.limits if cell.method == "none" else ():
            model, began = copy.deepcopy(training.model), time.process_time()
            wc.Regularizer(model, wc.ConditionLimit(K)).enforce()
            found = {"train_seconds": seconds + time.process_time() - began}
            found |= measure_accuracy(model, *inputs)
            metrics |= {projection_key(name, K): value for name, value in found.items()}
        return Measured(metrics, {})

    def evidence(self, evidence: Evidence) -> Evidence:
        """Returns the evidence with one additional run per projection."""
        runs = [
            run
            | {
                "method": PROJECTED,
                "strength": K,
                "metrics": {
                    name: run["metrics"][projection_key(name, K)]
                    for name in (*TESTED, "train_seconds")
                },
            }
            for run in evidence.document["runs"]
            if run["method"] == "none"
            for K in self.limits
        ]
        return Evidence(evidence.document | {"runs": evidence.document["runs"] + runs})

    def tables(self, evidence: Evidence) -> dict[str, Table]:
        evidence = self.evidence(evidence)
        return {case: self._table(evidence, case) for case in self.cases}

    def _table(self, evidence: Evidence, case: str) -> Table:
        without: dict[str, Any] = {"case": case, "method": "none"}
        alone = evidence.band("train_seconds", **without).mean
        rows = []
        for method, strength in self._points():
            here: dict[str, Any] = {"case": case, "method": method, "strength": strength}
            row = [LABELS.get(method) or figures.label(method)]
            row += [number(strength) if method != "none" else ""]
            for metric in ("accuracy", "in_noise"):
                change = evidence.difference(metric, here, without)
                row += [evidence.band(metric, **here).fixed()]
                row += [change.signed() if method != "none" else ""]
            gained = evidence.difference("accuracy", here, here | {"method": PROJECTED})
            row += [gained.signed() if method == LIMITED else ""]
            row += [str(evidence.band("kappa_worst", log=True, **here))]
            row += [number(evidence.band("train_seconds", **here).mean / alone)]
            rows.append(row)
        header = ["method", "K or strength", "clean, %", "change", "with noise, %", "change"]
        header += ["clean, vs. projected", "largest κ", "CPU time"]
        return Table(f"Accuracy of {NETS[case].title}", header, rows)

    def _points(self) -> list[tuple[str, float]]:
        """Returns the method and strength of each row of a table."""
        none, *others = ((method, K) for method, Ks in self.methods.items() for K in Ks)
        return [none, *((PROJECTED, K) for K in self.limits), *others]

    def failed(self, evidence: Evidence) -> bool:
        """Returns whether a limit was exceeded."""
        runs = self.evidence(evidence).runs
        limited = runs[runs["method"].isin(LABELS)]
        return bool((limited["kappa_worst"] > limited["strength"]).any())

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        evidence = self.evidence(evidence)
        drawing, panels = figures.figure(columns=len(self.cases), width=4.4, height=3.8)
        for panel, case in zip(panels, self.cases, strict=True):
            without = {"case": case, "method": "none"}
            for index, (method, label) in enumerate(LABELS.items()):
                bands = [
                    evidence.difference(
                        "accuracy", {"case": case, "method": method, "strength": K}, without
                    )
                    for K in self.limits
                ]
                colour = figures.CYCLE[index]
                means = [band.mean for band in bands]
                panel.plot(self.limits, means, color=colour, label=label, marker="o", ms=4)
                lows, highs = [band.low for band in bands], [band.high for band in bands]
                panel.fill_between(self.limits, lows, highs, color=colour, alpha=0.2, lw=0)
            panel.axhline(0, color=figures.NOTHING, lw=0.9)
            panel.set_xscale("log")
            panel.invert_xaxis()  # the limit is tighter to the right
            panel.set_xticks(self.limits, [f"{K:g}" for K in self.limits])
            panel.minorticks_off()
            panel.set(xlabel="limit K", title=NETS[case].title)
        panels[0].set_ylabel("change of accuracy, points")
        panels[0].legend(frameon=False, fontsize=9)
        return {self.name: drawing}


@cache
def _load(name: str) -> Images:
    return load(name, colour=True)


def projection_key(name: str, K: float) -> str:
    """Returns the name of a metric of the network projected to K."""
    return f"{name}_projected_{K:g}"


def measure_accuracy(
    model: nn.Module, inputs: tuple[Tensor, Tensor], labels: Tensor
) -> dict[str, float]:
    """Returns the accuracy, clean and with noise, and the largest κ of matrices and kernels."""
    accuracies = (accuracy(model, x, labels) for x in inputs)
    worst = largest(condition_numbers(model).values())
    return dict(zip(TESTED, (*accuracies, worst), strict=True))
