"""Stores the measured values of an audit in a file, so that a later audit can continue.

The first line identifies the audit. Each other line contains one value as JSON, and is appended and
flushed. With several processes, process r > 0 appends to its own file, whose name ends in .r. A
line without a newline was cut off when the audit was killed, and is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from wellcond.linalg.certify import Certificate
from wellcond.linalg.interval import Interval
from wellcond.report.findings import Finding, Grade, Status
from wellcond.text import escape, list_some

Key = tuple[str, int, str]
_CLASSES: dict[str, Any] = {
    one.__name__: one for one in (Finding, Certificate, Interval, Grade, Status)
}
_CLASS = "class"


class Record:
    """The known values, and a file to which new values are appended.

    Args:
        path: the path of the file, which need not exist.
        audit: what determines the values: versions, options, and the state of every file.
        rank: the rank of this process.

    Raises:
        ValueError: the file is not a record, or belongs to another audit.
        OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path, audit: Mapping[str, Any], rank: int = 0) -> None:
        self.known: dict[Key, Any] = {}
        first = f"{json.dumps({'wellcond': 'resume', **audit})}\n"
        numbered = (one for one in path.parent.glob(f"{_quote(path.name)}.*"))
        parts = [one for one in numbered if one.suffix[1:].isdecimal()]
        for one in (path, *sorted(parts)):
            if one.exists():
                self._read(one, first, [path, *parts])
        own = path if rank == 0 else path.with_name(f"{path.name}.{rank}")
        self.file = own.open("ab")
        self._begin(own, first)

    def _read(self, path: Path, first: str, all_of_it: list[Path]) -> None:
        if not path.is_file():
            raise ValueError(f"`resume` must be a file, but {path} is not. Give another path.")
        with path.open("rb") as file:
            head = file.readline().decode(errors="replace")
            if not head.endswith("\n") and first.startswith(head):
                return  # cut off, or empty
            if head != first:
                raise ValueError(_describe_other(path, head, first, all_of_it))
            for line in file:
                if line.endswith(b"\n"):
                    self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            kind, index, name, value = json.loads(line, object_hook=_revive)
            self.known[kind, index, name] = _as_tuple(value)
        except (ValueError, TypeError, KeyError, RecursionError):
            pass  # incomplete, for example after a power cut: the value is measured again

    def _begin(self, path: Path, first: str) -> None:
        """Removes a line that was cut off, and writes the first line if it is missing."""
        content = path.read_bytes()
        self.file.truncate(content.rfind(b"\n") + 1)
        if b"\n" not in content:
            self._write(first)

    def add(self, key: Key, value: Any) -> None:
        """Appends a value, unless it is a failure, which a later audit tries again."""
        if not _has_failed(value):
            self._write(f"{json.dumps([*key, value], default=_describe)}\n")

    def _write(self, line: str) -> None:
        self.file.write(line.encode())
        self.file.flush()

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _has_failed(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return any(isinstance(one, Finding) and one.status is Status.failed for one in value)


def _describe(value: Any) -> dict[str, Any]:
    """A value of one of the classes as JSON."""
    kind = {_CLASS: type(value).__name__}
    if isinstance(value, Enum):
        return kind | {"name": value.name}
    if not is_dataclass(value):
        raise TypeError(f"{type(value).__name__} cannot be written as JSON")
    return kind | {field.name: getattr(value, field.name) for field in fields(value)}


def _revive(found: dict[str, Any]) -> Any:
    kind = _CLASSES[found.pop(_CLASS)]
    if issubclass(kind, Enum):
        return kind[found["name"]]
    return kind(**{name: _as_tuple(value) for name, value in found.items()})


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _quote(name: str) -> str:
    """The `glob` pattern that matches only this name."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _describe_other(path: Path, head: str, first: str, all_of_it: list[Path]) -> str:
    """Why a file does not belong to this audit."""
    demand = f"`resume` must be a new file or the file of the same audit, but {path}"
    try:
        known = json.loads(head)
        is_record = known.pop("wellcond") == "resume"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_record = False
    if not is_record:
        return f"{demand} is something else. Give another path."
    wanted = json.loads(first)
    named = list_some(map(escape, _differences(known, wanted)), limit=3)
    files = " and ".join(str(one) for one in all_of_it if one.exists())
    return f"{demand} belongs to another audit ({named}). Give another path, or delete {files}."


def _differences(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    found = []
    for part in ("versions", "options", "files"):
        old, new = known.get(part), wanted[part]
        old = old if isinstance(old, dict) else {}
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                change = f"{name} was {old.get(name)} and is now {new.get(name)}"
                found.append(f"{name} has changed" if part == "files" else change)
    return found
