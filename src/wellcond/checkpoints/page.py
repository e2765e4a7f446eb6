"""An audit as one HTML page that needs neither network nor script, dark or light as the reader's.

It is given text and numbers and knows nothing of weights.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape as escape_markup
from typing import NamedTuple

from wellcond.text import shown

# So many singular value curves are told apart.
CURVES = 6
_POINTS = 240  # of a curve
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 720, 340, 84, 60, 16


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        cells: the name, a column for each condition number, and the others.
        condition_numbers: for the bars.
        explanation: what is the matter with it, if anything.
        exceeds: whether it is marked, for each condition number that is above the limit.
    """

    cells: Sequence[str]
    condition_numbers: Sequence[float]
    explanation: str
    exceeds: Sequence[bool] = ()


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --faint: #67707b;
  --line: #d5dae0; --bar: #4f7fb8; --bad: #b3261e;
  --c0: #1f6fb4; --c1: #c05a00; --c2: #2e7d32; --c3: #8e3fa8; --c4: #b3261e; --c5: #6b5b00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #14171a; --faint: #9aa3ad;
  --line: #333a41; --bar: #6f9fd8; --bad: #ff8a80;
  --c0: #6db3f2; --c1: #ffab5e; --c2: #7fce83; --c3: #d59be8; --c4: #ff8a80; --c5: #d9c65c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 96rem; padding: 1.5rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p, summary { max-width: 60rem; margin: .25rem 0; overflow-wrap: anywhere; }
.faint, .ticks { color: var(--faint); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem .25rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; vertical-align: bottom; }
.text { text-align: left; }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 13rem; }
td.bar, th.bar { width: 16rem; min-width: 9rem; padding: .25rem 1.5rem .25rem .5rem; }
.track { position: relative; height: .8rem; }
.track + .track { margin-top: 2px; }
.limit { position: absolute; top: -3px; bottom: -3px; border-left: 2px solid var(--bad); }
.mark { color: var(--bad); }
.over { background: color-mix(in srgb, var(--bad) 9%, transparent); }
.fill { height: 100%; min-width: 2px; background: var(--bar); border-radius: 0 2px 2px 0; }
.fill.before { opacity: .45; }
.fill.infinite { background: repeating-linear-gradient(135deg, var(--bad) 0 4px,
  transparent 4px 8px); }
.ticks { position: relative; height: 1.3em; font-weight: 400; }
.ticks span { position: absolute; transform: translateX(-50%); }
.ticks span:first-child { transform: none; }
.note td { text-align: left; color: var(--bad); border-bottom: 1px solid var(--line);
  white-space: normal; overflow-wrap: anywhere; padding-top: 0; }
tr:has(+ .note) td { border-bottom: none; }
figure { margin: 0; max-width: 48rem; }
svg { width: 100%; height: auto; }
svg text { fill: var(--faint); font-size: 12px; }
svg .grid { stroke: var(--line); }
svg polyline { fill: none; stroke-width: 2; }
ul.facts { padding-left: 1.2rem; margin: .25rem 0; }
ul.facts li { max-width: 60rem; }
ul.key { list-style: none; padding: 0; margin: .25rem 0; }
ul.key svg { width: 2.5rem; height: .6rem; vertical-align: middle; margin-right: .5rem; }
dl { display: grid; grid-template-columns: minmax(0, max-content) minmax(0, 1fr);
  gap: .1rem 1rem; margin: .25rem 0; }
