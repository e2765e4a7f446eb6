"""The comparison of two audits as a table, JSON, CSV and HTML."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from wellcond.report.base import (
    ROWS,
    SCHEMA,
    WAY_TO_ALL,
    Report,
    format_csv,
    format_remarks,
    list_exceeding,
)
from wellcond.report.findings import Finding
from wellcond.report.not_finite import NotFinite, describe_not_finite, to_list
from wellcond.report.page import Page
from wellcond.report.pairing import (
    QUANTITIES,
    SAME,
    USUAL,
    Change,
    Pair,
    by_label,
    pair_names,
)
from wellcond.report.report import AuditReport
from wellcond.report.rows import (
    PAIR_COLUMNS,
    PAIR_MEANINGS,
    Row,
    record_of_pair,
    row_of_pair,
    visible_columns,
)
from wellcond.text import escape, join_remarks, list_some, read_versions, save_text
from wellcond.weights.reasons import Reason, Skipped

_MEDIAN = 5  # fewer ratios have no meaningful median
_SQNR = 6.0  # dB, an error of half of the norm; 4 bits with one scale per row reach about 19


@dataclass(frozen=True)
class Comparison(Report):
    """The comparison of two audits, sorted by movement; see `Pair.movement`.

    Attributes:
        pairs: one `Pair` per weight: the label, the findings before and after (None on a side
            without the weight), and the change of the matrix. Weights on only one side come first;
            the others are sorted by `Pair.movement`.
        before: the source of the first audit.
        after: the source of the second audit.
        versions: the versions of wellcond, torch and Python.
        notes: the notes on weights, by label: different dtypes, the problem on a side, or why a
            side skipped the weight.
        naming: a sentence about the prefix that only the names of one side have; "" if there is
            none.
        not_finite_before: the tensors of the first audit with NaN or infinity, by name.
        not_finite_after: those of the second audit.
        names: the names of the two sides.
    """

    pairs: list[Pair]
    before: str
    after: str
    versions: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)
    naming: str = ""
    not_finite_before: dict[str, NotFinite] = field(default_factory=dict)
    not_finite_after: dict[str, NotFinite] = field(default_factory=dict)
    names: tuple[str, str] = ("before", "after")

    _COLUMNS, _MEANINGS = PAIR_COLUMNS, PAIR_MEANINGS

    def exceeding(self, max_condition: float) -> list[Finding]:
        """Returns the findings of the second audit above a limit; see `Finding.exceeds`."""
        later = (pair.after for pair in self.pairs)
        return [finding for finding in later if finding and finding.exceeds(max_condition)]

    def summary(self) -> list[str]:
        """Returns sentences on the largest movement, rises and falls of κ, and missing weights."""
        both = [
            (pair, pair.before, pair.after) for pair in self.pairs if pair.before and pair.after
        ]
        known = [pair for pair, _, _ in both if not math.isnan(pair.ratio)]
        rose = [pair for pair in known if pair.ratio > 1 + SAME]
        fell = [pair for pair in known if pair.ratio < 1 - SAME]
        counts = [
            f"rose in {len(rose)}{_most(rose)}",
            f"fell in {len(fell)}{_most(fell)}",
            f"moved by less than 1 % in {len(known) - len(rose) - len(fell)}",
        ]
        if len(known) < len(both):
            counts.append(f"is unknown on a side in {len(both) - len(known)}")
        line = f"In the {_count(len(both), 'weight')} on both sides, κ {', '.join(counts)}"
        if len(known) >= _MEDIAN:
            median = statistics.median(pair.ratio for pair in known)
            line += f"; the median ratio after/before is {median:.4g}"
        moved = next((pair for pair, _, _ in both if pair.moved), None)
        lines = [_describe_most(moved), line] if moved else [line]
        first, second = (
            name if name in ("before", "after") else f"in {escape(name)}" for name in self.names
        )
        for when, names in (
            (first, [pair.label for pair in self.pairs if pair.after is None]),
            (second, [pair.label for pair in self.pairs if pair.before is None]),
        ):
            if names:
                lines.append(f"{_count(len(names), 'weight')} only {when}: {list_some(names, 3)}")
        reshaped = [pair.label for pair, old, new in both if old.shape != new.shape]
        if reshaped:
            count = _count(len(reshaped), "weight")
            lines.append(
                f"{count} with different shapes, possibly unrelated: {list_some(reshaped, 3)}"
            )
        coarse = [
            f"{pair.label} ({pair.change.sqnr:.1f} dB)"
            for pair, _, _ in both
            if pair.change and pair.is_stored_differently and pair.change.sqnr < _SQNR
        ]
        if coarse:
            lines.append(
                f"In {_count(len(coarse), 'weight')}, rounding changed more than half of the norm: "
                f"{list_some(coarse, 3)}. If the two sides differ only in their storage, check the "
                "scales"
            )
        for when, found in ((first, self.not_finite_before), (second, self.not_finite_after)):
            lines += [f"{when[0].upper()}{when[1:]}, {describe_not_finite(found)}"] if found else []
        return [*lines, *([self.naming] if self.naming else [])]

    def table(self, *, top: int | None = None) -> str:
        """Returns the `top` weights that moved most, 1,000 by default, as text."""
        rows = self._rows(top=top or ROWS)
        text = self._text(rows)
        if more := len(self.pairs) - len(rows):
            text += f"... and {more} more with smaller movements{'' if top else WAY_TO_ALL}\n"
        text += format_remarks(rows)
        before, after = self._sides()
        return f"{text}before: {before}\nafter: {'. '.join([after, *self.summary()])}\n"

    def _sides(self) -> list[str]:
        """Returns the sources, each after its name unless the source already ends in the name."""
        sides = zip(self.names, (self.before, self.after), ("before", "after"), strict=True)
        return [
            escape(source if source.endswith(name) or name == when else f"{name}, {source}")
            for name, source, when in sides
        ]

    def to_dict(self, max_condition: float | None = None) -> dict[str, Any]:
        """Returns plain data; numbers can be inf or nan.

        With a limit, the data contain the limit and the weights above it.
        """
        return {
            "schema": SCHEMA,
            "before": self.before,
            "after": self.after,
            "names": list(self.names),
            **list_exceeding(((pair.label, pair.after) for pair in self.pairs), max_condition),
            "summary": self.summary(),
            "not_finite_before": to_list(self.not_finite_before),
            "not_finite_after": to_list(self.not_finite_after),
            "comparison": [
                {
                    "weight": pair.label,
                    "before": pair.before.to_dict() if pair.before else None,
                    "after": pair.after.to_dict() if pair.after else None,
                    "ratio": pair.ratio if pair.before and pair.after else None,
                    "moved": pair.moved,
                    "movement": pair.movement,
                    "change": pair.change.to_dict() if pair.change else None,
                    "note": self._note(pair),
                }
                for pair in self.pairs
            ],
            "versions": self.versions,
        }

    def _records(self) -> list[dict[str, Any]]:
        return [record_of_pair(pair, self._note(pair)) for pair in self.pairs]

    def __repr__(self) -> str:
        sides = " → ".join(self._sides())
        return f"<Comparison of {sides}: {_count(len(self.pairs), 'weight')}>"

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Returns one line of CSV per weight, and writes all to `path` if one is given.

        Cells are empty for a side without the weight.
        """
        columns = record_of_pair(Pair("", None, None), "")
        return save_text(format_csv(columns, self._records()), path)

    def _note(self, pair: Pair) -> str:
        return self.notes.get(pair.label, "")

    def _rows(self, max_condition: float | None = None, top: int | None = None) -> list[Row]:
        pairs = self.pairs[:top]
        return [row_of_pair(p, self._note(p), n, max_condition) for n, p in enumerate(pairs)]

    def _page(self, max_condition: float | None) -> Page:
        # Weights on only one side have no change, so they come last. The summary counts them.
        rows = zip(self.pairs, self._rows(max_condition), strict=True)
        ordered = sorted(rows, key=lambda item: None in item[0][1:3])
        before, after = self._sides()
        sources = [f"Before: {before}", f"After: {after}"]
        return Page(
            title="Condition numbers before and after",
            lead=[*sources, *self.summary()],
            columns=visible_columns(PAIR_COLUMNS, [row for _, row in ordered]),
            meanings=PAIR_MEANINGS,
            rows={row.label: row for _, row in ordered},
            max_condition=max_condition,
            versions=self.versions,
            is_comparison=True,
        )


