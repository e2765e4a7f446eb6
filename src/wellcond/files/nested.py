"""Finds all tensors in nested dicts and lists, and the dicts that contain no weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from wellcond.files.inert import SCRIPT, Foreign, ForeignTensor, StoredTensor, array_of
from wellcond.files.subclasses import name_part, take_apart
from wellcond.files.tensors import UnreadableError
from wellcond.recipes.base import TensorClass
from wellcond.text import list_some
from wellcond.weights.reasons import Reason, Skipped

# The keys that identify a dict without weights, and what it is.
STATES = (
    ({"state", "param_groups"}, Reason.optimizer),
    ({"zero_stage", "partition_count"}, Reason.optimizer),  # of DeepSpeed
    ({"basis", "from_right", "warm"}, Reason.regularizer),
)
# A Lightning checkpoint contains weights only in `state_dict`.
LIGHTNING_VERSION = "pytorch-lightning_version"
_LIGHTNING = {"state_dict", LIGHTNING_VERSION}
# Limits that no real checkpoint reaches; a small file of shared lists can exceed any limit.
_DEPTH, _CONTAINERS, _ITEMS = 100, 200_000, 10_000_000
_TENSORS, _LETTERS = 300_000, 50_000_000  # of all names together
_SETTINGS = 1_000_000  # of the weights of torchao together


# The attributes of a module that contain the content of its state dict.
_MODULE = ("_parameters", "_buffers", "_modules")
_HOLDERS = (StoredTensor, Mapping, list, tuple, Foreign)
_OBJECTS = "Python objects"
# Objects that the report does not mention.
_HARMLESS = {"builtins.frozenset", "__builtin__.frozenset"}
_HARMLESS |= {"builtins.bytearray", "builtins.complex", "builtins.range", "builtins.slice"}
_HARMLESS |= {"builtins.set", "__builtin__.set", "torch.serialization._get_layout"}
_HARMLESS |= {"_codecs.encode", "collections.Counter", "collections.defaultdict"}
_HARMLESS |= {str(one) for one in vars(torch).values() if isinstance(one, torch.qscheme)}


def tensors_in(
    content: Any, path: Path
) -> tuple[dict[str, StoredTensor | ForeignTensor], dict[str, Skipped], dict[str, TensorClass]]:
    """Returns the tensors of a file with names joined by dots, other content, and torchao weights.

    The tensors of a saved module or TorchScript program have the names of its state dict. The
    tensors of a torchao weight have the names that torchao gives to them in safetensors.
    """
    walk = _Walk(path)
    walk.visit(content, "", 0)
    if walk.objects:
        kinds = ((name, list_some(some, limit=2)) for name, some in walk.objects.items())
        named = (f"{name} ({some})" if name else some for name, some in kinds)
        walk.others[_OBJECTS] = Skipped(Reason.objects, list_some(named, limit=3))
    return walk.tensors, walk.others, walk.classes


class _Walk:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.containers = self.items = self.letters = self.settings = 0
        self.names: dict[str, int] = {}  # how many tensors would have each name
        self.tensors: dict[str, StoredTensor | ForeignTensor] = {}
        self.others: dict[str, Skipped] = {}
        self.classes: dict[str, TensorClass] = {}
        self.objects: dict[str, dict[str, None]] = {}  # their classes, by the outermost name
        self.seen: set[int] = set()
        self.inside = False  # whether the walk is in the parts of an object, each visited once

    def visit(self, content: Any, prefix: str, depth: int) -> None:
        self.letters += len(prefix)
        many = len(self.tensors) > _TENSORS or self.settings > _SETTINGS
        if many or self.letters > _LETTERS:
            raise UnreadableError(
                f"{self.path} must contain at most {_TENSORS:,} tensors, {_LETTERS:,} characters "
                f"in their names and {_SETTINGS:,} settings, but contains more. Save the weights "
                "in several files."
            )
        if isinstance(content, Foreign) and not isinstance(content, ForeignTensor):
            content = self._read_object(content, prefix, depth)
        elif self.inside and isinstance(content, Mapping | list | tuple):
            if id(content) in self.seen:
                return
            self.seen.add(id(content))
        if isinstance(content, ForeignTensor) and (apart := take_apart(content)) is not None:
            self._add_class(self._free(prefix or "tensor"), content.name, *apart)
        elif isinstance(content, StoredTensor | ForeignTensor):
            self.tensors[self._free(prefix or "tensor")] = content
        elif isinstance(content, Mapping | list | tuple):
            self.containers += 1
            self.items += len(content)
            if depth > _DEPTH or self.containers > _CONTAINERS or self.items > _ITEMS:
                raise UnreadableError(
                    f"{self.path} must contain at most {_CONTAINERS:,} dicts and lists, nested at "
                    f"most {_DEPTH} levels deep and with {_ITEMS:,} items, but contains more or is "
                    "recursive. Save only the weights: torch.save(model.state_dict(), path)."
                )
            keys = set(content) if isinstance(content, Mapping) else set()
            for known, reason in STATES:
                if known <= keys:
                    self.others[prefix or "everything"] = Skipped(reason)
                    return
            lightning = not prefix and keys >= _LIGHTNING
            items = content.items() if isinstance(content, Mapping) else enumerate(content)
            for key, value in items:
                if not isinstance(value, _HOLDERS):
                    continue
                name = f"{prefix}.{key}" if prefix else str(key)
                if lightning and key != "state_dict":
                    self._visit_trainer(value, name)
                else:
                    self.visit(value, name, depth + 1)

    def _add_class(
        self, name: str, kind: str, tensors: dict[str, StoredTensor], attributes: dict[str, Any]
    ) -> None:
        """Adds a weight that is stored as several tensors."""
        self.settings += sum(
            len(one) if isinstance(one, list) else 1 for one in attributes.values()
        )
        parts = {}
        for part, tensor in tensors.items():
            parts[part] = own = self._free(name_part(name, part))
            self.tensors[own] = tensor
            self.letters += len(own)
        self.classes[name] = TensorClass(kind, parts, attributes)

    def _read_object(self, one: Foreign, name: str, depth: int) -> Any:
        """Returns the content of a foreign object in a form that can be searched for tensors."""
        if one.name.endswith("Tensor"):  # a class such as ShardedTensor
            return ForeignTensor(one.kind)
        attributes = one.attributes
        self.items += len(one.arguments) + len(one.states)
        if all(isinstance(attributes.get(part), Mapping) for part in _MODULE):
            found = {name: t for part in _MODULE for name, t in attributes[part].items()}
            left_out = self._texts_of(attributes.get("_non_persistent_buffers_set"))
            return {name: t for name, t in found.items() if name not in left_out}
        scripted = one.kind.startswith(SCRIPT)
        if scripted and isinstance(one.state, Mapping):
            return one.state
        if id(one) in self.seen:  # an object may contain itself
            return None
        self.seen.add(id(one))
        if (array := array_of(one)) is not None:
            return array
        if not (self.inside or scripted or one.kind in _HARMLESS):
            outermost, *_ = name.split(".")
            self.objects.setdefault(outermost, {})[one.kind] = None
        # The arguments contain the content of a state dict or a named tuple.
        parts = [*one.arguments, *(part for part in one.states if not isinstance(part, Mapping))]
        parts = [part for part in parts if isinstance(part, _HOLDERS) and id(part) not in self.seen]
        taken = attributes.keys() | one.items.keys()
        if len(parts) == 1 and isinstance(parts[0], Mapping) and taken.isdisjoint(parts[0]):
            attributes = {**parts[0], **attributes}
        elif parts:
            inside, self.inside = self.inside, True
            for number, part in enumerate(parts):
                self.visit(part, f"{name}.{number}" if name else str(number), depth + 1)
            self.inside = inside
        return attributes | one.items | dict(enumerate(one.elements))

    def _visit_trainer(self, content: Any, name: str) -> None:
        """Records only whether the state of a trainer contains tensors."""
        tensors, others, classes = self.tensors, self.others, self.classes
        self.tensors, self.others, self.classes = {}, {}, {}
        self.visit(content, name, 1)
        found = {name: Skipped(Reason.trainer)} if self.tensors else self.others
        self.tensors, self.others, self.classes = tensors, others | found, classes

    def _free(self, name: str) -> str:
        """Returns the name, numbered if it exists: {"a.b": X, "a": {"b": Y}} has two "a.b"."""
        free = name
        while free in self.tensors or free in self.classes:
            number = self.names[name] = self.names.get(name, 1) + 1
            free = f"{name} ({number})"
        return free

    def _texts_of(self, one: Any) -> set[str]:
        """Returns the strings in a set, from its arguments and the elements added later."""
        if not isinstance(one, Foreign):
            return set()
        lists = [*(part for part in one.arguments if isinstance(part, list)), one.elements]
        self.items += sum(map(len, lists))
        return {text for part in lists for text in part if isinstance(text, str)}
