"""What the host remembers of a weight that is watched, and when it looks at it again."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from wellcond.rules.watch import Judgement, Watch

_FIRST, _RESTLESS = 20, 10  # steps: how a weight moves is not known yet
_AFTER = 2  # looks in a row after an application
_JUMP = 2.0  # times the learning rate of the last look
_PRODUCTS = 5  # of a look where a weight may have moved far
_FEW, _SOME = 2, 4  # of a look after one that was an alert, and after one that was unsure
# A growth per step above _SLOW that is so many times that of late may become faster still.
_SURGE, _SLOW = 3.0, 0.002
_STEADY = 1.1  # times the last sigma_1: what rises by more in one step may have turned
_FADES = 0.9  # the growth of one look counts so much less at the next
_SHARE, _HORIZON = 0.25, 40  # so many decompositions per step, over so many steps, are too many
_NEAR = 0.9  # of the limit: only there a weight is checked now and then
_UNKNOWN = -1e300  # in place of nan, which does not equal itself


@dataclass
class Record:
    """Counts since a weight is watched, numbers of the host.

    Attributes:
        known: whether the weight was decomposed, so that there is something to follow.
        due: whether it is to be decomposed at the next step, if that was not done at this one.
        steps: of the optimizer.
        since_look: steps since the last look or decomposition.
        since_move: steps since the weight was last projected.
        since_decomposition: steps since it was last decomposed.
        interval: steps from the last look to the next, if nothing happens.
        rate: the learning rate at the last look.
        level: the logarithm of the excess at the last look.
        growth: by how much that rises per step at most, of late.
        looks: how often it was looked at.
        decompositions: how often it was decomposed.
        applications: how often it was projected.
        recent: the recent share of steps at which it was projected.
        blindness: the recent share of steps at which a look could not tell.
        is_blind: whether the watch is given up.
        excess: by what factor the limit was exceeded at the last look.
        largest: the largest excess since the last report.
        value: sigma_1 at the last look.
        condition_number: kappa at the last look, nan if it was not asked.
        closeness: products of the next look.
        products: with the weight since it was last decomposed; a block changes sides at each.
        mark: of the limit; a limit with another mark does not take this over.
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
        """Counts a step at this learning rate: products of the look that is due, 0 for none."""
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
        """Takes in what a look has shown."""
        self.looks += 1
        # A weight that moves as far at each step, and in the same direction, is followed closely.
        steady = not judgement.largest > _STEADY * self.value  # or it is the first look
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
            # Half of the steps after which it would reach the limit at this pace.
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
        """Takes in what a decomposition has shown."""
        first = self.decompositions == 0  # it tells how the weight was made, not how it moves
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
        """A tensor of fixed shape, in which equal records are equal."""
        numbers = [float(getattr(self, field.name)) for field in fields(self)]
        known = [_UNKNOWN if math.isnan(number) else number for number in numbers]
        return torch.tensor(known, dtype=torch.float64, device="cpu")

    @classmethod
    def from_tensor(cls, numbers: Tensor) -> Record:
        """The inverse of `to_tensor`."""
        kinds: list[Any] = [type(field.default) for field in fields(cls)]
        known = [math.nan if number == _UNKNOWN else number for number in numbers.tolist()]
        return cls(*(kind(number) for kind, number in zip(kinds, known, strict=True)))
