"""Watched hard limits: they hold after every step, and no state is lost between steps."""

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import wellcond as wc
from readback import ReadBackError, accelerator, sights
from wellcond.rules import watch as watch_module
from wellcond.training import deferred
from wellcond.training import state as state_module

KAPPA, UPPER = wc.ConditionLimit(3.0), wc.SingularValueLimit(upper=0.9)
BOTH, LOWER = wc.SingularValueLimit(lower=0.4, upper=1.1), wc.SingularValueLimit(lower=0.3)
TOGETHER = wc.ConditionLimit(4.0, upper=1.2)
LIMITS = [KAPPA, UPPER, BOTH, LOWER, TOGETHER]
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


class Stack(nn.Module):
    """Experts, as transformers stores them."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)


LAYOUTS: dict[str, Callable[[], nn.Module]] = {
    "tall": lambda: nn.Linear(28, 40, bias=False),
    "wide": lambda: nn.Linear(40, 28, bias=False),
    "square": lambda: nn.Linear(32, 32, bias=False),
    "small": lambda: nn.Linear(6, 8, bias=False),
    "row": lambda: nn.Linear(9, 1, bias=False),
    "column": lambda: nn.Linear(1, 9, bias=False),
    "number": lambda: nn.Linear(1, 1, bias=False),
    "experts": lambda: Stack(3, 30, 27),
    "groups": lambda: nn.Conv2d(8, 12, 3, groups=2, bias=False),
    "depthwise": lambda: nn.Conv1d(6, 6, 3, groups=6, bias=False),
}


def excess(S: Tensor, limit: Any, joined: bool = False) -> float:
    """The factor by which a limit is exceeded, from a singular value decomposition in float64."""
    sigma = torch.linalg.svdvals(S.detach().double())
    if joined:
        sigma = sigma.flatten().sort(descending=True).values
    return float(limit.excess(sigma[..., 0], sigma[..., -1]).max())


def matrices(parameter: Tensor, layout: str) -> Tensor:
    groups = {"groups": 2, "depthwise": 6}.get(layout)
    return parameter if groups is None else parameter.reshape(groups, -1, parameter[0].numel())


def make(
    layout: str, limit: Any, dtype: torch.dtype = F32, lr: float = 2e-3, **options: Any
) -> tuple[nn.Module, torch.optim.Optimizer, wc.Regularizer]:
    torch.manual_seed(0)
    model = LAYOUTS[layout]().to(dtype)
    reg = wc.Regularizer(model, {name: limit for name, _ in model.named_parameters()})
    eps = 1e-4 if dtype == F16 else 1e-8  # which would be 0
    optimizer = torch.optim.Adam(model.parameters(), lr, eps=eps)
    reg.attach(optimizer, **options)
    return model, optimizer, reg


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """A step with noise towards a matrix that satisfies no limit."""
    for parameter in model.parameters():
        source = torch.Generator().manual_seed(number)
        target = torch.ones_like(parameter) * 0.5
        noise = torch.randn(parameter.shape, generator=source).to(parameter)
        parameter.grad = parameter.detach() - target + 0.3 * noise
    optimizer.step()


def cases() -> Iterator[Any]:
    for layout in LAYOUTS:
        for limit in LIMITS:
            yield layout, limit, F32
    for dtype in (F64, BF16, F16):
        for limit in LIMITS:
            yield "tall", limit, dtype
    yield "experts", KAPPA, BF16
    yield "groups", KAPPA, BF16
    yield "wide", UPPER, F64


# Rounding to half precision after the limit was applied adds this much.
ROUNDS = {F64: 1.0, F32: 1.0, F16: 1.01, BF16: 1.05}


@pytest.mark.parametrize(("layout", "limit", "dtype"), [*cases()])
def test_limits_hold_after_every_step(layout: str, limit: Any, dtype: torch.dtype) -> None:
    model, optimizer, _ = make(layout, limit, dtype)
    (parameter,) = model.parameters()
    # The groups of a convolution are the blocks of one map.
    joined = layout in ("groups", "depthwise") and isinstance(limit, wc.ConditionLimit)
    held = (1.01 if limit is UPPER else 1.05) * ROUNDS[dtype]
    for number in range(40):
        step(model, optimizer, number)
        assert excess(matrices(parameter, layout), limit, joined) <= held


# --- scales and bounds ----------------------------------------------------------------------------

EDGES: list[tuple[Any, Callable[[Tensor], Tensor]]] = [
    *((limit, change) for limit in LIMITS for change in (torch.zeros_like, torch.ones_like)),
    *((limit, lambda S: S / S.abs().max() * 1e-30) for limit in (KAPPA, UPPER, BOTH)),
    *((limit, lambda S: S / S.abs().max() * 1e30) for limit in (KAPPA, UPPER, BOTH)),
    *((wc.SingularValueLimit(upper=b), lambda S: S) for b in (1e30, 1e-30, 1e-7, 1e7)),
    *((wc.SingularValueLimit(lower=b), lambda S: S) for b in (1e30, 1e-30)),
    (wc.ConditionLimit(math.inf), lambda S: S),
    (wc.ConditionLimit(1.01), lambda S: S),
    (wc.SingularValueLimit(upper=1.0), lambda S: torch.linalg.qr(S).Q),
    (wc.SingularValueLimit(upper=1.0), lambda S: torch.linalg.qr(S).Q * 2),
    *((wc.ConditionLimit(3.0, headroom=h), lambda S: S) for h in (1.0, 1.01, 4.0)),
    *((wc.SingularValueLimit(upper=0.9, headroom=h), lambda S: S) for h in (1.0, 1.01, 4.0)),
]


@pytest.mark.parametrize(("limit", "change"), EDGES)
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("layout", ["tall", "small"])
def test_limits_hold_for_extreme_weights(
    layout: str, dtype: torch.dtype, limit: Any, change: Callable[[Tensor], Tensor]
) -> None:
    """The weight is replaced between two steps, without notice."""
    model, optimizer, _ = make(layout, limit, dtype, lr=1e-4)
    (parameter,) = model.parameters()
    for number in range(12):
        if number in (0, 6):
            parameter.data.copy_(change(parameter.data))
        step(model, optimizer, number)
        found = excess(parameter, limit)
        assert found <= 1.01 or (number not in (0, 6) and found <= 1.05) or not parameter.any()


# --- state of the watch ---------------------------------------------------------------------------


class Training:
    """A square weight whose watch stores all of its vectors, and one that is clipped."""

    def __init__(self, limits: tuple[Any, Any] = (KAPPA, UPPER), **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 20))
        self.optimizer = torch.optim.Adam(self.model.parameters(), 3e-3)
        self.reg = wc.Regularizer(self.model, {"0.*": limits[0], "2.*": limits[1]})
        self.options = options

    def attach(self) -> "Training":
        self.reg.attach(self.optimizer, **self.options)
        return self

    def take(self, *steps: int) -> "Training":
        for number in range(*steps):
            x = torch.randn(8, 30, generator=torch.Generator().manual_seed(number))
            self.optimizer.zero_grad()
            (self.model(x) - x[:, :1].sin()).square().mean().backward()
            self.optimizer.step()
        return self

    def save(self) -> Any:
        buffer = io.BytesIO()
        torch.save([part.state_dict() for part in (self.model, self.optimizer, self.reg)], buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=True)

    def load(self, saved: Any) -> "Training":
        for part, own in zip((self.model, self.optimizer, self.reg), saved, strict=True):
            part.load_state_dict(own)
        return self

    def decompositions(self) -> list[int]:
        return [state.record.decompositions for state in self.reg._states]


def compare(one: Training, other: Training) -> None:
    for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for name, state in one.reg.state_dict().items():
        theirs = other.reg.state_dict()[name]
        assert state.keys() == theirs.keys()
        for key, tensor in state.items():
            torch.testing.assert_close(theirs[key], tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("saved_at", [1, 3, 26, 33])
@pytest.mark.parametrize("order", ["loaded first", "attached first", "detached between"])
def test_watch_resumes_bitwise(
    late: bool, saved_at: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`late`: the check of the last step has not arrived when the state is saved."""
    monkeypatch.setattr(deferred, "LATE", late)
    whole = Training().attach().take(saved_at)
    saved = whole.save()
    whole.take(saved_at, 60)
    other = Training()
    if order == "loaded first":
        other.load(saved).attach()
    elif order == "attached first":
        other.attach().take(2)
        other.load(saved)
    else:
        other.attach().take(3)
        other.reg.detach()
        other.load(saved).attach()
    compare(other.take(saved_at, 60), whole)


