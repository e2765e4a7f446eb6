"""Certificates enclose the true values: 60 or more digits, and exact spectra."""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import pytest
import rogues
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import oracles
import wellcond as wc
import wellcond.linalg.certify as certify_module
from matrices import hadamard_conjugate, hilbert, kahan, lauchli, with_spectrum
from wellcond.linalg.interval import Interval


@given(st.integers(1, 2**52 - 1))
def test_gamma_is_an_upper_bound(k: int) -> None:
    """k u/(1 - k u), exactly."""
    exact = Fraction(k, 2**53) / (1 - Fraction(k, 2**53))
    assert Fraction(certify_module._gamma(k)) >= exact


# --- enclosures -----------------------------------------------------------------------------------


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(seed: int) -> Tensor:
    m, n = 1 + seed % 6, 1 + seed // 6 % 6
    return torch.randn(m, n, generator=random(seed), dtype=torch.float64)


def float32(seed: int) -> Tensor:
    return gaussian(seed).float()


def bfloat16(seed: int) -> Tensor:
    return gaussian(seed).bfloat16()


def float16(seed: int) -> Tensor:
    return gaussian(seed).half()


def graded_rows(seed: int) -> Tensor:
    S = gaussian(seed)
    return S * 10.0 ** -(4 * torch.arange(len(S), dtype=torch.float64))[:, None]


def spectrum(values: Callable[[int], list[float]]) -> Callable[[int], Tensor]:
    def sample(seed: int) -> Tensor:
        m, n = 2 + seed % 5, 2 + seed // 5 % 5
        sigma = torch.tensor(values(min(m, n)), dtype=torch.float64)
        return with_spectrum(sigma, m, n, seed)

    return sample


def integers(seed: int) -> Tensor:
    """Often exactly rank-deficient."""
    m, n = 1 + seed % 5, 1 + seed // 5 % 5
    return torch.randint(-1, 2, (m, n), generator=random(seed)).double()


def deficient(seed: int) -> Tensor:
    """Rank-deficient by exactly one: two equal columns."""
    S = torch.randint(-9, 10, (6, 4), generator=random(seed)).double()
    return torch.cat([S, S[:, :1]], dim=1)


def ties(seed: int) -> Tensor:
    d = torch.randint(1, 3, (4,), generator=random(seed))
    return hadamard_conjugate(d * (1 << seed % 40))


def scaled(seed: int) -> Tensor:
    return gaussian(seed) * (1e150, 1e-150, 1e300, 1e-300)[seed % 4]


def wild_entries(seed: int) -> Tensor:
    S = gaussian(seed)
    exponents = torch.randint(-150, 151, S.shape, generator=random(seed)).double()
    return S * 10.0**exponents


