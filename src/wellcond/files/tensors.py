"""A file of tensors, whatever its format: what is in it, one tensor read, a copy with others."""

from __future__ import annotations

import abc
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

from wellcond.recipes.base import TensorClass
from wellcond.weights import names
from wellcond.weights.fused import Views
from wellcond.weights.kernels import guess_views, view_by_bias
from wellcond.weights.reasons import Reason, Skipped

Rows = tuple[int, int]  # start and stop along the first side
Write = Callable[[str, Tensor], None]  # gives a tensor of a copy new values
_DIMENSIONS = 64  # as numpy has; millions of them can be written into a file
_PIECE = 16 << 20  # bytes


class UnreadableError(ValueError):
    """A file that gives no answer: its path, what is wrong with it, and the way out."""


class NoTensorsError(UnreadableError):
    """A file that is sound but holds no tensors, such as the state of a scheduler."""


class DamagedError(ValueError):
    """What is wrong within a file; `damaged` makes the whole sentence of it."""


def damaged(path: Path, kind: str, what: object) -> UnreadableError:
    """The error for a file that is not what a writer of its format leaves."""
    return UnreadableError(
        f"{path} must be a whole {kind}, but: {what}. It may be truncated or damaged: compare its "
        "size with the original's, or fetch it again."
    )


