"""A safetensors file: read by offset, so that only one tensor is ever in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from wellcond.checkpoints.tensors import (
    Entry,
    TensorFile,
    UnreadableError,
    why_no_weight,
)

# What safetensors calls the dtypes of torch.
_INTEGERS = {"BOOL": "bool", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64"}
_INTEGERS |= {"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}
# The format allows 100 MB, and some 20 times that is what Python makes of it. A third of a million
# tensors fit into this.
_HEADER = 32 << 20
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Safetensors(TensorFile):
    """One file of safetensors."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path, self.others, self.overlapping = path, {}, []
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > _HEADER:
            raise UnreadableError(
                f"{path} must be a safetensors file, the header of which has at most {_HEADER:,} "
                f"bytes, but this says {length:,}. It is damaged, or holds more tensors than "
                "belong in one file: save them in several."
            )
        try:
            # It checks the header, the offsets and the length of the file.
            with safe_open(path, framework="pt"), path.open("rb") as file:
                file.seek(8)
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
