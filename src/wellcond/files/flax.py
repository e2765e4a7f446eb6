"""Reads files of flax.serialization, nested msgpack maps that contain arrays, without Flax.

An array is an extension type, which contains shape, dtype and entries in msgpack again. An array
above 1 GB is a map of several arrays. The name of an array consists of the keys of all maps around
it, such as `params/Dense_0/kernel`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wellcond.files.archive import errors_as_damage
from wellcond.files.inert import is_shape
from wellcond.files.msgpack import Bytes, Unpacker
from wellcond.files.pieces import pieces_of
from wellcond.files.tensors import (
    DamagedError,
    Entry,
    NoTensorsError,
    Rows,
    TensorFile,
    explain_non_weight,
)
from wellcond.weights.reasons import Reason, Skipped

_KIND = "Flax msgpack file"
_NOT_WHOLE = "its contents are inconsistent"
_ARRAY = 1  # the extension type
_CHUNKED = "__msgpack_chunked_array__"
_DTYPES = (
    *("float16", "float32", "float64", "bfloat16", "complex64", "complex128", "bool"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
)
# Keys of the state of an optimizer: a field of a TrainState, a part of the old flax.optim, and the
# keys of optax.adam, whose state may be saved separately.
_OPTIMIZER = ("opt_state", "opt_states", "optimizer_state", "param_states")
_ADAM = {"count", "mu", "nu"}
_STATISTICS = "batch_stats"


@dataclass(frozen=True)
class _Stored:
    """An array: its dtype in Flax, and the places of its entries, in order."""

    shape: tuple[int, ...]
    dtype: str
    places: tuple[Bytes, ...]

    @property
    def known(self) -> torch.dtype | None:
        """The dtype; None if torch lacks it."""
        return getattr(torch, self.dtype, None) if self.dtype in _DTYPES else None


class Flax(TensorFile):
    """A file of flax.serialization.to_bytes, such as flax_model.msgpack."""

    endings = (".msgpack",)
    kind = "a Flax msgpack file"
    not_copied = (
        "it is a Flax msgpack file, which wellcond only reads; save its arrays as safetensors: "
        "safetensors.numpy.save_file({n: a for n, a in flax.traverse_util.flatten_dict("
        "flax.serialization.msgpack_restore(open(path, 'rb').read()), sep='/').items() "
        "if hasattr(a, 'shape') and not n.startswith('opt_state')}, other)"
    )

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._stored: dict[str, _Stored] = {}
        with errors_as_damage(path, _KIND, _NOT_WHOLE), self._open() as file:
            unpacker = Unpacker(file)
            tree = unpacker.read(0, path.stat().st_size)
            if not isinstance(tree, dict) or _CHUNKED in tree or path.stem in _OPTIMIZER:
                tree = {path.stem: tree}
            self._collect(unpacker, tree, ())
        if not self.entries:
            found = "only the state of an optimizer" if self.others else "none"
            raise NoTensorsError(
                f"{path} must contain arrays, as flax.serialization.to_bytes writes them, but "
                f"contains {found}. Save the parameters: flax.serialization.to_bytes(params)."
            )
        self._leave_out_guesses()

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Recognises checkpoints of flax.training, which have no ending, such as checkpoint_100."""
        try:
            return bool(cls(path).entries)
        except ValueError:
            return False

    def _collect(self, unpacker: Unpacker, tree: dict[str, Any], above: tuple[str, ...]) -> None:
        for key, value in tree.items():
            path = (*above, key)
            name = "/".join(path)
            if key in _OPTIMIZER or (isinstance(value, dict) and value.keys() >= _ADAM):
                self.others[name] = Skipped(Reason.optimizer)
            elif isinstance(value, dict) and _CHUNKED not in value:
                self._collect(unpacker, value, path)
            elif isinstance(value, dict):
                self._add(name, _join(unpacker, value), path)
            elif isinstance(value, Bytes) and value.code == _ARRAY:
                self._add(name, _read_array(unpacker, value), path)

    def _add(self, name: str, array: _Stored, path: tuple[str, ...]) -> None:
        if name in self.entries:
            raise DamagedError("two of its arrays have the same name")
        dtype = array.dtype
        skipped = explain_non_weight(array.shape, dtype)
        statistics = _STATISTICS in path
        if skipped is None and statistics:
            skipped = Skipped(Reason.normalisation)
        floating = dtype.startswith(("float", "bfloat", "complex"))
        self._stored[name] = array
        self.entries[name] = Entry(name, array.shape, dtype, floating and not statistics, skipped)

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        array = self._stored[name]
        shape = array.shape
        start, stop = rows or (0, shape[0] if shape else 1)
        each = math.prod(shape[1:])
        flat = self._read_entries(name, start * each, stop * each)
        return flat.reshape(stop - start, *shape[1:]) if shape else flat.reshape(())

    def first_row(self, name: str) -> Tensor:
        return self._read_entries(name, 0, self._stored[name].shape[-1])

    def pieces(self, name: str) -> Iterator[Tensor]:
        array = self._stored[name]
        if (dtype := array.known) is not None and (dtype.is_floating_point or dtype.is_complex):
            for place in array.places:
                for piece in self._read_pieces(place.start, place.size, dtype, name):
                    yield from pieces_of(piece)

    def _read_entries(self, name: str, first: int, last: int) -> Tensor:
        """Reads the entries from `first` to `last`, in the order of the file."""
        array = self._stored[name]
        dtype = array.known or torch.uint8
        start, stop, at = first * dtype.itemsize, last * dtype.itemsize, 0
        if start == stop:  # `frombuffer` refuses an empty buffer
            return torch.empty(0, dtype=dtype, device="cpu")
        buffer = memoryview(self._memory_for(stop - start, name))
        with self._open() as file:
            for place in array.places:
                begin, end = max(start - at, 0), min(stop - at, place.size)
                if begin < end:
                    file.seek(place.start + begin)
                    part = buffer[at + begin - start : at + end - start]
                    if file.readinto(part) != end - begin:  # type: ignore[attr-defined]
                        raise self._changed(0)
                at += place.size
        return torch.frombuffer(buffer, dtype=dtype)


