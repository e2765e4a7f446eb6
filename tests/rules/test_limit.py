"""ConditionLimit and SingularValueLimit: every step gives a nearest weight within the limit."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import wellcond as wc
from matrices import with_spectrum


def trained(model: nn.Module, every: int, steps: int, K: float) -> tuple[wc.Regularizer, list]:
    """The largest kappa of the weights after every optimizer step."""
    reg = wc.Regularizer(model, wc.ConditionLimit(K))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    reg.attach(optimizer, every=every)
    source = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    kappas = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 6, generator=source).to(dtype)).square().mean().backward()
        optimizer.step()
        weights = [p for p in model.parameters() if p.ndim == 2]
        kappas.append(max(float(wc.condition_number(w)) for w in weights))
    return reg, kappas


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("every", [1, 3])
def test_every_nth_step_ends_within_the_limit(dtype: torch.dtype, every: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    _, kappas = trained(model, every, 9, 1.5)
    assert all(kappa <= 1.5 for kappa in kappas[every - 1 :: every])
    if every > 1:
        assert max(kappas) > 1.5  # otherwise the limit is not tested


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (10, 10)])
def test_step_gives_the_nearest_matrix(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], bias=False)
    before = layer.weight.detach().clone()
    wc.Regularizer(layer, wc.ConditionLimit(4.0)).proximal_step(lr=0.0)
    torch.testing.assert_close(layer.weight.detach(), wc.nearest(before, 4.0), rtol=1e-5, atol=1e-6)


def test_a_weight_within_the_limit_is_untouched_bit_for_bit() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 8, bias=False)
    before = layer.weight.detach().clone()
    wc.Regularizer(layer, wc.ConditionLimit(1e9)).proximal_step(lr=1.0, steps=5)
    assert torch.equal(layer.weight, before)


def test_loss_and_gradients_raise_before_any_change() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    reg = wc.Regularizer(model, {"0.*": wc.ConditionPenalty(0.1), "1.*": wc.ConditionLimit(2.0)})
    for way in (reg, reg.add_gradients):
        with pytest.raises(ValueError, match=r'"1\.weight" is under a hard limit'):
            way()
    assert model[0].weight.grad is None
    reg.proximal_step(0.1)  # both together by proximal steps
    assert float(wc.condition_number(model[1].weight)) <= 2.0


def test_views_stacks_and_kernels_are_limited_in_place() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(8, 2),
            "conv": nn.Conv2d(3, 6, 3).to(memory_format=torch.channels_last),
        }
    )
    wc.Regularizer(model, wc.ConditionLimit(1.2)).proximal_step(0.0)
    for block_size in model["attention"].in_proj_weight.chunk(3):
        assert float(wc.condition_number(block_size)) <= 1.2
    assert float(wc.condition_number(model["conv"].weight.flatten(1))) <= 1.2
    stack = nn.Module()
    stack.register_parameter("experts", nn.Parameter(torch.randn(3, 4, 5)))
    wc.Regularizer(stack, {"experts": wc.ConditionLimit(1.2)}).proximal_step(0.0)
    assert (wc.condition_number(stack.experts) <= 1.2).all()


def test_measure_does_not_decompose_and_has_no_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("svd", "svdvals", "eigh", "eigvalsh", "cholesky_ex"):
        real = getattr(torch.linalg, name)

        def small(A: torch.Tensor, *args: Any, real: Any = real, **kwargs: Any) -> Any:
            assert max(A.shape[-2:]) <= 40, f"{real.__name__} of a whole weight"
            return real(A, *args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, small)
    layer = nn.Linear(80, 100)
    reg = wc.Regularizer(layer, wc.ConditionLimit(2.0), block_size=4)
    estimate = reg.measure()["weight"]
    assert math.isnan(estimate.penalty)
    assert math.isnan(estimate.strength)
    assert estimate.sigma_max > 0
    logged = reg.log(lambda values, step: None, step=0, layers=True)
    assert logged is not None
    assert all(math.isfinite(value) for value in logged.values())


def test_limit_is_not_a_penalty_and_error_names_alternative() -> None:
    layer = nn.Linear(4, 4, bias=False)
    limit = wc.ConditionLimit(2.0)
    assert isinstance(limit, wc.Limit)
    assert not isinstance(limit, wc.Penalty)
    reg = wc.Regularizer(layer, limit)
    for call in (reg, reg.add_gradients):
        with pytest.raises(
            ValueError, match=r"hard limit.*Use attach\(optimizer\) or proximal_step"
        ):
            call()
    reg.proximal_step(0.0)
    assert float(wc.condition_number(layer.weight)) <= 2.0


def test_measuring_names_weights_that_are_not_finite() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        model[1].weight.copy_(torch.diag(torch.tensor([9.0, 1.0, 1.0, 1.0])))
    reg = wc.Regularizer(model, wc.ConditionLimit(2.0))
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    assert "not finite" in reg.measure()["0.weight"].status


def test_zero_weight_is_unchanged_and_nan_weight_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    reg = wc.Regularizer(model, wc.ConditionLimit(2.0))
    with torch.no_grad():
        model[0].weight.zero_()
    reg.proximal_step(0.1)
    assert not model[0].weight.any()
    with torch.no_grad():
        model[1].weight[2, 2] = math.inf
    with pytest.raises(ValueError, match=r'"1\.weight" contains NaN or infinity'):
        reg.proximal_step(0.1)


def test_error_names_bfloat16_for_limit_near_one() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False).bfloat16()
    with pytest.raises(ValueError, match="rounded to bfloat16"):
        wc.Regularizer(layer, wc.ConditionLimit(1.001)).proximal_step(0.0)


def test_training_resumes_bit_for_bit() -> None:
    def make() -> tuple[nn.Module, wc.Regularizer, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        reg = wc.Regularizer(model, wc.ConditionLimit(2.0))
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        reg.attach(optimizer, every=3)
        return model, reg, optimizer

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    whole, _, optimizer = make()
    train(whole, optimizer, 0, 8)
    half, reg, optimizer = make()
    train(half, optimizer, 0, 4)
    states = half.state_dict(), reg.state_dict(), optimizer.state_dict()
    rest, reg, optimizer = make()
    for thing, state in zip((rest, reg, optimizer), states, strict=True):
        thing.load_state_dict(state)
    train(rest, optimizer, 4, 8)
    for ours, theirs in zip(rest.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("K", "error"), [(0.9, ValueError), (math.nan, ValueError), ("1", TypeError)]
)
def test_max_condition_must_be_a_number_of_at_least_one(K: object, error: type) -> None:
    with pytest.raises(error, match="max_condition"):
        wc.ConditionLimit(K)  # type: ignore[arg-type]


# --- bounds of singular values --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "error", "says"),
    [
        ({}, ValueError, "`lower` or `upper` must be given"),
        ({"lower": 0.0}, ValueError, "`lower` must be positive and finite, got 0.0"),
        ({"upper": -1.0}, ValueError, "`upper` must be positive"),
        ({"upper": math.inf}, ValueError, "`upper` must be positive and finite"),
        ({"lower": math.nan}, ValueError, "`lower` must be positive"),
        ({"lower": 2.0, "upper": 1.0}, ValueError, "lower=2.0 and upper=1.0"),
        ({"lower": "1"}, TypeError, "`lower` must be a number or None, got str"),
        ({"upper": True}, TypeError, "`upper` must be a number or None, got bool"),
    ],
)
def test_bounds_are_positive_numbers_in_order(
    bounds: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        wc.SingularValueLimit(**bounds)


def test_equal_bounds_leave_no_room_for_rounding() -> None:
    layer = nn.Linear(8, 8, bias=False)
    before = layer.weight.detach().clone()
    with pytest.raises(
        ValueError, match=r'"weight": no nearby weight satisfies .*lower=1, upper=1'
    ):
        wc.Regularizer(layer, wc.SingularValueLimit(lower=1, upper=1)).enforce()
    assert torch.equal(layer.weight, before)


def test_lower_bound_changes_zero_weight_deterministically() -> None:
    weights = []
    for _ in range(2):
        layer = nn.Linear(5, 8, bias=False)
        nn.init.zeros_(layer.weight)
        wc.Regularizer(layer, wc.SingularValueLimit(lower=0.5)).enforce()
        sigma = torch.linalg.svdvals(layer.weight.detach().double())
        torch.testing.assert_close(sigma, torch.full_like(sigma, 0.5))
        assert sigma.min() >= 0.5
        weights.append(layer.weight.detach())
    assert torch.equal(*weights)
    wc.Regularizer(layer, wc.SingularValueLimit(upper=0.25)).enforce()
    nn.init.zeros_(layer.weight)
    wc.Regularizer(layer, wc.SingularValueLimit(upper=0.25)).enforce()
    assert not layer.weight.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [4, 32])
def test_upper_bound_holds_nearly_by_block_and_exactly_by_enforce(
    dtype: torch.dtype, block_size: int
) -> None:
    """Few values are above the bound, or more than the block contains."""
    coarse = 4 * torch.finfo(dtype).eps
    for above in (2, 20):
        sigma = torch.cat([torch.linspace(1.6, 5, above), torch.linspace(0.1, 1.2, 40 - above)])
        M = with_spectrum(sigma.double().flip(0), 60, 40)
        layer = nn.Linear(40, 60, bias=False, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(M)
        reg = wc.Regularizer(layer, wc.SingularValueLimit(upper=1.5), block_size=block_size)
        for step in range(4):
            reg.proximal_step(0.1)
            largest = float(torch.linalg.svdvals(layer.weight.detach().double())[0])
            assert largest <= (1.5 if step == 0 else 1.5 * (1.05 + coarse))  # 1.65 before
            with torch.no_grad():  # as much as training moves it between two applications
                if step == 0:
                    U, s, Vh = torch.linalg.svd(layer.weight.double(), full_matrices=False)
                    target = (U * s.clamp(max=1.5)) @ Vh
                    torch.testing.assert_close(
                        target, layer.weight.double(), rtol=0, atol=2 * coarse
                    )
                layer.weight.mul_(1.1)
        reg.enforce()
        sigma = torch.linalg.svdvals(layer.weight.detach().double())
        assert sigma[0] <= 1.5


def test_upper_bound_needs_no_decomposition_with_warm_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = nn.Linear(60, 50, bias=False)
    sigma = torch.cat([torch.linspace(3, 2.6, 5), torch.linspace(1.5, 0.1, 45)]).double()
    M = with_spectrum(sigma, 50, 60)
    with torch.no_grad():
        layer.weight.copy_(M)
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    layer.weight.grad = torch.zeros_like(layer.weight)
    reg = wc.Regularizer(layer, wc.SingularValueLimit(upper=2.5))
    reg.attach(optimizer)
    optimizer.step()
    for name in ("svd", "svdvals", "eigh", "eigvalsh"):
        real = getattr(torch.linalg, name)

        def small(A: torch.Tensor, *args: Any, real: Any = real, **kwargs: Any) -> Any:
            assert max(A.shape[-2:]) <= 16, f"{real.__name__} of a whole weight"
            return real(A, *args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, small)
    for _ in range(3):
        with torch.no_grad():
            layer.weight.mul_(1.1)
        optimizer.step()
    monkeypatch.undo()
    assert float(torch.linalg.svdvals(layer.weight.detach())[0]) <= 2.5 * 1.001  # 1.1 before
    estimate = reg.measure()["weight"]
    assert estimate.sigma_before == pytest.approx(2.75, rel=1e-3)
    assert estimate.excess is not None
    assert estimate.excess <= 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weight_within_bounds_is_unchanged_bit_for_bit(dtype: torch.dtype) -> None:
    for limit in (
        wc.SingularValueLimit(upper=2.1),
        wc.SingularValueLimit(lower=0.9),
        wc.SingularValueLimit(lower=0.9, upper=2.1),
    ):
        layer = nn.Linear(8, 12, bias=False, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(with_spectrum(torch.linspace(2, 1, 8).double(), 12, 8))
        before = layer.weight.detach().clone()
        reg = wc.Regularizer(layer, limit, block_size=4)
        for _ in range(3):
            reg.proximal_step(0.1)
        reg.enforce()
        assert torch.equal(layer.weight, before)


def test_upper_bound_holds_after_large_steps() -> None:
    """A large step changes the leading vectors, so the block is out of date."""
    layer = nn.Linear(60, 60, bias=False)
    reg = wc.Regularizer(layer, wc.SingularValueLimit(upper=1.0), block_size=8)
    reg.proximal_step(0.1)
    for seed in range(20):
        source = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            layer.weight.add_(0.1 * torch.randn(60, 60, generator=source))
        reg.proximal_step(0.1)
        assert float(torch.linalg.svdvals(layer.weight.detach().double())[0]) <= 1.001


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_unattainable_limit_error_names_a_valid_remedy(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    reg = wc.Regularizer(nn.Linear(6, 8, dtype=dtype), wc.ConditionLimit(1))
    with pytest.raises(ValueError, match="Widen the limit") as caught:
        reg.enforce()
    assert ("wider dtype" in str(caught.value)) == (dtype != torch.float64)


@pytest.mark.parametrize("nu", [1, 2, 3, 20, 40])
def test_watched_weight_with_nan_is_named_for_every_size(nu: int) -> None:
    # An eigenvalue solver may return finite numbers for a matrix (2, 2) with NaN.
    layer = nn.Linear(nu, 50, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    layer.weight.grad = torch.zeros_like(layer.weight)
    wc.Regularizer(layer, wc.SingularValueLimit(upper=1.5)).attach(optimizer)
    optimizer.step()
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match='"weight" contains NaN or infinity'):
        optimizer.step()