dt, dd, li { overflow-wrap: anywhere; max-width: 40rem; }
dd { margin: 0; color: var(--faint); }
@media (max-width: 48rem) { /* a phone: a weight is a block, its numbers with their names */
  body { padding: 1rem; }
  thead { display: none; }
  table, tbody { display: block; }
  tr { display: flex; flex-wrap: wrap; gap: 0 1rem; padding: .5rem 0;
    border-bottom: 1px solid var(--line); }
  tr:has(+ .note) { border-bottom: none; padding-bottom: 0; }
  .note { padding-top: 0; }
  .note td:first-child { font-weight: 400; }
  td, .note td { display: block; border: none; padding: 0; text-align: left; }
  td:first-child { flex: 0 0 100%; min-width: 0; font-weight: 600; }
  td:empty { display: none; }
  td[data-label]::before { content: attr(data-label) " "; color: var(--faint); }
  td.bar { flex: 0 0 100%; padding: .3rem 0; }
  dl { grid-template-columns: minmax(0, 1fr); }
  dd { margin: 0 0 .4rem 1rem; }
  svg text { font-size: 22px; }
}
"""
_MARK = "▲"
_MARKED = f'<span class="mark" title="above the limit">{_MARK}</span> '
_OVER = ' class="over"'
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 5", "1 5")


def render(
    title: str,
    summary: Sequence[str],
    headers: Sequence[str],
    rows: Sequence[Row],
    max_condition: float | None,
    skipped: Mapping[str, str],
    no_matrices: Mapping[str, str],
    unusual: Sequence[str],
    columns: Mapping[str, str],
    grades: Mapping[str, str],
    curves: Sequence[tuple[str, Sequence[float]]],
    versions: Mapping[str, str],
) -> str:
    """The page as text; cells without a header are left out."""
    sections = [
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(line)}</p>" for line in summary),
        _limit(rows, max_condition),
        _table(headers, rows, max_condition),
        _unusual(unusual) if unusual else "",
        _curves(curves) if curves else "",
        "<h2>What the columns say</h2>",
        "<p>Bars show κ on a logarithmic scale.</p>",
        _list(columns),
        "<h2>Grades</h2>" if grades else "",
        _list(grades) if grades else "",
        "<h2>Skipped</h2>" if skipped or no_matrices else "",
        _list(skipped) if skipped else "",
        _folded(no_matrices) if no_matrices else "",
        "<h2>Versions</h2>" + _list(versions),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _limit(rows: Sequence[Row], max_condition: float | None) -> str:
    if max_condition is None:
        return ""
    count = sum(any(row.exceeds) for row in rows)
    marked = f", marked {_MARK}" if count else ""
    line = "; the line across the bars is that limit" if math.isfinite(max_condition) else ""
    return f"<p>{count} of {len(rows)} exceed κ = {max_condition:g}{marked}{line}.</p>"


def _unusual(lines: Sequence[str]) -> str:
    named = (line.partition(": ") for line in lines)
    items = "".join(f"<li>{_name(name)}{colon}{escape(rest)}</li>" for name, colon, rest in named)
    return f'<h2>Out of the ordinary</h2>\n<ul class="facts">{items}</ul>'


def _folded(items: Mapping[str, str]) -> str:
    counts = Counter(items.values())
    summary = "; ".join(f"{count} {escape(why)}" for why, count in counts.items())
    return f"<details><summary>{summary}</summary>{_list(items)}</details>"


def escape(text: str) -> str:
    """As text that is neither markup nor anything else that a browser obeys."""
    return escape_markup(shown(text))


def _name(text: str) -> str:
    """A name that is broken, if it must be, after a dot and not within a word."""
    return re.sub(r"([.:/_])", r"\1<wbr>", escape(text))


def _list(items: Mapping[str, str]) -> str:
    lines = (f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in items.items())
    return f"<dl>{''.join(lines)}</dl>"


def _power(exponent: int) -> str:
    return str(10**exponent) if exponent < 2 else f"10<sup>{exponent}</sup>"


def _table(headers: Sequence[str], rows: Sequence[Row], max_condition: float | None) -> str:
    kappas = [kappa for row in rows for kappa in row.condition_numbers]
    finite = [kappa for kappa in (*kappas, max_condition or 1) if math.isfinite(kappa)]
    decades = max(1, math.ceil(math.log10(max(finite, default=10))))
    every = -(-decades // 3)
    ticks = "".join(
        f'<span style="left:{100 * exponent / decades:.4g}%">{_power(exponent)}</span>'
        for exponent in range(0, decades + 1, every)
    )
    bar_head = f'<th scope="col" class="bar">log scale<div class="ticks">{ticks}</div></th>'
    before_bar = len(rows[0].condition_numbers)
    head = "".join(
        f'<th scope="col"{_text(header)}>{escape(header)}</th>'
        + (bar_head if number == before_bar else "")
        for number, header in enumerate(headers)
    )
    limit = ""
    if max_condition is not None and math.isfinite(max_condition):
        share = math.log10(max_condition) / decades
        limit = f'<div class="limit" style="left:{100 * share:.4g}%"></div>'
    body = ""
    for row in rows:
        last = len(row.condition_numbers) - 1
        bars = "".join(
            _bar(kappa, decades, limit, before=number < last)
            for number, kappa in enumerate(row.condition_numbers)
        )
        cells = ""
        for number, (header, cell) in enumerate(zip(headers, row.cells, strict=False)):
            label = f' data-label="{escape(header)}"' if number else ""
            mark = _MARKED if number and any(row.exceeds[number - 1 : number]) else ""
            shown_cell = escape(cell) if number else _name(cell)
            cells += f"<td{_text(header)}{label}>{mark}{shown_cell}</td>"
            if number == before_bar:
                cells += f'<td class="bar">{bars}</td>'
        body += f"<tr{_OVER if any(row.exceeds) else ''}>{cells}</tr>\n"
        if row.explanation:
            span = len(headers) + 1
            note = f'<td colspan="{span}">{escape(row.explanation)}</td>'
            body += f'<tr class="note">{note}</tr>\n'
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>"
    )


def _text(header: str) -> str:
    return ' class="text"' if header in ("weight", "dtype", "grade") else ""


def _bar(kappa: float, decades: int, limit: str, before: bool) -> str:
    if math.isnan(kappa):
        return ""
    share = 1.0 if math.isinf(kappa) else math.log10(kappa) / decades
    kind = "fill" + " before" * before + " infinite" * math.isinf(kappa)
    label = f"κ = {kappa:.4g}"
    return (
        f'<div class="track" role="img" aria-label="{label}" title="{label}">'
        f'<div class="{kind}" style="width:{100 * share:.4g}%"></div>{limit}</div>'
    )


def _curves(curves: Sequence[tuple[str, Sequence[float]]]) -> str:
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
        key += f"<li>{sample}{_name(name)}</li>"
    drawing = "\n".join(parts)
    return (
        "<h2>Singular values of the worst weights</h2>\n<figure>"
        "<figcaption>σ_i/σ_1, i = 1 … ν, on a logarithmic axis.</figcaption>\n"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="singular value curves">\n'
        f'{drawing}\n</svg>\n<ul class="key">{key}</ul></figure>'
    )


def _log(value: float, largest: float) -> float:
    return math.log10(value / largest) if value > 0 and largest > 0 else -math.inf
