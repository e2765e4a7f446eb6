"""Stable rank, spectral norm, orthogonality and isometry steps: theorems, and all modes."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import oracles
import wellcond as wc
from matrices import SPECTRA, matrices, with_spectrum
from registry import OPERATORS, ProductMatrix, normal
from wellcond.operators.base import Gradient, NewWeight, Rescaled
from wellcond.operators.stored import StoredMatrix
from wellcond.rules.isometry import isometry_step

PENALTIES = [
    wc.StableRankPenalty(0.3),
    wc.SpectralNormPenalty(0.3, 0.5),
    wc.OrthogonalityPenalty(0.3, 0.7),
]
EVERY_RULE = [*PENALTIES, wc.IsometryStep()]
SHAPES = [(6, 4), (4, 6), (5, 5), (1, 7), (7, 1), (3, 5, 4)]
FULL_RANK = ("gap", "no gap", "cluster", "tied", "semi-orthogonal")


class Holder(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())


def held(S: Tensor, rule: Any, block_size: int = 32) -> tuple[nn.Parameter, wc.Regularizer]:
    model = Holder(S)
    return model.weight, wc.Regularizer(model, {"weight": rule}, block_size=block_size)


def stepped(S: Tensor, rule: Any, lr: float = 1.0, block_size: int = 32, times: int = 1) -> Tensor:
    """The weight after proximal steps."""
    weight, reg = held(S, rule, block_size)
    for _ in range(times):
        reg.proximal_step(lr)
    return weight.detach()


def added(S: Tensor, rule: wc.Penalty) -> Tensor:
    """The gradient."""
    weight, reg = held(S, rule)
    reg.add_gradients()
    assert weight.grad is not None
    return weight.grad


def values(S: Tensor) -> Tensor:
    return torch.linalg.svdvals(S.double())


def dense(rule: wc.Penalty, S: Tensor) -> Tensor:
    """The penalty at strength 1 from the definition, differentiable."""
    if isinstance(rule, wc.OrthogonalityPenalty):
        G = S.mT @ S if S.shape[-2] >= S.shape[-1] else S @ S.mT
        E = G - rule.scale**2 * torch.eye(len(G[-1]), dtype=G.dtype)
        return E.square().sum((-2, -1)) / 4
    top = torch.linalg.matrix_norm(S, 2)
    if isinstance(rule, wc.SpectralNormPenalty):
        return (top - rule.target).clamp_min(0).square() / 2
    return (1 - S.square().sum((-2, -1)) / top.square() / min(S.shape[-2:])) / 2


# --- values and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", PENALTIES, ids=repr)
def test_value_and_gradient_are_those_of_autograd(rule: wc.Penalty, shape: tuple) -> None:
    S = normal(*shape).requires_grad_()
    expected = 0.3 * dense(rule, S).sum()
    expected.backward()
    weight, reg = held(S.detach(), rule)
    total = reg()
    (2 * total).backward()
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(weight.grad, 2 * S.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(added(S.detach(), rule), S.grad, rtol=1e-9, atol=1e-11)


@given(matrices(("gap", "no gap", "graded")))
def test_gradient_matches_finite_differences(S: Tensor) -> None:
    """In a random direction."""
    D = normal(*S.shape, seed=3)
    for rule in PENALTIES:
        h = 1e-6
        slope = (dense(rule, S + h * D) - dense(rule, S - h * D)) / (2 * h)
        torch.testing.assert_close((added(S, rule) * D).sum() / 0.3, slope, rtol=1e-5, atol=1e-6)


@given(matrices(("gap", "no gap", "graded")), st.sampled_from([1e-3, 0.5, 7.0, 1e4]))
def test_stable_rank_is_scale_invariant_with_orthogonal_gradient(S: Tensor, c: float) -> None:
    """The gradient scales as 1/||S||, so a plain step makes S grow."""
    rule = wc.StableRankPenalty(1.0)
    of_S, of_cS = (held(X, rule)[1]() for X in (S, c * S))
    torch.testing.assert_close(of_cS, of_S, rtol=1e-9, atol=1e-12)
    G = added(S, rule)
    norm = torch.linalg.vector_norm(S)
    assert abs((G * S).sum()) < 1e-12
    torch.testing.assert_close(added(c * S, rule), G / c, rtol=1e-8, atol=1e-11 / c)
    assert torch.linalg.vector_norm(S - 0.1 * G) >= norm * (1 - 1e-12)
    r = wc.condition_penalty(S)
    torch.testing.assert_close(of_S.detach(), r / values(S)[0] ** 2, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_stable_rank_is_the_same_at_any_scale(dtype: torch.dtype, scale: float) -> None:
    S = normal(6, 4)
    rule = wc.StableRankPenalty(1.0)
    large = (scale * S).to(dtype)
    expected = held(S, rule)[1]()
    torch.testing.assert_close(held(large, rule)[1]().double(), expected, rtol=1e-5, atol=0)
    G = added(large, rule)
    assert torch.isfinite(G).all()
    if dtype == torch.float64:
        torch.testing.assert_close(G * scale, added(S, rule), rtol=1e-9, atol=1e-12)
    for block_size in (2, 4):  # with a strength in units of sigma^2
        X = stepped(large.double(), wc.StableRankPenalty(scale**2), block_size=block_size).to(dtype)
        torch.testing.assert_close(
            X.double() / scale, stepped(S, rule, block_size=block_size), rtol=1e-4, atol=1e-6
        )
        after = stepped(large, wc.StableRankPenalty(1e30), block_size=block_size)
        assert torch.isfinite(after).all()
        assert wc.condition_number(after) <= wc.condition_number(large) * (1 + 1e-4)


# --- proximal steps of the leading triplets -------------------------------------------------------


@given(matrices(tuple(name for name in SPECTRA if name != "zero")), st.sampled_from([0.01, 0.5, 9]))
def test_stable_rank_step_is_step_of_r_with_restored_norm(S: Tensor, length: float) -> None:
    top, norm = values(S)[0], torch.linalg.vector_norm(S)
    expected = oracles.proximal_step(S / top, length)
    expected = expected * norm / torch.linalg.vector_norm(expected)
    X = stepped(S, wc.StableRankPenalty(length * float(top) ** 2))
    torch.testing.assert_close(X, expected, rtol=1e-9, atol=1e-11 * float(top))


@given(matrices(FULL_RANK), st.sampled_from([1e-3, 0.5, 7.0, 1e3, 1e12]))
def test_no_step_of_the_stable_rank_raises_kappa_or_changes_the_norm(S: Tensor, eta: float) -> None:
    X = stepped(S, wc.StableRankPenalty(eta))
    torch.testing.assert_close(torch.linalg.vector_norm(X), torch.linalg.vector_norm(S))
    assert wc.condition_number(X) <= wc.condition_number(S) * (1 + 1e-9)
    assert dense(wc.StableRankPenalty(1.0), X) <= dense(wc.StableRankPenalty(1.0), S) + 1e-12


@given(matrices(), st.sampled_from([1e-3, 0.5, 7.0, 1e3]), st.sampled_from([0.0, 0.7, 1.2]))
def test_the_step_of_the_spectral_norm_minimises_its_objective(
    S: Tensor, eta: float, target: float
) -> None:
    """A search without a formula finds no better value at which to clip."""
    sigma = values(S).numpy()
    if not 1e-6 < sigma[0] < 1e6:
        return
    goal = target * sigma[0]

    def objective(tau: float) -> float:
        moved = np.minimum(sigma, tau)
        return float(np.sum((moved - sigma) ** 2) + eta * max(moved[0] - goal, 0) ** 2)

    found = minimize_scalar(
        objective, bounds=(0, sigma[0]), method="bounded", options={"xatol": 1e-12 * sigma[0]}
    )
    X = stepped(S, wc.SpectralNormPenalty(eta, goal))
    assert objective(float(values(X)[0])) <= found.fun * (1 + 1e-9) + 1e-12 * sigma[0] ** 2
    expected = np.minimum(sigma, values(X)[0].item())
    np.testing.assert_allclose(values(X).numpy(), expected, atol=1e-12 * sigma[0])
    if goal >= sigma[0]:
        assert torch.equal(X, S)


def test_narrow_block_shortens_steps_and_reports_it() -> None:
    S = with_spectrum(torch.tensor([2.0, 1.9, 1.8, 0.1], dtype=torch.float64), 6, 4)
    for rule in (wc.StableRankPenalty(100.0), wc.SpectralNormPenalty(100.0, 0.5)):
        weight, reg = held(S, rule, block_size=2)
        for _ in range(3):
            reg.proximal_step(1.0)
        assert reg.measure()["weight"].shortened_steps > 0
        assert wc.condition_number(weight) <= wc.condition_number(S) * (1 + 1e-6)
        assert values(weight.detach())[0] >= values(S)[2] * (1 - 1e-9)  # the third is unknown
    weight, reg = held(S, wc.SpectralNormPenalty(100.0, 1.95), block_size=2)
    reg.proximal_step(1.0)  # the second is below the target: all values to be clipped are known
    assert reg.measure()["weight"].shortened_steps == 0


# --- isometry steps -------------------------------------------------------------------------------


def moved(s: Tensor, theta: float) -> Tensor:
    """The new singular values after an isometry step, in units of the scale."""
    return s * (1 + theta / 2 * (1 - s.square()))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("theta", [0.1, 0.5, 1.0, 1.9])
def test_an_isometry_step_is_its_formula(theta: float, shape: tuple[int, ...]) -> None:
    S = 0.3 * normal(*shape)
    S = S / values(S).amax() * 1.4
    G = S.mT @ S if shape[-2] >= shape[-1] else S @ S.mT
    E = torch.eye(len(G[-1]), dtype=G.dtype) - G / 1.1**2
    expected = S + theta / 2 * (S @ E if shape[-2] >= shape[-1] else E @ S)
    torch.testing.assert_close(stepped(S, wc.IsometryStep(theta=theta, scale=1.1)), expected)


@given(st.floats(0.01, 1.99), st.floats(0.001, 1.49))
def test_when_isometry_step_approaches_one_and_keeps_signs(theta: float, s: float) -> None:
    x = torch.tensor(s, dtype=torch.float64)
    after = float(moved(x, theta))
    if abs(s - 1) > 1e-6 and abs(s * (s + 1) - 4 / theta) > 1e-6:
        assert (abs(after - 1) < abs(s - 1)) == (s * (s + 1) < 4 / theta)
    if abs(s**2 - (2 + theta) / theta) > 1e-6:
        assert (after > 0) == (s**2 < (2 + theta) / theta)
    stored = stepped(x.reshape(1, 1), wc.IsometryStep(theta=theta, scale=1.0))
    torch.testing.assert_close(float(stored), after, rtol=1e-12, atol=1e-14)


@given(matrices(FULL_RANK), st.sampled_from([0.2, 0.5, 1.0]), st.sampled_from([0.3, 1.0, None]))
def test_isometry_steps_converge_to_nearest_isometry(
    S: Tensor, theta: float, scale: float | None
) -> None:
    """The limit is scale U V^T, with the singular vectors of S."""
    X = stepped(S, wc.IsometryStep(theta=theta, scale=scale), times=int(90 / theta))
    U, sigma, Vh = torch.linalg.svd(S, full_matrices=False)
    expected = U @ Vh * (sigma.square().mean().sqrt() if scale is None else scale)
    torch.testing.assert_close(X, expected, rtol=0, atol=1e-6 * float(expected.norm()))


def test_convergence_is_linear_and_at_theta_1_quadratic() -> None:
    sigma = torch.tensor([1.1, 1.0, 0.9], dtype=torch.float64)
    S = with_spectrum(sigma, 5, 3)
    off = [
        1 - stepped(S, wc.IsometryStep(theta=0.5, scale=1.0), times=t).svd().S.min()
        for t in (20, 21)
    ]
    torch.testing.assert_close(
        off[1] / off[0], torch.tensor(0.5, dtype=torch.float64), rtol=1e-4, atol=0
    )
    off = [
        1 - stepped(S, wc.IsometryStep(theta=1.0, scale=1.0), times=t).svd().S.min()
        for t in (1, 2, 3)
    ]
    for before, after in itertools.pairwise(off):
        assert after <= 1.6 * before**2 + 1e-15


def test_without_a_clip_a_step_may_raise_kappa() -> None:
    """From (1.7, 1), theta = 1 gives kappa 10.7, or 1.78 if clipped to 1.5; theta = 0.5 lowers."""
    S = torch.diag(torch.tensor([1.7, 1.0], dtype=torch.float64))
    one = torch.ones((), dtype=torch.float64)
    weight = StoredMatrix(S.clone())
    weight.update_(isometry_step(weight, one, one, 10 * one))
    assert round(float(wc.condition_number(weight.S)), 1) == 10.7
    assert (
        round(float(wc.condition_number(stepped(S, wc.IsometryStep(theta=1.0, scale=1.0)))), 2)
        == 1.78
    )
    assert wc.condition_number(stepped(S, wc.IsometryStep(theta=0.5, scale=1.0))) < 1.7


@given(
    matrices(("gap", "no gap", "cluster", "tied", "graded")),
    st.sampled_from([0.05, 0.3, 0.5, 4 / 7]),
    st.sampled_from([0.01, 0.5, 1.0, 40.0]),
)
def test_kappa_does_not_rise_for_theta_up_to_4_over_7(S: Tensor, theta: float, c: float) -> None:
    kappa = wc.condition_number(S)
    if kappa > 1e6:
        return
    for X in (
        stepped(c * S, wc.IsometryStep(theta=theta, scale=1.0)),
        stepped(c * S, wc.OrthogonalityPenalty(theta / 2, 1.0)),
    ):
        assert wc.condition_number(X) <= kappa * (1 + 1e-7)


@given(matrices(), st.sampled_from([1e-4, 0.05, 0.3, 1.0, 1e6]), st.sampled_from([0.01, 1.0, 40.0]))
def test_no_step_of_orthogonality_raises_the_penalty(S: Tensor, eta: float, c: float) -> None:
    rule, S = wc.OrthogonalityPenalty(eta), c * S
    if values(S)[0] < 1e6:
        assert dense(rule, stepped(S, rule)) <= dense(rule, S) * (1 + 1e-9) + 1e-12


def test_isometry_step_clips_to_1_5_scale() -> None:
    sigma = torch.tensor([9.0, 1.2, 0.7], dtype=torch.float64)
    X = stepped(with_spectrum(sigma, 5, 3), wc.IsometryStep(theta=0.5, scale=1.0))
    expected = moved(sigma.clamp_max(1.5), 0.5).sort(descending=True).values
    torch.testing.assert_close(values(X), expected)


def test_attached_orthogonality_is_explicit_step_of_bounded_length() -> None:
    S = 0.4 * normal(6, 4)
    rule = wc.OrthogonalityPenalty(0.2, 0.7)
    G = added(S, wc.OrthogonalityPenalty(1.0, 0.7))
    torch.testing.assert_close(stepped(S, rule, lr=0.5), S - 0.1 * G)
    near = with_spectrum(torch.tensor([0.8, 0.7, 0.6], dtype=torch.float64), 5, 3)
    expected = stepped(near, wc.IsometryStep(theta=1.0, scale=0.7))
    torch.testing.assert_close(stepped(near, wc.OrthogonalityPenalty(1e9, 0.7)), expected)
    # A very weak step clips nothing.
    large = with_spectrum(torch.tensor([50.0, 1.0], dtype=torch.float64), 3, 2)
    G = added(large, wc.OrthogonalityPenalty(1.0))
    torch.testing.assert_close(stepped(large, wc.OrthogonalityPenalty(1e-6)), large - 1e-6 * G)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_isometry_at_any_scale(dtype: torch.dtype, scale: float) -> None:
    S = normal(6, 4)
    large = (scale * S).to(dtype)
    X = stepped(large, wc.IsometryStep()).double() / scale
    torch.testing.assert_close(X, stepped(S, wc.IsometryStep()), rtol=1e-4, atol=1e-5)
    for rule in (wc.IsometryStep(theta=1.0, scale=1.0), wc.OrthogonalityPenalty(1.0)):
        X = stepped(large, rule)
        assert values(X)[0] <= 1.5 + 1e-5
        assert wc.condition_number(X) <= wc.condition_number(large) * (1 + 1e-4)
    if scale == 1e30:
        for rule in (wc.IsometryStep(theta=1.0, scale=1.0), wc.OrthogonalityPenalty(1.0)):
            X = stepped(large, rule, times=40)
            torch.testing.assert_close(
                values(X), torch.ones(4, dtype=torch.float64), rtol=1e-5, atol=0
            )


def test_huge_singular_value_is_clipped_in_several_steps() -> None:
    """Values that rounding of the Gram matrix hides are not clipped with it."""
    sigma = torch.tensor([1e12, 1.0, 0.9], dtype=torch.float64)
    X = stepped(torch.diag(sigma), wc.IsometryStep(theta=0.5, scale=1.0), times=60)
    torch.testing.assert_close(X, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-4)


def test_zero_singular_values_remain_and_zero_weight_has_no_scale() -> None:
    S = with_spectrum(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64), 5, 3)
    for rule in (wc.IsometryStep(theta=1.0, scale=1.0), wc.OrthogonalityPenalty(1.0)):
        torch.testing.assert_close(
            values(stepped(S, rule, times=9)),  # rounding errors grow by 1 + theta/2 per step
            torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64),
            rtol=1e-9,
            atol=1e-12,
        )
    weight, reg = held(torch.zeros(4, 3), wc.IsometryStep())
    reg.proximal_step(1.0)
    assert not weight.any()
    assert reg.state_dict()["weight"]["scale"] == 0
    with torch.no_grad():
        weight.copy_(2 * torch.eye(4, 3))
    reg.proximal_step(1.0)
    assert reg.state_dict()["weight"]["scale"] == 2
    for rule in PENALTIES:
        zero = torch.zeros(4, 3)
        assert not added(zero, rule).any()
        assert torch.equal(stepped(zero, rule), zero)
        assert math.isfinite(held(zero, rule)[1]().item())


def test_scale_is_determined_at_first_step_and_kept() -> None:
    S = normal(3, 5, 4)
    weight, reg = held(S, wc.IsometryStep())
    assert not reg.state_dict()["weight"]["scale"].any()
    expected = torch.linalg.vector_norm(S, dim=(-2, -1)) / 2
    for _ in range(3):
        reg.proximal_step(1.0)
        torch.testing.assert_close(reg.state_dict()["weight"]["scale"], expected)
    assert (wc.condition_number(weight) < wc.condition_number(S)).all()


# --- in every mode, on every kind of weight -------------------------------------------------------


@pytest.mark.parametrize("rule", PENALTIES, ids=repr)
def test_at_strength_0_nothing_changes(rule: wc.Penalty) -> None:
    none = type(rule)(0.0)
    for S in (9 * normal(6, 4), normal(4, 6), 1e-3 * normal(5, 5), normal(3, 5, 4)):
        assert torch.equal(stepped(S, none), S)
        assert torch.equal(stepped(S, rule, lr=0.0), S)
        assert not added(S, none).any()


def zoo() -> nn.ModuleDict:
    """A fused parameter, a channels-last kernel, a grouped kernel, two weights of one shape."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.ModuleDict(
            {
                "attention": nn.MultiheadAttention(8, 2, bias=False),
                "conv": nn.Conv2d(3, 6, 3, bias=False).to(memory_format=torch.channels_last),
                "groups": nn.Conv2d(4, 6, 3, groups=2, bias=False),
                "one": nn.Linear(8, 5, bias=False),
                "other": nn.Linear(8, 5, bias=False),
            }
        )


