"""An audit and a comparison as pages: what stands first, what is folded, what is in a map."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from wellcond.report.columns import COMPARED, cells_of, cells_of_pair, headers_of
from wellcond.report.findings import Finding, Grade, Status
from wellcond.report.heatmap import Cell, HeatMap, heat_maps
from wellcond.report.layers import Stack, stacks
from wellcond.report.markup import document, folded, listed, paragraphs, section
from wellcond.report.not_finite import NotFinite, describe_not_finite
from wellcond.report.page import CURVES, MARK, Group, Row, drawing, facts, limit, table
from wellcond.report.pairing import Pair, by_label
from wellcond.weights.reasons import Skipped

if TYPE_CHECKING:
    from wellcond.report.report import AuditReport, Comparison

# So many rows are looked through; of more, so many of the worst are open, or all above the limit.
_FLAT, _OPEN = 100, 30
_READ = 10  # so many reasons why something is skipped are read; more are folded
_SYMBOLS = {
    "∞": "infinite",
    "≥": "a lower bound of κ",
    "?": "no κ: it is zero, or could not be measured",
}
_SYMBOLS_OF_CHANGE = {
    "∞": "became infinite",
    "↓": "is infinite no more",
    "+": "only after",
    "−": "only before",
    "?": "not known: a side has no κ, or but a lower bound",
}


def audit_page(report: AuditReport, max_condition: float | None) -> str:
    """The findings of an audit as a page."""
    findings = by_label(report.findings)
    repeated = stacks(findings)
    headers = _kappa_first(headers_of(report.findings))
    cells = {label: cells_of(finding) for label, finding in findings.items()}

    def above(finding: Finding) -> bool:
        return max_condition is not None and finding.exceeds(max_condition)

    rows = {
        label: Row(
            f"w{number}",
            [cells[label][header] for header in headers],
            (finding.condition_number,),
            finding.explanation,
            finding.status is not Status.ok,
            [above(finding)],
        )
        for number, (label, finding) in enumerate(findings.items())
    }

    def cell(label: str) -> tuple[float, str, str]:
        finding = findings[label]
        kappa = finding.condition_number
        text = rows[label].cells[1]
        symbol = MARK if above(finding) else "≥" * (finding.grade is Grade.bounded)
        if not math.isfinite(kappa):
            symbol = "?" if math.isnan(kappa) else "∞"
        return kappa, symbol, f"κ = {text}" if not math.isnan(kappa) else finding.explanation

    curves = [(f.label, f.singular_values) for f in report.findings if f.sigma_max > 0]
    curves = [curve for curve in curves if len(curve[1]) > 1][:CURVES]
    columns = {name: words for name, words in report.columns().items() if name != "grade"}
    opened = sum(any(row.exceeds) for row in rows.values())
    words = "κ of each weight by layer and kind."
    return document(
        f"Condition numbers of {report.source}",
        [
            paragraphs([f"{report.coverage}.", *_not_finite(report.not_finite)]),
            limit([*rows.values()], max_condition),
            section("Out of the ordinary", facts(report.unusual(), _links(rows))),
            _map_section(words, repeated, rows, cell, _SYMBOLS, max_condition, False),
            section(
                "Weights, the worst first",
                _folding(rows),
                table(headers, _groups(rows, repeated, opened, "κ up to {}", 1), max_condition),
            ),
            section("Singular values of the worst weights", drawing(curves) if curves else ""),
            section(
                "What the columns say",
                paragraphs(["Bars show κ on a logarithmic scale."]),
                listed(columns),
            ),
            section("Grades", listed({grade.name: grade.value for grade in Grade})),
            section("Skipped", *_skipped(report.coverage.skipped)),
            section("Versions", listed(report.versions)),
        ],
    )


def comparison_page(comparison: Comparison, max_condition: float | None) -> str:
    """Two audits side by side as a page."""
    # What is on one side alone has no change: it comes last, and is counted above.
    ordered = sorted(comparison.pairs, key=lambda pair: not (pair.before and pair.after))
    pairs = {pair.label: pair for pair in ordered}
    repeated = stacks(pairs)

    def above(side: Finding | None) -> bool:
        return side is not None and max_condition is not None and side.exceeds(max_condition)

    rows = {
        label: Row(
            f"w{number}",
            cells_of_pair(pair),
            [side.condition_number if side else math.nan for side in pair[1:]],
            comparison.notes.get(label, ""),
            any(side and side.status is not Status.ok for side in pair[1:]),
            [above(side) for side in pair[1:]],
        )
        for number, (label, pair) in enumerate(pairs.items())
    }

    def cell(label: str) -> tuple[float, str, str]:
        pair, cells = pairs[label], rows[label].cells
        return pair.ratio, _symbol(pair, above), f"κ {cells[1]} → {cells[2]}, {cells[3]} times"

    opened = sum(any(row.exceeds) for row in rows.values())
    words = "κ after over κ before, by layer and kind."
    return document(
        "Condition numbers before and after",
        [
            paragraphs(
                [
                    f"Before, the paler bar: {comparison.before}",
                    f"After: {comparison.after}",
                    *comparison.summary(),
                ]
            ),
            limit([*rows.values()], max_condition),
            _map_section(words, repeated, rows, cell, _SYMBOLS_OF_CHANGE, max_condition, True),
            section(
                "Weights, the largest change first",
                _folding(rows),
                table(COMPARED, _groups(rows, repeated, opened, "{} times", 3), max_condition),
            ),
            section(
                "What the columns say",
                paragraphs(["Bars show κ on a logarithmic scale."]),
                listed(comparison.columns()),
            ),
            section("Versions", listed(comparison.versions)),
        ],
    )


def _not_finite(found: Mapping[str, NotFinite]) -> list[str]:
    return [f"{describe_not_finite(found)}."] if found else []


def _skipped(skipped: Mapping[str, Skipped]) -> list[str]:
    """What the report lacks, folded if it is much, and what is no matrix, always folded."""
    lost = {name: why for name, why in skipped.items() if not why.reason.no_matrix}
    none = {name: why for name, why in skipped.items() if why.reason.no_matrix}
    lists = [listed({name: str(why) for name, why in some.items()}) for some in (lost, none)]
    reasons = [Counter(why.reason for why in some.values()).most_common() for some in (lost, none)]
    parts = []
    if lost:
        counted = "; ".join(f"{count} {reason.value}" for reason, count in reasons[0])
        parts.append(lists[0] if len(lost) <= _READ else folded(counted, lists[0]))
    if none:
        counted = ", ".join(f"{count} ({reason.name})" for reason, count in reasons[1])
        parts.append(folded(f"No matrices: {counted}", lists[1]))
    return parts


def _symbol(pair: Pair, above: Callable[[Finding | None], bool]) -> str:
    if not (pair.before and pair.after):
        return "−" if pair.before else "+"
    if math.isnan(pair.ratio):
        return "?"
    if pair.ratio in (0, math.inf):
        return "∞" if pair.ratio else "↓"
    return MARK if above(pair.after) else ""


def _kappa_first(headers: Sequence[str]) -> tuple[str, ...]:
    """As the page has them: a phone shows the first columns first."""
    at = headers.index("κ")
    return (headers[0], *headers[at : at + 2], *headers[1:at], *headers[at + 2 :])


def _links(rows: Mapping[str, Row]) -> dict[str, str]:
    return {label: row.link for label, row in rows.items()}


def _map_section(
    words: str,
    repeated: Sequence[Stack],
    rows: Mapping[str, Row],
    cell: Callable[[str], tuple[float, str, str]],
    symbols: Mapping[str, str],
    max_condition: float | None,
    change: bool,
) -> str:
    """A map of each stack: of a layer and a kind the first weight, which is the worst."""
    if not repeated:
        return ""
    maps = []
    several = False
    for stack in repeated:
        cells = {}
        for (layer, kind), labels in stack.weights.items():
            worst = labels[0]
            value, symbol, text = cell(worst)
            title = f"{worst}: {text}"
            if len(labels) > 1:
                several = True
                title += f", of {len(labels)}"
            where = stack.layers.index(layer), stack.kinds.index(kind)
            cells[where] = Cell(value, symbol, title, rows[worst].link)
        maps.append(HeatMap(stack.name, _layer_names(stack), _kind_names(stack), cells))
    if several:
        most = "changed most" if change else "is the worst"
        words += f" Of several, where * stands for a number, the one that {most}."
    outside = len(rows) - sum(map(len, itertools.chain(*(s.weights.values() for s in repeated))))
    if outside:
        weights = "1 weight is" if outside == 1 else f"{outside} weights are"
        words += f" {weights} in no layer that repeats, and in the table alone."
    if max_condition is not None:
        symbols = {MARK: f"above κ = {max_condition:g}{' after' * change}"} | dict(symbols)
    return section("Layers", paragraphs([words]), heat_maps(maps, symbols, change))


def _layer_names(stack: Stack) -> list[str]:
    """What comes after the name of the stack: 7, 2.blocks.5."""
    start = stack.name.index("*")
    return [layer[start:] for layer in stack.layers]


def _kind_names(stack: Stack) -> list[str]:
    """Without what nearly all end in."""
    short = [kind.replace(".weight", "") for kind in stack.kinds]
    return short if all(short) and len(set(short)) == len(short) else stack.kinds


def _folding(rows: Mapping[str, Row]) -> str:
    if len(rows) <= _FLAT:
        return ""
    return paragraphs([f"The first are open, all others of these {len(rows)} folded by layer."])


def _groups(
    rows: Mapping[str, Row], repeated: Sequence[Stack], above: int, extent: str, column: int
) -> list[Group]:
    """The first rows, and folded the others, by layer where layers repeat."""
    if len(rows) <= _FLAT:
        return [Group("", [*rows.values()])]
    first = max(_OPEN, min(above, _FLAT))
    layers = {
        label: layer
        for stack in repeated
        for (layer, _), labels in stack.weights.items()
        for label in labels
    }
    others: dict[str, list[Row]] = {layer: [] for stack in repeated for layer in stack.layers}
    for label, row in itertools.islice(rows.items(), first, None):
        others.setdefault(layers.get(label, ""), []).append(row)
    groups = [Group("", [*itertools.islice(rows.values(), first)])]
    for layer, some in others.items():
        if some:
            title = f"{layer or 'No layer that repeats'}: {len(some)} more"
            if some[0].cells[column] not in ("-", "nan"):
                title += f", {extent.format(some[0].cells[column])}"
            if marked := sum(any(row.exceeds) for row in some):
                title += f", {marked} {MARK}"
            groups.append(Group(title, some))
    return groups
