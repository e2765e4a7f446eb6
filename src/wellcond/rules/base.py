"""What a penalty is, a value and its gradient; what a hard limit is, a nearest weight that obeys.

Neither ever sees a model. A penalty is given a weight as an operator and what one product with it
told of its leading subspace, and answers in a form that costs no temporary of the size of the
weight where it has one: a number times S plus a product of two skinny factors.

Letters: S (..., m, n) the weight; nu = min(m, n); sigma_1 >= ... >= sigma_nu its singular values,
u_i and v_i its singular vectors; eta the length of a proximal step; kappa = sigma_1/sigma_nu.
"""

from __future__ import annotations

import abc
import math
import numbers
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from wellcond.linalg.checks import as_number
from wellcond.operators.base import Gradient, LowRank, NewWeight, Operator, Rescaled
from wellcond.operators.subspace import Image

Strength = float | Callable[[int], float]


class Penalty(abc.ABC):
    """A penalty on a weight, to be subclassed for one of your own: `evaluate` is all it needs.

    A subclass that also has `proximal_step` (see `Proximal`) can be attached to an optimizer; one
    without works in the loss and on the gradients. Weights under equal penalties, which are of one
    class and have equal numbers and the same objects as attributes, are evaluated as one stack, so
    that everything must work with leading dimensions.

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

    needs_subspace: ClassVar[bool] = True  # False: `image` is None, and no product is made

    def __init__(self, strength: Strength) -> None:
        self.strength = strength if callable(strength) else _valid_strength(strength)

    def __repr__(self) -> str:
        each = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({each})"

    def __eq__(self, other: object) -> bool:
        """Equal numbers and texts; everything else, as a tensor, must be the same object."""
        if type(self) is not type(other):
            return NotImplemented
        own, others = vars(self), vars(other)
        return own.keys() == others.keys() and all(_same(own[key], others[key]) for key in own)

    def __hash__(self) -> int:
        return hash(type(self))

    def strength_at(self, step: int) -> float:
        """The strength after `step` applications."""
        if callable(self.strength):
            return _valid_strength(self.strength(step), f"`strength({step})`")
        return self.strength

    @abc.abstractmethod
    def evaluate(self, S: Operator, image: Image | None) -> tuple[Tensor, Gradient]:
        """The penalty at strength 1, one number a matrix, and its gradient with respect to S.

        `image.top` is the leading Ritz triplet, `image.triplets` all that the block holds; None if
        `needs_subspace` is False. Outside of autograd, in float32 or wider.
        """

    def gradient(self, S: Operator, image: Image | None) -> Gradient:
        """The gradient alone; to be overridden where the value costs something besides."""
        return self.evaluate(S, image)[1]


@runtime_checkable
class Proximal(Protocol):
    """A penalty that can also take a proximal step."""

    def proximal_step(
        self, S: Operator, image: Image | None, eta: Tensor
    ) -> tuple[NewWeight, Tensor]:
        """The weight after a proximal step of length eta, and per matrix whether it fell short."""


def check_answer(penalty: Penalty, S: Operator, gradient: Gradient, value: Tensor | None) -> None:
    """Raises unless a penalty has answered in the shapes that it must; nothing is read.

    `value` is None where only the gradient was asked for.
    """
    *stack, m, n = S.shape
    said = f"{type(penalty).__name__}.evaluate must return"
    for found_one, kind in ((gradient, Gradient), (value, Tensor | None)):
        if not isinstance(found_one, kind):
            raise TypeError(f"{said} (Tensor, Gradient), got a {type(found_one).__name__} in it.")
    expected: list[tuple[int, ...]] = [(*stack, m, n)]
    if isinstance(gradient.form, LowRank):
        k = gradient.form.U.shape[-1]
        expected = [tuple(stack), (*stack, m, k), (*stack, n, k)]
    elif isinstance(gradient.form, Rescaled):
        expected = [(*stack, 1), (*stack, S.nu, S.nu)]
    found = [tuple(one.shape) for one in gradient.tensors]
    if value is not None:
        expected, found = [tuple(stack), *expected], [tuple(value.shape), *found]
    if found != expected:
        raise ValueError(
            f"{said} a value and a gradient of shapes {expected} for a weight of shape "
            f"{tuple(S.shape)}, got {found}. Leading dimensions are a stack: write sigma[..., 0]."
        )


class Limit(abc.ABC):
    """A hard limit on a weight. It is no `Penalty`: it has neither a value nor a gradient.

    A limit is applied after steps of the optimizer, by `Regularizer.attach`, or by hand, by
    `Regularizer.enforce()`. The loss and the gradients know nothing of it.
    """

    needs_subspace: ClassVar[bool] = False

    @abc.abstractmethod
    def apply(self, S: Tensor) -> Tensor:
        """A nearest weight that obeys as it is stored: finite, in the shape and dtype of S.

        S is a copy. An exception, or an answer of another kind, leaves the weight as it was, and
        one error names it after the limits of all other weights have been applied.
        """


def _same(one: Any, other: Any) -> bool:
    """Whether two attributes are the same; arrays are not compared by their entries."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    plain = isinstance(one, numbers.Number | str) and isinstance(other, numbers.Number | str)
    return one is other or (plain and one == other)


def _valid_strength(strength: Any, name: str = "`strength`") -> float:
    number = float(as_number(strength, name, "a number or a callable step -> number"))
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(
            f"{name} must be finite and not negative, got {number}. "
            "To leave a weight out, give its pattern None instead of a penalty."
        )
    return number
