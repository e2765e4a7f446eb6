"""Finds the pickles and storages in a file of torch: a zip archive, or pickles and raw bytes.

Since torch 1.6, torch.save writes a zip archive with one record per storage, like torch.jit and
torch.export. Before, it wrote pickles followed by the storages. wellcond reads only zip archives
that it reads exactly like torch.
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

# Limits on unpacked bytes: for all records, a constant and a multiple of the size of the file; for
# the pickle, a constant. Unpickled objects need up to a hundred times the bytes of the pickle.
_UNPACKED, _RATIO, _PICKLE = 64 << 20, 20, 4 << 20
# The number in the first pickle of a file of torch before 1.6.
_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
_CHUNK = 1 << 20
_KIND = "torch.save file"
_NO_PICKLE = (
    "If it was truncated while it was written, save it again: torch.save(model.state_dict(), "
    "path). If another program wrote it, convert it with that program."
)


@dataclass(frozen=True)
class Extent:
    """The bytes that torch.save wrote: an entire file, or a part of a file.

    Attributes:
        part: whether the file contains other bytes.
    """

    path: Path
    start: int
    size: int
    part: bool = True

    @classmethod
    def whole(cls, path: Path) -> Extent:
        """Returns the extent of an entire file."""
        return cls(path, 0, path.stat().st_size, part=False)

    def open(self) -> IO[bytes]:
        """Opens these bytes as a separate file."""
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
            raise OSError("the position is before the beginning of the file")
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
    """The bytes of a storage: their start in the file, and the record if it is compressed."""

    start: int
    size: int
    compressed: str = ""


@dataclass(frozen=True)
class Saved:
    """The content of a file, with tensors that are not read yet, and their storages.

    Attributes:
        swapped: whether the byte order of its numbers differs from that of this machine.
    """

    content: Any
    storages: dict[str, Region]
    swapped: bool = False


@contextlib.contextmanager
def errors_as_damage(
    path: Path, kind: str, otherwise: str = "it contains no complete pickle"
) -> Iterator[None]:
    """Reports every exception as damage of the file, because a damaged file can raise anything.

    Raises:
        UnreadableError: the block raised an exception other than OSError.
    """
    try:
        yield
    except (OSError, UnreadableError):
        raise
    except MemoryError:
        raise UnreadableError(
            f"{path} cannot be read, because there is not enough memory. Use a machine with more "
            "memory."
        ) from None
    except (DamagedError, zipfile.BadZipFile, zlib.error) as error:
        raise damaged(path, kind, error) from None
    except Exception:
        what = otherwise if path.stat().st_size else "it is empty"
        raise damaged(path, kind, what) from None


def is_archive(extent: Extent) -> bool:
    """Returns whether torch treats the file as a zip archive."""
    with extent.open() as file:
        return file.read(4) == b"PK\x03\x04"


def load_saved(extent: Extent) -> Saved:
    """Reads everything except the storages. Exceptions other than OSError mean a damaged file."""
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
                f"{path} must be a torch.save file, but is a pickle that torch.save did not write, "
                "and loading it could run code. Load it where it was made, and save its tensors: "
                "torch.save(state_dict, other)."
            )
        file.seek(0)
        unpickler = Unpickler(file)
        for _ in range(4):  # a magic number, a version, the byte order, the content
            content = unpickler.load()
        keys, named = unpickler.load(), unpickler.storages
        stored = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
        if not stored or sorted(keys) != sorted(named):
            raise DamagedError("its storages are not those of its tensors")
        needed = sum(8 + storage.stop for storage in named.values())
        if (left := extent.size - file.tell()) < needed:
            raise _differs(path, "its storages", needed, left)
        for key in keys:
            count, length = int.from_bytes(file.read(8), sys.byteorder), named[key].stop
            if count * named[key].dtype.itemsize != length:
                raise DamagedError("the length of a storage differs from that of its tensors")
            storages[key] = Region(file.tell(), length)
            file.seek(length, 1)
    return Saved(content, storages)


def read_compressed(path: Path, region: Region) -> bytes:
    """Returns all bytes of a compressed storage."""
    with zipfile.ZipFile(path) as archive:
        return archive.read(region.compressed)


def copy_uncompressed(path: Path, target: Path, storages: dict[str, Region]) -> dict[str, Region]:
    """Copies a file with its compressed records unpacked; returns the regions of its storages."""
    if not any(region.compressed for region in storages.values()):
        shutil.copyfile(path, target)
        return storages
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        for record in source.infolist():
            stored = zipfile.ZipInfo(record.filename, record.date_time)
            stored.file_size = record.file_size  # given in advance, so that ZIP64 is chosen
            with source.open(record) as old, copy.open(stored, "w") as new:
                shutil.copyfileobj(old, new)
    whole = Extent.whole(target)
    with open_records(whole, _KIND, "data.pkl", _NO_PICKLE) as records:
        regions = records.find_regions()
    return {key: regions[key.lower()] for key in storages}


def refresh_checksums(extent: Extent, keys: Collection[str]) -> None:
    """Corrects the checksums of an archive for storages that were overwritten."""
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
                if record.flag_bits & 8:  # a descriptor after the bytes replaces the header
                    file.seek(start + record.file_size)
                    places[1] = start + record.file_size + 4 * (file.read(4) == b"PK\x07\x08")
                for place in places:
                    file.seek(place)
                    file.write(checksum)
            at += 46 + sum(struct.unpack("<3H", entry[28:34]))


class Records:
    """The records of a zip archive of torch, by their names in its folder.

    Attributes:
        storages: the storages that the pickles read so far name, by their records.
        swapped: whether the byte order of its numbers differs from that of this machine.
    """

    def __init__(
        self, extent: Extent, archive: zipfile.ZipFile, infos: dict[str, zipfile.ZipInfo]
    ) -> None:
        self._extent, self._archive, self._infos = extent, archive, infos
        self.storages: dict[str, Storage] = {}
        order = self.read("byteorder") if "byteorder" in self else b"little"
        if order not in (b"little", b"big"):
            raise DamagedError("its record byteorder must be little or big")
        self.swapped = order.decode() != sys.byteorder

    def __contains__(self, name: str) -> bool:
        return name.lower() in self._infos

    def __iter__(self) -> Iterator[str]:
        return (record.filename.partition("/")[2] for record in self._infos.values())

    def size(self, name: str) -> int:
        """Returns the number of bytes of a record, 0 if it does not exist."""
        record = self._infos.get(name.lower())
        return record.file_size if record else 0

    def read(self, name: str) -> bytes:
        """Returns all bytes of a record, which must be small."""
        return self._archive.read(self._infos[name.lower()])

    def unpickle(self, name: str, folder: str) -> Any:
        """Returns the content of a pickle, with tensors that are not read yet.

        Args:
            name: the name of the record.
            folder: the folder of the storages that the pickle names.
        """
        if self.size(name) > max(_PICKLE, self._extent.size):
            raise DamagedError("its pickle would unpack to more bytes than the file has")
        with self._archive.open(self._infos[name.lower()]) as file:
            unpickler = Unpickler(io.BufferedReader(file), f"{folder}/")  # type: ignore[type-var]
            content = unpickler.load()
        for key, storage in unpickler.storages.items():
            if storage.stop != self.size(key):
                what = f"storage {key.rpartition('/')[2]}"
                raise _differs(self._extent.path, what, storage.stop, self.size(key))
            record = self._infos.get(key.lower())
            if record and record.compress_type:  # reading it to the end verifies its checksum
                with self._archive.open(record) as file:
                    while file.read(_CHUNK):
                        pass
        self.storages |= unpickler.storages
        return content

    def find_regions(self) -> dict[str, Region]:
        """Finds the bytes of each record."""
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
        extent: the bytes of the archive.
        kind: what the archive must be, such as "torch.save file".
        needed: the record that such an archive must contain.
        way_out: the remedy for an archive without this record.

    Raises:
        UnreadableError: the archive is of another kind, or incomplete.
        DamagedError: torch might read the archive differently, or not at all.
    """
    with extent.open() as file:
        try:
            archive = zipfile.ZipFile(file)
        except OSError:
            raise
        except Exception:  # a damaged archive directory can raise anything
            raise UnreadableError(
                f"{extent.path} is not a valid {kind}: its zip archive is damaged. Compare its "
                "size with the size of the original, or fetch it again."
            ) from None
        with archive:
            infos = archive.infolist()
            check_unpacked(extent, infos, "torch.save")
            records = {_inner(info): info for info in infos}
            if min((info.header_offset for info in infos), default=0):
                # For example, the end of a larger archive that contained this one.
                raise DamagedError("its zip archive does not begin with a record")
            if needed not in records:
                found = list_some((info.filename for info in infos), limit=2)
                raise UnreadableError(
                    f"{extent.path} must be a {kind}, but is a zip archive without {needed}: it "
                    f"contains {found}. {way_out}"
                )
            _check(extent, infos)
            yield Records(extent, archive, records)


