"""Reports: the findings of an audit, and two audits side by side, as table, JSON, CSV and page."""

from __future__ import annotations

import abc
import csv
import io
import math
import os
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from wellcond.report.findings import Coverage, Finding
from wellcond.report.not_finite import NotFinite, describe_not_finite, to_list
from wellcond.report.page import CURVES, Page, render
from wellcond.report.pairing import Pair, by_label, pair_names
from wellcond.report.rows import (
    COLUMNS,
    MEANINGS,
    PAIR_COLUMNS,
    PAIR_MEANINGS,
    Column,
    Row,
    record_of_finding,
    record_of_pair,
    row_of_finding,
    row_of_pair,
    visible_columns,
)
from wellcond.report.unusual import facts_of
from wellcond.text import (
    dump_json,
    escape,
    format_table,
    join_remarks,
    list_some,
    read_versions,
    save_text,
)
from wellcond.weights.reasons import Reason, Skipped

SCHEMA = 1
# Printing more rows is slow (1 ms per row) and unreadable.
_ROWS = 1000
_WAY_TO_ALL = "; all are in what --csv FILE writes"
# A line is worth what fewer than 1 in 100 reports of random matrices would have.
_CHANCE = 0.01
_LINES = 5
# A smaller change counts as none: it is far above the error of a measured kappa.
_SAME = 0.01


class _Report(abc.ABC):
    """What an audit and a comparison have in common: how they are printed and written."""

    _COLUMNS: ClassVar[Sequence[Column[Any]]]
    _MEANINGS: ClassVar[Mapping[str, str]]

    @abc.abstractmethod
    def to_dict(self, max_condition: float | None = None) -> dict[str, Any]:
        """Plain data; numbers may be inf and nan."""

    @abc.abstractmethod
    def table(self, *, top: int | None = None) -> str:
        """The rows as text, at most `top` of them, or 1,000, and a summary."""

    @abc.abstractmethod
    def _rows(self, max_condition: float | None = None, top: int | None = None) -> list[Row]:
        """The first `top` rows, or all, in the order of the table."""

    @abc.abstractmethod
    def _page(self, max_condition: float | None) -> Page:
        """The content of the page."""

    def columns(self) -> dict[str, str]:
        """What each column of the table means, in words, with an example."""
        columns = visible_columns(self._COLUMNS, self._rows())
        return {one.header: self._MEANINGS[one.key] for one in columns if one.key in self._MEANINGS}

    def legend(self) -> str:
        """`columns` as text, to be printed below the table."""
        meanings = self.columns()
        width = max(map(len, meanings)) + 2
        lines = (
            textwrap.fill(f"{name:<{width}}{meaning}", 100, subsequent_indent=" " * width)
            for name, meaning in meanings.items()
        )
        return "".join(f"{line}\n" for line in lines)

    def _text(self, rows: Sequence[Row]) -> str:
        columns = visible_columns(self._COLUMNS, rows)
        cells = ([row.cells[column.key] for column in columns] for row in rows)
        return format_table([column.header for column in columns], cells)

    def to_json(
        self, path: str | os.PathLike[str] | None = None, *, max_condition: float | None = None
    ) -> str:
        """`to_dict` as strict JSON, inf and nan as the strings "inf" and "nan"; written to path."""
        return save_text(dump_json(self.to_dict(max_condition)), path)

    def to_html(
        self, path: str | os.PathLike[str] | None = None, *, max_condition: float | None = None
    ) -> str:
        """One page that needs neither network nor script. It marks what exceeds a limit.

        The page of a comparison has two bars per weight, and its map shows after/before.
        """
        return save_text(render(self._page(max_condition)), path)

    def __str__(self) -> str:
        return self.table()


