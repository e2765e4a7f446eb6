"""A TorchScript program, as torch.jit.save writes it, read for its tensors; its code does not run.

Its pickle holds the modules, of which the source text declares the parameters and the buffers:

    class STFT(Module):
      __parameters__ = []
      __buffers__ = ["basis", ]

A frozen program has no parameters. Its weights are constants, which have numbers and no names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from wellcond.files.archive import Extent, Records, errors_as_damage, open_records
from wellcond.files.inert import SCRIPT, Foreign
from wellcond.files.nested import tensors_in
from wellcond.files.stored import StoredFile, describe_tensors, leave_out, mark_shared
from wellcond.files.tensors import DamagedError, NoTensorsError
from wellcond.text import join_remarks
from wellcond.weights.fused import Views
from wellcond.weights.kernels import infer_views
from wellcond.weights.reasons import Reason, Skipped

_KIND = "TorchScript archive"
_RENAME = "If torch.save wrote it, let its name end in .pt"
_CONSTANT = "CONSTANTS.c"  # and a number, as the code of the program calls them
_LOST = "a constant of a frozen program, which has lost its name and perhaps is no weight"
# What a tensor is within a program. Of a class without source text all may be parameters.
_PARAMETER, _BUFFER, _ATTRIBUTE = "a parameter", "a buffer", "an attribute"
_CLASS = re.compile(
    r"^class (\w+)\(Module\):\n  __parameters__ = \[(.*)\]\n(?:  __buffers__ = \[(.*)\]\n)?",
    re.MULTILINE,
)
_QUOTED = re.compile(r'"([^"]*)"')


class Script(StoredFile):
    """One TorchScript archive. Names are those of the state dict of the program."""

    endings = (".jit", ".torchscript", ".ptl")
    kind = f"a {_KIND}"
    not_copied = (
        "it is a program, which is not written. Repair its weights: "
        "torch.save(torch.jit.load(path).state_dict(), other)"
    )

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        whole = Extent.whole(path)
        with (
            errors_as_damage(path, _KIND),
            open_records(whole, _KIND, "constants.pkl", f"{_RENAME}.") as records,
        ):
            module = records.unpickle("data.pkl", "data")
            constants = records.unpickle("constants.pkl", "constants")
            if not (isinstance(module, Foreign) and isinstance(module.state, Mapping)):
                raise DamagedError("its pickle holds no module")
            if not isinstance(constants, tuple):
                raise DamagedError("its constants are no tuple")
            numbered = {f"{_CONSTANT}{number}": one for number, one in enumerate(constants)}
            self._tensors, self.others, self.classes = tensors_in(
                {**module.state, **numbered}, path
            )
            regions = records.find_regions()
            self._storages = {key: regions[key.lower()] for key in records.storages}
            self._swapped = records.swapped
            roles = dict(_find_roles(module, _Source(records)))
        if not self._tensors:
            raise NoTensorsError(f"{path} must hold tensors, but is a program without any.")
        self.entries = describe_tensors(self._tensors)
        self._leave_out_parts()
        if _PARAMETER in roles.values():
            self._leave_out_others(roles)
        else:
            self._add_notes(roles)
        self.overlapping = mark_shared(self.entries, self._tensors)

    def _leave_out_others(self, roles: Mapping[str, str]) -> None:
        """What is no parameter is not trained, unless it is the same tensor as one."""
        parameters = {
            id(self._tensors[name]): name for name in self.entries if roles.get(name) == _PARAMETER
        }
        for name, entry in self.entries.items():
            of_code = "a constant" if name.startswith(_CONSTANT) else _ATTRIBUTE
            role = roles.get(name, of_code)
            tied = parameters.get(id(self._tensors[name]))
            if role != _PARAMETER and tied and entry.skipped is None:
                skipped = Skipped(Reason.same, tied)
                self.entries[name] = replace(entry, parameter=False, skipped=skipped)
            elif role != _PARAMETER:
                self.entries[name] = leave_out(entry, role)

    def _add_notes(self, roles: Mapping[str, str]) -> None:
        """Says of the tensors of a frozen program what is not known of them."""
        self.not_copied = (
            "it is a frozen program, which is not written. Repair the weights from which it was "
            "made, and freeze it again"
        )
        shapes = {name: entry.shape for name, entry in self.entries.items()}
        for name, entry in self.entries.items():
            if roles.get(name) == _BUFFER:
                self.entries[name] = leave_out(entry, _BUFFER)
            elif entry.skipped is None:
                views, note = infer_views(name, shapes)
                seen = Views(views, join_remarks(_LOST, note))
                self.entries[name] = replace(entry, views=seen)


class _Source:
    """The source text of a program: what each class of a module declares."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._read: dict[str, dict[str, dict[str, str]]] = {}  # by file, then by class

    def roles_in(self, kind: str) -> dict[str, str] | None:
        """The roles of the attributes of a class by its full name; None if there is no source."""
        module, _, name = kind.rpartition(".")
        file = f"code/{module.replace('.', '/')}.py"
        if file not in self._records:
            return None
        if file not in self._read:
            text = self._records.read(file).decode(errors="replace")
            self._read[file] = {
                found: dict.fromkeys(_QUOTED.findall(buffers or ""), _BUFFER)
                | dict.fromkeys(_QUOTED.findall(parameters), _PARAMETER)
                for found, parameters, buffers in _CLASS.findall(text)
            }
        return self._read[file].get(name, {})


def _find_roles(module: Foreign, source: _Source) -> Iterator[tuple[str, str]]:
    """The roles of the tensors in a module and in those within it, by their names."""
    modules: list[tuple[str, Foreign]] = [("", module)]
    while modules:
        prefix, one = modules.pop()
        roles = source.roles_in(one.kind)
        state: Mapping[Any, Any] = one.state if isinstance(one.state, Mapping) else {}
        for key, value in state.items():
            name = f"{prefix}{key}"
            if isinstance(value, Foreign) and value.kind.startswith(SCRIPT):
                modules.append((f"{name}.", value))
            elif roles is None:
                yield name, _PARAMETER
            elif key in roles:
                yield name, roles[key]
