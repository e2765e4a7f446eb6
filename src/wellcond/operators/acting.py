"""sigma_1 of a convolution as it acts, on inputs of every size: a bound, a limit and an estimate.

With zeros around, the map is a part of that on the whole lattice (see `wellcond.linalg.lattice`).
Other paddings copy inputs; a factor says by how much that may raise sigma_1. So the limit is loose
for them. Groups are the blocks of the map: each is measured and limited by itself.

Letters: K (o, i/g, *k) the kernel of g groups; s, d, p stride, dilation and padding of an axis; N
the size of an input; L (g, m, n, *c) the kernel with stride 1 and without dilation; A(w) its symbol
at a frequency w; u, v left and right singular vectors; f cells of frequencies, T = prod(c) taps.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from wellcond.linalg import lattice
from wellcond.linalg.lattice import COARSE, FINE, Grid
from wellcond.operators.convolution import CIRCULAR, ZEROS, Geometry
from wellcond.operators.rounding import widest_dtype, working_dtype

_ROUNDS = 12  # of storing and measuring
_MARGIN = 1e-8  # above the rounding of eigenvalues in `lattice.bound_norm`


def padding_factor(kernel: torch.Size, geometry: Geometry) -> float:
    """By how much the padding may raise sigma_1 above that on the lattice, for every input size.

    1 with zeros. Per axis, with b and a inputs copied before and after it, and S phases:

    - circular: sqrt(min(S, c)) with c = 1 + ceil((a + b)/max(a, b)) copies at most; 1 with stride 1
      and a + b <= d (k - 1), where each output is one of those on a torus.
    - reflect: sqrt(2) with stride 1 and a + b <= d (k - 1), where the outputs are some of those on
      a torus of 2 N - 2 inputs on which each stands twice; else sqrt(3).
    - replicate: sqrt(1 + max(a, b)), or what a single input may do, if that is more: it stands at
      1 + a + b places, and is used by (a + b - d (k - 1)) // s + 1 outputs, with all phases.
    """
    if geometry.mode == ZEROS:
        return 1.0
    sides = kernel[2:]
    steps = lattice.effective_steps(sides, geometry.stride, geometry.dilation)
    squared = 1
    for k, step, s, d, (before, after) in zip(
        sides, steps, geometry.stride, geometry.dilation, geometry.padding, strict=True
    ):
        total, most = max(before, 0) + max(after, 0), max(before, after)
        if total == 0:
            continue
        surplus = before + after - d * (k - 1)
        if geometry.mode == CIRCULAR:
            copies = 1 + -(-total // most)
            turns = 1 + max(0, -(-surplus // most))
            squared *= min(step * turns, copies)
        elif geometry.mode == "reflect":
            squared *= 2 if step == 1 and surplus <= 0 else 3
        else:
            single = min(1 + total, max(0, surplus // s + 1) * step)
            squared *= max(1 + most, single)
    return math.sqrt(squared)


def flattening_factor(kernel: torch.Size, geometry: Geometry) -> float:
    """By how much sigma_1 of the map may exceed that of the flattened kernel: sqrt(T), T taps.

    T = prod ceil(k/S), S = s/gcd(s, d) phases per axis: sqrt(prod k) with stride 1. A(w) is the
    flattened kernel times a matrix of norm sqrt(T). Equal taps of equal sign reach it, but for
    borders. Paddings that copy add their own factor.

    Args:
        kernel: its shape (o, i/g, *k).
        geometry: of any size.
    """
    steps = lattice.effective_steps(kernel[2:], geometry.stride, geometry.dilation)
    counts = (-(-k // step) for k, step in zip(kernel[2:], steps, strict=True))
    return math.sqrt(math.prod(counts)) * padding_factor(kernel, geometry)


class _Folded(NamedTuple):
    """A kernel as L, and the way back."""

    L: Tensor
    steps: tuple[int, ...]
    shape: torch.Size  # of a group of the kernel

    @classmethod
    def of(cls, kernel: Tensor, geometry: Geometry) -> _Folded:
        steps = lattice.effective_steps(kernel.shape[2:], geometry.stride, geometry.dilation)
        shape = torch.Size([len(kernel) // geometry.groups, *kernel.shape[1:]])
        L = lattice.fold(kernel, steps)
        return cls(L.reshape(geometry.groups, shape[0], *L.shape[1:]), steps, shape)

    def support(self) -> Tensor:
        """Where L may have entries, (n, *c): what `fold` fills up has none."""
        ones = torch.ones(1, *self.shape[1:], device=self.L.device)
        return lattice.fold(ones, self.steps)[0]

    def kernel(self, L: Tensor) -> Tensor:
        shape = (len(L) * self.shape[0], *self.shape[1:])
        return lattice.unfold(L.flatten(0, 1), self.steps, shape)


# --- bound and limit ------------------------------------------------------------------------------


def bound_norm(kernel: Tensor, geometry: Geometry) -> float:
    """An upper bound of sigma_1 of the layer, for inputs of every size.

    With zeros around it exceeds the supremum over all sizes by at most 0.5 % per axis. It is
    computed in float64, with a margin for rounding; NaN where the kernel holds one.

    Args:
        kernel: (o, i/g, *k), real; of a transposed layer (i, o/g, *k).
        geometry: of the layer; its size is without effect.
    """
    L = _Folded.of(_wide(kernel), geometry).L
    if not L.numel():
        return 0.0
    return float(lattice.bound_norm(L).amax()) * padding_factor(kernel.shape, geometry)


def limit_norm(kernel: Tensor, geometry: Geometry, upper: float) -> Tensor:
    """A nearby kernel with `bound_norm` at most `upper` as it is stored, in the dtype of `kernel`.

    Groups that obey stay bit for bit; of the others the singular values are clipped at frequencies
    (see `wellcond.linalg.lattice.limit_norm`), or they are scaled, whichever is nearer. It is near,
    not nearest: mostly within 10 % of the least distance. A kernel that is not finite stays.

    Raises:
        ValueError: after rounding to the dtype no such kernel is left, as when entries overflow.
    """
    folded = _Folded.of(_wide(kernel), geometry)
    factor = padding_factor(kernel.shape, geometry)
    target = folded.L.new_full((geometry.groups,), upper / factor)
    exceeding = _exceed(folded.L, target)
    if not bool(exceeding.any()):
        return kernel
    rows = exceeding.nonzero()[:, 0]
    # In the dtype of the weight, which says in which arithmetic to clip.
    L = folded.L[rows].to(working_dtype(kernel.dtype))
    nearby = lattice.limit_norm(L, target[rows], folded.support())
    narrowest = max(_MARGIN, 4 * torch.finfo(working_dtype(kernel.dtype)).eps)
    margin = torch.full_like(target[rows], narrowest)
    for _ in range(_ROUNDS):
        stored = folded.kernel(nearby * lattice.each(1 - margin, nearby)).to(kernel.dtype)
        again = _Folded.of(stored.to(folded.L), replace(geometry, groups=len(rows))).L
        excess = lattice.bound_norm(again, enough=target[rows]) / target[rows] - 1
        if bool((excess <= 0).all()):
            result = kernel.detach().clone()
            groups = result.view(geometry.groups, *folded.shape)
            groups[rows] = stored.to(kernel.device).reshape(len(rows), *folded.shape)
            return result
        # Doubled, since rounding to few bits takes back what is a small part of an entry.
        margin = torch.where(excess > 0, 2 * margin + 1.25 * excess, margin).clamp_max(1)
    raise ValueError(
        f"no kernel near it has a norm of at most {upper} once it is rounded to "
        f"{str(kernel.dtype).removeprefix('torch.')}. Store the weight in a wider dtype."
    )


def _wide(kernel: Tensor) -> Tensor:
    device = kernel.device
    wide = widest_dtype(device) == torch.float64
    return kernel.detach().to(device if wide else "cpu", torch.float64)


def _exceed(L: Tensor, target: Tensor) -> Tensor:
    """Which groups are not proven to have norms of at most these; False if not finite."""
    above = lattice.norm_on_grid(L) > target
    rest = (~above).nonzero()[:, 0]
    if len(rest):
        above[rest] = lattice.bound_norm(L[rest], enough=target[rest]) > target[rest]
    return above & torch.isfinite(L).flatten(1).all(1)


# --- estimate -------------------------------------------------------------------------------------


@functools.cache
def _cells(counts: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Phases of taps at the middles of cells, (f, T, 2), and at places within one, (q, T, 2)."""
    grid, t = Grid(counts, COARSE, device), lattice.taps(counts, device)
    finer = FINE // COARSE
    steps = [2 * math.pi / (FINE * (c - 1)) if c > 1 else 0.0 for c in counts]
    near = torch.arange(-(finer // 2), finer // 2 + 1, device=device, dtype=torch.float64)
    lines = [near * step if step else near.new_zeros(1) for step in steps]
    inside = torch.cartesian_prod(*lines).reshape(-1, len(counts))
    return tuple(
        torch.polar(torch.ones_like(angle), -angle).to(dtype)
        for angle in (grid.w @ t.mT, inside @ t.mT)
    )


def _narrow(kernel: Tensor, geometry: Geometry) -> Tensor:
    """L in the working dtype, with n <= m: of the transpose the singular values are the same."""
    L = _Folded.of(kernel.detach().to(working_dtype(kernel.dtype)), geometry).L
    return L.transpose(1, 2) if L.shape[2] > L.shape[1] else L


def _complex(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype == torch.float64 else torch.complex64


def start_estimate(kernel: Tensor, geometry: Geometry, generator: torch.Generator) -> Tensor:
    """A random start for `estimate_norm`, (g, 2 n + 1, f), in the working dtype."""
    L = _narrow(kernel, geometry)
    groups, _, n, *counts = L.shape
    f = len(Grid(counts, COARSE, torch.device("cpu")))
    X = torch.randn(groups, 2 * n + 1, f, generator=generator, dtype=L.dtype)
    X /= torch.linalg.vector_norm(X[:, :-1], dim=1, keepdim=True)
    X[:, -1] = (FINE // COARSE + 1) ** sum(c > 1 for c in counts) // 2  # the middle of the cell
    return X.to(kernel.device)


def estimate_norm(kernel: Tensor, geometry: Geometry, X: Tensor) -> tuple[Tensor, Tensor]:
    """A lower estimate of sigma_1 per group, (g,), for large inputs, and X refined by one step.

    The frequencies are split into cells, 4 h per axis. Each has a unit vector v and a frequency w
    of its own, one of 5 per axis within it. A step forms u = A(w) v, whose norm is the estimate,
    then takes the w at which |u^* A(w) v| is largest and v = A(w)^* u: for a fixed kernel no step
    makes the estimate smaller. It is two products with the kernel as a matrix (m, n T); nothing is
    asked of the host.

    Args:
        kernel: as in `bound_norm`; half precision is widened.
        geometry: of the layer.
        X: (g, 2 n + 1, f): real and imaginary parts of v, and the place of w in its cell.
    """
    L = _narrow(kernel, geometry)
    unit = L.abs().amax(dim=tuple(range(1, L.ndim)), keepdim=True)
    usable = (unit > 0) & (unit < math.inf)
    counts = tuple(L.shape[3:])
    L = (L / torch.where(usable, unit, 1)).flatten(3)
    groups, m, n, T = L.shape
    f = X.shape[-1]
    middles, inside = _cells(counts, L.device, _complex(L.dtype))
    matrix = L.movedim(-1, 2).reshape(groups, m, T * n)
    # (g, T, f): the phases at w.
    phases = middles.mT * inside[X[:, -1].long()].movedim(-1, 1)
    v = torch.complex(X[:, :n], X[:, n:-1])
    parts = torch.view_as_real(phases[:, :, None] * v[:, None]).reshape(groups, T * n, 2 * f)
    image = (matrix @ parts).reshape(groups, m, f, 2)
    sigma = torch.linalg.vector_norm(image, dim=(1, 3))
    u = image / torch.where(sigma > 0, sigma, 1)[:, None, :, None]
    back = (matrix.mT @ u.reshape(groups, m, 2 * f)).reshape(groups, T, n, f, 2)
    back = torch.view_as_complex(back)
    # u^* A(w) v = sum_t exp(-i w t) u^* L_t v
    shares = middles.mT * (back.conj() * v[:, None]).sum(2)
    place = (inside @ shares).abs().argmax(1)
    phases = middles.mT * inside[place].movedim(-1, 1)
    following = (phases.conj()[:, :, None] * back).sum(1)
    norms = torch.linalg.vector_norm(following, dim=1, keepdim=True)
    following = torch.cat([following.real, following.imag], 1) / torch.where(norms > 0, norms, 1)
    estimate = sigma.amax(1) * unit.flatten()
    chosen = usable.reshape(-1, 1, 1) & (norms > 0)
    following = torch.cat([following, place[:, None].to(X)], 1)
    return estimate, torch.where(chosen, following, X)
