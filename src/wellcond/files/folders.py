"""Finds the checkpoint below a folder that contains no weights itself, as trainers write it."""

from __future__ import annotations

from pathlib import Path

from wellcond.files.distributed import find_descriptions
from wellcond.files.tensors import UnreadableError
from wellcond.text import list_some

_STEP = "global_step"  # DeepSpeed writes one folder per saved step
_LATEST = "latest"  # the file with the name of the last of these folders
_NAME = 255  # bytes


def find_below(folder: Path) -> list[Path]:
    """Returns the subfolders of torch.distributed.checkpoint or DeepSpeed that contain weights."""
    below = sorted(one for one in folder.iterdir() if one.is_dir())
    if steps := [one for one in below if one.name.startswith(_STEP)]:
        return [one for one in steps if one.name == _read_latest(folder)] or steps
    # Accelerate saves the optimizer in a folder of its own.
    return [one for one in below if _is_distributed(one) and not one.name.startswith("optimizer")]


def only_one(found: list[Path]) -> Path:
    """Returns the only folder found.

    Raises:
        UnreadableError: there are several folders.
    """
    if len(found) > 1:
        raise UnreadableError(
            f"{found[0].parent} must contain one checkpoint, but contains several: "
            f"{list_some(one.name for one in found)}. Give the path of one of them."
        )
    return found[0]


def _is_distributed(folder: Path) -> bool:
    try:
        return bool(find_descriptions(folder))
    except OSError:  # no permission to list the folder
        return False


def _read_latest(folder: Path) -> str:
    path = folder / _LATEST
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return file.read(_NAME).decode(errors="replace").strip()
