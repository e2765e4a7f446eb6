"""Where torch keeps pickles and storages: in the records of a zip archive, or one after the other.

Since torch 1.6 a file of torch.save is a zip archive with a record for each storage, as the
programs of torch.jit and torch.export are, and before that pickles with the storages behind them.
Only zip archives that torch reads in the same way are read here.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from wellcond.files.inert import Storage, Unpickler
from wellcond.files.tensors import DamagedError, UnreadableError, damaged
from wellcond.text import list_some

# How many bytes may be unpacked: of all records, in any case and for each byte of the file; and of
# the pickle in any case. What is unpickled takes up to a hundred times the bytes of the pickle.
_UNPACKED, _RATIO, _PICKLE = 64 << 20, 20, 4 << 20
# The number with which a file of torch before 1.6 begins, within its first pickle.
_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_CHUNK = 1 << 20
_KIND = "file of torch.save"
_NO_PICKLE = (
    "If it was cut off while it was written, save it again: torch.save(model.state_dict(), path); "
    "if it is of another program, convert it there."
)


@dataclass(frozen=True)
class Extent:
    """The bytes of a file that torch.save wrote: all of them, or a part of many such files.

    Attributes:
        part: whether there are others in the file.
    """

    path: Path
    start: int
    size: int
    part: bool = True

    @classmethod
    def whole(cls, path: Path) -> Extent:
        """All bytes of a file."""
        return cls(path, 0, path.stat().st_size, part=False)

    def open(self) -> IO[bytes]:
        """These bytes as a file of their own."""
        file = self.path.open("rb")
        return io.BufferedReader(_Part(file, self.start, self.size)) if self.part else file


class _Part(io.RawIOBase):
    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if origin + offset < 0:
            raise OSError("the place lies before the beginning")
        self._at = origin + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        left = max(0, self._size - self._at)
        read = int(self._file.readinto(memoryview(buffer)[:left]))  # type: ignore[attr-defined]
        self._at += read
        return read

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass(frozen=True)
class Region:
    """The bytes of a storage: where they begin in the file, and the record, if it is compressed."""

    start: int
    size: int
    compressed: str = ""


@dataclass(frozen=True)
class Saved:
    """The content of a file, with tensors that are not read yet, and the storages of these.

    Attributes:
        swapped: whether its numbers have the byte order of another machine.
    """

    content: Any
    storages: dict[str, Region]
    swapped: bool = False


@contextlib.contextmanager
def errors_as_damage(
    path: Path, kind: str, otherwise: str = "it holds no pickle that is whole"
) -> Iterator[None]:
    """Whatever is raised, the file is to blame: a damaged one can raise anything.

    Raises:
        UnreadableError: anything but an error of the system was raised.
    """
    try:
        yield
    except (OSError, UnreadableError):
        raise
    except MemoryError:
        raise UnreadableError(f"{path} cannot be read: there is not enough memory.") from None
    except (DamagedError, zipfile.BadZipFile, zlib.error) as error:
        raise damaged(path, kind, error) from None
    except Exception:
        what = otherwise if path.stat().st_size else "it is empty"
        raise damaged(path, kind, what) from None


def is_archive(extent: Extent) -> bool:
    """Whether torch takes it for a zip archive."""
    with extent.open() as file:
        return file.read(4) == b"PK\x03\x04"


def load_saved(extent: Extent) -> Saved:
    """Reads all but the storages. Whatever else it raises says that the file is damaged."""
    if is_archive(extent):
        return _load_archive(extent)
    if extent.part:
        raise DamagedError("it is not a zip archive")
    return _load_legacy(extent)


def _load_archive(extent: Extent) -> Saved:
    with open_records(extent, _KIND, "data.pkl", _NO_PICKLE) as records:
        content = records.unpickle("data.pkl", "data")
        regions = records.find_regions()
        storages = {key: regions[key.lower()] for key in records.storages}
        return Saved(content, storages, records.swapped)


def _load_legacy(extent: Extent) -> Saved:
    path, storages = extent.path, {}
    with extent.open() as file:
        start = file.read(64)
        if start[:1] == pickle.PROTO and _MAGIC not in start:
            raise UnreadableError(
                f"{path} must be a file of torch.save, but is a pickle that torch.save did not "
                "write, and loading it could run code. Load it where it was made, and save its "
                "tensors: torch.save(state_dict, other)."
            )
        file.seek(0)
        unpickler = Unpickler(file)
        for _ in range(4):  # a magic number, a version, of what machine, the content
            content = unpickler.load()
        keys, named = unpickler.load(), unpickler.storages
        stored = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
        if not stored or sorted(keys) != sorted(named):
            raise DamagedError("it does not store what it holds")
        needed = sum(8 + storage.stop for storage in named.values())
        if (left := extent.size - file.tell()) < needed:
            raise _differs(path, "its storages", needed, left)
        for key in keys:
            count, length = int.from_bytes(file.read(8), sys.byteorder), named[key].stop
            if count * named[key].dtype.itemsize != length:
                raise DamagedError("the length of a storage is not that of its tensors")
            storages[key] = Region(file.tell(), length)
            file.seek(length, 1)
    return Saved(content, storages)


def read_compressed(path: Path, region: Region) -> bytes:
    """All bytes of a storage that is compressed."""
    with zipfile.ZipFile(path) as archive:
        return archive.read(region.compressed)


def copy_uncompressed(path: Path, target: Path, storages: dict[str, Region]) -> dict[str, Region]:
    """Copies a file, each record that is compressed unpacked; returns where its storages are."""
    if not any(region.compressed for region in storages.values()):
        shutil.copyfile(path, target)
        return storages
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        for record in source.infolist():
            stored = zipfile.ZipInfo(record.filename, record.date_time)
            stored.file_size = record.file_size  # in advance, for the limits of the older format
            with source.open(record) as old, copy.open(stored, "w") as new:
                shutil.copyfileobj(old, new)
    whole = Extent.whole(target)
    with open_records(whole, _KIND, "data.pkl", _NO_PICKLE) as records:
        regions = records.find_regions()
    return {key: regions[key.lower()] for key in storages}


def refresh_checksums(extent: Extent, keys: Collection[str]) -> None:
    """Corrects the check sums of an archive for storages that were overwritten."""
    changed = {key.lower() for key in keys}
    with extent.open() as whole, zipfile.ZipFile(whole) as archive:
        records, at = archive.infolist(), extent.start + archive.start_dir
    with extent.path.open("r+b") as file:
        for record in records:
            file.seek(at)
            entry = file.read(46)
            if _inner(record) in changed:
                header = extent.start + record.header_offset
                start = _data_start(file, header)
                checksum = _checksum(file, start, record.file_size)
                places = [at + 16, header + 14]
                if record.flag_bits & 8:  # a descriptor follows the bytes, and the header has zeros
                    file.seek(start + record.file_size)
                    places[1] = start + record.file_size + 4 * (file.read(4) == b"PK\x07\x08")
                for place in places:
                    file.seek(place)
                    file.write(checksum)
            at += 46 + sum(struct.unpack("<3H", entry[28:34]))


class Records:
    """The records of a zip archive of torch, by what they are called in its folder.

    Attributes:
        storages: the storages that were named by pickles so far, by their records.
        swapped: whether its numbers have the byte order of another machine.
    """

    def __init__(
        self, extent: Extent, archive: zipfile.ZipFile, infos: dict[str, zipfile.ZipInfo]
    ) -> None:
        self._extent, self._archive, self._infos = extent, archive, infos
        self.storages: dict[str, Storage] = {}
        order = self.read("byteorder") if "byteorder" in self else b"little"
        if order not in (b"little", b"big"):
            raise DamagedError("the order of the bytes in its numbers is not known")
        self.swapped = order.decode() != sys.byteorder

    def __contains__(self, name: str) -> bool:
        return name.lower() in self._infos

    def __iter__(self) -> Iterator[str]:
        return (record.filename.partition("/")[2] for record in self._infos.values())

    def size(self, name: str) -> int:
        """The bytes of a record, 0 of one that is not there."""
        record = self._infos.get(name.lower())
        return record.file_size if record else 0

    def read(self, name: str) -> bytes:
        """All bytes of a record, which must be small."""
        return self._archive.read(self._infos[name.lower()])

    def unpickle(self, name: str, folder: str) -> Any:
        """The content of a pickle, with tensors that are not read yet.

        Args:
            name: of the record.
            folder: in which the storages lie that the pickle names.
        """
        if self.size(name) > max(_PICKLE, self._extent.size):
            raise DamagedError("its pickle would unpack to more than the file holds")
        with self._archive.open(self._infos[name.lower()]) as file:
            unpickler = Unpickler(io.BufferedReader(file), f"{folder}/")  # type: ignore[type-var]
            content = unpickler.load()
        for key, storage in unpickler.storages.items():
            if storage.stop != self.size(key):
                what = f"storage {key.rpartition('/')[2]}"
                raise _differs(self._extent.path, what, storage.stop, self.size(key))
            record = self._infos.get(key.lower())
            if record and record.compress_type:  # of which the check sum says whether it is whole
                with self._archive.open(record) as file:
                    while file.read(_CHUNK):
                        pass
        self.storages |= unpickler.storages
        return content

    def find_regions(self) -> dict[str, Region]:
        """Where the bytes of each record are."""
        regions = {}
        with self._extent.path.open("rb") as file:
            for name, record in self._infos.items():
                start = find_start(file, self._extent, record)
                compressed = record.filename if record.compress_type else ""
                regions[name] = Region(start, record.file_size, compressed)
        return regions


@contextlib.contextmanager
def open_records(extent: Extent, kind: str, needed: str, way_out: str) -> Iterator[Records]:
    """Opens a zip archive of torch.

    Args:
        extent: its bytes.
        kind: what it must be, such as "file of torch.save".
        needed: the record that makes it one. way_out: what to do with an archive without it.

    Raises:
        UnreadableError: it is another archive, or is not whole.
        DamagedError: torch may read it in another way, or not at all.
    """
    with extent.open() as file:
        try:
            archive = zipfile.ZipFile(file)
        except OSError:
            raise
        except Exception:  # what a damaged directory of the archive leads to
            raise UnreadableError(
                f"{extent.path} must be a whole {kind}, but is a damaged zip archive. "
                "Compare its size with the original's, or fetch it again."
            ) from None
        with archive:
            infos = archive.infolist()
            check_unpacked(extent, infos, "torch.save")
            records = {_inner(info): info for info in infos}
            if min((info.header_offset for info in infos), default=0):
                # Such as the end of a larger one that was cut off, within which it lay.
                raise DamagedError("its zip archive does not begin with a record")
            if needed not in records:
                found = list_some((info.filename for info in infos), limit=2)
                raise UnreadableError(
                    f"{extent.path} must be a {kind}, but is a zip archive without {needed}: it "
                    f"holds {found}. {way_out}"
                )
            _check(extent, infos)
            yield Records(extent, archive, records)


def check_unpacked(extent: Extent, infos: Collection[zipfile.ZipInfo], writer: str) -> None:
    """Raises if the records of an archive would unpack to much more than the file holds."""
    unpacked, packed = sum(info.file_size for info in infos), extent.size
    if unpacked > max(_UNPACKED, _RATIO * packed):
        raise UnreadableError(
            f"{extent.path} would unpack from {packed:,} to {unpacked:,} bytes, which no weights "
            f"do. If you trust it, load it and save it again: {writer} does not compress."
        )


def _check(extent: Extent, infos: list[zipfile.ZipInfo]) -> None:
    """Raises for what is read in two ways: torch might load one, and the other be looked at."""
    if len({*map(_inner, infos)}) < len(infos):
        raise DamagedError("two of its records have the same name")
    if len({info.filename.partition("/")[0] for info in infos}) > 1:
        raise DamagedError("its records are in several folders")
    if any(info.flag_bits & 1 for info in infos):
        raise DamagedError("its records are encrypted")
    # Of many parts each could unpack to a thousand times its size.
    if extent.part and any(info.compress_type for info in infos):
        raise DamagedError("its records are compressed, which torch.save does not do")


def _inner(record: zipfile.ZipInfo) -> str:
    """The name of a record in the folder of the archive; torch does not regard its case."""
    return record.filename.partition("/")[2].lower()


def find_start(file: IO[bytes], whole: Extent, record: zipfile.ZipInfo) -> int:
    """Where in a file the bytes of a record of an archive begin.

    Raises:
        DamagedError: they end after the archive, or are not as many as the record says.
    """
    start = _data_start(file, whole.start + record.header_offset)
    differs = not record.compress_type and record.compress_size != record.file_size
    if differs or start + record.compress_size > whole.start + whole.size:
        raise DamagedError("its records go beyond its end")
    return start


def _data_start(file: IO[bytes], header: int) -> int:
    """Where the bytes of a record begin, the header of which begins here."""
    file.seek(header + 26)
    name, extra = struct.unpack("<2H", file.read(4))
    return header + 30 + int(name) + int(extra)


def _checksum(file: IO[bytes], start: int, length: int) -> bytes:
    """The CRC-32 of these bytes as an archive has it."""
    file.seek(start)
    value = 0
    while length > 0 and (piece := file.read(min(length, _CHUNK))):
        value = zlib.crc32(piece, value)
        length -= len(piece)
    return struct.pack("<I", value)


def _differs(path: Path, what: str, wanted: int, found: int) -> UnreadableError:
    return UnreadableError(
        f"{path} must hold {wanted:,} bytes for {what}, but holds {found:,}. "
        "It is damaged: fetch it again."
    )
