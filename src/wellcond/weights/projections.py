"""The projections of a module: where each is stored, its view, and its shape.

A file has no modules, but the names of its tensors are paths of modules. `StoredModule` is a module
as a file describes it; config.json in the folder of the file replaces its attributes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from wellcond.operators.views import STORED, Transposed, View
from wellcond.weights.architectures import HEADS, HEADS_OF_SIDES

# The place of a tensor: a module and the attribute; in a file None and the name of the tensor.
Place = tuple[object, str]

_Config = Mapping[str, object]

_WRAPPED = "base_layer"  # the layer inside a layer of PEFT
_LANGUAGE_MODEL = re.compile(r"(model\.)?layers\.\d+\.")  # a language model without other parts
# Words in the paths of modules, and the section of a config that describes such modules.
_SECTIONS = {"language": "text", "visual": "vision", "image": "vision", "speech": "audio"}


class UnknownLayoutError(Exception):
    """The layout of a projection is unknown; the message is the reason for the user."""


@dataclass(frozen=True)
class Projection:
    """A matrix or a stack of matrices, as a view of a tensor; in a file also a vector.

    Attributes:
        place: the place of the tensor.
        view: the view from the tensor to the matrix.
        shape: (m, n), or (b, m, n) for a stack.
        adapted: whether PEFT adds to it.
    """

    place: Place
    view: View
    shape: tuple[int, ...]
    adapted: bool = False

    @property
    def rows(self) -> int:
        return self.shape[-2]

    @property
    def columns(self) -> int:
        return self.shape[-1]

    def transpose(self) -> Projection:
        """The projection as stored (inputs, outputs) instead of (outputs, inputs)."""
        return replace(self, view=Transposed(), shape=(*self.shape[:-2], self.columns, self.rows))


@dataclass
class StoredModule:
    """A module as a file describes it.

    Attributes:
        path: the prefix of the names of its tensors.
        model_config: the content of config.json.
        parts: its layers and parameters.
    """

    path: str
    model_config: _Config
    parts: dict[str, Projection | StoredModule] = field(default_factory=dict)

    @property
    def config(self) -> SimpleNamespace:
        """The section of config.json for the module."""
        return SimpleNamespace(**_section_of(self.model_config, self.path))


Module = nn.Module | StoredModule


def find_stored_modules(
    shapes: Mapping[str, tuple[int, ...]], config: _Config
) -> dict[str, StoredModule]:
    """The modules in a file with tensors of these shapes, by path."""
    modules: dict[str, StoredModule] = {}
    for name, shape in shapes.items():
        file = name[: name.rfind("/") + 1]  # if there are several: step1.pt/
        path, _, own = name.removeprefix(file).rpartition(".")
        layer = path.removesuffix(f".{_WRAPPED}")
        tensor = Projection((None, name), STORED, shape, adapted=layer != path)
        is_layer = own == "weight"
        above, _, child = layer.rpartition(".")
        owner = file + (above if is_layer else path)
        parts = modules.setdefault(owner, StoredModule(owner, config)).parts
        if is_layer:
            parts[child] = tensor
        else:
            parts.setdefault(own, tensor)
    _transpose_conv1d(modules)
    return modules


def _transpose_conv1d(modules: Mapping[str, StoredModule]) -> None:
    """Transposes the Conv1D layers of GPT-2: those of attention and of the MLP in its block."""
    attention = {path: _has_conv1d(one) for path, one in modules.items() if has_part(one, "c_attn")}
    blocks = {path.rpartition(".")[0] for path, found in attention.items() if found}
    for path, one in modules.items():
        if attention.get(path, path.rpartition(".")[0] in blocks):
            for name in ("c_attn", "q_attn", "c_fc", "c_proj"):
                layer = one.parts.get(name)
                if isinstance(layer, Projection) and len(layer.shape) == 2:
                    one.parts[name] = layer.transpose()


def _has_conv1d(module: StoredModule) -> bool:
    """Whether it is attention of GPT-2, whose layers are stored as (inputs, outputs)."""
    fused, output = (module.parts.get(name) for name in ("c_attn", "c_proj"))
    if not (isinstance(fused, Projection) and isinstance(output, Projection)):
        return False
    if not len(fused.shape) == len(output.shape) == 2:
        return False
    width = output.rows
    return fused.rows == output.columns and fused.columns in (2 * width, 3 * width)


def _section_of(config: _Config, path: str) -> _Config:
    """The section of a config that describes the modules at this path."""
    names = path.lower().split(".")
    words = {*names, *(name.split("_")[0] for name in names)}
    words |= {_SECTIONS[word] for word in words & _SECTIONS.keys()}
    sections = {
        key.removesuffix("_config"): part for key, part in _sections_with_heads(config).items()
    }
    matching = [section for key, section in sections.items() if key in words]
    if not matching and "text" in sections and _LANGUAGE_MODEL.match(path):
        matching = [sections["text"]]
    if len(matching) == 1:
        return _section_of(matching[0], path)
    for name in HEADS_OF_SIDES:
        if name.split("_")[0] in names and name in config:
            return {**config, HEADS[0]: config[name]}
    return config


def _sections_with_heads(config: _Config, depth: int = 3) -> dict[str, _Config]:
    """The sub-configs of a config that contain a number of heads, directly or in a sub-config."""
    return {
        key: part
        for key, part in config.items()
        if key.endswith("_config")
        and isinstance(part, Mapping)
        and (
            any(name in part for name in (*HEADS, *HEADS_OF_SIDES))
            or (depth > 0 and _sections_with_heads(part, depth - 1))
        )
    }


def is_conv1d(layer: object) -> bool:
    """Whether it is a Conv1D of the transformers library, stored as (inputs, outputs)."""
    return hasattr(layer, "nf") and any(kind.__name__ == "Conv1D" for kind in type(layer).__mro__)


def get_part(module: Module, name: str) -> object | None:
    """The layer or the parameter of this name, or None."""
    if isinstance(module, StoredModule):
        return module.parts.get(name)
    if isinstance(module, torch.jit.ScriptModule):
        return None
    layer = module._modules.get(name)
    return module._parameters.get(name) if layer is None else layer


def has_part(module: Module, name: str) -> bool:
    """Whether there is a layer or a parameter of this name."""
    return get_part(module, name) is not None


def get_projection(module: Module, name: str, ndim: int | None = None) -> Projection:
    """The projection of this name: a Linear, a Conv1D of transformers, or a parameter.

    Raises:
        UnknownLayoutError: the part is something else, or does not have `ndim` dimensions.
    """
    layer = get_part(module, name)
    wrapped = get_part(layer, _WRAPPED) if isinstance(layer, nn.Module) else None
    layer, adapted = (layer, False) if wrapped is None else (wrapped, True)
    if isinstance(layer, Projection):
        found = layer
    elif isinstance(layer, Tensor):
        found = Projection((module, name), STORED, tuple(layer.shape))
    elif isinstance(layer, nn.Linear):
        if not layer.in_features:
            raise UnknownLayoutError(f"`{name}` is not initialised yet: run the model once first")
        shape = layer.out_features, layer.in_features
        found = Projection((layer, "weight"), STORED, shape, adapted)
    elif isinstance(layer, nn.Module) and is_conv1d(layer):
        assert isinstance(layer.weight, Tensor)
        shape = layer.weight.shape[0], layer.weight.shape[1]
        found = Projection((layer, "weight"), STORED, shape, adapted).transpose()
    else:
        kind = type(layer)
        raise UnknownLayoutError(
            f"`{name}` is a {kind.__name__} of {kind.__module__}, not a Linear"
        )
    if len(found.shape) < 2 or ndim not in (None, len(found.shape)):
        raise UnknownLayoutError(f"`{name}` is not a matrix")
    return found


def read_setting(module: Module, name: str) -> object:
    """The setting of this name in a module or its config; None if neither has it."""
    own = getattr(module, name, None)
    return getattr(getattr(module, "config", None), name, None) if own is None else own


def read_count(holder: object, names: tuple[str, ...]) -> int | None:
    """The first of these attributes that is a positive integer."""
    values = (getattr(holder, name, None) for name in names)
    return next((v for v in values if type(v) is int and v > 0), None)
