"""A product of two skinny matrices as a linear map: what a head of attention does, for one.

Letters: S = B A^T (m, n) with factors B (m, k) and A (n, k); nu = min(m, n, k) of its singular
values need not be zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Product:
    """S as products with it; the dense matrix is formed only when it is asked for.

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

    def matmat(self, V: Tensor) -> Tensor:
        return self.B @ (self.A.mT @ V)

    def rmatmat(self, U: Tensor) -> Tensor:
        return self.A @ (self.B.mT @ U)

    def squared_frobenius_norm(self, dtype: torch.dtype | None = None) -> Tensor:
        """||S||_F^2 = <B^T B, A^T A>."""
        B, A = self.B.to(dtype or self.dtype), self.A.to(dtype or self.dtype)
        return ((B.mT @ B) * (A.mT @ A)).sum()

    def finite(self) -> Tensor:
        """Whether no entry of the factors is NaN or infinite."""
        return torch.isfinite(self.B).all() & torch.isfinite(self.A).all()

    def dense(self) -> Tensor:
        return self.B @ self.A.mT
