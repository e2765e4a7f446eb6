"""Singular values of a product of two skinny matrices, which is never formed.

With B = Q_B R_B and A = Q_A R_A the singular values of B A^T are those of R_B R_A^T, because Q_B
and Q_A have orthonormal columns. All arithmetic is float64.

Letters: S = B A^T (m, n), B (m, k), A (n, k); sigma_1 >= ... >= sigma_nu, nu = min(m, n, k).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from wellcond.linalg.lapack import singular_values
from wellcond.linalg.scaling import split_scale
from wellcond.linalg.spectrum import rank_tolerance


class ProductSpectrum(NamedTuple):
    """The nu leading singular values of a product, descending, as `unit * scaled`.

    A scaled value of at most `unresolved` is zero to working precision. One of at most `rounding`
    may be an effect of rounding the entries of B and A to their dtypes.
    """

    scaled: Tensor
    unit: float
    unresolved: float
    rounding: float

    @property
    def singular_values(self) -> Tensor:
        return self.scaled * self.unit

    @property
    def condition_number(self) -> float:
        """sigma_1/sigma_nu; inf if sigma_nu is zero to working precision, nan if S = 0."""
        largest, smallest = float(self.scaled[0]), float(self.scaled[-1])
        if largest == 0:
            return math.nan
        return math.inf if smallest <= self.unresolved else largest / smallest

    @property
    def rank(self) -> int:
        """The smallest rank of all pairs of factors that round to this one."""
        return int((self.scaled > max(self.rounding, self.unresolved)).sum())


def spectrum_of_product(B: Tensor, A: Tensor) -> ProductSpectrum:
    """The nu leading singular values of B A^T; the others are zero.

    The error is relative to ||B|| ||A||, which may be much larger than sigma_1 if the dominant
    directions of B and A differ: values up to max(m, n, k) eps(float64) ||B|| ||A|| are unresolved.

    Raises:
        ValueError: a factor is not finite, or LAPACK does not converge.
    """
    (left, left_unit), (right, right_unit) = split_scale(B), split_scale(A)
    R_left, R_right = (torch.linalg.qr(factor, mode="r").R for factor in (left, right))
    sigma = singular_values(R_left @ R_right.mT)
    (top_left, move_left), (top_right, move_right) = (
        (float(singular_values(R)[0]), _rounding(factor, R, unit))
        for factor, R, unit in ((B, R_left, left_unit), (A, R_right, right_unit))
    )
    # (B + E)(A + F)^T - B A^T = E (A + F)^T + B F^T, whose norm bounds the change of each sigma.
    rounding = move_left * (top_right + move_right) + top_left * move_right
    largest = torch.Size([max(*B.shape, *A.shape), 1])
    unresolved = rank_tolerance(largest) * top_left * top_right
    return ProductSpectrum(sigma, left_unit * right_unit, unresolved, rounding)


def _rounding(factor: Tensor, R: Tensor, unit: float) -> float:
    """A bound of the change of a factor by rounding to its dtype: Frobenius norm, in its unit."""
    dtype = torch.finfo(factor.dtype)
    subnormal = dtype.tiny / unit * math.sqrt(factor.numel())
    return dtype.eps / 2 * (float(torch.linalg.vector_norm(R)) + subnormal)
