"""A file of torch.save: mapped, with weights only; nothing that could run code is unpickled.

It is opened anew now and then, because pages that were read once stay resident.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import re
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wellcond.checkpoints.archive import can_be_mapped, check_pickle
from wellcond.checkpoints.nested import tensors_in
from wellcond.checkpoints.overlaps import repeats, shared_memory, span
from wellcond.checkpoints.slices import LOCAL_SHARD
from wellcond.checkpoints.tensors import (
    Entry,
    NoTensorsError,
    PickledCodeError,
    TensorFile,
    UnreadableError,
    memory_for,
    why_no_weight,
)
from wellcond.text import out_of_memory
from wellcond.weights.names import no_weights
from wellcond.weights.reasons import Reason, Skipped

# Mapped bytes that may be read before the file is opened anew.
_RESIDENT = 64 << 20
_PIPE = 64 << 10  # what a pipe takes at a time, by default


class Pickled(TensorFile):
    """One file of torch.save."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped = can_be_mapped(path)
        self._open()
        if not (self._tensors or self.others):
            raise NoTensorsError(
                f"{path} must hold a dict of tensors, but holds a {type(self._content).__name__} "
                "without any. Save a state dict: torch.save(model.state_dict(), path)."
            )
        self.entries = {name: _entry(name, tensor) for name, tensor in self._tensors.items()}
        matrices = {n: t for n, t in self._tensors.items() if self.entries[n].skipped is None}
        # Embeddings first: what is tied to one is the same as it, not the other way round.
        looked_up = no_weights({n: (e.shape, e.dtype) for n, e in self.entries.items()})
        names = sorted(matrices, key=lambda name: name not in looked_up)
        shared, self.overlapping = shared_memory({name: matrices[name] for name in names})
        for name, skipped in shared.items():
            self.entries[name] = replace(self.entries[name], parameter=False, skipped=skipped)

    def _open(self) -> None:
        self._content: Any = None
        self._tensors: dict[str, Tensor] = {}
        self._read = 0
        self._content = _load(self.path, self._mapped)
        self._tensors, self.others = tensors_in(self._content, self.path)

    def read(self, name: str) -> Tensor:
        if self._mapped and self._read > _RESIDENT:
            self._open()
        self._check_same(name, self._tensors)
        tensor = self._tensors[name].detach()
        self._read += tensor.nbytes
        return self._copied(name, tensor) if self._mapped else tensor

    def first_row(self, name: str) -> Tensor:
        tensor = self._tensors[name].detach()
        row = tensor[(0,) * (tensor.ndim - 1)]
        return self._copied(name, row) if self._mapped else row

    def _check_same(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Raises if the file was replaced by another since it was opened first."""
        entry = self.entries[name]
        now = _entry(name, tensors[name]) if name in tensors else None
        if now is None or (now.shape, now.dtype) != (entry.shape, entry.dtype):
            raise UnreadableError(f"{self.path} has changed while it was read.")

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of mapped memory, made by the system.

        Where the file was cut off meanwhile the system says so; to read it here ends the process.
        """
        size = span(tensor)
        source = memoryview((ctypes.c_char * size).from_address(tensor.data_ptr()))
        buffer = memory_for(size, name, self.path)
        read_end, write_end = os.pipe()
        try:
            os.set_blocking(write_end, False)  # it takes what fits
            start = 0
            while start < size:
                count = os.write(write_end, source[start : start + _PIPE])
                buffer[start : start + count] = os.read(read_end, count)
                start += count
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            raise UnreadableError(f"{self.path} has become shorter while it was read.") from None
        finally:
            os.close(read_end)
            os.close(write_end)
        flat = torch.frombuffer(buffer, dtype=tensor.dtype)
        copied = flat.as_strided(tensor.shape, tensor.stride())
        copied = copied.conj() if tensor.is_conj() else copied
        return copied.neg() if tensor.is_neg() else copied

    def copy_with(self, replaced: Iterable[tuple[str, Tensor]], target: Path) -> None:
        # Mapped privately: what is written here stays in memory.
        content = _load(self.path, self._mapped)
        size = self.path.stat().st_size
        tensors, _ = tensors_in(content, self.path)
        with torch.no_grad():
            for name, tensor in replaced:
                self._check_same(name, tensors)
                tensors[name].copy_(tensor)
        if self.path.stat().st_size < size:
            raise UnreadableError(f"{self.path} has become shorter while it was read.")
        try:
            torch.save(content, target)
            _load(target, True)  # a damaged pickle may hold what can be written and not be read
        except (OSError, MemoryError):
            raise
        except RuntimeError as error:
            if out_of_memory(error):
                raise MemoryError(f"There is not enough memory to save {self.path}.") from None
            # torch hides why it could not write behind words about its archive.
            raise OSError(errno.ENOSPC, "torch.save failed, is the disk full?") from None
        except Exception:  # of attributes, say, that a damaged pickle gave to a tensor
            raise UnreadableError(
                f"{self.path} must hold what can be saved again, but does not. "
                "It may be damaged: compare its size with the original's."
            ) from None


def _entry(name: str, tensor: Tensor) -> Entry:
    if hasattr(tensor, "_local_tensor"):  # a DTensor, the shape of which is that of the whole
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Entry(name, tuple(tensor.shape), dtype, True, LOCAL_SHARD)
    if tensor.is_nested:  # it has no shape
        kind = str(tensor.dtype).removeprefix("torch.")
        return Entry(name, (), kind, False, Skipped(Reason.not_dense, "nested"))
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    parameter = tensor.is_floating_point() or tensor.is_complex()
    skipped = why_no_weight(shape, dtype)
    if tensor.is_meta:
        skipped, parameter = Skipped(Reason.no_values), False
    elif tensor.layout != torch.strided:
        skipped = Skipped(Reason.not_dense, str(tensor.layout).removeprefix("torch."))
    elif repeats(tensor):
        skipped, parameter = Skipped(Reason.not_dense, "its entries share memory"), False
    return Entry(name, shape, dtype, parameter, skipped)


def _load(path: Path, mapped: bool) -> Any:
    try:
        with warnings.catch_warnings():
            # Of a TorchScript archive, which is refused below, and of the storages' own classes.
            warnings.simplefilter("ignore")
            check_pickle(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (FileNotFoundError, PermissionError, IsADirectoryError, UnreadableError):
        raise
    except Exception as error:  # a damaged pickle can raise whatever there is
        if out_of_memory(error) and mapped:
            raise UnreadableError(f"{path} cannot be read: there is not enough memory.") from None
        if out_of_memory(error):
            raise UnreadableError(
                f"{path} takes more memory than there is, as it is compressed or in the format of "
                "torch before 1.6, and cannot be mapped. Load it elsewhere and save it again."
            ) from None
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and code is not None:
            raise PickledCodeError(
                f"{path} must hold tensors alone, but holds a {code[1]}, and loading it could run "
                "any code. Save the weights alone: torch.save(model.state_dict(), path)."
            ) from None
        if "DTensor" in str(error):
            raise UnreadableError(
                f"{path} must hold whole tensors, but holds DTensors, of which it has the shard of "
                "one process. Save tensor.full_tensor() of each."
            ) from None
        if "TorchScript" in str(error):
            raise PickledCodeError(
                f"{path} must hold tensors alone, but is a TorchScript archive, a program. "
                "Save its weights: torch.save(torch.jit.load(path).state_dict(), other)."
            ) from None
        if isinstance(error, RuntimeError | EOFError | OSError | ValueError | KeyError):
            (what, *_) = str(error).split(".")[0].splitlines() or [""]
            if not path.stat().st_size:
                what = "it is empty"
            elif not what or isinstance(error, KeyError):  # an instruction that no pickle has
                what = "it holds no pickle"
            raise UnreadableError(
                f"{path} must be a whole file of torch.save, but: {what}. "
                "It may be truncated or damaged: compare its size with the original's."
            ) from None
        raise UnreadableError(
            f"{path} must be a file of torch.save, but cannot be unpickled. "
            "It may be damaged, or something else altogether."
        ) from None
