"""Penalties on a weight: value, gradient, proximal step.

A penalty never sees a model. It is given a weight as an operator and what one product with it told
of its leading subspace, and answers in a form that costs no temporary of the size of the weight: a
number times S plus a product of two skinny factors.

Letters: S (..., m, n) the weight; nu = min(m, n); sigma_1 >= ... >= sigma_nu its singular values,
u_i and v_i its singular vectors; eta the length of a proximal step; kappa = sigma_1/sigma_nu.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wellcond.linalg.checks import as_matrices
from wellcond.linalg.nearest import check_limit, limited
from wellcond.linalg.spectrum import measure
from wellcond.operators.stored import Operator, StoredMatrix
from wellcond.operators.subspace import Product, Ritz, ritz_triplets, top_pair

Strength = float | Callable[[int], float]


class LowRankChange(NamedTuple):
    """c S + U V^T, with c (...), U (..., m, k), V (..., n, k); k may be 0."""

    c: Tensor
    U: Tensor
    V: Tensor


class PenaltyFunction(torch.autograd.Function):
    """A value that is known, with a gradient c S + U V^T that is known; the factors are fixed.

    With v_1 held fixed, 1/2 ||S v_1||^2 - ||S||_F^2/(2 nu) is the penalty to differentiate: no
    derivative passes through the singular vectors, which have none where singular values tie.
    """

    @staticmethod
    def forward(ctx: Any, S: Tensor, value: Tensor, c: Tensor, U: Tensor, V: Tensor) -> Tensor:
        ctx.save_for_backward(S, c, U, V)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        S, c, U, V = ctx.saved_tensors
        gradient = torch.zeros_like(S)
        change = LowRankChange(weight * c, weight[..., None, None] * U, V)
        StoredMatrix(gradient).add_(change.c, StoredMatrix(S), change.U, change.V)
        return gradient, None, None, None, None


def with_gradient(S: Tensor, value: Tensor, gradient: LowRankChange) -> Tensor:
    """The value, differentiable once with respect to S by the gradient given."""
    result: Tensor = PenaltyFunction.apply(S, value, *gradient)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class Penalty(abc.ABC):
    """What a `Regularizer` asks of a penalty; the strength multiplies value and gradient."""

    strength: Strength
    needs_subspace: ClassVar[bool] = True
    has_gradient: ClassVar[bool] = True  # else it acts by proximal steps alone
    gradient_rank: ClassVar[int] = 1  # columns of U and V in its gradient

    def __post_init__(self) -> None:
        if callable(self.strength):
            return
        object.__setattr__(self, "strength", _valid_strength(self.strength))

    def strength_at(self, step: int) -> float:
        """The strength after `step` applications."""
        if callable(self.strength):
            return _valid_strength(self.strength(step), f"`strength({step})`")
        return self.strength

    @abc.abstractmethod
    def value(self, S: Operator, product: Product | None) -> Tensor:
        """The penalty at strength 1, one number a matrix."""

    @abc.abstractmethod
    def gradient(self, S: Operator, product: Product | None) -> LowRankChange:
        """Its gradient at strength 1."""

    @abc.abstractmethod
    def proximal_step(
        self, S: Operator, product: Product | None, eta: Tensor
    ) -> tuple[LowRankChange | Tensor, Tensor]:
        """The weight after a proximal step of length eta, and per matrix whether it fell short.

        As a change, or if it takes no such form, as the values to be stored.
        """


def _valid_strength(strength: Any, name: str = "`strength`") -> float:
    try:
        number = float(strength)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must be a number or a callable step -> number, got {strength!r}."
        ) from None
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(
            f"{name} must be finite and not negative, got {number}. "
            "To leave a weight out, give its pattern None instead of a penalty."
        )
    return number


class Condition(Penalty):
    """The condition-number regulariser r(S) = 1/2 ||S||_2^2 - ||S||_F^2/(2 nu).

    r >= 0, and r(S) = 0 exactly for S of full rank with condition number 1 (Nenov, Haider & Balazs,
    arXiv 2410.00169, Theorem 2.1). Its unit is that of a squared singular value. The gradient is
    sigma_1 u_1 v_1^T - S/nu where sigma_1 is simple (Theorem 3.1).

    What it does not see: r = sigma_1^2/2 (1 - srank/nu) with the stable rank srank, so a single
    tiny singular value among nu costs it only 1/(2 nu) of sigma_1^2. diag(1, ..., 1, 1e-6) with
    nu = 784 has kappa = 1e6 and r = 6.4e-4. Nor does it hold the scale of S.

    Args:
        strength: factor of r; a finite number that is not negative, or a callable step -> number,
            where step counts applications (optimizer steps when attached).

    Raises:
        ValueError: the strength is negative or not finite.
        TypeError: it is neither a number nor a callable.

    Example:
        >>> import wellcond as wc
        >>> wc.Condition(1e-2)
        Condition(strength=0.01)
    """

    def value(self, S: Operator, product: Product | None) -> Tensor:
        assert product is not None
        sigma = top_pair(product).sigma[..., 0]
        return (sigma.square() - S.squared_frobenius_norm() / S.nu) / 2

    def gradient(self, S: Operator, product: Product | None) -> LowRankChange:
        assert product is not None
        left, right, _ = top_pair(product)
        return LowRankChange(left.new_full(left.shape[:-2], -1 / S.nu), left, right)

    def proximal_step(
        self, S: Operator, product: Product | None, eta: Tensor
    ) -> tuple[LowRankChange, Tensor]:
        assert product is not None
        ritz = ritz_triplets(product)
        return clip_leading(ritz, ritz.sigma, S.nu, eta)


class Tikhonov(Penalty):
    """Tikhonov regularisation 1/2 ||S||_F^2, also known as L2 or weight decay.

    Gradient S; proximal step S/(1 + eta). It shrinks all singular values and so does not lower the
    condition number by itself; it stands here as the baseline of the paper.

    Args:
        strength: factor of the penalty, as for `Condition`.

    Raises:
        ValueError: the strength is negative or not finite.
        TypeError: it is neither a number nor a callable.

    Example:
        >>> import wellcond as wc
        >>> wc.Tikhonov(lambda step: 1e-4 * min(1, step / 100)).strength_at(50)
        5e-05
    """

    needs_subspace = False
    gradient_rank = 0

    def value(self, S: Operator, product: Product | None) -> Tensor:
        return S.squared_frobenius_norm() / 2

    def gradient(self, S: Operator, product: Product | None) -> LowRankChange:
        return _multiple(S, torch.ones(S.shape[:-2], dtype=S.dtype, device=S.device))

    def proximal_step(
        self, S: Operator, product: Product | None, eta: Tensor
    ) -> tuple[LowRankChange, Tensor]:
        c = (1 / (1 + eta)).expand(S.shape[:-2])
        return _multiple(S, c), torch.zeros_like(c, dtype=torch.bool)


@dataclass(frozen=True)
class ConditionLimit(Penalty):
    """The hard limit kappa <= K: 0 where it holds, infinite where it does not.

    Its proximal step replaces the weight by a nearest one that obeys (see `nearest`), as measured
    after rounding to the dtype of the weight; the length of the step does not matter. So every
    checkpoint that is saved after a proximal step obeys; `reg.proximal_step_(lr=0)` before saving
    makes sure. A zero weight has no condition number and stays zero.

    It has no gradient: use `attach` or `proximal_step_`. A step measures the weight in float64 on
    the CPU, and where it is above the limit decomposes it: dear, so `every` should be large.

    Args:
        max_condition: K, at least 1.

    Raises:
        ValueError: K < 1 or nan; in a proximal step, rounding to the dtype of a weight lifts its
            kappa above K whatever is done, as in bfloat16 for K below 1.004 or so.
        TypeError: K is not a number.

    Example:
        >>> import torch, wellcond as wc
        >>> layer = torch.nn.Linear(8, 8, bias=False)
        >>> reg = wc.Regularizer(layer, wc.ConditionLimit(3.0))
        >>> reg.proximal_step_(lr=0.0)
        >>> bool(wc.condition_number(layer.weight) <= 3.0)
        True
    """

    max_condition: float
    strength: Strength = field(default=1.0, init=False, repr=False)
    needs_subspace = False
    has_gradient = False

    def __post_init__(self) -> None:
        check_limit(self.max_condition)

    def value(self, S: Operator, product: Product | None) -> Tensor:
        # nan where there is no condition number, which is no obeying.
        kappas = [
            measure(one).condition_number if torch.isfinite(one).all() else math.nan
            for one in _each(S)
        ]
        obeys = torch.tensor(kappas, device=S.device) <= self.max_condition
        return torch.where(obeys, 0.0, torch.inf).to(S.dtype).reshape(S.shape[:-2])

    def gradient(self, S: Operator, product: Product | None) -> LowRankChange:
        raise NotImplementedError("ConditionLimit has no gradient")

    def proximal_step(
        self, S: Operator, product: Product | None, eta: Tensor
    ) -> tuple[Tensor, Tensor]:
        # What is not finite stays as it is: the caller says so.
        obeying = [
            limited(one, self.max_condition).S if torch.isfinite(one).all() else one
            for one in _each(S)
        ]
        shortened = torch.zeros(S.shape[:-2], dtype=torch.bool, device=S.device)
        return torch.stack(obeying).reshape(S.shape).to(S.device), shortened


def _each(S: Operator) -> Tensor:
    """The matrices of a stack, or the one, on the CPU."""
    assert isinstance(S, StoredMatrix)
    return S.dense().reshape(-1, *S.shape[-2:]).cpu()


def _multiple(S: Operator, c: Tensor) -> LowRankChange:
    *stack, m, n = S.shape
    return LowRankChange(c, c.new_zeros(*stack, m, 0), c.new_zeros(*stack, n, 0))


def clip_leading(ritz: Ritz, sigma: Tensor, nu: int, eta: Tensor) -> tuple[LowRankChange, Tensor]:
    """The proximal step of r from the k leading triplets; per matrix, whether it was shortened.

    Forward on the concave part, -||S||_F^2/(2 nu), and implicit on the convex part, 1/2 ||S||_2^2:
    with c = 1 + eta/nu every sigma_i becomes min(c sigma_i, tau), where tau is the root of
    sum_i (c sigma_i - tau)_+ = eta tau, which is max_j (c sum_{i<=j} sigma_i)/(j + eta).

    When k < nu the root must lie above all that is not known, tau >= c sigma_k. It does for every
    step up to sum_i (sigma_i/sigma_k - 1), and a longer one is cut to that.
    """
    k = sigma.shape[-1]
    length = eta.to(sigma.dtype).expand(sigma.shape[:-1])
    shortened = torch.zeros_like(length, dtype=torch.bool)
    if k < nu:
        last = sigma[..., -1]
        ratios = sigma / torch.where(last > 0, last, 1.0)[..., None]
        reach = torch.where(last > 0, (ratios - 1).clamp_min(0).sum(dim=-1), torch.inf)
        shortened = reach < length
        length = torch.minimum(length, reach)
    c = 1 + length / nu
    j = torch.arange(1, k + 1, dtype=sigma.dtype, device=sigma.device)
    # tau/c: relative to c S, whose singular values are c sigma.
    tau = (sigma.cumsum(dim=-1) / (j + length[..., None])).amax(dim=-1, keepdim=True)
    clipped = torch.where(sigma > tau, 1 - tau / torch.where(sigma > 0, sigma, 1.0), 0.0)
    return LowRankChange(
        c, -c[..., None, None] * ritz.left * clipped[..., None, :], ritz.right
    ), shortened


class _Exact(NamedTuple):
    S: Tensor  # float64, detached
    triplets: Ritz
    sigma: Tensor


def _exact(S: Tensor) -> _Exact:
    wide = as_matrices(S.detach() if isinstance(S, Tensor) else S)
    U, sigma, Vh = torch.linalg.svd(wide, full_matrices=False)
    return _Exact(wide, Ritz(U * sigma[..., None, :], Vh.mT), sigma)


def _penalty_from(sigma: Tensor) -> Tensor:
    # Each term is a product of non-negative numbers: r cannot come out negative near kappa = 1.
    top = sigma[..., :1]
    return ((top - sigma) * (top + sigma)).sum(dim=-1) / (2 * sigma.shape[-1])


def condition_penalty(S: Tensor) -> Tensor:
    """The regulariser r(S) = 1/2 ||S||_2^2 - ||S||_F^2/(2 nu), by a full SVD, differentiable once.

    Equal to sum_i (sigma_1^2 - sigma_i^2)/(2 nu), so never negative; 0 exactly for S = 0 and for
    full rank with condition number 1 (arXiv 2410.00169, Theorem 2.1). Backward gives
    `condition_penalty_gradient`. In a training loop use `Regularizer`, which needs no SVD.

    Args:
        S: real floating-point tensor (..., m, n); leading dimensions are a batch.

    Returns:
        Tensor (...) in the dtype of S, in units of a squared singular value; computed in float64.

    Raises:
        ValueError: fewer than two dimensions, no entries, or an entry that is NaN or infinite.
        TypeError: S is integer, boolean or complex.

    Example:
        >>> import torch, wellcond as wc
        >>> wc.condition_penalty(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        tensor(0.7500)
    """
    _, (left, right, _), sigma = _exact(S)
    value = _penalty_from(sigma).to(S.dtype)
    c = torch.full_like(sigma[..., 0], -1 / sigma.shape[-1])
    return with_gradient(S, value, LowRankChange(c, left[..., :1], right[..., :1]))


def condition_penalty_gradient(S: Tensor) -> Tensor:
    """The gradient of r: sigma_1 u_1 v_1^T - S/nu (arXiv 2410.00169, Theorem 3.1).

    Where sigma_1 is not simple r has no gradient, and this is one element of the subdifferential of
    its convex part minus S/nu. For orthogonal S, kappa = 1, its norm is then sqrt(1 - 1/nu), not 0.

    Args:
        S: real floating-point tensor (..., m, n); leading dimensions are a batch.

    Returns:
        Tensor (..., m, n) in the dtype of S, in units of a singular value; computed in float64.

    Raises:
        ValueError: fewer than two dimensions, no entries, or an entry that is NaN or infinite.
        TypeError: S is integer, boolean or complex.

    Example:
        >>> import torch, wellcond as wc
        >>> wc.condition_penalty_gradient(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        tensor([[ 1.0000,  0.0000],
                [ 0.0000, -0.5000]])
    """
    wide, (left, right, _), sigma = _exact(S)
    # Adding 0.0 turns the zeros' signs positive.
    return (left[..., :1] @ right[..., :1].mT - wide / sigma.shape[-1] + 0.0).to(S.dtype)


def condition_penalty_bound(S: Tensor) -> Tensor:
    """The bound of the paper: kappa(S) <= exp(nu r(S)/sigma_nu^2) (arXiv 2410.00169, Theorem 2.2).

    Args:
        S: real floating-point tensor (..., m, n); leading dimensions are a batch.

    Returns:
        Tensor (...), float64, dimensionless. It is inf where sigma_nu = 0 or the exponential
        overflows, and nan where S = 0. A bound of the exact value, computed without directed
        rounding.

    Raises:
        ValueError: fewer than two dimensions, no entries, or an entry that is NaN or infinite.
        TypeError: S is integer, boolean or complex.

    Example:
        >>> import torch, wellcond as wc
        >>> S = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> float(wc.condition_number(S)), round(float(wc.condition_penalty_bound(S)), 4)
        (2.0, 4.4817)
    """
    sigma = _exact(S).sigma
    # Relative to sigma_1, so that squares of 1e-200 do not vanish; 0/0 is nan, which is meant.
    sigma = sigma / sigma[..., :1]
    return torch.exp(sigma.shape[-1] * _penalty_from(sigma) / sigma[..., -1].square())


def proximal_step(S: Tensor, step: float | Tensor) -> Tensor:
    """One exact proximal step on r: sigma_i becomes min(c sigma_i, tau), with c = 1 + step/nu.

    tau = max_j (c sum_{i<=j} sigma_i)/(j + step) is the root of sum_i (c sigma_i - tau)_+ = step
    tau. The result minimises 1/2 ||X - c S||_F^2 + step/2 ||X||_2^2 over X. For every step neither
    kappa nor r rises, and tied singular values stay tied.

    Args:
        S: real floating-point tensor (..., m, n); leading dimensions are a batch. Not changed.
        step: learning rate times strength, dimensionless, finite and not negative.

    Returns:
        A new tensor, the shape and dtype of S; computed in float64 from a full SVD.

    Raises:
        ValueError: a negative or infinite step, fewer than two dimensions, no entries, or an entry
            that is NaN or infinite.
        TypeError: S is integer, boolean or complex.

    Example:
        >>> import torch, wellcond as wc
        >>> wc.proximal_step(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), 0.5)
        tensor([[1.6667, 0.0000],
                [0.0000, 1.2500]])
    """
    wide, triplets, sigma = _exact(S)
    eta = torch.as_tensor(step, dtype=torch.float64, device=wide.device)
    if eta.ndim != 0 or not bool(torch.isfinite(eta)) or bool(eta < 0):
        raise ValueError(
            f"`step` must be a single finite number that is not negative, got {step}. "
            "It is the learning rate times the strength."
        )
    (c, U, V), _ = clip_leading(triplets, sigma, sigma.shape[-1], eta)
    return (c[..., None, None] * wide + U @ V.mT + 0.0).to(S.dtype)
