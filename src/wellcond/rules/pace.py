"""When a hard limit is due: by how far the weight has moved, not by a number of steps.

A weight moves with the sum of the learning rates. The budget B is the sum of them after which a
bound may be exceeded by about a fifth; every application corrects it by what it has measured.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

_SHORTEST, _LONGEST = 10, 1000  # steps
_RISE = 0.23  # by how much a bound may be exceeded before an application, of itself


@dataclass(frozen=True)
class Pace:
    """What a limit remembers of its applications to a weight; numbers of the host.

    Attributes:
        applications: how many there were.
        budget: the sum of learning rates after which the next is due.
        excess: by what factor the limit was exceeded before the last, nan if that is not known.
        condition_number: kappa before the last, nan if that is not known.
        interval: optimizer steps between the last two.
        passed: whether the weight was seen to obey without a decomposition.
        mark: of the limit; a limit with another mark does not take this pace over.
    """

    applications: int = 0
    budget: float = 0.0
    excess: float = math.nan
    condition_number: float = math.nan
    interval: int = 0
    passed: bool = False
    mark: int = 0

    def due(self, steps: int, rate: float) -> bool:
        """Whether the limit is due, this many steps and this sum of rates after the last time."""
        if self.applications == 0:
            return True
        # How a weight moves is not known at first, and small initial weights move fast.
        shortest = min(1 << min(self.applications - 1, 4), _SHORTEST)
        return steps >= _LONGEST or (steps >= shortest and rate >= self.budget and rate > 0)

    @property
    def known(self) -> bool:
        """Whether the last application has measured the weight."""
        return self.passed or not math.isnan(self.excess)

    @property
    def obeyed(self) -> bool:
        """Whether the weight obeyed at the last application, so that it may well do so again."""
        return self.passed or self.excess <= 1

    def budget_after(self, rate: float) -> float:
        """The budget that follows from what was measured after this sum of learning rates."""
        if self.passed:
            return rate * 1.25
        if math.isnan(self.excess):
            return rate
        rise = self.excess - 1
        return rate * (2.0 if rise <= _RISE / 2 else max(_RISE / rise, 0.25))

    def to_tensor(self) -> Tensor:
        """A tensor of fixed shape; 0 for what is not known, so that equal paces are equal."""
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
