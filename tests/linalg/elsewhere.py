"""Tensors on a simulated second device: an operation must not mix tensors of two devices.

The device is called "meta", because PyTorch needs no driver for it, but the tensors have values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class There(Tensor):
    """A tensor on the simulated device; `held` contains its values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        options = {"dtype": held.dtype, "device": "meta"}
        place = (held.shape, held.stride(), held.storage_offset())
        tensor: There = Tensor._make_wrapper_subclass(cls, *place, **options)
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> None:
        raise AssertionError("only within `Elsewhere`")


class Elsewhere(TorchDispatchMode):
    """Simulates the second device while the mode is active."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        there = any(isinstance(x, There) for x in tensors)
        # Tensors without dimensions may be on the CPU in any operation.
        here = [x for x in tensors if not isinstance(x, There) and x.ndim]
        if there and here and func not in COPIES:
            raise RuntimeError(f"{func} expects all tensors on the same device, but got two")
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type == "meta"
            kwargs["device"] = torch.device("cpu")
        held = tree_map(lambda x: x.held if isinstance(x, There) else x, (args, kwargs))
        result = func(*held[0], **held[1])
        return tree_map(lambda x: There(x) if isinstance(x, Tensor) and there else x, result)
