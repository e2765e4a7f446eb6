"""Condition numbers and stable ranks of matrices with independent Gaussian entries.

The distribution of kappa for any shape has two parts. First, the smallest eigenvalue lambda_n of
S^T S: the joint density of all eigenvalues, integrated over all but one with signs instead of
absolute values, is the derivative of P(an odd number of eigenvalues is below t). It is known
exactly, because the mean of det(W - t I) over Wishart matrices W is a Laguerre polynomial:

    A t^(k/2 - 1) exp(-t/2) L(t)/L(0),  L = L_(n-1)^(m-n),  k = m - n + 1,
    A = n 2^(k/2 - 2) Gamma((m + 1)/2)/(Gamma(k) Gamma(1 + n/2)).

Eigenvalues repel each other, so in the tail an odd number means one. Second, the largest eigenvalue
is nearly independent of the smallest. It follows the Tracy-Widom law around (sqrt(m) + sqrt(n))^2
(Johnstone 2001), approximated by the shifted gamma law of Chiani (2014). For a small lambda_n, its
law is that of an (m + 1, n - 1) matrix (Edelman and Sutton 2005, "Tails of condition number
distributions"). For large square matrices this is Edelman's P(kappa > x n) = 1 - exp(-2/x - 2/x^2)
(1988). The tail is a constant times x^-k and is within the bounds of Chen and Dongarra (2005,
"Condition numbers of Gaussian random matrices").

Letters: m >= n the sides of the shape; k = m - n + 1; t = v^2 an eigenvalue of S^T S.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# The Tracy-Widom law of order 1 as a gamma law: shape, scale, shift (Chiani 2014, table I).
_TRACY_WIDOM = (46.446, 0.186054, 9.84801)
_NODES = 81
_COARSE, _FINE = 64, 512
# Tables begin at this logarithm of a probability; below it only the power of t matters.
_FAR = -45.0


def exceedance(shape: Sequence[int], condition_number: float) -> float:
    """P(kappa > x) for a matrix of this shape with independent Gaussian entries.

    It does not depend on the standard deviation of the entries and is the same for the transpose.
    It is exact for min(m, n) <= 2: (2x/(x^2 + 1))^(m - 1) for two columns. Otherwise, for
    probabilities below 0.5, the error is at most a factor of 1.5 down to 1e-4 and of 2 down to 1e-6
    (shapes from 3x3 to 3000x30, and 10000x3), and at most 15 % down to 1e-12 if n >= 10 and
    m - n < n. The tail of narrow shapes is too large: at 1e-9 by a factor of 1.6 for 300x3 and 6
    for 10000x3. Above 0.5 the probability is interpolated, within 15 %. The references were
    samples, samples with lambda_n integrated, and an exact integral for 3 columns. Edelman's limit
    for square matrices is 40 % too large at n = 4 and 10 % at n = 16; from n = 64 on it is closer
    than sampling can resolve.

    The weights of a trained network are not Gaussian. The probability shows how unusual a value is;
    it does not predict the quality of the network.

    Args:
        shape: (m, n), both at least 1.
        condition_number: x; every matrix exceeds x < 1, no matrix exceeds inf.

    Returns:
        A probability, which decreases with x; nan if x is nan.

    Raises:
        ValueError: the shape does not have two dimensions, or one is below 1.

    Example:
        >>> from wellcond.linalg.gaussian import exceedance
        >>> print(f"{exceedance((768, 768), 1.2e5):.3f}, {exceedance((3072, 768), 3.05):.0e}")
        0.013, 4e-04
    """
    m, n = _sort_sides(shape)
    x = float(condition_number)
    if math.isnan(x):
        return math.nan
    if x < 1:
        return 1.0
    if n == 1 or math.isinf(x):
        return 0.0
    if n == 2:
        return float((2 / (x + 1 / x)) ** (m - 1))
    largest, weights = _largest_value_law(m, n)
    below = _probability_below(_table(m, n), largest - math.log(x))
    return min(1.0, float((weights * below).sum()))


def gaussian_stable_rank(shape: Sequence[int]) -> float:
    """The mean stable rank ||S||_F^2/sigma_1^2 of a Gaussian matrix; 1 for vectors.

    It is m n/E sigma_1^2 with the mean of the Tracy-Widom law, about m n/(sqrt(m) + sqrt(n))^2. The
    error relative to sampled means is at most 1 % from 8x8 on, 12 % at 3x3, and 2 % for n = 2.

    Raises:
        ValueError: the shape does not have two dimensions, or one is below 1.

    Example:
        >>> from wellcond.linalg.gaussian import gaussian_stable_rank
        >>> round(gaussian_stable_rank((768, 768)))
        194
    """
    m, n = _sort_sides(shape)
    if n == 1:
        return 1.0
    if n == 2:  # sigma_1^2 = T/2 (1 + sqrt(1 - u^2)), T of mean 2 m, u = 2 sigma_1 sigma_2/T
        logs = math.lgamma((m + 1) / 2) + math.lgamma(1.5) - math.lgamma(m / 2 + 1)
        return 2 / (1 + math.exp(logs))
    form, scale, shift = _TRACY_WIDOM
    centre, width = _tracy_widom(m, n)
    return m * n / (centre + width * (form * scale - shift))


@lru_cache(maxsize=256)
def median_condition_number(shape: Sequence[int]) -> float:
    """The median of kappa of a Gaussian matrix, by bisection of `exceedance`; 1 for vectors.

    For large square matrices with n columns it is about 3.7 n (Edelman 1988: 3.67 n).

    Args:
        shape: (m, n), both at least 1; hashable.

    Raises:
        ValueError: the shape does not have two dimensions, or one is below 1.

    Example:
        >>> from wellcond.linalg.gaussian import median_condition_number
        >>> print(f"{median_condition_number((768, 768)) / 768:.1f}")
        3.7
    """
    if _sort_sides(shape)[1] == 1:
        return 1.0
    low, high = 0.0, 1.0  # of log kappa
    while exceedance(shape, math.exp(high)) > 0.5:
        low, high = high, 2 * high
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if exceedance(shape, math.exp(middle)) > 0.5 else (low, middle)
    return math.exp((low + high) / 2)


def _sort_sides(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"`shape` must be two positive numbers, got {tuple(shape)}.")
    return max(shape), min(shape)


def _tracy_widom(m: int, n: int) -> tuple[float, float]:
    """Centre and width of the law of the largest eigenvalue of S^T S.

    The offsets of 1/2 improve the law for small shapes (Ma 2012).
    """
    a, b = math.sqrt(m - 0.5), math.sqrt(n - 0.5)
    return (a + b) ** 2, (a + b) * (1 / a + 1 / b) ** (1 / 3)


class _Table(NamedTuple):
    """log P(lambda_n < v^2) at equidistant log v, and its slope k before the first point."""

    log_v: Tensor
    log_p: Tensor
    slope: int


@lru_cache(maxsize=256)  # networks have few shapes
def _table(m: int, n: int) -> _Table:
    k = m - n + 1
    # P(lambda_n < v^2) would be lead v^k if the exponential and L(t)/L(0) were 1; they are smaller.
    lead = math.log(2 * n / k) + (k / 2 - 2) * math.log(2)
    lead += math.lgamma((m + 1) / 2) - math.lgamma(k) - math.lgamma(1 + n / 2)
    low, high = (_FAR - lead) / k, math.log(m) / 2
    log_v = torch.linspace(low, high, _COARSE, dtype=torch.float64, device="cpu")
    log_v, log_p = _integrate(log_v, m, n, lead)
    # Refine where the probability is not negligible and t is below the first zero of L.
    first = int((log_p < _FAR).sum().clamp_min(1)) - 1
    low, high = float(log_v[first]), min(high, float(2 * log_v[-1] - log_v[-2]))
    fine = torch.linspace(low, high, _FINE, dtype=torch.float64, device="cpu")
    log_v, log_p = _integrate(fine, m, n, lead)
    # Beyond the first zero of L an odd number need not mean one: interpolate from 0.5 up to 1.
    peak = float(log_p[-1])
    filled = (log_p + (math.expm1(-peak) * (6 * (log_p - peak)).exp()).log1p()).clamp_max(0.0)
    return _Table(log_v, filled, k)


def _integrate(log_v: Tensor, m: int, n: int, lead: float) -> tuple[Tensor, Tensor]:
    """The points before the first zero of L, and the logarithm of the integral up to each."""
    k = m - n + 1
    log_v, polynomial = _log_laguerre(log_v, n - 1, m - n)
    log_f = lead + math.log(k) + k * log_v - (2 * log_v).exp() / 2 + polynomial
    # Between two points log_f is nearly linear; a linear exponent is integrated exactly.
    step, rise = log_v[1:] - log_v[:-1], log_f[1:] - log_f[:-1]
    steep = rise.abs().clamp_min(1e-9)
    mean = torch.maximum(log_f[1:], log_f[:-1]) + (-torch.expm1(-steep) / steep).log()
    before = log_f[:1] - (rise[:1] / step[:1]).log()  # extrapolates the first slope
    parts = torch.cat([before, mean + step.log()])
    return log_v, parts.logcumsumexp(0)


def _log_laguerre(log_v: Tensor, degree: int, alpha: int) -> tuple[Tensor, Tensor]:
    """log L(t)/L(0) of the Laguerre polynomial, at the points t = v^2 before its first zero.

    It uses ratios of the three-term recurrence. Before that zero, all polynomials of lower degree
    are also positive, and no ratio overflows.
    """
    t = (2 * log_v).exp()
    ratio = (1 + alpha - t) / (1 + alpha)
    least, product, logarithm = ratio.clone(), ratio.clone(), torch.zeros_like(t)
    for j in range(1, degree):
        ratio = ((2 * j + 1 + alpha - t) - j / ratio) / (j + 1 + alpha)
        torch.minimum(least, ratio, out=least)
        product *= ratio
        if j % 16 == 0:  # one logarithm per step would double the cost
            logarithm += product.log()
            product.fill_(1.0)
    logarithm += product.log()
    before = int((least > 0).long().cumprod(0).sum())
    return log_v[:before], logarithm[:before]


def _probability_below(table: _Table, log_v: Tensor) -> Tensor:
    """P(lambda_n < v^2) by linear interpolation of logarithms."""
    points, values, slope = table
    at = torch.searchsorted(points, log_v).clamp(1, len(points) - 1)
    share = ((log_v - points[at - 1]) / (points[at] - points[at - 1])).clamp(0, 1)
    inside = values[at - 1] + share * (values[at] - values[at - 1])
    return (inside + slope * (log_v - points[0]).clamp_max(0.0)).exp()


@lru_cache(maxsize=256)
def _largest_value_law(m: int, n: int) -> tuple[Tensor, Tensor]:
    """log sigma_1 of an (m + 1, n - 1) matrix at equidistant points, and their probabilities."""
    form, scale, shift = _TRACY_WIDOM
    s = torch.linspace(-5.5, 9.0, _NODES, dtype=torch.float64, device="cpu")
    log_density = (form - 1) * (s + shift).log() - (s + shift) / scale
    centre, width = _tracy_widom(m + 1, n - 1)
    return (centre + width * s).clamp_min(1.0).log() / 2, log_density.softmax(0)
