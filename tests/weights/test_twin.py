"""A trial forward pass does not change the layer, its model or the process."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import random
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as hooks

import wellcond as wc
from wellcond.weights.forward import UNKNOWN, find_effective_weight
from wellcond.weights.twin import Twin


@dataclasses.dataclass
class Settings:
    seen: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(2))
    step: int = 0


class Slots:
    __slots__ = ("seen",)

    def __init__(self) -> None:
        self.seen = torch.zeros(2)


class Own(nn.Linear):
    """Counts its calls in a place that a test chooses."""

    def __init__(self, other: Any, count: Callable[[Any], Any]) -> None:
        super().__init__(4, 4)
        self.other, self.count = other, count

    def forward(self, x: Tensor) -> Tensor:
        self.count(self.other)
        return super().forward(x)


def held_by_a_function() -> Any:
    seen = torch.zeros(2)

    def add() -> Tensor:
        return seen.add_(1)

    return add


norm = functools.partial(nn.BatchNorm1d, 4)
HOLDERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "namespace": (
        lambda: types.SimpleNamespace(seen=torch.zeros(2)),
        lambda o: o.seen.add_(1),
        lambda o: o.seen,
    ),
    "dataclass": (Settings, lambda o: o.seen.add_(1), lambda o: o.seen),
    "slots": (Slots, lambda o: o.seen.add_(1), lambda o: o.seen),
    "number": (Settings, lambda o: setattr(o, "step", 1), lambda o: torch.tensor(o.step)),
    "tuple": (lambda: (torch.zeros(2),), lambda o: o[0].add_(1), lambda o: o[0]),
    "deque": (
        lambda: collections.deque([torch.zeros(2)], 3),
        lambda o: o.append(torch.ones(2)),
        lambda o: torch.stack([*o]),
    ),
    "unregistered": (
        lambda: [norm()],
        lambda o: o[0].running_mean.add_(1),
        lambda o: o[0].running_mean,
    ),
    "nested": (
        lambda: {"a": [(norm(), {1})]},
        lambda o: o["a"][0][0].running_mean.add_(1),
        lambda o: o["a"][0][0].running_mean,
    ),
    "method": (
        lambda: norm().running_mean.add_,
        lambda o: o(1),
        lambda o: o.__self__,
    ),
    "bound": (
        lambda: Counter().add,
        lambda o: o(),
        lambda o: o.__self__.seen,
    ),
    "partial": (
        lambda: functools.partial(Tensor.add_, torch.zeros(2), 1),
        lambda o: o(),
        lambda o: o.args[0],
    ),
    "closure": (held_by_a_function, lambda o: o(), lambda o: o.__closure__[0].cell_contents),
    "generator": (
        torch.Generator,
        lambda o: torch.rand(2, generator=o),
        lambda o: o.get_state(),
    ),
}


class Counter:
    def __init__(self) -> None:
        self.seen = torch.zeros(2)

    def add(self) -> None:
        self.seen += 1


@pytest.mark.parametrize("name", HOLDERS)
def test_referenced_objects_are_not_changed(name: str) -> None:
    make, count, read = HOLDERS[name]
    layer = Own(make(), count)
    before = copy.deepcopy(read(layer.other))
    wc.audit(layer)
    wc.Regularizer(layer, wc.ConditionPenalty(0.1))
    assert torch.equal(read(layer.other), before)
    count(layer.other)
    assert not torch.equal(read(layer.other), before)  # the test can detect a change


class Bound(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("steps", torch.zeros(()))
        self.step, self.own = self.take, weakref.ref(self)

    def take(self) -> None:
        self.steps += 1
        self.own().steps.add_(1)

    def forward(self, x: Tensor) -> Tensor:
        self.step()
        return super().forward(x)


def test_bound_methods_and_weak_references_point_to_the_copy() -> None:
    layer = Bound()
    assert find_effective_weight(layer, layer.weight.detach()) == (None, "")
    assert float(layer.steps) == 0


def test_layer_that_refers_to_large_model_is_not_run() -> None:
    class Child(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.parent[0].weight.data += 1
            return super().forward(x)

    layer = Child(4, 4)
    layer.parent = [nn.Linear(1000, 1000)]
    before = layer.parent[0].weight.clone()
    assert find_effective_weight(layer, layer.weight.detach()).note == UNKNOWN
    assert torch.equal(layer.parent[0].weight, before)


def test_hooks_do_not_run() -> None:
    class Child(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.inner = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(super().forward(x))

    layer, calls = Child(), []
    handle = layer.inner.register_forward_hook(lambda *_: calls.append("own"))
    assert find_effective_weight(layer, layer.weight.detach()).note == ""
    handle.remove()
    handle = hooks.register_module_forward_hook(lambda *_: calls.append("global"))
    try:
        note = find_effective_weight(layer, layer.weight.detach()).note
    finally:
        handle.remove()
    assert (note, calls) == (UNKNOWN, [])


def test_random_states_and_output_are_isolated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    numpy = pytest.importorskip("numpy")

    class Loud(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            print("called")
            torch.rand(()), random.random(), numpy.random.rand()
            return super().forward(x)

    layer = Loud(4, 4)
    states = [torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())]
    assert find_effective_weight(layer, layer.weight.detach()).note == ""
    assert torch.equal(torch.get_rng_state(), states[0])
    assert [random.getstate(), str(numpy.random.get_state())] == states[1:]
    assert capsys.readouterr() == ("", "")


def test_only_keyboard_interrupt_propagates() -> None:
    class Ends(nn.Linear):
        error: type[BaseException] = SystemExit

        def forward(self, x: Tensor) -> Tensor:
            raise self.error

    layer = Ends(4, 4)
    assert find_effective_weight(layer, layer.weight.detach()).note == UNKNOWN
    Ends.error = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        find_effective_weight(layer, layer.weight.detach())


def test_copy_is_in_eval_mode_without_calling_methods() -> None:
    class Merges(nn.Linear):
        def train(self, mode: bool = True) -> Any:
            raise AssertionError("train")

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.5, self.training)

    layer = Merges(4, 4)
    twin = Twin(layer, layer.weight.detach())
    x = torch.ones(1, 4)
    with torch.no_grad():
        run = twin.run(x, 0)
        assert torch.equal(run.y, x @ layer.weight.T)
    assert layer.training
    assert not run.draws
