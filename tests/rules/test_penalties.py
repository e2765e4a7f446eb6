"""The theorems on r(S), its gradient and its proximal step, and errors for bad input."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import wellcond as wc
from matrices import SPECTRA, hilbert, lauchli, matrices, orthonormal, with_spectrum
from oracles import gradient, penalty, proximal_step

FULL_RANK = ("gap", "no gap", "cluster", "tied", "semi-orthogonal", "graded")
SIMPLE = ("gap", "no gap", "graded")
EPS = torch.finfo(torch.float64).eps
STEPS = st.sampled_from([1e-3, 0.1, 0.5, 1.0, 7.0, 1e3, 1e9])
FUNCTIONS = [
    wc.condition_number,
    wc.condition_penalty,
    wc.condition_penalty_gradient,
    wc.condition_penalty_bound,
    lambda S: wc.proximal_step(S, 0.1),
]


def singular_values(S: Tensor) -> Tensor:
    return torch.linalg.svdvals(S.double())


def close(actual: Tensor, expected: Tensor | float, scale: float, ulps: float = 500) -> None:
    """Asserts equality up to `ulps` roundings of the scale of the inputs."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(
        actual.double(), expected, rtol=0, atol=ulps * EPS * scale, equal_nan=True
    )


@given(matrices())
def test_penalty_and_gradient_equal_the_definition(S: Tensor) -> None:
    sigma = float(singular_values(S)[0])
    close(wc.condition_penalty(S), penalty(S), sigma**2)


@given(matrices(SIMPLE))
def test_gradient_is_sigma_u_v_minus_s_over_nu(S: Tensor) -> None:
    """Theorem 3.1."""
    # The error of u_1 and v_1 is eps sigma_1/(sigma_1 - sigma_2); the ratio is at most 100 here.
    close(wc.condition_penalty_gradient(S), gradient(S), float(singular_values(S)[0]), 5e4)


@given(matrices())
def test_penalty_is_a_sum_of_differences_and_not_negative(S: Tensor) -> None:
    """r = 1/(2 nu) sum (sigma_1^2 - sigma_i^2) = sigma_1^2/2 (1 - srank/nu) >= 0."""
    sigma, nu = singular_values(S), min(S.shape)
    r = wc.condition_penalty(S)
    close(r, (sigma[0] ** 2 - sigma**2).sum() / (2 * nu), float(sigma[0]) ** 2)
    assert r >= 0
    if sigma[0] > 0:
        srank = sigma.square().sum() / sigma[0] ** 2
        close(r, sigma[0] ** 2 / 2 * (1 - srank / nu), float(sigma[0]) ** 2)


@given(matrices())
@example(torch.zeros(3, 2))
def test_penalty_is_zero_exactly_for_full_rank_and_condition_one(S: Tensor) -> None:
    """Theorem 2.1."""
    sigma = singular_values(S)
    if sigma[0] == 0:
        assert wc.condition_penalty(S) == 0
        return
    perfect = bool(sigma[-1] > (1 - 1e-12) * sigma[0])
    assert (wc.condition_penalty(S) < 1e-12 * sigma[0] ** 2) == perfect


@given(matrices(FULL_RANK))
def test_condition_number_is_bounded_by_the_penalty(S: Tensor) -> None:
    """Theorem 2.2, and two sharper bounds."""
    sigma, nu, r = singular_values(S), min(S.shape), float(wc.condition_penalty(S))
    kappa = float(wc.condition_number(S))
    slack = 1 + 1e-9
    assert kappa <= float(wc.condition_penalty_bound(S)) * slack
    exponent = nu * r / float(sigma[-1]) ** 2
    if exponent < 600:
        bound = torch.tensor(math.exp(exponent), dtype=torch.float64)
        torch.testing.assert_close(wc.condition_penalty_bound(S), bound, rtol=1e-6, atol=0)
    assert kappa**2 <= (1 + 2 * nu * r / float(sigma[-1]) ** 2) * slack
    inside = 1 - 2 * nu * r / float(sigma[0]) ** 2
    if inside > 1e-6:
        assert kappa <= slack / math.sqrt(inside)


