"""Declared grids of trainings, run by several processes; one file per run makes them resumable.

A `Setting` declares what is trained, over which cells (case, method, strength, learning rate,
seed), and which tables and pictures are made. The strength and learning rate of each method are
chosen on seeds and data of the search, which are not reported. The reported runs use the chosen
values.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from joblib import Parallel, delayed

import wellcond as wc
import wellcond_experiments
from wellcond_experiments import command
from wellcond_experiments.command import dump_json, format_duration, write_text
from wellcond_experiments.evidence import Evidence, Verdict
from wellcond_experiments.methods import METHODS, without_subnormals
from wellcond_experiments.prediction import Case
from wellcond_experiments.tables import Table

# The first seeds of the search and of its second round; reported seeds count from 0.
SEARCH, FINAL = 10_000, 20_000
DIGITS = 6  # significant digits of stored curves


@dataclass(frozen=True)
class Cell:
    """A point of a grid: one run."""

    case: str
    method: str
    strength: float
    lr: float
    seed: int
    search: bool = False

    @property
    def final(self) -> bool:
        """Whether the cell belongs to the second round of the search."""
        return self.search and self.seed >= FINAL

    @property
    def name(self) -> str:
        stage = "search" if self.search else "report"
        what = (stage, self.case, self.method, f"{self.strength:g}", f"{self.lr:g}", f"{self.seed}")
        return "-".join(filter(None, what))


class Measured(NamedTuple):
    """The result of a run: numbers, and curves, usually over time."""

    metrics: dict[str, float]
    curves: dict[str, list[float]]


@dataclass(frozen=True)
class Chosen:
    """The choice of the search for a method; `edge` names the values at the edge of their grid.

    The learning rate is 0 if it is not searched.
    """

    case: str
    method: str
    strength: float
    lr: float
    score: float
    edge: str


class Setting(ABC):
    """An experiment. A new experiment is a subclass in its own file.

    A subclass sets `cases`, `methods` with their strengths, and `rates`. The search covers the
    product of these. To search another grid, override `strengths`, `searched_cases`,
    `search_cells` and `report_cells`.

    Args:
        data: the value of `--data`; "" for the default.
        quick: whether the run is short and only checks that the experiment works.
        seeds: the number of reported seeds; None for the default.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    protocol: ClassVar[str]
    score: ClassVar[str] = "accuracy"  # the metric that the search compares; larger is better
    default_data: ClassVar[str] = "mnist"
    quick_data: ClassVar[str] = "digits"
    default_seeds: ClassVar[int] = 5
    rate_is_chosen: ClassVar[bool] = True  # if False, only the strength, by the mean over all rates
    search_seeds: ClassVar[int] = 1
    # If a search at full length would take too long: the number of the best points of each method
    # that enter a second round. The second round decides.
    finalists: ClassVar[int] = 0
    workers: ClassVar[int | None] = None  # 1 in experiments that measure time
    cases: tuple[str, ...] = ("",)
    searched_cases: tuple[str, ...] = ()  # empty for all; fewer if cases share their choice
    methods: dict[str, tuple[float, ...]]
    rates: tuple[float, ...] = (0.0,)

    def __init__(self, data: str = "", quick: bool = False, seeds: int | None = None) -> None:
        self.data = data or (self.quick_data if quick else self.default_data)
        self.quick = quick
        self.seeds = seeds or (2 if quick else self.default_seeds)

    def settings(self) -> dict[str, Any]:
        """Returns everything that determines a run except the cell; resumed runs must match it."""
        return {"data": self.data, "quick": self.quick}

    def search_cells(self) -> list[Cell]:
        """Returns the cells of the search: all strengths at all rates of methods with a choice."""
        rates = len(self.rates) if self.rate_is_chosen else 1
        return [
            Cell(case, method, strength, lr, SEARCH + seed, search=True)
            for case in self.searched_cases or self.cases
            for method, strengths in self.strengths(case).items()
            if len(strengths) * rates > 1
            for strength, lr, seed in product(strengths, self.rates, range(self.search_seeds))
        ]

    def strengths(self, case: str) -> dict[str, tuple[float, ...]]:
        """Returns the methods of a case with their strengths."""
        return self.methods

    def contest(self, case: str) -> str:
        """Returns the group of a case. Cases of a group share strength and learning rate."""
        return case

    def report_cells(self, chosen: dict[tuple[str, str], Chosen]) -> list[Cell]:
        """Returns the reported cells for the choices by contest and method."""
        cells = []
        for case in self.cases:
            for method, strengths in self.strengths(case).items():
                best = chosen.get((self.contest(case), method))
                strength = best.strength if best else strengths[0]
                rates = (best.lr,) if best and self.rate_is_chosen else self.rates
                cells += [
                    Cell(case, method, strength, lr, seed)
                    for lr, seed in product(rates, range(self.seeds))
                ]
        return cells

    @abstractmethod
    def run(self, cell: Cell) -> Measured:
        """Runs one training."""

    def note(self, evidence: Evidence) -> str:
        """Returns the text above the tables."""
        seeds = evidence.document["seeds"]
        spread = f"Mean ± 95 % interval of {seeds} seeds" if seeds > 1 else "One seed, no interval"
        return f"{self.protocol} {spread}; with [ ], the geometric mean and its interval."

    @abstractmethod
    def tables(self, evidence: Evidence) -> dict[str, Table]:
        """Returns the tables of the results by a short name."""

    @abstractmethod
    def figures(self, evidence: Evidence) -> dict[str, Any]:
        """Returns the pictures by file name without suffix."""

    def verdicts(self, evidence: Evidence) -> dict[str, Verdict]:
        """Returns the verdicts by the name of the comparison, as printed on the page."""
        return {}

    def early(self, evidence: Evidence) -> list[Case]:
        """Returns the cases with early measurements, for `prediction`."""
        return []

    def failed(self, evidence: Evidence) -> bool:
        """Returns whether the results contradict what the experiment should show."""
        return False

    @classmethod
    def of(cls, document: dict[str, Any]) -> Setting:
        """Returns the setting of a results document."""
        settings = document["settings"]
        return cls(settings["data"], settings["quick"], document["seeds"])


