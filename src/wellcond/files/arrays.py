"""NumPy arrays, in a file of one (.npy) or an archive of several (.npz), read without NumPy.

A header contains dtype, order and shape as a Python literal, and the entries follow. Arrays of
Python objects are pickles, which are not read. Neither format records which framework wrote it.
"""

from __future__ import annotations

import ast
import contextlib
import math
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from wellcond.files.archive import Extent, check_unpacked, errors_as_damage, find_start
from wellcond.files.inert import is_shape
from wellcond.files.pieces import pieces_of
from wellcond.files.tensors import (
    DamagedError,
    Entry,
    NoTensorsError,
    Rows,
    TensorFile,
    UnreadableError,
    explain_non_weight,
)
from wellcond.weights.reasons import Reason, Skipped

_MAGIC = b"\x93NUMPY"
_HEADER = 10_000  # characters, the limit of NumPy; a longer header can be slow to parse
_PIECE = 16 << 20  # bytes
_KIND = "NumPy file"
_CUT_OFF = "its contents are inconsistent"
_ENDING = ".npy"
_DTYPES = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "b1": torch.bool}
_DTYPES |= {"c8": torch.complex64, "c16": torch.complex128, "i1": torch.int8, "i2": torch.int16}
_DTYPES |= {"i4": torch.int32, "i8": torch.int64, "u1": torch.uint8, "u2": torch.uint16}
_DTYPES |= {"u4": torch.uint32, "u8": torch.uint64}
# Floating point dtypes that torch lacks, or that NumPy stores without their name.
_UNREAD = {
    "f16": "long double: save it as float64",
    "f12": "long double: save it as float64",
    "c32": "long double: save it as complex128",
    "c24": "long double: save it as complex128",
    "V2": "V2, perhaps bfloat16: save array.view(ml_dtypes.bfloat16).astype('float32')",
    "V1": "V1, perhaps a float of 8 bits: save it as float32",
}
_OBJECTS, _RECORDS = "O", "records"  # records may have objects among their fields
_OTHERS = {
    _OBJECTS: (Reason.objects, "an array of Python objects, which is a pickle"),
    _RECORDS: (Reason.no_tensors, "an array of records (a structured dtype)"),
}
# The arrays that scipy.sparse.save_npz stores for a matrix, in addition to its indices.
_SPARSE = {"data", "format", "shape"}
_CONVERT = "save its arrays as safetensors: safetensors.numpy.save_file({}, other)"


@dataclass(frozen=True)
class _Stored:
    """An array: its dtype, and where its entries begin.

    Attributes:
        start: the byte in the file; for a compressed member of an archive, the byte in the member.
        member: the name of the compressed member; "" if the entries are not compressed.
    """

    shape: tuple[int, ...]
    code: str
    fortran: bool
    swapped: bool
    start: int
    member: str = ""

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.code]

    @property
    def nbytes(self) -> int:
        count = 0 if 0 in self.shape else math.prod(self.shape)
        return count * int(self.code[1:]) * (4 if self.code[0] == "U" else 1)


