"""Guarantees of a Regularizer: the places of a penalty, its state, and unusual weights."""

import copy
import gc
import io
import logging
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import wellcond as wc
from devices import on_a_device
from matrices import with_spectrum
from oracles import gradient, penalty, proximal_step


def linear(sigma: list[float], m: int = 12, n: int = 9, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(n, m, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(with_spectrum(torch.tensor(sigma, dtype=torch.float64), m, n, seed))
    return layer


def gap() -> nn.Linear:
    return linear([5.0, 3.0, 2.0, 1.5, 1.0, 0.9, 0.8, 0.7, 0.6])


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5)).to(dtype)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    reg: wc.Regularizer | None = None,
) -> None:
    source = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 20, generator=source)
        model(x).square().sum().backward()
        if reg is not None:
            reg.add_gradients()
        optimizer.step()


def converge(reg: wc.Regularizer) -> None:
    """Refines the subspaces without changing a weight."""
    for _ in range(40):
        reg().detach()


# --- the places of a penalty ----------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [3, 9, 32])
def test_value_and_gradients_equal_dense(block_size: int) -> None:
    layer = gap()
    reg = wc.Regularizer(layer, wc.ConditionPenalty(0.3), block_size=block_size)
    converge(reg)
    loss = reg()
    torch.testing.assert_close(loss.item(), 0.3 * penalty(layer.weight.detach()))
    loss.backward()
    expected = 0.3 * gradient(layer.weight.detach())
    torch.testing.assert_close(layer.weight.grad, expected)
    layer.weight.grad = None
    reg.add_gradients()
    torch.testing.assert_close(layer.weight.grad, expected)
    reg.add_gradients()  # adds, does not replace
    torch.testing.assert_close(layer.weight.grad, 2 * expected)


def test_loss_scaling_applies_to_the_penalty() -> None:
    layer = gap()
    reg = wc.Regularizer(layer, wc.ConditionPenalty(0.3))
    converge(reg)
    (128 * reg()).backward()
    torch.testing.assert_close(layer.weight.grad, 128 * 0.3 * gradient(layer.weight.detach()))


def test_value_is_at_most_the_true_penalty() -> None:
    """Every unit vector gives a lower estimate, however few products there were."""
    for seed in range(20):
        layer = linear([1 - 0.01 * i for i in range(9)], seed=seed)
        reg = wc.Regularizer(layer, wc.ConditionPenalty(1.0), block_size=2)
        for _ in range(3):
            assert reg().item() <= penalty(layer.weight.detach()) + 1e-14


