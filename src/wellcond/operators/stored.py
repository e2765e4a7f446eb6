"""A matrix in memory: a parameter or a gradient seen through a view.

Arithmetic is in float32 or wider for all dtypes. Half-precision weights are widened one band of
rows at a time, so that no temporary tensor has the size of the weight.

Letters: S (..., m, n) the weight; U (..., m, k) and V (..., n, k) skinny; G a gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from wellcond.linalg.projection import gram
from wellcond.operators.base import Gradient, LowRank, NewWeight, Rescaled, over_matrices
from wellcond.operators.rounding import round_stochastically, working_dtype
from wellcond.operators.views import STORED, Kernel, View, shares_memory, writable

_NARROW_DEVICES = {"mps"}  # without float64: the CPU does what needs it
_PLAIN = Tensor, torch.nn.Parameter  # the storage of other classes cannot be compared
_BANDS = 16  # a half-precision weight is widened by sixteenths


class StoredMatrix:
    """A matrix, or a stack of them, that one parameter stores.

    `seed` seeds the stochastic rounding of updates to half-precision weights.
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

    @property
    def is_one_map(self) -> bool:
        return isinstance(self.view, Kernel) and len(self.shape) == 3

    @property
    def is_lasting(self) -> bool:
        """Whether it remains valid as long as the parameter keeps its storage."""
        exact = self.S.dtype == self.dtype  # otherwise each update has its own seed
        plain = type(self.parameter) is Tensor and not self.S.is_meta
        return exact and plain and shares_memory(self.S, self.parameter)

    def shows(self, parameter: Tensor) -> bool:
        """Returns whether this operator, which is lasting, still shows this parameter."""
        own = self.parameter
        alike = own.dtype == parameter.dtype and own.device == parameter.device
        return alike and type(parameter) in _PLAIN and own.is_set_to(parameter)

    def reduce_(self, sums: Tensor) -> Tensor:
        """Sums results over processes; here, one process stores the complete matrix."""
        return sums

    def matmat(self, V: Tensor) -> Tensor:
        return self.reduce_(self.partial_matmat(V))

    def rmatmat(self, U: Tensor) -> Tensor:
        return self.reduce_(self.partial_rmatmat(U))

    def squared_frobenius_norm(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.reduce_(self.partial_squared_frobenius_norm(dtype))

    def partial_matmat(self, V: Tensor) -> Tensor:
        """Returns the contribution of this process to S V."""
        if self.S.dtype == self.dtype or not self.S.numel():
            return self.S.to(self.dtype) @ V
        return torch.cat([rows @ V for _, rows in self._bands()], dim=-2)

    def partial_rmatmat(self, U: Tensor) -> Tensor:
        """Returns the contribution of this process to S^T U."""
        if self.S.dtype == self.dtype:
            return self.S.mT @ U
        product = U.new_zeros(*self.S.shape[:-2], self.S.shape[-1], U.shape[-1])
        for band, rows in self._bands():
            product += rows.mT @ U[..., band, :]
        return product

    def partial_squared_frobenius_norm(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the contribution of this process to ||S||_F^2."""
        # Row norms first, which is ten times as fast if the dtype is widened.
        rows = torch.linalg.vector_norm(self.S, dim=-1, dtype=dtype or self.dtype)
        norm: Tensor = torch.linalg.vector_norm(rows, dim=-1)
        return norm.square()

    def finite(self) -> Tensor:
        return torch.isfinite(torch.linalg.vector_norm(self.S, torch.inf, dim=(-2, -1)))

    def dense(self) -> Tensor:
        return self.S

    @property
    def upright(self) -> bool:
        """Whether the smaller Gram matrix is S^T S, not S S^T."""
        return self.shape[-2] >= self.shape[-1]

    def gram(self, dtype: torch.dtype | None = None, unit: Tensor | None = None) -> Tensor:
        return gram(self._long(self.S), dtype or self.dtype, unit)

    @contextlib.contextmanager
    def spread(self, whole: bool = False) -> Iterator[StoredMatrix]:
        if self.device.type not in _NARROW_DEVICES:
            yield self
            return
        host = StoredMatrix(self.parameter.cpu(), self.view, self.seed)
        yield host
        # Write only this view: other views of the parameter might have changed meanwhile.
        with writable(self.view, self.parameter) as S:
            S.copy_(host.S)

    def agree(self, compute: Callable[[], Sequence[Tensor]], *like: Tensor) -> list[Tensor]:
        return list(compute())

    def own_part(self, numbers: Tensor) -> Tensor:
        return numbers

    def all_of(self, numbers: Tensor) -> Tensor:
        return numbers

    def rescale_(self, V: Tensor, d: Tensor, original: Tensor, chosen: Tensor) -> None:
        with writable(self.view, self.parameter) as S:
            self.S = S
            new, old = self._long(S), self._long(original)
            C = (V * d[..., None, :]) @ V.mT if 2 * V.shape[-1] > V.shape[-2] else None
            for band in _parts(old):
                rows = old[..., band, :]
                wide = rows.to(V.dtype)
                change = wide @ C if C is not None else ((wide @ V) * d[..., None, :]) @ V.mT
                moved = (wide + change).to(S.dtype)
                new[..., band, :] = moved.where(chosen[..., None, None], new[..., band, :])

    def update_(self, new: NewWeight) -> None:
        with writable(self.view, self.parameter) as S:
            self.S = S
            if isinstance(new.form, Rescaled):
                self._store_rescaled_(new.form)
                return
            if not isinstance(new.form, LowRank):
                self._store_(new.form)
                return
            c, U, V = new.form
            if S.dtype == self.dtype:
                S.mul_(over_matrices(c))
            self._add_product_(U, V, over_matrices(c))

    def add_(self, U: Tensor, V: Tensor) -> None:
        with writable(self.view, self.parameter) as S:
            self.S = S
            self._add_product_(U, V)

    def _add_product_(self, U: Tensor, V: Tensor, factor: Tensor | float = 1.0) -> None:
        """Adds U V^T; a half-precision weight is first multiplied by the factor."""
        if self.S.dtype == self.dtype:
            _add_product_(self.S, U, V)
            return
        generator = self._chance()
        for band, rows in self._bands():
            updated = rows * factor + U[..., band, :] @ V.mT
            self.S[..., band, :] = round_stochastically(updated, self.S.dtype, generator)

    def _store_(self, values: Tensor) -> None:
        """Stores values; those wider than a half-precision weight are rounded stochastically."""
        if torch.finfo(values.dtype).bits > torch.finfo(self.S.dtype).bits == 16:
            values = round_stochastically(values, self.S.dtype, self._chance())
        self.S.copy_(values)

    def _store_rescaled_(self, form: Rescaled) -> None:
        generator = self._chance() if self.S.dtype != self.dtype else None
        long = self._long(self.S)
        for band, rows in self._rescaled(form):
            if generator is not None:
                rows = round_stochastically(rows.to(self.dtype), self.S.dtype, generator)
            long[..., band, :] = rows

    def _rescaled(self, form: Rescaled) -> Iterator[tuple[slice, Tensor]]:
        """Yields parts of the long side of c S + S C, in the dtype of C."""
        long, (c, C) = self._long(self.S), form
        for band in _parts(long) if long.numel() else ():
            rows = long[..., band, :].to(C.dtype)
            yield band, rows * over_matrices(c) + rows @ C

    def _long(self, X: Tensor) -> Tensor:
        """Returns a tensor of the shape of the weight with its long side first."""
        return X if self.upright else X.mT

    def _chance(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed)

    def pullback_(self, gradient: Gradient, into: Sequence[Tensor]) -> None:
        # With c = 0 and U = 0 the gradient is unchanged, but becomes NaN where S is not finite.
        with writable(self.view, self.local(into[0])) as G:
            if isinstance(gradient.form, Rescaled):
                long = self._long(G)
                for band, rows in self._rescaled(gradient.form):
                    long[..., band, :] += rows
                return
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
        """Returns the part of a parameter or a gradient in this process: here, all of it."""
        return tensor

    def _bands(self, dtype: torch.dtype | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yields bands of adjacent rows, widened."""
        held = self.S.shape[-2]
        rows = max(1, -(-held // _BANDS))
        for start in range(0, held, rows):
            band = slice(start, min(start + rows, held))
            yield band, self.S[..., band, :].to(dtype or self.dtype)


def _parts(long: Tensor) -> Iterator[slice]:
    """Yields slices of the long side that are at least as long as the short side."""
    m, n = long.shape[-2:]
    size = max(n, -(-m // _BANDS), 1)
    for start in range(0, m, size):
        yield slice(start, min(start + size, m))


def _add_product_(S: Tensor, U: Tensor, V: Tensor) -> None:
    if U.shape[-1] == 0 or S.numel() == 0:
        return
    if S.ndim == 2 and U.shape[-1] == 1:
        S.addr_(U[:, 0], V[:, 0])  # three times as fast as addmm_ on the CPU
    elif S.ndim == 2:
        S.addmm_(U, V.mT)
    else:
        S.baddbmm_(U, V.mT)
