"""The singular values of convolutions as linear operators: all of them, or bounds.

All singular values are computed if the kernel uses no input twice, on a torus, and from the dense
matrix of small operators. For other operators, products bound sigma_1 from below and the symbol
bounds it from above. sigma_nu is only bounded from above, because the symbol gives no lower bound.

Letters: S (m, n) the operator; K its kernel; sigma_1 >= ... >= sigma_nu, nu = min(m, n).
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

# Limits for the dense matrix: singular values and entries per group, multiplications in total.
_DENSE, _ENTRIES, _WORK = 4096, 1 << 26, 2e11
_CORNER = 1536  # unknowns in the corners that bound sigma_nu; fewer if there are many groups
_STEPS = 30  # steps of the power iteration that bounds sigma_1 from below

T = TypeVar("T")


class MapSpectrum(NamedTuple):
    """The singular values of S, or bounds.

    Attributes:
        singular_values: all nu values, descending; empty if there are only bounds.
        largest: a lower and an upper bound of sigma_1.
        smallest: sigma_nu, or an upper bound of it.
        method: how the values or bounds were computed.
    """

    singular_values: Tensor
    largest: tuple[float, float]
    smallest: float
    method: str


def measure_convolution(
    convolution: Convolution, report: Callable[[float], None] = lambda share: None
) -> MapSpectrum:
    """The singular values of a convolution in float64, or bounds of sigma_1 and sigma_nu.

    `report` is called with the completed share of the work, above 0 and up to 1: after each group,
    and for bounds after each part of a group.
    """
    geometry = convolution.geometry
    wide = Convolution(convolution.kernel.to(torch.float64), geometry)
    groups = [wide.group(index) for index in range(geometry.groups)]
    for applies, values, how in (
        (wide.disjoint, _of_kernel, "the flattened kernel, which uses no input twice"),
        (wide.periodic, _on_torus, "Fourier coefficients of the kernel, on a torus"),
        (_feasible(groups), _of_dense, "the dense matrix of the operator"),
    ):
        if applies:
            step = _steps(report, len(groups))
            sigma = torch.cat([step(values(group)) for group in groups])
            sigma = sigma.sort(descending=True).values
            unseen = wide.nu - len(sigma)  # inputs that the kernel never uses
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
        "products, the symbol and corners of the operator",
    )


def _steps(report: Callable[[float], None], total: int) -> Callable[[T], T]:
    """Returns a function that passes on a result and reports one more of `total` parts as done."""
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
    """Bounds sigma_1 from above by the symbol, which describes a convolution on the entire lattice.

    With zero padding, S is a part of that operator. On a torus, the bound grows with the number of
    times that the outputs go round each axis. With reflected or replicated inputs, it grows with
    the number of times that the padded input repeats an entry.
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
    """||S v|| for a unit vector v of a power iteration in float32, evaluated in float64."""
    narrow = Convolution(S.kernel.to(torch.float32), S.geometry)
    v = torch.randn(S.shape[1], 1, generator=torch.Generator().manual_seed(0))
    for _ in range(_STEPS):
        v = narrow.rmatmat(narrow.matmat(v / torch.linalg.vector_norm(v)))
    v = v.to(torch.float64)
    return float(torch.linalg.vector_norm(S.matmat(v)) / torch.linalg.vector_norm(v))


def _corners(geometry: Geometry) -> list[tuple[str, ...]]:
    """The corners for `_in_corner`, each with a place per axis."""
    places = ("start", "end") if geometry.mode == ZEROS else ("middle",)
    return [*itertools.product(places, repeat=len(geometry.size))]


def _in_corner(S: Convolution, unknowns: float, corner: Sequence[str]) -> float:
    """An upper bound of sigma_nu: S restricted to a corner of its inputs, or of its outputs.

    The corner is on the smaller side, because the smallest ||S v|| over the vectors of a corner is
    at least the smallest over all vectors. Singular values are smallest at a border that cuts off
    the operator. With reflected or replicated borders, the middle is used instead.
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
    """Size and padding along an axis of S restricted to `length` inputs or outputs at `where`.

    None if the axis is too short.
    """
    n, s = S.geometry.size[axis], S.geometry.stride[axis]
    before, after = S.geometry.padding[axis]
    reach = S.geometry.dilation[axis] * (S.kernel.shape[2 + axis] - 1)
    total = n if inputs else S.positions[axis]
    length = min(length, total)
    first = {"start": 0, "middle": (total - length) // 2, "end": total - length}[where]
    if inputs:
        if where == "middle" and (first <= before or first + length >= n - after):
            return None
        # Keep all outputs that use one of these inputs; an inner border cuts off none of them.
        start = before if first == 0 else reach + (before + first - reach) % s
        return length, (start, after if first + length == n else reach)
    begin = s * first - before  # the first input that these outputs use, including padding
    end = s * (first + length - 1) - before + reach + 1
    if where == "middle" and (begin < 0 or end > n):
        return None
    return min(end, n) - max(begin, 0), (max(-begin, 0), max(end - n, 0))
