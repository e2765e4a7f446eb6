"""Relatives of r that only need the leading triplets: the stable rank and the spectral norm.

Letters: S (..., m, n) the weight; nu = min(m, n); sigma_1 >= ... >= sigma_nu its singular values,
of which k are known; eta the length of a proximal step; tau the value to which it clips them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wellcond.linalg.checks import as_number
from wellcond.operators.base import Gradient, LowRank, NewWeight, Operator, over_matrices
from wellcond.operators.norms import squared_norm_over
from wellcond.operators.subspace import Image
from wellcond.rules.condition import clip_at, find_clip_height, limit_length
from wellcond.rules.penalty import Penalty, Strength

# A step clips to at least this share of sigma_1. Below it, rounding errors of ||S||_F would
# determine the factor by which the step rescales.
_LOWEST = 0.01


class StableRankPenalty(Penalty):
    """The condition-number regulariser relative to the scale: r/sigma_1^2 = (1 - srank/nu)/2.

    S (m, n) is the weight, nu = min(m, n), u_1, v_1 and sigma_1 are its first singular vectors and
    its largest singular value, and r is the penalty of `ConditionPenalty`. srank =
    ||S||_F^2/sigma_1^2 is the stable rank, between 1 and nu. The penalty is in [0, 1/2), and it is
    0 exactly for kappa = 1. Unlike `ConditionPenalty`, it is scale-invariant: c S has the same
    penalty as S, so shrinking a weight does not lower it.

    If sigma_1 is simple, the gradient is c S - c srank sigma_1 u_1 v_1^T with c = -1/(nu
    sigma_1^2); it is 0 at S = 0. The gradient is orthogonal to S and scales as 1/||S||_F, so plain
    gradient steps make S grow, and they are weak on a large weight. The proximal step of `attach`
    avoids both problems: it performs the proximal step of r with length eta/sigma_1^2 and then
    restores ||S||_F. A weight gets no gradient if sigma_1 is below 1e-19 or above 1e20/sqrt(nu) in
    float32, or below 1e-154 or above 1e160/sqrt(nu) in float64.

    Args:
        strength: factor of the penalty, as for `ConditionPenalty`. The gradient equals that of
            `ConditionPenalty` with strength/sigma_1^2, except for the component along S.

    Raises:
        ValueError: the strength is negative or not finite.
        TypeError: the strength is neither a number nor a callable.

    Example:
        >>> import torch, wellcond as wc
        >>> layer = torch.nn.Linear(2, 2, bias=False)
        >>> layer.weight.data = torch.diag(torch.tensor([20.0, 10.0]))  # srank = 5/4
        >>> round(wc.Regularizer(layer, wc.StableRankPenalty(1.0))().item(), 4)
        0.1875
    """

    def evaluate(self, S: Operator, image: Image | None) -> tuple[Tensor, Gradient]:
        assert image is not None
        sigma, srank = image.top.sigma[..., 0], _stable_rank(S, image)
        value = torch.where(sigma > 0, (1 - srank / S.nu) / 2, 0.0)
        return value, self._gradient(S, image, srank)

    def gradient(self, S: Operator, image: Image | None) -> Gradient:
        assert image is not None
        return self._gradient(S, image, _stable_rank(S, image))

    def _gradient(self, S: Operator, image: Image, srank: Tensor) -> Gradient:
        left, right, _ = image.top
        inverse = 1 / image.top.sigma[..., 0]
        c = -inverse / S.nu * inverse
        # A subnormal c has too few digits for c S to cancel U V^T along S.
        known = torch.isfinite(c) & (
            -c > 1e3 * torch.finfo(c.dtype).smallest_normal * torch.finfo(c.dtype).eps
        )
        inverse, c = torch.where(known, inverse, 0.0), torch.where(known, c, 0.0)
        return Gradient(
            LowRank(
                c, over_matrices(srank / S.nu * inverse) * (left * over_matrices(inverse)), right
            )
        )

    def proximal_step(
        self, S: Operator, image: Image | None, eta: Tensor
    ) -> tuple[NewWeight, Tensor]:
        assert image is not None
        ritz = image.triplets
        sigma = ritz.sigma
        top = torch.where(sigma[..., :1] > 0, sigma[..., :1], 1.0)
        x = sigma / top
        # Longer steps also clip to the lowest value.
        wanted = (eta.to(x.dtype) / top[..., 0].square()).nan_to_num(nan=0.0).clamp_max(1e6)
        length, shortened = limit_length(x, S.nu, wanted)
        tau = find_clip_height(x, length).clamp_min(_LOWEST)
        known = x.square().sum(dim=-1)
        rest = torch.zeros_like(known)
        if x.shape[-1] < S.nu:
            rest = (_stable_rank(S, image) - known).clamp_min(0)
        after = rest + x.minimum(tau).square().sum(dim=-1)
        c = torch.where(after > 0, (rest + known) / after, 1.0).sqrt()
        return NewWeight(clip_at(ritz, x, tau, c)), shortened


def _stable_rank(S: Operator, image: Image) -> Tensor:
    """||S||_F^2/sigma_1^2, 0 for S = 0."""
    sigma = image.top.sigma[..., 0]
    squares = squared_norm_over(S, sigma, precise=True)
    return torch.where(sigma > 0, squares, 0.0).to(sigma.dtype)


class SpectralNormPenalty(Penalty):
    """Half the squared excess of the spectral norm over a target: 1/2 (sigma_1 - target)_+^2.

    sigma_1 >= ... >= sigma_nu are the singular values of the weight, u_i and v_i its singular
    vectors, and eta = learning rate * strength is the length of a proximal step.

    It is a soft upper bound on sigma_1, for networks whose Lipschitz constant should remain
    bounded. For a bound that must hold, use `SingularValueLimit(upper=target)`. The penalty does
    not act on small singular values, so kappa decreases only through sigma_1. If sigma_1 is simple,
    the gradient is (sigma_1 - target)_+ u_1 v_1^T. If sigma_1 is above the target, the proximal
    step clips the singular values to max_j (sum_{i<=j} sigma_i + eta target)/(j + eta); otherwise
    it changes nothing.

    Args:
        strength: factor of the penalty, as for `ConditionPenalty`.
        target: the value up to which sigma_1 is not penalised; a finite, non-negative number.

    Raises:
        ValueError: the strength or the target is negative or not finite.
        TypeError: the strength is neither a number nor a callable, or the target is not a number.

    Example:
        >>> import torch, wellcond as wc
        >>> layer = torch.nn.Linear(4, 4, bias=False)
        >>> _ = torch.nn.init.ones_(layer.weight)  # sigma_1 = 4
        >>> round(wc.Regularizer(layer, wc.SpectralNormPenalty(1.0, target=1.0))().item(), 4)
        4.5
    """

    def __init__(self, strength: Strength, target: float = 1.0) -> None:
        super().__init__(strength)
        self.target = float(as_number(target, "`target`"))
        if not 0 <= self.target < math.inf:
            raise ValueError(f"`target` must be finite and not negative, got {target}.")

    def evaluate(self, S: Operator, image: Image | None) -> tuple[Tensor, Gradient]:
        assert image is not None
        left, right, _ = image.top
        sigma = image.top.sigma[..., 0]
        excess = (sigma - self.target).clamp_min(0)
        share = excess / torch.where(sigma > 0, sigma, 1.0)
        gradient = LowRank(torch.zeros_like(sigma), over_matrices(share) * left, right)
        return excess.square() / 2, Gradient(gradient)

    def proximal_step(
        self, S: Operator, image: Image | None, eta: Tensor
    ) -> tuple[NewWeight, Tensor]:
        assert image is not None
        ritz = image.triplets
        sigma = ritz.sigma
        length, shortened = limit_length(sigma, S.nu, eta, self.target)
        tau = find_clip_height(sigma, length, self.target)
        return NewWeight(clip_at(ritz, sigma, tau, torch.ones_like(length))), shortened
