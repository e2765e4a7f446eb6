"""sigma_1 of convolutions as linear operators: bounds and limits hold for dense twins."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from convolutions import CASES, dense
from readback import accelerator
from wellcond.linalg import lattice
from wellcond.linalg.symbol import periodic_singular_values
from wellcond.operators.acting import (
    NormEstimator,
    bound_norm,
    flattening_factor,
    limit_norm,
    padding_factor,
)
from wellcond.operators.convolution import Convolution, Geometry

ROUNDING = 1 + 1e-12


def sigma_1(kernel: Tensor, geometry: Geometry) -> float:
    """From the operator as a matrix, which test_convolution.py compares with a dense twin."""
    S = Convolution(kernel.detach().to(torch.float64), geometry).dense()
    return float(torch.linalg.matrix_norm(S, 2))


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def adversarial(kernel: Tensor) -> dict[str, Tensor]:
    """Hard kernels of this shape, by the reason."""
    o, i, *k = kernel.shape
    corner, last, two = (torch.zeros_like(kernel) for _ in range(3))
    corner[..., *(0 for _ in k)] = 1  # all borders differ
    last[0, 0, *(-1 for _ in k)] = 1
    two[..., *(0 for _ in k)], two[..., *(-1 for _ in k)] = 1, 0.5  # sigma_nu is far below
    signs = 1 - 2 * (torch.stack(torch.meshgrid(*map(torch.arange, k), indexing="ij")).sum(0) % 2)
    u, v = random(o, i, seed=1), random(*k, seed=2)
    return {
        "random": kernel,
        "one corner": corner,
        "one entry": last,
        "taps 1 and 1/2": two,
        "equal taps": torch.ones_like(kernel),  # largest at frequency 0, in every border
        "alternating signs": torch.ones_like(kernel) * signs,  # at the highest frequency
        "rank one": u.reshape(o, i, *[1] * len(k)) * v,
    }


def smaller_and_larger(geometry: Geometry) -> Iterator[Geometry]:
    """The same layer on other valid sizes, including tiny and non-square ones."""
    for change in (-5, -4, -2, 0, 1):
        size = tuple(n + change + axis for axis, n in enumerate(geometry.size))
        other = replace(geometry, size=size)
        if min(size) > 0 and takes(other):
            yield other


def takes(geometry: Geometry) -> bool:
    most = [max(around) for around in geometry.padding]
    if geometry.mode == "reflect":
        return all(p < n for p, n in zip(most, geometry.size, strict=True))
    return geometry.mode != "circular" or all(
        p <= n for p, n in zip(most, geometry.size, strict=True)
    )


def runs(kernel: Tensor, geometry: Geometry) -> bool:
    return min(Convolution(kernel, geometry).positions) > 0


def case(name: str) -> tuple[Tensor, Geometry]:
    layer, size = CASES[name]
    return layer.weight.detach(), Geometry.of(layer, size)


def every(number: int) -> list[str]:
    """Every `number`-th case, and all special cases at the end."""
    names = [*CASES]
    return [*names[:-7:number], *names[-7:]]


# --- bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", every(4))
def test_bound_holds_for_all_input_sizes(name: str) -> None:
    kernel, geometry = case(name)
    for hard in adversarial(kernel).values():
        bound = bound_norm(hard, geometry)
        for other in smaller_and_larger(geometry):
            if runs(hard, other):
                assert sigma_1(hard, other) <= bound * ROUNDING


@st.composite
def layers(draw: Any) -> tuple[Tensor, Geometry]:
    """Includes more padding than the kernel uses, and strides that skip inputs."""
    axes = draw(st.integers(1, 2))

    def each(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(least, most), min_size=axes, max_size=axes)))

    taps, stride, dilation = each(1, 4), each(1, 3), each(1, 3)
    padding = tuple(zip(each(0, 3), each(0, 3), strict=True))
    mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    geometry = Geometry(each(1, 7), stride, dilation, padding, mode)
    kernel = random(2, draw(st.integers(1, 2)), *taps, seed=draw(st.integers(0, 99)))
    kernel = draw(st.sampled_from(list(adversarial(kernel).values())))
    hypothesis.assume(takes(geometry) and runs(kernel, geometry))
    return kernel, geometry


@hypothesis.given(layers())
@hypothesis.settings(max_examples=150, deadline=None)
def test_bound_and_flattened_bound_hold(
    layer: tuple[Tensor, Geometry],
) -> None:
    kernel, geometry = layer
    largest = float(torch.linalg.matrix_norm(dense(kernel, geometry), 2))
    assert largest <= bound_norm(kernel, geometry) * ROUNDING
    flattened = float(torch.linalg.matrix_norm(kernel.flatten(1), 2))
    assert largest <= flattened * flattening_factor(kernel.shape, geometry) * ROUNDING


@pytest.mark.parametrize("taps", [(3,), (4, 3), (2, 3, 2)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_bound_matches_large_torus(taps: tuple[int, ...], stride: int, dilation: int) -> None:
    """Up to 0.5 % per axis; zero padding gives parts of the torus."""
    kernel = random(3, 2, *taps)
    steps, apart = [stride] * len(taps), [dilation] * len(taps)
    geometry = Geometry((), tuple(steps), tuple(apart), ((1, 1),) * len(taps))
    points = (31, 17, 9)[len(taps) - 1]  # odd, so that a dilation of 2 permutes frequencies
    largest = float(
        periodic_singular_values(kernel, steps, apart, [stride * points] * len(taps))[0]
    )
    degrees = [-(-k // (stride // math.gcd(stride, dilation))) - 1 for k in taps]
    # The factor by which the supremum can exceed the torus.
    torus = math.prod(1 / math.cos(math.pi * h / (2 * points)) for h in degrees)
    bound = bound_norm(kernel, geometry)
    assert largest <= bound * ROUNDING
    assert bound <= largest * torus * 1.00484 ** len(taps)


def test_zero_padding_attains_bound_on_large_inputs() -> None:
    kernel = random(2, 3, 3, 3)
    geometry = Geometry((16, 14), (1, 1), (1, 1), ((1, 1), (1, 1)))
    assert 0.96 * bound_norm(kernel, geometry) <= sigma_1(kernel, geometry)


@pytest.mark.parametrize("h", [1, 2, 5])
def test_bound_holds_between_grid_points(h: int) -> None:
    """Taps 1 and exp(i t), h apart, are largest between two points, where the bound is tight."""
    n = lattice.FINE * h
    angle = torch.tensor(math.pi * h / n, dtype=torch.float64)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
    kernel = torch.zeros(2, 2, h + 1, dtype=torch.float64)
    kernel[:, :, 0], kernel[:, :, -1] = torch.eye(2), rotation
    geometry = Geometry((), (1,), (1,), ((0, 0),))
    assert float(lattice.norm_on_grid(kernel[None], lattice.FINE)) < 2 * 0.999
    assert bound_norm(kernel, geometry) == pytest.approx(2, rel=1e-8)
    assert bound_norm(kernel, geometry) >= 2


def test_circular_padding_factor_is_necessary() -> None:
    """The factor is necessary: sqrt(2) per axis of stride 2."""
    kernel = random(2, 2, 3)
    geometry = Geometry((5,), (2,), (1,), ((1, 1),), "circular")
    factor = padding_factor(kernel.shape, geometry)
    worst = max(
        sigma_1(kernel, replace(geometry, size=(n,))) / (bound_norm(kernel, geometry) / factor)
        for kernel in (random(1, 1, 3, seed=seed) for seed in range(30))
        for n in (1, 3, 5)
    )
    assert factor == pytest.approx(math.sqrt(2))
    assert 1.2 < worst <= factor
    assert padding_factor(kernel.shape, replace(geometry, stride=(1,))) == 1


def test_equal_taps_attain_flattening_factor() -> None:
    for stride, dilation, k in ((1, 1, (3, 3)), (2, 1, (4, 4)), (1, 2, (3,)), (2, 2, (3,))):
        kernel = torch.ones(1, 1, *k, dtype=torch.float64)
        geometry = Geometry((), (stride,) * len(k), (dilation,) * len(k), ((0, 0),) * len(k))
        size = [4 * stride * dilation] * len(k)
        largest = periodic_singular_values(kernel, geometry.stride, geometry.dilation, size)[0]
        factor = flattening_factor(kernel.shape, geometry)
        assert float(largest) == pytest.approx(factor * math.sqrt(math.prod(k)))


@pytest.mark.parametrize("factor", [1e30, 1e-30, 1e-45, 1e38])
def test_bound_scales_with_kernel(factor: float) -> None:
    kernel = random(4, 3, 3, 3, dtype=torch.float32)
    kernel = torch.sign(kernel) * factor
    geometry = Geometry((), (1, 1), (1, 1), ((1, 1), (1, 1)))
    unit = float(kernel.abs().max().double())
    expected = bound_norm(torch.sign(kernel), geometry)
    assert bound_norm(kernel, geometry) == pytest.approx(expected * unit, rel=1e-12)


def test_bound_of_zero_and_nonfinite_kernels() -> None:
    geometry = Geometry((), (1, 1), (1, 1), ((1, 1), (1, 1)))
    assert bound_norm(torch.zeros(2, 3, 3, 3), geometry) == 0
    assert bound_norm(torch.zeros(2, 0, 3, 3), geometry) == 0
    assert math.isnan(bound_norm(torch.full((2, 3, 3, 3), math.nan), geometry))
    assert bound_norm(torch.full((2, 3, 3, 3), math.inf), geometry) == math.inf


# --- limits ---------------------------------------------------------------------------------------


def check_limited(kernel: Tensor, geometry: Geometry, share: float) -> None:
    """The limited kernel is within the limit, is stable, and is as near as the scaled one."""
    before = bound_norm(kernel, geometry)
    upper = share * before
    X = limit_norm(kernel, geometry, upper)
    assert (X.shape, X.dtype) == (kernel.shape, kernel.dtype)
    assert bound_norm(X, geometry) <= upper
    for other in smaller_and_larger(geometry):
        if runs(kernel, other):
            assert sigma_1(X, other) <= upper
    assert limit_norm(X, geometry, upper) is X
    # Scale the groups that exceed the limit.
    rows = len(kernel) // geometry.groups
    one = replace(geometry, groups=1)
    scaled = torch.cat(
        [part * min(1, upper / (bound_norm(part, one) or 1)) for part in kernel.split(rows)]
    )
    rounding = (4 * torch.finfo(kernel.dtype).eps + 2e-8) * float(kernel.double().norm())
    distance, scaling = (float((one - kernel).double().norm()) for one in (X, scaled))
    assert distance <= scaling + rounding


@pytest.mark.parametrize("name", every(5))
def test_limited_kernel_within_limit_in_dense_twins(name: str) -> None:
    kernel, geometry = case(name)
    kernels = [*adversarial(kernel).values()]
    index = [*CASES].index(name)
    check_limited(kernels[index % len(kernels)], geometry, (0.6, 0.999)[index % 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.03, 0.7, 0.9999])
def test_limit_holds_after_rounding_to_storage_dtype(dtype: torch.dtype, share: float) -> None:
    geometry = Geometry((5, 4), (1, 1), (1, 1), ((1, 1), (1, 1)), groups=2)
    kernel = random(4, 3, 3, 3).to(dtype)
    check_limited(kernel, geometry, share)
    channels_last = kernel.to(memory_format=torch.channels_last)
    X = limit_norm(channels_last, geometry, 1.0)
    assert X.stride() == channels_last.stride()
    assert torch.equal(X, limit_norm(kernel, geometry, 1.0))


def test_clipping_nearer_than_scaling() -> None:
    """The reference is 400 of Dykstra's projections on a grid twice as fine."""
    geometry = Geometry((), (1,), (1,), ((1, 1),))
    kernel = random(6, 5, 3)
    for share, close in ((0.5, 1.05), (0.8, 1.1), (0.95, 1.3)):
        before = bound_norm(kernel, geometry)
        X = limit_norm(kernel, geometry, share * before)
        nearest = dykstra(kernel, share * before / 1.0048)
        distance = float((X - kernel).norm())
        assert distance <= close * float((nearest - kernel).norm())
        assert distance <= 0.9 * (1 - share) * float(kernel.norm())


