"""Weights of torchao classes, which files store as plain tensors and settings.

`flatten_tensor_state_dict` of torchao stores a weight `0.weight` as `0._weight_qdata`,
`0._weight_scale` and others, and describes it in the metadata of safetensors. In a pickle, the same
tensors are attributes of an object. wellcond gives them the same names. The names of the attributes
of an inner object also contain the name of this object, as in `0._weight_tensor_impl_scale`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch

from wellcond.files.inert import Foreign, ForeignTensor, StoredTensor
from wellcond.recipes.base import TensorClass

# Limits above the needs of any class; a weight that exceeds them is not taken apart.
_ATTRIBUTES, _OBJECTS, _LIST, _LETTERS, _END = 64, 4, 16, 200, 1 << 63


def name_part(name: str, part: str) -> str:
    """Returns the name that torchao gives to a part of the weight with this name."""
    module, dot, own = name.rpartition(".")
    return f"{module}{dot}_{own}_{part.replace('.', '_')}"


def read_classes(metadata: Mapping[str, str]) -> dict[str, TensorClass]:
    """Returns the weights in the metadata of safetensors; some parts may be in other files."""
    names = _parse(metadata.get("tensor_names", ""))
    found = {}
    for name in names if isinstance(names, list) else ():
        described = _parse(metadata.get(name, "")) if isinstance(name, str) else None
        if not isinstance(described, dict):
            continue
        kind, settings = described.get("_type"), described.get("_data")
        parts = described.get("_tensor_data_names")
        named = isinstance(kind, str) and kind[:_LETTERS].isidentifier()
        if not (named and isinstance(settings, dict) and isinstance(parts, list)):
            continue  # such as {"_type": "Tensor"}
        if all(isinstance(part, str) for part in parts):
            attributes = {key: _of_json(value) for key, value in settings.items()}
            own = {part: name_part(name, part) for part in parts}
            found[name] = TensorClass(str(kind)[:_LETTERS], own, attributes)
    return found


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _of_json(value: Any) -> Any:
    """Acts as `_plain` for JSON of torchao, such as {"_type": "torch.dtype", "_data": "int8"}."""
    if isinstance(value, dict):
        kind, data = value.get("_type"), value.get("_data")
        value = data if kind == "torch.dtype" else kind if isinstance(data, dict) else (kind, data)
    return _plain(value)


def take_apart(
    tensor: ForeignTensor,
) -> tuple[dict[str, StoredTensor], dict[str, Any]] | None:
    """Returns the stored tensors and the settings of a torchao weight; None for another tensor.

    The names of the content of an inner object begin with its name, as in "tensor_impl.scale".
    """
    of_torchao = tensor.kind.startswith("torchao.") and tensor.name.isidentifier()
    if not of_torchao or tensor.values is not None:
        return None
    parts: dict[str, StoredTensor] = {}
    others: dict[str, Any] = {"shape": tensor.shape, "dtype": tensor.dtype}
    objects = [("", tensor)]
    for prefix, one in objects:  # the loop appends the inner objects
        for key, value in _attributes(one):
            if len(parts) + len(others) > _ATTRIBUTES or len(objects) > _OBJECTS:
                return None
            name = f"{prefix}{key}"
            (parts if isinstance(value, StoredTensor) else others)[name] = value
            if isinstance(value, ForeignTensor):
                objects.append((f"{name}.", value))
    return (parts, {name: _plain(one) for name, one in others.items()}) if parts else None


def _attributes(one: Foreign) -> Iterator[tuple[str, Any]]:
    """Yields the attributes of an object, without copying large ones."""
    for state in islice(one.states, 2):
        if isinstance(state, Mapping):
            for key, value in islice(state.items(), _ATTRIBUTES + 1):
                if isinstance(key, str) and len(key) <= _LETTERS:
                    yield key, value


def _plain(value: Any) -> Any:
    """Returns a setting for `TensorClass`: a dtype as its name, an object as its class name.

    A member of an enumeration, such as ZeroPointDomain(1), becomes a list of both.
    """
    if isinstance(value, Foreign) and value.arguments:
        value = (value.name, value.arguments[0])
    if isinstance(value, list | tuple):
        return [_single(one) for one in value] if len(value) <= _LIST else None
    return _single(value)


def _single(value: Any) -> Any:
    if isinstance(value, Foreign):
        value = value.name
    if isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    if isinstance(value, str):
        return value[:_LETTERS]
    number = isinstance(value, float) or (isinstance(value, int) and abs(value) < _END)
    return value if number else None