@given(matrices(), st.sampled_from([-3.0, 1e-3, 2.0, 1e4]), st.integers(0, 99))
def test_penalty_is_homogeneous_and_invariant(S: Tensor, c: float, seed: int) -> None:
    """r(cS) = c^2 r(S), r(S^T) = r(S), r(U S V^T) = r(S)."""
    scale = float(singular_values(S)[0]) ** 2
    r = float(wc.condition_penalty(S))
    source = torch.Generator().manual_seed(seed)
    U, V = (orthonormal(size, size, source) for size in S.shape)
    close(wc.condition_penalty(c * S), c**2 * r, c**2 * scale)
    close(wc.condition_penalty(S.mT), r, scale)
    close(wc.condition_penalty(U @ S @ V.mT), r, scale)


@given(matrices())
def test_euler_identity(S: Tensor) -> None:
    """<grad r(S), S> = 2 r(S), also if singular values are equal."""
    product = (wc.condition_penalty_gradient(S) * S).sum()
    close(product, 2 * float(wc.condition_penalty(S)), float(singular_values(S)[0]) ** 2)


def test_gradient_at_condition_one_does_not_vanish() -> None:
    for n in (2, 5, 9):
        Q = orthonormal(n, n, torch.Generator().manual_seed(n))
        norm = torch.linalg.matrix_norm(wc.condition_penalty_gradient(Q))
        close(norm, math.sqrt(1 - 1 / n), 1.0)


@given(matrices(SIMPLE), st.sampled_from([1e-3, 0.05, 0.3]))
def test_gradient_step_lowers_the_condition_number_as_predicted(S: Tensor, lam: float) -> None:
    """Theorem 3.2, with its formula for kappa after the step."""
    sigma, nu = singular_values(S), min(S.shape)
    if nu < 2 or sigma[0] * (1 + lam / nu - lam) < sigma[-1] * (1 + lam / nu):
        return
    kappa = wc.condition_number(S)
    after = wc.condition_number(S - lam * wc.condition_penalty_gradient(S))
    top = max(float(sigma[0]) * (1 + lam / nu - lam), float(sigma[1]) * (1 + lam / nu))
    expected = top / (float(sigma[-1]) * (1 + lam / nu))
    torch.testing.assert_close(float(after), expected, rtol=1e-7 * float(kappa) ** 0.5, atol=0)
    assert after < kappa


@given(matrices(), st.integers(0, 99))
def test_any_unit_vector_gives_a_lower_bound(S: Tensor, seed: int) -> None:
    """1/2 ||S v||^2 - ||S||_F^2/(2 nu) <= r(S)."""
    v = orthonormal(S.shape[1], 1, torch.Generator().manual_seed(seed))
    estimate = (S @ v).square().sum() / 2 - S.square().sum() / (2 * min(S.shape))
    assert estimate <= wc.condition_penalty(S) + 100 * EPS * singular_values(S)[0] ** 2


def test_single_tiny_singular_value_hardly_changes_r() -> None:
    sigma = torch.ones(784, dtype=torch.float64)
    sigma[-1] = 1e-6
    S = torch.diag(sigma)
    torch.testing.assert_close(float(wc.condition_number(S)), 1e6, rtol=1e-9, atol=0)
    torch.testing.assert_close(float(wc.condition_penalty(S)), 6.4e-4, rtol=5e-3, atol=0)


@pytest.mark.parametrize("shape", [(5, 4), (4, 5), (3, 4, 2)], ids=str)
def test_penalty_passes_gradcheck_where_sigma_1_is_simple(shape: tuple[int, ...]) -> None:
    S = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.autograd.gradcheck(wc.condition_penalty, S.requires_grad_())


