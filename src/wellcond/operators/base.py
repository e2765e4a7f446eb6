"""A weight as a linear map S: what can be asked of it, and the forms in which it is changed.

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
    """c S + U V^T, with c (...), U (..., m, k), V (..., n, k); k may be 0."""

    c: Tensor
    U: Tensor
    V: Tensor


class Rescaled(NamedTuple):
    """c S + S C if n <= m, else c S + C S, with c (...) and a symmetric C (..., nu, nu).

    Of a square matrix C is a function of its Gram matrix, so that S C = C' S with that of the other
    side, and an operator is free to take either.
    """

    c: Tensor
    C: Tensor


# How many tensors each form consists of; its place here is its code.
_SIZES = (len(LowRank._fields), len(Rescaled._fields), 1)


@dataclass(frozen=True)
class _Change:
    form: LowRank | Rescaled | Tensor

    @property
    def code(self) -> int:
        """Which of the three forms it has, for places where only tensors and numbers can go."""
        return 0 if isinstance(self.form, LowRank) else 1 if isinstance(self.form, Rescaled) else 2

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it consists of; `from_tensors` puts it together again."""
        return (self.form,) if isinstance(self.form, Tensor) else tuple(self.form)

    @classmethod
    def from_tensors(cls, code: int, tensors: Sequence[Tensor]) -> Self:
        return cls((LowRank, Rescaled)[code](*tensors) if code < 2 else tensors[0])

    @classmethod
    def take(cls, code: int, tensors: list[Tensor]) -> Self:
        """The one that the first tensors of a list make up, which are removed from it."""
        own, tensors[:] = tensors[: _SIZES[code]], tensors[_SIZES[code] :]
        return cls.from_tensors(code, own)


class Gradient(_Change):
    """The gradient of a function of S, as c S + U V^T or, if it takes no such form, as it is.

    Example:
        >>> import torch, wellcond as wc
        >>> S = torch.ones(3, 2)
        >>> zero = torch.zeros(3, 0), torch.zeros(2, 0)
        >>> half = wc.rules.Gradient(wc.rules.LowRank(torch.tensor(0.5), *zero))
        >>> dense = wc.rules.Gradient(0.5 * S)  # the same for this S, but as large as the weight
    """

    def times(self, factor: Tensor) -> Gradient:
        """A multiple; the factor is one number, or one per matrix."""
        if isinstance(self.form, LowRank):
            c, U, V = self.form
            return Gradient(LowRank(factor * c, over_matrices(factor) * U, V))
        if isinstance(self.form, Rescaled):
            return Gradient(Rescaled(factor * self.form.c, over_matrices(factor) * self.form.C))
        return Gradient(over_matrices(factor) * self.form)

    def where(self, chosen: Tensor) -> Gradient:
        """Itself for the chosen matrices and 0 for the others, without asking the host."""
        if not isinstance(self.form, Tensor):
            return Gradient(_where(chosen, self.form, identity=0.0))
        return Gradient(torch.where(over_matrices(chosen), self.form, 0.0))


class NewWeight(_Change):
    """What S is to become: c S + U V^T or, if it takes no such form, the values to be stored.

    Example:
        >>> import torch, wellcond as wc
        >>> S = wc.rules.LowRank(torch.tensor(1.0), torch.zeros(3, 0), torch.zeros(2, 0))
        >>> wc.rules.NewWeight(S) == wc.rules.Gradient(S)  # that gradient is S, not 0
        False
    """

    @classmethod
    def scaled(cls, S: Operator, c: Tensor) -> NewWeight:
        """c S, with one number per matrix."""
        sides = (c.new_zeros(*S.shape[:-2], side, 0) for side in S.shape[-2:])
        return cls(LowRank(c, *sides))

    def where(self, chosen: Tensor, S: Dense | None = None) -> NewWeight:
        """Itself for the chosen matrices and S for the others, without asking the host."""
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
    """One number per matrix, so that it multiplies its entries."""
    return c[..., None, None]


