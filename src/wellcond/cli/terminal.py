"""Progress, messages and error texts for the terminal."""

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
    """Yields a callback that updates one line on standard error; None without a terminal.

    The line is cleared at the end.
    """
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
    """Prints one line on standard error, with the prefix "wellcond: "."""
    print(f"wellcond: {text}", file=sys.stderr)


def describe_error(error: Exception) -> str:
    """The message for the user; raises the error again if it is a bug in wellcond."""
    if isinstance(error, MemoryError | RuntimeError):
        if not is_out_of_memory(error):
            raise error
        own = isinstance(error, MemoryError) and str(error)
        return escape(own or "there is not enough memory")
    return escape(error)
