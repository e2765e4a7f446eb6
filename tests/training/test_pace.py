"""Hard limits that cannot be watched, under `every="auto"`, and limits written by users.

When they are due by the learning rates, their state, and its description.
"""

import io
import itertools
import math
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import wellcond as wc
from wellcond.rules.pace import Pace

K = 3.0


class Paced(wc.ConditionLimit):
    """A limit under which no weight can be watched."""

    def watch(self, nu: int) -> str:
        return "a test forbids it"


@hypothesis.given(
    st.integers(1, 9), st.floats(0.0, 10.0), st.integers(1, 2000), st.floats(0.0, 20.0)
)
def test_pace_waits_for_its_budget_at_most_1000_steps(
    applications: int, budget: float, steps: int, rate: float
) -> None:
    pace = Pace(applications, budget)
    due = pace.due(steps, rate)
    if steps >= 1000:
        assert due
    if due:
        assert steps >= min(2 ** (applications - 1), 10)
        assert steps >= 1000 or (rate >= budget and rate > 0)
        assert pace.due(steps + 1, rate + 1)
    elif steps >= 10:
        assert rate < budget or rate == 0
    assert Pace().due(steps, rate)  # how the weight was initialised is unknown


@hypothesis.given(st.floats(1e-6, 1e3), st.floats(0.1, 1e6), st.floats(0.1, 1e6))
def test_larger_excess_shortens_the_budget(rate: float, one: float, other: float) -> None:
    low, high = sorted((one, other))
    longer, shorter = (Pace(excess=x).budget_after(rate) for x in (low, high))
    assert rate / 4 <= shorter <= longer <= 2 * rate
    assert math.isclose(Pace(excess=1.23).budget_after(rate), rate)
    assert math.isclose(Pace(passed=True).budget_after(rate), 1.25 * rate)
    assert Pace(excess=math.nan).budget_after(rate) == rate


@hypothesis.given(
    st.floats(1.0, 1e9) | st.sampled_from([math.inf, math.nan]),
    st.floats(1.0, 1e9) | st.sampled_from([math.inf, math.nan]),
    st.booleans(),
)
def test_pace_tensor_round_trip(excess: float, kappa: float, passed: bool) -> None:
    for pace in (Pace(7, 0.3, excess, kappa, 42, passed, 2**32 - 1), Pace()):
        again = Pace.from_tensor(pace.to_tensor())
        assert repr(again) == repr(pace)
        assert torch.equal(again.to_tensor(), pace.to_tensor())
        assert pace.to_tensor().shape == Pace().to_tensor().shape


