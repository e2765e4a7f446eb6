"""Writes files and folders atomically: they appear complete under their name, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

_UNFINISHED = ".wellcond-unfinished-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def new_path(target: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary path that is renamed to the target on success and removed on failure.

    If several processes write to the same target, the first one succeeds and the others raise an
    error. With `overwrite`, which is for files only, the last one wins. A process that is killed
    leaves its folder `.wellcond-unfinished-*`, which can be removed.

    Raises:
        FileExistsError: the target already exists, at the beginning or at the end.
        OSError: the target cannot be written; the error names the target.
    """
    target = Path(target).absolute()
    if not overwrite:
        refuse_existing(target)
    elif target.exists() and not target.is_file():  # write directly to a device or a pipe
        with _errors_name(target):
            yield target
        return
    near = next(parent for parent in target.parents if parent.exists())
    with (
        _errors_name(target),
        tempfile.TemporaryDirectory(
            prefix=_UNFINISHED, dir=near, ignore_cleanup_errors=True
        ) as folder,
    ):
        path = Path(folder, target.name)
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
    """Raises FileExistsError if the target exists."""
    if os.path.lexists(target):
        raise FileExistsError(
            f"{target} already exists and is not overwritten. Choose another name, or remove it."
        )


def _take_free_name(path: Path, target: Path) -> None:
    """Renames the path in one step, which fails if the target exists."""
    if path.is_dir():  # an empty folder is replaced: it is not the output of another process
        path.rename(target)
        return
    try:
        os.link(path, target)
    except FileExistsError:
        raise
    except OSError:  # no hard links on this file system: reserve the name with an empty file
        target.touch(exist_ok=False)
        os.replace(path, target)


@contextlib.contextmanager
def _errors_name(target: Path) -> Iterator[None]:
    """Makes system errors, such as a full disk, name the target instead of the temporary path."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL or _UNFINISHED in f"{error.filename} {error.filename2}":
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
