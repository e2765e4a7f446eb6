"""Singular value decompositions where LAPACK's first attempt does not converge."""

from __future__ import annotations

import torch
from torch import Tensor

FAILED = (
    "no singular values of `S` were found: LAPACK does not converge, for S and its transpose. "
    "Another build of PyTorch, or S on another device, may succeed."
)


def singular_values(S: Tensor) -> Tensor:
    """Of matrices (..., m, n), descending. Raises ValueError if LAPACK converges for no way."""
    for attempt in (S, S.mT):
        try:
            sigma: Tensor = torch.linalg.svdvals(attempt)
            return sigma
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
    raise ValueError(FAILED)


def svd(S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin U, sigma, V^T. Raises ValueError if LAPACK converges for no way."""
    try:
        U, sigma, Vh = torch.linalg.svd(S, full_matrices=False)
        return U, sigma, Vh
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        pass
    try:
        V, sigma, Uh = torch.linalg.svd(S.mT, full_matrices=False)
        return Uh.mT, sigma, V.mT
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise ValueError(FAILED) from None
