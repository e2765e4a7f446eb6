"""`attach` refuses an optimizer that it cannot serve, and says where steps are never seen."""

import functools
import gc
import importlib
import math
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

import foreign
import wellcond as wc
from wellcond.training import attachment as attachment_module
from wellcond.training.state import WeightState

K = wc.ConditionLimit(3.0)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 8))


def loss(model: nn.Module) -> Tensor:
    total: Tensor = (model(torch.ones(4, 12)) - 1).square().mean()
    return total


def steps(model: nn.Module, optimizer: Optimizer, count: int = 1) -> None:
    for _ in range(count):
        model.zero_grad()
        loss(model).backward()
        optimizer.step()


def kappas(model: nn.Module) -> list[float]:
    return [float(wc.condition_number(model[i].weight.detach())) for i in (0, 2)]  # type: ignore[index]


def looked(state: WeightState) -> int:
    """How often a weight was looked at or decomposed: at least once per step, if it is small."""
    return state.record.looks + state.record.decompositions


# --- learning rates -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [foreign.RelativeStep, foreign.Rateless])
@pytest.mark.parametrize("every", [None, 1])
def test_a_limit_holds_under_an_optimizer_without_a_learning_rate(
    kind: type[foreign.RelativeStep], every: int | None
) -> None:
    model = net()
    optimizer = kind(model.parameters())
    reg = wc.Regularizer(model, K)
    reg.attach(optimizer, every=every)
    steps(model, optimizer, 2)
    assert max(kappas(model)) < 3.3
    steps(model, optimizer, 40)
    if every is None:
        assert all(looked(state) >= 42 for state in reg._states)
    else:
        assert min(int(s["pace"][0]) for s in reg.state_dict().values()) == 42
    assert max(kappas(model)) <= 3.0 * 1.01
    wc.Regularizer(model, wc.IsometryStep()).attach(optimizer)  # its steps know no learning rate


@pytest.mark.parametrize("kind", [foreign.RelativeStep, foreign.Rateless])
@pytest.mark.parametrize("every", [None, 1])
def test_a_penalty_without_a_learning_rate_is_refused_when_it_is_attached(
    kind: type[foreign.RelativeStep], every: int | None
) -> None:
    model = net()
    reg = wc.Regularizer(model, {"0.*": K, "2.*": wc.ConditionPenalty(0.1)})
    with pytest.raises(
        ValueError, match=rf'{kind.__name__} has no number under "lr" in the group of "2.weight"'
    ):
        reg.attach(kind(model.parameters()), every=every)
    assert reg.attachments == []


