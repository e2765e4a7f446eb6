"""What the columns of a table say: of the findings of an audit, and of those of two."""

from __future__ import annotations

import math
from collections.abc import Iterable

from wellcond.report.findings import Finding, Grade
from wellcond.report.pairing import Pair
from wellcond.report.unusual import how_often
from wellcond.text import percent

_NUMBERS = ("κ", "random", "σ_max", "σ_min", "stable rank", "rank", "r")
_HEADERS = ("weight", "shape", "dtype", *_NUMBERS, "added", "grade", "κ certified")
WORDS = {
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
    "added": "with an adapter of rank r, how much of the sum of the r largest singular values is "
    "the adapter's, and of how many of them more than half: 30 %, 2 of 8",
    "κ certified": "an interval that holds κ whatever the rounding: [9.82, 9.83]",
}
COMPARED = (
    *("weight", "κ before", "κ after", "after/before"),
    *("σ_max after/before", "σ_min after/before", "shape"),
)
COMPARED_WORDS = {
    "κ before": WORDS["κ"],
    "κ after": "the same of the second checkpoint; - where there is no weight, or no κ",
    "after/before": "their quotient: at 0.5, κ has halved. The largest change comes first; "
    "- where a side has no κ, or but a lower bound",
    "σ_max after/before": "the same quotient of σ_max: κ rises with it",
    "σ_min after/before": "the same quotient of σ_min: κ falls with it",
    "shape": WORDS["shape"],
}


def headers_of(findings: Iterable[Finding]) -> tuple[str, ...]:
    """The columns that a table of these has."""
    findings = list(findings)
    left_out = set()
    if all(finding.certificate is None for finding in findings):
        left_out.add("κ certified")
    if all(math.isnan(finding.added_share) for finding in findings):
        left_out.add("added")
    return tuple(header for header in _HEADERS if header not in left_out)


def cells_of(finding: Finding) -> dict[str, str]:
    """The cells of a finding, by their column."""
    numbers = (finding.condition_number, finding.sigma_max, finding.sigma_min, finding.stable_rank)
    kappa, high, low, stable = (f"{number:.4g}" for number in numbers)
    known, often = finding.measured, how_often(finding.exceedance)
    if finding.grade is Grade.bounded:
        kappa, high, low, known = f"≥{kappa}", f"≥{high}", f"≤{low}", False
    enclosure = str(finding.certificate.condition_number) if finding.certificate else ""
    added = ""
    if not math.isnan(finding.added_share):
        added = f"{percent(finding.added_share)}, {finding.added_new} of {finding.added_of}"
    cells = (
        finding.label,
        "x".join(map(str, finding.shape)),
        finding.dtype,
        *(kappa, often, high, low, stable),
        f"{finding.rank}/{finding.nu}" if known else "-",
        f"{finding.penalty:.3g}",
        added,
        finding.grade.name,
        enclosure,
    )
    return dict(zip(_HEADERS, cells, strict=True))


def cells_of_pair(pair: Pair) -> tuple[str, ...]:
    """The cells of a pair, as `COMPARED` names them."""

    def kappa(side: Finding | None) -> str:
        if side is None or math.isnan(side.condition_number):
            return "-"
        return f"{'≥' * (side.grade is Grade.bounded)}{side.condition_number:.4g}"

    quotients = (
        pair.ratio,
        pair.quotient(lambda finding: finding.sigma_max),
        pair.quotient(lambda finding: finding.sigma_min),
    )
    shapes = ("x".join(map(str, side.shape)) for side in (pair.before, pair.after) if side)
    return (
        pair.label,
        kappa(pair.before),
        kappa(pair.after),
        *("-" if math.isnan(quotient) else f"{quotient:.4g}" for quotient in quotients),
        " → ".join(dict.fromkeys(shapes)),
    )
