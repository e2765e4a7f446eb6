"""The rules that the callbacks accept and the modes in which they apply them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import wellcond as wc

Rules: TypeAlias = wc.rules.Rule | Mapping[str, wc.rules.Rule | None]


def has_modes(optimizer: object) -> bool:
    """Whether an optimizer (schedulefree, for example) evaluates other weights than it steps."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def rules_in(rules: Rules) -> list[wc.rules.Rule]:
    """The rules of a mapping, or the single rule."""
    if isinstance(rules, wc.rules.Rule):
        return [rules]
    return [rule for rule in rules.values() if rule is not None]


def checked_mode(mode: str, rules: Rules) -> str:
    """Checks the mode and the rules, and returns the mode unchanged.

    Raises:
        ValueError: the mode is unknown, or it is "gradients" and a rule has no gradient.
        TypeError: `rules` is neither a rule nor a mapping.
    """
    if not isinstance(rules, wc.rules.Rule | Mapping):
        raise TypeError(
            f"`rules` must be a rule or map patterns to rules or None, got {rules!r}. To watch "
            "weights without a rule, use MonitorCallback from the same module."
        )
    if mode not in ("proximal", "gradients"):
        raise ValueError(
            f'`mode` must be "proximal" or "gradients", got {mode!r}. For a penalty in the loss, '
            "create a wc.Regularizer and add reg() where the loss is computed."
        )
    bare = [rule for rule in rules_in(rules) if not rule.differentiable]
    if mode == "gradients" and bare:
        raise ValueError(
            f'`mode` must be "proximal" for {bare[0]!r}, which has no gradient, got "gradients". '
            "To add gradients of penalties on other weights, create a wc.Regularizer for them."
        )
    return mode