class Swept(Setting):
    """An experiment without a search: it reports every strength of every method at every rate."""

    def search_cells(self) -> list[Cell]:
        return []

    def report_cells(self, chosen: dict[tuple[str, str], Chosen]) -> list[Cell]:
        return [
            Cell(case, method, strength, lr, seed)
            for case, (method, strengths) in product(self.cases, self.methods.items())
            for strength, lr, seed in product(strengths, self.rates, range(self.seeds))
        ]


def strengths_of(*names: str) -> dict[str, tuple[float, ...]]:
    """Returns methods with their default strengths."""
    return {name: METHODS[name].strengths for name in names}


def restore_numbers(value: Any) -> Any:
    """Replaces the strings that `dump_json` writes for non-finite numbers by numbers."""
    if isinstance(value, dict):
        return {key: restore_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [restore_numbers(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def plain(content: Any) -> Any:
    """Returns the content as it would be read back from a file."""
    return restore_numbers(json.loads(dump_json(content)))


def cell(run: dict[str, Any]) -> Cell:
    """Returns the cell of a run from a file."""
    return Cell(**{field.name: run[field.name] for field in fields(Cell)})


def read(path: Path) -> dict[str, Any]:
    """Reads a results file.

    Raises:
        ValueError: if the file does not exist or is damaged.
    """
    try:
        content = restore_numbers(json.loads(path.read_text()))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist. Run `wellcond reproduce` first.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}. Remove it and run again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not contain results. Remove it and run again.")
    return content


def _round(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


class Runner:
    """The runs of a setting in a folder: `runs/` with one file per run, and results.json.

    Args:
        setting: the experiment.
        folder: the output folder; it is created if it does not exist.
        workers: the number of processes.
        overwrite: whether existing runs and results are replaced.

    Raises:
        ValueError: if the folder contains runs under other settings.
    """

    def __init__(self, setting: Setting, folder: Path, workers: int, overwrite: bool) -> None:
        self.setting, self.folder, self.workers = setting, folder, workers
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out must be a directory, but {folder} is not.")
        self.declared = plain({"experiment": setting.name} | setting.settings())
        path = folder / "settings.json"
        if overwrite:
            shutil.rmtree(folder / "runs", ignore_errors=True)
            path.unlink(missing_ok=True)
        begun = any((folder / "runs").glob("*.json"))
        if begun and not path.exists():
            raise ValueError(
                f"{folder} contains runs but no settings.json. Choose another --out, or pass "
                "--overwrite to start again."
            )
        if begun and (found := read(path)) != self.declared:
            differing = [
                f"{key}: {found.get(key)} there, {self.declared.get(key)} requested"
                for key in sorted(found.keys() | self.declared.keys())
                if found.get(key) != self.declared.get(key)
            ]
            raise ValueError(
                f"{folder} contains runs under other settings ({'; '.join(differing)}). Choose "
                "another --out, or pass --overwrite to start again."
            )
        if not begun:
            if (folder / "results.json").exists() and not overwrite:
                raise ValueError(
                    f"{folder / 'results.json'} exists. Pass --overwrite, or choose another --out."
                )
            write_text(path, dump_json(self.declared) + "\n")

    def path(self, cell: Cell) -> Path:
        return self.folder / "runs" / f"{cell.name}.json"

    def results(self) -> dict[str, Any]:
        """Runs the missing cells, writes results.json and returns its content."""
        setting = self.setting
        searched = setting.search_cells()
        any_choice = _any_choice(setting, searched)
        total = len(searched) + len(setting.report_cells(any_choice))
        total += setting.finalists * len(any_choice)
        with self._report_interruption(), progress(total, setting.name) as advance:
            found = self._complete(searched, advance)
            found += self._complete(finals(setting, found), advance)
            chosen = choose(setting, found)
            best = {(c.case, c.method): c for c in chosen}
            runs = self._complete(setting.report_cells(best), advance)
        versions = {json.dumps(run.pop("versions")) for run in found + runs}
        document = {
            "experiment": setting.name,
            "protocol": setting.protocol,
            "settings": self.declared,
            "seeds": setting.seeds,
            "versions": sorted((json.loads(one) for one in versions), key=str),
            "chosen": [asdict(one) for one in chosen],
            "runs": found + runs,
        }
        write_text(self.folder / "results.json", dump_results(document))
        return document

    def _complete(
        self, cells: list[Cell], advance: Callable[[Cell | None], None]
    ) -> list[dict[str, Any]]:
        """Runs the missing cells and returns the runs of all cells."""
        missing = [cell for cell in cells if not self.path(cell).exists()]
        for _ in range(len(cells) - len(missing)):
            advance(None)
        setting = self.setting
        key = (type(setting), setting.data, setting.quick, setting.seeds)
        tasks = (delayed(_work)(key, cell, self.path(cell)) for cell in missing)
        pool = Parallel(
            n_jobs=min(self.workers, max(len(missing), 1)),
            return_as="generator_unordered",
            pre_dispatch="n_jobs",
            batch_size=1,
        )
        for cell in pool(tasks):
            advance(cell)
        return [read(self.path(cell)) for cell in cells]

    @contextmanager
    def _report_interruption(self) -> Iterator[None]:
        """Adds to a KeyboardInterrupt how many finished runs were kept."""
        try:
            yield
        except KeyboardInterrupt:
            count = len(list(self.folder.glob("runs/*.json")))
            kept = f"Kept {count} finished run{'s' * (count != 1)} in {self.folder / 'runs'}: "
            kept += "the same command resumes from there."
            raise KeyboardInterrupt(kept if count else "No run was finished.") from None


_settings: dict[Any, Setting] = {}  # one cache per process: each loads its data once


def _work(key: tuple[type[Setting], str, bool, int], cell: Cell, path: Path) -> Cell:
    """Runs a cell on one thread, so that results do not depend on workers; writes its file."""
    if key not in _settings:
        kind, data, quick, seeds = key
        _settings[key] = kind(data, quick, seeds)
    setting = _settings[key]
    threads = torch.get_num_threads()
    if setting.workers is None:
        torch.set_num_threads(1)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        with without_subnormals():
            metrics, curves = setting.run(cell)
    except Exception as error:
        error.add_note(f"in the run {cell.name}")
        raise
    finally:
        torch.set_num_threads(threads)
    run = asdict(cell) | {
        "metrics": metrics,
        "curves": {name: [_round(value) for value in curve] for name, curve in curves.items()},
        "seconds": round(time.perf_counter() - wall, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "versions": versions(),
    }
    write_text(path, dump_json(run) + "\n")
    return cell


@cache
def versions() -> dict[str, str]:
    """Returns the versions, the machine, and a digest of all modules of both packages."""
    code = hashlib.sha256()
    for package in (wc, wellcond_experiments):
        for module in sorted(Path(*package.__path__).rglob("*.py")):
            code.update(module.read_bytes())
    return command.versions(_cpu()) | {"code": code.hexdigest()[:12]}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"


Points = dict[tuple[float, float], float]  # (strength, learning rate): mean score


def _scores(
    setting: Setting, runs: list[dict[str, Any]]
) -> Iterator[tuple[tuple[str, str], Points]]:
    """Yields the scores per contest and method. A nan score counts as the worst."""
    groups: dict[tuple[str, str], dict[tuple[float, float], list[float]]] = {}
    for run in runs:
        group = groups.setdefault((setting.contest(run["case"]), run["method"]), {})
        point = (run["strength"], run["lr"] if setting.rate_is_chosen else 0.0)
        score = run["metrics"][setting.score]
        group.setdefault(point, []).append(-math.inf if math.isnan(score) else score)
    for key, points in groups.items():
        yield key, {p: math.fsum(values) / len(values) for p, values in points.items()}


def finals(setting: Setting, runs: list[dict[str, Any]]) -> list[Cell]:
    """Returns the cells of the second round: the best points of the first round."""
    cells = []
    for (contest, method), points in _scores(setting, runs) if setting.finalists else ():
        best = sorted(points, key=lambda point: -points[point])[: setting.finalists]
        cases = [run["case"] for run in runs if setting.contest(run["case"]) == contest]
        cells += [
            Cell(case, method, *p, FINAL, search=True)
            for case, p in product(dict.fromkeys(cases), best)
        ]
    return cells


def choose(setting: Setting, runs: list[dict[str, Any]]) -> list[Chosen]:
    """Returns the best strength and learning rate of each method; ties go to the first."""
    grids = dict(_scores(setting, runs))
    last = [run for run in runs if run["seed"] >= FINAL] or runs
    chosen = []
    for (contest, method), points in _scores(setting, last):
        best = max(points, key=lambda point: points[point])
        searched = zip(*grids[contest, method], strict=True)
        edge = [
            name
            for name, values, value in zip(("strength", "lr"), searched, best, strict=True)
            if len(set(values)) > 1 and value in (min(values), max(values))
        ]
        chosen.append(Chosen(contest, method, *best, points[best], " and ".join(edge)))
    return chosen


def _any_choice(setting: Setting, searched: list[Cell]) -> dict[tuple[str, str], Chosen]:
    """Returns placeholder choices, to count the reported cells before the search."""
    return {
        (setting.contest(c.case), c.method): Chosen(
            setting.contest(c.case), c.method, c.strength, c.lr, 0.0, ""
        )
        for c in searched
    }


def dump_results(document: dict[str, Any]) -> str:
    """Returns strict JSON with one line per run, so that diffs remain readable."""
    head = dump_json({key: value for key, value in document.items() if key != "runs"})
    lines = [dump_json(run, indent=None) for run in document["runs"]]
    return head.removesuffix("\n}") + ',\n "runs": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


@contextmanager
def progress(total: int, title: str) -> Iterator[Callable[[Cell | None], None]]:
    """Shows the number of finished runs and the remaining time, on standard error.

    Call the yielded function with the cell of a run that ended, or with None for a run that
    existed. A terminal shows a bar, otherwise a line appears at most every 30 seconds.
    """
    began = said = time.monotonic()
    done = new = 0
    with command.progress(total, title) as advance:

        def ended(cell: Cell | None) -> None:
            nonlocal done, new, said
            now = time.monotonic()
            done, new = done + 1, new + (cell is not None)
            seconds = (now - began) / new * (total - done) if new else 0
            left = f"about {format_duration(seconds)} left" if new else ""
            advance(left)
            if not sys.stderr.isatty() and now - said > 30:
                print(f"{title}: {done} of {total} runs, {left}", file=sys.stderr, flush=True)
                said = now

        yield ended
