"""The Frobenius norm of weights whose squares overflow or underflow in the working dtype.

Letters: S (..., m, n) the weight; nu = min(m, n).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wellcond.operators.base import HasGram, Operator
from wellcond.operators.rounding import widest_dtype

# If a sum of squares exceeds the smallest normal number by this factor, underflowed squares are
# negligible.
_CLEAR = 1e18


def squared_norm_over(S: Operator, unit: Tensor, precise: bool = False) -> Tensor:
    """Returns ||S/unit||_F^2, one number per matrix; a unit 0 counts as 1.

    On the CPU, it uses the working dtype if the sum of squares neither overflows nor underflows,
    because a float64 sum takes eight times as long. Otherwise, on devices where this check would
    synchronise, and if `precise`, it uses the widest dtype of the device.
    """
    unit = torch.where(unit > 0, unit, 1.0)  # also 0 if the image of a subspace is zero
    if unit.is_cpu and not precise:
        squares = S.squared_frobenius_norm()
        if _is_clear(squares):
            return squares / unit.square()
    wide = widest_dtype(S.device)
    over = unit.to(wide)
    squares = S.squared_frobenius_norm(wide)
    if unit.is_cpu and S.dtype == wide and isinstance(S, HasGram) and not _is_clear(squares):
        return S.gram(wide, over).diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return squares / over / over


def _is_clear(squares: Tensor) -> bool:
    least = torch.finfo(squares.dtype).tiny * _CLEAR
    return all(least < number < math.inf for number in squares.flatten().tolist())