def net(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(*each) for each in itertools.pairwise(sizes)))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    width = model[0].in_features  # type: ignore[index]
    x = torch.randn(8, width, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    (model(x) - x[:, :1].sin()).square().mean().backward()
    optimizer.step()


def applied(reg: wc.Regularizer) -> set[str]:
    return {state.name for state in reg._states if state.pending_steps == 0}


RATES: dict[str, Callable[[int], float]] = {
    "warm-up": lambda step: 0.02 * min(1, (step + 1) / 60),
    "decay": lambda step: 0.03 * 0.99**step,
    "jump": lambda step: 0.001 + 0.031 * (step > 70),
}


@pytest.mark.parametrize("schedule", RATES)
def test_limits_hold_when_applied_and_shapes_take_turns(schedule: str) -> None:
    model = net(6, 8, 8, 8, 4)
    optimizer = torch.optim.Adam(model.parameters(), 1.0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, RATES[schedule])
    reg = wc.Regularizer(model, Paced(K))
    reg.attach(optimizer, every="auto")
    weights = {state.name: state.weight.parameters[0] for state in reg._states}
    times: dict[str, list[int]] = {name: [] for name in weights}
    for number in range(250):
        step(model, optimizer, number)
        names = applied(reg)
        assert len({weights[name].shape for name in names}) <= 1
        for name in names:
            times[name].append(number)
            assert float(wc.condition_number(weights[name])) <= K
        rates.step()
    assert sorted(each[0] for each in times.values()) == [0, 1, 1, 2]
    for each in times.values():
        gaps = [after - before for before, after in itertools.pairwise(each)]
        assert all(gap >= least for gap, least in zip(gaps, (1, 2, 4, 8), strict=False))
        assert min(gaps[4:]) >= 10
        assert 7 < len(each) < 27


def test_weight_within_its_limit_is_decomposed_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = net(6, 8)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8, 6))
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    reg = wc.Regularizer(model, Paced(K))
    reg.attach(optimizer, every="auto")
    before = model[0].weight.detach().clone()
    times = []
    for number in range(200):
        if number == 1:  # known to be within its limit: two Cholesky factorisations suffice
            monkeypatch.delattr(torch.linalg, "eigh")
            monkeypatch.delattr(torch.linalg, "svd")
        step(model, optimizer, number)
        times += [number] * bool(applied(reg))
    assert times[:6] == [0, 1, 3, 7, 15, 25]
    ratios = [(c - b) / (b - a) for a, b, c in zip(times[4:], times[5:], times[6:], strict=False)]
    assert all(1 < ratio < 1.5 for ratio in ratios)
    assert torch.allclose(model[0].weight, before, atol=1e-3)
    assert "within its limit at the last application" in repr(reg)
    monkeypatch.undo()
    assert reg.measure()["0.weight"].excess is None


def test_zero_learning_rate_is_due_only_once() -> None:
    model = net(6, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    reg = wc.Regularizer(model, Paced(K))
    reg.attach(optimizer, every="auto")
    for number in range(50):
        step(model, optimizer, number)
        assert bool(applied(reg)) == (number == 0)


def test_tensor_learning_rate() -> None:
    weights, times = [], []
    for lr in (0.01, torch.tensor(0.01, dtype=torch.float64)):
        model = net(6, 8, 4)
        optimizer = torch.optim.Adam(model.parameters(), lr)
        reg = wc.Regularizer(model, Paced(K))
        reg.attach(optimizer, every="auto")
        times.append([])
        for number in range(60):
            step(model, optimizer, number)
            times[-1].append(applied(reg))
        weights.append(model[0].weight.detach())
    assert times[0] == times[1]
    torch.testing.assert_close(*weights)


def test_steps_that_a_scaler_skips_do_not_count() -> None:
    model = net(6, 8)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    reg = wc.Regularizer(model, Paced(K))
    reg.attach(optimizer, every="auto")
    taken, times = 0, []
    for number in range(30):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 6)).square().mean()).backward()
        skipped = number % 3 == 0
        if skipped:
            model[0].weight.grad[0, 0] = math.inf  # type: ignore[index]
        scaler.step(optimizer)
        scaler.update()
        taken += not skipped
        (state,) = reg._states
        assert state.step == taken
        if not skipped and state.pending_steps == 0:
            times.append(taken)
    assert times[:4] == [1, 2, 4, 8]