def test_add_gradients_equals_penalty_in_the_loss() -> None:
    first, second = net(torch.float64), net(torch.float64)
    x = torch.randn(8, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    patterns = {"0.weight": wc.ConditionPenalty(0.1), "2.weight": wc.TikhonovPenalty(0.2)}
    for model, in_loss in ((first, True), (second, False)):
        reg = wc.Regularizer(model, patterns, block_size=4)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            (loss + reg() if in_loss else loss).backward()
            if not in_loss:
                reg.add_gradients()
            optimizer.step()
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_tikhonov_value_and_step() -> None:
    layer = gap()
    reg = wc.Regularizer(layer, wc.TikhonovPenalty(0.5))
    weight = layer.weight.detach().clone()
    torch.testing.assert_close(reg().item(), 0.25 * float(weight.square().sum()))
    reg.add_gradients()
    torch.testing.assert_close(layer.weight.grad, 0.5 * weight)
    reg.proximal_step(0.4)
    torch.testing.assert_close(layer.weight.detach(), weight / 1.2)


@pytest.mark.parametrize("eta", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("block_size", [4, 9])
def test_proximal_step_equals_dense(block_size: int, eta: float) -> None:
    layer = gap()
    reg = wc.Regularizer(layer, wc.ConditionPenalty(0.5), block_size=block_size)
    converge(reg)
    expected = proximal_step(layer.weight.detach(), eta)
    reg.proximal_step(eta / 0.5 / 2, steps=2)
    torch.testing.assert_close(layer.weight.detach(), expected)
    assert reg.measure()["weight"].shortened_steps == 0


def test_step_longer_than_the_block_allows_is_shortened() -> None:
    """eta' = sum (sigma_i/sigma_k - 1): the exact step of that length; S stays bounded."""
    layer = linear([1.0, 1.0, 1.0, 0.1] + [0.05] * 5)
    reg = wc.Regularizer(layer, wc.ConditionPenalty(1.0), block_size=2)
    assert "block_size=" not in repr(reg).split("\n", 1)[1]
    for _ in range(200):
        reg.proximal_step(1.0)
    assert reg.measure()["weight"].shortened_steps == 200
    assert "200 proximal steps were shortened" in repr(reg)
    assert "raise block_size=2" in repr(reg)
    assert torch.linalg.matrix_norm(layer.weight, 2) < 1.1

    layer = gap()
    reg = wc.Regularizer(layer, wc.ConditionPenalty(1.0), block_size=3)
    converge(reg)
    reach = (5 / 2 - 1) + (3 / 2 - 1)
    expected = proximal_step(layer.weight.detach(), reach)
    reg.proximal_step(100.0)
    torch.testing.assert_close(layer.weight.detach(), expected)


@pytest.mark.parametrize("seed", range(10))
def test_proximal_step_never_raises_kappa(seed: int) -> None:
    layer = linear([2.0, 1.9, 1.8, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5], seed=seed)
    reg = wc.Regularizer(layer, wc.ConditionPenalty(1.0), block_size=3)
    kappa = wc.condition_number(layer.weight)
    for _ in range(20):
        reg.proximal_step(0.2)
        after = wc.condition_number(layer.weight)
        assert after <= kappa * (1 + 1e-9)
        kappa = after


# --- attach ---------------------------------------------------------------------------------------


def test_attach_sums_learning_rates_since_the_last_step() -> None:
    """Two groups with schedules of their own; eta = strength * sum of lr."""
    model = net(torch.float64)
    first, second = model[0].weight, model[2].weight
    optimizer = torch.optim.SGD(
        [{"params": [first], "lr": 0.0}, {"params": [second], "lr": 0.0}], lr=0.0
    )
    reg = wc.Regularizer(model, wc.ConditionPenalty(1.0), block_size=16)
    reg.attach(optimizer, every=3)
    converge(reg)
    expected = [first.detach().clone(), second.detach().clone()]
    for lrs in ([0.1, 0.2, 0.3], [0.3, 0.1, 0.0]):
        for lr in lrs:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.param_groups[1]["lr"] = torch.tensor(2 * lr)
            first.grad, second.grad = torch.zeros_like(first), torch.zeros_like(second)
            optimizer.step()
        expected[0] = proximal_step(expected[0], sum(lrs))
        expected[1] = proximal_step(expected[1], 2 * sum(lrs))
        # tensors of lr are float32
        torch.testing.assert_close(first.detach(), expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(second.detach(), expected[1], rtol=1e-5, atol=1e-6)
    assert {e.step for e in reg.measure().values()} == {46}


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.01),
        lambda p: torch.optim.Adam(p, 0.01, fused=True),
        lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
        lambda p: torch.optim.LBFGS(p, 0.01),
        lambda p: torch.optim.RMSprop(p, 0.01),
    ],
    ids=["SGD", "Adam fused", "AdamW foreach", "LBFGS", "RMSprop"],
)
def test_attach_equals_proximal_step_for_every_optimizer(make: object) -> None:
    models = net(), net()
    for model, attached in zip(models, (True, False), strict=True):
        optimizer = make(model.parameters())  # type: ignore[operator]
        reg = wc.Regularizer(model, wc.ConditionPenalty(0.5), block_size=4)
        if attached:
            reg.attach(optimizer, every=2)
        source = torch.Generator().manual_seed(0)
        for step in range(6):
            x = torch.randn(8, 20, generator=source)

            def closure(x: Tensor = x, model: nn.Module = model, optimizer=optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
            if not attached and step % 2:
                reg.proximal_step(0.01, steps=2)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_skipped_steps_of_a_grad_scaler_do_not_count() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.5))
    reg.attach(optimizer, every=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for scale in (1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(scale * model(torch.ones(2, 20)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert reg.measure()["0.weight"].step == 2


def test_accumulation_counts_once_per_optimizer_step() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.5))
    for _ in range(4):
        for _ in range(3):
            model(torch.ones(2, 20)).sum().backward()
        reg.add_gradients()
        optimizer.step()
    assert reg.measure()["0.weight"].step == 4


def test_detach_and_remove_end_the_steps() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.5))
    for end in (reg.attach(optimizer, every=1).remove, reg.detach):
        end()
        train(model, optimizer, 2)
        assert reg.measure()["0.weight"].step == 0
        handle = reg.attach(optimizer, every=1)
        assert "attached to SGD, every=1" in repr(reg)
        handle.remove()
        reg.attach(optimizer, every=1)


