"""Hard limits: rules that a weight obeys after each application, and when these are due."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from wellcond.operators.base import Dense, NewWeight, Operator
from wellcond.operators.subspace import Image
from wellcond.rules.base import Movement, Need, Rule, RuleState, Schedule
from wellcond.rules.outcome import Outcome, OutcomeStatus, Worst
from wellcond.rules.pace import Pace


class Limit(Rule):
    """A hard limit on a weight, to be subclassed for one of your own: `apply` is all it needs.

    It has neither a value nor a gradient. It is applied after steps of the optimizer, by
    `Regularizer.attach`, or by hand, by `Regularizer.enforce`; the loss and the gradients know
    nothing of it. It is due by the learning rates, see `Pace`; limits of singular values are
    watched instead.

    Example:
        >>> import torch, wellcond as wc
        >>> class NoLargeEntry(wc.Limit):
        ...     def apply(self, S):
        ...         return S.clamp(-1, 1)
        >>> layer = torch.nn.Linear(2, 2, bias=False)
        >>> layer.weight.data.fill_(100.0)
        tensor([[100., 100.],
                [100., 100.]])
        >>> wc.Regularizer(layer, NoLargeEntry()).enforce()
        >>> layer.weight.max().item()
        1.0
    """

    needs = frozenset({Need.whole})
    default_schedule = Schedule(None)
    enforceable = True
    joins_groups = True

    @abc.abstractmethod
    def apply(self, S: Tensor) -> Tensor:
        """A nearest weight that obeys as it is stored: finite, in the shape and dtype of S.

        S is a copy. An exception, or an answer of another kind, leaves the weight as it was, and
        one error names it after the limits of all other weights have been applied.
        """

    def step(self, S: Operator, image: Image | None, eta: Tensor, state: RuleState) -> Outcome:
        return self.project(S, state, exact=False)

    def project(self, S: Operator, state: RuleState, *, exact: bool) -> Outcome:
        stored = cast(Dense, S).dense()
        if not bool(torch.isfinite(stored).all()):
            return Outcome.of(S, OutcomeStatus.not_finite)
        # A copy: an `apply` that writes to S and then fails must leave the weight as it is.
        values = self.apply(stored.clone())
        if not _replaces(values, stored):
            raise ValueError(
                f"`{type(self).__name__}.apply` must return a finite tensor of the shape "
                f"{tuple(stored.shape)}, in {stored.dtype} on {stored.device}, got "
                f"{_describe(values)}. The weight was left as it is."
            )
        if torch.equal(values, stored):
            return Outcome.of(S, OutcomeStatus.unchanged)
        return Outcome.of(S, OutcomeStatus.applied, NewWeight(values.detach()))

    def is_due(self, state: RuleState, movement: Movement) -> bool:
        return self.pace(state).due(movement.steps, float(movement.rate))

    def init(self, shape: torch.Size) -> RuleState:
        return {"pace": Pace(mark=self.mark).to_tensor()}

    def pace(self, state: RuleState) -> Pace:
        return Pace.from_tensor(state["pace"])

    def learn(self, state: RuleState, outcome: Worst, movement: Movement | None) -> RuleState:
        before = self.pace(state)
        passed = outcome.status is OutcomeStatus.unchanged
        pace = replace(
            before,
            excess=outcome.excess,
            condition_number=outcome.condition_number,
            passed=passed,
        )
        if movement is not None:
            if before.applications > 0:  # the first says how the weight was made, not how it moves
                budget = pace.budget_after(float(movement.rate))
                pace = replace(pace, interval=movement.steps, budget=budget)
            pace = replace(pace, applications=before.applications + 1)
        return {"pace": pace.to_tensor()}

    def restore(self, state: RuleState, saved: Mapping[str, Tensor]) -> RuleState:
        restored = super().restore(state, saved)
        return restored if self.pace(restored).mark == self.mark else self.init(torch.Size())

    def describe(self, state: RuleState) -> str:
        pace = self.pace(state)
        if not pace.known:
            return ""
        text = "obeyed at the last application"
        if not pace.passed:
            value = self.describe_excess(pace.excess, pace.condition_number)
            text = f"before the last application {value}{pace.excess:.4g} times its limit"
        return f"{text}; {pace.interval} steps after the one before" if pace.interval else text

    def describe_excess(self, excess: float, condition_number: float) -> str:
        """The value that exceeded the limit by this factor, for people; "" if it is not known."""
        return ""


def _replaces(values: object, S: Tensor) -> bool:
    """Whether what the `apply` of a limit returned can be stored in place of S."""
    return (
        isinstance(values, Tensor)
        and (values.shape, values.dtype, values.device) == (S.shape, S.dtype, S.device)
        and bool(torch.isfinite(values).all())
    )


def _describe(values: object) -> str:
    if not isinstance(values, Tensor):
        return type(values).__name__
    text = f"the shape {tuple(values.shape)}, in {values.dtype} on {values.device}"
    if values.is_meta or bool(torch.isfinite(values).all()):
        return text
    return f"{text}, with NaN or infinity"
