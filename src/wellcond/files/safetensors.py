"""A safetensors file, read by offset, so that at most one tensor is in memory at a time."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wellcond.files.slices import saved_offsets, slice_at
from wellcond.files.subclasses import read_classes
from wellcond.files.tensors import (
    DamagedError,
    Entry,
    Rows,
    TensorFile,
    UnreadableError,
    Write,
    damaged,
    explain_non_weight,
)

# The dtypes of torch by their names in the format.
_INTEGERS = {"BOOL": "bool", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64"}
_INTEGERS |= {"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_FLOATS |= {"C64": "complex64"}
# Codes of quantised weights. Versions of torch before 2.7 lack some of these dtypes.
_OTHER_FLOATS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_OTHER_FLOATS |= {"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"}
_OTHER_FLOATS |= {"F8_E8M0": "float8_e8m0fnu"}
_NAMES = _FLOATS | _INTEGERS | _OTHER_FLOATS
# The format allows 100 MB, which need about 2 GB in Python. 32 MB hold about 330,000 tensors.
_HEADER = 32 << 20
_END = 1 << 63
# A tensor to be written: its name, its dtype as in `Entry`, its shape, and a function that returns
# its entries in memory order, in one or several tensors.
Item = tuple[str, str, tuple[int, ...], Callable[[], Iterable[Tensor]]]


class Safetensors(TensorFile):
    """One safetensors file."""

    endings = (".safetensors",)

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        header, start = _read_header(path)
        self.metadata = metadata = header.pop("__metadata__", {})
        self._written = {name: entry["dtype"] for name, entry in header.items()}
        self._offsets = {
            name: [start + offset for offset in entry["data_offsets"]]
            for name, entry in header.items()
        }
        # `save_model` stores a tied tensor once, and maps its other names to this name.
        aliases: dict[str, list[str]] = {}
        for other, kept in metadata.items():
            if other not in header:
                aliases.setdefault(kept, []).append(other)
        sliced = saved_offsets(metadata)
        for name, written in self._written.items():
            shape, dtype = tuple(header[name]["shape"]), _NAMES.get(written, written)
            entry = Entry(
                name,
                shape,
                dtype,
                parameter=written not in _INTEGERS,
                skipped=explain_non_weight(shape, dtype),
                aliases=tuple(aliases.get(name, ())),
            )
            if sliced is None or name in sliced:
                at = sliced[name] if sliced else None
                at = at if at is not None and len(at) == len(shape) else None
                entry = replace(entry, skipped=slice_at([] if at is None else [at]), offsets=at)
            self.entries[name] = entry
        self.classes = read_classes(metadata)
        self._leave_out_parts()

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(stop - start for start, stop in self._offsets.values())

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        (start, stop), entry = self._offsets[name], self.entries[name]
        shape = entry.shape
        if rows is not None:
            each = (stop - start) // max(1, shape[0])
            start, stop = start + rows[0] * each, start + rows[1] * each
            shape = (rows[1] - rows[0], *shape[1:])
        flat = self._read_flat(start, stop - start, _dtype(entry), name)
        fits = flat.numel() == math.prod(shape)
        return flat.reshape(shape if fits or 0 in shape else (*shape[:-1], -1))

    def first_row(self, name: str) -> Tensor:
        start, stop = self._offsets[name]
        entry = self.entries[name]
        size = (stop - start) // math.prod(entry.shape[:-1])
        return self._read_flat(start, size, _dtype(entry), name)

    def pieces(self, name: str) -> Iterator[Tensor]:
        dtype = getattr(torch, (_FLOATS | _OTHER_FLOATS).get(self._written[name], ""), None)
        start, stop = self._offsets[name]
        if dtype is not None:
            yield from self._read_pieces(start, stop - start, dtype, name)

    @contextlib.contextmanager
    def copy(self, target: Path) -> Iterator[Write]:
        shutil.copyfile(self.path, target)

        def write(name: str, new: Tensor) -> None:
            start, stop = self._offsets[name]
            buffer = self._memory_for(stop - start, name)
            torch.frombuffer(buffer, dtype=new.dtype).copy_(new.flatten())
            with target.open("r+b") as file:
                file.seek(start)
                file.write(buffer)

        yield write
        shutil.copymode(self.path, target)
        self._open().close()


def write_safetensors(path: Path, items: Sequence[Item], metadata: Mapping[str, str]) -> None:
    """Writes a file of tensors, with at most one of them in memory at a time.

    Args:
        path: the path of the file, which must not exist.
        items: the tensors, in the order of the file.
        metadata: strings by name.

    Raises:
        ValueError: the format lacks the dtype of a tensor, or its entries do not fit its shape.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    codes = {name: code for code, name in _NAMES.items()}
    end = 0
    for name, dtype, shape, _ in items:
        code = codes.get(dtype, dtype)
        if not (bits := _bits(code)):
            raise ValueError(
                f"{name} must have a dtype that safetensors can store, but has {dtype}. Convert it "
                "to another dtype."
            )
        start, end = end, end + math.prod(shape) * bits // 8
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, _, _, values in items:
            begin = file.tell()
            for tensor in values():
                buffer = bytearray(tensor.numel() * tensor.element_size())
                if buffer:
                    torch.frombuffer(buffer, dtype=tensor.dtype).copy_(tensor.flatten())
                file.write(buffer)
            start, end = header[name]["data_offsets"]
            if file.tell() - begin != end - start:
                raise ValueError(
                    f"{name} must have {end - start:,} bytes, but has {file.tell() - begin:,}."
                )


