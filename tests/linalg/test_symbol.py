"""The frequencies give all singular values on a torus."""

from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor

from convolutions import dense
from wellcond.linalg.symbol import periodic_singular_values, symbol_matrices
from wellcond.operators.convolution import Geometry


@st.composite
def convolutions(draw: Any) -> tuple[Tensor, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Kernel, stride, dilation and a size that the stride divides; kernels may wrap around."""
    axes = draw(st.integers(1, 2))
    each = st.lists(st.integers(1, 3), min_size=axes, max_size=axes)
    stride, dilation, turns = (tuple(draw(each)) for _ in range(3))
    taps = draw(st.lists(st.integers(1, 4), min_size=axes, max_size=axes))
    o, i, seed = (draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 999)))
    source = torch.Generator().manual_seed(seed)
    K = torch.randn(o, i, *taps, generator=source, dtype=torch.float64)
    return K, stride, dilation, tuple(s * t for s, t in zip(stride, turns, strict=True))


@hypothesis.given(convolutions())
@hypothesis.settings(max_examples=150, deadline=None)
def test_frequencies_give_all_singular_values_on_a_torus(case: Any) -> None:
    K, stride, dilation, size = case
    extents = [d * (k - 1) for k, d in zip(K.shape[2:], dilation, strict=True)]
    geometry = Geometry(size, stride, dilation, tuple((0, e) for e in extents), "circular")
    found = periodic_singular_values(K, stride, dilation, size)
    expected = torch.linalg.svdvals(dense(K, geometry))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * max(1.0, float(expected[0])))


def test_half_of_the_frequencies_represent_all() -> None:
    K = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    for size in ((4, 6), (5, 6), (5, 7), (1, 1), (1, 2)):
        matrices, counts = symbol_matrices(K, [1, 1], [1, 1], size)
        assert int(counts.sum()) == size[0] * size[1]
        assert len(matrices) == len(counts) <= size[0] * size[1] // 2 + 2
