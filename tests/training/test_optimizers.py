"""A Regularizer with every optimizer of torch, gradient scalers, autocast and storage types.

Introspection finds the optimizers: one that a later torch adds fails here until it has a learning
rate. SparseAdam takes only sparse gradients and has separate tests.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.optim.optimizer import Optimizer

import wellcond as wc
from oracles import gradient, penalty

# Learning rates with which some twenty steps move the weights of `net`.
RATES = {
    "ASGD": 0.05,
    "Adadelta": 1.0,
    "Adafactor": 0.05,
    "Adagrad": 0.05,
    "Adam": 0.02,
    "AdamW": 0.02,
    "Adamax": 0.02,
    "LBFGS": 0.1,
    "Muon": 0.02,
    "NAdam": 0.02,
    "RAdam": 0.02,
    "RMSprop": 0.002,
    "Rprop": 0.01,
    "SGD": 0.05,
    "SparseAdam": 0.02,
}
RATES = {name: lr for name, lr in RATES.items() if hasattr(torch.optim, name)}  # Muon is new


def shipped() -> dict[str, type[Optimizer]]:
    found = {name: getattr(torch.optim, name) for name in dir(torch.optim)}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }


def takes(name: str, option: str) -> bool:
    return option in inspect.signature(shipped()[name]).parameters


def implementations() -> Iterator[Any]:
    """Each optimizer for dense gradients, plain, foreach and fused."""
    for name in sorted(shipped()):
        if name == "SparseAdam":
            continue
        yield pytest.param(name, {}, id=name)
        for option in ("foreach", "fused"):
            if takes(name, option):
                yield pytest.param(name, {option: True}, id=f"{name}-{option}")


every_implementation = pytest.mark.parametrize(("name", "options"), list(implementations()))
DENSE = sorted(set(RATES) - {"SparseAdam"})


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Square weights: a block of full width contains every triplet exactly, on any side."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)).to(dtype)


def wide() -> nn.Sequential:
    """Gaussian weights of 12 x 40, without tiny singular values, which hardly affect r."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        return nn.Sequential(nn.Linear(40, 12), nn.Tanh(), nn.Linear(12, 40))


def batch(step: int, dtype: torch.dtype = torch.float32, width: int = 12) -> Tensor:
    return torch.randn(8, width, generator=torch.Generator().manual_seed(step), dtype=dtype)


def make(name: str, parameters: Any, lr: float | Tensor, **options: Any) -> Optimizer:
    groups = list(parameters)
    if groups and isinstance(groups[0], Tensor) and name == "Muon":
        groups = [p for p in groups if p.ndim == 2]  # it accepts no others
    if name == "LBFGS":
        options["max_iter"] = 6  # enough, and quick
    return shipped()[name](groups, lr=lr, **options)  # type: ignore[call-arg]


