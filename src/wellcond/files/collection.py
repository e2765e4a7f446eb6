"""The files that a checkpoint consists of: one, those that an index names, or those of a folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from wellcond.files.arrays import Array, Arrays
from wellcond.files.distributed import PARTS, Distributed, find_descriptions
from wellcond.files.exported import Exported
from wellcond.files.flax import Flax
from wellcond.files.folders import find_below, only_one
from wellcond.files.formats import (
    ending_of,
    format_by_name,
    is_pickle,
    other_folder,
    other_format,
)
from wellcond.files.gguf import Gguf
from wellcond.files.keras import Keras
from wellcond.files.memory import NOWHERE, Memory
from wellcond.files.onnx import Onnx
from wellcond.files.pickled import Pickled
from wellcond.files.safetensors import Safetensors
from wellcond.files.script import Script
from wellcond.files.tensors import NoTensorsError, TensorFile, UnreadableError, Write
from wellcond.text import list_some
from wellcond.weights.reasons import Reason, Skipped

# The readers, one for each format; what several recognise is for the first. Exports and arrays lie
# beside the weights that they are made of, so a folder is read by the first that finds files in it.
_OF_TORCH: tuple[type[TensorFile], ...] = (Safetensors, Pickled, Distributed)
_OF_OTHERS: tuple[type[TensorFile], ...] = (
    *(Script, Exported, Keras, Gguf, Flax, Onnx, Arrays, Array),
)
READERS = (*_OF_TORCH, *_OF_OTHERS)
PICKLED = Pickled.endings
INDEX = ".index.json"
_ENDINGS = ", ".join(
    (*Safetensors.endings, INDEX, *PICKLED, *(end for one in _OF_OTHERS for end in one.endings))
)
_CONFIG = 1 << 20  # bytes; those of large models have some thousand
_POINTER = b"version https://git-lfs"
_INDEX = 32 << 20  # bytes; some 25 times that is what Python makes of the worst of it


class Files:
    """All files of a checkpoint, open; or a state dict in memory, as if it were one file.

    Attributes:
        name: the path, or "state dict".
        path: that was given; of a description of torch.distributed.checkpoint its folder.
        directory: which holds the files, or the one file.
        files: the readers, by the names of the files within the directory.
        index: the file of each tensor, if an index says so.
        others: files that hold no tensors or are not read, and why.
        damaged: files of a folder that cannot be read, and why.
    """

    def __init__(self, path: str | os.PathLike[str] | Mapping[str, Tensor]) -> None:
        self.path = NOWHERE if isinstance(path, Mapping) else Path(path)
        self.others: dict[str, Skipped] = {}
        self.damaged: dict[str, str] = {}
        self.files: dict[str, TensorFile] = {}
        self.index: dict[str, str] | None = None
        self._below: Path | None = None  # the folder that holds the weights, if this one does not
        self._asked: set[Path] = set()  # the files of settings, whether they are there or not
        if isinstance(path, Mapping):
            self.name, self.directory = "state dict", NOWHERE
            self.files[""] = Memory(path)
            return
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path} must be a file or a directory, but is not there.")
        if not self.path.is_dir():
            _check_regular(self.path)
        if self.path.is_file() and Distributed.recognises(self.path):
            self.path = self.path.parent
        self.name = str(self.path)
        self.directory = self.path if self.path.is_dir() else self.path.parent
        self._open_all(self._find())

    def _find(self) -> list[str]:
        """Names of the files, within `self.directory`."""
        path = self.path
        if path.is_dir():
            indices = _find_indices(path)
            if len(indices) == 1:
                path = indices[0]
        if path.is_file() and path.name.endswith(INDEX):
            shards = self._read_index(path)
            if self.path.is_dir():
                beside = {file.name for file in _weight_files(self.path)} - set(shards)
                self.others = {name: Skipped(Reason.beside) for name in sorted(beside)}
                self.others |= _find_unread(self.path)
            return shards
        if not path.is_dir():
            return [path.name]
        found = _weight_files(path)
        if {file.name for file in found} <= {"meta.pt"} and not find_below(path):
            if other := other_folder(path):
                raise UnreadableError(other)
            if not found:
                raise UnreadableError(
                    f"{path} must contain checkpoint files, but has none that ends in {_ENDINGS}."
                )
        self.others = _find_unread(path)
        return [file.name for file in found]

    def _read_index(self, path: Path) -> list[str]:
        if path.stat().st_size > _INDEX:
            raise UnreadableError(
                f"{path} must be an index of at most {_INDEX:,} bytes, but has more. "
                "It is damaged, or something else altogether."
            )
        self._index = path
        try:
            self.index = dict(json.loads(path.read_text())["weight_map"])
            shards = sorted(set(self.index.values()))
            if not all(isinstance(shard, str) for shard in shards):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UnreadableError(
                f'{path} must be JSON with a "weight_map" from tensors to files, but is not.'
            ) from None
        for shard in shards:
            if Path(shard).name != shard:
                raise UnreadableError(f"{path} must name files beside it, but names {shard!r}.")
            if not (path.parent / shard).is_file():
                raise UnreadableError(
                    f"{path} names {shard}, which is not there. Fetch the missing shard."
                )
        return shards

    def _open_all(self, names: list[str]) -> None:
        """Opens files, and where none of them has weights those of a folder beside them."""
        in_folder = self.path.is_dir() and self.index is None
        below = find_below(self.path) if in_folder else []
        for name in names:
            self._open(name, alone=len(names) == 1 and not below)
        files = self.files.values()
        if below and not any(one.matrix for file in files for one in file.entries.values()):
            self._below = only_one(below)
            inside = [f"{self._below.name}/{file.name}" for file in _weight_files(self._below)]
            for name in inside:
                self._open(name, alone=len(inside) == 1)
        self._unite_parts()

    def _unite_parts(self) -> None:
        """Takes files for one model if they say that they are its parts; names missing parts."""
        parts = {file.part for file in self.files.values()}
        counts = {count for _, count in parts}
        if self.index is not None or len(parts) < len(self.files) or len(counts) != 1:
            return
        (count,) = counts
        missing = [str(number + 1) for number in range(count) if (number, count) not in parts]
        if missing:
            name = f"part {list_some(missing)} of {count}"
            self.others[name] = Skipped(Reason.absent)
        if len(self.files) > 1:
            files = self.files.items()
            self.index = {name: own for own, file in files for name in file.entries}

    def _open(self, name: str, alone: bool) -> None:
        path = self.directory / name
        try:
            _check_regular(path)
            with path.open("rb") as file:
                if file.read(len(_POINTER)) == _POINTER:
                    raise UnreadableError(
                        f"{path} is a pointer of Git LFS, and not the file that it stands for. "
                        "Fetch that with `git lfs pull`."
                    )
            self.files[name] = _reader_of(path)(path)
        except (UnreadableError, OSError) as raised:
            other = other_format(path) if path.is_file() else ""
            error = UnreadableError(other) if other else raised
            if alone or self.index is not None:
                raise error from None
            what = str(error).removeprefix(f"{path} ")
            if isinstance(error, OSError):
                what = f"cannot be read: {error.strerror}"
            if isinstance(error, NoTensorsError):  # such as scheduler.pt
                self.others[name] = Skipped(Reason.no_tensors)
            else:
                self.damaged[name] = what

    @property
    def of_graph(self) -> bool:
        """Whether its tensors are those of a graph; see `TensorFile.of_graph`."""
        return any(file.of_graph for file in self.files.values())

    def beside(self, name: str) -> dict[str, Any]:
        """The content of the JSON file of this name beside the checkpoint; {} without one.

        What files say themselves stands in for config.json, unless they differ.
        """
        own = [file.settings for file in self.files.values() if file.settings]
        if own and name == "config.json":
            return own[0] if all(one == own[0] for one in own) else {}
        path = self.directory / name
        if self._below is not None and not path.exists():
            path = self._below / name
        self._asked.add(path)
        try:
            if not path.is_file() or path.stat().st_size > _CONFIG:
                return {}
            config = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        return config if isinstance(config, dict) else {}

    def states(self) -> dict[str, list[int]]:
        """Size and time in ns of each file that was read so far; [] of settings not there."""
        paths = {path for file in self.files.values() for path in file.paths} | self._asked
        if self.index is not None:
            paths.add(self._index)
        found = {}
        for path in sorted({path.resolve() for path in paths}):
            state = path.stat() if path.exists() else None
            found[str(path)] = [] if state is None else [state.st_size, state.st_mtime_ns]
        return found

    @contextlib.contextmanager
    def copy(self, target: Path) -> Iterator[dict[TensorFile, Write]]:
        """Writes a copy of all files, and gives a function per file that changes tensors in it."""
        alone = self.path.is_file() and self.index is None
        if not alone:
            target.mkdir()
            opened = {path for file in self.files.values() for path in file.paths}
            beside = self.directory.iterdir() if self.path.is_dir() else [self.path]
            for path in sorted(beside):
                if path not in opened:
                    _copy(path, target / path.name, opened, (self.directory.resolve(),))
        with contextlib.ExitStack() as copies:
            yield {
                file: copies.enter_context(file.copy(target if alone else target / name))
                for name, file in self.files.items()
            }
        if self.path.is_dir():  # its owner must be able to rename it
            target.chmod(stat.S_IMODE(self.path.stat().st_mode) | stat.S_IRWXU)


def _find_indices(directory: Path) -> list[Path]:
    """The indices of the shards in a directory, of the format that is read."""
    found = sorted(directory.glob(f"*{INDEX}"))
    if first := [one for one in found if one.name.endswith(f"{Safetensors.endings[0]}{INDEX}")]:
        return first
    endings = tuple(f"{end}{INDEX}" for one in _OF_OTHERS for end in one.endings)
    of_torch = [one for one in found if not one.name.endswith(endings)]
    files = _names_of(directory.iterdir())
    beside = any(_files_of(reader, files) for reader in _OF_TORCH)
    return of_torch if of_torch or beside else found


def _find_unread(directory: Path) -> dict[str, Skipped]:
    """The files of other formats in a directory."""
    parts = PARTS if find_descriptions(directory) else ()
    files = [path for path in sorted(directory.iterdir()) if not path.name.endswith(parts)]
    called, read = _names_of(files), {*_weight_files(directory)}
    kinds = {path: format_by_name(path) for path in files}
    kinds |= {
        path: f"{reader.kind}: give its path"
        for reader in _OF_OTHERS
        for path in _files_of(reader, called)
        if path not in read
    }
    return {path.name: Skipped(Reason.unread, kind) for path, kind in kinds.items() if kind}


def _weight_files(directory: Path) -> list[Path]:
    files = _names_of(path for path in sorted(directory.iterdir()) if not path.is_dir())
    named = [path for reader in _OF_TORCH for path in _files_of(reader, files)]
    named += find_descriptions(directory)[:1]  # which has those of other processes beside it
    if named or find_below(directory):
        return named
    return next(filter(None, (_files_of(reader, files) for reader in _OF_OTHERS)), [])


def _names_of(files: Iterable[Path]) -> dict[Path, str]:
    """The names of files; of a program that is called as weights are only the true ending."""
    names = {path: path.name.lower() for path in files}
    for path, name in names.items():
        if name.endswith(PICKLED) and path.is_file():
            with contextlib.suppress(OSError):
                if (ending := ending_of(path)).endswith((*Script.endings, *Exported.endings)):
                    names[path] = ending
    return names


def _files_of(reader: type[TensorFile], files: Mapping[Path, str]) -> list[Path]:
    """Those of the files of which the names end as this reader has it."""
    return [path for path, name in files.items() if name.endswith(reader.endings)]


def is_of_torch(path: Path) -> bool:
    """Whether a file is one of torch or safetensors; also a folder, or one that is not there."""
    if not path.is_file() or path.name.endswith(INDEX):
        return True
    ending = ending_of(path).lower()
    return not any(ending.endswith(reader.endings) for reader in _OF_OTHERS)


def _reader_of(path: Path) -> type[TensorFile]:
    """The reader of a file: by its content, or else by the ending of its name."""
    ending = ending_of(path)
    for reader in READERS:
        if ending.lower().endswith(reader.endings):
            return reader
    if what := other_format(path):
        raise UnreadableError(what)
    for reader in READERS:
        if reader.recognises(path):
            return reader
    if is_pickle(path):
        return Pickled
    raise UnreadableError(f"{path} must end in {_ENDINGS}, but does not.")


def _check_regular(path: Path) -> None:
    """Raises for a pipe or a device, which could be read for ever."""
    if not path.exists() and path.is_symlink():
        raise UnreadableError(f"{path} is a link that leads nowhere. Fetch the file it stands for.")
    if path.exists() and not path.is_file():
        raise UnreadableError(f"{path} must be a file, but is a pipe, a socket or a device.")


def _copy(path: Path, target: Path, without: set[Path], above: tuple[Path, ...]) -> None:
    """A copy with its mode; of a directory all in it, of a link that leads nowhere the link."""
    if path.is_dir():
        real = path.resolve()
        if real in above:
            raise UnreadableError(f"{path} leads in a circle, to {real}. Remove that link.")
        target.mkdir()
        inside = list(path.iterdir())
        for one in inside:
            if one not in without:
                _copy(one, target / one.name, without, (*above, real))
        writable = 0 if without.isdisjoint(inside) else stat.S_IRWXU  # by what comes later
        target.chmod(stat.S_IMODE(path.stat().st_mode) | writable)
        return
    there = path.exists()
    if there:
        _check_regular(path)
    shutil.copy(path, target, follow_symlinks=there)