def test_invalid_rules_are_rejected_in_one_line() -> None:
    model = net()
    regularizer = wc.Regularizer(model, wc.ConditionPenalty(0.5))
    for wrong in (0.1, "condition", regularizer, {"*": 0.1}, {1: None}):
        said = r"`rules` must (be a rule or map|have patterns of type str)"
        with pytest.raises(TypeError, match=said) as caught:
            wc.Regularizer(model, wrong)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)


def test_attach_rejects_invalid_arguments() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.5))
    for every in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="`every` must be a positive integer"):
            reg.attach(optimizer, every=every)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must have at least one regularised weight"):
        reg.attach(torch.optim.SGD(net().parameters(), 0.1))
    with pytest.raises(TypeError, match=r"must be a torch.optim.Optimizer, got Sequential"):
        reg.attach(model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got list\. Attach to several optimizers one by one"):
        reg.attach([optimizer])  # type: ignore[arg-type]
    reg.attach(optimizer)
    with pytest.raises(ValueError, match="must not be attached twice"):
        reg.attach(optimizer)


def test_new_optimizer_after_a_deleted_one_warns_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.5))
    reg.attach(optimizer, every=1)
    with caplog.at_level(logging.WARNING, "wellcond"):
        successor = torch.optim.SGD(model.parameters(), 0.1)
        train(model, successor, 1)
        assert not caplog.records  # the attached one lives
        del optimizer
        gc.collect()
        assert not caplog.records  # training usually ends this way
        other = net()
        train(other, torch.optim.SGD(other.parameters(), 0.1), 1)
        assert not caplog.records  # another model
        train(model, successor, 3)
        assert [record.message.count("was deleted") for record in caplog.records] == [1]
    assert "a deleted optimizer" in repr(reg)
    reg.detach()
    reg.attach(successor)


def test_copied_optimizer_is_not_attached_and_warns(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.5))
    reg.attach(optimizer, every=1)
    restored = torch.optim.SGD(model.parameters(), 0.1)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer = restored
    gc.collect()
    with caplog.at_level(logging.WARNING, "wellcond"):
        train(model, optimizer, 2)
    assert len(caplog.records) == 1


