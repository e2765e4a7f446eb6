"""A monitor of the weights of a model, which changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from wellcond.linalg.checks import as_count
from wellcond.operators.rounding import full_precision
from wellcond.report.estimate import Estimate
from wellcond.rules.base import Rule
from wellcond.rules.condition import ConditionPenalty
from wellcond.training.batch import group_weights, look
from wellcond.training.estimates import estimate_weights
from wellcond.training.log import log
from wellcond.training.oversights import warn_of_stored
from wellcond.training.selection import select
from wellcond.training.state import WeightState
from wellcond.weights.discover import unwrapped
from wellcond.weights.reasons import Skipped


class Monitor:
    """Measures the weights of a model while it trains, and changes nothing.

    A measurement costs a few products of each weight with a few vectors, and one copy to the host
    for all weights together. The monitor keeps the vectors, so estimates become more accurate with
    each measurement.

    Args:
        model: the model. Wrappers of torch.compile and DistributedDataParallel are unwrapped.
        patterns: the weights to watch, as patterns of `fnmatch.fnmatchcase`.
        block_size: the number of leading singular vectors per weight.
        condition_numbers: also measure kappa, in float64. This takes about as long as an SVD per
            weight. A sharded weight is gathered for it on every process, one weight at a time.

    Raises:
        ValueError: a pattern matches nothing, or the patterns select no weight.

    Example:
        >>> import torch, wellcond as wc
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 10))
        >>> monitor = wc.Monitor(model, condition_numbers=True)
        >>> logged = {}
        >>> _ = monitor.log(lambda values, step: logged.update(values), step=0)
        >>> logged["wellcond/condition_number/largest"] >= 1
        True
    """

    def __init__(
        self,
        model: nn.Module,
        patterns: Sequence[str] = ("*",),
        *,
        block_size: int = 8,
        condition_numbers: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        each = [patterns] if isinstance(patterns, str) else list(patterns)
        penalties: dict[str, Rule | None] = {pattern: ConditionPenalty(0.0) for pattern in each}
        chosen, self._skipped = select(unwrapped(model), penalties, parameter="patterns")
        self.block_size = as_count(block_size, "`block_size`")
        self.condition_numbers = condition_numbers
        self._states = [WeightState(weight, penalty, self.block_size) for weight, penalty in chosen]
        self._calls = 0
        warn_of_stored(self._states)

    def __repr__(self) -> str:
        count = len(self._states)
        return f"Monitor of {count} weight{'s' * (count != 1)}, {len(self._skipped)} skipped"

    @property
    def names(self) -> list[str]:
        """The names of the watched weights."""
        return [state.name for state in self._states]

    @property
    def skipped(self) -> dict[str, Skipped]:
        """Every other parameter and why it is skipped."""
        return dict(self._skipped)

    def measure(self) -> dict[str, Estimate]:
        """Estimates the singular values of every weight, as `Regularizer.measure` does."""
        with full_precision(self._states[0].weight.parameters[0].device.type):
            operators = [state.operator() for state in self._states]
            for seen in look(group_weights(self._states, operators)):
                seen.remember()
            return estimate_weights(self._states, self.block_size, self.condition_numbers)

    def log(
        self,
        target: Any,
        step: int | None = None,
        *,
        every: int = 100,
        layers: bool = False,
        prefix: str = "wellcond",
    ) -> dict[str, float] | None:
        """Logs estimates every `every` steps, as `Regularizer.log` does.

        Without `step` the monitor counts the calls of this method, from 0.
        """
        step = self._calls if step is None else step
        self._calls += 1
        return log(self.measure, target, step, every, layers, prefix)