def dykstra(kernel: Tensor, upper: float, turns: int = 400) -> Tensor:
    *_, k = kernel.shape
    n = 32 * (k - 1)
    X, P = kernel, torch.zeros(())
    for _ in range(turns):
        A = torch.fft.fft(X, n=n).movedim(-1, 0) + P
        U, sigma, Vh = torch.linalg.svd(A, full_matrices=False)
        clipped = (U * sigma.clamp_max(upper)[:, None]) @ Vh
        P = A - clipped
        X = torch.fft.ifft(clipped.movedim(0, -1)).real[..., :k]
    return X


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_disjoint_kernel_clipped_exactly(stride: int) -> None:
    kernel = random(5, 3, stride, stride)
    geometry = Geometry((), (stride,) * 2, (1, 1), ((0, 0), (0, 0)))
    U, sigma, Vh = torch.linalg.svd(kernel.flatten(1), full_matrices=False)
    upper = float(sigma[1])
    expected = (U * sigma.clamp_max(upper)) @ Vh
    X = limit_norm(kernel, geometry, upper)
    torch.testing.assert_close(X.flatten(1), expected, rtol=1e-6, atol=1e-6)


def test_groups_limited_separately() -> None:
    geometry = Geometry((), (1, 1), (1, 1), ((1, 1), (1, 1)), groups=3)
    kernel = (
        random(6, 2, 3, 3) * torch.tensor([1.0, 4.0, 0.1]).repeat_interleave(2)[:, None, None, None]
    )
    upper = 1.01 * bound_norm(kernel[:2], replace(geometry, groups=1))
    X = limit_norm(kernel, geometry, upper)
    assert torch.equal(X[:2], kernel[:2])
    assert torch.equal(X[4:], kernel[4:])
    assert bound_norm(X[2:4], replace(geometry, groups=1)) == pytest.approx(upper, rel=0.01)


