"""One weight in a report: a row of text for tables and pages, a record of numbers for CSV."""

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
        key: the name in code, and the key in `Row.cells`.
        header: the displayed name.
        text: returns the cell of a finding or of a pair.
        is_text: whether it contains words, which are aligned to the left.
        is_optional: whether it is omitted if all its cells are empty.
        leads: whether it is among the first columns of a page, which narrow screens show first.
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
        id: the unique id on the page, used by links.
        label: the name of the weight.
        cells: the text of each column, by the key of the column.
        condition_numbers: the condition numbers by the keys of their columns; nan if unknown.
        exceeds: the keys of the condition numbers above the limit.
        value: the number that a map shows as a color: the condition number, or the movement, -inf
            where κ became finite; nan if it is unknown.
        summary: the value in words.
        symbol: the symbol in the cell of a map, or "".
        note: further information, or "".
        is_wrong: whether the status of the weight is not "ok".
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
    """Returns the shape as "768x3072"."""
    return "x".join(map(str, shape))


def visible_columns(columns: Sequence[Column[_T]], rows: Collection[Row]) -> list[Column[_T]]:
    """Returns the columns without optional ones that are empty in all rows."""
    return [c for c in columns if not c.is_optional or any(row.cells[c.key] for row in rows)]


# --- audits ---------------------------------------------------------------------------------------


def _number(finding: Finding, number: float, sign: str) -> str:
    """Returns four digits, preceded by the sign if the number is a bound."""
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
    "label": "the name of the parameter; after a colon, the matrix within the parameter",
    "shape": "m x n, outputs and inputs; g x m x n for a convolution in g groups",
    "dtype": "the stored dtype, or float64 for a sum with an adapter, which no file contains; all "
    "numbers are computed in float64",
    "condition_number": "σ_max/σ_min, the condition number: at 1e4 the matrix amplifies one "
    "direction 1e4 times as much as another; at inf it maps a direction to zero",
    "standing": "the position among trained weights of its class, in the quantity in which the "
    'weight is most extreme: "usual", or "σ_max: top 1 %". κ and the stable rank are first divided '
    f"by those of random matrices of the same shape ({COHORT}). The column shows how unusual a "
    "weight is; it does not predict accuracy. Empty for heads, vectors and convolutions as linear "
    "operators",
    "sigma_max": "the largest singular value, the spectral norm",
    "sigma_min": "the smallest of the min(m, n) singular values",
    "stable_rank": "‖S‖²/σ_max² (Frobenius norm), from 1 to min(m, n): roughly the number of "
    "directions that make up the norm. Random matrices have about m n/(√m + √n)²: 192 at 768 x 768",
    "rank": "the number of singular values that are too large to be an effect of rounding the "
    "entries to their dtype: at 760/768, eight might be only rounding noise, and so might κ",
    "penalty": "the penalty ½ σ_max² − ‖S‖²/(2 min(m, n)), 0 if all singular values are equal",
    "added": "for an adapter of rank r, its share in the sum of the r largest singular values, and "
    "how many of these come more than half from it: 30 %, 2 of 8. A new adapter has 0 %. Above "
    "50 %, the adapter determines most of what the weight amplifies most. This is not a verdict: "
    "43 good adapters of small networks had from 2 % to nearly 100 %",
    "grade": f"the reliability of the numbers. {_GRADES}",
    "certificate": "an interval that contains κ regardless of rounding errors: [9.82, 9.83]",
    "delta": "‖Δ‖/‖W‖ (Frobenius norm): the size of the change by the adapter relative to the "
    "weight. The median over the weights was at most 3.2 in 43 good adapters of small networks",
    "directions": "‖Δ‖²/σ_max(Δ)², the number of directions that the adapter uses, of its maximum",
    "base": "κ of the weight without its adapter",
    "rounded": "κ after the sum is rounded to the dtype of the weight, as in a merge",
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
    """Returns the row of the `number`-th finding of a report."""
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
    """Returns the numbers of a finding as in its JSON, without lists, and always all keys."""
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
    """Returns the quantity that moved most, and its factor: "σ_max ×20"."""
    key = pair.moved
    ratio = pair.quotient(attrgetter(key)) if key else math.nan
    return f"{QUANTITIES[key]} ×{ratio:.3g}" if 0 < ratio < math.inf else QUANTITIES.get(key, "")