def test_large_watch_state_is_saved_only_with_resume_bitwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(state_module, "_SMALL", 29)
    for resume in (None, "bitwise"):
        first = Training(resume=resume).attach().take(30)
        saved = first.save()
        assert ("watch.vectors" in saved[2]["0.weight"]) == (resume == "bitwise")
        other = Training(resume=resume).load(saved).attach()
        before = other.decompositions()
        if resume == "bitwise":
            compare(other.take(30, 50), first.take(30, 50))
            continue
        other.take(30, 31)
        assert other.decompositions()[0] == before[0] + 1
        assert other.reg._states[0].record.known
        for number in range(31, 50):
            other.take(number, number + 1)
            assert excess(other.model[0].weight, KAPPA) <= 1.05


def test_mismatched_watch_state_starts_anew() -> None:
    saved = Training().attach().take(30).save()
    watched = dict(saved[2])

    def change(key: str, value: Any) -> Any:
        own = {k: v for k, v in watched["0.weight"].items() if k != key}
        return {**watched, "0.weight": own if value is None else {**own, key: value}}

    changes = [
        change("watch.record", None),
        change("watch.record", torch.zeros(3)),
        change("watch.vectors", None),
        change("watch.vectors", torch.zeros(3, 3)),
        change("watch.top", torch.full((30, 24), math.nan)),
    ]
    for state in changes:
        for early in (True, False):
            other = Training().load([*saved[:2], watched])
            if early:
                other.reg.load_state_dict(state)
            other.attach()
            if not early:
                other.reg.load_state_dict(state)
            for number in range(30, 45):
                other.take(number, number + 1)
                assert excess(other.model[0].weight, KAPPA) <= 1.05
    with pytest.raises(TypeError, match=r"watch\.top.*must be a tensor"):
        Training().reg.load_state_dict(change("watch.top", [1.0]))
    other = Training((wc.ConditionLimit(2.0), UPPER)).load(saved).attach().take(30, 31)
    assert other.decompositions()[0] == 1
    assert excess(other.model[0].weight, wc.ConditionLimit(2.0)) <= 1.01


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copy_of_a_watch_is_independent(
    duplicate: Callable[[Any], Any], late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferred, "LATE", late)
    training = Training().attach().take(33)
    other = Training()
    other.model, other.reg, saved = duplicate(
        (training.model, training.reg, training.optimizer.state_dict())
    )
    assert other.reg.attachments == []
    assert "watched:" not in repr(other.reg)
    other.optimizer = torch.optim.Adam(other.model.parameters(), 3e-3)
    other.optimizer.load_state_dict(saved)
    training.take(33, 60)
    compare(other.attach().take(33, 60), training)