def test_transposed_layer_limited_like_adjoint() -> None:
    kernel = random(3, 4, 3, 3)
    geometry = Geometry((7, 8), (2, 2), (1, 1), ((1, 0), (1, 0)), transposed=True)
    X = limit_norm(kernel, geometry, 1.0)
    assert torch.equal(X, limit_norm(kernel, replace(geometry, transposed=False), 1.0))
    layer = nn.ConvTranspose2d(3, 4, 3, 2, 1, 1, bias=False).double()
    layer.weight.data = X
    inputs = torch.eye(3 * 16, dtype=torch.float64).reshape(-1, 3, 4, 4)
    S = layer(inputs).flatten(1).detach()
    assert 0.9 <= float(torch.linalg.matrix_norm(S, 2)) <= 1.0


@pytest.mark.parametrize("factor", [1e30, 1e-30, 1e-42])
def test_large_and_small_kernels_limited(factor: float) -> None:
    geometry = Geometry((4, 5), (1, 1), (1, 1), ((1, 1), (1, 1)))
    kernel = random(4, 3, 3, 3, dtype=torch.float32) * factor
    check_limited(kernel, geometry, 0.5)
    if factor > 1:
        check_limited(kernel, geometry, 1e-30)


def test_unchanged_kernel_returned_as_same_tensor() -> None:
    geometry = Geometry((), (1, 1), (1, 1), ((1, 1), (1, 1)))
    for kernel in (
        torch.zeros(2, 3, 3, 3),
        torch.full((2, 3, 3, 3), math.nan),
        torch.full((2, 3, 3, 3), math.inf),
        0.01 * random(2, 3, 3, 3, dtype=torch.float32),
    ):
        assert limit_norm(kernel, geometry, 1.0) is kernel


