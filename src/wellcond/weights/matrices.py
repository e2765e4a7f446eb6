"""Tensors of a model or a file that contain matrices: their views, and how to read the values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wellcond.operators.convolution import Geometry
from wellcond.operators.views import InputsFirst, Member, Part, Strided, View, is_kernel
from wellcond.weights.adapters import Adapter


@dataclass(frozen=True)
class Matrices:
    """A tensor and the views of the matrices in it.

    Attributes:
        name: the name of the tensor.
        aliases: every name that a pattern can match, including `name`.
        shape: the shape of the tensor.
        views: the views of the matrices by name, "" if there is only one.
        read: reads the tensor, which can be slow and large; callers read one tensor at a time.
        geometry: the geometry of a convolution on inputs of a known size; None if it is unknown.
        adapters: the adapters of the effective weight.
        note: a remark on all of its matrices, such as why they are not split.
        stored: whether it is a stored parameter and not computed from parameters.
        parts: the names of the tensors of a file from which it is built; () if it is stored itself.
        stored_as: the format in which its entries are stored, such as "int4"; "" for their dtype.
        grouped: whether the number of groups of a kernel is known, also if it is one.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    views: Mapping[str, View]
    read: Callable[[], Tensor]
    geometry: Geometry | None = None
    adapters: tuple[Adapter, ...] = ()
    note: str = ""
    stored: bool = True
    parts: tuple[str, ...] = ()
    stored_as: str = ""
    grouped: bool = False


def is_vector(shape: Sequence[int]) -> bool:
    """Whether it is a vector shaped for entrywise operations, such as (1, 1, n)."""
    return len(shape) > 2 and entries(shape) == max(shape)


def entries(shape: Sequence[int]) -> int:
    """The number of entries. The check for 0 avoids a huge product of sides in damaged files."""
    return 0 if 0 in shape else math.prod(shape)


def single_views(views: Mapping[str, View], shape: Sequence[int]) -> dict[str, View]:
    """One view per matrix of a tensor of this shape; the matrices of a stack are named by number.

    A kernel of several groups remains a stack (g, m, n): the blocks of one block-diagonal map.
    """
    single: dict[str, View] = {}
    for name, view in views.items():
        in_groups = isinstance(view, InputsFirst) and (view.groups or 1) > 1
        if in_groups or (is_kernel(view) and not isinstance(view, Part | Strided | Member)):
            single[name or "kernel"] = view
            continue
        count, *inner = view(torch.empty(tuple(shape), device="meta")).shape
        if len(inner) == 1:
            single[name] = view
        else:
            single |= {f"{name}:{i}".lstrip(":"): Member(view, i) for i in range(count)}
    return single


class ViewsByName(dict[str, View]):
    """Views that, called with a tensor, return its matrices by the names of `single_views`."""

    def __call__(self, tensor: Tensor) -> dict[str, Tensor]:
        views = single_views(self, tensor.shape)
        return {name: view(tensor) for name, view in views.items()}
