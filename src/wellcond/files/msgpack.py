"""Reads the values in a msgpack file; for values that may be long, only their places.

See https://github.com/msgpack/msgpack/blob/master/spec.md. A value begins with a byte that encodes
its kind, and often its length. The reader needs memory in proportion to the number of values, which
is bounded. It refuses a length that exceeds the remaining bytes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import IO, Any

from wellcond.files.tensors import DamagedError

_VALUES = 1 << 20
_DEPTH = 100
_TEXT = 1 << 16  # bytes; longer strings are not read
_NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}
_NUMBERS |= {0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
# For each first byte, the kind of the value, and the width of its length or its fixed length.
_LONG = {0xC4: ("bytes", 1), 0xC5: ("bytes", 2), 0xC6: ("bytes", 4)}
_LONG |= {0xC7: ("extension", 1), 0xC8: ("extension", 2), 0xC9: ("extension", 4)}
_LONG |= {0xD9: ("text", 1), 0xDA: ("text", 2), 0xDB: ("text", 4)}
_LONG |= {0xDC: ("list", 2), 0xDD: ("list", 4), 0xDE: ("map", 2), 0xDF: ("map", 4)}
_FIXED = {0xD4 + power: ("extension", 1 << power) for power in range(5)}
_FIXED |= {0x80 + n: ("map", n) for n in range(16)} | {0x90 + n: ("list", n) for n in range(16)}
_FIXED |= {0xA0 + n: ("text", n) for n in range(32)}


@dataclass(frozen=True)
class Bytes:
    """Bytes in the file that are not read: a string, or an extension type with this code."""

    start: int
    size: int
    code: int | None = None

    @property
    def stop(self) -> int:
        """The byte after the last one."""
        return self.start + self.size


class Unpacker:
    """Reads values of an open file. Any exception means that the file is damaged."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._at, self._stop, self._left = file, 0, 0, _VALUES

    def read(self, start: int, stop: int) -> Any:
        """Returns the value in these bytes: a dict, list, number, string, None or `Bytes`."""
        self._file.seek(start)
        self._at, self._stop = start, stop
        value = self._value(0)
        if self._at != stop:
            raise DamagedError(f"{stop - self._at:,} bytes follow its last value")
        return value

    def _value(self, depth: int) -> Any:
        self._left -= 1
        if self._left < 0 or depth > _DEPTH:
            raise DamagedError(f"it contains more than {_VALUES:,} values or {_DEPTH} levels")
        (first,) = self._take(1)
        if first < 0x80 or first >= 0xE0:
            return first if first < 0x80 else first - 0x100
        if first in _CONSTANTS:
            return _CONSTANTS[first]
        if first in _NUMBERS:
            return struct.unpack(_NUMBERS[first], self._take(struct.calcsize(_NUMBERS[first])))[0]
        if first in _FIXED:
            kind, length = _FIXED[first]
        elif first in _LONG:
            kind, width = _LONG[first]
            length = int.from_bytes(self._take(width), "big")
        else:
            raise DamagedError("a value has an unknown kind")
        code = int.from_bytes(self._take(1), "big", signed=True) if kind == "extension" else None
        if length * (2 if kind == "map" else 1) > self._stop - self._at:
            raise DamagedError("a value extends beyond its end")
        if kind == "map":
            return self._map(length, depth)
        if kind == "list":
            return [self._value(depth + 1) for _ in range(length)]
        if kind == "text" and length <= _TEXT:
            return self._take(length).decode()
        self._at += length
        self._file.seek(self._at)
        return Bytes(self._at - length, length, code)

    def _map(self, length: int, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(length):
            key = self._value(depth + 1)
            if not isinstance(key, str) and type(key) is not int:
                raise DamagedError("a key is neither a string nor an integer")
            if str(key) in found:
                raise DamagedError("two of its keys are the same")
            found[str(key)] = self._value(depth + 1)
        return found

    def _take(self, size: int) -> bytes:
        if size > self._stop - self._at or len(data := self._file.read(size)) != size:
            raise DamagedError("it ends within a value")
        self._at += size
        return data
