"""A file of torch.save: mapped, with weights only; nothing that could run code is unpickled.

It is opened anew now and then, because pages that were read once stay resident.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wellcond.checkpoints.archive import can_be_mapped, check_storages
from wellcond.checkpoints.tensors import (
    Entry,
    NoTensorsError,
    PickledCodeError,
    TensorFile,
    UnreadableError,
)
from wellcond.weights.names import why_no_weight
from wellcond.weights.reasons import Reason, Skipped

# Mapped bytes that may be read before the file is opened anew.
_RESIDENT = 64 << 20
# Keys by which a dict is known that holds no weights, and what it is.
_STATES = {
    Reason.optimizer: {"state", "param_groups"},
    Reason.regularizer: {"basis", "from_right", "warm"},
}
# A checkpoint of Lightning: its weights are in its `state_dict` alone.
_LIGHTNING = {"state_dict", "pytorch-lightning_version"}


class Pickled(TensorFile):
    """One file of torch.save."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped = can_be_mapped(path)
        self._open()
        if not (self._tensors or self.others):
            raise NoTensorsError(
                f"{path} must hold a dict of tensors, but holds a {type(self._content).__name__} "
                "without any. Save a state dict: torch.save(model.state_dict(), path)."
            )
        self.entries = {}
        first: dict[tuple[Any, ...], str] = {}
        for name, tensor in self._tensors.items():
            shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
            parameter = tensor.is_floating_point() or tensor.is_complex()
            skipped = why_no_weight(shape, dtype)
            if tensor.layout != torch.strided:
                layout = str(tensor.layout).removeprefix("torch.")
                skipped = Skipped(Reason.not_dense, layout)
            elif skipped is None:
                where = (tensor.data_ptr(), shape, tensor.stride(), dtype)
                if first.setdefault(where, name) != name:
                    skipped, parameter = Skipped(Reason.same, first[where]), False
            self.entries[name] = Entry(name, shape, dtype, parameter, skipped)

    def _open(self) -> None:
        self._content: Any = None
        self._tensors: dict[str, Tensor] = {}
        self._read = 0
        self._content = _load(self.path, self._mapped)
        self.others = {}
        self._tensors = dict(_tensors(self._content, "", self.others))

    def read(self, name: str) -> Tensor:
        if self._mapped and self._read > _RESIDENT:
            self._open()
        tensor = self._tensors[name].detach()
        self._read += tensor.numel() * tensor.element_size()
        return tensor

    def copy_with(self, replaced: Iterable[tuple[str, Tensor]], target: Path) -> None:
        # Mapped privately: what is written here stays in memory.
        content = _load(self.path, self._mapped)
        tensors = dict(_tensors(content, "", {}))
        with torch.no_grad():
            for name, tensor in replaced:
                tensors[name].copy_(tensor)
        torch.save(content, target)


def _load(path: Path, mapped: bool) -> Any:
    try:
        with warnings.catch_warnings():
            # Of a TorchScript archive, which is refused below, and of the storages' own classes.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            if zipfile.is_zipfile(path):  # not one from before torch 1.6
                check_storages(path)
            return content
    except (FileNotFoundError, PermissionError, IsADirectoryError, UnreadableError):
        raise
    except Exception as error:  # a damaged pickle can raise whatever there is
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and code is not None:
            raise PickledCodeError(
                f"{path} must hold tensors alone, but holds a {code[1]}, and loading it could run "
                "any code. Save the weights alone: torch.save(model.state_dict(), path)."
            ) from None
        if "TorchScript" in str(error):
            raise PickledCodeError(
                f"{path} must hold tensors alone, but is a TorchScript archive, a program. "
                "Save its weights: torch.save(torch.jit.load(path).state_dict(), other)."
            ) from None
        if isinstance(error, RuntimeError | EOFError | OSError | ValueError | KeyError):
            (what, *_) = str(error).split(".")[0].splitlines() or [type(error).__name__]
            raise UnreadableError(
                f"{path} must be a whole file of torch.save, but: {what}. "
                "It may be truncated or damaged: compare its size with the original's."
            ) from None
        raise UnreadableError(
            f"{path} must be a file of torch.save, but cannot be unpickled. "
            "It may be damaged, or something else altogether."
        ) from None


def _tensors(content: Any, prefix: str, others: dict[str, Skipped]) -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested dicts and lists, names joined by dots."""
    if isinstance(content, Tensor):
        yield prefix or "tensor", content
    elif isinstance(content, Mapping | list | tuple):
        keys = set(content) if isinstance(content, Mapping) else set()
        for reason, known in _STATES.items():
            if known <= keys:
                others[prefix or "everything"] = Skipped(reason)
                return
        items = content.items() if isinstance(content, Mapping) else enumerate(content)
        for key, value in items:
            name = f"{prefix}.{key}" if prefix else str(key)
            if prefix or key == "state_dict" or not keys >= _LIGHTNING:
                yield from _tensors(value, name, others)
            else:
                inside: dict[str, Skipped] = {}
                held = list(_tensors(value, name, inside))
                others |= {name: Skipped(Reason.trainer)} if held else inside
