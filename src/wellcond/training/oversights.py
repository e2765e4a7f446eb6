"""What a training loop has probably not meant: said once, by name, and otherwise let be."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from wellcond.penalties.base import Limit
from wellcond.text import quoted, subject
from wellcond.training.attachment import Attachment, attachments
from wellcond.training.state import WeightState

logger = logging.getLogger("wellcond")

# Looking through the modules of a model costs little, but not nothing.
_EVERY = 10


class Oversights:
    """Looks for them whenever penalties are applied, outside of compiled graphs."""

    def __init__(self, model: nn.Module, states: Sequence[WeightState]) -> None:
        self._model: weakref.ref[nn.Module] | None = weakref.ref(model)
        self._states = states
        self._applied = 0
        self._said: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def applied(self, own: Iterable[Attachment], by: str) -> None:
        """Penalties are being applied, by a call or, if it is "", by an attachment of `own`."""
        if torch.compiler.is_compiling():
            return
        if self._applied % _EVERY == 0:
            self._replaced()
        self._applied += 1
        attached = [s.name for a in own for s in a.states if not isinstance(s.rule, Limit)]
        if by and attached:
            self._say(
                "twice",
                "The penalty of %s is applied twice: attached to an optimizer, and by %s. Keep one "
                "of them; to look at its value, call reg() under torch.no_grad().",
                quoted(attached),
                by,
            )
        if not by:
            held = {id(state) for a in own for state in a.states}
            left = [s.name for s in self._states if s.active and id(s) not in held]
            if left:
                self._say(
                    "left",
                    "%s regularised, but held by no optimizer that the regulariser is attached to: "
                    "no proximal step is taken. Attach the optimizer too, or leave the weights out "
                    "with a pattern.",
                    subject(left),
                )

    def attached(self, attachment: Attachment) -> None:
        """Another regulariser may be on the same weights already."""
        rules = {
            id(parameter): type(state.rule)
            for other in attachments()
            if not any(state in self._states for state in other.states)
            for state in other.states
            for parameter in state.weight.parameters
        }
        both = [
            state.name
            for state in attachment.states
            if any(rules.get(id(p)) is type(state.rule) for p in state.weight.parameters)
        ]
        if both:
            self._say(
                "both",
                "%s regularised by another Regularizer as well, which is still attached to its "
                "optimizer: both will be applied. Call its detach() if it is not meant any more.",
                subject(both),
            )

    def logged(self, own: Sequence[Attachment]) -> None:
        """A training is watched, but nothing has ever applied its limits: no call and no `own`."""
        limited = [s.name for s in self._states if isinstance(s.rule, Limit) and s.active]
        if limited and not self._applied and not own:
            self._say(
                "nothing",
                "%s under a hard limit that nothing applies while the network trains. Call "
                "attach(optimizer) before the loop.",
                subject(limited),
            )

    def enforced(self) -> None:
        """Limits are asked for now, but a frozen weight is left alone."""
        frozen = [s.name for s in self._states if isinstance(s.rule, Limit) and not s.active]
        if frozen:
            self._say(
                "frozen",
                "%s under a hard limit, but frozen: left unchanged. Call enforce_() "
                "before requires_grad_(False), or repair the checkpoint.",
                subject(frozen),
            )

    def _replaced(self) -> None:
        model = None if self._model is None else self._model()
        if model is None:
            return
        there = set(map(id, model.modules()))
        gone = [
            state.name
            for state in self._states
            if any(id(source.owner) not in there for source in state.weight.sources)
        ]
        if gone:
            self._say(
                "gone",
                "%s of a layer that is in the model no more: what is regularised is the "
                "old one. Make a new Regularizer after layers are replaced.",
                subject(gone),
            )

    def _say(self, what: str, message: str, *args: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning(message, *args)


def warn_of_stored(states: Iterable[WeightState]) -> None:
    """Names the weights of which what is stored is not what acts."""
    for state in states:
        if state.caution:
            logger.warning(
                '"%s" is %s: what is regularised and measured is that, and not the weight that '
                "acts. Leave it out with a pattern if that is not meant.",
                *(state.name, state.caution),
            )
