"""In which dtype a weight is worked on, and how results are rounded back to half precision."""

from __future__ import annotations

import torch
from torch import Tensor


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a weight of this dtype is worked on: float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounded(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """x in a dtype of half precision, each entry up or down by chance so that the mean is x.

    To the nearest, a step of 1e-3 of an entry would vanish in bfloat16 however often it is taken.
    """
    info = torch.finfo(dtype)
    # The distance of the neighbours of x in that dtype, a power of two.
    unit = torch.ldexp(torch.full_like(x, info.eps), torch.frexp(x).exponent - 1)
    multiple = x / unit.clamp_min_(info.tiny * info.eps)
    below = multiple.floor()
    chance = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    return (below + (chance < multiple - below)).mul_(unit).to(dtype)
