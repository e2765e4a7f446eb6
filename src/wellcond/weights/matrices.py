"""The matrices in one tensor of a model or a file, read when they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from wellcond.operators.convolution import Geometry
from wellcond.operators.views import Kernel, View
from wellcond.weights.adapters import Adapter


@dataclass(frozen=True)
class Matrices:
    """A tensor and the matrices in it by the name of their view, "" if it is one as it stands.

    `read` may be slow, and what it returns large: it is for one tensor at a time. A view may be a
    stack (g, m, n): the blocks of one block-diagonal map, such as the groups of a convolution.
    The tensor of which the geometry is known is a kernel, of a convolution on inputs of that size.
    Where there are adapters, what they add acts besides. `note` is what is to be known of all of
    its matrices, such as why it is seen as a whole. `stored`: it is a parameter as it stands, and
    not computed from some.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    views: Callable[[Tensor], dict[str, Tensor]]
    read: Callable[[], Tensor]
    geometry: Geometry | None = None
    adapters: tuple[Adapter, ...] = ()
    note: str = ""
    stored: bool = True


def is_vector(shape: Sequence[int]) -> bool:
    """Whether it is a vector laid out to be added or multiplied entrywise, as (1, 1, n)."""
    return len(shape) > 2 and entries(shape) == max(shape)


def entries(shape: Sequence[int]) -> int:
    """How many there are. Of a file, none may have millions of lengths with a huge product."""
    return 0 if 0 in shape else math.prod(shape)


def seen_through(views: Mapping[str, View]) -> Callable[[Tensor], dict[str, Tensor]]:
    """The matrices that views show, by their names; those of a stack by their numbers as well."""

    def of(parameter: Tensor) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        for name, view in views.items():
            matrix = view(parameter)
            if isinstance(view, Kernel):
                seen["kernel"] = matrix  # of several groups a stack: one block-diagonal map
            elif matrix.ndim == 2:
                seen[name] = matrix
            else:
                seen |= {f"{name}:{i}".lstrip(":"): one for i, one in enumerate(matrix)}
        return seen

    return of
