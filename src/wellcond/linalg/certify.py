"""Certified enclosures of the extreme singular values and the condition number of a matrix.

A certificate holds for the stored matrix whatever the rounding: every bound rests on a theorem and
on bounds of the rounding errors, never on an estimate. Estimates only choose where to try. We
assume IEEE 754 float64 arithmetic on the CPU, with correctly rounded +, -, *, / and square root,
where results below 2^-1022 may be flushed to zero, and matrix products and factorisations that sum
products in any order (no Strassen-like scheme). Then |fl(A B) - A B| <= gamma_k |A| |B| (Higham,
Accuracy and Stability of Numerical Algorithms, 3.5) for sums of k products, with gamma_k = k u/(1 -
k u) and u = 2^-53.

Letters: S (m, n) the matrix, m >= n after a transposition, scaled to a largest entry in [1, 2);
G = fl(S^T S); sigma_1 >= ... >= sigma_n its singular values; kappa = sigma_1/sigma_n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wellcond.linalg.arrays import as_tensor
from wellcond.linalg.checks import as_matrices, check_matrices, real_form
from wellcond.linalg.interval import Interval, as_interval, ball
from wellcond.linalg.lapack import svd
from wellcond.linalg.scaling import power_of_two

if TYPE_CHECKING:
    from numpy.typing import NDArray

_U = 2.0**-53
# Exceeds the sum of all underflows: each loses at most 2^-1022, and sums have far fewer than 2^100
# terms. Everything is scaled to entries of order 1.
_UNDERFLOW = 2.0**-900
# Up to this number of columns the verified SVD, which is tighter, is cheap.
_SMALL = 256
# If numbers below 2^-1022 are flushed to zero, the bounds of smaller matrices would be void.
_FAR_FROM_SUBNORMAL = 2.0**-900
# Up to this relative width of kappa, the cheaper certificate is preferred.
_NARROW = 1e-4


@dataclass(frozen=True)
class Certificate:
    """Enclosures of sigma_1, sigma_nu and kappa = sigma_1/sigma_nu of one matrix; see `certify`.

    Attributes:
        sigma_max: encloses sigma_1, the spectral norm.
        sigma_min: encloses sigma_nu, nu = min(m, n).
        condition_number: encloses kappa. The upper end is inf if sigma_nu = 0 cannot be excluded;
            both ends are nan for a zero matrix, which has no condition number.
        certified: whether the upper end of kappa is finite.
        computed: kappa as computed, without a guarantee.
        method: the theorem that was used.
        reason: why kappa is not certified; "" if it is.
    """

    sigma_max: Interval
    sigma_min: Interval
    condition_number: Interval
    certified: bool
    computed: float
    method: str
    reason: str = ""

    def __repr__(self) -> str:
        why = "" if self.certified else f", not certified: {self.reason}"
        return (
            f"<Certificate: κ in {self.condition_number}, σ_max in {self.sigma_max}, "
            f"σ_min in {self.sigma_min}, by {self.method}{why}>"
        )


def certify(S: Tensor | NDArray[Any]) -> Certificate:
    """Intervals that provably contain sigma_1, sigma_nu and kappa of the stored matrix.

    It chooses the method with the smaller predicted width.

    *Verified SVD*: with R = S - U Sigma V^T, E = U^T U - I and F = V^T V - I, every sigma_i is in
    Sigma_i sqrt((1 +- ||E||)(1 +- ||F||)) +- ||R|| (Weyl, Ostrowski; Rump, Verified bounds for
    singular values, BIT 51, 2011).

    *Verified Cholesky*: if the Cholesky factorisation of G - theta I runs to completion in floating
    point, then sigma_nu^2 >= theta - delta, where delta covers the rounding errors of the
    factorisation and of G = fl(S^T S) (Rump, Verification of positive definiteness, BIT 46, 2006).
    The same holds for sigma_1 and theta I - G. The other ends are ||S v||/||v|| for a vector v.

    It needs IEEE float64 arithmetic, so it runs on the CPU, whatever the device of S.

    Args:
        S: real or complex floating-point matrix (m, n), a tensor or a NumPy array of any dtype,
            taken exactly as stored. For A + iB the intervals are those of the real matrix
            [[A, -B], [B, A]].

    Returns:
        A `Certificate`. It always contains enclosures; `certified` is True if the enclosure of
        kappa is bounded.

    Raises:
        ValueError: S does not have exactly two dimensions, has no entries, contains NaN or
            infinity, or is a meta tensor.
        TypeError: the dtype of S is integer, boolean or float8, whose entries are codes that must
            be dequantised first.

    Example:
        >>> import torch, wellcond as wc
        >>> certificate = wc.certify(torch.tensor([[2.0, 0.0], [0.0, 0.5]]))
        >>> certificate.certified, 4.0 in certificate.condition_number
        (True, True)
    """
    S = as_tensor(S)
    check_matrices(S)
    vector = min(S.shape[-2:]) == 1
    S = real_form(S.detach().cpu())
    wide = as_matrices(S)
    if wide.ndim != 2:
        raise ValueError(
            f"`S` must have exactly 2 dimensions, got shape {tuple(wide.shape)}. "
            "For a batch, certify each matrix: [wc.certify(one) for one in S]; for the kernel of a "
            "convolution as a matrix, S.flatten(1)."
        )
    largest = float(wide.abs().max())
    if _flushes() and (_holds_subnormal(S) or 0 < largest < _FAR_FROM_SUBNORMAL):
        any_size, any_ratio = Interval(0.0, math.inf), Interval(1.0, math.inf)
        return Certificate(any_size, any_size, any_ratio, False, math.nan, "none", _FLUSHED)
    if largest == 0:
        zero, none = Interval(0.0, 0.0), Interval(math.nan, math.nan)
        reason = "the matrix is zero and has no condition number"
        return Certificate(zero, zero, none, False, math.nan, "none needed", reason)
    unit = power_of_two(largest)
    # Exact except for entries that underflow, which _UNDERFLOW covers.
    scaled = wide / unit
    if scaled.shape[0] < scaled.shape[1]:
        scaled = scaled.mT
    certificate = (
        (_by_cholesky(scaled) if scaled.shape[1] > _SMALL else None)
        or _by_svd(scaled)
        or _by_norm(scaled)
    )
    if vector:
        one = Interval(1.0, 1.0)
        certificate = replace(certificate, condition_number=one, certified=True, reason="")
    return replace(
        certificate,
        sigma_max=certificate.sigma_max * unit,
        sigma_min=_nonnegative(certificate.sigma_min * unit),
    )


_FLUSHED = (
    "the matrix contains numbers so small that this process flushes them to zero "
    "(torch.set_flush_denormal), so nothing can be certified for the matrix as stored"
)
_UNVERIFIED = "no singular value decomposition could be verified"


def _flushes() -> bool:
    """Whether PyTorch or Python flushes subnormal numbers to zero in this thread."""
    smallest = torch.tensor(1, dtype=torch.int64, device="cpu").view(torch.float64)
    return float(smallest * 1.0) == 0 or math.ulp(0.0) * 1.0 == 0


def _holds_subnormal(S: Tensor) -> bool:
    """Compares bits, because comparisons of numbers flush too."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[S.itemsize]
    normal = torch.tensor(torch.finfo(S.dtype).smallest_normal, dtype=S.dtype, device="cpu")
    magnitude = S.contiguous().view(integer) & torch.iinfo(integer).max
    return bool(((magnitude > 0) & (magnitude < normal.view(integer))).any())


