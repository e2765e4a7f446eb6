"""What experiments and benchmarks share on the command line: options, versions, progress."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

import wellcond.text

Advance = Callable[[str], None]  # moves a bar of progress by one, under this label


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


def apply_threads(arguments: argparse.Namespace) -> None:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)


def versions() -> dict[str, str]:
    """Those of the software, and of the machine as far as it matters."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return wellcond.text.versions() | {"machine": machine}


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
    with Progress(*columns, console=Console(stderr=True, emoji=False)) as bar:
        task = bar.add_task(title, total=total, label="")
        yield lambda label: bar.update(task, advance=1, label=label)


@contextmanager
def without_subnormals() -> Iterator[None]:
    """What is below the normal numbers of its dtype counts as zero.

    Units that die in a training leave ever smaller averages behind, on which processors work many
    times slower: what dies out would decide what a way to train seems to cost. Before the first
    parallel operation, as threads take it over from the one that starts them.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
