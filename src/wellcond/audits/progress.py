"""The progress of long work on many tensors."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from wellcond.text import escape, format_duration
from wellcond.weights.matrices import Matrices, entries

# Larger matrices are not decomposed completely; their time grows with their number of entries.
_DECOMPOSED = 2048
_WIDTH = 79  # of a line of progress
_PAUSE = 1.0  # seconds between two reports on one tensor


@dataclass(frozen=True)
class Progress:
    """The tensor that is next or is being measured, and the remaining work.

    Attributes:
        name: the name of the tensor, or of an attention module.
        number: the number of the tensor, from 1.
        total: the number of tensors.
        seconds_left: the estimated time for this tensor and the remaining ones, from the sizes of
            the finished ones; nan before the first is finished.
        share: the finished share of this tensor, 0 to 1. It is updated at most once per second for
            convolutions as linear operators, which can take long, and is 0 for all others.

    Example:
        >>> print(Progress("layers.3.weight", 4, 10, seconds_left=80.0))
        4 of 10, about 1 min left: layers.3.weight
        >>> print(Progress("layers.3.weight", 4, 10, seconds_left=60.0, share=0.5))
        4 of 10, 50 % of it done, about 1 min left: layers.3.weight
    """

    name: str
    number: int
    total: int
    seconds_left: float
    share: float = 0.0

    def __str__(self) -> str:
        known = not math.isnan(self.seconds_left)
        left = f", about {format_duration(self.seconds_left)} left" if known else ""
        done = f", {self.share:.0%} of it done".replace("%", " %") if self.share else ""
        return f"{self.number} of {self.total}{done}{left}: {escape(self.name)}"


ProgressCallback = Callable[[Progress], None]


class CallbackError(Exception):
    """Wraps an error of a callback, which is its cause, because errors of weights are caught."""


@contextlib.contextmanager
def shown(progress: ProgressCallback | bool | None) -> Iterator[ProgressCallback | None]:
    """Yields the callback; for True, one that draws a progress bar; for False, None.

    The bar is a bar of tqdm, which is a widget in notebooks, or without tqdm, a line on standard
    error.
    """
    if not isinstance(progress, bool):
        yield progress
    elif not progress:
        yield None
    else:
        try:
            if find_spec("ipywidgets"):
                from tqdm.auto import tqdm
            else:  # a notebook gets a text bar
                from tqdm.std import tqdm
        except ImportError:
            try:
                yield _draw_line
            finally:
                print(f"\r{'':{_WIDTH}}\r", end="", file=sys.stderr, flush=True)
            return
        bar = tqdm(leave=False)

        def draw(step: Progress) -> None:
            bar.total, bar.n = step.total, step.number - 1 + (round(step.share, 1) or 0)
            bar.set_postfix_str(escape(step.name))

        try:
            yield draw
        finally:
            bar.close()


def _draw_line(step: Progress) -> None:
    print(f"\r{str(step)[:_WIDTH]:{_WIDTH}}", end="", file=sys.stderr, flush=True)


class Counter:
    """Reports one source after the other; `work` lists the work for each, in any unit."""

    def __init__(self, callback: ProgressCallback | None, work: Sequence[float]) -> None:
        self.callback, self.work = callback, work
        self.name, self.number, self.done = "", 0, 0.0  # done: finished before the current source
        self.began = self.last = time.monotonic()

    def next(self, name: str) -> None:
        """Marks the previous source as finished and reports that the next one begins."""
        if self.number:
            self.done += self.work[self.number - 1]
        self.name, self.number = name, self.number + 1
        self._report(0.0)

    def within(self, share: float) -> None:
        """Reports the finished share of the current source if the last report is a second old.

        Raises:
            CallbackError: the callback raised an error, which is its cause.
        """
        if self.callback is not None and time.monotonic() - self.last >= _PAUSE:
            try:
                self._report(share)
            except Exception as error:
                raise CallbackError from error

    def _report(self, share: float) -> None:
        if self.callback is None:
            return
        self.last = time.monotonic()
        present = self.work[self.number - 1]
        done = self.done + share * present
        left = math.fsum(self.work[self.number :]) + (1 - share) * present
        seconds = (self.last - self.began) / done * left if done > 0 else math.nan
        self.callback(Progress(self.name, self.number, len(self.work), seconds, share))


def work_of(tensors: Iterable[Matrices | None]) -> list[float]:
    """The estimated work for each tensor: m n nu, with a limit on nu.

    The heads of a module (together) and adapters are not tensors. They count as the mean of the
    others.
    """
    work = [None if one is None else _work(one.shape) for one in tensors]
    known = [one for one in work if one is not None]
    mean = math.fsum(known) / len(known) if known else 1.0
    return [mean if one is None else one for one in work]


def _work(shape: Sequence[int]) -> float:
    """The matrices of a stack are its last two dimensions; a kernel counts as (out, rest)."""
    size = entries(shape)
    rows, columns = shape[-2:] if len(shape) == 3 else (shape[0], size // max(1, shape[0]))
    return float(size * min(rows, columns, _DECOMPOSED))
