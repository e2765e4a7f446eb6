"""Protocols of a weight as a linear map S, and the forms of its gradients and updates.

Letters: S (..., m, n) the weight, m rows (outputs), n columns (inputs); leading dimensions are a
stack of matrices (experts, groups, weights of one kind). U (..., m, k), V (..., n, k) are skinny;
nu = min(m, n).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """c S + U V^T, with c (...), U (..., m, k), V (..., n, k); k can be 0."""

    c: Tensor
    U: Tensor
    V: Tensor


class Rescaled(NamedTuple):
    """c S + S C if n <= m, else c S + C S, with c (...) and a symmetric C (..., nu, nu).

    For a square matrix, C is a function of its Gram matrix, so that S C = C' S with the matrix C'
    of the other side. An operator can use either.
    """

    c: Tensor
    C: Tensor


# The number of tensors of each form; the index of a form is its code.
_SIZES = (len(LowRank._fields), len(Rescaled._fields), 1)


@dataclass(frozen=True)
class _Change:
    form: LowRank | Rescaled | Tensor

    @property
    def code(self) -> int:
        """The code of the form, for interfaces that accept only tensors and numbers."""
        return 0 if isinstance(self.form, LowRank) else 1 if isinstance(self.form, Rescaled) else 2

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the form; `from_tensors` reassembles it."""
        return (self.form,) if isinstance(self.form, Tensor) else tuple(self.form)

    @classmethod
    def from_tensors(cls, code: int, tensors: Sequence[Tensor]) -> Self:
        return cls((LowRank, Rescaled)[code](*tensors) if code < 2 else tensors[0])

    @classmethod
    def take(cls, code: int, tensors: list[Tensor]) -> Self:
        """Reassembles an object from the first tensors of a list, and removes them from it."""
        own, tensors[:] = tensors[: _SIZES[code]], tensors[_SIZES[code] :]
        return cls.from_tensors(code, own)


class Gradient(_Change):
    """The gradient of a function of S: a low-rank or rescaled form, or a dense tensor.

    Example:
        >>> import torch, wellcond as wc
        >>> S = torch.ones(3, 2)
        >>> zero = torch.zeros(3, 0), torch.zeros(2, 0)
        >>> half = wc.rules.Gradient(wc.rules.LowRank(torch.tensor(0.5), *zero))
        >>> dense = wc.rules.Gradient(0.5 * S)  # the same for this S, but as large as the weight
    """

    def times(self, factor: Tensor) -> Gradient:
        """Returns a multiple; the factor is one number, or one number per matrix."""
        if isinstance(self.form, LowRank):
            c, U, V = self.form
            return Gradient(LowRank(factor * c, over_matrices(factor) * U, V))
        if isinstance(self.form, Rescaled):
            return Gradient(Rescaled(factor * self.form.c, over_matrices(factor) * self.form.C))
        return Gradient(over_matrices(factor) * self.form)

    def where(self, chosen: Tensor) -> Gradient:
        """Returns the gradient for the chosen matrices and 0 for others, without synchronising."""
        if not isinstance(self.form, Tensor):
            return Gradient(_where(chosen, self.form, identity=0.0))
        return Gradient(torch.where(over_matrices(chosen), self.form, 0.0))


class NewWeight(_Change):
    """The new value of S: a low-rank or rescaled form, or a dense tensor to be stored.

    Example:
        >>> import torch, wellcond as wc
        >>> S = wc.rules.LowRank(torch.tensor(1.0), torch.zeros(3, 0), torch.zeros(2, 0))
        >>> wc.rules.NewWeight(S) == wc.rules.Gradient(S)  # that gradient is S, not 0
        False
    """

    @classmethod
    def scaled(cls, S: Operator, c: Tensor) -> NewWeight:
        """Returns c S, with one number per matrix."""
        sides = (c.new_zeros(*S.shape[:-2], side, 0) for side in S.shape[-2:])
        return cls(LowRank(c, *sides))

    def where(self, chosen: Tensor, S: Dense | None = None) -> NewWeight:
        """Returns the new value for the chosen matrices and S for others, without synchronising."""
        if not isinstance(self.form, Tensor):
            return NewWeight(_where(chosen, self.form, identity=1.0))
        assert S is not None
        return NewWeight(torch.where(over_matrices(chosen), self.form, S.dense()))


