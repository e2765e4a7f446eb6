"""Whether two tensors of a forward pass are equal up to rounding, layout and a border."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor


def are_equal(a: Tensor, b: Tensor) -> bool:
    """Whether they are equal, where NaN equals NaN; their dtypes can differ."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    if a.shape != b.shape or torch.equal(a, b):
        return a.shape == b.shape
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def differ_alike(y: Tensor, y_origin: Tensor, there: Tensor, there_origin: Tensor) -> bool:
    """Whether y - y_origin equals there - there_origin, up to the rounding of the operands."""
    if y.shape != y_origin.shape or there.shape != there_origin.shape:
        return False
    rounding = 4 * torch.finfo(y.dtype).eps
    own, room = (rounding * (a.abs() + b.abs()) for a, b in ((y, y_origin), (there, there_origin)))
    for b, extra in zip(arrangements(there - there_origin, y), arrangements(room, y), strict=True):
        a, b, error = y - y_origin, b.view_as(y), own + extra.view_as(y)
        # A difference that rounding could hide is unknown.
        close = ((a - b).abs() <= error) & (error <= b.abs() / 2)
        if bool((close | (a == b)).all()):
            return True
    return False


def is_rearranged(part: Tensor, whole: Tensor) -> bool:
    """Whether the first is the second in another layout, or without a border."""
    return any(is_near(part, one.view_as(part)) for one in arrangements(whole, part))


def is_near(a: Tensor, b: Tensor) -> bool:
    """Whether all entries are equal, in float32 and wider dtypes up to their last bits."""
    if torch.equal(a, b):
        return True
    eps = torch.finfo(b.dtype).eps
    error = 4 * eps if eps < 1e-6 else 0.0
    equal = (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= error * b.abs())
    return bool(equal.all())


def arrangements(whole: Tensor, like: Tensor) -> Iterator[Tensor]:
    """The layouts of a tensor with as many entries as `like`; otherwise its blocks of that shape.

    A block has all channels (the second axis) and a part of the positions.
    """
    if whole.numel() == like.numel():
        yield whole.contiguous()
        if whole.ndim > 2:
            yield whole.movedim(1, -1).contiguous()
        return
    if whole.ndim != like.ndim or whole.ndim < 3 or whole.shape[:2] != like.shape[:2]:
        return
    sizes = like.shape[2:]
    ends = (range(a - b + 1) for a, b in zip(whole.shape[2:], sizes, strict=True))
    for starts in itertools.product(*ends):
        block = whole
        for axis, (start, size) in enumerate(zip(starts, sizes, strict=True), 2):
            block = block.narrow(axis, start, size)
        yield block.contiguous()
