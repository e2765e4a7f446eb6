"""The geometry of convolutions, from the options of a layer or from one forward pass of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from wellcond.operators.convolution import Geometry
from wellcond.weights.forward import has_own_forward
from wellcond.weights.reasons import Reason


def geometry_of(layer: nn.modules.conv._ConvNd) -> Geometry | Reason:
    """The geometry of a convolution on inputs of every size, or why it is unknown.

    It is read from the options of the layer, without a forward pass, and includes the padding of
    `padding="same"`.
    """
    if has_own_forward(layer):
        return Reason.own_forward
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(weight, nn.parameter.UninitializedParameter):
        return Reason.uninitialised
    if not weight.is_floating_point():
        return Reason.not_real
    return Geometry.of(layer)


def find_geometries(model: nn.Module, example: Any) -> dict[nn.Module, Geometry]:
    """The geometry of each convolution that the example reaches, at its first use.

    Runs one forward pass in eval mode under no_grad, with temporary hooks, on the device of the
    model. Restores training flags and the global random state.

    Args:
        model: a model on the device of the example.
        example: the argument of the model: a tensor, a tuple of positional arguments or a dict of
            keyword arguments.

    Raises:
        ValueError: the forward pass fails, or would initialise layers.
    """
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise ValueError(
            "`example` requires a model whose weights are all initialised, but some are not, and a "
            "forward pass would initialise them. Call the model once first."
        )
    found: dict[nn.Module, Geometry] = {}

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        assert isinstance(layer, nn.modules.conv._ConvNd)
        x = args[0] if args else kwargs["input"]
        inputs, outputs = (tuple(t.shape[-len(layer.kernel_size) :]) for t in (x, y))
        geometry = Geometry.of(layer, *((outputs, inputs) if layer.transposed else (inputs,)))
        first = found.setdefault(layer, geometry)
        if geometry.size not in (first.size, *first.also):
            found[layer] = replace(first, also=(*first.also, geometry.size))

    with _in_eval_mode(model), contextlib.ExitStack() as hooks, torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.modules.conv._ConvNd):
                handle = layer.register_forward_hook(record, with_kwargs=True)
                hooks.callback(handle.remove)
        with torch.random.fork_rng(devices=[]):
            try:
                if isinstance(example, Mapping):
                    model(**example)
                else:
                    model(*(example if isinstance(example, tuple) else (example,)))
            except Exception as error:
                raise ValueError(
                    f"`example` must be a valid input of the model, but a forward pass failed with "
                    f"{type(error).__name__}: {error}"
                ) from error
    return found


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, flag in training:
            module.training = flag
