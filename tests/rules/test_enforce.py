"""Enforced limits hold for weights as stored, take the nearest weight and move nothing else."""

import math
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import oracles
import wellcond as wc
from matrices import SPECTRA, kahan, matrices, with_spectrum
from registry import OPERATORS
from wellcond.linalg.projection import are_within_bounds
from wellcond.operators.stored import StoredMatrix
from wellcond.rules.outcome import OutcomeStatus
from wellcond.rules.project import Verdict, project
from wellcond.rules.spectral import SpectralLimit, _status

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LIMITS = [1.5, 10.0, 1000.0, 1e6, math.inf]
INTERVALS = [(None, 1.5), (0.5, None), (0.5, 1.5), (1e-3, 1e3)]


def worst_status(S: Tensor, verdict: Verdict) -> OutcomeStatus:
    return OutcomeStatus(int(_status(StoredMatrix(S), verdict).min()))


def has_passed(S: Tensor, verdict: Verdict) -> bool:
    """Whether the weight passed the gate, so that it was not measured."""
    return worst_status(S, verdict) is OutcomeStatus.unchanged


def enforced(S: Tensor, limit: SpectralLimit, **options: Any) -> tuple[Tensor, Verdict]:
    X = S.clone()
    (verdict,) = project([StoredMatrix(X)], limit, **options)
    assert worst_status(S, verdict) >= OutcomeStatus.not_finite
    return X, verdict


def failure(S: Tensor, limit: SpectralLimit) -> str:
    """Why S cannot satisfy the limit; S remains unchanged."""
    X = S.clone()
    (verdict,) = project([StoredMatrix(X)], limit)
    assert torch.equal(X, S)
    assert worst_status(S, verdict) is OutcomeStatus.unattainable
    return limit.explain(OutcomeStatus.unattainable, S.dtype)


def sigma(S: Tensor) -> np.ndarray:
    """Singular values by NumPy, in units of the largest entry (1 for a zero matrix)."""
    return np.linalg.svd((S.double() / unit(S)).numpy(), compute_uv=False)


def unit(S: Tensor) -> float:
    return float(S.double().abs().max()) or 1.0


def measured(S: Tensor) -> float:
    return float(wc.condition_number(S))


def distance(S: Tensor, target: np.ndarray) -> float:
    return float(np.linalg.norm(target - sigma(S)))


def moved(X: Tensor, S: Tensor) -> float:
    """||X - S||_F in the unit of S."""
    return float(torch.linalg.matrix_norm((X.double() - S.double()) / unit(S)))


def fits(S: Tensor) -> bool:
    return bool(torch.isfinite(S).all())


@hypothesis.given(matrices(), st.sampled_from(LIMITS), st.sampled_from(DTYPES))
@hypothesis.settings(max_examples=200)
def test_condition_limit_holds_as_stored_and_is_nearest(
    M: Tensor, K: float, dtype: torch.dtype
) -> None:
    S = M.to(dtype)
    hypothesis.assume(fits(S))
    X, told = enforced(S, wc.ConditionLimit(K))
    assert X.dtype == dtype
    before = measured(S)
    if not S.any() or before <= K:
        assert torch.equal(X, S)
        return
    assert measured(X) <= K
    u, margin = torch.finfo(dtype).eps / 2, float(told.margin)
    # Rounding changes sigma_nu by at most u ||X||_F; measured changes were 20 times smaller.
    assert margin <= 1e-7 + 4 * K * u * math.sqrt(min(S.shape))
    best = distance(S, oracles.nearest_singular_values(sigma(S), max(1.0, K / (1 + margin))))
    assert moved(X, S) <= best + (1e-6 + u) * np.linalg.norm(sigma(S))
    assert math.isclose(float(told.condition_number), before, rel_tol=1e-6) or before > 1e5


