"""Flags: facts about wrong or unusual weights, with advice; and the standing of each weight.

Flags compare a weight with trained weights of its class (`wellcond.report.usual`), with its
siblings (weights of the same kind in other layers), and with the range of float16. A weight without
a flag can still cause a problem, and a weight with a flag can be sound.

Letters: S (m, n) a weight; sigma_1 >= ... >= sigma_nu its singular values; kappa =
sigma_1/sigma_nu.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from wellcond.report.findings import Finding, Grade, Status
from wellcond.report.layers import places
from wellcond.report.usual import Usual, usual_of
from wellcond.text import format_percent, list_some

KINDS = {
    "not_finite": "NaN or infinity",
    "dominant_entry": "one entry dominates the norm",
    "float16": "entries outside the range of float16",
    "network": "most weights have a smaller stable rank than 95 % of trained weights",
    "siblings": "σ_max is more than ten times the median of its siblings",
    "scale": "σ_max or the gain exceeds that of 99.9 % of trained weights",
    "stable_rank": "the stable rank is smaller than in 99 % of trained weights",
    "zero_rows": "rows or columns are zero",
    "equal_rows": "two rows are equal",
    "rank": "the weight is rank-deficient, or a direction has collapsed",
    "condition_number": "κ exceeds that of 99 % of trained weights",
}
_ORDER = {kind: number for number, kind in enumerate(KINDS)}
# The compared quantities: the symbol, and whether small instead of large values are extreme.
_EXTREMES = {
    "condition_number": ("κ", False),
    "stable_rank": ("stable rank", True),
    "sigma_max": ("σ_max", False),
    "gain": ("gain", False),
}
_FLOAT16_MAX = 65504.0
# Singular values below this fraction of the next larger one have collapsed.
_COLLAPSED = 1e-3
# A larger share of entries that are subnormal or underflow is flagged.
_ENTRIES = 0.01
# If all weights were random, fewer than 1 in 1,000 reports would flag a kappa.
_CHANCE = 0.001
# The numbers of matrices with a shorter side vary too much to be compared.
_LEAST = 8
_SIBLINGS, _TIMES = 4, 10.0
# A network is unusual if more than half of its weights, at least 8, are in the last twentieth.
_WEIGHTS, _TWENTIETH = 8, 0.05
_SHARE, _SCALE_SHARE = 0.99, 0.999
_LEVELS = ((0.001, "0.1 %"), (0.01, "1 %"), (0.05, "5 %"))
# Narrower dtypes are excluded: rounding to them perturbs the small singular values of any weight.
_RANKED = ("float32", "float64", "complex64", "complex128")


@dataclass(frozen=True)
class Flag:
    """A fact about a wrong or unusual weight, with advice.

    Attributes:
        kind: a key of `wellcond.report.flags.KINDS`, which lists the gravest kinds first.
        text: the fact, in words and numbers.
        advice: one sentence of advice.
        page: the section of the documentation about this kind of flag.
    """

    kind: str
    text: str
    advice: str

    @property
    def page(self) -> str:
        return f"symptoms.html#{self.kind.replace('_', '-')}"


class Standing(NamedTuple):
    """The standing of a weight among trained weights of its class.

    Attributes:
        share: the share of trained weights that are at least as extreme, in the quantity in which
            the weight is most extreme, 0 to 1; nan if it is not compared.
        words: "usual", or "σ_max: top 1 %"; "" if it is not compared.
        usual: the class; None if it is not compared.
    """

    share: float
    words: str
    usual: Usual | None


def stand(finding: Finding) -> Standing:
    """Returns the standing of a weight among trained weights of its class."""
    usual, shares = _shares_below(finding)
    extremes = []
    for quantity, share in shares.items():
        symbol, is_low = _EXTREMES[quantity]
        if not math.isnan(share):
            extremes.append(
                (share, f"{symbol}: bottom") if is_low else (1 - share, f"{symbol}: top")
            )
    if usual is None or not extremes or min(finding.shape[-2:]) < _LEAST:
        return Standing(math.nan, "", None)
    share, words = min(extremes)
    level = next((level for limit, level in _LEVELS if share < limit), "")
    return Standing(share, f"{words} {level}" if level else "usual", usual)


def find_flags(findings: Sequence[Finding]) -> dict[str, tuple[Flag, ...]]:
    """Returns the flags of all flagged weights by label, the gravest flag of each first."""
    compared = sum(not math.isnan(finding.exceedance) for finding in findings)
    rare = _CHANCE / max(1, compared)
    medians = _medians_of_siblings(findings)
    found = {}
    network = _find_network(findings)
    for finding in findings:
        flags = [
            *network.get(finding.label, ()),
            *_flags_of_entries(finding),
            *_flags_of_spectrum(finding, finding.exceedance < rare),
            *_flags_of_scale(finding, medians.get(finding.label)),
        ]
        if flags:
            found[finding.label] = tuple(sorted(flags, key=lambda flag: _ORDER[flag.kind]))
    return found


def sort_findings(
    findings: Iterable[Finding], flags: Mapping[str, Sequence[Flag]]
) -> list[Finding]:
    """Returns the findings in the order of a report.

    Failed weights come first, then those without kappa, then flagged weights by their gravest
    flag, then all others by their standing.
    """

    def key(finding: Finding) -> tuple[bool, bool, bool, int, float, float]:
        kappa = finding.condition_number
        own = flags.get(finding.label)
        share = stand(finding).share
        return (
            finding.status is Status.fresh,
            finding.measured,
            not math.isnan(kappa),
            _ORDER[own[0].kind] if own else len(_ORDER),
            1.0 if math.isnan(share) else share,
            -kappa,
        )

    return sorted(findings, key=key)


def _shares_below(finding: Finding) -> tuple[Usual | None, dict[str, float]]:
    """Returns the class of a weight and, for each quantity, the share of the class below it."""
    view = finding.view.partition(":")[0].partition(".")[0]
    if math.isnan(finding.gain) or min(finding.shape[-2:]) < 2 or view in ("delta", "operator"):
        return None, {}
    if finding.status in (Status.zero, Status.fresh) or not finding.measured:
        return None, {}
    usual = usual_of(finding.name, finding.view, finding.shape)
    numbers = {"sigma_max": finding.sigma_max, "gain": finding.gain}
    if min(finding.shape[-2:]) >= _LEAST and not finding.opposite_rows:
        numbers |= {
            "condition_number": finding.condition_number / finding.random_condition_number,
            "stable_rank": finding.stable_rank / finding.random_stable_rank,
        }
    return usual, {key: usual.share_below(key, number) for key, number in numbers.items()}


def _of_class(usual: Usual) -> str:
    return f"trained weights ({usual.name}, n = {usual.count:,})"


# --- entries --------------------------------------------------------------------------------------


def _flags_of_entries(finding: Finding) -> Iterator[Flag]:
    if finding.status is Status.not_finite:
        detail = f": {finding.detail}" if finding.detail else ""
        yield Flag(
            "not_finite",
            f"contains NaN or infinity{detail}",
            "Return to the last finite checkpoint, and inspect the training step after it",
        )
    if finding.dominant_entry:
        where = ", ".join(map(str, finding.dominant_entry))
        yield Flag(
            "dominant_entry",
            f"one entry, {finding.largest_entry:.2g} at ({where}), contributes more than 99.9 % of "
            "‖S‖²",
            "Check the file, the program that wrote it, and the training data",
        )
    facts = []
    if finding.dtype != "float16":
        if finding.largest_entry > _FLOAT16_MAX:
            facts.append(f"the largest entry, {finding.largest_entry:.2g}, overflows in float16")
        if finding.float16_zero_share > _ENTRIES:
            share = format_percent(finding.float16_zero_share)
            facts.append(f"{share} of the entries underflow to zero in float16")
    if finding.subnormal_share > _ENTRIES:
        share = format_percent(finding.subnormal_share)
        dtype = "float32" if finding.parts else finding.dtype  # parts are combined in float32
        facts.append(f"{share} of the entries are subnormal in {dtype}")
    if facts:
        yield Flag(
            "float16", "; ".join(facts), "Store the weight in bfloat16 or float32, or rescale it"
        )
    zeros = _describe_zeros(finding)
    if zeros:
        yield Flag(
            "zero_rows",
            "; ".join(zeros),
            "Check for an unused class, unit or input, or pruning; a repair would fill the zeros",
        )
    if finding.equal_rows:
        first, second = finding.equal_rows
        yield Flag(
            "equal_rows",
            f"rows {first} and {second} are equal",
            "Two units compute the same output: check how they were initialised or copied",
        )


def _describe_zeros(finding: Finding) -> list[str]:
    facts = []
    for kind, zeros in (("row", finding.zero_rows), ("column", finding.zero_columns)):
        if len(zeros) == 1:
            facts.append(f"{kind} {zeros[0]} is zero")
        elif zeros:
            facts.append(f"{len(zeros)} {kind}s are zero: {list_some(map(str, zeros))}")
    return facts


# --- small singular values ------------------------------------------------------------------------


def _flags_of_spectrum(finding: Finding, is_rare: bool) -> Iterator[Flag]:
    """Yields a flag of a rank deficiency or a large kappa.

    It skips weights with opposite rows, as sound heads of two classes have, and weights with a
    dominant entry, next to which all other entries are negligible.
    """
    exempt = finding.dominant_entry or finding.opposite_rows or math.isnan(finding.exceedance)
    if exempt or finding.status in (Status.zero, Status.fresh) or not finding.measured:
        return
    facts = []
    lost = _count_lost(finding)
    if finding.grade is not Grade.bounded and finding.rank < finding.nu - lost and _ranks(finding):
        facts.append(f"rank {finding.rank} of {finding.nu}")
    if is_rare:
        facts += _describe_collapse(finding, lost)
    if facts:
        yield Flag("rank", "; ".join(facts), _advise_repair(finding))
        return
    usual, shares = _shares_below(finding)
    share = shares.get("condition_number", math.nan)
    if usual is not None and is_rare and not lost and share > _SHARE:
        times = finding.condition_number / finding.random_condition_number
        yield Flag(
            "condition_number",
            f"κ = {finding.condition_number:.4g} is {times:.2g} times that of random matrices, "
            f"a larger ratio than in 99 % of {_of_class(usual)}",
            _advise_repair(finding),
        )


def _ranks(finding: Finding) -> bool:
    return bool(finding.parts) or finding.dtype in _RANKED


def _count_lost(finding: Finding) -> int:
    """Returns the number of singular values that are zero because rows or columns are zero."""
    *_, m, n = finding.shape
    return max(len(finding.zero_rows) if m <= n else 0, len(finding.zero_columns) if n <= m else 0)


def _describe_collapse(finding: Finding, lost: int) -> list[str]:
    """Describes the widest gap in the lower half of the singular values, if it is a collapse.

    Zero rows and columns, which cause `lost` zero singular values, do not count.
    """
    below, ratio = finding.gap
    if ratio > _COLLAPSED or below <= lost:
        return []
    how_far = f"{format_digit(ratio)} times the next singular value"
    if below == 1:
        return [f"one direction has collapsed: σ_min is {how_far}"]
    return [f"{below} directions have collapsed, to at most {how_far}"]


def _advise_repair(finding: Finding) -> str:
    """Advises how to raise small singular values, with the change of the weight if it is known."""
    limit = finding.repair_limit
    named = "K" if math.isnan(limit) else f"{limit:.0f}" if limit < 1e4 else format_digit(limit)
    advice = f"Train with `ConditionLimit({named})`"
    # No file contains a merged or computed weight, and a repair would fill zero rows.
    if not finding.stored or finding.with_adapter or _count_lost(finding):
        return advice
    advice += f", or run `wellcond repair --max-condition {named}`"
    if math.isnan(limit):
        return advice
    return (
        f"{advice}, which changes the weight by {format_digit(finding.repair_change)} of its norm"
    )


# --- large singular values ------------------------------------------------------------------------


def _flags_of_scale(finding: Finding, median: float | None) -> Iterator[Flag]:
    """Yields flags of sigma_1, of the gain and of the stable rank."""
    usual, shares = _shares_below(finding)
    if usual is None or finding.dominant_entry:
        return
    if median is not None and finding.sigma_max > _TIMES * median:
        times = finding.sigma_max / median
        yield Flag(
            "siblings",
            f"σ_max = {finding.sigma_max:.4g} is {times:.3g} times the median of its siblings in "
            "other layers",
            _advise_limit(finding, median),
        )
    for symbol, key in (("σ_max", "sigma_max"), ("gain", "gain")):
        if shares[key] > _SCALE_SHARE:
            yield Flag(
                "scale",
                f"{symbol} = {getattr(finding, key):.4g} is larger than in 99.9 % of "
                f"{_of_class(usual)}",
                _advise_limit(finding),
            )
            break
    if shares.get("stable_rank", math.nan) < 1 - _SHARE:
        yield Flag(
            "stable_rank",
            f"{_describe_share(finding)}, a smaller ratio than in 99 % of {_of_class(usual)}",
            _advise_limit(finding, _random_sigma_max(finding)),
        )


def _find_network(findings: Sequence[Finding]) -> dict[str, tuple[Flag, ...]]:
    """Returns a flag if most weights of the network have a small stable rank.

    The flag belongs to the weight with the smallest stable rank relative to random matrices.
    """
    shares = {one.label: _shares_below(one)[1].get("stable_rank", math.nan) for one in findings}
    shares = {label: share for label, share in shares.items() if not math.isnan(share)}
    few = [one for one in findings if shares.get(one.label, 1.0) < _TWENTIETH]
    if len(shares) < _WEIGHTS or 2 * len(few) <= len(shares):
        return {}
    worst = min(few, key=lambda one: one.stable_rank / one.random_stable_rank)
    text = (
        f"{_describe_share(worst)}; {len(few)} of {len(shares)} weights have a smaller stable rank "
        "than 95 % of trained weights"
    )
    return {worst.label: (Flag("network", text, _advise_limit(worst, _random_sigma_max(worst))),)}


def _describe_share(finding: Finding) -> str:
    carried = format_percent(1 / finding.stable_rank)
    return (
        f"σ_max = {finding.sigma_max:.4g} contributes {carried} of ‖S‖² (stable rank "
        f"{finding.stable_rank:.2g}; random matrices: {finding.random_stable_rank:.2g})"
    )


def _random_sigma_max(finding: Finding) -> float:
    """Returns sigma_1 of a random matrix of the same shape and norm."""
    return finding.sigma_max * math.sqrt(finding.stable_rank / finding.random_stable_rank)


def _advise_limit(finding: Finding, upper: float = math.inf) -> str:
    """Advises a bound: `upper`, or the median of trained weights if that is smaller."""
    if finding.with_adapter:
        return "Lower the learning rate or the scale of the adapter, such as lora_alpha"
    usual, _ = _shares_below(finding)
    if usual is not None:
        upper = min(upper, usual.quantile("sigma_max", 0.5))
    return (
        f"If σ_max grew in training, bound it with `SingularValueLimit(upper={upper:.2g})`, or "
        "lower the learning rate"
    )


def _medians_of_siblings(findings: Sequence[Finding]) -> dict[str, float]:
    """Returns the median of sigma_1 over each weight and its siblings, by label.

    Siblings are weights of one kind in at least four layers.
    """
    known = [one for one in findings if one.measured and not math.isnan(one.gain)]
    layers = places([one.label for one in known])
    families: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for one in known:
        place = layers[one.label]
        if place.layer:
            families[place.stack, place.kind].append(one)
    medians: dict[str, float] = {}
    for family in families.values():
        if len({layers[one.label].layer for one in family}) >= _SIBLINGS:
            median = statistics.median(one.sigma_max for one in family)
            medians |= {one.label: median for one in family if median > 0}
    return medians


def format_digit(number: float) -> str:
    """Returns one significant digit, such as "2e-5", "0.02", "10" or "2e4"."""
    return re.sub(r"e([+-])0?", lambda sign: "e" + sign[1].strip("+"), f"{number:.1g}")
