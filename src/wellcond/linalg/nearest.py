"""A nearest matrix with a bounded condition number, and one that still has it when stored.

Letters: S (..., m, n) a matrix or a batch; sigma its singular values, descending, nu = min(m, n) of
them; K the largest condition number allowed; [a, K a] the interval to which sigma is clipped.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from wellcond.linalg.checks import as_matrices, in_float64
from wellcond.linalg.lapack import svd
from wellcond.linalg.scaling import power_of_two
from wellcond.linalg.spectrum import gram, measure, negligible

# A limit must hold for whoever measures next: more than measuring with other threads changes.
_SLACK = 1e-8
# Halvings of the interval between a margin that is too small and one that is enough.
_HALVINGS = 4


def nearest(S: Tensor, max_condition: float) -> Tensor:
    """A matrix nearest to S in the Frobenius norm among those with kappa <= max_condition.

    The singular values are clipped to [a, K a], where a is the root of the increasing, piecewise
    linear g(a) = sum (a - sigma_i)_+ - K sum (sigma_i - K a)_+; singular vectors stay. It is unique
    unless sigma_nu = 0 or singular values that are raised belong to more than one choice of
    vectors. S = 0 stays zero.

    Args:
        S: real floating-point tensor (..., m, n); leading dimensions are a batch. Not changed.
        max_condition: K, at least 1. With inf, and wherever kappa <= K, S comes back bit for bit.

    Returns:
        A new tensor, the shape and dtype of S; computed in float64 from a full SVD, then rounded to
        the dtype, which may lift kappa above K by rounding. `wellcond.repair` sees to it that a
        stored matrix obeys.

    Raises:
        ValueError: max_condition < 1 or nan, fewer than two dimensions, no entries, an entry that
            is NaN or infinite, or LAPACK does not converge.
        TypeError: S is integer, boolean or complex.

    Example:
        >>> import torch, wellcond as wc
        >>> wc.nearest(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 2.0)
        tensor([[2.8000, 0.0000],
                [0.0000, 1.4000]])
    """
    check_limit(max_condition)
    wide = as_matrices(S.detach() if isinstance(S, Tensor) else S)
    unit = wide.abs().amax(dim=(-2, -1), keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)
    U, sigma, Vh = svd(wide / unit)
    clipped = clip(sigma, max_condition)
    change = (U * (clipped - sigma)[..., None, :]) @ Vh
    allowed = (clipped == sigma).all(dim=-1)[..., None, None]
    # Adding 0.0 turns the zeros' signs positive.
    moved = ((wide / unit + change) * unit + 0.0).to(S.dtype)
    return torch.where(allowed.to(S.device), S.detach(), moved.to(S.device))


def check_limit(max_condition: float) -> None:
    """Raises unless it is a condition number that a matrix can have."""
    if not isinstance(max_condition, int | float) or isinstance(max_condition, bool):
        raise TypeError(f"`max_condition` must be a number, got {type(max_condition).__name__}.")
    if not max_condition >= 1:
        raise ValueError(
            f"`max_condition` must be at least 1, got {max_condition}. "
            "No matrix has a smaller condition number."
        )


def clip(sigma: Tensor, K: float) -> Tensor:
    """Descending singular values clipped to [a, K a] at the least change, or as they are."""
    nu = sigma.shape[-1]
    rising = sigma.flip(-1).contiguous()
    sums = torch.cat([torch.zeros_like(rising[..., :1]), rising.cumsum(-1)], dim=-1)

    def sides(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """How many lie below a and above K a, and their sums."""
        low = torch.searchsorted(rising, a)
        up_to = torch.searchsorted(rising, K * a, right=True)
        below, above = sums.gather(-1, low), sums[..., -1:] - sums.gather(-1, up_to)
        return low, nu - up_to, below, above

    # g is linear between its corners; the root lies on the segment where it changes its sign.
    corners = torch.cat([rising, rising / K], dim=-1).sort(dim=-1).values
    low, high, below, above = sides(corners)
    g = (low * corners - below) / K - (above - K * high * corners).where(high > 0, 0.0)
    segment = (g <= 0).sum(dim=-1, keepdim=True).clamp(1, 2 * nu - 1)
    ends = corners.gather(-1, segment - 1), corners.gather(-1, segment)
    low, high, below, above = sides((ends[0] + ends[1]) / 2)
    a = (below / K + above) / (low / K + K * high)
    clipped = sigma.clamp(a, K * a)
    return torch.where(sigma[..., :1] <= K * sigma[..., -1:], sigma, clipped)


class Limited(NamedTuple):
    """A matrix with kappa <= K as measured in its dtype, and the margin below K that it took."""

    S: Tensor
    before: float  # kappa of what was given
    after: float
    margin: float


def limited(S: Tensor, max_condition: float) -> Limited:
    """A matrix of the dtype of S with kappa <= K after rounding, nearest but for a small margin.

    The one nearest with kappa <= K/(1 + t) is rounded and measured; t is the smallest that was
    found to do, within some percent. A zero matrix stays zero, with kappa nan.

    Raises:
        ValueError: rounding to the dtype lifts kappa above K whatever the margin, or LAPACK does
            not converge.
    """
    K = float(max_condition)
    kappa = measure(S).condition_number
    if kappa <= K or math.isnan(kappa):
        return Limited(S, kappa, kappa, 0.0)
    unit = power_of_two(float(S.abs().max()))
    wide = in_float64(S.detach().cpu()) / unit
    U, sigma, V = _triplets(wide.mT if S.shape[0] < S.shape[1] else wide)
    if S.shape[0] < S.shape[1]:
        U, V = V, U

    def attempt(margin: float) -> Limited | None:
        clipped = clip(sigma, max(1.0, K / (1 + margin)))
        moved = (clipped != sigma).nonzero()[:, 0]
        change = U[:, moved] * (clipped - sigma)[moved]
        rounded = ((wide + change @ V[:, moved].mT) * unit).to(S.dtype)
        if not torch.isfinite(rounded).all():
            return None
        after = measure(rounded).condition_number
        return Limited(rounded, kappa, after, margin) if after * (1 + _SLACK) <= K else None

    too_small, margin = 0.0, torch.finfo(S.dtype).eps / 4
    while (found := attempt(margin)) is None:
        if K / (1 + margin) < 1:
            raise ValueError(
                f"no matrix near it has a condition number of at most {K:g} once it is rounded to "
                f"{str(S.dtype).removeprefix('torch.')}. Allow a larger one, or store the weight "
                "in a wider dtype."
            )
        too_small, margin = margin, 2 * margin
    for _ in range(_HALVINGS):
        between = (too_small + margin) / 2
        if (closer := attempt(between)) is None:
            too_small = between
        else:
            found, margin = closer, between
    return found


def _triplets(S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, sigma, V of S (m >= n): from the Gram matrix where that resolves them, else by an SVD."""
    try:
        values, V = torch.linalg.eigh(gram(S))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        values, V = S.new_zeros(S.shape[1]), S
    # An error of n eps in sigma^2/sigma_1^2 turns the vectors of sigma_n by n eps kappa^2.
    if float(values[0]) > 1e6 * negligible(S.shape) * float(values[-1]):
        V = V.flip(-1)
        left = S @ V
        sigma = torch.linalg.vector_norm(left, dim=0)
        order = sigma.argsort(descending=True)
        return (left / sigma)[:, order], sigma[order], V[:, order]
    U, sigma, Vh = svd(S)
    return U, sigma, Vh.mT
