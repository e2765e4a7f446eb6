"""Measured singular values and condition numbers of single matrices.

All arithmetic is float64. The singular values are the square roots of the eigenvalues of the
smaller Gram matrix if that resolves them. The relative error of sigma_nu^2, eps kappa^2, may be too
large. Then sigma_nu comes from inverse iteration and is measured as ||S v||, which does not square
S. An SVD decides if the iteration does not converge, or if rounding of the Gram matrix may have
hidden sigma_nu.

Letters: S (..., m, n) a matrix or a batch of them; G the Gram matrix S^T S, or S S^T if that is
smaller; sigma (..., nu) the singular values, descending; nu = min(m, n); kappa = sigma_1/sigma_nu.
"""

from __future__ import annotations

import enum
import hashlib
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wellcond.linalg.arrays import takes_arrays
from wellcond.linalg.checks import as_matrices, check_matrices
from wellcond.linalg.lapack import singular_values
from wellcond.linalg.projection import gram
from wellcond.linalg.scaling import NARROW, split_scale

_EPS = torch.finfo(torch.float64).eps
# Up to _SMALL (nu) an SVD is as fast as the Gram matrix; from _LARGE on, Krylov spaces find the
# extremes faster than eigenvalues of the Gram matrix (`wellcond bench audit`).
_SMALL, _LARGE = 256, 2048
_BAND = 1 << 20  # entries that are converted at once
# Accepted relative errors of a squared singular value: for the Gram matrix by the bound
# n eps kappa^2, which is pessimistic; for an iteration by its residual, which is an estimate.
_GRAM_ERROR, _RESIDUAL_ERROR = 1e-6, 1e-8
# The Gram matrix is computed with an error D, and the vector v of its smallest eigenvalue has
# ||S v||^2 <= sigma_nu^2 + 2 ||D|| (Weyl). If sigma_nu^2 is smaller than ||D||, an iteration may
# converge to another vector, and its residual does not show it. ||D|| is taken as
# max(m, n) eps sigma_1^2; a result must exceed ||D||/_HIDDEN to rule out a much smaller sigma_nu.
_HIDDEN = 0.1


class Method(enum.Enum):
    """The algorithm that computed the singular values of a weight."""

    svd = "SVD in float64"
    gram = "eigenvalues of the Gram matrix in float64"
    inverse = "eigenvalues of the Gram matrix in float64, the smallest by inverse iteration"
    krylov = "extremes only, by block Krylov spaces of the Gram matrix and its inverse in float64"


class Spectrum(NamedTuple):
    """Singular values of one matrix, descending: all of them, or only the extremes (`krylov`).

    They are `unit * scaled`, kept apart because the product may overflow where kappa does not.
    `shape` is (m, n), or (g, m, n) for g blocks of a block-diagonal matrix.
    """

    scaled: Tensor
    method: Method
    shape: torch.Size
    unit: float = 1.0

    @property
    def singular_values(self) -> Tensor:
        return self.scaled * self.unit

    @property
    def condition_number(self) -> float:
        """inf if sigma_nu is zero to working precision, nan for a zero matrix."""
        sigma = self.scaled.cpu()
        largest, smallest = float(sigma[0]), float(sigma[-1])
        if largest == 0:
            return math.nan
        return math.inf if smallest <= rank_tolerance(self.shape) * largest else largest / smallest


@takes_arrays
def condition_number(S: Tensor) -> Tensor:
    """The condition number kappa = sigma_1/sigma_nu of the stored values, computed in float64.

    It uses an SVD, or for a single matrix with nu > 256 the cheapest sound method. Relative errors
    were below 1e-6 for kappa up to 1e5 (`wellcond bench audit`). For proven bounds, see `certify`.

    Args:
        S: real or complex floating-point tensor or NumPy array (..., m, n); leading dimensions are
            a batch. For A + iB the result is the condition number of [[A, -B], [B, A]].

    Returns:
        Tensor (...), float64, dimensionless, at least 1; for a NumPy array, an array or a NumPy
        number. It is inf where sigma_nu <= max(m, n) eps(float64) sigma_1, which is zero to working
        precision, and nan where S = 0. It is on the device of S, or on the CPU if that device has
        no float64.

    Raises:
        ValueError: S has fewer than two dimensions or no entries, contains NaN or infinity, or is a
            meta tensor; LAPACK does not converge.
        TypeError: the dtype of S is integer, boolean or float8, whose entries are codes that must
            be dequantised first.

    Example:
        >>> import torch, wellcond as wc
        >>> wc.condition_number(torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.5, 0.0]]))
        tensor(4., dtype=torch.float64)
        >>> wc.condition_number(torch.ones(3, 3))
        tensor(inf, dtype=torch.float64)
    """
    check_matrices(S)
    if S.ndim == 2:
        spectrum = compute_spectrum(S)
        return spectrum.scaled.new_full((), spectrum.condition_number, dtype=torch.float64)
    # The largest entry is the unit: singular values of 1e+-200 would overflow inside LAPACK's
    # scaling of subnormal entries. The ratio does not depend on the unit.
    wide = as_matrices(S.detach())
    unit = wide.abs().amax(dim=(-2, -1), keepdim=True)
    sigma = singular_values(wide / torch.where(unit > 0, unit, 1.0))
    largest, smallest = sigma[..., 0], sigma[..., -1]
    zero = smallest <= rank_tolerance(S.shape) * largest
    return torch.where(largest == 0, torch.nan, torch.where(zero, torch.inf, largest / smallest))