@pytest.mark.parametrize("rule", EVERY_RULE, ids=repr)
def test_views_kernels_and_weights_of_one_shape_are_treated_matrix_by_matrix(rule: Any) -> None:
    model, alone = zoo().double(), zoo().double()
    reg = wc.Regularizer(model, rule)
    if isinstance(rule, wc.Penalty):
        reg.add_gradients()
    reg.proximal_step(0.5)
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        flat = theirs.detach().flatten(1)
        parts = flat.chunk({(24, 8): 3, (6, 2, 3, 3): 2}.get(tuple(theirs.shape), 1))
        each = [stepped(part, rule, lr=0.5) for part in parts]
        torch.testing.assert_close(ours.detach().flatten(1), torch.cat(each), rtol=1e-7, atol=1e-9)
        if isinstance(rule, wc.Penalty):
            gradients = torch.cat([added(part, rule) for part in parts])
            assert ours.grad is not None
            torch.testing.assert_close(ours.grad.flatten(1), gradients, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", EVERY_RULE, ids=repr)
def test_half_precision_is_computed_in_float32(rule: Any, dtype: torch.dtype) -> None:
    S = (0.5 * normal(20, 16)).to(dtype)
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}
    torch.testing.assert_close(stepped(S, rule).double(), stepped(S.double(), rule), **close)
    if isinstance(rule, wc.Penalty):
        torch.testing.assert_close(added(S, rule).double(), added(S.double(), rule), **close)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        name
        for name, case in OPERATORS.items()
        if not isinstance(case.operator(case.parameters()), ProductMatrix)
        and len(case.parameters()) == 1
    ],
)
def test_rescaled_form_reaches_the_parameter(name: str, dtype: torch.dtype) -> None:
    """Tests c S + S C as a new weight, its pullback, and the Gram matrix of S/unit."""
    case = OPERATORS[name]
    parameters = [one.to(dtype) for one in case.parameters()]
    S, twin = case.operator(parameters), case.twin(*parameters).double()
    assert isinstance(S, StoredMatrix)
    upright = twin.shape[-2] >= twin.shape[-1]
    unit = torch.full(twin.shape[:-2], 3.0)
    G = (twin.mT @ twin if upright else twin @ twin.mT) / 9
    torch.testing.assert_close(S.gram(torch.float64, unit), G)
    squares = twin.square().sum((-2, -1))
    torch.testing.assert_close(S.squared_frobenius_norm(torch.float64), squares)
    c = torch.full(twin.shape[:-2], 0.5, dtype=S.dtype)
    expected = twin / 2 + (twin @ G if upright else G @ twin)
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    close = close if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    form = Rescaled(c, G.to(S.dtype))
    into = [torch.zeros_like(parameters[0])]
    S.pullback_(Gradient(form), into)
    torch.testing.assert_close(case.twin(*into).double(), expected, **close)
    S.update_(NewWeight.from_tensors(NewWeight(form).code, NewWeight(form).tensors))
    torch.testing.assert_close(case.twin(*parameters).double(), expected, **close)


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 5)
        )


