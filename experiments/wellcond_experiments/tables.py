"""Numbers with their intervals, and tables for a terminal and for a page."""

from __future__ import annotations

import math
import sys
from typing import NamedTuple


class Band(NamedTuple):
    """A mean with its 95 % interval, nan where there is none; of a geometric mean if log.

    As text: "0.5 ± 0.1", and where factors count "58 [31, 110]".
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
        """Of the numbers times a factor, which may be negative."""
        low, high = sorted((factor * self.low, factor * self.high))
        return Band(factor * self.mean, low, high, self.log)

    def __neg__(self) -> Band:
        """Of the negative numbers."""
        return self.scale(-1.0)

    def signed(self, digits: int = 2) -> str:
        """Of a difference, as "+0.50 ± 0.10"."""
        return f"{self.mean:+.{digits}f} ± {self.high - self.mean:.{digits}f}"

    def fixed(self, digits: int = 2) -> str:
        """As "97.50 ± 0.10": with so many digits after the point; of factors as they are."""
        if self.log:
            return str(self)
        if math.isnan(self.low):
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.high - self.mean:.{digits}f}"


def interval(values: list[float], log: bool = False) -> Band:
    """Mean and 95 % interval (Student's t); of the logarithms if log, so of a geometric mean.

    A mean of condition numbers is that of the worst one, and its interval reaches below zero.
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
    """Three significant digits, for a table."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.2e}" if value and (abs(value) >= 1e5 or abs(value) < 1e-3) else f"{value:.3g}"


class Table(NamedTuple):
    """Title, header and rows."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """For a page, without the title."""
        escaped = [
            [cell.replace("|", r"\|") for cell in line] for line in (self.header, *self.rows)
        ]
        lines = [escaped[0], ["---"] * len(self.header), *escaped[1:]]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

    def drop(self, name: str) -> Table:
        """Without the column of this name."""
        place = self.header.index(name)
        lines = [line[:place] + line[place + 1 :] for line in (self.header, *self.rows)]
        return Table(self.title, lines[0], lines[1:])

    def print(self) -> None:
        """For a terminal, on standard output."""
        from rich.console import Console
        from rich.table import Table as Drawn

        table = Drawn(title=self.title, title_justify="left", title_style="bold")
        for index, name in enumerate(self.header):
            table.add_column(name, justify="right" if index else "left", no_wrap=not index)
        for row in self.rows:
            table.add_row(*row)
        # A pipe or a file has no width; a narrow default would break the numbers.
        console = Console(width=None if sys.stdout.isatty() else 160, emoji=False)
        with console.capture() as text:  # because rich ends the program if nobody reads on
            console.print(table)
        print(text.get(), end="")