def combine_certificates(certificates: Sequence[Certificate]) -> Certificate:
    """The certificate of a block-diagonal matrix from those of its blocks."""
    largest, smallest = zip(*((c.sigma_max, c.sigma_min) for c in certificates), strict=True)
    high = Interval(max(x.lower for x in largest), max(x.upper for x in largest))
    low = Interval(min(x.lower for x in smallest), min(x.upper for x in smallest))
    if len(certificates) == 1 or high.upper == 0:
        return certificates[0]
    computed = high.upper / low.upper if low.upper > 0 else math.inf
    methods = dict.fromkeys(certificate.method for certificate in certificates)
    whole = _certificate(high, low, computed, "; ".join(methods))
    lost = [c.reason for c in certificates if c.reason in (_FLUSHED, _UNVERIFIED)]
    return replace(whole, reason=lost[0]) if lost else whole


def _certificate(high: Interval, low: Interval, computed: float, method: str) -> Certificate:
    """The certificate for given enclosures of sigma_1 > 0 and sigma_nu."""
    low = _nonnegative(low)
    kappa = high / low
    certified = kappa.upper < math.inf
    reason = (
        f"sigma_min is within {low.upper / high.upper:.1e} of zero, relative to sigma_max: "
        "rounding in float64 cannot tell it from zero"
    )
    return Certificate(
        sigma_max=high,
        sigma_min=low,
        condition_number=Interval(max(kappa.lower, 1.0), kappa.upper),
        certified=certified,
        computed=computed,
        method=method,
        reason="" if certified else reason,
    )


