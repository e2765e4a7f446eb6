"""The projections of a module: where each is stored, how it is seen, and how large it is.

A file has no modules, but its names are those of modules, and so are its shapes: `Stored` is what
they say of one, and the numbers in the config.json beside the file stand in for its attributes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from wellcond.operators.views import STORED, Transposed, View

# Where a tensor is: of this module, by this name; of a file, of none but by the tensor's own name.
Place = tuple[object, str]

_Config = Mapping[str, object]

# What PEFT puts around a layer, by the name under which it holds it.
_WRAPPING = "base_layer"

# Numbers by which a config tells of heads, and what names of modules go with its parts.
HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads")
_HEADS_OF_SIDES = ("encoder_attention_heads", "decoder_attention_heads")
_LANGUAGE_MODEL = re.compile(r"(model\.)?layers\.\d+\.")  # of one that has no other part
_CALLED = {"language": "text", "visual": "vision", "image": "vision", "speech": "audio"}


class Unknown(Exception):
    """Why something is not known, in words for the user."""


@dataclass(frozen=True)
class Projection:
    """A matrix of so many rows and columns, or a stack of such, as it is seen through `view`."""

    place: Place
    view: View
    shape: tuple[int, ...]
    adapted: bool = False  # by PEFT: it is not all that acts

    @property
    def rows(self) -> int:
        return self.shape[-2]

    @property
    def columns(self) -> int:
        return self.shape[-1]


@dataclass
class StoredTensor:
    """A tensor of a file; as a Linear, whose weight it is, or as a parameter.

    Attributes:
        name: in the file.
        shape: as it is seen.
        adapted: by PEFT, so that it is not all that acts.
        view: how it is seen.
    """

    name: str
    shape: tuple[int, ...]
    adapted: bool
    view: View = STORED

    def transpose(self) -> None:
        """Takes it as stored (inputs, outputs)."""
        self.shape, self.view = (*self.shape[:-2], *self.shape[:-3:-1]), Transposed()


@dataclass
class Stored:
    """What a file says of a module.

    Attributes:
        path: by which its tensors begin.
        said: what config.json says of the model.
        parts: its layers and parameters.
    """

    path: str
    said: _Config
    parts: dict[str, StoredTensor | Stored] = field(default_factory=dict)

    @property
    def config(self) -> SimpleNamespace:
        """What config.json says of it."""
        return SimpleNamespace(**_part_of(self.said, self.path))


Module = nn.Module | Stored


def stored_modules(shapes: Mapping[str, tuple[int, ...]], config: _Config) -> dict[str, Stored]:
    """The modules of a file of tensors of these shapes, by their paths."""
    modules: dict[str, Stored] = {}

    def module(path: str) -> Stored:
        if path not in modules:
            modules[path] = Stored(path, config)
        return modules[path]

    for name, shape in shapes.items():
        file = name[: name.rfind("/") + 1]  # of several: step1.pt/
        path, _, own = name.removeprefix(file).rpartition(".")
        layer = path.removesuffix(f".{_WRAPPING}")
        above, _, child = layer.rpartition(".")
        tensor = StoredTensor(name, shape, layer != path)
        if own == "weight":
            module(file + above).parts[child] = tensor
        else:
            module(file + path).parts.setdefault(own, tensor)
    _transpose_conv1d(modules)
    return modules


def _transpose_conv1d(modules: Mapping[str, Stored]) -> None:
    """Finds what is a Conv1D of GPT-2, stored as (inputs, outputs): in attention, and beside it."""
    attention = {path: _of_conv1d(one) for path, one in modules.items() if has(one, "c_attn")}
    blocks = {path.rpartition(".")[0] for path, it_is in attention.items() if it_is}
    for path, one in modules.items():
        if attention.get(path, path.rpartition(".")[0] in blocks):
            for name in ("c_attn", "q_attn", "c_fc", "c_proj"):
                layer = one.parts.get(name)
                if isinstance(layer, StoredTensor) and len(layer.shape) == 2:
                    layer.transpose()


def _of_conv1d(module: Stored) -> bool:
    """Whether it is attention of GPT-2, whose layers are stored as (inputs, outputs)."""
    fused, output = (module.parts.get(name) for name in ("c_attn", "c_proj"))
    if not (isinstance(fused, StoredTensor) and isinstance(output, StoredTensor)):
        return False
    if not len(fused.shape) == len(output.shape) == 2:
        return False
    width = output.shape[0]
    return fused.shape[0] == output.shape[1] and fused.shape[1] in (2 * width, 3 * width)


def _part_of(config: _Config, path: str) -> _Config:
    """What a config says of the modules there: the part of it that is called as they are."""
    names = path.lower().split(".")
    words = {*names, *(name.split("_")[0] for name in names)}
    words |= {_CALLED[word] for word in words & _CALLED.keys()}
    parts = {key.removesuffix("_config"): part for key, part in _parts_with_heads(config).items()}
    called = [part for key, part in parts.items() if key in words]
    if not called and "text" in parts and _LANGUAGE_MODEL.match(path):
        called = [parts["text"]]
    if len(called) == 1:
        return _part_of(called[0], path)
    for name in _HEADS_OF_SIDES:  # of Bart and Whisper
        if name.split("_")[0] in names and name in config:
            return {**config, HEADS[0]: config[name]}
    return config


def _parts_with_heads(config: _Config, depth: int = 3) -> dict[str, _Config]:
    """The configs in a config that say how many heads there are, or hold one that does."""
    parts = {key: part for key, part in config.items() if key.endswith("_config")}
    return {
        key: part
        for key, part in parts.items()
        if isinstance(part, Mapping)
        and (
            any(name in part for name in (*HEADS, *_HEADS_OF_SIDES))
            or (depth > 0 and _parts_with_heads(part, depth - 1))
        )
    }


def is_conv1d(layer: object) -> bool:
    """Whether it is a Conv1D of the transformers library, stored as (inputs, outputs)."""
    return hasattr(layer, "nf") and any(kind.__name__ == "Conv1D" for kind in type(layer).__mro__)


def part(module: Module, name: str) -> object | None:
    """The layer or the parameter of this name; None if there is none."""
    if isinstance(module, Stored):
        return module.parts.get(name)
    if isinstance(module, torch.jit.ScriptModule):
        return None
    layer = module._modules.get(name)
    return module._parameters.get(name) if layer is None else layer


def projection(module: Module, name: str) -> Projection:
    """The one of this name.

    A Linear, a Conv1D of the transformers library, or a parameter of the module itself.

    Raises:
        Unknown: it is something else.
    """
    layer = part(module, name)
    wrapped = part(layer, _WRAPPING) if isinstance(layer, nn.Module) else None
    layer, adapted = (layer, False) if wrapped is None else (wrapped, True)
    found = None
    if isinstance(layer, StoredTensor):
        found = Projection((None, layer.name), layer.view, layer.shape, layer.adapted)
    elif isinstance(layer, Tensor):
        found = Projection((module, name), STORED, tuple(layer.shape))
    elif isinstance(layer, nn.Linear):
        if not layer.in_features:
            raise Unknown(f"`{name}` is not initialised yet: run the model once first")
        shape = layer.out_features, layer.in_features
        found = Projection((layer, "weight"), STORED, shape, adapted)
    elif isinstance(layer, nn.Module) and is_conv1d(layer):
        assert isinstance(layer.weight, Tensor)
        found = Projection((layer, "weight"), Transposed(), tuple(layer.weight.mT.shape), adapted)
    if found is None:
        kind = type(layer)
        raise Unknown(f"`{name}` is no Linear, but a {kind.__name__} of {kind.__module__}")
    if len(found.shape) < 2:
        raise Unknown(f"`{name}` is no matrix")
    return found


def said(module: Module, name: str) -> object:
    """What a module or its config says under this name; None if nothing."""
    own = getattr(module, name, None)
    return getattr(getattr(module, "config", None), name, None) if own is None else own


def number(holder: object, names: tuple[str, ...]) -> int | None:
    """The first of these that is a positive whole number."""
    values = (getattr(holder, name, None) for name in names)
    return next((v for v in values if type(v) is int and v > 0), None)


def has(module: Module, name: str) -> bool:
    """Whether there is a layer or a parameter of this name."""
    return part(module, name) is not None
