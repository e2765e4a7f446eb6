"""Finds the matrices to measure in a model, in a file, and in an adapter with its base."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from wellcond.audits.attempt import failed_finding
from wellcond.files.checkpoint import Checkpoint
from wellcond.files.pieces import Pieces, pieces_of
from wellcond.files.tensors import Entry, Holder
from wellcond.linalg.arrays import as_tensor
from wellcond.operators.views import Stored, is_transposed
from wellcond.report.findings import MERGED, Finding
from wellcond.text import escape, join_remarks, last_part, list_some
from wellcond.weights.adapters import (
    Adapter,
    find_adapted_weight,
    find_adapter_parameters,
    find_adapters,
    find_other_adapter,
    is_shared_by_layers,
    read_settings_of_file,
    read_settings_of_model,
)
from wellcond.weights.changes import UnknownAdapterError
from wellcond.weights.discover import heads_of, unwrapped
from wellcond.weights.effective import acting_tensor, effective_matrices
from wellcond.weights.heads import Attention, Value, find_heads_in_file
from wellcond.weights.matrices import Matrices, entries
from wellcond.weights.reasons import Reason, Skipped
from wellcond.weights.sizes import find_geometries

_FLATTEN = (
    'If several contain weights, join their names: wc.audit({f"{a}.{b}": w for a, inner in '
    "state.items() for b, w in inner.items()})."
)
Auditable: TypeAlias = nn.Module | str | os.PathLike[str] | Mapping[str, Any]


@dataclass
class Source:
    """The matrices and tensors of a model or a file, found without reading a weight.

    Attributes:
        name: the path of a file, or the class of a model.
        matrices: the matrices, grouped by tensor.
        skipped: the tensors that are not weights, and why.
        parameters: the total number of entries of all parameters.
        sizes: the number of entries of each parameter, by its name.
        tensors: the entries of every tensor that can be of floating point, by its name.
        masks: the tensors in which -inf is expected.
        find_heads: finds the attention heads, and returns them with a function that reads their
            tensors.
        constants: the numbers of entries of tensors that are not parameters, but are measured if a
            pattern is their exact name.
        of_file: whether it is a file, which describes weights less completely than a model.
        of_graph: whether it is a file with a graph, whose names have no known meaning; see
            `TensorFile.of_graph`.
        failed: findings for tensors that can never be measured, such as those of damaged files.
        adapters: the adapters, each with the name of its weight; their factors are not matrices.
        states: returns the size and time of each file of the source, by path.
        bases: the adapted weights that another source contains; reading a missing one raises an
            error with the reason.
    """

    name: str
    matrices: list[Matrices]
    skipped: dict[str, Skipped]
    parameters: int
    sizes: dict[str, int]
    tensors: dict[str, Pieces]
    masks: set[str]
    find_heads: Callable[[], tuple[list[Attention], Value]]
    constants: dict[str, int] = field(default_factory=dict)
    of_file: bool = False
    of_graph: bool = False
    failed: list[Finding] = field(default_factory=list)
    adapters: list[tuple[str, Adapter]] = field(default_factory=list)
    bases: list[Matrices] = field(default_factory=list)
    states: Callable[[], dict[str, list[int]]] = dict

    @property
    def others(self) -> list[str]:
        """Names that may have no row: of all tensors, and of merged weights without a base."""
        return [*self.tensors, *(f"{name}:{MERGED}" for name, _ in self.adapters)]


def source_of(model_or_path: Auditable, example: Any = None, base: Any = None) -> Source:
    """The source of a model, a path or a state dict.

    Raises:
        TypeError: the argument is something else, `example` is given without a model, or `base` is
            given for a model.
        ValueError: the base contains none of the adapted weights.
    """
    if any(one.__module__.partition(".")[0] == "keras" for one in type(model_or_path).__mro__):
        raise TypeError(
            "`model_or_path` must be a torch.nn.Module, a path or a mapping of names to tensors, "
            'got a model of Keras. Save it with model.save("model.keras"), and audit the file.'
        )
    if isinstance(model_or_path, nn.Module):
        if base is not None:
            raise TypeError(
                "`base` requires the path of an adapter, got a model. A PEFT model contains its "
                "base: omit `base`."
            )
        return _of_model(unwrapped(model_or_path), example)
    if isinstance(model_or_path, str | os.PathLike | Mapping):
        if example is not None:
            raise TypeError(
                "`example` requires a model, got only weights, which do not specify the stride and "
                "padding of convolutions. Load the model, and audit it."
            )
        if isinstance(model_or_path, Mapping):
            model_or_path = tensors_of(model_or_path)
        source = source_of_file(Checkpoint(model_or_path))
        return source if base is None else _with_base(source, source_of(base))
    is_array = isinstance(getattr(model_or_path, "ndim", None), int)
    raise TypeError(
        "`model_or_path` must be a torch.nn.Module, a path or a mapping of names to tensors, got "
        f"{type(model_or_path).__name__}."
        + (' Give the array a name: {"weight": array}.' if is_array else "")
    )


def tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict; NumPy arrays are converted.

    Raises:
        TypeError: a name is not a str, or a value is not a tensor or array, but is array-like or
            a container of tensors.
    """
    tensors = {}
    for name, value in state.items():
        if not isinstance(name, str):
            raise TypeError(
                f"`model_or_path` must map names to tensors, got a key of type "
                f"{type(name).__name__}."
            )
        where = f'`model_or_path["{escape(name)}"]`'
        if isinstance(value, Mapping | list | tuple | nn.Module):
            nested = f" {_FLATTEN}" if isinstance(value, Mapping) else ""
            raise TypeError(
                f"{where} must be a torch.Tensor or a NumPy array, got {type(value).__name__}. "
                f"Pass the mapping that directly contains the weights.{nested}"
            )
        if isinstance(value, Tensor) or getattr(value, "ndim", None):  # an array, such as of JAX
            tensors[name] = as_tensor(value, where)
    return tensors


