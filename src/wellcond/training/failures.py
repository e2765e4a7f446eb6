"""Weights to which a limit or a step could not be applied, and the error that names them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from wellcond.text import list_some

HOLDS_NAN = (
    " contains NaN or infinity and was left unchanged. "
    "Restore the last good checkpoint, or lower the learning rate."
)
_HOLD_NAN = HOLDS_NAN.replace("contains", "contain").replace("was left", "were left")
ELSEWHERE = (
    ": the process that applies the limit for the entire group has failed. "
    "See the error of that process."
)

Failures = dict[str, str]  # the text that follows the name of each weight in the message


def describe_error(error: Exception) -> str:
    """The message of an error in user code, with its type unless it is a ValueError.

    A limit raises ValueError for a weight that cannot satisfy it.
    """
    kind = type(error).__name__.lstrip("_")
    message = str(error) if type(error) is ValueError else f"{kind}: {error}"
    return message if message.endswith(".") else f"{message}."


def raise_failures(
    failures: Mapping[str, str], rest: str = "", errors: Sequence[Exception] = ()
) -> None:
    """Raises one ValueError for all failures, if there are any.

    Args:
        failures: the reasons by the name of the weight.
        rest: a sentence about the other weights.
        errors: the errors raised so far; the first one becomes the cause.
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
