"""An audit held against one of before: which of kappa, sigma_max and stable rank got worse.

The one of before is what `wellcond audit --json` printed, a file small enough to keep beside a
model. Numbers may be inf, or nan where they are undefined or unknown.
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

_LARGEST = 256 << 20  # bytes; a finding takes some 700
# kappa of square weights may rise by so many times more than all else.
SQUARES = 10
# What is held against a baseline, its least value, and its name in an error.
GATED = {
    "condition_number": (1.0, "condition numbers, which are at least 1"),
    "sigma_max": (0.0, "singular values, which are not negative"),
    "stable_rank": (1 - 1e-6, "stable ranks, which are at least 1"),
}


class Baseline(dict[str, dict[str, float]]):
    """Numbers of weights by their labels; `exported` as of an AuditReport."""

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
    """What became of the weights of a baseline.

    Attributes:
        risen: those of which a number has moved by more than it may, the furthest above its limit
            first; of several numbers of one weight only that one.
        missing: those that the audit does not have: nobody knows whether they have risen.
        new: those that only the audit has.
    """

    risen: list[Rise]
    missing: list[str]
    new: list[str]


def read_baseline(path: Path) -> Baseline:
    """The numbers of the weights, by their labels. Older files have kappa only.

    Raises:
        ValueError: the file is not what `wellcond audit --json` prints, or a number in it is below
            what it can be.
        FileNotFoundError: it is not there.
        OSError: it cannot be read.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError
        document = json.loads(path.read_bytes())
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
            f"--baseline must be what `wellcond audit PATH --json` printed, but {path} is not "
            "there. Make it first, from the model as it is to stay."
        ) from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(
            f"--baseline must be what `wellcond audit PATH --json` printed, but {path} is not. "
            "Make one from the model as it is to stay."
        ) from None
    for label, numbers in baseline.items():
        for quantity, number in numbers.items():
            least, what = GATED[quantity]
            if number < least:  # nan is unknown
                raise ValueError(
                    f"--baseline must hold {what}, but {path} says {number:g} of {escape(label)}. "
                    "Make one from the model as it is to stay."
                )
    return baseline


def compare_with_baseline(
    report: AuditReport, baseline: Baseline, times: float
) -> BaselineComparison:
    """Which numbers have moved by more than `limit_of` them; names are paired as by `compare`.

    From a number to inf or nan is a rise without end; what was inf or nan cannot rise, nor has an
    adapter that adds nothing. Numbers that the baseline does not have are not held against it.

    Raises:
        ValueError: they have no weight in common, or one of them is of an export.
    """
    check_exported("--baseline", baseline.exported, report.source, report.exported)
    now = {finding.label: finding for finding in report.findings}
    names = [(old, new) for _, old, new in pair_names(baseline, now).paired]
    if not names:
        raise ValueError(
            f"--baseline must name weights of {report.source}, but names none of them: it has "
            f"{list_some(baseline, limit=3)}, and not {list_some(now, limit=3)}."
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
    """Each number that the baseline has: how far it has risen, over how far it may."""
    for quantity in GATED:
        if quantity in before:
            rise = Rise(finding.label, quantity, before[quantity], getattr(finding, quantity))
            yield ratio(rise) / limit_of(quantity, finding.shape, times), rise


def limit_of(quantity: str, shape: Sequence[int], times: float) -> float:
    """By which factor a quantity of a weight of this shape may rise, or the stable rank fall.

    kappa of a weight whose sides are within a factor of 1.2 varies from training to training by a
    factor of 2.5 (one standard deviation): it has ten times as much.
    """
    square = quantity == "condition_number" and is_square(shape)
    return SQUARES * times if square else times


def ratio(rise: Rise) -> float:
    """How many times what it was; of the stable rank, which falls, how many times less."""
    if not (math.isfinite(rise.before) and rise.before > 0):
        return 1.0
    if rise.quantity == "stable_rank":
        return rise.before / rise.after if rise.after > 0 else math.inf
    return rise.after / rise.before if math.isfinite(rise.after) else math.inf
