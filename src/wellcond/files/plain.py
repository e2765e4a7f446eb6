"""Writes a copy of a checkpoint in which weights that recipes build are plain tensors."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from wellcond.files.checkpoint import NO_PARTS, Checkpoint
from wellcond.files.collection import INDEX
from wellcond.files.safetensors import Item, Safetensors, write_safetensors
from wellcond.files.tensors import Entry, TensorFile
from wellcond.recipes.base import QUANTIZATION, Recipe, configs_in
from wellcond.text import list_some
from wellcond.weights.matrices import entries

# The settings of the quantisation, in config.json and in separate files.
_SETTINGS = (*QUANTIZATION, "quantization")
_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_DTYPE = ("dtype", "torch_dtype")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class PlainWeight:
    """A weight that becomes one tensor.

    Attributes:
        recipe: the recipe that builds it.
        dtype: the dtype in which it is written.
        values: returns its entries in memory order, in one or several tensors.
    """

    recipe: Recipe
    dtype: torch.dtype
    values: Callable[[], Iterable[Tensor]]


def dtype_of(recipe: Recipe, config: Mapping[str, Any]) -> torch.dtype:
    """Returns the dtype of a weight in a plain checkpoint.

    Its parts determine the dtype, or else config.json; the default is float32.
    """
    named = [recipe.dtype, *(one.get(key) for one in configs_in(config) for key in _DTYPE)]
    known = (_DTYPES[one] for one in named if isinstance(one, str) and one in _DTYPES)
    return next(known, torch.float32)


def check_plain(checkpoint: Checkpoint, recipes: Iterable[Recipe], alone: bool) -> None:
    """Checks that weights can be written in the place of their parts.

    Args:
        checkpoint: the checkpoint that contains the weights.
        recipes: the recipes of the weights.
        alone: whether the copy is one file.

    Raises:
        ValueError: a file is not a safetensors file, or contains data that safetensors cannot
            store.
    """
    recipes = list(recipes)
    split = [one.label for one in recipes if _is_split(checkpoint, one)]
    if split:
        raise ValueError(
            f"The parts of {list_some(split)} must each be stored in one file to be dequantised, "
            "but are split over several files. Join these first."
        )
    parts = {part for one in recipes for part in one.parts}
    changed = {checkpoint.stored[part][0] for part in parts}
    for file in checkpoint.files.values():
        if file not in changed:
            continue
        if not (alone or isinstance(file, Safetensors)):
            raise ValueError(
                f"{file.path.name} must be a safetensors file to be dequantised, but is not. Give "
                "the path of a single file, and a path_out that ends in .safetensors."
            )
        for name, (holder, entry) in checkpoint.stored.items():
            if holder is file and entry.skipped and entry.skipped.reason in NO_PARTS:
                raise ValueError(
                    f"{file.path.name} must contain only plain tensors and the weights to "
                    f"dequantise, but {name} is {entry.skipped}. Remove it from the file."
                )


def write_plain(copied: Checkpoint, target: Path, weights: Mapping[str, PlainWeight]) -> None:
    """Writes the weights in the place of their parts.

    Args:
        copied: a copy of the checkpoint that no other program uses.
        target: a file, if the copy is one file; otherwise the directory of the copy, which is
            changed.
        weights: the weights by name.
    """
    first = {one.recipe.parts[0]: one for one in weights.values()}
    parts = {part for one in weights.values() for part in one.recipe.parts}
    places: dict[str, str] = {}
    count = 0
    for file_name, file in copied.files.items():
        own = {name: entry for name, (holder, entry) in copied.stored.items() if holder is file}
        items: list[Item] = []
        for name, entry in own.items():
            # The index may assign this name to another file.
            doubled = (copied.index or {}).get(entry.name, file_name) != file_name
            if name in first:
                one = first[name]
                code = str(one.dtype).removeprefix("torch.")
                label = one.recipe.label.removeprefix(name.removesuffix(entry.name))
                items.append((label, code, one.recipe.shape, one.values))
            elif name not in parts and not (doubled and entry.name in parts):
                items.append((entry.name, entry.dtype, entry.shape, _reader(file, entry)))
            else:
                continue
            if not doubled:
                written, _, shape, _ = items[-1]
                places[written] = file_name
                count += entries(shape)
        if len(items) == len(own) and parts.isdisjoint(own):
            continue
        metadata = file.metadata
        if "tensor_names" in metadata:  # torchao describes each tensor in the metadata
            described = {"tensor_names", *weights, *own}
            metadata = {key: text for key, text in metadata.items() if key not in described}
        with _replacing(file.path, target if not target.is_dir() else file.path) as path:
            write_safetensors(path, items, metadata)
    if target.is_dir():
        _adapt_settings(target, {one.dtype for one in weights.values()})
        if copied.index is not None:
            _adapt_index(target, places, count)


def _is_split(copied: Checkpoint, recipe: Recipe) -> bool:
    return any(not isinstance(copied.stored[name][0], TensorFile) for name in recipe.parts)


def _reader(file: TensorFile, entry: Entry) -> Callable[[], Iterable[Tensor]]:
    return lambda: (file.read(entry.name),)


@contextlib.contextmanager
def _replacing(old: Path, target: Path) -> Iterator[Path]:
    """Yields a path for a new file, which then replaces the target and has the mode of the old."""
    path = old.with_name(f"{old.name}.{uuid.uuid4().hex}")  # a name that no copied file has
    yield path
    shutil.copymode(old, path)
    os.replace(path, target)


def _adapt_settings(folder: Path, dtypes: set[torch.dtype]) -> None:
    """Removes the settings of the quantisation."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return
    if not isinstance(config, dict):
        return
    for one in cast(list[dict[str, Any]], list(configs_in(config))):
        removed = [one.pop(key) for key in _SETTINGS if isinstance(one.get(key), dict)]
        if len(dtypes) == 1 and (removed or one is config):
            dtype = str(*dtypes).removeprefix("torch.")
            one |= dict.fromkeys(one.keys() & set(_DTYPE), dtype)
    _write_json(config, path)


def _adapt_index(folder: Path, places: Mapping[str, str], count: int) -> None:
    """Updates the index with the tensors of the copy, and their numbers of entries and bytes."""
    (path,) = folder.glob(f"*{INDEX}")
    index = json.loads(path.read_text())
    index["weight_map"] = dict(sorted(places.items()))
    files = {folder / name for name in places.values()}
    sizes = {
        "total_parameters": count,
        "total_size": sum(Safetensors(file).nbytes for file in files),
    }
    if isinstance(metadata := index.get("metadata"), dict):
        metadata |= {key: size for key, size in sizes.items() if key in metadata}
    _write_json(index, path)


def _write_json(content: Any, path: Path) -> None:
    with _replacing(path, path) as new:
        new.write_text(json.dumps(content, indent=2) + "\n")
