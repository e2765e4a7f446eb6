"""NumPy arrays as tensors, for functions of one matrix. NumPy itself is not imported."""

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
    """Whether it is an array of NumPy."""
    numpy = sys.modules.get("numpy")  # nobody has an array who has not imported it
    return numpy is not None and isinstance(one, numpy.ndarray)


def as_tensor(one: Any, name: str = "`S`") -> Tensor:
    """A tensor as it is; an array of NumPy as a tensor with the same values, without a copy if
    torch can do without.

    Raises:
        TypeError: neither; an array with a mask; a dtype that torch does not have.
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
            f"{name} must not be a masked array: say what is behind the mask by one.filled(value)."
        )
    try:
        # In the byte order of this machine and without negative strides, as torch demands.
        native = one.astype(one.dtype.newbyteorder("="), order="A", copy=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the array is read-only; it is only read
            return torch.from_numpy(native)
    except TypeError:
        raise TypeError(
            f"{name} must have a dtype that torch has, got a NumPy array of {one.dtype}. "
            "Convert it: array.astype(numpy.float32)."
        ) from None


class _OfArrays(Protocol[_P, _R]):
    @overload
    def __call__(self, S: Tensor, *args: _P.args, **kwargs: _P.kwargs) -> _R: ...
    @overload
    def __call__(self, S: NDArray[Any], *args: _P.args, **kwargs: _P.kwargs) -> NDArray[Any]: ...


def takes_arrays(function: Callable[Concatenate[Tensor, _P], Tensor]) -> _OfArrays[_P, Tensor]:
    """The function, which of a NumPy array returns a NumPy array."""

    @functools.wraps(function)
    def call(S: Any, *args: _P.args, **kwargs: _P.kwargs) -> Any:
        if not is_array(S):
            return function(S, *args, **kwargs)
        return function(as_tensor(S), *args, **kwargs).numpy()[()]

    return call
