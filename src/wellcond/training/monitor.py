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
from wellcond.text import format_count
from wellcond.training.estimates import estimate_weights
from wellcond.training.log import log
from wellcond.training.oversights import warn_of_stored
from wellcond.training.selection import select
from wellcond.training.state import WeightState
from wellcond.weights.discover import unwrapped
from wellcond.weights.reasons import Skipped


class Monitor:
    """Measures the weights of a model while it trains, and changes nothing.

    A measurement costs about 25 products of each weight with `block_size` vectors, and one copy to
    the host for all weights together. sigma_max is estimated from below: with a block of 8, the
    first estimate was at most 0.5 % too low for Gaussian matrices from 64x64 to 1024x1024, and
    estimates in training with Adam at most 0.2 %. The monitor keeps the vectors, so the next
    measurement starts from them, and the estimates of a weight that does not change become more
    accurate.

    Args:
        model: the model. Wrappers of torch.compile and DistributedDataParallel are unwrapped.
        patterns: the weights to watch, as patterns of `fnmatch.fnmatchcase`. Frozen weights are
            watched too.
        block_size: the number of leading singular vectors per weight.
        condition_numbers: also measure sigma_max, sigma_min and kappa, in float64. This takes about
            as long as an SVD per weight. A sharded weight is gathered for it on every process, one
            weight at a time.

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
        chosen, self._skipped = select(
            unwrapped(model), penalties, frozen=True, parameter="patterns", purpose="watch"
        )
        self.block_size = as_count(block_size, "`block_size`")
        self.condition_numbers = condition_numbers
        self._states = [WeightState(weight, penalty, self.block_size) for weight, penalty in chosen]
        self._calls = 0
        self._named: set[str] = set()
        warn_of_stored(self._states)

    def __repr__(self) -> str:
        weights = format_count(len(self._states), "weight")
        return f"Monitor of {weights}, {len(self._skipped)} skipped"

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
            return estimate_weights(
                self._states, self.block_size, self.condition_numbers, remember=True
            )

    def log(
        self,
        target: Any,
        step: int | None = None,
        *,
        every: int = 100,
        layers: bool = False,
        prefix: str = "wellcond",
    ) -> dict[str, float] | None:
        """Logs estimates at steps that are multiples of `every`, as `Regularizer.log` does.

        Without `step` the monitor counts the calls of this method, from 0. A warning names each
        weight that contains NaN or infinity, once.
        """
        step = self._calls if step is None else step
        self._calls += 1
        return log(self.measure, target, step, every, layers, prefix, self._named)
