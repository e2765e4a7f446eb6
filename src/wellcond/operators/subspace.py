"""A warm-started estimate of the leading singular subspace of a weight.

Training changes a weight little between two steps, so the leading subspaces of both steps are
nearly equal, and a single skinny product refines the estimate. The sides alternate: a step from the
right forms Y = S V and keeps U = orth(Y). The next step, from the left, forms Z = S^T U and keeps
V = orth(Z). Two steps are one sweep of block power iteration. A block is necessary because the
regulariser pulls the leading singular values together, and a single vector cannot follow them. A
block as wide as the shorter side spans all of it. It is never refined, and its results are exact.

Letters: S (..., m, n) the weight; U (..., m, k), V (..., n, k) orthonormal columns; k the width of
the block; sigma (..., k) Ritz values, descending, each a lower bound of the singular value of its
rank.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wellcond.linalg.symmetric import top_eigenvector
from wellcond.operators.base import Operator


class Subspace(NamedTuple):
    """An approximate leading subspace: V if the next product is from the right, else U."""

    basis: Tensor
    from_right: bool


class Ritz(NamedTuple):
    """Approximate singular triplets: left_i right_i^T = sigma_i u_i v_i^T."""

    left: Tensor
    right: Tensor
    from_right: bool = True  # whether sigma are the column norms of left, not of right

    @property
    def sigma(self) -> Tensor:
        """Column norms: more accurate than roots of eigenvalues of the Gram matrix."""
        return _column_norms(self.left if self.from_right else self.right)


class Image:
    """The product of a weight with a subspace: left right^T = S V V^T, or U U^T S.

    Attributes:
        left: S V, or U if the product was from the left.
        right: V, or S^T U if the product was from the left.
        gram: the Gram matrix of the factor with S, scaled by its largest entry, (..., k, k).
        from_right: whether the product was S V.
        usable: False for each matrix that is zero or not finite.
        finite: False for each matrix that is not finite.
    """

    def __init__(
        self,
        left: Tensor,
        right: Tensor,
        gram: Tensor,
        from_right: bool,
        usable: Tensor,
        finite: Tensor,
    ) -> None:
        self.left, self.right, self.gram, self.from_right = left, right, gram, from_right
        self.usable, self.finite = usable, finite

    @functools.cached_property
    def top(self) -> Ritz:
        """The first Ritz triplet, as factors of one column, without synchronising."""
        return self._rotated(self._top_vector)

    @functools.cached_property
    def _top_vector(self) -> Tensor:
        return top_eigenvector(self.gram)[..., None]

    @functools.cached_property
    def triplets(self) -> Ritz:
        """All k Ritz triplets, descending; on CUDA, the eigenvalue solver synchronises."""
        return self._rotated(torch.linalg.eigh(self.gram).eigenvectors.flip(-1))

    def crowded(self, share: float) -> Tensor:
        """Returns whether all Ritz values exceed this share of the first, without synchronising."""
        top = self._top_vector
        largest = top.mT @ self.gram @ top
        identity = torch.eye(self.gram.shape[-1], dtype=top.dtype, device=top.device)
        shifted = self.gram - share**2 * largest * identity
        failed: Tensor = torch.linalg.cholesky_ex(shifted).info
        return (failed == 0) & self.usable

    def _rotated(self, rotation: Tensor) -> Ritz:
        return Ritz(self.left @ rotation, self.right @ rotation, self.from_right)


def cold_start(operator: Operator, width: int, seed: str) -> Subspace:
    """Returns a random subspace, drawn from a separate generator that is seeded by a name."""
    *stack, m, n = operator.shape
    from_right = width < operator.nu or n <= m
    rows = n if from_right else m
    source = torch.Generator("cpu").manual_seed(zlib.crc32(seed.encode()))
    normal = torch.randn(*stack, rows, width, generator=source, dtype=operator.dtype, device="cpu")
    return Subspace(by_columns(torch.linalg.qr(normal).Q.to(operator.device)), from_right)


def by_columns(X: Tensor) -> Tensor:
    """Returns X in the memory layout of the Q of a QR factorisation.

    Products in another layout round differently, so restored or received bases need this layout.
    """
    return X.mT.contiguous().mT


def refine(operator: Operator, subspace: Subspace) -> tuple[Image, Subspace]:
    """Returns the image of a subspace, from one product, and the refined subspace."""
    basis, from_right = subspace
    return read_image(operator.matmat(basis) if from_right else operator.rmatmat(basis), subspace)


def read_image(
    image: Tensor, subspace: Subspace, basis: Tensor | None = None
) -> tuple[Image, Subspace]:
    """Returns the image of a subspace as an `Image`, and the subspace for the next product.

    `basis` is an orthonormal basis of the image, if it is known. If the weight is zero or not
    finite, the next subspace does not depend on it, which is a sound start once it has recovered.
    """
    start, from_right = subspace
    # A NaN or an infinity anywhere in S makes its row of the image, and so the scale, not finite.
    scale = image.abs().amax(dim=(-2, -1), keepdim=True)
    finite = scale < torch.inf
    usable = finite & (scale > 0)
    # Scale, so that squares neither overflow nor underflow: weights can be 1e30 or 1e-30.
    scaled = image / torch.where(usable, scale, 1.0)
    gram = torch.where(usable, scaled.mT @ scaled, 0.0)
    left, right = (image, start) if from_right else (start, image)
    told = Image(left, right, gram, from_right, usable[..., 0, 0], finite[..., 0, 0])
    if _complete(subspace):
        return told, subspace
    if basis is None:
        # A QR factorisation returns an orthonormal basis for any columns, even equal ones.
        ramp = torch.arange(1.0, image.shape[-2] + 1, dtype=image.dtype, device=image.device)
        basis = torch.linalg.qr(torch.where(usable, scaled, ramp.sqrt()[:, None])).Q
    return told, Subspace(basis, not from_right)


def _complete(subspace: Subspace) -> bool:
    """Returns whether the subspace is the entire space, so that no refinement is necessary."""
    return subspace.basis.shape[-1] == subspace.basis.shape[-2]


def warm_up(operator: Operator, subspace: Subspace) -> Subspace:
    """Returns the subspace after two sweeps; after less than one, a step could raise kappa."""
    for _ in range(0 if _complete(subspace) else 4):
        _, subspace = refine(operator, subspace)
    return subspace


def krylov_image(operator: Operator, subspace: Subspace, sweeps: int) -> Image:
    """Returns the image of a block Krylov space, V and its images under `sweeps` sweeps.

    Its Ritz values converge much faster than those of the last block of the same sweeps.
    """
    blocks = [subspace.basis]
    rows, width = subspace.basis.shape[-2:]
    for _ in range(0 if _complete(subspace) else min(sweeps, -(-rows // width) - 1)):
        for _ in range(2):
            _, subspace = refine(operator, subspace)
        blocks.append(subspace.basis)
    if len(blocks) > 1:
        # The QR factorisation returns orthonormal columns even if the blocks overlap.
        basis = torch.linalg.qr(torch.cat(blocks, dim=-1)).Q
        subspace = Subspace(basis, subspace.from_right)
    return refine(operator, subspace)[0]


def lead(image: Image, width: int) -> Subspace:
    """Returns the leading `width` Ritz vectors of an image, a start for the next product."""
    left, right, from_right = image.triplets
    return Subspace(by_columns((right if from_right else left)[..., :width]), from_right)


def align_sides(operators: Sequence[Operator], subspaces: Sequence[Subspace]) -> list[Subspace]:
    """Returns all subspaces on the side of the first; the others need one product each."""
    side = subspaces[0].from_right
    return [
        subspace if subspace.from_right is side else refine(operator, subspace)[1]
        for operator, subspace in zip(operators, subspaces, strict=True)
    ]


def _column_norms(X: Tensor) -> Tensor:
    """Returns Euclidean norms of columns whose squares might overflow or underflow."""
    unit = X.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(X.dtype).tiny)
    norms: Tensor = torch.linalg.vector_norm(X / unit, dim=-2)
    return norms * unit[..., 0]


def residual(operator: Operator, image: Image) -> Tensor:
    """Returns ||S^T u - sigma v|| of the top triplet.

    A singular value is within this distance of sigma (Weyl).
    """
    left, right = image.top.left, image.top.right
    sigma = image.top.sigma[..., None, :]
    unit = torch.where(sigma > 0, sigma, 1.0)  # its inverse might overflow
    if image.from_right:
        error = operator.rmatmat(left / unit) - sigma * right
    else:
        error = operator.matmat(right / unit) - sigma * left
    return _column_norms(error)[..., 0]
