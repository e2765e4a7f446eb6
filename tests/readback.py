"""A stand-in for an accelerator on which nothing can be read back: a step must not wait for it.

Tensors are fake: they have a shape, a dtype and a device, and no data, so that the host
cannot know a single number of them. What needs one raises, as `Tensor.item`, `bool`, `float`,
`tolist`, `numpy`, `torch.equal`, `nonzero` and masks do; so does a copy to the CPU that waits.
A copy that does not wait is allowed; the event after it says that it has not arrived yet.

It catches every read that a step does by operations of torch, also deep within them, on the path
that an accelerator takes (`Tensor.is_cpu` is false). It cannot catch `torch.cuda.synchronize`,
kernels that wait by themselves (as an SVD by MAGMA does), or paths that depend on numbers: such a
branch is a read and raises. Numbers are not checked, because there are none.

One read is allowed, and named here: `Sight.read`, of what a look at limited weights has found at
the step before, which does not wait for what follows. A test says what it finds.
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
    """A number of a device was read while a step was under way."""


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
    """One that is never reached, as if the device were far behind the host."""

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
    """The device to make models on; within, every read of a number of it raises ReadBackError."""
    with contextlib.ExitStack() as entered:
        entered.enter_context(warnings.catch_warnings())
        # All of them are 0: that tensors share memory is what a step takes for granted.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        entered.enter_context(mock.patch.object(torch, "Event", _Event))
        entered.enter_context(FakeTensorMode())
        entered.enter_context(_NoReads())
        yield torch.device("lazy:0")


@contextlib.contextmanager
def sights(numbers: Sequence[float]) -> Iterator[None]:
    """Within, a look at any matrix has found these numbers."""

    def read(sight: Sight) -> list[list[list[float]]]:
        return [[[*numbers]] for _ in sight.states]

    with mock.patch.object(Sight, "read", read):
        yield
