"""The laws of Gaussian matrices, against samples, exact laws and known bounds."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.polynomial.legendre import leggauss
from torch import Tensor

import wellcond as wc
from wellcond.linalg.gaussian import exceedance, gaussian_stable_rank

sizes = st.integers(1, 40)
shapes = st.tuples(sizes, sizes)
conditions = st.floats(0, 1e18)


def sampled(m: int, n: int, count: int) -> Tensor:
    """Singular values of `count` Gaussian (m, n) matrices, from their R factors (Bartlett)."""
    source = torch.Generator().manual_seed(0)
    batches = []
    for start in range(0, count, 10_000):
        size = min(10_000, count - start)
        R = torch.randn(size, n, n, generator=source, dtype=torch.float64).triu(1)
        for i in range(n):
            halves = torch.full((size,), (m - i) / 2, dtype=torch.float64)
            R[:, i, i] = (2 * torch._standard_gamma(halves, generator=source)).sqrt()
        batches.append(torch.linalg.svdvals(R))
    return torch.cat(batches)


def quantile(kappa: Tensor, share: float) -> float:
    return float(kappa.sort(descending=True).values[round(share * len(kappa))])


# --- theorems -------------------------------------------------------------------------------------


@given(shapes, conditions, conditions)
def test_larger_condition_numbers_are_rarer(shape: tuple[int, int], x: float, y: float) -> None:
    low, high = (exceedance(shape, max(x, y)), exceedance(shape, min(x, y)))
    assert 0 <= low <= high <= 1


@given(shapes, conditions)
def test_transpose_has_the_same_law(shape: tuple[int, int], x: float) -> None:
    m, n = shape
    assert exceedance((m, n), x) == exceedance((n, m), x)
    assert gaussian_stable_rank((m, n)) == gaussian_stable_rank((n, m))


@given(shapes)
def test_exceedance_and_stable_rank_are_in_range(shape: tuple[int, int]) -> None:
    assert exceedance(shape, 0.999) == 1.0
    assert exceedance(shape, math.inf) == 0.0
    assert math.isnan(exceedance(shape, math.nan))
    assert 1 <= gaussian_stable_rank(shape) <= min(shape)


@given(st.integers(2, 300), st.integers(0, 20), st.floats(10, 1e6))
def test_tail_satisfies_the_bounds_of_chen_and_dongarra(n: int, more: int, times: float) -> None:
    """(c/x)^k < sqrt(2 pi) P(kappa > x m/k) < (C/x)^k, k = m - n + 1, for x >= k, m >= n."""
    k = more + 1
    x = k * times
    p = exceedance((n + more, n), x * (n + more) / k)
    assert (0.245 / x) ** k < math.sqrt(2 * math.pi) * p < (6.414 / x) ** k


@pytest.mark.parametrize("n", [256, 1024])
@pytest.mark.parametrize("x", [8.0, 40.0, 1e3, 1e9])
def test_large_squares_follow_edelman(n: int, x: float) -> None:
    limit = -math.expm1(-2 / x - 2 / x**2)
    assert exceedance((n, n), n * x) == pytest.approx(limit, rel=0.05)


# --- oracles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [2, 3, 10])
def test_two_columns_follow_their_exact_law(m: int) -> None:
    kappa = sampled(m, 2, 20_000)
    kappa = kappa[:, 0] / kappa[:, 1]
    for share in (0.9, 0.5, 0.1, 0.02):  # 400 samples, so 5 % is one standard deviation
        assert exceedance((m, 2), quantile(kappa, share)) == pytest.approx(share, rel=0.15)


# The number of samples per shape. The rarest compared share has 200 samples, an error of 7 %.
SAMPLED = {(3, 3): 20_000, (4, 4): 20_000, (16, 16): 4000, (64, 64): 800}
SAMPLED |= {(5, 3): 20_000, (300, 3): 20_000, (20, 16): 4000, (512, 10): 20_000, (40, 20): 4000}
SAMPLED |= {(128, 32): 2000}


@pytest.mark.parametrize("shape", SAMPLED, ids=str)
def test_exceedance_matches_samples(shape: tuple[int, int]) -> None:
    sigma = sampled(*shape, SAMPLED[shape])
    kappa = sigma[:, 0] / sigma[:, -1]
    shares = [share for share in (0.9, 0.5, 0.3, 0.1, 0.05, 0.01) if share * len(kappa) >= 200]
    assert len(shares) >= 3
    for share in shares:
        found = exceedance(shape, quantile(kappa, share))
        assert 0.66 <= found / share <= 1.25
    stable = (sigma.square().sum(1) / sigma[:, 0] ** 2).mean()
    assert gaussian_stable_rank(shape) == pytest.approx(float(stable), rel=0.13)


def rare(m: int, n: int, x: float, count: int = 1000) -> float:
    """P(kappa > x), also if it is tiny: lambda_n is integrated, the other eigenvalues are sampled.

    In the density of all eigenvalues at lambda_n = t, the other eigenvalues are those of an
    (m + 1, n - 1) matrix with the weight prod (1 - t/lambda_i), and t < lambda_1/x^2.
    """
    k = m - n + 1
    others = sampled(m + 1, n - 1, count).square()
    highest = others[:, 0] / x**2
    u = torch.linspace(0, 40 / k, 1500, dtype=torch.float64)
    t = highest[:, None] * (-2 * u).exp()
    weight = -t / 2
    for i in range(n - 1):
        ratio = t / others[:, i, None]
        weight = weight + torch.where(ratio < 1, torch.log1p(-ratio.clamp_max(1 - 1e-16)), -1e9)
    lead = math.log(2 * n) + (k / 2 - 2) * math.log(2) + math.lgamma((m + 1) / 2)
    lead -= math.lgamma(k) + math.lgamma(1 + n / 2)
    integral = torch.trapezoid((weight - k * u).exp(), u, dim=1)
    return float((lead + k / 2 * highest.log()).exp().mul(integral).mean())


@pytest.mark.parametrize(
    "shape",
    [
        (3, 3),
        (6, 4),
        (20, 16),
        pytest.param((40, 20), marks=pytest.mark.slow),
        pytest.param((36, 32), marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("share", [1e-2, 1e-6, 1e-12])
def test_rare_probabilities_match_an_integral(shape: tuple[int, int], share: float) -> None:
    x = 2.0
    while exceedance(shape, x) > share:
        x *= 1.05
    assert exceedance(shape, x) == pytest.approx(rare(*shape, x), rel=0.15)


def three_columns(m: int, x: float) -> float:
    """P(kappa > x) of an (m, 3) matrix.

    With ratios q < r < 1 to the largest eigenvalue, whose law cancels, the density is
    (q r)^((m - 4)/2) (1 - q)(1 - r)(r - q)/(1 + q + r)^(3m/2).
    """

    def integral(low: float, high: float) -> float:
        nodes, weights = (torch.from_numpy(part) for part in leggauss(400))
        q = (low + (high - low) * (nodes + 1) / 2)[:, None]
        r = q + (1 - q) * (nodes + 1) / 2
        log = (m - 4) / 2 * (q * r).log() + ((1 - q) * (1 - r) * (r - q)).log()
        log -= 1.5 * m * ((1 + q + r) / 3).log()
        return float((weights[:, None] * weights * (1 - q) * log.exp()).sum()) * (high - low)

    return integral(x**-2 / 30, x**-2) / integral(1e-3, 1.0)


@pytest.mark.parametrize("m", [20, 100, 300, 1000])
@pytest.mark.parametrize("share", [0.1, 1e-3, 1e-6])
def test_three_columns_follow_their_exact_law(m: int, share: float) -> None:
    x = 1.02
    while exceedance((m, 3), x) > share:
        x *= 1.002
    assert 0.65 <= exceedance((m, 3), x) / three_columns(m, x) <= 1.45


def test_large_gaussian_weight_is_not_unusual() -> None:
    S = torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    shares = [exceedance(S.shape, float(wc.condition_number(c * S))) for c in (1.0, 1e-3, 1e8)]
    assert shares[0] > 0.01
    assert shares == pytest.approx(shares[:1] * 3, rel=1e-3)  # c S rounds to float32 again


# --- edges ----------------------------------------------------------------------------------------


def test_extreme_shapes_give_probabilities() -> None:
    for shape in ((10**7, 5), (10**6, 3), (151_936, 1024), (2000, 1999), (1, 9), (3, 3)):
        shares = [exceedance(shape, x) for x in (1.0, 1.001, 1.01, 1.1, 2.0, 10.0, 1e9, 1e300)]
        assert all(0 <= p <= 1 for p in shares)
        assert shares == sorted(shares, reverse=True)
    assert exceedance((10**7, 5), 1.01) < 1e-12
    assert exceedance((2000, 1999), 1e9) > 1e-12


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 3)])
def test_invalid_shapes_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="two positive numbers"):
        exceedance(shape, 2.0)
    with pytest.raises(ValueError, match="two positive numbers"):
        gaussian_stable_rank(shape)
