"""The regulariser in a graph of torch.compile: operators that the compiler does not look into.

Their inputs are the parameters and a number that stands for the regulariser. What changes from step
to step, the side of the product, the step, the strength, stays inside: it breaks no graph and asks
for no second compilation. A captured CUDA graph would leave it out, so these operators are kept
outside of such graphs.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_numbers = map(str, itertools.count())  # a whole number would become a symbol in a graph
_passes: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def register(passes: Any) -> str:
    """The number by which a graph names the weights of a regulariser."""
    number = next(_numbers)
    _passes[number] = passes
    return number


def compiled_penalty(parameters: Sequence[Tensor], number: str, remember: bool) -> Tensor:
    """The sum of strength * penalty, differentiable in the parameters."""
    total: Tensor = _penalty(list(parameters), number, remember)[0]
    return total


@torch.library.custom_op("wellcond::penalty", mutates_args=(), tags=torch.Tag.cudagraph_unsafe)
def _penalty(parameters: list[Tensor], number: str, remember: bool) -> list[Tensor]:
    total, factors = _passes[number].total(parameters, remember)
    return [total, *factors]


@_penalty.register_fake
def _(parameters: list[Tensor], number: str, remember: bool) -> list[Tensor]:
    shapes: list[Tensor] = _passes[number].shapes_of_total(parameters)
    return shapes


@torch.library.custom_op("wellcond::gradients", mutates_args=(), tags=torch.Tag.cudagraph_unsafe)
def _gradients(
    weight: Tensor, factors: list[Tensor], parameters: list[Tensor], number: str
) -> list[Tensor]:
    gradients: list[Tensor] = _passes[number].gradients(weight, factors, parameters)
    return gradients


@_gradients.register_fake
def _(weight: Tensor, factors: list[Tensor], parameters: list[Tensor], number: str) -> list[Tensor]:
    return [torch.empty_like(parameter) for parameter in parameters]


def _save(ctx: Any, inputs: tuple[list[Tensor], str, bool], output: list[Tensor]) -> None:
    parameters, ctx.number, _ = inputs
    ctx.factors = len(output) - 1
    ctx.save_for_backward(*output[1:], *parameters)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[list[Tensor], None, None]:
    saved = list(ctx.saved_tensors)
    factors, parameters = saved[: ctx.factors], saved[ctx.factors :]
    return _gradients(grads[0], factors, parameters, ctx.number), None, None


_penalty.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op(
    "wellcond::add_gradients_", mutates_args=("gradients",), tags=torch.Tag.cudagraph_unsafe
)
def compiled_add_gradients_(gradients: list[Tensor], parameters: list[Tensor], number: str) -> None:
    """Adds strength * gradient at the parameters to the gradients."""
    _passes[number].add_gradients_(gradients, parameters)
