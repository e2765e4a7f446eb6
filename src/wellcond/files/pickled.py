"""A file of torch.save: its pickle is read by `inert`, its tensors by their place in the file."""

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
from wellcond.files.formats import ZERO
from wellcond.files.inert import Foreign, StoredTensor
from wellcond.files.nested import LIGHTNING_VERSION, tensors_in
from wellcond.files.stored import StoredFile, describe_tensors, mark_shared, view_of
from wellcond.files.tensors import NoTensorsError, UnreadableError, Write
from wellcond.weights.reasons import Reason, Skipped

_KIND = "file of torch.save"


class Pickled(StoredFile):
    """One file of torch.save."""

    endings = (".pt", ".pth", ".bin", ".ckpt", ".pth.tar", ".pt.tar")

    def __init__(self, path: Path, extent: Extent | None = None) -> None:
        super().__init__(path)
        self._extent = extent or Extent.whole(path)
        content = self._load()
        if not self._tensors and all(w.reason is Reason.objects for w in self.others.values()):
            found = _without_tensor(content, self.others)
            raise NoTensorsError(f"{path} must hold a dict of tensors, but holds {found}")
        self.entries = describe_tensors(self._tensors)
        self._check_placeholders(content)
        self._leave_out_parts()
        self.overlapping = mark_shared(self.entries, self._tensors)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        return zipfile.is_zipfile(path)

    def _load(self) -> Any:
        with errors_as_damage(self.path, _KIND):
            saved = load_saved(self._extent)
            self._storages, self._swapped = saved.storages, saved.swapped
            self._tensors, self.others, self.classes = tensors_in(saved.content, self.path)
        return saved.content

    def _check_placeholders(self, content: Any) -> None:
        """Raises if the parameters are empty, as DeepSpeed's ZeRO-3 saves them elsewhere."""
        groups = content.get("param_shapes") if isinstance(content, Mapping) else None
        if not isinstance(groups, list) or not all(isinstance(one, Mapping) for one in groups):
            return
        names = [f"module.{name}" for group in groups for name in group if isinstance(name, str)]
        shapes = [self.entries[name].shape for name in names if name in self.entries]
        if shapes and all(0 in shape for shape in shapes):
            raise UnreadableError(
                f"{self.path} must hold weights, but holds empty tensors in place of them: with "
                f"DeepSpeed's ZeRO-3 the values lie in the files *_optim_states.pt. {ZERO}."
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
        """Gives a tensor new values in a copy that has these storages; returns the one it changes.

        The check sums stay as they are.
        """
        tensor = self._tensors[name]
        assert isinstance(tensor, StoredTensor)
        start = storages[tensor.key].start + tensor.start
        buffer = self._memory_for(tensor.span, name)
        with target.open("r+b") as file:
            file.seek(start)
            file.readinto(buffer)  # between its entries may lie those of another
            flat = self._flat(buffer, tensor.dtype)
            view_of(flat, tensor).copy_(new)
            self._flat(buffer, tensor.dtype)  # in the order of bytes that it had
            file.seek(start)
            file.write(buffer)
        return tensor.key


def _without_tensor(content: Any, others: Mapping[str, Skipped]) -> str:
    """What a file holds that has no tensor, and the way out."""
    if isinstance(content, Mapping) and LIGHTNING_VERSION in content:
        return (
            "the state of a trainer of Lightning and no tensor. The weights of a sharded "
            "checkpoint lie beside meta.pt: give its folder."
        )
    kind = content.kind if isinstance(content, Foreign) else type(content).__name__
    article = "an" if kind[0].lower() in "aeiou" else "a"
    besides = "".join(
        f"; beside it are Python objects that are not read: {why.detail}"
        for why in others.values()
        if kind == "dict"
    )
    found = "None" if content is None else f"{article} {kind}"
    way_out = "Save a state dict: torch.save(model.state_dict(), path)."
    return f"{found} and no tensor{besides}. {way_out}"
