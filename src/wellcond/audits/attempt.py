"""Converts the errors that an audit expects to messages, so that the audit can continue.

Expected errors come from memory, files, numbers and user code. All other errors, such as a
TypeError, are bugs in wellcond and are raised.
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

# torch and LAPACK raise RuntimeError. wellcond raises ValueError for damaged files, for weights
# without values, and for errors in user code, which it names.
_EXPECTED = (MemoryError, OSError, RuntimeError, ValueError, UnknownLayoutError)


class Trouble(str):
    """The reason why there is no value, as a message for the user."""


def attempt(compute: Callable[[], T]) -> T | Trouble:
    """The result of `compute`, or the reason why it failed."""
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
    """The row of a tensor that could not be read."""
    return Finding(name, view, (0, 0), "", status=Status.failed, detail=why)
