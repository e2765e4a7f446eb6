"""What an audit found, and how it is shown: table, JSON, CSV, page, comparison.

Letters: S (m, n) a weight; sigma_1 >= ... >= sigma_nu its singular values, nu = min(m, n);
kappa = sigma_1/sigma_nu; u the unit roundoff of the dtype in which S is stored.
"""

from __future__ import annotations

import abc
import csv
import enum
import functools
import io
import math
import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from wellcond.checkpoints.page import CURVES, Row, render
from wellcond.linalg.certify import Certificate
from wellcond.linalg.gaussian import exceedance, usual_stable_rank
from wellcond.linalg.nearest import clip
from wellcond.linalg.spectrum import negligible
from wellcond.text import and_more, dump_json, shown, text_table, versions, written
from wellcond.weights.reasons import Skipped

SCHEMA = 1
# Longer tables nobody reads, and they take a millisecond a row.
_ROWS = 1000
_WAY_TO_ALL = "; all are in what --csv FILE writes"
# More often than 1 in 20 is usual. Below the other, of narrow shapes the power of ten is not sure.
_USUAL, _NEVER = 0.05, 1e-9
# A line is worth what fewer than 1 in 100 reports of random matrices would have.
_CHANCE = 0.01
_LINES = 5
# So much smaller than the one before, and singular values have collapsed.
_COLLAPSED = 1e-2
# A larger share of entries that a dtype holds badly is said.
_ENTRIES = 0.01
_FLOAT16 = torch.finfo(torch.float16)


class Grade(enum.Enum):
    """How far the numbers of a weight can be trusted."""

    none = "there are no numbers"
    estimated = (
        "extremes from an iteration that converged: sigma_max from below, sigma_min from above"
    )
    bounded = "σ_max is at least, and σ_min at most what is shown, so that κ is at least that"
    computed = "from all singular values in float64"
    certified = "computed, and enclosed by intervals that rounding errors cannot break"


class Status(enum.Enum):
    """What is the matter with a weight, in the words that the user reads."""

    ok = "measured"
    rank_deficient = (
        "the smallest singular value is zero to working precision, "
        "so the condition number is infinite"
    )
    zero = "every entry is zero, so there is no condition number"
    not_finite = "it holds NaN or infinity"
    failed = "it could not be measured"


