"""How many entries of a tensor are NaN or infinite, as data and in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wellcond.text import and_more


@dataclass(frozen=True)
class NotFinite:
    """How many entries of a tensor are not finite.

    Attributes:
        nan: how many are NaN.
        infinite: how many are infinite, of either sign.
        entries: how many entries the tensor has.

    Example:
        >>> import torch, wellcond as wc
        >>> layer = torch.nn.Linear(3, 2)
        >>> layer.bias.data[0] = torch.nan
        >>> print(wc.audit(layer).not_finite["bias"])
        1 NaN of 2 entries
    """

    nan: int
    infinite: int
    entries: int

    def __str__(self) -> str:
        counts = ((self.nan, "NaN"), (self.infinite, "infinite"))
        found = " and ".join(f"{count:,} {what}" for count, what in counts if count)
        return f"{found} of {self.entries:,} entries"


def describe_not_finite(found: Mapping[str, NotFinite]) -> str:
    """One line with the number of tensors and the first names, or "" if all are finite."""
    if not found:
        return ""
    named = and_more((f"{name} ({counts})" for name, counts in found.items()), limit=3)
    return f"{len(found)} tensor{'s hold' if len(found) > 1 else ' holds'} NaN or infinity: {named}"


def to_list(found: Mapping[str, NotFinite]) -> list[dict[str, object]]:
    """As plain data."""
    return [
        {"name": name, "nan": one.nan, "infinite": one.infinite, "entries": one.entries}
        for name, one in found.items()
    ]
