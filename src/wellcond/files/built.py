"""A weight that a recipe builds, read like a tensor of a file."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from wellcond.files.tensors import Entry, Holder, Rows, TensorFile, UnreadableError
from wellcond.recipes.base import Read, Recipe, RecipeError


class BuildError(UnreadableError):
    """A weight cannot be built, because its parts are contradictory or damaged."""


@dataclass(frozen=True)
class Stack:
    """A stack of matrices, each of which is built on access.

    A view is applied to the stack as to a tensor: it acts on each matrix.
    """

    build: Callable[[int], Tensor]

    @property
    def mT(self) -> Stack:
        """The stack of the transposes."""
        return Stack(lambda index: self.build(index).mT)

    def narrow(self, dim: int, start: int, length: int) -> Stack:
        """Narrows the rows (dim -2) or columns (dim -1) of each matrix."""
        return Stack(lambda index: self.build(index).narrow(dim, start, length))

    def __getitem__(self, key: Any) -> Any:
        """Returns the matrix with this number, or indexes each matrix with (..., rows, columns)."""
        if isinstance(key, int):
            return self.build(key)
        return Stack(lambda index: self.build(index)[key])


class Built(Holder):
    """One weight, built by its recipe from stored tensors."""

    def __init__(self, recipe: Recipe, stored: Mapping[str, tuple[Holder, Entry]]) -> None:
        self.recipe = recipe
        self.parts = {name: stored[name] for name in recipe.parts}

    def read_part(self, name: str, rows: Rows | None = None) -> Tensor:
        """Reads the values of a part, or rows of it."""
        holder, entry = self.parts[name]
        return holder.read(entry.name, rows)

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        W = self._build(self.read_part, 0)
        return W if rows is None else W[rows[0] : rows[1]]

    def matrices(self) -> Any:
        """Returns the weight, or a `Stack` if its matrices are built one by one."""
        if self.recipe.count == 1:
            return self.read(self.recipe.label)
        return Stack(lambda index: self._build(self.read_part, index))

    def read_after(self, new: Tensor) -> Tensor:
        """Returns the weight that would be built after the parts have stored `new`."""
        stored = self._store(new)

        def read(name: str, rows: Rows | None = None) -> Tensor:
            if name not in stored:
                return self.read_part(name, rows)
            return stored[name] if rows is None else stored[name][rows[0] : rows[1]]

        return self._build(read, 0)

    def pieces(self, name: str) -> Iterable[Tensor]:
        """Yields the floating point entries of all parts.

        The weight is not finite where one of these entries is not.
        """
        parts = self.parts.values()
        return itertools.chain.from_iterable(holder.pieces(entry.name) for holder, entry in parts)

    def first_row(self, name: str) -> Tensor:
        return self._build(self.read_part, 0).flatten()[: self.recipe.shape[-1]]

    def split(self, name: str, new: Tensor) -> Iterator[tuple[TensorFile, str, Tensor]]:
        for part, values in self._store(new).items():
            holder, entry = self.parts[part]
            yield from holder.split(entry.name, values)

    def _build(self, read: Read, index: int) -> Tensor:
        with _errors_of_parts():
            return self.recipe.build(read, index)

    def _store(self, new: Tensor) -> dict[str, Tensor]:
        with _errors_of_parts():
            return self.recipe.store(new, self.read_part)


@contextlib.contextmanager
def _errors_of_parts() -> Iterator[None]:
    try:
        yield
    except RecipeError as why:
        raise BuildError(why) from None
