"""One weight in a report: a row of text for tables and pages, and a record of numbers for CSV."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, Generic, TypeVar

from wellcond.report.findings import Finding, Grade, Status
from wellcond.report.flags import stand
from wellcond.report.pairing import QUANTITIES, USUAL, Change, Pair
from wellcond.report.usual import COHORT
from wellcond.text import format_percent

MARK = "▲"
_T = TypeVar("_T")
_SIDE = (
    "condition_number",
    "sigma_max",
    "sigma_min",
    "stable_rank",
    "rank",
    "grade",
    "status",
    "dtype",
)
_CHANGE = [one.name for one in fields(Change) if one.name != "reasons"]
_ENCLOSED = ("sigma_max", "sigma_min", "condition_number")


@dataclass(frozen=True)
class Column(Generic[_T]):
    """A column of a table.

    Attributes:
        key: its name in code, and its key in `Row.cells`.
        header: its name for the reader.
        text: returns the cell of a finding or of a pair.
        is_text: whether it holds words, which are aligned to the left.
        is_optional: whether it is left out if all its cells are empty.
        leads: whether it is among the first columns of a page, because a phone shows these first.
    """

    key: str
    header: str
    text: Callable[[_T], str]
    is_text: bool = False
    is_optional: bool = False
    leads: bool = False


@dataclass(frozen=True)
class Row:
    """One weight of an audit, or of a comparison.

    Attributes:
        id: unique on its page; links lead to it.
        label: the name of the weight.
        cells: the text of each column, by the key of the column.
        condition_numbers: by the keys of their columns; nan where there is none.
        exceeds: the keys of the condition numbers above the limit.
        value: the number that a map shows as a color: the condition number, or the movement, -inf
            where κ is infinite no more; nan if it is not known.
        summary: the value in words.
        symbol: what a cell of a map shows in addition to the color; "" if nothing.
        note: what else there is to know; "" if nothing.
        is_wrong: whether something is the matter with the weight.
    """

    id: str
    label: str
    cells: dict[str, str]
    condition_numbers: dict[str, float]
    exceeds: tuple[str, ...]
    value: float
    summary: str
    symbol: str
    note: str
    is_wrong: bool


def format_shape(shape: Sequence[int]) -> str:
    """As "768x3072"."""
    return "x".join(map(str, shape))


def visible_columns(columns: Sequence[Column[_T]], rows: Collection[Row]) -> list[Column[_T]]:
    """The columns without the optional ones that are empty in all rows."""
    return [c for c in columns if not c.is_optional or any(row.cells[c.key] for row in rows)]


# --- audits ---------------------------------------------------------------------------------------


def _number(finding: Finding, number: float, sign: str) -> str:
    """Four digits, after the sign if the number is a bound."""
    return f"{sign if finding.grade is Grade.bounded else ''}{number:.4g}"


def _kappa(finding: Finding) -> str:
    return _number(finding, finding.condition_number, "≥")


def _rank(finding: Finding) -> str:
    known = finding.measured and finding.grade is not Grade.bounded
    return f"{finding.rank}/{finding.nu}" if known else "-"


def _enclosure(finding: Finding) -> str:
    return str(finding.certificate.condition_number) if finding.certificate else ""


def _added(finding: Finding) -> str:
    if math.isnan(finding.added_share):
        return ""
    return f"{format_percent(finding.added_share)}, {finding.added_new} of {finding.added_of}"


def _delta(finding: Finding) -> str:
    return "" if math.isnan(finding.delta_share) else format_percent(finding.delta_share)


def _directions(finding: Finding) -> str:
    if math.isnan(finding.delta_stable_rank):
        return ""
    return f"{finding.delta_stable_rank:.2g} of {finding.delta_rank}"


def _kappa_or_nothing(kappa: float) -> str:
    return "" if math.isnan(kappa) else f"{kappa:.4g}"


_GRADES = "; ".join(f'"{grade.name}": {grade.value}' for grade in Grade)
MEANINGS = {
    "label": "its name; after a colon, which matrix of the parameter",
    "shape": "m x n, outputs and inputs; g x m x n for a convolution in g groups",
    "dtype": "in which it is stored; all is computed in float64",
    "condition_number": "σ_max/σ_min, the condition number: at 1e4 the matrix stretches one "
    "direction 1e4 times as much as another; at inf it loses one",
    "standing": "where it stands among trained weights of its class, in the quantity in which it "
    'is most extreme: "usual", or "σ_max: top 1 %"; κ and the stable rank are divided by those of '
    f"random matrices of the shape first ({COHORT}). It says how unusual a weight is, and nothing "
    "about accuracy. Empty of heads, vectors and convolutions as they act",
    "sigma_max": "the largest singular value, the spectral norm",
    "sigma_min": "the smallest of the min(m, n) singular values",
    "stable_rank": "‖S‖²/σ_max² (Frobenius norm), from 1 to min(m, n): how many directions carry "
    "the weight. Random matrices have about m n/(√m + √n)²: 192 at 768 x 768",
    "rank": "how many singular values no rounding of the entries to their dtype could have made: "
    "at 760/768, eight may be noise of that rounding, and κ with them",
    "penalty": "the penalty ½ σ_max² − ‖S‖²/(2 min(m, n)), 0 where all singular values are equal",
    "added": "with an adapter of rank r, how much of the sum of the r largest singular values is "
    "the adapter's, and of how many of them more than half: 30 %, 2 of 8. One that has just been "
    "made has 0 %; above a half it decides what the weight amplifies most. No verdict: 43 "
    "good adapters of small networks had from 2 % to nearly all",
    "grade": f"how far the numbers can be trusted. {_GRADES}",
    "certificate": "an interval that holds κ whatever the rounding: [9.82, 9.83]",
    "delta": "‖Δ‖/‖W‖ (Frobenius norm): how large what the adapter adds is beside the weight; of "
    "43 good adapters of small networks none had a median over its weights beyond 3.2",
    "directions": "‖Δ‖²/σ_max(Δ)², how many directions the adapter uses, of as many as it can",
    "base": "κ of the weight without its adapter",
    "rounded": "κ once the sum is rounded to the dtype of the weight, as by a merge",
}
COLUMNS: tuple[Column[Finding], ...] = (
    Column("label", "weight", lambda one: one.label, is_text=True, leads=True),
    Column("shape", "shape", lambda one: format_shape(one.shape)),
    Column("dtype", "dtype", lambda one: one.dtype, is_text=True),
    Column("condition_number", "κ", _kappa, leads=True),
    Column("standing", "among trained", lambda one: stand(one).words, leads=True),
    Column("sigma_max", "σ_max", lambda one: _number(one, one.sigma_max, "≥")),
    Column("sigma_min", "σ_min", lambda one: _number(one, one.sigma_min, "≤")),
    Column("stable_rank", "stable rank", lambda one: f"{one.stable_rank:.4g}"),
    Column("rank", "rank", _rank),
    Column("penalty", "r", lambda one: f"{one.penalty:.3g}"),
    Column("added", "added", _added, is_optional=True),
    Column("grade", "grade", lambda one: one.grade.name, is_text=True),
    Column("certificate", "κ certified", _enclosure, is_optional=True),
    Column("delta", "‖Δ‖/‖W‖", _delta, is_optional=True),
    Column("directions", "directions", _directions, is_optional=True),
    Column(
        "base",
        "κ before",
        lambda one: _kappa_or_nothing(one.base_condition_number),
        is_optional=True,
    ),
    Column(
        "rounded",
        "κ rounded",
        lambda one: _kappa_or_nothing(one.rounded_condition_number),
        is_optional=True,
    ),
)


def row_of_finding(finding: Finding, number: int, max_condition: float | None) -> Row:
    """The row of a finding, which is the `number`-th of its report."""
    kappa = finding.condition_number
    exceeds = _exceeds(finding, max_condition)
    if not math.isfinite(kappa):
        symbol = "?" if math.isnan(kappa) else "∞"
    elif exceeds:
        symbol = MARK
    else:
        symbol = "≥" if finding.grade is Grade.bounded else ""
    return Row(
        id=f"w{number}",
        label=finding.label,
        cells={column.key: column.text(finding) for column in COLUMNS},
        condition_numbers={"condition_number": kappa},
        exceeds=("condition_number",) if exceeds else (),
        value=kappa,
        summary=finding.explanation if math.isnan(kappa) else f"κ = {_kappa(finding)}",
        symbol=symbol,
        note=finding.explanation,
        is_wrong=finding.status is not Status.ok,
    )


def record_of_finding(finding: Finding) -> dict[str, Any]:
    """The numbers of a finding as in its JSON, without lists; all keys are always there."""
    record = finding.to_dict()
    enclosures = record.pop("certificate", {})
    record["shape"] = format_shape(finding.shape)
    for key in _ENCLOSED:
        record[f"{key}_lower"], record[f"{key}_upper"] = enclosures.get(key, (None, None))
    return record


# --- comparisons ----------------------------------------------------------------------------------


def _kappa_of_side(side: Finding | None) -> str:
    return "-" if side is None or math.isnan(side.condition_number) else _kappa(side)


def _shapes(pair: Pair) -> str:
    shapes = (format_shape(side.shape) for side in (pair.before, pair.after) if side)
    return " → ".join(dict.fromkeys(shapes))


def _moved(pair: Pair) -> str:
    """As "σ_max ×20": what moved most, and how far."""
    key = pair.moved
    ratio = pair.quotient(attrgetter(key)) if key else math.nan
    return f"{QUANTITIES[key]} ×{ratio:.3g}" if 0 < ratio < math.inf else QUANTITIES.get(key, "")


def _movement(pair: Pair) -> str:
    return "-" if math.isnan(pair.ratio) else f"{pair.movement:.3g}"


def _both(pair: Pair, key: str, sign: str = "") -> str:
    """The number before and after, as "0.67 → 13.3"."""
    sides = (pair.before, pair.after)
    numbers = [getattr(side, key) if side else math.nan for side in sides]
    bounds = [sign if side and side.grade is Grade.bounded else "" for side in sides]
    shown = zip(bounds, numbers, strict=True)
    return " → ".join("-" if math.isnan(one) else f"{bound}{one:.3g}" for bound, one in shown)


def _relative(pair: Pair) -> str:
    relative = pair.change.relative if pair.change else math.nan
    return "" if math.isnan(relative) else f"{relative:.3g}"


def _sqnr(pair: Pair) -> str:
    """Only where a side is stored otherwise: of a training it is the relative change again."""
    old, new, change = pair.before, pair.after, pair.change
    if not (old and new and change) or math.isnan(change.sqnr):
        return ""
    return f"{change.sqnr:.1f}" if old.dtype != new.dtype or old.parts != new.parts else ""


def _leading(pair: Pair) -> str:
    """As "40 % (28 %)": the share, and that of a random change."""
    change = pair.change
    if change is None or math.isnan(change.leading_share):
        return ""
    return f"{format_percent(change.leading_share)} ({format_percent(change.random_share)})"


def _round_angle(degrees: float) -> float:
    """Without what rounding errors of float64 make of no angle at all."""
    return degrees if degrees > 1e-5 else 0.0


def _turns(pair: Pair) -> str:
    """As "12°, 40° (58°)": leading, trailing, and what random spans have."""
    change = pair.change
    turns = (change.leading_turn, change.trailing_turn) if change else ()
    known = ["-" if math.isnan(turn) else f"{_round_angle(turn):.2g}°" for turn in turns]
    if change is None or set(known) <= {"-"}:
        return ""
    return f"{', '.join(known)} ({change.random_turn:.2g}°)"


PAIR_COLUMNS: tuple[Column[Pair], ...] = (
    Column("label", "weight", lambda pair: pair.label, is_text=True),
    Column("moved", "moved most", _moved),
    Column("movement", "movement", _movement),
    Column("before", "κ before", lambda pair: _kappa_of_side(pair.before)),
    Column("after", "κ after", lambda pair: _kappa_of_side(pair.after)),
    Column("sigma_max", "σ_max", lambda pair: _both(pair, "sigma_max", "≥")),
    Column("stable_rank", "stable rank", lambda pair: _both(pair, "stable_rank")),
    Column("relative", "‖ΔW‖/‖W‖", _relative, is_optional=True),
    Column("sqnr", "SQNR dB", _sqnr, is_optional=True),
    Column("leading_share", "ΔW in leading", _leading, is_optional=True),
    Column("turns", "turned", _turns, is_optional=True),
    Column("shape", "shape", _shapes),
)
PAIR_MEANINGS = {
    "moved": "which of σ_max, the stable rank and κ has moved most for its usual spread, and to "
    "how many times what it was: at ×0.5 it has halved",
    "movement": "how far that moved, |log(after/before)|, over its usual spread from one training "
    "to another: the logarithm of 1.16 (one standard deviation), for κ of weights whose sides are "
    f"within a factor of 1.2 that of 2.5. Up to {USUAL:g} is as from one training to "
    "another; what moved most comes first. - where a side has no κ, or only a lower bound",
    "before": MEANINGS["condition_number"],
    "after": "the same of the second checkpoint; - where there is no weight, or no κ",
    "sigma_max": f"before and after: {MEANINGS['sigma_max']}",
    "stable_rank": f"before and after: {MEANINGS['stable_rank']}",
    "relative": "the change of the weight over the weight before, both as Frobenius norms",
    "sqnr": "the signal-to-quantization-noise ratio, 20 log10(‖W‖/‖ΔW‖) in decibels, where a side "
    "is stored in another way; 6 dB are one bit",
    "leading_share": "how much of ‖ΔW‖² lies in the k leading directions of the outputs before; "
    "k is the stable rank rounded up, at most 32. In brackets what a random change of m rows has "
    "there, k/m",
    "turns": "by which angle the k leading directions of the inputs turned, and the k last ones: "
    "the root-mean-square principal angle, arccos √(mean cos² θ_i). One of ten directions that "
    "turns by 90° makes 18°, five make 45°. In brackets what two random spans of k of n inputs "
    "have, arccos √(k/n). - where singular values at the edge are equal to rounding",
    "shape": MEANINGS["shape"],
}


def row_of_pair(pair: Pair, note: str, number: int, max_condition: float | None) -> Row:
    """The row of a pair, which is the `number`-th of its comparison."""
    sides = {"before": pair.before, "after": pair.after}
    cells = {column.key: column.text(pair) for column in PAIR_COLUMNS}
    exceeds = tuple(key for key, side in sides.items() if _exceeds(side, max_condition))
    ratio, value = pair.ratio, pair.movement
    if pair.before is None or pair.after is None:
        symbol = "+" if pair.before is None else "−"
    elif math.isnan(ratio):
        symbol = "?"
    elif ratio in (0, math.inf):
        symbol, value = ("∞", math.inf) if ratio else ("↓", -math.inf)
    else:
        symbol = MARK if "after" in exceeds else ""
    if math.isnan(ratio):
        value, summary = math.nan, f"κ {cells['before']} → {cells['after']}"
    elif pair.moved:
        summary = f"{cells['moved']}, movement {cells['movement']}"
    else:
        summary = "moved by less than 1 %"
    return Row(
        id=f"w{number}",
        label=pair.label,
        cells=cells,
        condition_numbers={
            key: side.condition_number if side else math.nan for key, side in sides.items()
        },
        exceeds=exceeds,
        value=value,
        summary=summary,
        symbol=symbol,
        note=note,
        is_wrong=any(side and side.status is not Status.ok for side in sides.values()),
    )


def record_of_pair(pair: Pair, note: str) -> dict[str, Any]:
    """The numbers of both sides, their ratio and the note; None where a side is missing."""
    record: dict[str, Any] = {"weight": pair.label}
    for when, side in (("before", pair.before), ("after", pair.after)):
        numbers = side.to_dict() if side else {}
        record |= {f"{key}_{when}": numbers.get(key) for key in _SIDE}
        record[f"shape_{when}"] = format_shape(side.shape) if side else None
    record["ratio"] = pair.ratio if pair.before and pair.after else None
    record |= {"moved": pair.moved, "movement": pair.movement}
    record |= {key: getattr(pair.change, key, None) for key in _CHANGE}
    return record | {"note": note}


def _exceeds(finding: Finding | None, max_condition: float | None) -> bool:
    return finding is not None and max_condition is not None and finding.exceeds(max_condition)