def test_optimizer_keeps_the_regulariser_alive() -> None:
    model = net(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    wc.Regularizer(model, wc.ConditionPenalty(1e3)).attach(optimizer, every=1)
    gc.collect()
    before = wc.condition_number(model[0].weight)
    optimizer.param_groups[0]["lr"] = 1e-4
    model(torch.ones(1, 20, dtype=torch.float64)).sum().mul(0).backward()
    optimizer.step()
    assert wc.condition_number(model[0].weight) < before


# --- strengths ------------------------------------------------------------------------------------


def test_schedules_take_the_number_of_applications() -> None:
    seen: list[int] = []

    def strength(step: int) -> float:
        seen.append(step)
        return 0.1 * step

    layer = gap()
    reg = wc.Regularizer(layer, wc.ConditionPenalty(strength))
    for _ in range(3):
        reg.add_gradients()
    assert seen == [0, 1, 2]
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    reg.attach(optimizer, every=2)
    for _ in range(4):
        optimizer.step()
    assert seen == [0, 1, 2, 5, 7]


def test_negative_schedule_is_named() -> None:
    reg = wc.Regularizer(gap(), wc.ConditionPenalty(lambda step: -1.0))
    with pytest.raises(ValueError, match=r"`strength\(0\)` must be finite and not negative"):
        reg.add_gradients()


# --- state and memory -----------------------------------------------------------------------------


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class LargestAllocation(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and storage(made) not in inputs:
                self.numel = max(self.numel, made.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("kind", ["linear", "kernel", "channels_last", "stack", "bfloat16"])
def test_no_temporary_of_the_size_of_the_weight(kind: str) -> None:
    module: nn.Module = nn.Linear(320, 320, bias=False)
    if kind in ("kernel", "channels_last"):
        module = nn.Conv2d(32, 300, 3, bias=False)
    if kind == "channels_last":
        module = module.to(memory_format=torch.channels_last)
    if kind == "stack":
        module = nn.Bilinear(200, 200, 3, bias=False)
    if kind == "bfloat16":
        module = module.bfloat16()
    weight = module.weight
    weight.grad = torch.zeros_like(weight)
    reg = wc.Regularizer(module, wc.ConditionPenalty(1.0), block_size=8)
    with LargestAllocation() as largest:
        reg.add_gradients()
        if kind != "bfloat16":
            reg.proximal_step(0.1)
    assert 0 < largest.numel < weight.numel() / 3
    state = sum(t.numel() for entry in reg.state_dict().values() for t in entry.values())
    m, n = weight.flatten(1).shape if weight.ndim == 4 else weight.shape[-2:]
    assert state <= (m + n) * 8 * (3 if kind == "stack" else 1) + 8


def test_no_side_effects_on_model_and_global_generator(
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = net().train()
    optimizer = torch.optim.Adam(model.parameters())
    keys, hooks = list(model.state_dict()), dict(model[0]._forward_pre_hooks)
    weights = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.1))
    reg.attach(optimizer)
    reg.add_gradients()
    reg()
    reg.measure()
    repr(reg)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(model.state_dict()) == keys
    assert model.training
    assert dict(model[0]._forward_pre_hooks) == hooks
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])
    copy.deepcopy(model)
    torch.save(model, io.BytesIO())
    assert capfd.readouterr() == ("", "")


def test_same_seed_same_numbers() -> None:
    runs = []
    for _ in range(2):
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        reg = wc.Regularizer(model, wc.ConditionPenalty(0.1), block_size=4)
        reg.attach(optimizer, every=2)
        train(model, optimizer, 9, reg)
        runs.append(model[0].weight.detach().clone())
    assert torch.equal(*runs)


def flattened(reg: wc.Regularizer) -> dict[str, Tensor]:
    return {f"{w}/{k}": v for w, state in reg.state_dict().items() for k, v in state.items()}


def test_only_applications_change_the_subspace() -> None:
    model = net()
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.1), block_size=4)
    start = flattened(reg)
    reg.measure()
    with torch.no_grad():
        reg()
    for key, value in flattened(reg).items():
        assert torch.equal(value, start[key]), key
    for apply in (reg, reg.add_gradients, lambda: reg.proximal_step(0.1)):
        before = flattened(reg)
        apply()
        after = flattened(reg)
        assert not torch.equal(before["0.weight/basis"], after["0.weight/basis"])


