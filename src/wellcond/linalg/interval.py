"""Interval arithmetic that rounds every operation outward, so that results are enclosures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context


@dataclass(frozen=True)
class Interval:
    """All real numbers from lower to upper, both included; an end may be infinite.

    `in` tests whether a number is in the interval. Sums, differences, products, quotients and
    square roots of intervals enclose all results, because every operation rounds outward.

    Example:
        >>> import wellcond as wc
        >>> 2.0 in wc.Interval(1.5, 2.5)
        True
    """

    lower: float
    upper: float

    def __contains__(self, number: float) -> bool:
        return self.lower <= number <= self.upper

    def __str__(self) -> str:
        """Six digits, rounded outward too."""
        return f"[{_digits(self.lower, ROUND_FLOOR)}, {_digits(self.upper, ROUND_CEILING)}]"

    def __add__(self, other: Interval | float) -> Interval:
        other = as_interval(other)
        return _outward(self.lower + other.lower, self.upper + other.upper)

    def __neg__(self) -> Interval:
        return Interval(-self.upper, -self.lower)

    def __rsub__(self, other: float) -> Interval:
        return as_interval(other) - self

    def __sub__(self, other: Interval | float) -> Interval:
        other = as_interval(other)
        return _outward(self.lower - other.upper, self.upper - other.lower)

    def __mul__(self, other: Interval | float) -> Interval:
        other = as_interval(other)
        corners = [x * y for x in (self.lower, self.upper) for y in (other.lower, other.upper)]
        if any(map(math.isnan, corners)):
            return _ALL
        return _outward(min(corners), max(corners))

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: Interval | float) -> Interval:
        """Division by all numbers of the other interval except zero."""
        other = as_interval(other)
        if other.upper <= 0:
            return -self / -other if other.lower < 0 else _ALL
        if not other.lower >= 0:
            return _ALL
        lower = _quotient(self.lower, other.upper if self.lower >= 0 else other.lower)
        upper = _quotient(self.upper, other.lower if self.upper > 0 else other.upper)
        return _ALL if math.isnan(lower) or math.isnan(upper) else _outward(lower, upper)

    def sqrt(self) -> Interval:
        """The square root of the non-negative part."""
        return _outward(*(math.sqrt(max(end, 0.0)) for end in (self.lower, self.upper)))


_ALL = Interval(-math.inf, math.inf)


def _quotient(x: float, y: float) -> float:
    """x/y for y >= 0; for y = 0 the limit from above."""
    return x / y if y else math.copysign(math.inf, x)


def _digits(x: float, rounding: str) -> str:
    if not math.isfinite(x):
        return str(x)
    return f"{Context(prec=6, rounding=rounding).create_decimal(x):g}"


def as_interval(x: Interval | float) -> Interval:
    return x if isinstance(x, Interval) else Interval(x, x)


def _outward(lower: float, upper: float) -> Interval:
    """One float further on both sides: more than the rounding of one operation."""
    return Interval(math.nextafter(lower, -math.inf), math.nextafter(upper, math.inf))


def ball(radius: Interval) -> Interval:
    return Interval(-radius.upper, radius.upper)
