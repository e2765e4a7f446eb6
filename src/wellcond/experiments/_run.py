"""What the experiments share: options, results on disk, summaries, tables, progress, figures.

results.json is written whole and anew after every finished run, so that an interrupted experiment
leaves what was finished and nothing half-written.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import wellcond.text
from wellcond.text import dump_json, written

Advance = Callable[[str], None]  # moves a bar of progress by one, under this label
Titled = tuple[str, list[str], list[list[str]]]  # a table: title, header, rows
METHODS = ("none", "tikhonov", "condition", "condition-proximal")
LABELS = {
    "none": "no regulariser",
    "tikhonov": "Tikhonov",
    "condition": "condition (in the loss)",
    "condition-proximal": "condition (proximal)",
}
COLOURS = {
    "none": "#7f7f7f",
    "tikhonov": "#d98c1f",
    "condition": "#1f6fb4",
    "condition-proximal": "#2a9d6f",
}
LINES = {"none": "-", "tikhonov": "-", "condition": "-", "condition-proximal": "--"}
MARKERS = {"none": "s", "tikhonov": "^", "condition": "o", "condition-proximal": "D"}


def add_common(parser: argparse.ArgumentParser, name: str, data: bool = True) -> None:
    """The options of every experiment."""
    if data:
        parser.add_argument(
            "--data",
            default="digits",
            metavar="digits|mnist|PATH",
            help="scikit-learn's digits (default), MNIST, or a directory or .npz that holds MNIST",
        )
    parser.add_argument("--seeds", type=positive, help="how many seeds (default 3; 1 with --quick)")
    parser.add_argument("--quick", action="store_true", help="a short run to see that it works")
    parser.add_argument("--out", type=Path, default=Path("runs") / name, help="default runs/NAME")
    parser.add_argument("--overwrite", action="store_true", help="replace results in --out")
    add_output(parser)


def add_output(parser: argparse.ArgumentParser) -> None:
    """The options of every command that prints."""
    parser.add_argument("--json", action="store_true", help="print one JSON document, alone")
    parser.add_argument("--threads", type=positive, help="threads of torch")


def positive(text: str) -> int:
    """A positive integer, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def prepare(arguments: argparse.Namespace) -> None:
    """Settles the common options; says at once what would stop the experiment at its end."""
    import_figures()
    apply_threads(arguments)
    arguments.seeds = arguments.seeds or (1 if arguments.quick else 3)


def apply_threads(arguments: argparse.Namespace) -> None:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)


