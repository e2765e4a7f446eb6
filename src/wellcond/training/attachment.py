"""Attachments of a regulariser to an optimizer: they count steps and apply rules when due.

The hook runs after the optimizer's step. This works with every framework, GradScaler and closure: a
skipped step fires no hook, and several accumulated gradients fire one.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import numbers
import weakref
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from wellcond.text import quote_names
from wellcond.training.bypass import Changes
from wellcond.training.conflicts import count_nonzeros
from wellcond.training.state import WeightState

logger = logging.getLogger("wellcond")

# The number of applications of limits after which it is checked whether entries become zero again.
_COUNTS = 4


class Actions(NamedTuple):
    """What a regulariser does after steps of an optimizer to which it is attached."""

    step: Callable[[list[WeightState]], None]  # takes proximal steps, applies limits exactly
    watch: Callable[
        [list[WeightState], list[float]], list[WeightState]
    ]  # returns the weights to project
    project: Callable[[list[WeightState]], None]  # projects to the target inside the limit
    warn_of_undone: Callable[[list[str]], None]


class Attachment:
    """A regulariser attached to an optimizer; `remove()` ends it.

    The optimizer keeps the regulariser alive, not the reverse.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        states: list[WeightState],
        every: int | str | None,
        actions: Actions,
    ) -> None:
        self.states = states
        # Steps between applications. None: limits are watched, and penalties have their own
        # schedule. "auto": weights that cannot be watched are due by their learning rates.
        self.every = every if isinstance(every, int) else None
        self._paced = every == "auto"
        # At each step an optimizer with an eval() mode moves the weights towards others that are
        # not projected. Limits are applied at every step, or the optimizer would undo them.
        self._at_once = every is None and has_modes(optimizer)
        self.removed = False
        self.steps = 0  # of the optimizer, since the attachment
        # Steps of other optimizers on the weights before the first step of this one.
        self.steps_of_others = 0
        self.warned = False  # that the optimizer has taken no step
        self._changes = Changes(states)
        self._optimizer = weakref.ref(optimizer, self._orphan)
        self._actions = actions
        # Nonzero entries per weight after the last application of a limit, and how often they were
        # counted. Counting reads from the device.
        self._nonzeros: dict[str, tuple[int, int]] = {}
        self._counts = 0
        _watch_all_optimizers()
        self._open, self._closing = 0, False  # nested steps of the optimizer that have begun
        # The hooks are bookkeeping in Python and rare proximal steps: compiling them gains nothing.
        before, after = map(torch.compiler.disable, (self._before_step, self._after_step))
        self._hooks = [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
        ]
        _attachments.add(self)

    def remove(self) -> None:
        """Ends the attachment. Further calls have no effect."""
        if not self.removed:
            for state in self.states:
                state.end_watch()
        self.removed = True
        for hook in self._hooks:
            hook.remove()

    def __repr__(self) -> str:
        optimizer = self._optimizer()
        owner = "a deleted optimizer" if optimizer is None else type(optimizer).__name__
        said = f"attached to {owner}, every={self.every or self._words()}"
        return said if self.steps else f"{said}: the optimizer has taken no step"

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, or None if it was deleted."""
        return self._optimizer()

    def look(self) -> None:
        """Compares the weights for `is_bypassed`: reads from the device until the first step."""
        if not (self.steps or self.removed):
            self._changes.look()

    @property
    def steps_now(self) -> bool:
        """Whether a step of the optimizer has begun and not ended."""
        return self._open > 0

    @property
    def is_bypassed(self) -> bool:
        """Whether the weights have changed as in training although the optimizer took no step."""
        if self.steps or self.removed:
            return False
        return self._changes.show_training(self.optimizer)

    def own_changes(self) -> contextlib.AbstractContextManager[None]:
        """A context in which changes of the weights do not count as training."""
        return contextlib.nullcontext() if self.steps else self._changes.own()

    def _words(self) -> str:
        schedules = {state.rule.default_schedule.every for state in self.states}
        fixed = " and ".join(str(every) for every in sorted(schedules - {None}))  # type: ignore[type-var]
        if None not in schedules:
            return fixed
        auto = "1, because the optimizer has an eval()" if self._at_once else '"auto"'
        if any(self.is_watched(state) for state in self.states):
            auto = "1, watched"
        return f"{auto}, {fixed} for penalties" if fixed else auto

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._nonzeros:
            counted = [state for state in self.states if state.name in self._nonzeros]
            now = count_nonzeros(counted)
            self._actions.warn_of_undone([name for name in now if now[name] < self._nonzeros[name]])
            self._nonzeros = {}
        # A step that calls the step of its base class runs the hooks twice: the outer one counts.
        # If only some of the nested steps have ended, one has raised an exception.
        nested = not self._closing and _may_nest(type(optimizer))
        self._open = self._open + 1 if nested else 1
        self._closing = False

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._open -= 1
        self._closing = True
        if self._open > 0:
            return
        self.steps += 1
        # A fused optimizer under a GradScaler skips within its step. On the CPU the flag is read.
        # On other devices it is not: a skipped step counts, with a learning rate of zero.
        skipped = getattr(optimizer, "found_inf", None)
        taken: float | Tensor = 1.0
        if isinstance(skipped, Tensor):
            if skipped.is_cpu and bool(skipped):
                return
            taken = 1.0 if skipped.is_cpu else 1 - skipped.reshape(())
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        watched: list[WeightState] = []
        others: list[WeightState] = []
        rates, strange = [], []
        for state in self.states:
            parameters = state.weight.parameters
            if not any(parameter.requires_grad for parameter in parameters):
                continue
            group = group_of.get(id(parameters[0]))
            if group is None or any(id(parameter) not in group_of for parameter in parameters[1:]):
                strange.append(state.name)
            elif self.is_watched(state):
                watched.append(state)
                rates.append(_rate(group.get("lr")))
            else:
                others.append(state)
        if strange:
            raise ValueError(
                f"The optimizer no longer contains {quote_names(strange)}: the model has a new "
                "parameter in its place. Create the optimizer from the current model and "
                "attach to it. Under FSDP2 keep resharding after backward enabled."
            )
        due = self._find_due(optimizer, others, group_of, taken) if others else []
        try:
            if due:
                self._actions.step(due)
        finally:  # watched limits are applied even if a step has failed
            if watched and (projected := self._actions.watch(watched, rates)):
                self._actions.project(projected)
                due += projected
        if due and self._counts < _COUNTS:
            limited = [state for state in due if state.rule.enforceable]
            self._counts += bool(limited)
            self._nonzeros = count_nonzeros(limited)

    def _find_due(
        self,
        optimizer: Optimizer,
        states: list[WeightState],
        group_of: Mapping[int, Mapping[str, Any]],
        taken: float | Tensor,
    ) -> list[WeightState]:
        """Counts a step for weights that are not watched; returns those that are due."""
        check_rates(optimizer, states)
        for state in states:
            lr = group_of[id(state.weight.parameters[0])].get("lr")
            if state.rule.differentiable:
                # A tensor is summed on its device: reading it here would wait for the device.
                assert lr is not None
                state.gather((lr.detach().reshape(()) if isinstance(lr, Tensor) else lr) * taken)
            else:
                state.gather(_rate(lr))
        due = [s for s in states if not self.is_paced(s) and s.pending_steps >= self._interval(s)]
        return due + self._turn([state for state in states if self.is_paced(state) and state.due])

    def _interval(self, state: WeightState) -> int:
        every = self.every or state.rule.default_schedule.every
        return 1 if every is None else every

    def is_watched(self, state: WeightState) -> bool:
        """Whether estimates decide when it is projected, or it is decomposed at every step."""
        if self.every or self._at_once or state.watch is None:
            return False
        return state.is_followed or not (self._paced or state.is_too_large)

    def is_paced(self, state: WeightState) -> bool:
        """Whether it is due by how far it might have moved."""
        scheduled = self.every or state.rule.default_schedule.every
        return scheduled is None and not (self._at_once or self.is_watched(state))

    def _turn(self, due: list[WeightState]) -> list[WeightState]:
        """Returns the due weights of one shape, so that no step projects all of them at once.

        The shape is that of the weight that has waited longest. A weight that has failed remains
        due, and comes after the others.
        """
        if not due:
            return []
        first = max(due, key=lambda s: (not s.failed, s.pace.applications == 0, s.pending_steps))
        return [state for state in due if state.shape == first.shape]

    def _orphan(self, _: weakref.ref[Optimizer]) -> None:
        if not self.removed and _orphans is not None:  # None at the exit of the interpreter
            _orphans.append(weakref.ref(self))

    def names_in(self, optimizer: Optimizer) -> list[str]:
        """The names of the weights that another optimizer steps."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [state.name for state in self.states if _is_held_by(state, held)]