@dataclass(frozen=True)
class AuditReport(_Report):
    """The findings of an audit, worst first, with what they cover.

    Attributes:
        findings: one per matrix, by descending condition number; unknown ones before all others.
        coverage: what was measured, what not and why.
        source: the path or the class of the model.
        versions: of wellcond, torch and Python.
        not_finite: every tensor with NaN or infinity by its name, whether it is a matrix, a bias,
            an embedding or a buffer, and how many of its entries are not finite. Of tensors that
            are not measured, -inf in a mask, or in a buffer of a model that is no running
            statistic, and the infinite ends of a range (`min_val`, `max_val`) are left out.
    """

    findings: list[Finding]
    coverage: Coverage
    source: str
    versions: dict[str, str]
    not_finite: dict[str, NotFinite] = field(default_factory=dict)

    _COLUMNS, _MEANINGS = COLUMNS, MEANINGS

    def exceeding(self, max_condition: float) -> list[Finding]:
        """The findings above a limit of the condition number; see `Finding.exceeds`."""
        return [finding for finding in self.findings if finding.exceeds(max_condition)]

    def table(self, *, top: int | None = None) -> str:
        """The findings as text, the worst `top` of them or 1,000, with what they cover."""
        rows = self._rows(top=top or _ROWS)
        # If not even the shape is known, the note says all there is.
        known = [row for row, f in zip(rows, self.findings, strict=False) if f.shape != (0, 0)]
        text = self._text(known)
        if more := len(self.findings) - len(rows):
            text += f"... and {more} more with a smaller κ{'' if top else _WAY_TO_ALL}\n"
        text += _remarks(rows)
        text += "".join(f"{escape(line)}\n" for line in self.unusual())
        text += f"{describe_not_finite(self.not_finite)}\n" if self.not_finite else ""
        return f"{text}{self.coverage}\n"

    def unusual(self) -> list[str]:
        """A line for each weight that is out of the ordinary, the rarest first; after five a count.

        That is a kappa so rare among random matrices of the shape that, were all weights random,
        fewer than 1 in 100 reports would name one; and entries that float16 or the dtype holds
        badly. These are facts about numbers: they promise nothing about accuracy.
        """
        return [f"{label}: {facts}" if label else facts for label, facts in self._facts()]

    def _facts(self) -> list[tuple[str, str]]:
        """The labels of the lines of `unusual`, "" for the count, and what they say."""
        shares = [finding.exceedance for finding in self.findings]
        rare = _CHANCE / max(1, sum(not math.isnan(share) for share in shares))
        lines = [
            (share if share < rare else 1.0, finding.label, "; ".join(facts))
            for finding, share in zip(self.findings, shares, strict=True)
            if (facts := facts_of(finding, share < rare))
        ]
        lines.sort(key=lambda line: line[0])
        named = [(label, facts) for _, label, facts in lines[:_LINES]]
        if more := len(lines) - len(named):
            named.append(
                ("", f"and {more} more {'is' if more == 1 else 'are'} out of the ordinary")
            )
        return named

    def to_dict(self, max_condition: float | None = None) -> dict[str, Any]:
        """Plain data in the documented schema; numbers may be inf and nan.

        With a limit also that, and the weights above it.
        """
        return {
            "schema": SCHEMA,
            "source": self.source,
            **_exceeding(((finding.label, finding) for finding in self.findings), max_condition),
            "findings": [finding.to_dict() for finding in self.findings],
            "coverage": {
                "measured": self.coverage.measured,
                "failed": self.coverage.failed,
                "skipped": [
                    {"name": name, "reason": str(why)}
                    for name, why in self.coverage.skipped.items()
                ],
                "parameter_share": self.coverage.parameter_share,
                "largest_left_out": [
                    {"name": name, "entries": size} for name, size in self.coverage.largest_left_out
                ],
                "note": self.coverage.note,
            },
            "not_finite": to_list(self.not_finite),
            "versions": self.versions,
        }

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """One line per finding, columns as in the JSON; written to path."""
        columns = record_of_finding(Finding("", "", (0, 0), ""))
        return save_text(_csv(columns, map(record_of_finding, self.findings)), path)

    def _rows(self, max_condition: float | None = None, top: int | None = None) -> list[Row]:
        findings = self.findings[:top]
        return [row_of_finding(finding, n, max_condition) for n, finding in enumerate(findings)]

    def _page(self, max_condition: float | None) -> Page:
        rows = dict(zip(by_label(self.findings), self._rows(max_condition), strict=True))
        curves = [
            (finding.label, finding.singular_values)
            for finding in self.findings
            if len(finding.singular_values) > 1 and finding.singular_values[0] > 0
        ]
        not_finite = describe_not_finite(self.not_finite)
        return Page(
            title=f"Condition numbers of {self.source}",
            lead=[f"{line}." for line in (str(self.coverage), not_finite) if line],
            columns=sorted(visible_columns(COLUMNS, rows.values()), key=lambda c: not c.leads),
            meanings=MEANINGS,
            rows=rows,
            max_condition=max_condition,
            versions=self.versions,
            facts=self._facts(),
            curves=curves[:CURVES],
            skipped=self.coverage.skipped,
        )


