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
import math
import numbers
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from wellcond.linalg.checks import as_number
from wellcond.operators.base import (
    Dense,
    Gradient,
    LowRank,
    NewWeight,
    Operator,
    Rescaled,
)
from wellcond.operators.subspace import Image
from wellcond.rules.outcome import Outcome, OutcomeStatus, Worst
from wellcond.rules.pace import Pace

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

    every: int | None  # steps of the optimizer; None: when `Rule.watch` says so


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
    """

    needs: frozenset[Need] = frozenset()
    default_schedule: ClassVar[Schedule] = Schedule(10)
    differentiable: ClassVar[bool] = False
    enforceable: ClassVar[bool] = False
    joins_groups: ClassVar[bool] = False
    fills_zeros: ClassVar[bool] = False

    def group_key(self) -> Hashable:
        """What rules that may share a stack have in common; by default the rule itself."""
        return id(self)

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

    def watch(
        self, S: Operator | None, image: Image | None, state: RuleState, movement: Movement
    ) -> tuple[bool | Tensor, RuleState]:
        """Whether the rule is due: a bool where the host knows it, else one per matrix.

        S and image are None if the rule decides by the movement only.
        """
        return True, state

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


class Penalty(Rule):
    """A penalty on a weight, to be subclassed for one of your own: `evaluate` is all it needs.

    A subclass that also has a method `proximal_step(S, image, eta)` can be attached to an
    optimizer; one without works in the loss and on the gradients. That method returns the
    `NewWeight` after a proximal step of length eta, and one bool per matrix: whether the step fell
    short of eta. Weights under equal penalties, which are of one class and have equal numbers and
    the same objects as attributes, are evaluated as one stack, so that everything must work with
    leading dimensions. A subclass with `needs = frozenset()` gets no image, and no product is made.

    Args:
        strength: factor of value and gradient; a finite number that is not negative, or a callable
            step -> number, where step counts applications (optimizer steps when attached).

    Raises:
        ValueError: the strength is negative or not finite.
        TypeError: it is neither a number nor a callable.

    Example:
        A penalty 1/2 (sigma_1 - 1)_+^2, whose gradient is (sigma_1 - 1)_+ u_1 v_1^T:

        >>> import torch, wellcond as wc
        >>> class Expansion(wc.Penalty):
        ...     def evaluate(self, S, image):
        ...         top = image.top  # left right^T = sigma_1 u_1 v_1^T
        ...         excess = (top.sigma[..., 0] - 1).clamp_min(0)
        ...         share = excess / top.sigma[..., 0]
        ...         c = torch.zeros_like(share)
        ...         U = share[..., None, None] * top.left
        ...         return excess.square() / 2, wc.rules.Gradient(wc.rules.LowRank(c, U, top.right))
        >>> layer = torch.nn.Linear(4, 4, bias=False)
        >>> _ = torch.nn.init.ones_(layer.weight)  # sigma_1 = 4
        >>> reg = wc.Regularizer(layer, Expansion(0.5))
        >>> round(reg().item(), 4)  # 0.5 * (4 - 1)^2 / 2
        2.25
    """

    needs = frozenset({Need.subspace})
    differentiable = True

    def __init__(self, strength: Strength) -> None:
        self.strength = strength if callable(strength) else _valid_strength(strength)

    def __repr__(self) -> str:
        each = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({each})"

    def group_key(self) -> Hashable:
        """Its class, its numbers and texts; everything else, as a tensor, by identity."""
        return type(self), tuple((name, _key_of(value)) for name, value in vars(self).items())

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return self.group_key() == other.group_key()

    def __hash__(self) -> int:
        return hash(self.group_key())

    @property
    def steppable(self) -> bool:
        return hasattr(self, "proximal_step")

    def strength_at(self, step: int) -> float:
        """The strength after `step` applications."""
        if callable(self.strength):
            return _valid_strength(self.strength(step), f"`strength({step})`")
        return self.strength

    @abc.abstractmethod
    def evaluate(self, S: Operator, image: Image | None) -> tuple[Tensor, Gradient]:
        """The penalty at strength 1, one number per matrix, and its gradient with respect to S.

        `image.top` is the leading Ritz triplet, `image.triplets` all that the block holds; the
        image is None if the penalty does not need the subspace. Outside of autograd, in float32 or
        wider.
        """

    def step(self, S: Operator, image: Image | None, eta: Tensor, state: RuleState) -> Outcome:
        new, short = self.proximal_step(S, image, eta)  # type: ignore[attr-defined]
        status = torch.where(short, int(OutcomeStatus.shortened), int(OutcomeStatus.applied))
        return Outcome(status.to(torch.int8), new)


def check_answer(rule: Rule, S: Operator, gradient: Gradient, value: Tensor | None) -> None:
    """Raises unless a rule has answered in the shapes that it must; nothing is read.

    `value` is None where only the gradient was asked for.
    """
    *stack, m, n = S.shape
    said = f"{type(rule).__name__}.evaluate must return"
    for found_one, kind in ((gradient, Gradient), (value, Tensor | None)):
        if not isinstance(found_one, kind):
            raise TypeError(f"{said} (Tensor, Gradient), got a {type(found_one).__name__} in it.")
    expected: list[tuple[int, ...]] = [(*stack, m, n)]
    if isinstance(gradient.form, LowRank):
        k = gradient.form.U.shape[-1]
        expected = [tuple(stack), (*stack, m, k), (*stack, n, k)]
    elif isinstance(gradient.form, Rescaled):
        expected = [tuple(stack), (*stack, S.nu, S.nu)]
    found = [tuple(one.shape) for one in gradient.tensors]
    if value is not None:
        expected, found = [tuple(stack), *expected], [tuple(value.shape), *found]
    if found != expected:
        raise ValueError(
            f"{said} a value and a gradient of shapes {expected} for a weight of shape "
            f"{tuple(S.shape)}, got {found}. Leading dimensions are a stack: write sigma[..., 0]."
        )


class Limit(Rule):
    """A hard limit on a weight, to be subclassed for one of your own: `apply` is all it needs.

    It has neither a value nor a gradient. It is applied after steps of the optimizer, by
    `Regularizer.attach`, or by hand, by `Regularizer.enforce`; the loss and the gradients know
    nothing of it. It decides by the learning rates when it is due, see `Pace`.

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

    def watch(
        self, S: Operator | None, image: Image | None, state: RuleState, movement: Movement
    ) -> tuple[bool | Tensor, RuleState]:
        return self.pace(state).due(movement.steps, float(movement.rate)), state

    @property
    def mark(self) -> int:
        """Tells limits of other bounds apart, whose pace is another; 0: of whatever bounds."""
        return 0

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


def _key_of(value: Any) -> Hashable:
    """An attribute by which rules are compared; arrays are not compared by their entries."""
    if isinstance(value, tuple):
        return tuple(map(_key_of, value))
    return value if isinstance(value, numbers.Number | str) else id(value)


def _valid_strength(strength: Any, name: str = "`strength`") -> float:
    number = float(as_number(strength, name, "a number or a callable step -> number"))
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(
            f"{name} must be finite and not negative, got {number}. "
            "To leave a weight out, give its pattern None instead of a penalty."
        )
    return number
