"""The matrices in a model: the name and view of each, or the reason why a parameter is skipped.

A weight is a parameter viewed as a matrix of m rows (outputs) and n columns (inputs), or as a stack
of such matrices. If a parameter has several views, each appends its own name:
`attn.in_proj_weight:q`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from wellcond.operators.base import WeightOperator
from wellcond.operators.convolution import Geometry
from wellcond.operators.sharded import is_sharded, operator_of
from wellcond.operators.views import STORED, Kernel, Member, Transposed, View, shape_of
from wellcond.weights.computed import find_weight_computed_from
from wellcond.weights.forward import UNKNOWN, find_effective_weight, has_own_forward
from wellcond.weights.fused import GATES, Views, cut_equally, find_fused_projections
from wellcond.weights.heads import Attention, find_heads
from wellcond.weights.matrices import is_vector
from wellcond.weights.projections import Place, is_conv1d
from wellcond.weights.reasons import Reason, Skipped
from wellcond.weights.sizes import geometry_of

_FACTOR = re.compile(r"(?:^|[._])lora_(?:[AB]|down|up)(?:[._]|$)")


@dataclass(frozen=True)
class Source:
    """The place of a parameter, looked up each time because assign=True replaces the parameter."""

    owner: nn.Module
    attribute: str

    @property
    def parameter(self) -> nn.Parameter:
        parameter = getattr(self.owner, self.attribute)
        if not isinstance(parameter, nn.Parameter):
            raise ValueError(
                f"`{self.attribute}` of a {type(self.owner).__name__} must still be a parameter, "
                f"got a {type(parameter).__name__}; it may have been parametrized. Create a new "
                "Regularizer after changing layers."
            )
        return parameter


@dataclass(frozen=True)
class Weight:
    """A parameter viewed as a matrix (m, n) or a stack (b, m, n), with a name and its aliases.

    A subclass that overrides `operator` can depend on several parameters. `reason` states why the
    weight is skipped unless a pattern is its exact name. `tied` are the other places of its
    parameter, in the order of the aliases after the first.
    """

    name: str
    aliases: tuple[str, ...]  # every name that a pattern can match, views and parameters
    sources: tuple[Source, ...]
    view: View = STORED
    reason: Skipped | None = None
    tied: tuple[Source, ...] = ()

    @property
    def caution(self) -> str:
        """What the stored tensor is, if it is not the effective weight; "" if it is."""
        if _FACTOR.search(self.name):
            return "a factor of LoRA, of which only the product with the other factor is used"
        notes = []
        for source in (*self.sources, *self.tied):
            module, attribute = source.owner, source.attribute
            if (computed := find_weight_computed_from(module, attribute)) is not None:
                return f"a part from which {computed.attribute} is computed by {computed.method}"
            if attribute == "weight" and has_own_forward(module):
                parameter = source.parameter
                if not is_sharded(parameter):
                    notes.append(
                        find_effective_weight(module, parameter.detach(), thorough=False).note
                    )
        if not any(notes):
            return ""
        which = "the forward of a layer that shares it" if self.tied else "the layer's own forward"
        may = "may change" if set(notes) <= {"", UNKNOWN} else "changes"
        return f"the stored parameter, which {which} {may}"

    @property
    def geometry(self) -> Geometry | Skipped:
        """The geometry of the convolution with this kernel, or why it is unknown."""
        owner = self.sources[0].owner
        if type(self.view) is not Kernel or not isinstance(owner, nn.modules.conv._ConvNd):
            return Skipped(Reason.unknown_use, type(owner).__name__)
        found = geometry_of(owner)
        return found if isinstance(found, Geometry) else Skipped(found)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters on which it depends."""
        return [source.parameter for source in self.sources]

    @property
    def trained(self) -> bool:
        """Whether at least one of its parameters is not frozen."""
        return any(source.parameter.requires_grad for source in self.sources)

    def operator(self, parameters: Sequence[Tensor], seed: int = 0) -> WeightOperator:
        """The weight as a linear map, with these values for its parameters."""
        (parameter,) = parameters
        return operator_of(parameter.detach(), self.view, seed)

    def members(self) -> list[Weight]:
        """The matrices of a stack, each as a separate weight."""
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
class Discovery:
    """The weights of a model, and the reason why each other parameter is not one."""

    weights: list[Weight]
    others: dict[str, Skipped]


