"""A file of torch.save: mapped, with weights only; nothing that could run code is unpickled.

It is opened anew now and then, because pages that were read once stay resident.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wellcond.checkpoints.archive import can_be_mapped, check_storages
from wellcond.checkpoints.nested import tensors_in
from wellcond.checkpoints.overlaps import repeats, shared_memory
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
        self.entries = {name: _entry(name, tensor) for name, tensor in self._tensors.items()}
        matrices = {n: t for n, t in self._tensors.items() if self.entries[n].skipped is None}
        shared, self.overlapping = shared_memory(matrices)
        for name, skipped in shared.items():
            self.entries[name] = replace(self.entries[name], parameter=False, skipped=skipped)

    def _open(self) -> None:
        self._content: Any = None
        self._tensors: dict[str, Tensor] = {}
        self._read = 0
        self._content = _load(self.path, self._mapped)
        self._tensors, self.others = tensors_in(self._content, self.path)

    def read(self, name: str) -> Tensor:
        if self._mapped and self._read > _RESIDENT:
            self._open()
        tensor = self._tensors[name].detach()
        self._read += tensor.numel() * tensor.element_size()
        return tensor

    def copy_with(self, replaced: Iterable[tuple[str, Tensor]], target: Path) -> None:
        # Mapped privately: what is written here stays in memory.
        content = _load(self.path, self._mapped)
        tensors, _ = tensors_in(content, self.path)
        with torch.no_grad():
            for name, tensor in replaced:
                tensors[name].copy_(tensor)
        torch.save(content, target)


def _entry(name: str, tensor: Tensor) -> Entry:
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    parameter = tensor.is_floating_point() or tensor.is_complex()
    skipped = why_no_weight(shape, dtype)
    if tensor.is_meta:
        skipped, parameter = Skipped(Reason.no_values), False
    elif tensor.layout != torch.strided:
        skipped = Skipped(Reason.not_dense, str(tensor.layout).removeprefix("torch."))
    elif repeats(tensor):
        skipped, parameter = Skipped(Reason.not_dense, "its entries share memory"), False
    return Entry(name, shape, dtype, parameter, skipped)


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
