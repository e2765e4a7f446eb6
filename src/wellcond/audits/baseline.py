"""An audit held against one of before: which condition numbers have risen.

The one of before is what `wellcond audit --json` printed, a file small enough to keep beside a
model. kappa may be inf, or nan where it is undefined or unknown.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from wellcond.report.findings import Status
from wellcond.report.pairing import pair_names
from wellcond.report.report import AuditReport
from wellcond.text import escape, list_some

_LARGEST = 256 << 20  # bytes; a finding takes some 700


@dataclass(frozen=True)
class Rise:
    """A weight with a larger kappa than before."""

    label: str
    before: float
    after: float


@dataclass(frozen=True)
class BaselineComparison:
    """What became of the weights of a baseline.

    Attributes:
        risen: those whose kappa is more than so many times what it was, the largest rise first.
        missing: those that the audit does not have: nobody knows whether they have risen.
        new: those that only the audit has.
    """

    risen: list[Rise]
    missing: list[str]
    new: list[str]


def read_baseline(path: Path) -> dict[str, float]:
    """The condition numbers of the weights, by their labels.

    Raises:
        ValueError: the file is not what `wellcond audit --json` prints, or a condition
            number in it is below 1.
        FileNotFoundError: it is not there.
        OSError: it cannot be read.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError
        rows = [(f["name"], f["view"], f["condition_number"]) for f in _findings(path)]
        kappas = {f"{n}:{view}" if view else str(n): float(kappa) for n, view, kappa in rows}
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
    for label, kappa in kappas.items():
        if kappa < 1:  # nan is unknown
            raise ValueError(
                f"--baseline must hold condition numbers, which are at least 1, but {path} says "
                f"{kappa:g} of {escape(label)}. Make one from the model as it is to stay."
            )
    return kappas


def _findings(path: Path) -> list[dict[str, str]]:
    document = json.loads(path.read_bytes())
    found: list[dict[str, str]] = document["findings"]
    return found


def compare_with_baseline(
    report: AuditReport, baseline: dict[str, float], factor: float
) -> BaselineComparison:
    """Which kappa are more than factor times what they were; names are paired as by `compare`.

    From a number to inf or nan is a rise without end; what was inf or nan cannot rise, nor has an
    adapter that adds nothing.

    Raises:
        ValueError: they have no weight in common.
    """
    now = {finding.label: finding.condition_number for finding in report.findings}
    names = [(old, new) for _, old, new in pair_names(baseline, now).paired]
    if not names:
        raise ValueError(
            f"--baseline must name weights of {report.source}, but names none of them: it has "
            f"{list_some(baseline, limit=3)}, and not {list_some(now, limit=3)}."
        )
    fresh = {finding.label for finding in report.findings if finding.status is Status.fresh}
    rises = [Rise(new, baseline[old], now[new]) for old, new in names if new not in fresh]
    risen = [rise for rise in rises if ratio(rise) > factor]
    risen.sort(key=ratio, reverse=True)
    paired_old, paired_new = map(set, zip(*names, strict=True))
    missing = [label for label in baseline if label not in paired_old]
    return BaselineComparison(risen, missing, [label for label in now if label not in paired_new])


def ratio(rise: Rise) -> float:
    """How many times what it was."""
    if not math.isfinite(rise.before):
        return 1.0
    return rise.after / rise.before if math.isfinite(rise.after) else math.inf