def _nonnegative(x: Interval) -> Interval:
    return Interval(max(x.lower, 0.0), x.upper)


def _gamma(k: int) -> float:
    """At least k u/(1 - k u); k u is exact."""
    return math.nextafter(k * _U / math.nextafter(1 - k * _U, 0), math.inf)


_TINY = Interval(0.0, _UNDERFLOW)


def _norm(X: Tensor) -> Interval:
    """Encloses the Frobenius norm."""
    squared = as_interval(float(X.square().sum()))
    return (squared * (1 + ball(as_interval(_gamma(X.numel() + 2)))) + ball(_TINY)).sqrt()


def _norm_of_absolute_product(A: Tensor, B: Tensor) -> Interval:
    """An upper bound of || |A| |B| ||_2, the root of its largest row sum times column sum."""
    A, B = A.abs(), B.abs()
    rows, columns = A @ B.sum(dim=1), A.sum(dim=0) @ B
    bound = (as_interval(float(rows.max())) * float(columns.max())).sqrt()
    return bound * (1 + as_interval(_gamma(sum(A.shape) + B.shape[1] + 2))) + _TINY


def _defect(Q: Tensor) -> Interval:
    """An upper bound of ||Q^T Q - I||_2."""
    difference = Q.mT @ Q
    difference.diagonal().sub_(1)
    rounding = _gamma(len(Q)) * _norm_of_absolute_product(Q.mT, Q)
    return _norm(difference) * (1 + 2 * _U) + rounding + _TINY


def _by_svd(S: Tensor) -> Certificate | None:
    """sigma_i sqrt((1 + E)(1 + F)) + R, with E, F and R balls about zero."""
    try:
        U, sigma, Vh = svd(S)
    except ValueError:
        return None
    left = U * sigma
    difference = S - left @ Vh
    # Sums of n products; fl(U Sigma) adds one rounding, and the difference another.
    rounding = _gamma(S.shape[1] + 2) * _norm_of_absolute_product(left, Vh)
    R = ball(_norm(difference) * (1 + 2 * _U) + rounding + _TINY)
    E, F = ball(_defect(U)), ball(_defect(Vh.mT))
    if not (E.upper < 1 and F.upper < 1 and R.upper < math.inf):
        return None
    factor = ((1 + E) * (1 + F)).sqrt()
    largest, smallest = float(sigma[0]), float(sigma[-1])
    computed = largest / smallest if smallest > 0 else math.inf
    return _certificate(largest * factor + R, smallest * factor + R, computed, "verified SVD")


