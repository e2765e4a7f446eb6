"""Reads the groups and arrays of an HDF5 file, and nothing outside of it.

An HDF5 link may lead to another file, an array may keep its values in another file, and an array
that stores nothing may have any shape. wellcond follows or reads none of these. It reads the rest
with h5py, which it imports when it opens a file.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wellcond.files.archive import Extent
from wellcond.files.extras import import_extra
from wellcond.files.tensors import DamagedError, Rows, UnreadableError, damaged

KIND = "HDF5 file"
_DEPTH = 100
_TEXT = 64 << 20  # bytes of an attribute
# Limits on unpacked bytes: a constant, and a multiple of the size of the file.
_UNPACKED, _RATIO = 64 << 20, 20
# Deflate, shuffle, Fletcher32, szip, n-bit, scale-offset, and LZF of h5py. For other filters, HDF5
# would load and run code from a folder of plugins.
_FILTERS = {*range(1, 7), 32000}
_NOT_FOLLOWED = "a soft or external link, which is not followed"
_ELSEWHERE = "its values are in another file, which is not opened"
_REPEATED = "a second link to an array of this file"


@dataclass(frozen=True)
class Array:
    """An array.

    Attributes:
        path: the path within the file.
        dtype: the dtype as in `Entry`.
        without: why the values cannot be read; "" if they can.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    without: str = ""


@dataclass(frozen=True)
class Group:
    """A group: its string attributes, and its groups and arrays by name."""

    path: str = ""
    texts: dict[str, str] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    arrays: dict[str, Array] = field(default_factory=dict)

    def below(self) -> Iterator[Array]:
        """Yields all arrays in the group and in the groups below it."""
        yield from self.arrays.values()
        for group in self.groups.values():
            yield from group.below()


@contextmanager
def open_hdf5(extent: Extent) -> Iterator[Any]:
    """Opens these bytes with h5py.

    Raises:
        UnreadableError: h5py is not installed, or a read fails while the file is open.
    """
    h5py = import_extra("h5py", extent.path, "an HDF5 file")
    try:
        with extent.open() as bytes_, h5py.File(bytes_, "r") as file:
            yield file
    except UnreadableError:
        raise
    except MemoryError:
        raise UnreadableError(
            f"{extent.path} cannot be read, because there is not enough memory. Use a machine with "
            "more memory."
        ) from None
    except DamagedError as error:
        raise damaged(extent.path, KIND, error) from None
    except Exception:  # h5py can raise anything for bytes that no writer leaves
        what = "h5py cannot read it" if extent.size else "it is empty"
        raise damaged(extent.path, KIND, what) from None


def read_tree(extent: Extent, attributes: Collection[str]) -> Group:
    """Reads the groups, arrays and the named string attributes of a file, without array values."""
    with open_hdf5(extent) as file:
        return _Walk(extent, attributes).group(file, "", 0)


