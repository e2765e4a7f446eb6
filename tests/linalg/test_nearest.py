"""Nearest matrices with a bounded condition number: optimal, and bounded as stored."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

import oracles
import wellcond as wc
from matrices import matrices, with_spectrum
from wellcond.linalg.nearest import clip
from wellcond.linalg.spectrum import compute_spectrum
from wellcond.rules.spectral import limit_condition_number

LIMITS = st.sampled_from([1.0, 1.5, 2.0, 10.0, 1e3, 1e6])


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), LIMITS)
def test_clipping_is_optimal(values: list[float], K: float) -> None:
    """Compared with a numerical minimiser over a."""
    sigma = np.sort(np.array(values))[::-1].copy()
    found = clip(torch.from_numpy(sigma), K).numpy()
    best = oracles.nearest_singular_values(sigma, K)
    distance, least = (np.linalg.norm(x - sigma) for x in (found, best))
    assert distance <= least * (1 + 1e-6) + 1e-7 * sigma[0]
    assert found[0] <= K * found[-1] * (1 + 1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_no_matrix_is_nearer(seed: int) -> None:
    """Brute force over all matrices, not only those with the same singular vectors."""
    S = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    K = 1.3
    ours = float(torch.linalg.vector_norm(wc.nearest(S, K) - S))

    def slack(x: np.ndarray) -> float:
        sigma = np.linalg.svd(x.reshape(3, 2), compute_uv=False)
        return float(K * sigma[-1] - sigma[0])

    def distance(x: np.ndarray) -> float:
        return float(np.sum((x - S.numpy().ravel()) ** 2))

    for start in range(4):
        source = torch.Generator().manual_seed(100 + start)
        x = torch.randn(6, generator=source, dtype=torch.float64).numpy()
        found = minimize(
            distance, x, constraints={"type": "ineq", "fun": slack}, options={"maxiter": 500}
        )
        if found.success and slack(found.x) > -1e-9:
            assert ours <= math.sqrt(found.fun) + 1e-6
    assert compute_spectrum(wc.nearest(S, K)).condition_number <= K * (1 + 1e-12)


@given(matrices(), LIMITS)
def test_kappa_is_bounded_and_nearest_is_idempotent(S: Tensor, K: float) -> None:
    X = wc.nearest(S, K)
    if S.abs().max() == 0:
        assert torch.equal(X, S)
        return
    assert compute_spectrum(X).condition_number <= K * (1 + 1e-9)
    torch.testing.assert_close(wc.nearest(X, K), X, rtol=1e-8, atol=1e-9 * float(S.abs().max()))


@given(matrices(("gap", "no gap", "cluster", "tied", "semi-orthogonal")), st.floats(1, 100))
def test_nearest_commutes_with_scaling_and_transposition(S: Tensor, K: float) -> None:
    torch.testing.assert_close(wc.nearest(S.mT, K), wc.nearest(S, K).mT, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(wc.nearest(4 * S, K), 4 * wc.nearest(S, K), rtol=1e-9, atol=1e-9)


@given(matrices())
@example(torch.zeros(3, 2))
@example(torch.diag(torch.tensor([1.0, 0.0])))
def test_allowed_matrix_is_returned_bit_for_bit(S: Tensor) -> None:
    assert torch.equal(wc.nearest(S, math.inf), S)
    kappa = float(wc.condition_number(S))
    if kappa < math.inf:
        assert torch.equal(wc.nearest(S, kappa * (1 + 1e-9)), S)


def test_a_batch_is_treated_matrix_by_matrix() -> None:
    S = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    S[1] = with_spectrum(torch.ones(4).double(), 4, 5).float()
    S[2] = 0
    X = wc.nearest(S, 2.0)
    for index in range(3):
        torch.testing.assert_close(X[index], wc.nearest(S[index], 2.0))
    assert torch.equal(X[1:], S[1:])


def test_rank_deficient_matrices_get_full_rank() -> None:
    X = wc.nearest(torch.ones(3, 3, dtype=torch.float64), 10.0)
    assert compute_spectrum(X).condition_number == pytest.approx(10.0)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
@pytest.mark.parametrize("K", [1.0, 1e200])
def test_extreme_scales_and_limits(scale: float, K: float) -> None:
    S = torch.tensor([[3.0, 0.0], [0.0, 0.0]], dtype=torch.float64) * scale
    X = wc.nearest(S, K)
    assert torch.isfinite(X).all()
    assert torch.linalg.vector_norm((X - S) / scale) <= 3


@pytest.mark.parametrize(
    ("K", "error"), [(0.5, ValueError), (math.nan, ValueError), (-1, ValueError), ("2", TypeError)]
)
def test_no_matrix_has_kappa_below_one(K: object, error: type) -> None:
    with pytest.raises(error, match="max_condition"):
        wc.nearest(torch.eye(2), K)  # type: ignore[arg-type]


# --- as stored ------------------------------------------------------------------------------------

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [1.05, 2.0, 100.0, 1e4])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_stored_matrices_satisfy_the_limit(
    dtype: torch.dtype, K: float, shape: tuple[int, int]
) -> None:
    S = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    S[:, 0] = 1e-3 * S[:, 1] + 1e-4 * S[:, 0]
    S = S.to(dtype)
    found = limit_condition_number(S, K)
    assert found.S.dtype == dtype
    assert float(wc.condition_number(found.S)) <= K
    ideal = torch.linalg.vector_norm(wc.nearest(S.double(), K) - S.double())
    rounding = torch.finfo(dtype).eps * torch.linalg.vector_norm(S.double())
    distance = torch.linalg.vector_norm(found.S.double() - S.double())
    assert distance <= ideal * 1.1 + 3 * rounding


def test_matrix_within_the_limit_is_returned_itself() -> None:
    S = torch.eye(3, dtype=torch.bfloat16)
    assert limit_condition_number(S, 1.0).S is S


@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**-600, 2.0**600, 2.0**1000])
@pytest.mark.parametrize("n", [6, 300])
@pytest.mark.parametrize("K", [2.0, 100.0])
def test_stored_matrices_satisfy_the_limit_at_any_scale(scale: float, n: int, K: float) -> None:
    """Entries whose squares vanish or overflow give the same result as entries of order 1."""
    S = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    S[0] *= 1e-6
    far, near = limit_condition_number(S * scale, K), limit_condition_number(S, K)
    assert far.before == pytest.approx(near.before, rel=1e-6)
    assert far.before > 1e5
    assert not torch.equal(far.S, S * scale)
    assert far.after <= K
    assert float(wc.condition_number(far.S)) <= K
    torch.testing.assert_close(far.S / scale, near.S, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(wc.nearest(S * scale, K) / scale, wc.nearest(S, K))


def test_stored_matrices_satisfy_the_limit_across_360_orders() -> None:
    S = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    S[:, :3] *= 1e-180
    S[:, 3:] *= 1e180
    found = limit_condition_number(S, 10.0)
    assert found.before == math.inf
    assert found.after <= 10
    assert torch.isfinite(found.S).all()
    assert float(found.S[:, :3].abs().max()) > 1e178


def test_zero_stays_zero() -> None:
    found = limit_condition_number(torch.zeros(3, 3), 2.0)
    assert torch.equal(found.S, torch.zeros(3, 3))
    assert math.isnan(found.after)


def test_bfloat16_cannot_represent_kappa_near_one() -> None:
    S = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with pytest.raises(ValueError, match="rounded to bfloat16"):
        limit_condition_number(S, 1.001)


def test_a_deficient_matrix_can_be_stored_with_full_rank() -> None:
    found = limit_condition_number(torch.ones(6, 4, dtype=torch.float16), 50.0)
    assert float(wc.condition_number(found.S)) <= 50.0


def test_clipping_is_as_precise_as_float64() -> None:
    """For [2, 2, 1] with kappa <= 1.5: a = (1 + 2 K + 2 K)/(1 + 2 K^2) = 14/11."""
    found = clip(torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64), 1.5)
    assert float(found[-1]) == pytest.approx(14 / 11, rel=1e-15)
    assert float(found[0]) == pytest.approx(21 / 11, rel=1e-15)
