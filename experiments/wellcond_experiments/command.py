"""Shared by all commands: options, progress, versions, and writing JSON and files."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import wellcond as wc

Advance = Callable[[str], None]  # advances a progress bar by one and sets its label


def positive(text: str) -> int:
    """Parses a positive integer, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


@contextmanager
def progress(total: int, title: str) -> Iterator[Advance]:
    """Shows a progress bar if standard error is a terminal. Yields a function that advances it."""
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


def versions(machine: str) -> dict[str, str]:
    """Returns the versions of wellcond, torch and Python, and the machine."""
    return {
        "wellcond": wc.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {machine}",
    }


def format_duration(seconds: float) -> str:
    """Formats a duration, such as "40 s", "12 min" or "1 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def dump_json(content: Any, indent: int | None = 1) -> str:
    """Returns strict JSON in ASCII. Inf, -inf and nan become strings."""

    def strict(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        if isinstance(value, dict):
            return {key: strict(item) for key, item in value.items()}
        return [strict(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps(strict(content), indent=indent, allow_nan=False)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path that replaces `path` at the end, unless there is an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes the file atomically: a failure leaves the old file unchanged."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