def check_unpacked(extent: Extent, infos: Collection[zipfile.ZipInfo], writer: str) -> None:
    """Raises if the records of an archive would unpack to much more than the size of the file."""
    unpacked, packed = sum(info.file_size for info in infos), extent.size
    if unpacked > max(_UNPACKED, _RATIO * packed):
        raise UnreadableError(
            f"{extent.path} would unpack from {packed:,} to {unpacked:,} bytes, but weights do not "
            f"compress so well, so it may be an attack. If you trust the file, load it and save it "
            f"again: {writer} does not compress."
        )


def _check(extent: Extent, infos: list[zipfile.ZipInfo]) -> None:
    """Raises for an ambiguous archive: torch might load other records than wellcond measures."""
    if len({*map(_inner, infos)}) < len(infos):
        raise DamagedError("two of its records have the same name")
    if len({info.filename.partition("/")[0] for info in infos}) > 1:
        raise DamagedError("its records are in several folders")
    if any(info.flag_bits & 1 for info in infos):
        raise DamagedError("its records are encrypted")
    # A file can have many parts, each of which could unpack to a thousand times its size.
    if extent.part and any(info.compress_type for info in infos):
        raise DamagedError("its records are compressed, but torch.save does not compress")


def _inner(record: zipfile.ZipInfo) -> str:
    """Returns the name of a record in the folder of the archive; torch ignores its case."""
    return record.filename.partition("/")[2].lower()