def subnormal(seed: int) -> Tensor:
    """Multiples of 2^-1074, some together with entries of order 1."""
    S = torch.randint(-5, 6, (1 + seed % 4, 1 + seed // 4 % 4), generator=random(seed)).double()
    S = S * 5e-324
    if seed % 2:
        S[0, 0] = 1.0
    return S


def randsvd(seed: int) -> Tensor:
    """Modes 1 to 4 of rogues: one large, one small, geometric, arithmetic."""
    np.random.seed(seed)  # noqa: NPY002 - rogues draws from it
    return torch.from_numpy(rogues.randsvd(5, 10.0 ** (seed % 14), 1 + seed % 4))


def named(seed: int) -> Tensor:
    n = 2 + seed // 4 % 6
    return [
        hilbert(n),
        kahan(n, 0.3 + seed / 300),
        lauchli(n, 10.0 ** -(1 + seed % 17)),
        torch.tril(torch.ones(n, n, dtype=torch.float64)),
    ][seed % 4]


FAMILIES: dict[str, tuple[Callable[[int], Tensor], int]] = {
    "gaussian": (gaussian, 300),
    "float32": (float32, 200),
    "bfloat16": (bfloat16, 200),
    "float16": (float16, 200),
    "graded rows": (graded_rows, 200),
    "geometric": (spectrum(lambda nu: [10.0 ** (-3 * i) for i in range(nu)]), 200),
    "cluster": (spectrum(lambda nu: [1 + 1e-12 * i for i in range(nu)]), 200),
    "semi-orthogonal": (spectrum(lambda nu: [1.0] * nu), 200),
    "one tiny": (spectrum(lambda nu: [1.0] * (nu - 1) + [1e-14]), 200),
    "integers": (integers, 200),
    "deficient": (deficient, 100),
    "ties": (ties, 160),
    "scaled": (scaled, 200),
    "wild entries": (wild_entries, 100),
    "subnormal": (subnormal, 160),
    "randsvd": (randsvd, 200),
    "named": (named, 200),
}


def ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The method that `certify` chooses, and Cholesky wherever it is possible."""
    yield "as chosen"
    with monkeypatch.context() as patch:
        patch.setattr(certify_module, "_SMALL", 0)
        patch.setattr(certify_module, "_NARROW", math.inf)
        yield "Cholesky"


def assert_encloses(
    certificate: wc.Certificate, sigma: list[Fraction], error: Fraction, S: Tensor
) -> None:
    largest, smallest = sigma[0], sigma[-1]
    high, low, kappa = certificate.sigma_max, certificate.sigma_min, certificate.condition_number
    assert Fraction(high.lower) <= largest + error, S
    assert high.upper == math.inf or largest - error <= Fraction(high.upper), S
    assert Fraction(low.lower) <= smallest + error, S
    assert low.upper == math.inf or smallest - error <= Fraction(low.upper), S
    if largest == 0:
        assert math.isnan(kappa.lower)
        assert math.isnan(kappa.upper)
    else:
        assert Fraction(kappa.lower) * (smallest - error) <= largest + error, S
        assert kappa.upper == math.inf or largest - error <= Fraction(kappa.upper) * (
            smallest + error
        ), S
        assert kappa.lower >= 1
    assert certificate.certified == (kappa.upper < math.inf)
    assert certificate.certified == (certificate.reason == "")


@pytest.mark.parametrize("part", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_enclosure_misses(family: str, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, count = FAMILIES[family]
    first = -(-count // 4)
    for seed in range(first) if part == 0 else range(first, count):
        S = sample(seed)
        sigma, error = oracles.singular_values(S)
        for _ in ways(monkeypatch):
            assert_encloses(wc.certify(S), sigma, error, S)


@pytest.mark.parametrize("n", [16, 128, pytest.param(1024, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bits", [2, 10, 24, 40])
def test_exact_spectra_are_enclosed(n: int, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """H diag(d) H/n is exact: n 2^bits < 2^53, and the last division is by a power of 2."""
    d = torch.randint(1, 1 << bits, (n,), generator=random(bits))
    d[0], d[1] = 1, 1 << bits
    S = hadamard_conjugate(d)
    for _ in ways(monkeypatch):
        certificate = wc.certify(S)
        assert float(1 << bits) in certificate.sigma_max
        assert 1.0 in certificate.sigma_min
        assert float(1 << bits) in certificate.condition_number


@pytest.mark.parametrize(
    ("n", "kappa", "width"),
    [(1000, 1e3, 1e-3), (1000, 1e6, 1e-3), (100, 1e6, 1e-3), (100, 1e9, 1e-2)],
)
def test_enclosures_are_tight(n: int, kappa: float, width: float) -> None:
    """A flat spectrum is the worst case, because errors grow with the mean singular value."""
    sigma = torch.ones(n, dtype=torch.float64)
    sigma[-1] = 1 / kappa
    found = wc.certify(with_spectrum(sigma, n, n)).condition_number
    assert found.upper - found.lower <= width * found.lower


def test_well_conditioned_large_matrix_uses_cholesky() -> None:
    certificate = wc.certify(with_spectrum(torch.linspace(1, 0.1, 300).double(), 400, 300))
    assert certificate.method == "verified Cholesky"
    assert certificate.certified
    assert certificate.condition_number.upper / certificate.condition_number.lower < 1 + 1e-6


def test_diagonal_matrix_is_enclosed_tightly() -> None:
    """Its eigenvalues are found exactly, which makes the shifted matrix singular."""
    found = wc.certify(torch.diag(torch.arange(1.0, 301.0)))
    assert found.method == "verified Cholesky"
    assert found.sigma_min.upper < 1 + 1e-6
    assert found.sigma_max.lower > 300 - 1e-6
    assert found.computed == pytest.approx(300.0)


@pytest.mark.parametrize("lie", [0.0, 0.3, 0.999, 1.001, 3.0, math.nan])
def test_wrong_estimates_only_widen_enclosures(lie: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eigenvalues and eigenvectors only choose where to try."""
    honest = torch.linalg.eigvalsh
    monkeypatch.setattr(certify_module, "_SMALL", 0)
    monkeypatch.setattr(certify_module, "_NARROW", math.inf)
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda G: honest(G) * lie)
    monkeypatch.setattr(
        certify_module, "_eigenvector", lambda G, _: torch.ones(len(G), 1, dtype=G.dtype)
    )
    d = torch.randint(1, 100, (64,), generator=random(0))
    d[0], d[1] = 1, 100
    certificate = wc.certify(hadamard_conjugate(d))
    assert 100.0 in certificate.sigma_max
    assert 1.0 in certificate.sigma_min
    assert 100.0 in certificate.condition_number


@pytest.mark.parametrize("error", [1e-14, 1e-8, 1e-3, 0.5, 10.0, math.nan])
def test_wrong_svd_only_widens_enclosures(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = torch.linalg.svd

    def dishonest(S: Tensor, full_matrices: bool) -> tuple[Tensor, ...]:
        return tuple(
            x * (1 + error * torch.rand(x.shape, generator=random(i), dtype=x.dtype))
            for i, x in enumerate(honest(S, full_matrices=full_matrices))
        )

    monkeypatch.setattr(torch.linalg, "svd", dishonest)
    d = torch.randint(1, 100, (64,), generator=random(0))
    d[0], d[1] = 1, 100
    certificate = wc.certify(hadamard_conjugate(d))
    assert 100.0 in certificate.sigma_max
    assert 1.0 in certificate.sigma_min
    assert 100.0 in certificate.condition_number


def test_failed_svd_falls_back_to_norm_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(S: Tensor, full_matrices: bool) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    certificate = wc.certify(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    assert 3.0 in certificate.sigma_max
    assert 1.0 in certificate.sigma_min
    assert not certificate.certified


def test_blocks_are_enclosed_as_their_block_diagonal_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for seed in range(40):
        source = random(seed)
        shape = [int(k) for k in torch.randint(1, 5, (3,), generator=source)]
        S = torch.randint(-3, 4, shape, generator=source).double()
        exact = [oracles.singular_values(one) for one in S]
        sigma = sorted((value for values, _ in exact for value in values), reverse=True)
        error = max(error for _, error in exact)
        for _ in ways(monkeypatch):
            found = certify_module.combine_certificates([wc.certify(one) for one in S])
            assert_encloses(found, sigma, error, S)


def test_blocks_are_certified_if_all_are() -> None:
    good, bad = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.ones(2, 2)
    both = certify_module.combine_certificates([wc.certify(good), wc.certify(good / 4)])
    assert 12.0 in both.condition_number
    assert both.condition_number.upper < 12.001
    assert both.computed == pytest.approx(12.0)
    assert both.method == "verified SVD"
    for other in (bad, 0 * bad):
        found = certify_module.combine_certificates([wc.certify(good), wc.certify(other)])
        assert found.condition_number.upper == math.inf
        assert "cannot tell it from zero" in found.reason
    none = certify_module.combine_certificates([wc.certify(0 * bad)] * 2)
    assert "the matrix is zero" in none.reason


def contradicts(certificate: wc.Certificate, measured: float) -> bool:
    """Whether a measured kappa is outside the certificate by more than the measurement error.

    The error is 1e-6 kappa, or 1e-12 sigma_1 in sigma_nu. Beyond it, the measurement is wrong.
    """
    known = certificate.condition_number
    none = math.isnan(known.lower)
    if none or math.isnan(measured):
        return none != math.isnan(measured)
    least, most = 1 / known.upper, 1 / known.lower
    return not least * (1 - 1e-6) - 1e-12 <= 1 / measured <= most * (1 + 1e-6) + 1e-12


@given(st.integers(0, 99), st.sampled_from(sorted(FAMILIES)))
def test_measurements_agree_with_certificates(seed: int, family: str) -> None:
    S = FAMILIES[family][0](seed)
    assert not contradicts(wc.certify(S), float(wc.condition_number(S)))


def test_contradicts_detects_measurement_outside_certificate() -> None:
    certificate = wc.certify(torch.diag(torch.tensor([800.0, 100.0, 1.0])))
    assert [
        k
        for k in (100.0, 799.9, 800.0, 800.1, math.inf, math.nan)
        if not contradicts(certificate, k)
    ] == [800.0]
    assert not contradicts(wc.certify(torch.zeros(2, 2)), math.nan)
    assert contradicts(wc.certify(torch.zeros(2, 2)), 1.0)
    singular = wc.certify(torch.ones(2, 2))
    assert not contradicts(singular, math.inf)
    assert contradicts(singular, 1e3)


# --- subnormal numbers flushed to zero ------------------------------------------------------------


@pytest.fixture
def flushing() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes nothing")
    yield
    torch.set_flush_denormal(False)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_flushed_numbers_are_not_certified(dtype: torch.dtype, flushing: None) -> None:
    torch.set_flush_denormal(False)
    subnormal = torch.tensor([[1.0, 30.0], [0.04, 1.0]]).to(dtype)
    subnormal *= 4 * torch.finfo(dtype).smallest_normal
    normal = torch.tensor([[4.0, 2.0], [-1.0, 0.0]]).to(dtype)
    honest = wc.certify(subnormal), wc.certify(normal)
    assert honest[0].certified
    torch.set_flush_denormal(True)
    found = wc.certify(subnormal)
    assert not found.certified
    assert found.condition_number == Interval(1.0, math.inf)
    assert found.sigma_min == Interval(0.0, math.inf)
    assert "set_flush_denormal" in found.reason
    assert wc.certify(normal) == honest[1]
    both = certify_module.combine_certificates([honest[1], found])
    assert both.sigma_max.upper == both.condition_number.upper == math.inf
    assert both.reason == found.reason
    assert torch.tensor(1, dtype=torch.int64).view(torch.float64) * 1.0 == 0


@pytest.mark.parametrize("family", ["subnormal", "scaled", "wild entries", "graded rows"])
def test_no_enclosure_misses_while_flushing(family: str, flushing: None) -> None:
    sample, _ = FAMILIES[family]
    for seed in range(60):
        torch.set_flush_denormal(False)
        S = sample(seed)
        sigma, error = oracles.singular_values(S)
        torch.set_flush_denormal(True)
        certificate = wc.certify(S)
        torch.set_flush_denormal(False)
        if certificate.sigma_max.upper == math.inf:
            assert not certificate.certified
        elif sigma[0] > 0:
            assert_encloses(certificate, sigma, error, S)


def test_tiny_normal_numbers_are_not_certified_while_flushing(flushing: None) -> None:
    """Their smallest singular values are subnormal."""
    assert not wc.certify(torch.diag(torch.tensor([1e-306, 1e-307]).double())).certified
    S = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-4]], dtype=torch.float64) * 1e-306
    assert "set_flush_denormal" in wc.certify(S).reason


