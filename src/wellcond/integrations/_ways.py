"""What the callbacks have in common: the penalties they take and the ways they apply them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import wellcond as wc

Rule: TypeAlias = wc.Penalty | wc.Limit | wc.Isometry
Penalties: TypeAlias = Rule | Mapping[str, Rule | None]


def checked_way(way: str) -> str:
    """The way as given.

    Raises:
        ValueError: it is none that a callback can apply.
    """
    if way not in ("proximal", "gradients"):
        raise ValueError(
            f'`way` must be "proximal" or "gradients", got {way!r}. For a penalty in the loss make '
            "a wc.Regularizer of your own and add reg() where the loss is computed."
        )
    return way