def test_a_learning_rate_that_is_lost_later_is_named_and_those_of_other_groups_are_not() -> None:
    model = net()
    groups = [{"params": model[i].parameters(), "lr": 0.1} for i in (0, 2)]
    optimizer = foreign.RelativeStep(groups)
    wc.Regularizer(model, wc.ConditionPenalty(0.1)).attach(optimizer, every=1)
    steps(model, optimizer)
    optimizer.param_groups[1]["lr"] = None
    with pytest.raises(ValueError, match=r'in the group of "2\.weight"'):
        steps(model, optimizer)


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), -1.0])
def test_a_strange_learning_rate_does_not_stop_limits(lr: float) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    reg = wc.Regularizer(model, K)
    reg.attach(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = lr
    for _ in range(60):
        for hook in tuple(optimizer._optimizer_step_post_hooks.values()):
            hook(optimizer, (), {})
    assert all(looked(state) >= 60 for state in reg._states)


@pytest.mark.parametrize("lr", [np.float32(0.1), torch.tensor(0.1), torch.tensor([0.1])])
def test_numbers_of_other_libraries_are_learning_rates(lr: Any) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.param_groups[0]["lr"] = lr
    reg = wc.Regularizer(model, {"0.*": K, "2.*": wc.ConditionPenalty(0.1)})
    reg.attach(optimizer, every=3)
    for hook in tuple(optimizer._optimizer_step_post_hooks.values()):
        hook(optimizer, (), {})
    for state in reg._states:
        assert float(state.pending_lr) == pytest.approx(0.1)


# --- hooks ----------------------------------------------------------------------------------------


def test_an_optimizer_whose_step_runs_no_hooks_is_refused_and_the_way_out_works() -> None:
    class Fresh(foreign.Lookahead):  # a class of its own, as torch adds hooks to classes
        def step(self, closure: Any = None) -> None:
            self._base_optimizer.step(closure)

    model = net()
    optimizer = Fresh(torch.optim.SGD(model.parameters(), 0.1))
    reg = wc.Regularizer(model, K)
    with pytest.raises(ValueError, match=r"Fresh.step runs none.*optimizer.zero_grad\(\) before"):
        reg.attach(optimizer)
    optimizer.zero_grad()
    handle = reg.attach(optimizer, every=1)
    steps(model, optimizer, 5)
    assert handle.steps == 5
    assert max(kappas(model)) <= 3.0


def test_an_optimizer_by_name_alone_is_refused() -> None:
    model = net()
    with pytest.raises(TypeError, match="If it wraps one, attach to that"):
        wc.Regularizer(model, K).attach(foreign.NoTables(torch.optim.SGD(model.parameters(), 0.1)))


def test_a_step_that_calls_that_of_its_base_class_counts_once() -> None:
    torch.optim.SGD(net().parameters(), 0.1)  # from here on its step runs hooks
    model = net()
    optimizer = foreign.Within(model.parameters(), 0.1)
    reg = wc.Regularizer(model, {"0.*": wc.ConditionPenalty(0.1)})
    handle = reg.attach(optimizer, every=100)
    steps(model, optimizer, 5)
    assert handle.steps == 5
    assert int(reg.state_dict()["0.weight"]["pending_steps"]) == 5

    def failing() -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(failing)
    steps(model, optimizer, 5)  # of the first it cannot be told that it is no part of the other
    assert handle.steps in (9, 10)
    handle.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_steps_that_raise_an_exception_hide_no_others() -> None:
    model = net()
    optimizer = torch.optim.Adadelta(model.parameters(), 0.1)  # of no other that has a step
    handle = wc.Regularizer(model, K).attach(optimizer, every=1)

    def failing() -> Tensor:
        raise ZeroDivisionError

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            optimizer.step(failing)
        steps(model, optimizer)
    assert handle.steps == 3


def test_a_compiled_step_is_served_compiled_before_or_after() -> None:
    for before in (True, False):
        torch._dynamo.reset()
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        reg = wc.Regularizer(model, K)
        if before:
            reg.attach(optimizer, every=1)
        optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore[method-assign]
        if not before:
            reg.attach(optimizer, every=1)
        steps(model, optimizer, 3)
        assert reg.attachments[0].steps == 3
        assert max(kappas(model)) <= 3.0


def test_a_scheduler_that_wraps_the_step_changes_nothing(said: Callable[[], list[str]]) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    reg = wc.Regularizer(model, K)
    reg.attach(optimizer, every=1)
    steps(model, optimizer, 3)
    assert reg.attachments[0].steps == 3
    assert said() == []


# --- steps that are never seen --------------------------------------------------------------------


def test_sam_in_two_steps_is_named_at_once_and_again_by_its_steps(
    said: Callable[[], list[str]],
) -> None:
    model = net()
    optimizer = foreign.TwoStep(model.parameters(), torch.optim.Adam, lr=1e-2)
    reg = wc.Regularizer(model, K)
    reg.attach(optimizer)
    assert "first_step() and second_step()" in said()[0]
    assert "Attach to optimizer.base_optimizer" in said()[0]
    assert repr(reg).endswith("TwoStep, every=1, watched: the optimizer has taken no step")
    for _ in range(6):
        model.zero_grad()
        loss(model).backward()
        optimizer.first_step()
        loss(model).backward()
        optimizer.second_step()
        reg.log(lambda values, step: None, every=10)
    assert len(said()) == 2
    assert said()[1].startswith("TwoStep, to which the regulariser is attached, has taken no step")
    assert min(kappas(model)) > 3.0
    reg.detach()
    reg.attach(optimizer.base_optimizer, every=1)
    loss(model).backward()
    optimizer.first_step()
    loss(model).backward()
    optimizer.second_step()
    assert max(kappas(model)) <= 3.0


def test_sam_by_closure_is_served_by_itself_and_by_what_it_wraps(
    said: Callable[[], list[str]],
) -> None:
    for inner in (False, True):
        model = net()
        optimizer = foreign.TwoStep(model.parameters(), torch.optim.SGD, lr=1e-2)
        reg = wc.Regularizer(model, K)
        handle = reg.attach(optimizer.base_optimizer if inner else optimizer, every=1)
        for _ in range(5):
            loss(model).backward()
            optimizer.step(lambda model=model: loss(model).backward())
            reg.log(lambda values, step: None, every=1)
        assert handle.steps == 5
        assert max(kappas(model)) <= 3.0
    assert len(said()) == 1  # that of attach, which cannot know


def bypassing(optimizer: Optimizer) -> Callable[[], None]:
    """A step that runs no hooks of any optimizer, as one that another library has replaced."""
    return functools.partial(type(optimizer).step.__wrapped__, optimizer)  # type: ignore[attr-defined]


@pytest.mark.parametrize("asked", ["log", "enforce"])
def test_a_step_that_was_replaced_is_told_by_what_it_does_to_the_weights(
    asked: str, said: Callable[[], list[str]]
) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    reg = wc.Regularizer(model, K)
    optimizer.step = bypassing(optimizer)  # type: ignore[method-assign]
    reg.attach(optimizer)
    steps(model, optimizer, 8)
    assert "has taken no step" in repr(reg)
    for _ in range(3):
        if asked == "log":
            reg.log(lambda values, step: None, every=10)
        else:
            reg.enforce()
    at_attach, message = said()
    assert at_attach.startswith("The step of this Adam was replaced by a function that does not")
    assert message.startswith("Adam, to which the regulariser is attached, has taken no step, but")


def writing(optimizer: Optimizer) -> Callable[[], None]:
    """A step that writes to `.data`, which torch does not count."""

    def descend(self: Optimizer) -> None:
        for p in model_parameters(self):
            p.data.add_(p.grad, alpha=-1e-2)

    return types.MethodType(descend, optimizer)


def model_parameters(optimizer: Optimizer) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("asked", ["log", "enforce"])
def test_a_step_that_writes_to_data_is_told_by_a_few_entries(
    asked: str, late: bool, said: Callable[[], list[str]]
) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    reg = wc.Regularizer(model, K)
    if not late:
        optimizer.step = writing(optimizer)  # type: ignore[method-assign]
    reg.attach(optimizer)
    assert len(said()) == (not late)
    optimizer.step = writing(optimizer)  # type: ignore[method-assign]
    for _ in range(3):
        steps(model, optimizer, 1)
        if asked == "log":
            reg.log(lambda values, step: None, step=0)
            reg.log(lambda values, step: None, step=1)  # no report
        else:
            reg.enforce()
    assert "has taken no step, but the weights have changed" in said()[-1]
    assert len(said()) == 1 + (not late)


def test_an_unhooked_loop_over_data_is_told_after_three_looks(
    said: Callable[[], list[str]],
) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    reg = wc.Regularizer(model, K)
    reg.attach(optimizer)
    for look in range(4):
        loss(model).backward()
        writing(optimizer)()
        reg.log(lambda values, step: None, step=0)
        assert bool(said()) == (look >= 2)


def by_partial(optimizer: Optimizer) -> Any:
    return functools.partial(optimizer.step)


def by_accelerate(optimizer: Optimizer) -> Any:
    method = optimizer.step

    def patched_step(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return patched_step


def by_name(optimizer: Optimizer) -> Any:
    return types.MethodType(lambda self, closure=None: type(self).step(self, closure), optimizer)


def by_object(optimizer: Optimizer) -> Any:
    class Caller:
        def __call__(self, *args: Any) -> Any:
            return type(optimizer).step(optimizer, *args)

    return Caller()


def compiled(optimizer: Optimizer) -> Any:
    return torch.compile(optimizer.step, backend="eager")


WRAPPERS = [by_partial, by_accelerate, by_name, by_object, compiled]


@pytest.mark.parametrize("wrapped", WRAPPERS)
def test_a_step_that_is_wrapped_is_not_warned_of(
    wrapped: Callable[[Optimizer], Any], said: Callable[[], list[str]]
) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    optimizer.step = wrapped(optimizer)  # type: ignore[method-assign]
    if hasattr(optimizer.step, "__func__"):  # what a scheduler needs to wrap it once more
        torch.optim.lr_scheduler.ConstantLR(optimizer)
    reg = wc.Regularizer(model, K)
    handle = reg.attach(optimizer)
    steps(model, optimizer, 3)
    reg.enforce()
    assert handle.steps == 3
    assert said() == []


def test_weights_that_are_made_and_loaded_before_the_first_step_are_no_training(
    said: Callable[[], list[str]],
) -> None:
    model = net()
    reg = wc.Regularizer(model, K)
    reg.attach(torch.optim.SGD(model.parameters(), 1e-2))
    for i in (0, 2):
        nn.init.orthogonal_(model[i].weight)  # type: ignore[arg-type]
    for _ in range(2):
        model.load_state_dict(net().state_dict())
    reg.enforce()
    for p in model.parameters():  # an average is swapped in
        p.data.copy_(p.data + 0.1)
    reg.log(lambda values, step: None, step=0)
    reg.enforce()
    assert said() == []


def test_a_weight_with_nan_and_one_on_meta_are_not_taken_for_changed(
    said: Callable[[], list[str]],
) -> None:
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.1))
    reg.attach(torch.optim.SGD(model.parameters(), 1e-2))
    for _ in range(5):
        reg.log(lambda values, step: None, step=0)
    with torch.device("meta"):
        absent = net()
    late = wc.Regularizer(absent, K)
    late.attach(torch.optim.SGD(absent.parameters(), 1e-2))
    absent.to_empty(device="cpu")
    absent.load_state_dict(net().state_dict())
    late.enforce()
    assert said() == []