def rank_tolerance(shape: torch.Size) -> float:
    """The ratio sigma/sigma_1 up to which a computed sigma is zero to working precision."""
    return max(shape[-2:]) * _EPS


def compute_spectrum(S: Tensor, all_values: bool = False, extremes: bool = False) -> Spectrum:
    """Computes the singular values of one matrix (m, n) in float64 by the cheapest sound method.

    Args:
        S: the matrix.
        all_values: compute all singular values of a very large matrix, not only the extremes.
        extremes: compute only the extremes, for a matrix of any size, if that is cheaper.

    Raises:
        ValueError: an entry is NaN or infinite, or LAPACK does not converge.
    """
    m, n = S.shape
    large = m > _SMALL and n > _SMALL and not S.is_complex()
    if large and S.device.type == "cpu" and S.dtype in NARROW:
        # Converted in bands of rows, because a copy in float64 takes twice the memory of float32.
        spectrum = _try_gram(_finite(S.detach().cpu()), all_values, extremes)
        if spectrum is not None:
            return spectrum
        large = False
    wide, unit = split_scale(S)  # because LAPACK squares entries, and scales subnormal ones up
    if m == 1 or n == 1:
        return Spectrum(torch.linalg.vector_norm(wide)[None], Method.svd, wide.shape, unit)
    if large:
        spectrum = _try_gram(wide, all_values, extremes)
        if spectrum is not None:
            return spectrum._replace(unit=unit)
    return Spectrum(singular_values(wide), Method.svd, wide.shape, unit)


def _finite(S: Tensor) -> Tensor:
    """S itself.

    Raises:
        ValueError: an entry is NaN or infinite.
    """
    if not all(math.isfinite(float(end)) for end in S.aminmax()):
        as_matrices(S)  # raises
    return S


def _try_gram(S: Tensor, all_values: bool, extremes: bool) -> Spectrum | None:
    try:
        return _from_gram(S.mT if S.shape[0] < S.shape[1] else S, all_values, extremes)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None


def combine_spectra(spectra: Sequence[Spectrum]) -> Spectrum:
    """The spectrum of a block-diagonal matrix from those of its blocks, all of one shape.

    It contains only the extremes if the spectrum of a block does. Its method is the one of the
    blocks that is farthest from an SVD.
    """
    unit = max(spectrum.unit for spectrum in spectra)
    method = max((spectrum.method for spectrum in spectra), key=list(Method).index)
    sigma = torch.cat([spectrum.scaled * (spectrum.unit / unit) for spectrum in spectra])
    sigma = sigma.sort(descending=True).values
    if method is Method.krylov:
        sigma = torch.stack([sigma[0], sigma[-1]])
    return Spectrum(sigma, method, torch.Size([len(spectra), *spectra[0].shape]), unit)


def _from_gram(S: Tensor, all_values: bool, extremes: bool = False) -> Spectrum | None:
    """Singular values of S (m >= n) from its Gram matrix; None if that does not resolve them.

    The cheap checks come first, so that a matrix that needs an SVD does not pay for eigenvalues.
    """
    n = S.shape[1]
    G = gram(S, torch.float64)
    factor, failed = torch.linalg.cholesky_ex(G)
    if failed:
        return None
    start = _random_block(S)
    smallest, error = _smallest(S, factor, start)
    del factor
    hides = rank_tolerance(S.shape) / _HIDDEN
    if hides * G.diagonal().max() > smallest.square():
        return None
    converged = error <= _RESIDUAL_ERROR
    sure = (n >= _LARGE or extremes) and converged and not all_values
    top, _, top_error = _krylov(lambda V: G @ V, start, _RESIDUAL_ERROR, steps=100 if sure else 3)
    if hides * top > smallest.square():
        return None
    if sure and top_error <= _RESIDUAL_ERROR:
        return Spectrum(torch.stack([top.sqrt(), smallest]), Method.krylov, S.shape)
    if not (converged or n * _EPS * top <= _GRAM_ERROR * smallest.square()):
        return None
    eigenvalues = torch.linalg.eigvalsh(G).flip(0)
    top, bottom = eigenvalues[0], eigenvalues[-1]
    if n * _EPS * top <= _GRAM_ERROR * bottom:
        return Spectrum(eigenvalues.sqrt(), Method.gram, S.shape)
    missed = bottom < (1 - 2 * _HIDDEN) * smallest.square()
    if missed or not converged or hides * top > smallest.square():
        return None
    sigma = eigenvalues.sqrt().clamp_min(smallest)
    sigma[-1] = smallest
    return Spectrum(sigma, Method.inverse, S.shape)


