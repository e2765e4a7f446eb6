"""Which matrices a model holds: a name and a view for each, or the reason why it is left out.

A weight is a parameter seen as a matrix of m rows (outputs) and n columns (inputs), or as a stack
of such matrices. Several views of one parameter append their own name: `attn.in_proj_weight:q`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from wellcond.operators.base import WeightOperator
from wellcond.operators.convolution import Geometry
from wellcond.operators.sharded import is_sharded, operator_of
from wellcond.operators.views import STORED, Kernel, Member, Transposed, View, shape_of
from wellcond.weights.fused import GATES, Views, equal_blocks, fused_projections
from wellcond.weights.heads import Attention, find_heads
from wellcond.weights.matrices import Matrices, is_vector, seen_through
from wellcond.weights.projections import Place
from wellcond.weights.reasons import Reason, Skipped


@dataclass(frozen=True)
class Source:
    """Where a parameter is found: looked up anew each time, as assign=True replaces it."""

    owner: nn.Module
    attribute: str

    @property
    def parameter(self) -> nn.Parameter:
        parameter = getattr(self.owner, self.attribute)
        if not isinstance(parameter, nn.Parameter):
            raise ValueError(
                f"`{self.attribute}` of a {type(self.owner).__name__} must still be a parameter, "
                f"but is a {type(parameter).__name__}: parametrized since, perhaps. Make a new "
                "Regularizer after layers have changed."
            )
        return parameter


@dataclass(frozen=True)
class Weight:
    """A parameter seen as a matrix (m, n) or a stack (b, m, n), under a name and its aliases.

    A subclass that overrides `operator` may rest on several parameters. `reason` says why it is
    left out unless it is asked for by its exact name.
    """

    name: str
    aliases: tuple[str, ...]  # every name that a pattern may match, views and parameters
    sources: tuple[Source, ...]
    view: View = STORED
    reason: Skipped | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that it rests on."""
        return [source.parameter for source in self.sources]

    @property
    def trained(self) -> bool:
        """Whether one of its parameters is not frozen."""
        return any(source.parameter.requires_grad for source in self.sources)

    def operator(self, parameters: Sequence[Tensor], seed: int = 0) -> WeightOperator:
        """It as a linear map, with these values for its parameters."""
        (parameter,) = parameters
        return operator_of(parameter.detach(), self.view, seed)

    def members(self) -> list[Weight]:
        """The matrices of a stack, each as a weight of its own."""
        shape = shape_of(self.view, self.parameters[0])
        if len(shape) == 2:
            return [self]
        label = "group" if isinstance(self.view, Kernel) else ""
        return [
            replace(
                self,
                name=f"{self.name}:{label}{index}",
                aliases=tuple(f"{a}:{label}{index}" for a in self.aliases) + self.aliases,
                view=Member(self.view, index),
            )
            for index in range(shape[0])
        ]


@dataclass(frozen=True)
class Found:
    """The weights of a model, and for every other parameter the reason why it is none."""

    weights: list[Weight]
    others: dict[str, Skipped]


_GATES = {nn.RNN: "", nn.LSTM: GATES[4], nn.GRU: GATES[3]}
_GATES |= {nn.RNNCell: "", nn.LSTMCell: GATES[4], nn.GRUCell: GATES[3]}


