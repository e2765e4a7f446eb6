"""Reads the tensors of a TorchScript program, as torch.jit.save writes it, without running it.

Its pickle contains the modules, and its source text declares their parameters and buffers:

    class STFT(Module):
      __parameters__ = []
      __buffers__ = ["basis", ]

A frozen program has no parameters. Its weights are constants, which have numbers instead of names.
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
_RENAME = "If torch.save wrote it, rename it so that its name ends in .pt"
_CONSTANT = "CONSTANTS.c"  # with a number, the name of a constant in the code of the program
_LOST = "a constant of a frozen program, which has lost its name and may not be a weight"
# The role of a tensor in a program. In a class without source text, all tensors may be parameters.
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
        "wellcond does not write programs. Repair its weights: "
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
                raise DamagedError("its pickle contains no module")
            if not isinstance(constants, tuple):
                raise DamagedError("its constants are not a tuple")
            numbered = {f"{_CONSTANT}{number}": one for number, one in enumerate(constants)}
            self._tensors, self.others, self.classes = tensors_in(
                {**module.state, **numbered}, path
            )
            regions = records.find_regions()
            self._storages = {key: regions[key.lower()] for key in records.storages}
            self._swapped = records.swapped
            roles = dict(_find_roles(module, _Source(records)))
        if not self._tensors:
            raise NoTensorsError(
                f"{path} must contain tensors, but is a program without any. Audit the model from "
                "which it was made."
            )
        self.entries = describe_tensors(self._tensors)
        self._leave_out_parts()
        if _PARAMETER in roles.values():
            self._leave_out_others(roles)
        else:
            self._add_notes(roles)
        self.overlapping = mark_shared(self.entries, self._tensors)

    def _leave_out_others(self, roles: Mapping[str, str]) -> None:
        """Skips tensors that are not parameters, unless they are tied to one."""
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
        """Adds notes to the tensors of a frozen program, which lack their names and roles."""
        self.not_copied = (
            "wellcond does not write frozen programs. Repair the weights from which it was made, "
            "and freeze it again"
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
    """The source text of a program, which declares the tensors of each class."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._read: dict[str, dict[str, dict[str, str]]] = {}  # by file, then by class

    def roles_in(self, kind: str) -> dict[str, str] | None:
        """Returns the roles of the attributes of a class; None if there is no source text."""
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
    """Yields the names and roles of the tensors in a module and its submodules."""
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
