"""Weights of Keras: `.keras`, `.weights.h5`, and the HDF5 files of Keras 2.

Keras 3 stores one group per layer. The name of the group is the class of the layer with a number,
or the attribute that refers to the layer. The group `vars` in it contains the variables by number,
and the name of the layer as an attribute. A `.keras` file is a zip archive of such an HDF5 file and
of config.json, which describes the layers of all models except subclassed ones. Keras 2 lists the
names of its variables by layer, and may also store such a config.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wellcond.files.archive import Extent, find_start, is_archive
from wellcond.files.hdf5 import Array, Group, open_hdf5, read_array, read_tree
from wellcond.files.pieces import pieces_of
from wellcond.files.tensors import (
    DamagedError,
    Entry,
    Rows,
    TensorFile,
    UnreadableError,
    damaged,
    explain_non_weight,
)
from wellcond.weights.fused import Views
from wellcond.weights.keras_layers import (
    Layer,
    find_views,
    is_trained,
    kind_of,
    name_of,
    read_layer,
    snake_case,
)
from wellcond.weights.quantised import FLOATING
from wellcond.weights.reasons import Reason, Skipped

_WEIGHTS, _CONFIG = "model.weights.h5", "config.json"
_JSON = 64 << 20  # bytes of a config
_PIECE = 16 << 20  # bytes
_CONTAINERS = ("layers", "_layer_checkpoint_dependencies")  # the second of Keras 2.12
_OPTIMIZERS = ("optimizer", "optimizer_weights")
_OTHER = (
    "{} must be a file of weights that Keras saved, but is another HDF5 file. Convert its weights: "
    "safetensors.torch.save_file({{name: torch.from_numpy(h5py.File(path)[name][()]) for name in "
    "names}}, other)."
)


class Keras(TensorFile):
    """One Keras file, read through h5py; the HDF5 file in a `.keras` is read in place."""

    of_layers = True
    endings = (".keras", ".h5", ".hdf5")
    kind = "a Keras file"
    not_copied = (
        "wellcond only reads Keras files. Repair its kernels and assign them to the model: kernels "
        "= {layer.name + '/kernel': layer.kernel for layer in model.layers if type(layer).__name__ "
        "in ('Dense', 'Conv2D')}; safetensors.torch.save_file({name: "
        "torch.tensor(numpy.array(kernel)).reshape(-1, kernel.shape[-1]) for name, kernel in "
        "kernels.items()}, other); repair that file; then kernels[name].assign(W.reshape("
        "kernels[name].shape)) for each name and W that load_file returns"
    )

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._extent, config = _find_weights(path)
        root = read_tree(self._extent, ("name", "layer_names", "layer_names0", "model_config"))
        self._arrays: dict[str, Array] = {}
        described = isinstance(config.get("config"), Mapping)
        weights = root.groups.get("model_weights", root)
        self._named = not {"layer_names", "layer_names0"}.isdisjoint(weights.texts)
        if self._named:
            self._add_named(weights, _parse(root.texts.get("model_config")) or config)
            self._add_optimizer(root)
        elif any(array.path.rpartition("/")[0].endswith("vars") for array in root.below()):
            layer = read_layer(config) if described else Layer()
            self._add_layer(root, layer, "")
        else:
            raise UnreadableError(_OTHER.format(path))

    def _add_layer(self, group: Group, layer: Layer, name: str) -> None:
        """Adds the variables of a layer, and of all layers in it."""
        arrays = group.groups.get("vars", Group()).arrays
        codes = any("int" in array.dtype and len(array.shape) > 1 for array in arrays.values())
        for number, array in sorted(arrays.items(), key=lambda one: (len(one[0]), one[0])):
            own = name_of(layer, number, len(arrays))
            self._add(f"{name}/{own}".lstrip("/"), array, layer, codes)
        for attribute, inner in group.groups.items():
            if attribute == "vars":
                continue
            if attribute in _OPTIMIZERS and not name:
                self._add_optimizer(Group(groups={attribute: inner}))
            elif "vars" in inner.groups:
                known = layer.part(attribute) or _guess(inner, attribute, layer)
                self._add_layer(inner, known, _path_of(inner, attribute, name, bool(layer.kind)))
            else:
                self._add_container(inner, attribute, layer, name)

    def _add_container(self, group: Group, attribute: str, layer: Layer, name: str) -> None:
        """Adds the layers in a list, tuple or dict; uses a config only if the names agree."""
        configs = _members(layer, "layers" if attribute in _CONTAINERS else attribute)
        named = attribute in (*_CONTAINERS, "cells")
        above = name if named else f"{name}/{attribute}".lstrip("/")
        for member, inner in group.groups.items():
            if "vars" not in inner.groups:
                self._add_container(inner, member, Layer(described=layer.described), above)
                continue
            known = configs.get(member)
            if known is None or _name_of_layer(inner) not in ("", known.config.get("name")):
                known = Layer(kind_of(member), described=layer.described)
            self._add_layer(inner, known, _path_of(inner, member, above, named))

    def _add_named(self, group: Group, config: Mapping[str, Any]) -> None:
        """Adds the variables of a Keras 2 file, which has one group per layer."""
        layers = _layers_by_name(config)
        for layer, inner in group.groups.items():
            if group.path == "" and layer in _OPTIMIZERS:
                continue
            for array in inner.below():
                called = array.path.removeprefix(f"{inner.path}/").partition(":")[0]
                known = Layer()
                for module in (layer, *called.split("/")[:-1]):
                    known = layers.get(module) or known.inside(module)
                self._add(called, array, known.innermost)

    def _add_optimizer(self, group: Group) -> None:
        for name in _OPTIMIZERS:
            if name in group.groups:
                self.others[name] = Skipped(Reason.optimizer)

    def _add(self, name: str, array: Array, layer: Layer, codes: bool = False) -> None:
        if name in self.entries:
            name = array.path if array.path not in self.entries else f"{name}_{len(self.entries)}"
        shape, views = array.shape, None
        skipped = explain_non_weight(shape, array.dtype)
        if array.without:
            skipped = Skipped(Reason.no_values, array.without)
        elif skipped is None and codes:
            skipped = Skipped(Reason.scales)
        elif skipped is None and (layer.kind or not self._named):
            found = find_views(layer, name, shape)
            skipped, views = (None, found) if isinstance(found, Views) else (found, None)
        elif codes and skipped is not None and skipped.reason in (Reason.quantised, Reason.packed):
            skipped = Skipped(Reason.codes, array.dtype)
        parameter = is_trained(layer, name) and (array.dtype in FLOATING or codes)
        if skipped is not None and skipped.reason in (Reason.same, Reason.component):
            parameter = False
        self._arrays[name] = array
        self.entries[name] = Entry(name, shape, array.dtype, parameter, skipped, views=views)

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        with self._file() as file:
            return self._read(file, name, rows)

    def first_row(self, name: str) -> Tensor:
        shape = self.entries[name].shape
        row = self.read(name, (0, 1)) if len(shape) > 1 else self.read(name)
        return row.reshape(-1)[: shape[-1]]

    def pieces(self, name: str) -> Iterator[Tensor]:
        entry = self.entries[name]
        if entry.dtype not in FLOATING or self._arrays[name].without or 0 in entry.shape:
            return
        if not entry.shape:
            yield from pieces_of(self.read(name))
            return
        each = math.prod(entry.shape[1:]) * getattr(torch, entry.dtype).itemsize
        step, length = max(1, _PIECE // each), entry.shape[0]
        with self._file() as file:
            for start in range(0, length, step):
                yield from pieces_of(self._read(file, name, (start, min(length, start + step))))

    def _file(self) -> Any:
        self._open().close()
        return open_hdf5(self._extent)

    def _read(self, file: Any, name: str, rows: Rows | None) -> Tensor:
        array = self._arrays[name]
        dtype: torch.dtype = getattr(torch, array.dtype)
        shape = array.shape if rows is None else (rows[1] - rows[0], *array.shape[1:])
        if not (count := math.prod(shape)):
            return torch.empty(shape, dtype=dtype, device="cpu")
        return read_array(file, array, self._memory_for(count * dtype.itemsize, name), rows)


def _members(layer: Layer, key: str) -> dict[str, Layer]:
    """Returns the layers in a container by the names of their groups, numbered per class."""
    counts: dict[str, int] = {}
    found: dict[str, Layer] = {}
    for saved in layer.members(key):
        kind = snake_case(str(saved.get("class_name")))
        number = counts[kind] = counts.get(kind, -1) + 1
        found[f"{kind}_{number}" if number else kind] = read_layer(saved)
    return found


def _guess(group: Group, attribute: str, above: Layer) -> Layer:
    """Guesses the layer of an attribute from the name that Keras gives to layers of a class."""
    kind = kind_of(_name_of_layer(group) or attribute)
    return Layer(kind, guess=bool(kind), described=above.described)


def _name_of_layer(group: Group) -> str:
    return group.groups["vars"].texts.get("name", "") if "vars" in group.groups else ""


def _path_of(group: Group, attribute: str, above: str, by_name: bool) -> str:
    """Returns the path of a layer: its name, or the attribute if the name is a numbered class.

    Such numbers count all layers of a process, including those of other models.
    """
    name = _name_of_layer(group)
    called = name if name and (by_name or not kind_of(name)) else attribute
    return f"{above}/{called}".lstrip("/")


def _layers_by_name(config: Mapping[str, Any]) -> dict[str, Layer]:
    """Returns the layers of a model and of the models in it, without names that occur twice."""
    found: dict[str, Layer] = {}
    twice: set[str] = set()
    waiting = [config]
    while waiting:
        one = waiting.pop()
        inner = one.get("config")
        if not isinstance(inner, Mapping):
            continue
        name = inner.get("name")
        if isinstance(name, str):
            twice |= {name} & found.keys()
            found[name] = read_layer(one)
        listed = inner.get("layers")
        parts = [inner.get("layer"), inner.get("backward_layer"), inner.get("cell")]
        parts += listed if isinstance(listed, list) else []
        waiting += [part for part in parts if isinstance(part, Mapping)]
    return {name: layer for name, layer in found.items() if name not in twice}


def _parse(text: Any) -> dict[str, Any]:
    try:
        config = json.loads(text) if isinstance(text, str | bytes) else {}
    except (ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _find_weights(path: Path) -> tuple[Extent, dict[str, Any]]:
    """Finds the HDF5 file, and the config of the model in or next to the file, if there is one."""
    if not is_archive(whole := Extent.whole(path)):
        other = path.parent / _CONFIG
        beside = path.name == _WEIGHTS and other.is_file() and other.stat().st_size <= _JSON
        return whole, _parse(other.read_bytes()) if beside else {}
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            named = {record.filename: record for record in records}
            if len(named) < len(records):
                raise DamagedError("two of its records have the same name")
            if _WEIGHTS not in named:
                raise DamagedError(f"it has no {_WEIGHTS}")
            config = named.get(_CONFIG)
            small = config is not None and config.file_size <= min(_JSON, 20 * path.stat().st_size)
            described = _parse(archive.read(config)) if config is not None and small else {}
        record = named[_WEIGHTS]
        if record.compress_type or record.flag_bits & 1:
            raise UnreadableError(
                f"{path} must store {_WEIGHTS} uncompressed, as Keras does, but stores it "
                f"compressed. Unpack it with `python -m zipfile -e {path.name} folder`, and give "
                f"the path folder/{_WEIGHTS}."
            )
        with path.open("rb") as file:
            start = find_start(file, whole, record)
    except (OSError, UnreadableError):
        raise
    except DamagedError as error:
        raise damaged(path, "Keras file", error) from None
    except Exception:  # a damaged archive directory can raise anything
        raise damaged(path, "Keras file", "its zip archive is damaged") from None
    return Extent(path, start, record.file_size), described
