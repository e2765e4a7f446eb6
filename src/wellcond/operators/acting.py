"""Bound, limit and estimate of sigma_1 of a convolution as a linear operator, for all input sizes.

With zero padding, the operator is a part of the operator on the infinite lattice (see
`wellcond.linalg.lattice`). Other paddings copy inputs. A factor bounds how much this can raise
sigma_1, so the limit is loose for them. Groups are the blocks of the operator: each is measured and
limited separately.

Letters: K (o, i/g, *k) the kernel of g groups; s, d, p stride, dilation and padding of an axis; N
the size of an input; L (g, m, n, *c) the kernel with stride 1 and without dilation; A(w) its symbol
at a frequency w; u, v left and right singular vectors; f cells of frequencies, T = prod(c) taps.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from wellcond.linalg import lattice
from wellcond.linalg.lattice import COARSE, FINE, Grid
from wellcond.operators.convolution import CIRCULAR, ZEROS, Geometry
from wellcond.operators.rounding import widest_dtype, working_dtype

_ROUNDS = 12  # the maximal number of rounds of storing and measuring
_MARGIN = 1e-8  # above the rounding of eigenvalues in `lattice.bound_norm`


def padding_factor(kernel: torch.Size, geometry: Geometry) -> float:
    """Returns a bound of the factor by which the padding raises sigma_1, for every input size.

    The factor is relative to the lattice. It is 1 with zero padding. Otherwise it is a product over
    the axes, with b and a inputs copied before and after an axis, and S phases:

    - circular: sqrt(min(S, c)) with at most c = 1 + ceil((a + b)/max(a, b)) copies; 1 with stride 1
      and a + b <= d (k - 1), because each output is then an output on a torus.
    - reflect: sqrt(2) with stride 1 and a + b <= d (k - 1), because the outputs are then a subset
      of those on a torus of 2 N - 2 inputs that contains each input twice; else sqrt(3).
    - replicate: sqrt(1 + max(a, b)), or the effect of a single input if that is larger: the input
      is at 1 + a + b places, and (a + b - d (k - 1)) // s + 1 outputs use it with all phases.
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
    """Returns a bound of sigma_1 of the operator over sigma_1 of the flattened kernel.

    The bound is sqrt(T) for T = prod ceil(k/S) taps, with S = s/gcd(s, d) phases per axis. With
    stride 1 it is sqrt(prod k). The reason is that A(w) is the flattened kernel times a matrix of
    norm sqrt(T). Equal taps of equal sign attain the bound up to border effects. Paddings that
    copy inputs contribute `padding_factor`.

    Args:
        kernel: the shape (o, i/g, *k) of the kernel.
        geometry: the geometry of the layer; its size has no effect.
    """
    steps = lattice.effective_steps(kernel[2:], geometry.stride, geometry.dilation)
    counts = (-(-k // step) for k, step in zip(kernel[2:], steps, strict=True))
    return math.sqrt(math.prod(counts)) * padding_factor(kernel, geometry)


class _Folded(NamedTuple):
    """A kernel as L, and the conversion back."""

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
        """Returns 1 where L can have entries and 0 where `fold` pads, (n, *c)."""
        ones = torch.ones(1, *self.shape[1:], device=self.L.device)
        return lattice.fold(ones, self.steps)[0]

    def kernel(self, L: Tensor) -> Tensor:
        shape = (len(L) * self.shape[0], *self.shape[1:])
        return lattice.unfold(L.flatten(0, 1), self.steps, shape)


# --- bound and limit ------------------------------------------------------------------------------


def bound_norm(kernel: Tensor, geometry: Geometry) -> float:
    """Returns an upper bound of sigma_1 of the layer for inputs of every size.

    With zero padding, the bound exceeds the supremum over all sizes by at most 0.5 % per axis. It
    is computed in float64, with a margin for rounding. It is NaN if the kernel contains NaN.

    Args:
        kernel: (o, i/g, *k), real; for a transposed layer (i, o/g, *k).
        geometry: the geometry of the layer; its size has no effect.
    """
    L = _Folded.of(_wide(kernel), geometry).L
    if not L.numel():
        return 0.0
    return float(lattice.bound_norm(L).amax()) * padding_factor(kernel.shape, geometry)


def bound_norm_cheaply(kernel: Tensor, geometry: Geometry) -> float:
    """A faster `bound_norm` for many channels; for two axes it can be 17 % larger."""
    L = _Folded.of(_wide(kernel), geometry).L
    if not L.numel():
        return 0.0
    return float(lattice.bound_norm_cheaply(L).amax()) * padding_factor(kernel.shape, geometry)


def limit_norm(kernel: Tensor, geometry: Geometry, upper: float) -> Tensor:
    """Returns a nearby kernel with `bound_norm` at most `upper` after rounding to its dtype.

    Groups within the limit are unchanged bit for bit. For the others, the singular values are
    clipped at frequencies (see `wellcond.linalg.lattice.limit_norm`), or the group is scaled,
    whichever is nearer. The result is near, but not the nearest kernel. In tests, it was within 6 %
    of the least distance if the bound was exceeded by 25 % or more, and up to 2.5 times as far if
    it was exceeded by 1 %. A kernel that is not finite is returned unchanged.

    Raises:
        ValueError: no nearby kernel is within the limit after rounding to the dtype, for example
            because entries overflow.
    """
    folded = _Folded.of(_wide(kernel), geometry)
    factor = padding_factor(kernel.shape, geometry)
    target = folded.L.new_full((geometry.groups,), upper / factor)
    exceeding = _exceed(folded.L, target)
    if not bool(exceeding.any()):
        return kernel
    rows = exceeding.nonzero()[:, 0]
    # The working dtype of the weight determines the arithmetic of the clipping.
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
        # Doubled, because rounding to few bits undoes changes that are a small part of an entry.
        margin = torch.where(excess > 0, 2 * margin + 1.25 * excess, margin).clamp_max(1)
    raise ValueError(
        f"no nearby kernel has a norm of at most {upper} after rounding to "
        f"{str(kernel.dtype).removeprefix('torch.')}. Store the weight in a wider dtype."
    )


def _wide(kernel: Tensor) -> Tensor:
    device = kernel.device
    wide = widest_dtype(device) == torch.float64
    return kernel.detach().to(device if wide else "cpu", torch.float64)


def _exceed(L: Tensor, target: Tensor) -> Tensor:
    """Returns which groups might exceed `target`; False for groups that are not finite."""
    above = lattice.norm_on_grid(L) > target
    rest = (~above).nonzero()[:, 0]
    if len(rest):
        above[rest] = lattice.bound_norm(L[rest], enough=target[rest]) > target[rest]
    return above & torch.isfinite(L).flatten(1).all(1)


# --- estimate -------------------------------------------------------------------------------------


class NormEstimator:
    """A warm-started estimate from below of sigma_1 of a layer, for large inputs.

    The frequencies are split into cells, 4 h per axis. Each cell has its own unit vector v and its
    own frequency w, one of 5 per axis within the cell. A step forms u = A(w) v, whose norm is the
    estimate. It then chooses the w with the largest |u^* A(w) v|, and v = A(w)^* u. For a fixed
    kernel, no step reduces the estimate. A step costs two products with the kernel as a matrix
    (m, n T), without synchronising with the host. In trainings, the estimate was within 1 % of the
    supremum from the 20th step on. It lags if a kernel changes by more than its size in one step.

    Kernels of one shape are estimated together as groups of one kernel.

    Args:
        kernel: as in `bound_norm`; later kernels must have the same shape and dtype.
        geometry: the geometry of the layer; its size and padding have no effect.
    """

    def __init__(self, kernel: Tensor, geometry: Geometry) -> None:
        self.geometry = geometry
        self._place(kernel)

    def _place(self, kernel: Tensor) -> None:
        """Computes phases of taps at the centers of cells, (T, f), and at places in one, (q, T)."""
        L = self._fold(kernel)
        self._shape, counts = L.shape[:3], tuple(L.shape[3:])
        dtype = torch.complex128 if L.dtype == torch.float64 else torch.complex64
        middles, t = Grid(counts, COARSE, L.device).w, lattice.taps(counts, L.device)
        reach = FINE // COARSE // 2
        near = torch.arange(-reach, reach + 1, dtype=torch.float64, device=L.device)
        lines = [2 * math.pi / (FINE * (c - 1)) * near if c > 1 else near[:1] for c in counts]
        within = torch.cartesian_prod(*lines).reshape(-1, len(counts))
        self._middles, self._within = (
            torch.polar(torch.ones_like(angle), -angle).to(dtype)
            for angle in (t @ middles.mT, within @ t.mT)
        )

    def _fold(self, kernel: Tensor) -> Tensor:
        """Returns L in the working dtype, transposed if n > m, which keeps the singular values."""
        kernel = kernel.detach().to(working_dtype(kernel.dtype))
        L = _Folded.of(kernel, self.geometry).L
        return L.transpose(1, 2) if L.shape[2] > L.shape[1] else L

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (g, 2 n + 1, f) of X: real and imaginary parts of v, and the index of w."""
        groups, _, n = self._shape
        return groups, 2 * n + 1, self._middles.shape[1]

    def start(self, generator: torch.Generator) -> Tensor:
        """Returns a random X in the working dtype, drawn on the CPU."""
        real = self._middles.real
        X = torch.randn(self.shape, generator=generator, dtype=real.dtype, device="cpu")
        X[:, :-1] /= torch.linalg.vector_norm(X[:, :-1], dim=1, keepdim=True)
        X[:, -1] = len(self._within) // 2  # the middle of the cell
        return X.to(real.device)

    def refine(self, kernel: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the estimates per group, (g,), and X after one step.

        If a group is zero or not finite, its X is unchanged, and its estimate is 0 or not finite.
        """
        if kernel.device != self._middles.device:
            self._place(kernel)
        L = self._fold(kernel)
        unit = L.abs().amax(dim=tuple(range(1, L.ndim)))
        usable = (unit > 0) & (unit < math.inf)
        L = L.flatten(3) / lattice.each(torch.where(usable, unit, 1), L.flatten(3))
        groups, m, n, T = L.shape
        matrix = L.movedim(-1, 2).reshape(groups, m, T * n)
        v, place = torch.complex(X[:, :n], X[:, n:-1]), X[:, -1].long()
        moved = (self._phases(place)[:, :, None] * v[:, None]).reshape(groups, T * n, -1)
        image = matrix @ torch.view_as_real(moved).flatten(2)
        sigma = torch.linalg.vector_norm(image.reshape(groups, m, -1, 2), dim=(1, 3))
        u = image / torch.where(sigma > 0, sigma, 1).repeat_interleave(2, dim=1)[:, None]
        back = (matrix.mT @ u).reshape(groups, T, n, -1, 2)
        back = torch.view_as_complex(back)  # L_t^T u
        # u^* A(w) v is the sum of exp(-i w t) u^* L_t v.
        shares = self._middles * (back.conj() * v[:, None]).sum(2)
        place = (self._within @ shares).abs().argmax(1)
        v = (self._phases(place).conj()[:, :, None] * back).sum(1)
        norms = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        v = v / torch.where(norms > 0, norms, 1)
        refined = torch.cat([v.real, v.imag, place[:, None].to(X)], dim=1)
        kept = usable[:, None, None] & (norms > 0)
        return sigma.amax(1) * unit, torch.where(kept, refined, X)

    def _phases(self, place: Tensor) -> Tensor:
        """Returns exp(-i w t) at these places in the cells, (g, T, f)."""
        return self._middles * self._within[place].movedim(-1, 1)
