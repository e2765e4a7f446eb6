"""What the callbacks have in common: the rules they take and the modes in which they apply them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import wellcond as wc

Rules: TypeAlias = wc.rules.Rule | Mapping[str, wc.rules.Rule | None]


def has_modes(optimizer: object) -> bool:
    """Whether an optimizer evaluates other weights than it steps, as those of schedulefree."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


def rules_in(rules: Rules) -> list[wc.rules.Rule]:
    """The rules of a mapping, or the only one."""
    if isinstance(rules, wc.rules.Rule):
        return [rules]
    return [rule for rule in rules.values() if rule is not None]


def checked_mode(mode: str, rules: Rules) -> str:
    """The mode as given.

    Raises:
        ValueError: a callback does not know it, or one of the rules has no gradient.
        TypeError: the rules are neither a rule nor a mapping to rules.
    """
    if not isinstance(rules, wc.rules.Rule | Mapping):
        raise TypeError(
            f"`rules` must be a rule or map patterns to rules or None, got {rules!r}. To watch "
            "weights without a rule take MonitorCallback, from the same module."
        )
    if mode not in ("proximal", "gradients"):
        raise ValueError(
            f'`mode` must be "proximal" or "gradients", got {mode!r}. For a penalty in the loss '
            "make a wc.Regularizer of your own and add reg() where the loss is computed."
        )
    bare = [rule for rule in rules_in(rules) if not rule.differentiable]
    if mode == "gradients" and bare:
        raise ValueError(
            f'`mode` must be "proximal" for {bare[0]!r}, which has no gradient, got "gradients". '
            "For a penalty on the gradients of other weights make a wc.Regularizer of your own."
        )
    return mode