def _where(chosen: Tensor, form: LowRank | Rescaled, identity: float) -> LowRank | Rescaled:
    c, *factors = form
    return type(form)(
        torch.where(chosen, c, identity),
        *(torch.where(over_matrices(chosen), x, 0.0) for x in factors),
    )


def over_matrices(c: Tensor) -> Tensor:
    """Reshapes one number per matrix for multiplication with the entries."""
    return c[..., None, None]


class Operator(Protocol):
    """A linear map, or a stack of them. Arithmetic is in float32 or wider for all dtypes."""

    @property
    def shape(self) -> torch.Size:
        """(..., m, n)."""

    @property
    def nu(self) -> int:
        """min(m, n), the number of singular values."""

    @property
    def dtype(self) -> torch.dtype:
        """The working dtype."""

    @property
    def device(self) -> torch.device:
        """The device of the results."""

    def matmat(self, V: Tensor) -> Tensor:
        """Returns S V, (..., m, k)."""

    def rmatmat(self, U: Tensor) -> Tensor:
        """Returns S^T U, (..., n, k)."""

    def squared_frobenius_norm(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns ||S||_F^2, one number per matrix, by default in the working dtype."""

    def finite(self) -> Tensor:
        """Returns whether all entries are finite, one bool per matrix."""


class WeightOperator(Operator, Protocol):
    """An operator that is computed from one or several parameters of a model."""

    @property
    def kind(self) -> tuple[object, ...]:
        """Operators of equal kind can be processed as one stack."""

    def pullback_(self, gradient: Gradient, into: Sequence[Tensor]) -> None:
        """Adds a gradient with respect to S to the gradients of the parameters, in place.

        A gradient c S + U V^T then needs no temporary tensor of the size of the weight.

        Args:
            gradient: the gradient with respect to S.
            into: one tensor per parameter.
        """


# Optional capabilities of operators, checked with isinstance(S, Updatable).


@runtime_checkable
class Updatable(Protocol):
    """A weight that can be changed in place."""

    def update_(self, new: NewWeight) -> None:
        """Replaces S by the new weight, in place."""


@runtime_checkable
class Dense(Protocol):
    """A weight whose entries are all available in this process."""

    def dense(self) -> Tensor:
        """Returns S as stored; callers must not modify it."""


@runtime_checkable
class HasGram(Protocol):
    """A weight that provides its smaller Gram matrix."""

    @property
    def upright(self) -> bool:
        """Whether the smaller Gram matrix is S^T S, not S S^T."""

    def gram(self, dtype: torch.dtype | None = None, unit: Tensor | None = None) -> Tensor:
        """Returns S^T S if n <= m, else S S^T, (..., nu, nu), by default in the working dtype.

        With `unit`, one number per matrix, it returns the Gram matrix of S/unit. Use this if
        squares of S can overflow or underflow.
        """

    def agree(self, compute: Callable[[], Sequence[Tensor]], *like: Tensor) -> list[Tensor]:
        """Returns the result of `compute` from one of the processes that store the matrix.

        `like` are tensors with the shapes and dtypes of the result.
        """


class SpectralOperator(WeightOperator, Updatable, HasGram, Protocol):
    """A weight whose singular values can be changed, as limits and isometry steps require.

    It can be distributed over processes that each store a part. A number per matrix is then stored
    by the processes that store a part of that matrix.
    """

    S: Tensor  # the entries in this process, as stored

    @property
    def is_one_map(self) -> bool:
        """Whether its matrices are blocks of one map, such as the groups of a convolution."""

    def spread(self, whole: bool = False) -> AbstractContextManager[SpectralOperator]:
        """Returns the weight in a layout for which `gram` and `rescale_` work.

        With `whole`, each process gets the complete weight. Changes are copied back on exit.
        """

    def own_part(self, numbers: Tensor) -> Tensor:
        """Returns the numbers of the matrices in this process, from one per matrix (...)."""

    def all_of(self, numbers: Tensor) -> Tensor:
        """Returns one number per matrix (...) from the numbers of all processes."""

    def add_(self, U: Tensor, V: Tensor) -> None:
        """Adds U V^T to S in place, with U (..., m, k) and V (..., n, k)."""

    def rescale_(self, V: Tensor, d: Tensor, original: Tensor, chosen: Tensor) -> None:
        """S <- S0 + S0 V diag(d) V^T, or S0 + V diag(d) V^T S0, rounded to nearest.

        V (..., nu, j) is on the short side, and d is (..., j). S0 is the original weight. In a
        stack, only the chosen (...) matrices change.
        """