class Dense(wc.Penalty):
    """1/2 ||S||_F^2 with a gradient as large as the weight."""

    needs = frozenset()

    def evaluate(self, S: Any, image: Any) -> tuple[Tensor, wc.rules.Gradient]:
        return S.squared_frobenius_norm() / 2, wc.rules.Gradient(S.dense().clone())


# Square weights with each of the forms of a gradient.
RULES = {"0.*": wc.OrthogonalityPenalty(0.1), "2.*": Dense(0.1), "4.*": wc.StableRankPenalty(0.1)}


def train(way: str, rules: Any = None, compiled: Any = None, steps: int = 12) -> nn.Module:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    reg = wc.Regularizer(model, RULES if rules is None else rules, block_size=12)
    compiled = compiled or (lambda f: f)
    loss = compiled(lambda x: model(x).square().mean() + (reg() if way == "loss" else 0.0))
    add = compiled(lambda: reg.add_gradients())
    if way == "attach":
        reg.attach(optimizer, every=4)
    source = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.randn(8, 12, generator=source)).backward()
        if way == "gradients":
            add()
        optimizer.step()
    return model


def test_loss_and_add_gradients_agree() -> None:
    for p, q in zip(train("loss").parameters(), train("gradients").parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", ["loss", "gradients"])
def test_compiled_training_has_one_graph_and_the_numbers_of_eager_mode(way: str) -> None:
    torch._dynamo.reset()
    rules = {**RULES, "2.*": wc.SpectralNormPenalty(0.1, 0.5)}
    counter = CompileCounterWithBackend("aot_eager")
    ours = train(way, rules, lambda f: torch.compile(f, backend=counter, fullgraph=True))
    assert counter.frame_count == (1 if way == "loss" else 2)
    for p, q in zip(ours.parameters(), train(way, rules).parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "better"),
    [
        (wc.StableRankPenalty(20.0), lambda S: float(dense(wc.StableRankPenalty(1.0), S))),
        (wc.SpectralNormPenalty(20.0, 0.7), lambda S: float(values(S)[0])),
        (wc.OrthogonalityPenalty(1.0), lambda S: float(dense(wc.OrthogonalityPenalty(1.0), S))),
        (wc.IsometryStep(scale=1.0), lambda S: float(wc.condition_number(S))),
    ],
    ids=["stable rank", "norm", "orthogonality", "isometry"],
)
def test_training_with_rule_improves_its_measure(
    rule: Any, better: Callable[[Tensor], float]
) -> None:
    plain = better(train("none", None)[0].weight.detach())
    ways = ["attach"] if isinstance(rule, wc.IsometryStep) else ["attach", "loss", "gradients"]
    for way in ways:
        model = train(way, {"0.*": rule, "*": None}, steps=40)
        assert better(model[0].weight.detach()) < 0.8 * plain + 0.05


