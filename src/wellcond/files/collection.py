"""The files of a checkpoint: one file, the files that an index names, or the files of a folder."""

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

# The readers, one per format. The first reader that recognises a file reads it. Exports and arrays
# are often in the folder of the weights that they were made from, so only the first reader that
# finds files in a folder reads it.
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
_CONFIG = 1 << 20  # bytes; the config of a large model has a few thousand
_POINTER = b"version https://git-lfs"
_INDEX = 32 << 20  # bytes; Python needs up to about 25 times as much memory to parse it


class Files:
    """All files of a checkpoint, or a state dict in memory, which acts as one file.

    Attributes:
        name: the path, or "state dict".
        path: the given path, or the folder of a given torch.distributed.checkpoint metadata file.
        directory: the directory that contains the files, or the one file.
        files: the readers, by the names of the files within the directory.
        index: the file of each tensor, if there is an index.
        others: files that contain no tensors or are not read, and why.
        damaged: files of a folder that cannot be read, and why.
    """

    def __init__(self, path: str | os.PathLike[str] | Mapping[str, Tensor]) -> None:
        self.path = NOWHERE if isinstance(path, Mapping) else Path(path)
        self.others: dict[str, Skipped] = {}
        self.damaged: dict[str, str] = {}
        self.files: dict[str, TensorFile] = {}
        self.index: dict[str, str] | None = None
        self._below: Path | None = None  # the subfolder that contains the weights, if there is one
        self._asked: set[Path] = set()  # the files of settings, whether they exist or not
        if isinstance(path, Mapping):
            self.name, self.directory = "state dict", NOWHERE
            self.files[""] = Memory(path)
            return
        if not self.path.exists():
            raise FileNotFoundError(
                f"{self.path} must be a file or a directory, but does not exist. Check the path; "
                "wellcond downloads nothing."
            )
        if not self.path.is_dir():
            _check_regular(self.path)
        if self.path.is_file() and Distributed.recognises(self.path):
            self.path = self.path.parent
        self.name = str(self.path)
        self.directory = self.path if self.path.is_dir() else self.path.parent
        self._open_all(self._find())

    def _find(self) -> list[str]:
        """Returns the names of the files within `self.directory`."""
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
                # A trainer writes its checkpoints into subfolders.
                below = [one.name for one in sorted(path.iterdir()) if _has_weights(one)]
                if below:
                    raise UnreadableError(
                        f"{path} must contain checkpoint files, but only its subfolders do: "
                        f"{list_some(below)}. Give the path of one of them."
                    )
                raise UnreadableError(
                    f"{path} must contain checkpoint files, but contains none whose name ends in "
                    f"{_ENDINGS}. Give the path of a file, or of the folder that contains it."
                )
        self.others = _find_unread(path)
        return [file.name for file in found]

    def _read_index(self, path: Path) -> list[str]:
        if path.stat().st_size > _INDEX:
            raise UnreadableError(
                f"{path} must be an index of at most {_INDEX:,} bytes, but has more. It is damaged "
                "or not an index: fetch it again."
            )
        self._index = path
        try:
            self.index = dict(json.loads(path.read_text())["weight_map"])
            shards = sorted(set(self.index.values()))
            if not all(isinstance(shard, str) for shard in shards):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UnreadableError(
                f'{path} must be JSON with a "weight_map" from tensors to files, but is not. It is '
                "damaged or not an index: fetch it again."
            ) from None
        for shard in shards:
            if Path(shard).name != shard:
                raise UnreadableError(
                    f"{path} must name files in its own folder, but names {shard!r}. Move this "
                    "file into the folder, and name it there without a path."
                )
            if not (path.parent / shard).is_file():
                raise UnreadableError(
                    f"{path} names {shard}, but this file does not exist. Fetch the missing shard."
                )
        return shards

    def _open_all(self, names: list[str]) -> None:
        """Opens files; if none of them contains weights, opens those of the subfolder that does."""
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
        """Treats files that declare themselves parts of one model as one; finds missing parts."""
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
                        f"{path} must be a checkpoint file, but is a Git LFS pointer. Fetch the "
                        "file with `git lfs pull`."
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
        """Whether the tensors belong to a graph; see `TensorFile.of_graph`."""
        return any(file.of_graph for file in self.files.values())

    def beside(self, name: str) -> dict[str, Any]:
        """Returns the content of the JSON file of this name in the folder, or {} without one.

        Settings that the checkpoint files contain themselves replace config.json, if they agree.
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
        """Returns size and time in ns of each file read; [] for settings that do not exist."""
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
        """Copies all files, and yields one function per file that changes tensors in the copy."""
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
        if self.path.is_dir():  # the owner must be able to rename the copy
            target.chmod(stat.S_IMODE(self.path.stat().st_mode) | stat.S_IRWXU)


def _find_indices(directory: Path) -> list[Path]:
    """Returns the index files in a directory whose shards have the format that is read."""
    found = sorted(directory.glob(f"*{INDEX}"))
    if first := [one for one in found if one.name.endswith(f"{Safetensors.endings[0]}{INDEX}")]:
        return first
    endings = tuple(f"{end}{INDEX}" for one in _OF_OTHERS for end in one.endings)
    of_torch = [one for one in found if not one.name.endswith(endings)]
    files = _names_of(directory.iterdir())
    beside = any(_files_of(reader, files) for reader in _OF_TORCH)
    return of_torch if of_torch or beside else found


def _find_unread(directory: Path) -> dict[str, Skipped]:
    """Returns the files in a directory whose format is not read there."""
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
    named += find_descriptions(directory)[:1]  # its reader finds those of other processes
    if named or find_below(directory):
        return named
    return next(filter(None, (_files_of(reader, files) for reader in _OF_OTHERS)), [])


def _has_weights(path: Path) -> bool:
    try:
        return path.is_dir() and bool(_weight_files(path))
    except OSError:  # a folder that cannot be read
        return False


def _names_of(files: Iterable[Path]) -> dict[Path, str]:
    """Returns the names of files; for a program named like weights, only its true ending."""
    names = {path: path.name.lower() for path in files}
    for path, name in names.items():
        if name.endswith(PICKLED) and path.is_file():
            with contextlib.suppress(OSError):
                if (ending := ending_of(path)).endswith((*Script.endings, *Exported.endings)):
                    names[path] = ending
    return names


def _files_of(reader: type[TensorFile], files: Mapping[Path, str]) -> list[Path]:
    """Returns the files whose names have an ending of this reader."""
    return [path for path, name in files.items() if name.endswith(reader.endings)]


def is_of_torch(path: Path) -> bool:
    """Returns whether a path is a torch or safetensors file, a folder, or does not exist."""
    if not path.is_file() or path.name.endswith(INDEX):
        return True
    ending = ending_of(path).lower()
    return not any(ending.endswith(reader.endings) for reader in _OF_OTHERS)


def _reader_of(path: Path) -> type[TensorFile]:
    """Returns the reader of a file: by its content, or else by the ending of its name."""
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
    raise UnreadableError(
        f"{path} must end in {_ENDINGS}, but does not, and its content is not in any of these "
        "formats. Give the path of a checkpoint."
    )


def _check_regular(path: Path) -> None:
    """Raises for a pipe or a device, which could provide bytes without end."""
    if not path.exists() and path.is_symlink():
        raise UnreadableError(
            f"{path} must be a file, but is a broken link. Fetch the file that it refers to."
        )
    if path.exists() and not path.is_file():
        raise UnreadableError(
            f"{path} must be a file, but is a pipe, a socket or a device. Save its content as a "
            "file."
        )


def _copy(path: Path, target: Path, without: set[Path], above: tuple[Path, ...]) -> None:
    """Copies a file or a directory with its mode; copies a broken link as a link."""
    if path.is_dir():
        real = path.resolve()
        if real in above:
            raise UnreadableError(
                f"{path} cannot be copied: it is a link to {real}, which contains it. Remove the "
                "link."
            )
        target.mkdir()
        inside = list(path.iterdir())
        for one in inside:
            if one not in without:
                _copy(one, target / one.name, without, (*above, real))
        writable = 0 if without.isdisjoint(inside) else stat.S_IRWXU  # readers still add files
        target.chmod(stat.S_IMODE(path.stat().st_mode) | writable)
        return
    there = path.exists()
    if there:
        _check_regular(path)
    shutil.copy(path, target, follow_symlinks=there)
