"""Hard limits: rules that a weight satisfies after each application, and when they are due."""

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
    """The base class of hard limits on a weight. A subclass only needs to define `apply`.

    A limit has neither a value nor a gradient, so it changes neither the loss nor the gradients.
    `Regularizer.attach` applies it after optimizer steps, and `Regularizer.enforce` applies it at
    once. An attached limit is due when the sum of the learning rates is large enough (see `Pace`);
    limits on singular values are watched instead.

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
        """A nearest weight that satisfies the limit as stored: finite, in the shape and dtype of S.

        S is a copy. If `apply` raises an exception or returns anything else, the weight remains
        unchanged. One error names all such weights after all other weights have been limited.
        """

    def step(self, S: Operator, image: Image | None, eta: Tensor, state: RuleState) -> Outcome:
        return self.project(S, state, exact=False)

    def project(self, S: Operator, state: RuleState, *, exact: bool) -> Outcome:
        stored = cast(Dense, S).dense()
        if not bool(torch.isfinite(stored).all()):
            return Outcome.of(S, OutcomeStatus.not_finite)
        # A copy, because an `apply` that writes to S and then fails must not change the weight.
        values = self.apply(stored.clone())
        if not _replaces(values, stored):
            raise ValueError(
                f"`{type(self).__name__}.apply` must return a finite tensor of the shape "
                f"{tuple(stored.shape)}, in {stored.dtype} on {stored.device}, got "
                f"{_describe(values)}. The weight is unchanged."
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
            if before.applications > 0:  # the first shows the initial weight, not its movement
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
        text = "within its limit at the last application"
        if not pace.passed:
            value = self.describe_excess(pace.excess, pace.condition_number)
            text = f"before the last application: {value}{pace.excess:.4g} times its limit"
        steps = f"{pace.interval} step{'s' * (pace.interval != 1)}"
        return f"{text}; {steps} after the previous one" if pace.interval else text

    def describe_excess(self, excess: float, condition_number: float) -> str:
        """Describes for users the value that exceeded the limit by this factor; "" if unknown."""
        return ""


def _replaces(values: object, S: Tensor) -> bool:
    """Whether the result of `apply` can be stored in place of S."""
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
