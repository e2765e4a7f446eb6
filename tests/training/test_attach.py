"""`attach` rejects unsuitable optimizers, and warns if steps bypass the attached optimizer."""

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
    """How often a weight was checked or decomposed: at least once per step if it is small."""
    return state.record.looks + state.record.decompositions


# --- learning rates -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [foreign.RelativeStep, foreign.Rateless])
@pytest.mark.parametrize("every", [None, 1])
def test_limit_holds_without_a_learning_rate(
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
    wc.Regularizer(model, wc.IsometryStep()).attach(optimizer)  # its steps use no learning rate


@pytest.mark.parametrize("kind", [foreign.RelativeStep, foreign.Rateless])
@pytest.mark.parametrize("every", [None, 1])
def test_attach_rejects_penalty_without_a_learning_rate(
    kind: type[foreign.RelativeStep], every: int | None
) -> None:
    model = net()
    reg = wc.Regularizer(model, {"0.*": K, "2.*": wc.ConditionPenalty(0.1)})
    with pytest.raises(
        ValueError, match=rf'{kind.__name__} has no number under "lr" in the group of "2.weight"'
    ):
        reg.attach(kind(model.parameters()), every=every)
    assert reg.attachments == []


def test_lost_learning_rate_names_its_group_only() -> None:
    model = net()
    groups = [{"params": model[i].parameters(), "lr": 0.1} for i in (0, 2)]
    optimizer = foreign.RelativeStep(groups)
    wc.Regularizer(model, wc.ConditionPenalty(0.1)).attach(optimizer, every=1)
    steps(model, optimizer)
    optimizer.param_groups[1]["lr"] = None
    with pytest.raises(ValueError, match=r'in the group of "2\.weight"'):
        steps(model, optimizer)


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), -1.0])
def test_limits_hold_with_unusual_learning_rates(lr: float) -> None:
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
def test_learning_rates_of_other_libraries(lr: Any) -> None:
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


def test_attach_rejects_optimizer_without_hooks_and_the_remedy_works() -> None:
    class Fresh(foreign.Lookahead):  # a new class, because torch adds hooks to classes
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


def test_attach_rejects_optimizer_subclass_without_hook_support() -> None:
    model = net()
    with pytest.raises(TypeError, match="For a wrapper, attach to"):
        wc.Regularizer(model, K).attach(foreign.NoTables(torch.optim.SGD(model.parameters(), 0.1)))


def test_step_calling_base_class_step_counts_once() -> None:
    torch.optim.SGD(net().parameters(), 0.1)  # from now on its step runs hooks
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
    steps(model, optimizer, 5)  # the first could be nested in the failed step
    assert handle.steps in (9, 10)
    handle.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_steps_after_an_exception_count() -> None:
    model = net()
    optimizer = torch.optim.Adadelta(model.parameters(), 0.1)  # its step calls no other step
    handle = wc.Regularizer(model, K).attach(optimizer, every=1)

    def failing() -> Tensor:
        raise ZeroDivisionError

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            optimizer.step(failing)
        steps(model, optimizer)
    assert handle.steps == 3


def test_attach_before_or_after_compiling_the_step() -> None:
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


def test_scheduler_wrapping_the_step_changes_nothing(said: Callable[[], list[str]]) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    reg = wc.Regularizer(model, K)
    reg.attach(optimizer, every=1)
    steps(model, optimizer, 3)
    assert reg.attachments[0].steps == 3
    assert said() == []


# --- steps that are never seen --------------------------------------------------------------------


