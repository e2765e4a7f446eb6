"""Measured singular values and condition numbers of single matrices.

Letters: S (..., m, n) a matrix or a batch of them; sigma (..., nu) its singular values, descending;
nu = min(m, n).
"""

from __future__ import annotations

import torch
from torch import Tensor


def as_matrices(S: Tensor) -> Tensor:
    """S in float64, refused unless it is a batch of finite, real matrices with rows and columns."""
    if not isinstance(S, Tensor):
        raise TypeError(f"`S` must be a torch.Tensor, got {type(S).__name__}.")
    if not S.is_floating_point():
        raise TypeError(
            f"`S` must be a real floating-point tensor, got {S.dtype}. "
            "Convert it first, for instance with S.to(torch.float64)."
        )
    if S.ndim < 2:
        raise ValueError(
            f"`S` must have at least 2 dimensions, got shape {tuple(S.shape)}. "
            "A vector has no condition number; S[None] makes it a matrix of one row."
        )
    if S.shape[-1] == 0 or S.shape[-2] == 0:
        raise ValueError(f"`S` must have rows and columns, got shape {tuple(S.shape)}.")
    wide = S.to(torch.float64)
    if not torch.isfinite(wide).all():
        count = int((~torch.isfinite(wide)).sum())
        raise ValueError(
            f"`S` must be finite, got {count} NaN or infinite of {S.numel()} entries. "
            "Look for the step at which they appeared."
        )
    return wide


def condition_number(S: Tensor) -> Tensor:
    """The condition number kappa = sigma_1/sigma_nu of the stored values, computed in float64.

    Args:
        S: real floating-point tensor (..., m, n); leading dimensions are a batch.

    Returns:
        float64 tensor (...), dimensionless, at least 1. It is inf where sigma_nu is at most
        max(m, n) eps(float64) sigma_1, that is zero to working precision, and nan where S = 0.

    Raises:
        ValueError: fewer than two dimensions, no entries, or an entry that is NaN or infinite.
        TypeError: S is integer, boolean or complex.

    Example:
        >>> import torch, wellcond as wc
        >>> wc.condition_number(torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.5, 0.0]]))
        tensor(4., dtype=torch.float64)
        >>> wc.condition_number(torch.ones(3, 3))
        tensor(inf, dtype=torch.float64)
    """
    # The largest entry as unit: singular values of 1e+-200 would overflow inside LAPACK's scaling
    # of subnormal entries, and a ratio does not mind.
    wide = as_matrices(S.detach() if isinstance(S, Tensor) else S)
    unit = wide.abs().amax(dim=(-2, -1), keepdim=True)
    sigma = torch.linalg.svdvals(wide / torch.where(unit > 0, unit, 1.0))
    largest, smallest = sigma[..., 0], sigma[..., -1]
    negligible = max(S.shape[-2:]) * torch.finfo(torch.float64).eps * largest
    kappa = torch.where(smallest <= negligible, torch.inf, largest / smallest)
    return torch.where(largest == 0, torch.nan, kappa)
