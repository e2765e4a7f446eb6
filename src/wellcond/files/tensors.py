"""A file of tensors, whatever its format: what is in it, one tensor read, a copy with others."""

from __future__ import annotations

import abc
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from wellcond.files.pieces import pieces_of
from wellcond.weights import names
from wellcond.weights.reasons import Reason, Skipped

_DIMENSIONS = 64  # as numpy has; millions of them can be written into a file


class UnreadableError(ValueError):
    """A file that gives no answer: its path, what is wrong with it, and the way out."""


class PickledCodeError(UnreadableError):
    """A file that is sound but holds more than tensors."""


class NoTensorsError(UnreadableError):
    """A file that is sound but holds no tensors, such as the state of a scheduler."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file; `skipped` says why it holds no weights.

    Whether it is a `parameter` that counts for the share of what was measured: integers are
    counters, positions and masks as often as packed weights, and the same tensor counts once.
    `aliases` are other names of it that the file tells, and that are none of other tensors. Of a
    slice of a larger tensor `offsets` says where it begins, if the file does.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parameter: bool
    skipped: Skipped | None
    aliases: tuple[str, ...] = ()
    offsets: tuple[int, ...] | None = None

    @property
    def matrix(self) -> bool:
        """Whether it can be measured: without further ado, or by its exact name."""
        return self.skipped is None or self.skipped.reason.by_name


def why_no_weight(shape: tuple[int, ...], dtype: str) -> Skipped | None:
    """Why a tensor of a file holds no weight; None if it does."""
    if len(shape) > _DIMENSIONS:
        return Skipped(Reason.dimensions, str(len(shape)))
    return names.why_no_weight(shape, dtype)


def memory_for(size: int, name: str, path: Path) -> bytearray:
    """So many bytes to read a tensor into, or an error that says what they were wanted for."""
    try:
        return bytearray(size)
    except (MemoryError, OverflowError):
        raise UnreadableError(
            f"{path} holds {name} of {size:,} bytes, for which there is not enough memory."
        ) from None


class TensorFile(abc.ABC):
    """One file of tensors."""

    path: Path
    entries: dict[str, Entry]
    others: dict[str, Skipped]  # what is in it besides, and why it is not measured
    overlapping: list[tuple[str, str]]  # tensors that share entries, though neither has the other's

    @abc.abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor, to be used and let go before the next is read."""

    def pieces(self, name: str) -> Iterable[Tensor]:
        """The floating point entries of the tensor in parts, none of one without any."""
        return pieces_of(self.read(name))

    @abc.abstractmethod
    def first_row(self, name: str) -> Tensor:
        """The first entries of a tensor, as many as its last side is long."""

    @abc.abstractmethod
    def copy_with(self, replaced: Iterable[tuple[str, Tensor]], target: Path) -> None:
        """Writes a copy in which these tensors have other values; all else stays as it is."""
