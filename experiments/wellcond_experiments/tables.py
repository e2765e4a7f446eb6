"""Numbers with intervals, and tables for a terminal and for Markdown pages."""

from __future__ import annotations

import math
import sys
from typing import NamedTuple


class Band(NamedTuple):
    """A mean with its 95 % interval; the ends are nan if there is no interval.

    With `log`, a geometric mean. The text form is "0.5 ± 0.1", with `log` "58 [31, 110]".
    """

    mean: float
    low: float
    high: float
    log: bool = False

    def __str__(self) -> str:
        if math.isnan(self.low):
            return number(self.mean)
        if self.log:
            return f"{number(self.mean)} [{number(self.low)}, {number(self.high)}]"
        return f"{number(self.mean)} ± {number(self.high - self.mean)}"

    def scale(self, factor: float) -> Band:
        """Returns the band of the values times a factor, which can be negative."""
        low, high = sorted((factor * self.low, factor * self.high))
        return Band(factor * self.mean, low, high, self.log)

    def __neg__(self) -> Band:
        """Returns the band of the negated values."""
        return self.scale(-1.0)

    def signed(self, digits: int = 2) -> str:
        """Formats a difference, such as "+0.50 ± 0.10"."""
        return f"{self.mean:+.{digits}f} ± {self.high - self.mean:.{digits}f}"

    def fixed(self, digits: int = 2) -> str:
        """Formats with fixed decimals, such as "97.50 ± 0.10"; a `log` band as `str` does."""
        if self.log:
            return str(self)
        if math.isnan(self.low):
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.high - self.mean:.{digits}f}"


def interval(values: list[float], log: bool = False) -> Band:
    """Returns the mean and the 95 % interval (Student's t), with `log` of a geometric mean.

    Use `log` for condition numbers: the largest one dominates their arithmetic mean, and the
    interval of that mean can include negative numbers.
    """
    import numpy
    from scipy import stats

    array = numpy.asarray(values, dtype=float)
    if log:
        with numpy.errstate(divide="ignore", over="ignore", invalid="ignore"):
            band = interval(list(numpy.log(array)))
            mean, low, high = numpy.exp(band[:3])
        return Band(float(mean), float(low), float(high), log=True)
    mean = float(array.mean()) if len(array) else math.nan
    if len(array) < 2 or not math.isfinite(mean):
        return Band(mean, math.nan, math.nan)
    half = float(stats.t.ppf(0.975, len(array) - 1) * stats.sem(array))
    return Band(mean, mean - half, mean + half)


def number(value: float) -> str:
    """Formats a number with three significant digits."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.2e}" if value and (abs(value) >= 1e5 or abs(value) < 1e-3) else f"{value:.3g}"


class Table(NamedTuple):
    """A table: title, header and rows."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Returns the table in Markdown, without the title."""
        escaped = [
            [cell.replace("|", r"\|") for cell in line] for line in (self.header, *self.rows)
        ]
        lines = [escaped[0], ["---"] * len(self.header), *escaped[1:]]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

    def drop(self, name: str) -> Table:
        """Returns the table without the column of this name."""
        place = self.header.index(name)
        lines = [line[:place] + line[place + 1 :] for line in (self.header, *self.rows)]
        return Table(self.title, lines[0], lines[1:])

    def print(self) -> None:
        """Prints the table for a terminal on standard output."""
        from rich.console import Console
        from rich.table import Table as Drawn

        table = Drawn(title=self.title, title_justify="left", title_style="bold")
        for index, name in enumerate(self.header):
            table.add_column(name, justify="right" if index else "left", no_wrap=not index)
        for row in self.rows:
            table.add_row(*row)
        # A pipe or a file has no width; a narrow default would break the numbers.
        console = Console(width=None if sys.stdout.isatty() else 160, emoji=False)
        with console.capture() as text:  # rich ends the program if the pipe is closed
            console.print(table)
        print(text.get(), end="")