@dataclass(frozen=True)
class Comparison(_Report):
    """Two audits side by side, in the order of the largest change of kappa.

    Attributes:
        pairs: label, finding before and finding after; None on the side that lacks the weight.
            Weights that only one side has come first.
        before: the source of the first audit.
        after: the source of the second audit.
        versions: of wellcond, torch and Python.
        notes: what else there is to know of a weight, by its label: another dtype, what is the
            matter on a side, why a side skipped it.
        naming: the prefix that only the names of one side have, in words; "" if there is none.
        not_finite_before: the tensors with NaN or infinity of the first audit, by their names.
        not_finite_after: the same of the second audit.
    """

    pairs: list[Pair]
    before: str
    after: str
    versions: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)
    naming: str = ""
    not_finite_before: dict[str, NotFinite] = field(default_factory=dict)
    not_finite_after: dict[str, NotFinite] = field(default_factory=dict)

    _COLUMNS, _MEANINGS = PAIR_COLUMNS, PAIR_MEANINGS

    def exceeding(self, max_condition: float) -> list[Finding]:
        """The findings of the second audit above a limit; see `Finding.exceeds`."""
        return [new for _, _, new in self.pairs if new and new.exceeds(max_condition)]

    def summary(self) -> list[str]:
        """In how many weights kappa rose and fell, and what is on one side only, in words."""
        both = [
            (pair, pair.before, pair.after) for pair in self.pairs if pair.before and pair.after
        ]
        known = [pair for pair, _, _ in both if not math.isnan(pair.ratio)]
        rose = [pair for pair in known if pair.ratio > 1 + _SAME]
        fell = [pair for pair in known if pair.ratio < 1 - _SAME]
        counts = [
            f"rose in {len(rose)}{_most(rose)}",
            f"fell in {len(fell)}{_most(fell)}",
            f"moved by less than 1 % in {len(known) - len(rose) - len(fell)}",
        ]
        if len(known) < len(both):
            counts.append(f"is not known on both sides in {len(both) - len(known)}")
        lines = [f"In the {_count(len(both), 'weight')} of both, κ {', '.join(counts)}"]
        if known:
            median = statistics.median(pair.ratio for pair in known)
            lines[0] += f"; the median of after/before is {median:.4g}"
        for when, names in (
            ("before", [pair.label for pair in self.pairs if pair.after is None]),
            ("after", [pair.label for pair in self.pairs if pair.before is None]),
        ):
            if names:
                lines.append(f"{_count(len(names), 'weight')} only {when}: {list_some(names, 3)}")
        reshaped = [pair.label for pair, old, new in both if old.shape != new.shape]
        if reshaped:
            count = _count(len(reshaped), "weight")
            lines.append(
                f"{count} of another shape, and so perhaps another: {list_some(reshaped, 3)}"
            )
        for when, found in (("Before", self.not_finite_before), ("After", self.not_finite_after)):
            lines += [f"{when}, {describe_not_finite(found)}"] if found else []
        return [*lines, *([self.naming] if self.naming else [])]

    def table(self, *, top: int | None = None) -> str:
        """kappa before and after, and their ratio, of the `top` or 1,000 that changed most."""
        rows = self._rows(top=top or _ROWS)
        text = self._text(rows)
        if more := len(self.pairs) - len(rows):
            text += f"... and {more} more with a smaller change{'' if top else _WAY_TO_ALL}\n"
        text += _remarks(rows)
        after = ". ".join([escape(self.after), *self.summary()])
        return f"{text}before: {escape(self.before)}\nafter: {after}\n"

    def to_dict(self, max_condition: float | None = None) -> dict[str, Any]:
        """Plain data; numbers may be inf and nan. With a limit also that, and what is above it."""
        return {
            "schema": SCHEMA,
            "before": self.before,
            "after": self.after,
            **_exceeding(((pair.label, pair.after) for pair in self.pairs), max_condition),
            "summary": self.summary(),
            "not_finite_before": to_list(self.not_finite_before),
            "not_finite_after": to_list(self.not_finite_after),
            "comparison": [
                {
                    "weight": pair.label,
                    "before": pair.before.to_dict() if pair.before else None,
                    "after": pair.after.to_dict() if pair.after else None,
                    "ratio": pair.ratio if pair.before and pair.after else None,
                    "note": self._note(pair),
                }
                for pair in self.pairs
            ],
            "versions": self.versions,
        }

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """One line per weight, empty where a side lacks it; written to path."""
        columns = record_of_pair(Pair("", None, None), "")
        records = (record_of_pair(pair, self._note(pair)) for pair in self.pairs)
        return save_text(_csv(columns, records), path)

    def _note(self, pair: Pair) -> str:
        return self.notes.get(pair.label, "")

    def _rows(self, max_condition: float | None = None, top: int | None = None) -> list[Row]:
        pairs = self.pairs[:top]
        return [row_of_pair(p, self._note(p), n, max_condition) for n, p in enumerate(pairs)]

    def _page(self, max_condition: float | None) -> Page:
        # The summary counts what only one side has. It has no change, so it comes last here.
        rows = zip(self.pairs, self._rows(max_condition), strict=True)
        ordered = sorted(rows, key=lambda item: None in item[0])
        sources = [f"Before, the paler bar: {self.before}", f"After: {self.after}"]
        return Page(
            title="Condition numbers before and after",
            lead=[*sources, *self.summary()],
            columns=PAIR_COLUMNS,
            meanings=PAIR_MEANINGS,
            rows={row.label: row for _, row in ordered},
            max_condition=max_condition,
            versions=self.versions,
            is_comparison=True,
        )


