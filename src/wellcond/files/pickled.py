"""A torch.save file: `inert` reads its pickle, and its tensors are read by offset."""

from __future__ import annotations

import contextlib
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from wellcond.files.archive import (
    Extent,
    Region,
    copy_uncompressed,
    errors_as_damage,
    is_archive,
    load_saved,
    refresh_checksums,
)
from wellcond.files.formats import ZERO, is_pickle
from wellcond.files.inert import Foreign, StoredTensor
from wellcond.files.nested import LIGHTNING_VERSION, tensors_in
from wellcond.files.stored import StoredFile, describe_tensors, mark_shared, view_of
from wellcond.files.tensors import NoTensorsError, UnreadableError, Write
from wellcond.weights.reasons import Reason, Skipped

_KIND = "torch.save file"
_CUT_OFF = "it contains no complete pickle"
_UNLIKE = "it does not look like one, so its name may have the wrong ending"
# The keys of a checkpoint whose value is usually the state dict.
_STATE_DICTS = ("state_dict", "model_state_dict", "model")


class Pickled(StoredFile):
    """One torch.save file."""

    endings = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar", ".pt.tar")

    def __init__(self, path: Path, extent: Extent | None = None) -> None:
        super().__init__(path)
        self._extent = extent or Extent.whole(path)
        content = self._load()
        if not self._tensors and all(w.reason is Reason.objects for w in self.others.values()):
            found = _without_tensor(content, self.others)
            raise NoTensorsError(f"{path} must contain a dict of tensors, but contains {found}")
        self.entries = describe_tensors(self._tensors)
        self._check_placeholders(content)
        self._leave_out_parts()
        self.overlapping = mark_shared(self.entries, self._tensors)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return zipfile.is_zipfile(path)

    def _load(self) -> Any:
        looks_right = is_archive(self._extent) or is_pickle(self.path)
        with errors_as_damage(self.path, _KIND, _CUT_OFF if looks_right else _UNLIKE):
            saved = load_saved(self._extent)
            self._storages, self._swapped = saved.storages, saved.swapped
            self._tensors, self.others, self.classes = tensors_in(saved.content, self.path)
        return saved.content

    def _check_placeholders(self, content: Any) -> None:
        """Raises if the parameters are empty, because DeepSpeed ZeRO-3 saves them elsewhere."""
        groups = content.get("param_shapes") if isinstance(content, Mapping) else None
        if not isinstance(groups, list) or not all(isinstance(one, Mapping) for one in groups):
            return
        names = [f"module.{name}" for group in groups for name in group if isinstance(name, str)]
        shapes = [self.entries[name].shape for name in names if name in self.entries]
        if shapes and all(0 in shape for shape in shapes):
            raise UnreadableError(
                f"{self.path} must contain weights, but contains only empty tensors: DeepSpeed "
                f"ZeRO-3 stores the values in the files *_optim_states.pt. {ZERO}."
            )

    @contextlib.contextmanager
    def copy(self, target: Path) -> Iterator[Write]:
        with errors_as_damage(self.path, _KIND):
            storages = copy_uncompressed(self.path, target, self._storages)
        changed = set()

        def write(name: str, new: Tensor) -> None:
            changed.add(self._overwrite(target, name, new, storages))

        yield write
        if is_archive(whole := Extent.whole(target)):
            refresh_checksums(whole, changed)
        shutil.copymode(self.path, target)
        self._open().close()

    def _overwrite(
        self, target: Path, name: str, new: Tensor, storages: Mapping[str, Region]
    ) -> str:
        """Overwrites a tensor in a copy, without updating the checksums; returns its storage."""
        tensor = self._tensors[name]
        assert isinstance(tensor, StoredTensor)
        start = storages[tensor.key].start + tensor.start
        buffer = self._memory_for(tensor.span, name)
        with target.open("r+b") as file:
            file.seek(start)
            file.readinto(buffer)  # there may be entries of other tensors between its entries
            flat = self._flat(buffer, tensor.dtype)
            view_of(flat, tensor).copy_(new)
            self._flat(buffer, tensor.dtype)  # restores the byte order of the file
            file.seek(start)
            file.write(buffer)
        return tensor.key


def _without_tensor(content: Any, others: Mapping[str, Skipped]) -> str:
    """Describes the content of a file without tensors, and states the remedy."""
    if isinstance(content, Mapping) and (
        not content or any(content.get(key) == {} for key in _STATE_DICTS)
    ):
        return (
            "an empty state dict. The saved model has no parameters and no buffers: save a model "
            "that has some."
        )
    if isinstance(content, Mapping) and LIGHTNING_VERSION in content:
        return (
            "the state of a Lightning trainer and no tensor. The weights of a sharded checkpoint "
            "are in the same folder as meta.pt: give the path of this folder."
        )
    kind = content.kind if isinstance(content, Foreign) else type(content).__name__
    article = "an" if kind[0].lower() in "aeiou" else "a"
    besides = "".join(
        f"; its Python objects are not read: {why.detail}"
        for why in others.values()
        if kind == "dict"
    )
    found = "None" if content is None else f"{article} {kind}"
    way_out = "Save a state dict: torch.save(model.state_dict(), path)."
    return f"{found} and no tensor{besides}. {way_out}"
