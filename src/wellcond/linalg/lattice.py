"""Convolutions on an infinite lattice: a tight bound of the norm, and kernels within a bound.

A stride s of an axis splits inputs and taps into s phases. If s and the dilation d have no common
divisor, the taps of each phase are d apart on the coarse lattice. The supremum over all frequencies
is then the same as for taps that are 1 apart, so the dilation has no effect. If s and d have a
common divisor, the inputs split into independent lattices, on which stride and dilation are divided
by it. So each convolution has the same norm as one with stride 1 and without dilation, whose kernel
is L (m, n prod(s), *c) with c = ceil(k/s) taps per axis. The norm is the supremum over all
frequencies w of sigma_1(A(w)), A(w) = sum_a L_a exp(-i w.a).

For fixed v, ||A(w) v||^2 is a trigonometric polynomial of degree h = c - 1 per axis. By a lemma of
M. Riesz, such a polynomial p between 0 and p(w0) is at least p(w0) cos(h t/2)^2 at a distance t
from w0, if h t <= pi. A grid of N points per axis has a point within pi/N of w0. So the supremum is
at most the maximum over the grid times prod 1/cos(pi h/(2 N)), which is 0.5 % per axis for
N = 16 h. The taps (1, 1) show that no smaller factor holds.

Letters: K (o, i, *k) the kernel; s, d stride and dilation of an axis; L (g, m, n, *c) the kernels
of g groups of channels as above; w frequencies, f their number; N points of the grid;
nu = min(m, n).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

# Points per degree of a grid that proves a bound, and of a grid for a first estimate.
FINE, COARSE = 16, 4
# Up to each side of the matrices: points per degree of the grid on which singular values are
# clipped, and the maximum number of rounds. If many values are clipped, a finer grid or more rounds
# hardly give a nearer kernel.
_CLIPPED = ((128, 6, 20), (math.inf, 4, 10))
_CLOSE = 3e-3  # an excess over the bound that the last scaling removes
_ROUNDING = 1e-9  # relative, of eigenvalues: far above the rounding error of float64
_ENTRIES = 1 << 22  # of the Gram matrices that exist at once


# --- stride 1 and no dilation ---------------------------------------------------------------------


def effective_steps(
    kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """The number of phases per axis into which the taps of a kernel of these sides split."""
    axes = zip(kernel, stride, dilation, strict=True)
    return tuple(min(s // math.gcd(s, d), k) for k, s, d in axes)


def fold(K: Tensor, steps: Sequence[int]) -> Tensor:
    """L (o, i prod(s), *c) from K (o, i, *k): an isometry, which pads with zeros."""
    taps = K.shape[2:]
    counts = [-(-k // s) for k, s in zip(taps, steps, strict=True)]
    around = [x for k, c, s in zip(taps, counts, steps, strict=True) for x in (c * s - k, 0)]
    if any(around):
        K = pad(K, around[::-1])
    axes = range(len(taps))
    K = K.contiguous()  # because sums are rounded differently in another memory format
    split = K.reshape(*K.shape[:2], *(x for pair in zip(counts, steps, strict=True) for x in pair))
    order = (0, 1, *(3 + 2 * a for a in axes), *(2 + 2 * a for a in axes))
    return split.permute(order).flatten(1, 1 + len(taps)).reshape(len(K), -1, *counts)


def unfold(L: Tensor, steps: Sequence[int], shape: Sequence[int]) -> Tensor:
    """K (o, i, *k) of this shape from L: the adjoint of `fold`, which removes the padding."""
    counts, axes = L.shape[2:], range(len(steps))
    split = L.reshape(*shape[:2], *steps, *counts)
    order = (0, 1, *(x for a in axes for x in (2 + len(steps) + a, 2 + a)))
    sides = [c * s for c, s in zip(counts, steps, strict=True)]
    whole = split.permute(order).reshape(*shape[:2], *sides)
    for axis, k in enumerate(shape[2:], start=2):
        whole = whole.narrow(axis, 0, k)
    return whole


# --- the grid -------------------------------------------------------------------------------------


class Grid:
    """Half of the frequencies of a grid of N = finer h points per axis.

    Half suffices, because A(w) and A(-w) have the same singular values.

    Args:
        counts: c, the taps per axis.
        finer: points per degree.
        device: the device of the tensors.

    Attributes:
        w: (f, axes).
        weight: the share of all frequencies that each one represents, (f,).
        slack: the factor by which the supremum of sigma_1 may exceed the maximum over the grid.
    """

    def __init__(self, counts: Sequence[int], finer: int, device: torch.device) -> None:
        self.counts = tuple(counts)
        points = [max(1, finer * (c - 1)) for c in counts]
        # Only the last axis that has several points is halved.
        halved = max((axis for axis, n in enumerate(points) if n > 1), default=0)
        lines, weights = [], []
        for axis, n in enumerate(points):
            index = torch.arange(n // 2 + 1 if axis == halved else n, dtype=torch.float64)
            both = (index > 0) & (2 * index < n) & (axis == halved)
            lines.append(2 * math.pi / n * index)
            weights.append(torch.where(both, 2.0, 1.0).to(torch.float64) / n)
        self.w = torch.cartesian_prod(*lines).reshape(-1, len(points)).to(device)
        weight = torch.cartesian_prod(*weights).reshape(-1, len(points)).prod(-1)
        self.weight = weight.to(device)
        axes = zip(points, counts, strict=True)
        self.slack = math.prod(1 / math.cos(math.pi * (c - 1) / (2 * n)) for n, c in axes)

    def __len__(self) -> int:
        return len(self.w)


def taps(counts: Sequence[int], device: torch.device) -> Tensor:
    """The positions of the taps, (T, axes), in the order of memory, in float64."""
    places = torch.cartesian_prod(*(torch.arange(c, dtype=torch.float64) for c in counts))
    return places.reshape(-1, len(counts)).to(device)


class _Gram:
    """The smaller Gram matrices of A(w), from lags: sum_l R_l cos(w.l) and -sum_l R_l sin(w.l).

    R_l = sum_a L_(a + l) L_a^T, so that no product of two A(w) is formed.
    """

    def __init__(self, L: Tensor) -> None:
        groups, m, _, *counts = L.shape
        lags = [2 * c - 1 for c in counts]
        R = L.new_zeros(groups, math.prod(lags), m, m)
        last = L.flatten(3).movedim(-1, 1)  # (g, T, m, n)
        places = taps(counts, L.device).long()
        strides = torch.tensor([math.prod(lags[a + 1 :]) for a in range(len(lags))]).to(places)
        offset = torch.tensor(counts).to(places) - 1
        for a, place in enumerate(places):
            index = ((places - place + offset) * strides).sum(-1)
            R.index_add_(1, index, last @ last[:, a : a + 1].mT)
        self.R = R.flatten(2)
        self.lags = taps(lags, L.device) - offset
        self.m = m

    def rows(self, w: Tensor) -> Tensor:
        """The Gram matrices for m = 1 at frequencies (f, axes), of all groups: real (g, f)."""
        return self.R[..., 0] @ (w @ self.lags.mT).cos().mT.to(self.R)

    def __call__(self, w: Tensor, group: int) -> Tensor:
        """The Gram matrices (f, m, m) of one group at frequencies (f, axes)."""
        angle = w @ self.lags.mT
        R = self.R[group]
        parts = angle.cos().to(R) @ R, -(angle.sin().to(R) @ R)
        return torch.complex(*parts).reshape(-1, self.m, self.m)


def _upright(L: Tensor) -> Tensor:
    """L, transposed if m > n, so that A A^H is the smaller Gram matrix."""
    return L.transpose(1, 2) if L.shape[1] > L.shape[2] else L


# --- the bound ------------------------------------------------------------------------------------


def norm_on_grid(L: Tensor, finer: int = COARSE) -> Tensor:
    """The maximum over a grid, a lower bound of the norm, per group (g,) in float64."""
    return bound_norm(L, finer) / Grid(L.shape[3:], finer, L.device).slack


# The maximum cost of a bound that need not be tight, in multiplications.
_WORK = 2e10


def bound_norm_cheaply(L: Tensor) -> Tensor:
    """`bound_norm` on the finest of three grids that is not too expensive.

    On the coarsest grid, it may exceed the norm by 17 % for two axes.
    """
    _, m, n, *counts = L.shape
    for finer in (FINE, FINE // 2, COARSE):
        if math.prod(max(1, finer * (c - 1)) for c in counts) * min(m, n) ** 3 <= _WORK:
            break
    return bound_norm(L, finer)


def bound_norm(L: Tensor, finer: int = FINE, enough: Tensor | None = None) -> Tensor:
    """An upper bound of the norm on the lattice, per group (g,) in float64.

    It exceeds the norm by at most prod 1/cos(pi h/(2 N)) - 1 with N = finer h: 1 % for two axes
    with N = 16 h.

    Args:
        L: (g, m, n, *c).
        finer: points of the grid per degree.
        enough: (g,) sufficient bounds: if the norm is proven to be at most `enough`, `enough` is
            returned.
    """
    wide = _upright(L.to(torch.float64))
    largest = wide.abs().amax(dim=tuple(range(1, wide.ndim)))
    unit = powers_of_two(largest)
    wide = wide / each(unit, wide)
    grid = Grid(L.shape[3:], finer, L.device)
    gram = _Gram(wide)
    best = wide.new_zeros(len(L))
    if enough is not None:
        best = (enough.to(best) / unit / grid.slack).square() / (1 + 3 * _ROUNDING)
    if gram.m == 1:
        best = torch.maximum(best, gram.rows(grid.w).amax(-1)) * (1 + _ROUNDING)
    else:
        parts = torch.split(grid.w, max(1, _ENTRIES // gram.m**2))
        eigenvalues = [
            _raise_to_largest((gram(w, g) for w in parts), float(best[g])) for g in range(len(L))
        ]
        best = wide.new_tensor(eigenvalues)
    return torch.where(torch.isfinite(largest), best.sqrt() * grid.slack * unit, largest)


def powers_of_two(largest: Tensor) -> Tensor:
    """Powers of two between these numbers and twice them; 1 for zero and non-finite numbers."""
    usable = (largest > 0) & torch.isfinite(largest)
    one = torch.ones_like(largest)
    return torch.where(usable, torch.ldexp(one, largest.frexp().exponent), one)


def _raise_to_largest(chunks: Iterator[Tensor], best: float) -> float:
    """The largest eigenvalue of all matrices (f, m, m), or `best`, with a margin for rounding.

    Cholesky factorisations prove that most eigenvalues are smaller than a known one.
    """
    for G in chunks:
        norms: Tensor = torch.linalg.vector_norm(torch.view_as_real(G), dim=(1, 2, 3))
        left = norms.argsort(descending=True)
        while len(left := left[norms[left] > best]):
            if best > 0:
                shifted = G[left].neg_()
                shifted.diagonal(dim1=-2, dim2=-1).add_(best * (1 + _ROUNDING))
                left = left[torch.linalg.cholesky_ex(shifted).info > 0]
            first, left = left[:8], left[8:]
            if len(first):
                best = max(best, float(torch.linalg.eigvalsh(G[first])[:, -1].max()))
    return best * (1 + _ROUNDING)


# --- a nearby kernel ------------------------------------------------------------------------------


def limit_norm(L: Tensor, upper: Tensor, support: Tensor) -> Tensor:
    """Kernels near L with norms on the lattice of at most `upper` by `bound_norm`, in float64.

    It alternates between clipping singular values at the points of a grid and restricting the
    kernel to the support, and finally scales the kernel. The result is this kernel or the scaled L,
    whichever is nearer to L in the Frobenius norm.

    Args:
        L: (g, m, n, *c), finite, of groups that exceed the bound.
        upper: (g,).
        support: (n, *c), 1 where a tap is allowed.
    """
    wide = L.to(torch.float64)
    norm = _over(wide, torch.linalg.vector_norm)
    unit = powers_of_two(norm)
    wide, norm, upper = wide / each(unit, wide), norm / unit, upper.to(wide) / unit
    clipped = _clip_on_grid(wide, upper, support, L.dtype)
    clipped *= each((upper / bound_norm(clipped)).clamp_max(1), clipped)
    distance = _over(clipped - wide, torch.linalg.vector_norm)
    doubtful = distance > (1 - upper / norm_on_grid(wide)) * norm
    if bool(doubtful.any()):
        scaled = wide * each(upper / bound_norm(wide), wide)
        nearer = _over(scaled - wide, torch.linalg.vector_norm) <= distance
        clipped = torch.where(each(nearer, wide), scaled, clipped)
    return clipped * each(unit, clipped)


def each(numbers: Tensor, L: Tensor) -> Tensor:
    """Reshapes one number per group for multiplication with L."""
    return numbers.reshape(-1, *[1] * (L.ndim - 1))


def _over(L: Tensor, norm: Callable[..., Tensor]) -> Tensor:
    return norm(L.flatten(1), dim=1)


def _clip_on_grid(L: Tensor, upper: Tensor, support: Tensor, dtype: torch.dtype) -> Tensor:
    """Projects onto the kernels within the bound on a grid, and onto this support, in turns.

    The arithmetic is in the dtype of the weight, at least float32. The last scaling corrects its
    rounding errors.
    """
    complex_dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    X = _upright(L).clone()
    support = support.expand(L.shape[1:])
    if X.shape != L.shape:
        support = support.transpose(0, 1)
    groups, m, n, *counts = X.shape
    finer, turns = next(rest for side, *rest in _CLIPPED if m <= side)
    grid, places = Grid(counts, finer, L.device), taps(counts, L.device)
    # So that the certified bound, which also holds between grid points, is the upper bound.
    target = upper / Grid(counts, FINE, L.device).slack
    chunk = max(1, _ENTRIES // (groups * m * n))
    for _ in range(turns):
        last, moved = X.flatten(3).movedim(-1, 1).flatten(2).to(complex_dtype), False
        change = torch.zeros_like(last.real)
        for w, weight in zip(
            torch.split(grid.w, chunk), torch.split(grid.weight, chunk), strict=True
        ):
            angle = w @ places.mT
            phases = torch.polar(torch.ones_like(angle), -angle).to(complex_dtype)
            A = (phases @ last).reshape(groups, -1, m, n)
            shifted = -(A @ A.mH)
            threshold = (target * (1 + _CLOSE)).square().to(shifted.real)[:, None, None]
            shifted.diagonal(dim1=-2, dim2=-1).add_(threshold)
            above = torch.linalg.cholesky_ex(shifted).info > 0
            if not bool(above.any()):
                continue
            moved = True
            exceeding = A[above]
            bound = target[:, None].expand(above.shape)[above].to(shifted.real)[:, None]
            eigenvalues, U = torch.linalg.eigh(exceeding @ exceeding.mH)
            share = 1 - bound / eigenvalues.clamp_min(0).sqrt().maximum(bound)
            D = torch.zeros_like(A)
            D[above] = -(U * share[:, None].to(U)) @ (U.mH @ exceeding)
            change += ((phases.conj() * weight[:, None].to(phases)).mT @ D.flatten(2)).real
        if not moved:
            break
        X += change.reshape(groups, -1, m, n).movedim(1, -1).reshape(X.shape).to(X) * support
    return X.transpose(1, 2) if X.shape != L.shape else X
