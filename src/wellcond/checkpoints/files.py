"""Weights in files: read one tensor at a time, write a copy in which some are replaced.

A safetensors file is read by offset, so that only one tensor is ever in memory. A file of
torch.save is mapped, with weights only, and opened anew now and then, because pages that were read
once stay resident. Nothing that could run code is ever unpickled.
"""

from __future__ import annotations

import abc
import contextlib
import json
import math
import os
import pickle
import re
import shutil
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wellcond.weights.matrices import Matrices
from wellcond.weights.names import views_by_name, why_no_weight
from wellcond.weights.reasons import Reason, Skipped

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
INDEX = ".index.json"
# Mapped bytes that may be read before the file is opened anew.
_RESIDENT = 64 << 20
# What safetensors calls the dtypes of torch.
_INTEGERS = {"BOOL": "bool", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64"}
_INTEGERS |= {"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class UnreadableError(ValueError):
    """A file that gives no answer: its path, what is wrong with it, and the way out."""


class PickledCodeError(UnreadableError):
    """A file that is sound but holds more than tensors."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file; `skipped` says why it holds no weights.

    Whether it is a `parameter` that counts for the share of what was measured: integers are
    counters, positions and masks as often as packed weights, and the same tensor counts once.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parameter: bool
    skipped: Skipped | None


class TensorFile(abc.ABC):
    """One file of tensors."""

    path: Path
    entries: dict[str, Entry]
    others: dict[str, Skipped]  # what is in it besides, and why it is not measured

    @abc.abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor, to be used and let go before the next is read."""

    @abc.abstractmethod
    def copy_with(self, replaced: Iterable[tuple[str, Tensor]], target: Path) -> None:
        """Writes a copy in which these tensors have other values; all else stays as it is."""


class _Safetensors(TensorFile):
    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path, self.others = path, {}
        try:
            # It checks the header, the offsets and the length of the file.
            with safe_open(path, framework="pt"), path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
        except SafetensorError as error:
            raise UnreadableError(
                f"{path} must be a whole safetensors file, but: {error}. It may be truncated or "
                "damaged: compare its size with the original's, or fetch it again."
            ) from None
        self._offsets = {
            name: [8 + length + offset for offset in entry["data_offsets"]]
            for name, entry in header.items()
            if name != "__metadata__"
        }
        self.entries = {}
        for name in self._offsets:
            shape, written = tuple(header[name]["shape"]), header[name]["dtype"]
            dtype = (_FLOATS | _INTEGERS).get(written, written)
            skipped = why_no_weight(shape, dtype)
            self.entries[name] = Entry(name, shape, dtype, written not in _INTEGERS, skipped)

    def read(self, name: str) -> Tensor:
        start, stop = self._offsets[name]
        buffer = bytearray(stop - start)
        with self.path.open("rb") as file:
            file.seek(start)
            if file.readinto(buffer) != len(buffer):
                raise UnreadableError(f"{self.path} has become shorter while it was read.")
        entry = self.entries[name]
        return torch.frombuffer(buffer, dtype=getattr(torch, entry.dtype)).reshape(entry.shape)

    def copy_with(self, replaced: Iterable[tuple[str, Tensor]], target: Path) -> None:
        shutil.copyfile(self.path, target)
        with target.open("r+b") as file:
            for name, tensor in replaced:
                start, stop = self._offsets[name]
                buffer = bytearray(stop - start)
                torch.frombuffer(buffer, dtype=tensor.dtype).copy_(tensor.flatten())
                file.seek(start)
                file.write(buffer)


class _Pickled(TensorFile):
    def __init__(self, path: Path) -> None:
        self.path = path
        self._open()
        if not (self._tensors or self.others):
            raise UnreadableError(
                f"{path} must hold a dict of tensors, but holds a {type(self._content).__name__} "
                "without any. Save a state dict: torch.save(model.state_dict(), path)."
            )
        self.entries = {}
        first: dict[tuple[Any, ...], str] = {}
        for name, tensor in self._tensors.items():
            shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
            parameter = tensor.is_floating_point() or tensor.is_complex()
            skipped = why_no_weight(shape, dtype)
            if tensor.layout != torch.strided:
                layout = str(tensor.layout).removeprefix("torch.")
                skipped = Skipped(Reason.not_dense, layout)
            elif skipped is None:
                where = (tensor.data_ptr(), shape, tensor.stride(), dtype)
                if first.setdefault(where, name) != name:
                    skipped, parameter = Skipped(Reason.same, first[where]), False
            self.entries[name] = Entry(name, shape, dtype, parameter, skipped)

    def _open(self) -> None:
        self._content: Any = None
        self._tensors: dict[str, Tensor] = {}
        self._read = 0
        self._content = _load(self.path)
        self.others = {}
        self._tensors = dict(_tensors(self._content, "", self.others))

    def read(self, name: str) -> Tensor:
        if self._read > _RESIDENT:
            self._open()
        tensor = self._tensors[name].detach()
        self._read += tensor.numel() * tensor.element_size()
        return tensor

    def copy_with(self, replaced: Iterable[tuple[str, Tensor]], target: Path) -> None:
        content = _load(self.path)  # mapped privately: what is written here stays in memory
        tensors = dict(_tensors(content, "", {}))
        with torch.no_grad():
            for name, tensor in replaced:
                tensors[name].copy_(tensor)
        torch.save(content, target)


def _load(path: Path) -> Any:
    mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 cannot be mapped
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a TorchScript archive, which is refused below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code is None:
            raise UnreadableError(
                f"{path} must be a file of torch.save, but cannot be unpickled. "
                "It may be damaged, or something else altogether."
            ) from None
        raise PickledCodeError(
            f"{path} must hold tensors alone, but holds a {code[1]}, and loading it could run any "
            "code. Save the weights alone: torch.save(model.state_dict(), path)."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AssertionError) as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        if "TorchScript" in str(error):
            raise PickledCodeError(
                f"{path} must hold tensors alone, but is a TorchScript archive, a program. "
                "Save its weights: torch.save(torch.jit.load(path).state_dict(), other)."
            ) from None
        raise UnreadableError(
            f"{path} must be a whole file of torch.save, but: {str(error).split('.')[0]}. "
            "It may be truncated or damaged: compare its size with the original's."
        ) from None


def _tensors(content: Any, prefix: str, others: dict[str, Skipped]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested dicts and lists, names joined by dots."""
    if isinstance(content, Tensor):
        yield prefix or "tensor", content
    elif isinstance(content, Mapping) and {"state", "param_groups"} <= set(content):
        others[prefix or "everything"] = Skipped(Reason.optimizer)
    elif isinstance(content, Mapping | list | tuple):
        items = content.items() if isinstance(content, Mapping) else enumerate(content)
        for key, value in items:
            yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key), others)


class Checkpoint:
    """The tensors of a file, of a sharded file, or of all files of a directory.

    Of several files that no index unites, names begin with that of their file: `step1.pt/0.weight`;
    those that are damaged are in `damaged`, with the reason.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path} must be a file or a directory, but is not there.")
        self.others: dict[str, Skipped] = {}
        self.damaged: dict[str, str] = {}
        self.files: dict[str, TensorFile] = {}  # by their name within the checkpoint
        names = self._find()
        for name in names:
            self._open(name, alone=len(names) == 1)
        holding = [
            file
            for file in self.files.values()
            if any(entry.skipped is None for entry in file.entries.values())
        ]
        self.where: dict[str, tuple[TensorFile, Entry]] = {}
        for file_name, file in self.files.items():
            united = self.index is not None or len(self.files) == 1 or holding == [file]
            prefix = "" if united else f"{file_name}/"
            for name, entry in file.entries.items():
                self.where[prefix + name] = file, entry
            self.others |= {prefix + name: skipped for name, skipped in file.others.items()}
        if self.index is not None:
            self._check_index()

    def _find(self) -> list[str]:
        """Names of the files, within `self.directory`."""
        self.index: dict[str, str] | None = None
        self.index_name = ""
        path = self.path
        self.directory = path if path.is_dir() else path.parent
        if path.is_dir():
            indices = sorted(path.glob(f"*.safetensors{INDEX}")) or sorted(path.glob(f"*{INDEX}"))
            if len(indices) == 1:
                path = indices[0]
        if path.is_file() and path.name.endswith(INDEX):
            self.index_name = path.name
            return self._read_index(path)
        if path.is_file():
            return [path.name]
        found = sorted(path.glob("*.safetensors"))
        found += sorted(file for file in path.iterdir() if file.suffix in PICKLED)
        if not found:
            raise UnreadableError(
                f"{path} must contain checkpoint files, but has none that ends in .safetensors, "
                f"{INDEX}, {', '.join(PICKLED)}."
            )
        return [file.name for file in found]

    def _read_index(self, path: Path) -> list[str]:
        try:
            self.index = dict(json.loads(path.read_text())["weight_map"])
            shards = sorted(set(self.index.values()))
        except (ValueError, KeyError, TypeError):
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

    def _open(self, name: str, alone: bool) -> None:
        path = self.directory / name
        try:
            if path.suffix == ".safetensors":
                self.files[name] = _Safetensors(path)
            elif path.suffix in PICKLED or zipfile.is_zipfile(path):
                self.files[name] = _Pickled(path)
            else:
                raise UnreadableError(
                    f"{path} must end in .safetensors, {INDEX}, {', '.join(PICKLED)}, but does not."
                )
        except UnreadableError as error:
            if alone or self.index is not None:
                raise
            what = str(error).removeprefix(f"{path} ")
            if isinstance(error, PickledCodeError):  # such as training_args.bin, beside the weights
                self.others[name] = Skipped(Reason.program, what)
            else:
                self.damaged[name] = what

    def _check_index(self) -> None:
        assert self.index is not None
        for name, shard in self.index.items():
            file, _ = self.where.get(name, (None, None))
            if file is None or file.path.name != shard:
                raise UnreadableError(
                    f"{self.path} says that {name} is in {shard}, where it is not. "
                    "The shards belong to another checkpoint, or one is incomplete."
                )

    @property
    def parameters(self) -> int:
        """How many entries all parameters have together."""
        return sum(math.prod(entry.shape) for _, entry in self.where.values() if entry.parameter)

    def matrices(self) -> Iterator[Matrices]:
        """The tensors that hold matrices, one after the other."""
        for name, (file, entry) in self.where.items():
            if entry.skipped is None:
                views = views_by_name(name, len(entry.shape))
                yield Matrices(name, (name,), views, partial(file.read, entry.name))

    def skipped(self) -> dict[str, Skipped]:
        """All others, and why."""
        entries = {name: entry.skipped for name, (_, entry) in self.where.items()}
        return {name: why for name, why in entries.items() if why is not None} | self.others

    def copy_with(self, change: Callable[[str], Tensor | None], target: Path) -> None:
        """Writes a copy of all files in which the tensors that `change` returns have new values.

        A single file becomes a file, a directory or a sharded checkpoint a directory with all that
        belongs to it. Asks for one tensor after the other, in the order of the files.
        """

        def replaced(file: TensorFile) -> Iterator[tuple[str, Tensor]]:
            for name, (owner, entry) in self.where.items():
                if owner is not file or entry.skipped is not None:
                    continue
                if (new := change(name)) is not None:
                    yield entry.name, new

        if self.path.is_file() and self.index is None:
            (file,) = self.files.values()
            file.copy_with(replaced(file), target)
            return
        target.mkdir()
        others = [self.path] if self.path.is_file() else sorted(self.directory.iterdir())
        for path in others:
            if path.name not in self.files:
                copy = shutil.copytree if path.is_dir() else shutil.copyfile
                copy(path, target / path.name)
        for name, file in self.files.items():
            file.copy_with(replaced(file), target / name)


@contextlib.contextmanager
def new_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside the target, renamed to it when all went well, else removed."""
    target = Path(target).absolute()
    refuse_existing(target)
    near = next(parent for parent in target.parents if parent.exists())
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=near) as scratch:
        path = Path(scratch) / target.name
        yield path
        refuse_existing(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


def check_output(source: Path, target: Path) -> None:
    """Raises unless a copy of the source can be written to the target."""
    refuse_existing(target)
    for parent in target.parents:
        if parent.exists() and not parent.is_dir():
            raise NotADirectoryError(
                f"`path_out` must lie in a directory, but {parent} is a file. Choose another path."
            )
    resolved = target.resolve()
    # Copying follows links, and so they may lead to where the copy is written.
    seen: set[Path] = set()
    for folder, below, _ in os.walk(source, followlinks=True):
        real = Path(folder).resolve()
        if resolved.is_relative_to(real):
            raise ValueError(
                f"`path_out` must lie outside of the directory that is copied, but {target} lies "
                f"in {folder}. Choose a path beside {source}."
            )
        if real in seen:
            below.clear()
        seen.add(real)


def refuse_existing(target: Path) -> None:
    """Raises if there is something where the output should go."""
    if target.exists() or target.is_symlink():
        raise FileExistsError(
            f"{target} exists already and is not overwritten. Choose another name, or remove it."
        )