@pytest.mark.parametrize("at", [1, 4, 7])
def test_resuming_is_bitwise(at: int) -> None:
    def start() -> tuple[nn.Sequential, torch.optim.Optimizer, wc.Regularizer]:
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        strength = lambda step: 0.1 + 0.01 * step  # noqa: E731
        reg = wc.Regularizer(model, wc.ConditionPenalty(strength), block_size=4)
        reg.attach(optimizer, every=3)
        return model, optimizer, reg

    model, optimizer, reg = start()
    file = io.BytesIO()
    for step in range(12):
        if step == at:
            torch.save([part.state_dict() for part in (model, optimizer, reg)], file)
        train(model, optimizer, 1, reg)
    resumed = start()
    file.seek(0)
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    for _ in range(12 - at):
        train(resumed[0], resumed[1], 1, resumed[2])
    for one, other in zip(model.parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(one, other)
    for key, value in flattened(reg).items():
        assert torch.equal(value, flattened(resumed[2])[key]), key


def test_state_shapes_are_constant() -> None:
    model = net()
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.1), block_size=4)
    before = {key: (value.shape, value.dtype) for key, value in flattened(reg).items()}
    reg.add_gradients()
    assert {key: (value.shape, value.dtype) for key, value in flattened(reg).items()} == before


def test_mismatched_state_is_rejected_without_changes() -> None:
    model = net()
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.1), block_size=4)
    reg.add_gradients()
    good, before = reg.state_dict(), flattened(reg)
    wide = wc.Regularizer(model, wc.ConditionPenalty(0.1), block_size=5).state_dict()
    fewer = {"0.weight": good["0.weight"]}
    lacking = {name: {k: v for k, v in s.items() if k != "step"} for name, s in good.items()}
    integer = {name: {**s, "basis": s["basis"].long()} for name, s in good.items()}
    half_bad = {"0.weight": wide["2.weight"] | good["0.weight"], "2.weight": wide["2.weight"]}
    for state, message in (
        (wide, r"must have shape \(20, 4\), got \(20, 5\)"),
        (fewer, 'lacks "2.weight"'),
        (good | {"other": good["0.weight"]}, 'additionally has "other"'),
        (lacking, "got none"),
        (integer, "must be floating point"),
        (half_bad, "must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            reg.load_state_dict(state)
        for key, value in flattened(reg).items():
            assert torch.equal(value, before[key]), key


def test_subspace_starts_from_weights_loaded_after_construction() -> None:
    layer = gap()
    reg = wc.Regularizer(layer, wc.ConditionPenalty(1.0), block_size=3)
    layer.load_state_dict(linear([7.0, 2.0, 1.0, 1, 1, 1, 1, 1, 1], seed=5).state_dict())
    torch.testing.assert_close(reg.measure()["weight"].sigma_max, 7.0, rtol=1e-3, atol=0)


# --- unusual weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("penalty_type", [wc.ConditionPenalty, wc.TikhonovPenalty])
def test_weight_that_is_not_finite_is_named_and_nothing_changes(
    penalty_type: type, bad: float
) -> None:
    model = net()
    reg = wc.Regularizer(model, penalty_type(0.1), block_size=4)
    reg.add_gradients()
    with torch.no_grad():
        kept = model[2].weight[0, 0].clone()
        model[2].weight[0, 0] = bad  # the last weight: the first must not change before it
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    reg.attach(optimizer, every=1)
    before, weights = flattened(reg), copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in (model[0].weight, model[2].weight)]
    for apply in (reg, reg.add_gradients, lambda: reg.proximal_step(0.1)):
        with pytest.raises(ValueError, match=r'"2\.weight" contains NaN or infinity'):
            apply()
    model[0].weight.grad, model[2].weight.grad = (torch.zeros_like(g) for g in gradients)
    with pytest.raises(ValueError, match=r'"2\.weight" contains NaN or infinity'):
        optimizer.step()
    after = flattened(reg)
    for key in before:
        if "pending" not in key and "step" not in key:
            assert torch.equal(before[key], after[key]), key
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=0, equal_nan=True)
    estimates = reg.measure()
    assert "not finite" in estimates["2.weight"].status
    assert math.isnan(estimates["2.weight"].sigma_max)
    assert estimates["0.weight"].status == ""
    with torch.no_grad():
        model[2].weight[0, 0] = kept
    reg.add_gradients()
    assert reg.measure()["2.weight"].status == ""


