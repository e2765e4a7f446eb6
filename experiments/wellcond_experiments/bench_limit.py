"""Hard limits in training: whether they hold at every step, and their cost compared with others.

Every competitor trains in its own process, from the same seed and on the same data. They take
turns in random order, a number of steps each, so that load on the machine affects all. Only the
steps are timed: forward, backward, and the optimizer's step with its hooks. The spectra are
measured in a separate run, by an exact SVD in float64 after every step, for the weight that
`eval()` uses.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from wellcond_experiments.benchmark import Benchmark, count, option
from wellcond_experiments.command import Advance
from wellcond_experiments.limit_cases import CASES, Case, find_case
from wellcond_experiments.limit_competitors import BEFORE, check_method
from wellcond_experiments.limit_worker import Worker, WorkerError, workers

SETTLED = 20  # the step from which on a limit must hold
CLOSE = 1.05  # steps above this multiple of the bound are counted
THIRD = 2 / 3  # the quantile that a third of the weights exceed
FEW = 3  # up to this number of weights, the notes quote print(reg)


@dataclass(frozen=True)
class Limit(Benchmark):
    name = "limit"
    help = "cost of a hard limit, and whether it holds at every step"
    description = (
        "Training under hard limits, compared with other methods that bound the spectrum. Times: "
        "mean step relative to a training without a limit (plain) and to a reference, medians over "
        "seeds of interleaved runs. Excess: the largest sigma_1/b or kappa/K of any weight, from "
        "step 20 on and in the first 20 steps, by an exact SVD after every step of a separate run. "
        "`watched` is the default of `attach`; before-auto and before-every=N use the wellcond in "
        "--against."
    )
    example = "--case critic-default,mnist-k10 --data mnist --seeds 3"
    threads = 1
    columns: ClassVar = {
        "case": ("case", ""),
        "competitor": ("method", ""),
        "ratio": ("× plain", ".3g"),
        "to_reference": ("× reference", ".3g"),
        "to_reference_processor": ("CPU time", ".3g"),
        "milliseconds": ("ms", ".3g"),
        "late": ("excess", ".5g"),
        "early": ("first 20", ".5g"),
        "beyond": ("> 1.05", "d"),
        "accuracy": ("accuracy %", ".4g"),
        "met": ("met", ""),
    }

    case: str = option(
        "all", f"all, or names from {','.join(CASES)}; mnist-kK, square-kK for any K"
    )
    competitors: str | None = option(None, "such as plain,every=1; default: those of the case")
    steps: int | None = count(None, "default: those of the case")
    seeds: int = count(3)
    data: str = option("mnist", "digits, mnist, PATH (for cases with images)")
    against: str | None = option(None, "source tree of an older wellcond", metavar="PATH")
    only: str = option("all", "times, spectra or all", choices=("times", "spectra", "all"))

    @cached_property
    def cases(self) -> list[Case]:
        return [find_case(name) for name in (CASES if self.case == "all" else self.case.split(","))]

    def methods(self, case: Case) -> list[str]:
        """Returns the competitors of a case."""
        chosen = list(case.competitors)
        if self.competitors:
            chosen = list(dict.fromkeys(["plain", *self.competitors.split(",")]))
        for method in chosen:
            check_method(method)
        return chosen

    @property
    def total(self) -> int:
        return sum(
            self.seeds
            * math.ceil((self.steps or case.steps) / case.stretch)
            * (self.only != "spectra")
            + self.seeds * len(self.methods(case)) * (self.only != "times")
            for case in self.cases
        )

    def measure(self, advance: Advance) -> dict[str, Any]:
        plan = [(case, self.methods(case)) for case in self.cases]
        older = self._find_older()
        runs: list[dict[str, Any]] = []
        failures: list[str] = []
        settings = {"seeds": self.seeds, "threads": torch.get_num_threads(), "data": self.data}
        for case, methods in plan:
            common = (self.data, torch.get_num_threads())
            absent = {
                method: "pass the older source tree with --against"
                for method in methods
                if method.startswith(BEFORE) and older is None
            }
            arguments = {
                method: (case.name, method, *common, older if method.startswith(BEFORE) else None)
                for method in methods
                if method not in absent
            }
            with workers(arguments) as own:
                trial = Trial(case, self.steps or case.steps, own, absent)
                trial.begin()
                for seed in range(self.seeds):
                    if self.only != "spectra":
                        trial.time(seed, advance)
                    if self.only != "times":
                        trial.measure(seed, advance)
                runs += [trial.summarise(method) for method in methods]
                if "plain" in trial.absent:
                    failures.append(f"{case.name}: {trial.absent['plain']}")
        said = [note for run in runs for note in notes(run)]
        return {"settings": settings, "runs": runs, "notes": said, "failures": failures}

    def _find_older(self) -> Path | None:
        """Returns the directory of the older package."""
        if self.against is None:
            return None
        tree = Path(self.against).resolve()
        for path in (tree / "src", tree):
            if (path / "wellcond" / "__init__.py").is_file():
                return path
        raise ValueError(f"--against must be a source tree of wellcond, but {tree} contains none.")

    def title(self, document: dict[str, Any]) -> str:
        settings = document["settings"]
        return (
            f"Training under hard limits, {settings['threads']} threads, medians of "
            f"{settings['seeds']} seeds: mean step relative to the training without a limit and to "
            "the reference, the latter also in CPU time; the largest sigma_1/b or kappa/K from "
            f"step {SETTLED} on and in the first {SETTLED}; number of steps above {CLOSE}"
        )


@dataclass
class Trial:
    """All runs of a case and their results by method."""

    case: Case
    steps: int
    workers: dict[str, Worker]
    absent: dict[str, str]  # reasons why methods do not take part
    bound: float | None = None
    described: dict[str, dict[str, str]] = field(default_factory=dict)
    seconds: dict[str, list[list[list[float]]]] = field(default_factory=dict)  # by seed, by step
    values: dict[str, list[list[list[float]]]] = field(default_factory=dict)
    reports: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    enforced: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def present(self) -> list[str]:
        return [method for method in self.workers if method not in self.absent]

    def ask(self, method: str, request: str, **arguments: Any) -> Any:
        """Returns the answer; after a failure returns None and excludes the method."""
        try:
            return self.workers[method].ask(request, **arguments)
        except WorkerError as error:
            self.absent[method] = str(error)
            return None

    def begin(self) -> None:
        """Determines the bound in a pilot run if none is given."""
        for method in self.present:
            self.described[method] = self.ask(method, "describe")
        self.bound = self.case.bound
        self.ask("plain", "start", seed=0, bound=None)
        if self.bound is None and "plain" in self.present:
            values = torch.tensor(self.ask("plain", "measure", steps=self.steps))
            self.bound = float(f"{float(values.double().amax(dim=0).quantile(THIRD)):.4g}")
        if "plain" in self.absent:  # no comparison without the plain training
            self.absent |= dict.fromkeys(self.workers, self.absent["plain"])

    def time(self, seed: int, advance: Advance) -> None:
        """Times one interleaved run."""
        for method in self.present:
            self.ask(method, "start", seed=seed, bound=self.bound)
        for method in self.present:
            self.seconds.setdefault(method, []).append([])
        order, chance = self.present, random.Random(seed)
        for begun in range(0, self.steps, self.case.stretch):
            chance.shuffle(order)
            for method in order:
                steps = min(self.case.stretch, self.steps - begun)
                if method not in self.absent:
                    taken = self.ask(method, "train", steps=steps)
                    self.seconds[method][-1] += taken or []
            advance(f"{self.case.name}, seed {seed}")
        for method in self.present:
            self.reports.setdefault(method, []).append(self.ask(method, "report"))
        if seed == 0 and self.case.quantity == "acting":
            for method in {"watched", "kernel"} & {*self.present}:
                self.enforced[method] = self.ask(method, "enforce")

    def measure(self, seed: int, advance: Advance) -> None:
        """Measures the spectra of all methods."""
        for method in self.present:
            if method != "plain" or self.case.measures_plain:
                self.ask(method, "start", seed=seed, bound=self.bound)
                values = self.ask(method, "measure", steps=self.steps)
                if values is not None:
                    self.values.setdefault(method, []).append(values)
                    self.reports.setdefault(method, []).append(self.ask(method, "report"))
            advance(f"{self.case.name}, spectra of {method}, seed {seed}")

    def summarise(self, method: str) -> dict[str, Any]:
        """Returns the row of a method."""
        case, target = self.case, self.case.target
        row: dict[str, Any] = {"case": case.name, "net": case.net, "competitor": method}
        row |= {"quantity": case.quantity, "bound": self.bound, "steps": self.steps}
        if method in self.absent:
            return row | {"reason": self.absent[method], "met": self.absent[method]}
        row |= self.described[method]
        row |= self._summarise_times(method) | self._summarise_spectra(method)
        reports = self.reports.get(method, [])
        row["printed"] = [report["printed"] for report in reports]
        accuracies = [r["accuracy"] for r in reports if r["accuracy"] is not None]
        row["accuracy"] = statistics.mean(accuracies) if accuracies else None
        if method in self.enforced:
            row["enforce_seconds"] = self.enforced[method]
        if method == "watched":
            row |= {"target": str(target), "met": judge(row, case)}
        return row

    def _summarise_times(self, method: str) -> dict[str, Any]:
        if method not in self.seconds:
            return {}
        row: dict[str, Any] = {}
        wall = [[second for second, _ in run] for run in self.seconds[method]]
        row["milliseconds"] = 1e3 * statistics.median(map(statistics.mean, wall))
        row["reference"] = self.case.target.reference
        for key, other in {"ratio": "plain", "to_reference": row["reference"]}.items():
            if other in self.present:
                row[key], row[f"{key}s"] = self._ratio(method, other, 0, statistics.mean)
                row[f"{key}_processor"], _ = self._ratio(method, other, 1, statistics.mean)
                row[f"{key}_median_step"], _ = self._ratio(method, other, 0, statistics.median)
        return row

    def _ratio(
        self, method: str, other: str, clock: int, average: Any
    ) -> tuple[float, list[float]]:
        """Returns the ratio of the average step times of two methods: median and all seeds."""
        ratios = [
            average([step[clock] for step in own]) / average([step[clock] for step in its])
            for own, its in zip(self.seconds[method], self.seconds[other], strict=True)
        ]
        return statistics.median(ratios), ratios

    def _summarise_spectra(self, method: str) -> dict[str, Any]:
        if method not in self.values:
            return {}
        assert self.bound is not None
        runs = [[largest(step) / self.bound for step in run] for run in self.values[method]]
        late = [run[SETTLED - 1 :] for run in runs]
        row: dict[str, Any] = {"early": largest(x for run in runs for x in run[:SETTLED])}
        if late[0]:
            row["late"] = largest(x for run in late for x in run)
            row["late_median"] = statistics.median(x for run in late for x in run)
            # The maximum over the seeds; `not x <= ...`, so that nan counts.
            row["beyond"] = max(sum(not x <= CLOSE for x in run) for run in late)
        highest = [
            [largest(step[i] for step in run) for i in range(len(run[0]))]
            for run in self.values[method]
        ]
        row["weights"] = len(highest[0])
        # A weight within 0.1 % of the bound was clipped, or exceeds it.
        at_bound = [sum(not x < 0.999 * self.bound for x in run) / len(run) for run in highest]
        row["share_at_bound"] = statistics.mean(at_bound)
        return row


def largest(values: Iterable[float]) -> float:
    """Returns the largest value, or nan if any value is nan (`max` does not ensure this)."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