def _views(
    module: nn.Module, attribute: str, parameter: Tensor, fused: Mapping[Place, Views]
) -> Mapping[str, View] | Skipped:
    """The matrices in a parameter by the name of their view, "" if it has one only; or why none.

    `fused` are the views of projections that only the module above them knows.
    """
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Skipped(Reason.embedding)
    if parameter.ndim < 2:
        return Skipped((Reason.number, Reason.vector)[parameter.ndim])
    if parameter.numel() == 0:
        return Skipped(Reason.empty)
    if (module, attribute) in fused:
        return fused[module, attribute].views
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and attribute == "weight":
        return {"": Transposed()}  # of the transformers library: stored as (in, out)
    if isinstance(module, nn.modules.conv._ConvNd) and attribute == "weight":
        return {"": Kernel(module.groups if module.groups > 1 else None)}
    if isinstance(module, nn.MultiheadAttention) and attribute == "in_proj_weight":
        return equal_blocks("qkv", len(parameter))
    if isinstance(module, nn.MultiheadAttention) and attribute.endswith("_proj_weight"):
        return {"": STORED}
    if attribute.startswith("weight_") and type(module) in _GATES:
        gates = _GATES[type(module)]
        # weight_hr is the projection of an LSTM, one matrix.
        whole = not gates or attribute.startswith("weight_hr")
        return {"": STORED} if whole else equal_blocks(gates, len(parameter))
    if isinstance(module, nn.Linear | nn.Bilinear) and attribute == "weight":
        return {"": STORED}
    kind = type(module).__name__  # of the transformers library: MixtralExperts, MixtralTopKRouter
    if "Experts" in kind and parameter.ndim == 3:
        return {"": STORED}
    if kind.endswith("Router") and parameter.ndim == 2 and attribute == "weight":
        return {"": STORED}
    if is_vector(parameter.shape):
        return Skipped(Reason.vector)
    if parameter.ndim > 3:
        return Skipped(Reason.dimensions, f"{parameter.ndim} in a {type(module).__name__}")
    return Skipped(Reason.unknown_use, f"of {type(module).__name__}")


# Modules that wrap another, as torch.compile and checkpointing do: no part of a name.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")


