"""A state dict in memory, read like a file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from wellcond.files.inert import ForeignTensor, StoredTensor
from wellcond.files.pieces import pieces_of
from wellcond.files.stored import describe_tensors, mark_shared
from wellcond.files.tensors import Rows, TensorFile, Write

# A path that is neither a file nor a directory, next to which there are no files of a checkpoint.
NOWHERE = Path(os.devnull)


class Memory(TensorFile):
    """Tensors by their names, without a file."""

    endings = ()

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.path = NOWHERE
        self._tensors = tensors
        self.others, self.metadata, self.classes = {}, {}, {}
        stored = {name: _describe(tensor) for name, tensor in tensors.items()}
        self.entries = describe_tensors(stored)
        self.overlapping = mark_shared(self.entries, stored)

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        tensor = self._tensors[name].detach()
        return _copy(tensor if rows is None else tensor[slice(*rows)])

    def first_row(self, name: str) -> Tensor:
        tensor = self._tensors[name].detach()
        return _copy(tensor[(0,) * (tensor.ndim - 1)])

    def pieces(self, name: str) -> Iterator[Tensor]:
        tensor = self._tensors[name]
        return pieces_of(tensor.detach()) if _is_plain(tensor) else iter(())

    def copy(self, target: Path) -> contextlib.AbstractContextManager[Write]:
        raise TypeError("a state dict in memory has no file that could be copied")


def _copy(tensor: Tensor) -> Tensor:
    """Copies a tensor to the CPU: callers may change in place what a reader returns."""
    return tensor.to("cpu", copy=True).resolve_neg()


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer)


def _describe(tensor: Tensor) -> StoredTensor | ForeignTensor:
    """Describes the tensor like one in a pickle."""
    if not _is_plain(tensor):
        kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
        if is_lazy(tensor):
            return ForeignTensor(kind, dtype=tensor.dtype)
        return ForeignTensor(kind, shape=tuple(tensor.shape), dtype=tensor.dtype)
    if tensor.is_nested:
        return ForeignTensor("nested", dtype=tensor.dtype)
    shape = tuple(tensor.shape)
    if tensor.is_meta:
        return ForeignTensor("meta", shape=shape, dtype=tensor.dtype)
    if tensor.layout != torch.strided:
        kind = str(tensor.layout).removeprefix("torch.")
        values = _stored(_values_of(tensor.detach())) if kind.startswith("sparse") else None
        return ForeignTensor(kind, shape=shape, dtype=tensor.dtype, values=values)
    return _stored(tensor)


def _values_of(tensor: Tensor) -> Tensor:
    return tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()


def _stored(tensor: Tensor) -> StoredTensor:
    # The key is the address, not the storage: overlapping NumPy arrays have several storages.
    return StoredTensor(
        str(tensor.device),
        tensor.dtype,
        tensor.data_ptr(),
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.is_conj(),
        tensor.is_neg(),
    )