@hypothesis.given(matrices(), st.sampled_from(INTERVALS), st.sampled_from(DTYPES))
@hypothesis.settings(max_examples=200)
def test_singular_value_limit_holds_as_stored_and_is_nearest(
    M: Tensor, bounds: tuple[float | None, float | None], dtype: torch.dtype
) -> None:
    S = M.to(dtype)
    hypothesis.assume(fits(S))
    lower, upper = bounds
    X, told = enforced(S, wc.SingularValueLimit(lower=lower, upper=upper))
    low, high = lower or 0.0, upper or math.inf
    before, after = sigma(S) * unit(S), sigma(X) * unit(X)
    assert low <= after[-1]
    assert after[0] <= high
    u, margin = torch.finfo(dtype).eps / 2, float(told.margin)
    spread = after[0] / max(low, after[-1], 1e-300)
    assert margin <= 1e-7 + 4 * u * min(S.shape) * spread
    if low * (1 + 1e-12) <= before[-1] and before[0] <= high * (1 - 1e-12):
        assert torch.equal(X, S)
    target = np.clip(before, low * (1 + margin), high / (1 + margin))
    rounding = (1e-6 + u) * (np.linalg.norm(before) + np.linalg.norm(after))
    assert moved(X, S) * unit(S) <= np.linalg.norm(target - before) + rounding


@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        (torch.float32, [1e-30, 1e-19, 1e19, 1e30, 1e37]),
        (torch.float64, [1e-305, 1e-300, 1e-160, 1e-150, 1e150, 1e300, 1e305]),
    ],
)
def test_condition_limit_is_scale_invariant(dtype: torch.dtype, scales: list[float]) -> None:
    """Neither squares nor products with K overflow or vanish."""
    for spectrum in ("gap", "graded", "rank-deficient"):
        for shape in ((6, 6), (9, 4), (4, 9)):
            M = with_spectrum(SPECTRA[spectrum](min(shape)).double(), *shape)
            for K in (1.5, 1e4):
                best = distance(M, oracles.nearest_singular_values(sigma(M), K))
                for scale in scales:
                    S = (M * scale).to(dtype)
                    X, _ = enforced(S, wc.ConditionLimit(K))
                    assert measured(X) <= K
                    assert abs(moved(X, S) - best) < 1e-5


@pytest.mark.parametrize("K", [1.5, 10.0, 1e4])
def test_mixed_scales_and_hard_matrices_satisfy_limit(K: float) -> None:
    columns = torch.tensor([1e150, 1.0, 1e-150, 1e-300], dtype=torch.float64)
    mixed = with_spectrum(torch.ones(4, dtype=torch.float64), 7, 4) * columns
    for S in (mixed, mixed.mT, kahan(30, 1.2), torch.ones(5, 5).double(), torch.eye(4)[:3]):
        X, _ = enforced(S.contiguous(), wc.ConditionLimit(K))
        assert measured(X) <= K
        best = distance(S, oracles.nearest_singular_values(sigma(S), K / (1 + 1e-6)))
        assert moved(X, S) <= best + 1e-6 * np.linalg.norm(sigma(S))


def test_matrix_exactly_on_the_bound_is_unchanged() -> None:
    for dtype in DTYPES:
        for diagonal, K in (([2.0, 1.0, 1.0], 2.0), ([3.0, 3.0], 1.0), ([1000.0, 1.0], 1000.0)):
            S = torch.diag(torch.tensor(diagonal)).to(dtype)
            assert torch.equal(enforced(S, wc.ConditionLimit(K))[0], S)
    S = with_spectrum(torch.tensor([2.0, 1.0], dtype=torch.float64), 5, 2)
    assert "rounded to float64" in failure(S, wc.ConditionLimit(1.0))
    column = torch.randn(5, 1)
    assert torch.equal(enforced(column, wc.ConditionLimit(1.0))[0], column)


