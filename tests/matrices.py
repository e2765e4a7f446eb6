"""Difficult matrices: those of `wellcond.testing`, drawn by hypothesis, and named matrices."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from wellcond.testing import SPECTRA
from wellcond.testing import matrix_with_spectrum as with_spectrum

__all__ = ["SPECTRA", "with_spectrum"]


def orthonormal(rows: int, columns: int, source: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=source, dtype=torch.float64)).Q


@st.composite
def matrices(draw: st.DrawFn, names: tuple[str, ...] = tuple(SPECTRA)) -> Tensor:
    """Tall, wide, square, 1xn and nx1 matrices with one of the named spectra."""
    m, n = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    spectrum = SPECTRA[draw(st.sampled_from(names))]
    sigma = spectrum(min(m, n)).to(torch.float64)
    return with_spectrum(sigma, m, n, draw(st.integers(0, 10_000)))


def hilbert(n: int) -> Tensor:
    """1/(i + j + 1): kappa grows like e^(3.5 n)."""
    i = torch.arange(n, dtype=torch.float64)
    return 1 / (i[:, None] + i + 1)


def lauchli(n: int, mu: float) -> Tensor:
    """A row of ones over mu I: the Gram matrix loses mu^2 entirely."""
    return torch.cat(
        [torch.ones(1, n, dtype=torch.float64), mu * torch.eye(n, dtype=torch.float64)]
    )


def kahan(n: int, theta: float) -> Tensor:
    """Upper triangular and graded, with a smallest singular value that pivoting misses."""
    s, c = math.sin(theta), math.cos(theta)
    upper = torch.eye(n, dtype=torch.float64) - c * torch.triu(
        torch.ones(n, n, dtype=torch.float64), 1
    )
    return s ** torch.arange(n, dtype=torch.float64)[:, None] * upper


def hadamard_conjugate(d: Tensor) -> Tensor:
    """H diag(d) H/n with a Hadamard matrix H, n = len(d) a power of 2.

    For integers whose sums are below 2^53, it is exact in float64, so its singular values are
    exactly |d|.
    """
    n = len(d)
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return (H * d.double()) @ H / n