def judge(row: dict[str, Any], case: Case) -> str:
    """Describes which parts of the target are met."""
    target, words = case.target, []
    if row.get("late") is not None:
        words.append("holds" if row["late"] <= target.excess else "EXCEEDED")
    ratio = row.get("to_reference")
    if ratio is not None and target.at_most is not None:
        words.append("in time" if ratio <= target.at_most else "TOO SLOW")
    if ratio is not None and target.goal is not None:
        words.append("goal" if ratio <= target.goal else "not the goal")
    return ", ".join(words)


def notes(run: dict[str, Any]) -> list[str]:
    """Returns notes: the target, `print(reg)` for few weights, and the time of a clip."""
    subject = f"{run['case']}, {run['competitor']}"
    lines = (
        [f"{subject}: target {run['target']}; bound {run['bound']:.4g}"] if "target" in run else []
    )
    _, *said = (run.get("printed") or [""])[-1].splitlines() or [""]
    if run["competitor"] == "watched" and run.get("weights", 1) <= FEW:
        kept = itertools.takewhile(
            lambda line: not line.startswith(("  left out", "  skipped")), said
        )
        lines += [f"{subject}: {line.strip()}" for line in kept]
    for what, seconds in run.get("enforce_seconds", {}).items():
        lines.append(f"{subject}: {what} takes {seconds:.3g} s")
    return lines
