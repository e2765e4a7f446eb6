"""Does what a weight shows early tell how a training ends? Rank correlations over all runs.

Spearman's correlation of a quantity at a tenth of the training with the final score, of which
larger is better. The interval is that of a bootstrap over methods, because the runs of one method
are alike. Within rates means that ranks are taken among the runs of one learning rate, so that the
rate, which sets both, explains nothing.
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
    """Runs of one network on one task: a table of pandas, and the name of its final score.

    The table has the columns method, lr, the score, and those of `QUANTITIES` that were measured.
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
    """Rank correlation with its 95 % interval; nan where fewer than eight runs have both numbers.

    Args:
        x: a number per run.
        y: another.
        methods: the method of each run; the bootstrap draws methods, or, if there is one, runs.
        strata: ranks are taken among the runs of one stratum.
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
    """Of the ranks within layers, each centred and over their number."""
    ranks = numpy.zeros((2, len(x)))
    for layer in numpy.unique(layers):
        rows = layers == layer
        for rank, values in zip(ranks, (x[rows], y[rows]), strict=True):
            rank[rows] = rankdata(values) / len(values)
            rank[rows] -= rank[rows].mean()
    lengths = numpy.sqrt((ranks**2).sum(axis=1))
    return float(ranks[0] @ ranks[1] / lengths.prod()) if lengths.all() else math.nan


def tabulate(cases: Sequence[Case]) -> dict[str, Table]:
    """The tables of the page: over all runs, within rates, and of those with nothing."""
    return {among: list_correlations(cases, among) for among in ("all", "within", "nothing")}


def list_correlations(cases: Sequence[Case], among: str) -> Table:
    """A row per quantity, a column per case.

    Args:
        cases: what was run.
        among: "all" runs, those "within" one learning rate, or those with "nothing".
    """
    rows = [
        [words, *(_describe(_of_case(case, quantity, among)) for case in cases)]
        for quantity, words in QUANTITIES.items()
    ]
    return Table(
        f"Rank correlation with the final score: {among}",
        ["at a tenth of the training", *(case.name for case in cases)],
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
