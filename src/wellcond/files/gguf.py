"""A GGUF file of llama.cpp: reads its header, and decodes its codes with the package `gguf`.

The reader of the package `gguf` maps the file into memory, so a file that becomes shorter while it
is read ends the process. The package also trusts every length in the header. Therefore wellcond
reads the header itself, checks each length, and reads only the requested rows of tensors.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from wellcond.files.extras import import_extra
from wellcond.files.tensors import (
    DamagedError,
    Entry,
    Rows,
    TensorFile,
    UnreadableError,
    damaged,
    explain_non_weight,
)
from wellcond.text import escape
from wellcond.weights.fused import Views
from wellcond.weights.kernels import view_groups
from wellcond.weights.reasons import Reason, Skipped

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
# The `struct` codes of values in the metadata, by type number, except strings and arrays.
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KEPT = 1 << 10  # bytes of a string or numbers in an array; longer settings are dropped
_NAME = 1 << 16  # bytes, the limit of the format
_TENSORS, _VALUES = 1 << 18, 1 << 16  # large models have a few thousand, and fewer than 100
_TEXTS = 1 << 22  # in a list; the largest vocabularies have several hundred thousand
_DIMENSIONS = 4  # of ggml
_PARTS = 1 << 16  # of a model, as the writer counts them
_END = 1 << 63
_PIECE = 1 << 22  # entries that are decoded at once
# The dtypes that are stored without codes, by their names in the format.
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_INTEGERS = {"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}
_SCALED = ("float32", "float16", "bfloat16")
# One filter per channel, without the dimension of length 1 that a torch kernel has.
_DEPTHWISE = re.compile(r"(.*\.)?(ssm_conv1d\w*|shortconv\.conv)\.weight", re.DOTALL)
# The names of settings in config.json, by the keys of the metadata without the architecture.
_SETTINGS = {
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "embedding_length": "hidden_size",
    "rope.freq_base": "rope_theta",
    "rope.dimension_count": "rotary_dim",
}


@dataclass(frozen=True)
class _Place:
    """The place of a tensor, which has `rows` rows along its last dimension."""

    kind: int
    start: int
    rows: int
    row_bytes: int


class Gguf(TensorFile):
    """One GGUF file."""

    endings = (".gguf",)
    kind = "a GGUF file of llama.cpp"
    not_copied = (
        "wellcond does not write GGUF files. Repair the checkpoint from which it was converted, "
        "and convert the repaired copy"
    )

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._factors: dict[str, str] = {}  # the names of factors, by the tensors that they scale
        self._package = import_extra("gguf.quants", path, "a GGUF file")
        with self._open() as file:
            header = _Header(file, path.stat().st_size)
            try:
                version = header.begin()
                if version not in _VERSIONS:
                    raise UnreadableError(
                        f"{path} must be a little-endian GGUF file of version 2 or 3, but "
                        f"{_describe_version(version)}."
                    )
                count, values = header.numbers("QQ")
                self._values = _read_values(header, values)
                self._places = self._read_places(header, count)
            except DamagedError as error:
                raise damaged(path, "GGUF file", error) from None

    @property
    def settings(self) -> dict[str, Any]:
        stem = f"{self._values.get('general.architecture')}."
        values = {key.removeprefix(stem): value for key, value in self._values.items()}
        found = {name: _one_of(values[key]) for key, name in _SETTINGS.items() if key in values}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def part(self) -> tuple[int, int]:
        number, count = (self._values.get(f"split.{key}") for key in ("no", "count"))
        if isinstance(number, int) and isinstance(count, int) and 0 <= number < count <= _PARTS:
            return number, count
        return 0, 1

    def _read_places(self, header: _Header, count: int) -> dict[str, _Place]:
        """Reads the places of the tensors, and adds their entries."""
        if count > _TENSORS:
            raise DamagedError(f"it declares {count:,} tensors, but the limit is {_TENSORS:,}")
        alignment = self._values.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise DamagedError("its alignment is not a power of two")
        places: dict[str, _Place] = {}
        for _ in range(count):
            name = header.text()
            if name in places:
                raise DamagedError(f"two of its tensors are called {escape(name)}")
            (dimensions,) = header.numbers("I")
            if dimensions > _DIMENSIONS:
                raise DamagedError(
                    f"{escape(name)} has {dimensions:,} dimensions, but the limit is {_DIMENSIONS}"
                )
            shape = header.numbers("Q" * dimensions)[::-1]
            kind, offset = header.numbers("IQ")
            if max(offset, *shape, math.prod(shape)) >= _END:
                raise DamagedError(f"the size of {escape(name)} exceeds that of any file")
            # Tensors of a type that the package does not know are not read.
            length, size = self._package.GGML_QUANT_SIZES.get(kind, (1, 0))
            last = shape[-1] if shape else 1
            if last % length:
                raise DamagedError(
                    f"the row length of {escape(name)} is not a multiple of {length}"
                )
            places[name] = _Place(kind, offset, math.prod(shape[:-1]), last // length * size)
            self.entries[name] = _describe(name, shape, kind, self._package)
        start = header.at + -header.at % alignment
        _check_places(places, header.size - start)
        for name in places:
            self._find_factors(name)
        return {
            name: _Place(one.kind, start + one.start, one.rows, one.row_bytes)
            for name, one in places.items()
        }

    def _find_factors(self, name: str) -> None:
        """Finds the factors by which llama.cpp multiplies the output of a layer or its experts."""
        scale, entry = f"{name.removesuffix('.weight')}.scale", self.entries[name]
        if scale not in self.entries or entry.skipped or entry.dtype not in _SCALED:
            return
        of_each, factors = self.entries[scale], entry.shape[0] if len(entry.shape) == 3 else 1
        is_plain = of_each.dtype == "float32" and not of_each.stored_as
        if is_plain and math.prod(of_each.shape) in (1, factors):
            self._factors[name] = scale
            stored_as = entry.stored_as or entry.dtype
            self.entries[name] = replace(entry, dtype="float32", stored_as=stored_as)

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        shape, place = self.entries[name].shape, self._places[name]
        if rows is None:
            return self._read_rows(name, 0, place.rows).reshape(shape)
        if len(shape) < 2:
            return self.read(name)[slice(*rows)]
        each = math.prod(shape[1:-1])
        found = self._read_rows(name, rows[0] * each, rows[1] * each)
        return found.reshape(rows[1] - rows[0], *shape[1:])

    def first_row(self, name: str) -> Tensor:
        return self._read_rows(name, 0, min(1, self._places[name].rows))

    def pieces(self, name: str) -> Iterator[Tensor]:
        place, entry = self._places[name], self.entries[name]
        undecoded = entry.skipped is not None and entry.skipped.reason is Reason.undecoded
        if undecoded or not entry.parameter or not place.row_bytes:
            return
        step = self._rows_at_once(name)
        for first in range(0, place.rows, step):
            yield self._read_rows(name, first, min(first + step, place.rows))

    def _rows_at_once(self, name: str) -> int:
        return max(1, _PIECE // max(1, *self.entries[name].shape[-1:]))

    def _read_rows(self, name: str, first: int, last: int) -> Tensor:
        """Returns the entries of rows along the last dimension, end to end."""
        place, entry = self._places[name], self.entries[name]
        dtype = getattr(torch, entry.dtype)
        size = place.row_bytes
        if not entry.stored_as:
            return self._read_flat(place.start + first * size, (last - first) * size, dtype, name)
        width = entry.shape[-1]
        values = torch.empty((last - first) * width, dtype=dtype, device="cpu")
        step = self._rows_at_once(name)
        for start in range(first, last, step):
            stop = min(start + step, last)
            codes = self._read_bytes(place.start + start * size, (stop - start) * size, name)
            part = values[(start - first) * width : (stop - first) * width]
            part.copy_(_decode(self._package, codes, place))
        if name in self._factors:
            factors = self.read(self._factors[name]).flatten()
            rows_each = place.rows // len(factors)
            of_row = factors[torch.arange(first, last) // rows_each]
            values.view(-1, width).mul_(of_row[:, None])
        return values


class _Header:
    """Reads the numbers and strings at the beginning of a file, within its bounds."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self.size, self.at = file, size, 0

    def begin(self) -> int:
        """Reads the magic number of the format, and returns the version."""
        if self._take(len(_MAGIC)) != _MAGIC:
            raise DamagedError("it does not begin with GGUF")
        (version,) = self.numbers("I")
        return int(version)

    def numbers(self, codes: str) -> tuple[Any, ...]:
        """Reads numbers with these `struct` codes."""
        codes = f"<{codes}"
        return struct.unpack(codes, self._take(struct.calcsize(codes)))

    def text(self) -> str:
        """Reads a name, which its length precedes."""
        (length,) = self.numbers("Q")
        if length > _NAME:
            raise DamagedError(
                f"a name in its header has {length:,} bytes, but the limit is {_NAME:,}"
            )
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise DamagedError("a name in its header is not UTF-8") from None

    def value(self) -> Any:
        """Reads a type and a value of the metadata; None for a long value or a list of strings."""
        (kind,) = self.numbers("I")
        if kind in _CODES:
            return self.numbers(_CODES[kind])[0]
        if kind == _STRING:
            return self._short_text()
        if kind != _ARRAY:
            raise DamagedError(f"its metadata contain a value of the unknown type {kind}")
        kind, count = self.numbers("IQ")
        if kind == _STRING and count <= _TEXTS:
            for _ in range(count):
                self._short_text()
            return None
        if kind not in _CODES:
            raise DamagedError(
                f"its metadata contain an invalid list of {count:,} values of the type {kind}"
            )
        if count <= _KEPT:
            return self.numbers(_CODES[kind] * count)
        self._skip(count * struct.calcsize(_CODES[kind]))
        return None

    def _short_text(self) -> str | None:
        (length,) = self.numbers("Q")
        if length > _KEPT:
            self._skip(length)
            return None
        return self._take(length).decode(errors="replace")

    def _take(self, length: int) -> bytes:
        self._check(length)
        self.at += length
        return self._file.read(length)

    def _skip(self, length: int) -> None:
        self._check(length)
        self.at += length
        self._file.seek(length, 1)

    def _check(self, length: int) -> None:
        if length > self.size - self.at:
            raise DamagedError("it ends within its header" if self.size else "it is empty")


