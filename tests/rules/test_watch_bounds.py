"""Limits of watched weights: trigger, target and description."""

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import wellcond as wc
from matrices import with_spectrum

SPECTRA = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20)


@hypothesis.given(SPECTRA, st.floats(1.0, 50.0), st.floats(0.1, 100.0), st.floats(1.0, 3.0))
def test_both_bounds_hold_in_the_nearest_spectrum(
    values: list[float], K: float, upper: float, headroom: float
) -> None:
    limit = wc.ConditionLimit(K, upper=upper, headroom=headroom)
    sigma = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    clipped = limit.clip(sigma, torch.zeros((), dtype=torch.float64))
    assert float(limit.excess(clipped[0], clipped[-1])) <= 1 + 1e-12
    # No interval [t/K, t] of a fine grid is nearer.
    distance = float((clipped - sigma).norm())
    for t in torch.linspace(1e-4, 1, 400, dtype=torch.float64) * min(upper, float(sigma[0])):
        assert distance <= float((sigma.clamp(t / K, t) - sigma).norm()) + 1e-9
    if float(limit.excess(sigma[0], sigma[-1])) <= 1:
        assert torch.allclose(clipped, sigma)
    moved = limit.move(sigma)
    inside = limit.trigger.excess(sigma[0], sigma[-1]) <= 1
    assert torch.equal(moved, sigma) if inside else True
    assert float(limit.excess(moved[0], moved[-1])) <= 1 + 1e-12


@hypothesis.given(SPECTRA, st.floats(0.1, 1.0), st.floats(1.0, 10.0), st.floats(1.0, 2.0))
def test_a_move_stays_within_absolute_bounds(
    values: list[float], lower: float, upper: float, headroom: float
) -> None:
    sigma = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    for limit in (
        wc.SingularValueLimit(lower=lower, upper=upper, headroom=headroom),
        wc.SingularValueLimit(lower=lower, headroom=headroom),
        wc.SingularValueLimit(upper=upper, headroom=headroom),
    ):
        moved = limit.move(sigma)
        assert float(limit.excess(moved[0], moved[-1])) <= 1 + 1e-12
        assert bool((moved.diff() <= 1e-12).all())


def test_an_upper_bound_leaves_room_only_where_many_values_are_near_it() -> None:
    limit = wc.SingularValueLimit(upper=1.0)
    few = torch.tensor([1.3] * 5 + [0.8] * 30)
    many = torch.tensor([1.3] * 5 + [0.95] * 30)
    assert limit.move(few).max() == 1
    assert limit.move(many).max() == pytest.approx(1 / 1.2)
    assert limit.move(torch.tensor([1.3] * 5)).max() == 1  # the block contains all values


def test_kappa_and_sigma_are_limited_together_as_stored() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(30, 40)
    with torch.no_grad():
        layer.weight.copy_(with_spectrum(torch.linspace(5, 0.01, 30).double(), 40, 30))
    wc.Regularizer(layer, wc.ConditionLimit(4, upper=2)).enforce()
    sigma = torch.linalg.svdvals(layer.weight.detach().double())
    assert sigma[0] <= 2
    assert sigma[0] / sigma[-1] <= 4
    assert sigma[0] > 1.999
    with torch.no_grad():
        layer.weight.mul_(0.5)  # below the upper bound, only kappa is limited
    before = layer.weight.detach().clone()
    wc.Regularizer(layer, wc.ConditionLimit(4.001, upper=2)).enforce()
    assert torch.equal(layer.weight, before)


def test_repr_is_the_constructor_call() -> None:
    assert repr(wc.ConditionLimit(10)) == "ConditionLimit(max_condition=10)"
    assert repr(wc.ConditionLimit(10, upper=2, headroom=1.1)) == (
        "ConditionLimit(max_condition=10, upper=2, headroom=1.1)"
    )
    assert repr(wc.SingularValueLimit(upper=1.5)) == "SingularValueLimit(upper=1.5)"
    assert wc.ConditionLimit(10) == wc.ConditionLimit(10.0)
    assert hash(wc.ConditionLimit(10, upper=1)) == hash(wc.ConditionLimit(10, upper=1.0))


@pytest.mark.parametrize("value", [0.5, 0, -1, math.nan, math.inf])
def test_a_headroom_is_at_least_one(value: float) -> None:
    for make in (
        lambda: wc.ConditionLimit(10, headroom=value),
        lambda: wc.SingularValueLimit(upper=1, headroom=value),
    ):
        with pytest.raises(ValueError, match="`headroom` must be finite and at least 1"):
            make()
    with pytest.raises(TypeError, match="`headroom`"):
        wc.ConditionLimit(10, headroom="1.2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`upper` must be positive and finite"):
        wc.ConditionLimit(10, upper=0)


def test_repr_describes_when_weights_are_projected_or_not_watched() -> None:
    model = nn.ModuleDict(
        {name: nn.Linear(40, 40) for name in ("kappa", "both", "upper", "one", "mine")}
    )

    class Mine(wc.Limit):
        def apply(self, S: torch.Tensor) -> torch.Tensor:
            return S

    rules = {
        "kappa.*": wc.ConditionLimit(10),
        "both.*": wc.SingularValueLimit(lower=0.5, upper=2.0),
        "upper.*": wc.SingularValueLimit(upper=2.0),
        "one.*": wc.ConditionLimit(1.2),
        "mine.*": Mine(),
    }
    reg = wc.Regularizer(model, rules)
    reg.attach(torch.optim.SGD(model.parameters(), 0.1))
    text = repr(reg)
    assert "watched: projected to κ 7 when κ exceeds 9.73" in text
    assert "σ_ν is raised to 0.6 when it falls below" in text
    assert "watched: σ₁ is clipped to 2 after every step" in text
    assert "not watched, because K is below 1.5, so all singular values are close together" in text
    assert text.count("; watched:") == 3
    reg.detach()
    reg.attach(torch.optim.SGD(model.parameters(), 0.1), every="auto")
    assert "close together: scheduled by its learning rates" in repr(reg)


def test_repr_counts_in_words() -> None:
    layer = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.linspace(1.0, 8.0, 8)))
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    reg = wc.Regularizer(layer, wc.ConditionLimit(2.0))
    handle = reg.attach(optimizer)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    assert "projected once in 1 step, decomposed once" in repr(reg)
    optimizer.step()
    assert "projected once in 2 steps, decomposed once" in repr(reg)
    handle.remove()
    assert "detached after 2 steps" in repr(reg)


def test_repr_of_an_acting_limit_before_it_is_applied() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    acting = wc.SingularValueLimit(upper=1.0, acting=True)
    reg = wc.Regularizer(model, {"0.*": acting, "1.*": wc.SingularValueLimit(upper=1.0)})
    first, second = (line for line in repr(reg).splitlines() if ".weight  " in line)
    assert "acting=True" in first
    assert "acting" not in second