@dataclass(frozen=True)
class Finding:
    """What was found of one weight.

    Attributes:
        name: its parameter name.
        view: which matrix of the parameter: "q", "3" of a stack, "kernel"; "operator" for a
            convolution as it acts; "" if it has one.
        shape: (m, n), outputs and inputs; (g, m, n) of the kernel of a convolution in g groups,
            which acts as one block-diagonal matrix and is measured as that.
        dtype: in which it is stored, such as "bfloat16".
        sigma_max: the largest singular value, the spectral norm.
        sigma_min: the smallest of the nu = min(m, n) singular values, of groups g nu.
        condition_number: sigma_max/sigma_min; inf if sigma_min is zero to working precision, nan
            if there is none.
        stable_rank: ||S||_F^2/sigma_max^2, between 1 and nu.
        rank: how many singular values exceed what rounding the entries to the dtype can move one
            by, u ||S||_F; every matrix that rounds to this one has at least that rank. 0 if the
            grade is "bounded".
        penalty: r = sigma_max^2/2 - ||S||_F^2/(2 nu), in units of a squared singular value.
        grade: "none", "estimated", "bounded", "computed" or "certified"; see `Grade`.
        status: "ok", or what is the matter; its value says it in words.
        detail: more of the status, such as the error.
        method: how the singular values were found.
        certificate: the enclosures, if they were asked for.
        singular_values: all of them, descending, where the method gives all; of a convolution as it
            acts at most 4096, at equal distances.
        entries: of the parameter, how many it stands for.
        inner: of a product of two factors, as of a head, over how many dimensions it goes, of which
            nu counts no more; 0 of others.
        largest_entry: max |w|; float16 holds up to 65504. This and the next two are nan of what is
            no stored matrix, as a convolution as it acts.
        subnormal_share: of the entries, how many are subnormal in the dtype, 0 to 1: they have lost
            digits, and hardware may take them for zero.
        float16_zero_share: of the entries, how many are not zero and would be in float16, 0 to 1.
    """

    name: str
    view: str
    shape: tuple[int, ...]
    dtype: str
    sigma_max: float = math.nan
    sigma_min: float = math.nan
    condition_number: float = math.nan
    stable_rank: float = math.nan
    rank: int = 0
    penalty: float = math.nan
    grade: Grade = Grade.none
    status: Status = Status.ok
    detail: str = ""
    method: str = ""
    certificate: Certificate | None = None
    singular_values: tuple[float, ...] = field(default=(), repr=False)
    entries: int = 0
    inner: int = 0
    largest_entry: float = math.nan
    subnormal_share: float = math.nan
    float16_zero_share: float = math.nan

    def __post_init__(self) -> None:
        if not self.entries:  # of a convolution as it acts there are fewer
            object.__setattr__(self, "entries", math.prod(self.shape))

    @property
    def label(self) -> str:
        """name:view, by which it is shown."""
        return f"{self.name}:{self.view}" if self.view else self.name

    @property
    def nu(self) -> int:
        """How many singular values there are, of a product how many need not be zero."""
        return self.inner or math.prod(self.shape[:-2]) * min(self.shape[-2:])

    @property
    def _comparable(self) -> bool:
        """Whether random matrices of the shape are its like: of one stored matrix, no vector."""
        return len(self.shape) == 2 and self.nu > 1 and not math.isnan(self.largest_entry)

    @functools.cached_property
    def exceedance(self) -> float:
        """How often a random matrix of this shape has a larger condition number, 0 to 1.

        Of independent Gaussian entries; see `wellcond.linalg.gaussian.exceedance`. nan if there is
        no condition number, for vectors, and for what is no stored matrix: groups of a convolution,
        a convolution as it acts, a head of attention; random ones of these follow other laws.
        """
        return exceedance(self.shape, self.condition_number) if self._comparable else math.nan

    @property
    def usual_stable_rank(self) -> float:
        """The stable rank that random matrices of this shape have in the mean; nan as above."""
        return usual_stable_rank(self.shape) if self._comparable else math.nan

    @property
    def measured(self) -> bool:
        return self.status in (Status.ok, Status.rank_deficient, Status.zero)

    def exceeds(self, max_condition: float) -> bool:
        """Whether kappa is above; the certified upper bound if there is one.

        A kappa that is infinite, undefined or unknown is above every limit; one that is bounded
        from below alone is above those below that.
        """
        kappa = self.condition_number
        if self.certificate is not None:
            kappa = self.certificate.condition_number.upper
        return not (math.isfinite(kappa) and kappa <= max_condition)

    @property
    def explanation(self) -> str:
        """Status and detail in words; "" if all is well."""
        if self.status is Status.ok:
            return self.detail
        return f"{self.status.value}: {self.detail}" if self.detail else self.status.value

    def to_dict(self) -> dict[str, Any]:
        """All but the singular values, as JSON takes it: inf and nan as strings."""
        plain: dict[str, Any] = {
            "name": self.name,
            "view": self.view,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "sigma_max": self.sigma_max,
            "sigma_min": self.sigma_min,
            "condition_number": self.condition_number,
            "stable_rank": self.stable_rank,
            "rank": self.rank,
            "penalty": self.penalty,
            "exceedance": self.exceedance,
            "usual_stable_rank": self.usual_stable_rank,
            "largest_entry": self.largest_entry,
            "subnormal_share": self.subnormal_share,
            "float16_zero_share": self.float16_zero_share,
            "grade": self.grade.name,
            "status": self.status.name,
            "detail": self.explanation,
            "method": self.method,
        }
        if self.certificate is not None:
            c = self.certificate
            plain["certificate"] = {
                "certified": c.certified,
                "method": c.method,
                "reason": c.reason,
                "sigma_max": [c.sigma_max.lower, c.sigma_max.upper],
                "sigma_min": [c.sigma_min.lower, c.sigma_min.upper],
                "condition_number": [c.condition_number.lower, c.condition_number.upper],
            }
        return plain


def with_entries(finding: Finding, S: Tensor) -> Finding:
    """The finding with what is to be known of the single entries of its matrix, all finite."""
    sizes = S.abs()
    zeros = S.numel() - int(S.count_nonzero())

    def share(below: Tensor) -> float:
        return (int(below.count_nonzero()) - zeros) / S.numel()

    return replace(
        finding,
        largest_entry=float(sizes.max()),
        subnormal_share=share(sizes < torch.finfo(S.dtype).tiny),
        # At half its smallest number float16 rounds to zero, the even one of the two neighbours.
        float16_zero_share=share(sizes <= _FLOAT16.smallest_normal * _FLOAT16.eps / 2),
    )


