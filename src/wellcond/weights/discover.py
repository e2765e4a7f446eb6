"""Which matrices a model holds: a name and a view for each, or the reason why it is left out.

A weight is a parameter seen as a matrix of m rows (outputs) and n columns (inputs), or as a stack
of such matrices. Several views of one parameter append their own name: `attn.in_proj_weight:q`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from wellcond.operators.sharded import is_sharded
from wellcond.operators.views import Part, View

EMBEDDING = "an embedding: its rows are looked up, it is no linear map"
NOT_A_MATRIX = "not a matrix"
PARAMETRIZED = "parametrized"
SHARDED = "sharded over processes: audit a checkpoint, or a model that is whole"


@dataclass(frozen=True)
class Weight:
    """A parameter seen as a matrix (m, n) or a stack (b, m, n), under a name and its aliases.

    `reason` says why it is left out unless it is asked for by its exact name; "" if it is not.
    """

    name: str
    aliases: tuple[str, ...]  # every name that a pattern may match, views and parameters
    owner: nn.Module
    attribute: str
    view: View
    reason: str = ""

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself, looked up anew: loading with assign=True replaces it."""
        parameter = getattr(self.owner, self.attribute)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    def slices(self) -> list[Weight]:
        """The matrices of a stack, each as a weight of its own."""
        parameter = self.parameter
        blank = torch.empty_strided(parameter.shape, parameter.stride(), device="meta")
        shape = self.view(blank).shape
        if len(shape) == 2:
            return [self]

        def one(index: int) -> Weight:
            return Weight(
                f"{self.name}:{index}",
                tuple(f"{alias}:{index}" for alias in self.aliases) + self.aliases,
                self.owner,
                self.attribute,
                Part(self.view, index),
                self.reason,
            )

        return [one(index) for index in range(shape[0])]


@dataclass(frozen=True)
class Matrices:
    """A tensor and the matrices in it by the name of their view, "" if it is one as it stands.

    `read` may be slow, and what it returns large: it is for one tensor at a time.
    """

    name: str
    aliases: tuple[str, ...]
    views: Callable[[Tensor], dict[str, Tensor]]
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Found:
    """The weights of a model, and for every other parameter the reason why it is none."""

    weights: list[Weight]
    others: dict[str, str]


def _stored(parameter: Tensor) -> Tensor:
    return parameter


def _transposed(parameter: Tensor) -> Tensor:
    return parameter.mT


def kernel(parameter: Tensor) -> Tensor:
    """(out, in/groups * kernel), the columns in the order of memory, so that it is a view."""
    strides = parameter.stride()
    order = sorted(range(1, parameter.ndim), key=lambda dim: -strides[dim])
    return parameter.permute(0, *order).flatten(1)


def stack(parameter: Tensor) -> dict[str, Tensor]:
    """The matrices of a stack over the first dimension, by their number."""
    return {str(index): matrix for index, matrix in enumerate(parameter)}


def _blocks(names: str, parameter: Tensor) -> dict[str, View]:
    """Equal blocks of rows, one a letter."""
    rows = len(parameter) // len(names)
    return {name: Part(_stored, i * rows, rows) for i, name in enumerate(names)}


_GATES = {nn.RNN: "", nn.LSTM: "ifgo", nn.GRU: "rzn", nn.RNNCell: "", nn.LSTMCell: "ifgo"}
_GATES |= {nn.GRUCell: "rzn"}


def _views(module: nn.Module, attribute: str, parameter: Tensor) -> dict[str, View] | str:
    """The matrices in a parameter by the name of their view, "" if it has one only; or why none."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return EMBEDDING
    if parameter.ndim < 2:
        return f"{NOT_A_MATRIX}: {('a number', 'a vector')[parameter.ndim]}"
    if parameter.numel() == 0:
        return f"{NOT_A_MATRIX}: empty, shape {tuple(parameter.shape)}"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and attribute == "weight":
        return {"": _transposed}  # of the transformers library: stored as (in, out)
    if isinstance(module, nn.modules.conv._ConvNd) and attribute == "weight":
        return {"": kernel}
    if isinstance(module, nn.MultiheadAttention) and attribute == "in_proj_weight":
        return _blocks("qkv", parameter)
    if isinstance(module, nn.MultiheadAttention) and attribute.endswith("_proj_weight"):
        return {"": _stored}
    if attribute.startswith("weight_") and type(module) in _GATES:
        gates = _GATES[type(module)]
        # weight_hr is the projection of an LSTM, one matrix.
        whole = not gates or attribute.startswith("weight_hr")
        return {"": _stored} if whole else _blocks(gates, parameter)
    if isinstance(module, nn.Linear | nn.Bilinear) and attribute == "weight":
        return {"": _stored}
    if parameter.ndim > 3:
        return f"{NOT_A_MATRIX}: {parameter.ndim} dimensions in a {type(module).__name__}"
    return f"a parameter of {type(module).__name__}, whose use is not known"


# Modules that wrap another, as torch.compile and checkpointing do: no part of a name.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of torch.compile and DistributedDataParallel."""
    while True:
        if type(model).__name__ == "DistributedDataParallel":
            model = cast(nn.Module, model.module)
        elif "_orig_mod" in model._modules:
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Every name of every parameter, tied ones as often as they occur."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        path = [part for part in prefix.split(".") if part and part not in _WRAPPED]
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                yield ".".join([*path, attribute]), module, attribute, parameter