def _of_model(model: nn.Module, example: Any) -> Source:
    modules = dict(model.named_modules())
    matrices, skipped, total = effective_matrices(
        model, {} if example is None else find_geometries(model, example)
    )
    copied = tuple(
        f"{path}.original_module."
        for path, module in modules.items()
        if isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict)
        and not getattr(module, "disable_adapters", False)
    )
    replaced = (one.name for one in matrices if one.name.startswith(copied))
    skipped |= dict.fromkeys(replaced, Skipped(Reason.replaced))
    parameters = {n: p.detach() for n, p in model.named_parameters() if not is_lazy(p)}
    norms = {path for path, module in modules.items() if "norm" in type(module).__name__.lower()}
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    source = Source(
        type(model).__name__,
        matrices,
        skipped,
        total,
        {name: parameter.numel() for name, parameter in parameters.items()},
        # Tensors with values, but no subclasses.
        {
            name: partial(pieces_of, tensor.detach())
            for name, tensor in tensors.items()
            if type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
        },
        # All buffers except the statistics of norms, whatever their names.
        {
            name
            for name, buffer in model.named_buffers()
            if not _is_statistic(name)
            and not (buffer.ndim < 2 and name.rpartition(".")[0] in norms)
        },
        lambda: (heads_of(model), acting_tensor),
    )
    values = parameters | {n: one for n, one in model.named_buffers() if is_shared_by_layers(n)}
    read = {name: partial(lambda tensor: tensor, tensor) for name, tensor in values.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in values.items()}
    idle = {
        path
        for path, module in modules.items()
        if getattr(module, "merged", False) or getattr(module, "disable_adapters", False)
    }
    return _with_adapters(source, find_adapters(read, shapes, read_settings_of_model(model)), idle)


def source_of_file(file: Checkpoint) -> Source:
    """The source of a checkpoint."""
    matrices, sizes = list(file.matrices()), file.sizes
    # Buffers and square tables that are not weights, such as `tril`, can be masks.
    masks = {
        name
        for name, (_, entry) in file.where.items()
        if entry.skipped is not None
        and (
            entry.skipped.reason is Reason.buffer
            or (entry.skipped.reason is Reason.constant and _is_square(entry.shape))
        )
        and not _is_statistic(name)
    }
    source = Source(
        file.name,
        matrices,
        file.skipped(),
        sum(sizes.values()),
        sizes,
        _tensors_in(file),
        masks,
        partial(_heads_in, file, matrices),
        file.constants,
        of_file=True,
        of_graph=file.of_graph,
        failed=[failed_finding(name, "", why) for name, why in file.damaged.items()],
        states=file.states,
    )
    if file.of_graph:  # names in a graph do not identify heads and adapters
        return replace(source, find_heads=lambda: ([], acting_tensor))
    plain = {
        name: (owner, entry)
        for name, (owner, entry) in file.where.items()
        if entry.skipped is None or entry.skipped.reason in (Reason.vector, Reason.number)
    }
    read = {name: partial(owner.read, entry.name) for name, (owner, entry) in plain.items()}
    shapes = {name: entry.shape for name, (_, entry) in plain.items()}
    setting = read_settings_of_file(file.beside("adapter_config.json"))
    return _with_adapters(source, find_adapters(read, shapes, setting))


def _is_square(shape: tuple[int, ...]) -> bool:
    return len({*shape[-2:]}) == 1 < len(shape)


def _is_statistic(name: str) -> bool:
    return last_part(name).startswith("running_")


def _tensors_in(file: Checkpoint) -> dict[str, Pieces]:
    """The tensors of a file that can contain NaN; only the first of several names of a tensor."""
    repeated = (Reason.same, Reason.part)
    # An entry of bfloat16, for example, can pack several codes that look like NaN.
    packed = {
        recipe.parts[0]
        for recipe in file.recipes.values()
        if entries(file.stored[recipe.parts[0]][1].shape) != entries(recipe.shape)
    }

    def pieces(parts: Sequence[tuple[Holder, Entry]]) -> Iterator[Tensor]:
        for owner, entry in parts:
            yield from owner.pieces(entry.name)

    return {
        name: partial(pieces, file.slices.get(name, [(owner, entry)]))
        for name, (owner, entry) in file.stored.items()
        if name not in packed
        and not (entry.skipped is not None and entry.skipped.reason in repeated)
    }