def training(state: Any = None, rules: Any = None) -> tuple[nn.Module, wc.Regularizer, Any]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    rules = rules or {
        "0.*": wc.IsometryStep(),
        "2.*": wc.OrthogonalityPenalty(1.0),
        "4.*": wc.StableRankPenalty(1.0),
    }
    reg = wc.Regularizer(model, rules)
    reg.attach(optimizer, every=3)
    if state is not None:
        model.load_state_dict(state["model"])
        reg.load_state_dict(state["reg"])

    def run(first: int, last: int) -> None:
        for step in range(first, last):
            x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    return model, reg, run


@pytest.mark.parametrize("at", [0, 2, 3, 7])
def test_resumed_training_matches_uninterrupted_run_bitwise(at: int, tmp_path: Path) -> None:
    """Resumes before and after the scale of the isometry is determined."""
    whole, reg, run = training()
    run(0, at)
    torch.save({"model": whole.state_dict(), "reg": reg.state_dict()}, tmp_path / "state.pt")
    run(at, 12)
    resumed, other, go_on = training(torch.load(tmp_path / "state.pt", weights_only=True))
    go_on(at, 12)
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    for name, fields in reg.state_dict().items():
        for key, value in fields.items():
            assert torch.equal(value, other.state_dict()[name][key]), (name, key)
    assert reg.state_dict()["0.weight"]["scale"] > 0
    assert "scale" not in reg.state_dict()["2.weight"]


