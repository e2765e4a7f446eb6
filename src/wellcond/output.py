"""Files and folders that appear whole under their name, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_UNFINISHED = ".wellcond-unfinished-"
_LOCKED = "locked"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def new_path(target: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """A temporary path beside the target, which takes its name when all went well, else is removed.

    Of several processes that want one name, the first gets it and the others an error; if they may
    overwrite, which is for files alone, the last gets it. A killed process leaves a folder
    `.wellcond-unfinished-*`, which the next one to write there removes: the lock on it ends with
    the process that worked in it. Where a folder cannot be locked, as on some network file systems
    and on Windows, nothing is removed.

    Raises:
        FileExistsError: the target is there already, at the beginning or at the end.
        OSError: it cannot be written; names the target.
    """
    target = Path(target).absolute()
    if not overwrite:
        refuse_existing(target)
    elif target.exists() and not target.is_file():  # a device or a pipe is written to as it is
        with _errors_name(target):
            yield target
        return
    near = next(parent for parent in target.parents if parent.exists())
    _remove_abandoned(near)
    with _errors_name(target), _scratch(near) as scratch:
        path = scratch / target.name
        yield path
        target.parent.mkdir(parents=True, exist_ok=True)
        if overwrite:
            os.replace(path, target)
            return
        refuse_existing(target)
        try:
            _take_free_name(path, target)
        except OSError:
            refuse_existing(target)  # another process was faster
            raise


def refuse_existing(target: Path) -> None:
    """Raises if there is something where the output should go."""
    if os.path.lexists(target):
        raise FileExistsError(
            f"{target} exists already and is not overwritten. Choose another name, or remove it."
        )


def _take_free_name(path: Path, target: Path) -> None:
    """Renames in one step that fails if the name is taken."""
    if path.is_dir():  # taken by an empty folder is free: that is not what another process wrote
        path.rename(target)
        return
    try:
        os.link(path, target)
    except FileExistsError:
        raise
    except OSError:  # no hard links on this file system: an empty file holds the name
        target.touch(exist_ok=False)
        os.replace(path, target)


@contextlib.contextmanager
def _scratch(near: Path) -> Iterator[Path]:
    """A folder, locked as long as it is used, and removed in the end."""
    # What cannot be removed now is removed by the next process.
    with (
        tempfile.TemporaryDirectory(
            prefix=_UNFINISHED, dir=near, ignore_cleanup_errors=True
        ) as folder,
        _lock(folder) as locked,
    ):
        # Only what has this name is ever removed by others, so not before it is locked.
        scratch = Path(folder, _LOCKED if locked else "unlocked")
        scratch.mkdir()
        yield scratch


def _remove_abandoned(near: Path) -> None:
    for scratch in near.glob(f"{_UNFINISHED}*/{_LOCKED}"):
        with contextlib.suppress(OSError), _lock(scratch.parent) as abandoned:
            if abandoned:
                # It takes the place of an empty one, which then removes read-only folders as well.
                with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=near) as folder:
                    scratch.parent.rename(folder)


@contextlib.contextmanager
def _lock(folder: str | os.PathLike[str]) -> Iterator[bool]:
    """Whether the folder could be locked; if so it is, at most as long as the process lives."""
    if sys.platform == "win32":
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(handle)


@contextlib.contextmanager
def _errors_name(target: Path) -> Iterator[None]:
    """Errors of the system, such as a full disk, name the target and no temporary path."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL or _UNFINISHED in f"{error.filename} {error.filename2}":
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