def compare(before: AuditReport, after: AuditReport) -> Comparison:
    """How the condition number of every weight moved from one audit to another.

    Weights are the same if their names are. Names that differ only by a wrapper of the model
    (`module.`, `_orig_mod.`), or by one prefix of all names (`model.`), count as the same; `naming`
    states the prefix. The summary counts the weights that only one side has.

    Args:
        before: what `wellcond.audit` returned for the first model or checkpoint.
        after: what it returned for the second, such as a later state of a training, a repaired
            copy, or a copy in another dtype or quantised.

    Returns:
        A `Comparison`, the largest change of kappa first.

    Raises:
        ValueError: no weight has the same name in both.
        TypeError: `before` or `after` is not a report, but a path or a model.

    Example:
        >>> import torch, wellcond as wc
        >>> layer = torch.nn.Linear(2, 2)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[8.0, 0.0], [0.0, 2.0]]))
        >>> before = wc.audit(layer)
        >>> with torch.no_grad():
        ...     _ = layer.weight.div_(torch.tensor([4.0, 1.0]))
        >>> comparison = wc.compare(before, wc.audit(layer))
        >>> comparison.pairs[0].label, comparison.pairs[0].ratio
        ('weight', 0.25)
        >>> print(comparison.summary()[0])
        In the 1 weight of both, κ rose in 0, fell in 1 (most in weight, after/before 0.25), ...
    """
    for name, report in (("before", before), ("after", after)):
        if not isinstance(report, AuditReport):
            raise TypeError(
                f"`{name}` must be an AuditReport, got {type(report).__name__}. Audit it first: "
                "wc.compare(wc.audit(before), wc.audit(after))."
            )
    old, new = (by_label(report.findings) for report in (before, after))
    names = pair_names(old, new)
    if not names.paired:
        raise ValueError(
            f"The two must share the name of a weight, but share none: {before.source} has "
            f"{list_some(old, limit=3)}; {after.source} has {list_some(new, limit=3)}. Audit two "
            "states of one model, or rename the weights of one."
        )
    pairs = [Pair(label, old[a], new[b]) for label, a, b in names.paired]
    found_old, found_new = ({name[side] for name in names.paired} for side in (1, 2))
    pairs += [Pair(label, one, None) for label, one in old.items() if label not in found_old]
    pairs += [Pair(label, None, one) for label, one in new.items() if label not in found_new]
    pairs.sort(key=lambda pair: pair.change, reverse=True)
    skipped_before, skipped_after = map(_skipped_weights, (before, after))
    notes = {pair.label: _note_of(pair, skipped_before, skipped_after) for pair in pairs}
    notes = {label: note for label, note in notes.items() if note}
    naming = ""
    if names.prefix:
        naming = f'Names {names.side} begin with "{escape(names.prefix)}", which is left out here'
    return Comparison(
        pairs,
        before.source,
        after.source,
        read_versions(),
        notes,
        naming,
        before.not_finite,
        after.not_finite,
    )


