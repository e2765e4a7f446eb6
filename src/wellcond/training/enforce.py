"""Hard limits applied once to a model that is not trained, such as an averaged copy."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from wellcond.rules.base import Rule
from wellcond.rules.limit import Limit
from wellcond.training.engine import Engine
from wellcond.training.oversights import Oversights, warn_of_stored
from wellcond.training.regularizer import refuse_without_proximal_step
from wellcond.training.replicas import replicas_of
from wellcond.training.selection import select
from wellcond.training.state import WeightState
from wellcond.weights.discover import refuse_flat_parameters, unwrapped


def enforce(model: nn.Module, rule: Limit | Mapping[str, Limit | None]) -> None:
    """Applies hard limits to the weights of a model, once and in place, frozen weights included.

    For a model that is evaluated or saved, not trained: an average of weights (torch's
    AveragedModel, timm's ModelEmaV3, `ema.ema_model` of ema-pytorch) is frozen by intent, and that
    of weights that obey need not obey. Every weight that does not obey is replaced by a nearest one
    that does; see `ConditionLimit` and `SingularValueLimit`. The flags requires_grad stay as they
    are. While a model is trained use a `Regularizer`, which leaves frozen weights alone.

    Args:
        model: the model. Its weights are those that `Regularizer` finds, and the frozen ones.
        rule: one hard limit for all weights, or a mapping of patterns to a limit, or to None to
            leave out, as for `Regularizer`. The first pattern that matches wins.

    Raises:
        ValueError: a weight holds NaN or infinity, or cannot obey in its dtype; the error names all
            such weights, and the limits of all others hold. A pattern matches nothing, or no weight
            is left.
        TypeError: a rule is a penalty or `IsometryStep`, which take their steps while a model is
            trained.

    Example:
        >>> import torch, wellcond as wc
        >>> model = torch.nn.Linear(8, 8)
        >>> average = torch.optim.swa_utils.AveragedModel(model).requires_grad_(False)
        >>> wc.enforce(average, wc.ConditionLimit(2.0))
        >>> bool(wc.condition_number(average.module.weight) <= 2.0)
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
    for one in rule.values() if isinstance(rule, Mapping) else [rule]:
        enforceable = isinstance(one, Rule) and one.enforceable
        if not enforceable and (one is not None or one is rule):
            raise TypeError(
                f"`rule` must be a hard limit or map patterns to limits or None, got {one!r}. "
                "A limit is, for instance, ConditionLimit(10); a penalty takes its steps in "
                "training, by a Regularizer."
            )
    refuse_flat_parameters(model)
    chosen, _ = select(unwrapped(model), rule, frozen=True, parameter="rule")
    states = [WeightState(weight, limit, block_size=1) for weight, limit in chosen]
    refuse_without_proximal_step(states)
    oversights = Oversights(unwrapped(model), states)
    warn_of_stored(states)
    oversights.check_limits(states)
    with oversights.watch_zeros(states):
        Engine(states, replicas_of(model), check_replicas=False).enforce(states)
