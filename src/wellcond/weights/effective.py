"""The effective weights of a model: the matrices that a forward pass in eval mode multiplies by.

They differ from the stored tensors if a weight is parametrized, computed by a hook before each
forward pass, or changed by the `forward` method of its own layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from wellcond.operators.convolution import Geometry
from wellcond.operators.sharded import is_sharded
from wellcond.operators.views import View
from wellcond.text import join_remarks, quote_names
from wellcond.weights.computed import (
    find_computed_weight,
    find_computed_weights,
    find_weight_computed_from,
)
from wellcond.weights.discover import (
    Source,
    find_weights,
    join_path,
    named_parameters,
    quantised_weights,
    views_of,
    why_unfit,
)
from wellcond.weights.forward import (
    COMPUTED,
    UNKNOWN,
    find_effective_weight,
    has_geometry,
    has_own_forward,
)
from wellcond.weights.fused import Views, find_fused_projections
from wellcond.weights.matrices import Matrices
from wellcond.weights.reasons import Reason, Skipped


def effective_matrices(
    model: nn.Module, acting: Mapping[nn.Module, Geometry] | None = None
) -> tuple[list[Matrices], dict[str, Skipped], int]:
    """The effective matrices of a model, and the reason for every other tensor.

    Convolutions in `acting` carry their geometry. Weights that only a pattern with their exact name
    selects are among the matrices and also have a reason, so that the caller can decide.

    Returns:
        The matrices; the reason for each other tensor, by name; the number of entries of all
        parameters.
    """
    fused = find_fused_projections(model)
    found = find_weights(model, complex_values=True, fused=fused)
    matrices: list[Matrices] = []
    rest: dict[str, Skipped] = {}

    def add(
        aliases: Sequence[str], places: Sequence[Source], value: Tensor, views: Mapping[str, View]
    ) -> None:
        name, module, attribute = aliases[0], places[0].owner, places[0].attribute
        if is_sharded(value):
            rest[name] = Skipped(Reason.sharded)
            return
        if value.is_meta:
            rest.setdefault(name, Skipped(Reason.no_values))
            return
        own, geometry = _look_at(module, attribute, value, (acting or {}).get(module))
        note = join_remarks(own, _note_of_tied(aliases, places, value))
        if computed := find_weight_computed_from(module, attribute):
            note = f"a part from which {computed.attribute} is computed, not the effective weight"
        acts = own == COMPUTED
        matrices.append(
            Matrices(
                name,
                tuple(aliases),
                tuple(value.shape),
                views,
                partial(_acting_value if acts else value_of, module, attribute),
                geometry,
                note=join_remarks(fused.get((module, attribute), Views()).note, note),
                stored=attribute not in _effective_attributes(module) and not acts,
            )
        )

    # A computed weight counts instead of its parts.
    sizes = {
        name: 0
        if find_weight_computed_from(module, attribute) or is_lazy(parameter)
        else parameter.numel()
        for name, module, attribute, parameter in named_parameters(model)
    }
    total = sum(size for _, _, size in quantised_weights(model))
    for _, group in groupby(found.weights, key=lambda weight: weight.sources):
        weights = list(group)
        first, name = weights[0], weights[0].aliases[0]
        views = {weight.name.removeprefix(name)[1:]: weight.view for weight in weights}
        if first.reason is not None:
            rest[name] = first.reason
        total += sizes[name]
        aliases = [alias for alias in first.aliases if ":" not in alias]
        add(aliases, (*first.sources, *first.tied), first.parameters[0].detach(), views)
    for name, skipped in found.others.items():
        if skipped.reason is not Reason.parametrized:
            rest[name] = skipped
            total += sizes.get(name, 0)
    for prefix, module in model.named_modules():
        for attribute in _effective_attributes(module):
            name = join_path(prefix, attribute)
            try:
                value = value_of(module, attribute)
            except ValueError as error:
                rest[name] = Skipped(Reason.uncomputed, str(error))
                stale = vars(module).get(attribute)
                total += stale.numel() if isinstance(stale, Tensor) else 0
                continue
            total += value.numel()
            known = views_of(module, attribute, value, fused)
            if isinstance(known, Skipped):
                rest[name] = Skipped(Reason.sharded) if is_sharded(value) else known
            else:
                add((name,), (Source(module, attribute),), value, known)
    return matrices, rest, total


def _effective_attributes(module: nn.Module) -> list[str]:
    """The names of the tensors that are computed from parameters of a module."""
    computed = [one.attribute for one in find_computed_weights(module)]
    return [*getattr(module, "parametrizations", ()), *computed]


def _look_at(
    module: nn.Module, attribute: str, value: Tensor, geometry: Geometry | None
) -> tuple[str, Geometry | None]:
    """The remark on a weight with this value, and the geometry if the layer has it."""
    if attribute != "weight" or not has_own_forward(module):
        # Complex kernels are not measured as operators.
        return "", None if value.is_complex() else geometry
    W, note = find_effective_weight(module, value)
    if geometry is None:
        return note, None
    kernel, whole = value if W is None else W, note == UNKNOWN
    if value.is_complex() or not has_geometry(module, kernel, geometry, whole):
        own = "only the kernel: how the layer's own forward applies it is unknown"
        return join_remarks(note, own), None
    return (COMPUTED if W is not None else ""), geometry


def _note_of_tied(aliases: Sequence[str], places: Sequence[Source], value: Tensor) -> str:
    """A remark on layers that share a weight but use it differently, or ""."""
    owners = [place.owner for place in places]
    weights = all(place.attribute == "weight" for place in places)
    if len(places) == 1 or not weights or not any(map(has_own_forward, owners)):
        return ""
    first, *others = [find_effective_weight(owner, value) for owner in owners]
    known = UNKNOWN not in (first.note, *(one.note for one in others))
    differ = [
        alias
        for alias, other in zip(aliases[1:], others, strict=True)
        if other.note != first.note or not _equal(other.weight, first.weight)
    ]
    acts = "is" if known else "may be"
    return (
        f"shared with {quote_names(differ)}, where the effective weight {acts} different"
        if differ
        else ""
    )


def _equal(W: Tensor | None, V: Tensor | None) -> bool:
    return W is V or (W is not None and V is not None and torch.equal(W, V))


def acting_tensor(module: nn.Module, attribute: str) -> Tensor:
    """The effective tensor.

    Raises:
        ValueError: the tensor is sharded, or has no real values.
    """
    if attribute not in _effective_attributes(module):
        parameter = Source(module, attribute).parameter
        if is_sharded(parameter):
            raise ValueError(Reason.sharded.value)
        why = why_unfit(parameter, ())
        if why is not None:
            raise ValueError(str(why))
    return _acting_value(module, attribute)


def _acting_value(module: nn.Module, attribute: str) -> Tensor:
    value = value_of(module, attribute)
    W = find_effective_weight(module, value).weight if attribute == "weight" else None
    return value if W is None else W


def value_of(module: nn.Module, attribute: str) -> Tensor:
    """The tensor that the forward pass reads: parametrized, computed by a hook, or stored.

    Raises:
        ValueError: the method that computes it is unknown or fails.
    """
    compute: Callable[[], Tensor]
    if attribute in getattr(module, "parametrizations", ()):
        method = "its parametrization"
        compute = partial(evaluate_parametrization, module, attribute)
    elif (computed := find_computed_weight(module, attribute)) is None:
        return Source(module, attribute).parameter.detach()
    elif computed.compute is None:
        raise ValueError(f"from {join_remarks(*computed.parts)}")
    else:
        method, compute = computed.method, computed.compute
    try:
        return compute()
    except Exception as error:  # code of the user, or a part is missing or has another shape
        raise ValueError(f"by {method}: {type(error).__name__}: {error}") from error


def evaluate_parametrization(module: nn.Module, attribute: str) -> Tensor:
    """The value of a parametrized tensor, computed by a copy in eval mode.

    Reading the original in train mode would change its state: `spectral_norm` performs a step of
    power iteration at each read.
    """
    parametrization = copy.deepcopy(cast(nn.ModuleDict, module.parametrizations)[attribute])
    with torch.no_grad():
        value: Tensor = parametrization.eval()()
    return value
