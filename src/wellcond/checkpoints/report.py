"""How the findings of an audit are shown: table, JSON, CSV, page; and two audits side by side."""

from __future__ import annotations

import abc
import csv
import io
import math
import os
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from wellcond.checkpoints.findings import Coverage, Finding, Grade
from wellcond.checkpoints.page import CURVES, Row, render
from wellcond.checkpoints.unusual import facts_of, how_often
from wellcond.text import and_more, dump_json, shown, text_table, versions, written

SCHEMA = 1
# Longer tables nobody reads, and they take a millisecond a row.
_ROWS = 1000
_WAY_TO_ALL = "; all are in what --csv FILE writes"
# A line is worth what fewer than 1 in 100 reports of random matrices would have.
_CHANCE = 0.01
_LINES = 5


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
        self, path: str | os.PathLike[str] | None = None, max_condition: float | None = None
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
    """

    findings: list[Finding]
    coverage: Coverage
    source: str
    versions: dict[str, str]

    def exceeding(self, max_condition: float) -> list[Finding]:
        """The findings above a limit of the condition number; see `Finding.exceeds`."""
        return [finding for finding in self.findings if finding.exceeds(max_condition)]

    def table(self, top: int | None = None) -> str:
        """The findings as text, the worst `top` of them or 1,000, with what they cover."""
        worst = self.findings[: top or _ROWS]
        rows = [_cells(finding) for finding in worst]
        certified = any(finding.certificate for finding in worst)
        text = text_table(_HEADERS if certified else _HEADERS[:-1], rows)
        if len(worst) < len(self.findings):
            more = len(self.findings) - len(worst)
            text += f"... and {more} more with a smaller κ{'' if top else _WAY_TO_ALL}\n"
        for finding in worst:
            if finding.explanation:
                text += f"{shown(finding.label)}: {shown(finding.explanation)}\n"
        text += "".join(f"{shown(line)}\n" for line in self.unusual())
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
        certified = any(finding.certificate for finding in self.findings)
        grades = "; ".join(f'"{grade.name}": {grade.value}' for grade in Grade)
        words = _COLUMNS | {"grade": f"how far the numbers can be trusted. {grades}"}
        return {name: words[name] for name in (_HEADERS if certified else _HEADERS[:-1])}

    def to_dict(self, max_condition: float | None = None) -> dict[str, Any]:
        """Plain data in the documented schema; numbers may be inf and nan.

        With a limit also that, and the weights above it.
        """
        return {
            "schema": SCHEMA,
            "source": self.source,
            **_exceeding(self.findings, max_condition),
            "findings": [finding.to_dict() for finding in self.findings],
            "coverage": {
                "measured": self.coverage.measured,
                "failed": self.coverage.failed,
                "skipped": [
                    {"name": name, "reason": str(why)}
                    for name, why in self.coverage.skipped.items()
                ],
                "parameter_share": self.coverage.parameter_share,
            },
            "versions": self.versions,
        }

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """One line a finding, columns as in the JSON; written to path."""
        plain = [finding.to_dict() for finding in self.findings]
        columns = [key for key in plain[0] if key != "certificate"]
        ends = [f"{key}_{end}" for key in _ENCLOSED for end in ("lower", "upper")]
        for row in plain:
            enclosures = row.pop("certificate", {})
            row["shape"] = "x".join(map(str, row["shape"]))
            for key in _ENCLOSED if enclosures else ():
                row[f"{key}_lower"], row[f"{key}_upper"] = enclosures[key]
        return written(_csv(columns + ends, plain), path)

    def to_html(
        self, path: str | os.PathLike[str] | None = None, max_condition: float | None = None
    ) -> str:
        """One page that needs neither network nor script; what exceeds a limit is marked."""
        curves = [(f.label, f.singular_values) for f in self.findings if f.sigma_max > 0]
        skipped = self.coverage.skipped
        certified = any(finding.certificate for finding in self.findings)
        headers = _kappa_first(_HEADERS if certified else _HEADERS[:-1])
        page = render(
            title=f"Condition numbers of {self.source}",
            summary=[f"{self.coverage}."],
            headers=headers,
            rows=[
                Row(
                    _kappa_first(_cells(f)),
                    (f.condition_number,),
                    f.explanation,
                    [max_condition is not None and f.exceeds(max_condition)],
                )
                for f in self.findings
            ],
            max_condition=max_condition,
            skipped={n: str(why) for n, why in skipped.items() if not why.reason.no_matrix},
            no_matrices={n: str(why) for n, why in skipped.items() if why.reason.no_matrix},
            unusual=self.unusual(),
            columns={name: words for name, words in self.columns().items() if name != "grade"},
            grades={grade.name: grade.value for grade in Grade},
            curves=[curve for curve in curves if len(curve[1]) > 1][:CURVES],
            versions=self.versions,
        )
        return written(page, path)

    def __str__(self) -> str:
        return self.table()


@dataclass(frozen=True)
class Comparison(_Document):
    """Two audits side by side, in the order of the largest change of kappa.

    Attributes:
        pairs: label, finding before and finding after; None on the side where it is missing.
        before: the source of the first audit.
        after: that of the second.
        versions: of wellcond, torch and Python.
    """

    pairs: list[tuple[str, Finding | None, Finding | None]]
    before: str
    after: str
    versions: dict[str, str]

    def exceeding(self, max_condition: float) -> list[Finding]:
        """Of every weight that is above the limit on one side, the later finding that is."""
        return [
            next(side for side in (new, old) if side and side.exceeds(max_condition))
            for _, old, new in self.pairs
            if any(side and side.exceeds(max_condition) for side in (old, new))
        ]

    def table(self, top: int | None = None) -> str:
        """kappa before and after, and their ratio, of the `top` or 1,000 that changed most."""
        rows = [_compared(*pair) for pair in self.pairs[: top or _ROWS]]
        text = text_table(_COMPARED, rows)
        if more := len(self.pairs) - len(rows):
            text += f"... and {more} more with a smaller change{'' if top else _WAY_TO_ALL}\n"
        return f"{text}before: {shown(self.before)}\nafter: {shown(self.after)}\n"

    def to_dict(self, max_condition: float | None = None) -> dict[str, Any]:
        """Plain data; numbers may be inf and nan. With a limit also that, and what is above it."""
        sides = (side for _, *both in self.pairs for side in both if side)
        return {
            "schema": SCHEMA,
            "before": self.before,
            "after": self.after,
            **_exceeding(sides, max_condition),
            "comparison": [
                {
                    "weight": label,
                    "before": old.to_dict() if old else None,
                    "after": new.to_dict() if new else None,
                    "ratio": _ratio(old, new) if old and new else None,
                }
                for label, old, new in self.pairs
            ],
            "versions": self.versions,
        }

    def columns(self) -> dict[str, str]:
        """What each column of the table means, in words, with an example."""
        return {
            "κ before": _COLUMNS["κ"],
            "κ after": "the same of the second checkpoint; - where the weight is not there",
            "after/before": "their quotient: at 0.5, κ has halved. The largest change comes first",
        }

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """One line a weight, empty where a side lacks it; written to path."""
        rows = []
        for label, old, new in self.pairs:
            row: dict[str, Any] = {"weight": label}
            for when, side in (("before", old), ("after", new)):
                plain = side.to_dict() if side else {}
                row |= {f"{key}_{when}": plain.get(key) for key in _SIDE}
            row["ratio"] = _ratio(old, new) if old and new else None
            rows.append(row)
        return written(_csv(list(rows[0]), rows), path)

    def to_html(
        self, path: str | os.PathLike[str] | None = None, max_condition: float | None = None
    ) -> str:
        """One page as of an audit, with two bars a weight."""
        rows = []
        for label, old, new in self.pairs:
            sides = [(when, f) for when, f in (("before", old), ("after", new)) if f]
            notes = (f"{when}: {f.explanation}" for when, f in sides if f.explanation)
            exceeds = [
                side is not None and max_condition is not None and side.exceeds(max_condition)
                for side in (old, new)
            ]
            kappas = [side.condition_number if side else math.nan for side in (old, new)]
            rows.append(Row(_compared(label, old, new), kappas, "; ".join(notes), exceeds))
        page = render(
            title="Condition numbers before and after",
            summary=[f"Before, the paler bar: {self.before}", f"After: {self.after}"],
            headers=_COMPARED,
            rows=rows,
            max_condition=max_condition,
            skipped={},
            no_matrices={},
            unusual=[],
            columns=self.columns(),
            grades={},
            curves=[],
            versions=self.versions,
        )
        return written(page, path)


def _compared(label: str, old: Finding | None, new: Finding | None) -> tuple[str, ...]:
    kappas = [f"{side.condition_number:.4g}" if side else "-" for side in (old, new)]
    return (label, *kappas, f"{_ratio(old, new):.4g}" if old and new else "-")


def _ratio(old: Finding, new: Finding) -> float:
    return new.condition_number / old.condition_number if old.condition_number else math.nan


def compare(before: AuditReport, after: AuditReport) -> Comparison:
    """How the condition number of every weight moved from one audit to another.

    Raises:
        ValueError: no weight has the same name in both.
    """
    old, new = ({f.label: f for f in report.findings} for report in (before, after))
    if not old.keys() & new.keys():
        raise ValueError(
            f"The two must share the name of a weight, but share none: {before.source} has "
            f"{and_more(old, limit=3)}; {after.source} has {and_more(new, limit=3)}."
        )
    labels = list(old) + [label for label in new if label not in old]
    pairs = [(label, old.get(label), new.get(label)) for label in labels]

    def change(pair: tuple[str, Finding | None, Finding | None]) -> float:
        ratio = _ratio(pair[1], pair[2]) if pair[1] and pair[2] else math.nan
        if pair[1] and pair[2] and pair[1].condition_number == pair[2].condition_number:
            return 0.0  # infinite on both sides, too
        return abs(math.log(ratio)) if 0 < ratio < math.inf else math.inf

    pairs.sort(key=change, reverse=True)
    return Comparison(pairs, before.source, after.source, versions())


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


_COMPARED = ("weight", "κ before", "κ after", "after/before")
_SIDE = ("condition_number", "sigma_max", "sigma_min", "rank", "grade", "status")
_NUMBERS = ("κ", "random", "σ_max", "σ_min", "stable rank", "rank", "r")
_HEADERS = ("weight", "shape", "dtype", *_NUMBERS, "grade", "κ certified")
_COLUMNS = {
    "weight": "its name; after a colon, which matrix of the parameter",
    "shape": "m x n, outputs and inputs; g x m x n for a convolution in g groups",
    "dtype": "in which it is stored; all is computed in float64",
    "κ": "σ_max/σ_min, the condition number: at 1e4 the matrix stretches one direction 1e4 times "
    "as much as another; at inf it loses one",
    "random": "how often a random matrix of this shape, of independent Gaussian entries, has a "
    'larger κ: 1 in 77; "usual" is more often than 1 in 20, "never" less than 1 in 1e9. It says '
    "how unusual κ is, and nothing about accuracy. Empty where no such law is known: groups, "
    "convolutions as they act, heads, vectors",
    "σ_max": "the largest singular value, the spectral norm",
    "σ_min": "the smallest of the min(m, n) singular values",
    "stable rank": "‖S‖²/σ_max² (Frobenius norm), from 1 to min(m, n): how many directions carry "
    "the weight. Random matrices have about m n/(√m + √n)²: 192 at 768 x 768",
    "rank": "how many singular values no rounding of the entries to their dtype could have made: "
    "at 760/768, eight may be noise of that rounding, and κ with them",
    "r": "the penalty ½ σ_max² − ‖S‖²/(2 min(m, n)), 0 where all singular values are equal",
    "κ certified": "an interval that holds κ whatever the rounding: [9.82, 9.83]",
}
_ENCLOSED = ("sigma_max", "sigma_min", "condition_number")


def _kappa_first(cells: Sequence[str]) -> tuple[str, ...]:
    """As the page has them: a phone shows the first columns first."""
    at = _HEADERS.index("κ")
    return (cells[0], *cells[at : at + 2], *cells[1:at], *cells[at + 2 :])


def _exceeding(findings: Iterable[Finding], max_condition: float | None) -> dict[str, Any]:
    if max_condition is None:
        return {}
    above = dict.fromkeys(f.label for f in findings if f.exceeds(max_condition))
    return {"max_condition": max_condition, "exceeding": list(above)}


def _cells(finding: Finding) -> tuple[str, ...]:
    numbers = (finding.condition_number, finding.sigma_max, finding.sigma_min, finding.stable_rank)
    kappa, high, low, stable = (f"{number:.4g}" for number in numbers)
    known, often = finding.measured, how_often(finding.exceedance)
    if finding.grade is Grade.bounded:
        kappa, high, low, known = f"≥{kappa}", f"≥{high}", f"≤{low}", False
    enclosure = str(finding.certificate.condition_number) if finding.certificate else ""
    return (
        finding.label,
        "x".join(map(str, finding.shape)),
        finding.dtype,
        *(kappa, often, high, low, stable),
        f"{finding.rank}/{finding.nu}" if known else "-",
        f"{finding.penalty:.3g}",
        finding.grade.name,
        enclosure,
    )
