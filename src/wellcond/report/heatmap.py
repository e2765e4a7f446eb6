"""Heat maps as HTML tables: a number a cell, on one logarithmic scale for all of them.

They are given text and numbers and know nothing of weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from wellcond.report.markup import breakable, escape
from wellcond.report.style import STEPS

# Of more rows the names of the columns stand below them, too.
_LONG = 24
# A scale of changes reaches at least so far: what is less is near grey.
_LEAST = math.log10(1.1)
_TICKS = 8
_FEW_DECADES = 2
_AT_END = ' class="end"'


class Cell(NamedTuple):
    """A cell of a map.

    Attributes:
        value: its decimal logarithm gives the colour; 0, inf and nan have a look of their own.
        symbol: what stands in it; "" if nothing.
        title: what it says of itself.
        link: the id of the row that it leads to.
    """

    value: float
    symbol: str
    title: str
    link: str


class HeatMap(NamedTuple):
    """A map: what its rows and columns are called, and of which of them there is a cell."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Mapping[tuple[int, int], Cell]


class _Scale(NamedTuple):
    """From the least to the largest logarithm; `letter` is that of its colours."""

    letter: str
    low: float
    high: float

    def share(self, logarithm: float) -> float:
        """Where on the scale, from 0 to 1."""
        return (logarithm - self.low) / (self.high - self.low)

    def kind(self, value: float) -> str:
        """The class of a cell."""
        if math.isnan(value):
            return "unknown"
        if value in (0, math.inf):
            return "positive" if value else "negative"
        step = math.floor(self.share(math.log10(value)) * STEPS)
        return f"{self.letter}{min(max(step, 0), STEPS - 1)}"


def heat_maps(maps: Sequence[HeatMap], symbols: Mapping[str, str], change: bool = False) -> str:
    """The maps, with one scale above them and what the symbols mean.

    With `change` the values are ratios, and the middle of the scale is 1.
    """
    cells = [cell for one in maps for cell in one.cells.values()]
    logarithms = [math.log10(cell.value) for cell in cells if 0 < cell.value < math.inf]
    scale = _scale(logarithms, change)
    samples = {cell.symbol: scale.kind(cell.value) for cell in reversed(cells)}
    key = "".join(
        f'<li><i class="sample {samples[symbol]}">{escape(symbol)}</i>{escape(meaning)}</li>'
        for symbol, meaning in symbols.items()
        if symbol in samples
    )
    if any(len(one.cells) < len(one.rows) * len(one.columns) for one in maps):
        key += '<li><i class="sample none">&nbsp;</i>there is none</li>'
    return (
        (_legend(scale) if logarithms else "")
        + (f'<ul class="key">{key}</ul>' if key else "")
        + "\n".join(_table(one, scale) for one in maps)
    )


def _scale(logarithms: Sequence[float], change: bool) -> _Scale:
    if change:
        limit = max([_LEAST, *map(abs, logarithms)])
        return _Scale("d", -limit, limit)
    low, high = min(logarithms, default=0.0), max(logarithms, default=1.0)
    marks = _marks(low, high)
    low = max(mark for mark in marks if mark <= low)
    return _Scale("s", low, min(mark for mark in marks if mark >= high and mark > low))


def _marks(low: float, high: float) -> list[float]:
    """Powers of ten from below to above, and besides 2 and 5 times these where there are few."""
    decades = range(math.floor(low), math.ceil(high) + 2)
    parts = (1, 2, 5) if high - low < _FEW_DECADES else (1,)
    return [decade + math.log10(part) for decade in decades for part in parts]


def _legend(scale: _Scale) -> str:
    steps = "".join(f'<i class="{scale.letter}{step}"></i>' for step in range(STEPS))
    low, high = scale.low, scale.high
    if scale.letter == "d":
        marks = [low, low / 2, 0.0, high / 2, high]
    else:
        marks = [mark for mark in _marks(low, high) if low <= mark <= high]
        marks = marks[:: math.ceil(len(marks) / _TICKS)]
    ticks = "".join(
        f'<span{_AT_END if mark == high else ""} style="left:{100 * scale.share(mark):.4g}%">'
        f"{_number(10**mark)}</span>"
        for mark in marks
    )
    bar = f'<div class="steps">{steps}</div><div class="ticks">{ticks}</div>'
    return f'<div class="scale">{bar}</div>'


def _number(value: float) -> str:
    return f"{value:.2g}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")


def _table(one: HeatMap, scale: _Scale) -> str:
    heads = "".join(
        f'<th scope="col" title="{escape(name)}"><div class="kind">{escape(name)}</div></th>'
        for name in one.columns
    )
    body = ""
    for row, name in enumerate(one.rows):
        cells = "".join(
            _cell(one.cells.get((row, column)), scale) for column in range(len(one.columns))
        )
        body += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>\n'
    foot = f"<tfoot><tr><td></td>{heads}</tr></tfoot>" if len(one.rows) > _LONG else ""
    return (
        f"<h3>{breakable(one.title)}</h3>\n"
        f'<div class="scroll"><table class="heat"><thead><tr><td></td>{heads}</tr></thead>\n'
        f"<tbody>\n{body}</tbody>{foot}</table></div>"
    )


def _cell(cell: Cell | None, scale: _Scale) -> str:
    if cell is None:
        return "<td></td>"
    link = f'<a href="#{cell.link}" title="{escape(cell.title)}">{escape(cell.symbol)}</a>'
    return f'<td class="{scale.kind(cell.value)}">{link}</td>'
