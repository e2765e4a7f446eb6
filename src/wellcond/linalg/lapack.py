"""Singular value decompositions that retry with the transpose if LAPACK does not converge."""

from __future__ import annotations

import torch
from torch import Tensor

SVD_FAILED = (
    "LAPACK does not converge for `S` or its transpose, so its singular values are unknown. "
    "Try another build of PyTorch, or move `S` to another device."
)


def singular_values(S: Tensor) -> Tensor:
    """The singular values of S (..., m, n), descending.

    Raises:
        ValueError: LAPACK does not converge.
    """
    for attempt in (S, S.mT):
        try:
            sigma: Tensor = torch.linalg.svdvals(attempt)
            return sigma
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
    raise ValueError(SVD_FAILED)


def svd(S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD U, sigma, V^T.

    Raises:
        ValueError: LAPACK does not converge.
    """
    try:
        U, sigma, Vh = torch.linalg.svd(S, full_matrices=False)
        return U, sigma, Vh
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        pass
    try:
        V, sigma, Uh = torch.linalg.svd(S.mT, full_matrices=False)
        return Uh.mT, sigma, V.mT
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise ValueError(SVD_FAILED) from None