def compare_reports(
    before: AuditReport, after: AuditReport, names: tuple[str, str] | None = None
) -> Comparison:
    """Returns the comparison of two audits by their numbers.

    Raises:
        ValueError: the audits share no name of a weight, or only one of them is of an exported
            graph.
    """
    check_exported(before.source, before.exported, after.source, after.exported)
    old, new = (by_label(report.findings) for report in (before, after))
    common = pair_names(old, new)
    if not common.paired:
        raise ValueError(
            f"Both sides must contain a weight of the same name, but {before.source} contains "
            f"{list_some(old, limit=3)}, and {after.source} contains {list_some(new, limit=3)}. "
            "Compare two states of one model, or rename the weights of one side."
        )
    pairs = [Pair(label, old[a], new[b]) for label, a, b in common.paired]
    found_old, found_new = ({name[side] for name in common.paired} for side in (1, 2))
    pairs += [Pair(label, one, None) for label, one in old.items() if label not in found_old]
    pairs += [Pair(label, None, one) for label, one in new.items() if label not in found_new]
    pairs.sort(key=lambda pair: (None in pair[1:3], pair.movement), reverse=True)
    skipped_before, skipped_after = map(_skipped_weights, (before, after))
    notes = {pair.label: _note_of(pair, skipped_before, skipped_after) for pair in pairs}
    notes = {label: note for label, note in notes.items() if note}
    naming = ""
    if common.prefix:
        naming = f'The prefix "{escape(common.prefix)}" of the names {common.side} is omitted'
    return Comparison(
        pairs,
        before.source,
        after.source,
        read_versions(),
        notes,
        naming,
        before.not_finite,
        after.not_finite,
        names or shorten_sources(before.source, after.source),
    )


