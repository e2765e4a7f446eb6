"""Which weights of a model are under which penalty, and why the others are under none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from wellcond.penalties.base import Penalty
from wellcond.weights.discover import Weight, find_weights

FROZEN = "frozen: requires_grad is False"

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
    # What became of the parameters that each pattern was the first to match.
    outcomes: dict[str, list[str]] = {pattern: [] for pattern in patterns}
    chosen: list[tuple[Weight, Penalty]] = []
    skipped: dict[str, str] = {}

    def first_match(names: Iterable[str]) -> str | None:
        return next((p for p in patterns if any(fnmatchcase(name, p) for name in names)), None)

    def skip(name: str, reason: str, pattern: str | None) -> None:
        skipped[name] = reason
        if pattern is not None:
            outcomes[pattern].append(f'"{name}" is {reason}')

    for weight in found.weights:
        slices = weight.slices()
        matches = [first_match((one.name, *one.aliases)) for one in slices]
        # A stack under one pattern stays whole, and is worked on in one batch.
        if len(set(matches)) == 1:
            slices, matches = [weight], matches[:1]
        for one, match in zip(slices, matches, strict=True):
            penalty = None if match is None else patterns[match]
            if match is None:
                skip(one.name, weight.reason or "matched by no pattern", match)
            elif penalty is None:
                skip(one.name, f'left out by the pattern "{match}"', match)
            elif weight.reason and match not in (one.name, *one.aliases):
                skip(one.name, weight.reason, match)
            elif not weight.parameter.requires_grad:
                skip(one.name, FROZEN, match)
            else:
                outcomes[match].append("chosen")
                chosen.append((one, penalty))
    for name, reason in found.others.items():
        skip(name, reason, first_match([name]))

    if not found.weights:
        raise ValueError(
            "`model` must leave at least one weight to regularise, but holds no matrix."
        )
    for pattern, wanted in patterns.items():
        outcome = outcomes[pattern]
        if not outcome:
            names = [weight.name for weight in found.weights]
            raise ValueError(
                f'`penalties`: the pattern "{pattern}" matches no parameter, or only such as a '
                f"pattern before it matches. The weights are {listed(names)}."
            )
        if wanted is not None and not any(o == "chosen" or o.endswith(FROZEN) for o in outcome):
            raise ValueError(
                f'`penalties`: the pattern "{pattern}" selects no weight: '
                f"{'; '.join(outcome[:3])}. "
                f'Leave it out with {{"{pattern}": None}}, or insist on a matrix by its exact name.'
            )
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:5])
        raise ValueError(
            "`penalties` must leave at least one weight to regularise, but all are left out "
            f"({reasons or 'the model has no parameters'})."
        )
    return chosen, skipped