def test_detached_watch_starts_anew() -> None:
    training = Training().attach().take(30)
    (handle,) = training.reg.attachments
    handle.remove()
    assert not any(key.startswith("watch") for key in training.reg.state_dict()["0.weight"])
    with torch.no_grad():
        training.model[0].weight.copy_(torch.eye(30)).diagonal()[:20].mul_(0.01)
    training.attach().take(30, 31)
    assert excess(training.model[0].weight, KAPPA) <= 1.01
    handle.remove()  # once more: the new attachment stays
    training.take(31, 60)
    assert training.reg._states[0].record.steps == 30


# --- devices --------------------------------------------------------------------------------------


def test_late_reading_delays_the_limit_by_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred, "LATE", True)
    model, optimizer, reg = make("tall", wc.ConditionLimit(3.0), lr=1e-4)
    (parameter,) = model.parameters()
    (state,) = reg._states
    for number in range(25):
        step(model, optimizer, number)
    before = state.record.decompositions
    with torch.no_grad():
        U, sigma, Vh = torch.linalg.svd(parameter, full_matrices=False)
        sigma[-1] /= 4
        parameter.copy_((U * sigma) @ Vh)
    state.record.interval = 1
    for number, decomposed in ((25, 0), (26, 1), (27, 1)):
        step(model, optimizer, number)
        assert state.record.decompositions == before + decomposed
        assert (excess(parameter, wc.ConditionLimit(3.0)) > 1.05) == (number == 25)