def step_(
    model: nn.Module,
    optimizer: Optimizer,
    x: Tensor,
    before_step: Callable[[], None] | None = None,
    in_loss: Callable[[], Tensor] | None = None,
) -> None:
    """One step of any optimizer, within a closure, so that LBFGS and the others agree."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        if in_loss is not None:
            loss = loss + in_loss()
        loss.backward()
        if before_step is not None:
            before_step()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters() if p.ndim == 2]


def flattened(reg: wc.Regularizer) -> dict[str, Tensor]:
    return {f"{w}/{k}": v for w, state in reg.state_dict().items() for k, v in state.items()}


def test_all_torch_optimizers_are_listed() -> None:
    assert set(shipped()) == set(RATES)


# --- attached -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["number", "tensor"])
@every_implementation
def test_attach_equals_proximal_step_under_a_schedule(
    name: str, options: dict[str, bool], kind: str
) -> None:
    """The sum of the learning rates that the optimizer itself had, every third step."""
    if kind == "tensor" and name in ("Adam", "AdamW") and "foreach" in options:
        pytest.skip(f"torch: {name} takes no tensor for lr with foreach unless it is capturable")
    models, regs = (net(), net()), []
    for model, attached in zip(models, (True, False), strict=True):
        lr: float | Tensor = RATES[name] if kind == "number" else torch.tensor(RATES[name])
        optimizer = make(name, model.parameters(), lr, **options)
        schedule = ExponentialLR(optimizer, 0.8)
        reg = wc.Regularizer(model, wc.ConditionPenalty(0.5), block_size=4)
        regs.append(reg)
        if attached:
            reg.attach(optimizer, every=3)
        total: float | Tensor = 0.0
        for step in range(10):
            total = total + optimizer.param_groups[0]["lr"]
            step_(model, optimizer, batch(step))
            if not attached and step % 3 == 2:
                reg.proximal_step(total)
                total = 0.0
            schedule.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    for state in regs[0].state_dict().values():
        assert (int(state["step"]), int(state["pending_steps"])) == (10, 1)
        # The tenth step, at lr * 0.8^9, is still to come.
        torch.testing.assert_close(
            float(state["pending_lr"]), RATES[name] * 0.8**9, rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("name", DENSE)
def test_attach_uses_the_learning_rate_of_each_group(name: str) -> None:
    if name == "LBFGS":
        pytest.skip("torch: LBFGS has one group of parameters")
    models = net(torch.float64), net(torch.float64)
    for model, attached in zip(models, (True, False), strict=True):
        first, second = model[0].weight, model[2].weight
        groups = [{"params": [first]}, {"params": [second], "lr": 3 * RATES[name]}]
        optimizer = make(name, groups, RATES[name])
        schedule = ExponentialLR(optimizer, 0.9)
        # With proximal_step every weight needs a separate regulariser.
        patterns: list[dict[str, Any]] = [
            {f"{i}.weight": wc.ConditionPenalty(0.5), "*": None} for i in (0, 2)
        ]
        if attached:
            wc.Regularizer(model, wc.ConditionPenalty(0.5), block_size=4).attach(optimizer, every=2)
        by_hand = [wc.Regularizer(model, pattern, block_size=4) for pattern in patterns]
        totals = [0.0, 0.0]
        for step in range(8):
            for i in range(2):
                totals[i] += optimizer.param_groups[i]["lr"]
            step_(model, optimizer, batch(step, torch.float64))
            if not attached and step % 2:
                for reg, total in zip(by_hand, totals, strict=True):
                    reg.proximal_step(total)
                totals = [0.0, 0.0]
            schedule.step()
    for one, other in zip(weights(models[0]), weights(models[1]), strict=True):
        torch.testing.assert_close(one, other)


def test_learning_rate_tensor_of_shape_one() -> None:
    """torch takes any tensor of one element; the state keeps its shapes."""
    try:
        step_(model := net(), torch.optim.SGD(model.parameters(), torch.tensor([0.25])), batch(0))
    except TypeError as error:
        pytest.skip(f"this torch takes no such tensor: {error}")
    models = net(torch.float64), net(torch.float64)
    shapes = []
    for model, lr in zip(models, (0.25, torch.tensor([0.25])), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr)
        reg = wc.Regularizer(model, wc.ConditionPenalty(0.5), block_size=4)
        reg.attach(optimizer, every=2)
        for step in range(3):
            step_(model, optimizer, batch(step, torch.float64))
        shapes.append({key: value.shape for key, value in flattened(reg).items()})
        reg.load_state_dict(reg.state_dict())
    for one, other in zip(weights(models[0]), weights(models[1]), strict=True):
        torch.testing.assert_close(one, other)
    assert shapes[0] == shapes[1]


def test_proximal_step_accepts_one_element_tensors() -> None:
    models = net(torch.float64), net(torch.float64)
    for model, lr in zip(models, (0.25, torch.tensor([0.25])), strict=True):
        wc.Regularizer(model, wc.ConditionPenalty(0.5), block_size=4).proximal_step(lr)
    for one, other in zip(weights(models[0]), weights(models[1]), strict=True):
        torch.testing.assert_close(one, other)


def test_attach_lowers_kappa_with_maximize() -> None:
    models = net(), net()
    for model, strength in zip(models, (0.0, 2.0), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), 0.05, maximize=True)
        wc.Regularizer(model, wc.ConditionPenalty(strength)).attach(optimizer, every=2)
        for step in range(10):
            step_(model, optimizer, batch(step))
    for plain, regularised in zip(weights(models[0]), weights(models[1]), strict=True):
        assert wc.condition_number(regularised) < wc.condition_number(plain)


def test_steps_of_frozen_weights_do_not_count() -> None:
    """Frozen weights are skipped: their optimizer steps leave nothing pending."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.5), block_size=4)
    reg.attach(optimizer, every=2)
    model[0].weight.requires_grad_(False)
    for step in range(5):
        step_(model, optimizer, batch(step))
    frozen, other = reg.state_dict()["0.weight"], reg.state_dict()["2.weight"]
    assert (int(other["step"]), int(other["pending_steps"])) == (5, 1)
    assert (int(frozen["step"]), int(frozen["pending_steps"])) == (0, 0)
    assert float(frozen["pending_lr"]) == 0