@dataclass(frozen=True)
class Coverage:
    """What the findings stand for.

    Attributes:
        measured: how many matrices have numbers.
        failed: how many could not be measured; each has a finding that says why.
        skipped: everything else by name, and why.
        parameter_share: entries of the measured matrices over those of all parameters, 0 to 1.
    """

    measured: int
    failed: int
    skipped: dict[str, Skipped]
    parameter_share: float

    def __str__(self) -> str:
        left_out = {n: why for n, why in self.skipped.items() if not why.reason.no_matrix}
        matrices = self.measured + self.failed + len(left_out)
        text = f"{self.measured} of {matrices} matrices, {100 * self.parameter_share:.1f} % of "
        text += "the parameters"
        if self.failed:
            text += f"; {self.failed} could not be measured"
        if left_out:
            named = and_more((f"{name} ({why})" for name, why in left_out.items()), limit=3)
            text += f"; {len(left_out)} skipped: {named}"
        reasons = [why.reason for why in self.skipped.values() if why.reason.no_matrix]
        if reasons:
            counted = (f"{n} ({reason.name})" for reason, n in Counter(reasons).items())
            text += f"; no matrices: {', '.join(counted)}"
        return text


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
            if (facts := _facts(finding, share < rare))
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
    known, often = finding.measured, _how_often(finding.exceedance)
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


def _how_often(share: float) -> str:
    """A probability in words that are short: "1 in 77"."""
    if math.isnan(share):
        return ""
    if share >= _USUAL:
        return "usual"
    return "never" if share < _NEVER else f"1 in {_short(1 / share)}"


def _short(number: float) -> str:
    """Two digits of a number below 1,000, one of a larger: 77, 130, 2e4."""
    if number < 1000:
        return f"{float(f'{number:.2g}'):.0f}"
    return _one_digit(number)


def _one_digit(number: float) -> str:
    """2e-5, 0.02, 10, 2e4."""
    return re.sub(r"e([+-])0?", lambda sign: "e" + sign[1].strip("+"), f"{number:.1g}")


def _facts(finding: Finding, rare: bool) -> list[str]:
    """What is out of the ordinary, if anything; `rare` of its kappa."""
    facts = []
    if rare:
        often = _how_often(finding.exceedance)
        often = f"fewer than 1 in {_one_digit(1 / _NEVER)}" if often == "never" else often
        kappa = f"κ = {finding.condition_number:.4g}"
        facts = [f"{often} random matrices of this shape exceed {kappa}", *_collapse(finding)]
        if finding.stable_rank < finding.usual_stable_rank / 3:
            few = f"{finding.stable_rank:.2g} where they have {finding.usual_stable_rank:.2g}"
            facts.append(f"a stable rank of {few}")
    if finding.dtype != "float16":
        if finding.largest_entry > _FLOAT16.max:
            facts.append(f"an entry of {finding.largest_entry:.2g} is infinite in float16")
        if finding.float16_zero_share > _ENTRIES:
            percent = 100 * finding.float16_zero_share
            facts.append(f"{percent:.2g} % of its entries would be zero in float16")
    if finding.subnormal_share > _ENTRIES:
        percent = 100 * finding.subnormal_share
        facts.append(f"{percent:.2g} % of its entries are subnormal in {finding.dtype}")
    return [*facts, *(_repair(finding) if rare else [])]


def _collapse(finding: Finding) -> list[str]:
    """A gap in the lower half of the singular values, the widest."""
    zero = negligible(torch.Size(finding.shape)) * finding.sigma_max
    sigma = [max(value, zero) for value in finding.singular_values]
    lower = range(max(1, len(sigma) - len(sigma) // 2), len(sigma))
    ratio, below = min(((sigma[i] / sigma[i - 1], len(sigma) - i) for i in lower), default=(1.0, 0))
    if ratio > _COLLAPSED:
        return []
    how_far = f"{_one_digit(ratio)} of the next"
    if below == 1:
        return [f"one direction has collapsed: σ_min is {how_far}"]
    return [f"{below} directions have collapsed, to {how_far}"]


def _repair(finding: Finding) -> list[str]:
    """How far off a matrix with a usual kappa is, where all singular values are known."""
    limit = 10
    while exceedance(finding.shape, limit) > _USUAL:
        limit *= 10
    if not finding.singular_values or finding.condition_number <= limit:
        return []
    sigma = torch.tensor(finding.singular_values, dtype=torch.float64, device="cpu")
    sigma = sigma / finding.sigma_max
    moved = float((clip(sigma, limit) - sigma).norm() / sigma.norm())
    named = str(limit) if limit < 1e4 else _one_digit(limit)
    return [f"`repair --max-condition {named}` moves it by {_one_digit(moved)} of its norm"]


def sort_key(finding: Finding) -> tuple[bool, bool, float]:
    """Failed ones first, then undefined ones, then by descending kappa."""
    kappa = finding.condition_number
    return finding.measured, not math.isnan(kappa), -kappa
