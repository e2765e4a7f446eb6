"""The working precision of weights, and stochastic rounding to half precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_NOTHING = contextlib.nullcontext()
_BACKENDS: list[Any] = [
    torch.backends.cuda.matmul,
    getattr(torch.backends.mkldnn, "matmul", None),
]
_SETTINGS = [b for b in _BACKENDS if hasattr(b, "fp32_precision")]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the working dtype of a weight: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widest_dtype(device: torch.device) -> torch.dtype:
    """Returns float64, or float32 on devices without float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def full_precision(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Returns a context without autograd and autocast, and with float32 products in full precision.

    Users enable TF32 and bfloat16 products for the entire process to train faster. A subspace, a
    Ritz value or a Gram matrix would be wrong with their ten bits.
    """
    others = _without_autocast(device_type), _products_in_float32()
    if others == (_NOTHING, _NOTHING):
        return torch.no_grad()
    return _all_of(torch.no_grad(), *others)


@contextlib.contextmanager
def _all_of(*contexts: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    with contextlib.ExitStack() as entered:
        for one in contexts:
            entered.enter_context(one)
        yield


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(device_type)
    if not (available and torch.is_autocast_enabled(device_type)):
        return _NOTHING
    return torch.autocast(device_type, enabled=False)


def _products_in_float32() -> contextlib.AbstractContextManager[Any]:
    if len(_SETTINGS) < len(_BACKENDS):
        # Older versions of torch have one setting for all backends.
        if torch.get_float32_matmul_precision() == "highest":
            return _NOTHING
        return _highest_precision()
    coarse = [b for b in _SETTINGS if b.fp32_precision not in ("ieee", "none")]
    return _ieee_products(coarse) if coarse else _NOTHING


@contextlib.contextmanager
def _highest_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _ieee_products(coarse: list[Any]) -> Iterator[None]:
    settings = [backend.fp32_precision for backend in coarse]
    for backend in coarse:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, setting in zip(coarse, settings, strict=True):
            backend.fp32_precision = setting


def round_stochastically(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rounds x to a dtype of half precision stochastically, without bias.

    With rounding to nearest, repeated steps of 1e-3 of an entry would all vanish in bfloat16.
    """
    info = torch.finfo(dtype)
    # The spacing of that dtype at x, a power of two.
    unit = torch.ldexp(torch.full_like(x, info.eps), torch.frexp(x).exponent - 1)
    multiple = x / unit.clamp_min_(info.tiny * info.eps)
    below = multiple.floor()
    chance = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return (below + (chance < multiple - below)).mul_(unit).to(dtype)
