"""Gram matrices, and singular values moved into bounds by means of the smaller Gram matrix only.

With G = S^T S = V diag(sigma^2) V^T and new values sigma', the new matrix is
S + S V diag(sigma'/sigma - 1) V^T. It needs only the vectors of the values that move, on the short
side. So a matrix that is sharded over processes by its long side is not redistributed.

Letters: S (..., m, n) a matrix or a batch, here with m >= n; G (..., n, n) its Gram matrix; u the
unit roundoff of the dtype of G; kappa = sigma_1/sigma_n.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_BANDS = 16  # a matrix of another dtype is converted in this number of bands
# An eigenvalue of G has an error of a few u sigma_1^2. So sigma_n has a relative error of a few
# u kappa^2, and the columns of S V deviate from orthogonality by as much. Measured in float32:
# 5 u kappa^2. In float64 the error is far below its bound n u kappa^2, and the stored matrix is
# measured again.
_ERROR = 1e-3
# Margins in units of u sigma_1^2. For a Cholesky factorisation: several times the largest measured
# error; a proof would need (m + n) u times the trace (Rump 2006).
_CHOLESKY_ERROR = 32
# For the squares of the smallest and the largest singular value; measured: 13 and 67.
_SMALLEST_ERROR, _LARGEST_ERROR = 32, 128


def gram(S: Tensor, dtype: torch.dtype | None = None, unit: Tensor | None = None) -> Tensor:
    """The Gram matrices of S/unit in this dtype, with little more than half of the products.

    It computes the blocks of the lower triangle and mirrors them. If S must be converted, it
    converts one band of rows at a time, without a copy of S.

    Args:
        S: (..., m, n), best with m >= n.
        dtype: of the result and the arithmetic; that of S by default.
        unit: (...), one number per matrix; 1 by default.
    """
    dtype = dtype or S.dtype
    m, n = S.shape[-2:]
    is_converted = dtype != S.dtype or unit is not None
    rows = max(n, -(-m // _BANDS), 1) if is_converted else max(m, 1)
    width = max(256, -(-n // 4))
    G = torch.zeros(*S.shape[:-2], n, n, dtype=dtype, device=S.device)
    for first in range(0, m, rows):
        band = S[..., first : first + rows, :].to(dtype)
        if unit is not None:
            band = band / unit[..., None, None].to(dtype)
        for start in range(0, n, width):
            part = slice(start, start + width)
            G[..., start:, part] += band[..., start:].mT @ band[..., part]
    for start in range(0, n, width):
        part, rest = slice(start, start + width), slice(start + width, n)
        G[..., part, rest] = G[..., rest, part].mT
    return G


def resolvable_condition_number(dtype: torch.dtype, n: int = 1, error: float = _ERROR) -> float:
    """The kappa up to which a Gram matrix (n, n) of this dtype resolves all singular values.

    In float64 the relative error of sigma_n is then at most `error`, by a pessimistic bound.
    """
    u = torch.finfo(dtype).eps / 2
    return math.sqrt(error / (n * u) if dtype == torch.float64 else _ERROR / (5 * u))


class GramDecomposition(NamedTuple):
    """Singular values (..., n), in float64, ascending, and right singular vectors (..., n, n)."""

    sigma: Tensor
    V: Tensor

    def resolved(self, smallest: Tensor | None = None) -> Tensor:
        """Whether the Gram matrix resolves all singular values, or those of at least `smallest`.

        The result is one bool per matrix.
        """
        smallest = self.sigma[..., 0] if smallest is None else smallest
        bound = resolvable_condition_number(self.V.dtype, self.sigma.shape[-1])
        return self.sigma[..., -1] < bound * smallest

    def extremes(self, apart: float) -> tuple[Tensor, Tensor]:
        """The extreme values, as far apart (1) or as close together (-1) as rounding permits."""
        largest, smallest = (self.sigma[..., at].square() for at in (-1, 0))
        error = apart * torch.finfo(self.V.dtype).eps / 2 * largest
        largest = largest + _LARGEST_ERROR * error
        return largest.sqrt(), (smallest - _SMALLEST_ERROR * error).clamp_min(0).sqrt()

    def move(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """V (..., n, j) and d (..., j) such that S + S V diag(d) V^T has the values `target`.

        They cover the values that move in any matrix of the batch; d = 0 for those that stay.
        """
        change = torch.where(target == self.sigma, 0.0, target / self.sigma - 1)
        moves = (change != 0).reshape(-1, change.shape[-1]).any(dim=0)
        return self.V[..., moves], change[..., moves].to(self.V.dtype)


def decompose_gram(G: Tensor, vectors: bool = True) -> GramDecomposition | None:
    """Decomposes a Gram matrix; without `vectors` V has no columns. None if LAPACK fails."""
    if G.shape[-1] == 1:  # such stacks are long, for example those of depthwise kernels
        V = torch.ones_like(G) if vectors else G[..., :0]
        return GramDecomposition(G[..., 0].real.double().clamp_min(0).sqrt(), V)
    try:
        values, V = torch.linalg.eigh(G) if vectors else (torch.linalg.eigvalsh(G), G[..., :0])
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    return GramDecomposition(values.double().clamp_min(0).sqrt(), V)


def are_within_bounds(G: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Whether low <= sigma_n and sigma_1 <= high, by two Cholesky factorisations of G.

    The result is measured, not proven. Because of a margin for rounding, a matrix on the bound
    fails. G (..., n, n) is in float64; low and high are (...). The values low = 0 and high = inf
    check nothing.
    """
    identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    u = torch.finfo(G.dtype).eps / 2
    largest = G.diagonal(dim1=-2, dim2=-1).sum(dim=-1)  # at least sigma_1^2
    error = _CHOLESKY_ERROR * u * torch.minimum(largest, high.square())
    holds = torch.isfinite(largest)
    if bool((low > 0).any()):
        shift = torch.where(low > 0, low.square() + error, -largest.clamp_min(1.0))
        holds &= _positive(G - shift[..., None, None] * identity)
    if bool((high < torch.inf).any()):
        shift = torch.where(high < torch.inf, high.square() - error, 2 * largest.clamp_min(1.0))
        holds &= _positive(shift[..., None, None] * identity - G)
    return holds


def _positive(A: Tensor) -> Tensor:
    failed: Tensor = torch.linalg.cholesky_ex(A).info
    return failed == 0