def test_penalty_is_differentiable_once_only() -> None:
    S = torch.eye(3, dtype=torch.float64).mul(torch.tensor([3.0, 2.0, 1.0])).requires_grad_()
    (first,) = torch.autograd.grad(wc.condition_penalty(S), S, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(first.sum(), S)


# --- proximal step --------------------------------------------------------------------------------


@given(matrices(), STEPS)
@example(torch.zeros(3, 2), 0.5)
def test_proximal_step_equals_the_root_of_its_equation(S: Tensor, eta: float) -> None:
    scale = (1 + eta) * float(singular_values(S)[0])
    # The root of the oracle has an error of 1e-14 c sigma_1.
    close(wc.proximal_step(S, eta), proximal_step(S, eta), scale, 2000)


@given(matrices(), STEPS)
def test_proximal_step_raises_neither_kappa_nor_r(S: Tensor, eta: float) -> None:
    after = wc.proximal_step(S, eta)
    c = 1 + eta / min(S.shape)
    before = singular_values(S)
    kappa, kappa_after = wc.condition_number(S), wc.condition_number(after)
    if torch.isfinite(kappa) and kappa < 1e6:
        assert kappa_after <= kappa * (1 + 1e-7)
    r, rounding = wc.condition_penalty(S), 1e3 * EPS * (c * before[0]) ** 2
    assert wc.condition_penalty(after) <= r + rounding


@given(matrices(("gap", "no gap", "tied", "graded")), STEPS, st.integers(0, 99))
def test_proximal_step_minimises_its_objective(S: Tensor, eta: float, seed: int) -> None:
    """X = argmin 1/2 ||X - c S||_F^2 + eta/2 ||X||_2^2: no neighbour does better."""
    c = 1 + eta / min(S.shape)

    def objective(X: Tensor) -> Tensor:
        spectral = torch.linalg.matrix_norm(X, 2)
        return (X - c * S).square().sum() / 2 + eta / 2 * spectral**2

    X = wc.proximal_step(S, eta)
    best = objective(X)
    source = torch.Generator().manual_seed(seed)
    for size in (1e-1, 1e-3):
        other = X + size * torch.randn(X.shape, generator=source, dtype=torch.float64)
        assert objective(other) >= best - 1e-12 * (1 + c**2) * S.square().sum()


def test_proximal_step_of_zero_length_is_identity_and_ties_remain() -> None:
    S = with_spectrum(torch.tensor([3.0, 3.0, 1.0], dtype=torch.float64), 5, 3)
    torch.testing.assert_close(wc.proximal_step(S, 0.0), S)
    sigma = singular_values(wc.proximal_step(S, 0.5))
    torch.testing.assert_close(sigma[0], sigma[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("step", [-1e-9, math.nan, math.inf])
def test_proximal_step_refuses_a_bad_step(step: float) -> None:
    with pytest.raises(ValueError, match="`step` must be a single finite number"):
        wc.proximal_step(torch.eye(2), step)


# --- the condition number -------------------------------------------------------------------------


def test_condition_number_of_known_matrices() -> None:
    # Hilbert of order 6 (Todd 1954, and in exact arithmetic): 1.4951058642254665e7.
    torch.testing.assert_close(
        float(wc.condition_number(hilbert(6))), 1.4951058642254665e7, rtol=1e-9, atol=0
    )
    # Lauchli: sigma_1^2 = n + mu^2, the others mu^2. A Gram matrix in float64 would lose mu^2.
    expected = math.sqrt(4 + 1e-14) / 1e-7
    actual = float(wc.condition_number(lauchli(4, 1e-7)))
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1.0, 1e150, 1e300])
def test_condition_number_does_not_depend_on_scale(scale: float) -> None:
    S = with_spectrum(torch.tensor([4.0, 2.0, 0.5], dtype=torch.float64), 4, 3)
    torch.testing.assert_close(float(wc.condition_number(scale * S)), 8.0, rtol=1e-12, atol=0)


def test_condition_number_of_deficient_zero_and_vector_shaped_matrices() -> None:
    assert wc.condition_number(torch.ones(3, 4)) == math.inf
    zero_column = torch.eye(4)[:, [0, 1, 2]].clone()
    zero_column[:, 1] = 0
    assert wc.condition_number(zero_column) == math.inf  # a pseudo-inverse would give 1
    assert torch.isnan(wc.condition_number(torch.zeros(2, 3)))
    assert torch.isnan(wc.condition_penalty_bound(torch.zeros(2, 3)))
    assert wc.condition_penalty_bound(torch.ones(3, 4)) == math.inf
    assert wc.condition_number(torch.tensor([[3.0, 4.0]])) == 1


def test_batches_are_treated_matrix_by_matrix() -> None:
    names = ("gap", "tied", "zero", "rank-one", "graded", "semi-orthogonal")
    S = torch.stack([with_spectrum(SPECTRA[name](3).double(), 5, 3) for name in names])
    S = S.reshape(2, 3, 5, 3)
    for function in FUNCTIONS:
        whole = function(S)
        single = torch.stack([function(one) for one in S.reshape(6, 5, 3)])
        torch.testing.assert_close(whole, single.reshape(whole.shape), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_preserved_except_by_condition_number(dtype: torch.dtype) -> None:
    S = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert wc.condition_number(S).dtype == torch.float64
    assert wc.condition_penalty(S).dtype == dtype
    assert wc.condition_penalty_gradient(S).dtype == dtype
    assert wc.proximal_step(S, 0.1).dtype == dtype
    expected = wc.proximal_step(S.double(), 0.1)
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(wc.proximal_step(S, 0.1).double(), expected, **tolerance)


@pytest.mark.parametrize("function", [*FUNCTIONS, lambda S: wc.nearest(S, 2.0), wc.certify])
@pytest.mark.parametrize(
    ("S", "error", "message"),
    [
        (torch.tensor([[1.0, math.nan]]), ValueError, "must be finite, got 1 NaN"),
        (torch.tensor([[1.0, math.inf]]), ValueError, "must be finite"),
        (torch.ones(3), ValueError, r"at least 2 dimensions, got shape \(3,\)"),
        (torch.ones(0, 3), ValueError, "must have rows and columns"),
        (torch.ones(2, 2, dtype=torch.int64), TypeError, "got torch.int64"),
        (torch.ones(2, 2).to(torch.float8_e4m3fn), TypeError, "float8_e4m3fn, which holds codes"),
        (torch.ones(2, 2, dtype=torch.bool), TypeError, "which holds codes. Dequantise it first"),
        (torch.ones(2, 2).to_sparse(), TypeError, r"must be dense.* Pass S.to_dense"),
        (torch.ones(2, 2, device="meta"), ValueError, "must have values, got a meta tensor"),
        ([[1.0]], TypeError, "must be a torch.Tensor or a NumPy array, got list"),
    ],
    ids=["nan", "inf", "vector", "empty", "integer", "float8", "bool", "sparse", "meta", "list"],
)
def test_bad_matrices_are_refused(
    function: object, S: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(S)  # type: ignore[operator]


@pytest.mark.parametrize("penalty_type", [wc.ConditionPenalty, wc.TikhonovPenalty])
def test_bad_strengths_are_refused(penalty_type: type) -> None:
    for strength in (-1e-3, math.nan, math.inf):
        with pytest.raises(ValueError, match="`strength` must be finite and not negative"):
            penalty_type(strength)
    with pytest.raises(TypeError, match="must be a number or a callable"):
        penalty_type("strong")
    with pytest.raises(ValueError, match=r"`strength\(3\)`"):
        penalty_type(lambda step: -1.0).strength_at(3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 6, 4), (2, 3, 4, 6), (5, 4)], ids=str)
def test_the_penalty_of_a_batch_is_differentiable_in_every_dtype(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    source = torch.Generator().manual_seed(0)
    S = torch.randn(*shape, generator=source).to(dtype).requires_grad_()
    weights = torch.randn(shape[:-2], generator=source).to(dtype)
    (wc.condition_penalty(S) * weights).sum().backward()
    expected = weights[..., None, None] * wc.condition_penalty_gradient(S)
    assert S.grad is not None
    torch.testing.assert_close(S.grad, expected.detach())
