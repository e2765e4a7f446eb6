"""A copy of a checkpoint in which weights that recipes build are plain tensors of safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wellcond.files.checkpoint import NO_PARTS, Checkpoint
from wellcond.files.collection import INDEX
from wellcond.files.safetensors import Item, Safetensors, write_safetensors
from wellcond.files.tensors import Entry, TensorFile
from wellcond.recipes.base import Recipe
from wellcond.text import list_some

# The settings of the quantisation, inside of config.json and in files of their own.
_SETTINGS = ("quantization_config", "compression_config", "quantization")
_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class PlainWeight:
    """A weight that becomes one tensor.

    Attributes:
        recipe: how it is built.
        dtype: in which it is written.
        values: its entries in the order of memory, in as many tensors as it takes.
    """

    recipe: Recipe
    dtype: torch.dtype
    values: Callable[[], Iterable[Tensor]]


def dtype_of(recipe: Recipe, config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that a weight has in a plain checkpoint.

    That is what its parts say, or else config.json; float32 where neither does.
    """
    named = (recipe.dtype, config.get("dtype"), config.get("torch_dtype"))
    known = (_DTYPES[one] for one in named if isinstance(one, str) and one in _DTYPES)
    return next(known, torch.float32)


def write_plain(copied: Checkpoint, target: Path, weights: Mapping[str, PlainWeight]) -> None:
    """Writes the weights in the place of their parts.

    Args:
        copied: a copy of the checkpoint that belongs to nobody else.
        target: a file, if the copy is one; else the directory of the copy, which is changed.
        weights: by name.

    Raises:
        ValueError: a file is no safetensors file, or holds what that cannot store.
    """
    joined = [name for name, one in weights.items() if _is_split(copied, one.recipe)]
    if joined:
        raise ValueError(
            f"{list_some(joined)} must be stored whole to be dequantised, but are split over "
            "several files. Join these first."
        )
    first = {one.recipe.parts[0]: name for name, one in weights.items()}
    parts = {part for one in weights.values() for part in one.recipe.parts}
    places: dict[str, str] = {}
    for file_name, file in copied.files.items():
        own = {name: entry for name, (holder, entry) in copied.stored.items() if holder is file}
        items: list[Item] = []
        for name, entry in own.items():
            if name in first:
                one, label = weights[first[name]], first[name]
                code = str(one.dtype).removeprefix("torch.")
                items.append((label, code, one.recipe.shape, one.values))
            elif name not in parts:
                items.append((name, entry.dtype, entry.shape, _reader(file, entry)))
        places |= dict.fromkeys((name for name, *_ in items), file_name)
        if parts.isdisjoint(own):
            continue
        for name, entry in own.items():
            if entry.skipped is not None and entry.skipped.reason in NO_PARTS:
                raise ValueError(
                    f"{file.path.name} must hold plain tensors besides the weights that are "
                    f"dequantised, but {name} is {entry.skipped}."
                )
        alone = target if not target.is_dir() else None
        if alone is None and not isinstance(file, Safetensors):
            raise ValueError(
                f"{file.path.name} must be a safetensors file to be dequantised, but is none. Give "
                "the path of one file, and a path_out that ends in .safetensors."
            )
        described = {*weights, "tensor_names"}  # by torchao
        metadata = {key: text for key, text in file.metadata.items() if key not in described}
        unfinished = file.path.with_name(f"{file.path.name}.plain")
        write_safetensors(alone or unfinished, items, metadata)
        if alone is None:
            os.replace(unfinished, file.path)
    if target.is_dir():
        _adapt_settings(target, {one.dtype for one in weights.values()})
        if copied.index is not None:
            _adapt_index(target, places)


def _is_split(copied: Checkpoint, recipe: Recipe) -> bool:
    return any(not isinstance(copied.stored[name][0], TensorFile) for name in recipe.parts)


def _reader(file: TensorFile, entry: Entry) -> Callable[[], Iterable[Tensor]]:
    return lambda: (file.read(entry.name),)


def _adapt_settings(folder: Path, dtypes: set[torch.dtype]) -> None:
    """Removes what says that the weights are quantised."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return
    if not isinstance(config, dict):
        return
    for key in _SETTINGS:
        config.pop(key, None)
    if len(dtypes) == 1:
        (dtype,) = dtypes
        for key in {"dtype", "torch_dtype"} & config.keys():
            config[key] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2) + "\n")


def _adapt_index(folder: Path, places: Mapping[str, str]) -> None:
    """Names the tensors that there are now, and how many bytes they have."""
    (path,) = folder.glob(f"*{INDEX}")
    index = json.loads(path.read_text())
    index["weight_map"] = dict(sorted(places.items()))
    metadata = index.get("metadata")
    if isinstance(metadata, dict) and "total_size" in metadata:
        files = {folder / name for name in places.values()}
        metadata["total_size"] = sum(Safetensors(file).nbytes for file in files)
    path.write_text(json.dumps(index, indent=2) + "\n")