def test_a_wrapper_that_steps_twice_within_its_step_is_no_other(
    said: Callable[[], list[str]],
) -> None:
    class Twice(Optimizer):
        def __init__(self, inner: Optimizer) -> None:
            super().__init__(inner.param_groups, inner.defaults)
            self.inner = inner
            self.param_groups = inner.param_groups

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for _ in range(2):
                self.inner.step()

    model = net()
    optimizer = Twice(torch.optim.SGD(model.parameters(), 0.1))
    wc.Regularizer(model, K).attach(optimizer, every=1)
    steps(model, optimizer, 2)
    assert max(kappas(model)) <= 3.0
    assert said() == []


def test_before_the_first_step_nothing_is_wrong(said: Callable[[], list[str]]) -> None:
    """States are loaded, limits enforced, gradients accumulated, steps skipped by a scaler."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    reg = wc.Regularizer(model, K)
    reg.attach(optimizer)
    for _ in range(2):
        model.load_state_dict(net().state_dict())
        reg.load_state_dict(reg.state_dict())
        reg.enforce()
        reg.proximal_step(0.1)
        for _ in range(20):
            loss(model).backward()
            reg.log(lambda values, step: None, every=1)
    assert said() == []
    steps(model, optimizer, 30)
    reg.log(lambda values, step: None, every=1)
    reg.enforce()
    assert said() == []
    assert "no step" not in repr(reg)


def test_another_optimizer_that_steps_first_is_named(said: Callable[[], list[str]]) -> None:
    model = net()
    attached, other = (torch.optim.SGD(model.parameters(), 1e-2) for _ in range(2))
    apart = torch.optim.Adam(net().parameters(), 1e-2)
    wc.Regularizer(model, K).attach(attached)
    for _ in range(3):
        apart.step()
    steps(model, other, 1)
    assert said() == []
    steps(model, other, 5)
    (message,) = said()
    assert "but SGD steps" in message


def test_biases_alone_are_refused_and_a_loop_over_the_weights_is_not_in_backward() -> None:
    """As of optimizers that step within backward, one for each parameter."""
    model = net()
    optimizers = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}
    reg = wc.Regularizer(model, K)
    with pytest.raises(ValueError, match="at least one regularised weight, but has none of"):
        reg.attach(optimizers[model[0].bias])
    for name in reg.names:
        reg.attach(optimizers[model.get_parameter(name)], every=1)
    loss(model).backward()
    for optimizer in optimizers.values():
        optimizer.step()
    assert max(kappas(model)) <= 3.0


def test_the_last_optimizer_may_die_while_the_interpreter_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Globals of modules are None by then; an exception in a callback would be printed."""
    unraised: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", unraised.append)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg = wc.Regularizer(model, K)
    reg.attach(optimizer)
    monkeypatch.setattr(attachment_module, "_orphans", None)
    del optimizer
    gc.collect()
    assert unraised == []
    assert "a deleted optimizer" in repr(reg)


