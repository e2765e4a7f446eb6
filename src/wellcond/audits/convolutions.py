"""The singular values of convolutions as they act: all of them, or bounds that are called bounds.

All of them are known where the kernel sees no input twice, on a torus, and of small ones from the
dense matrix. Of others sigma_1 is enclosed, from below by products and from above by the symbol,
and sigma_nu is bounded from above alone: frequencies say nothing of it.

Letters: S (m, n) the map; K its kernel; sigma_1 >= ... >= sigma_nu, nu = min(m, n).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from wellcond.linalg.lattice import bound_norm_cheaply, effective_steps, fold
from wellcond.linalg.spectrum import compute_spectrum
from wellcond.linalg.symbol import periodic_singular_values
from wellcond.operators.convolution import CIRCULAR, ZEROS, Convolution, Geometry

# The dense matrix of a group: so many singular values, entries, and multiplications of them all.
_DENSE, _ENTRIES, _WORK = 4096, 1 << 26, 2e11
_CORNER = 1536  # unknowns of the corners that bound sigma_nu, fewer where there are many groups
_STEPS = 30  # of the power iteration that bounds sigma_1 from below

T = TypeVar("T")


class MapSpectrum(NamedTuple):
    """What is known of S.

    Attributes:
        singular_values: nu of them, descending; empty if there are only bounds.
        largest: bounds of sigma_1.
        smallest: sigma_nu, or an upper bound of it.
        method: how they were found.
    """

    singular_values: Tensor
    largest: tuple[float, float]
    smallest: float
    method: str


def measure_convolution(
    convolution: Convolution, report: Callable[[float], None] = lambda share: None
) -> MapSpectrum:
    """The singular values of a convolution in float64, or bounds of sigma_1 and sigma_nu.

    `report` is called with the share of the work that is done, above 0 and up to 1: after each
    group, and of bounds after each of their parts.
    """
    geometry = convolution.geometry
    wide = Convolution(convolution.kernel.to(torch.float64), geometry)
    groups = [wide.group(index) for index in range(geometry.groups)]
    for applies, values, how in (
        (wide.disjoint, _of_kernel, "the flattened kernel, which sees no input twice"),
        (wide.periodic, _on_torus, "Fourier coefficients of the kernel, on a torus"),
        (_feasible(groups), _of_dense, "the dense matrix of the map"),
    ):
        if applies:
            step = _steps(report, len(groups))
            sigma = torch.cat([step(values(group)) for group in groups])
            sigma = sigma.sort(descending=True).values
            unseen = wide.nu - len(sigma)  # where some inputs are
            sigma = torch.cat([sigma, sigma.new_zeros(unseen)])
            return MapSpectrum(sigma, (float(sigma[0]),) * 2, float(sigma[-1]), how)
    corners = _corners(geometry)
    step = _steps(report, len(groups) * (2 + len(corners)))
    below = max(step(_from_below(group)) for group in groups)
    above = max(step(_from_above(group)) for group in groups)
    unknowns = _CORNER / len(groups) ** (1 / 3)
    smallest = min(
        step(_in_corner(group, unknowns, corner)) for group in groups for corner in corners
    )
    return MapSpectrum(
        torch.empty(0),
        (below, max(above, below)),
        min(smallest, below),
        "products, the symbol and corners of the map",
    )


def _steps(report: Callable[[float], None], total: int) -> Callable[[T], T]:
    """Hands on what each of so many parts of the work has found, and reports that it is done."""
    numbers = itertools.count(1)

    def step(found: T) -> T:
        report(next(numbers) / total)
        return found

    return step


def _of_kernel(S: Convolution) -> Tensor:
    sigma = compute_spectrum(S.kernel.flatten(1), all_values=True).singular_values
    return sigma.repeat(math.prod(S.positions))


def _on_torus(S: Convolution) -> Tensor:
    geometry = S.geometry
    return periodic_singular_values(S.kernel, geometry.stride, geometry.dilation, geometry.size)


def _feasible(groups: list[Convolution]) -> bool:
    first = groups[0]
    work = len(groups) * first.nu**2 * max(first.shape)
    return first.nu <= _DENSE and math.prod(first.shape) <= _ENTRIES and work <= _WORK


def _of_dense(S: Convolution) -> Tensor:
    return compute_spectrum(S.dense(), all_values=True).singular_values


def _from_above(S: Convolution) -> float:
    """By the symbol: what pads with zeros is a part of the map on the whole lattice.

    On a torus no output stands twice, as long as it is not gone round twice. Reflected and repeated
    inputs count as often as they are seen.
    """
    geometry, kernel = S.geometry, S.kernel
    if geometry.mode == ZEROS:
        return _on_lattice(kernel, geometry.stride, geometry.dilation)
    if geometry.mode == CIRCULAR:
        bound = _on_lattice(kernel, [1] * len(geometry.size), geometry.dilation)
        axes = zip(S.positions, geometry.stride, geometry.size, strict=True)
        return bound * math.sqrt(math.prod(-(-p * s // n) for p, s, n in axes))
    bound = _on_lattice(kernel, geometry.stride, geometry.dilation)
    for n, around in zip(geometry.size, geometry.padding, strict=True):
        line = torch.arange(float(n))[None, None]
        padded = torch.nn.functional.pad(line, around, geometry.mode)
        bound *= math.sqrt(int(torch.bincount(padded.flatten().long()).max()))
    return bound


def _on_lattice(kernel: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> float:
    steps = effective_steps(kernel.shape[2:], stride, dilation)
    return float(bound_norm_cheaply(fold(kernel, steps)[None]))


def _from_below(S: Convolution) -> float:
    """||S v|| of a unit vector v by power iteration: in float32, and measured in float64."""
    narrow = Convolution(S.kernel.to(torch.float32), S.geometry)
    v = torch.randn(S.shape[1], 1, generator=torch.Generator().manual_seed(0))
    for _ in range(_STEPS):
        v = narrow.rmatmat(narrow.matmat(v / torch.linalg.vector_norm(v)))
    v = v.to(torch.float64)
    return float(torch.linalg.vector_norm(S.matmat(v)) / torch.linalg.vector_norm(v))


def _corners(geometry: Geometry) -> list[tuple[str, ...]]:
    """Where `_in_corner` may look, per axis."""
    places = ("start", "end") if geometry.mode == ZEROS else ("middle",)
    return [*itertools.product(places, repeat=len(geometry.size))]


def _in_corner(S: Convolution, unknowns: float, corner: Sequence[str]) -> float:
    """An upper bound of sigma_nu: S restricted to a corner of its inputs, or of its outputs.

    Of the smaller side, since of vectors that live in a corner the smallest ||S v|| is no smaller
    than of all. At a border, where the map is cut off, is where singular values are smallest; where
    it is reflected, or repeated, the middle has to do.
    """
    geometry = S.geometry
    m, n = reversed(S.shape) if geometry.transposed else S.shape
    inputs = n <= m
    channels = S.kernel.shape[1] if inputs else len(S.kernel)
    length = max(1, int((unknowns / channels) ** (1 / len(geometry.size))))
    spans = [_span(S, axis, length, at, inputs) for axis, at in enumerate(corner)]
    if None in spans:
        return math.inf
    size, padding = zip(*(span for span in spans if span), strict=True)
    own = replace(geometry, size=size, padding=padding, mode=ZEROS, transposed=False)
    return float(_of_dense(Convolution(S.kernel, own))[-1])


def _span(
    S: Convolution, axis: int, length: int, where: str, inputs: bool
) -> tuple[int, tuple[int, int]] | None:
    """Size and padding along an axis of S on so many inputs, or outputs, there; None: no room."""
    n, s = S.geometry.size[axis], S.geometry.stride[axis]
    before, after = S.geometry.padding[axis]
    reach = S.geometry.dilation[axis] * (S.kernel.shape[2 + axis] - 1)
    total = n if inputs else S.positions[axis]
    length = min(length, total)
    first = {"start": 0, "middle": (total - length) // 2, "end": total - length}[where]
    if inputs:
        if where == "middle" and (first <= before or first + length >= n - after):
            return None
        # All outputs that see one of these inputs: at an inner border none is cut off.
        start = before if first == 0 else reach + (before + first - reach) % s
        return length, (start, after if first + length == n else reach)
    begin = s * first - before  # of what these outputs see, border included
    end = s * (first + length - 1) - before + reach + 1
    if where == "middle" and (begin < 0 or end > n):
        return None
    return min(end, n) - max(begin, 0), (max(-begin, 0), max(end - n, 0))
