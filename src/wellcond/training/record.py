"""The record that the host keeps of a watched weight, and the schedule of its checks."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from wellcond.rules.watch import Judgement, Watch

_FIRST, _RESTLESS = 20, 10  # steps during which the speed of a weight is not known yet
_AFTER = 2  # checks in a row after an application
_JUMP = 2.0  # times the learning rate at the last check
_PRODUCTS = 5  # products of a check when a weight might have moved far
_FEW, _SOME = 2, 4  # products of a check after an alert, and after an unsure one
# Growth per step above _SLOW and above _SURGE times the recent growth might accelerate further.
_SURGE, _SLOW = 3.0, 0.002
_STEADY = 1.1  # times the last sigma_1: after a larger rise in one step the vectors may have turned
_FADES = 0.9  # factor by which the growth at one check counts less at the next
_SHARE, _HORIZON = 0.25, 40  # too many blind checks: this share of steps over this many steps
_NEAR = 0.9  # share of the limit above which a weight is decomposed every `watch.check` steps
_UNKNOWN = -1e300  # in place of nan, which does not equal itself


@dataclass
class Record:
    """Counts and estimates of a weight since it is watched, as numbers on the host.

    A check is an estimate of the singular values from the blocks.

    Attributes:
        known: whether the weight was decomposed, so that its blocks are known.
        due: whether it must be decomposed at the next step, if it was not at this one.
        steps: the number of optimizer steps.
        since_look: steps since the last check or decomposition.
        since_move: steps since the weight was last projected.
        since_decomposition: steps since it was last decomposed.
        interval: steps from the last check to the next, if the learning rate does not jump.
        rate: the learning rate at the last check.
        level: the logarithm of the excess at the last check.
        growth: the largest recent growth of `level` per step.
        looks: the number of checks.
        decompositions: the number of decompositions.
        applications: the number of projections.
        recent: the recent share of steps at which it was projected.
        blindness: the recent share of steps at which a check was inconclusive.
        is_blind: whether wellcond has stopped watching the weight.
        excess: the factor by which the limit was exceeded at the last check.
        largest: the largest excess since the last report.
        value: sigma_1 at the last check.
        condition_number: kappa at the last check; nan if it was not estimated.
        closeness: the number of products of the next check.
        products: products with the weight since the last decomposition; a block changes sides at
            each.
        mark: identifies the limit; a limit with another mark does not restore this record.
    """

    known: bool = False
    due: bool = False
    steps: int = 0
    since_look: int = 0
    since_move: int = 0
    since_decomposition: int = 0
    interval: int = 1
    rate: float = 0.0
    level: float = math.nan
    growth: float = 0.0
    looks: int = 0
    decompositions: int = 0
    applications: int = 0
    recent: float = 0.0
    blindness: float = 0.0
    is_blind: bool = False
    excess: float = math.nan
    largest: float = math.nan
    value: float = math.nan
    condition_number: float = math.nan
    closeness: int = 1
    products: int = 0
    mark: int = 0

    def count(self, rate: float) -> int:
        """Counts a step; returns the number of products of the check that is due, 0 for none."""
        self.steps += 1
        self.since_look += 1
        self.since_move += 1
        self.since_decomposition += 1
        self.blindness *= 1 - 1 / _HORIZON
        self.recent *= 1 - 1 / _HORIZON
        jumps = rate > _JUMP * self.rate
        if self.since_look < self.interval and not jumps:
            return 0
        self.rate = rate
        if jumps or self.steps <= _FIRST:
            return _PRODUCTS
        return self.closeness

    def judge(self, judgement: Judgement, watch: Watch) -> None:
        """Updates the record with the result of a check."""
        self.looks += 1
        # The blocks follow a weight closely if it moves steadily.
        steady = not judgement.largest > _STEADY * self.value  # also true at the first check
        sudden = judgement.excess >= 1 and not steady
        steady &= self.closeness > 1
        if not math.isnan(judgement.excess):
            self._see(judgement.excess)
            self.value, smallest = judgement.largest, judgement.smallest
            if not math.isnan(smallest):
                self.condition_number = self.value / smallest if smallest > 0 else math.inf
        level = math.log(judgement.excess) if judgement.excess > 0 else -math.inf
        growth = (level - self.level) / max(self.since_look, 1)
        if math.isfinite(growth):
            rises = growth > max(_SURGE * self.growth, _SLOW)
            self.growth = max(growth, self.growth * _FADES)
        else:
            rises = False
        self.level = level
        self.closeness = _SOME if judgement.unsure else _FEW if judgement.alert else 1
        calm = self.steps > _RESTLESS and self.since_move > _AFTER
        self.interval = watch.period if calm and not (rises or judgement.alert) else 1
        if self.interval > 1 and self.growth > 0:
            # Half the number of steps after which it would reach the limit at this growth.
            self.interval = max(1, int(min(self.interval, -level / (2 * self.growth))))
        self.since_look = 0
        if judgement.blind and self.known and self.steps > _FIRST:
            self.blindness += 1 / _HORIZON
            self.is_blind |= self.blindness > _SHARE
        due = judgement.due or (judgement.unsure and not steady) or (watch.check > 0 and sudden)
        self.due = due and (judgement.blind or self.since_move >= watch.rest)
        if watch.check and self.since_decomposition >= watch.check:
            self.due |= judgement.excess > _NEAR

    def decompose(self, excess: float, condition_number: float, moved: bool, known: bool) -> None:
        """Updates the record with the result of a decomposition."""
        first = self.decompositions == 0  # shows how the weight was initialised, not how it moves
        self.decompositions += 1
        self.known, self.due = known, False
        self.products = self.since_decomposition = 0
        if moved:
            self.applications += 1
            self.recent += 1 / _HORIZON
            self.since_move = 0
            self.level = math.nan
            self.interval = 1
        if not math.isnan(excess) and not first:
            self._see(excess)
            self.condition_number = condition_number
        self.since_look = 0

    def _see(self, excess: float) -> None:
        self.excess = excess
        self.largest = excess if math.isnan(self.largest) else max(excess, self.largest)

    def to_tensor(self) -> Tensor:
        """A tensor of fixed shape; equal records give equal tensors."""
        numbers = [float(getattr(self, field.name)) for field in fields(self)]
        known = [_UNKNOWN if math.isnan(number) else number for number in numbers]
        return torch.tensor(known, dtype=torch.float64, device="cpu")

    @classmethod
    def from_tensor(cls, numbers: Tensor) -> Record:
        """The inverse of `to_tensor`."""
        kinds: list[Any] = [type(field.default) for field in fields(cls)]
        known = [math.nan if number == _UNKNOWN else number for number in numbers.tolist()]
        return cls(*(kind(number) for kind, number in zip(kinds, known, strict=True)))
