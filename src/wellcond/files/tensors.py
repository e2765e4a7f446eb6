"""A file of tensors in any format: lists and reads its tensors, and copies it with new values."""

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

Rows = tuple[int, int]  # start and stop along the first dimension
Write = Callable[[str, Tensor], None]  # gives a tensor of a copy new values
_DIMENSIONS = 64  # the limit of NumPy; a malicious file can declare millions
_PIECE = 16 << 20  # bytes


class UnreadableError(ValueError):
    """A file cannot be read. The message names the file, the problem and the remedy."""


class NoTensorsError(UnreadableError):
    """A file is valid but contains no tensors, such as the state of a scheduler."""


class DamagedError(ValueError):
    """A clause that states what is wrong in a file; `damaged` adds the file and the remedy."""


def damaged(path: Path, kind: str, what: object) -> UnreadableError:
    """Returns the error for a file that no writer of its format leaves."""
    return UnreadableError(
        f"{path} is not a valid {kind}: {what}. The file may be truncated or damaged: compare its "
        "size with the size of the original, or fetch it again."
    )


@dataclass(frozen=True)
class Entry:
    """A tensor in a file; `skipped` states why it is not measured.

    Attributes:
        parameter: whether its entries count as parameters in the measured share. Integers do not,
            because they are counters, positions and masks as often as packed weights. A tensor
            with two names counts once.
        aliases: other names that the file gives to this tensor only.
        offsets: where the tensor begins in the larger tensor of which it is a slice, if the file
            states this.
        stored_as: the format in which the file stores it, such as "q4_K"; "" if that is its dtype.
        views: the matrices in it, if the format defines them; otherwise its name and shape decide.
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
        """Whether the tensor can be measured, at least if a pattern is its exact name."""
        return self.skipped is None or self.skipped.reason.by_name


def explain_non_weight(shape: tuple[int, ...], dtype: str) -> Skipped | None:
    """Returns why a tensor of a file is not a weight, or None if it is one."""
    if len(shape) > _DIMENSIONS:
        return Skipped(Reason.dimensions, str(len(shape)))
    return names.explain_non_weight(shape, dtype)


class Holder(abc.ABC):
    """A source of tensors: a file, or an object that makes one tensor from several."""

    @abc.abstractmethod
    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        """Reads the tensor, or its rows start to stop. Release it before reading the next one."""

    @abc.abstractmethod
    def pieces(self, name: str) -> Iterable[Tensor]:
        """Yields the floating point entries of the tensor in pieces."""

    @abc.abstractmethod
    def first_row(self, name: str) -> Tensor:
        """Returns the first entries of a tensor, as many as its last dimension is long."""

    @abc.abstractmethod
    def split(self, name: str, new: Tensor) -> Iterator[tuple[TensorFile, str, Tensor]]:
        """Yields the stored tensors that receive new values, each with the file that stores it."""


class TensorFile(Holder):
    """One file of tensors. Every read opens the file anew, and raises if the file has changed.

    Attributes:
        endings: the endings of the names of such files.
        kind: what such a file is called.
        of_layers: whether the views of its entries come from layers that the file names. The names
            of weights do not override them.
        of_graph: whether the file contains a graph that defines what each tensor is. Names are then
            ignored, because an export may use the names of a checkpoint for other values.
        not_copied: why wellcond does not copy such a file with new values, and the remedy; "" if it
            does.
        others: the content of the file that is not a tensor, and why it is not measured.
        classes: weights that are stored as several tensors, by their names. The tensors are
            entries, if they are in this file.
        metadata: strings that the file stores in addition to its tensors.
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
        """Returns whether the content of a file without one of the endings has this format."""
        return False

    @property
    def paths(self) -> list[Path]:
        """The files of which it consists."""
        return [self.path]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the model that the file contains, under the names of config.json."""
        return {}

    @property
    def part(self) -> tuple[int, int]:
        """The number of this file, counted from 0, and the number of files of the model."""
        return 0, 1

    def split(self, name: str, new: Tensor) -> Iterator[tuple[TensorFile, str, Tensor]]:
        yield self, name, new

    def _leave_out_parts(self) -> None:
        """Skips tensors that are parts of a weight."""
        for one in self.classes.values():
            for part in one.parts.values():
                if (entry := self.entries.get(part)) is not None and entry.skipped is None:
                    skipped = Skipped(Reason.torchao, one.kind)
                    self.entries[part] = replace(entry, skipped=skipped)

    def _leave_out_guesses(self) -> None:
        """Skips tensors with three or more axes whose order neither name nor format tells."""
        shapes = {name: entry.shape for name, entry in self.entries.items()}
        for name, entry in self.entries.items():
            if entry.skipped is None and (guess := guess_views(name, shapes)):
                known = view_by_bias(name, shapes)
                skipped = None if known else Skipped(Reason.layout)
                views = Views(*(known or guess))
                self.entries[name] = replace(entry, skipped=skipped, views=views)

    def copy(self, target: Path) -> contextlib.AbstractContextManager[Write]:
        """Copies the file, and yields a function that changes tensors in the copy."""
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
        return UnreadableError(
            f"{self.path} has {how} while it was read. Try again when no program writes to it."
        )

    def _read_bytes(self, start: int, size: int, name: str) -> bytearray:
        """Reads bytes of the file; an error about memory contains the name of the tensor."""
        buffer = self._memory_for(size, name)
        with self._open() as file:
            file.seek(start)
            if file.readinto(buffer) != size:  # type: ignore[attr-defined]
                raise self._changed(0)
        return buffer

    def _read_flat(self, start: int, size: int, dtype: torch.dtype, name: str) -> Tensor:
        if not size:  # `frombuffer` refuses an empty buffer
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
                f"{self.path} contains {name} of {size:,} bytes, for which there is not enough "
                "memory. Use a machine with more memory."
            ) from None


def state_of(file: IO[bytes]) -> tuple[int, int]:
    """Returns the size and modification time of a file; network drives renumber inodes."""
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns
