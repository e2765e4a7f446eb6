"""Steps towards isometries, S^T S = scale^2 I on the smaller side, by matrix products.

Letters: S (..., m, n) the weight; nu = min(m, n); sigma its singular values; H (..., nu, nu) the
smaller Gram matrix of S/scale; s = sigma/scale; theta the length of a step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from wellcond.linalg.checks import as_number
from wellcond.operators.base import (
    Gradient,
    HasGram,
    NewWeight,
    Operator,
    Rescaled,
    SpectralOperator,
    Updatable,
    over_matrices,
)
from wellcond.operators.rounding import widest_dtype
from wellcond.operators.stacked import stack, unstack
from wellcond.operators.subspace import Image
from wellcond.rules.base import Need, Rule, RuleState
from wellcond.rules.outcome import Outcome, OutcomeStatus
from wellcond.rules.penalty import Penalty, Strength

_REACH = 1.5  # times the scale: an isometry step first clips singular values to this
# Rounding of the Gram matrix may hide singular values below this share of sigma_1, and a hidden
# value must not be clipped.
_HIDDEN = 1e-6
_ROOM = 1e-6  # the share of the largest float up to which gradients are computed


class OrthogonalityPenalty(Penalty):
    """The distance of a weight from an isometry of this scale: 1/4 ||S^T S - scale^2 I||_F^2.

    S (m, n) is the weight, and sigma_1 >= ... >= sigma_nu are its singular values. If m < n, S S^T
    replaces S^T S. The penalty equals 1/4 sum_i (sigma_i^2 - scale^2)^2, and it is 0 exactly if all
    singular values equal the scale. The gradient S (S^T S - scale^2 I) is dense: it costs a Gram
    matrix and a product. Unlike `ConditionPenalty`, it acts on all singular values, including small
    ones. In float32 the value, a fourth power, is inf if sigma_1 is above about 4e9, and a weight
    with sigma_1 above about 1e10 gets no gradient. In float64 these bounds are 1e77 and 1e100.

    When attached, it performs the step of `IsometryStep` with theta = min(1, 2 eta scale^2), where
    eta = learning rate * strength, at all scales. For theta < 1 this is the explicit gradient step.
    Before the step, singular values above max(1.5, sqrt((2 + theta)/(2 theta))) scale are clipped
    to that value, because the step might raise kappa beyond it. So kappa never increases for
    theta <= 4/7. A zero singular value remains zero.

    Args:
        strength: factor of the penalty, as for `ConditionPenalty`.
        scale: the target of all singular values, positive and finite.

    Raises:
        ValueError: the strength is negative or not finite, or the scale is not positive and finite.
        TypeError: the strength is neither a number nor a callable, or the scale is not a number.

    Example:
        >>> import torch, wellcond as wc
        >>> layer = torch.nn.Linear(2, 2, bias=False)
        >>> layer.weight.data = torch.diag(torch.tensor([2.0, 1.0]))
        >>> wc.Regularizer(layer, wc.OrthogonalityPenalty(1.0))().item()  # (4 - 1)^2/4
        2.25
    """

    needs = frozenset({Need.gram})

    def __init__(self, strength: Strength, scale: float = 1.0) -> None:
        super().__init__(strength)
        self.scale = _valid_scale(scale)

    def evaluate(self, S: Operator, image: Image | None) -> tuple[Tensor, Gradient]:
        E = self._deviation(S)
        norm = torch.linalg.vector_norm(E, dim=(-2, -1), dtype=widest_dtype(E.device))
        # For a finite weight, NaN is the difference of two entries that overflow.
        value = (self.scale**4 / 4 * norm.square()).nan_to_num(nan=math.inf, posinf=math.inf)
        return value.to(E.dtype), self._gradient(E)

    def gradient(self, S: Operator, image: Image | None) -> Gradient:
        return self._gradient(self._deviation(S))

    def _deviation(self, S: Operator) -> Tensor:
        """H - I."""
        H = cast(HasGram, S).gram(unit=torch.full((), self.scale, dtype=S.dtype, device=S.device))
        return H - torch.eye(S.nu, dtype=H.dtype, device=H.device)

    def _gradient(self, E: Tensor) -> Gradient:
        # A bound of the sums in S E, with room for the strength: a sum that overflows may be
        # inf - inf. If E contains NaN, the comparison is False.
        largest = torch.linalg.vector_norm(E, torch.inf, dim=(-2, -1))
        size = self.scale**3 * E.shape[-1] * (largest + 1).sqrt() * largest
        known = size < _ROOM * torch.finfo(E.dtype).max
        C = torch.where(over_matrices(known), self.scale**2 * E, 0.0)
        return Gradient(Rescaled(E.new_zeros(E.shape[:-2]), C))

    def proximal_step(
        self, S: Operator, image: Image | None, eta: Tensor
    ) -> tuple[NewWeight, Tensor]:
        theta = (2 * eta * self.scale**2).clamp_max(1.0).expand(S.shape[:-2])
        # Up to here s times its new value increases with s, so kappa does not rise.
        reach = (1 / theta.clamp_min(1e-12) + 0.5).sqrt().clamp_min(_REACH)
        scale = torch.full_like(theta, self.scale, device=S.device)
        new = isometry_step(S, theta, scale, reach).where(theta > 0)
        return new, torch.zeros_like(theta, dtype=torch.bool)


@dataclass(frozen=True, kw_only=True)
class IsometryStep(Rule):
    """A step towards an isometry, S <- S + (theta/2) S (I - S^T S/scale^2), without a penalty.

    S (m, n) is the weight. If m < n, the step acts on S^T. It keeps weights near scale times an
    isometry during training, independently of the learning rate: every singular value s, in units
    of the scale, becomes s (1 + (theta/2) (1 - s^2)). A step costs a Gram matrix on the smaller
    side and a matrix product. `attach` applies it after every 10th optimizer step by default, as
    for penalties. `proximal_step` performs one step, whatever `lr` and `steps` are. `reg()` and
    `reg.add_gradients()` raise an error, and `reg.enforce()` skips it.

    Before a step, singular values above 1.5 scale are clipped to 1.5 scale. Clipping to the scale
    itself would erase the initialisation. One step brings s closer to 1 if s (s + 1) < 4/theta, and
    s keeps its sign if s^2 < (2 + theta)/theta. For s <= 1.5 both hold if theta <= 1, and kappa
    does not increase if theta <= 4/7. Near 1, each step multiplies the deviation from 1 by
    1 - theta; at theta = 1, the Newton-Schulz iteration, the deviation is squared. For all
    theta < 2, the steps converge from values near 1. A singular value 0 remains 0, but a rounding
    error in its place grows by a factor of 1 + theta/2 per step.

    Args:
        theta: the length of a step, between 0 and 2.
        scale: the target of the singular values. sqrt 2 suits layers before a ReLU; 1 suits linear
            layers and layers before tanh. None takes ||S||_F/sqrt(nu) of each matrix at its first
            step and stores it in the state; while S = 0 the scale remains undetermined. torch
            initialises a square `Linear` with a scale of 0.58, which is small.

    Raises:
        ValueError: theta is not between 0 and 2, or the scale is not positive and finite.
        TypeError: theta or the scale is not a number.

    Example:
        >>> import torch, wellcond as wc
        >>> layer = torch.nn.Linear(8, 8, bias=False)
        >>> _ = torch.nn.init.normal_(layer.weight, std=0.2)
        >>> reg = wc.Regularizer(layer, wc.IsometryStep(theta=1.0, scale=1.0))
        >>> for _ in range(50):
        ...     reg.proximal_step(lr=0.0)
        >>> bool(wc.condition_number(layer.weight) < 1.001)
        True
    """

    theta: float = 0.5
    scale: float | None = None

    needs = frozenset({Need.gram})

    def __post_init__(self) -> None:
        object.__setattr__(self, "theta", as_number(self.theta, "`theta`"))
        if not 0 < self.theta < 2:
            raise ValueError(
                f"`theta` must be between 0 and 2, got {self.theta}. "
                "Steps of other lengths lead away from isometries."
            )
        if self.scale is not None:
            object.__setattr__(self, "scale", _valid_scale(self.scale))

    def group_key(self) -> Hashable:
        return self

    def init(self, shape: torch.Size) -> RuleState:
        """The scale of each matrix, 0 while it is unknown."""
        scale = self.scale or 0.0
        return {"scale": torch.full(shape[:-2], scale, dtype=torch.float64, device="cpu")}

    def prepare(self, S: Operator, state: RuleState) -> RuleState:
        scale = state["scale"]
        if bool((scale > 0).all()):
            return state
        norm = S.squared_frobenius_norm(widest_dtype(S.device)).sqrt()
        known = torch.where(torch.isfinite(norm), norm / math.sqrt(S.nu), 0.0)
        return {"scale": torch.where(scale > 0, scale, known.to(scale))}

    def step(self, S: Operator, image: Image | None, eta: Tensor, state: RuleState) -> Outcome:
        finite = S.finite()
        weights = cast(Sequence[SpectralOperator], unstack(S))
        scales = state["scale"].unbind() if len(weights) > 1 else [state["scale"]]
        each = finite.reshape(len(weights), -1).all(dim=1).tolist()
        pairs = [(w, x) for w, x, fit in zip(weights, scales, each, strict=True) if fit]
        if pairs:
            self._step_(pairs)
        code = torch.where(finite, int(OutcomeStatus.applied), int(OutcomeStatus.not_finite))
        return Outcome(code.to(torch.int8))

    def _step_(self, weights: Sequence[tuple[SpectralOperator, Tensor]]) -> None:
        """Performs a step on finite weights with their scales, one per matrix; 0: no step."""
        with contextlib.ExitStack() as opened:
            near = [opened.enter_context(weight.spread()) for weight, _ in weights]
            parts = [one.own_part(scale) for one, (_, scale) in zip(near, weights, strict=True)]
            S = stack(near)
            scale = torch.stack(parts) if len(parts) > 1 else parts[0]
            scale = scale.to(S.device, widest_dtype(S.device))
            known = scale > 0
            theta, reach = torch.full_like(scale, self.theta), torch.full_like(scale, _REACH)
            new = isometry_step(S, theta, torch.where(known, scale, 1.0), reach)
            cast(Updatable, S).update_(new.where(known))


def isometry_step(S: Operator, theta: Tensor, scale: Tensor, reach: Tensor) -> NewWeight:
    """S + (theta/2) S (I - S^T S/scale^2), for S with singular values clipped to reach * scale.

    theta, scale and reach are (...), one number per matrix. If a Cholesky factorisation of
    reach^2 I - H shows that nothing must be clipped, matrix products suffice. If kappa is above
    1e6, values are clipped to at least 1e-6 sigma_1, and further in later steps.
    """
    weight = cast(HasGram, S)
    H = weight.gram(unit=scale)
    theta, reach = theta.to(H.dtype), reach.to(H.dtype)

    def is_below() -> list[Tensor]:
        identity = torch.eye(S.nu, dtype=H.dtype, device=H.device)
        failed = torch.linalg.cholesky_ex(over_matrices(reach.square()) * identity - H).info
        return [((failed == 0).all() & torch.isfinite(H).all()).to(H.dtype)]

    # Processes that share a weight must agree: the other branch computes a Gram matrix together.
    if bool(weight.agree(is_below, H.new_empty(()))[0]):
        return NewWeight(Rescaled(1 + theta / 2, -over_matrices(theta / 2) * H))
    # In float64, because the product cancels large parts, and squares of 1e30 are finite.
    H = weight.gram(widest_dtype(S.device), scale)
    theta, reach = theta.to(H.dtype), reach.to(H.dtype)
    finite = torch.isfinite(H).all(dim=-1).all(dim=-1)
    squares, V = torch.linalg.eigh(torch.where(over_matrices(finite), H, 0.0))
    s = squares.clamp_min(0).sqrt()
    hidden = _HIDDEN * s[..., -1:]
    highest = reach[..., None].maximum(torch.where(s[..., :1] < hidden, hidden, 0.0))
    share = (highest / torch.where(s > 0, s, 1.0)).clamp_max(1.0).where(s > 0, 1.0)
    kept = s.minimum(reach[..., None])
    factor = share * (1 + theta[..., None] / 2 * (1 - kept.square()))
    # Not S plus a change, which nearly cancels S if all singular values are far too large.
    C = (V * factor[..., None, :]) @ V.mT
    return NewWeight(Rescaled(torch.zeros_like(theta), C)).where(finite)


def _valid_scale(scale: float) -> float:
    number = as_number(scale, "`scale`")
    if not 0 < number < math.inf:
        raise ValueError(f"`scale` must be positive and finite, got {scale}.")
    return float(number)
