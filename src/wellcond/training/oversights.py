"""Warnings about likely mistakes of a training loop; each is logged once and names the weights."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import Optimizer

from wellcond.operators.acting import flattening_factor
from wellcond.operators.convolution import Geometry
from wellcond.operators.views import is_kernel
from wellcond.rules.convolution import ConvolutionLimit
from wellcond.text import list_some, quote_names, quote_subject
from wellcond.training.attachment import Attachment, attachments, has_modes
from wellcond.training.bypass import is_replaced
from wellcond.training.conflicts import count_nonzeros, find_masked, find_quantised
from wellcond.training.state import WeightState
from wellcond.weights.discover import Weight

logger = logging.getLogger("wellcond")

# Applications between two passes over the modules of the model, which cost little but not nothing.
_EVERY = 10


class Oversights:
    """Checks for likely mistakes whenever rules are applied outside compiled graphs."""

    def __init__(self, model: nn.Module, states: Sequence[WeightState]) -> None:
        self._model: weakref.ref[nn.Module] | None = weakref.ref(model)
        self._states = states
        self._applied = 0
        self._said: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def check_application(self, own: Iterable[Attachment], by: str) -> None:
        """Checks an application of penalties by the call `by`, or "" for an attachment of `own`."""
        if torch.compiler.is_compiling():
            return
        if self._applied % _EVERY == 0:
            self._check_replaced()
        self._applied += 1
        attached = [s.name for a in own for s in a.states if not s.rule.enforceable]
        if by and attached:
            self._warn_once(
                "twice",
                "The penalty of %s is applied twice: by the attachment to an optimizer and by %s. "
                "Remove one of them. To read only the value, call reg() under torch.no_grad().",
                quote_names(attached),
                by,
            )
        if not by:
            held = {id(state) for a in own for state in a.states}
            left = [s.name for s in self._states if s.active and id(s) not in held]
            if left:
                self._warn_once(
                    "left",
                    "%s regularised, but not in an attached optimizer: no rule is applied in "
                    "training. Also attach to the optimizer of these weights, or exclude the "
                    "weights with a pattern.",
                    quote_subject(left),
                )

    def check_attachment(self, attachment: Attachment) -> None:
        """Checks a new attachment: the kind of its optimizer, limits, and other regularisers."""
        optimizer = attachment.optimizer
        if hasattr(optimizer, "first_step") and hasattr(optimizer, "base_optimizer"):
            self._warn_once(
                "two steps",
                "%s has first_step() and second_step(), after which no rule is applied: only its "
                "step(closure) runs hooks. Attach to optimizer.base_optimizer, which works for "
                "both.",
                type(optimizer).__name__,
            )
        if optimizer is not None and is_replaced(optimizer):
            self._warn_once(
                "replaced",
                "The step of this %s was replaced by a function that does not seem to call the "
                "original one, so no rule is applied. Call the original step in that function, or "
                "call proximal_step(lr) after each step.",
                type(optimizer).__name__,
            )
        self.check_limits(attachment.states)
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
            self._warn_once(
                "both",
                "%s also regularised by another Regularizer, which is still attached to its "
                "optimizer: both will be applied. Call detach() on the one you no longer need.",
                quote_subject(both),
            )

    def check_log(self, own: Sequence[Attachment], report: bool) -> None:
        """Checks, when a training is logged, that some call or attachment applies its limits."""
        self._check_bypass(own, report)
        limited = [s.name for s in self._states if s.rule.enforceable and s.active]
        if limited and not self._applied and not own:
            self._warn_once(
                "nothing",
                "%s under a hard limit that is not applied during training. Call "
                "attach(optimizer) before the loop.",
                quote_subject(limited),
            )

    def check_enforcement(self, own: Sequence[Attachment]) -> None:
        """Checks, when limits are enforced, that the weights are trained and those to be saved."""
        self._check_bypass(own, True)
        training = [a.optimizer for a in own if _trains(a.optimizer) is not False]
        if training and any(s.rule.enforceable for a in own for s in a.states):
            kind = type(training[0]).__name__
            known = _trains(training[0]) is not None
            self._warn_once(
                "train mode",
                "%s the limits hold for the current weights, and its eval() replaces them by "
                "others, which might exceed the limits. Before you evaluate or save, call "
                "optimizer.eval(), then reg.enforce(). To continue training, call "
                "optimizer.train().",
                f"{kind} is in train mode:" if known else f"If {kind} is in train mode,",
            )
        frozen = [s.name for s in self._states if s.rule.enforceable and not s.active]
        if frozen:
            self._warn_once(
                "frozen",
                "%s under a hard limit, but frozen, and so left unchanged. Call enforce() "
                "before requires_grad_(False), or repair the checkpoint.",
                quote_subject(frozen),
            )

    def check_limits(self, states: Iterable[WeightState]) -> None:
        """Checks for limits on weights that the forward pass masks or quantises, and on kernels."""
        limited = [state for state in states if state.rule.enforceable]
        if names := find_masked(state for state in limited if not state.caution):
            self._warn_once(
                "masked",
                "%s under a hard limit and has a mask in the same module: a projection fills the "
                "zeros, and the mask undoes the limit. Exclude the weight with a pattern, or "
                "remove the mask.",
                quote_subject(names),
            )
        if names := find_quantised(limited):
            self._warn_once(
                "quantised",
                "%s trained for quantisation: the hard limit holds for the float weight, but the "
                "layer applies a quantised copy. Audit the converted model.",
                quote_subject(names),
            )

        factors = {
            state.name: factor
            for state in limited
            if state.rule.bounds_kernel and (factor := _flattening_factor(state.weight)) > 1
        }
        if factors:
            self._warn_once(
                "kernel",
                "The upper limit of %s holds for the kernel as a matrix (out, in * taps). The "
                "spectral norm of the convolution can be up to %s times as large. Use acting=True "
                "to limit the convolution itself.",
                quote_names(factors),
                f"{max(factors.values()):.3g}",
            )
        model = self._model() if self._model is not None else None
        if model is not None and any(isinstance(state.rule, ConvolutionLimit) for state in limited):
            norms = [name for name, one in model.named_modules() if isinstance(one, _BatchNorm)]
            if norms:
                self._warn_once(
                    "norms",
                    "The model contains BatchNorm (%s), which scales its inputs by a factor that "
                    "acting=True does not limit. For a bound on the Lipschitz constant of the "
                    "model, remove it.",
                    list_some(norms, 3),
                )

    @contextlib.contextmanager
    def watch_zeros(self, states: Sequence[WeightState]) -> Iterator[None]:
        """A context in which limits are applied: warns if weights of mostly zeros are filled."""
        bounded = [state for state in states if state.rule.fills_zeros]
        counts = {} if "zeros" in self._said else count_nonzeros(bounded)
        before = {name: some for name, (some, all_) in counts.items() if 0 < some < all_ / 2}
        yield
        after = count_nonzeros(state for state in states if state.name in before)
        filled = [name for name, (some, _) in after.items() if some > before[name]]
        if filled:
            self._warn_once(
                "zeros",
                "Most entries of %s were exact zeros, as after pruning, and the hard limit has "
                "filled them. To keep the zeros, exclude the weight with a pattern.",
                quote_names(filled),
            )

    def warn_of_undone(self, names: Sequence[str]) -> None:
        """Warns that entries of these weights were set to zero after a hard limit was applied."""
        if names:
            self._warn_once(
                "undone",
                "Entries of %s are set to zero after a hard limit is applied, for example by a "
                "mask. The mask and the limit undo each other. Exclude the weight with a pattern, "
                "or enforce the limit after the mask is removed.",
                quote_names(names),
            )

    def _check_bypass(self, own: Iterable[Attachment], look: bool) -> None:
        for attachment in own:
            if look:
                attachment.look()
            if attachment.is_bypassed and not attachment.warned:
                attachment.warned = True
                logger.warning(
                    "%s, to which the regulariser is attached, has taken no step, but the weights "
                    "have changed: no rule is applied. Attach to the optimizer whose step() you "
                    "call; for a wrapper, that is often optimizer.base_optimizer.",
                    type(attachment.optimizer).__name__,
                )

    def _check_replaced(self) -> None:
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
            self._warn_once(
                "gone",
                "%s in a layer that is no longer part of the model: the Regularizer still acts on "
                "the old layer. Create a new Regularizer after you replace layers.",
                quote_subject(gone),
            )

    def _warn_once(self, what: str, message: str, *args: str) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning(message, *args)


def _flattening_factor(weight: Weight) -> float:
    """By what factor the norm of a convolution can exceed its kernel as a matrix; 1 if unknown."""
    if not is_kernel(weight.view) or not isinstance(geometry := weight.geometry, Geometry):
        return 1.0
    return flattening_factor(weight.parameters[0].shape, geometry)


def warn_of_stored(states: Iterable[WeightState]) -> None:
    """Warns of weights whose stored tensor is not the effective weight, in one message per kind.

    Quantisers under a hard limit are skipped: `Oversights.check_limits` warns of those.
    """
    states = list(states)
    quantisers = find_quantised(state for state in states if state.rule.enforceable)
    names: dict[str, list[str]] = {}
    for state in states:
        if state.caution and state.name not in quantisers:
            names.setdefault(state.caution, []).append(state.name)
    for caution, group in names.items():
        one = len(group) == 1
        logger.warning(
            "%s %s: wellcond regularises and measures this tensor, not the effective weight. "
            "Exclude %s with a pattern if you do not want this.",
            *(
                quote_subject(group) if one else f"{quote_subject(group)} each",
                caution,
                "it" if one else "them",
            ),
        )


def _trains(optimizer: Optimizer | None) -> bool | None:
    """Whether an optimizer with two modes is in train mode; None if unknown.

    schedulefree keeps the mode in each group, wrappers of pytorch_optimizer in an attribute, and
    heavyball in each group from the first eval() on.
    """
    if optimizer is None or not has_modes(optimizer):
        return False
    if isinstance(mode := getattr(optimizer, "train_mode", None), bool):
        return mode
    modes = [group["train_mode"] for group in optimizer.param_groups if "train_mode" in group]
    return any(modes) if modes else None
