"""The numbers of NaN and infinite entries of a tensor, as data and in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from wellcond.text import list_some


@dataclass(frozen=True)
class NotFinite:
    """The number of entries of a tensor that are not finite.

    Attributes:
        nan: the number of NaN entries.
        infinite: the number of infinite entries, of either sign.
        entries: the number of all entries.

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


def describe_not_finite(not_finite: Mapping[str, NotFinite]) -> str:
    """Returns one line with the number of tensors and the first names; "" if all are finite."""
    if not not_finite:
        return ""
    named = list_some((f"{name} ({counts})" for name, counts in not_finite.items()), limit=3)
    hold = "tensors contain" if len(not_finite) > 1 else "tensor contains"
    return f"{len(not_finite)} {hold} NaN or infinity: {named}"


def to_list(not_finite: Mapping[str, NotFinite]) -> list[dict[str, object]]:
    return [{"name": name, **asdict(counts)} for name, counts in not_finite.items()]