# --- estimates ------------------------------------------------------------------------------------


def warm(kernel: Tensor, geometry: Geometry) -> tuple[NormEstimator, Tensor, Tensor]:
    """An estimator, its estimate after 40 steps on this kernel, and its state."""
    estimator = NormEstimator(kernel, geometry)
    X = estimator.start(torch.Generator().manual_seed(0))
    assert X.shape == estimator.shape
    for _ in range(40):
        estimate, X = estimator.refine(kernel, X)
    return estimator, estimate, X


@pytest.mark.parametrize("name", every(7))
def test_warm_estimate_slightly_below_bound(name: str) -> None:
    """The gap is twice the slack of the grid, 0.5 % per axis, and the error of power iteration."""
    kernel, geometry = case(name)
    for hard in adversarial(kernel).values():
        _, estimate, _ = warm(hard, geometry)
        bound = bound_norm(hard, geometry) / padding_factor(hard.shape, geometry)
        assert 0.97 * bound <= float(estimate.max()) <= bound


def test_estimate_never_decreases_for_fixed_kernel() -> None:
    geometry = Geometry((), (2, 1), (1, 1), ((1, 1), (1, 1)), groups=2)
    kernel = random(6, 5, 4, 3)
    estimator = NormEstimator(kernel, geometry)
    X = estimator.start(torch.Generator().manual_seed(0))
    last = torch.zeros(2, dtype=torch.float64)
    for _ in range(30):
        estimate, X = estimator.refine(kernel, X)
        assert bool((estimate >= last * (1 - 1e-12)).all())
        last = estimate
    for group, value in zip(kernel.chunk(2), last, strict=True):
        assert float(value) <= bound_norm(group, replace(geometry, groups=1))


