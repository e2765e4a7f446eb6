"""A recipe: how one weight is built from the tensors that a file stores in its place.

A recipe stands for one tensor of the plain checkpoint of the same network: it has the name, the
shape and the order of entries that the weight has there. All else (fused blocks, experts, heads,
adapters) therefore works as it does for plain weights.
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

QUANTIZATION = ("quantization_config", "compression_config")  # the latter was the first name
SMALL = 4096  # bytes of a description that is read before anything is measured
_SHOWN, _LETTERS = 8, 60  # of a setting, in a sentence
_WIDTHS = {"uint8": 1, "int8": 1, "int64": 8, "uint64": 8, "float64": 8}  # others at most 4


class RecipeError(ValueError):
    """Why a weight cannot be built, as the end of a sentence: what is missing or contradictory."""


class Read(Protocol):
    """Reads a stored tensor, or the rows start to stop of it along its first side."""

    def __call__(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor in the dtype in which it is stored; float4 as bytes of two values."""


@dataclass(frozen=True)
class TensorClass:
    """A tensor of a foreign class, which a file stores as several plain tensors.

    Attributes:
        kind: the name of the class, such as "Int8Tensor".
        parts: the names of the stored tensors, by the names that the class gives them.
        attributes: what else the class stores: numbers, texts, lists of these, None, dtypes as the
            texts "float32".
    """

    kind: str
    parts: Mapping[str, str]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class Content:
    """What a checkpoint says without its weights.

    Attributes:
        tensors: shape and dtype by name. Dtypes have the names of torch ("float8_e4m3fn",
            "uint8"); "F4" of two values per byte, with the shape that counts values.
        read: reads a tensor.
        beside: the content of a JSON file beside the checkpoint; {} if there is none.
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
        """A tensor that describes others.

        Raises:
            RecipeError: no tensor has this name, or it has more than 4 kB.
        """
        if entries(self.shape(name)) * _WIDTHS.get(self.dtype(name), 4) > SMALL:
            raise RecipeError(f"{name} is too large for a description")
        return self.read(name)

    def quantization(self) -> Mapping[str, Any]:
        """The settings of the quantisation in config.json; {} without any, or if two differ."""
        return self._quantization

    @cached_property
    def _quantization(self) -> Mapping[str, Any]:
        return find_quantization(self.beside("config.json"))


def find_quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the quantisation in the content of config.json.

    A larger model may have them in the config of its language model. {} without any, or if those
    of its models differ.
    """
    whole, *parts = (
        [one[key] for key in QUANTIZATION if isinstance(one.get(key), Mapping)]
        for one in configs_in(config)
    )
    found: list[Mapping[str, Any]] = whole or [one for some in parts for one in some]
    return found[0] if found and (whole or found.count(found[0]) == len(found)) else {}


def configs_in(config: Mapping[str, Any], depth: int = 2) -> Iterator[Mapping[str, Any]]:
    """A config, and those of the models that it consists of: `text_config`, `vision_config`."""
    yield config
    for key, one in config.items() if depth else ():
        if key.endswith("_config") and key not in QUANTIZATION and isinstance(one, Mapping):
            yield from configs_in(one, depth - 1)


@dataclass(frozen=True)
class Recipe(abc.ABC):
    """How one weight is built.

    Attributes:
        label: the name that the weight has in a plain checkpoint.
        parts: the names of all stored tensors that belong to it, the one that has most of its
            entries first. They are no weights of their own.
        shape: of the weight.
        note: what the parts are, for the reader of a report: "dequantised from FP8 (E4M3) with a
            scale per block of 128x128".
        dtype: the dtype of the weight in a plain checkpoint, if the parts say so: "bfloat16".
        keeps: why a repair cannot write other values back; "" if it can.
        stored_as: as what its entries are stored, such as "int4" or "nf4"; "" if that is the dtype
            of the first part.
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
        """How many matrices are built one at a time: of a stack (b, m, n) each of the b."""
        return 1

    @abc.abstractmethod
    def build(self, read: Read, index: int) -> Tensor:
        """The weight in float32 or float64, or of a stack with a count > 1 its matrix number index.

        Raises:
            RecipeError: the parts contradict each other.
        """

    def store(self, W: Tensor, read: Read) -> dict[str, Tensor]:
        """New values for parts, from which the weight W is built; only if nothing `keeps` it.

        They have the shapes and dtypes of the parts; parts that stay as they are are left out.
        """
        raise NotImplementedError


class Candidate(NamedTuple):
    """Tensors that look like the parts of one weight.

    Attributes:
        label: the name of the weight.
        parts: the tensors that belong to it whether or not it can be built, the main one first.
        make: makes the recipe; raises RecipeError.
    """

    label: str
    parts: tuple[str, ...]
    make: Callable[[], Recipe]


Finder = Callable[[Content], Iterator[Candidate]]


def show(value: Any) -> str:
    """A setting in a few letters, for a sentence: in a file it may be of any size and depth."""
    if isinstance(value, Mapping):
        return f"an object of {len(value)} settings"
    if isinstance(value, list):
        flat = len(value) <= _SHOWN and not any(isinstance(one, list | Mapping) for one in value)
        return f"[{', '.join(map(show, value))}]" if flat else f"a list of {len(value)}"
    if isinstance(value, str):
        return value[:_LETTERS] if value[:1].isalpha() else repr(value[:_LETTERS])
    return repr(value)[:_LETTERS]


def zeros(shape: tuple[int, ...]) -> Tensor:
    """An empty float32 matrix on the CPU, to be filled."""
    return torch.zeros(shape, dtype=torch.float32, device="cpu")
