"""Small symmetric matrices, such as the Gram matrices of blocks, without waiting for a device.

On the CPU the eigenvalue solver is fast. On other devices it waits for the device, so matrix
products replace it, with a relative error of about 1e-3.

Letters: G (..., k, k) a positive semidefinite matrix; lambda its eigenvalues.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# The coefficients of odd polynomials a x + b x^3 + c x^5 whose composition maps [1e-3, 1] to 1.
_SIGN = (
    (8.2051, -22.9019, 16.4607),
    (4.0664, -2.8612, 0.5184),
    (3.9096, -2.8234, 0.5250),
    (3.2856, -2.4153, 0.4853),
    (2.2779, -1.6198, 0.3985),
    (1.8726, -1.2307, 0.3585),
    (1.8564, -1.2132, 0.3568),
    (1.875, -1.25, 0.375),
)
_ROOT_STEPS = 10  # of the coupled iteration for an inverse root; for eigenvalues of at least 1/40


def top_eigenvector(gram: Tensor, squarings: int = 14) -> Tensor:
    """A unit eigenvector of the largest eigenvalue of a small symmetric (..., k, k) matrix.

    On the CPU it uses `eigh`, elsewhere repeated squaring, which never waits for the device. The
    power 2^14 reduces an eigenvalue that is smaller by 1e-3 to a share of less than 1e-7.
    """
    if gram.device.type == "cpu":
        eigenvectors: Tensor = torch.linalg.eigh(gram).eigenvectors
        return eigenvectors[..., -1]
    return power_eigenvector(gram, squarings)


def power_eigenvector(gram: Tensor, squarings: int) -> Tensor:
    """The column of gram^(2^squarings) with the largest norm, normalised: see `top_eigenvector`."""
    tiny = torch.finfo(gram.dtype).tiny
    power = gram
    for _ in range(squarings):
        power = power / power.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(tiny)
        power = power @ power
    norms = torch.linalg.vector_norm(power, dim=-2)
    best = norms.argmax(dim=-1, keepdim=True)
    column = torch.take_along_dim(power, best[..., None, :], dim=-1)[..., 0]
    return column / torch.take_along_dim(norms, best, dim=-1).clamp_min(tiny)


def eigenvalue_range(G: Tensor) -> Tensor:
    """The smallest and the largest eigenvalue, (..., 2); NaN where G is not finite.

    On devices other than the CPU they come from repeated squaring: the largest is too small, and
    the smallest too large, by a relative error of less than 1e-3. The smallest is NaN where G is
    numerically singular.
    """
    if G.is_cpu:
        # A matrix that is not finite would stop the solver for the entire stack.
        finite = torch.isfinite(G).all(-1, keepdim=True).all(-2, keepdim=True)
        values = torch.linalg.eigvalsh(G.where(finite, 0.0))
        ends = torch.stack([values[..., 0], values[..., -1]], dim=-1)
        known: Tensor = ends.where(finite[..., 0], torch.nan)
        return known
    scale = G.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(G.dtype).tiny)
    factor, failed = torch.linalg.cholesky_ex(G / scale)
    inverse = torch.cholesky_inverse(factor)
    largest = _rayleigh(G / scale)
    least = 1 / _rayleigh(inverse)
    least = torch.where(failed == 0, least, torch.nan)
    return torch.stack([least, largest], dim=-1) * scale[..., 0]


class Clip(NamedTuple):
    """How the singular values of Z (..., m, k) are clipped to 1, by its Gram matrix G = Z^T Z.

    Attributes:
        factor: F = min(1, G^(-1/2)) - I, so that the singular values of Z + Z F are min(sigma, 1).
            It is zero where a singular value exceeds `most` or G is not finite, and None if the
            host knows that it is zero for all matrices.
        root: R such that the columns of Z R are orthonormal; None if the eigenvectors of G are
            unknown, or R would be inaccurate.
        extremes: the smallest and the largest eigenvalue of G, (..., 2); NaN where G is not finite.
    """

    factor: Tensor | None
    root: Tensor | None
    extremes: Tensor


def clip_blocks(blocks: Sequence[Tensor], most: float, flat: float) -> list[Clip]:
    """The clips of blocks of several shapes, with the number of operations of a single block.

    Args:
        blocks: Z (..., m, k) of one dtype and on one device. A block with fewer columns than
            another one gets 0 as its smallest eigenvalue and no root.
        most: the singular value from which on F is zero. On devices other than the CPU, F comes
            from matrix products and is accurate up to 4.
        flat: R is computed if the ratio of the smallest to the largest singular value exceeds this.
    """
    k = max(Z.shape[-1] for Z in blocks)
    counts = [Z.shape[:-2].numel() for Z in blocks]
    G = _grams(blocks, counts, k)
    if G.is_cpu:
        return _clip_by_eigenvectors(G, blocks, counts, most, flat)
    extremes = eigenvalue_range(G)
    factor = _clip_factor_by_products(G).where(extremes[:, 1, None, None] < most**2, 0.0)
    each = zip(_parts(factor, blocks, counts), _parts(extremes, blocks, counts), strict=True)
    pairs = zip(blocks, each, strict=True)
    return [Clip(_corner(factor, Z.shape[-1]), None, ends) for Z, (factor, ends) in pairs]


def _grams(blocks: Sequence[Tensor], counts: Sequence[int], k: int) -> Tensor:
    """All Gram matrices, smaller ones padded with zeros.

    The zeros change neither F nor the largest eigenvalue.
    """
    G = blocks[0].new_zeros(sum(counts), k, k)
    at = 0
    for Z, count in zip(blocks, counts, strict=True):
        if Z.ndim == 2:
            _corner(G[at], Z.shape[-1]).addmm_(Z.mT, Z)
        elif count:
            Z = Z.reshape(count, *Z.shape[-2:])
            _corner(G[at : at + count], Z.shape[-1]).baddbmm_(Z.mT, Z)
        at += count
    return G


def _corner(G: Tensor, k: int) -> Tensor:
    return G if G.shape[-1] == k else G[..., :k, :k]


def _parts(tensor: Tensor, blocks: Sequence[Tensor], counts: Sequence[int]) -> Sequence[Tensor]:
    """The parts of a tensor that belong to each block."""
    if len(counts) == len(tensor) and all(Z.ndim == 2 for Z in blocks):
        return tensor.unbind()
    parts = zip(torch.split(tensor, list(counts)), blocks, strict=True)
    return [part.reshape(*Z.shape[:-2], *part.shape[1:]) for part, Z in parts]


def _clip_by_eigenvectors(
    G: Tensor, blocks: Sequence[Tensor], counts: Sequence[int], most: float, flat: float
) -> list[Clip]:
    values, W, ends = _eigh(G)
    extremes = G.new_tensor(ends)
    inverse = values.clamp_min(torch.finfo(G.dtype).tiny).rsqrt_()
    roots = _parts(W * inverse[:, None, :], blocks, counts)
    factors: Sequence[Tensor] = ()
    if any(1 < largest < most**2 for _, largest in ends):
        shares = inverse.clamp_max_(1).sub_(1)
        if not all(largest < most**2 for _, largest in ends):
            shares = shares.where(extremes[:, 1:] < most**2, 0.0)
        factors = _parts((W * shares[:, None, :]) @ W.mT, blocks, counts)
    clips, at = [], 0
    parts = _parts(extremes, blocks, counts)
    for index, (Z, count) in enumerate(zip(blocks, counts, strict=True)):
        rows = ends[at : at + count]
        at += count
        clips.append(
            Clip(
                _corner(factors[index], Z.shape[-1])
                if any(1 < largest < most**2 for _, largest in rows)
                else None,
                roots[index] if all(low > flat**2 * high for low, high in rows) else None,
                parts[index],
            )
        )
    return clips


def _eigh(G: Tensor) -> tuple[Tensor, Tensor, list[tuple[float, float]]]:
    """Eigenvalues, eigenvectors, and the ends of each spectrum, NaN where G is not finite."""
    with contextlib.suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        values, W = torch.linalg.eigh(G)
        rows = values.tolist()
        # For a matrix (2, 2) with NaN, eigh may return finite numbers.
        if G.shape[-1] > 2 and math.isfinite(sum(map(sum, rows))):
            return values, W, [(row[0], row[-1]) for row in rows]
    # A matrix that is not finite may stop the solver for the entire stack.
    finite = torch.isfinite(G).all(-1).all(-1)
    values, W = torch.linalg.eigh(G.where(finite[:, None, None], 0.0))
    known: list[bool] = finite.tolist()
    pairs = zip(values.tolist(), known, strict=True)
    return values, W, [(row[0], row[-1]) if good else (math.nan, math.nan) for row, good in pairs]


def _clip_factor_by_products(G: Tensor) -> Tensor:
    identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    H = G - identity
    excess = (H + H @ _sign(H)) / 2  # its eigenvalues are max(lambda - 1, 0)
    factor = _inverse_root(identity + (excess + excess.mT) / 2) - identity
    finite = torch.isfinite(factor).all(-1, keepdim=True).all(-2, keepdim=True)
    clipped: Tensor = factor.where(finite, 0.0)
    return clipped


def _sign(H: Tensor) -> Tensor:
    """The matrix sign of a symmetric H, for eigenvalues down to about 1e-3 of its norm."""
    X: Tensor = H / torch.linalg.matrix_norm(H, keepdim=True).clamp_min(torch.finfo(H.dtype).tiny)
    for a, b, c in _SIGN:
        square = X @ X
        X = a * X + X @ (b * square + c * (square @ square))
    return X


def _inverse_root(A: Tensor) -> Tensor:
    """A^(-1/2) of a symmetric A with eigenvalues of at least 1, by the coupled Newton iteration."""
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    # Half of the largest row sum: the iteration converges on (0, 3).
    bound = A.abs().sum(dim=-1).amax(dim=-1)[..., None, None] / 2
    Y, Z = A / bound, identity.expand_as(A)
    for _ in range(_ROOT_STEPS):
        T = (3 * identity - Z @ Y) / 2
        Y, Z = Y @ T, T @ Z
    return Z / bound.sqrt()


def _rayleigh(G: Tensor) -> Tensor:
    v = power_eigenvector(G, 14)[..., None]
    quotient: Tensor = (v.mT @ G @ v)[..., 0, 0]
    return quotient
