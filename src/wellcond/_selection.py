"""Which weights of a model are under which penalty, and why the others are under none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from wellcond._penalties import Penalty
from wellcond._weights import Weight, find_weights

Penalties = Penalty | Mapping[str, Penalty | None]


def listed(names: Iterable[str]) -> str:
    names = sorted(names)
    shown = ", ".join(f'"{name}"' for name in names[:5])
    return (shown + f" and {len(names) - 5} more" if len(names) > 5 else shown) or "none"


def select(
    model: nn.Module, penalties: Penalties
) -> tuple[list[tuple[Weight, Penalty]], dict[str, str]]:
    """The weights to regularise with their penalties, and why every other parameter is none."""
    patterns = dict(penalties) if isinstance(penalties, Mapping) else {"*": penalties}
    for pattern, penalty in patterns.items():
        if not isinstance(penalty, Penalty | None) or not isinstance(pattern, str):
            raise TypeError(
                "`penalties` must be a penalty or map patterns to penalties or None, got "
                f"{penalty!r} for {pattern!r}. A penalty is, for instance, Condition(1e-2)."
            )
    found = find_weights(model)
    matched: set[str] = set()

    def penalty_of(weight: Weight) -> tuple[str | None, Penalty | None]:
        for pattern, penalty in patterns.items():
            if any(fnmatchcase(alias, pattern) for alias in (*weight.aliases, weight.name)):
                matched.add(pattern)
                if penalty is None or not weight.reason or pattern in weight.aliases:
                    return pattern, penalty
        return None, None

    chosen: list[tuple[Weight, Penalty]] = []
    skipped: dict[str, str] = {}
    for weight in found.weights:
        slices = weight.slices()
        picks = [penalty_of(one) for one in slices]
        # A stack under one penalty stays whole, and is worked on in one batch.
        if len(set(picks)) == 1:
            slices, picks = [weight], picks[:1]
        for one, (by, penalty) in zip(slices, picks, strict=True):
            if penalty is not None and weight.parameter.requires_grad:
                chosen.append((one, penalty))
            elif penalty is not None:
                skipped[one.name] = "frozen: requires_grad is False"
            elif by is not None:
                skipped[one.name] = f'left out by the pattern "{by}"'
            else:
                skipped[one.name] = weight.reason or "matched by no pattern"
    for name, why in found.others.items():
        skipped[name] = why
        for pattern, penalty in patterns.items():
            if fnmatchcase(name, pattern):
                matched.add(pattern)
                if penalty is not None and pattern == name:
                    raise ValueError(
                        f'`penalties` must name matrices, but "{name}" is none: {why}. '
                        f'Leave it out: {{"{name}": None, ...}}.'
                    )
    if unmatched := [pattern for pattern in patterns if pattern not in matched]:
        names = [weight.name for weight in found.weights]
        raise ValueError(
            f"`penalties`: the pattern {listed(unmatched)} matches no parameter or comes after "
            f"others that match the same. The weights are {listed(names)}."
        )
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:5])
        raise ValueError(
            "`penalties` must leave at least one weight to regularise, but all are left out "
            f"({reasons or 'the model has no parameters'})."
        )
    return chosen, skipped
