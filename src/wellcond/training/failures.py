"""Weights to which a limit or a step could not be applied, and the one error that names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wellcond.text import list_some

HOLDS_NAN = (
    " holds NaN or infinity and was left as it is. "
    "Restore the last good checkpoint, or lower the learning rate."
)
_HOLD_NAN = HOLDS_NAN.replace("holds", "hold").replace("was left as it is", "were left as they are")
ELSEWHERE = (
    ": the process that applies the limit for the whole group could not apply it. "
    "See the error of that process."
)

Failures = dict[str, str]  # by the name of a weight, what follows it in the message


def describe_error(error: Exception) -> str:
    """The message of an error in the code of a user; its type too, unless it is a ValueError.

    A ValueError is how a limit states that a weight cannot obey.
    """
    kind = type(error).__name__.lstrip("_")
    message = str(error) if type(error) is ValueError else f"{kind}: {error}"
    return message if message.endswith(".") else f"{message}."


def raise_failures(
    failures: Mapping[str, str], rest: str = "", errors: Sequence[Exception] = ()
) -> None:
    """Raises one ValueError for all of them, if there are any.

    Args:
        failures: why each has failed.
        rest: what became of the other weights, as a sentence.
        errors: what was raised meanwhile; the first of them is the cause.
    """
    if not failures:
        return
    why = dict.fromkeys(failures.values())
    sentences = []
    for one in why:
        names = [f'"{name}"' for name in sorted(failures) if failures[name] == one]
        many = len(names) > 1 and one == HOLDS_NAN
        sentences.append(list_some(names, limit=100) + (_HOLD_NAN if many else one))
    cause = errors[0] if errors else None
    raise ValueError(" ".join([*sentences, *([rest] if rest else [])])) from cause