class _Walk:
    def __init__(self, extent: Extent, attributes: Collection[str]) -> None:
        self._extent, self._attributes = extent, attributes
        self._h5py = import_extra("h5py", extent.path, "an HDF5 file")
        self._seen: set[int] = set()
        self._bytes = 0

    def group(self, group: Any, path: str, depth: int) -> Group:
        if depth > _DEPTH:
            raise DamagedError(f"its groups are nested more than {_DEPTH} levels deep")
        found = Group(path, self._texts(group))
        for name in group:
            inner = f"{path}/{name}".lstrip("/")
            link = group.get(name, getlink=True)
            if not isinstance(link, self._h5py.HardLink):
                found.arrays[name] = Array(inner, (), "", _NOT_FOLLOWED)
                continue
            one = group[name]
            address = self._h5py.h5o.get_info(one.id).addr
            repeated = address in self._seen
            self._seen.add(address)
            if isinstance(one, self._h5py.Dataset):
                found.arrays[name] = self._array(one, inner, repeated)
            elif isinstance(one, self._h5py.Group) and not repeated:
                found.groups[name] = self.group(one, inner, depth + 1)
        return found

    def _array(self, dataset: Any, path: str, repeated: bool) -> Array:
        shape = tuple(map(int, dataset.shape or (() if dataset.shape == () else (0,))))
        dtype, without = _name_of(dataset), ""
        if repeated:
            without = _REPEATED
        elif dataset.is_virtual or dataset.external:
            without = _ELSEWHERE
        elif math.prod(shape):
            size, stored = self._unpacked(dataset, shape), dataset.id.get_storage_size()
            filters = _filters_of(dataset)
            if not filters <= _FILTERS:
                without = "compressed with a filter that is not read"
            elif not filters and stored < math.prod(shape) * dataset.dtype.itemsize:
                without = f"only {stored:,} of {size:,} bytes are stored"
            elif dtype:
                self._count(size)
        return Array(path, shape, dtype or str(dataset.dtype), without)

    def _unpacked(self, dataset: Any, shape: tuple[int, ...]) -> int:
        """Returns the bytes that a read of the array unpacks, which consist of entire chunks."""
        lengths = zip(shape, dataset.chunks or (1,) * len(shape), strict=True)
        sides = [int(-(-length // chunk) * chunk) for length, chunk in lengths]
        return math.prod(sides) * int(dataset.dtype.itemsize)

    def _count(self, size: int) -> None:
        self._bytes += size
        if self._bytes > max(_UNPACKED, _RATIO * self._extent.size):
            raise UnreadableError(
                f"{self._extent.path} would unpack from {self._extent.size:,} to at least "
                f"{self._bytes:,} bytes, but weights do not compress so well, so it may be an "
                "attack. If you trust the file, load it and save it again without compression."
            )

    def _texts(self, group: Any) -> dict[str, str]:
        """Returns the requested attributes; "" for an attribute that is not a single string.

        Lists are not read, because all strings of a list could be the same bytes of the file.
        """
        texts: dict[str, str] = {}
        for name in self._attributes:
            if name not in group.attrs:
                continue
            about = group.attrs.get_id(name)
            size = max(about.get_storage_size(), about.dtype.itemsize)
            single = about.shape == () and about.dtype.kind in "SO"
            readable = single and size <= min(_TEXT, self._extent.size)
            texts[name] = _decode(group.attrs[name]) if readable else ""
        return texts


def _decode(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return str(value) if isinstance(value, str) else ""


def _filters_of(dataset: Any) -> set[int]:
    """Returns the numbers of the filters of an array, such as compression."""
    settings = dataset.id.get_create_plist()
    return {int(settings.get_filter(i)[0]) for i in range(settings.get_nfilters())}


def _name_of(dataset: Any) -> str:
    """Returns the dtype; "" if it is not numeric."""
    dtype = dataset.dtype
    if (
        dtype.kind == "V"
        and dtype.itemsize == 2
        and _decode(dataset.attrs.get("dtype")) == BFLOAT16
    ):
        return BFLOAT16
    return str(dtype.name) if dtype.kind in "fiuc" else "bool" if dtype.kind == "b" else ""


BFLOAT16 = "bfloat16"  # HDF5 lacks this type: Keras stores two bytes and the attribute `dtype`


def read_array(file: Any, array: Array, buffer: bytearray, rows: Rows | None) -> Tensor:
    """Reads the entries of an array, or its rows start to stop, into a buffer of this length."""
    shape = array.shape if rows is None else (rows[1] - rows[0], *array.shape[1:])
    dtype = getattr(torch, array.dtype)
    flat = torch.frombuffer(buffer, dtype=dtype)
    as_stored = (
        flat.view(torch.int16).numpy().view("V2") if array.dtype == BFLOAT16 else flat.numpy()
    )
    if shape:
        selection = None if rows is None else slice(*rows)
        file[array.path].read_direct(as_stored.reshape(shape), selection)
    else:
        as_stored[0] = file[array.path][()]
    return flat.reshape(shape)
