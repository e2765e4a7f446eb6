"""Compares an audit with a baseline: which of kappa, sigma_max and stable rank got worse.

The baseline is an earlier output of `wellcond audit --json`, which is small enough to keep next to
a model. Numbers can be inf, or nan if they are undefined or unknown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from wellcond.report.comparison import check_exported
from wellcond.report.findings import Finding, Status
from wellcond.report.pairing import is_square, pair_names
from wellcond.report.report import AuditReport
from wellcond.text import escape, list_some

_LARGEST = 256 << 20  # bytes; a finding has about 700
# The limit on the rise of kappa is this many times larger for square weights.
SQUARES = 10
# The quantities that are compared, with their least value and their name in errors.
GATED = {
    "condition_number": (1.0, "condition numbers, which are at least 1"),
    "sigma_max": (0.0, "singular values, which are not negative"),
    "stable_rank": (1 - 1e-6, "stable ranks, which are at least 1"),
}


class Baseline(dict[str, dict[str, float]]):
    """Numbers of weights by their labels; `exported` has the meaning of `AuditReport.exported`."""

    exported = False


@dataclass(frozen=True)
class Rise:
    """A weight with a larger kappa or sigma_max than before, or a smaller stable rank."""

    label: str
    quantity: str
    before: float
    after: float


@dataclass(frozen=True)
class BaselineComparison:
    """How the weights of an audit differ from those of a baseline.

    Attributes:
        risen: the weights with a number that changed by more than its limit, the largest excess
            first; for each weight only the number with the largest excess.
        missing: the weights that only the baseline contains, so their change is unknown.
        new: the weights that only the audit contains.
    """

    risen: list[Rise]
    missing: list[str]
    new: list[str]


def read_baseline(path: Path) -> Baseline:
    """Reads the numbers of the weights by their labels. Older files contain only kappa.

    Raises:
        ValueError: the file is not an output of `wellcond audit --json`, or a number in it is below
            the least possible value.
        FileNotFoundError: the file does not exist.
        OSError: the file cannot be read.
    """
    several = 0
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError
        document = json.loads(path.read_bytes())
        several = len(document.get("reports", ()))
        rows = [(f["name"], f["view"], f, f["condition_number"]) for f in document["findings"]]
        baseline = Baseline(
            (
                f"{name}:{view}" if view else str(name),
                {key: float(finding[key]) for key in GATED if key in finding},
            )
            for name, view, finding, _ in rows
        )
        baseline.exported = bool(document.get("exported"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"--baseline must be an output of `wellcond audit PATH --json`, but {path} does not "
            "exist. Create it first, from the reference model."
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        if several:
            raise ValueError(
                f"--baseline must contain the report of one checkpoint, but {path} contains "
                f"{several}. Create one baseline per checkpoint."
            ) from None
        raise ValueError(
            f"--baseline must be an output of `wellcond audit PATH --json`, but {path} is not. "
            "Create a new one from the reference model."
        ) from None
    for label, numbers in baseline.items():
        for quantity, number in numbers.items():
            least, what = GATED[quantity]
            if number < least:  # nan is unknown
                raise ValueError(
                    f"--baseline must contain {what}, but {path} contains {number:g} for "
                    f"{escape(label)}. Create a new one from the reference model."
                )
    return baseline


def compare_with_baseline(
    report: AuditReport, baseline: Baseline, times: float
) -> BaselineComparison:
    """Finds the numbers that changed by more than `limit_of`; pairs names as `compare` does.

    A change from a finite number to inf or nan counts as an infinite rise. A number that was inf or
    nan cannot rise, and neither can an adapter that adds nothing. Numbers that the baseline lacks
    are not compared.

    Raises:
        ValueError: they have no weight in common, or one of them is of an exported file.
    """
    check_exported("--baseline", baseline.exported, report.source, report.exported)
    now = {finding.label: finding for finding in report.findings}
    names = [(old, new) for _, old, new in pair_names(baseline, now).paired]
    if not names:
        raise ValueError(
            f"--baseline must contain weights of {report.source}, but it contains none of them: it "
            f"has {list_some(baseline, limit=3)} instead of {list_some(now, limit=3)}."
        )
    excesses = [
        max(_excesses(now[new], baseline[old], times), key=itemgetter(0))
        for old, new in names
        if now[new].status is not Status.fresh
    ]
    excesses.sort(key=itemgetter(0), reverse=True)
    risen = [rise for excess, rise in excesses if excess > 1]
    paired_old, paired_new = map(set, zip(*names, strict=True))
    missing = [label for label in baseline if label not in paired_old]
    return BaselineComparison(risen, missing, [label for label in now if label not in paired_new])


def _excesses(
    finding: Finding, before: Mapping[str, float], times: float
) -> Iterator[tuple[float, Rise]]:
    """For each number of the baseline, its rise divided by the allowed rise."""
    for quantity in GATED:
        if quantity in before:
            rise = Rise(finding.label, quantity, before[quantity], getattr(finding, quantity))
            yield ratio(rise) / limit_of(quantity, finding.shape, times), rise


def limit_of(quantity: str, shape: Sequence[int], times: float) -> float:
    """The factor by which a quantity of a weight of this shape may rise, or the stable rank fall.

    If the sides of a weight are within a factor of 1.2, its kappa varies between training runs by a
    factor of 2.5 (one standard deviation), so its limit is ten times larger.
    """
    square = quantity == "condition_number" and is_square(shape)
    return SQUARES * times if square else times


def ratio(rise: Rise) -> float:
    """The factor by which the quantity rose, or by which the stable rank fell."""
    if not (math.isfinite(rise.before) and rise.before > 0):
        return 1.0
    if rise.quantity == "stable_rank":
        return rise.before / rise.after if rise.after > 0 else math.inf
    return rise.after / rise.before if math.isfinite(rise.after) else math.inf
