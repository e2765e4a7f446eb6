"""Penalties: rules with a value and a gradient, and optionally a proximal step.

Letters: S (..., m, n) the weight; sigma_1 its largest singular value, u_1 and v_1 the singular
vectors of sigma_1; eta the length of a proximal step.
"""

from __future__ import annotations

import abc
import math
import numbers
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from wellcond.linalg.checks import as_number
from wellcond.operators.base import Gradient, LowRank, Operator, Rescaled
from wellcond.operators.subspace import Image
from wellcond.rules.base import Need, Rule, RuleState
from wellcond.rules.outcome import Outcome, OutcomeStatus

Strength = float | Callable[[int], float]


class Penalty(Rule):
    """The base class of penalties on a weight. A subclass only needs to define `evaluate`.

    A subclass can be attached to an optimizer if it also defines `proximal_step(S, image, eta)`.
    That method returns the `NewWeight` after a proximal step of length eta, and one bool per
    matrix: whether the step was shorter than eta. Without it, the penalty works in the loss and on
    the gradients. Two penalties are equal if they have the same class, equal numbers and strings as
    attributes, and otherwise the same objects. Weights under equal penalties are evaluated as one
    stack, so all methods must support leading dimensions. A subclass with `needs = frozenset()`
    receives no image, which saves a product.

    Args:
        strength: factor of value and gradient; a finite, non-negative number, or a callable
            step -> number, where step counts applications (optimizer steps when attached).

    Raises:
        ValueError: the strength is negative or not finite.
        TypeError: the strength is neither a number nor a callable.

    Example:
        A penalty 1/2 (sigma_1 - 1)_+^2, whose gradient is (sigma_1 - 1)_+ u_1 v_1^T:

        >>> import torch, wellcond as wc
        >>> class Expansion(wc.Penalty):
        ...     def evaluate(self, S, image):
        ...         top = image.top  # left right^T = sigma_1 u_1 v_1^T
        ...         excess = (top.sigma[..., 0] - 1).clamp_min(0)
        ...         share = excess / top.sigma[..., 0].clamp_min(1e-30)
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
        """The class and the attributes: numbers and strings by value, others by identity."""
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

        `image.top` is the leading Ritz triplet, and `image.triplets` are all triplets of the block.
        The image is None if the penalty does not need the subspace. The call runs outside autograd,
        in float32 or wider.
        """

    def step(self, S: Operator, image: Image | None, eta: Tensor, state: RuleState) -> Outcome:
        new, short = self.proximal_step(S, image, eta)  # type: ignore[attr-defined]
        status = torch.where(short, int(OutcomeStatus.shortened), int(OutcomeStatus.applied))
        return Outcome(status.to(torch.int8), new)


def check_answer(rule: Rule, S: Operator, gradient: Gradient, value: Tensor | None) -> None:
    """Raises unless the answer of a rule has the required types and shapes; reads no entries.

    `value` is None if only the gradient was computed.
    """
    *stack, m, n = S.shape
    said = f"{type(rule).__name__}.evaluate must return"
    for found_one, kind in ((gradient, Gradient), (value, Tensor | None)):
        if not isinstance(found_one, kind):
            raise TypeError(
                f"{said} a tuple (Tensor, Gradient), got one with a {type(found_one).__name__}."
            )
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
            f"{tuple(S.shape)}, got {found}. Weights are stacked along leading dimensions, so "
            "index from the end, as in sigma[..., 0]."
        )


def _key_of(value: Any) -> Hashable:
    """A hashable key of an attribute; arrays are compared by identity, not by their entries."""
    if isinstance(value, tuple):
        return tuple(map(_key_of, value))
    return value if isinstance(value, numbers.Number | str) else id(value)


def _valid_strength(strength: Any, name: str = "`strength`") -> float:
    number = float(as_number(strength, name, "a number or a callable step -> number"))
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(
            f"{name} must be finite and not negative, got {number}. "
            "To exclude a weight, map its pattern to None instead of a penalty."
        )
    return number
