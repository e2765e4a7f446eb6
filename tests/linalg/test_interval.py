"""Intervals enclose every result, with no more width than rounding requires."""

import math
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from wellcond.linalg.interval import Interval

FINITE = st.floats(allow_nan=False, allow_infinity=False)
# Ends of all signs, often zero and often equal, to reach all cases of a quotient.
ENDS = st.one_of(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 3.0, 5e-324, 1e308]), FINITE)


@st.composite
def intervals(draw: st.DrawFn) -> Interval:
    return Interval(*sorted((draw(ENDS), draw(ENDS))))


def encloses(interval: Interval, x: Fraction) -> bool:
    above = interval.lower == -math.inf or Fraction(interval.lower) <= x
    return above and (interval.upper == math.inf or x <= Fraction(interval.upper))


@given(FINITE, FINITE, st.sampled_from("+-*"))
def test_operations_round_outward(x: float, y: float, operation: str) -> None:
    a, b = Interval(x, x), Interval(y, y)
    result = {"+": a + b, "-": a - b, "*": a * b}[operation]
    exact = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__}[operation]
    assert encloses(result, exact(Fraction(x), Fraction(y)))


@given(st.floats(0, 1e300))
def test_roots_round_outward(x: float) -> None:
    root = Interval(x, x).sqrt()
    assert root.lower <= 0 or Fraction(root.lower) ** 2 <= Fraction(x)
    assert Fraction(x) <= Fraction(root.upper) ** 2


@given(intervals(), intervals(), st.fractions(0, 1), st.fractions(0, 1))
def test_quotients_enclose_all_quotients(
    X: Interval, Y: Interval, s: Fraction, t: Fraction
) -> None:
    """For numbers in both intervals, including the ends, except for a divisor of zero."""
    quotient = X / Y
    numerators, divisors = (
        {(1 - share) * Fraction(Z.lower) + share * Fraction(Z.upper) for share in (0, 1, other)}
        for Z, other in ((X, s), (Y, t))
    )
    for x, y in product(numerators, divisors - {0}):
        assert encloses(quotient, x / y)


@given(intervals(), intervals())
def test_quotients_are_no_wider_than_rounding_makes_them(X: Interval, Y: Interval) -> None:
    """The ends are one float beyond the extreme quotients, which are quotients of ends."""
    assume(Y.lower > 0 or Y.upper < 0)
    ends = [x / y for x in (X.lower, X.upper) for y in (Y.lower, Y.upper)]
    below, above = math.nextafter(min(ends), -math.inf), math.nextafter(max(ends), math.inf)
    assert Interval(below, above) == X / Y


INF = math.inf


@pytest.mark.parametrize(
    ("X", "Y", "quotient"),
    [
        ((-1, 1), (0.5, 2), (-2, 2)),  # not (-0.5, 2)
        ((1, 2), (-1, 1), (-INF, INF)),
        ((1, 2), (0, 1), (1, INF)),
        ((1, 2), (-1, 0), (-INF, -1)),
        ((-2, -1), (0, 1), (-INF, -1)),
        ((-2, -1), (-1, 0), (1, INF)),
        ((-1, 1), (0, 1), (-INF, INF)),
        ((0, 1), (0, 1), (0, INF)),
        ((0, 0), (0, 1), (0, 0)),
        ((1, 2), (0, 0), (-INF, INF)),
        ((0, 0), (0, 0), (-INF, INF)),
        ((1, INF), (1, 2), (0.5, INF)),
        ((1, 2), (1, INF), (0, 2)),
        ((1, INF), (1, INF), (0, INF)),
        ((INF, INF), (INF, INF), (-INF, INF)),
        ((math.nan, math.nan), (0, 1), (-INF, INF)),
        ((1, 2), (math.nan, math.nan), (-INF, INF)),
    ],
)
def test_quotients_by_zero_and_infinity(
    X: tuple[float, float], Y: tuple[float, float], quotient: tuple[float, float]
) -> None:
    found = Interval(*X) / Interval(*Y)
    assert found.lower == math.nextafter(quotient[0], -INF)
    assert found.upper == math.nextafter(quotient[1], INF)