def _with_adapters(source: Source, adapters: list[Adapter], idle: Collection[str] = ()) -> Source:
    """Replaces the factors by one adapter for each pair, which is added to the weight next to it.

    `idle` contains the modules whose adapters are merged or disabled.
    """
    parts = {name for adapter in adapters for name in adapter.parts}
    matrices = {one.name: one for one in source.matrices if one.name not in parts}
    skipped = {
        name: why
        for name, why in source.skipped.items()
        if name not in parts or why.reason.no_matrix
    }
    for adapter in adapters:
        name, setting = find_adapted_weight(adapter, matrices, beside=True), adapter.setting
        source.adapters.append((name or adapter.weight, adapter))
        if name and setting.acts and not setting.unknown and not setting.no_sum:
            one = matrices[name]
            matrices[name] = replace(one, adapters=(*one.adapters, adapter))
    others = source.skipped | find_adapter_parameters(source.skipped, {})
    others = {name: why for name, why in others.items() if why.reason is Reason.adapter}
    for weight, one in matrices.items():
        of = "" if one.adapters else find_other_adapter(weight, others)
        if of and weight.partition(".base_layer.")[0] not in idle:
            note = join_remarks(one.note, f"these numbers do not include the effect of {of}")
            matrices[weight] = replace(one, note=note)
    return replace(source, matrices=list(matrices.values()), skipped=skipped)


def _with_base(source: Source, base: Source) -> Source:
    """Adds the weights of the base that the adapters adapt, under the names of the base."""
    # The names of its tensors identify an adapter.
    beside = {adapter.parts for one in source.matrices for adapter in one.adapters}
    if len(beside) == len(source.adapters):
        found = "contains its base" if source.adapters else "has no adapter that wellcond knows"
        raise ValueError(
            f"`base` requires an adapter without its base, but {source.name} {found}. Omit `base`."
        )
    matrices = {alias: one for one in base.matrices for alias in one.aliases}
    adapters: list[tuple[str, Adapter]] = []
    bases: dict[str, Matrices] = {}
    missing: dict[str, str] = {}
    for label, adapter in source.adapters:
        name = label if adapter.parts in beside else find_adapted_weight(adapter, matrices)
        weight = name or label
        adapters.append((weight, adapter))
        if weight in bases:
            raise ValueError(
                f"{source.name} must contain one adapter, but it contains several for {weight}: "
                f"{list_some((*bases[weight].adapters[0].parts, *adapter.parts))}. "
                "Give the path of one file."
            )
        if name is None:
            skipped = find_adapted_weight(adapter, base.skipped) or _find_codes(adapter, base)
            why = f"is skipped ({base.skipped[skipped]})" if skipped else "is missing"
            missing[label] = f"in {base.name} it {why}"
            read, views = partial(_raise_missing, missing[label]), {"": Stored()}
            bases[label] = Matrices(label, (label,), (0, 0), views, read, adapters=(adapter,))
        elif adapter.parts not in beside:
            one, setting = matrices[name], adapter.setting
            if any(map(is_transposed, one.views.values())):
                # The adapter of a quantised GPT-2 does not state this, because its quantised layers
                # are Linear.
                adapter = replace(adapter, setting=replace(setting, transposed=True))
            bases[name] = replace(one, name=name, adapters=(adapter,))
    if len(missing) == len(bases):
        first, why = next(iter(missing.items()))
        raise ValueError(
            f"`base` must contain the weights that {source.name} adapts, but it has no "
            f"weight for {first} ({why}); it has {list_some(matrices, limit=3)}. Give the model "
            "that was adapted. If its file does not use the names of the modules, pass the model "
            "itself: wc.audit(adapter, base=model)."
        )
    return replace(
        source,
        adapters=adapters,
        bases=list(bases.values()),
        states=lambda: source.states() | base.states(),
    )


def _raise_missing(why: str) -> Tensor:
    raise UnknownAdapterError(why)


def _find_codes(adapter: Adapter, base: Source) -> str | None:
    """The name of the codes that are stored instead of the adapted weight, if there are any."""
    module = adapter.weight.removesuffix("weight")
    codes = [name for name, why in base.skipped.items() if why.reason is Reason.quantised]
    return next((n for n in codes if n.startswith(module) or f".{module}" in n), None)


def _heads_in(file: Checkpoint, matrices: list[Matrices]) -> tuple[list[Attention], Value]:
    """The heads in a file, and a function that reads its tensors by name."""
    read = {alias: one.read for one in matrices for alias in one.aliases}
    entries = {name: entry for name, (_, entry) in file.where.items()}
    shapes = {alias: entries[one.name].shape for one in matrices for alias in one.aliases}
    shapes |= {name: entry.shape for name, entry in entries.items() if len(entry.shape) == 1}
    config = file.beside("config.json")
    return find_heads_in_file(shapes, config), lambda _, name: read[name]()
