"""On a lattice, each convolution has the norm of one with stride 1 and without dilation."""

import itertools
import math
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from convolutions import dense
from wellcond.linalg import lattice
from wellcond.linalg.lattice import bound_norm, effective_steps, fold, limit_norm, unfold
from wellcond.linalg.symbol import periodic_singular_values
from wellcond.operators.convolution import Geometry

LAYERS = [*itertools.product((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 5))]


def random(*shape: int, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.float64)


@pytest.mark.parametrize("steps", [(1, 1), (2, 1), (3, 2), (4, 5)])
def test_folding_is_an_isometry_with_unfolding_as_its_adjoint(steps: tuple[int, ...]) -> None:
    K = random(2, 3, 4, 5)
    L = fold(K, steps)
    assert L.shape[2:] == tuple(math.ceil(k / s) for k, s in zip((4, 5), steps, strict=True))
    assert torch.equal(unfold(L, steps, K.shape), K)
    other = random(*L.shape, seed=1)
    torch.testing.assert_close((L * other).sum(), (K * unfold(other, steps, K.shape)).sum())
    torch.testing.assert_close(L.norm(), K.norm())


@pytest.mark.parametrize(("k", "stride", "dilation"), LAYERS)
def test_fold_removes_stride_and_dilation(k: int, stride: int, dilation: int) -> None:
    """On tori, the convolution with L has the same singular values, except for zeros.

    If stride and dilation have a common divisor, the convolution ignores the inputs in between.
    """
    K = random(2, 3, k)
    steps = effective_steps((k,), (stride,), (dilation,))
    n = 13  # no dilation divides it, so that frequencies are permuted
    sigma = periodic_singular_values(K, [stride], [dilation], [stride * n])
    of_L = periodic_singular_values(fold(K, steps), [1], [1], [n])
    torch.testing.assert_close(sigma, of_L)


@st.composite
def kernels(draw: Any) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    axes = draw(st.integers(1, 2))
    each = st.lists(st.integers(1, 4), min_size=axes, max_size=axes)
    stride, dilation, taps = (tuple(draw(each)) for _ in range(3))
    o, i, seed = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 999)))
    return random(o, i, *taps, seed=seed), stride, dilation


@hypothesis.given(kernels(), st.integers(1, 7))
@hypothesis.settings(max_examples=100, deadline=None)
def test_no_part_of_the_lattice_exceeds_the_bound(case: Any, n: int) -> None:
    K, stride, dilation = case
    extents = [d * (k - 1) for k, d in zip(K.shape[2:], dilation, strict=True)]
    geometry = Geometry((n,) * len(stride), stride, dilation, tuple((e, e) for e in extents))
    largest = float(torch.linalg.matrix_norm(dense(K, geometry), 2))
    L = fold(K, effective_steps(K.shape[2:], stride, dilation))[None]
    for finer in (lattice.COARSE, lattice.FINE):
        assert largest <= float(bound_norm(L, finer)) * (1 + 1e-12)
    assert largest <= float(lattice.bound_norm_cheaply(L)) * (1 + 1e-12)


def frequency_kernel(k: int, seed: int) -> Tensor:
    """A kernel whose symbol is largest at a random frequency."""
    source = torch.Generator().manual_seed(seed)
    frequency = torch.rand((), generator=source, dtype=torch.float64)
    phases = 2 * torch.pi * frequency * torch.arange(k, dtype=torch.float64)
    return torch.stack([phases.cos(), phases.sin()])[:, None]


@pytest.mark.parametrize("k", [2, 3, 5])
def test_the_bound_holds_between_the_points_of_its_grid(k: int) -> None:
    """Compared with a grid that is 64 times as fine."""
    for seed in range(20):
        K = frequency_kernel(k, seed)
        fine = periodic_singular_values(K, [1], [1], [16 * k * 64])[0]
        for finer, slack in ((16, 1.0049), (8, 1.0196), (4, 1.0824)):
            bound = float(bound_norm(K[None], finer))
            assert fine <= bound * (1 + 1e-12)
            assert bound <= slack * fine


def test_bound_covers_all_eigenvalues() -> None:
    """Most eigenvalues are never computed, but their order makes no difference."""
    for seed in range(5):
        L = random(1, 5, 7, 3, 3, seed=seed)
        grid = lattice.Grid(L.shape[3:], lattice.FINE, L.device)
        n = lattice.FINE * 2
        expected = periodic_singular_values(L[0], [1, 1], [1, 1], [n, n])[0]
        assert float(bound_norm(L)) == pytest.approx(float(expected) * grid.slack, rel=1e-8)
        assert int(torch.round(grid.weight * n * n).sum()) == n * n


def test_sufficient_bound_is_returned_if_proven() -> None:
    L = random(3, 4, 4, 3)
    bounds = bound_norm(L)
    enough = bounds * torch.tensor([1.5, 1.0, 0.5])
    found = bound_norm(L, enough=enough)
    torch.testing.assert_close(found, torch.maximum(bounds, enough), rtol=1e-8, atol=0)
    assert bool((found[:2] <= enough[:2]).all())


@pytest.mark.parametrize("shape", [(2, 3, 5, 3), (2, 5, 3, 3), (2, 4, 4, 2, 3), (2, 1, 1, 3)])
def test_limited_kernels_keep_their_support(shape: tuple[int, ...]) -> None:
    L = random(*shape)
    support = torch.ones(shape[2:], dtype=torch.float64)
    support[0, ..., -1] = 0  # the last tap of the first phase is padding
    L = L * support
    upper = bound_norm(L) * torch.tensor([0.5, 0.9])
    X = limit_norm(L, upper, support)
    assert bool((bound_norm(X) <= upper * (1 + 1e-8)).all())
    assert torch.equal(X * support, X)
    assert bool(((X - L).flatten(1).norm(dim=1) < L.flatten(1).norm(dim=1)).all())
