"""Reads the tensors of a torch.export program, as torch.export.save writes it, without running it.

Since torch 2.9, JSON describes the record and the strides of each tensor, and whether it is a
parameter. Before, the archive contains a torch.save file with a state dict, and the signature of
the program names the parameters. The graph of the program states the groups of its convolutions.
"""

from __future__ import annotations

import contextlib
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from wellcond.files.archive import (
    Extent,
    Records,
    check_unpacked,
    errors_as_damage,
    find_start,
    load_saved,
    open_records,
)
from wellcond.files.inert import ForeignTensor, Storage, is_shape, rebuild_tensor
from wellcond.files.nested import tensors_in
from wellcond.files.stored import Described, StoredFile, describe_tensors, leave_out, mark_shared
from wellcond.files.tensors import DamagedError, NoTensorsError, UnreadableError
from wellcond.weights.fused import Views
from wellcond.weights.kernels import view_groups

_KIND = "torch.export program"
_LOAD = "torch.save(torch.export.load(path).state_dict, other)"
_CONFIG = re.compile(r"data/(weights|constants)/(.+)_\1_config\.json")
_STATE = re.compile(r"data/weights/(.+)\.pt")  # of torch 2.8
# The records of torch before 2.8, which are in no folder.
FLAT = ("serialized_state_dict.pt", "serialized_exported_program.json")
_MODEL = "models/{}.json"
_CONVOLUTION = re.compile(r"torch\.ops\.aten\.(conv(_transpose)?[123]d|convolution)\..*")
_JSON = 32 << 20  # bytes; Python needs up to about 25 times as much memory to parse it
_STRIDED = 7
_DTYPES = {
    **{1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32"},
    **{8: "float64", 9: "complex32", 10: "complex64", 11: "complex128", 12: "bool"},
    **{13: "bfloat16", 28: "uint16", 29: "float8_e4m3fn", 30: "float8_e5m2", 34: "uint32"},
    **{31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz", 33: "float8_e8m0fnu", 35: "uint64"},
}


class Exported(StoredFile):
    """One torch.export program. Names are those of its state dict and its constants."""

    endings = (".pt2",)
    kind = f"a {_KIND}"
    not_copied = f"wellcond does not write programs. Repair its weights: {_LOAD}"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._tensors, self._storages = {}, {}
        self._parameters: set[str] = set()  # empty if the parameters are unknown
        self._constants: set[str] = set()
        self._groups: dict[str, int] = {}  # of the kernels of convolutions
        with errors_as_damage(path, _KIND, "torch.export does not describe weights like this"):
            self._load(Extent.whole(path))
        if not self._tensors:
            raise NoTensorsError(
                f"{path} must contain tensors, but is a program without any. Audit the checkpoint "
                "that was exported."
            )
        self.entries = describe_tensors(self._tensors)
        self._leave_out_parts()
        for name, groups in self._groups.items():
            entry = self.entries.get(name)
            if entry is not None and len(entry.shape) > 2 and entry.shape[0] % groups == 0:
                views = Views(view_groups(groups), grouped=True)
                self.entries[name] = replace(entry, views=views)
        for name, entry in self.entries.items():
            if name in self._constants:
                self.entries[name] = leave_out(entry, "a constant")
            elif self._parameters and name not in self._parameters:
                self.entries[name] = leave_out(entry, "a buffer")
        self.overlapping = mark_shared(self.entries, self._tensors)

    def _load(self, whole: Extent) -> None:
        if (flat := _find_flat(whole)) is not None:
            state, description = flat
            self._load_state(state, json.loads(description))
            return
        what = "Audit the checkpoint that was exported."
        with open_records(whole, _KIND, "archive_format", what) as records:
            self._storages, self._swapped = records.find_regions(), records.swapped
            configs = [found for name in records if (found := _CONFIG.fullmatch(name))]
            states = [found for name in records if (found := _STATE.fullmatch(name))]
            described = any(found[1] == "weights" for found in configs)
            if not described and len(states) == 1:
                region = self._storages[states[0][0].lower()]
                _check_uncompressed(self.path, bool(region.compressed))
                state = Extent(self.path, region.start, region.size)
                self._load_state(state, _parse_model(records, states[0][1]))
                return
            if not described:
                raise UnreadableError(
                    f"{self.path} must contain weights in data/weights, but contains none there. "
                    f"The code of a compiled program contains them instead. {what}"
                )
            several = len({found[2] for found in configs}) > 1
            for found in configs:
                prefix = f"{found[2]}." if several else ""
                self._load_config(records, found[0], f"data/{found[1]}", prefix)
                if found[1] == "weights":
                    kernels = _find_kernels(_parse_model(records, found[2]))
                    self._groups |= {f"{prefix}{name}": groups for name, groups in kernels.items()}

    def _load_config(self, records: Records, name: str, folder: str, prefix: str) -> None:
        """Adds the tensors that a JSON record describes."""
        for key, payload in _parse(records, name)["config"].items():
            if payload["tensor_meta"] is None:  # an object that is not a tensor
                continue
            own = prefix + key
            if own in self._tensors:
                raise DamagedError(f"it describes {own} twice")
            self._tensors[own] = _describe(records, folder, payload)
            if folder == "data/constants":
                self._constants.add(own)
            elif payload["is_param"] is True:
                self._parameters.add(own)

    def _load_state(self, state: Extent, description: Any) -> None:
        """Adds the tensors of a state dict in the file."""
        saved = load_saved(state)
        self._storages, self._swapped = saved.storages, saved.swapped
        self._tensors, self.others, self.classes = tensors_in(saved.content, self.path)
        self._parameters = {name for _, name in _parameters_in(description)}
        self._groups = _find_kernels(description)


def _find_flat(whole: Extent) -> tuple[Extent, bytes] | None:
    """Returns state dict and description of an archive without folders, or None for another."""
    with zipfile.ZipFile(whole.path) as archive:
        infos = archive.infolist()
        names = [info.filename for info in infos]
        if not {*FLAT} <= {*names}:
            return None
        check_unpacked(whole, infos, "torch.export.save")
        if len({*names}) < len(names):
            raise DamagedError("two of its records have the same name")
        state, description = map(archive.getinfo, FLAT)
        _check_uncompressed(whole.path, bool(state.compress_type))
        with whole.path.open("rb") as file:
            start = find_start(file, whole, state)
        if description.file_size > _JSON:
            return Extent(whole.path, start, state.file_size), b"{}"
        return Extent(whole.path, start, state.file_size), archive.read(description)


def _check_uncompressed(path: Path, compressed: bool) -> None:
    """Raises for a compressed archive within an archive, which cannot be read by offset."""
    if compressed:
        raise UnreadableError(
            f"{path} must store its weights uncompressed, as torch.export.save writes them, but "
            f"stores them compressed. Save them: {_LOAD}."
        )


def _parse(records: Records, name: str) -> Any:
    if records.size(name) > _JSON:
        raise DamagedError(f"{name} has more than {_JSON:,} bytes")
    return json.loads(records.read(name))


def _parse_model(records: Records, name: str) -> Any:
    """Returns the description of a program; {} if it is missing or too long."""
    model = _MODEL.format(name)
    return _parse(records, model) if 0 < records.size(model) <= _JSON else {}


def _parameters_in(description: Any) -> Iterator[tuple[str, str]]:
    """Yields the name of each parameter in the graph and in the model."""
    specs = description["graph_module"]["signature"]["input_specs"] if description else []
    for one in specs:
        if isinstance(one.get("parameter"), Mapping):
            yield one["parameter"]["arg"]["name"], one["parameter"]["parameter_name"]


def _find_kernels(description: Any) -> dict[str, int]:
    """Returns the number of groups of each kernel; omits kernels with several numbers."""
    found: dict[str, set[Any]] = {}
    with contextlib.suppress(KeyError, TypeError, AttributeError):  # another version of the schema
        names = dict(_parameters_in(description))
        for node in description["graph_module"]["graph"]["nodes"] if names else []:
            if _CONVOLUTION.fullmatch(node["target"]):
                given = {one["name"]: one["arg"] for one in node["inputs"]}
                groups = given.get("groups", {"as_int": 1}).get("as_int")
                found.setdefault(given["weight"]["as_tensor"]["name"], set()).add(groups)
        return {
            names[kernel]: groups
            for kernel, (groups, *others) in found.items()
            if kernel in names and type(groups) is int and groups > 0 and not others
        }
    return {}


def _describe(records: Records, folder: str, payload: Mapping[str, Any]) -> Described:
    """Returns the tensor that a JSON payload describes."""
    meta, record = payload["tensor_meta"], f"{folder}/{payload['path_name']}"
    dtype = getattr(torch, _DTYPES.get(meta["dtype"], ""), None)
    shape, stride = (tuple(one["as_int"] for one in meta[key]) for key in ("sizes", "strides"))
    if not (isinstance(dtype, torch.dtype) and is_shape(shape, 1000)):
        raise DamagedError("a tensor must have a shape and a dtype")
    if record not in records:
        raise DamagedError(f"it lacks {record}")
    if payload["use_pickle"] or meta["layout"] != _STRIDED:
        return ForeignTensor("torch.Tensor", shape=shape, dtype=dtype)
    size = records.size(record)
    if not size and 0 not in shape:  # exported without values
        return ForeignTensor("meta", shape=shape, dtype=dtype)
    if size % dtype.itemsize:
        raise DamagedError("the length of a storage differs from that of its tensors")
    storage = Storage(record.lower(), dtype, 0, size)
    return rebuild_tensor(storage, meta["storage_offset"]["as_int"], shape, stride)
