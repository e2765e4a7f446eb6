"""float64 answers, written from the definitions and not from the product's formulas."""

import numpy as np
from scipy.optimize import brentq
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
    """argmin_X 1/2 ||X - c S||_F^2 + eta/2 ||X||_2^2, tau found as the root of its equation."""
    U, sigma, Vh = svd(S)
    grown = (1 + eta / len(sigma)) * sigma
    if eta == 0 or grown[0] == 0:
        return from_numpy((U * grown) @ Vh)
    unit = grown[0]  # the equation is homogeneous; brentq's tolerance is not
    scaled = grown / unit
    tau = unit * brentq(lambda t: np.maximum(scaled - t, 0).sum() - eta * t, 0, 1, xtol=1e-15)
    return from_numpy((U * np.minimum(grown, tau)) @ Vh)
