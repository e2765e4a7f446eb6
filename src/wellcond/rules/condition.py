"""The condition-number regulariser r, and its proximal step from the leading triplets only.

Letters: S (..., m, n) the weight; nu = min(m, n); sigma_1 >= ... >= sigma_nu its singular values,
of which k are known; eta the length of a proximal step; tau the value to which it clips them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond.operators.base import Gradient, LowRank, NewWeight, Operator
from wellcond.operators.norms import squared_norm_over
from wellcond.operators.subspace import Image, Ritz
from wellcond.rules.penalty import Penalty


class ConditionPenalty(Penalty):
    """The condition-number regulariser r(S) = 1/2 ||S||_2^2 - ||S||_F^2/(2 nu).

    S (m, n) is the weight, sigma_1 >= ... >= sigma_nu are its singular values, nu = min(m, n), and
    u_i, v_i are its singular vectors.

    r >= 0, and r(S) = 0 exactly for S of full rank with condition number 1 (Nenov, Haider & Balazs,
    arXiv 2410.00169, Theorem 2.1). Its unit is that of a squared singular value. If sigma_1 is
    simple, the gradient is sigma_1 u_1 v_1^T - S/nu (Theorem 3.1).

    A single small singular value hardly changes r, because r = sigma_1^2/2 (1 - srank/nu), where
    srank is the stable rank: one value near zero among nu adds only sigma_1^2/(2 nu).
    diag(1, ..., 1, 1e-6) with nu = 784 has kappa = 1e6 and r = 6.4e-4. r does not fix the scale of
    S.

    Args:
        strength: factor of r; a finite, non-negative number, or a callable step -> number, where
            step counts applications (optimizer steps when attached).

    Raises:
        ValueError: the strength is negative or not finite.
        TypeError: the strength is neither a number nor a callable.

    Example:
        >>> import wellcond as wc
        >>> wc.ConditionPenalty(1e-2)
        ConditionPenalty(strength=0.01)
    """

    def evaluate(self, S: Operator, image: Image | None) -> tuple[Tensor, Gradient]:
        assert image is not None
        sigma = image.top.sigma[..., 0]
        # Relative to sigma_1, because squares may overflow or vanish although r does not.
        relative = (1 - squared_norm_over(S, sigma) / S.nu) / 2
        value = sigma * relative * sigma
        return value.to(sigma.dtype), self.gradient(S, image)

    def gradient(self, S: Operator, image: Image | None) -> Gradient:
        assert image is not None
        left, right, _ = image.top
        return Gradient(LowRank(left.new_full(left.shape[:-2], -1 / S.nu), left, right))

    def proximal_step(
        self, S: Operator, image: Image | None, eta: Tensor
    ) -> tuple[NewWeight, Tensor]:
        assert image is not None
        ritz = image.triplets
        change, shortened = clip_leading(ritz, ritz.sigma, S.nu, eta)
        return NewWeight(change), shortened


def clip_leading(ritz: Ritz, sigma: Tensor, nu: int, eta: Tensor) -> tuple[LowRank, Tensor]:
    """The proximal step of r from the k leading triplets; per matrix, whether it was shortened.

    The step is explicit in the concave part, -||S||_F^2/(2 nu), and implicit in the convex part,
    1/2 ||S||_2^2. With c = 1 + eta/nu, every sigma_i becomes min(c sigma_i, tau), where tau is the
    root of sum_i (c sigma_i - tau)_+ = eta tau, which is max_j (c sum_{i<=j} sigma_i)/(j + eta).

    If k < nu, the root must be at least as large as all unknown values: tau >= c sigma_k. This
    holds for every step up to sum_i (sigma_i/sigma_k - 1). A longer step is shortened to that.
    """
    length, shortened = limit_length(sigma, nu, eta)
    # tau/c: relative to c S, whose singular values are c sigma.
    return clip_at(ritz, sigma, find_clip_height(sigma, length), 1 + length / nu), shortened


def limit_length(sigma: Tensor, nu: int, eta: Tensor, target: float = 0.0) -> tuple[Tensor, Tensor]:
    """The longest step up to eta that k known values permit, and whether it is shorter than eta.

    The result of `find_clip_height` is at least sigma_k for lengths up to sum_i (sigma_i -
    sigma_k)/(sigma_k - target), and for every length if sigma_k <= target.
    """
    length = eta.to(sigma.dtype).expand(sigma.shape[:-1])
    if sigma.shape[-1] == nu:
        return length, torch.zeros_like(length, dtype=torch.bool)
    above = sigma[..., -1:] - target
    unit = torch.where(above > 0, above, 1.0)
    ratios = ((sigma - sigma[..., -1:]) / unit).clamp_min(0)
    reach = torch.where(above[..., 0] > 0, ratios.sum(dim=-1), torch.inf)
    return torch.minimum(length, reach), reach < length


def find_clip_height(sigma: Tensor, length: Tensor, target: float = 0.0) -> Tensor:
    """The root tau (..., 1) of sum_i (sigma_i - tau)_+ = length (tau - target).

    It is max_j (sum_{i<=j} sigma_i + length target)/(j + length). If sigma_1 is below the target,
    this is not the root, but it is at least sigma_1, so nothing is clipped.
    """
    j = torch.arange(1, sigma.shape[-1] + 1, dtype=sigma.dtype, device=sigma.device)
    eta = length[..., None]
    return ((sigma.cumsum(dim=-1) + eta * target) / (j + eta)).amax(dim=-1, keepdim=True)


def clip_at(ritz: Ritz, sigma: Tensor, tau: Tensor, c: Tensor) -> LowRank:
    """c times the weight, with its known singular values clipped to tau."""
    share = torch.where(sigma > tau, 1 - tau / torch.where(sigma > 0, sigma, 1.0), 0.0)
    return LowRank(c, -c[..., None, None] * ritz.left * share[..., None, :], ritz.right)
