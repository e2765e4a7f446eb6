"""The regulariser of single matrices by a full SVD in float64: value, gradient, bound, step.

Letters: S (..., m, n) a matrix or a batch; nu = min(m, n); sigma_1 >= ... >= sigma_nu its singular
values, u_i and v_i its singular vectors; kappa = sigma_1/sigma_nu.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wellcond.linalg.arrays import takes_arrays
from wellcond.linalg.checks import as_matrices, as_number
from wellcond.operators.subspace import Ritz
from wellcond.rules.condition import clip_leading


class _Penalty(torch.autograd.Function):
    """Returns a known value, and a known gradient in the backward pass.

    The gradient is that of 1/2 ||S v_1||^2 - ||S||_F^2/(2 nu) with v_1 constant. No derivative
    passes through the singular vectors, which are not differentiable if singular values are equal.
    """

    @staticmethod
    def forward(ctx: Any, S: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return weight[..., None, None] * gradient, None, None


class _Exact(NamedTuple):
    S: Tensor  # float64 or complex128, detached
    triplets: Ritz  # left right^T = sigma_i u_i v_i^H
    sigma: Tensor


def _exact(S: Tensor) -> _Exact:
    wide = as_matrices(S.detach() if isinstance(S, Tensor) else S)
    U, sigma, Vh = torch.linalg.svd(wide, full_matrices=False)
    return _Exact(wide, Ritz(U * sigma[..., None, :], Vh.mT), sigma)


def _penalty_from(sigma: Tensor) -> Tensor:
    # Each term is a product of non-negative numbers, so r is not negative near kappa = 1.
    top = sigma[..., :1]
    return ((top - sigma) * (top + sigma)).sum(dim=-1) / (2 * sigma.shape[-1])


def _gradient(exact: _Exact) -> Tensor:
    wide, (left, right, _), sigma = exact
    # Adding 0.0 turns -0.0 into 0.0.
    return left[..., :1] @ right[..., :1].mT - wide / sigma.shape[-1] + 0.0


@takes_arrays
def condition_penalty(S: Tensor) -> Tensor:
    """The regulariser r(S) = 1/2 ||S||_2^2 - ||S||_F^2/(2 nu), by a full SVD, differentiable once.

    It equals sum_i (sigma_1^2 - sigma_i^2)/(2 nu), so it is never negative. It is 0 exactly for
    S = 0 and for S of full rank with condition number 1 (arXiv 2410.00169, Theorem 2.1). Its
    backward pass gives `condition_penalty_gradient`. In a training loop, use `Regularizer`, which
    needs no SVD.

    Args:
        S: real or complex floating-point tensor or NumPy array (..., m, n); leading dimensions are
            a batch.

    Returns:
        Tensor (...) in the dtype of the real part of S, in units of a squared singular value;
        computed in float64.

    Raises:
        ValueError: S has fewer than two dimensions or no entries, contains NaN or infinity, or is a
            meta tensor.
        TypeError: the dtype of S is integer, boolean or float8, whose entries are codes that must
            be dequantised first.

    Example:
        >>> import torch, wellcond as wc
        >>> wc.condition_penalty(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        tensor(0.7500)
    """
    exact = _exact(S)
    value = _penalty_from(exact.sigma).to(S.real.dtype)
    result: Tensor = _Penalty.apply(S, value, _gradient(exact).to(S.dtype))  # type: ignore[no-untyped-call]
    return result


@takes_arrays
def condition_penalty_gradient(S: Tensor) -> Tensor:
    """The gradient of r: sigma_1 u_1 v_1^T - S/nu (arXiv 2410.00169, Theorem 3.1).

    If sigma_1 is not simple, r has no gradient. The result is then an element of the
    subdifferential of the convex part of r, minus S/nu. For orthogonal S (kappa = 1) its norm is
    sqrt(1 - 1/nu), not 0.

    Args:
        S: real or complex floating-point tensor or NumPy array (..., m, n); leading dimensions are
            a batch.

    Returns:
        Tensor (..., m, n) in the dtype of S, in units of a singular value; computed in float64.

    Raises:
        ValueError: S has fewer than two dimensions or no entries, contains NaN or infinity, or is a
            meta tensor.
        TypeError: the dtype of S is integer, boolean or float8, whose entries are codes that must
            be dequantised first.

    Example:
        >>> import torch, wellcond as wc
        >>> wc.condition_penalty_gradient(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        tensor([[ 1.0000,  0.0000],
                [ 0.0000, -0.5000]])
    """
    return _gradient(_exact(S)).to(S.dtype)


@takes_arrays
def condition_penalty_bound(S: Tensor) -> Tensor:
    """The upper bound kappa(S) <= exp(nu r(S)/sigma_nu^2) (arXiv 2410.00169, Theorem 2.2).

    Args:
        S: real or complex floating-point tensor or NumPy array (..., m, n); leading dimensions are
            a batch.

    Returns:
        Tensor (...), float64, dimensionless. It is inf where sigma_nu = 0 or the exponential
        overflows, and nan where S = 0. It is computed without directed rounding, so it is not a
        certificate; see `certify`.

    Raises:
        ValueError: S has fewer than two dimensions or no entries, contains NaN or infinity, or is a
            meta tensor.
        TypeError: the dtype of S is integer, boolean or float8, whose entries are codes that must
            be dequantised first.

    Example:
        >>> import torch, wellcond as wc
        >>> S = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> float(wc.condition_number(S)), round(float(wc.condition_penalty_bound(S)), 4)
        (2.0, 4.4817)
    """
    sigma = _exact(S).sigma
    # Relative to sigma_1, so that squares of 1e-200 do not vanish; S = 0 gives 0/0 = nan.
    sigma = sigma / sigma[..., :1]
    return torch.exp(sigma.shape[-1] * _penalty_from(sigma) / sigma[..., -1].square())


@takes_arrays
def proximal_step(S: Tensor, step: float | Tensor) -> Tensor:
    """One exact proximal step on r: sigma_i becomes min(c sigma_i, tau), with c = 1 + step/nu.

    tau = max_j (c sum_{i<=j} sigma_i)/(j + step) is the root of sum_i (c sigma_i - tau)_+ = step
    tau. The result minimises 1/2 ||X - c S||_F^2 + step/2 ||X||_2^2 over X. For every step, neither
    kappa nor r increases, and equal singular values remain equal.

    Args:
        S: real or complex floating-point tensor or NumPy array (..., m, n); leading dimensions are
            a batch. Not changed.
        step: learning rate times strength, dimensionless, finite and non-negative.

    Returns:
        A new tensor with the shape and dtype of S, computed in float64 from a full SVD.

    Raises:
        ValueError: the step is negative or not finite; S has fewer than two dimensions or no
            entries, contains NaN or infinity, or is a meta tensor.
        TypeError: the dtype of S is integer, boolean or float8, whose entries are codes that must
            be dequantised first; the step is not a number.

    Example:
        >>> import torch, wellcond as wc
        >>> wc.proximal_step(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), 0.5)
        tensor([[1.6667, 0.0000],
                [0.0000, 1.2500]])
    """
    wide, triplets, sigma = _exact(S)
    whole = isinstance(step, Tensor) and step.ndim > 0
    if whole or not 0 <= (number := as_number(step, "`step`")) < math.inf:
        raise ValueError(
            f"`step` must be a single finite number that is not negative, got {step}. "
            "It is the learning rate times the strength."
        )
    eta = torch.full((), number, dtype=torch.float64, device=wide.device)
    (c, U, V), _ = clip_leading(triplets, sigma, sigma.shape[-1], eta)
    return (c[..., None, None] * wide + U @ V.mT + 0.0).to(S.dtype)