def versions() -> dict[str, str]:
    """Those of the software, and of the machine as far as it matters."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return wellcond.text.versions() | {"machine": machine}


class Results:
    """The document of an experiment, on disk after every run; `reports` are the files beside it."""

    def __init__(
        self, arguments: argparse.Namespace, data: str, protocol: str, reports: tuple[str, ...]
    ) -> None:
        self.out: Path = arguments.out
        self.path = self.out / "results.json"
        self.reports = ("table.md", *reports)
        self.overwrite: bool = arguments.overwrite
        self.written = 0  # runs on disk
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out must be a directory, {self.out} is none.")
        if self.path.exists() and not arguments.overwrite:
            raise ValueError(f"{self.path} exists. Give --overwrite, or another --out.")
        hidden = ("run", "command", "json", "overwrite", "out", "experiment")
        settings = {key: value for key, value in vars(arguments).items() if key not in hidden}
        self.document: dict[str, Any] = {
            "experiment": arguments.experiment,
            "data": data,
            "protocol": protocol,
            "settings": settings,
            "versions": versions(),
            "runs": [],
            "summary": [],
        }

    @property
    def runs(self) -> list[dict[str, Any]]:
        runs: list[dict[str, Any]] = self.document["runs"]
        return runs

    @property
    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = self.document["settings"]
        return settings

    def add(self, run: dict[str, Any]) -> None:
        self.runs.append(run)
        self.document["summary"] = self.summarised()
        written(self.text(), self.path, self.overwrite or self.written > 0)
        if not self.written:  # what an earlier experiment drew would not fit these results
            for report in self.reports:
                (self.out / report).unlink(missing_ok=True)
        self.written = len(self.runs)

    def summarised(self) -> list[dict[str, Any]]:
        return summarise(self.runs)

    def text(self) -> str:
        return dump_json(self.document)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """An interruption inside says what it leaves."""
        try:
            yield
        except KeyboardInterrupt:
            runs = f"{self.written} finished run{'s' * (self.written != 1)}"
            left = f"Kept {runs} in {self.path}." if self.written else "Nothing was kept."
            raise KeyboardInterrupt(left) from None

    def row(self, method: str, strength: float, metric: str, tuned: bool = False) -> dict[str, Any]:
        """What `interval` says of the seeds; nan where there is no such run."""
        summary: list[dict[str, Any]] = self.document["summary"]
        for row in summary:
            if (row["method"], row["strength"], row["tuned"], row["metric"]) == (
                method,
                strength,
                tuned,
                metric,
            ):
                return row
        return {"mean": math.nan, "low": math.nan, "high": math.nan, "log": False}

    def mean(self, method: str, strength: float, metric: str, tuned: bool = False) -> float:
        mean: float = self.row(method, strength, metric, tuned)["mean"]
        return mean


# What differs by factors rather than by amounts, from seed to seed as well.
LOGARITHMIC = {"condition_number", "sigma_max", "residual", "error"}


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and 95 % interval over the seeds, per method, strength and metric."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for run in runs:
        metrics = {f"condition_number:{k}": v for k, v in run["condition_numbers"].items()}
        metrics |= {f"score:{k}": v for k, v in run["scores"].items()}
        metrics |= run.get("metrics", {})
        for metric, value in metrics.items():
            key = (run["method"], run["strength"], run["tuned"], metric)
            groups.setdefault(key, []).append(value)
    return [
        {"method": method, "strength": strength, "tuned": tuned, "metric": metric}
        | interval(values, log=not LOGARITHMIC.isdisjoint(metric.split(":")))
        for (method, strength, tuned, metric), values in groups.items()
    ]


def interval(values: list[float], log: bool = False) -> dict[str, Any]:
    """Mean and 95 % interval (Student's t); of the logarithms if log, so of a geometric mean.

    A mean of condition numbers is that of the worst one, and its interval reaches below zero.
    """
    if len(values) == 1:
        return {"mean": values[0], "low": math.nan, "high": math.nan, "log": log}
    if log:
        # torch knows log(0) and an exp beyond float64.
        logs = torch.tensor(values, dtype=torch.float64).log().tolist()
        ends = ("mean", "low", "high")
        band = torch.tensor([interval(logs)[end] for end in ends], dtype=torch.float64).exp()
        return dict(zip(ends, band.tolist(), strict=True)) | {"log": True}
    mean = statistics.fmean(values)
    if not math.isfinite(mean):
        return {"mean": mean, "low": math.nan, "high": math.nan, "log": False}
    from scipy.special import stdtrit  # comes with scikit-learn

    spread = statistics.stdev(values) / math.sqrt(len(values))
    half = float(stdtrit(len(values) - 1, 0.975)) * spread
    return {"mean": mean, "low": mean - half, "high": mean + half, "log": False}


def number(value: float) -> str:
    """Three significant digits, for a table."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.2e}" if value and (abs(value) >= 1e5 or abs(value) < 1e-3) else f"{value:.3g}"


def with_interval(row: dict[str, Any]) -> str:
    """As "0.5 ± 0.1", and where factors count "58 [31, 110]"."""
    mean, low, high = row["mean"], row["low"], row["high"]
    if math.isnan(low):
        return number(mean)
    spread = f"[{number(low)}, {number(high)}]" if row["log"] else f"± {number(high - mean)}"
    return f"{number(mean)} {spread}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in (header, *rows)]
    lines = [escaped[0], ["---"] * len(header), *escaped[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        table.add_row(*row)
    # A pipe or a file has no width; a narrow default would break the numbers.
    console = Console(width=None if sys.stdout.isatty() else 160)
    with console.capture() as text:  # as rich ends the program, its own way, if nobody reads on
        console.print(table)
    print(text.get(), end="")


@contextmanager
def progress(total: int, title: str) -> Iterator[Advance]:
    """A bar on standard error where that is a terminal; the function moves it by one."""
    if not sys.stderr.isatty():
        yield lambda label: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[label]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, label="")
        yield lambda label: bar.update(task, advance=1, label=label)


def over_seeds(seeds: int) -> str:
    if seeds == 1:
        return "One seed: no interval."
    return f"Mean ± 95 % interval of {seeds} seeds; with [ ]: geometric mean, interval of factors."


def write_tables(results: Results, note: str, tables: list[Titled]) -> None:
    parts = [note + "\n", *(f"{title}:\n\n{markdown(head, rows)}" for title, head, rows in tables)]
    written("\n".join(parts), results.out / "table.md")


def finished(results: Results, note: str, tables: list[Titled], as_json: bool) -> None:
    """Prints the document, or the tables and where everything lies."""
    if as_json:
        print(results.text(), end="")
        return
    print(note, end="\n\n")
    for title, header, rows in tables:
        print_table(title, header, rows)
    print(f"Written to {results.out}: {', '.join(('results.json', *results.reports))}")


def figure(columns: int = 1, width: float = 6.4, height: float = 4.2) -> tuple[Any, list[Any]]:
    """A figure of so many panels side by side, drawn without a window."""
    import_figures()
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width * columns, height), layout="constrained", dpi=130)
    panels = list(drawing.subplots(1, columns, squeeze=False)[0])
    for panel in panels:
        panel.grid(True, which="major", color="#dddddd", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
    return drawing, panels


def logarithmic(axis: Any) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5, or at the powers of ten if many."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    if high / low < 200:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, position: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


HUGE = 1e6  # in pictures, larger condition numbers are one


def draw_condition_numbers(panel: Any) -> None:
    """A logarithmic axis from 1 on; all that is above `HUGE`, or infinite, lies on one line."""
    top = panel.dataLim.y1
    panel.set_yscale("log")
    if top < HUGE:
        panel.set_ylim(1, None)
        logarithmic(panel.yaxis)
        return
    ticks = [10.0**k for k in range(6)] + [3 * HUGE]
    panel.set_yticks(ticks, [f"$10^{k}$" for k in range(6)] + ["over $10^6$\nor infinite"])
    panel.set_ylim(1, 8 * HUGE)
    panel.axhline(HUGE, color="#999999", ls=":", lw=0.9)


def drawable(kappa: float) -> float:
    """Where `draw_condition_numbers` shows it; nan is nowhere."""
    return 3 * HUGE if kappa > HUGE else kappa


def import_figures() -> None:
    """Says at once, before hours of training, that pictures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError(
            "pictures need matplotlib: pip install 'wellcond[experiments]'."
        ) from None