def _read_array(unpacker: Unpacker, value: Bytes) -> _Stored:
    match unpacker.read(value.start, value.stop):
        case [list(sides), str(dtype), Bytes(code=None) as place]:
            array = _Stored(_as_shape(sides), dtype, (place,))
        case _:
            raise DamagedError("an array has no shape, dtype or entries")
    if array.known is not None and place.size != math.prod(array.shape) * array.known.itemsize:
        raise DamagedError("the size of an array differs from that of its entries")
    return array


def _join(unpacker: Unpacker, value: dict[str, Any]) -> _Stored:
    """Joins an array that is written in chunks of one axis."""
    match value:
        case {"shape": dict(sides), "chunks": dict(chunks)}:
            shape = _as_shape([sides.get(str(number)) for number in range(len(sides))])
            found = [chunks.get(str(number)) for number in range(len(chunks))]
        case _:
            raise DamagedError("an array in chunks has no shape or no chunks")
    parts = [_read_array(unpacker, chunk) for chunk in found if isinstance(chunk, Bytes)]
    sizes, dtypes = [math.prod(part.shape) for part in parts], {part.dtype for part in parts}
    if len(parts) != len(found) or len(dtypes) != 1 or sum(sizes) != math.prod(shape):
        raise DamagedError("the chunks of an array differ from it in dtype or number of entries")
    return _Stored(shape, dtypes.pop(), tuple(part.places[0] for part in parts))


def _as_shape(sides: list[Any]) -> tuple[int, ...]:
    if not is_shape(shape := tuple(sides)):
        raise DamagedError("the shape of an array is not a list of lengths")
    return shape