def check_exported(before: str, old: bool, after: str, new: bool) -> None:
    """Raises ValueError if only one of two sources is an exported graph."""
    if old != new:
        export, other = (before, after) if old else (after, before)
        raise ValueError(
            f"{export} is an exported graph, and {other} is not. An exporter can change values, "
            "for example by multiplying a BatchNorm into a convolution. Compare two exports, or "
            "two checkpoints."
        )


def shorten_sources(before: str, after: str) -> tuple[str, str]:
    """Returns the shortest different ends of two paths; "before" and "after" if they are equal."""
    old, new = (PurePath(source).parts for source in (before, after))
    for count in range(1, max(len(old), len(new)) + 1):
        first, second = ("/".join(parts[-count:]) for parts in (old, new))
        if first != second:
            return first, second
    return "before", "after"


def with_changes(comparison: Comparison, measure: Callable[[Pair], Change | None]) -> Comparison:
    """Returns the comparison with the change that `measure` returns for each pair."""
    pairs = [pair._replace(change=measure(pair)) for pair in comparison.pairs]
    return replace(comparison, pairs=pairs)


def _skipped_weights(report: AuditReport) -> dict[str, Skipped]:
    """Returns why weights were skipped, with codes such as `q.qweight` also under `q.weight`."""
    skipped = report.coverage.skipped
    codes = {
        f"{name.rpartition('.')[0]}.weight": why
        for name, why in skipped.items()
        if why.reason is Reason.quantised
    }
    return codes | skipped


def _note_of(pair: Pair, before: Mapping[str, Skipped], after: Mapping[str, Skipped]) -> str:
    """Returns why one side skipped the weight, if it did, and the note of the pair."""
    why = None
    if pair.before and not pair.after:
        why = after.get(pair.before.name)
    elif pair.after and not pair.before:
        why = before.get(pair.after.name)
    skipped = f"skipped {'after' if pair.before else 'before'}: {why}" if why else ""
    return join_remarks(skipped, pair.note)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _most(pairs: Sequence[Pair]) -> str:
    if not pairs:
        return ""
    most = max(pairs, key=lambda pair: abs(math.log(pair.ratio)) if pair.ratio else math.inf)
    return f" (most in {escape(most.label)}, after/before {most.ratio:.4g})"


def _describe_most(pair: Pair) -> str:
    """Returns "Largest movement: a.weight, σ_max 0.67 → 13.3 (20 times)"."""
    key = pair.moved
    old, new = (getattr(side, key) for side in (pair.before, pair.after))
    text = f"Largest movement: {escape(pair.label)}, {QUANTITIES[key]} {old:.3g} → {new:.3g}"
    ratio = pair.quotient(lambda finding: getattr(finding, key))
    if 0 < ratio < math.inf:
        text += f" ({ratio:.3g} times)"
    # Rounding to another dtype is not a training.
    if pair.movement > USUAL or pair.is_stored_differently:
        return text
    return f"{text}, which is usual between two trainings"
