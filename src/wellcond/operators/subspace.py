"""The leading singular subspace of a weight, kept warm from step to step.

Training moves a weight little between two steps, so the leading subspace of the last step is
nearly that of this one, and a single skinny product refines it. The sides alternate: a step from
the right forms Y = S V and keeps U = orth(Y); the next, from the left, forms Z = S^T U and keeps
V = orth(Z). Two steps are one sweep of block power iteration. A block is needed because the
regulariser pulls the leading singular values together, where a single vector cannot follow them.

Letters: S (..., m, n) the weight; U (..., m, k), V (..., n, k) orthonormal columns; k the width of
the block; sigma (..., k) Ritz values, descending, each a lower bound of the singular value of its
rank.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from wellcond.operators.stored import Operator


class Subspace(NamedTuple):
    """An approximate leading subspace on both sides; `from_right` says from which one to go on."""

    left: Tensor
    right: Tensor
    from_right: bool


class Product(NamedTuple):
    """What one product with the weight tells: left right^T = S V V^T, or U U^T S from the left.

    `left` is S V and `right` is V, or `left` is U and `right` is S^T U; `usable` is False for each
    matrix that is zero or not finite, `finite` for the latter alone.
    """

    left: Tensor
    right: Tensor
    gram: Tensor  # of the factor that holds S, scaled by its largest entry: (..., k, k)
    from_right: bool
    usable: Tensor
    finite: Tensor


class Ritz(NamedTuple):
    """Approximate singular triplets: left_i right_i^T = sigma_i u_i v_i^T."""

    left: Tensor
    right: Tensor
    from_right: bool = True  # then the columns of left have the norms sigma, else those of right

    @property
    def sigma(self) -> Tensor:
        """Column norms: more accurate than roots of eigenvalues of the Gram matrix."""
        return _column_norms(self.left if self.from_right else self.right)


def cold_start(operator: Operator, width: int, seed: str) -> Subspace:
    """A random subspace, drawn from a generator of its own that is seeded by a name."""
    *stack, m, n = operator.shape
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))

    def orthonormal(rows: int) -> Tensor:
        normal = torch.randn(*stack, rows, width, generator=generator, dtype=operator.dtype)
        return by_columns(torch.linalg.qr(normal).Q.to(operator.device))

    return Subspace(orthonormal(m), orthonormal(n), from_right=True)


def by_columns(X: Tensor) -> Tensor:
    """X in the memory layout in which a QR factorisation leaves its Q.

    A product rounds otherwise in another layout: what is restored or received must have this one.
    """
    return X.mT.contiguous().mT


def refine(operator: Operator, subspace: Subspace) -> tuple[Product, Subspace]:
    """One product with the weight: what it tells, and the subspace refined on the other side."""
    U, V, from_right = subspace
    return completed(operator.matmat(V) if from_right else operator.rmatmat(U), subspace)


def completed(
    image: Tensor, subspace: Subspace, basis: Tensor | None = None
) -> tuple[Product, Subspace]:
    """What the image of a subspace tells of the weight; `basis` is that of the image, if known.

    Where the weight is zero or not finite the subspace is handed back as it was, so that it is
    still a sound start once the weight has recovered.
    """
    U, V, from_right = subspace
    # A NaN or an infinity anywhere in S makes its row of the image, and so the scale, not finite.
    scale = image.abs().amax(dim=(-2, -1), keepdim=True)
    finite = scale < torch.inf
    usable = finite & (scale > 0)
    # Scaled, so that squares neither overflow nor vanish: weights may be 1e30 or 1e-30.
    scaled = image / torch.where(usable, scale, 1.0)
    gram = torch.where(usable, scaled.mT @ scaled, 0.0)
    if basis is None:
        basis = torch.where(usable, torch.linalg.qr(scaled).Q, U if from_right else V)
    product = Product(
        image if from_right else U,
        V if from_right else image,
        gram,
        from_right,
        usable[..., 0, 0],
        finite[..., 0, 0],
    )
    return product, Subspace(basis if from_right else U, V if from_right else basis, not from_right)


def warmed(operator: Operator, subspace: Subspace) -> Subspace:
    """The subspace after two sweeps; on less than one a proximal step could raise kappa."""
    for _ in range(4):
        _, subspace = refine(operator, subspace)
    return subspace


def top_pair(product: Product) -> Ritz:
    """The first Ritz triplet alone, as factors of one column."""
    return _rotated(product, top_eigenvector(product.gram)[..., None])


def ritz_triplets(product: Product) -> Ritz:
    """All k Ritz triplets, descending. The eigenvalue solver synchronises with the host on CUDA."""
    return _rotated(product, torch.linalg.eigh(product.gram).eigenvectors.flip(-1))


def _rotated(product: Product, rotation: Tensor) -> Ritz:
    return Ritz(product.left @ rotation, product.right @ rotation, product.from_right)


def _column_norms(X: Tensor) -> Tensor:
    """Euclidean norms of columns whose squares may overflow or vanish."""
    unit = X.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
    norms: Tensor = torch.linalg.vector_norm(X / unit, dim=-2)
    return norms * unit[..., 0]


def top_eigenvector(gram: Tensor, squarings: int = 14) -> Tensor:
    """A unit eigenvector of the largest eigenvalue of a small symmetric (..., k, k) matrix.

    On the CPU by `eigh`. Elsewhere by repeated squaring, which never asks the host: the power 2^14
    leaves of an eigenvalue 1 part in 1000 smaller less than 1e-7.
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


def residual(operator: Operator, product: Product) -> Tensor:
    """||S^T u - sigma v|| of the top triplet: a singular value lies within it of sigma (Weyl)."""
    top = top_pair(product)
    left, right, sigma = top.left, top.right, top.sigma
    inverse = 1 / torch.where(sigma > 0, sigma, 1.0)[..., None, :]
    if product.from_right:
        error = operator.rmatmat(left * inverse) - sigma[..., None, :] * right
    else:
        error = operator.matmat(right * inverse) - sigma[..., None, :] * left
    return _column_norms(error)[..., 0]
