"""An ONNX model: the constants of its graph, with the matrices as which nodes take them.

Data in the file is parsed once and stays in memory while the file is open, which protobuf limits to
2 GB. Data beside it, in the files that it names, is read when it is needed, row by row.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from wellcond.files.extras import import_extra
from wellcond.files.pieces import pieces_of
from wellcond.files.tensors import (
    DamagedError,
    Entry,
    Rows,
    TensorFile,
    UnreadableError,
    damaged,
    explain_non_weight,
    state_of,
)
from wellcond.text import join_remarks
from wellcond.weights.names import is_of_transform
from wellcond.weights.onnx_graph import Constant, EndlessGraphError, Scales, find_constants
from wellcond.weights.quantised import FLOATING
from wellcond.weights.reasons import Reason, Skipped

# The dtypes of torch by the numbers that the format gives to them, and those that torch lacks.
_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64"}
_DTYPES |= {9: "bool", 10: "float16", 11: "float64", 12: "uint32", 13: "uint64"}
_DTYPES |= {14: "complex64", 15: "complex128", 16: "bfloat16"}
_DTYPES |= {17: "float8_e4m3fn", 18: "float8_e4m3fnuz", 19: "float8_e5m2", 20: "float8_e5m2fnuz"}
_DTYPES |= {24: "float8_e8m0fnu"}
_NARROW = {21: ("uint4", 4), 22: ("int4", 4), 25: ("uint2", 2), 26: ("int2", 2)}
_CODES = ("uint8", "int8", "uint16", "int16", "int32", *(name for name, _ in _NARROW.values()))
# Entries that are not in `raw_data`: the field and the numbers in it.
_FIELDS = {"float32": "float_data", "complex64": "float_data"}
_FIELDS |= {"float64": "double_data", "complex128": "double_data", "int64": "int64_data"}
_FIELDS |= {"uint32": "uint64_data", "uint64": "uint64_data"}
_TYPES = {"float_data": "f", "double_data": "d", "int32_data": "i", "int64_data": "q"}
_TYPES |= {"uint64_data": "Q"}  # of array
_EXTERNAL = 1  # of TensorProto.data_location
_INTEGERS = 4096  # bytes of a tensor that says how another is rearranged
_LARGEST = (1 << 31) - 1  # bytes, of protobuf
# Names that exporters make up: `onnx::MatMul_205`, `val_0`, `/conv/Constant_output_0`.
_MADE_UP = re.compile(
    r"onnx::.*|(.*/)?_?Constant(_\d+)?(_output_\d+)?(:\d+)?|const_fold_opt_.*|(_?val|_v|tensor)?_?\d+",
    re.DOTALL,
)
_KIND = "ONNX model"


@dataclass(frozen=True)
class _Place:
    """Where the bytes of a tensor are: in a file beside the model."""

    path: Path
    start: int


class Onnx(TensorFile):
    """One ONNX model, with the files beside it that hold its data."""

    endings = (".onnx",)
    kind = "an ONNX model"
    of_graph = True
    not_copied = (
        "an ONNX model is not written. Repair the checkpoint that was exported, and export again"
    )

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        onnx = import_extra("onnx", path, self.kind)
        if self._state[0] > _LARGEST:
            raise UnreadableError(
                f"{path} has more than 2 GB, which protobuf does not read. Save it with its data "
                "beside it: onnx.save(model, path, save_as_external_data=True)."
            )
        model = onnx.ModelProto()
        try:
            with self._open() as file:
                model.ParseFromString(file.read())
        except MemoryError:
            raise UnreadableError(f"{path} needs more memory than there is.") from None
        except Exception as error:  # protobuf has a class of its own for it
            raise damaged(path, _KIND, str(error).rstrip(".")) from None
        if not model.HasField("graph"):
            raise damaged(path, _KIND, "it has no graph")
        self._places: dict[str, _Place] = {}
        self._beside: dict[Path, tuple[int, int]] = {}
        try:
            self._constants = find_constants(model, self._read_integers)
            for name, constant in self._constants.items():
                if _is_listed(constant):
                    self._check(name, constant)
                    self.entries[name] = self._entry(name, constant)
        except (DamagedError, EndlessGraphError) as error:
            raise damaged(path, _KIND, error) from None

    @property
    def paths(self) -> list[Path]:
        return [self.path, *self._beside]

    # --- what is in it ----------------------------------------------------------------------------

    def _entry(self, name: str, constant: Constant) -> Entry:
        shape, stored = constant.shape, _dtype_of(constant.tensor)
        views, scales = constant.views, constant.scales
        dtype, skipped = stored, constant.skipped
        if views is not None and scales is not None and self._fits(scales, shape, stored):
            dtype = "float32"
        elif scales is not None:
            views = None
            skipped = Skipped(Reason.quantised, "its scales do not fit it")
        if views is not None:  # what is stored as a vector may be reshaped
            skipped = explain_non_weight(shape if len(shape) != 1 else (1, *shape), dtype)
        elif skipped is None or skipped.reason is Reason.unmultiplied or len(shape) < 2:
            skipped = explain_non_weight(shape, dtype) or skipped
        if views is not None and _MADE_UP.fullmatch(name):
            note = join_remarks(f"a folded constant of {constant.node}", views.note)
            views = replace(views, note=note)
            if skipped is None and is_of_transform(constant.node):
                skipped = Skipped(Reason.constant, f"of {constant.node}")
        return Entry(
            name,
            shape,
            dtype,
            parameter=dtype in FLOATING
            and not (skipped is not None and skipped.reason is Reason.scales)
            and (constant.initializer or views is not None),
            skipped=skipped,
            stored_as=stored if dtype != stored else "",
            views=views if skipped is None or skipped.reason.by_name else None,
        )

    def _fits(self, scales: Scales, shape: tuple[int, ...], stored: str) -> bool:
        """Whether these scales fit codes of this shape."""
        scale = self._constants[scales.scale]
        zero = None if scales.zero is None else self._constants[scales.zero]
        known = stored in _CODES or stored.startswith("float8_e4") or stored.startswith("float8_e5")
        if not known or _dtype_of(scale.tensor) not in FLOATING[:4]:
            return False
        if zero is not None and (zero.shape != scale.shape or _dtype_of(zero.tensor) != stored):
            return False
        return _spread_shape(scale.shape, shape, scales) is not None

    def _check(self, name: str, constant: Constant) -> None:
        """Raises DamagedError unless the tensor has its entries; notes where they are."""
        tensor, shape = constant.tensor, constant.shape
        if constant.skipped is not None and constant.skipped.reason is Reason.not_dense:
            return
        if any(side < 0 for side in shape):
            raise DamagedError(f"{name} has the shape {shape}")
        if tensor.HasField("segment"):
            raise DamagedError(f"{name} is stored in segments, which no writer leaves")
        dtype, count = _dtype_of(tensor), 0 if 0 in shape else math.prod(shape)
        if tensor.data_location == _EXTERNAL:
            self._places[name] = self._find(name, tensor, _size_of(tensor, count))
            return
        if dtype in ("string", "unknown"):
            return
        if tensor.HasField("raw_data"):
            found, expected, what = len(tensor.raw_data), _size_of(tensor, count), "bytes"
        else:
            found, expected = len(_field_of(tensor)), _length_of(tensor, count)
            what = "numbers"
        if found != expected:
            raise DamagedError(
                f"{name} of shape {list(shape)} must have {expected:,} {what}, but has {found:,}"
            )

    def _find(self, name: str, tensor: Any, size: int) -> _Place:
        """Where the data of a tensor lies, in a file within the folder of the model."""
        given = {one.key: one.value for one in tensor.external_data}
        location = given.get("location", "")
        inside = PurePosixPath(location)
        if not location or inside.is_absolute() or ".." in inside.parts or "\\" in location:
            raise DamagedError(
                f"{name} must name a file within the folder of the model, but names {location!r}"
            )
        path = self.path.parent / inside
        try:
            real = path.resolve(strict=True)
            # Of a cache of a hub, both are links to files in one folder.
            folders = (self.path.parent.resolve(), self.path.resolve().parent)
            within = real.is_file() and any(real.is_relative_to(one) for one in folders)
            if within and path not in self._beside:
                with path.open("rb") as file:
                    self._beside[path] = state_of(file)
        except (OSError, ValueError, RuntimeError):
            raise UnreadableError(
                f"{self.path} needs the file {location!r} beside it, which cannot be read. Fetch "
                "it, or keep both in one folder."
            ) from None
        if not within:
            raise DamagedError(f"{name} is in {location!r}, which is no file within the folder")
        try:
            start = int(given.get("offset") or 0)
            length = int(given.get("length") or size)
        except ValueError:
            raise DamagedError(f"{name} has an offset or a length that is no number") from None
        if length != size:
            raise DamagedError(f"{name} must have {size:,} bytes in {location}, but has {length:,}")
        if start < 0 or start + size > self._beside[path][0]:
            raise DamagedError(f"{name} ends beyond the end of {location}")
        return _Place(path, start)

    # --- reading ----------------------------------------------------------------------------------

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        constant, entry = self._constants[name], self.entries[name]
        if not entry.stored_as:
            return self._stored(name, rows)
        assert constant.scales is not None
        values = self._dequantised(name, constant.scales)
        return values if rows is None else values[slice(*rows)]

    def first_row(self, name: str) -> Tensor:
        shape = self.entries[name].shape
        first = self.read(name, (0, 1)) if len(shape) > 1 else self.read(name)
        return first.reshape(-1, shape[-1])[0] if shape else first.reshape(1)

    def pieces(self, name: str) -> Iterator[Tensor]:
        entry = self.entries[name]
        if entry.dtype in FLOATING and not (
            entry.skipped is not None and entry.skipped.reason is Reason.not_dense
        ):
            yield from pieces_of(self.read(name))

    def _stored(self, name: str, rows: Rows | None = None) -> Tensor:
        """The entries as they are stored; codes of 4 bits and less as int32."""
        constant = self._constants[name]
        tensor, shape = constant.tensor, constant.shape
        place, count = self._places.get(name), math.prod(shape)
        if tensor.data_type in _NARROW:
            data = self._bytes(place, 0, _size_of(tensor, count), name) if place else None
            values = _unpacked(tensor, data, count).reshape(shape)
            return values if rows is None else values[slice(*rows)]
        dtype = getattr(torch, _dtype_of(tensor))
        start, stop = 0, count
        if rows is not None and shape:
            first, last, _ = slice(*rows).indices(shape[0])
            each = math.prod(shape[1:])
            start, stop, shape = first * each, last * each, (last - first, *shape[1:])
        if start >= stop:
            return torch.empty(shape, dtype=dtype)
        width = dtype.itemsize
        if place is not None:
            data = self._bytes(place, start * width, (stop - start) * width, name)
        elif tensor.HasField("raw_data"):
            data = bytearray(memoryview(tensor.raw_data)[start * width : stop * width])
        else:
            data = _encoded(tensor, width)[start * width : stop * width]
        return torch.frombuffer(data, dtype=dtype).reshape(shape)

    def _bytes(self, place: _Place, start: int, size: int, name: str) -> bytearray:
        buffer = self._memory_for(size, name)
        with place.path.open("rb") as file:
            if state_of(file) != self._beside[place.path]:
                raise UnreadableError(f"{place.path} has changed while it was read.")
            file.seek(place.start + start)
            if file.readinto(buffer) != size:
                raise UnreadableError(f"{place.path} has become shorter while it was read.")
        return buffer

    def _dequantised(self, name: str, scales: Scales) -> Tensor:
        """(codes - zero) scale, in float32 as the operator computes it."""
        codes = self._stored(name).float()
        scale = _spread(self._stored(scales.scale).float(), codes.shape, scales)
        if scales.zero is not None:
            codes -= _spread(self._stored(scales.zero).float(), codes.shape, scales)
        return codes.mul_(scale)

    def _read_integers(self, tensor: Any) -> list[int] | None:
        """The entries of a small tensor of integers; None of all others."""
        count = math.prod(tensor.dims)
        if tensor.data_type not in (6, 7) or tensor.data_location == _EXTERNAL:
            return None
        if not 0 <= count * 8 <= _INTEGERS:
            return None
        width = 8 if tensor.data_type == 7 else 4
        raw = tensor.raw_data if tensor.HasField("raw_data") else _encoded(tensor, width)
        if len(raw) != count * width:
            return None
        return array("q" if width == 8 else "i", bytes(raw)).tolist()


def _is_listed(constant: Constant) -> bool:
    """Whether a user may want to know of it: of the constants in nodes, only of matrices."""
    if constant.initializer or constant.views is not None:
        return True
    return len(constant.shape) > 1 and _dtype_of(constant.tensor) in FLOATING


# --- a tensor as the format stores it -------------------------------------------------------------


def _dtype_of(tensor: Any) -> str:
    if tensor.data_type in _NARROW:
        return _NARROW[tensor.data_type][0]
    if tensor.data_type == 8:
        return "string"
    return _DTYPES.get(tensor.data_type, "unknown")


def _bits(tensor: Any) -> int:
    if tensor.data_type in _NARROW:
        return _NARROW[tensor.data_type][1]
    name = _dtype_of(tensor)
    if name == "complex128":
        return 128
    digits = re.search(r"float8|\d+$", name)
    return 8 if digits is None or digits[0] == "float8" else int(digits[0])


def _size_of(tensor: Any, count: int) -> int:
    """How many bytes so many entries take."""
    return -(-count * _bits(tensor) // 8)


def _field_of(tensor: Any) -> Any:
    return getattr(tensor, _FIELDS.get(_dtype_of(tensor), "int32_data"))


def _length_of(tensor: Any, count: int) -> int:
    """How many numbers of the field so many entries take."""
    if tensor.data_type in _NARROW:
        return _size_of(tensor, count)
    return count * (2 if _dtype_of(tensor).startswith("complex") else 1)


def _encoded(tensor: Any, width: int) -> bytearray:
    """The bytes of entries that a field stores as numbers; each entry takes `width` of them."""
    name = _FIELDS.get(_dtype_of(tensor), "int32_data")
    wide = array(_TYPES[name], getattr(tensor, name))
    if not wide or wide.itemsize <= width:
        return bytearray(wide.tobytes())
    by_number = torch.frombuffer(wide, dtype=torch.uint8).reshape(-1, wide.itemsize)
    return bytearray(bytes(by_number[:, :width].flatten().tolist()))


def _unpacked(tensor: Any, data: bytearray | None, count: int) -> Tensor:
    """Codes of 4 or 2 bits, the first in the lowest bits of a byte."""
    name, bits = _NARROW[tensor.data_type]
    if data is None:
        raw = tensor.HasField("raw_data")
        data = bytearray(tensor.raw_data) if raw else _encoded(tensor, 1)
    packed = torch.frombuffer(data, dtype=torch.uint8).int() if data else torch.empty(0).int()
    shifts = torch.arange(0, 8, bits, dtype=torch.int32)
    codes: Tensor = ((packed[:, None] >> shifts) & (2**bits - 1)).flatten()[:count]
    return codes if name.startswith("u") else codes - ((codes >> (bits - 1)) << bits)


def _spread_shape(
    of: tuple[int, ...], shape: tuple[int, ...], scales: Scales
) -> tuple[int, ...] | None:
    """The shape with which scales of shape `of` are broadcast to codes; None if they do not fit."""
    if math.prod(of) == 1:
        return (1,) * len(shape)
    if not -len(shape) <= scales.axis < len(shape):
        return None
    axis = scales.axis % len(shape)
    if scales.block:
        blocks = -(-shape[axis] // scales.block) if scales.block > 0 else -1
        return of if of == (*shape[:axis], blocks, *shape[axis + 1 :]) else None
    if len(of) == 1 and of[0] == shape[axis]:
        return tuple(of[0] if at == axis else 1 for at in range(len(shape)))
    return None


def _spread(scale: Tensor, shape: torch.Size, scales: Scales) -> Tensor:
    """Scales that can be multiplied with codes of this shape."""
    known = _spread_shape(tuple(scale.shape), tuple(shape), scales)
    assert known is not None
    scale = scale.reshape(known)
    if scales.block and scale.numel() > 1:
        axis = scales.axis % len(shape)
        wide = scale.repeat_interleave(scales.block, axis)
        return wide.narrow(axis, 0, shape[axis])
    return scale