def test_gradients_unchanged_if_a_weight_is_not_finite() -> None:
    model = net()
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.1))
    reg.add_gradients()
    before = [p.grad.clone() for p in (model[0].weight, model[2].weight)]
    with torch.no_grad():
        model[2].weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"2.weight"):
        reg.add_gradients()
    for parameter, gradient_ in zip((model[0].weight, model[2].weight), before, strict=True):
        assert torch.equal(parameter.grad, gradient_)


def test_zero_weight_is_reported_and_recovers() -> None:
    layer = gap()
    weight = layer.weight.detach().clone()
    reg = wc.Regularizer(layer, wc.ConditionPenalty(0.5), block_size=3)
    with torch.no_grad():
        layer.weight.zero_()
    assert reg().item() == 0
    reg.add_gradients()
    reg.proximal_step(0.1)
    assert not layer.weight.any()
    assert not layer.weight.grad.any()
    assert "zero" in reg.measure()["weight"].status
    with torch.no_grad():
        layer.weight.copy_(weight)
    converge(reg)
    torch.testing.assert_close(reg().item(), 0.5 * penalty(weight))


@pytest.mark.parametrize(
    "shape", [(1, 6), (6, 1), (1, 1), (40, 3), (3, 40)], ids=lambda shape: f"{shape[0]}x{shape[1]}"
)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e15])
def test_narrow_and_scaled_weights_equal_dense(shape: tuple[int, int], scale: float) -> None:
    layer = nn.Linear(shape[1], shape[0], bias=False)
    with torch.no_grad():
        source = torch.Generator().manual_seed(0)
        layer.weight.copy_(scale * torch.randn(shape, generator=source))
    reg = wc.Regularizer(layer, wc.ConditionPenalty(0.5))
    converge(reg)
    reg.add_gradients()
    sigma = torch.linalg.svdvals(layer.weight.detach().double())[0]
    # Single-precision vectors of a spectrum with gaps of a tenth.
    expected = 0.5 * gradient(layer.weight.detach())
    torch.testing.assert_close(
        layer.weight.grad.double(), expected, rtol=0, atol=1e-4 * float(sigma)
    )
    expected = proximal_step(layer.weight.detach(), 0.25)
    reg.proximal_step(0.5)
    torch.testing.assert_close(
        layer.weight.detach().double(), expected, rtol=0, atol=1e-4 * float(sigma)
    )


def test_rank_one_weight_keeps_rank_and_is_bounded() -> None:
    layer = linear([3.0])
    reg = wc.Regularizer(layer, wc.ConditionPenalty(0.5), block_size=3)
    for _ in range(10):
        reg.proximal_step(0.1)
    sigma = torch.linalg.svdvals(layer.weight.detach())
    # One singular value: sigma (1 + eta/nu)/(1 + eta), each step.
    torch.testing.assert_close(float(sigma[0]), 3 * ((1 + 0.05 / 9) / 1.05) ** 10)
    assert sigma[1] < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_equal_dense(dtype: torch.dtype) -> None:
    layer = gap().to(dtype)
    reg = wc.Regularizer(layer, wc.ConditionPenalty(0.5), block_size=4)
    converge(reg)
    reg.add_gradients()
    expected = 0.5 * gradient(layer.weight.detach())
    assert layer.weight.grad.dtype == dtype
    # One rounding to the storage type.
    torch.testing.assert_close(
        layer.weight.grad.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5
    )
    layer.weight.grad = None
    reg().backward()
    torch.testing.assert_close(
        layer.weight.grad.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5
    )
    assert reg().dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("penalty", [wc.ConditionPenalty(1.0), wc.TikhonovPenalty(1.0)])
