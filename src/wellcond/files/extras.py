"""Packages that read other formats, imported when a file of theirs is opened."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from wellcond.files.tensors import UnreadableError


def import_extra(module: str, path: Path, kind: str) -> Any:
    """The module of a package that an extra of the same name installs.

    Args:
        module: its full name, which begins with that of the package and of the extra.
        path: the file that needs it. kind: what that is, such as "a GGUF file".

    Raises:
        UnreadableError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = module.partition(".")[0]
        raise UnreadableError(
            f"{path} is {kind}, for which the package {extra} must be installed, but is not "
            f"({error}). Run `pip install {extra}`."
        ) from None
