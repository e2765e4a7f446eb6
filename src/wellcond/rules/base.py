"""What is required of a weight: `Rule`, and its two kinds that users write, `Penalty` and `Limit`.

No rule ever sees a model. A rule is given a weight as an operator, and the image of the leading
subspace if it needs that, and answers in a form that costs no temporary of the size of the weight
where it has one: a number times S plus a product of two skinny factors.

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
# What a rule remembers of a weight: tensors of fixed shape under the keys of a state dict.
RuleState = dict[str, Tensor]


class Need(enum.Enum):
    """What must be there before a rule acts on a weight."""

    subspace = "the image of the leading singular subspace"
    gram = "the smaller Gram matrix"
    whole = "all entries in one place"


class Schedule(NamedTuple):
    """When an attached rule is applied, unless `attach(every=)` says otherwise."""

    every: int | None  # steps of the optimizer; None: when the weight has moved far enough


class Movement(NamedTuple):
    """How far a weight may have moved since a rule was last applied to it."""

    steps: int  # of the optimizer
    rate: float | Tensor  # the sum of their learning rates


class Rule(abc.ABC):
    """What is required of a weight, and how it is brought about.

    Weights of equal shape, dtype, device and `group_key` are worked on as one stack, so that
    everything must work with leading dimensions; a rule that needs whole weights gets them one by
    one. A method never changes the rule: what it remembers of a weight it is given and returns as
    a `RuleState`.

    Attributes:
        needs: what must be there before the rule acts on a weight.
        default_schedule: when an attached rule is applied.
        differentiable: whether it has a value and a gradient, `evaluate`, times a strength.
        enforceable: whether it is a hard limit, which `project` makes hold.
        joins_groups: whether it acts on the groups of a convolution as on one map.
        fills_zeros: whether it turns exact zeros into other numbers.
        acting: whether it limits a convolution as it acts, not its kernel as a matrix.
        bounds_kernel: whether it bounds sigma_1 of the kernel as a matrix.
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
        """What rules that may share a stack have in common; by default the rule itself."""
        return id(self)

    @property
    def mark(self) -> int:
        """Tells rules of other bounds apart in a saved state; 0: of whatever bounds."""
        return 0

    @property
    def steppable(self) -> bool:
        """Whether it has a step to take after steps of the optimizer."""
        return True

    def strength_at(self, step: int) -> float:
        """By what a learning rate is multiplied after `step` applications."""
        return 1.0

    def evaluate(self, S: Operator, image: Image | None) -> tuple[Tensor, Gradient]:
        """The value at strength 1, one number per matrix, and the gradient with respect to S."""
        raise NotImplementedError

    def gradient(self, S: Operator, image: Image | None) -> Gradient:
        """The gradient only; for a rule whose value costs something besides."""
        return self.evaluate(S, image)[1]

    @abc.abstractmethod
    def step(self, S: Operator, image: Image | None, eta: Tensor, state: RuleState) -> Outcome:
        """What becomes of S after a step of length eta = strength * learning rate."""

    def project(self, S: Operator, state: RuleState, *, exact: bool) -> Outcome:
        """Makes a hard limit hold: if `exact` the limit itself, else a target inside of it."""
        return Outcome.of(S, OutcomeStatus.unchanged)

    def is_due(self, state: RuleState, movement: Movement) -> bool:
        """Whether the rule is to be applied, by how far the weight may have moved."""
        return True

    def watch(self, nu: int) -> Watch | str | None:
        """How a weight with nu singular values is watched between applications.

        Or why it cannot be, as a clause; None if weights under this rule never are.
        """
        return None

    def on_convolution(self, geometry: Geometry) -> Rule:
        """The rule for a convolution with this geometry, if it limits that as it acts."""
        return self

    def describe_watch(self) -> str:
        """What is done to a weight that is watched, and when, for people."""
        return ""

    # --- what it remembers ------------------------------------------------------------------------

    def init(self, shape: torch.Size) -> RuleState:
        """What is remembered of a weight of this shape before anything is known of it."""
        return {}

    def prepare(self, S: Operator, state: RuleState) -> RuleState:
        """Completes the state by what only the weight itself tells, before the first step."""
        return state

    def learn(self, state: RuleState, outcome: Worst, movement: Movement | None) -> RuleState:
        """The state after an application; `movement` is None if it was not due but called for."""
        return state

    def restore(self, state: RuleState, saved: Mapping[str, Tensor]) -> RuleState:
        """The state with what was saved of it."""
        return {
            key: saved[key].to(own, copy=True) if key in saved else own
            for key, own in state.items()
        }

    def pace(self, state: RuleState) -> Pace:
        """What is known of the applications so far."""
        return Pace()

    def describe(self, state: RuleState) -> str:
        """What is known of the weight, for people; "" if nothing is."""
        return ""

    def explain(self, status: OutcomeStatus, dtype: torch.dtype) -> str:
        """Why it was not applied to a weight of this dtype, as a sentence."""
        return f"{self!r} could not be applied: {status.name.replace('_', ' ')}."
