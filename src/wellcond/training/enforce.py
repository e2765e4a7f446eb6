"""Hard limits applied once to a model that is not in training, such as an averaged copy."""

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

    Use it for a model that you evaluate or save, not for one in training. An average of weights
    (torch's AveragedModel, timm's ModelEmaV3, `ema.ema_model` of ema-pytorch) is frozen
    intentionally, and the average of weights within a limit can exceed the limit. Every weight that
    exceeds its limit is replaced by a nearest weight within it; see `ConditionLimit` and
    `SingularValueLimit`. The requires_grad flags do not change. During training use a
    `Regularizer`, which does not change frozen weights.

    Args:
        model: the model. Its weights are those that `Regularizer` finds, and the frozen ones.
        rule: one hard limit for all weights, or a mapping of patterns to a limit, or to None to
            skip the weights, as for `Regularizer`. The first pattern that matches wins.

    Raises:
        ValueError: a weight contains NaN or infinity, or cannot satisfy its limit in its dtype; the
            error names all such weights, and the limits of all others hold. Or a pattern matches
            nothing, or no weight is selected.
        TypeError: a rule is a penalty or `IsometryStep`, which act only during training.

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
                "A limit is, for instance, ConditionLimit(10). For penalties and isometry steps, "
                "use a Regularizer during training."
            )
    refuse_flat_parameters(model)
    chosen, _ = select(unwrapped(model), rule, frozen=True, parameter="rule", purpose="limit")
    states = [WeightState(weight, limit, block_size=1) for weight, limit in chosen]
    refuse_without_proximal_step(states)
    oversights = Oversights(unwrapped(model), states)
    warn_of_stored(states)
    oversights.check_limits(states)
    with oversights.watch_zeros(states):
        Engine(states, replicas_of(model), check_replicas=False).enforce(states)
