"""The HTML page of an audit or a comparison.

`page.html.j2` contains the text and the markup, and `report.css` the style. This module computes
the positions of bars, the colors of maps, the points of curves, and which rows are folded.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

from wellcond.report.findings import Grade
from wellcond.report.layers import Stack, stacks
from wellcond.report.pairing import USUAL
from wellcond.report.rows import MARK, Column, Row
from wellcond.text import escape
from wellcond.weights.reasons import Skipped

if TYPE_CHECKING:
    from jinja2 import Environment

CURVES = 6  # more curves are hard to distinguish
_POINTS = 240  # per curve
_LOWEST = -17  # smaller singular values are zero to working precision
# Up to _FLAT rows are all open. If there are more, the first _OPEN are open, or all that exceed the
# limit up to _FLAT.
_FLAT, _OPEN = 100, 30
_READ = 10  # more skipped tensors are folded
_SHARED = 4  # a note on more rows is printed once, below the table
_STEPS = 11  # colors of a scale: s0 ... s10 of report.css
_LEAST = 2 * USUAL  # minimal end of a scale of movements, so that usual movements look small
_TICKS = 8
_FEW_DECADES = 2


@dataclass(frozen=True)
class Page:
    """The content of a page.

    Attributes:
        title: the title.
        lead: the paragraphs below the title.
        columns: the columns of the table, in the order of the page.
        meanings: the meanings of the columns, by their keys.
        rows: the rows by unique labels, in the order of the page.
        max_condition: the limit, if there is one.
        versions: the versions of wellcond, torch and Python.
        is_comparison: whether rows have two condition numbers and maps show movements.
        facts: pairs of the label of a flagged weight, or "", and a fact about it.
        curves: labels and singular values to draw.
        skipped: the tensors that were not measured, with the reasons.
    """

    title: str
    lead: Sequence[str]
    columns: Sequence[Column[Any]]
    meanings: Mapping[str, str]
    rows: Mapping[str, Row]
    max_condition: float | None
    versions: Mapping[str, str]
    is_comparison: bool = False
    facts: Sequence[tuple[str, str]] = ()
    curves: Sequence[tuple[str, Sequence[float]]] = ()
    skipped: Mapping[str, Skipped] = field(default_factory=dict)


def render(page: Page) -> str:
    """Returns the page as HTML without scripts and external files."""
    rows = [*page.rows.values()]
    repeated = stacks(page.rows)
    notes = Counter(row.note for row in rows if row.note)
    shared = [note for note, count in notes.items() if count > _SHARED]
    lost = {name: why for name, why in page.skipped.items() if not why.reason.no_matrix}
    no_matrices = {name: why for name, why in page.skipped.items() if why.reason.no_matrix}
    html = (
        environment()
        .get_template("page.html.j2")
        .render(
            page=page,
            above=[row for row in rows if row.exceeds],
            axis=_Axis.of(rows, page.max_condition),
            groups=_groups(page.rows, repeated),
            note_numbers={note: number for number, note in enumerate(shared, 1)},
            grades={} if page.is_comparison else {grade.name: grade.value for grade in Grade},
            lost=lost,
            lost_reasons=_count_reasons(lost) if len(lost) > _READ else (),
            no_matrices=no_matrices,
            no_matrix_reasons=_count_reasons(no_matrices),
            **_map_context(page, repeated),
            **_drawing(page.curves),
        )
    )
    return html.lstrip()  # macros leave empty lines before the first tag


@functools.cache
def environment() -> Environment:
    """Returns the environment of the templates; it imports Jinja2 on demand."""
    import jinja2
    from markupsafe import Markup
    from markupsafe import escape as escape_markup

    def breakable(name: str) -> Markup:
        """Allows line breaks in a name after . : / and _."""
        return Markup(re.sub(r"([.:/_])", r"\1<wbr>", str(escape_markup(escape(name)))))

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("wellcond.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        # Names come from untrusted files: escape markup and control characters.
        finalize=lambda value: value if isinstance(value, Markup) else escape(value),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"breakable": breakable, "short": "{:.4g}".format}
    made.tests |= {"nan": math.isnan, "infinite": math.isinf}
    style = resources.files("wellcond.report").joinpath("report.css").read_text("utf-8")
    made.globals |= {"style": Markup(style), "MARK": MARK, "USUAL": USUAL}
    return made


def _count_reasons(skipped: Mapping[str, Skipped]) -> list[tuple[Any, int]]:
    return Counter(why.reason for why in skipped.values()).most_common()


# --- the table ------------------------------------------------------------------------------------


class _Axis(NamedTuple):
    """The logarithmic scale of all bars, from 1 to a power of ten, and the limit, if any."""

    decades: int
    limit: float | None

    @classmethod
    def of(cls, rows: Sequence[Row], max_condition: float | None) -> _Axis:
        limit = max_condition if max_condition and math.isfinite(max_condition) else None
        kappas = [kappa for row in rows for kappa in row.condition_numbers.values()]
        largest = max(filter(math.isfinite, [*kappas, limit or 1.0]))
        return cls(max(1, math.ceil(math.log10(largest))), limit)

    @property
    def exponents(self) -> range:
        """The exponents of the powers of ten that label the scale."""
        return range(0, self.decades + 1, math.ceil(self.decades / 3))

    def share(self, kappa: float) -> float:
        """Returns the position of a condition number, in percent of the width."""
        return 100.0 if math.isinf(kappa) else 100 * math.log10(kappa) / self.decades


class _Group(NamedTuple):
    """Open rows, or rows folded under the name of their layer, "" without a repeated layer."""

    layer: str
    rows: list[Row]
    is_open: bool = False

    @property
    def above(self) -> int:
        """The number of rows that exceed the limit."""
        return sum(bool(row.exceeds) for row in self.rows)


def _groups(rows: Mapping[str, Row], repeated: Sequence[Stack]) -> list[_Group]:
    """Returns the first rows as one open group, and the others folded by layer."""
    if len(rows) <= _FLAT:
        return [_Group("", [*rows.values()], is_open=True)] if rows else []
    above = sum(bool(row.exceeds) for row in rows.values())
    count = max(_OPEN, min(above, _FLAT))
    layers = {
        label: layer
        for stack in repeated
        for (layer, _), labels in stack.weights.items()
        for label in labels
    }
    folded: dict[str, list[Row]] = {layer: [] for stack in repeated for layer in stack.layers}
    for label in list(rows)[count:]:
        folded.setdefault(layers.get(label, ""), []).append(rows[label])
    groups = [_Group(layer, some) for layer, some in folded.items() if some]
    return [_Group("", list(rows.values())[:count], is_open=True), *groups]


# --- maps -----------------------------------------------------------------------------------------


class _Scale(NamedTuple):
    """The color scale of all maps, from the first to the last of its marks.

    The scale is logarithmic for condition numbers, and linear for movements, which are logarithms.
    """

    marks: list[float]
    is_logarithmic: bool

    @classmethod
    def of(cls, values: Sequence[float], is_comparison: bool) -> _Scale:
        known = [value for value in values if math.isfinite(value)]
        if is_comparison:
            high = max([_LEAST, *known])
            steps = (part * 10**exponent for exponent in itertools.count() for part in (1, 2, 5))
            step = next(step for step in steps if step * (_TICKS - 1) >= high)
            return cls([float(step * k) for k in range(math.ceil(high / step) + 1)], False)
        logarithms = [math.log10(value) for value in known]
        low, high = min(logarithms, default=0.0), max(logarithms, default=1.0)
        marks = _marks(low, high)
        low = max(mark for mark in marks if mark <= low)
        high = min(mark for mark in marks if mark >= high and mark > low)
        return cls([mark for mark in marks if low <= mark <= high], True)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """The positions, in percent of the width, and the numbers below the scale."""
        shown = self.marks[:: math.ceil(len(self.marks) / _TICKS)]
        numbers = [10**mark if self.is_logarithmic else mark for mark in shown]
        return [(100 * self._share(m), _short(n)) for m, n in zip(shown, numbers, strict=True)]

    def color(self, value: float) -> str:
        """Returns the CSS class of a cell with this value."""
        if math.isnan(value):
            return "unknown"
        if math.isinf(value):
            return "positive" if value > 0 else "negative"
        mark = math.log10(value) if self.is_logarithmic else value
        step = math.floor(self._share(mark) * _STEPS)
        return f"s{min(max(step, 0), _STEPS - 1)}"

    def _share(self, mark: float) -> float:
        low, high = self.marks[0], self.marks[-1]
        return (mark - low) / (high - low)


def _marks(low: float, high: float) -> list[float]:
    """Returns the logarithms of the marks on a scale that covers `low` to `high`.

    Marks are powers of ten, and over few decades also 2 and 5 times these.
    """
    decades = range(math.floor(low), math.ceil(high) + 2)
    parts = (1, 2, 5) if high - low < _FEW_DECADES else (1,)
    return [decade + math.log10(part) for decade in decades for part in parts]


def _short(value: float) -> str:
    """Returns three significant digits, such as "2e-5", "0.5" or "1e4"."""
    return re.sub(r"e([+-])0?", lambda sign: "e" + sign[1].strip("+"), f"{value:.3g}")


class _Map(NamedTuple):
    """The map of a stack: kinds as columns, and for each layer its name and one cell per kind.

    A cell contains the row of the first weight in the order of the page, and the number of weights.
    """

    title: str
    kinds: list[str]
    lines: list[tuple[str, list[tuple[Row, int] | None]]]

    @classmethod
    def of(cls, stack: Stack, rows: Mapping[str, Row]) -> _Map:
        def cell(layer: str, kind: str) -> tuple[Row, int] | None:
            labels = stack.weights.get((layer, kind))
            return (rows[labels[0]], len(labels)) if labels else None

        # Titles omit the ending ".weight" of kinds and the name of the stack.
        short = [kind.replace(".weight", "") for kind in stack.kinds]
        start = stack.name.index("*")
        return cls(
            stack.name,
            short if all(short) and len(set(short)) == len(short) else stack.kinds,
            [
                (layer[start:], [cell(layer, kind) for kind in stack.kinds])
                for layer in stack.layers
            ],
        )


def _map_context(page: Page, repeated: Sequence[Stack]) -> dict[str, Any]:
    """Returns the maps of all stacks, and the values for their legend."""
    maps = [_Map.of(stack, page.rows) for stack in repeated]
    places = [cell for one in maps for _, line in one.lines for cell in line]
    cells = [cell for cell in places if cell]
    scale = _Scale.of([row.value for row, _ in cells], page.is_comparison)
    return {
        "maps": maps,
        "scale": scale,
        "samples": {row.symbol: scale.color(row.value) for row, _ in reversed(cells)},
        "has_colors": any(math.isfinite(row.value) for row, _ in cells),
        "has_several": any(count > 1 for _, count in cells),
        "has_gaps": None in places,
        "outside": len(page.rows) - sum(count for _, count in cells),
    }


# --- curves ---------------------------------------------------------------------------------------


def _drawing(curves: Sequence[tuple[str, Sequence[float]]]) -> dict[str, Any]:
    """Returns the curves as points (x, y) from 0 to 1, and the levels of the grid.

    x is the position, and y = 0 the largest singular value. A level is an exponent of ten, relative
    to the largest singular value, and its y.
    """
    logarithms = [
        [math.log10(value) - math.log10(values[0]) if value > 0 else -math.inf for value in values]
        for _, values in curves
    ]
    finite = [value for values in logarithms for value in values if math.isfinite(value)]
    floor = min(-1.0, max(_LOWEST, min(finite, default=-1.0)))

    def points(values: Sequence[float]) -> str:
        last = len(values) - 1
        indices = sorted({round(k * last / (_POINTS - 1)) for k in range(_POINTS)})
        return " ".join(f"{i / last:.4g},{max(values[i], floor) / floor:.4g}" for i in indices)

    lowest = math.floor(-floor)
    return {
        "curves": [(label, points(v)) for (label, _), v in zip(curves, logarithms, strict=True)],
        "levels": [(-k, k / -floor) for k in range(0, lowest + 1, max(1, lowest // 8))],
    }