def find_weights(model: nn.Module) -> Found:
    """All weights of a model in the order of its parameters, tied ones once."""
    names: dict[int, list[tuple[str, nn.Module, str, nn.Parameter]]] = {}
    for occurrence in _parameters(model):
        occurrences = names.setdefault(id(occurrence[-1]), [])
        if all(occurrence[0] != other[0] for other in occurrences):
            occurrences.append(occurrence)

    weights: list[Weight] = []
    others: dict[str, str] = {}
    for occurrences in names.values():
        name, module, attribute, parameter = occurrences[0]
        aliases = tuple(occurrence[0] for occurrence in occurrences)
        reason = _unfit(parameter, aliases)
        if reason:
            others[name] = reason
            continue
        views = [_views(owner, slot, parameter) for _, owner, slot, _ in occurrences]
        # One owner that looks rows up makes it an embedding; else one that knows the use decides.
        known = (view for view in views if isinstance(view, dict))
        found = EMBEDDING if EMBEDDING in views else next(known, views[0])
        if isinstance(found, dict):
            weights += [
                Weight(
                    f"{name}:{view}" if view else name,
                    aliases + tuple(f"{alias}:{view}" for alias in aliases if view),
                    module,
                    attribute,
                    found[view],
                )
                for view in found
            ]
        elif found.startswith(NOT_A_MATRIX) or parameter.ndim < 2:
            others[name] = found
        else:
            weights.append(Weight(name, aliases, module, attribute, _stored, found))
    return Found(weights, others)


def _unfit(parameter: nn.Parameter, aliases: tuple[str, ...]) -> str:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return "not initialised yet: run the model once first"
    if not parameter.is_floating_point():
        return f"not real floating point: {parameter.dtype}".replace("torch.", "")
    if any(".parametrizations." in f".{alias}" for alias in aliases):
        return f"{PARAMETRIZED}: what is stored is not the matrix that acts"
    if parameter.layout != torch.strided:
        return f"not a dense tensor: {parameter.layout}".replace("torch.", "")
    return ""


def effective_matrices(model: nn.Module) -> tuple[list[Matrices], dict[str, str], int]:
    """What acts in a model: its matrices, parametrized ones by their value; the rest and why.

    The third is the number of entries of all parameters. Weights whose reason asks for their exact
    name are among the matrices, with their reason in the rest: the caller decides.
    """
    found = find_weights(model)
    matrices: dict[str, Matrices] = {}
    rest: dict[str, str] = {}
    total = 0
    for weight in found.weights:
        name = weight.aliases[0]
        if is_sharded(weight.parameter):
            total += weight.parameter.numel() if name not in rest else 0
            rest[name] = SHARDED
            continue
        if weight.reason:
            rest[name] = weight.reason
        if name in matrices:
            continue
        total += weight.parameter.numel()
        same = [other for other in found.weights if other.aliases[0] == name]
        aliases = tuple(alias for alias in weight.aliases if ":" not in alias)
        views = _matrices_of([(one.name.removeprefix(name)[1:], one.view) for one in same])
        matrices[name] = Matrices(name, aliases, views, partial(_detached, weight))
    parameters = {name: parameter for name, _, _, parameter in _parameters(model)}
    for name, reason in found.others.items():
        if not reason.startswith(PARAMETRIZED):
            rest[name] = reason
            total += parameters[name].numel()
    for prefix, module in model.named_modules():
        for attribute in getattr(module, "parametrizations", ()):
            name = f"{prefix}.{attribute}".lstrip(".")
            value = effective(module, attribute)
            total += value.numel()
            seen = _views(module, attribute, value)
            if isinstance(seen, str):
                rest[name] = seen
            else:
                read = partial(effective, module, attribute)
                matrices[name] = Matrices(name, (name,), _matrices_of(list(seen.items())), read)
    return list(matrices.values()), rest, total


def _matrices_of(views: list[tuple[str, View]]) -> Callable[[Tensor], dict[str, Tensor]]:
    def of(parameter: Tensor) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        for name, view in views:
            matrix = view(parameter)
            label = "kernel" if view is kernel else name
            if matrix.ndim == 2:
                seen[label] = matrix
            else:
                seen |= {f"{label}:{i}".lstrip(":"): one for i, one in stack(matrix).items()}
        return seen

    return of


def _detached(weight: Weight) -> Tensor:
    return weight.parameter.detach()


def effective(module: nn.Module, attribute: str) -> Tensor:
    """The value of a parametrized tensor, by a copy in eval mode: reading advances nothing.

    `spectral_norm` in train mode takes a step of power iteration each time it is read.
    """
    parametrization = copy.deepcopy(cast(nn.ModuleDict, module.parametrizations)[attribute])
    with torch.no_grad():
        value: Tensor = parametrization.eval()()
    return value
