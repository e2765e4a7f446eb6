"""Measured singular values against float64 SVDs and prescribed spectra."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import wellcond.linalg.spectrum as spectrum_module
from matrices import hilbert, matrices, with_spectrum
from wellcond.linalg.scaling import frobenius_norm
from wellcond.linalg.spectrum import Method, combine_spectra, compute_spectrum


@pytest.fixture
def no_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """All matrices except narrow ones use the Gram matrix, so small examples reach every branch."""
    monkeypatch.setattr(spectrum_module, "_SMALL", 3)


def spectrum_of(name: str, n: int, kappa: float) -> Tensor:
    t = torch.linspace(0, 1, n, dtype=torch.float64)
    return {
        "geometric": kappa**-t,
        "arithmetic": 1 - t * (1 - 1 / kappa),
        "one small": torch.where(t < 1, 1.0, 1 / kappa),  # exhausts a Krylov space in two steps
        "one large": torch.where(t == 0, 1.0, 1 / kappa),
        "bottom cluster": torch.where(t < 0.5, 1.0, (1 + 1e-3 * (1 - t)) / kappa),  # no gap
        "top cluster": torch.where(t < 0.5, 1 - 1e-3 * t, 1 / kappa + 0.5 * (1 - t) ** 2),
    }[name].to(torch.float64)


SPECTRA = [
    "geometric",
    "arithmetic",
    "one small",
    "one large",
    "bottom cluster",
    "top cluster",
]


@pytest.mark.parametrize("kappa", [1.0, 10.0, 1e3, 1e5, 1e7])
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("large", [False, True])
def test_kappa_is_right_to_1e_6(
    name: str, kappa: float, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every method; the error of the float64 SVD itself is n eps kappa = 3e-7 at 1e7."""
    monkeypatch.setattr(spectrum_module, "_SMALL", 8)
    if large:
        monkeypatch.setattr(spectrum_module, "_LARGE", 8)
    S = with_spectrum(spectrum_of(name, 120, kappa), 150, 120).float()
    exact = np.linalg.svd(S.double().numpy(), compute_uv=False)
    for matrix in (S, S.mT, S.double()):
        found = compute_spectrum(matrix)
        assert float(found.singular_values[0]) == pytest.approx(exact[0], rel=1e-6)
        assert found.condition_number == pytest.approx(exact[0] / exact[-1], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "kappa", "method"),
    [
        ("arithmetic", 10.0, Method.gram),
        ("geometric", 1e5, Method.inverse),
        ("geometric", 1e10, Method.svd),
    ],
)
def test_method_depends_on_what_the_gram_matrix_resolves(
    name: str, kappa: float, method: Method, no_small: None
) -> None:
    S = with_spectrum(spectrum_of(name, 120, kappa), 120, 120)
    assert compute_spectrum(S).method is method


@pytest.mark.parametrize("seed", range(40))
def test_equal_columns_are_found_next_to_four_tiny_ones(seed: int) -> None:
    """Tiny columns fill the iteration's block; rounding of the Gram matrix hides the equal pair."""
    S = torch.randn(400, 300, generator=torch.Generator().manual_seed(seed))
    S[:, :4] *= 1e-9
    S[:, 299] = S[:, 298]
    assert compute_spectrum(S).condition_number == math.inf


@pytest.mark.parametrize("gap", [1e-12, 1e-9, 1e-7])
@pytest.mark.parametrize("tiny", [6e-9, 1e-7, 2e-6])
@pytest.mark.parametrize("count", [3, 4, 9])
@pytest.mark.parametrize("large", [False, True])
def test_nearly_singular_block_is_found_next_to_tiny_columns(
    gap: float, tiny: float, count: int, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spectrum_module, "_SMALL", 8)
    if large:
        monkeypatch.setattr(spectrum_module, "_LARGE", 8)
    S = torch.eye(120, dtype=torch.float64)
    S[:count] *= tiny
    S[-2:, -2:] = 1
    S[-1, -1] += gap
    exact = float(np.linalg.cond(S.numpy()))
    # The SVD itself has an error of n eps kappa.
    error = max(1e-6, 120 * np.finfo(float).eps * exact)
    assert compute_spectrum(S).condition_number == pytest.approx(exact, rel=error)