def test_state_without_scale_loads_and_scale_is_determined_anew() -> None:
    _, reg, _ = training(rules=wc.TikhonovPenalty(0.1))
    _, ours, run = training(rules=wc.IsometryStep())
    ours.load_state_dict(reg.state_dict())
    run(0, 3)
    assert (ours.state_dict()["0.weight"]["scale"] > 0).all()
    given = wc.Regularizer(net(), wc.IsometryStep(scale=2.0))
    assert given.state_dict()["0.weight"]["scale"] == 2


# --- errors ---------------------------------------------------------------------------------------


def test_isometry_step_raises_where_a_gradient_is_needed() -> None:
    weight, reg = held(normal(4, 4), wc.IsometryStep())
    before = weight.detach().clone()
    for way in (reg, reg.add_gradients):
        with pytest.raises(ValueError, match=r'"weight" is under .*IsometryStep.*attach\('):
            way()
    reg.enforce()  # an isometry step is not a limit
    assert torch.equal(weight, before)
    optimizer = torch.optim.SGD([weight], 0.1)
    with pytest.raises(ValueError, match="`every` must be an integer"):
        reg.attach(optimizer, every="auto")
    attachment = reg.attach(optimizer)
    assert "every=10" in repr(attachment)
    for _ in range(9):
        optimizer.step()
    assert torch.equal(weight, before)
    optimizer.step()
    assert not torch.equal(weight, before)
    estimate = reg.measure()["weight"]
    assert math.isnan(estimate.penalty)
    assert estimate.step == 10
    assert "IsometryStep(theta=0.5, scale=None)" in repr(reg)