def _by_cholesky(S: Tensor) -> Certificate | None:
    """Bounds from factorisations of G - theta I and theta I - G; None if the SVD is better."""
    m, n = S.shape
    G = S.mT @ S
    try:
        eigenvalues = torch.linalg.eigvalsh(G)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    bottom, top = float(eigenvalues[0]), float(eigenvalues[-1])
    # Bounds ||S^T S - G||_2, whichever triangle of G is read.
    product = _gamma(m) * _norm_of_absolute_product(S.mT, S) + _TINY
    trace = float(G.diagonal().sum())
    promised = (product.upper + _gamma(n) * trace) / bottom if bottom > 0 else math.inf
    by_svd = 2 * _gamma(n) * n * math.sqrt(top / bottom) if bottom > 0 else 0.0
    if not promised <= max(_NARROW, by_svd):
        return None
    low = _bound_eigenvalue(G, bottom, product.upper + _gamma(n) * trace)
    high = _bound_eigenvalue(-G, -top, product.upper + _gamma(n) * n * top)
    if low is None or high is None:
        return None
    first, last = (_stretch(S, _eigenvector(G, value)) for value in (top, bottom))
    return _certificate(
        Interval(first.lower, (product - high).sqrt().upper),
        Interval((low - product).sqrt().lower, last.upper),
        first.upper / last.upper,
        "verified Cholesky",
    )


def _bound_eigenvalue(A: Tensor, estimate: float, margin: float) -> Interval | None:
    """The lower end is a lower bound of the smallest eigenvalue of a symmetric matrix.

    If Cholesky of M = fl(A - shift I) completes, then M + D is positive semidefinite for some D
    with ||D||_2 <= gamma/(1 - gamma) trace(M), gamma = gamma_{n+1} (Higham 10.3; two more for
    libraries that multiply by reciprocals of pivots).
    """
    gamma = as_interval(_gamma(len(A) + 3))
    for step in (1, 4, 16):
        shift = estimate - step * margin
        M = A.clone()
        M.diagonal().sub_(shift)
        factor, failed = torch.linalg.cholesky_ex(M)
        if failed or not torch.isfinite(factor.diagonal()).all():
            continue
        trace = as_interval(float(M.diagonal().sum())) * (1 + gamma)
        rounding = _U * as_interval(float(M.diagonal().abs().max()))
        return shift - (gamma / (1 - gamma) * trace + rounding + _TINY)
    return None


def _eigenvector(G: Tensor, value: float) -> Tensor:
    """A vector near an eigenvector, by inverse iteration, without a guarantee."""
    shifted = G.clone()
    # Not exactly: a shift equal to an eigenvalue would divide by zero.
    shifted.diagonal().sub_(value * (1 - 16 * _U))
    factors = torch.linalg.lu_factor_ex(shifted)[:2]
    source = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(len(G), 1, generator=source, dtype=G.dtype, device="cpu")
    for _ in range(3):
        x = torch.linalg.lu_solve(*factors, x)
        x = torch.where(torch.isfinite(x), x, 0.0)
        x = x / x.abs().max().clamp_min(_UNDERFLOW)
    return x if float(x.abs().max()) > 0.5 else torch.ones_like(x)


def _stretch(S: Tensor, x: Tensor) -> Interval:
    """Encloses ||S x||/||x||, which is between sigma_n and sigma_1."""
    length = _norm(x)
    rounding = _gamma(S.shape[1]) * _norm_of_absolute_product(S, x)
    return _nonnegative(_norm(S @ x) + ball(rounding + _TINY)) / length


def _by_norm(S: Tensor) -> Certificate:
    """From the entries only: max |s_ij| <= sigma_1 <= ||S||_F and n sigma_n^2 <= ||S||_F^2."""
    norm = _norm(S)
    smallest = Interval(0.0, (norm / as_interval(S.shape[1]).sqrt()).upper)
    largest = Interval(float(S.abs().max()), norm.upper)
    certificate = _certificate(largest, smallest, math.nan, "Frobenius norm")
    return replace(certificate, reason=_UNVERIFIED)
