"""The leading singular triplets of a matrix, and the share of their values due to an update.

Letters: S (m, n) in float64; U (m, k), sigma (k), V (n, k) singular triplets; nu = min(m, n).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wellcond.linalg.lapack import svd

# Up to this nu a full decomposition takes at most about two seconds.
_WHOLE = 1024
_ROUNDS, _EXTRA = 8, 8


class UpdateShare(NamedTuple):
    """The share of the k leading singular values of S that comes from its part D.

    Attributes:
        among: k.
        new: the number of values of which more than half comes from D.
        share: the share of their sum that comes from D; negative if D reduces it.
    """

    among: int
    new: int
    share: float


def measure_share(S: Tensor, D: Tensor, count: int) -> UpdateShare:
    """The share of D in sigma_j = u_j^T S v_j = u_j^T (S - D) v_j + u_j^T D v_j: the last term.

    The sum over j does not depend on the choice of vectors for equal singular values. If nu > 1024,
    the triplets are estimates by subspace iteration. The identity also holds exactly for them, but
    they may miss some of several leading values that are close together.

    Args:
        S: (m, n), finite and not zero.
        D: (m, n).
        count: k; all singular values are used if there are fewer.
    """
    U, sigma, V = leading_triplets(S, count)
    parts = (U * (D @ V)).sum(0)
    share = float(parts.sum() / sigma.sum())
    return UpdateShare(len(sigma), int((parts > sigma / 2).sum()), share)


def leading_triplets(S: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, sigma and V of the `count` leading singular values."""
    k = min(count, *S.shape)
    if min(S.shape) <= _WHOLE:
        U, sigma, Vh = svd(S)
        return U[:, :k], sigma[:k], Vh[:k].mT
    source = torch.Generator().manual_seed(0)
    V = torch.randn(S.shape[1], min(k + _EXTRA, *S.shape), generator=source, dtype=S.dtype)
    for _ in range(_ROUNDS):
        V = torch.linalg.qr(S.mT @ torch.linalg.qr(S @ V).Q).Q
    U, sigma, Wh = svd(S @ V)
    return U[:, :k], sigma[:k], V @ Wh[:k].mT