# --- on the gradients and in the loss -------------------------------------------------------------


@every_implementation
def test_add_gradients_adds_to_the_gradient_of_the_loss(
    name: str, options: dict[str, bool]
) -> None:
    if name == "LBFGS":
        pytest.skip("LBFGS calls for gradients within its step: tested below")
    model = net(torch.float64)
    optimizer = make(name, model.parameters(), RATES[name], **options)
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.3))
    expected: list[Tensor] = []
    seen: list[Tensor] = []

    def add() -> None:
        layers = (model[0].weight, model[2].weight)
        expected[:] = [p.grad + 0.3 * wc.condition_penalty_gradient(p.detach()) for p in layers]
        reg.add_gradients()

    def note(*_: Any) -> None:
        seen[:] = [p.grad.clone() for p in (model[0].weight, model[2].weight)]

    optimizer.register_step_pre_hook(note)
    start = [weight.clone() for weight in weights(model)]
    for step in range(6):
        step_(model, optimizer, batch(step, torch.float64), before_step=add)
        torch.testing.assert_close(seen, expected)
    for before, after in zip(start, weights(model), strict=True):
        assert not torch.equal(before, after)
    assert {int(state["step"]) for state in reg.state_dict().values()} == {6}


@pytest.mark.parametrize("way", ["attach", "add_gradients"])
@every_implementation
def test_training_lowers_the_condition_number(
    name: str, options: dict[str, bool], way: str
) -> None:
    models = wide(), wide()
    for model, regularised in zip(models, (False, True), strict=True):
        optimizer = make(name, model.parameters(), RATES[name], **options)
        # As long a step whatever the learning rate; a gradient meets each optimizer's own scale.
        strength = 0.1 / RATES[name] if way == "attach" else 1.0
        reg = wc.Regularizer(model, wc.ConditionPenalty(strength if regularised else 0.0))
        if way == "attach":
            reg.attach(optimizer, every=4)
        for step in range(20):
            add = None if way == "attach" else reg.add_gradients
            step_(model, optimizer, batch(step, width=40), before_step=add)
    for plain, regularised_ in zip(weights(models[0]), weights(models[1]), strict=True):
        assert wc.condition_number(regularised_) < 0.9 * wc.condition_number(plain)


def test_lbfgs_add_gradients_counts_every_evaluation() -> None:
    """So the step of a schedule counts evaluations, up to max_iter of them in one optimizer step;
    `attach` counts optimizer steps with LBFGS too."""
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=5)
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.3))
    step_(model, optimizer, batch(0), before_step=reg.add_gradients)
    assert {int(state["step"]) for state in reg.state_dict().values()} == {5}
    attached = wc.Regularizer(model, wc.ConditionPenalty(0.3))
    attached.attach(optimizer, every=10)
    step_(model, optimizer, batch(1))
    assert {int(state["step"]) for state in attached.state_dict().values()} == {1}


