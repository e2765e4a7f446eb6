"""Weights in files: read one tensor at a time, write a copy in which some are replaced.

A safetensors file is read by offset, so that only one tensor is ever in memory. A file of
torch.save is mapped, with weights only, and opened anew now and then, because pages that were read
once stay resident. Nothing that could run code is ever unpickled.

A file has no classes, so its shapes decide what is a matrix: two dimensions as stored; three a
stack of matrices, or a kernel if "conv" is in the name; four and more a kernel.
"""

from __future__ import annotations

import abc
import contextlib
import json
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

from wellcond.weights.discover import NOT_A_MATRIX, Matrices, kernel, stack

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
INDEX = ".index.json"
# Mapped bytes that may be read before the file is opened anew.
_RESIDENT = 64 << 20
_FLOATS = {"F64": torch.float64, "F32": torch.float32}
_FLOATS |= {"F16": torch.float16, "BF16": torch.bfloat16}


class UnreadableError(ValueError):
    """A file that gives no answer: its path, what is wrong with it, and the way out."""


class PickledCodeError(UnreadableError):
    """A file that is sound but holds more than tensors."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file; `dtype` as the file calls it, `reason` why it holds no weights."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    reason: str = ""


class TensorFile(abc.ABC):
    """One file of tensors."""

    path: Path
    entries: dict[str, Entry]
    others: dict[str, str]  # what is in it besides, and why it is not measured

    @abc.abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor, to be used and let go before the next is read."""

    @abc.abstractmethod
    def copy_with(self, replaced: Iterable[tuple[str, Tensor]], target: Path) -> None:
        """Writes a copy in which these tensors have other values; all else stays as it is."""


def _reason(name: str, shape: tuple[int, ...], dtype: str, floating: bool) -> str:
    if len(shape) < 2:
        return f"{NOT_A_MATRIX}: {('a number', 'a vector')[len(shape)]}"
    if 0 in shape:
        return f"{NOT_A_MATRIX}: empty, shape {shape}"
    if re.match(r"(F|float)[864](_|$)", dtype):
        return f"quantised: {dtype}, whose scales are stored elsewhere"
    if not floating:
        return f"not real floating point: {dtype}, packed or quantised perhaps, or no weight"
    return ""


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
            shape, dtype = tuple(header[name]["shape"]), header[name]["dtype"]
            reason = _reason(name, shape, dtype, dtype in _FLOATS)
            written = str(_FLOATS.get(dtype, dtype)).removeprefix("torch.")
            self.entries[name] = Entry(name, shape, written, reason)

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
            reason = _reason(name, shape, dtype, tensor.is_floating_point())
            if tensor.layout != torch.strided:
                reason = f"not a dense tensor: {tensor.layout}".replace("torch.", "")
            elif tensor.numel() and not reason:
                where = (tensor.data_ptr(), shape, tensor.stride(), dtype)
                if first.setdefault(where, name) != name:
                    reason = f"the same tensor as {first[where]}"
            self.entries[name] = Entry(name, shape, dtype, reason)

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


def _tensors(content: Any, prefix: str, others: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested dicts and lists, names joined by dots."""
    if isinstance(content, Tensor):
        yield prefix or "tensor", content
    elif isinstance(content, Mapping) and {"state", "param_groups"} <= set(content):
        others[prefix or "everything"] = "the state of an optimizer"
    elif isinstance(content, Mapping | list | tuple):
        items = content.items() if isinstance(content, Mapping) else enumerate(content)
        for key, value in items:
            yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key), others)


def _views(name: str, dimensions: int) -> Callable[[Tensor], dict[str, Tensor]]:
    if dimensions == 2:
        return lambda tensor: {"": tensor}
    if dimensions == 3 and "conv" not in name.lower():
        return stack
    return lambda tensor: {"kernel": kernel(tensor)}


class Checkpoint:
    """The tensors of a file, of a sharded file, or of all files of a directory.

    Of several files that no index unites, names begin with that of their file: `step1.pt/0.weight`;
    those that are damaged are in `damaged`, with the reason.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path} must be a file or a directory, but is not there.")
        self.others: dict[str, str] = {}
        self.damaged: dict[str, str] = {}
        self.files: dict[str, TensorFile] = {}  # by their name within the checkpoint
        names = self._find()
        for name in names:
            self._open(name, alone=len(names) == 1)
        holding = [f for f in self.files.values() if any(not e.reason for e in f.entries.values())]
        self.where: dict[str, tuple[TensorFile, Entry]] = {}
        for file_name, file in self.files.items():
            united = self.index is not None or len(self.files) == 1 or holding == [file]
            prefix = "" if united else f"{file_name}/"
            for name, entry in file.entries.items():
                self.where[prefix + name] = file, entry
            self.others |= {prefix + name: reason for name, reason in file.others.items()}
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
            # Sound ones with code are such as training_args.bin, beside the weights.
            beside = self.others if isinstance(error, PickledCodeError) else self.damaged
            beside[name] = str(error).removeprefix(f"{path} ")

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
        """How many numbers all tensors have together that could be weights."""
        return sum(
            torch.Size(entry.shape).numel()
            for _, entry in self.where.values()
            if not (entry.reason.startswith("the same tensor") or "int" in entry.dtype.lower())
        )

    def matrices(self) -> Iterator[Matrices]:
        """The tensors that hold matrices, one after the other."""
        for name, (file, entry) in self.where.items():
            if not entry.reason:
                views = _views(name, len(entry.shape))
                yield Matrices(name, (name,), views, partial(file.read, entry.name))

    def skipped(self) -> dict[str, str]:
        """All others, and why."""
        reasons = {name: entry.reason for name, (_, entry) in self.where.items() if entry.reason}
        return reasons | self.others

    def copy_with(self, change: Callable[[str], Tensor | None], target: Path) -> None:
        """Writes a copy of all files in which the tensors that `change` returns have new values.

        A single file becomes a file, a directory or a sharded checkpoint a directory with all that
        belongs to it. Asks for one tensor after the other, in the order of the files.
        """

        def replaced(file: TensorFile) -> Iterator[tuple[str, Tensor]]:
            for name, (owner, entry) in self.where.items():
                if owner is file and not entry.reason and (new := change(name)) is not None:
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
    target = Path(target)
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        path = Path(scratch) / target.name
        yield path
        refuse_existing(target)
        path.rename(target)


def refuse_existing(target: Path) -> None:
    """Raises if there is something where the output should go."""
    if target.exists() or target.is_symlink():
        raise FileExistsError(
            f"{target} exists already and is not overwritten. Choose another name, or remove it."
        )
