"""Reference values in float64, computed from the definitions instead of wellcond's formulas."""

import math
from fractions import Fraction

import mpmath
import numpy as np
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor, from_numpy


def svd(S: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.linalg.svd(S.double().numpy(), full_matrices=False)


def penalty(S: Tensor) -> float:
    """r(S) = 1/2 ||S||_2^2 - ||S||_F^2/(2 nu)."""
    dense = S.double().numpy()
    return 0.5 * np.linalg.norm(dense, 2) ** 2 - 0.5 * np.sum(dense**2) / min(dense.shape)


def gradient(S: Tensor) -> Tensor:
    """sigma_1 u_1 v_1^T - S/nu."""
    U, sigma, Vh = svd(S)
    return from_numpy(sigma[0] * np.outer(U[:, 0], Vh[0]) - S.double().numpy() / len(sigma))


def proximal_step(S: Tensor, eta: float) -> Tensor:
    """argmin_X 1/2 ||X - c S||_F^2 + eta/2 ||X||_2^2, with tau as the root of its equation."""
    U, sigma, Vh = svd(S)
    grown = (1 + eta / len(sigma)) * sigma
    if eta == 0 or grown[0] == 0:
        return from_numpy((U * grown) @ Vh)
    unit = grown[0]  # the equation is homogeneous; brentq's tolerance is not
    scaled = grown / unit
    tau = unit * brentq(lambda t: np.maximum(scaled - t, 0).sum() - eta * t, 0, 1, xtol=1e-15)
    return from_numpy((U * np.minimum(grown, tau)) @ Vh)


def singular_values(S: Tensor) -> tuple[list[Fraction], Fraction]:
    """The singular values of the stored matrix, descending, and a bound on their error.

    Uses 60 digits in addition to those that the entries span.
    """
    entries = [abs(x) for x in S.double().flatten().tolist() if x]
    digits = 60 + (int(math.log10(max(entries)) - math.log10(min(entries))) if entries else 0)
    with mpmath.workdps(digits):
        tall = S.double() if S.shape[0] >= S.shape[1] else S.double().mT
        values = mpmath.svd_r(mpmath.matrix(tall.tolist()), compute_uv=False)
        exact = sorted((_fraction(abs(value)) for value in values), reverse=True)
    return exact, exact[0] / 10 ** (digits - 10)


def _fraction(x: mpmath.mpf) -> Fraction:
    _, mantissa, exponent, _ = x._mpf_
    return int(mantissa) * Fraction(2) ** exponent


def nearest_singular_values(sigma: np.ndarray, K: float) -> np.ndarray:
    """argmin over a of sum (clip(sigma, a, K a) - sigma)^2, found by a numerical search."""
    if sigma[0] <= K * sigma[-1]:
        return sigma

    def distance(a: float) -> float:
        return float(np.sum((np.clip(sigma, a, K * a) - sigma) ** 2))

    found = minimize_scalar(
        distance, bounds=(sigma[0] / K * 1e-3, sigma[0]), method="bounded", options={"xatol": 1e-14}
    )
    return np.clip(sigma, found.x, K * found.x)
