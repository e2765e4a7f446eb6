"""What the callbacks have in common: the penalties they take and the ways they apply them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import wellcond as wc

Rule: TypeAlias = wc.Penalty | wc.Limit | wc.IsometryStep
Penalties: TypeAlias = Rule | Mapping[str, Rule | None]


def has_modes(optimizer: object) -> bool:
    """Whether an optimizer evaluates other weights than it steps, as those of schedulefree."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def checked_mode(mode: str, rules: Penalties) -> str:
    """The way as given.

    Raises:
        ValueError: it is none that a callback can apply, or none for one of the penalties.
        TypeError: the penalties are neither a penalty nor a mapping to penalties.
    """
    if not isinstance(rules, Rule | Mapping):
        raise TypeError(
            "`rules` must be a penalty or map patterns to penalties or None, got "
            f"{rules!r}. To watch weights alone use wc.Monitor in a callback of your own."
        )
    if mode not in ("proximal", "gradients"):
        raise ValueError(
            f'`mode` must be "proximal" or "gradients", got {mode!r}. For a penalty in the loss '
            "make a wc.Regularizer of your own and add reg() where the loss is computed."
        )
    each = rules.values() if isinstance(rules, Mapping) else [rules]
    bare = [rule for rule in each if isinstance(rule, wc.Limit | wc.IsometryStep)]
    if mode == "gradients" and bare:
        raise ValueError(
            f'`mode` must be "proximal" for {bare[0]!r}, which has no gradient, got "gradients". '
            "For a penalty on the gradients of other weights make a wc.Regularizer of your own."
        )
    return mode