# --- optimizers that evaluate other weights than they step ----------------------------------------


@pytest.mark.parametrize("kind", [foreign.ScheduleFree, foreign.Swapping])
def test_enforcing_in_train_mode_is_warned_of_and_in_eval_mode_it_is_right(
    kind: Any, said: Callable[[], list[str]]
) -> None:
    model = net()
    optimizer = kind(model.parameters(), lr=0.1)
    optimizer.train()
    reg = wc.Regularizer(model, K)
    reg.attach(optimizer, every=1)
    steps(model, optimizer, 10)
    reg.enforce()
    reg.enforce()
    (message,) = said()
    known = kind is foreign.ScheduleFree  # of the other no key tells before the first eval()
    start = f"{kind.__name__} is in train mode:" if known else f"If {kind.__name__} is in train"
    assert message.startswith(start)
    assert "optimizer.eval(), then reg.enforce(); and optimizer.train() to go on" in message
    optimizer.eval()
    reg.enforce()
    assert max(kappas(model)) <= 3.0
    optimizer.train()
    optimizer.eval()
    assert max(kappas(model)) <= 3.0 + 1e-4
    assert len(said()) == 1


def test_in_eval_mode_and_under_penalties_nothing_is_said(said: Callable[[], list[str]]) -> None:
    model = net()
    optimizer = foreign.ScheduleFree(model.parameters())
    limit, penalty = wc.Regularizer(model, K), wc.Regularizer(model, wc.ConditionPenalty(0.1))
    limit.attach(optimizer)
    penalty.attach(optimizer)
    optimizer.train()
    penalty.enforce()
    optimizer.eval()
    limit.enforce()
    assert said() == []