def _read_values(header: _Header, count: int) -> dict[str, Any]:
    """Reads the settings by their names."""
    if count > _VALUES:
        raise DamagedError(f"it declares {count:,} settings, but the limit is {_VALUES:,}")
    values: dict[str, Any] = {}
    for _ in range(count):
        name = header.text()
        if name in values:
            raise DamagedError(f"two of its settings are called {escape(name)}")
        values[name] = header.value()
    return values


def _check_places(places: dict[str, _Place], size: int) -> None:
    """Raises unless each tensor has its own bytes among those that follow the header.

    llama.cpp demands that each tensor begins where the previous one ends. The package `gguf`
    demands only that all tensors are within the file.
    """
    end = 0
    for name, one in sorted(places.items(), key=lambda item: (item[1].start, item[1].row_bytes)):
        if one.start < end:
            raise DamagedError(f"{escape(name)} begins within another tensor")
        end = one.start + one.rows * one.row_bytes
        if end > size:
            raise DamagedError(
                f"{escape(name)} ends {end - size:,} bytes beyond the end of the file"
            )


def _one_of(value: Any) -> Any:
    """Returns the common value of a list with one value per layer; None if they differ."""
    if not isinstance(value, tuple):
        return value
    return value[0] if len({*value}) == 1 else None


