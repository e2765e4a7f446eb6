"""`Rule`, a requirement on a weight. Users subclass its two kinds, `Penalty` and `Limit`.

A rule never sees a model. It receives a weight as an operator, and the image of the leading
subspace if it needs one. It answers, where possible, in a form without temporaries of the size of
the weight: a multiple of S plus a product of two skinny factors.

Letters: S (..., m, n) the weight; nu = min(m, n); sigma_1 >= ... >= sigma_nu its singular values,
u_i and v_i its singular vectors; eta the length of a step; kappa = sigma_1/sigma_nu.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from wellcond.operators.base import (
    Gradient,
    Operator,
)
from wellcond.operators.convolution import Geometry
from wellcond.operators.subspace import Image
from wellcond.rules.outcome import Outcome, OutcomeStatus, Worst
from wellcond.rules.pace import Pace

if TYPE_CHECKING:
    from wellcond.rules.watch import Watch

Strength = float | Callable[[int], float]
# The state that a rule keeps per weight: tensors of fixed shape under the keys of a state dict.
RuleState = dict[str, Tensor]


class Need(enum.Enum):
    """What a rule requires before it can act on a weight."""

    subspace = "the image of the leading singular subspace"
    gram = "the smaller Gram matrix"
    whole = "all entries in one place"


class Schedule(NamedTuple):
    """When an attached rule is applied, unless `attach(every=)` overrides it."""

    every: int | None  # optimizer steps; None: when the weight has moved far enough


class Movement(NamedTuple):
    """How far a weight may have moved since the last application of a rule."""

    steps: int  # of the optimizer
    rate: float | Tensor  # the sum of the learning rates of these steps


class Rule(abc.ABC):
    """A requirement on a weight, and how to meet it.

    Weights of equal shape, dtype, device and `group_key` are processed as one stack, so every
    method must support leading dimensions. A rule with `Need.whole` receives weights one by one. A
    method never changes the rule: it receives and returns the state of a weight as a `RuleState`.

    Attributes:
        needs: what the rule requires before it can act on a weight.
        default_schedule: when an attached rule is applied.
        differentiable: whether the rule has a value and a gradient (`evaluate`), times a strength.
        enforceable: whether the rule is a hard limit, which `project` enforces.
        joins_groups: whether the rule acts on the groups of a convolution as one map.
        fills_zeros: whether the rule turns exact zeros into other numbers.
        acting: whether the rule limits a convolution as a linear operator, not its kernel as a
            matrix.
        bounds_kernel: whether the rule bounds sigma_1 of the kernel as a matrix.
    """

    needs: frozenset[Need] = frozenset()
    default_schedule: ClassVar[Schedule] = Schedule(10)
    differentiable: ClassVar[bool] = False
    enforceable: ClassVar[bool] = False
    joins_groups: ClassVar[bool] = False
    fills_zeros: ClassVar[bool] = False
    acting: bool = False
    bounds_kernel: bool = False

    def group_key(self) -> Hashable:
        """A key: rules with equal keys can share a stack. By default the identity of the rule."""
        return id(self)

    @property
    def mark(self) -> int:
        """Identifies the bounds of the rule in a saved state; 0 if bounds are not compared."""
        return 0

    @property
    def steppable(self) -> bool:
        """Whether the rule can act after an optimizer step."""
        return True

    def strength_at(self, step: int) -> float:
        """The factor of the learning rate after `step` applications."""
        return 1.0

    def evaluate(self, S: Operator, image: Image | None) -> tuple[Tensor, Gradient]:
        """The value at strength 1, one number per matrix, and the gradient with respect to S."""
        raise NotImplementedError

    def gradient(self, S: Operator, image: Image | None) -> Gradient:
        """The gradient only. A rule whose value costs extra overrides this."""
        return self.evaluate(S, image)[1]

    @abc.abstractmethod
    def step(self, S: Operator, image: Image | None, eta: Tensor, state: RuleState) -> Outcome:
        """The outcome of a step on S of length eta = strength * learning rate."""

    def project(self, S: Operator, state: RuleState, *, exact: bool) -> Outcome:
        """Enforces a hard limit: the limit itself if `exact`, else a target inside it."""
        return Outcome.of(S, OutcomeStatus.unchanged)

    def is_due(self, state: RuleState, movement: Movement) -> bool:
        """Whether the rule is due, given how far the weight may have moved."""
        return True

    def watch(self, nu: int) -> Watch | str | None:
        """How to watch a weight with nu singular values between applications.

        A string is a clause that says why the weight cannot be watched. None means that the rule
        never watches weights.
        """
        return None

    def on_convolution(self, geometry: Geometry) -> Rule:
        """The rule that replaces an `acting` rule for a convolution with this geometry."""
        return self

    def describe_watch(self) -> str:
        """Describes for users what happens to a watched weight, and when."""
        return ""

    # --- state ------------------------------------------------------------------------------------

    def init(self, shape: torch.Size) -> RuleState:
        """The initial state of a weight of this shape."""
        return {}

    def prepare(self, S: Operator, state: RuleState) -> RuleState:
        """Completes the state from the entries of the weight, before the first step."""
        return state

    def learn(self, state: RuleState, outcome: Worst, movement: Movement | None) -> RuleState:
        """The state after an application; `movement` is None if the rule was not due."""
        return state

    def restore(self, state: RuleState, saved: Mapping[str, Tensor]) -> RuleState:
        """The state, with the saved values in place of its own."""
        return {
            key: saved[key].to(own, copy=True) if key in saved else own
            for key, own in state.items()
        }

    def pace(self, state: RuleState) -> Pace:
        """The record of the applications so far."""
        return Pace()

    def describe(self, state: RuleState) -> str:
        """Describes the state of the weight for users; "" if nothing is known."""
        return ""

    def explain(self, status: OutcomeStatus, dtype: torch.dtype) -> str:
        """A sentence that says why the rule was not applied to a weight of this dtype."""
        return f"{self!r} could not be applied: {status.name.replace('_', ' ')}."
