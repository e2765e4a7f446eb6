"""When a hard limit is due: after the weight has moved far enough, not after a number of steps.

The movement of a weight grows with the sum of the learning rates. The budget B is the sum after
which a bound may be exceeded by about 20 %. Every application corrects B by its measurement.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

_SHORTEST, _LONGEST = 10, 1000  # steps
_RISE = 0.23  # the relative excess of a bound that is accepted before an application


@dataclass(frozen=True)
class Pace:
    """The record of the applications of a limit to a weight, in Python numbers.

    Attributes:
        applications: the number of applications.
        budget: the sum of learning rates after which the next application is due.
        excess: the factor by which the limit was exceeded before the last application, nan if
            unknown.
        condition_number: kappa before the last application, nan if unknown.
        interval: optimizer steps between the last two applications.
        passed: whether the weight was found within the limit without a decomposition.
        mark: identifies the limit; a limit with another mark starts a new record.
    """

    applications: int = 0
    budget: float = 0.0
    excess: float = math.nan
    condition_number: float = math.nan
    interval: int = 0
    passed: bool = False
    mark: int = 0

    def due(self, steps: int, rate: float) -> bool:
        """Whether the limit is due this number of steps, and sum of rates, after the last time."""
        if self.applications == 0:
            return True
        # At first the speed of the weight is unknown, and small initial weights move fast.
        shortest = min(1 << min(self.applications - 1, 4), _SHORTEST)
        return steps >= _LONGEST or (steps >= shortest and rate >= self.budget and rate > 0)

    @property
    def known(self) -> bool:
        """Whether the last application measured the weight."""
        return self.passed or not math.isnan(self.excess)

    @property
    def obeyed(self) -> bool:
        """Whether the weight was within the limit at the last application, so probably is now."""
        return self.passed or self.excess <= 1

    def budget_after(self, rate: float) -> float:
        """The budget that follows from a measurement after this sum of learning rates."""
        if self.passed:
            return rate * 1.25
        if math.isnan(self.excess):
            return rate
        rise = self.excess - 1
        return rate * (2.0 if rise <= _RISE / 2 else max(_RISE / rise, 0.25))

    def to_tensor(self) -> Tensor:
        """A tensor of fixed shape. 0 replaces nan, so that equal paces give equal tensors."""
        numbers = torch.tensor(astuple(self), dtype=torch.float64, device="cpu")
        return numbers.nan_to_num(nan=0.0, posinf=math.inf)

    @classmethod
    def from_tensor(cls, numbers: Tensor) -> Pace:
        """The inverse of `to_tensor`."""
        applications, budget, excess, kappa, interval, passed, mark = numbers.tolist()
        return cls(
            int(applications),
            budget,
            excess or math.nan,
            kappa or math.nan,
            int(interval),
            bool(passed),
            int(mark),
        )
