"""Declared grids of trainings, run by several processes, one file per run; a killed one goes on.

A `Setting` says what is trained, over which cells (case, method, strength, learning rate, seed) and
what is drawn of it. Strength and learning rate of a method are chosen by its score on seeds and
data of the search, which are not reported; what is reported is run once with the chosen values.
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

# The first seeds of the search, and of its second round; those that are reported count from 0.
SEARCH, FINAL = 10_000, 20_000
DIGITS = 6  # of what is kept of a curve


@dataclass(frozen=True)
class Cell:
    """A point of a grid, and one run."""

    case: str
    method: str
    strength: float
    lr: float
    seed: int
    search: bool = False

    @property
    def final(self) -> bool:
        """Whether it is of the second round of the search."""
        return self.search and self.seed >= FINAL

    @property
    def name(self) -> str:
        stage = "search" if self.search else "report"
        what = (stage, self.case, self.method, f"{self.strength:g}", f"{self.lr:g}", f"{self.seed}")
        return "-".join(filter(None, what))


class Measured(NamedTuple):
    """The result of a run: numbers, and curves over time or over what else their names say."""

    metrics: dict[str, float]
    curves: dict[str, list[float]]


@dataclass(frozen=True)
class Chosen:
    """What the search has found for a method; `edge` names what lies at the end of its grid.

    The learning rate is 0 where it is not chosen.
    """

    case: str
    method: str
    strength: float
    lr: float
    score: float
    edge: str


class Setting(ABC):
    """An experiment. A subclass in a file of its own is all that a new one needs.

    It sets `cases`, `methods` with the strengths to choose from, and `rates`, whose product the
    search goes through; one that has another grid says so by `strengths`, `searched_cases`,
    `search_cells` and `report_cells`.

    Args:
        data: as `--data` has it; "" for the default.
        quick: whether it only has to show that it works.
        seeds: how many are reported; None for the default.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    protocol: ClassVar[str]
    score: ClassVar[str] = "accuracy"  # the metric that the search compares; larger is better
    default_data: ClassVar[str] = "mnist"
    quick_data: ClassVar[str] = "digits"
    default_seeds: ClassVar[int] = 5
    rate_is_chosen: ClassVar[bool] = True  # else the strength that is best on the mean of them
    search_seeds: ClassVar[int] = 1
    # Where a search at full length would be too long: so many of the best points of each method
    # come into a second round, which alone decides.
    finalists: ClassVar[int] = 0
    workers: ClassVar[int | None] = None  # where something is timed, 1
    cases: tuple[str, ...] = ("",)
    searched_cases: tuple[str, ...] = ()  # all, unless some of them have the same answer
    methods: dict[str, tuple[float, ...]]
    rates: tuple[float, ...] = (0.0,)

    def __init__(self, data: str = "", quick: bool = False, seeds: int | None = None) -> None:
        self.data = data or (self.quick_data if quick else self.default_data)
        self.quick = quick
        self.seeds = seeds or (2 if quick else self.default_seeds)

    def settings(self) -> dict[str, Any]:
        """All that decides what a run gives, but the cell; what goes on must agree in it."""
        return {"data": self.data, "quick": self.quick}

    def search_cells(self) -> list[Cell]:
        """The cells by which strength and learning rate are chosen: for each method with a choice,
        all of its strengths at all rates."""
        rates = len(self.rates) if self.rate_is_chosen else 1
        return [
            Cell(case, method, strength, lr, SEARCH + seed, search=True)
            for case in self.searched_cases or self.cases
            for method, strengths in self.strengths(case).items()
            if len(strengths) * rates > 1
            for strength, lr, seed in product(strengths, self.rates, range(self.search_seeds))
        ]

    def strengths(self, case: str) -> dict[str, tuple[float, ...]]:
        """The methods of a case, with the strengths to choose from."""
        return self.methods

    def contest(self, case: str) -> str:
        """Cases with the same answer get the same strength and learning rate."""
        return case

    def report_cells(self, chosen: dict[tuple[str, str], Chosen]) -> list[Cell]:
        """The cells that are reported, given by contest and method what was chosen."""
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
        """One training."""

    def note(self, evidence: Evidence) -> str:
        """The text above the tables."""
        seeds = evidence.document["seeds"]
        spread = f"Mean ± 95 % interval of {seeds} seeds" if seeds > 1 else "One seed: no interval"
        return f"{self.protocol} {spread}; with [ ]: geometric mean, interval of factors."

    @abstractmethod
    def tables(self, evidence: Evidence) -> dict[str, Table]:
        """The tables of the results, by a short name."""

    @abstractmethod
    def figures(self, evidence: Evidence) -> dict[str, Any]:
        """The pictures, by the name of the file without suffix."""

    def verdicts(self, evidence: Evidence) -> dict[str, Verdict]:
        """Ours against all others, by what was compared in the words of the page."""
        return {}

    def early(self, evidence: Evidence) -> list[Case]:
        """Runs that show early what they may end with."""
        return []

    def failed(self, evidence: Evidence) -> bool:
        """Whether the results contradict what they should show."""
        return False

    @classmethod
    def of(cls, document: dict[str, Any]) -> Setting:
        """The one that these results are of."""
        settings = document["settings"]
        return cls(settings["data"], settings["quick"], document["seeds"])