_GATES = {nn.RNN: "", nn.LSTM: GATES[4], nn.GRU: GATES[3]}
_GATES |= {nn.RNNCell: "", nn.LSTMCell: GATES[4], nn.GRUCell: GATES[3]}


def views_of(
    module: nn.Module, attribute: str, parameter: Tensor, fused: Mapping[Place, Views]
) -> Mapping[str, View] | Skipped:
    """The matrices in a parameter, by view name ("" for a single one), or why there are none.

    `fused` are the views of projections that only the parent module determines.
    """
    if (
        computed := find_weight_computed_from(module, attribute)
    ) is not None and parameter.ndim > 1:
        return Skipped(Reason.component, f"{computed.attribute} by {computed.method}")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Skipped(Reason.embedding)
    if parameter.ndim < 2:
        return Skipped((Reason.number, Reason.vector)[parameter.ndim])
    if parameter.numel() == 0:
        return Skipped(Reason.empty)
    if isinstance(module, torch.jit.ScriptModule):
        return Skipped(Reason.scripted)
    if (module, attribute) in fused:
        return fused[module, attribute].views
    if is_conv1d(module) and attribute == "weight":
        return {"": Transposed()}
    if isinstance(module, nn.modules.conv._ConvNd) and attribute == "weight":
        return {"": Kernel(module.groups if module.groups > 1 else None)}
    if isinstance(module, nn.MultiheadAttention) and attribute == "in_proj_weight":
        return cut_equally("qkv", len(parameter))
    if isinstance(module, nn.MultiheadAttention) and attribute.endswith("_proj_weight"):
        return {"": STORED}
    if attribute.startswith("weight_") and type(module) in _GATES:
        gates = _GATES[type(module)]
        # weight_hr is the projection of an LSTM, one matrix.
        whole = not gates or attribute.startswith("weight_hr")
        return {"": STORED} if whole else cut_equally(gates, len(parameter))
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


# Wrapper modules of torch.compile and of checkpointing, which names omit.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")


def wrappings(model: nn.Module) -> Iterator[nn.Module]:
    """The given model, then the modules within torch.compile, DataParallel and DDP, inwards."""
    yield model
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        yield from wrappings(cast(nn.Module, model.module))
    elif "_orig_mod" in model._modules:
        yield from wrappings(cast(nn.Module, model._orig_mod))


def unwrapped(model: nn.Module) -> nn.Module:
    """The innermost of the `wrappings`, in which the names of the weights are paths."""
    *_, innermost = wrappings(model)
    return innermost


def refuse_flat_parameters(model: nn.Module) -> None:
    """Raises ValueError for FSDP1, which concatenates all weights of a unit to one vector."""
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__name__ == "FullyShardedDataParallel" and kind.__module__.startswith("torch."):
            raise ValueError(
                f'`model` must not be wrapped by FullyShardedDataParallel, but "{name}" is: its '
                "flat parameters do not preserve matrices. Use "
                "torch.distributed.fsdp.fully_shard, which keeps every weight as a DTensor."
            )


def join_path(prefix: str, attribute: str) -> str:
    path = [part for part in prefix.split(".") if part and part not in _WRAPPED]
    return ".".join([*path, attribute])


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Every name of every parameter; tied parameters occur once per name."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                yield join_path(prefix, attribute), module, attribute, parameter


