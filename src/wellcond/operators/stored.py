"""A weight as a linear map S, and the few things that are ever done with it.

Letters: S (..., m, n) the weight, m rows (outputs), n columns (inputs); leading dimensions are a
stack of matrices (experts, heads). U (..., m, k) and V (..., n, k) are skinny. Arithmetic is
float32 or wider whatever the storage: half-precision weights are widened a band of rows at a time,
so that nothing of the size of the weight is ever made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from wellcond.operators.rounding import rounded, working_dtype

_BANDS = 16  # a half-precision weight is widened by sixteenths


class StoredMatrix:
    """A matrix, or a stack of them, that lies in memory: a view of a parameter or a gradient.

    `seed` is that of the chance by which updates of half-precision weights are rounded.
    """

    def __init__(self, S: Tensor, seed: int = 0) -> None:
        self.S = S
        self.shape = S.shape
        self.dtype = working_dtype(S.dtype)
        self.device = S.device
        self.seed = seed

    @property
    def nu(self) -> int:
        """min(m, n), the number of singular values."""
        return min(self.shape[-2:])

    @property
    def kind(self) -> tuple[object, ...]:
        """Matrices of one kind can be worked on as one stack."""
        return self.shape, self.S.dtype, self.device

    def _bands(self) -> Iterator[tuple[int, int]]:
        rows = max(1, -(-self.S.shape[-2] // _BANDS))
        for start in range(0, self.S.shape[-2], rows):
            yield start, min(rows, self.S.shape[-2] - start)

    def reduce_(self, sums: Tensor) -> Tensor:
        """Adds up what the holders of a matrix have found; this one is held whole."""
        return sums

    def matmat(self, V: Tensor) -> Tensor:
        """S V, (..., m, k)."""
        return self.reduce_(self.partial_matmat(V))

    def rmatmat(self, U: Tensor) -> Tensor:
        """S^T U, (..., n, k)."""
        return self.reduce_(self.partial_rmatmat(U))

    def squared_frobenius_norm(self) -> Tensor:
        """||S||_F^2, one number a matrix."""
        return self.reduce_(self.partial_squared_norm())

    def partial_matmat(self, V: Tensor) -> Tensor:
        """S V as far as what is held here adds to it."""
        if self.S.dtype == self.dtype:
            return self.S @ V
        return torch.cat(
            [self.S.narrow(-2, *band).to(self.dtype) @ V for band in self._bands()], dim=-2
        )

    def partial_rmatmat(self, U: Tensor) -> Tensor:
        """S^T U as far as what is held here adds to it."""
        if self.S.dtype == self.dtype:
            return self.S.mT @ U
        product = U.new_zeros(*self.S.shape[:-2], self.S.shape[-1], U.shape[-1])
        for band in self._bands():
            product += self.S.narrow(-2, *band).to(self.dtype).mT @ U.narrow(-2, *band)
        return product

    def partial_squared_norm(self) -> Tensor:
        """||S||_F^2 as far as what is held here adds to it."""
        norm: Tensor = torch.linalg.vector_norm(self.S, dim=(-2, -1), dtype=self.dtype)
        return norm.square()

    def finite(self) -> Tensor:
        """Whether no entry is NaN or infinite, one truth value a matrix."""
        return torch.isfinite(torch.linalg.vector_norm(self.S, torch.inf, dim=(-2, -1)))

    def dense(self) -> Tensor:
        """S itself, as stored."""
        return self.S

    def store_(self, values: Tensor) -> None:
        """S <- values, in place."""
        self.S.copy_(values)

    def update_(self, c: Tensor, U: Tensor, V: Tensor) -> None:
        """S <- c S + U V^T in place; c is one number, or one a matrix."""
        if self.S.dtype == self.dtype:
            self.S.mul_(_over_matrices(c))
            _add_product_(self.S, U, V)
            return
        generator = torch.Generator(self.device).manual_seed(self.seed)
        for band in self._bands():
            rows = self.S.narrow(-2, *band)
            updated = rows.to(self.dtype) * _over_matrices(c) + U.narrow(-2, *band) @ V.mT
            rows.copy_(rounded(updated, rows.dtype, generator))

    def add_(self, c: Tensor, S: StoredMatrix, U: Tensor, V: Tensor) -> None:
        """G <- G + c S + U V^T in place, G being this matrix, a gradient.

        With c = 0 and U = 0 the gradient stays as it was, but where S is not finite it becomes NaN.
        """
        if self.S.dtype == S.S.dtype == self.dtype:
            if c.ndim == 0 and self.S.is_cpu:
                self.S.add_(S.S, alpha=float(c))  # twice as fast as addcmul_
            else:
                self.S.addcmul_(S.S, _over_matrices(c))
            _add_product_(self.S, U, V)
            return
        for band in self._bands():
            rows = self.S.narrow(-2, *band)
            added = S.S.narrow(-2, *band).to(S.dtype) * _over_matrices(c)
            rows.copy_(rows.to(S.dtype) + added + U.narrow(-2, *band) @ V.mT)


class SeparateMatrices:
    """Matrices of one kind in storages of their own, as one stack (b, ..., m, n).

    A product each; what follows on the skinny results is done for all of them at once.
    """

    def __init__(self, matrices: Sequence[StoredMatrix]) -> None:
        self.matrices = matrices
        first = matrices[0]
        self.shape = torch.Size([len(matrices), *first.shape])
        self.dtype, self.device, self.nu = first.dtype, first.device, first.nu

    def _each(self, partial: Callable[..., Tensor], *factors: Tensor) -> Tensor:
        parts = [partial(S, *one) for S, *one in zip(self.matrices, *factors, strict=True)]
        return self.matrices[0].reduce_(torch.stack(parts))

    def matmat(self, V: Tensor) -> Tensor:
        """S V, (b, ..., m, k)."""
        return self._each(lambda S, v: S.partial_matmat(v), V)

    def rmatmat(self, U: Tensor) -> Tensor:
        """S^T U, (b, ..., n, k)."""
        return self._each(lambda S, u: S.partial_rmatmat(u), U)

    def squared_frobenius_norm(self) -> Tensor:
        """||S||_F^2, one number a matrix."""
        if len(self.shape) == 3 and all(type(S) is StoredMatrix for S in self.matrices):
            norms = torch._foreach_norm([S.S for S in self.matrices], 2, self.dtype)
            return torch.stack(norms).square()
        return self._each(lambda S: S.partial_squared_norm())


Operator = StoredMatrix | SeparateMatrices


def _over_matrices(c: Tensor) -> Tensor:
    return c[..., None, None]


def _add_product_(S: Tensor, U: Tensor, V: Tensor) -> None:
    if U.shape[-1] == 0 or S.numel() == 0:
        return
    if S.ndim == 2 and U.shape[-1] == 1:
        S.addr_(U[:, 0], V[:, 0])  # three times as fast as addmm_ on the CPU
    elif S.ndim == 2:
        S.addmm_(U, V.mT)
    else:
        S.baddbmm_(U, V.mT)
