"""A safetensors file: read by offset, so that only one tensor is ever in memory."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wellcond.files.slices import saved_offsets, slice_at
from wellcond.files.tensors import (
    Entry,
    TensorFile,
    UnreadableError,
    memory_for,
    why_no_weight,
)

# What safetensors calls the dtypes of torch.
_INTEGERS = {"BOOL": "bool", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64"}
_INTEGERS |= {"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}
# The format allows 100 MB, and some 20 times that is what Python makes of it. A third of a million
# tensors fit into this.
_HEADER = 32 << 20
_END = 1 << 63
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FLOATS |= {"C64": "complex64"}
# What is not measured, but may hold NaN; of torch before 2.7 not all.
_OTHER_FLOATS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_OTHER_FLOATS |= {"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"}
_OTHER_FLOATS |= {"F8_E8M0": "float8_e8m0fnu"}
_PIECE = 16 << 20  # bytes


class _DamagedError(ValueError):
    """What is wrong with a header."""


def _check(header: Any, stored: int) -> None:
    """Raises unless the header describes each of the bytes that are stored, and each once.

    The library that writes such files checks the same, but maps them for it in a way that asks for
    as much memory as they are long.
    """
    if not isinstance(header, dict):
        raise _DamagedError("its header is no list of tensors")
    places = []
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
                raise _DamagedError("its metadata are no texts")
            continue
        try:
            dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            bits = 8 if dtype == "BOOL" else int(re.findall(r"^[A-Z]+(\d+)", dtype)[0])
            numbers = [*shape, start, stop] if isinstance(shape, list) else [-1]
        except (KeyError, TypeError, ValueError, IndexError):
            numbers = [-1]
        if not all(type(number) is int and 0 <= number < _END for number in numbers):
            raise _DamagedError(f"what it says of {name} is no dtype, shape and place")
        size = bits
        for length in shape:
            size = min(size * length, _END)  # millions of lengths would make a very long number
        if size != 8 * (stop - start):
            raise _DamagedError(f"the shape and the dtype of {name} do not fit its place")
        places.append((start, stop))
    end = 0
    for start, stop in sorted(places):
        if start != end:
            raise _DamagedError("its tensors overlap, or leave gaps")
        end = stop
    if end != stored:
        raise _DamagedError(f"it must hold {end:,} bytes of tensors, but holds {stored:,}")


class Safetensors(TensorFile):
    """One file of safetensors."""

    def __init__(self, path: Path) -> None:
        self.path, self.others, self.overlapping = path, {}, []
        with path.open("rb") as file:
            begin = file.read(8)
        if begin.startswith(b"PK\x03\x04"):  # as a length it would be above the limit
            raise UnreadableError(
                f"{path} must be a safetensors file, but is a zip archive, as torch.save writes "
                "them. Then its name must end in .pt."
            )
        length = int.from_bytes(begin, "little")
        if length > _HEADER:
            raise UnreadableError(
                f"{path} must be a safetensors file, the header of which has at most {_HEADER:,} "
                f"bytes, but this says {length:,}. It is none, or damaged, or holds more tensors "
                "than belong in one file: save them in several."
            )
        try:
            with path.open("rb") as file:
                file.seek(8)
                header = json.loads(file.read(length).decode())
            _check(header, path.stat().st_size - 8 - length)
        except (ValueError, RecursionError) as error:
            what = "its header is no JSON" if type(error) is not _DamagedError else error
            raise UnreadableError(
                f"{path} must be a whole safetensors file, but: {what}. It may be truncated or "
                "damaged: compare its size with the original's, or fetch it again."
            ) from None
        self._written = {n: entry["dtype"] for n, entry in header.items() if n != "__metadata__"}
        self._offsets = {
            name: [8 + length + offset for offset in entry["data_offsets"]]
            for name, entry in header.items()
            if name != "__metadata__"
        }
        # Of tensors that are one, `save_model` keeps a name, and writes to it from the others.
        aliases: dict[str, list[str]] = {}
        for other, kept in header.get("__metadata__", {}).items():
            if other not in self._offsets:
                aliases.setdefault(kept, []).append(other)
        self.entries = {}
        sliced = saved_offsets(header.get("__metadata__", {}))
        for name in self._offsets:
            shape, written = tuple(header[name]["shape"]), header[name]["dtype"]
            dtype = (_FLOATS | _INTEGERS).get(written, written)
            skipped = why_no_weight(shape, dtype)
            parameter, others = written not in _INTEGERS, tuple(aliases.get(name, ()))
            entry = Entry(name, shape, dtype, parameter, skipped, others)
            if len(shape) > 1 and (sliced is None or name in sliced):
                at = sliced[name] if sliced else None
                entry = replace(entry, skipped=slice_at([at] if at else []), offsets=at)
            self.entries[name] = entry

    def read(self, name: str) -> Tensor:
        entry = self.entries[name]
        return self._entries(name, *self._offsets[name]).reshape(entry.shape)

    def first_row(self, name: str) -> Tensor:
        start, stop = self._offsets[name]
        shape = self.entries[name].shape
        return self._entries(name, start, start + (stop - start) // math.prod(shape[:-1]))

    def _entries(self, name: str, start: int, stop: int) -> Tensor:
        dtype = getattr(torch, self.entries[name].dtype)
        if start == stop:  # of which `frombuffer` makes nothing
            return torch.empty(0, dtype=dtype, device="cpu")
        buffer = memory_for(stop - start, name, self.path)
        with self.path.open("rb") as file:
            file.seek(start)
            if file.readinto(buffer) != len(buffer):
                raise UnreadableError(f"{self.path} has become shorter while it was read.")
        return torch.frombuffer(buffer, dtype=dtype)

    def pieces(self, name: str) -> Iterator[Tensor]:
        dtype = getattr(torch, (_FLOATS | _OTHER_FLOATS).get(self._written[name], ""), None)
        start, stop = self._offsets[name]
        with self.path.open("rb") as file:
            file.seek(start)
            while dtype is not None and start < stop:
                buffer = bytearray(min(_PIECE, stop - start))
                if file.readinto(buffer) != len(buffer):
                    raise UnreadableError(f"{self.path} has become shorter while it was read.")
                yield torch.frombuffer(buffer, dtype=dtype)
                start += len(buffer)

    def copy_with(self, replaced: Iterable[tuple[str, Tensor]], target: Path) -> None:
        shutil.copyfile(self.path, target)
        with target.open("r+b") as file:
            for name, tensor in replaced:
                start, stop = self._offsets[name]
                buffer = memory_for(stop - start, name, self.path)
                torch.frombuffer(buffer, dtype=tensor.dtype).copy_(tensor.flatten())
                file.seek(start)
                file.write(buffer)
