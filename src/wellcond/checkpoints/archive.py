"""The zip archive that torch.save writes: whether its records can be mapped, and are whole."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from wellcond.checkpoints.tensors import UnreadableError

# How many bytes may be unpacked in any case, and for each byte of the file.
_UNPACKED, _RATIO = 64 << 20, 20


def can_be_mapped(path: Path) -> bool:
    """Whether it is an archive, as since torch 1.6, that was not compressed afterwards."""
    try:
        if not zipfile.is_zipfile(path):
            return False
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
    return all(record.compress_type == zipfile.ZIP_STORED for record in records)


def check_storages(path: Path) -> None:
    """Raises if a storage is longer than its record, so that what follows would be mapped too."""
    with zipfile.ZipFile(path) as archive:
        sizes = {r.filename.partition("/")[2]: r.file_size for r in archive.infolist()}
        (pickled,) = [n for n in archive.namelist() if n.partition("/")[2] == "data.pkl"]
        wanted = _Storages(io.BytesIO(archive.read(pickled)))
    wanted.load()
    for key, size in wanted.sizes.items():
        found = sizes.get(f"data/{key}", 0)
        if size > found:
            raise UnreadableError(
                f"{path} must hold {size:,} bytes for storage {key}, but holds {found:,}. "
                "It is damaged: fetch it again."
            )


class _Anything:
    """Stands for whatever a pickle names: takes everything, does nothing."""

    def __init__(self, *args: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...
    def __setstate__(self, state: Any) -> None: ...


class _Storages(pickle._Unpickler):
    """Which storages a pickle wants, and their bytes; nothing that it names is looked up or run.

    In Python, because the one in C allocates for whatever index the pickle may name.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.sizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> type[_Anything]:
        return type(name, (_Anything,), {})

    def persistent_load(self, saved: Any) -> _Anything:
        _, kind, key, _, count = saved
        itemsize = getattr(getattr(torch, kind.__name__, None), "dtype", torch.uint8).itemsize
        self.sizes[str(key)] = max(self.sizes.get(str(key), 0), count * itemsize)
        return _Anything()
