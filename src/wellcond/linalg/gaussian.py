"""What is usual: condition numbers and stable ranks of matrices of independent Gaussian entries.

The law of kappa, of any shape, from two parts. The smallest eigenvalue lambda_n of S^T S: the joint
density of all eigenvalues, integrated over all but one with signs instead of absolute values, is
the derivative of P(an odd number of eigenvalues lies below t), and is known exactly, as the mean of
det(W - t I) over Wishart matrices W is a Laguerre polynomial:

    A t^(k/2 - 1) exp(-t/2) L(t)/L(0),  L = L_(n-1)^(m-n),  k = m - n + 1,
    A = n 2^(k/2 - 2) Gamma((m + 1)/2)/(Gamma(k) Gamma(1 + n/2)).

Eigenvalues repel: in the tail an odd number is one. The largest eigenvalue is nearly independent of
the smallest, and follows the law of Tracy and Widom about (sqrt(m) + sqrt(n))^2 (Johnstone 2001),
here as the shifted gamma law of Chiani (2014); for a small lambda_n it is that of an (m + 1, n - 1)
matrix (Edelman and Sutton 2005, "Tails of condition number distributions"). Square and large, this
is Edelman's P(kappa > x n) = 1 - exp(-2/x - 2/x^2) (1988); the tail is a constant times x^-k, and
lies within the bounds of Chen and Dongarra (2005, "Condition numbers of Gaussian random matrices").

Letters: m >= n the shape, whichever way round; k = m - n + 1; t = v^2 an eigenvalue of S^T S.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# The law of Tracy and Widom of order 1 as a gamma law: shape, scale, shift (Chiani 2014, table I).
_TRACY_WIDOM = (46.446, 0.186054, 9.84801)
_NODES = 81
_COARSE, _FINE = 64, 512
# Tables begin at this logarithm of a probability; below, the power of t alone is left.
_FAR = -45.0


def exceedance(shape: Sequence[int], condition_number: float) -> float:
    """P(kappa > x): how often a matrix of independent Gaussian entries of this shape exceeds x.

    Dimensionless, and the same for every standard deviation of the entries and for the transpose.
    Exact for min(m, n) <= 2, (2x/(x^2 + 1))^(m - 1) for two columns. Else, below a half, within a
    factor of 1.5 down to 1e-4 and of 2 down to 1e-6, of 3x3 to 3000x30 and of 10000x3; within 15 %
    where n is at least 10 and m - n below n, down to 1e-12. The tail of narrow shapes is too large:
    at 1e-9 1.6 times for 300x3, 6 times for 10000x3. Above a half it is interpolated, within 15 %.
    That is against samples, others that leave only lambda_n to be integrated, and for 3 columns an
    exact integral. Edelman's limit for squares is 40 % too large at n = 4, 10 % at 16, and off by
    less than can be sampled from 64 on.

    The weights of a trained network are not Gaussian: this says how unusual a number is, and
    nothing about what the network can do.

    Args:
        shape: (m, n), both at least 1.
        condition_number: x; below 1 every matrix exceeds it, inf none.

    Returns:
        A probability, falling with x; nan if x is nan.

    Raises:
        ValueError: not two dimensions, or one below 1.

    Example:
        >>> from wellcond.linalg.gaussian import exceedance
        >>> print(f"{exceedance((768, 768), 1.2e5):.3f}, {exceedance((3072, 768), 3.05):.0e}")
        0.013, 4e-04
    """
    m, n = _sorted(shape)
    x = float(condition_number)
    if math.isnan(x):
        return math.nan
    if x < 1:
        return 1.0
    if n == 1 or math.isinf(x):
        return 0.0
    if n == 2:
        return float((2 / (x + 1 / x)) ** (m - 1))
    largest, weights = _largest(m, n)
    below = _below(_table(m, n), largest - math.log(x))
    return min(1.0, float((weights * below).sum()))


def usual_stable_rank(shape: Sequence[int]) -> float:
    """||S||_F^2/sigma_1^2 of such a matrix, in the mean; 1 for vectors.

    m n/E sigma_1^2, with the mean of the law of Tracy and Widom; near m n/(sqrt(m) + sqrt(n))^2.
    Within 1 % of sampled means from 8x8 on, 12 % at 3x3, 2 % where n = 2.

    Raises:
        ValueError: not two dimensions, or one below 1.

    Example:
        >>> from wellcond.linalg.gaussian import usual_stable_rank
        >>> round(usual_stable_rank((768, 768)))
        194
    """
    m, n = _sorted(shape)
    if n == 1:
        return 1.0
    if n == 2:  # sigma_1^2 = T/2 (1 + sqrt(1 - u^2)), T of mean 2 m, u = 2 sigma_1 sigma_2/T
        logs = math.lgamma((m + 1) / 2) + math.lgamma(1.5) - math.lgamma(m / 2 + 1)
        return 2 / (1 + math.exp(logs))
    form, scale, shift = _TRACY_WIDOM
    centre, width = _tracy_widom(m, n)
    return m * n / (centre + width * (form * scale - shift))


def _sorted(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"`shape` must be two positive numbers, got {tuple(shape)}.")
    return max(shape), min(shape)


def _tracy_widom(m: int, n: int) -> tuple[float, float]:
    """Centre and width of the law of the largest eigenvalue of S^T S.

    By the halves the law is good at small shapes, too (Ma 2012).
    """
    a, b = math.sqrt(m - 0.5), math.sqrt(n - 0.5)
    return (a + b) ** 2, (a + b) * (1 / a + 1 / b) ** (1 / 3)


class _Table(NamedTuple):
    """log P(lambda_n < v^2) at equal distances of log v, and its slope k before the first."""

    log_v: Tensor
    log_p: Tensor
    slope: int


@lru_cache(maxsize=256)  # networks have few shapes
def _table(m: int, n: int) -> _Table:
    k = m - n + 1
    # P(lambda_n < v^2) = lead v^k, were the exponential and L(t)/L(0) one; they are smaller.
    lead = math.log(2 * n / k) + (k / 2 - 2) * math.log(2)
    lead += math.lgamma((m + 1) / 2) - math.lgamma(k) - math.lgamma(1 + n / 2)
    low, high = (_FAR - lead) / k, math.log(m) / 2
    log_v = torch.linspace(low, high, _COARSE, dtype=torch.float64, device="cpu")
    log_v, log_p = _integrated(log_v, m, n, lead)
    # Once more, where the probability is neither nothing nor beyond the first zero of L.
    first = int((log_p < _FAR).sum().clamp_min(1)) - 1
    low, high = float(log_v[first]), min(high, float(2 * log_v[-1] - log_v[-2]))
    fine = torch.linspace(low, high, _FINE, dtype=torch.float64, device="cpu")
    log_v, log_p = _integrated(fine, m, n, lead)
    # At the first zero of L an odd number is no longer one. From a half on, up to 1, it is filled.
    peak = float(log_p[-1])
    filled = (log_p + (math.expm1(-peak) * (6 * (log_p - peak)).exp()).log1p()).clamp_max(0.0)
    return _Table(log_v, filled, k)


def _integrated(log_v: Tensor, m: int, n: int, lead: float) -> tuple[Tensor, Tensor]:
    """The points before the first zero of L, and the logarithm of the integral up to each."""
    k = m - n + 1
    log_v, polynomial = _log_laguerre(log_v, n - 1, m - n)
    log_f = lead + math.log(k) + k * log_v - (2 * log_v).exp() / 2 + polynomial
    # Between two points log_f is nearly linear, and a line is integrated exactly.
    step, rise = log_v[1:] - log_v[:-1], log_f[1:] - log_f[:-1]
    steep = rise.abs().clamp_min(1e-9)
    mean = torch.maximum(log_f[1:], log_f[:-1]) + (-torch.expm1(-steep) / steep).log()
    before = log_f[:1] - (rise[:1] / step[:1]).log()  # as if the first slope went on
    parts = torch.cat([before, mean + step.log()])
    return log_v, parts.logcumsumexp(0)


def _log_laguerre(log_v: Tensor, degree: int, alpha: int) -> tuple[Tensor, Tensor]:
    """log L(t)/L(0) of the Laguerre polynomial, at the points t = v^2 before its first zero.

    By ratios of the three-term recurrence: before that zero all polynomials of lower degree are
    positive, too, and none of the ratios overflows.
    """
    t = (2 * log_v).exp()
    ratio = (1 + alpha - t) / (1 + alpha)
    least, product, logarithm = ratio.clone(), ratio.clone(), torch.zeros_like(t)
    for j in range(1, degree):
        ratio = ((2 * j + 1 + alpha - t) - j / ratio) / (j + 1 + alpha)
        torch.minimum(least, ratio, out=least)
        product *= ratio
        if j % 16 == 0:  # a logarithm of each would cost as much as all the rest
            logarithm += product.log()
            product.fill_(1.0)
    logarithm += product.log()
    before = int((least > 0).long().cumprod(0).sum())
    return log_v[:before], logarithm[:before]


def _below(table: _Table, log_v: Tensor) -> Tensor:
    """P(lambda_n < v^2) by linear interpolation of logarithms."""
    points, values, slope = table
    at = torch.searchsorted(points, log_v).clamp(1, len(points) - 1)
    share = ((log_v - points[at - 1]) / (points[at] - points[at - 1])).clamp(0, 1)
    inside = values[at - 1] + share * (values[at] - values[at - 1])
    return (inside + slope * (log_v - points[0]).clamp_max(0.0)).exp()


@lru_cache(maxsize=256)
def _largest(m: int, n: int) -> tuple[Tensor, Tensor]:
    """log sigma_1 of an (m + 1, n - 1) matrix at equal distances, and the probability of each."""
    form, scale, shift = _TRACY_WIDOM
    s = torch.linspace(-5.5, 9.0, _NODES, dtype=torch.float64, device="cpu")
    log_density = (form - 1) * (s + shift).log() - (s + shift) / scale
    centre, width = _tracy_widom(m + 1, n - 1)
    return (centre + width * s).clamp_min(1.0).log() / 2, log_density.softmax(0)