NUMBERS = {  # results of a check: (fine, due)
    UPPER: ((0.1, 0.5), (0.1, 9.0)),
    KAPPA: ((0.5, 1.0, 0.5, 1.0, 0.1, 1.0), (0.5, 1.0, 0.01, 1.0, 0.1, 1.0)),
    BOTH: ((0.5, 1.0, 0.5, 1.0, 0.1, 1.0), (0.5, 1.0, 0.01, 1.0, 0.1, 1.0)),
}


@pytest.mark.parametrize("limit", NUMBERS)
@pytest.mark.parametrize("layout", ["tall", "wide", "small", "experts"])
def test_device_step_reads_only_the_previous_check(layout: str, limit: Any) -> None:
    watch_module._probes.cache_clear()
    projected: list[int] = []
    with accelerator() as device:
        with device:
            model = LAYOUTS[layout]()
        (parameter,) = model.parameters()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        reg = wc.Regularizer(model, {name: limit for name, _ in model.named_parameters()})

        def project(*_: Any) -> None:
            projected.append(number)

        with mock.patch.object(type(reg._engine), "project", project):
            handle = reg.attach(optimizer)
            (state,) = reg._states
            # A decomposition reads, and so does the count of zeros after the first four.
            state.record.known, state.record.decompositions, handle._counts = True, 4, 4
            parameter.grad = torch.zeros_like(parameter)
            fine, due = NUMBERS[limit]
            for number in range(6):
                before = parameter._version
                with sights(due if number == 3 else fine):
                    optimizer.step()
                if limit is UPPER and number != 3:  # the block is clipped without a read
                    assert parameter._version >= before + 2
                state.record.due = False
            with pytest.raises((ReadBackError, RuntimeError)):
                optimizer.step()  # every read that is not allowed is detected
    watch_module._probes.cache_clear()
    # The check of step 2 is read at step 3.
    assert projected == [3]


def test_weight_changes_dtype_or_storage_or_starts_on_meta() -> None:
    model, optimizer, _ = make("tall", KAPPA)
    (parameter,) = model.parameters()
    moves = {
        10: lambda S: S.double(),
        14: lambda S: S.clone(),
        18: lambda S: S.mT.contiguous().mT,
        22: lambda S: S.bfloat16(),
        26: lambda S: S.float(),
    }
    for number in range(32):
        if number in moves:
            parameter.data = moves[number](parameter.data)
            optimizer.state.clear()
            parameter.grad = None
        step(model, optimizer, number)
        assert excess(parameter, KAPPA) <= 1.06
    for early in (True, False):
        with torch.device("meta"):
            model = nn.Linear(40, 30)
        reg = wc.Regularizer(model, KAPPA)
        saved = None
        if early:
            twin = nn.Linear(40, 30)
            source = wc.Regularizer(twin, KAPPA)
            other = torch.optim.SGD(twin.parameters(), 1e-3)
            source.attach(other)
            step(twin, other, 0)
            saved = source.state_dict()
            reg.load_state_dict(saved)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        reg.attach(optimizer)
        model.to_empty(device="cpu")
        optimizer.param_groups[0]["params"] = list(model.parameters())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        for number in range(8):
            step(model, optimizer, number)
            assert excess(model.weight, KAPPA) <= 1.05


# --- steps that fail, or do not count -------------------------------------------------------------


