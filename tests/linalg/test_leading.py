"""The share of the leading singular values of a matrix that comes from a part of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wellcond.linalg import leading as module
from wellcond.linalg.leading import leading_triplets, measure_share


def random(m: int, n: int, seed: int) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
def test_shares_of_two_parts_add_up_to_one(m: int, n: int, k: int, seed: int) -> None:
    S, D = random(m, n, seed), random(m, n, seed + 100)
    ours, rest = measure_share(S, D, k), measure_share(S, S - D, k)
    assert ours.among == rest.among == min(k, m, n)
    assert ours.share + rest.share == pytest.approx(1, abs=1e-9)
    assert ours.new + rest.new == ours.among


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_share_of_multiples_of_the_matrix(m: int, n: int, seed: int) -> None:
    S = random(m, n, seed)
    for factor, new in ((0.0, 0), (1.0, 3), (-1.0, 0), (0.75, 3)):
        found = measure_share(S, factor * S, 3)
        assert found.share == pytest.approx(factor)
        assert found.new == min(new, m, n)


def test_new_direction_of_adapter_is_distinguished_from_old_ones() -> None:
    """W has the values 5, 4, 3, 2, 1; the adapter adds the value 4.5 in a new direction."""
    W = torch.diag(torch.tensor([5.0, 4, 3, 2, 1, 0], dtype=torch.float64))
    D = torch.zeros(6, 6, dtype=torch.float64)
    D[5, 5] = 4.5
    assert measure_share(W + D, D, 1) == (1, 0, 0.0)
    two = measure_share(W + D, D, 2)
    assert (two.among, two.new) == (2, 1)
    assert two.share == pytest.approx(4.5 / 9.5)


def test_share_is_unique_for_equal_singular_values() -> None:
    """All vectors are singular vectors of I, but the sum over a basis is a trace."""
    D = random(5, 5, 0)
    identity = torch.eye(5, dtype=torch.float64)
    assert measure_share(identity, D, 5).share == pytest.approx(float(D.trace()) / 5)


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (40, 40)])
def test_iteration_agrees_with_decomposition(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product of two factors above noise, like a relevant adapter."""
    S = 0.02 * random(*shape, 1) + random(shape[0], 4, 2) @ random(4, shape[1], 3)
    exact = leading_triplets(S, 4)
    monkeypatch.setattr(module, "_WHOLE", 0)
    U, sigma, V = leading_triplets(S, 4)
    torch.testing.assert_close(sigma, exact[1], rtol=1e-10, atol=0)
    torch.testing.assert_close(S @ V, U * sigma)
    torch.testing.assert_close((U.mT @ exact[0]).abs(), torch.eye(4, dtype=torch.float64))


def test_iteration_satisfies_the_identity_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before convergence, u^T S v equals the returned value."""
    monkeypatch.setattr(module, "_WHOLE", 0)
    S = random(60, 90, 4)
    U, sigma, V = leading_triplets(S, 5)
    torch.testing.assert_close((U * (S @ V)).sum(0), sigma)
    torch.testing.assert_close(V.mT @ V, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(U.mT @ U, torch.eye(5, dtype=torch.float64))
    again = leading_triplets(S, 5)
    assert torch.equal(again[1], sigma), "the start must be the same every time"