def wrappings(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it is given, and what torch.compile, DataParallel and DDP hold, one by one."""
    yield model
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        yield from wrappings(cast(nn.Module, model.module))
    elif "_orig_mod" in model._modules:
        yield from wrappings(cast(nn.Module, model._orig_mod))


def unwrapped(model: nn.Module) -> nn.Module:
    """The innermost of its wrappings, by whose names its weights are called."""
    *_, innermost = wrappings(model)
    return innermost


def refuse_flat_parameters(model: nn.Module) -> None:
    """Raises for the first FSDP, which lays all weights of a unit end to end in one vector."""
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__name__ == "FullyShardedDataParallel" and kind.__module__.startswith("torch."):
            raise ValueError(
                f'`model` must not be wrapped by FullyShardedDataParallel, but "{name}" is: '
                "its flat parameters keep no matrix. Use torch.distributed.fsdp.fully_shard, which "
                "keeps every weight as a DTensor."
            )


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

    fused = fused_projections(model)
    weights: list[Weight] = []
    others: dict[str, Skipped] = {}
    for occurrences in names.values():
        name, module, attribute, parameter = occurrences[0]
        aliases = tuple(occurrence[0] for occurrence in occurrences)
        sources = (Source(module, attribute),)
        unfit = _unfit(parameter, aliases)
        if unfit is not None:
            others[name] = unfit
            continue
        views = [_views(owner, slot, parameter, fused) for _, owner, slot, _ in occurrences]
        # One owner that looks rows up makes it an embedding; else one that knows the use decides.
        known = (view for view in views if not isinstance(view, Skipped))
        embedding = Skipped(Reason.embedding)
        found = embedding if embedding in views else next(known, views[0])
        if not isinstance(found, Skipped):
            for label, view in found.items():
                own = f"{name}:{label}" if label else name
                seen = tuple(f"{alias}:{label}" for alias in aliases if label)
                weights.append(Weight(own, aliases + seen, sources, view))
        elif found.reason.no_matrix or parameter.ndim < 2:
            others[name] = found
        else:
            weights.append(Weight(name, aliases, sources, reason=found))
    return Found(weights, others)


def _unfit(parameter: nn.Parameter, aliases: tuple[str, ...]) -> Skipped | None:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return Skipped(Reason.uninitialised)
    if not parameter.is_floating_point():
        return Skipped(Reason.not_real, str(parameter.dtype).removeprefix("torch."))
    if any(".parametrizations." in f".{alias}" for alias in aliases):
        return Skipped(Reason.parametrized)
    if parameter.layout != torch.strided:
        return Skipped(Reason.not_dense, str(parameter.layout).removeprefix("torch."))
    return None


def effective_matrices(
    model: nn.Module, acting: Mapping[nn.Module, Geometry] | None = None
) -> tuple[list[Matrices], dict[str, Skipped], int]:
    """What acts in a model: its matrices, parametrized ones by their value; the rest and why.

    Those of convolutions whose geometry is known say so.

    The third is the number of entries of all parameters. Weights whose reason asks for their exact
    name are among the matrices, with their reason in the rest: the caller decides.
    """
    acting = acting or {}
    found, fused = find_weights(model), fused_projections(model)
    seen: dict[str, dict[str, View]] = {}
    for weight in found.weights:
        name = weight.aliases[0]
        seen.setdefault(name, {})[weight.name.removeprefix(name)[1:]] = weight.view
    matrices: dict[str, Matrices] = {}
    rest: dict[str, Skipped] = {}
    total = 0
    for weight in found.weights:
        name, (parameter,) = weight.aliases[0], weight.parameters
        if is_sharded(parameter):
            total += parameter.numel() if name not in rest else 0
            rest[name] = Skipped(Reason.sharded)
            continue
        if weight.reason is not None:
            rest[name] = weight.reason
        if name in matrices:
            continue
        total += parameter.numel()
        (source,) = weight.sources
        matrices[name] = Matrices(
            name,
            tuple(alias for alias in weight.aliases if ":" not in alias),
            tuple(parameter.shape),
            seen_through(seen[name]),
            partial(_detached, weight),
            acting.get(source.owner),
            note=fused.get((source.owner, source.attribute), Views()).note,
        )
    parameters = {name: parameter for name, _, _, parameter in _parameters(model)}
    for name, skipped in found.others.items():
        if skipped.reason is not Reason.parametrized:
            rest[name] = skipped
            if skipped.reason is not Reason.uninitialised:
                total += parameters[name].numel()
    for prefix, module in model.named_modules():
        for attribute in getattr(module, "parametrizations", ()):
            name = f"{prefix}.{attribute}".lstrip(".")
            value = effective(module, attribute)
            total += value.numel()
            known = _views(module, attribute, value, fused)
            if isinstance(known, Skipped):
                rest[name] = known
            else:
                read = partial(effective, module, attribute)
                views, shape = seen_through(known), tuple(value.shape)
                note = fused.get((module, attribute), Views()).note
                matrices[name] = Matrices(
                    name, (name,), shape, views, read, acting.get(module), note=note
                )
    return list(matrices.values()), rest, total


def heads_of(model: nn.Module) -> list[Attention]:
    """The heads of attention of a model, under the names that its weights begin with."""
    return find_heads(model, _WRAPPED)


def current(module: nn.Module, attribute: str) -> Tensor:
    """The value of a tensor, parametrized or not.

    Raises:
        ValueError: it is sharded, or has no values of real numbers.
    """
    if attribute in getattr(module, "parametrizations", ()):
        return effective(module, attribute)
    parameter = Source(module, attribute).parameter
    if is_sharded(parameter):
        raise ValueError(Reason.sharded.value)
    unfit = _unfit(parameter, ())
    if unfit is not None:
        raise ValueError(str(unfit))
    return parameter.detach()


def _detached(weight: Weight) -> Tensor:
    return weight.parameters[0].detach()


def effective(module: nn.Module, attribute: str) -> Tensor:
    """The value of a parametrized tensor, by a copy in eval mode: reading advances nothing.

    `spectral_norm` in train mode takes a step of power iteration each time it is read.
    """
    parametrization = copy.deepcopy(cast(nn.ModuleDict, module.parametrizations)[attribute])
    with torch.no_grad():
        value: Tensor = parametrization.eval()()
    return value