def test_lbfgs_without_line_search_loss_equals_gradients() -> None:
    """LBFGS then uses the loss only to stop; with a full block the penalty is a fixed function."""
    models = net(torch.float64), net(torch.float64)
    for model, in_loss in zip(models, (True, False), strict=True):
        optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=4)
        reg = wc.Regularizer(model, wc.ConditionPenalty(0.3))
        for step in range(4):
            x = batch(step, torch.float64)
            if in_loss:
                step_(model, optimizer, x, in_loss=reg)
            else:
                step_(model, optimizer, x, before_step=reg.add_gradients)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_line_search_needs_the_penalty_in_the_loss() -> None:
    """strong_wolfe compares losses along the gradient: with `reg()` both are of one function and
    the objective falls to a lower one than where only the gradients know of the penalty."""
    x, objectives = batch(0, torch.float64), []
    for in_loss in (True, False):
        model = net(torch.float64)
        optimizer = torch.optim.LBFGS(
            model.parameters(), max_iter=10, line_search_fn="strong_wolfe"
        )
        reg = wc.Regularizer(model, wc.ConditionPenalty(3.0))
        for _ in range(5):
            if in_loss:
                step_(model, optimizer, x, in_loss=reg)
            else:
                step_(model, optimizer, x, before_step=reg.add_gradients)
        with torch.no_grad():
            loss = float((model(x) - x).square().mean())
        objectives.append(loss + 3.0 * sum(penalty(weight) for weight in weights(model)))
    assert objectives[0] < objectives[1]


