"""What is asked of a file of torch.save before torch loads it: that it is whole, and no bomb.

A few bytes of a pickle can stand for any number of copies of one another, and torch would make
them all.
"""

from __future__ import annotations

import bisect
import pickle
import struct
import zipfile
import zlib
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import IO, Any, ClassVar

import torch

from wellcond.files.tensors import UnreadableError
from wellcond.text import and_more

# How many bytes may be unpacked in any case, and for each byte of the file.
_UNPACKED, _RATIO = 64 << 20, 20
# The number with which a file of torch before 1.6 begins, within its first pickle.
_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")


def is_archive(path: Path) -> bool:
    """Whether it is a zip archive, as since torch 1.6; by what torch goes by."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def can_be_mapped(path: Path) -> bool:
    """Whether it is an archive that was not compressed after torch wrote it."""
    if not is_archive(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception:  # what a damaged directory of the archive leads to
        raise UnreadableError(
            f"{path} must be a whole file of torch.save, but is a damaged zip archive. "
            "Compare its size with the original's, or fetch it again."
        ) from None
    unpacked, packed = sum(record.file_size for record in records), path.stat().st_size
    if unpacked > max(_UNPACKED, _RATIO * packed):
        raise UnreadableError(
            f"{path} would unpack from {packed:,} to {unpacked:,} bytes, which no weights do. "
            "If you trust it, load it and save it again: torch.save does not compress."
        )
    names = [record.filename for record in records]
    if not any(_inner(name) == "data.pkl" for name in names):
        raise UnreadableError(
            f"{path} must be a file of torch.save, but is a zip archive without data.pkl: it holds "
            f"{and_more(names, limit=2)}. If it was cut off while it was written, save it again: "
            "torch.save(model.state_dict(), path); if it is of another program, convert it there."
        )
    return all(record.compress_type == zipfile.ZIP_STORED for record in records)


def _inner(name: str) -> str:
    """The name of a record below the folder of the archive; case is nothing to torch."""
    return name.partition("/")[2].lower()


def check_pickle(path: Path) -> None:
    """Raises if its storages are not stored whole, or if to load it would take too much.

    Whatever else it raises says that the pickle is damaged.
    """
    if not is_archive(path):
        with path.open("rb") as file:
            size = path.stat().st_size
            if (start := file.read(64))[:1] == pickle.PROTO and _MAGIC not in start:
                raise UnreadableError(
                    f"{path} must be a file of torch.save, but is a pickle that it did not write, "
                    "and to load such a one could run code. Load it where it was made, and save "
                    "its tensors: torch.save(state_dict, other)."
                )
            file.seek(0)
            wanted = _Storages(path, file, size, legacy=True)
            for _ in range(4):  # a magic number, a version, of what machine, the content
                wanted.load()
            stored = wanted.load()
            if sorted(stored) != sorted(wanted.sizes):  # else torch leaves memory as it found it
                raise ValueError("it does not store what it holds")
            # A number of eight bytes before each.
            needed = sum(8 + length for length in wanted.sizes.values())
            if (left := size - file.tell()) < needed:
                raise _differs(path, "its storages", needed, left)
        return
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        sizes = {_inner(record.filename): record.file_size for record in records}
        if len(sizes) < len(records):
            raise ValueError("two of its records have the same name")
        (pickled,) = [record for record in records if _inner(record.filename) == "data.pkl"]
        with archive.open(pickled) as file:
            wanted = _Storages(path, file, pickled.file_size)
            wanted.load()
    for key, size in wanted.sizes.items():
        found = sizes.get(f"data/{key}".lower(), 0)
        if size != found:  # of a shorter one, what follows it would be mapped, too
            raise _differs(path, f"storage {key}", size, found)


def _differs(path: Path, what: str, wanted: int, found: int) -> UnreadableError:
    return UnreadableError(
        f"{path} must hold {wanted:,} bytes for {what}, but holds {found:,}. "
        "It is damaged: fetch it again."
    )


def dtype_of_storage(name: str) -> torch.dtype:
    """By the name of its class, such as FloatStorage; an UntypedStorage consists of bytes."""
    dtype = getattr(vars(torch).get(name), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.uint8


def data_start(file: IO[bytes], record: zipfile.ZipInfo) -> int:
    """Where the bytes of a record begin that is not compressed."""
    file.seek(record.header_offset + 26)
    name, extra = struct.unpack("<2H", file.read(4))
    return record.header_offset + 30 + int(name) + int(extra)


def refresh_checksums(path: Path, changed: Collection[int]) -> None:
    """Corrects the check sums of the records in which bytes at these places were overwritten."""
    changed = sorted(changed)
    with zipfile.ZipFile(path) as archive:
        records, at = archive.infolist(), archive.start_dir
    with path.open("r+b") as file:
        for record in records:
            file.seek(at)
            entry = file.read(46)
            start = data_start(file, record)
            first = bisect.bisect_left(changed, start)
            if first < len(changed) and changed[first] < start + record.file_size:
                checksum = _checksum(file, start, record.file_size)
                places = [at + 16, record.header_offset + 14]
                if record.flag_bits & 8:  # a descriptor follows the bytes, and the header has zeros
                    file.seek(start + record.file_size)
                    places[1] = start + record.file_size + 4 * (file.read(4) == b"PK\x07\x08")
                for place in places:
                    file.seek(place)
                    file.write(checksum)
            at += 46 + sum(struct.unpack("<3H", entry[28:34]))


def _checksum(file: IO[bytes], start: int, length: int) -> bytes:
    """The CRC-32 of these bytes as an archive has it."""
    file.seek(start)
    value = 0
    while length > 0 and (piece := file.read(min(length, 1 << 20))):
        value = zlib.crc32(piece, value)
        length -= len(piece)
    return struct.pack("<I", value)


class _Tuple(tuple[Any, ...]):
    """A tuple that knows how many things are in it, and in what is in it."""

    size: int


class _Anything:
    """Stands for whatever a pickle names: takes everything, does nothing."""

    unpickler: _Storages
    size = 1

    def __new__(cls, *args: Any, **more: Any) -> _Anything:
        name, made = cls.__name__, super().__new__(cls)
        numbers = any(isinstance(arg, int) for arg in args)
        in_torch = cls.__module__.split(".")[0] == "torch"
        # Nothing that is saved is made by these; `bytearray` and tensors take a length, and an
        # encoding may be one that doubles it.
        if (
            (in_torch and args and name.endswith(("Tensor", "Storage")))
            or (numbers and name == "bytearray")
            or (name == "encode" and not isinstance(args[0], str))
            or name == "_rebuild_device_tensor_from_cpu_tensor"
            # Its shape is in storages, and of the older format these are read later.
            or (name == "_rebuild_nested_tensor" and cls.unpickler.legacy)
            or (name == "_rebuild_from_type_v2" and not args[0].__name__.startswith("_rebuild"))
        ):
            raise UnreadableError(
                f"{cls.unpickler.path} must hold what torch.save writes, but calls {name} as "
                "that never does. It is damaged, or was made to do harm."
            )
        made.size = cls.unpickler.counted(args)
        return made

    def __init__(self, *args: Any, **more: Any) -> None: ...
    def __call__(self, *args: Any) -> _Anything:
        return type(self)(*args)

    def __setstate__(self, state: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None:
        self.size += 1

    def append(self, item: Any) -> None: ...
    def add(self, item: Any) -> None: ...


def _size(value: Any, depth: int = 2) -> int:
    """How many things are copied, hashed or printed with it."""
    if isinstance(value, _Tuple | _Anything):
        return value.size
    if isinstance(value, list | dict) and depth:
        return 1 + sum(_size(item, depth - 1) for item in value)
    return 1 + len(value) if isinstance(value, str | bytes | list | dict) else 1


class _Storages(pickle._Unpickler):
    """Which storages a pickle wants, and their bytes; nothing that it names is looked up or run.

    In Python, because the one in C allocates for whatever index the pickle may name.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, path: Path, file: IO[bytes], length: int, legacy: bool = False) -> None:
        super().__init__(file)
        self.path, self.legacy = path, legacy
        self.budget = max(_UNPACKED, _RATIO * length)
        self.sizes: dict[str, int] = {}

    def counted(self, value: Any) -> int:
        """The size of it, taken from the budget."""
        size = 1 + sum(map(_size, value))
        self.budget -= size
        if self.budget < 0:
            raise UnreadableError(
                f"{self.path} must be about as long as what it holds, but a small part of it is "
                "repeated without end. It is damaged, or was made to do harm."
            )
        return size

    def find_class(self, module: str, name: str) -> type[_Anything]:
        return type(name, (_Anything,), {"unpickler": self, "__module__": module})

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("names must be written out")

    def persistent_load(self, saved: Any) -> Any:
        if saved[0] in ("module", b"module"):  # of a whole model, before torch 1.6: with its source
            return saved[1]
        _, kind, key, _, count, *_ = saved
        itemsize = dtype_of_storage(kind.__name__).itemsize
        if not (isinstance(key, str) and isinstance(count, int)):
            raise TypeError("a storage must have a name and a length")
        self.sizes[key] = max(self.sizes.get(key, 0), count * itemsize)
        return object.__new__(_Anything)

    # Tuples can be keys. What is shared in them is hashed each time, and so is the key.

    def _tuple(self: Any, instruction: int) -> None:
        pickle._Unpickler.dispatch[instruction](self)
        made = _Tuple(self.stack[-1])
        made.size = self.counted(made)
        self.stack[-1] = made

    def _item(self: Any) -> None:
        self.counted(self.stack[-2:-1])
        pickle._Unpickler.dispatch[pickle.SETITEM[0]](self)

    def _items(self: Any) -> None:
        self.counted(self.stack[::2])
        pickle._Unpickler.dispatch[pickle.SETITEMS[0]](self)

    for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
        dispatch[_code[0]] = partial(_tuple, instruction=_code[0])
    dispatch[pickle.SETITEM[0]], dispatch[pickle.SETITEMS[0]] = _item, _items
