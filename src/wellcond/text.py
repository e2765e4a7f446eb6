"""Formats text consistently: names in a sentence, tables, strict JSON, versions.

Names come from files that may be malicious, so characters that control a terminal are escaped.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from wellcond.output import new_path


def escape(text: object) -> str:
    """The text on one line, with unprintable characters escaped: control, direction, surrogates.

    Example:
        >>> print(escape("a\\x1b[2J\\nb"))
        a\\x1b[2J\\nb
    """
    plain = str(text)
    if plain.isprintable():
        return plain
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in plain)


def list_some(items: Iterable[str], limit: int = 5, separator: str = ", ") -> str:
    """The first items and the number of the others; "none" if there are no items."""
    items = list(items)
    named = separator.join(map(escape, items[:limit])) or "none"
    return f"{named} and {len(items) - limit} more" if len(items) > limit else named


def join_remarks(*remarks: str) -> str:
    """Joins the remarks that are not empty with semicolons."""
    return "; ".join(filter(None, remarks))


def last_part(name: str) -> str:
    """The last part of the name of a tensor, after dots and slashes: `weight` of `fc.weight`."""
    return re.split(r"[./]", name)[-1]


def quote_names(names: Iterable[str]) -> str:
    """The first five names in sorted order, in quotation marks, and the number of the others."""
    return list_some([f'"{name}"' for name in sorted(names)])


def quote_subject(names: Collection[str]) -> str:
    """The names as in `quote_names`, followed by "is" or "are"."""
    return f"{quote_names(names)} {'is' if len(names) == 1 else 'are'}"


def format_count(number: int, noun: str) -> str:
    """The number and the noun, in the plural where necessary: "1 step", "2 steps"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def format_times(number: int) -> str:
    """How often something happened: "once", "2 times"."""
    return "once" if number == 1 else f"{number} times"


def suggest_patterns(patterns: Iterable[str], names: Iterable[str]) -> str:
    """The remedy for patterns that match only a part of a name, such as the name of a module."""
    names = list(names)
    wider = [(f"{p}.*", f"*{p}", f"*{p}.*", f"*{p}*") for p in patterns]
    found = [
        next((one for one in few if any(fnmatchcase(name, one) for name in names)), "")
        for few in wider
    ]
    if not any(found):
        return ""
    return f" A pattern matches an entire name: write {quote_names(one for one in found if one)}."


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch or the system raised this error because memory ran out."""
    said = re.search("allocate memory|(not enough|out of) memory|bad_alloc", str(error))
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError) and said is not None
    )


def format_duration(seconds: float) -> str:
    """The duration, such as "40 s", "12 min" or "1 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def format_percent(share: float) -> str:
    """The share as a percentage with two digits, such as 0.031 %, 7.2 % or 100 %."""
    return f"{float(f'{100 * share:.2g}'):g} %"


def format_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain text table, with words aligned left and numbers aligned right."""
    table = [headers, *([escape(cell) for cell in row[: len(headers)]] for row in rows)]
    widths = [max(map(_width, column)) for column in zip(*table, strict=True)]
    left = [header in ("weight", "dtype", "grade") for header in headers]
    lines = []
    for row in table:
        gaps = [" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = zip(row, gaps, left, strict=True)
        lines.append("  ".join(c + gap if words else gap + c for c, gap, words in cells).rstrip())
    return "".join(f"{line}\n" for line in lines)


_WITHOUT_WIDTH = ("Mn", "Me", "Mc", "Cf")  # combining marks and format characters
_SKIN_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"


def _width(text: str) -> int:
    """The number of terminal columns of the text; wide East Asian characters occupy two."""
    return sum(
        0
        if unicodedata.category(c) in _WITHOUT_WIDTH or c in _SKIN_TONES
        else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def dump_json(content: Any) -> str:
    """Strict JSON in ASCII; inf, -inf, nan and values of types that JSON lacks become strings."""

    def strict(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        if isinstance(value, dict):
            return {key: strict(item) for key, item in value.items()}
        return [strict(item) for item in value] if isinstance(value, list | tuple) else value

    plain = strict(content)
    return json.dumps(plain, indent=1, allow_nan=False, default=str) + "\n"


def save_text(text: str, path: str | os.PathLike[str] | None, overwrite: bool = True) -> str:
    """Returns the text; if there is a path, also writes it to that file by `new_path`."""
    if path is not None:
        with new_path(path, overwrite) as part:
            part.write_text(text, encoding="utf-8", errors="backslashreplace")
    return text


def read_versions() -> dict[str, str]:
    """The versions of wellcond, torch and Python."""
    import torch

    try:
        own = version("wellcond")
    except PackageNotFoundError:  # run from the sources, or frozen into an application
        own = "unknown"
    return {
        "wellcond": own,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