def _bits(dtype: Any) -> int:
    """Returns the number of bits of a dtype of the format; 0 if it is not a dtype."""
    if dtype == "BOOL":
        return 8
    found = re.match(r"[A-Z]+(\d+)", dtype) if isinstance(dtype, str) else None
    return int(found[1]) if found else 0


def _dtype(entry: Entry) -> torch.dtype:
    """Returns the dtype; uint8 if torch lacks it, such as pairs of float4."""
    dtype = getattr(torch, entry.dtype, None)
    return dtype if isinstance(dtype, torch.dtype) else torch.uint8


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Returns the header of a file, checked against its size, and the start of its tensors."""
    with path.open("rb") as file:
        begin = file.read(8)
        if begin.startswith(b"PK\x03\x04"):  # read as a length, it would exceed the limit
            raise UnreadableError(
                f"{path} must be a safetensors file, but is a zip archive. If torch.save wrote it, "
                "rename it so that its name ends in .pt."
            )
        length = int.from_bytes(begin, "little")
        if length > _HEADER:
            raise UnreadableError(
                f"{path} must be a safetensors file with a header of at most {_HEADER:,} bytes, "
                f"but its header has {length:,}. It is another kind of file, damaged, or contains "
                "too many tensors: fetch it again, or save the tensors in several files."
            )
        try:
            header = json.loads(file.read(length).decode())
            _check(header, path.stat().st_size - 8 - length)
        except DamagedError as error:
            raise damaged(path, "safetensors file", error) from None
        except (ValueError, RecursionError):
            raise damaged(path, "safetensors file", "its header is not JSON") from None
    return header, 8 + length


def _check(header: Any, stored: int) -> None:
    """Raises unless the header describes each stored byte exactly once.

    The safetensors library checks the same, but it maps the file, which requires as much address
    space as the file is long.
    """
    if not isinstance(header, dict):
        raise DamagedError("its header is not a JSON object")
    places = []
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict) or not all(isinstance(v, str) for v in entry.values()):
                raise DamagedError("the values of its metadata are not strings")
            continue
        try:
            dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            bits = _bits(dtype)
            numbers = chain(shape if bits and isinstance(shape, list) else [-1], (start, stop))
        except (KeyError, TypeError, ValueError, IndexError):
            numbers = chain([-1])
        if not all(type(number) is int and 0 <= number < _END for number in numbers):
            raise DamagedError(f"the dtype, shape or offsets of {name} are invalid")
        size = bits
        for length in shape:
            size = min(size * length, _END)  # millions of dimensions would make a huge integer
        if size != 8 * (stop - start):
            raise DamagedError(f"the shape and the dtype of {name} do not fit its offsets")
        places.append((start, stop))
    end = 0
    for start, stop in sorted(places):
        if start != end:
            raise DamagedError("its tensors overlap or leave gaps")
        end = stop
    if end != stored:
        raise DamagedError(f"it must contain {end:,} bytes of tensors, but contains {stored:,}")
