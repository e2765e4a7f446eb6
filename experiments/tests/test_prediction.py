"""Rank correlations: agreement with scipy, strata by rate, and intervals."""

import math

import numpy
import pandas
import pytest
from scipy.stats import spearmanr

from wellcond_experiments.early import QUANTITIES
from wellcond_experiments.prediction import Case, correlate, list_correlations

METHODS = [name for name in "abcdefgh" for _ in range(6)]
RATES = [0.1, 0.2, 0.3] * 16


def draw(seed: int) -> numpy.ndarray:
    return numpy.random.default_rng(seed).standard_normal(48)


def test_the_correlation_is_spearmans() -> None:
    x, y = draw(0), draw(1) + draw(0)
    band = correlate(x, y, METHODS)
    assert band.mean == pytest.approx(spearmanr(x, y).statistic)
    assert band.low < band.mean < band.high
    assert correlate(numpy.exp(x), y**3, METHODS) == band  # only the order counts


def test_equal_order_has_correlation_one() -> None:
    x = draw(2)
    assert correlate(x, numpy.exp(x), METHODS) == pytest.approx((1, 1, 1, False))
    assert correlate(x, -x, METHODS, RATES).mean == pytest.approx(-1)


def test_strata_remove_the_effect_of_the_rate() -> None:
    rates = numpy.asarray(RATES)
    x, y = rates + 1e-3 * draw(3), -rates + 1e-3 * draw(4)
    assert correlate(x, y, METHODS).mean < -0.8
    band = correlate(x, y, METHODS, RATES)
    assert band.low < 0 < band.high


def test_nan_runs_are_ignored_and_few_runs_give_nan() -> None:
    x, y = draw(5), draw(6)
    x[:8] = math.nan
    known = correlate(x[8:], y[8:], METHODS[8:])
    assert correlate(x, y, METHODS).mean == known.mean
    assert math.isnan(correlate(x[:15], y[:15], METHODS[:15]).mean)
    assert math.isnan(correlate([1.0] * 48, y, METHODS).mean)


def test_interval_is_wider_if_runs_of_a_method_are_similar() -> None:
    x = numpy.repeat(draw(7)[:8], 6) + 1e-6 * draw(8)
    y = numpy.repeat(draw(9)[:8], 6) + 1e-6 * draw(10)
    alike, apart = correlate(x, y, METHODS), correlate(x, y, [str(i) for i in range(48)])
    assert alike.high - alike.low > 1.5 * (apart.high - apart.low)


def test_table_has_a_row_per_quantity_and_empty_cells_without_data() -> None:
    x = draw(11)
    runs = pandas.DataFrame({"method": ["none"] * 24 + ["l2"] * 24, "lr": RATES})
    runs = runs.assign(early_sigma=x, accuracy=-x)
    for among in ("all", "within", "nothing"):
        table = list_correlations([Case("a net", runs, "accuracy")], among)
        assert len(table.rows) == len(QUANTITIES)
        rows = dict(table.rows)
        assert rows[QUANTITIES["early_sigma"]] == "-1.00 [-1.00, -1.00]"
        assert rows[QUANTITIES["early_kappa"]] == ""
