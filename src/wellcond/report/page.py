"""The parts of the pages: rows with bars, what exceeds a limit, facts, and curves.

They are given text and numbers and know nothing of weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from wellcond.report.markup import breakable, escape, linked

# So many singular value curves are told apart.
CURVES = 6
MARK = "▲"
_POINTS = 240  # of a curve
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 720, 340, 84, 60, 16
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 5", "1 5")
_MARKED = f'<span class="mark" title="above the limit">{MARK}</span> '
_OVER = ' class="over"'
# A remark that more rows share is made once, below them.
_SHARED = 4
_NAMED = 5


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        link: the id by which it is found.
        cells: the name, a column for each condition number, and the others.
        condition_numbers: for the bars.
        remark: what there is to say of it besides, if anything.
        wrong: whether that is bad news.
        exceeds: whether it is marked, for each condition number that is above the limit.
    """

    link: str
    cells: Sequence[str]
    condition_numbers: Sequence[float]
    remark: str = ""
    wrong: bool = False
    exceeds: Sequence[bool] = ()


class Group(NamedTuple):
    """Rows below each other, folded under a title if it has one."""

    title: str
    rows: Sequence[Row]


def limit(rows: Sequence[Row], max_condition: float | None) -> str:
    """How many rows exceed it, and which; nothing without a limit."""
    if max_condition is None:
        return ""
    above = [row for row in rows if any(row.exceeds)]
    text = f"<strong>{len(above)} of {len(rows)} exceed κ = {max_condition:g}</strong>"
    if above:
        names = ", ".join(linked(row.cells[0], row.link) for row in above[:_NAMED])
        more = len(above) - _NAMED
        text += f", marked {MARK}: {names}{f' and {more} more' if more > 0 else ''}"
    if math.isfinite(max_condition):
        text += "; the line across the bars is that limit"
    return f"<p>{text}.</p>"


def facts(lines: Sequence[str], links: Mapping[str, str]) -> str:
    """Lines of a name, a colon and what is to be said of it."""
    named = (line.partition(": ") for line in lines)
    items = "".join(
        f"<li>{linked(name, links.get(name, ''))}{colon}{escape(rest)}</li>"
        for name, colon, rest in named
    )
    return f'<ul class="facts">{items}</ul>' if items else ""


