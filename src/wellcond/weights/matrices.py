"""A tensor of a model or a file that holds matrices: their views now, its values when needed."""

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
    """A tensor, and the views of the matrices in it, by their names.

    Attributes:
        name: of the tensor.
        aliases: every name that a pattern may match, the first of them included.
        shape: of the tensor.
        views: by their names, "" if there is only one.
        read: may be slow, and return a large tensor: only one tensor is read at a time.
        geometry: of a convolution on inputs of a known size; None if that is not known.
        adapters: what is added to the tensor before it acts.
        note: what a reader must know of all of its matrices, such as why it is not cut.
        stored: whether it is a parameter as it stands, not computed from parameters.
        parts: the names of the tensors of a file from which it is built; () if it is one of them.
        stored_as: as what its entries are stored, such as "int4"; "" if that is their dtype.
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


def is_vector(shape: Sequence[int]) -> bool:
    """Whether it is a vector laid out to be added or multiplied entrywise, as (1, 1, n)."""
    return len(shape) > 2 and entries(shape) == max(shape)


def entries(shape: Sequence[int]) -> int:
    """How many there are. Of a file, none may have millions of lengths with a huge product."""
    return 0 if 0 in shape else math.prod(shape)


def single_views(views: Mapping[str, View], shape: Sequence[int]) -> dict[str, View]:
    """A view of each matrix of a tensor of this shape; those of a stack are named by number.

    A kernel of several groups stays a stack (g, m, n): the blocks of one block-diagonal map.
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
    """Views that, called with a tensor, give its matrices by the names of `single_views`."""

    def __call__(self, tensor: Tensor) -> dict[str, Tensor]:
        views = single_views(self, tensor.shape)
        return {name: view(tensor) for name, view in views.items()}