def find_start(file: IO[bytes], whole: Extent, record: zipfile.ZipInfo) -> int:
    """Returns where in a file the bytes of a record of an archive begin.

    Raises:
        DamagedError: they end after the archive, or their number differs from the record.
    """
    start = _data_start(file, whole.start + record.header_offset)
    differs = not record.compress_type and record.compress_size != record.file_size
    if differs or start + record.compress_size > whole.start + whole.size:
        raise DamagedError("one of its records extends beyond its end")
    return start


def _data_start(file: IO[bytes], header: int) -> int:
    """Returns where the bytes of a record begin whose header begins at `header`."""
    file.seek(header + 26)
    name, extra = struct.unpack("<2H", file.read(4))
    return header + 30 + int(name) + int(extra)


def _checksum(file: IO[bytes], start: int, length: int) -> bytes:
    """Returns the CRC-32 of these bytes, encoded as in an archive."""
    file.seek(start)
    value = 0
    while length > 0 and (piece := file.read(min(length, _CHUNK))):
        value = zlib.crc32(piece, value)
        length -= len(piece)
    return struct.pack("<I", value)


def _differs(path: Path, what: str, wanted: int, found: int) -> UnreadableError:
    return UnreadableError(
        f"{path} must contain {wanted:,} bytes for {what}, but contains {found:,}. "
        "It is damaged: fetch it again."
    )
