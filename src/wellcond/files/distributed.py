"""A folder of torch.distributed.checkpoint: tensors whose chunks are in the files of processes.

`.metadata` is a pickle that describes which chunks tile each tensor, and where each chunk is in the
files of the same folder. Each chunk has the format of a torch.save file. Without a coordinator,
each process describes its own chunks in a file such as `__0.metadata`.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from wellcond.files.archive import Extent, errors_as_damage, refresh_checksums
from wellcond.files.inert import Foreign, OtherKey, StoredTensor, Unpickler, is_shape
from wellcond.files.joined import Joined, Sides, Slice, explain_misfit
from wellcond.files.nested import STATES
from wellcond.files.pickled import Pickled
from wellcond.files.tensors import (
    DamagedError,
    Entry,
    NoTensorsError,
    Rows,
    TensorFile,
    UnreadableError,
    Write,
    damaged,
    explain_non_weight,
    state_of,
)
from wellcond.text import escape, list_some
from wellcond.weights.reasons import Reason, Skipped

METADATA, PARTS = ".metadata", ".distcp"
_OF_PROCESS = re.compile(r"__\d+\.metadata")
_OPTIMIZER = re.compile(r"(optim|optimizers?)(_\d+)?\.")
_KIND = "metadata file of torch.distributed.checkpoint"
_PART = "shard of torch.distributed.checkpoint"
_SETTINGS = 1 << 16  # bytes that are read of metadata.json
_ONLY = "tensor"  # the name of the only tensor in a file


class Stored(NamedTuple):
    """Where a chunk is stored: a range of bytes of a file in the folder."""

    file: str
    start: int
    size: int


class Described:
    """A tensor in the metadata: its shape, its dtype, and the places of its chunks by box."""

    def __init__(self, shape: Sides, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.chunks: dict[tuple[Sides, Sides], list[Stored]] = {}


class Distributed(TensorFile):
    """The tensors of a folder; `path` is its first metadata file."""

    endings = ()

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return path.name == METADATA or bool(_OF_PROCESS.fullmatch(path.name))

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        _refuse_megatron(path.parent)
        described: dict[str, Described] = {}
        names: list[str] = []
        self._descriptions = find_descriptions(path.parent) or [path]
        for one in self._descriptions:
            with errors_as_damage(one, _KIND):
                names += _read_description(one, described)
        with errors_as_damage(path, _KIND):
            self._files = _check_places(path.parent, described)
        self._states = [*map(_state_of_file, self.paths)]
        self._tensors: dict[str, Joined] = {}
        states = _find_states(names)
        for name, tensor in described.items():
            if name in states:
                group, reason = states[name]
                self.others[group] = Skipped(reason)
            else:
                self._add(name, tensor)
        if not described:
            raise NoTensorsError(
                f"{path} must describe tensors, but describes none. Give the folder of the weights "
                "of the model."
            )

    def _add(self, name: str, tensor: Described) -> None:
        with errors_as_damage(self.path, _KIND):
            if why := explain_misfit(list(tensor.chunks), tensor.shape):
                raise DamagedError(
                    f"the chunks of {name} do not tile its shape {tensor.shape}: {why}"
                )
        skipped = explain_non_weight(tensor.shape, dtype := str(tensor.dtype)[6:])
        slices = []
        for (offsets, shape), places in tensor.chunks.items():
            chunks = [self._open_chunk(name, shape, tensor.dtype, place) for place in places]
            skipped = next(filter(None, (chunk.foreign for chunk in chunks)), skipped)
            slices.append(Slice(offsets, shape, tuple((chunk, _ONLY) for chunk in chunks)))
        floating = tensor.dtype.is_floating_point or tensor.dtype.is_complex
        self.entries[name] = Entry(name, tensor.shape, dtype, floating, skipped)
        self._tensors[name] = Joined(slices, tensor.shape, tensor.dtype)

    def _open_chunk(self, name: str, shape: Sides, dtype: torch.dtype, place: Stored) -> _Chunk:
        path = self.path.parent / place.file
        try:
            chunk = _Chunk(path, Extent(path, place.start, place.size))
            entry = chunk.entries.get(_ONLY)
        except UnreadableError:
            entry = None
        if entry is None:
            _refuse_safetensors(path)
            raise damaged(
                path, _PART, f"the bytes of {name} at byte {place.start:,} are not a tensor"
            )
        written = str(dtype)[6:]
        if not chunk.foreign and (entry.shape, entry.dtype) != (shape, written):
            raise damaged(
                path,
                _PART,
                f"a chunk of {name} must be {shape} of {written}, but is {entry.shape} of "
                f"{entry.dtype}",
            )
        return chunk

    @property
    def paths(self) -> list[Path]:
        return [*self._descriptions, *self._files]

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        return self._tensors[name].read(name, rows)

    def first_row(self, name: str) -> Tensor:
        return self._tensors[name].first_row(name)

    def pieces(self, name: str) -> Iterator[Tensor]:
        yield from self._tensors[name].pieces(name)

    @contextlib.contextmanager
    def copy(self, target: Path) -> Iterator[Write]:
        for path in self.paths:
            shutil.copyfile(path, target.parent / path.name)

        def write(name: str, new: Tensor) -> None:
            for chunk, _, values in self._tensors[name].split(name, new):
                assert isinstance(chunk, _Chunk)
                chunk.overwrite(target.parent / chunk.path.name, values)

        yield write
        for path in self.paths:
            shutil.copymode(path, target.parent / path.name)
        for path, state in zip(self.paths, self._states, strict=True):
            if _state_of_file(path) != state:
                raise UnreadableError(
                    f"{path} has changed while it was read. Try again when no program writes to it."
                )


class _Chunk(Pickled):
    """A chunk: a torch.save file within another file."""

    @property
    def foreign(self) -> Skipped | None:
        """Why the chunk is not a plain dense tensor; None if it is one."""
        skipped = self.entries[_ONLY].skipped
        plain = isinstance(self._tensors[_ONLY], StoredTensor)
        repeats = skipped is not None and skipped.reason is Reason.not_dense
        return skipped if repeats or not plain else None

    def overwrite(self, target: Path, new: Tensor) -> None:
        """Overwrites the chunk in a copy of the file."""
        key = self._overwrite(target, _ONLY, new, self._storages)
        refresh_checksums(replace(self._extent, path=target), [key])


def _state_of_file(path: Path) -> tuple[int, int]:
    with path.open("rb") as file:
        return state_of(file)


def find_descriptions(folder: Path) -> list[Path]:
    """Returns the metadata files of a folder: one of all processes, or one per process."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if not any(path.name.endswith(PARTS) for path in files):
        return []
    whole = [path for path in files if path.name == METADATA]
    return whole or [path for path in files if _OF_PROCESS.fullmatch(path.name)]


