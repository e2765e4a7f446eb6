"""A product of skinny matrices as an operator, and its singular values without forming it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from registry import normal
from wellcond.linalg.product import Product
from wellcond.linalg.products import spectrum_of_product

EPS = torch.finfo(torch.float64).eps
SHAPES = [(7, 5, 3), (5, 7, 3), (6, 6, 6), (3, 4, 9), (1, 5, 2), (5, 1, 1)]


def made(m: int, n: int, k: int, seed: int = 0) -> Product:
    return Product(normal(m, k, seed=seed), normal(n, k, seed=seed + 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_has_the_shape_and_the_rank_of_its_dense_twin(
    shape: tuple[int, int, int],
) -> None:
    S = made(*shape)
    twin = S.B @ S.A.mT
    assert S.shape == twin.shape
    assert S.nu == min(shape) == torch.linalg.matrix_rank(twin)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_leading_singular_values_are_those_of_the_dense_product(
    shape: tuple[int, int, int],
) -> None:
    S = made(*shape)
    found = spectrum_of_product(S.B, S.A)
    expected = torch.linalg.svdvals(S.B @ S.A.mT)[: S.nu]
    # LAPACK has an error of a few eps of the norm.
    atol = 50 * EPS * float(expected[0])
    torch.testing.assert_close(found.singular_values, expected, rtol=0, atol=atol)
    assert found.rank == S.nu
    assert found.condition_number == pytest.approx(float(expected[0] / expected[-1]))


@given(st.floats(-30, 30), st.floats(-30, 30))
@settings(max_examples=20, deadline=None)
def test_condition_number_is_invariant_to_factor_scales(first: float, second: float) -> None:
    S = made(7, 5, 3)
    expected = spectrum_of_product(S.B, S.A).condition_number
    found = spectrum_of_product(10.0**first * S.B, 10.0**second * S.A)
    assert found.condition_number == pytest.approx(expected, rel=1e-9)
    assert found.rank == 3


def test_condition_number_survives_overflow_of_factor_scales() -> None:
    S = made(7, 5, 3)
    expected = spectrum_of_product(S.B, S.A).condition_number
    for scale in (1e200, 1e-200):
        found = spectrum_of_product(scale * S.B, scale * S.A)
        assert found.condition_number == pytest.approx(expected, rel=1e-9)


def test_prescribed_singular_values_are_found() -> None:
    U, V = (torch.linalg.qr(normal(20, 4, seed=seed)).Q for seed in (1, 2))
    middle = torch.linalg.qr(normal(4, 4)).Q
    sigma = torch.tensor([1.0, 1e-2, 1e-4, 1e-6], dtype=torch.float64)
    # Each factor has the condition number 1e3, and both share the rotation between them.
    B, A = U * sigma.sqrt() @ middle, V * sigma.sqrt() @ middle
    found = spectrum_of_product(B, A)
    torch.testing.assert_close(found.singular_values, sigma, rtol=1e-8, atol=0)
    assert found.condition_number == pytest.approx(1e6, rel=1e-8)


def test_cancelling_factors_are_unresolved() -> None:
    """The row spaces of B and A are orthogonal, so B A^T consists of rounding errors only."""
    B, A = normal(9, 4), normal(8, 4, seed=3)
    B[:, 2:], A[:, :2] = 0, 0
    found = spectrum_of_product(B @ (Q := torch.linalg.qr(normal(4, 4)).Q), A @ Q)
    assert found.rank == 0
    assert not found.condition_number < math.inf
    assert math.isnan(spectrum_of_product(B, torch.zeros(8, 4)).condition_number)


def test_rank_ignores_values_within_rounding() -> None:
    sigma = torch.tensor([1.0, 0.5, 1e-3], dtype=torch.float64)
    U, V = (torch.linalg.qr(normal(20, 3, seed=seed)).Q for seed in (1, 2))
    assert spectrum_of_product(U * sigma, V).rank == 3
    assert spectrum_of_product((U * sigma).bfloat16(), V.bfloat16()).rank == 2


def test_nonfinite_factors_raise() -> None:
    S = made(7, 5, 3)
    S.B[0, 0] = math.nan
    with pytest.raises(ValueError, match="must be finite"):
        spectrum_of_product(S.B, S.A)