def _describe(name: str, shape: tuple[int, ...], kind: int, package: Any) -> Entry:
    """Describes a tensor; codes become float32."""
    known = kind in package.GGML_QUANT_SIZES
    called = package.GGMLQuantizationType(kind).name if known else f"the type {kind}"
    dtype = (_PLAIN | _INTEGERS).get(called, "float32")
    skipped = explain_non_weight(shape, dtype)
    stored_as = "" if called in _PLAIN | _INTEGERS else called.lower().replace("_k", "_K")
    if stored_as and not (known and _is_decoded(package, kind)):
        newer = "a newer version may: pip install --upgrade gguf"
        why = f"{stored_as}, which the installed package gguf does not decode; {newer}"
        skipped = Skipped(Reason.undecoded, why)
    depthwise = len(shape) == 2 and _DEPTHWISE.fullmatch(name)
    views = Views(view_groups(shape[0])) if depthwise else None
    parameter = called not in _INTEGERS
    return Entry(name, shape, dtype, parameter, skipped, stored_as=stored_as, views=views)


@cache
def _is_decoded(package: Any, kind: int) -> bool:
    """Returns whether the package can decode blocks of this type."""
    _, size = package.GGML_QUANT_SIZES[kind]
    try:
        _decode(package, bytearray(size), _Place(kind, 0, 1, size))
    except NotImplementedError:
        return False
    return True


def _decode(package: Any, codes: bytearray, place: _Place) -> Tensor:
    """Decodes the entries of rows, end to end."""
    import numpy as np

    rows = np.frombuffer(codes, dtype=np.uint8).reshape(-1, place.row_bytes)
    with np.errstate(all="ignore"):  # the audit itself reports scales that are not finite
        found = package.dequantize(rows, package.GGMLQuantizationType(place.kind))
    return torch.from_numpy(found).flatten()


def _describe_version(version: int) -> str:
    if version and not version & 0xFFFF:
        return "is big-endian: convert it with gguf-convert-endian from the package gguf"
    return f"has version {version}: convert the model again with a current llama.cpp"
