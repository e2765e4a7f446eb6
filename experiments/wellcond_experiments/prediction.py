"""Do the weights show early how a training ends? Rank correlations over all runs.

Spearman's correlation of a quantity after 10 % of the training with the final score (larger is
better). The interval comes from a bootstrap over methods, because the runs of one method are
similar. "Within rates" ranks runs only among runs with the same learning rate. This removes the
correlation that the learning rate causes by affecting both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy
from scipy.stats import rankdata

from wellcond_experiments.early import QUANTITIES
from wellcond_experiments.tables import Band, Table

RESAMPLES = 1000


class Case(NamedTuple):
    """Runs of one network on one task: a pandas table, and the column of the final score.

    The table has the columns method, lr, the score, and the `QUANTITIES` that were measured.
    """

    name: str
    runs: Any
    score: str


def correlate(
    x: Sequence[float],
    y: Sequence[float],
    methods: Sequence[str],
    strata: Sequence[float] | None = None,
) -> Band:
    """Returns the rank correlation with its 95 % interval; nan for fewer than eight valid runs.

    Args:
        x: one number per run.
        y: another number per run.
        methods: the method of each run. The bootstrap draws methods, or runs if there is only one
            method.
        strata: the stratum of each run. Runs are ranked within their stratum.
    """
    x, y = numpy.asarray(x, float), numpy.asarray(y, float)
    known = ~(numpy.isnan(x) | numpy.isnan(y))
    x, y = x[known], y[known]
    if len(x) < 8:
        return Band(math.nan, math.nan, math.nan)
    groups = numpy.asarray(methods)[known]
    if len(set(groups)) == 1:
        groups = numpy.arange(len(x))
    layers = numpy.zeros(len(x)) if strata is None else numpy.asarray(strata)[known]
    members = [numpy.flatnonzero(groups == name) for name in dict.fromkeys(groups.tolist())]
    found = _correlation(x, y, layers)
    if math.isnan(found):  # all numbers are equal
        return Band(found, found, found)
    source = numpy.random.default_rng(0)
    draws = []
    for _ in range(RESAMPLES):
        chosen = source.integers(len(members), size=len(members))
        rows = numpy.concatenate([members[i] for i in chosen])
        draws.append(_correlation(x[rows], y[rows], layers[rows]))
    low, high = numpy.nanquantile(draws, (0.025, 0.975))
    return Band(found, float(low), float(high))


def _correlation(x: Any, y: Any, layers: Any) -> float:
    """Returns the correlation of the ranks within layers, centred and divided by their number."""
    ranks = numpy.zeros((2, len(x)))
    for layer in numpy.unique(layers):
        rows = layers == layer
        for rank, values in zip(ranks, (x[rows], y[rows]), strict=True):
            rank[rows] = rankdata(values) / len(values)
            rank[rows] -= rank[rows].mean()
    lengths = numpy.sqrt((ranks**2).sum(axis=1))
    return float(ranks[0] @ ranks[1] / lengths.prod()) if lengths.all() else math.nan


def tabulate(cases: Sequence[Case]) -> dict[str, Table]:
    """Returns the tables of the page: all runs, within rates, and the baseline only."""
    return {among: list_correlations(cases, among) for among in ("all", "within", "nothing")}


def list_correlations(cases: Sequence[Case], among: str) -> Table:
    """Returns a table with one row per quantity and one column per case.

    Args:
        cases: the cases.
        among: "all" runs, "within" for ranks within one learning rate, or "nothing" for the runs
            of the baseline.
    """
    rows = [
        [words, *(_describe(_of_case(case, quantity, among)) for case in cases)]
        for quantity, words in QUANTITIES.items()
    ]
    return Table(
        f"Rank correlation with the final score: {among}",
        ["after 10 % of the training", *(case.name for case in cases)],
        rows,
    )


def _of_case(case: Case, quantity: str, among: str) -> Band:
    runs = case.runs[case.runs["method"] == "none"] if among == "nothing" else case.runs
    if quantity not in runs:
        return Band(math.nan, math.nan, math.nan)
    rates = list(runs["lr"]) if among == "within" else None
    return correlate(list(runs[quantity]), list(runs[case.score]), list(runs["method"]), rates)


def _describe(band: Band) -> str:
    if math.isnan(band.mean):
        return ""
    return f"{band.mean:+.2f} [{band.low:+.2f}, {band.high:+.2f}]"