def refuse_programs(model: nn.Module) -> None:
    """Raises ValueError for the result of torch.jit.script, trace or load."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"`model` must be an eager module, got a TorchScript program ({type(model).__name__}), "
            "whose layers have no classes. Pass the model from which it was made, or save its "
            'weights with torch.save(model.state_dict(), "weights.pt") and audit the file.'
        )


def find_weights(
    model: nn.Module, complex_values: bool = False, fused: Mapping[Place, Views] | None = None
) -> Discovery:
    """All weights of a model in the order of its parameters, tied weights once.

    Complex weights are included only if `complex_values` is True. `fused` is the result of
    `find_fused_projections` if the caller has already computed it.
    """
    refuse_programs(model)
    names: dict[int, list[tuple[str, nn.Module, str, nn.Parameter]]] = {}
    for occurrence in named_parameters(model):
        occurrences = names.setdefault(id(occurrence[-1]), [])
        if all(occurrence[0] != other[0] for other in occurrences):
            occurrences.append(occurrence)

    fused = find_fused_projections(model) if fused is None else fused
    weights: list[Weight] = []
    others: dict[str, Skipped] = {}
    for occurrences in names.values():
        parameter, aliases = occurrences[0][-1], tuple(name for name, *_ in occurrences)
        first, *tied = (Source(owner, slot) for _, owner, slot, _ in occurrences)
        why = why_unfit(parameter, aliases)
        if why is not None and not (complex_values and parameter.is_complex()):
            others[aliases[0]] = why
            continue
        views = [views_of(owner, slot, parameter, fused) for _, owner, slot, _ in occurrences]
        # One owner that looks rows up makes it an embedding; otherwise the first owner with a known
        # use decides.
        known = (view for view in views if not isinstance(view, Skipped))
        embedding = Skipped(Reason.embedding)
        found = embedding if embedding in views else next(known, views[0])
        why = found if isinstance(found, Skipped) else None
        if why is not None and (
            parameter.ndim < 2 or (why.reason.no_matrix and why.reason is not Reason.component)
        ):
            others[aliases[0]] = why
            continue
        for label, view in {"": STORED}.items() if isinstance(found, Skipped) else found.items():
            own = tuple(f"{alias}:{label}" for alias in aliases if label)
            name, *_ = own or aliases
            weights.append(Weight(name, aliases + own, (first,), view, why, tuple(tied)))
    others |= {name: why for name, why, _ in quantised_weights(model)}
    return Discovery(weights, others)


def quantised_weights(model: nn.Module) -> Iterator[tuple[str, Skipped, int]]:
    """Name, reason and number of entries of the weights of torch.ao's layers (not parameters)."""
    for prefix, module in model.named_modules():
        if ".ao.nn.quantized." not in type(module).__module__ or "weight" in module._parameters:
            continue
        for method in ("weight", "get_weight"):  # recurrent layers have the second
            read = getattr(module, method, None)
            codes = read() if callable(read) else None
            each = {method: codes} if isinstance(codes, Tensor) else codes or {}
            for name, tensor in each.items():
                why = Skipped(Reason.codes, str(tensor.dtype).removeprefix("torch."))
                yield join_path(prefix, name), why, tensor.numel()


def why_unfit(parameter: nn.Parameter, aliases: tuple[str, ...]) -> Skipped | None:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return Skipped(Reason.uninitialised)
    if type(parameter).__module__.partition(".")[0] == "torchao":
        return Skipped(Reason.codes, type(parameter).__name__)
    dtype = str(parameter.dtype).removeprefix("torch.")
    narrow = parameter.itemsize < 2 and dtype != "bool"
    if narrow and (parameter.is_floating_point() or parameter.ndim > 1):
        return Skipped(Reason.codes, dtype)
    if not parameter.is_floating_point():
        return Skipped(Reason.not_real, dtype)
    if any(".parametrizations." in f".{alias}" for alias in aliases):
        return Skipped(Reason.parametrized)
    if parameter.layout != torch.strided:
        return Skipped(Reason.not_dense, str(parameter.layout).removeprefix("torch."))
    return None


def heads_of(model: nn.Module) -> list[Attention]:
    """The attention modules of a model, under the prefixes of the names of their weights."""
    return find_heads(model, _WRAPPED)
