"""The weights of a model that each rule applies to, and the reasons why others are skipped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from textwrap import shorten

from torch import nn

from wellcond.operators.views import Kernel, shape_of
from wellcond.rules.base import Rule
from wellcond.text import list_some, quote_names, suggest_patterns
from wellcond.weights.computed import find_computed_weights
from wellcond.weights.discover import Weight, find_weights
from wellcond.weights.reasons import Reason, Skipped
from wellcond.weights.roles import GROUPS, find_group

# Views of an audit: convolutions as operators, merged adapters, heads of attention.
_MEASURED_ONLY = re.compile(r"operator|merged|delta|(qk|vo)\d*")

Rules = Rule | Mapping[str, Rule | None]


def select(
    model: nn.Module,
    rules: Rules,
    *,
    frozen: bool = False,
    parameter: str = "rules",
    purpose: str = "regularise",
) -> tuple[list[tuple[Weight, Rule]], dict[str, Skipped]]:
    """Returns the selected weights with their rules, and why other parameters are skipped.

    Frozen weights are selected only if `frozen`. Errors name the argument `parameter` and the
    purpose of the selection, a verb.
    """
    if not isinstance(rules, Rule | Mapping):
        raise TypeError(
            f"`{parameter}` must be a rule or map patterns to rules or None, got "
            f"{shorten(repr(rules), 80)}. Examples of rules are ConditionPenalty(1e-2) and "
            "ConditionLimit(10). To measure weights without a rule, use wc.Monitor."
        )
    patterns = dict(rules) if isinstance(rules, Mapping) else {"*": rules}
    own_names = {name for name, _ in model.named_parameters()}
    groups = {pattern for pattern in patterns if pattern in GROUPS and pattern not in own_names}
    for pattern, rule in patterns.items():
        if not isinstance(pattern, str):
            raise TypeError(
                f"`{parameter}` must have patterns of type str, got {shorten(repr(pattern), 80)}. "
                'An example of a pattern is "*.weight".'
            )
        if not isinstance(rule, Rule | None):
            raise TypeError(
                f"`{parameter}` must be a rule or map patterns to rules or None, got "
                f"{shorten(repr(rule), 80)} for {pattern!r}. An example of a rule is "
                "ConditionPenalty(1e-2)."
            )
    found = find_weights(model)
    # outcomes[pattern][name] for the first pattern that matches: None if selected, else the reason.
    outcomes: dict[str, dict[str, Skipped | None]] = {pattern: {} for pattern in patterns}
    chosen: list[tuple[Weight, Rule]] = []
    skipped: dict[str, Skipped] = {}

    def is_match(name: str, pattern: str) -> bool:
        if pattern in groups:
            return find_group(*name.partition(":")[::2]) == pattern
        return fnmatchcase(name, pattern)

    def first_match(names: Iterable[str]) -> str | None:
        names = [*names]
        return next((p for p in patterns if any(is_match(name, p) for name in names)), None)

    def skip(name: str, why: Skipped, pattern: str | None) -> None:
        skipped[name] = why
        if pattern is not None:
            outcomes[pattern][name] = why

    for weight in found.weights:
        members = weight.members()
        matches = [first_match((one.name, *one.aliases)) for one in members]
        # A stack under one pattern is not split: it is processed in one batch.
        if len(set(matches)) == 1:
            members, matches = [weight], matches[:1]
        for one, match in zip(members, matches, strict=True):
            rule = None if match is None else patterns[match]
            as_one_map = rule is not None and rule.joins_groups
            reason = weight.reason or (None if as_one_map else _one_row(weight))
            if match is None:
                skip(one.name, reason or Skipped(Reason.unmatched), match)
            elif rule is None:
                skip(one.name, Skipped(Reason.excluded, f'"{match}"'), match)
            elif reason is not None and match not in (one.name, *one.aliases):
                skip(one.name, reason, match)
            elif not (weight.trained or frozen):
                skip(one.name, Skipped(Reason.frozen), match)
            else:
                outcomes[match][one.name] = None
                chosen.append((one, rule))
    for name, why in found.others.items():
        skip(name, why, first_match([name]))

    def comes_late(pattern: str) -> bool:
        names = (name for one, _ in chosen for name in (one.name, *one.aliases))
        return any(is_match(name, pattern) for name in names)

    if not found.weights:
        reasons = list_some((f"{name}: {why}" for name, why in skipped.items()), separator="; ")
        raise ValueError(
            f"`model` must have at least one weight to {purpose}, but contains no matrix "
            f"({reasons})."
        )
    for pattern, wanted in patterns.items():
        outcome = outcomes[pattern]
        if wanted is None and (pattern == "*" or outcome or not comes_late(pattern)):
            continue  # excluding nothing is allowed, excluding after a pattern that selects is not
        if not outcome:
            names = [weight.name for weight in found.weights]
            raise ValueError(
                f'`{parameter}`: the pattern "{pattern}" matches no parameter, or only those '
                f"that an earlier pattern matches. The weights are {quote_names(names)}."
                f"{suggest_patterns([pattern], names)}{_of_view(pattern)}"
                f"{_of_computed(pattern, model)}"
            )
        usable = [why is None or why.reason is Reason.frozen for why in outcome.values()]
        if not any(usable):
            reasons = list_some((f'"{n}": {why}' for n, why in outcome.items()), 3, "; ")
            raise ValueError(
                f'`{parameter}`: the pattern "{pattern}" selects no weight ({reasons}). '
                f'Use {{"{pattern}": None}} to skip it, or include a matrix by its exact name.'
            )
    if not chosen:
        reasons = list_some((f"{name}: {why}" for name, why in skipped.items()), separator="; ")
        raise ValueError(
            f"`{parameter}` must select at least one weight, but all are skipped ({reasons})."
        )
    return chosen, skipped


def _of_view(pattern: str) -> str:
    """A hint about a pattern for a view that only an audit measures."""
    _, colon, view = pattern.rpartition(":")
    if not (colon and _MEASURED_ONLY.fullmatch(view)):
        return ""
    kind = "the kernel of a convolution" if view == "operator" else "the weights that it is made of"
    return f' A view ":{view}" can be measured by audit(), but not limited: name {kind}.'


def _of_computed(pattern: str, model: nn.Module) -> str:
    """A hint about a pattern for a weight that is computed and not a parameter."""
    for prefix, module in model.named_modules():
        path = f"{prefix}." if prefix else ""
        for one in find_computed_weights(module):
            if fnmatchcase(f"{path}{one.attribute}", pattern):
                parts = quote_names(f"{path}{part}" for part in one.parts)
                return (
                    f' "{path}{one.attribute}" is computed by {one.method} from {parts} before '
                    f"each forward pass, and is not a parameter. Remove {one.method}, or omit the "
                    "pattern."
                )
    return ""


def _one_row(weight: Weight) -> Skipped | None:
    """The reason to skip a depthwise kernel, unless its rule acts on the convolution as one map."""
    if isinstance(weight.view, Kernel) and weight.view.groups is not None:
        groups, rows, _ = shape_of(weight.view, weight.parameters[0])
        return Skipped(Reason.one_row, f"{groups} groups") if rows == 1 else None
    return None
