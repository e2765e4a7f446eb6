"""Recipes, which build one weight from the tensors that a file stores in its place.

A recipe represents one tensor of the plain checkpoint of the same network: it has the name, the
shape and the order of entries that the weight has there. Everything else (fused blocks, experts,
heads, adapters) therefore works as for plain weights.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from wellcond.weights.matrices import entries

QUANTIZATION = ("quantization_config", "compression_config")  # the second one is the older name
SMALL = 4096  # largest size in bytes of a description that is read before anything is measured
_SHOWN, _LETTERS = 8, 60  # items and letters of a setting that a sentence shows
_WIDTHS = {"uint8": 1, "int8": 1, "int64": 8, "uint64": 8, "float64": 8}  # others: at most 4


class RecipeError(ValueError):
    """Raised if a weight cannot be built. The message names the missing or contradictory part.

    It completes a sentence, without a capital letter and a full stop.
    """


class Read(Protocol):
    """Reads a stored tensor, or its rows start to stop along the first side."""

    def __call__(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Returns the tensor in its stored dtype; float4 as bytes of two values each."""


@dataclass(frozen=True)
class TensorClass:
    """A tensor of a foreign class, which a file stores as several plain tensors.

    Attributes:
        kind: the name of the class, such as "Int8Tensor".
        parts: the names of the stored tensors, by the names of the parts in the class.
        attributes: the other attributes of the class: numbers, strings, lists of these, None, and
            dtypes as strings such as "float32".
    """

    kind: str
    parts: Mapping[str, str]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Content:
    """The description of a checkpoint without its weights.

    Attributes:
        tensors: shape and dtype by name. Dtypes have the names of torch ("float8_e4m3fn",
            "uint8"), except "F4", which has two values per byte and a shape that counts values.
        read: reads a tensor.
        beside: returns the content of a JSON file in the folder of the checkpoint; {} if the file
            does not exist.
        classes: the tensors of foreign classes, by the names of their weights.
    """

    tensors: Mapping[str, tuple[tuple[int, ...], str]]
    read: Read
    beside: Callable[[str], Mapping[str, Any]] = lambda _: {}
    classes: Mapping[str, TensorClass] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
            RecipeError: no tensor has this name.
        """
        if name not in self.tensors:
            raise RecipeError(f"{name} is missing")
        return self.tensors[name][0]

    def dtype(self, name: str) -> str:
        """The dtype of a tensor; "" if no tensor has this name."""
        return self.tensors[name][1] if name in self.tensors else ""

    def read_small(self, name: str) -> Tensor:
        """Reads a tensor that describes others.

        Raises:
            RecipeError: no tensor has this name, or the tensor has more than 4 kB.
        """
        if entries(self.shape(name)) * _WIDTHS.get(self.dtype(name), 4) > SMALL:
            raise RecipeError(f"{name} is too large for a description")
        return self.read(name)

    def quantization(self) -> Mapping[str, Any]:
        """The quantisation settings in config.json; {} without any, or if two differ."""
        return self._quantization

    @cached_property
    def _quantization(self) -> Mapping[str, Any]:
        return find_quantization(self.beside("config.json"))


def find_quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantisation settings in the content of config.json.

    A multimodal model can have them in the config of its language model. Returns {} if there are no
    settings, or if the settings of the submodels differ.
    """
    whole, *parts = (
        [one[key] for key in QUANTIZATION if isinstance(one.get(key), Mapping)]
        for one in configs_in(config)
    )
    found: list[Mapping[str, Any]] = whole or [one for some in parts for one in some]
    return found[0] if found and (whole or found.count(found[0]) == len(found)) else {}


def configs_in(config: Mapping[str, Any], depth: int = 2) -> Iterator[Mapping[str, Any]]:
    """A config and the configs of its submodels, such as `text_config` and `vision_config`."""
    yield config
    for key, one in config.items() if depth else ():
        if key.endswith("_config") and key not in QUANTIZATION and isinstance(one, Mapping):
            yield from configs_in(one, depth - 1)


@dataclass(frozen=True)
class Recipe(abc.ABC):
    """Builds one weight.

    Attributes:
        label: the name of the weight in a plain checkpoint.
        parts: the names of all stored tensors that belong to the weight, beginning with the one
            that contains most of its entries. They are not weights themselves.
        shape: the shape of the weight.
        note: a description of the parts for reports, such as "dequantised from FP8 (E4M3) with a
            scale per block of 128x128".
        dtype: the dtype of the weight in a plain checkpoint, such as "bfloat16"; "" if the parts do
            not determine it.
        keeps: why a repair cannot write new values; "" if it can.
        stored_as: the type in which the entries are stored, such as "int4" or "nf4"; "" if it is
            the dtype of the first part.
    """

    label: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    note: str
    dtype: str = ""
    keeps: str = "stored as codes"
    stored_as: str = ""

    @property
    def count(self) -> int:
        """The number of matrices that are built one at a time: b for a stack (b, m, n), or 1."""
        return 1

    @abc.abstractmethod
    def build(self, read: Read, index: int) -> Tensor:
        """Builds the weight in float32 or float64; for a count > 1 only its matrix at `index`.

        Raises:
            RecipeError: the parts contradict each other.
        """

    def store(self, W: Tensor, read: Read) -> dict[str, Tensor]:
        """Returns new values of parts from which `build` gives W. Requires `keeps` to be "".

        The values have the shapes and dtypes of the parts. Unchanged parts are omitted.
        """
        raise NotImplementedError


class Candidate(NamedTuple):
    """Tensors that look like the parts of one weight.

    Attributes:
        label: the name of the weight.
        parts: the tensors that belong to the weight even if it cannot be built, the main one first.
        make: creates the recipe, or raises RecipeError.
    """

    label: str
    parts: tuple[str, ...]
    make: Callable[[], Recipe]


Finder = Callable[[Content], Iterator[Candidate]]


def show(value: Any) -> str:
    """Abbreviates a setting for a sentence: in a file it can have any size and depth."""
    if isinstance(value, Mapping):
        return f"an object of {len(value)} settings"
    if isinstance(value, list):
        flat = len(value) <= _SHOWN and not any(isinstance(one, list | Mapping) for one in value)
        return f"[{', '.join(map(show, value))}]" if flat else f"a list of {len(value)}"
    if isinstance(value, str):
        return value[:_LETTERS] if value[:1].isalpha() else repr(value[:_LETTERS])
    return repr(value)[:_LETTERS]


def zeros(shape: tuple[int, ...]) -> Tensor:
    """Zeros in float32 on the CPU, whatever the default dtype and device are."""
    return torch.zeros(shape, dtype=torch.float32, device="cpu")
