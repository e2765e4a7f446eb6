"""Complex matrices: [[A, -B], [B, A]] has each singular value of A + iB twice."""

import pytest
import torch
from torch import Tensor

import wellcond as wc

SHAPES = [(5, 3), (3, 5), (4, 4), (1, 4), (4, 1)]
DTYPES = [torch.complex64, torch.complex128]


def complex_matrix(shape: tuple[int, ...], dtype: torch.dtype = torch.complex128) -> Tensor:
    source = torch.Generator().manual_seed(len(shape) + shape[-1])
    return torch.randn(shape, dtype=dtype, generator=source)


def embedded(S: Tensor) -> Tensor:
    A, B = S.to(torch.complex128).real, S.to(torch.complex128).imag
    return torch.cat([torch.cat([A, -B], dim=-1), torch.cat([B, A], dim=-1)], dim=-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 4, 3), (270, 260)], ids=str)
def test_the_condition_number_is_that_of_the_real_form(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    S = complex_matrix(shape, dtype)
    expected = torch.linalg.cond(embedded(S))
    torch.testing.assert_close(wc.condition_number(S), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_certificates_enclose_the_real_form(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    S = complex_matrix(shape, dtype)
    certificate = wc.certify(S)
    sigma = torch.linalg.svdvals(embedded(S))
    assert certificate.certified
    assert certificate.sigma_max.lower <= float(sigma[0]) * (1 + 1e-14)
    assert certificate.sigma_max.upper >= float(sigma[0]) * (1 - 1e-14)
    assert certificate.sigma_min.lower <= float(sigma[-1]) * (1 + 1e-12)
    assert certificate.sigma_min.upper >= float(sigma[-1]) * (1 - 1e-12)
    if min(shape) == 1:
        assert certificate.condition_number == wc.Interval(1.0, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 4, 3)], ids=str)
def test_the_nearest_is_that_of_the_real_form(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    S = complex_matrix(shape, dtype)
    found = wc.nearest(S, 1.3)
    assert found.dtype == dtype
    expected = wc.nearest(embedded(S), 1.3)
    tolerance = 1e-12 if dtype == torch.complex128 else 1e-6
    torch.testing.assert_close(embedded(found), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(wc.nearest(S, torch.inf), S)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 4, 3)], ids=str)
def test_penalty_matches_real_form_and_gradient_matches_autograd(
    shape: tuple[int, ...],
) -> None:
    S = complex_matrix(shape).requires_grad_()
    value = wc.condition_penalty(S)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, wc.condition_penalty(embedded(S.detach())))
    assert torch.autograd.gradcheck(wc.condition_penalty, (S,))
    (gradient,) = torch.autograd.grad(value.sum(), S)
    torch.testing.assert_close(gradient, wc.condition_penalty_gradient(S))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_proximal_step_minimises_its_objective(shape: tuple[int, ...]) -> None:
    """1/2 ||X - c S||_F^2 + eta/2 ||X||_2^2 with c = 1 + eta/nu, which is convex."""
    S, eta = complex_matrix(shape), 0.4
    target = (1 + eta / min(shape)) * S

    def objective(X: Tensor) -> Tensor:
        squares = torch.linalg.matrix_norm(X - target).square()
        return (squares + eta * torch.linalg.matrix_norm(X, ord=2).square()) / 2

    X = wc.proximal_step(S, eta)
    least = objective(X)
    for seed in range(20):
        move = torch.randn(shape, dtype=S.dtype, generator=torch.Generator().manual_seed(seed))
        assert objective(X + 1e-3 * move) > least


def test_the_imaginary_part_is_never_dropped() -> None:
    S = torch.complex(torch.eye(4), 3 * torch.randn(4, 4, generator=torch.Generator()))
    assert float(wc.condition_number(S)) > 2 * float(wc.condition_number(S.real))
