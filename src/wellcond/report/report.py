"""How the findings of an audit are shown: table, JSON, CSV, page; and two audits side by side."""

from __future__ import annotations

import abc
import csv
import io
import math
import os
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from wellcond.report.columns import (
    COMPARED,
    COMPARED_WORDS,
    WORDS,
    cells_of,
    cells_of_pair,
    headers_of,
)
from wellcond.report.documents import audit_page, comparison_page
from wellcond.report.findings import Coverage, Finding, Grade
from wellcond.report.not_finite import NotFinite, describe_not_finite, to_list
from wellcond.report.pairing import Pair, by_label, pair_names
from wellcond.report.unusual import facts_of
from wellcond.text import and_more, dump_json, shown, text_table, versions, written

SCHEMA = 1
# Longer tables nobody reads, and they take a millisecond a row.
_ROWS = 1000
_WAY_TO_ALL = "; all are in what --csv FILE writes"
# A line is worth what fewer than 1 in 100 reports of random matrices would have.
_CHANCE = 0.01
_LINES = 5
# Less is called no change: it is far above what a measured kappa may be wrong by.
_SAME = 0.01


class _Document(abc.ABC):
    """What an audit or a comparison found, as data."""

    @abc.abstractmethod
    def to_dict(self, max_condition: float | None = None) -> dict[str, Any]:
        """Plain data; numbers may be inf and nan."""

    @abc.abstractmethod
    def columns(self) -> dict[str, str]:
        """What each column of the table means, in words, with an example."""

    def legend(self) -> str:
        """`columns` as text, to stand beneath the table."""
        words = self.columns()
        width = max(map(len, words)) + 2
        return "".join(
            textwrap.fill(f"{name:<{width}}{words[name]}", 100, subsequent_indent=" " * width)
            + "\n"
            for name in words
        )

    def to_json(
        self, path: str | os.PathLike[str] | None = None, *, max_condition: float | None = None
    ) -> str:
        """`to_dict` as strict JSON, inf and nan as the strings "inf" and "nan"; written to path."""
        return written(dump_json(self.to_dict(max_condition)), path)