# --- the metadata ---------------------------------------------------------------------------------


def _read_description(path: Path, described: dict[str, Described]) -> list[str]:
    """Adds the tensors of a metadata file; returns all names, including those of other objects."""
    with path.open("rb") as file:
        content = Unpickler(file).load()
    about = _state_of(content, "Metadata")
    tensors = about.get("state_dict_metadata")
    places = _read_places(path, about.get("storage_data"))
    if not isinstance(tensors, dict):
        raise DamagedError("it has no list of tensors")
    listed, stored = 0, len(places)
    for name, one in tensors.items():
        if _is(one, "BytesStorageMetadata"):
            continue
        about = _state_of(one, "TensorStorageMetadata")
        shape, chunks = about.get("size"), about.get("chunks")
        dtype = _dtype_of(about.get("properties"))
        if not (isinstance(name, str) and is_shape(shape) and isinstance(chunks, list) and dtype):
            raise DamagedError("a tensor must have a name, a shape, a dtype and chunks")
        listed += len(chunks)
        if listed > stored:  # a pickle can contain one list in many places
            raise DamagedError(f"it lists more chunks than the {stored:,} that are stored")
        tensor = described.setdefault(name, Described(shape, dtype))
        if (tensor.shape, tensor.dtype) != (shape, dtype):
            raise DamagedError(f"processes differ in the shape or the dtype of {name}")
        for chunk in chunks:
            box = _state_of(chunk, "ChunkStorageMetadata")
            offsets, sizes = box.get("offsets"), box.get("sizes")
            if not (is_shape(offsets) and is_shape(sizes)):
                raise DamagedError(f"a chunk of {name} must have offsets and sizes")
            if not len(offsets) == len(sizes) == len(shape):
                raise DamagedError(f"a chunk of {name} must have {len(shape)} dimensions")
            place = places.pop((name, offsets), None)
            if place is None:
                raise DamagedError(f"a chunk of {name} at {offsets} is listed, but not stored")
            tensor.chunks.setdefault((offsets, sizes), []).append(place)
    return [name for name in tensors if isinstance(name, str)]