def test_estimate_scales_and_ignores_nonfinite_kernels() -> None:
    geometry = Geometry((), (1, 1), (1, 1), ((1, 1), (1, 1)))
    kernel = random(4, 3, 3, 3, dtype=torch.float32)
    estimator, estimate, X = warm(kernel, geometry)
    for factor in (2.0**100, 2.0**-100):
        again, _ = estimator.refine(kernel * factor, X)
        torch.testing.assert_close(again, estimate * factor)
    zero, kept = estimator.refine(torch.zeros_like(kernel), X)
    assert float(zero) == 0
    assert torch.equal(kept, X)
    broken, kept = estimator.refine(torch.full_like(kernel, math.nan), X)
    assert not math.isfinite(float(broken))
    assert torch.equal(kept, X)


def test_estimate_follows_moving_kernel() -> None:
    """One estimation step per step of a random walk of 1 % of the norm."""
    geometry = Geometry((), (1, 1), (1, 1), ((1, 1), (1, 1)))
    kernel = random(12, 8, 3, 3, dtype=torch.float32)
    estimator, _, X = warm(kernel, geometry)
    for step in range(60):
        change = random(*kernel.shape, seed=step, dtype=torch.float32)
        kernel = kernel + 0.01 * change
        estimate, X = estimator.refine(kernel, X)
        if step % 10 == 9:
            assert float(estimate) >= 0.97 * bound_norm(kernel, geometry)


def test_half_precision_estimated_in_float32() -> None:
    geometry = Geometry((), (1, 1), (1, 1), ((1, 1), (1, 1)))
    kernel = random(4, 3, 3, 3).to(torch.bfloat16)
    _, estimate, X = warm(kernel, geometry)
    assert X.dtype == torch.float32
    assert torch.equal(estimate, warm(kernel.float(), geometry)[1])


def test_kernels_of_equal_shape_estimated_as_groups() -> None:
    geometry = Geometry((), (2,), (1,), ((1, 1),), groups=2)
    kernels = [random(4, 3, 5, seed=seed) for seed in range(3)]
    apart = torch.cat([warm(kernel, geometry)[1] for kernel in kernels])
    together = warm(torch.cat(kernels), replace(geometry, groups=6))[1]
    torch.testing.assert_close(together, apart, rtol=5e-3, atol=0)  # from other starts


def test_estimate_does_not_synchronise() -> None:
    geometry = Geometry((), (1, 1), (1, 1), ((1, 1), (1, 1)))
    with accelerator() as device:
        kernel = torch.empty(4, 3, 3, 3, device=device)
        estimator = NormEstimator(kernel, geometry)
        estimate, X = estimator.refine(kernel, estimator.start(torch.Generator()))
        assert estimate.device == X.device == device
