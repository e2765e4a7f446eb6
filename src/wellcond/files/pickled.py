"""A file of torch.save: mapped, with weights only; nothing that could run code is unpickled.

Where torch refuses it for the classes of other objects, it is read without these; see `foreign`.

It is opened anew now and then, because pages that were read once stay resident.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pickle
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wellcond.files.archive import can_be_mapped, check_pickle, refresh_checksums
from wellcond.files.foreign import ARRAY, Foreign, ForeignTensor, Inert, load_inert
from wellcond.files.formats import DCP, ZERO
from wellcond.files.nested import LIGHTNING_VERSION, tensors_in
from wellcond.files.overlaps import repeats, shared_memory, span
from wellcond.files.pieces import pieces_of
from wellcond.files.slices import local_shard
from wellcond.files.tensors import (
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
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_PIPE = 64 << 10  # what a pipe takes at a time, by default


class Pickled(TensorFile):
    """One file of torch.save."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped = can_be_mapped(path)
        self._open()
        if not self._tensors and all(w.reason is Reason.objects for w in self.others.values()):
            raise NoTensorsError(
                f"{path} must hold a dict of tensors, but holds {self._no_tensor()}"
            )
        self.entries = {name: _entry(name, tensor) for name, tensor in self._tensors.items()}
        self._check_placeholders()
        matrices = {
            name: tensor
            for name, tensor in self._tensors.items()
            if isinstance(tensor, Tensor) and self.entries[name].skipped is None
        }
        # Embeddings first: what is tied to one is the same as it, not the other way round.
        looked_up = no_weights({n: (e.shape, e.dtype) for n, e in self.entries.items()})
        names = sorted(matrices, key=lambda name: name not in looked_up)
        shared, self.overlapping = shared_memory({name: matrices[name] for name in names})
        for name, skipped in shared.items():
            self.entries[name] = replace(self.entries[name], parameter=False, skipped=skipped)

    def _no_tensor(self) -> str:
        """What the file holds instead, and the way out."""
        content = self._content
        if isinstance(content, Mapping) and LIGHTNING_VERSION in content:
            return (
                "the state of a trainer of Lightning and no tensor. Beside meta.pt of a sharded "
                f"checkpoint lie its weights. {DCP}."
            )
        kind = content.kind if isinstance(content, Foreign) else type(content).__name__
        article = "an" if kind[0].lower() in "aeiou" else "a"
        besides = "".join(
            f"; beside it are Python objects that are not read: {why.detail}"
            for why in self.others.values()
            if kind == "dict"
        )
        found = "None" if content is None else f"{article} {kind}"
        way_out = "Save a state dict: torch.save(model.state_dict(), path)."
        return f"{found} and no tensor{besides}. {way_out}"

    def _check_placeholders(self) -> None:
        """Raises if the parameters are empty, as DeepSpeed's ZeRO-3 saves them elsewhere."""
        groups = self._content.get("param_shapes") if isinstance(self._content, Mapping) else None
        if not isinstance(groups, list) or not all(isinstance(one, Mapping) for one in groups):
            return
        names = [f"module.{name}" for group in groups for name in group if isinstance(name, str)]
        shapes = [self.entries[name].shape for name in names if name in self.entries]
        if shapes and all(0 in shape for shape in shapes):
            raise UnreadableError(
                f"{self.path} must hold weights, but holds empty tensors in place of them: with "
                f"DeepSpeed's ZeRO-3 the values lie in the files *_optim_states.pt. {ZERO}."
            )

    def _open(self) -> None:
        self._content: Any = None
        self._tensors: dict[str, Tensor | ForeignTensor] = {}
        self._read = 0
        loaded = _load(self.path, self._mapped)
        self._address = loaded.address if isinstance(loaded, Inert) else None
        self._content = loaded.content if isinstance(loaded, Inert) else loaded
        self._tensors, self.others = tensors_in(self._content, self.path)

    def read(self, name: str) -> Tensor:
        if self._mapped and self._read > _RESIDENT:
            self._open()
        tensor = self._same(name, self._tensors).detach()
        self._read += tensor.nbytes
        return self._copied(name, tensor) if self._mapped else tensor

    def first_row(self, name: str) -> Tensor:
        tensor = self._same(name, self._tensors).detach()
        row = tensor[(0,) * (tensor.ndim - 1)]
        return self._copied(name, row) if self._mapped else row

    def pieces(self, name: str) -> Iterator[Tensor]:
        if not self._mapped:
            yield from self._pieces(name)
            return
        for number in count():
            if self._read > _RESIDENT:
                self._open()
            piece = next(islice(self._pieces(name), number, None), None)
            if piece is None:
                return
            self._read += piece.nbytes
            yield self._copied(name, piece)

    def _pieces(self, name: str) -> Iterator[Tensor]:
        tensor = self._tensors.get(name)
        if isinstance(tensor, ForeignTensor):
            return pieces_of(tensor.values) if tensor.values is not None else iter(())
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_nested):
            return iter(())
        return pieces_of(self._same(name, self._tensors).detach())

    def _same(self, name: str, tensors: Mapping[str, Tensor | ForeignTensor]) -> Tensor:
        """The tensor; raises if the file was replaced by another since it was opened first."""
        entry, tensor = self.entries[name], tensors.get(name)
        now = _entry(name, tensor) if isinstance(tensor, Tensor) else None
        if now is None or (now.shape, now.dtype) != (entry.shape, entry.dtype):
            raise UnreadableError(f"{self.path} has changed while it was read.")
        assert isinstance(tensor, Tensor)
        return tensor

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        """A copy of mapped memory, made by the system.

        Where the file was cut off meanwhile the system says so; to read it here ends the process.
        """
        if not tensor.numel() or sys.platform == "win32":  # which lets nobody cut off a mapped file
            return tensor.clone()
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
        if self._address is not None:
            self._overwrite(replaced, target)
            return
        # Mapped privately: what is written here stays in memory.
        content = _load(self.path, self._mapped)
        size = self.path.stat().st_size
        tensors, _ = tensors_in(content, self.path)
        with torch.no_grad():
            for name, tensor in replaced:
                self._same(name, tensors).copy_(tensor)
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

    def _overwrite(self, replaced: Iterable[tuple[str, Tensor]], target: Path) -> None:
        """Copies the file and overwrites entries in it: to save it takes the foreign classes."""
        if not self._mapped:
            raise UnreadableError(
                f"{self.path} cannot be written again without the classes of its objects, as it is "
                "compressed or in the format of torch before 1.6. Load it where they are, and save "
                "the weights alone: torch.save(model.state_dict(), path)."
            )
        shutil.copyfile(self.path, target)
        changed = []
        with target.open("r+b") as file:
            for name, tensor in replaced:
                old = self._same(name, self._tensors)
                assert self._address is not None
                start = old.data_ptr() - self._address
                buffer = memory_for(span(old), name, self.path)
                file.seek(start)
                if file.readinto(buffer) < len(buffer):
                    raise UnreadableError(f"{self.path} has become shorter while it was read.")
                flat = torch.frombuffer(buffer, dtype=old.dtype)
                stored = flat.as_strided(old.shape, old.stride())
                stored = stored.conj() if old.is_conj() else stored
                (torch._neg_view(stored) if old.is_neg() else stored).copy_(tensor)
                file.seek(start)
                file.write(buffer)
                changed.append(start)
        refresh_checksums(target, changed)


