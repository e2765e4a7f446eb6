"""What is out of the ordinary in a weight, in words: facts, and no promise of accuracy."""

from __future__ import annotations

import math
import re

from wellcond.report.findings import USUAL, Finding
from wellcond.text import format_percent, list_some

# Below, the power of ten of a probability is not sure for narrow shapes.
_NEVER = 1e-9
_FLOAT16_MAX = 65504.0
# So much smaller than the one before, and singular values have collapsed.
_COLLAPSED = 1e-2
# A larger share of entries that a dtype holds badly is said.
_ENTRIES = 0.01


def how_often(share: float) -> str:
    """A probability in words that are short: "1 in 77"."""
    if math.isnan(share):
        return ""
    if share >= USUAL:
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


def facts_of(finding: Finding, rare: bool) -> list[str]:
    """What is out of the ordinary, if anything; `rare` of its kappa."""
    facts = _zeros(finding)
    if finding.dominant_entry:
        where = ", ".join(map(str, finding.dominant_entry))
        facts.append(
            f"one entry, {finding.largest_entry:.2g} at ({where}), holds all of its norm: "
            "look at the file, or at what wrote it"
        )
    if rare:
        often = how_often(finding.exceedance)
        often = f"fewer than 1 in {_one_digit(1 / _NEVER)}" if often == "never" else often
        kappa = f"κ = {finding.condition_number:.4g}"
        facts = [
            f"{often} random matrices of this shape exceed {kappa}",
            *facts,
            *_collapse(finding),
        ]
        if finding.stable_rank < finding.random_stable_rank / 3:
            few = f"{finding.stable_rank:.2g} where they have {finding.random_stable_rank:.2g}"
            facts.append(f"a stable rank of {few}")
    if finding.dtype != "float16":
        if finding.largest_entry > _FLOAT16_MAX:
            facts.append(f"an entry of {finding.largest_entry:.2g} is infinite in float16")
        if finding.float16_zero_share > _ENTRIES:
            share = format_percent(finding.float16_zero_share)
            facts.append(f"{share} of its entries would be zero in float16")
    if finding.subnormal_share > _ENTRIES:
        share = format_percent(finding.subnormal_share)
        dtype = "float32" if finding.parts else finding.dtype  # in which it is built
        facts.append(f"{share} of its entries are subnormal in {dtype}")
    # No file holds a sum, or what is computed. To fill a row gives outputs to a class that never
    # occurs, and beside one huge entry all others are as good as zero.
    stored = finding.stored and not finding.with_adapter
    repairable = rare and stored and not (_lost(finding) or finding.dominant_entry)
    return [*facts, *(_repair(finding) if repairable else [])]


def _zeros(finding: Finding) -> list[str]:
    """Which rows and columns are zero."""
    facts = []
    for kind, zeros in (("row", finding.zero_rows), ("column", finding.zero_columns)):
        if len(zeros) == 1:
            facts.append(f"{kind} {zeros[0]} is zero")
        elif zeros:
            facts.append(f"{len(zeros)} {kind}s are zero: {list_some(map(str, zeros))}")
    return facts


def _lost(finding: Finding) -> int:
    """How many singular values are zero because rows or columns are."""
    *_, m, n = finding.shape
    return max(len(finding.zero_rows) if m <= n else 0, len(finding.zero_columns) if n <= m else 0)


def _collapse(finding: Finding) -> list[str]:
    """The widest gap in the lower half of the singular values, unless zero rows explain it."""
    below, ratio = finding.gap
    if ratio > _COLLAPSED or finding.dominant_entry or below <= _lost(finding):
        return []
    how_far = f"{_one_digit(ratio)} of the next"
    if below == 1:
        return [f"one direction has collapsed: σ_min is {how_far}"]
    return [f"{below} directions have collapsed, to {how_far}"]


def _repair(finding: Finding) -> list[str]:
    """How far off a matrix with a usual kappa is, where all singular values are known."""
    limit = finding.repair_limit
    if math.isnan(limit):
        return []
    named = f"{limit:.0f}" if limit < 1e4 else _one_digit(limit)
    change = _one_digit(finding.repair_change)
    return [f"`repair --max-condition {named}` moves it by {change} of its norm"]
