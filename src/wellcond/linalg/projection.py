"""Singular values moved into bounds, by means of the smaller Gram matrix alone.

With G = S^T S = V diag(sigma^2) V^T and sigma' what the values become, the new matrix is
S + S V diag(sigma'/sigma - 1) V^T: only the vectors of the values that move are needed, on the
short side. So a matrix that is spread over processes by its long side stays where it is.

Letters: S (..., m, n) a matrix or a batch, here with m >= n; G (..., n, n) its Gram matrix; u the
unit roundoff of the dtype of G; kappa = sigma_1/sigma_n.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# An eigenvalue of G is off by a few u sigma_1^2, so sigma_n by a few u kappa^2 of itself, and S V
# has columns that are as far from orthogonal. Measured in float32: 5 u kappa^2; in float64 that is
# far less than the bound n u kappa^2, and what is stored is measured again.
_NARROW_ERROR, _WIDE_ERROR = 1e-3, 1e-3
# Of the squares of the largest: what rounding may do to a Cholesky factorisation as it is measured,
# some times what was ever seen; a proof would take (m + n) u times the trace (Rump 2006).
_CHOLESKY_ERROR = 32
# And what it may do to the squares of the smallest and the largest that are found: 13 and 67 seen.
_SMALLEST_ERROR, _LARGEST_ERROR = 32, 128


def resolvable(dtype: torch.dtype, n: int = 1, error: float = _WIDE_ERROR) -> float:
    """Up to which kappa a Gram matrix (n, n) of this dtype tells all singular values.

    In float64 with this relative error at most, which is far from reached.
    """
    u = torch.finfo(dtype).eps / 2
    return math.sqrt(error / (n * u) if dtype == torch.float64 else _NARROW_ERROR / (5 * u))


class Decomposed(NamedTuple):
    """Singular values (..., n), in float64, ascending, and right singular vectors (..., n, n)."""

    sigma: Tensor
    V: Tensor

    def resolved(self, smallest: Tensor | None = None) -> Tensor:
        """Whether rounding of the Gram matrix has spared them, one truth value a matrix.

        All of them, or those from `smallest` on.
        """
        smallest = self.sigma[..., 0] if smallest is None else smallest
        bound = resolvable(self.V.dtype, self.sigma.shape[-1])
        return self.sigma[..., -1] < bound * smallest

    def extremes(self, apart: float) -> tuple[Tensor, Tensor]:
        """The largest and the smallest as far apart (1) or as near (-1) as rounding leaves open."""
        largest, smallest = (self.sigma[..., at].square() for at in (-1, 0))
        error = apart * torch.finfo(self.V.dtype).eps / 2 * largest
        largest = largest + _LARGEST_ERROR * error
        return largest.sqrt(), (smallest - _SMALLEST_ERROR * error).clamp_min(0).sqrt()

    def move(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """V (..., n, j) and d (..., j) with S + S V diag(d) V^T as the matrix with these values.

        Over the values that move in any matrix of the batch; d = 0 for what stays.
        """
        change = torch.where(target == self.sigma, 0.0, target / self.sigma - 1)
        moves = (change != 0).reshape(-1, change.shape[-1]).any(dim=0)
        return self.V[..., moves], change[..., moves].to(self.V.dtype)


def decomposed(G: Tensor, vectors: bool = True) -> Decomposed | None:
    """From a Gram matrix, or V without columns; None if LAPACK does not converge."""
    try:
        if not vectors:
            return Decomposed(_roots(torch.linalg.eigvalsh(G)), G[..., :0])
        values, V = torch.linalg.eigh(G)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    return Decomposed(_roots(values), V)


def _roots(values: Tensor) -> Tensor:
    return values.double().clamp_min(0).sqrt()


def within(G: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Whether low <= sigma_n and sigma_1 <= high as two Cholesky factorisations of G tell.

    Measured, not proven: with a margin for rounding, so that what is on the bound fails. G
    (..., n, n) in float64, low and high (...); low = 0 and high = inf ask for nothing.
    """
    identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    u = torch.finfo(G.dtype).eps / 2
    largest = G.diagonal(dim1=-2, dim2=-1).sum(dim=-1)  # sigma_1^2 at most
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