@dataclass(frozen=True)
class AuditReport(_Document):
    """The findings of an audit, worst first, with what they cover.

    Attributes:
        findings: one a matrix, by descending condition number; unknown ones before all others.
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

    def exceeding(self, max_condition: float) -> list[Finding]:
        """The findings above a limit of the condition number; see `Finding.exceeds`."""
        return [finding for finding in self.findings if finding.exceeds(max_condition)]

    def table(self, *, top: int | None = None) -> str:
        """The findings as text, the worst `top` of them or 1,000, with what they cover."""
        worst = self.findings[: top or _ROWS]
        # One of which not even the shape is known has a remark alone.
        known = [finding for finding in worst if finding.shape != (0, 0)]
        headers = headers_of(known)
        cells = map(cells_of, known)
        text = text_table(headers, ([row[name] for name in headers] for row in cells))
        if len(worst) < len(self.findings):
            more = len(self.findings) - len(worst)
            text += f"... and {more} more with a smaller κ{'' if top else _WAY_TO_ALL}\n"
        text += _remarks((finding.label, finding.explanation) for finding in worst)
        text += "".join(f"{shown(line)}\n" for line in self.unusual())
        text += f"{describe_not_finite(self.not_finite)}\n" if self.not_finite else ""
        return f"{text}{self.coverage}\n"

    def unusual(self) -> list[str]:
        """A line for each weight that is out of the ordinary, the rarest first; after five a count.

        That is a kappa so rare among random matrices of the shape that, were all weights random,
        fewer than 1 in 100 reports would name one; and entries that float16 or the dtype holds
        badly. These are facts about numbers: they promise nothing about accuracy.
        """
        shares = [finding.exceedance for finding in self.findings]
        rare = _CHANCE / max(1, sum(not math.isnan(share) for share in shares))
        found = [
            (share if share < rare else 1.0, f"{finding.label}: {'; '.join(facts)}")
            for finding, share in zip(self.findings, shares, strict=True)
            if (facts := facts_of(finding, share < rare))
        ]
        found.sort(key=lambda pair: pair[0])
        lines = [line for _, line in found[:_LINES]]
        if more := len(found) - len(lines):
            lines.append(f"and {more} more {'is' if more == 1 else 'are'} out of the ordinary")
        return lines

    def columns(self) -> dict[str, str]:
        """What each column of the table means, in words, with an example."""
        grades = "; ".join(f'"{grade.name}": {grade.value}' for grade in Grade)
        words = WORDS | {"grade": f"how far the numbers can be trusted. {grades}"}
        return {name: words[name] for name in headers_of(self.findings)}

    def to_dict(self, max_condition: float | None = None) -> dict[str, Any]:
        """Plain data in the documented schema; numbers may be inf and nan.

        With a limit also that, and the weights above it.
        """
        return {
            "schema": SCHEMA,
            "source": self.source,
            **_exceeding(((f.label, [f]) for f in self.findings), max_condition),
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
        """One line a finding, columns as in the JSON; written to path."""
        plain = [finding.to_dict() for finding in self.findings]
        columns = [key for key in Finding("", "", (0, 0), "").to_dict() if key != "certificate"]
        ends = [f"{key}_{end}" for key in _ENCLOSED for end in ("lower", "upper")]
        for row in plain:
            enclosures = row.pop("certificate", {})
            row["shape"] = "x".join(map(str, row["shape"]))
            for key in _ENCLOSED if enclosures else ():
                row[f"{key}_lower"], row[f"{key}_upper"] = enclosures[key]
        return written(_csv(columns + ends, plain), path)

    def to_html(
        self, path: str | os.PathLike[str] | None = None, *, max_condition: float | None = None
    ) -> str:
        """One page that needs neither network nor script; what exceeds a limit is marked."""
        return written(audit_page(self, max_condition), path)

    def __str__(self) -> str:
        return self.table()


@dataclass(frozen=True)
class Comparison(_Document):
    """Two audits side by side, in the order of the largest change of kappa.

    Attributes:
        pairs: label, finding before and finding after; None on the side where it is missing. What
            is on one side alone comes first.
        before: the source of the first audit.
        after: that of the second.
        versions: of wellcond, torch and Python.
        notes: of some labels what is to be known besides: another dtype, what is the matter
            on a side, why it was skipped there.
        naming: what the names of one side begin with and those of the other lack, in words; "" if
            they agree.
        not_finite_before: the tensors with NaN or infinity of the first audit, by their names.
        not_finite_after: those of the second.
    """

    pairs: list[Pair]
    before: str
    after: str
    versions: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)
    naming: str = ""
    not_finite_before: dict[str, NotFinite] = field(default_factory=dict)
    not_finite_after: dict[str, NotFinite] = field(default_factory=dict)

    def exceeding(self, max_condition: float) -> list[Finding]:
        """The findings of the second audit above a limit; see `Finding.exceeds`."""
        return [new for _, _, new in self.pairs if new and new.exceeds(max_condition)]

    def summary(self) -> list[str]:
        """In how many weights kappa rose and fell, and what is on one side alone, in words."""
        both = [pair for pair in self.pairs if pair.before and pair.after]
        known = [pair for pair in both if not math.isnan(pair.ratio)]
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
        for when, there, other in (("before", 1, 2), ("after", 2, 1)):
            alone = [pair.label for pair in self.pairs if pair[there] and not pair[other]]
            if alone:
                lines.append(f"{_count(len(alone), 'weight')} only {when}: {and_more(alone, 3)}")
        reshaped = [
            p.label for p in both if p.before and p.after and p.before.shape != p.after.shape
        ]
        if reshaped:
            count = _count(len(reshaped), "weight")
            lines.append(
                f"{count} of another shape, and so perhaps another: {and_more(reshaped, 3)}"
            )
        for when, found in (("Before", self.not_finite_before), ("After", self.not_finite_after)):
            lines += [f"{when}, {describe_not_finite(found)}"] if found else []
        return [*lines, *([self.naming] if self.naming else [])]

    def table(self, *, top: int | None = None) -> str:
        """kappa before and after, and their ratio, of the `top` or 1,000 that changed most."""
        shown_pairs = self.pairs[: top or _ROWS]
        text = text_table(COMPARED, [cells_of_pair(pair) for pair in shown_pairs])
        if more := len(self.pairs) - len(shown_pairs):
            text += f"... and {more} more with a smaller change{'' if top else _WAY_TO_ALL}\n"
        text += _remarks((pair.label, self.notes.get(pair.label, "")) for pair in shown_pairs)
        said = ". ".join([shown(self.after), *self.summary()])
        return f"{text}before: {shown(self.before)}\nafter: {said}\n"

    def to_dict(self, max_condition: float | None = None) -> dict[str, Any]:
        """Plain data; numbers may be inf and nan. With a limit also that, and what is above it."""
        return {
            "schema": SCHEMA,
            "before": self.before,
            "after": self.after,
            **_exceeding(((pair.label, [pair.after]) for pair in self.pairs), max_condition),
            "summary": self.summary(),
            "not_finite_before": to_list(self.not_finite_before),
            "not_finite_after": to_list(self.not_finite_after),
            "comparison": [
                {
                    "weight": pair.label,
                    "before": pair.before.to_dict() if pair.before else None,
                    "after": pair.after.to_dict() if pair.after else None,
                    "ratio": pair.ratio if pair.before and pair.after else None,
                    "note": self.notes.get(pair.label, ""),
                }
                for pair in self.pairs
            ],
            "versions": self.versions,
        }

    def columns(self) -> dict[str, str]:
        """What each column of the table means, in words, with an example."""
        return dict(COMPARED_WORDS)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """One line a weight, empty where a side lacks it; written to path."""
        rows = []
        for pair in self.pairs:
            row: dict[str, Any] = {"weight": pair.label}
            for when, side in (("before", pair.before), ("after", pair.after)):
                plain = side.to_dict() if side else {}
                row |= {f"{key}_{when}": plain.get(key) for key in _SIDE}
                row[f"shape_{when}"] = "x".join(map(str, side.shape)) if side else None
            row["ratio"] = pair.ratio if pair.before and pair.after else None
            row["note"] = self.notes.get(pair.label, "")
            rows.append(row)
        both = [f"{key}_{when}" for when in ("before", "after") for key in (*_SIDE, "shape")]
        return written(_csv(["weight", *both, "ratio", "note"], rows), path)

    def to_html(
        self, path: str | os.PathLike[str] | None = None, *, max_condition: float | None = None
    ) -> str:
        """One page as of an audit, with two bars a weight; its map is of after/before."""
        return written(comparison_page(self, max_condition), path)

    def __str__(self) -> str:
        return self.table()


def compare(before: AuditReport, after: AuditReport) -> Comparison:
    """How the condition number of every weight moved from one audit to another.

    Weights are the same if their names are. Names that differ by what wraps a model (`module.`,
    `_orig_mod.`), or by one prefix before all of them (`model.`), are the same, too: `naming` says
    so. What is on one side alone is kept, and counted in the summary.

    Args:
        before: what `wellcond.audit` returned of the first model or checkpoint.
        after: that of the second, such as a later one of a training, a repaired one, or one of
            another dtype.

    Returns:
        A `Comparison`: the largest change of kappa first, as a table, JSON, CSV or page.

    Raises:
        ValueError: no weight has the same name in both.
        TypeError: one is no report, but a path or a model.

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
            f"{and_more(old, limit=3)}; {after.source} has {and_more(new, limit=3)}. Audit two "
            "states of one model, or rename the weights of one."
        )
    pairs = [Pair(label, old[a], new[b]) for label, a, b in names.paired]
    found_old, found_new = ({name[side] for name in names.paired} for side in (1, 2))
    pairs += [Pair(label, one, None) for label, one in old.items() if label not in found_old]
    pairs += [Pair(label, None, one) for label, one in new.items() if label not in found_new]
    pairs.sort(key=lambda pair: pair.change, reverse=True)
    notes = {pair.label: pair.note for pair in pairs if pair.note}
    for pair in pairs:
        for side, when, other in ((pair.before, "after", after), (pair.after, "before", before)):
            alone = side is not None and None in pair
            if alone and side and (why := other.coverage.skipped.get(side.name)):
                notes[pair.label] = "; ".join(
                    filter(None, [f"skipped {when}: {why}", notes.get(pair.label)])
                )
    naming = ""
    if names.prefix:
        naming = f'Names {names.side} begin with "{shown(names.prefix)}", which is left out here'
    return Comparison(
        pairs,
        before.source,
        after.source,
        versions(),
        notes,
        naming,
        before.not_finite,
        after.not_finite,
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _most(pairs: Sequence[Pair]) -> str:
    if not pairs:
        return ""
    most = max(pairs, key=lambda pair: pair.change)
    return f" (most in {shown(most.label)}, after/before {most.ratio:.4g})"


def _remarks(remarks: Iterable[tuple[str, str]]) -> str:
    """A line for each remark, with the labels of which it is made."""
    labels: dict[str, list[str]] = {}
    for label, remark in remarks:
        if remark:
            labels.setdefault(remark, []).append(label)
    return "".join(f"{and_more(of, 3)}: {shown(remark)}\n" for remark, of in labels.items())


def _csv(columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> str:
    """Names are escaped as everywhere, and those that a spreadsheet would run are quoted."""

    def harmless(cell: Any) -> Any:
        if not isinstance(cell, str):
            return cell
        return f"'{shown(cell)}" if cell.startswith(("=", "+", "-", "@")) else shown(cell)

    text = io.StringIO()
    sheet = csv.DictWriter(text, columns, lineterminator="\n")
    sheet.writeheader()
    sheet.writerows({key: harmless(cell) for key, cell in row.items()} for row in rows)
    return text.getvalue()


_SIDE = ("condition_number", "sigma_max", "sigma_min", "rank", "grade", "status", "dtype")
_ENCLOSED = ("sigma_max", "sigma_min", "condition_number")


def _exceeding(
    findings: Iterable[tuple[str, Sequence[Finding | None]]], max_condition: float | None
) -> dict[str, Any]:
    """The limit, and the labels of which a finding is above it; nothing without a limit."""
    if max_condition is None:
        return {}
    above = [
        label
        for label, sides in findings
        if any(side and side.exceeds(max_condition) for side in sides)
    ]
    return {"max_condition": max_condition, "exceeding": above}
