"""Imports the packages that read other formats, when such a file is opened."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from wellcond.files.tensors import UnreadableError


def import_extra(module: str, path: Path, kind: str) -> Any:
    """Imports a module of a package that an extra of the same name installs.

    Args:
        module: the full name of the module, which begins with the name of the package and extra.
        path: the file that requires the package.
        kind: what the file is, such as "a GGUF file".

    Raises:
        UnreadableError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = module.partition(".")[0]
        raise UnreadableError(
            f"{path} is {kind}, which requires the package {extra}, but {extra} cannot be imported "
            f"({error}). Run `pip install {extra}`."
        ) from None