class Operator(Protocol):
    """A linear map, or a stack of them. Arithmetic is float32 or wider whatever the storage."""

    @property
    def shape(self) -> torch.Size:
        """(..., m, n)."""

    @property
    def nu(self) -> int:
        """min(m, n), the number of singular values."""

    @property
    def dtype(self) -> torch.dtype:
        """In which it is worked on."""

    @property
    def device(self) -> torch.device:
        """Where the results are."""

    def matmat(self, V: Tensor) -> Tensor:
        """S V, (..., m, k)."""

    def rmatmat(self, U: Tensor) -> Tensor:
        """S^T U, (..., n, k)."""

    def squared_frobenius_norm(self, dtype: torch.dtype | None = None) -> Tensor:
        """||S||_F^2, one number per matrix; in the working dtype if none is given."""

    def finite(self) -> Tensor:
        """Whether no entry is NaN or infinite, one bool per matrix."""


class WeightOperator(Operator, Protocol):
    """An operator that rests on parameters of a model, one or several."""

    @property
    def kind(self) -> tuple[object, ...]:
        """Operators of one kind are worked on as one stack."""

    def pullback_(self, gradient: Gradient, into: Sequence[Tensor]) -> None:
        """Adds to these tensors, one for each parameter, its share of a gradient with respect to S.

        In place, so that a gradient c S + U V^T costs no temporary of the size of the weight.
        """


# What an operator can do besides, asked for by name: isinstance(S, Updatable).


@runtime_checkable
class Updatable(Protocol):
    """A weight that can be changed where it lies."""

    def update_(self, new: NewWeight) -> None:
        """S <- the new weight, in place."""


@runtime_checkable
class Dense(Protocol):
    """A weight whose entries are all here."""

    def dense(self) -> Tensor:
        """S itself, as stored; not to be written to."""


@runtime_checkable
class HasGram(Protocol):
    """A weight whose smaller Gram matrix can be had."""

    @property
    def upright(self) -> bool:
        """Whether that is S^T S, not S S^T."""

    def gram(self, dtype: torch.dtype | None = None, unit: Tensor | None = None) -> Tensor:
        """S^T S if n <= m, else S S^T, (..., nu, nu); in the working dtype if none is given.

        That of S/unit, one number per matrix, where squares of S could overflow or vanish.
        """

    def agree(self, compute: Callable[[], Sequence[Tensor]], *like: Tensor) -> list[Tensor]:
        """What is computed, of these shapes and dtypes, by one of the holders of the matrix."""


class SpectralOperator(WeightOperator, Updatable, HasGram, Protocol):
    """A weight whose singular values can be changed: what limits and isometry steps ask for.

    It may be spread over processes, each of which holds a part of it; a number per matrix is then
    held by those that hold a part of that matrix.
    """

    S: Tensor  # the entries that are held here, as they are stored

    @property
    def is_one_map(self) -> bool:
        """Whether its matrices are the blocks of one map, as the groups of a convolution are."""

    def spread(self, whole: bool = False) -> AbstractContextManager[SpectralOperator]:
        """Itself, laid out so that `gram` and `rescale_` work, or so that it is whole.

        What is stored in it is carried back in the end.
        """

    def own_part(self, numbers: Tensor) -> Tensor:
        """The numbers that are held here, of one number per matrix (...)."""

    def all_of(self, numbers: Tensor) -> Tensor:
        """One number per matrix (...), of those held here, put together with all others."""

    def add_(self, U: Tensor, V: Tensor) -> None:
        """S <- S + U V^T, with U (..., m, k) and V (..., n, k), in place."""

    def rescale_(self, V: Tensor, d: Tensor, original: Tensor, chosen: Tensor) -> None:
        """S <- S0 + S0 V diag(d) V^T, or S0 + V diag(d) V^T S0, rounded to the nearest.

        V (..., nu, j) on the short side, d (..., j); S0 is what the weight was. For a stack, those
        chosen (...).
        """
