"""The tie between a regulariser and an optimizer: it counts steps and calls when some are due.

The hook runs after the optimizer's step, the one place that every framework, GradScaler and closure
leaves alone: a step that is skipped fires no hook, and an accumulated one fires one.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from wellcond._selection import listed
from wellcond._weights import Weight

logger = logging.getLogger("wellcond")


class Pending(Protocol):
    """A weight with what has gathered since its last proximal step."""

    @property
    def weight(self) -> Weight: ...

    step: int
    pending_steps: int
    pending_lr: float | Tensor


Entry = TypeVar("Entry", bound=Pending)


class Attachment(Generic[Entry]):
    """A regulariser attached to an optimizer; `remove()` ends it.

    The optimizer holds the regulariser, not the other way round.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        entries: list[Entry],
        every: int,
        apply: Callable[[list[Entry]], None],
    ) -> None:
        self.entries = entries
        self.every = every
        self.removed = False
        self._optimizer = weakref.ref(optimizer, self._watch_for_successor)
        self._apply = apply
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def remove(self) -> None:
        """Takes no more steps; may be called again."""
        self.removed = True
        self._hook.remove()

    def __repr__(self) -> str:
        optimizer = self._optimizer()
        owner = "an optimizer that is gone" if optimizer is None else type(optimizer).__name__
        return f"attached to {owner}, every={self.every}"

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for entry in self.entries:
            lr = rates.get(id(entry.weight.parameter), 0.0)
            # A tensor is added up on its device: reading it here would wait for the device.
            entry.pending_lr = entry.pending_lr + (lr.detach() if isinstance(lr, Tensor) else lr)
            entry.pending_steps += 1
            entry.step += 1
        due = [entry for entry in self.entries if entry.pending_steps >= self.every]
        if due:
            self._apply(due)

    def _watch_for_successor(self, _: weakref.ref[Optimizer]) -> None:
        """The optimizer is gone, as at the end of any training. It matters only when another one
        steps the weights after it: then a warning says, once, that it does so unattached."""
        this = weakref.ref(self)

        def after_any_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            attachment = this()
            if attachment is None or attachment.removed:
                hook.remove()
                return
            lost = {id(entry.weight.parameter): entry.weight.name for entry in attachment.entries}
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if not held & lost.keys():
                return
            hook.remove()
            logger.warning(
                "The optimizer to which the regulariser was attached is gone, and %s steps %s "
                "without it: copies of an optimizer drop its hooks. Call detach(), then attach() "
                "with the new one.",
                type(optimizer).__name__,
                listed(lost.values()),
            )

        if not self.removed:
            hook = register_optimizer_step_post_hook(after_any_step)
