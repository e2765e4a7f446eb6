"""A device that holds no data and counts what is asked of it."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Factorisations whose status the host reads on a CUDA device, and reads of numbers.
_WAITS = ("_linalg_eigh", "_linalg_svd", "linalg_cholesky.", "nonzero", "_local_scalar_dense")


class Device(TorchDispatchMode):
    """Counts the operations on meta tensors for which the host would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.synchronisations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).removeprefix("aten.")
        on_device = any(x.is_meta for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        to_host = name.startswith("_to_copy") and kwargs.get("device") == torch.device("cpu")
        waits = name.startswith(_WAITS) or (to_host and not kwargs.get("non_blocking"))
        self.synchronisations += on_device and waits
        if to_host and args[0].is_meta:
            return torch.zeros_like(args[0], device="cpu")
        return func(*args, **kwargs)


class _NoEvent:
    """Stands for an event of a device, which meta tensors do not have."""

    def __init__(self, device: torch.device) -> None: ...

    def record(self) -> None: ...

    def query(self) -> bool:
        return False


@contextlib.contextmanager
def on_a_device() -> Iterator[Device]:
    with mock.patch("torch.Event", _NoEvent), Device() as device:
        yield device
