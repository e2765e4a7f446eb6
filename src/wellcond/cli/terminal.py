"""What a terminal shows besides the output: progress, and lines on standard error."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from wellcond.text import escape, is_out_of_memory

if TYPE_CHECKING:
    from wellcond.audits.progress import Progress, ProgressCallback

_CLEAR = "\r\x1b[K"


@contextlib.contextmanager
def show_progress(verb: str) -> Iterator[ProgressCallback | None]:
    """A line on standard error, written over and cleared at the end; None without a terminal."""
    if not sys.stderr.isatty():
        yield None
        return

    def show(step: Progress) -> None:
        width = shutil.get_terminal_size().columns - 1
        print(f"{_CLEAR}{f'{verb} {step}'[:width]}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        print(_CLEAR, end="", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Prints one line on standard error, which says that it is from wellcond."""
    print(f"wellcond: {text}", file=sys.stderr)


def describe_error(error: Exception) -> str:
    """What the user reads of an error; raises it if it is a mistake of the program."""
    if isinstance(error, MemoryError | RuntimeError):
        if not is_out_of_memory(error):
            raise error
        own = isinstance(error, MemoryError) and str(error)
        return escape(own or "there is not enough memory")
    return escape(error)
