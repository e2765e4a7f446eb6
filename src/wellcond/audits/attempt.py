"""The one place where an error that an audit expects becomes words, and the audit goes on.

Expected is what memory, files, numbers and the code of users bring about. All else is a mistake of
wellcond itself, such as a TypeError, and is raised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from wellcond.files.built import BuildError
from wellcond.report.findings import Finding, Status
from wellcond.text import is_out_of_memory
from wellcond.weights.changes import UnknownAdapterError
from wellcond.weights.projections import UnknownLayoutError

T = TypeVar("T")

# RuntimeError is what torch and LAPACK raise, ValueError what wellcond does: for damaged files,
# for weights that have no values, and for the code of users, whose own errors it names.
_EXPECTED = (MemoryError, OSError, RuntimeError, ValueError, UnknownLayoutError)


class Trouble(str):
    """Why there is no value, in the words that the user reads."""


def attempt(compute: Callable[[], T]) -> T | Trouble:
    """What it returns, or why it cannot."""
    try:
        return compute()
    except _EXPECTED as error:
        if is_out_of_memory(error):
            return Trouble("there is not enough memory to measure it")
        if isinstance(error, UnknownAdapterError | UnknownLayoutError | BuildError):
            return Trouble(error)
        first = str(error).strip().splitlines()
        return Trouble(f"{type(error).__name__}: {first[0] if first else 'without a message'}")


def failed_finding(name: str, view: str, why: str) -> Finding:
    """The row of what could not even be read."""
    return Finding(name, view, (0, 0), "", status=Status.failed, detail=why)
