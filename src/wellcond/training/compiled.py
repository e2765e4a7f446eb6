"""The regulariser in a graph of torch.compile: operators that are opaque to the compiler.

Their inputs are the parameters and a number that identifies the regulariser. Values that change
from step to step (the side of the product, the step, the strength) remain inside the operators, so
they cause neither graph breaks nor recompilation. A captured CUDA graph would not update them, so
these operators are excluded from such graphs.
"""

from __future__ import annotations

import inspect
import itertools
import re
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from wellcond.text import read_versions
from wellcond.training.engine import Engine

# torch caches compiled graphs on disk, and does not check whether an operator now returns another
# shape than when the graph was compiled: so each version of wellcond has its own operators.
_NAMESPACE = "wellcond_" + re.sub(r"\W", "_", read_versions()["wellcond"])
_numbers = map(str, itertools.count())  # an integer would become a symbol in a graph
_by_number: weakref.WeakValueDictionary[str, Compilable] = weakref.WeakValueDictionary()


class Compilable:
    """An engine that a compiled graph can refer to; in eager mode it calls the engine itself."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._take_number()

    def _take_number(self) -> None:
        self.number = next(_numbers)
        _by_number[self.number] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy needs a number of its own.
        self.__dict__.update(state)
        self._take_number()

    def penalty(self) -> Tensor:
        """The sum of strength * penalty, differentiable in the parameters."""
        if not torch.compiler.is_compiling():
            return self.engine.penalty()
        parameters, remember = self.engine.parameters(), torch.is_grad_enabled()
        total: Tensor = _penalty(parameters, self.number, remember)[0]
        return total

    def add_gradients(self) -> None:
        """Adds strength * gradient to the gradients of the parameters."""
        parameters = self.engine.parameters()
        gradients = [_gradient_of(parameter) for parameter in parameters]
        if torch.compiler.is_compiling():
            _add_gradients_(gradients, parameters, self.number)
        else:
            self.engine.add_gradients(gradients, parameters)


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    """The gradient in the memory layout of its parameter, so that one view works for both."""
    if not parameter.requires_grad:
        return torch.zeros_like(parameter)  # for a frozen part of a weight: discarded
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    if parameter.grad.stride() != parameter.stride():
        parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
    return parameter.grad


def _custom_op(
    name: str, schema: str, changes: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """A custom operator with an explicit schema, because old versions of torch do not infer it."""
    options: dict[str, Any] = {"mutates_args": changes, "schema": schema}
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    if tag is not None and "tags" in inspect.signature(torch.library.custom_op).parameters:
        options["tags"] = tag
    made: Callable[[Callable[..., Any]], Any] = torch.library.custom_op(
        f"{_NAMESPACE}::{name}", **options
    )
    return made


@_custom_op("penalty", "(Tensor[] parameters, str number, bool remember) -> Tensor[]")
def _penalty(parameters: list[Tensor], number: str, remember: bool) -> list[Tensor]:
    total, codes, factors = _by_number[number].engine.total(parameters, remember)
    return [total, torch.tensor(codes, dtype=torch.int64, device="cpu"), *factors]


@_penalty.register_fake  # type: ignore[untyped-decorator]
def _(parameters: list[Tensor], number: str, remember: bool) -> list[Tensor]:
    return _by_number[number].engine.blank_total(parameters)


@_custom_op(
    "gradients",
    "(Tensor weight, Tensor codes, Tensor[] factors, Tensor[] parameters, str number) -> Tensor[]",
)
def _gradients(
    weight: Tensor, codes: Tensor, factors: list[Tensor], parameters: list[Tensor], number: str
) -> list[Tensor]:
    return _by_number[number].engine.gradients(weight, codes.tolist(), factors, parameters)


@_gradients.register_fake  # type: ignore[untyped-decorator]
def _(
    weight: Tensor, codes: Tensor, factors: list[Tensor], parameters: list[Tensor], number: str
) -> list[Tensor]:
    return [torch.empty_like(parameter) for parameter in parameters]


def _save(ctx: Any, inputs: tuple[list[Tensor], str, bool], output: list[Tensor]) -> None:
    parameters, ctx.number, _ = inputs
    ctx.factors = len(output) - 1  # the first factor contains the forms of the others
    ctx.save_for_backward(*output[1:], *parameters)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[list[Tensor], None, None]:
    saved = list(ctx.saved_tensors)
    factors, parameters = saved[: ctx.factors], saved[ctx.factors :]
    codes, *rest = factors
    return _gradients(grads[0], codes, rest, parameters, ctx.number), None, None


_penalty.register_autograd(_backward, setup_context=_save)


@_custom_op(
    "add_gradients",
    "(Tensor(a!)[] gradients, Tensor[] parameters, str number) -> ()",
    changes=("gradients",),
)
def _add_gradients_(gradients: list[Tensor], parameters: list[Tensor], number: str) -> None:
    _by_number[number].engine.add_gradients(gradients, parameters)