def _random_block(S: Tensor, width: int = 4) -> Tensor:
    """A random block (n, width), which depends only on the matrix.

    It is seeded by a hash of all entries, so that no matrix can be built whose extreme singular
    vectors are orthogonal to it and are therefore missed.
    """
    digest = hashlib.sha256()
    for _, band in _bands(S):
        digest.update(band.cpu().contiguous().view(torch.uint8).numpy().data)
    # PyTorch's generator on the CPU takes 32 bits, few enough to try out: one seed per column.
    seeds = struct.unpack_from(f"<{width}I", digest.digest())
    sources = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    columns = [
        torch.randn(S.shape[1], generator=source, dtype=torch.float64, device="cpu")
        for source in sources
    ]
    return torch.stack(columns, dim=1).to(S.device)  # the same numbers on every device


def _bands(S: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Ranges of rows of S, and these rows in float64; each band overwrites the previous one."""
    m, n = S.shape
    rows = max(1, _BAND // n)
    band = S.new_empty(min(rows, m), n, dtype=torch.float64)
    if S.stride(0) < S.stride(1):  # copy in the order of memory, which is faster
        band = band.view(n, -1).mT
    for start in range(0, m, rows):
        stop = min(start + rows, m)
        yield slice(start, stop), band[: stop - start].copy_(S[start:stop])


def _smallest(S: Tensor, factor: Tensor, start: Tensor) -> tuple[Tensor, float]:
    """sigma_n of S from the Cholesky factor of S^T S, and an estimate of the error of sigma_n^2.

    The vectors are those of the rounded Gram matrix. sigma_n = ||S v|| depends on their error only
    to second order, and the residual is computed with S itself.
    """

    def inverse(V: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(factor, V, upper=False)
        solved: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        return solved

    _, V, _ = _krylov(inverse, start, _RESIDUAL_ERROR, steps=30)
    for _ in range(2):  # each time the share of large singular vectors shrinks by kappa^2
        V = torch.linalg.qr(inverse(V)).Q
    image, back = V.new_empty(len(S), V.shape[1]), V.new_zeros(len(V))
    for rows, band in _bands(S):
        image[rows] = band @ V
    U, sigma, Wh = torch.linalg.svd(image, full_matrices=False)
    for rows, band in _bands(S):
        back += band.mT @ U[rows, -1]
    residual = torch.linalg.vector_norm(back - sigma[-1] * (V @ Wh[-1]))
    squared = sigma.square()
    return sigma[-1], _ritz_error(squared[-1], sigma[-1] * residual, squared[-2] - squared[-1])


def _ritz_error(value: Tensor, residual: Tensor, gap: Tensor) -> float:
    """An estimate of the relative error of a Ritz value: residual, or residual^2/gap if smaller.

    Some eigenvalue is within the residual (Weyl). If the gap to the next Ritz value equals the gap
    to the next eigenvalue, it is within residual^2/gap (Kato and Temple).
    """
    error = torch.where(gap > residual, residual.square() / gap, residual)
    return float(error / value)


def _krylov(
    apply: Callable[[Tensor], Tensor], start: Tensor, tolerance: float, steps: int
) -> tuple[Tensor, Tensor, float]:
    """The largest eigenvalue of a positive semidefinite operator by block Lanczos.

    It starts from a block (n, width). Returns the Ritz value, a lower bound, the `width` leading
    Ritz vectors (n, width), and an estimate of the relative error of the value.
    """
    n, width = start.shape
    steps = min(steps, n // width)
    block = torch.linalg.qr(start).Q
    basis = block.new_empty(steps * width, n)  # in rows: products with them are much faster
    projected = block.new_zeros(steps * width, steps * width)
    for step in range(1, steps + 1):
        last, filled = slice((step - 1) * width, step * width), step * width
        basis[last] = block.mT
        before = basis[:filled]
        image = apply(block)
        along = before @ image
        block, remainder = torch.linalg.qr(image - before.mT @ along)
        # Once more, after scaling: if the space is exhausted, only rounding errors remain.
        again = before @ block
        block, scaled = torch.linalg.qr(block - before.mT @ again)
        projected[:filled, last] = along + again @ remainder
        if step % 4 and step < steps:
            continue
        values, vectors = torch.linalg.eigh(projected[:filled, :filled], UPLO="U")
        residual = torch.linalg.vector_norm(scaled @ (remainder @ vectors[last, -1]))
        error = _ritz_error(values[-1], residual, values[-1] - values[-2])
        if error <= tolerance:
            break
    return values[-1], before.mT @ vectors[:, -width:], error
