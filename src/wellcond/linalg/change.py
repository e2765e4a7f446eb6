"""The distance between two matrices, and how much their singular directions differ.

Letters: S (m, n) the matrix before, T after, D = T - S; sigma_1 >= ... >= sigma_nu the singular
values of S, nu = min(m, n); k = min(ceil(||S||_F^2/sigma_1^2), 32, nu), the stable rank rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from wellcond.linalg.checks import as_matrices
from wellcond.linalg.lapack import svd
from wellcond.linalg.scaling import frobenius_norm, power_of_two

_MOST = 32
# Up to this nu a full decomposition takes at most about two seconds.
_WHOLE = 1024
_ENTRIES = 1 << 26  # 512 MiB

TOO_LARGE = "directions are computed for at most 1024 singular values and 2^26 entries"
UNCHANGED = "nothing has changed"
ZERO = "a side is zero"
WHOLE_SPACE = "the leading directions span all inputs"
CLOSE = "singular values are closer than the rounding of the dtype, so directions are arbitrary"


class MatrixChange(NamedTuple):
    """The change from S to T.

    Attributes:
        relative: ||D||_F/||S||_F; inf if only S is zero, 0 if both are.
        sqnr: 20 log10(||S||_F/||D||_F) in decibels; inf without a change, nan if S is zero.
        directions: k; 0 if directions are not computed.
        leading_share: ||U_k U_k^T D||_F^2/||D||_F^2, where U_k are the k leading left singular
            vectors of S (directions of the outputs).
        random_share: k/m, the expected share of a random D.
        leading_turn: the root-mean-square principal angle (`measure_angles`), in degrees, between
            the spans of the k leading right singular vectors (directions of the inputs) of S and
            of T.
        trailing_turn: the same for the last k of the nu right singular vectors.
        largest_leading_turn: the largest of the angles behind `leading_turn`.
        largest_trailing_turn: the largest of the angles behind `trailing_turn`.
        random_turn: arccos sqrt(k/n), the root-mean-square angle of two random spans.
        reasons: for each attribute that is nan, its name and the reason.
    """

    relative: float
    sqnr: float
    directions: int = 0
    leading_share: float = math.nan
    random_share: float = math.nan
    leading_turn: float = math.nan
    trailing_turn: float = math.nan
    largest_leading_turn: float = math.nan
    largest_trailing_turn: float = math.nan
    random_turn: float = math.nan
    reasons: Mapping[str, str] = MappingProxyType({})


_TURNS = ("leading_turn", "trailing_turn")
_DIRECTIONS = (
    "leading_share",
    "random_share",
    *_TURNS,
    *(f"largest_{turn}" for turn in _TURNS),
    "random_turn",
)


def measure_change(S: Tensor, T: Tensor) -> MatrixChange:
    """Measures the change from S to T in float64 or complex128.

    Args:
        S: (m, n), or the blocks (g, m, n) of a block-diagonal matrix; the matrix before.
        T: of the same shape; the matrix after.

    Raises:
        ValueError: the shapes differ, or an entry is NaN or infinite.
        TypeError: the entries of the dtype are codes, not values.
    """
    if S.shape != T.shape:
        raise ValueError(f"`S` and `T` must have equal shapes, got {(*S.shape,)}, {(*T.shape,)}.")
    own = max(torch.finfo(one.dtype).eps for one in (S, T))
    rounding = max(own, max(S.shape) * torch.finfo(torch.float64).eps)
    S, T = (as_matrices(one.detach().cpu()) for one in (S, T))
    largest = max(float(one.abs().max()) for one in (S, T))
    unit = power_of_two(largest) if largest else 1.0
    S, T = S / unit, T / unit
    before, moved = frobenius_norm(S), frobenius_norm(T - S)
    if not moved:
        sqnr = math.inf if before else math.nan
        return MatrixChange(0.0, sqnr, reasons=dict.fromkeys(_DIRECTIONS, UNCHANGED))
    if not before:
        return MatrixChange(math.inf, math.nan, reasons=dict.fromkeys(("sqnr", *_DIRECTIONS), ZERO))
    relative = moved / before
    sqnr = 20 * (math.log10(before) - math.log10(moved))
    count = S.shape[0] if S.ndim == 3 else 1
    if count * min(S.shape[-2:]) > _WHOLE or count * S.numel() > _ENTRIES:
        return MatrixChange(relative, sqnr, reasons=dict.fromkeys(_DIRECTIONS, TOO_LARGE))
    if S.ndim == 3:
        S, T = (torch.block_diag(*one) for one in (S, T))  # type: ignore[no-untyped-call]
    return _with_directions(S, T, relative, sqnr, rounding)


def _with_directions(
    S: Tensor, T: Tensor, relative: float, sqnr: float, rounding: float
) -> MatrixChange:
    U, sigma, Vh = svd(S)
    _, tau, Wh = svd(T)
    k = min(math.ceil(float((sigma / sigma[0]).square().sum()) * (1 - 1e-12)), _MOST, len(sigma))
    D = T - S
    share = (frobenius_norm(U[:, :k].mH @ D) / frobenius_norm(D)) ** 2
    reasons: dict[str, str] = {}
    turns: dict[str, float] = {}
    for name, leading in zip(_TURNS, (True, False), strict=True):
        reason = ZERO if not tau[0] else ""
        for values in (sigma, tau) if tau[0] else ():
            reason = reason or _reason_without_gap(values, k, S.shape[1], leading, rounding)
        if reason:
            reasons |= dict.fromkeys((name, f"largest_{name}"), reason)
        else:
            rows = slice(0, k) if leading else slice(len(sigma) - k, None)
            turns[name], turns[f"largest_{name}"] = measure_angles(Vh[rows].mH, Wh[rows].mH)
    turns["random_turn"] = math.degrees(math.acos(math.sqrt(k / S.shape[1])))
    return MatrixChange(
        relative, sqnr, k, min(1.0, share), k / S.shape[0], **turns, reasons=reasons
    )


def _reason_without_gap(sigma: Tensor, k: int, inputs: int, leading: bool, rounding: float) -> str:
    """Why the span of k singular vectors is arbitrary; "" if it is not.

    The span is arbitrary if a singular value inside equals one outside. If there are more inputs
    than singular values, the null space is also outside.
    """
    nu = len(sigma)
    if k == inputs:
        return WHOLE_SPACE
    gaps = []
    if k < nu:
        edge = k if leading else nu - k
        gaps.append(float(sigma[edge - 1] - sigma[edge]))
    if nu < inputs and not (leading and k < nu):
        gaps.append(float(sigma[-1]))
    return CLOSE if min(gaps) <= rounding * float(sigma[0]) else ""


def measure_angles(V: Tensor, W: Tensor) -> tuple[float, float]:
    """The root-mean-square and the largest principal angle between two spans, in degrees.

    V and W are (n, k) with orthonormal columns; theta_1, ..., theta_k are the principal angles. The
    root-mean-square angle is arccos sqrt(mean cos^2 theta_i). Its squared sine, the mean of
    sin^2 theta_i, is the share of one span outside the other. The share is 0.1 if one of ten
    directions turns by 90 degrees (an angle of 18.4 degrees), and 0.5 if five do (45 degrees). The
    largest angle is 90 degrees in both cases. The expected mean cos^2 of two independent random
    spans is k/n.

    Both angles are arctangents of norms of W - V V^H W, whose singular values are the sines, and of
    V^H W, whose singular values are the cosines. So small angles are accurate, which they would not
    be from the cosines only.
    """
    inside = V.mH @ W
    outside = W - V @ inside
    mean = math.atan2(frobenius_norm(outside), frobenius_norm(inside))
    sine = float(torch.linalg.matrix_norm(outside, 2))
    cosine = float(torch.linalg.svdvals(inside)[-1])
    return math.degrees(mean), math.degrees(math.atan2(sine, cosine))