# --- outcomes and errors --------------------------------------------------------------------------


def test_zero_has_no_condition_number() -> None:
    certificate = wc.certify(torch.zeros(3, 2))
    assert certificate.sigma_max == Interval(0.0, 0.0)
    assert math.isnan(certificate.condition_number.lower)
    assert not certificate.certified
    assert "zero" in certificate.reason


def test_reason_explains_an_uncertified_matrix() -> None:
    certificate = wc.certify(hilbert(14))
    assert not certificate.certified
    assert certificate.condition_number.upper == math.inf
    assert certificate.condition_number.lower > 1e13
    assert "cannot tell it from zero" in certificate.reason


def test_a_vector_has_condition_number_one_exactly() -> None:
    for shape in ((1, 1), (1, 7), (7, 1)):
        S = torch.randn(shape, generator=random(0))
        assert wc.certify(S).condition_number == Interval(1.0, 1.0)


@pytest.mark.parametrize(
    ("S", "error", "message"),
    [
        (torch.ones(2, 2, 2), ValueError, "For a batch, certify each matrix"),
        (torch.ones(3), ValueError, "at least 2"),
        (torch.ones(0, 3), ValueError, "rows and columns"),
        (torch.tensor([[math.nan]]), ValueError, "finite"),
        (torch.ones(2, 2, dtype=torch.int64), TypeError, "floating"),
        ([[1.0]], TypeError, "torch.Tensor"),
    ],
)
def test_certify_raises_for_invalid_input(S: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        wc.certify(S)  # type: ignore[arg-type]


def test_certify_changes_nothing_and_ignores_autograd() -> None:
    S = torch.randn(4, 3, generator=random(0), requires_grad=True)
    before = S.detach().clone()
    wc.certify(S)
    assert torch.equal(S.detach(), before)
    assert S.grad is None
