"""The skeleton of a benchmark: options, a progress bar, a JSON document or a table."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch

from wellcond_experiments.command import Advance, dump_json, positive, progress, versions
from wellcond_experiments.tables import Table

SHOWN = 10  # number of printed failures; the document contains all


def option(default: Any, help: str = "", **settings: Any) -> Any:
    """A field of a benchmark that is an option of its command, with settings for argparse."""
    if default is not None:
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        help = f"{help} (default {shown})".strip()
    return field(default=default, metadata={"help": help} | settings)


def count(default: int | None, help: str = "") -> Any:
    """An option whose value is a positive integer."""
    return option(default, help, type=positive)


@dataclass(frozen=True)
class Benchmark(ABC):
    """A subclass is a dataclass; its fields are the options of `wellcond bench NAME`."""

    name: ClassVar[str]
    help: ClassVar[str]
    description: ClassVar[str]
    example: ClassVar[str]  # options of the example in the help
    rows: ClassVar[str] = "runs"  # key of the table rows in the document
    columns: ClassVar[dict[str, tuple[str, str]]]  # title and format of each key of a row
    threads: ClassVar[int | None] = None  # default threads of torch; None keeps those of torch

    @property
    @abstractmethod
    def total(self) -> int:
        """The number of times that `measure` advances the progress bar."""

    @abstractmethod
    def measure(self, advance: Advance) -> dict[str, Any]:
        """Returns a document of settings and results.

        Optional keys: "failures" for unexpected results, and "notes" for lines below the table.
        """

    @abstractmethod
    def title(self, document: dict[str, Any]) -> str:
        """Returns the title of the table."""

    def table(self, document: dict[str, Any]) -> Table:
        """Returns the table of a document."""
        header = [title for title, _ in self.columns.values()]
        formats = {key: spec for key, (_, spec) in self.columns.items()}
        cells = [
            [format_cell(row.get(key), spec) for key, spec in formats.items()]
            for row in document[self.rows]
        ]
        return Table(self.title(document), header, cells)


def format_cell(value: Any, spec: str) -> str:
    """Formats a value or a list of values; None and nan become ""."""
    if isinstance(value, list):
        return ", ".join(format_cell(one, spec) for one in value)
    return "" if value is None or value != value else format(value, spec)


def add_command(benchmarks: Any, kind: type[Benchmark]) -> None:
    """Adds the subcommand of a benchmark."""
    parser: argparse.ArgumentParser = benchmarks.add_parser(
        kind.name,
        help=kind.help,
        description=kind.description,
        epilog=f"example: wellcond bench {kind.name} {kind.example}".rstrip(),
    )
    for one in fields(kind):
        parser.add_argument(f"--{one.name}", default=one.default, **one.metadata)
    parser.add_argument("--json", action="store_true", help="print a JSON document, not a table")
    parser.add_argument("--threads", type=positive, default=kind.threads, help="threads of torch")
    parser.set_defaults(run=run, kind=kind)


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints; the exit code is 1 if there are failures."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    kind: type[Benchmark] = arguments.kind
    benchmark = kind(**{one.name: getattr(arguments, one.name) for one in fields(kind)})
    with progress(benchmark.total, f"bench {kind.name}") as advance:
        document = {"benchmark": kind.name} | benchmark.measure(advance)
    document["versions"] = versions(f"{torch.get_num_threads()} threads")
    failures = document.get("failures", [])
    if arguments.json:
        print(dump_json(document))
    else:
        benchmark.table(document).print()
        for note in document.get("notes", []):
            print(note)
        for failure in failures[:SHOWN]:
            print(f"FAILED {failure}")
        if len(failures) > SHOWN:
            print(f"and {len(failures) - SHOWN} more")
    return 1 if failures else 0