def _skipped_weights(report: AuditReport) -> dict[str, Skipped]:
    """Why weights were skipped; those that are stored as codes, as `q.qweight`, as `q.weight`."""
    skipped = report.coverage.skipped
    codes = {
        f"{name.rpartition('.')[0]}.weight": why
        for name, why in skipped.items()
        if why.reason is Reason.quantised
    }
    return codes | skipped


def _note_of(pair: Pair, before: Mapping[str, Skipped], after: Mapping[str, Skipped]) -> str:
    """Why the side that lacks the weight skipped it, if it did, and the note of the pair."""
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
    most = max(pairs, key=lambda pair: pair.change)
    return f" (most in {escape(most.label)}, after/before {most.ratio:.4g})"


def _remarks(rows: Iterable[Row]) -> str:
    """A line for each note, with the weights that have it."""
    labels: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            labels.setdefault(row.note, []).append(row.label)
    return "".join(f"{list_some(names, 3)}: {escape(note)}\n" for note, names in labels.items())


def _csv(columns: Iterable[str], records: Iterable[dict[str, Any]]) -> str:
    """Escapes names as everywhere, and quotes those that a spreadsheet would run."""

    def harmless(cell: Any) -> Any:
        if not isinstance(cell, str):
            return cell
        return f"'{escape(cell)}" if cell.startswith(("=", "+", "-", "@")) else escape(cell)

    text = io.StringIO()
    sheet = csv.DictWriter(text, list(columns), lineterminator="\n")
    sheet.writeheader()
    sheet.writerows({key: harmless(cell) for key, cell in one.items()} for one in records)
    return text.getvalue()


def _exceeding(
    findings: Iterable[tuple[str, Finding | None]], max_condition: float | None
) -> dict[str, Any]:
    """The limit, and the labels of the findings above it; nothing without a limit."""
    if max_condition is None:
        return {}
    above = [label for label, finding in findings if finding and finding.exceeds(max_condition)]
    return {"max_condition": max_condition, "exceeding": above}
