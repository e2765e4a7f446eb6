"""A matrix that lies in memory: a parameter or a gradient seen through a view.

Arithmetic is float32 or wider whatever the storage: half-precision weights are widened a band of
rows at a time, so that nothing of the size of the weight is ever made.

Letters: S (..., m, n) the weight; U (..., m, k) and V (..., n, k) skinny; G a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from wellcond.operators.base import Gradient, LowRank, NewWeight, over_matrices
from wellcond.operators.rounding import rounded, working_dtype
from wellcond.operators.views import STORED, View, writable

_BANDS = 16  # a half-precision weight is widened by sixteenths


class StoredMatrix:
    """A matrix, or a stack of them, that rests on one parameter.

    `seed` is that of the chance by which updates of half-precision weights are rounded.
    """

    def __init__(self, parameter: Tensor, view: View = STORED, seed: int = 0) -> None:
        self.view = view
        self.parameter = parameter
        self.seed = seed
        self.S = view(parameter)
        self.shape = self.S.shape
        self.dtype = working_dtype(parameter.dtype)
        self.device = parameter.device

    @property
    def nu(self) -> int:
        return min(self.shape[-2:])

    @property
    def kind(self) -> tuple[object, ...]:
        return type(self), self.shape, self.S.dtype, self.device

    def reduce_(self, sums: Tensor) -> Tensor:
        """Adds up what the holders of a matrix have found; this one is held whole."""
        return sums

    def matmat(self, V: Tensor) -> Tensor:
        return self.reduce_(self.partial_matmat(V))

    def rmatmat(self, U: Tensor) -> Tensor:
        return self.reduce_(self.partial_rmatmat(U))

    def squared_frobenius_norm(self) -> Tensor:
        return self.reduce_(self.partial_squared_frobenius_norm())

    def partial_matmat(self, V: Tensor) -> Tensor:
        """S V as far as what is held here adds to it."""
        if self.S.dtype == self.dtype:
            return self.S @ V
        return torch.cat([rows @ V for _, rows in self._bands()], dim=-2)

    def partial_rmatmat(self, U: Tensor) -> Tensor:
        """S^T U as far as what is held here adds to it."""
        if self.S.dtype == self.dtype:
            return self.S.mT @ U
        product = U.new_zeros(*self.S.shape[:-2], self.S.shape[-1], U.shape[-1])
        for band, rows in self._bands():
            product += rows.mT @ U[..., band, :]
        return product

    def partial_squared_frobenius_norm(self) -> Tensor:
        """||S||_F^2 as far as what is held here adds to it."""
        norm: Tensor = torch.linalg.vector_norm(self.S, dim=(-2, -1), dtype=self.dtype)
        return norm.square()

    def finite(self) -> Tensor:
        return torch.isfinite(torch.linalg.vector_norm(self.S, torch.inf, dim=(-2, -1)))

    def dense(self) -> Tensor:
        return self.S

    def gram(self, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        m, n = self.shape[-2:]
        if m < n:
            wide = self.S.to(dtype)
            return wide @ wide.mT
        gram = torch.zeros(*self.S.shape[:-2], n, n, dtype=dtype, device=self.device)
        for _, rows in self._bands(dtype):
            gram += rows.mT @ rows
        return gram

    def update_(self, new: NewWeight) -> None:
        with writable(self.view, self.parameter) as S:
            self.S = S
            if not isinstance(new.form, LowRank):
                self._store_(new.form)
                return
            c, U, V = new.form
            if S.dtype == self.dtype:
                S.mul_(over_matrices(c))
                _add_product_(S, U, V)
                return
            generator = self._chance()
            for band, rows in self._bands():
                updated = rows * over_matrices(c) + U[..., band, :] @ V.mT
                S[..., band, :] = rounded(updated, S.dtype, generator)

    def _store_(self, values: Tensor) -> None:
        """Values of the weight's own dtype are stored as they are, wider ones rounded by chance."""
        if torch.finfo(values.dtype).bits > torch.finfo(self.S.dtype).bits == 16:
            values = rounded(values, self.S.dtype, self._chance())
        self.S.copy_(values)

    def _chance(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed)

    def pullback_(self, gradient: Gradient, into: Sequence[Tensor]) -> None:
        # With c = 0 and U = 0 the gradient stays, but where S is not finite it becomes NaN.
        with writable(self.view, self.local(into[0])) as G:
            if not isinstance(gradient.form, LowRank):
                G.add_(gradient.form)
                return
            c, U, V = gradient.form
            if G.dtype == self.S.dtype == self.dtype:
                if c.ndim == 0 and G.is_cpu:
                    G.add_(self.S, alpha=float(c))  # twice as fast as addcmul_
                else:
                    G.addcmul_(self.S, over_matrices(c))
                _add_product_(G, U, V)
                return
            for band, rows in self._bands():
                wide = G[..., band, :].to(self.dtype)
                G[..., band, :] = wide + rows * over_matrices(c) + U[..., band, :] @ V.mT

    def local(self, tensor: Tensor) -> Tensor:
        """The part of a parameter or a gradient that is held here: all of it."""
        return tensor

    def _bands(self, dtype: torch.dtype | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Rows that are next to each other, widened."""
        held = self.S.shape[-2]
        rows = max(1, -(-held // _BANDS))
        for start in range(0, held, rows):
            band = slice(start, min(start + rows, held))
            yield band, self.S[..., band, :].to(dtype or self.dtype)


def _add_product_(S: Tensor, U: Tensor, V: Tensor) -> None:
    if U.shape[-1] == 0 or S.numel() == 0:
        return
    if S.ndim == 2 and U.shape[-1] == 1:
        S.addr_(U[:, 0], V[:, 0])  # three times as fast as addmm_ on the CPU
    elif S.ndim == 2:
        S.addmm_(U, V.mT)
    else:
        S.baddbmm_(U, V.mT)
