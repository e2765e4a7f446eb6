"""Views of parameters as matrices, with write access.

Most views share memory with their parameter. A view of a kernel whose storage has gaps is a copy,
so that changes must be written back to the parameter explicitly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class View(Protocol):
    """Maps a parameter to a matrix (m, n) or a stack of them by rearranging its entries."""

    def __call__(self, parameter: Tensor) -> Tensor:
        """Returns the matrix, which shares memory with the parameter if the strides allow it."""

    def write_(self, parameter: Tensor, matrix: Tensor) -> None:
        """Writes the entries of the matrix to the parameter."""


@dataclass(frozen=True)
class Stored:
    """The parameter, unchanged."""

    def __call__(self, parameter: Tensor) -> Tensor:
        return parameter

    def write_(self, parameter: Tensor, matrix: Tensor) -> None:
        parameter.copy_(matrix)


STORED = Stored()


@dataclass(frozen=True)
class Transposed:
    """A parameter that is stored as (inputs, outputs)."""

    def __call__(self, parameter: Tensor) -> Tensor:
        return parameter.mT

    def write_(self, parameter: Tensor, matrix: Tensor) -> None:
        parameter.copy_(matrix.mT)


def is_transposed(view: View) -> bool:
    """Returns whether the parameter, or a part of it, is stored as (inputs, outputs)."""
    while isinstance(view, Part | Strided | Member):
        view = view.view
    return isinstance(view, Transposed)


@dataclass(frozen=True)
class Kernel:
    """A convolution kernel as (out, in/groups * kernel), with columns in memory order.

    With groups, it is a stack of their matrices, (groups, out/groups, in/groups * kernel).
    """

    groups: int | None = None

    def __call__(self, parameter: Tensor) -> Tensor:
        matrix = parameter.permute(_order(parameter)).flatten(1)
        if self.groups is None:
            return matrix
        return matrix.reshape(
            self.groups, parameter.shape[0] // max(self.groups, 1), matrix.shape[1]
        )

    def write_(self, parameter: Tensor, matrix: Tensor) -> None:
        permuted = parameter.permute(_order(parameter))
        permuted.copy_(matrix.reshape(permuted.shape))


def _order(parameter: Tensor) -> list[int]:
    strides = parameter.stride()
    return [0, *sorted(range(1, parameter.ndim), key=lambda dim: -strides[dim])]


@dataclass(frozen=True)
class InputsFirst:
    """The matrix (outputs, inputs) of a kernel whose first axes are inputs, as in Keras.

    The inputs are the first three axes of (height, width, in, out), and the first axis of a dense
    (in, out). With several groups of outputs, it is a stack of their matrices, (groups,
    outputs/groups, inputs).
    """

    inputs: int
    groups: int | None = None

    def __call__(self, parameter: Tensor) -> Tensor:
        columns = math.prod(parameter.shape[: self.inputs])
        rows = math.prod(parameter.shape[self.inputs :])
        if self.groups in (None, 1):
            return parameter.reshape(columns, rows).mT
        return parameter.reshape(columns, self.groups, rows // self.groups).permute(1, 2, 0)

    def write_(self, parameter: Tensor, matrix: Tensor) -> None:
        stored = matrix.mT if matrix.ndim == 2 else matrix.permute(2, 0, 1)
        parameter.copy_(stored.reshape(parameter.shape))


@dataclass(frozen=True)
class Axes:
    """The matrix whose rows are some axes of a parameter, and whose columns are others.

    With axes in `stack`, it is a stack of matrices, in the order of these axes.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    stack: tuple[int, ...] = ()

    def __call__(self, parameter: Tensor) -> Tensor:
        sides = [
            math.prod(parameter.shape[axis] for axis in axes)
            for axes in (self.stack, self.rows, self.columns)
        ]
        permuted = parameter.permute(*self.stack, *self.rows, *self.columns)
        return permuted.reshape(sides if self.stack else sides[1:])

    def write_(self, parameter: Tensor, matrix: Tensor) -> None:
        permuted = parameter.permute(*self.stack, *self.rows, *self.columns)
        permuted.copy_(matrix.reshape(permuted.shape))