def _may_nest(kind: type) -> bool:
    """Whether both the step of an optimizer and the step of a base class run hooks."""
    steps = [vars(one).get("step") for one in kind.__mro__]
    return len([step for step in steps if getattr(step, "hooked", False)]) > 1


def has_modes(optimizer: Optimizer) -> bool:
    """Whether it has a train mode and an eval mode, with different weights in each."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def check_optimizer(optimizer: object) -> None:
    """Raises unless steps of the optimizer run hooks."""
    # A wrapper can be an Optimizer and still have no hooks.
    if not (isinstance(optimizer, Optimizer) and hasattr(optimizer, "_optimizer_step_post_hooks")):
        raise TypeError(
            f"`optimizer` must be a torch.optim.Optimizer, got {type(optimizer).__name__}. "
            "Attach to several optimizers one by one. For a wrapper, attach to the optimizer that "
            "it wraps, for example `optimizer.optimizer` with accelerate."
        )
    if not getattr(type(optimizer).step, "hooked", False):
        raise ValueError(
            f"`optimizer` must run hooks after its steps, but {type(optimizer).__name__}.step runs "
            "none, because Optimizer.__init__ was not called. Call optimizer.zero_grad() before "
            "attach(), so that torch adds them, or attach to the optimizer that it wraps."
        )


def check_rates(optimizer: Optimizer, states: Sequence[WeightState]) -> None:
    """Raises unless the optimizer has a learning rate for every weight under a penalty."""
    without = {
        id(p)
        for group in optimizer.param_groups
        if not isinstance(group.get("lr"), numbers.Real | Tensor)
        for p in group["params"]
    }
    names = [
        state.name
        for state in states
        if state.rule.differentiable and id(state.weight.parameters[0]) in without
    ]
    if names:
        raise ValueError(
            f"`optimizer` must have a learning rate, which scales the steps of penalties, but "
            f'{type(optimizer).__name__} has no number under "lr" in the group of '
            f"{quote_names(names)}. "
            "Use reg() in the loss, add_gradients(), or proximal_step(lr) after each step."
        )


def _rate(lr: Any) -> float:
    """By how much a step brings a hard limit closer: the learning rate, or 1 if it is unknown.

    It is unknown without a learning rate, or if it is on a device and reading it would wait.
    """
    known = isinstance(lr, float | numbers.Real) or (isinstance(lr, Tensor) and lr.is_cpu)
    rate = abs(float(lr)) if known else 1.0
    return rate if math.isfinite(rate) else 1.0


@contextlib.contextmanager
def own_changes(attachments: Sequence[Attachment]) -> Iterator[None]:
    """A context in which the regulariser itself changes the weights."""
    with contextlib.ExitStack() as entered:
        for attachment in attachments:
            entered.enter_context(attachment.own_changes())
        yield


def _is_held_by(state: WeightState, held: Container[int]) -> bool:
    """Whether an optimizer with these parameters steps the weight."""
    return all(id(parameter) in held for parameter in state.weight.parameters)


_attachments: weakref.WeakSet[Attachment] = weakref.WeakSet()


def attachments() -> list[Attachment]:
    """The attachments of all regularisers that are not removed and whose optimizer exists."""
    return [one for one in _attachments if not one.removed and one._optimizer() is not None]


# Attachments whose optimizer was deleted. Training usually ends this way. It is a problem only if
# another optimizer steps the weights later. One hook on all optimizers checks for that. It is never
# removed: a callback of the garbage collector could remove it during an iteration over the hooks.
_orphans: list[weakref.ref[Attachment]] = []


def _warn_of_successor(optimizer: Optimizer) -> None:
    for reference in tuple(_orphans):
        attachment = reference()
        if attachment is None or attachment.removed:
            _orphans.remove(reference)
        elif names := attachment.names_in(optimizer):
            _orphans.remove(reference)
            logger.warning(
                "The optimizer to which the regulariser was attached was deleted, and %s steps %s "
                "without applying any rule: a copy of an optimizer has no hooks. Call detach(), "
                "then attach() with the new optimizer.",
                type(optimizer).__name__,
                quote_names(names),
            )


def _warn_of_another(optimizer: Optimizer) -> None:
    """Warns if another optimizer steps the weights and the attached one has taken no step.

    A wrapper that steps the attached optimizer is allowed: it does so within its own step, or, if
    hooks do not run before its own step, it appears at most once before the attached optimizer.
    """
    for attachment in attachments() if any(not one.steps for one in _attachments) else ():
        if attachment.steps or attachment.steps_now or attachment.optimizer is optimizer:
            continue
        if names := attachment.names_in(optimizer):
            attachment.steps_of_others += 1
            if attachment.steps_of_others == 2 and not attachment.warned:
                attachment.warned = True
                logger.warning(
                    "%s, to which the regulariser is attached, has taken no step, but %s steps "
                    "%s: no rule is applied. Attach to the optimizer whose step() you call; for "
                    "a wrapper, that is often optimizer.base_optimizer.",
                    type(attachment.optimizer).__name__,
                    type(optimizer).__name__,
                    quote_names(names),
                )


def _watch_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if _orphans:
        _warn_of_successor(optimizer)
    _warn_of_another(optimizer)


@functools.cache
def _watch_all_optimizers() -> None:
    hook = torch.compiler.disable(_watch_step)  # type: ignore[no-untyped-call]
    register_optimizer_step_post_hook(hook)
