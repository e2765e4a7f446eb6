"""What a tensor of a file means by its name, shape and dtype: a file has no classes.

Two dimensions are a matrix as stored; three a stack of matrices, or a kernel if "conv" is in the
name; four and more a kernel.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor

from wellcond.operators.views import Kernel
from wellcond.weights.matrices import numbered
from wellcond.weights.reasons import Reason, Skipped

_MEASURED = ("float64", "float32", "float16", "bfloat16")


def why_no_weight(shape: tuple[int, ...], dtype: str) -> Skipped | None:
    """Why a tensor holds no weight; None if it does."""
    if len(shape) < 2:
        return Skipped((Reason.number, Reason.vector)[len(shape)])
    if 0 in shape:
        return Skipped(Reason.empty, f"shape {shape}")
    if dtype in _MEASURED:
        return None
    # float8_e4m3fn, or F6_E2M3, which torch has no name for
    narrow = re.match(r"(F|float)[864](_|$)", dtype)
    return Skipped(Reason.quantised if narrow else Reason.packed, dtype)


def views_by_name(name: str, dimensions: int) -> Callable[[Tensor], dict[str, Tensor]]:
    """The matrices in a tensor, by the name of their view."""
    if dimensions == 2:
        return lambda tensor: {"": tensor}
    if dimensions == 3 and "conv" not in name.lower():
        return numbered
    return lambda tensor: {"kernel": Kernel()(tensor)}