def test_a_method_eval_alone_makes_no_train_mode(said: Callable[[], list[str]]) -> None:
    class Evaluating(torch.optim.SGD):
        def eval(self) -> float:
            return 0.0

    model = net()
    optimizer = Evaluating(model.parameters(), 1e-2)
    reg = wc.Regularizer(model, K)
    assert "every=1, watched" in repr(reg.attach(optimizer))
    steps(model, optimizer, 2)
    reg.enforce()
    assert said() == []


@pytest.mark.parametrize("training", [True, False])
def test_a_train_mode_in_an_attribute_is_read(
    training: bool, said: Callable[[], list[str]]
) -> None:
    class Wrapper(torch.optim.SGD):
        train_mode = training

        def eval(self) -> None:
            pass

        def train(self) -> None:
            pass

    model = net()
    optimizer = Wrapper(model.parameters(), 1e-2)
    reg = wc.Regularizer(model, K)
    reg.attach(optimizer)
    reg.enforce()
    assert [message.startswith("Wrapper is in train mode:") for message in said()] == [
        True
    ] * training


def test_limits_are_applied_after_each_step_of_what_has_an_eval() -> None:
    """A step draws the weight to another that no limit has reached."""
    model = net()
    optimizer = foreign.ScheduleFree(model.parameters(), lr=0.5)
    reg = wc.Regularizer(model, K)
    attachment = reg.attach(optimizer)
    assert "every=1, because the optimizer has an eval()" in repr(attachment)
    optimizer.train()
    for _ in range(12):
        steps(model, optimizer, 1)
        assert max(kappas(model)) <= 3.0 + 1e-4


# --- the packages themselves, where they are ------------------------------------------------------


def real(module: str, name: str) -> Any:
    pytest.importorskip(module, reason=f"{module} is not installed")
    return getattr(importlib.import_module(module), name)


def test_sam_of_pytorch_optimizer_is_served_by_its_base() -> None:
    model = net()
    optimizer = real("pytorch_optimizer", "SAM")(model.parameters(), torch.optim.Adam, lr=1e-2)
    reg = wc.Regularizer(model, K)
    reg.attach(optimizer.base_optimizer, every=1)
    for _ in range(3):
        loss(model).backward()
        optimizer.first_step(zero_grad=True)
        loss(model).backward()
        optimizer.second_step(zero_grad=True)
    assert max(kappas(model)) <= 3.0


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_what_schedulefree_evaluates_obeys(name: str) -> None:
    model = net()
    optimizer = real("schedulefree", name)(model.parameters(), lr=1e-2)
    reg = wc.Regularizer(model, K)
    reg.attach(optimizer, every=1)
    optimizer.train()
    steps(model, optimizer, 20)
    optimizer.eval()
    reg.enforce()
    assert max(kappas(model)) <= 3.0


@pytest.mark.frameworks
def test_adafactor_of_transformers_is_limited_and_no_penalty_is_attached_to_it() -> None:
    kind = real("transformers.optimization", "Adafactor")
    model = net()
    optimizer = kind(model.parameters(), lr=None, relative_step=True, warmup_init=True)
    wc.Regularizer(model, K).attach(optimizer, every=1)
    steps(model, optimizer, 3)
    assert max(kappas(model)) <= 3.0
    with pytest.raises(ValueError, match='Adafactor has no number under "lr"'):
        wc.Regularizer(model, wc.ConditionPenalty(0.1)).attach(optimizer)
