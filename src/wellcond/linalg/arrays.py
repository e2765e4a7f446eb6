"""NumPy arrays as tensors, for functions of one matrix. This module does not import NumPy."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

_P = ParamSpec("_P")
_R = TypeVar("_R", covariant=True)


def is_array(one: object) -> bool:
    """Whether `one` is a NumPy array."""
    numpy = sys.modules.get("numpy")  # without NumPy imported there is no array
    return numpy is not None and isinstance(one, numpy.ndarray)


def as_tensor(one: Any, name: str = "`S`") -> Tensor:
    """Converts a NumPy array to a tensor, without a copy if possible. Returns a tensor unchanged.

    Raises:
        TypeError: `one` is neither a tensor nor an array, has a mask, or has a dtype that torch
            does not support.
    """
    if isinstance(one, Tensor):
        return one
    if not is_array(one):
        raise TypeError(
            f"{name} must be a torch.Tensor or a NumPy array, got {type(one).__name__}."
            + (" Convert it: numpy.asarray(array)." if hasattr(one, "__array__") else "")
        )
    if hasattr(one, "mask"):
        raise TypeError(
            f"{name} must not be a masked array. Fill in the masked entries: array.filled(value)."
        )
    try:
        # torch requires the byte order of this machine and no negative strides.
        native = one.astype(one.dtype.newbyteorder("="), order="A", copy=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for a read-only array, because we only read it
            return torch.from_numpy(native)
    except TypeError:
        raise TypeError(
            f"{name} must have a dtype that torch supports, got a NumPy array of {one.dtype}. "
            "Convert it: array.astype(numpy.float32)."
        ) from None


class _OfArrays(Protocol[_P, _R]):
    @overload
    def __call__(self, S: Tensor, *args: _P.args, **kwargs: _P.kwargs) -> _R: ...
    @overload
    def __call__(self, S: NDArray[Any], *args: _P.args, **kwargs: _P.kwargs) -> NDArray[Any]: ...


def takes_arrays(function: Callable[Concatenate[Tensor, _P], Tensor]) -> _OfArrays[_P, Tensor]:
    """Wraps a function of a tensor so that it returns a NumPy array for a NumPy array."""

    @functools.wraps(function)
    def call(S: Any, *args: _P.args, **kwargs: _P.kwargs) -> Any:
        if not is_array(S):
            return function(S, *args, **kwargs)
        return function(as_tensor(S), *args, **kwargs).numpy()[()]

    return call
