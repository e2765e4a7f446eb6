"""The tie between a regulariser and an optimizer: it counts steps and calls when some are due.

The hook runs after the optimizer's step, the one place that every framework, GradScaler and closure
leaves alone: a step that is skipped fires no hook, and an accumulated one fires one.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from wellcond.penalties.base import Limit
from wellcond.text import quoted
from wellcond.training.state import WeightState

logger = logging.getLogger("wellcond")

EVERY = 10  # optimizer steps between proximal steps, if nothing else is said


class Attachment:
    """A regulariser attached to an optimizer; `remove()` ends it.

    The optimizer holds the regulariser, not the other way round.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        states: list[WeightState],
        every: int | None,
        apply: Callable[[list[WeightState]], None],
    ) -> None:
        self.states = states
        # Steps between proximal steps. None: hard limits when they are due, penalties every 10.
        self.every = every
        self.removed = False
        self._optimizer = weakref.ref(optimizer, self._orphan)
        self._apply = apply
        _watch_all_optimizers()
        # Bookkeeping in Python, and proximal steps that pay for themselves: nothing to compile.
        after_step = torch.compiler.disable(self._after_step)  # type: ignore[no-untyped-call]
        self._hook = optimizer.register_step_post_hook(after_step)
        _attachments.add(self)

    def remove(self) -> None:
        """Takes no more steps; may be called again."""
        self.removed = True
        self._hook.remove()

    def __repr__(self) -> str:
        optimizer = self._optimizer()
        owner = "an optimizer that is gone" if optimizer is None else type(optimizer).__name__
        return f"attached to {owner}, every={self.every or self._words()}"

    def _words(self) -> str:
        hard = [isinstance(state.rule, Limit) for state in self.states]
        soft = f"{EVERY} for penalties" if not all(hard) else ""
        return f'"auto"{", " * bool(soft)}{soft}' if any(hard) else str(EVERY)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A fused optimizer under a GradScaler skips inside of its step. On the CPU that is read; on
        # a device it stays there: the step counts, at a learning rate of zero.
        skipped = getattr(optimizer, "found_inf", None)
        taken: float | Tensor = 1.0
        if isinstance(skipped, Tensor):
            if skipped.is_cpu and bool(skipped):
                return
            taken = 1.0 if skipped.is_cpu else 1 - skipped.reshape(())
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        states = [state for state in self.states if state.active]
        strange = [s.name for s in states if not _held(s, rates)]
        if strange:
            raise ValueError(
                f"The optimizer does not hold {quoted(strange)} any more: the parameter in the "
                "model is another one now. Make the optimizer from the model as it is and attach "
                "to that; under FSDP2 leave resharding after backward on."
            )
        for state in states:
            lr = rates[id(state.weight.parameters[0])]
            if self._by_pace(state):
                # When it is due is decided here: what lies on a device counts as steps.
                known = not isinstance(lr, Tensor) or lr.is_cpu
                state.gather(float(lr) if known else 1.0)
            else:
                # A tensor is added up on its device: reading it here would wait for the device.
                state.gather((lr.detach().reshape(()) if isinstance(lr, Tensor) else lr) * taken)
        due = [s for s in states if not self._by_pace(s) and s.pending_steps >= self._interval]
        due += self._turn([state for state in states if self._by_pace(state) and state.due])
        if due:
            self._apply(due)

    @property
    def _interval(self) -> int:
        return self.every or EVERY

    def _by_pace(self, state: WeightState) -> bool:
        return self.every is None and isinstance(state.rule, Limit)

    def _turn(self, due: list[WeightState]) -> list[WeightState]:
        """Those of one shape, the longest due, so that no step pays for all of them."""
        if not due:
            return []
        first = max(due, key=lambda state: (state.pace.applications == 0, state.pending_steps))
        return [state for state in due if state.shape == first.shape]

    def _orphan(self, _: weakref.ref[Optimizer]) -> None:
        if not self.removed:
            _orphans.append(weakref.ref(self))

    def succeeded_by(self, optimizer: Optimizer) -> list[str]:
        """The names of the weights that this other optimizer steps."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [state.name for state in self.states if _held(state, held)]


def _held(state: WeightState, held: Container[int]) -> bool:
    """Whether an optimizer that holds these parameters steps the weight."""
    return all(id(parameter) in held for parameter in state.weight.parameters)


_attachments: weakref.WeakSet[Attachment] = weakref.WeakSet()


def attachments() -> list[Attachment]:
    """All that have not been removed, of every regulariser, and whose optimizer lives."""
    return [one for one in _attachments if not one.removed and one._optimizer() is not None]


# Attachments whose optimizer is gone. That is the usual end of a training, and no matter, unless
# another optimizer steps the weights after it. One hook on all optimizers looks for that; it is
# never removed, as a callback of the garbage collector could do so while the hooks are iterated.
_orphans: list[weakref.ref[Attachment]] = []


def _warn_of_successor(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for reference in tuple(_orphans):
        attachment = reference()
        if attachment is None or attachment.removed:
            _orphans.remove(reference)
        elif names := attachment.succeeded_by(optimizer):
            _orphans.remove(reference)
            logger.warning(
                "The optimizer to which the regulariser was attached is gone, and %s steps %s "
                "without it: copies of an optimizer drop its hooks. Call detach(), then attach() "
                "with the new one.",
                type(optimizer).__name__,
                quoted(names),
            )


@functools.cache
def _watch_all_optimizers() -> None:
    hook = torch.compiler.disable(_warn_of_successor)  # type: ignore[no-untyped-call]
    register_optimizer_step_post_hook(hook)