def test_frozen_weight_is_not_counted_or_changed() -> None:
    model = net(6, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    reg = wc.Regularizer(model, Paced(K))
    reg.attach(optimizer, every="auto")
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    for number in range(15):
        step(model, optimizer, number)
    frozen, trained = reg._states
    assert (frozen.pace.applications, frozen.pending_steps) == (0, 0)
    assert torch.equal(model[0].weight, before)
    assert (trained.pace.applications, trained.pending_steps) == (4, 7)
    model[0].weight.requires_grad_(True)
    for number in range(15, 17):
        step(model, optimizer, number)
    assert frozen.pace.applications == 1
    assert float(wc.condition_number(model[0].weight)) <= K * 1.5


def test_default_schedules_of_limits_and_penalties() -> None:
    model = net(6, 8, 4)
    rules = {"0.*": Rounded(), "1.*": wc.ConditionPenalty(0.1)}
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    reg = wc.Regularizer(model, rules)
    with pytest.raises(ValueError, match=r'"auto".*only for hard limits.*"1\.weight"'):
        reg.attach(optimizer, every="auto")
    with pytest.raises(ValueError, match="every"):
        reg.attach(optimizer, every="often")
    handle = reg.attach(optimizer)
    assert '"auto", 10 for penalties' in repr(handle)
    limited, soft = reg._states
    for number in range(21):
        step(model, optimizer, number)
        assert soft.pending_steps == (number + 1) % 10
        if number in (0, 1, 3):
            assert limited.pending_steps == 0
    handle.remove()
    only = wc.Regularizer(model, {"0.*": Rounded(), "*": None})
    assert 'every="auto"' in repr(only.attach(optimizer))
    only.detach()
    handle = reg.attach(optimizer, every=3)
    assert "every=3" in repr(handle)
    count = limited.pace.applications
    for number in range(6):
        step(model, optimizer, number)
    assert limited.pace.applications == count + 2


def make(limit: wc.Limit) -> tuple[nn.Sequential, torch.optim.Optimizer, wc.Regularizer]:
    model = net(6, 8, 8, 4)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    reg = wc.Regularizer(model, limit, block_size=3)
    reg.attach(optimizer, every="auto")
    return model, optimizer, reg


@pytest.mark.parametrize(
    "limit",
    [
        Paced(K),
        wc.ConditionLimit(K),
        wc.SingularValueLimit(lower=0.5, upper=1.5),
        wc.SingularValueLimit(upper=1),
    ],
)
@pytest.mark.parametrize("saved_at", [1, 17, 40])
def test_resume_within_an_interval_is_bitwise(limit: wc.Limit, saved_at: int) -> None:
    model, optimizer, reg = make(limit)
    whole: list[Any] = []
    for number in range(80):
        if number == saved_at:
            parts = [part.state_dict() for part in (model, optimizer, reg)]
            saved = torch.load(_stored(parts), weights_only=True)
        step(model, optimizer, number)
        whole.append(applied(reg))
    other = make(limit)
    for part, state in zip(other, saved, strict=True):
        part.load_state_dict(state)
    for number in range(saved_at, 80):
        step(*other[:2], number)
        assert applied(other[2]) == whole[number]
    for ours, theirs in zip(other[0].parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert repr(other[2]) == repr(reg)
    for name, state in reg.state_dict().items():
        for key, tensor in state.items():
            assert torch.equal(other[2].state_dict()[name][key], tensor), key


def _stored(parts: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(parts, buffer)
    buffer.seek(0)
    return buffer


def test_state_without_pace_starts_a_new_one() -> None:
    model, optimizer, reg = make(Paced(K))
    for number in range(15):
        step(model, optimizer, number)
    old = {
        name: {key: tensor for key, tensor in state.items() if key != "pace"}
        for name, state in reg.state_dict().items()
    }
    reg.load_state_dict(old)
    assert all(state.pace.applications == 0 for state in reg._states)
    step(model, optimizer, 15)
    assert applied(reg)
    torch.testing.assert_close(reg.state_dict()["0.weight"]["step"], torch.tensor(16))
    del old["0.weight"]["step"]
    with pytest.raises(ValueError, match="step"):
        reg.load_state_dict(old)


def test_pace_of_another_limit_is_discarded() -> None:
    """The pace of K = 1e6 says nothing about K = 2."""
    layer = nn.Linear(6, 6, bias=False)
    lax, strict = (wc.Regularizer(layer, Paced(K)) for K in (1e6, 2.0))
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    lax.attach(optimizer, every="auto")
    for _ in range(60):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
    assert lax.measure()["weight"].interval
    lax.detach()
    strict.load_state_dict(lax.state_dict())
    assert strict.measure()["weight"].interval is None
    strict.attach(optimizer, every="auto")
    optimizer.step()
    assert float(wc.condition_number(layer.weight)) <= 2


def test_enforce_does_not_affect_the_pace() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 6, bias=False)
    reg = wc.Regularizer(layer, Paced(2.0))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    reg.attach(optimizer, every="auto")
    for step in range(40):
        layer.weight.grad = torch.randn_like(layer.weight)
        optimizer.step()
        if step % 7 == 6:
            reg.enforce()
            assert int(reg.state_dict()["weight"]["pending_steps"]) == 0
    # After the first four applications eight steps after one enforcement never came together.
    assert reg.measure()["weight"].interval == 4


def test_excess_is_shown() -> None:
    model, optimizer, reg = make(Paced(K))
    assert "application" not in repr(reg)
    before: list[float] = []
    reg.detach()
    optimizer.register_step_post_hook(
        lambda *_: before.append(float(wc.condition_number(model[0].weight)))
    )
    reg.attach(optimizer, every="auto")
    last = 0.0
    for number in range(40):
        step(model, optimizer, number)
        if "0.weight" in applied(reg):
            last = before[-1]
    estimate = reg.measure()["0.weight"]
    assert estimate.excess is not None
    assert math.isclose(estimate.excess, last / K, rel_tol=1e-3)  # found in float32
    assert estimate.condition_before is not None
    assert math.isclose(estimate.condition_before, last, rel_tol=1e-3)
    assert estimate.interval is not None
    assert estimate.interval >= 10
    line = (
        f"before the last application: κ {estimate.condition_before:.4g}, {estimate.excess:.4g} "
        f"times its limit; {estimate.interval} steps after the previous one"
    )
    assert line in repr(reg)
    values = reg.log(lambda values, step: None, step=0)
    assert values is not None
    each = reg.measure().values()
    assert values["wellcond/limit/excess/largest"] == max(e.excess or 0 for e in each)
    kappas = [e.condition_before or 0 for e in each]
    assert values["wellcond/limit/condition_before/largest"] == max(kappas)
    assert values["wellcond/limit/interval/median"] >= 10


def test_measure_decomposes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 100))
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    reg = wc.Regularizer(model, Paced(K), block_size=4)
    reg.attach(optimizer, every="auto")
    step(model, optimizer, 0)
    state = reg.state_dict()
    for name in ("svd", "svdvals", "eigh", "eigvalsh", "cholesky_ex"):
        real = getattr(torch.linalg, name)

        def small(A: Tensor, *args: Any, real: Any = real, **kwargs: Any) -> Any:
            assert max(A.shape[-2:]) <= 40, f"{real.__name__} of a whole weight"
            return real(A, *args, **kwargs)

        monkeypatch.setattr(torch.linalg, name, small)
    assert reg.measure()["0.weight"].condition_before is not None
    repr(reg)
    for name, fields in reg.state_dict().items():
        for key, tensor in fields.items():
            assert torch.equal(tensor, state[name][key])


class Rounded(wc.Limit):
    """Entries are multiples of 1/8."""

    def __init__(self) -> None:
        self.calls = 0

    def apply(self, S: Tensor) -> Tensor:
        self.calls += 1
        return (S * 8).round() / 8


def test_user_limit_has_a_pace() -> None:
    model = net(6, 8)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    limit = Rounded()
    reg = wc.Regularizer(model, limit)
    reg.attach(optimizer)
    times = []
    for number in range(40):
        step(model, optimizer, number)
        if applied(reg):
            times.append(number)
            assert torch.equal(model[0].weight * 8, (model[0].weight * 8).round())
    # The movement is unknown: due again by the same sum of learning rates.
    assert times == [0, 1, 3, 7, 15, 25, 35]
    assert limit.calls == 7
    estimate = reg.measure()["0.weight"]
    assert (estimate.excess, estimate.condition_before, estimate.interval) == (None, None, 10)