def _of_class(kind: str) -> Skipped:
    """Why a tensor of a class by this name, which is none of torch's own, is not measured."""
    module, _, name = kind.rpartition(".")
    if module.split(".")[0] == "torchao":
        return Skipped(Reason.torchao, name)
    if name in ("DTensor", "ShardedTensor"):
        return local_shard(name)
    return Skipped(Reason.tensor_class, kind)


def _foreign_entry(name: str, tensor: ForeignTensor) -> Entry:
    dtype = str(tensor.dtype or "").removeprefix("torch.")
    if tensor.kind == "meta":
        floating = tensor.dtype is not None and tensor.dtype.is_floating_point
        return Entry(name, tensor.shape, dtype, floating, Skipped(Reason.no_values))
    if tensor.kind == ARRAY:
        return Entry(name, tensor.shape, dtype, True, Skipped(Reason.array))
    if "." not in tensor.kind:
        values = tensor.values  # of a sparse tensor
        floating = values is not None and (values.is_floating_point() or values.is_complex())
        return Entry(name, tensor.shape, dtype, floating, Skipped(Reason.not_dense, tensor.kind))
    return Entry(name, tensor.shape, dtype, True, _of_class(tensor.kind))


def _entry(name: str, tensor: Tensor | ForeignTensor) -> Entry:
    if isinstance(tensor, ForeignTensor):
        return _foreign_entry(name, tensor)
    if tensor.is_nested:  # it has no shape
        kind = str(tensor.dtype).removeprefix("torch.")
        return Entry(name, (), kind, False, Skipped(Reason.not_dense, "nested"))
    if type(tensor) not in _PLAIN:
        kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
        return _foreign_entry(name, ForeignTensor(kind, shape=(*tensor.shape,), dtype=tensor.dtype))
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    parameter = tensor.is_floating_point() or tensor.is_complex()
    skipped = why_no_weight(shape, dtype)
    if tensor.is_meta:
        skipped = Skipped(Reason.no_values)
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
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            except pickle.UnpicklingError:
                return load_inert(path, mapped)
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