def test_proximal_steps_in_half_precision_are_unbiased(
    dtype: torch.dtype, penalty: wc.ConditionPenalty
) -> None:
    """Steps far below the spacing of numbers are taken with the right frequency."""
    layer = gap().to(dtype)
    before = layer.weight.detach().clone()
    eta, times = 5e-5, 1500
    wide = before.double()
    exact = (
        proximal_step(wide, eta) if isinstance(penalty, wc.ConditionPenalty) else wide / (1 + eta)
    )
    # Rounding to nearest would change hardly anything.
    assert int((exact.to(dtype) != before).sum()) <= 4
    reg = wc.Regularizer(layer, penalty)
    converge(reg)
    total = torch.zeros_like(wide)
    with torch.no_grad():
        for _ in range(times):
            reg.proximal_step(eta)
            total += layer.weight.double()
            distance = (layer.weight.double() - exact).abs()
            assert bool((distance <= wide.abs() * torch.finfo(dtype).eps).all())
            layer.weight.copy_(before)
    # A binomial count of probability p has a variance of at most p; five standard deviations.
    spacing = torch.finfo(dtype).eps * 2.0 ** wide.abs().log2().floor()
    moved = (exact - wide).abs()
    assert bool((moved > 0).any())
    error = (total / times - exact).abs()
    assert bool((error <= 5 * (moved * spacing / times).sqrt() + 5 * spacing / times).all())


def test_stochastic_rounding_is_deterministic_and_uses_its_own_generator() -> None:
    weights = []
    for _ in range(2):
        state = torch.get_rng_state()
        layer = gap().bfloat16()
        reg = wc.Regularizer(layer, wc.ConditionPenalty(1.0))
        before = layer.weight.detach().clone()
        torch.set_rng_state(state)
        reg.proximal_step(0.01)
        first = layer.weight.detach().clone()
        with torch.no_grad():
            layer.weight.copy_(before)
        reg.proximal_step(0.01)
        assert not torch.equal(layer.weight, first)  # each step draws anew
        assert torch.equal(torch.get_rng_state(), state)
        weights.append(layer.weight.detach().clone())
    assert torch.equal(*weights)


def test_an_optimizer_in_half_precision_lowers_kappa() -> None:
    torch.manual_seed(0)
    layer = gap().bfloat16()
    optimizer = torch.optim.SGD(layer.parameters(), 1e-3)
    wc.Regularizer(layer, wc.ConditionPenalty(2.0)).attach(optimizer, every=1)
    before = float(wc.condition_number(layer.weight))
    for _ in range(400):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
    assert float(wc.condition_number(layer.weight)) < 0.8 * before


def test_autocast_has_no_effect() -> None:
    layer, plain = gap().float(), gap().float()
    reg, other = (wc.Regularizer(x, wc.ConditionPenalty(0.5), block_size=4) for x in (layer, plain))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = reg()
    loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reg.proximal_step(0.01)
    value = other()
    value.backward()
    other.proximal_step(0.01)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, value)
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.weight.grad, plain.weight.grad)


def test_gradient_in_another_memory_layout() -> None:
    conv = nn.Conv2d(3, 8, 3, bias=False).double().to(memory_format=torch.channels_last)
    conv.weight.grad = torch.zeros(8, 3, 3, 3, dtype=torch.float64)  # contiguous
    reg = wc.Regularizer(conv, wc.ConditionPenalty(1.0))
    converge(reg)
    reg.add_gradients()
    expected = gradient(conv.weight.detach().contiguous().flatten(1)).reshape(8, 3, 3, 3)
    torch.testing.assert_close(conv.weight.grad, expected)


def test_blocks_of_one_parameter_are_regularised_separately() -> None:
    attention = nn.MultiheadAttention(6, 2, dtype=torch.float64)
    reg = wc.Regularizer(
        attention, {"in_proj_weight:q": wc.ConditionPenalty(1.0), "*:v": wc.TikhonovPenalty(1.0)}
    )
    q, k, v = attention.in_proj_weight.detach().clone().chunk(3)
    converge(reg)
    reg.proximal_step(0.3)
    new = attention.in_proj_weight.detach().chunk(3)
    for one, expected in zip(new, (proximal_step(q, 0.3), k, v / 1.3), strict=True):
        torch.testing.assert_close(one, expected)