def _read_places(path: Path, storage: Any) -> dict[tuple[str, Sides], Stored]:
    """Returns where the chunks are stored, by the names of their tensors and their offsets."""
    if not isinstance(storage, dict):
        raise DamagedError("it does not state where chunks are stored")
    places: dict[tuple[str, Sides], Stored] = {}
    for key, value in storage.items():
        index = _state_of(key.key if isinstance(key, OtherKey) else key, "MetadataIndex")
        about = _state_of(value, "_StorageInfo")
        name, offsets = index.get("fqn"), index.get("offset")
        if offsets is None:  # not a tensor
            continue
        if not (isinstance(name, str) and is_shape(offsets)):
            raise DamagedError("a chunk must belong to a tensor, and have offsets")
        if (name, offsets) in places:
            raise DamagedError(f"a chunk of {name} at {offsets} is stored twice")
        changes = about.get("transform_descriptors")
        if changes:
            known = isinstance(changes, list) and all(isinstance(one, str) for one in changes)
            raise UnreadableError(
                f"{path} must describe chunks that are stored as torch.save writes them, but its "
                f"chunks are transformed: {list_some(changes if known else ['changed'], limit=2)}. "
                "Load it with torch.distributed.checkpoint, and save it without extensions."
            )
        file, *numbers = (about.get(key) for key in ("relative_path", "offset", "length"))
        if not isinstance(file, str) or not is_shape((*numbers,)):
            raise DamagedError(f"a chunk of {name} must have a file and a place in it")
        if not file or Path(file).name != file or file == ".." or "\0" in file:
            raise DamagedError(
                f"it must name files in its own folder, but names {escape(file[:200])}"
            )
        places[name, offsets] = Stored(file, *numbers)
    return places


def _is(one: Any, kind: str) -> TypeGuard[Foreign]:
    """Returns whether `one` represents an object of this torch class."""
    known = isinstance(one, Foreign) and one.kind.startswith("torch.distributed.")
    return known and one.name == kind


def _state_of(one: Any, kind: str) -> Any:
    """Returns the attributes of an object of this class, uncopied: many objects may share them."""
    if not _is(one, kind) or not isinstance(one.state, Mapping):
        found = one.kind if isinstance(one, Foreign) else type(one).__name__
        raise DamagedError(f"it must contain a {kind}, but contains {escape(found)}")
    return one.state


def _dtype_of(properties: Any) -> torch.dtype | None:
    """Returns the dtype in the properties of a tensor, the first entry of the saved tuple."""
    if not _is(properties, "TensorProperties") or not isinstance(properties.state, tuple):
        return None
    return next((one for one in properties.state[:1] if isinstance(one, torch.dtype)), None)


def _check_places(folder: Path, described: Mapping[str, Described]) -> list[Path]:
    """Returns the files that contain chunks, after checking that no two chunks share bytes.

    Raises:
        UnreadableError: a file does not exist or is too short.
        DamagedError: two chunks share bytes.
    """
    places: dict[str, list[tuple[int, int]]] = {}
    for tensor in described.values():
        for copies in tensor.chunks.values():
            for place in copies:
                places.setdefault(place.file, []).append((place.start, place.size))
    files = [folder / name for name in sorted(places)]
    for path in files:
        if not path.is_file():
            raise UnreadableError(
                f"{folder / METADATA} names {escape(path.name)}, but this file does not exist. "
                "Fetch it."
            )
        size, end = path.stat().st_size, 0
        for start, length in sorted(places[path.name]):
            if start < end:
                _refuse_safetensors(path)
                raise DamagedError(f"two chunks share bytes of {path.name}")
            end = start + length
        if end > size:
            _refuse_safetensors(path)
            raise damaged(path, _PART, f"it must contain {end:,} bytes, but contains {size:,}")
    return files


def _refuse_megatron(folder: Path) -> None:
    """Raises for a checkpoint of Megatron Core, which has its own order of layers and rows."""
    path = folder / "metadata.json"
    if not path.is_file():
        return
    with path.open("rb") as file:
        if b'"sharded_backend"' in file.read(_SETTINGS):
            raise UnreadableError(
                f"{folder} must contain one tensor per weight, but is a Megatron Core checkpoint, "
                "which stacks layers and has its own order of the rows of fused weights. Export it "
                "to the format of transformers with the tool that wrote it."
            )


def _refuse_safetensors(path: Path) -> None:
    """Raises if a shard is a safetensors file, which does not fit the metadata."""
    with path.open("rb") as file:
        if file.read(9)[8:] == b"{":
            raise UnreadableError(
                f"{path} must contain chunks as torch.save writes them, but is a safetensors file. "
                "Copy all such files into another folder, with names that end in .safetensors, and "
                "give the path of that folder."
            )


def _find_states(names: Sequence[str]) -> dict[str, tuple[str, Reason]]:
    """Finds the names that belong to the state of an optimizer or Regularizer, with its name.

    In a torch.save file, the keys of a dict identify such a state. Here, the keys are parts of
    names.
    """
    matches = [match for name in names if (match := _OPTIMIZER.match(name))]
    found = {match.string: (match[0][:-1], Reason.optimizer) for match in matches}
    for keys, reason in STATES:
        common = set.intersection(*({_before(name, key) for name in names} for key in keys))
        for name in names if common - {None} else ():
            above = {_before(name, key) for key in keys} | {name.rpartition(".")[0] or None}
            for state in (above & common) - {None}:
                found.setdefault(name, (state or "state", reason))
    return found


def _before(name: str, key: str) -> str | None:
    """Returns the part of a name before a key between dots; None if the name lacks the key."""
    before, found, _ = f".{name}.".partition(f".{key}.")
    return before[1:] if found else None