class Swept(Setting):
    """Nothing is chosen: every strength of every method is reported, at every rate."""

    def search_cells(self) -> list[Cell]:
        return []

    def report_cells(self, chosen: dict[tuple[str, str], Chosen]) -> list[Cell]:
        return [
            Cell(case, method, strength, lr, seed)
            for case, (method, strengths) in product(self.cases, self.methods.items())
            for strength, lr, seed in product(strengths, self.rates, range(self.seeds))
        ]


def strengths_of(*names: str) -> dict[str, tuple[float, ...]]:
    """Methods with the strengths that they are searched over."""
    return {name: METHODS[name].strengths for name in names}


def restore_numbers(value: Any) -> Any:
    """Numbers in place of the strings that `dump_json` writes for those that are not finite."""
    if isinstance(value, dict):
        return {key: restore_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [restore_numbers(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def plain(content: Any) -> Any:
    """As it comes back from a file."""
    return restore_numbers(json.loads(dump_json(content)))


def cell(run: dict[str, Any]) -> Cell:
    """Which one a run in a file is."""
    return Cell(**{field.name: run[field.name] for field in fields(Cell)})


def read(path: Path) -> dict[str, Any]:
    """A file of results.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    try:
        content = restore_numbers(json.loads(path.read_text()))
    except FileNotFoundError:
        raise ValueError(f"there is no {path}. Run `wellcond reproduce` first.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}. Remove it, and run again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no results. Remove it, and run again.")
    return content


def _round(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


class Runner:
    """The runs of a setting in a folder: `runs/` with a file for each, and results.json.

    Args:
        setting: what to run.
        folder: where; made if it is not there.
        workers: processes.
        overwrite: whether runs under other settings, or results, may be removed.

    Raises:
        ValueError: the folder holds runs under other settings.
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
                f"{folder} holds runs, but no settings.json that says of what. Give another --out, "
                "or --overwrite to begin anew."
            )
        if begun and (found := read(path)) != self.declared:
            differing = [
                f"{key}: {found.get(key)} there, {self.declared.get(key)} asked"
                for key in sorted(found.keys() | self.declared.keys())
                if found.get(key) != self.declared.get(key)
            ]
            raise ValueError(
                f"{folder} holds runs under other settings ({'; '.join(differing)}). Give another "
                "--out, or --overwrite to begin anew."
            )
        if not begun:
            if (folder / "results.json").exists() and not overwrite:
                raise ValueError(
                    f"{folder / 'results.json'} exists. Give --overwrite, or another --out."
                )
            write_text(path, dump_json(self.declared) + "\n")

    def path(self, cell: Cell) -> Path:
        return self.folder / "runs" / f"{cell.name}.json"

    def results(self) -> dict[str, Any]:
        """Runs what is missing, writes results.json and returns its content."""
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
        """What the cells gave, those that are missing run first."""
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
        """An interruption inside says what it leaves."""
        try:
            yield
        except KeyboardInterrupt:
            count = len(list(self.folder.glob("runs/*.json")))
            kept = f"Kept {count} finished run{'s' * (count != 1)} in {self.folder / 'runs'}: "
            kept += "the same command goes on from there."
            raise KeyboardInterrupt(kept if count else "Nothing was kept.") from None


_settings: dict[Any, Setting] = {}  # of this process, so that each loads its data once


def _work(key: tuple[type[Setting], str, bool, int], cell: Cell, path: Path) -> Cell:
    """Runs a cell and writes its file; on one thread, so that workers change no result."""
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
    """Of the software, and the machine; the code by a digest of all modules of both packages."""
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


Points = dict[tuple[float, float], float]  # strength and learning rate with their mean score


def _scores(
    setting: Setting, runs: list[dict[str, Any]]
) -> Iterator[tuple[tuple[str, str], Points]]:
    """For each contest and method. A run that ended without a number loses against any other."""
    groups: dict[tuple[str, str], dict[tuple[float, float], list[float]]] = {}
    for run in runs:
        group = groups.setdefault((setting.contest(run["case"]), run["method"]), {})
        point = (run["strength"], run["lr"] if setting.rate_is_chosen else 0.0)
        score = run["metrics"][setting.score]
        group.setdefault(point, []).append(-math.inf if math.isnan(score) else score)
    for key, points in groups.items():
        yield key, {p: math.fsum(values) / len(values) for p, values in points.items()}


def finals(setting: Setting, runs: list[dict[str, Any]]) -> list[Cell]:
    """The second round of the search, of the best of the first."""
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
    """The best strength and learning rate of each method in the search; of equals the first."""
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
    """To count what will be reported before it is known."""
    return {
        (setting.contest(c.case), c.method): Chosen(
            setting.contest(c.case), c.method, c.strength, c.lr, 0.0, ""
        )
        for c in searched
    }


def dump_results(document: dict[str, Any]) -> str:
    """Strict JSON, a line per run, so that people can read and compare hundreds of them."""
    head = dump_json({key: value for key, value in document.items() if key != "runs"})
    lines = [dump_json(run, indent=None) for run in document["runs"]]
    return head.removesuffix("\n}") + ',\n "runs": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


@contextmanager
def progress(total: int, title: str) -> Iterator[Callable[[Cell | None], None]]:
    """Shows how many runs are done and how long the rest will take, on standard error.

    The function counts a run that has ended, or with None one that was there already. On a terminal
    there is a bar, else a line, at most every half minute.
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
