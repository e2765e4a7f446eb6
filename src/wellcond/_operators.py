"""A weight as a linear map S, and the few things that are ever done with it.

Letters: S (..., m, n) the weight, m rows (outputs), n columns (inputs); leading dimensions are a
stack of matrices (experts, heads). U (..., m, k) and V (..., n, k) are skinny. Arithmetic is
float32 or wider whatever the storage: half-precision weights are widened a band of rows at a time,
so that nothing of the size of the weight is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BANDS = 16  # a half-precision weight is widened by sixteenths


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a weight of this dtype is worked on: float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_matrices(S: Tensor) -> None:
    """Raises unless S is a batch of real matrices with rows and columns."""
    if not isinstance(S, Tensor):
        raise TypeError(f"`S` must be a torch.Tensor, got {type(S).__name__}.")
    if not S.is_floating_point():
        raise TypeError(
            f"`S` must be a real floating-point tensor, got {S.dtype}. "
            "Convert it first, for instance with S.to(torch.float64)."
        )
    if S.ndim < 2:
        raise ValueError(
            f"`S` must have at least 2 dimensions, got shape {tuple(S.shape)}. "
            "A vector has no condition number; S[None] makes it a matrix of one row."
        )
    if S.shape[-1] == 0 or S.shape[-2] == 0:
        raise ValueError(f"`S` must have rows and columns, got shape {tuple(S.shape)}.")


def as_matrices(S: Tensor) -> Tensor:
    """S in float64, refused unless it is a batch of finite, real matrices with rows and columns."""
    check_matrices(S)
    wide = S.to(torch.float64)
    if not torch.isfinite(wide).all():
        count = int((~torch.isfinite(wide)).sum())
        raise ValueError(
            f"`S` must be finite, got {count} NaN or infinite of {S.numel()} entries. "
            "Look for the step at which they appeared."
        )
    return wide


class StoredMatrix:
    """A matrix, or a stack of them, that lies in memory: a view of a parameter or a gradient."""

    def __init__(self, S: Tensor) -> None:
        self.S = S
        self.shape = S.shape
        self.dtype = working_dtype(S.dtype)

    @property
    def nu(self) -> int:
        """min(m, n), the number of singular values."""
        return min(self.shape[-2:])

    def _bands(self) -> Iterator[tuple[int, int]]:
        rows = -(-self.shape[-2] // _BANDS)
        for start in range(0, self.shape[-2], rows):
            yield start, min(rows, self.shape[-2] - start)

    def matmat(self, V: Tensor) -> Tensor:
        """S V, (..., m, k)."""
        if self.S.dtype == self.dtype:
            return self.S @ V
        return torch.cat(
            [self.S.narrow(-2, *band).to(self.dtype) @ V for band in self._bands()], dim=-2
        )

    def rmatmat(self, U: Tensor) -> Tensor:
        """S^T U, (..., n, k)."""
        if self.S.dtype == self.dtype:
            return self.S.mT @ U
        product = U.new_zeros(*self.shape[:-2], self.shape[-1], U.shape[-1])
        for band in self._bands():
            product += self.S.narrow(-2, *band).to(self.dtype).mT @ U.narrow(-2, *band)
        return product

    def squared_frobenius_norm(self) -> Tensor:
        """||S||_F^2, one number a matrix."""
        norm: Tensor = torch.linalg.vector_norm(self.S, dim=(-2, -1), dtype=self.dtype)
        return norm.square()

    def dense(self) -> Tensor:
        """S itself, in the working dtype."""
        return self.S.to(self.dtype)

    def update_(self, c: Tensor, U: Tensor, V: Tensor) -> None:
        """S <- c S + U V^T in place; c is one number, or one a matrix."""
        if self.S.dtype == self.dtype:
            self.S.mul_(_over_matrices(c))
            _add_product_(self.S, U, V)
            return
        for band in self._bands():
            rows = self.S.narrow(-2, *band)
            rows.copy_(rows.to(self.dtype) * _over_matrices(c) + U.narrow(-2, *band) @ V.mT)

    def add_(self, c: Tensor, S: StoredMatrix, U: Tensor, V: Tensor) -> None:
        """G <- G + c S + U V^T in place, G being this matrix, a gradient.

        Where c = 0 nothing of S is taken, even what is not finite. On the CPU that never occurs: a
        weight that is not finite has been refused before.
        """
        if self.S.dtype == S.S.dtype == self.dtype and self.S.is_cpu:
            if c.ndim == 0 and not torch.compiler.is_compiling():
                self.S.add_(S.S, alpha=float(c))  # twice as fast as addcmul_
            else:
                self.S.addcmul_(S.S, _over_matrices(c))
            _add_product_(self.S, U, V)
            return
        for band in self._bands():
            rows = self.S.narrow(-2, *band)
            added = S.S.narrow(-2, *band).to(S.dtype) * _over_matrices(c)
            added = torch.where(_over_matrices(c) == 0, 0.0, added)
            rows.copy_(rows.to(S.dtype) + added + U.narrow(-2, *band) @ V.mT)


def _over_matrices(c: Tensor) -> Tensor:
    return c[..., None, None]


def _add_product_(S: Tensor, U: Tensor, V: Tensor) -> None:
    if U.shape[-1] == 0:
        return
    if S.ndim == 2 and U.shape[-1] == 1:
        S.addr_(U[:, 0], V[:, 0])  # three times as fast as addmm_ on the CPU
    elif S.ndim == 2:
        S.addmm_(U, V.mT)
    else:
        S.baddbmm_(U, V.mT)
