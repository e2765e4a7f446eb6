"""When a hard limit is due: by how far the weight has moved, not by a number of steps.

A weight moves with the sum of the learning rates. The budget B is so much of it as lets a bound be
exceeded by about a fifth: after every application it is found anew from what this one has seen.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from wellcond.rules.limit import SpectralLimit

_SHORTEST, _LONGEST = 10, 1000  # steps
_RISE = 0.23  # by how much a bound may be exceeded before an application, of itself


@dataclass
class Pace:
    """What is remembered of the applications of a limit to a weight; numbers of the host.

    Attributes:
        applications: how many there were.
        budget: the sum of learning rates after which the next is due.
        excess: by what factor the limit was exceeded before the last, nan if that is not known.
        condition_number: kappa before the last, nan if that is not known.
        interval: optimizer steps between the last two.
        passed: whether the weight was seen to obey without being decomposed.
    """

    applications: int = 0
    budget: float = 0.0
    excess: float = math.nan
    condition_number: float = math.nan
    interval: int = 0
    passed: bool = False

    def due(self, steps: int, lr: float) -> bool:
        """Whether it is, after so many steps with these learning rates since the last time."""
        if self.applications == 0:
            return True
        return steps >= _LONGEST or (steps >= self._shortest and lr >= self.budget and lr > 0)

    @property
    def _shortest(self) -> int:
        """1, 2, 4, 8 and then 10 steps: how a weight moves is not known at first, and small initial
        weights move fast."""
        return min(1 << min(self.applications - 1, 4), _SHORTEST)

    def saw(self, excess: float, condition_number: float, passed: bool) -> None:
        """What an application has found."""
        self.excess, self.condition_number, self.passed = excess, condition_number, passed

    @property
    def known(self) -> bool:
        """Whether something was found at the last application."""
        return self.passed or not math.isnan(self.excess)

    @property
    def obeyed(self) -> bool:
        """Whether the weight did at the last application, so that it may well do at the next."""
        return self.passed or self.excess <= 1

    def applied(self, steps: int, lr: float) -> None:
        """After an application that was due, and `saw`."""
        if self.applications > 0:  # the first one says how the weight was made, not how it moves
            self.interval = steps
            self.budget = lr * self._stretch()
        self.applications += 1

    def _stretch(self) -> float:
        if self.passed:
            return 1.25
        if math.isnan(self.excess):
            return 1.0
        rise = self.excess - 1
        return 2.0 if rise <= _RISE / 2 else max(_RISE / rise, 0.25)

    def words(self, rule: object) -> str:
        """What is known of a weight under this limit, for people; "" if nothing is."""
        if self.passed:
            said = "obeyed at the last application"
        elif math.isnan(self.excess):
            return ""
        else:
            value = ""
            if isinstance(rule, SpectralLimit):
                value = rule.describe_excess(self.excess, self.condition_number)
            said = f"before the last application {value}{self.excess:.4g} times its limit"
        return said + (f"; {self.interval} steps after the one before" if self.interval else "")

    def state(self, rule: object) -> Tensor:
        """As a tensor of fixed shape; 0 for what is not known, so that equal states are equal."""
        numbers = torch.tensor([*astuple(self), _mark(rule)], dtype=torch.float64, device="cpu")
        return numbers.nan_to_num(nan=0.0, posinf=math.inf)

    @classmethod
    def of(cls, state: Tensor, rule: object) -> Pace:
        """From `state()`; anew if it is of another limit."""
        applications, budget, excess, kappa, interval, passed, mark = state.tolist()
        if mark != _mark(rule):
            return cls()
        return cls(
            int(applications),
            budget,
            excess or math.nan,
            kappa or math.nan,
            int(interval),
            bool(passed),
        )


def _mark(rule: object) -> int:
    """Tells limits of other bounds apart; those that users have written are taken for the same."""
    return zlib.crc32(repr(rule).encode()) if isinstance(rule, SpectralLimit) else 0