def test_two_step_sam_warns_at_attach_and_after_steps(
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


def test_closure_sam_works_with_itself_and_its_base_optimizer(
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
    assert len(said()) == 1  # the warning of attach, which cannot know which step is called


def bypassing(optimizer: Optimizer) -> Callable[[], None]:
    """A step that runs no hooks, like a step that another library has replaced."""
    return functools.partial(type(optimizer).step.__wrapped__, optimizer)  # type: ignore[attr-defined]


@pytest.mark.parametrize("asked", ["log", "enforce"])
def test_replaced_step_is_detected_by_weight_changes(
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
def test_step_writing_to_data_is_detected_by_entries(
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


def test_loop_writing_to_data_is_detected_after_three_comparisons(
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
def test_no_warning_for_a_wrapped_step(
    wrapped: Callable[[Optimizer], Any], said: Callable[[], list[str]]
) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    optimizer.step = wrapped(optimizer)  # type: ignore[method-assign]
    if hasattr(optimizer.step, "__func__"):  # so that a scheduler wraps it again
        torch.optim.lr_scheduler.ConstantLR(optimizer)
    reg = wc.Regularizer(model, K)
    handle = reg.attach(optimizer)
    steps(model, optimizer, 3)
    reg.enforce()
    assert handle.steps == 3
    assert said() == []


def test_no_warning_when_weights_are_loaded_before_the_first_step(
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


def test_nan_and_meta_weights_do_not_count_as_changed(
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
    assert all("not finite at step 0" in text for text in said())


def test_no_warning_for_a_wrapper_that_steps_twice(
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


def test_no_warning_before_the_first_step(said: Callable[[], list[str]]) -> None:
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


def test_warning_names_another_optimizer_that_steps_first(said: Callable[[], list[str]]) -> None:
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


def test_optimizer_per_parameter_rejects_biases_only() -> None:
    """One optimizer per parameter, as when optimizers step within backward."""
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


def test_optimizer_deleted_at_interpreter_exit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Module globals are None then, and an exception in a callback would be printed."""
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
def test_enforce_warns_in_train_mode_only(kind: Any, said: Callable[[], list[str]]) -> None:
    model = net()
    optimizer = kind(model.parameters(), lr=0.1)
    optimizer.train()
    reg = wc.Regularizer(model, K)
    reg.attach(optimizer, every=1)
    steps(model, optimizer, 10)
    reg.enforce()
    reg.enforce()
    (message,) = said()
    known = kind is foreign.ScheduleFree  # the other stores no mode before eval()
    start = f"{kind.__name__} is in train mode:" if known else f"If {kind.__name__} is in train"
    assert message.startswith(start)
    assert "optimizer.eval(), then reg.enforce(). To continue training" in message
    optimizer.eval()
    reg.enforce()
    assert max(kappas(model)) <= 3.0
    optimizer.train()
    optimizer.eval()
    assert max(kappas(model)) <= 3.0 + 1e-4
    assert len(said()) == 1


def test_no_warning_in_eval_mode_or_under_penalties(said: Callable[[], list[str]]) -> None:
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


def test_eval_method_without_train_is_not_a_mode(said: Callable[[], list[str]]) -> None:
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
def test_train_mode_attribute_is_read(training: bool, said: Callable[[], list[str]]) -> None:
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


def test_limits_apply_after_each_step_of_optimizers_with_eval() -> None:
    """A step moves the weight towards another one that is not limited."""
    model = net()
    optimizer = foreign.ScheduleFree(model.parameters(), lr=0.5)
    reg = wc.Regularizer(model, K)
    attachment = reg.attach(optimizer)
    assert "every=1, because the optimizer has an eval()" in repr(attachment)
    optimizer.train()
    for _ in range(12):
        steps(model, optimizer, 1)
        assert max(kappas(model)) <= 3.0 + 1e-4


# --- the real packages, if installed --------------------------------------------------------------


def real(module: str, name: str) -> Any:
    pytest.importorskip(module, reason=f"{module} is not installed")
    return getattr(importlib.import_module(module), name)


def test_pytorch_optimizer_sam_through_its_base() -> None:
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
def test_schedulefree_eval_weights_satisfy_the_limit(name: str) -> None:
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
def test_adafactor_of_transformers_takes_limits_not_penalties() -> None:
    kind = real("transformers.optimization", "Adafactor")
    model = net()
    optimizer = kind(model.parameters(), lr=None, relative_step=True, warmup_init=True)
    wc.Regularizer(model, K).attach(optimizer, every=1)
    steps(model, optimizer, 3)
    assert max(kappas(model)) <= 3.0
    with pytest.raises(ValueError, match='Adafactor has no number under "lr"'):
        wc.Regularizer(model, wc.ConditionPenalty(0.1)).attach(optimizer)
