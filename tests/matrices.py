"""Matrices with a prescribed spectrum, each with the reason why it is hard."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor


def orthonormal(rows: int, columns: int, source: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=source, dtype=torch.float64)).Q


def with_spectrum(sigma: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    """U diag(sigma) V^T, (m, n), with random singular vectors, float64."""
    source = torch.Generator().manual_seed(seed)
    U, V = orthonormal(m, len(sigma), source), orthonormal(n, len(sigma), source)
    return U * sigma @ V.mT


# Spectra as functions of nu.
SPECTRA = {
    "gap": lambda nu: torch.linspace(1, 2, nu).flip(0) + 3 * (torch.arange(nu) == 0),  # easy
    "no gap": lambda nu: 1 - 0.1 * torch.arange(nu) / nu,  # vectors are ill-defined
    "cluster": lambda nu: 1 - 1e-9 * torch.arange(nu) * (torch.arange(nu) < 3),  # nearly tied
    "tied": lambda nu: torch.where(torch.arange(nu) < 2, 2.0, 1.0),  # no gradient exists
    "semi-orthogonal": lambda nu: torch.ones(nu),  # r = 0, all tied
    "graded": lambda nu: 10.0 ** -torch.arange(nu),  # kappa grows with nu
    "rank-deficient": lambda nu: (torch.arange(nu) < max(1, nu - 1)) * 1.5,  # sigma_nu = 0
    "rank-one": lambda nu: (torch.arange(nu) == 0) * 2.0,  # srank = 1
    "zero": lambda nu: torch.zeros(nu),  # kappa is nan
    "large": lambda nu: 1e30 * (1 + torch.arange(nu)).flip(0),  # squares overflow in float32
    "small": lambda nu: 1e-30 * (1 + torch.arange(nu)).flip(0),  # squares vanish in float32
}


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
    """Upper triangular, graded, with a smallest singular value that pivoting does not see."""
    s, c = math.sin(theta), math.cos(theta)
    upper = torch.eye(n, dtype=torch.float64) - c * torch.triu(
        torch.ones(n, n, dtype=torch.float64), 1
    )
    return s ** torch.arange(n, dtype=torch.float64)[:, None] * upper


def hadamard_conjugate(d: Tensor) -> Tensor:
    """H diag(d) H/n with a Hadamard matrix H, n = len(d) a power of 2.

    For integers whose sums stay below 2^53 it is exact in float64, and so its singular values are
    |d|, exactly.
    """
    n = len(d)
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < n:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return (H * d.double()) @ H / n