@dataclass(frozen=True)
class Entry:
    """A tensor in a file; `skipped` says why it holds no weights.

    Attributes:
        parameter: whether it counts for the share of what was measured. Integers are counters,
            positions and masks as often as packed weights, and a tensor under two names counts
            once.
        aliases: other names that the file gives to this tensor, and to no other.
        offsets: where it begins in the tensor of which it is a slice, if the file says so.
        stored_as: as what the file stores it, such as "q4_K"; "" if that is its dtype.
        views: the matrices in it, if the format says which; else its name and shape decide.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parameter: bool
    skipped: Skipped | None
    aliases: tuple[str, ...] = ()
    offsets: tuple[int, ...] | None = None
    stored_as: str = ""
    views: Views | None = None

    @property
    def matrix(self) -> bool:
        """Whether it can be measured, if only by its exact name."""
        return self.skipped is None or self.skipped.reason.by_name


def explain_non_weight(shape: tuple[int, ...], dtype: str) -> Skipped | None:
    """Why a tensor of a file holds no weight; None if it does."""
    if len(shape) > _DIMENSIONS:
        return Skipped(Reason.dimensions, str(len(shape)))
    return names.explain_non_weight(shape, dtype)


class Holder(abc.ABC):
    """What holds tensors by name: a file, or what makes one tensor of several."""

    @abc.abstractmethod
    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """The tensor, or its rows start to stop, to be let go before the next is read."""

    @abc.abstractmethod
    def pieces(self, name: str) -> Iterable[Tensor]:
        """The floating point entries of the tensor in parts, none of one without any."""

    @abc.abstractmethod
    def first_row(self, name: str) -> Tensor:
        """The first entries of a tensor, as many as its last side is long."""

    @abc.abstractmethod
    def split(self, name: str, new: Tensor) -> Iterator[tuple[TensorFile, str, Tensor]]:
        """The stored tensors that get new values, with the file that stores each."""


class TensorFile(Holder):
    """One file of tensors. Every read opens it anew, and raises if it has changed since the first.

    Attributes:
        endings: what the names of such files end in.
        kind: what such a file is called.
        of_layers: whether the views of its entries are those of layers that the file names, so that
            names of weights say nothing against them.
        of_graph: whether the file holds a graph that says what each tensor is, so that names say
            nothing: those of an export may stand for other values than in the checkpoint.
        not_copied: why no copy with other values is written, and the way out; "" if one is.
        others: what is in the file beside tensors, and why it is not measured.
        classes: weights that are stored as several tensors, by their names. The tensors are
            entries, if they are in this file.
        metadata: texts that the file stores beside its tensors.
        overlapping: pairs of tensors that share entries, neither of which is a part of the other.
    """

    endings: ClassVar[tuple[str, ...]]
    kind: ClassVar[str] = ""
    of_layers: ClassVar[bool] = False
    of_graph: ClassVar[bool] = False
    not_copied: str = ""
    entries: dict[str, Entry]
    others: dict[str, Skipped]
    classes: dict[str, TensorClass]
    metadata: dict[str, str]
    overlapping: list[tuple[str, str]]

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._state = state_of(file)
        self.entries, self.others, self.metadata, self.overlapping = {}, {}, {}, []
        self.classes = {}

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether a file without one of the endings has this format by its content."""
        return False

    @property
    def paths(self) -> list[Path]:
        """The files of which it consists."""
        return [self.path]

    @property
    def settings(self) -> dict[str, Any]:
        """What the file itself says of the model, by the names that config.json has for it."""
        return {}

    @property
    def part(self) -> tuple[int, int]:
        """Which of how many files of one model it is, counted from 0."""
        return 0, 1

    def split(self, name: str, new: Tensor) -> Iterator[tuple[TensorFile, str, Tensor]]:
        yield self, name, new

    def _leave_out_parts(self) -> None:
        """Tensors of which a weight consists are no weights."""
        for one in self.classes.values():
            for part in one.parts.values():
                if (entry := self.entries.get(part)) is not None and entry.skipped is None:
                    skipped = Skipped(Reason.torchao, one.kind)
                    self.entries[part] = replace(entry, skipped=skipped)

    def _leave_out_guesses(self) -> None:
        """Tensors of three axes or more, where neither a name nor the format tells their order."""
        shapes = {name: entry.shape for name, entry in self.entries.items()}
        for name, entry in self.entries.items():
            if entry.skipped is None and (guess := guess_views(name, shapes)):
                known = view_by_bias(name, shapes)
                skipped = None if known else Skipped(Reason.layout)
                views = Views(*(known or guess))
                self.entries[name] = replace(entry, skipped=skipped, views=views)

    def copy(self, target: Path) -> contextlib.AbstractContextManager[Write]:
        """Writes a copy, and gives a function that changes tensors in it; all else is the same."""
        raise UnreadableError(f"{self.path} cannot be copied: {self.not_copied}.")

    def _open(self) -> IO[bytes]:
        file = self.path.open("rb")
        state = state_of(file)
        if state == self._state:
            return file
        file.close()
        raise self._changed(state[0])

    def _changed(self, size: int) -> UnreadableError:
        how = "become shorter" if size < self._state[0] else "changed"
        return UnreadableError(f"{self.path} has {how} while it was read.")

    def _read_bytes(self, start: int, size: int, name: str) -> bytearray:
        """Bytes of the file; the name of the tensor is for the error where memory is short."""
        buffer = self._memory_for(size, name)
        with self._open() as file:
            file.seek(start)
            if file.readinto(buffer) != size:  # type: ignore[attr-defined]
                raise self._changed(0)
        return buffer

    def _read_flat(self, start: int, size: int, dtype: torch.dtype, name: str) -> Tensor:
        if not size:  # of which `frombuffer` makes nothing
            return torch.empty(0, dtype=dtype, device="cpu")
        return torch.frombuffer(self._read_bytes(start, size, name), dtype=dtype)

    def _read_pieces(
        self, start: int, size: int, dtype: torch.dtype, name: str
    ) -> Iterator[Tensor]:
        for at in range(start, start + size, _PIECE):
            yield self._read_flat(at, min(_PIECE, start + size - at), dtype, name)

    def _memory_for(self, size: int, name: str) -> bytearray:
        try:
            return bytearray(size)
        except (MemoryError, OverflowError):
            raise UnreadableError(
                f"{self.path} holds {name} of {size:,} bytes, for which there is not enough memory."
            ) from None


def state_of(file: IO[bytes]) -> tuple[int, int]:
    """The size of a file and the time at which it was written; network drives renumber inodes."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns
