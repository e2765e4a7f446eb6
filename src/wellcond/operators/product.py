"""A product of two skinny matrices as a linear map: what a head of attention does, for one.

Letters: S = B A^T (m, n) with factors B (m, k) and A (n, k); nu = min(m, n, k) of its singular
values need not be zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Product:
    """S as its factors; the dense matrix is never formed.

    `nu` counts the leading singular values: all others are zero whatever the entries are.

    Args:
        B: (m, k).
        A: (n, k), of the same dtype and on the same device.
    """

    def __init__(self, B: Tensor, A: Tensor) -> None:
        self.B, self.A = B, A
        self.dtype, self.device = B.dtype, B.device

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self.B), len(self.A)])

    @property
    def nu(self) -> int:
        return min(len(self.B), len(self.A), self.B.shape[1])