class _NumPy(TensorFile):
    """A NumPy file with one array or several."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._stored: dict[str, _Stored] = {}
        with errors_as_damage(path, _KIND, _CUT_OFF):
            self._find_arrays()
        if not self.entries:
            if any(why.reason is Reason.objects for why in self.others.values()):
                raise NoTensorsError(
                    f"{path} must contain arrays of numbers, but contains {_OTHERS[_OBJECTS][1]}: "
                    "loading it could run code. Load it where it was made, and save each array of "
                    "numbers separately: numpy.savez(other, name=array)."
                )
            found = _OTHERS[_RECORDS][1] if self.others else "none"
            raise NoTensorsError(
                f"{path} must contain arrays of numbers, but contains {found}. Save each "
                "array with one dtype: numpy.savez(other, name=array)."
            )
        self._leave_out_guesses()

    def _find_arrays(self) -> None:
        raise NotImplementedError

    def _add(self, name: str, array: _Stored) -> None:
        code = array.code
        if code in _OTHERS:
            self.others[name] = Skipped(*_OTHERS[code])
            return
        if code in _DTYPES:
            dtype = str(array.dtype).removeprefix("torch.")
            skipped = explain_non_weight(array.shape, dtype)
            parameter = code[0] in "fc"
        elif code in _UNREAD:
            unread = Skipped(Reason.unnamed, _UNREAD[code])
            dtype, skipped = code, explain_non_weight(array.shape, "float32") or unread
            parameter = True
        else:  # texts and dates
            dtype, skipped, parameter = code, Skipped(Reason.packed, code), False
        self._stored[name] = array
        self.entries[name] = Entry(name, array.shape, dtype, parameter, skipped)

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        array = self._stored[name]
        shape = array.shape
        if array.fortran and len(shape) > 1:  # the last dimension varies slowest
            if rows is None:
                flat = self._read_part(array, 0, array.nbytes, name)
            else:
                flat, shape = self._read_columns(array, rows, name), (rows[1] - rows[0], *shape[1:])
            return flat.reshape(shape[::-1]).permute(*reversed(range(len(shape))))
        if rows is None:
            return self._read_part(array, 0, array.nbytes, name).reshape(shape)
        each = math.prod(shape[1:]) * array.dtype.itemsize
        flat = self._read_part(array, rows[0] * each, (rows[1] - rows[0]) * each, name)
        return flat.reshape(rows[1] - rows[0], *shape[1:])

    def _read_columns(self, array: _Stored, rows: Rows, name: str) -> Tensor:
        """Reads these rows of each column, one column after the other, and drops the other rows."""
        long, count = array.shape[0], math.prod(array.shape[1:])
        each = array.dtype.itemsize
        start, stop = rows
        found = torch.empty(count, stop - start, dtype=array.dtype, device="cpu")
        if not found.numel():
            return found
        step = max(1, _PIECE // (long * each))
        with self._reader(array) as read:
            for first in range(0, count, step):
                last = min(count, first + step)
                # From the first row of the first column to the last row of the last one.
                begin, end = first * long + start, (last - 1) * long + stop
                flat = read(begin * each, (end - begin) * each, name)
                found[first:last] = flat.as_strided((last - first, stop - start), (long, 1))
        return found

    def first_row(self, name: str) -> Tensor:
        array = self._stored[name]
        if array.fortran and len(array.shape) > 1:
            row = self.read(name, (0, 1))
            return row[(0,) * (len(array.shape) - 1)].clone()
        return self._read_part(array, 0, array.shape[-1] * array.dtype.itemsize, name)

    def pieces(self, name: str) -> Iterator[Tensor]:
        array = self._stored[name]
        if array.code not in _DTYPES or array.code[0] not in "fc":
            return
        with self._reader(array) as read:
            for at in range(0, array.nbytes, _PIECE):
                yield from pieces_of(read(at, min(_PIECE, array.nbytes - at), name))

    def _read_part(self, array: _Stored, at: int, size: int, name: str) -> Tensor:
        """Reads entries in the order of the file, starting at byte `at`."""
        if not size:
            return torch.empty(0, dtype=array.dtype, device="cpu")
        with self._reader(array) as read:
            return read(at, size, name)

    @contextlib.contextmanager
    def _reader(self, array: _Stored) -> Iterator[Callable[[int, int, str], Tensor]]:
        """Yields a function that reads entries in file order, each call at a later byte."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(errors_as_damage(self.path, _KIND, "an array cannot be unpacked"))
            file: IO[bytes] = stack.enter_context(self._open())
            if array.member:
                archive = stack.enter_context(zipfile.ZipFile(file))
                file = stack.enter_context(archive.open(array.member))

            def read(at: int, size: int, name: str) -> Tensor:
                file.seek(array.start + at)
                buffer = memoryview(self._memory_for(size, name))
                done = 0
                while done < size:
                    if not (count := file.readinto(buffer[done:])):  # type: ignore[attr-defined]
                        raise DamagedError("an array ends before its last entry")
                    done += count
                return _native(torch.frombuffer(buffer, dtype=array.dtype), array)

            yield read


class Array(_NumPy):
    """A .npy file. Its array has the name of the file without the ending."""

    endings = (_ENDING,)
    kind = "a NumPy array"
    not_copied = "it is a NumPy array, which wellcond only reads; " + _CONVERT.format(
        "{'weight': numpy.ascontiguousarray(numpy.load(path))}"
    )

    def _find_arrays(self) -> None:
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            array = _read_header(file)
        if array.code not in _OTHERS:
            left = size - array.start - array.nbytes
            if left < 0:
                raise DamagedError(f"it must contain {size - left:,} bytes, but contains {size:,}")
            if left:
                raise UnreadableError(
                    f"{self.path} must contain one array, but {left:,} bytes follow it. Save "
                    "several arrays with numpy.savez."
                )
        self._add(self.path.stem, array)