@pytest.mark.parametrize("rule", EVERY_RULE, ids=repr)
def test_nonfinite_weight_is_named_and_unchanged(rule: Any) -> None:
    S = normal(5, 4)
    S[1, 2] = math.nan
    weight, reg = held(S, rule)
    ways = [lambda: reg.proximal_step(0.1)]
    if isinstance(rule, wc.Penalty):
        ways += [reg, reg.add_gradients]
    for way in ways:
        with pytest.raises(ValueError, match=r'"weight" contains NaN'):
            way()
    torch.testing.assert_close(weight.detach(), S, rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        weight[1, 2] = 1.0
    reg.proximal_step(0.1)
    assert torch.isfinite(weight).all()


def test_bad_arguments_are_refused() -> None:
    for kind in (wc.StableRankPenalty, wc.SpectralNormPenalty, wc.OrthogonalityPenalty):
        with pytest.raises(ValueError, match="`strength` must be finite and not negative"):
            kind(-1.0)
    for bad in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="`target` must be finite and not negative"):
            wc.SpectralNormPenalty(1.0, bad)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="`scale` must be positive and finite"):
            wc.OrthogonalityPenalty(1.0, bad)
        with pytest.raises(ValueError, match="`scale` must be positive and finite"):
            wc.IsometryStep(scale=bad)
    for bad in (0.0, 2.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="`theta` must be between 0 and 2"):
            wc.IsometryStep(theta=bad)
    for make in (
        lambda: wc.SpectralNormPenalty(1.0, "1"),  # type: ignore[arg-type]
        lambda: wc.OrthogonalityPenalty(1.0, True),
        lambda: wc.IsometryStep(theta="1"),  # type: ignore[arg-type]
        lambda: wc.IsometryStep(scale="1"),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match="must be a number"):
            make()
    with pytest.raises(TypeError, match="`rules` must be"):
        wc.Regularizer(net(), wc.IsometryStep)  # type: ignore[arg-type]


def test_rules_compare_by_their_arguments() -> None:
    assert wc.SpectralNormPenalty(1.0, 2.0) == wc.SpectralNormPenalty(1.0, 2)
    assert wc.SpectralNormPenalty(1.0) != wc.SpectralNormPenalty(1.0, 2.0)
    assert wc.IsometryStep() == wc.IsometryStep(theta=0.5)
    assert repr(wc.OrthogonalityPenalty(0.1, 2)) == "OrthogonalityPenalty(strength=0.1, scale=2.0)"
