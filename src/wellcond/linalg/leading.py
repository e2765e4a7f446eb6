"""The leading singular vectors of a matrix, and how much of what they carry was added to it.

Letters: S (m, n) in float64; U (m, k), sigma (k), V (n, k) singular triplets; nu = min(m, n).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from wellcond.linalg.lapack import svd

# Up to there a decomposition of the whole takes less than a second or two.
_WHOLE = 1024
_ROUNDS, _BESIDES = 8, 8


class Added(NamedTuple):
    """How much of the k leading singular values of S comes from a part D of it.

    Attributes:
        among: how many there are, k.
        new: of how many more than half comes from D.
        share: of their sum what comes from D; below 0 where D takes away.
    """

    among: int
    new: int
    share: float


def added(S: Tensor, D: Tensor, count: int) -> Added:
    """sigma_j = u_j^T S v_j = u_j^T (S - D) v_j + u_j^T D v_j: the second term over sigma_j.

    The sum over j does not depend on the vectors that are chosen where singular values are equal.
    Of a matrix with nu > 1024 the triplets are estimates by a subspace iteration, for which the
    same holds exactly; they may miss some of the leading ones where these lie close together.

    Args:
        S: (m, n), finite and not zero.
        D: (m, n).
        count: k; of fewer singular values, all.
    """
    U, sigma, V = leading(S, count)
    parts = (U * (D @ V)).sum(0)
    share = float(parts.sum() / sigma.sum())
    return Added(len(sigma), int((parts > sigma / 2).sum()), share)


def leading(S: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, sigma and V of the leading singular values."""
    k = min(count, *S.shape)
    if min(S.shape) <= _WHOLE:
        U, sigma, Vh = svd(S)
        return U[:, :k], sigma[:k], Vh[:k].mT
    source = torch.Generator().manual_seed(0)
    V = torch.randn(S.shape[1], min(k + _BESIDES, *S.shape), generator=source, dtype=S.dtype)
    for _ in range(_ROUNDS):
        V = torch.linalg.qr(S.mT @ torch.linalg.qr(S @ V).Q).Q
    U, sigma, Wh = svd(S @ V)
    return U[:, :k], sigma[:k], V @ Wh[:k].mT
