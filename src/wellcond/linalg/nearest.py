"""The nearest matrix with a bounded condition number.

Letters: S (..., m, n) a matrix or a batch; sigma its singular values, descending, nu = min(m, n) of
them; K the largest condition number allowed; [a, K a] the interval to which sigma is clipped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond.linalg.arrays import takes_arrays
from wellcond.linalg.checks import as_matrices, as_number
from wellcond.linalg.lapack import svd
from wellcond.linalg.projection import decompose_gram, resolvable_condition_number


@takes_arrays
def nearest(S: Tensor, max_condition: float) -> Tensor:
    """A matrix nearest to S in the Frobenius norm among those with kappa <= max_condition.

    It has the singular vectors of S. The singular values are clipped to [a, K a], where a is the
    root of the increasing, piecewise linear g(a) = sum (a - sigma_i)_+ - K sum (sigma_i - K a)_+.
    The result is unique unless sigma_nu = 0 or the singular vectors of the raised values are not
    unique. S = 0 remains zero.

    Args:
        S: real or complex floating-point tensor or NumPy array (..., m, n); leading dimensions are
            a batch. Not changed.
        max_condition: K, at least 1. If K = inf or kappa <= K, the result equals S bit for bit.

    Returns:
        A new tensor (for a NumPy array, an array) with the shape and dtype of S. It is computed in
        float64, from the Gram matrix if that is as accurate as a full SVD, and then rounded to the
        dtype, which may raise kappa slightly above K. `wellcond.repair` ensures that the stored
        matrix satisfies the limit.

    Raises:
        ValueError: max_condition < 1 or nan; S has fewer than two dimensions or no entries,
            contains NaN or infinity, or is a meta tensor; LAPACK does not converge.
        TypeError: the dtype of S is integer, boolean or float8, whose entries are codes that must
            be dequantised first; max_condition is not a number.

    Example:
        >>> import torch, wellcond as wc
        >>> wc.nearest(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 2.0)
        tensor([[2.8000, 0.0000],
                [0.0000, 1.4000]])
    """
    max_condition = check_limit(max_condition)
    wide = as_matrices(S.detach() if isinstance(S, Tensor) else S)
    unit = wide.abs().amax(dim=(-2, -1), keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)
    # A result that is rounded to float32 need not be accurate to the last digits of float64.
    error = 1e-10 if S.dtype in (torch.float64, torch.complex128) else 1e-6
    change, allowed = _change(wide / unit, float(max_condition), error)
    # Adding 0.0 turns -0.0 into 0.0.
    moved = ((wide / unit + change) * unit + 0.0).to(S.dtype)
    return torch.where(allowed[..., None, None].to(S.device), S.detach(), moved.to(S.device))


def _change(S: Tensor, K: float, error: float) -> tuple[Tensor, Tensor]:
    """Nearest matrix with kappa <= K minus S (..., m, n), and whether S satisfies the limit."""
    m, n = S.shape[-2:]
    if m < n:
        change, allowed = _change(S.mT, K, error)
        return change.mT, allowed
    found = decompose_gram(S.mH @ S)
    limit = resolvable_condition_number(torch.float64, n, error)
    if found is not None and bool((found.sigma[..., -1] < limit * found.sigma[..., 0]).all()):
        clipped = clip(found.sigma.flip(-1), K).flip(-1)
        V, d = found.move(clipped)
        return ((S @ V) * d[..., None, :]) @ V.mH, (clipped == found.sigma).all(dim=-1)
    U, sigma, Vh = svd(S)
    clipped = clip(sigma, K)
    return (U * (clipped - sigma)[..., None, :]) @ Vh, (clipped == sigma).all(dim=-1)


def check_limit(max_condition: float) -> float:
    """The limit as a Python number; raises if no matrix can have this condition number."""
    number = as_number(max_condition, "`max_condition`")
    if not number >= 1:
        raise ValueError(
            f"`max_condition` must be at least 1, got {max_condition}. "
            "No matrix has a smaller condition number."
        )
    return number


def clip(sigma: Tensor, max_condition: float | Tensor) -> Tensor:
    """Descending singular values, clipped to the [a, K a] with the least change.

    Values within the limit K remain unchanged. K is one number, or one per matrix.
    """
    nu = sigma.shape[-1]
    K = max_condition[..., None] if isinstance(max_condition, Tensor) else max_condition
    rising = sigma.flip(-1).contiguous()
    sums = torch.cat([torch.zeros_like(rising[..., :1]), rising.cumsum(-1)], dim=-1)

    def sides(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The numbers of values below a and above K a, and their sums."""
        low = torch.searchsorted(rising, a)
        up_to = torch.searchsorted(rising, K * a, right=True)
        below, above = sums.gather(-1, low), sums[..., -1:] - sums.gather(-1, up_to)
        # The quotient of an integer tensor and a number would have the default dtype.
        return low.to(sigma.dtype), (nu - up_to).to(sigma.dtype), below, above

    # g is linear between its corners; the root is on the segment where g changes sign.
    corners = torch.cat([rising, rising / K], dim=-1).sort(dim=-1).values
    low, high, below, above = sides(corners)
    g = (low * corners - below) / K - (above - K * high * corners).where(high > 0, 0.0)
    segment = (g <= 0).sum(dim=-1, keepdim=True).clamp(1, 2 * nu - 1)
    ends = corners.gather(-1, segment - 1), corners.gather(-1, segment)
    low, high, below, above = sides((ends[0] + ends[1]) / 2)
    a = (below / K + above) / (low / K + K * high)
    clipped = sigma.clamp(a, K * a)
    # Not "<=": for K = inf and sigma_nu = 0 the product is nan, and nothing exceeds the limit.
    return torch.where(sigma[..., :1] > K * sigma[..., -1:], clipped, sigma)