# --- sparse gradients -----------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.head = nn.Linear(6, 6, bias=False)
            self.words = nn.Embedding(20, 6, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        looked_up: Tensor = self.words(x)
        return self.head(looked_up).square().mean()


def test_attach_to_sparse_adam_equals_proximal_step() -> None:
    models = Words(), Words()
    for model, attached in zip(models, (True, False), strict=True):
        optimizer = torch.optim.SparseAdam(model.words.parameters(), RATES["SparseAdam"])
        reg = wc.Regularizer(
            model, {"words.weight": wc.ConditionPenalty(5.0), "*": None}, block_size=4
        )
        if attached:
            reg.attach(optimizer, every=2)
        for step in range(6):
            optimizer.zero_grad()
            model(torch.tensor([1, 2, 3 + step])).backward()
            optimizer.step()
            if not attached and step % 2:
                reg.proximal_step(RATES["SparseAdam"] + RATES["SparseAdam"])
    assert torch.equal(models[0].words.weight, models[1].words.weight)
    start = Words().words.weight
    assert wc.condition_number(models[0].words.weight) < wc.condition_number(start)


def test_add_gradients_rejects_sparse_gradients() -> None:
    model = Words()
    reg = wc.Regularizer(
        model, {"words.weight": wc.ConditionPenalty(0.5), "*": wc.ConditionPenalty(0.5)}
    )
    model(torch.tensor([1, 2, 3])).backward()
    assert model.words.weight.grad.is_sparse
    head, before = model.head.weight.grad.clone(), flattened(reg)
    with pytest.raises(ValueError, match=r"words\.weight"):
        reg.add_gradients()
    assert torch.equal(model.head.weight.grad, head)
    steps = {key: int(value) for key, value in flattened(reg).items() if key.endswith("/step")}
    assert len(steps) == 2
    assert steps == {key: int(before[key]) for key in steps}


# --- gradient scalers -----------------------------------------------------------------------------

SCALED = [
    pytest.param(name, options, id="-".join((name, *options)))
    for name in ("SGD", "Adam", "AdamW", "Adagrad")
    for options in ({}, {"foreach": True}, {"fused": True})
]


@pytest.mark.parametrize(("name", "options"), SCALED)
def test_steps_skipped_by_a_scaler_do_not_count(name: str, options: dict[str, bool]) -> None:
    """Fused optimizers are stepped anyway, and leave the weights unchanged themselves."""
    bad = {2: math.inf, 3: math.nan, 7: -math.inf}
    models, regs = (net(), net()), []
    for model, scaled in zip(models, (True, False), strict=True):
        optimizer = make(name, model.parameters(), RATES[name], **options)
        reg = wc.Regularizer(model, wc.ConditionPenalty(1.0), block_size=4)
        reg.attach(optimizer, every=3)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
        for step in range(10):
            if step in bad and not scaled:
                continue
            optimizer.zero_grad()
            factor = bad.get(step, 1.0)
            before = [weight.clone() for weight in weights(model)]
            scaler.scale(factor * model(batch(step)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            if step in bad:
                for old, new in zip(before, weights(model), strict=True):
                    assert torch.equal(old, new), step
        regs.append(reg)
    for key, value in flattened(regs[1]).items():
        # A scale of a power of two changes no digit.
        assert torch.equal(flattened(regs[0])[key], value), key
    assert {int(state["step"]) for state in regs[0].state_dict().values()} == {7}
    assert {int(state["pending_steps"]) for state in regs[0].state_dict().values()} == {1}
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("name", "options"), SCALED)
def test_gradients_added_after_unscaling_are_not_scaled(
    name: str, options: dict[str, bool]
) -> None:
    models = net(), net()
    for model, scaled in zip(models, (True, False), strict=True):
        optimizer = make(name, model.parameters(), RATES[name], **options)
        reg = wc.Regularizer(model, wc.ConditionPenalty(0.3), block_size=4)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=scaled)
        for step in range(5):
            optimizer.zero_grad()
            scaler.scale(model(batch(step)).square().mean()).backward()
            scaler.unscale_(optimizer)
            reg.add_gradients()
            scaler.step(optimizer)
            scaler.update()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_skipped_step_after_add_gradients_keeps_weights() -> None:
    """The count is of calls: `add_gradients` comes before the scaler has decided."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.3))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [weight.clone() for weight in weights(model)]
    scaler.scale(math.inf * model(batch(0)).square().mean()).backward()
    scaler.unscale_(optimizer)
    reg.add_gradients()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    for old, new in zip(before, weights(model), strict=True):
        assert torch.equal(old, new)
    assert {int(state["step"]) for state in reg.state_dict().values()} == {1}
    optimizer.zero_grad()
    reg.add_gradients()
    assert all(p.grad.isfinite().all() for p in (model[0].weight, model[2].weight))


# --- autocast and storage types -------------------------------------------------------------------


def test_penalty_under_autocast_has_full_precision() -> None:
    values, gradients = [], []
    for enabled in (True, False):
        model = net()
        reg = wc.Regularizer(model, wc.ConditionPenalty(0.3), block_size=4)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = model(batch(0))
            loss = out.square().mean() + reg()
            value = reg()
        assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
        assert value.dtype == loss.dtype == torch.float32
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, [model[0].weight, model[2].weight]))
        loss.backward()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            reg.add_gradients()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(*values)
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)


@pytest.mark.parametrize("power", [-10, 0, 9])
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_value_and_gradients_equal_float64_twin(dtype: torch.dtype, power: int) -> None:
    """Of the stored values. Arithmetic is in float32 or wider, so the gradient is off by one
    rounding to its storage type and by a few eps of the arithmetic times sigma_1."""
    model = net(torch.float64)
    with torch.no_grad():
        for weight in weights(model):
            weight.mul_(2.0**power)
    model = model.to(dtype)
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    twins = [weight.double() for weight in weights(model)]
    sigma = [float(torch.linalg.matrix_norm(twin, 2)) for twin in twins]
    strength = 0.5
    expected = [strength * wc.condition_penalty_gradient(twin) for twin in twins]
    for oracle, twin in zip(expected, twins, strict=True):
        torch.testing.assert_close(oracle, strength * gradient(twin))

    reg = wc.Regularizer(model, wc.ConditionPenalty(strength))
    value = reg()
    total = strength * sum(penalty(twin) for twin in twins)
    # Differences of squares of sigma_1, over 12 x 12 entries.
    bound = 50 * eps * sum(s * s for s in sigma)
    torch.testing.assert_close(value.item(), total, rtol=0, atol=bound)
    assert value.dtype == torch.promote_types(dtype, torch.float32)

    # Two sigmas that are close turn their vectors into each other: 1 / gap beside eps.
    gaps = [float(s[0] / (s[0] - s[1])) for s in map(torch.linalg.svdvals, twins)]
    info = torch.finfo(dtype)
    value.backward()
    in_loss = [p.grad.clone() for p in (model[0].weight, model[2].weight)]
    model.zero_grad()
    reg.add_gradients()
    added = [p.grad for p in (model[0].weight, model[2].weight)]
    for found in (in_loss, added):
        for one, other, s, gap in zip(found, expected, sigma, gaps, strict=True):
            assert one.dtype == dtype
            subnormal = info.smallest_normal * info.eps
            torch.testing.assert_close(
                one.double(), other, rtol=info.eps, atol=50 * gap * eps * s + subnormal
            )