def hidden_from(start: Tensor) -> Tensor:
    """A matrix with kappa 800 whose v_1 is orthogonal to the block; without v_1 kappa is 100."""
    n = len(start)
    others = torch.randn(n, 1, generator=torch.Generator().manual_seed(1), dtype=start.dtype)
    v = torch.linalg.qr(torch.cat([start, others], dim=1)).Q[:, -1:]
    sigma = torch.linspace(1, 10, n, dtype=start.dtype)
    sigma[-1] = 100  # far from the others, so that it is found before rounding adds v_1
    sigma[n // 2] = 800
    V = with_spectrum(torch.ones(n).double(), n, n)
    V = V - 2 * (w := V[:, n // 2, None] - v) @ (w.mT @ V) / w.square().sum()
    return V * sigma @ V.mT


def test_no_matrix_can_hide_from_the_start_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries the fixed block of an earlier version, and the blocks of other matrices."""
    monkeypatch.setattr(spectrum_module, "_LARGE", 600)
    source = torch.Generator().manual_seed(0)
    known = torch.randn(600, 4, generator=source, dtype=torch.float64)
    S = hidden_from(known)
    with monkeypatch.context() as patch:
        patch.setattr(spectrum_module, "_random_block", lambda S: known)
        assert compute_spectrum(S).condition_number == pytest.approx(100.0, rel=1e-2)
    for _ in range(3):
        found = compute_spectrum(S)
        assert found.method is Method.krylov
        assert found.condition_number == pytest.approx(800.0, rel=1e-6)
        assert compute_spectrum(S.clone()).condition_number == found.condition_number
        S = hidden_from(spectrum_module._random_block(S))


def test_start_block_depends_on_all_entries() -> None:
    S = with_spectrum(torch.ones(20).double(), 30, 20)
    start = spectrum_module._random_block(S)
    assert torch.equal(spectrum_module._random_block(S.mT.contiguous().mT), start)
    S[-1, -1] = np.nextafter(float(S[-1, -1]), 1)
    assert not torch.isclose(spectrum_module._random_block(S), start).any(dim=0).all()


def test_large_matrices_get_extremes_unless_all_values_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spectrum_module, "_SMALL", 8)
    monkeypatch.setattr(spectrum_module, "_LARGE", 100)
    S = with_spectrum(spectrum_of("arithmetic", 120, 100.0), 120, 140)
    extremes, everything = compute_spectrum(S), compute_spectrum(S, all_values=True)
    assert extremes.method is Method.krylov
    assert extremes.singular_values.shape == (2,)
    assert everything.singular_values.shape == (120,)
    assert extremes.condition_number == pytest.approx(everything.condition_number, rel=1e-7)


@given(matrices())
def test_all_singular_values_agree_with_an_svd(S: Tensor) -> None:
    exact = torch.linalg.svdvals(S)
    found = compute_spectrum(S).singular_values
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-13 * float(exact[0]))


@given(st.integers(9, 40), st.integers(9, 40), st.integers(0, 999))
def test_the_gram_route_agrees_with_an_svd(m: int, n: int, seed: int) -> None:
    S = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = spectrum_module._from_gram(S.mT if m < n else S, all_values=False)
    if found is not None:
        torch.testing.assert_close(found.scaled, torch.linalg.svdvals(S), rtol=1e-7, atol=0)


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e-30, 1e30, 1e300, 1e307])
def test_kappa_is_scale_invariant(scale: float) -> None:
    S = torch.tensor([[4.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    assert compute_spectrum(S * scale).condition_number == 2.0


def test_kappa_survives_a_spectral_norm_beyond_float64() -> None:
    S = 1.6e308 * torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
    found = compute_spectrum(S)
    assert float(found.singular_values[0]) == math.inf
    assert found.condition_number == pytest.approx(1.0)


def test_zero_has_no_condition_number_and_deficient_an_infinite_one(no_small: None) -> None:
    assert math.isnan(compute_spectrum(torch.zeros(5, 4)).condition_number)
    assert compute_spectrum(torch.ones(5, 4)).condition_number == math.inf
    assert compute_spectrum(
        with_spectrum(torch.tensor([1.0, 1.0, 0.0]).double(), 9, 9)
    ).condition_number == (math.inf)


def test_vectors_have_one_singular_value() -> None:
    assert compute_spectrum(torch.tensor([[3.0, 4.0]])).singular_values.tolist() == [5.0]
    assert compute_spectrum(torch.tensor([[3.0], [4.0]])).condition_number == 1.0


def test_half_precision_values_are_taken_exactly() -> None:
    S = torch.randn(20, 12, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    exact = np.linalg.svd(S.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(compute_spectrum(S).singular_values.numpy(), exact, rtol=1e-12)


def test_hilbert_is_singular_to_working_precision_from_13_on(no_small: None) -> None:
    """kappa(hilbert(8)) = 1.526e10 (Todd 1961)."""
    assert compute_spectrum(hilbert(8)).condition_number == pytest.approx(1.5257575538e10, rel=1e-5)
    assert compute_spectrum(hilbert(14)).condition_number == math.inf


# --- block-diagonal matrices ----------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 999))
def test_blocks_have_the_spectrum_of_their_block_diagonal_matrix(
    m: int, n: int, groups: int, seed: int
) -> None:
    S = torch.randn(groups, m, n, generator=torch.Generator().manual_seed(seed)).double()
    found = combine_spectra([compute_spectrum(one) for one in S])
    whole = torch.linalg.svdvals(torch.block_diag(*S))[: groups * min(m, n)]
    torch.testing.assert_close(found.singular_values, whole)
    assert found.condition_number == pytest.approx(float(whole[0] / whole[-1]), rel=1e-9)


@pytest.mark.parametrize("scale", [1e-300, 1e-180, 1e180, 1e300])
def test_blocks_may_have_any_scale(scale: float) -> None:
    S = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64)) * scale
    found = combine_spectra([compute_spectrum(S), compute_spectrum(2 * S)])
    assert found.condition_number == pytest.approx(6.0)
    assert float(found.singular_values[0]) == pytest.approx(6 * scale)
    assert (
        combine_spectra([compute_spectrum(S), compute_spectrum(0 * S)]).condition_number == math.inf
    )
    assert math.isnan(combine_spectra([compute_spectrum(0 * S)] * 2).condition_number)


def test_blocks_with_extremes_only_combine_to_extremes_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spectrum_module, "_SMALL", 8)
    monkeypatch.setattr(spectrum_module, "_LARGE", 100)
    S = with_spectrum(spectrum_of("arithmetic", 120, 100.0), 120, 140)
    found = combine_spectra([compute_spectrum(S), compute_spectrum(S / 2, all_values=True)])
    assert found.method is Method.krylov
    assert found.singular_values.shape == (2,)
    assert found.condition_number == pytest.approx(200.0, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-323, 1e-310, 1e-180, 1.0, 1e180, 1e307])
def test_frobenius_norm_is_accurate_at_any_scale(scale: float) -> None:
    S = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64) * scale
    assert frobenius_norm(S) == pytest.approx(5 * scale, rel=1e-14, abs=1e-323)
    assert frobenius_norm(0 * S) == 0.0
