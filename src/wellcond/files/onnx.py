"""An ONNX model: the constants of its graph, and the matrices that its nodes make of them.

The file is parsed once and remains in memory; protobuf limits it to 2 GB. External data, in the
files that the model names, is read on demand, row by row.
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

# The dtypes of torch by their numbers in the format, and those that torch lacks.
_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64"}
_DTYPES |= {9: "bool", 10: "float16", 11: "float64", 12: "uint32", 13: "uint64"}
_DTYPES |= {14: "complex64", 15: "complex128", 16: "bfloat16"}
_DTYPES |= {17: "float8_e4m3fn", 18: "float8_e4m3fnuz", 19: "float8_e5m2", 20: "float8_e5m2fnuz"}
_DTYPES |= {24: "float8_e8m0fnu"}
_NARROW = {21: ("uint4", 4), 22: ("int4", 4), 25: ("uint2", 2), 26: ("int2", 2)}
_CODES = ("uint8", "int8", "uint16", "int16", "int32", *(name for name, _ in _NARROW.values()))
# The fields for entries that are not in `raw_data`, and the type codes of their numbers.
_FIELDS = {"float32": "float_data", "complex64": "float_data"}
_FIELDS |= {"float64": "double_data", "complex128": "double_data", "int64": "int64_data"}
_FIELDS |= {"uint32": "uint64_data", "uint64": "uint64_data"}
_TYPES = {"float_data": "f", "double_data": "d", "int32_data": "i", "int64_data": "q"}
_TYPES |= {"uint64_data": "Q"}  # codes of the module `array`
_EXTERNAL = 1  # a value of TensorProto.data_location
_INTEGERS = 4096  # bytes of a tensor that contains a shape or a permutation
_LARGEST = (1 << 31) - 1  # bytes, the limit of protobuf
# Names that exporters generate: `onnx::MatMul_205`, `val_0`, `/conv/Constant_output_0`.
_MADE_UP = re.compile(
    r"onnx::.*|(.*/)?_?Constant(_\d+)?(_output_\d+)?(:\d+)?|const_fold_opt_.*|(_?val|_v|tensor)?_?\d+",
    re.DOTALL,
)
_KIND = "ONNX model"


@dataclass(frozen=True)
class _Place:
    """Where the external data of a tensor begins."""

    path: Path
    start: int


class Onnx(TensorFile):
    """One ONNX model, with the files that contain its external data."""

    endings = (".onnx",)
    kind = "an ONNX model"
    of_graph = True
    not_copied = (
        "wellcond does not write ONNX models. Repair the checkpoint that was exported, and export "
        "the repaired copy"
    )

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        onnx = import_extra("onnx", path, self.kind)
        if self._state[0] > _LARGEST:
            raise UnreadableError(
                f"{path} must have at most {_LARGEST:,} bytes, the limit of protobuf, but has "
                f"{self._state[0]:,}. Save the model with external data: "
                "onnx.save(model, path, save_as_external_data=True)."
            )
        model = onnx.ModelProto()
        try:
            with self._open() as file:
                model.ParseFromString(file.read())
        except MemoryError:
            raise UnreadableError(
                f"{path} cannot be read, because there is not enough memory. Use a machine with "
                "more memory."
            ) from None
        except Exception as error:  # protobuf raises its own class
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

    # --- entries ----------------------------------------------------------------------------------

    def _entry(self, name: str, constant: Constant) -> Entry:
        shape, stored = constant.shape, _dtype_of(constant.tensor)
        views, scales = constant.views, constant.scales
        dtype, skipped = stored, constant.skipped
        if views is not None and scales is not None and self._fits(scales, shape, stored):
            dtype = "float32"
        elif scales is not None:
            views = None
            skipped = Skipped(Reason.quantised, "its scales do not fit its shape or dtype")
        if views is not None:  # the graph may reshape a stored vector
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
        """Returns whether these scales fit codes of this shape and dtype."""
        scale = self._constants[scales.scale]
        zero = None if scales.zero is None else self._constants[scales.zero]
        known = stored in _CODES or stored.startswith("float8_e4") or stored.startswith("float8_e5")
        if not known or _dtype_of(scale.tensor) not in FLOATING[:4]:
            return False
        if zero is not None and (zero.shape != scale.shape or _dtype_of(zero.tensor) != stored):
            return False
        return _spread_shape(scale.shape, shape, scales) is not None

    def _check(self, name: str, constant: Constant) -> None:
        """Raises DamagedError unless all entries of the tensor exist; records external data."""
        tensor, shape = constant.tensor, constant.shape
        if constant.skipped is not None and constant.skipped.reason is Reason.not_dense:
            return
        if any(side < 0 for side in shape):
            raise DamagedError(f"{name} has the invalid shape {shape}")
        if tensor.HasField("segment"):
            raise DamagedError(f"{name} is stored in segments, which no exporter writes")
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
        """Returns where the data of a tensor is, in a file within the folder of the model."""
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
            # In the cache of a hub, both are links to files in one folder.
            folders = (self.path.parent.resolve(), self.path.resolve().parent)
            within = real.is_file() and any(real.is_relative_to(one) for one in folders)
            if within and path not in self._beside:
                with path.open("rb") as file:
                    self._beside[path] = state_of(file)
        except (OSError, ValueError, RuntimeError):
            raise UnreadableError(
                f"{self.path} needs its external data {location!r}, but this file cannot be read. "
                "Fetch it into the folder of the model."
            ) from None
        if not within:
            raise DamagedError(
                f"{name} is in {location!r}, which is not a file within the folder of the model"
            )
        try:
            start = int(given.get("offset") or 0)
            length = int(given.get("length") or size)
        except ValueError:
            raise DamagedError(
                f"the offset and the length of {name} in {location!r} must be integers"
            ) from None
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
        """Returns the stored entries; codes of at most 4 bits as int32."""
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
                raise UnreadableError(
                    f"{place.path} has changed while it was read. Try again when no program writes "
                    "to it."
                )
            file.seek(place.start + start)
            if file.readinto(buffer) != size:
                raise UnreadableError(
                    f"{place.path} has become shorter while it was read. Try again when no program "
                    "writes to it."
                )
        return buffer

    def _dequantised(self, name: str, scales: Scales) -> Tensor:
        """Returns (codes - zero) scale, in float32 like the operator DequantizeLinear."""
        codes = self._stored(name).float()
        scale = _spread(self._stored(scales.scale).float(), codes.shape, scales)
        if scales.zero is not None:
            codes -= _spread(self._stored(scales.zero).float(), codes.shape, scales)
        return codes.mul_(scale)

    def _read_integers(self, tensor: Any) -> list[int] | None:
        """Returns the entries of a small integer tensor; None for other tensors."""
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
    """Returns whether the report lists a constant; for constants in nodes, only if a matrix."""
    if constant.initializer or constant.views is not None:
        return True
    return len(constant.shape) > 1 and _dtype_of(constant.tensor) in FLOATING


# --- stored tensors -------------------------------------------------------------------------------


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
    """Returns the number of bytes of `count` entries."""
    return -(-count * _bits(tensor) // 8)


def _field_of(tensor: Any) -> Any:
    return getattr(tensor, _FIELDS.get(_dtype_of(tensor), "int32_data"))


def _length_of(tensor: Any, count: int) -> int:
    """Returns how many numbers of the field `count` entries need."""
    if tensor.data_type in _NARROW:
        return _size_of(tensor, count)
    return count * (2 if _dtype_of(tensor).startswith("complex") else 1)


def _encoded(tensor: Any, width: int) -> bytearray:
    """Returns the bytes of entries that a field stores as numbers, `width` bytes per entry."""
    name = _FIELDS.get(_dtype_of(tensor), "int32_data")
    wide = array(_TYPES[name], getattr(tensor, name))
    if not wide or wide.itemsize <= width:
        return bytearray(wide.tobytes())
    by_number = torch.frombuffer(wide, dtype=torch.uint8).reshape(-1, wide.itemsize)
    return bytearray(bytes(by_number[:, :width].flatten().tolist()))


def _unpacked(tensor: Any, data: bytearray | None, count: int) -> Tensor:
    """Unpacks codes of 4 or 2 bits; the lowest bits of a byte contain the first code."""
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
    """Returns the shape in which scales of shape `of` broadcast to codes; None if none fits."""
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
    """Returns the scales in a form that can be multiplied with codes of this shape."""
    known = _spread_shape(tuple(scale.shape), tuple(shape), scales)
    assert known is not None
    scale = scale.reshape(known)
    if scales.block and scale.numel() > 1:
        axis = scales.axis % len(shape)
        wide = scale.repeat_interleave(scales.block, axis)
        return wide.narrow(axis, 0, shape[axis])
    return scale