class Arrays(_NumPy):
    """A .npz file: an archive of arrays, stored or compressed."""

    endings = (".npz",)
    kind = "a NumPy archive"
    not_copied = "it is a NumPy archive, which wellcond only reads; " + _CONVERT.format(
        "{n: numpy.ascontiguousarray(a) for n, a in numpy.load(path).items()}"
    )

    def _find_arrays(self) -> None:
        whole = Extent.whole(self.path)
        with self.path.open("rb") as file, zipfile.ZipFile(file) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
            check_unpacked(whole, infos, "numpy.savez")
            found = {info.filename.removesuffix(_ENDING): info for info in infos}
            if len(found) < len(infos):
                raise DamagedError("two of its arrays have the same name")
            if found.keys() >= _SPARSE:
                raise NoTensorsError(
                    f"{self.path} must contain dense arrays, but is a sparse SciPy matrix. Save it "
                    "as a dense one: numpy.savez(other, w=scipy.sparse.load_npz(path).toarray())."
                )
            for name, info in found.items():
                self._read_member(archive, info, name, whole)

    def _read_member(
        self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, whole: Extent
    ) -> None:
        if info.flag_bits & 1:
            raise DamagedError("its arrays are encrypted")
        with archive.open(info) as member:
            begin = member.read(len(_MAGIC))
            if begin != _MAGIC:
                if info.filename.endswith(_ENDING):
                    raise DamagedError("one of its arrays has no header")
                self.others[name] = Skipped(Reason.no_tensors)
                return
            array = _read_header(member, begin)
        if array.code in _OTHERS:
            self._add(name, array)
            return
        if array.start + array.nbytes != info.file_size:
            raise DamagedError("the size of an array differs from that of its entries")
        if info.compress_type:
            self._add(name, replace(array, member=info.filename))
            return
        with self.path.open("rb") as file:
            start = find_start(file, whole, info)
        self._add(name, replace(array, start=start + array.start))


def _native(flat: Tensor, array: _Stored) -> Tensor:
    """Returns the entries in the byte order of this machine."""
    if array.swapped:
        flat.untyped_storage().byteswap(array.dtype)  # type: ignore[no-untyped-call]
    return flat


def _read_header(file: IO[bytes], begin: bytes = b"") -> _Stored:
    """Reads the header of an array, after the bytes `begin`.

    Any exception means that the file is damaged.
    """
    begin += file.read(8 - len(begin))
    if begin[:6] != _MAGIC:
        raise DamagedError("it does not begin like a NumPy array" if begin else "it is empty")
    version = tuple(begin[6:])
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise DamagedError("its format version is not 1.0, 2.0 or 3.0")
    width = 2 if version == (1, 0) else 4
    length = int.from_bytes(file.read(width), "little")
    if length > _HEADER:
        raise DamagedError(f"a header has more than {_HEADER:,} bytes")
    text = file.read(length)
    if len(text) != length:
        raise DamagedError("a header is truncated")
    descr, fortran, shape = _parse(text.decode("utf-8" if version == (3, 0) else "latin-1"))
    at = 8 + width + length
    if not isinstance(descr, str):
        return _Stored(shape, _RECORDS, fortran, False, at)
    order, code = descr[:1], re.sub(r"\[\w+\]$", "", descr[1:])  # removes the unit of dates
    if code in ("O", "O8", "O4"):
        return _Stored(shape, _OBJECTS, fortran, False, at)
    if order not in ("<", ">", "|") or not re.fullmatch(r"[biufcmMSUV]\d{1,9}", code):
        raise DamagedError("a dtype is not a NumPy dtype")
    other = order != "|" and (order == "<") != (sys.byteorder == "little")
    swapped = other and code in _DTYPES and _DTYPES[code].itemsize > 1
    return _Stored(shape, code, fortran, swapped, at)


def _parse(text: str) -> tuple[Any, bool, tuple[int, ...]]:
    text = re.sub(r"(?<=\d)L\b", "", text)  # integers of Python 2
    try:
        header = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise DamagedError("a header is not a Python literal") from None
    if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
        raise DamagedError("a header does not contain exactly dtype, order and shape")
    descr, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
    # A tuple is a dtype with its own shape.
    if not (isinstance(descr, str | list | tuple) and type(fortran) is bool and is_shape(shape)):
        raise DamagedError("a header has no valid dtype, order or shape")
    return descr, fortran, shape
