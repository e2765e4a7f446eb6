"""A product of two skinny matrices, such as a head of attention or a low-rank adapter.

Letters: S = B A^T (m, n) with factors B (m, k) and A (n, k); at most nu = min(m, n, k) of its
singular values are not zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Product:
    """S, given by its factors; the dense matrix is never formed.

    `nu` is the number of leading singular values; all others are zero.

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
