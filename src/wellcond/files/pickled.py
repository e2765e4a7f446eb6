"""A file of torch.save: its pickle is read by `inert`, its tensors by their place in the file."""

from __future__ import annotations

import contextlib
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wellcond.files.archive import (
    Extent,
    Region,
    copy_uncompressed,
    errors_as_damage,
    is_archive,
    load_saved,
    read_compressed,
    refresh_checksums,
)
from wellcond.files.formats import ZERO
from wellcond.files.inert import ARRAY, Foreign, ForeignTensor, StoredTensor
from wellcond.files.nested import LIGHTNING_VERSION, tensors_in
from wellcond.files.overlaps import repeats, shared_memory
from wellcond.files.pieces import pieces_of
from wellcond.files.slices import local_shard
from wellcond.files.tensors import (
    Entry,
    NoTensorsError,
    Rows,
    TensorFile,
    UnreadableError,
    Write,
    explain_non_weight,
)
from wellcond.weights.names import find_non_weights
from wellcond.weights.reasons import Reason, Skipped

_KIND = "file of torch.save"


class Pickled(TensorFile):
    """One file of torch.save."""

    endings = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar", ".pt.tar")

    def __init__(self, path: Path, extent: Extent | None = None) -> None:
        super().__init__(path)
        self._extent = extent or Extent.whole(path)
        self._unpacked: tuple[str, bytes] = "", b""  # of a compressed storage, the last one read
        content = self._load()
        if not self._tensors and all(w.reason is Reason.objects for w in self.others.values()):
            found = _without_tensor(content, self.others)
            raise NoTensorsError(f"{path} must hold a dict of tensors, but holds {found}")
        self.entries = describe_tensors(self._tensors)
        self._check_placeholders(content)
        self._leave_out_parts()
        self.overlapping = mark_shared(self.entries, self._tensors)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return zipfile.is_zipfile(path)

    def _load(self) -> Any:
        with errors_as_damage(self.path, _KIND):
            saved = load_saved(self._extent)
            self._storages, self._swapped = saved.storages, saved.swapped
            self._tensors, self.others, self.classes = tensors_in(saved.content, self.path)
        return saved.content

    def _check_placeholders(self, content: Any) -> None:
        """Raises if the parameters are empty, as DeepSpeed's ZeRO-3 saves them elsewhere."""
        groups = content.get("param_shapes") if isinstance(content, Mapping) else None
        if not isinstance(groups, list) or not all(isinstance(one, Mapping) for one in groups):
            return
        names = [f"module.{name}" for group in groups for name in group if isinstance(name, str)]
        shapes = [self.entries[name].shape for name in names if name in self.entries]
        if shapes and all(0 in shape for shape in shapes):
            raise UnreadableError(
                f"{self.path} must hold weights, but holds empty tensors in place of them: with "
                f"DeepSpeed's ZeRO-3 the values lie in the files *_optim_states.pt. {ZERO}."
            )

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
        return _view_of(flat, tensor).resolve_neg()

    def _flat(self, buffer: bytearray, dtype: torch.dtype) -> Tensor:
        """The entries in these bytes, which are brought into the order of this machine first."""
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
            with errors_as_damage(self.path, _KIND):
                self._unpacked = tensor.key, read_compressed(self.path, region)
        return bytearray(self._unpacked[1][tensor.start : tensor.start + tensor.span])

    @contextlib.contextmanager
    def copy(self, target: Path) -> Iterator[Write]:
        with errors_as_damage(self.path, _KIND):
            storages = copy_uncompressed(self.path, target, self._storages)
        changed = set()

        def write(name: str, new: Tensor) -> None:
            changed.add(self._overwrite(target, name, new, storages))

        yield write
        if is_archive(whole := Extent.whole(target)):
            refresh_checksums(whole, changed)
        shutil.copymode(self.path, target)
        self._open().close()

    def _overwrite(
        self, target: Path, name: str, new: Tensor, storages: Mapping[str, Region]
    ) -> str:
        """Gives a tensor new values in a copy that has these storages; returns the one it changes.

        The check sums stay as they are.
        """
        tensor = self._tensors[name]
        assert isinstance(tensor, StoredTensor)
        start = storages[tensor.key].start + tensor.start
        buffer = self._memory_for(tensor.span, name)
        with target.open("r+b") as file:
            file.seek(start)
            file.readinto(buffer)  # between its entries may lie those of another
            flat = self._flat(buffer, tensor.dtype)
            _view_of(flat, tensor).copy_(new)
            self._flat(buffer, tensor.dtype)  # in the order of bytes that it had
            file.seek(start)
            file.write(buffer)
        return tensor.key


def describe_tensors(tensors: Mapping[str, StoredTensor | ForeignTensor]) -> dict[str, Entry]:
    """An entry per tensor."""
    return {name: _entry(name, tensor) for name, tensor in tensors.items()}


def mark_shared(
    entries: dict[str, Entry], tensors: Mapping[str, StoredTensor | ForeignTensor]
) -> list[tuple[str, str]]:
    """Leaves out the matrices that are another one or a part of it; returns pairs that overlap."""
    matrices = {
        name: tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, StoredTensor) and entries[name].skipped is None
    }
    # Embeddings first: what is tied to one is the same as it, not the other way round.
    looked_up = find_non_weights({n: (e.shape, e.dtype) for n, e in entries.items()})
    names = sorted(matrices, key=lambda name: name not in looked_up)
    shared, overlapping = shared_memory({name: matrices[name] for name in names})
    for name, skipped in shared.items():
        entries[name] = replace(entries[name], parameter=False, skipped=skipped)
    return overlapping


def _view_of(flat: Tensor, tensor: StoredTensor) -> Tensor:
    view = flat.as_strided(tensor.shape, tensor.stride)
    view = view.conj() if tensor.conj else view
    return torch._neg_view(view) if tensor.neg else view


def _without_tensor(content: Any, others: Mapping[str, Skipped]) -> str:
    """What a file holds that has no tensor, and the way out."""
    if isinstance(content, Mapping) and LIGHTNING_VERSION in content:
        return (
            "the state of a trainer of Lightning and no tensor. The weights of a sharded "
            "checkpoint lie beside meta.pt: give its folder."
        )
    kind = content.kind if isinstance(content, Foreign) else type(content).__name__
    article = "an" if kind[0].lower() in "aeiou" else "a"
    besides = "".join(
        f"; beside it are Python objects that are not read: {why.detail}"
        for why in others.values()
        if kind == "dict"
    )
    found = "None" if content is None else f"{article} {kind}"
    way_out = "Save a state dict: torch.save(model.state_dict(), path)."
    return f"{found} and no tensor{besides}. {way_out}"


def _of_class(kind: str) -> Skipped:
    """Why a tensor of a class by this name, which is not one of torch's, is not measured."""
    module, _, name = kind.rpartition(".")
    if module.split(".")[0] == "torchao":
        return Skipped(Reason.torchao, name)
    if name in ("DTensor", "ShardedTensor"):
        return local_shard(name)
    return Skipped(Reason.tensor_class, kind)


def _entry(name: str, tensor: StoredTensor | ForeignTensor) -> Entry:
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