class _Axis(NamedTuple):
    """Of the bars: how many powers of ten they span, and where the limit is, as markup."""

    decades: int
    limit: str

    @property
    def head(self) -> str:
        ticks = "".join(
            f'<span style="left:{100 * exponent / self.decades:.4g}%">{_power(exponent)}</span>'
            for exponent in range(0, self.decades + 1, -(-self.decades // 3))
        )
        return f'<th scope="col" class="bar">log scale<div class="ticks">{ticks}</div></th>'

    def bar(self, kappa: float, before: bool) -> str:
        if math.isnan(kappa):
            return ""
        share = 1.0 if math.isinf(kappa) else math.log10(kappa) / self.decades
        kind = "fill" + " before" * before + " infinite" * math.isinf(kappa)
        label = f"κ = {kappa:.4g}"
        return (
            f'<div class="track" role="img" aria-label="{label}" title="{label}">'
            f'<div class="{kind}" style="width:{100 * share:.4g}%"></div>{self.limit}</div>'
        )


def table(headers: Sequence[str], groups: Sequence[Group], max_condition: float | None) -> str:
    """The rows of all groups, with bars on one scale; cells without a header are left out."""
    rows = [row for group in groups for row in group.rows]
    if not rows:
        return ""
    kappas = [kappa for row in rows for kappa in row.condition_numbers]
    finite = [kappa for kappa in (*kappas, max_condition or 1) if math.isfinite(kappa)]
    axis = _Axis(max(1, math.ceil(math.log10(max(finite, default=10)))), "")
    if max_condition is not None and math.isfinite(max_condition):
        share = math.log10(max_condition) / axis.decades
        axis = axis._replace(limit=f'<div class="limit" style="left:{100 * share:.4g}%"></div>')
    counts = Counter(row.remark for row in rows)
    shared = [remark for remark, count in counts.items() if remark and count > _SHARED]
    numbers = {remark: number for number, remark in enumerate(shared, 1)}
    bars_after = len(rows[0].condition_numbers)
    head = "".join(
        f'<th scope="col"{_text(header)}>{escape(header)}</th>'
        + (axis.head if number == bars_after else "")
        for number, header in enumerate(headers)
    )
    parts = []
    for group in groups:
        lines = "".join(_row(row, headers, axis, numbers) for row in group.rows)
        one = (
            f'<div class="scroll"><table class="rows"><thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{lines}</tbody></table></div>"
        )
        if group.title:
            one = f"<details><summary>{breakable(group.title)}</summary>{one}</details>"
        parts.append(one)
    parts += [f'<p id="n{n}" class="faint">[{n}] {escape(r)}</p>' for r, n in numbers.items()]
    return "\n".join(parts)


def _row(row: Row, headers: Sequence[str], axis: _Axis, numbers: Mapping[str, int]) -> str:
    last = len(row.condition_numbers) - 1
    bars = "".join(
        axis.bar(kappa, before=number < last) for number, kappa in enumerate(row.condition_numbers)
    )
    wrong = ' class="wrong"' if row.wrong else ""
    cells = ""
    for number, (header, cell) in enumerate(zip(headers, row.cells, strict=False)):
        if number:
            mark = _MARKED if any(row.exceeds[number - 1 : number]) else ""
            cells += f'<td{_text(header)} data-label="{escape(header)}">{mark}{escape(cell)}</td>'
        else:
            note = numbers.get(row.remark)
            sign = f' <a href="#n{note}"{wrong}>[{note}]</a>' if note else ""
            cells += f'<td id="{row.link}"{_text(header)}>{breakable(cell)}{sign}</td>'
        if number == last + 1:
            cells += f'<td class="bar">{bars}</td>'
    markup = f"<tr{_OVER if any(row.exceeds) else ''}>{cells}</tr>\n"
    if row.remark and row.remark not in numbers:
        remark = f'<td colspan="{len(headers) + 1}"{wrong}>{escape(row.remark)}</td>'
        markup += f'<tr class="note">{remark}</tr>\n'
    return markup


def _text(header: str) -> str:
    return ' class="text"' if header in ("weight", "dtype", "grade") else ""


def _power(exponent: int) -> str:
    return str(10**exponent) if exponent < 2 else f"10<sup>{exponent}</sup>"


def drawing(curves: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Singular values relative to the largest over their relative position, as a drawing."""
    floor = min((_log(v, c[0]) for _, c in curves for v in c if v > 0 and c[0] > 0), default=-1.0)
    floor = min(-1.0, max(floor, -17.0))  # below that they are zero to working precision
    right, bottom = _WIDTH - 12, _HEIGHT - _BOTTOM

    def x(share: float) -> float:
        return _LEFT + share * (right - _LEFT)

    def y(logarithm: float) -> float:
        return _TOP + max(logarithm, floor) / floor * (bottom - _TOP)

    parts = []
    lowest = math.floor(floor)
    for exponent in range(0, lowest - 1, -max(1, -lowest // 8)):
        if exponent >= floor:
            at = y(exponent)
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
                f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">1e{exponent}</text>'
            )
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(
            f'<text x="{x(share):.1f}" y="{bottom + 24}" text-anchor="middle">{share:g}</text>'
        )
    parts.append(
        f'<text x="{x(0.5):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">(i − 1)/(ν − 1)</text>'
    )
    key = ""
    for number, (name, values) in enumerate(curves):
        count = len(values)
        indices = sorted({round(k * (count - 1) / (_POINTS - 1)) for k in range(_POINTS)})
        points = " ".join(
            f"{x(i / (count - 1)):.1f},{y(_log(values[i], values[0])):.1f}" for i in indices
        )
        pen = f'style="stroke:var(--c{number})" stroke-dasharray="{_DASHES[number]}"'
        parts.append(f'<polyline points="{points}" {pen}/>')
        sample = f'<svg viewBox="0 0 40 8"><polyline points="0,4 40,4" {pen}/></svg>'
        key += f"<li>{sample}{breakable(name)}</li>"
    drawn = "\n".join(parts)
    return (
        "<figure><figcaption>σ_i/σ_1, i = 1 … ν, on a logarithmic axis.</figcaption>\n"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="singular value curves">\n'
        f'{drawn}\n</svg>\n<ul class="key">{key}</ul></figure>'
    )


def _log(value: float, largest: float) -> float:
    return math.log10(value / largest) if value > 0 and largest > 0 else -math.inf