def test_replaced_parameters_are_followed() -> None:
    layer = gap()
    reg = wc.Regularizer(layer, wc.ConditionPenalty(1.0))
    layer.load_state_dict(gap().state_dict(), assign=True)
    reg.add_gradients()
    assert layer.weight.grad is not None


def test_measure_sigma_max_and_residual_enclose_the_true_value() -> None:
    layer = gap()
    reg = wc.Regularizer(layer, wc.ConditionPenalty(0.25), block_size=2)
    sigma = torch.linalg.svdvals(layer.weight.detach())
    estimate = reg.measure()["weight"]
    assert estimate.sigma_max <= float(sigma[0]) * (1 + 1e-14)
    assert float((sigma - estimate.sigma_max).abs().min()) <= estimate.residual + 1e-14
    assert estimate.strength == 0.25
    assert estimate.penalty <= penalty(layer.weight.detach()) * (1 + 1e-14)


def test_all_weights_frozen_later_is_a_no_op() -> None:
    layer = gap()
    reg = wc.Regularizer(layer, wc.ConditionPenalty(1.0))
    layer.requires_grad_(False)
    assert reg().item() == 0
    reg.add_gradients()
    reg.proximal_step(0.1)
    assert layer.weight.grad is None


@pytest.mark.parametrize("block_size", [0, -1, 2.0, True])
def test_invalid_block_size_is_rejected(block_size: object) -> None:
    with pytest.raises(ValueError, match="`block_size` must be a positive integer"):
        wc.Regularizer(gap(), wc.ConditionPenalty(1.0), block_size=block_size)  # type: ignore[arg-type]


def test_proximal_step_rejects_invalid_arguments() -> None:
    reg = wc.Regularizer(gap(), wc.ConditionPenalty(1.0))
    for lr in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="`lr` must be finite and not negative"):
            reg.proximal_step(lr)
    for steps in (0, -2, 1.0):
        with pytest.raises(ValueError, match="`steps` must be a positive integer"):
            reg.proximal_step(0.1, steps=steps)  # type: ignore[arg-type]


def test_repr_names_regularised_and_skipped_weights() -> None:
    text = repr(wc.Regularizer(net(), {"0.*": wc.ConditionPenalty(0.1), "*": None}))
    for part in (
        "0.weight",
        "16x20",
        "ConditionPenalty(strength=0.1)",
        "2.weight",
        'a pattern: "*"',
    ):
        assert part in text


def test_weight_removed_from_the_optimizer_is_named() -> None:
    layer = gap()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    wc.Regularizer(layer, wc.ConditionPenalty(0.1)).attach(optimizer, every=1)
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    with pytest.raises(ValueError, match=r'no longer contains "weight"'):
        optimizer.step()


def test_weights_on_several_devices() -> None:
    """The meta device stands for a second one: code that mixes devices fails there too."""
    model = nn.Sequential(nn.Linear(6, 5, device="meta"), nn.Linear(5, 4), nn.Linear(5, 4))
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.1), block_size=2)
    with on_a_device():
        reg().backward()
        reg.add_gradients()
        reg.proximal_step(0.1)
    assert {p.grad.device.type for p in model.parameters() if p.grad is not None} == {"cpu", "meta"}


def test_model_moves_to_another_device_after_construction() -> None:
    """Warm or not, the entire state moves with it; nothing remains on the old device."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    reg = wc.Regularizer(
        model, {"0.*": wc.ConditionPenalty(0.1), "1.*": wc.TikhonovPenalty(0.1)}, block_size=2
    )
    reg.add_gradients()
    model.zero_grad()
    model.to("meta")
    with on_a_device():
        reg().backward()
        reg.add_gradients()
        reg.proximal_step(0.1)
    assert {p.grad.device.type for p in model.parameters() if p.grad is not None} == {"meta"}
    for state in reg._states:
        kept = (state.subspace.basis, state.strength, state.shortened)
        assert {tensor.device.type for tensor in kept} == {"meta"}
