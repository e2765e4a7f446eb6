"""The weight that a recipe builds, read as a tensor of a file is."""

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
    """Why a weight cannot be built: what its parts hold is contradictory or damaged."""


@dataclass(frozen=True)
class Stack:
    """A stack of matrices, each of which is built when it is asked for.

    A view is applied to it as to a tensor: what the view does to a matrix is done to each.
    """

    build: Callable[[int], Tensor]

    @property
    def mT(self) -> Stack:
        """The stack of the transposes."""
        return Stack(lambda index: self.build(index).mT)

    def narrow(self, dim: int, start: int, length: int) -> Stack:
        """So many rows (dim -2) or columns (-1) of each."""
        return Stack(lambda index: self.build(index).narrow(dim, start, length))

    def __getitem__(self, key: Any) -> Any:
        """The matrix with this number; or the entries of each at (..., rows, columns)."""
        if isinstance(key, int):
            return self.build(key)
        return Stack(lambda index: self.build(index)[key])


class Built(Holder):
    """One weight, of the tensors from which its recipe builds it."""

    def __init__(self, recipe: Recipe, stored: Mapping[str, tuple[Holder, Entry]]) -> None:
        self.recipe = recipe
        self.parts = {name: stored[name] for name in recipe.parts}

    def read_part(self, name: str, rows: Rows | None = None) -> Tensor:
        """The values of a part, or rows of it."""
        holder, entry = self.parts[name]
        return holder.read(entry.name, rows)

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        W = self._build(self.read_part, 0)
        return W if rows is None else W[rows[0] : rows[1]]

    def matrices(self) -> Any:
        """The weight; of a stack that is built in parts a `Stack`."""
        if self.recipe.count == 1:
            return self.read(self.recipe.label)
        return Stack(lambda index: self._build(self.read_part, index))

    def read_after(self, new: Tensor) -> Tensor:
        """The weight that would be built if the parts were to store this one."""
        stored = self._store(new)

        def read(name: str, rows: Rows | None = None) -> Tensor:
            if name not in stored:
                return self.read_part(name, rows)
            return stored[name] if rows is None else stored[name][rows[0] : rows[1]]

        return self._build(read, 0)

    def pieces(self, name: str) -> Iterable[Tensor]:
        """The floating point entries of all parts: where one is not finite, the weight is not."""
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
