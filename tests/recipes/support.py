"""Reads the content of a checkpoint folder with safetensors, for the finders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from wellcond.recipes.base import Candidate, Content, Finder, Recipe, RecipeError

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "U32": "uint32",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "F4",
}


def content_of(folder: Path) -> Content:
    """The content of the safetensors files and the JSON files in a folder."""
    files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    slices = {
        name: (file, file.get_slice(name))
        for path, file in zip(sorted(folder.glob("*.safetensors")), files, strict=True)
        if path.name != "expected.safetensors"
        for name in file.keys()  # noqa: SIM118
    }

    def read(name: str, rows: tuple[int, int] | None = None) -> Tensor:
        file, whole = slices[name]
        return file.get_tensor(name) if rows is None else whole[rows[0] : rows[1]]

    def beside(name: str) -> Mapping[str, Any]:
        path = folder / name
        return json.loads(path.read_text()) if path.exists() else {}

    tensors = {
        name: (tuple(one.get_shape()), _DTYPES[one.get_dtype()])
        for name, (_, one) in slices.items()
    }
    return Content(tensors, read, beside)


def content_from(tensors: Mapping[str, Tensor], **beside: Mapping[str, Any]) -> Content:
    """The content of tensors in memory, with configs such as config={...}."""

    def read(name: str, rows: tuple[int, int] | None = None) -> Tensor:
        return tensors[name] if rows is None else tensors[name][rows[0] : rows[1]]

    described = {
        name: (tuple(one.shape), str(one.dtype).removeprefix("torch."))
        for name, one in tensors.items()
    }
    return Content(described, read, lambda name: beside.get(name.removesuffix(".json"), {}))


def load_expected(folder: Path) -> dict[str, Tensor]:
    """The weights as dequantised by the library that wrote the folder."""
    with safe_open(folder / "expected.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def build_all(recipe: Recipe, content: Content) -> Tensor:
    """Builds the complete weight of a recipe, for a stack all its matrices."""
    if recipe.count == 1:
        return recipe.build(content.read, 0)
    return torch.stack([recipe.build(content.read, i) for i in range(recipe.count)])


def weights_of(content: Content, find: Finder) -> dict[str, Tensor]:
    """Builds all weights that a finder finds. It must be possible to build each of them."""
    made = {one.label: one.make() for one in find(content)}
    for label, recipe in made.items():
        assert recipe.label == label
        assert set(recipe.parts) <= set(content.tensors)
    weights = {label: build_all(recipe, content) for label, recipe in made.items()}
    for label, W in weights.items():
        assert tuple(W.shape) == made[label].shape
    return weights


def reason_of(candidate: Candidate, content: Content) -> str:
    """Why the weight of a candidate cannot be built, from `make` or from `build`."""
    try:
        build_all(candidate.make(), content)
    except RecipeError as why:
        return str(why)
    raise AssertionError(f"{candidate.label} was built")