def _movement(pair: Pair) -> str:
    return "-" if math.isnan(pair.ratio) else f"{pair.movement:.3g}"


def _both(pair: Pair, key: str, sign: str = "") -> str:
    """Returns the number before and after: "0.67 → 13.3"."""
    sides = (pair.before, pair.after)
    numbers = [getattr(side, key) if side else math.nan for side in sides]
    bounds = [sign if side and side.grade is Grade.bounded else "" for side in sides]
    shown = zip(bounds, numbers, strict=True)
    return " → ".join("-" if math.isnan(one) else f"{bound}{one:.3g}" for bound, one in shown)


def _relative(pair: Pair) -> str:
    relative = pair.change.relative if pair.change else math.nan
    return "" if math.isnan(relative) else f"{relative:.3g}"


def _sqnr(pair: Pair) -> str:
    """Returns the SQNR if the storage differs; otherwise it only repeats the relative change."""
    if not pair.change or math.isnan(pair.change.sqnr):
        return ""
    return f"{pair.change.sqnr:.1f}" if pair.is_stored_differently else ""


def _leading(pair: Pair) -> str:
    """Returns the share, and that of a random change: "40 % (28 %)"."""
    change = pair.change
    if change is None or math.isnan(change.leading_share):
        return ""
    return f"{format_percent(change.leading_share)} ({format_percent(change.random_share)})"


def _round_angle(degrees: float) -> float:
    """Returns 0 for angles that can result from rounding errors of float64."""
    return degrees if degrees > 1e-5 else 0.0


def _turns(pair: Pair) -> str:
    """Returns the leading and trailing angle, and that of random spans: "12°, 40° (58°)"."""
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
    "moved": "which of σ_max, the stable rank and κ moved most relative to its usual spread, and "
    "the factor after/before: at ×0.5 it halved",
    "movement": "the size of that change: |log(after/before)| over the usual spread between two "
    "trainings of a network. The spread is log 1.16 (one standard deviation), and log 2.5 for κ of "
    f"weights whose sides are within a factor of 1.2. Two trainings usually differ by up to "
    f'{USUAL:g}. The largest movement comes first. "-": a side has no κ, or only a lower bound',
    "before": MEANINGS["condition_number"],
    "after": 'the same for the second checkpoint; "-": the weight or its κ is missing',
    "sigma_max": f"before and after: {MEANINGS['sigma_max']}",
    "stable_rank": f"before and after: {MEANINGS['stable_rank']}",
    "relative": "the norm of the change over the norm of the weight before (Frobenius norms)",
    "sqnr": "the signal-to-quantization-noise ratio, 20 log10(‖W‖/‖ΔW‖) in decibels, if the two "
    "sides are stored differently; 6 dB correspond to one bit",
    "leading_share": "the share of ‖ΔW‖² in the k leading output directions before; k is the "
    "stable rank rounded up, at most 32. In brackets, k/m: the share of a random change of m rows",
    "turns": "the angles by which the k leading and the k last input directions turned, as the "
    "root-mean-square principal angle arccos √(mean cos² θ_i). If one of ten directions turns by "
    "90°, the angle is 18°; if five turn, it is 45°. In brackets, the angle of two random spans of "
    'k of n inputs: arccos √(k/n). "-": singular values at the edge are equal up to rounding',
    "shape": MEANINGS["shape"],
}


def row_of_pair(pair: Pair, note: str, number: int, max_condition: float | None) -> Row:
    """Returns the row of the `number`-th pair of a comparison."""
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
    """Returns the numbers of both sides, their ratio and the note; None for a missing side."""
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
