"""Likely mistakes are logged once with the names of the weights; correct use logs nothing."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import wellcond as wc


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.ones(2, 6)).square().mean().backward()
        optimizer.step()


def test_no_warning_when_used_correctly(said: Callable[[], list[str]]) -> None:
    model = net()
    optimizer = sgd(model)
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.1))
    reg.attach(optimizer, every=1)
    limit = wc.Regularizer(model, wc.ConditionLimit(50.0))
    limit.attach(optimizer, every=2)
    with torch.no_grad():
        reg()
    reg.measure()
    steps(model, optimizer, 30)
    reg.detach()
    other = wc.Regularizer(model, wc.ConditionPenalty(0.1))
    other.attach(optimizer, every=1)
    steps(model, optimizer)
    assert said() == []


def test_weight_outside_attached_optimizers_warns(
    said: Callable[[], list[str]],
) -> None:
    model = net()
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.1))
    first, second = sgd(model[0]), sgd(model[2])
    reg.attach(first, every=1)
    steps(model, first)
    (message,) = said()
    assert '"2.weight" is regularised, but not in an attached optimizer' in message
    both = wc.Regularizer(model, wc.ConditionPenalty(0.1))
    reg.detach()
    both.attach(first, every=1)
    both.attach(second, every=1)
    steps(model, first)
    assert len(said()) == 1


def test_replaced_layer_warns(said: Callable[[], list[str]]) -> None:
    model = net()
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.1))
    for _ in range(5):
        reg.add_gradients()
    assert said() == []
    model[2] = nn.Linear(5, 3)
    for _ in range(20):
        reg.add_gradients()
    (message,) = said()
    assert '"2.weight" is in a layer that is no longer part of the model' in message


@pytest.mark.parametrize("call", ["reg()", "add_gradients()"])
def test_penalty_applied_twice_warns(call: str, said: Callable[[], list[str]]) -> None:
    model = net()
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.1))
    reg.attach(sgd(model))
    for _ in range(3):
        reg() if call == "reg()" else reg.add_gradients()
    (message,) = said()
    expected = f"is applied twice: by the attachment to an optimizer and by {call}. Remove one"
    assert f'"0.weight", "2.weight" {expected}' in message


def test_two_regularisers_on_one_weight_warn(
    said: Callable[[], list[str]],
) -> None:
    """As when a notebook cell is run again: the optimizer keeps the first one alive."""
    model = net()
    optimizer = sgd(model)
    for _ in range(2):
        reg = wc.Regularizer(model, {"0.*": wc.ConditionPenalty(0.1), "*": None})
        reg.attach(optimizer)
    (message,) = said()
    assert '"0.weight" is also regularised by another Regularizer' in message
    assert len(reg.attachments) == 1


@pytest.mark.parametrize("acting", [True, False])
def test_batch_norm_under_an_acting_limit_warns(
    acting: bool, said: Callable[[], list[str]]
) -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    wc.Regularizer(model, wc.SingularValueLimit(upper=1, acting=acting)).enforce()
    assert any("The model contains BatchNorm (1)" in one for one in said()) is acting


def test_weight_parametrized_later_is_rejected() -> None:
    layer = nn.Linear(4, 4)
    reg = wc.Regularizer(layer, wc.ConditionPenalty(0.1))
    nn.utils.parametrizations.spectral_norm(layer)
    with pytest.raises(ValueError, match=r"must still be a parameter.*Create a new Regularizer"):
        reg()


# --- models without values, copies ----------------------------------------------------------------


def test_regulariser_created_on_meta_follows_the_model() -> None:
    with torch.device("meta"):
        model = net()
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.5), block_size=4)
    assert "0.weight" in repr(reg)
    model.to_empty(device="cpu")
    model.load_state_dict(net().state_dict())
    fresh = net()
    expected = wc.Regularizer(fresh, wc.ConditionPenalty(0.5), block_size=4)
    for one, other in ((reg, model), (expected, fresh)):
        one().backward()
        one.attach(sgd(other), every=1)
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        if q.grad is not None:
            assert p.grad is not None
            assert torch.equal(p.grad, q.grad)
    assert reg.measure() == expected.measure()


def test_state_loaded_on_meta_is_kept() -> None:
    trained = net()
    reg = wc.Regularizer(trained, wc.ConditionPenalty(0.5), block_size=4)
    for _ in range(3):
        reg.add_gradients()
    with torch.device("meta"):
        model = net()
    resumed = wc.Regularizer(model, wc.ConditionPenalty(0.5), block_size=4)
    resumed.load_state_dict(reg.state_dict())
    model.to_empty(device="cpu")
    model.load_state_dict(trained.state_dict())
    resumed.add_gradients()
    reg.add_gradients()
    for name, state in reg.state_dict().items():
        for key, value in state.items():
            assert torch.equal(resumed.state_dict()[name][key], value), key


def test_unpickled_regulariser_is_detached() -> None:
    model = net()
    optimizer = sgd(model)
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.1), block_size=4)
    reg.attach(optimizer, every=1)
    steps(model, optimizer)
    file = io.BytesIO()
    torch.save((model, reg), file)
    file.seek(0)
    for other, copied in (
        pickle.loads(pickle.dumps((model, reg))),
        copy.deepcopy((model, reg)),
        torch.load(file, weights_only=False),
    ):
        assert copied.attachments == []
        assert len(reg.attachments) == 1
        assert copied.measure() == reg.measure()
        copied.attach(sgd(other), every=1)
        steps(other, torch.optim.SGD(other.parameters(), 0.1), 1)
        copied.add_gradients()


def test_complex_model_is_rejected_with_the_reason() -> None:
    model = nn.Linear(3, 3, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"contains no matrix \(weight: not real floating point"):
        wc.Regularizer(model, wc.ConditionPenalty(0.1))


# --- enforce --------------------------------------------------------------------------------------


def test_enforce_applies_only_limits() -> None:
    model = net()
    reg = wc.Regularizer(model, {"0.*": wc.ConditionLimit(1.5), "*": wc.ConditionPenalty(1.0)})
    optimizer = sgd(model)
    reg.attach(optimizer, every=100)
    steps(model, optimizer, 5)
    before, state = model[2].weight.clone(), reg.state_dict()
    assert float(wc.condition_number(model[0].weight)) > 1.5
    reg.enforce()
    assert float(wc.condition_number(model[0].weight)) <= 1.5
    assert torch.equal(model[2].weight, before)
    after = reg.state_dict()
    assert int(after["0.weight"]["pending_steps"]) == 0  # pending steps have been applied
    for key in set(after["0.weight"]) - {"pending_steps", "pending_lr", "pace"}:
        assert torch.equal(after["0.weight"][key], state["0.weight"][key])
    for key, value in after["2.weight"].items():
        assert torch.equal(value, state["2.weight"][key])
    weight = model[0].weight.clone()
    reg.enforce()
    assert torch.equal(model[0].weight, weight)
    wc.Regularizer(model, wc.ConditionPenalty(1.0)).enforce()
    assert torch.equal(model[0].weight, weight)


def test_enforce_skips_and_names_frozen_weights(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = net()
    reg = wc.Regularizer(model, wc.ConditionLimit(1.5))
    model.requires_grad_(False)
    before = model[0].weight.clone()
    reg.enforce()
    assert torch.equal(model[0].weight, before)
    assert "are under a hard limit, but frozen, and so left unchanged" in caplog.text


def test_log_warns_of_limits_that_are_not_applied(
    said: Callable[[], list[str]],
) -> None:
    def log(reg: wc.Regularizer) -> None:
        reg.log(lambda values, step: None, step=0)

    model = net()
    reg = wc.Regularizer(model, wc.ConditionLimit(2.0))
    assert "not attached to an optimizer: only enforce() applies the limits" in repr(reg)
    reg.enforce()  # which can be intended
    assert said() == []
    log(reg)
    log(reg)
    (message,) = said()
    assert message.startswith('"0.weight", "2.weight" are under a hard limit that is not applied')
    by_hand, attached, penalty = (
        wc.Regularizer(model, rule)
        for rule in (wc.ConditionLimit(2.0), wc.ConditionLimit(2.0), wc.ConditionPenalty(0.1))
    )
    by_hand.proximal_step(0.1)
    attached.attach(sgd(model))
    assert "not attached to an optimizer" not in repr(attached)
    attached.detach()  # as a callback does at the end
    for one in (by_hand, attached, penalty):
        log(one)
    assert len(said()) == 1
