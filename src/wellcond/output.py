"""Files and folders that appear whole under their name, or not at all."""

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
    """A temporary path beside the target, which takes its name when all went well, else is removed.

    If several processes want one name, the first gets it and the others an error; if they may
    overwrite, which is for files only, the last gets it. A process that is killed leaves its folder
    `.wellcond-unfinished-*`, which can be removed.

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
def _errors_name(target: Path) -> Iterator[None]:
    """Errors of the system, such as a full disk, name the target and no temporary path."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL or _UNFINISHED in f"{error.filename} {error.filename2}":
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
