"""The change of a matrix and of its singular directions, against dense twins."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wellcond.linalg.change import (
    CLOSE,
    TOO_LARGE,
    UNCHANGED,
    WHOLE_SPACE,
    ZERO,
    measure_angles,
    measure_change,
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rotation(n: int, i: int, j: int, degrees: float) -> Tensor:
    """The rotation in the plane of axes i and j."""
    R = torch.eye(n, dtype=torch.float64)
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    R[i, i], R[i, j], R[j, i], R[j, j] = c, -s, s, c
    return R


def with_values(m: int, values: list[float], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """U, sigma and V of an m x n matrix, n <= m, with these singular values."""
    n = len(values)
    U = torch.linalg.qr(normal(m, n, seed=seed)).Q
    V = torch.linalg.qr(normal(n, n, seed=seed + 1)).Q
    return U, torch.tensor(values, dtype=torch.float64), V


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99), st.floats(1e-6, 1e3))
def test_measure_change_matches_dense_twin(m: int, n: int, seed: int, size: float) -> None:
    S, T = normal(m, n, seed=seed), normal(m, n, seed=seed)
    T = T + size * normal(m, n, seed=seed + 1)
    A, B = S.numpy(), T.numpy()
    found = measure_change(S, T)
    relative = np.linalg.norm(B - A) / np.linalg.norm(A)
    assert found.relative == pytest.approx(relative, rel=1e-9)
    assert found.sqnr == pytest.approx(-20 * math.log10(relative), abs=1e-8)
    U, sigma, _ = np.linalg.svd(A)
    k = min(math.ceil((sigma**2).sum() / sigma[0] ** 2 - 1e-9), min(m, n))
    assert found.directions == k
    P = U[:, :k] @ U[:, :k].T
    share = np.linalg.norm(P @ (B - A)) ** 2 / np.linalg.norm(B - A) ** 2
    assert found.leading_share == pytest.approx(share, rel=1e-6)
    angles = {
        "leading_turn": (slice(0, k), slice(0, k)),
        "trailing_turn": (slice(min(m, n) - k, min(m, n)),) * 2,
    }
    V, W = (np.linalg.svd(one, full_matrices=False)[2] for one in (A, B))
    for name, (first, second) in angles.items():
        if name in found.reasons:
            assert math.isnan(getattr(found, name))
            continue
        cosines = np.linalg.svd(V[first] @ W[second].T, compute_uv=False)
        mean = math.sqrt(min(1.0, (cosines**2).mean()))
        assert math.cos(math.radians(getattr(found, name))) == pytest.approx(mean, abs=1e-9)
        P, Q = V[first].T @ V[first], W[second].T @ W[second]
        sine = min(1.0, np.linalg.norm(P - Q, 2))  # for two spans of equal dimension
        largest = getattr(found, f"largest_{name}")
        assert math.sin(math.radians(largest)) == pytest.approx(sine, abs=1e-6)
        assert getattr(found, name) <= largest * (1 + 1e-9) + 1e-9
    assert math.cos(math.radians(found.random_turn)) ** 2 == pytest.approx(k / n)


@pytest.mark.parametrize("degrees", [1e-5, 0.3, 30.0, 89.0])
def test_rotated_inputs_give_the_rotation_angle(degrees: float) -> None:
    """Rotates the plane of axes 1 (leading, k = 2) and 2, then of 6 (trailing) and 5."""
    U, sigma, V = with_values(8, [8.0, 7.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    S = U * sigma @ V.mT
    for plane, leading, trailing in (((1, 2), degrees, 0.0), ((6, 5), 0.0, degrees)):
        T = U * sigma @ (V @ rotation(8, *plane, degrees)).mT
        found = measure_change(S, T)
        assert found.directions == 2
        assert found.largest_leading_turn == pytest.approx(leading, rel=1e-6, abs=1e-9)
        assert found.largest_trailing_turn == pytest.approx(trailing, rel=1e-6, abs=1e-9)
        # One of two directions has turned: half of the mean squared sine.
        mean = math.degrees(math.asin(math.sin(math.radians(degrees)) / math.sqrt(2)))
        assert max(found.leading_turn, found.trailing_turn) == pytest.approx(mean, rel=1e-6)
        assert min(found.leading_turn, found.trailing_turn) == pytest.approx(0, abs=1e-9)


def test_longer_first_direction_changes_share_without_turn() -> None:
    U, sigma, V = with_values(9, [5.0, 3.0, 1.0, 0.5, 0.1])
    S = U * sigma @ V.mT
    found = measure_change(S, S + 2 * U[:, :1] @ V[:, :1].mT)
    assert found.relative == pytest.approx(2 / float(sigma.norm()))
    assert found.leading_share == pytest.approx(1)
    assert found.leading_turn == pytest.approx(0, abs=1e-9)
    assert found.largest_leading_turn == pytest.approx(0, abs=1e-9)
    below = measure_change(S, S + 0.05 * U[:, -1:] @ V[:, -1:].mT)
    assert below.leading_share == pytest.approx(0, abs=1e-20)


def test_random_change_has_the_random_share() -> None:
    U, sigma, V = with_values(200, [4.0, 2.0, *[1.0 - j / 500 for j in range(98)]])
    S = U * sigma @ V.mT
    found = measure_change(S, S + 1e-3 * normal(200, 100, seed=7))
    assert found.random_share == found.directions / 200
    assert found.leading_share == pytest.approx(found.random_share, rel=0.2)


def test_scale_and_order_do_not_matter() -> None:
    S, T = normal(6, 4), normal(6, 4, seed=1)
    found = measure_change(S, T)
    for factor in (1e-200, 1e200):
        other = measure_change(factor * S, factor * T)
        assert other[:-1] == pytest.approx(found[:-1], rel=1e-9)
    # Directions turn by the same angle in both orders of S and T, if k is the same.
    back = measure_change(T, S)
    if back.directions == found.directions:
        assert back.leading_turn == pytest.approx(found.leading_turn)


def test_equal_matrices_have_no_change() -> None:
    found = measure_change(normal(3, 3), normal(3, 3))
    assert (found.relative, found.sqnr) == (0, math.inf)
    assert set(found.reasons.values()) == {UNCHANGED}
    zero = measure_change(torch.zeros(2, 2), torch.zeros(2, 2))
    assert zero.relative == 0
    assert math.isnan(zero.sqnr)


def test_a_side_that_is_zero_has_no_directions() -> None:
    found = measure_change(torch.zeros(2, 2), torch.eye(2))
    assert found.relative == math.inf
    assert math.isnan(found.sqnr)
    assert found.reasons["leading_turn"] == ZERO
    found = measure_change(torch.diag(torch.tensor([2.0, 1.0])), torch.zeros(2, 2))
    assert (found.relative, found.sqnr) == (1, 0)
    assert found.leading_share == 1  # k = 2 of 2
    turns = ("leading_turn", "trailing_turn", "largest_leading_turn", "largest_trailing_turn")
    assert found.reasons == dict.fromkeys(turns, ZERO)


def test_equal_singular_values_at_the_edge_have_no_angle() -> None:
    S = torch.diag(torch.tensor([5.0, 1.5, 1.5, 1.0, 0.5]))  # k = 2
    found = measure_change(S, S + 0.01 * normal(5, 5).float())
    assert found.directions == 2
    assert found.reasons == dict.fromkeys(("leading_turn", "largest_leading_turn"), CLOSE)
    S = torch.diag(torch.tensor([5.0, 2.0, 1.0, 1.0 + 1e-3, 0.5]))
    T = S + 0.3 * normal(5, 5).float()
    assert "trailing_turn" not in measure_change(S, T).reasons
    half = measure_change(S.bfloat16(), T.bfloat16())  # its roundoff exceeds the gap of 1e-3
    assert half.reasons["trailing_turn"] == CLOSE


def test_whole_space_has_no_angle_but_a_row_has() -> None:
    S = torch.eye(3)
    whole = measure_change(S, S + 0.1 * normal(3, 3).float())
    assert set(whole.reasons.values()) == {WHOLE_SPACE}
    assert math.isnan(whole.leading_turn)
    assert math.isnan(whole.trailing_turn)
    assert whole.random_turn == 0
    row = measure_change(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    assert row.leading_turn == row.trailing_turn == pytest.approx(45)
    assert row.largest_leading_turn == pytest.approx(row.random_turn) == pytest.approx(45)


def test_blocks_are_one_block_diagonal_matrix() -> None:
    S, T = normal(3, 2, 4), normal(3, 2, 4, seed=1)
    whole = measure_change(torch.block_diag(*S), torch.block_diag(*T))
    assert measure_change(S, T)[:-1] == pytest.approx(whole[:-1], nan_ok=True)


def test_complex_matrices_are_measured() -> None:
    S, T = (
        normal(5, 4, seed=s).to(torch.complex128) + 1j * normal(5, 4, seed=s + 9) for s in (0, 1)
    )
    U = np.linalg.svd(S.numpy())[0]
    found = measure_change(S, T)
    k = found.directions
    D = (T - S).numpy()
    share = np.linalg.norm(U[:, :k].conj().T @ D) ** 2 / np.linalg.norm(D) ** 2
    assert found.leading_share == pytest.approx(share)


def test_large_matrices_have_norms_only() -> None:
    S = torch.zeros(1025, 1025)
    S[0, 0] = 1
    found = measure_change(S, 1.5 * S)
    assert found.relative == 0.5
    assert set(found.reasons.values()) == {TOO_LARGE}


def test_unequal_shapes_and_nan_raise() -> None:
    with pytest.raises(ValueError, match=r"must have equal shapes, got \(2, 2\), \(2, 3\)"):
        measure_change(torch.eye(2), torch.ones(2, 3))
    with pytest.raises(ValueError, match="must be finite"):
        measure_change(torch.eye(2), torch.full((2, 2), math.nan))


def test_angle_of_equal_spans_is_zero_for_any_bases() -> None:
    V = torch.linalg.qr(normal(6, 3)).Q
    R = torch.linalg.qr(normal(3, 3, seed=1)).Q
    assert measure_angles(V, V @ R) == pytest.approx((0, 0), abs=1e-12)
    assert measure_angles(V[:, :1], V[:, 1:2]) == pytest.approx((90, 90))


@pytest.mark.parametrize("degrees", [1e-7, 20.0, 90.0])
@pytest.mark.parametrize("turned", [1, 5, 10])
def test_angles_if_some_of_ten_directions_turn(degrees: float, turned: int) -> None:
    """The mean squared sine is turned/10 sin^2 theta for any bases; the largest angle is theta."""
    Q = torch.linalg.qr(normal(30, 30)).Q
    R = torch.linalg.qr(normal(10, 10, seed=1)).Q
    V = Q[:, :10]
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    W = V.clone()
    W[:, :turned] = V[:, :turned] * angles.cos() + Q[:, 10 : 10 + turned] * angles.sin()
    mean, largest = measure_angles(V, W @ R)
    sine = math.sqrt(turned / 10) * math.sin(math.radians(degrees))
    assert math.sin(math.radians(mean)) == pytest.approx(sine, rel=1e-6)
    assert largest == pytest.approx(degrees, rel=1e-6)


def test_random_spans_have_a_mean_squared_cosine_of_k_over_n() -> None:
    k, n, count = 4, 20, 400
    squares = [
        math.cos(math.radians(measure_angles(*torch.linalg.qr(normal(2, n, k, seed=s)).Q)[0])) ** 2
        for s in range(count)
    ]
    # A single value has a standard deviation of about 0.04.
    assert sum(squares) / count == pytest.approx(k / n, abs=4 * 0.05 / math.sqrt(count))
    S = torch.outer(normal(30), normal(n)) + 0.1 * normal(30, n)
    found = measure_change(S, S + 0.01 * normal(30, n, seed=1))
    expected = math.degrees(math.acos(math.sqrt(found.directions / n)))
    assert found.random_turn == pytest.approx(expected)