@dataclass(frozen=True)
class Part:
    """`length` rows of a view from `start` on, or columns with `dim` = -1."""

    view: View
    start: int
    length: int
    dim: int = -2

    def __call__(self, parameter: Tensor) -> Tensor:
        return self.view(parameter).narrow(self.dim, self.start, self.length)

    def write_(self, parameter: Tensor, matrix: Tensor) -> None:
        whole = self.view(parameter)
        whole.narrow(self.dim, self.start, self.length).copy_(matrix)
        self.view.write_(parameter, whole)


@dataclass(frozen=True)
class Strided:
    """Every `step`-th row of a view from `start` on."""

    view: View
    start: int
    step: int

    def __call__(self, parameter: Tensor) -> Tensor:
        return self.view(parameter)[..., self.start :: self.step, :]

    def write_(self, parameter: Tensor, matrix: Tensor) -> None:
        whole = self.view(parameter)
        whole[..., self.start :: self.step, :] = matrix
        self.view.write_(parameter, whole)


@dataclass(frozen=True)
class Member:
    """The matrix with this index in a view that is a stack."""

    view: View
    index: int

    def __call__(self, parameter: Tensor) -> Tensor:
        return self.view(parameter)[self.index]

    def write_(self, parameter: Tensor, matrix: Tensor) -> None:
        whole = self.view(parameter)
        whole[self.index] = matrix
        self.view.write_(parameter, whole)


@dataclass(frozen=True)
class Permuted:
    """The view of a parameter with its axes in another order."""

    view: View
    order: tuple[int, ...]

    def __call__(self, parameter: Tensor) -> Tensor:
        return self.view(parameter.permute(self.order))

    def write_(self, parameter: Tensor, matrix: Tensor) -> None:
        self.view.write_(parameter.permute(self.order), matrix)


@dataclass(frozen=True)
class Reshaped:
    """The view of a parameter with its axes merged or split."""

    view: View
    shape: tuple[int, ...]

    def __call__(self, parameter: Tensor) -> Tensor:
        return self.view(parameter.reshape(self.shape))

    def write_(self, parameter: Tensor, matrix: Tensor) -> None:
        other = parameter.reshape(self.shape)
        self.view.write_(other, matrix)
        if not shares_memory(other, parameter):
            parameter.copy_(other.reshape(parameter.shape))


@dataclass(frozen=True)
class Blocks:
    """The view of blocks of a parameter in another order, as (start, length) pairs."""

    view: View
    dim: int
    blocks: tuple[tuple[int, int], ...]

    def __call__(self, parameter: Tensor) -> Tensor:
        return self.view(self._join(parameter))

    def write_(self, parameter: Tensor, matrix: Tensor) -> None:
        joined = self._join(parameter)
        self.view.write_(joined, matrix)
        at = 0
        for start, length in self.blocks:
            block = joined.narrow(self.dim, at, length)
            parameter.narrow(self.dim, start, length).copy_(block)
            at += length

    def _join(self, parameter: Tensor) -> Tensor:
        parts = [parameter.narrow(self.dim, *block) for block in self.blocks]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)


def is_kernel(view: View) -> bool:
    """Returns whether the view shows a convolution kernel or a part of one."""
    match view:
        case Part(inner, _, _, _) | Strided(inner, _, _) | Member(inner, _):
            return is_kernel(inner)
        case Permuted(inner, _) | Reshaped(inner, _) | Blocks(inner, _, _):
            return is_kernel(inner)
    return isinstance(view, Kernel)


def shares_memory(matrix: Tensor, parameter: Tensor) -> bool:
    """Returns whether both tensors have the same storage."""
    mine, theirs = matrix.untyped_storage(), parameter.untyped_storage()
    return mine.data_ptr() == theirs.data_ptr()


class writable:
    """A context with a view of a tensor; changes to the view are written to the tensor."""

    def __init__(self, view: View, tensor: Tensor) -> None:
        self._view, self._tensor = view, tensor

    def __enter__(self) -> Tensor:
        self._matrix = self._view(self._tensor)
        return self._matrix

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        matrix, tensor = self._matrix, self._tensor
        if kind is not None or matrix is tensor or matrix.device.type == "meta":
            return
        if not shares_memory(matrix, tensor):
            self._view.write_(tensor, matrix)


def shape_of(view: View, tensor: Tensor) -> torch.Size:
    """Returns the shape of the view without reading the tensor."""
    return view(torch.empty_strided(tensor.shape, tensor.stride(), device="meta")).shape
