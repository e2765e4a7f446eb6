"""The facts of a report about a weight in addition to its spectrum.

Letters: S (m, n) a weight; sigma_1 >= ... >= sigma_nu its singular values, nu = min(m, n);
kappa = sigma_1/sigma_nu.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor

from wellcond.linalg.gaussian import exceedance, gaussian_stable_rank, median_condition_number
from wellcond.linalg.nearest import clip
from wellcond.linalg.spectrum import rank_tolerance
from wellcond.report.findings import USUAL, Finding

_FLOAT16 = torch.finfo(torch.float16)
_DOMINANT = 0.999  # share of the squared norm
_OPPOSITE = 0.05
_COLUMNS, _TRIES = 256, 100


def stored_numbers(S: Tensor) -> Tensor:
    """The stored numbers of S: the real and the imaginary parts of a complex one."""
    return torch.view_as_real(S.resolve_conj()) if S.is_complex() else S


def with_entries(finding: Finding, S: Tensor, norm: float) -> Finding:
    """Adds facts about the entries of the matrix, which must all be finite, to the finding.

    The entries of a complex matrix are its real and its imaginary parts. `norm` is ||S||_F.
    """
    parts = stored_numbers(S)
    sizes = parts.abs()
    zeros = parts.numel() - int(parts.count_nonzero())
    largest = float(sizes.max())

    def share(below: Tensor) -> float:
        return (int(below.count_nonzero()) - zeros) / parts.numel()

    def zero(dim: int) -> tuple[int, ...]:
        if zeros < S.shape[dim] or not largest:  # too few zeros, or only zeros
            return ()
        entries = sizes.amax(-1) if S.is_complex() else sizes
        return tuple((entries.amax(dim) == 0).flatten().nonzero().flatten().tolist())

    dominant: tuple[int, ...] = ()
    if 1 not in S.shape[-2:] and norm > 0 and (largest / norm) ** 2 > _DOMINANT:
        dominant = tuple(int(i) for i in torch.unravel_index(S.abs().argmax(), S.shape))
    return replace(
        finding,
        largest_entry=largest,
        gain=norm / math.sqrt(max(1, math.prod(S.shape[:-1]))),
        equal_rows=_find_equal_rows(S),
        opposite_rows=_are_opposite(S),
        zero_rows=zero(-1),
        zero_columns=zero(-2),
        subnormal_share=share(sizes < torch.finfo(parts.dtype).tiny),
        # Half the smallest number of float16 rounds to zero, the even one of its two neighbours.
        float16_zero_share=share(sizes <= _FLOAT16.smallest_normal * _FLOAT16.eps / 2),
        dominant_entry=dominant,
    )


def _find_equal_rows(S: Tensor) -> tuple[int, ...]:
    """Two equal nonzero rows, found by the products of some columns with a random vector."""
    if S.ndim != 2 or min(S.shape) < 2:
        return ()
    columns = S[:, :: max(1, S.shape[1] // _COLUMNS)]
    # In lower precision, different rows would often have equal products.
    columns = columns.to(torch.complex128 if S.is_complex() else torch.float64)
    source = torch.Generator("cpu").manual_seed(0)
    v = torch.randn(columns.shape[1], generator=source, dtype=torch.float64, device="cpu")
    products = (columns * v.to(S.device)).sum(-1)
    order = products.abs().argsort(stable=True)
    ordered = products[order]
    for at in ((ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)).nonzero().flatten()[:_TRIES]:
        first, second = sorted(order[at : at + 2].tolist())
        if torch.equal(S[first], S[second]):
            return first, second
    return ()


def _are_opposite(S: Tensor) -> bool:
    """Whether S has two rows w and -w up to 5 %, such as the head of a two-class classifier."""
    if S.ndim != 2 or S.shape[0] != 2:
        return False
    first, second = S.to(torch.complex128 if S.is_complex() else torch.float64)
    return bool((first + second).norm() <= _OPPOSITE * (first - second).norm())


def with_comparison(finding: Finding) -> Finding:
    """Adds a comparison with random matrices of its shape to the finding of a real matrix.

    Vectors are not compared. Groups of a convolution, convolutions as linear operators, heads and
    complex Gaussian matrices follow other distributions.
    """
    real = not finding.dtype.startswith("complex")
    if not real or len(finding.shape) != 2 or finding.nu < 2 or math.isnan(finding.largest_entry):
        return finding
    shape, kappa = finding.shape, finding.condition_number
    limit, change = _usual_limit(shape), math.nan
    if finding.singular_values and kappa > limit:
        sigma = torch.tensor(finding.singular_values, dtype=torch.float64, device="cpu")
        sigma = sigma / finding.sigma_max
        change = float((clip(sigma, limit) - sigma).norm() / sigma.norm())
    return replace(
        finding,
        exceedance=exceedance(shape, kappa),
        random_stable_rank=gaussian_stable_rank(shape),
        random_condition_number=median_condition_number(tuple(shape)),
        gap=_widest_gap(finding),
        repair_limit=math.nan if math.isnan(change) else limit,
        repair_change=change,
    )


@functools.lru_cache(maxsize=256)  # networks have few shapes
def _usual_limit(shape: tuple[int, ...]) -> float:
    """The least power of ten that few random matrices of this shape exceed in kappa."""
    limit = 10.0
    while exceedance(shape, limit) > USUAL:
        limit *= 10
    return limit


def _widest_gap(finding: Finding) -> tuple[int, float]:
    """The number of singular values below the widest gap in the lower half, and the gap's ratio."""
    top, zero = finding.sigma_max, rank_tolerance(torch.Size(finding.shape))
    sigma = [max(value / top, zero) for value in finding.singular_values if top > 0]
    lower = range(max(1, len(sigma) - len(sigma) // 2), len(sigma))
    ratio, below = min(((sigma[i] / sigma[i - 1], len(sigma) - i) for i in lower), default=(1.0, 0))
    return below, ratio