@pytest.mark.parametrize("K", [2.0, 10.0, 100.0, 1e3, 1e4])
@pytest.mark.parametrize("hint", [math.nan, 1.0])
@pytest.mark.parametrize("gate", [False, True])
def test_no_weight_just_above_its_limit_passes(K: float, hint: float, gate: bool) -> None:
    """Neither the gate nor a Gram matrix whose rounding hides the violation lets it pass."""
    for shape in ((5, 5), (40, 30), (300, 20)):
        nu = min(shape)
        for excess in (-1e-2, -1e-6, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
            kappa = K * (1 + excess)
            for spectrum in (
                kappa ** torch.linspace(0, -1, nu, dtype=torch.float64),
                1 + (1 / kappa - 1) * (torch.arange(nu) == nu - 1).double(),
            ):
                for dtype in (torch.float64, torch.float32):
                    S = with_spectrum(spectrum, *shape).to(dtype)
                    X, told = enforced(
                        S, wc.ConditionLimit(K), gate=gate, condition_number=hint * K
                    )
                    assert measured(X) <= K
                    if measured(S) <= K:
                        assert torch.equal(X, S)
                    else:
                        assert not has_passed(S, told)


@pytest.mark.parametrize("K", [2.0, 10.0, 1e3, 1e4])
def test_gate_passes_weights_five_percent_inside(K: float) -> None:
    for shape in ((5, 5), (40, 30), (20, 300)):
        for spectrum in (
            (K / 1.05) ** torch.linspace(0, -1, min(shape), dtype=torch.float64),
            1 + (1.05 / K - 1) * (torch.arange(min(shape)) == 0).double(),
        ):
            S = with_spectrum(spectrum, *shape)
            X, told = enforced(S, wc.ConditionLimit(K), gate=True)
            assert has_passed(S, told)
            assert math.isnan(float(told.excess))
            assert torch.equal(X, S)
            largest = float(spectrum.max())
            assert has_passed(
                S, enforced(S, wc.SingularValueLimit(upper=1.05 * largest), gate=True)[1]
            )


@hypothesis.given(matrices(), st.floats(0.2, 5), st.floats(0.2, 5))
@hypothesis.settings(max_examples=200)
def test_are_within_bounds_never_accepts_a_violation(S: Tensor, low: float, high: float) -> None:
    values = sigma(S) * unit(S)
    G = StoredMatrix(S).gram(torch.float64)
    each = {(a, b) for a in (low, values[-1]) for b in (high, values[0])}
    for a, b in each | {(0.0, b) for _, b in each} | {(a, math.inf) for a, _ in each}:
        bounds = (torch.tensor(x, dtype=torch.float64) for x in (a, b))
        if bool(are_within_bounds(G, *bounds)):
            assert values[-1] >= a * (1 - 1e-14)
            assert values[0] <= b * (1 + 1e-14)
    if fits(G) and 0 < values[0] < 1e3:
        wide = torch.tensor([0.0, 1.01 * values[0]], dtype=torch.float64)
        assert are_within_bounds(G, *wide)


@pytest.mark.parametrize("kappa", [2.0, 1e2, 1e4, 1e6])
def test_are_within_bounds_accounts_for_rounding(kappa: float) -> None:
    """Without a margin, the factorisation would succeed here."""
    for shape in ((6, 6), (200, 30)):
        for seed in range(5):
            spectrum = kappa ** torch.linspace(0, -1, min(shape), dtype=torch.float64)
            S = with_spectrum(spectrum, *shape, seed)
            G, values = StoredMatrix(S).gram(torch.float64), torch.from_numpy(sigma(S)) * unit(S)
            for excess in (1e-14, 1e-12, 1e-10, 1e-8, 1e-6):
                assert not are_within_bounds(G, values[-1] * (1 + excess), values[0] * 2)
                assert not are_within_bounds(G, values[-1] / 2, values[0] * (1 - excess))


@pytest.mark.parametrize("K", [1.5, 3.0, 10.0, 100.0])
def test_float32_agrees_with_float64(K: float) -> None:
    """A hint that float32 suffices costs a margin of order u kappa^2 and causes no violation."""
    u = torch.finfo(torch.float32).eps / 2
    for kappa in (2.0, 5.0, 30.0, 300.0, 1e4, math.inf):
        for shape in ((60, 60), (200, 50), (50, 200)):
            spectrum = kappa ** torch.linspace(0, -1, 50, dtype=torch.float64)
            S = with_spectrum(spectrum, *shape).float()
            exact, told = enforced(S, wc.ConditionLimit(K))
            for hint in (2.0, min(kappa, 1e30)):
                X, hinted = enforced(S, wc.ConditionLimit(K), condition_number=hint)
                assert measured(X) <= K
                assert hinted.margin <= told.margin + 11 * u * (min(kappa, 60.0) ** 2 + 1)
                torch.testing.assert_close(X, exact, rtol=0, atol=2 * float(hinted.margin) + 1e-6)


@pytest.mark.parametrize("smallest", [3e-3, 3e-4, 3e-5, 1e-6, 0.0])
def test_upper_bound_ignores_small_singular_values(smallest: float) -> None:
    """Their float32 rounding errors have no effect; they once shrank a weight to 1/13."""
    values = torch.cat([torch.linspace(1.2, 0.3, 99), torch.tensor([smallest])]).double()
    S = with_spectrum(values, 100, 100).float()
    X, told = enforced(S, wc.SingularValueLimit(upper=1.0), condition_number=4.0)
    assert 1 - 1e-5 < sigma(X)[0] * unit(X) <= 1
    assert float(told.margin) < 1e-5
    target = np.minimum(sigma(S), 1 / unit(S))
    assert moved(X, S) <= distance(S, target) * (1 + 1e-3)


def test_enforce_stack_independent() -> None:
    """A satisfied limit, an exceeded one, singular, zero, not finite, and extreme scales."""
    K, shape = 3.0, (6, 4)
    fine = with_spectrum(torch.tensor([2.0, 2, 1, 1]).double(), *shape)
    bad = with_spectrum(torch.tensor([9.0, 2, 1, 1]).double(), *shape, seed=1)
    flat = with_spectrum(torch.tensor([9.0, 2, 1, 0]).double(), *shape, seed=2)
    broken = fine.clone()
    broken[0, 0] = math.nan
    each = [fine, bad, flat, torch.zeros(shape).double(), broken, bad * 1e-200, bad * 1e200]
    for S in (torch.stack(each), torch.stack(each + each).reshape(2, 7, *shape)):
        X, told = enforced(S, wc.ConditionLimit(K))
        assert told.margin.shape == S.shape[:-2]
        for before, after in zip(S.reshape(-1, *shape), X.reshape(-1, *shape), strict=True):
            same = torch.equal(before.nan_to_num(), after.nan_to_num())
            if not before.any() or not fits(before) or measured(before) <= K:
                assert same
                continue
            alone, _ = enforced(before, wc.ConditionLimit(K))
            assert measured(after) <= K
            torch.testing.assert_close(after / unit(before), alone / unit(before))


def test_batched_weights_match_single_weights() -> None:
    for dtype in DTYPES:
        each = [with_spectrum(SPECTRA[name](5).double(), 9, 5).to(dtype) for name in SPECTRA]
        each = [S for S in each if fits(S)]
        together = [S.clone() for S in each]
        told = project([StoredMatrix(S) for S in together], wc.ConditionLimit(4.0))
        for S, X, one in zip(each, together, told, strict=True):
            alone, own = enforced(S, wc.ConditionLimit(4.0))
            torch.testing.assert_close(X, alone, atol=torch.finfo(dtype).eps * unit(S), rtol=1e-6)
            assert math.isclose(float(one.excess), float(own.excess), rel_tol=1e-6) or (
                math.isnan(own.excess) == math.isnan(one.excess)
            )


@pytest.mark.parametrize("dtype", DTYPES[2:])
def test_unattainable_limit_leaves_weight_unchanged(dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(0)
    S = torch.randn(64, 64, generator=source).to(dtype)
    for limit in (wc.ConditionLimit(1.0005), wc.SingularValueLimit(lower=1.3, upper=1.3)):
        assert f"when rounded to {str(dtype)[6:]}" in failure(S, limit)
    before = torch.stack([torch.eye(64).to(dtype), S])
    assert "rounded to" in failure(before, wc.ConditionLimit(1.0005))
    together = [before[1].clone(), 100 * before[0], before[1].clone()]
    found = project([StoredMatrix(X) for X in together], wc.ConditionLimit(1.0005))
    assert [worst_status(before, one) >= 0 for one in found] == [0, 1, 0]
    assert torch.equal(together[1], 100 * before[0])


# The groups of a convolution are one map with one limit: see test_groups.
APART = [n for n, c in OPERATORS.items() if len(c.parameters()) == 1 and n != "groups with gaps"]


@pytest.mark.parametrize(
    "limit", [wc.ConditionLimit(1.5), wc.SingularValueLimit(lower=0.8, upper=1.3)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", APART)
def test_limit_changes_only_its_view_of_the_parameter(
    name: str, dtype: torch.dtype, limit: SpectralLimit
) -> None:
    case = OPERATORS[name]
    (parameter,) = (p.to(dtype) for p in case.parameters())
    before = parameter.clone()
    S = case.operator([parameter])
    assert isinstance(S, StoredMatrix)
    project([S], limit)
    matrix = case.twin(parameter).double()
    expected, _ = enforced(case.twin(before).contiguous(), limit)
    torch.testing.assert_close(
        matrix, expected.double(), rtol=0, atol=2 * torch.finfo(dtype).eps * unit(before)
    )
    values = torch.linalg.svdvals(matrix)
    if isinstance(limit, wc.ConditionLimit):
        assert (values[..., 0] <= 1.5 * values[..., -1]).all()
    else:
        assert values.max() <= 1.3
        assert values.min() >= 0.8
    touched = torch.zeros_like(before, dtype=torch.float64)
    twin = case.twin(touched.requires_grad_())
    (touched,) = torch.autograd.grad(twin.sum(), touched)
    assert torch.equal(parameter[touched == 0], before[touched == 0])


def test_weights_of_modules_are_limited_through_their_views() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(8, 2),
            "grouped": nn.Conv2d(4, 8, 3, groups=2),
            "last": nn.Conv2d(3, 6, 3).to(memory_format=torch.channels_last),
        }
    )
    assert model["last"].weight.is_contiguous(memory_format=torch.channels_last)
    reg = wc.Regularizer(model, wc.ConditionLimit(1.2))
    reg.enforce()
    each = [
        *model["attention"].in_proj_weight.chunk(3),
        model["attention"].out_proj.weight,
        *model["grouped"].weight.flatten(1).chunk(2),
        model["last"].weight.flatten(1),
    ]
    assert max(measured(S) for S in each) <= 1.2
    assert model["last"].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "shape", [(255, 255), (256, 256), (257, 257), (600, 600), (300, 257), (257, 300), (17 * 40, 40)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gram_matrix_matches_dense_twin(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Sizes around the width of its blocks, and more than sixteen bands."""
    S = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    long = (S if shape[0] >= shape[1] else S.mT).double()
    G = StoredMatrix(S).gram(torch.float64)
    torch.testing.assert_close(G, long.mT @ long, rtol=0, atol=1e-11)
    large = StoredMatrix(torch.stack([S, 2 * S])).gram(torch.float64)
    torch.testing.assert_close(large, torch.stack([G, 4 * G]))


def test_enforce_is_idempotent() -> None:
    for dtype in DTYPES:
        for K in (1.5, 1e3, 1e4):
            S = with_spectrum(2 * K ** torch.linspace(0, -2, 20).double(), 40, 20).to(dtype)
            try:
                once, _ = enforced(S, wc.ConditionLimit(K))
            except ValueError:
                assert dtype in DTYPES[2:]  # 8 or 11 bits cannot represent kappa <= 1e4
                continue
            assert torch.equal(enforced(once, wc.ConditionLimit(K))[0], once)
            assert torch.equal(enforced(once, wc.ConditionLimit(K), condition_number=K)[0], once)


def test_device_without_float64_uses_a_cpu_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    class Elsewhere(torch.Tensor):
        def cpu(self, *args: object, **kwargs: object) -> Tensor:
            asked.append(self.shape)
            return self.as_subclass(torch.Tensor).clone()

    monkeypatch.setattr("wellcond.operators.stored._NARROW_DEVICES", {"cpu"})
    S = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).as_subclass(Elsewhere)
    project([StoredMatrix(S)], wc.ConditionLimit(2.0))
    assert asked == [(8, 6)]
    assert float(wc.condition_number(S.as_subclass(torch.Tensor))) <= 2.0


@pytest.mark.parametrize("scale", [1e200, 1e-200])
@pytest.mark.parametrize("stacked", [False, True])
def test_bound_holds_if_squares_overflow_or_vanish(scale: float, stacked: bool) -> None:
    source = torch.Generator().manual_seed(0)
    S = torch.randn(3, 6, 4, generator=source, dtype=torch.float64)
    S[1] *= scale
    for limit in (wc.SingularValueLimit(upper=0.5 * scale), wc.SingularValueLimit(upper=0.5)):
        each = [enforced(S, limit)[0]] if stacked else [enforced(X, limit)[0] for X in S]
        for X in torch.stack(each).flatten(0, -3):
            assert sigma(X / limit.upper).max() * unit(X / limit.upper) <= 1 + 1e-8


def test_bound_holds_in_float32_after_weight_becomes_huge() -> None:
    X = 1e25 * torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    found, _ = enforced(X, wc.SingularValueLimit(upper=1.0), condition_number=1.5)
    assert torch.linalg.svdvals(found.double()).max() <= 1
