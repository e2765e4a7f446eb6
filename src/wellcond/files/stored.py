"""Tensors in storages of a file: describes them, finds shared memory, and reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from wellcond.files.archive import Region, errors_as_damage, read_compressed
from wellcond.files.inert import ARRAY, ForeignTensor, StoredTensor
from wellcond.files.overlaps import repeats, shared_memory
from wellcond.files.pieces import pieces_of
from wellcond.files.slices import local_shard
from wellcond.files.tensors import Entry, Rows, TensorFile, explain_non_weight
from wellcond.weights.names import find_non_weights
from wellcond.weights.reasons import Reason, Skipped

# A tensor with its place in a storage, or a tensor with known shape and dtype only.
Described = StoredTensor | ForeignTensor


class StoredFile(TensorFile):
    """A file whose tensors are views of storages.

    A subclass sets `_tensors`, `_storages` and `_swapped`, whether the byte order of the numbers
    differs from that of this machine.
    """

    _tensors: dict[str, Described]
    _storages: dict[str, Region]
    _swapped: bool

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._unpacked: tuple[str, bytes] = "", b""  # the compressed storage that was read last

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        tensor = self._tensors[name]
        assert isinstance(tensor, StoredTensor)
        if rows is not None:
            start = tensor.start + rows[0] * tensor.stride[0] * tensor.dtype.itemsize
            shape = (rows[1] - rows[0], *tensor.shape[1:])
            tensor = replace(tensor, start=start, shape=shape)
        return self._read_stored(tensor, name)

    def first_row(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        assert isinstance(tensor, StoredTensor)
        row = replace(tensor, shape=tensor.shape[-1:], stride=tensor.stride[-1:])
        return self._read_stored(row, name)

    def pieces(self, name: str) -> Iterator[Tensor]:
        tensor = self._tensors[name]
        stored = tensor.values if isinstance(tensor, ForeignTensor) else tensor
        if stored is None or not stored.floating:
            return
        region = self._storages[stored.key]
        as_written = not (region.compressed or self._swapped or stored.conj or stored.neg)
        if stored.is_contiguous and as_written:
            start, dtype = region.start + stored.start, stored.dtype
            for piece in self._read_pieces(start, stored.span, dtype, name):
                yield from pieces_of(piece)
        else:
            yield from pieces_of(self._read_stored(stored, name))

    def _read_stored(self, tensor: StoredTensor, name: str) -> Tensor:
        if not tensor.span:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        flat = self._flat(self._bytes_of(tensor, name), tensor.dtype)
        return view_of(flat, tensor).resolve_neg()

    def _flat(self, buffer: bytearray, dtype: torch.dtype) -> Tensor:
        """Returns the entries in these bytes, after swapping them to the order of this machine."""
        flat = torch.frombuffer(buffer, dtype=dtype)
        if self._swapped:
            flat.untyped_storage().byteswap(dtype)  # type: ignore[no-untyped-call]
        return flat

    def _bytes_of(self, tensor: StoredTensor, name: str) -> bytearray:
        region = self._storages[tensor.key]
        if not region.compressed:
            return self._read_bytes(region.start + tensor.start, tensor.span, name)
        self._open().close()
        if self._unpacked[0] != tensor.key:
            with errors_as_damage(self.path, "zip archive"):
                self._unpacked = tensor.key, read_compressed(self.path, region)
        return bytearray(self._unpacked[1][tensor.start : tensor.start + tensor.span])


def describe_tensors(tensors: Mapping[str, Described]) -> dict[str, Entry]:
    """Returns one entry per tensor."""
    return {name: _entry(name, tensor) for name, tensor in tensors.items()}


def leave_out(entry: Entry, role: str) -> Entry:
    """Skips a tensor that is not a parameter, such as a buffer; its exact name includes it."""
    return replace(entry, parameter=False, skipped=entry.skipped or Skipped(Reason.buffer, role))


def mark_shared(
    entries: dict[str, Entry], tensors: Mapping[str, Described]
) -> list[tuple[str, str]]:
    """Skips matrices that are another matrix or a part of one; returns pairs that overlap."""
    matrices = {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, StoredTensor) and entries[name].skipped is None
    }
    # Embeddings come first, so that a head is reported as tied to its embedding.
    looked_up = find_non_weights({n: (e.shape, e.dtype) for n, e in entries.items()})
    names = sorted(matrices, key=lambda name: name not in looked_up)
    shared, overlapping = shared_memory({name: matrices[name] for name in names})
    for name, skipped in shared.items():
        entries[name] = replace(entries[name], parameter=False, skipped=skipped)
    return overlapping


def view_of(flat: Tensor, tensor: StoredTensor) -> Tensor:
    """Returns the tensor as a view of its entries from the first to the last."""
    view = flat.as_strided(tensor.shape, tensor.stride)
    view = view.conj() if tensor.conj else view
    return torch._neg_view(view) if tensor.neg else view


def _of_class(kind: str) -> Skipped:
    """Returns why a tensor of this foreign class is not measured."""
    module, _, name = kind.rpartition(".")
    if module.split(".")[0] == "torchao":
        return Skipped(Reason.torchao, name)
    if name in ("DTensor", "ShardedTensor"):
        return local_shard(name)
    return Skipped(Reason.tensor_class, kind)


def _entry(name: str, tensor: Described) -> Entry:
    dtype = str(tensor.dtype or "").removeprefix("torch.")
    if isinstance(tensor, StoredTensor):
        skipped, parameter = explain_non_weight(tensor.shape, dtype), tensor.floating
        if repeats(tensor):
            skipped, parameter = Skipped(Reason.not_dense, "its entries share memory"), False
    elif tensor.kind == "meta":
        skipped = Skipped(Reason.no_values)
        parameter = tensor.dtype is not None and tensor.dtype.is_floating_point
    elif tensor.kind == ARRAY:
        skipped, parameter = Skipped(Reason.array), True
    elif "." not in tensor.kind:  # a layout
        skipped = Skipped(Reason.not_dense, tensor.kind)
        parameter = tensor.values is not None and tensor.values.floating
    else:
        skipped, parameter = _of_class(tensor.kind), True
    return Entry(name, tensor.shape, dtype, parameter, skipped)
