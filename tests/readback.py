"""A stand-in for an accelerator that cannot be read: it checks that a step never waits for one.

Tensors are fake: they have a shape, a dtype and a device, but no data, so the host cannot know any
of their numbers. Operations that need a number raise, such as `Tensor.item`, `bool`, `float`,
`tolist`, `numpy`, `torch.equal`, `nonzero` and masks, and so does a blocking copy to the CPU. A
non-blocking copy is allowed; the event after it never completes.

The stand-in catches every read by operations of torch in a step, also deep within them, on the path
of an accelerator (`Tensor.is_cpu` is false). It cannot catch `torch.cuda.synchronize` or kernels
that wait internally (such as an SVD by MAGMA). A branch that depends on a number is a read and
raises. Numbers are not checked, because there are none.

One read is allowed: `Sight.read` of the result of a check of limited weights at the previous step,
which does not wait for later work. A test states the result.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wellcond.training.deferred import Sight

_READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique")


class ReadBackError(AssertionError):
    """A step read a number from the device."""


class _NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        if any(not tensor.is_cpu for tensor in tensors):
            if name in _READS:
                raise ReadBackError(f"{name} of a tensor of {tensors[0].shape}")
            waits = not kwargs.get("non_blocking", False)
            if name == "_to_copy" and waits and kwargs.get("device") == torch.device("cpu"):
                raise ReadBackError(f"a copy of {tensors[0].shape} to the CPU that waits")
            if name == "copy_" and waits and args[0].is_cpu and not args[1].is_cpu:
                raise ReadBackError(f"a copy of {args[1].shape} to the CPU that waits")
        try:
            return func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ReadBackError(f"{name} needs a number") from error


class _Event:
    """An event that never completes, as if the device were far behind the host."""

    def __init__(self, device: Any = None, **options: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        raise ReadBackError("a wait for an event")


@contextlib.contextmanager
def accelerator() -> Iterator[torch.device]:
    """Yields the device for models; within, every read of a number from it raises ReadBackError."""
    with contextlib.ExitStack() as entered:
        entered.enter_context(warnings.catch_warnings())
        # All pointers are 0, because a step assumes that tensors share memory.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        entered.enter_context(mock.patch.object(torch, "Event", _Event))
        entered.enter_context(FakeTensorMode())
        entered.enter_context(_NoReads())
        yield torch.device("lazy:0")


@contextlib.contextmanager
def sights(numbers: Sequence[float]) -> Iterator[None]:
    """Makes each check of a matrix return these numbers within this context."""

    def read(sight: Sight) -> list[list[list[float]]]:
        return [[[*numbers]] for _ in sight.states]

    with mock.patch.object(Sight, "read", read):
        yield