def test_weight_recovers_from_nan_while_other_limits_hold() -> None:
    training = Training((BOTH, UPPER)).attach().take(25)
    saved = training.save()
    for index in (0, 2):
        other, limit = training.model[2 - index].weight, (UPPER, BOTH)[index // 2]
        with torch.no_grad():
            training.model[index].weight[0, 0] = math.nan
            other.mul_(1.2)
        for state in training.reg._states:
            state.record.interval = 1  # a calm weight is checked some steps later
        with pytest.raises(ValueError, match=rf'"{index}\.weight" contains NaN'):
            training.optimizer.step()
        assert excess(other, limit) <= 1.01
        training.model.load_state_dict(saved[0])
        for number in range(25, 45):
            training.take(number, number + 1)
            assert excess(training.model[0].weight, BOTH) <= 1.05
            assert excess(training.model[2].weight, UPPER) <= 1.01


def test_failing_penalty_does_not_stop_limits() -> None:
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 20))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg = wc.Regularizer(model, {"0.*": wc.ConditionPenalty(0.1), "1.*": UPPER})
    reg.attach(optimizer)
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(9):
        optimizer.step()
    model[1].weight.data.mul_(1.2)
    with pytest.raises(ValueError, match=r'"0\.weight" contains NaN'):
        optimizer.step()
    assert excess(model[1].weight, UPPER) <= 1.01


def test_skipped_steps_do_not_count_and_frozen_weights_do_not_change() -> None:
    model, optimizer, reg = make("tall", KAPPA)
    (parameter,) = model.parameters()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    (state,) = reg._states
    for number in range(12):
        optimizer.zero_grad()
        source = torch.Generator().manual_seed(number)
        x = torch.randn(4, 28, generator=source)
        scaler.scale(model(x).square().mean()).backward()
        if number % 3 == 0:
            parameter.grad[0, 0] = math.inf
        before = parameter.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(parameter, before) == (number % 3 == 0)
        assert state.record.steps == number + 1 - (number // 3 + 1)
        assert number % 3 == 0 or excess(parameter, KAPPA) <= 1.05
    parameter.requires_grad_(False)
    parameter.grad = None
    steps = state.record.steps
    parameter.data[:, 0] *= 1e-3
    before = parameter.detach().clone()
    optimizer.step()
    assert torch.equal(parameter, before)
    assert state.record.steps == steps
    parameter.requires_grad_(True)
    state.record.interval = 1
    step(model, optimizer, 0)
    assert excess(parameter, KAPPA) <= 1.05


@pytest.mark.parametrize("compiled", [False, True])
def test_limits_hold_with_tensor_learning_rates_and_schedules(compiled: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 28))
    optimizer = torch.optim.Adam(model.parameters(), torch.tensor(0.0), foreach=False)
    reg = wc.Regularizer(model, {"0.*": KAPPA, "1.*": UPPER})
    reg.attach(optimizer)
    run = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    for number in range(30):
        optimizer.param_groups[0]["lr"].fill_((0.0, 1e-4, 5e-3)[number // 10])
        source = torch.Generator().manual_seed(number)
        optimizer.zero_grad()
        model(torch.randn(4, 30, generator=source)).square().mean().backward()
        run()
        assert excess(model[0].weight, KAPPA) <= 1.05
        assert excess(model[1].weight, UPPER) <= 1.01


def test_two_optimizers_and_a_tied_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 30, bias=False), nn.Tanh(), nn.Linear(30, 30, bias=False))
    model.append(nn.Linear(30, 30, bias=False))
    model[3].weight = model[2].weight
    reg = wc.Regularizer(model, {"0.*": KAPPA, "*": UPPER})
    optimizers = [torch.optim.Adam(model[i].parameters(), 3e-3) for i in (0, 2)]
    for optimizer in optimizers:
        reg.attach(optimizer)
    for number in range(40):
        for optimizer in optimizers if number % 3 else optimizers[:1]:
            optimizer.zero_grad()
            x = torch.randn(8, 30, generator=torch.Generator().manual_seed(number))
            model(x).square().mean().backward()
            optimizer.step()
        assert excess(model[0].weight, KAPPA) <= 1.05
        assert number == 0 or excess(model[2].weight, UPPER) <= 1.01


def test_zero_factor_is_watched_once_nonzero() -> None:
    model, optimizer, reg = make("tall", KAPPA)
    (parameter,) = model.parameters()
    (state,) = reg._states
    parameter.data.zero_()
    for _ in range(3):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert not parameter.any()
    assert not state.record.known
    optimizer.param_groups[0]["lr"] = 1e-5
    nn.init.orthogonal_(parameter)
    for number in range(30):
        step(model, optimizer, number)
        assert excess(parameter, KAPPA) <= 1.05
    assert state.record.known
    assert state.is_followed
    assert state.record.decompositions <= 4
