"""The outcome of applying a rule to weights, per matrix.

Letters: S (..., m, n) a weight or a stack of weights; kappa its condition number.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from wellcond.linalg.checks import to_float64
from wellcond.linalg.projection import GramDecomposition
from wellcond.operators.base import NewWeight, Operator


class OutcomeStatus(enum.IntEnum):
    """The outcome for one matrix; negative if the rule was not applied."""

    unattainable = -4
    not_converged = -3
    refused = -2
    not_finite = -1
    applied = 0
    unchanged = 1  # the limit was satisfied
    shortened = 2  # the block of singular vectors permitted only a shorter step


class Worst(NamedTuple):
    """The outcome for one weight: the worst over its matrices, in Python numbers."""

    status: OutcomeStatus
    excess: float
    condition_number: float


@dataclass(frozen=True)
class Outcome:
    """What a rule did to each of the matrices S (..., m, n).

    Attributes:
        status: an int8 code of `OutcomeStatus` per matrix, on the device of the weight.
        new: the new value of S; None if the rule has already stored it.
        excess: the factor by which a limit was exceeded before, nan where unknown; None if unknown
            for all matrices.
        condition_number: kappa before, with nan and None as for `excess`.
        moved: whether the matrix was changed; None if unknown.
        spectra: the new decomposition of each weight, None where unknown; None if unknown for all
            weights.
    """

    status: Tensor
    new: NewWeight | None = None
    excess: Tensor | None = None
    condition_number: Tensor | None = None
    moved: Tensor | None = None
    spectra: Sequence[GramDecomposition | None] | None = None

    @classmethod
    def of(cls, S: Operator, status: OutcomeStatus, new: NewWeight | None = None) -> Outcome:
        """An outcome with the same status for all matrices of S."""
        codes = torch.full(S.shape[:-2], int(status), dtype=torch.int8, device=S.device)
        return cls(codes, new)

    def numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Status, excess and kappa, as tensors of fixed shape and dtype on the CPU."""
        shape = self.status.shape
        excess, kappa = (
            # Two separate tensors, because the caller may write to them.
            torch.full(shape, math.nan, dtype=torch.float64, device="cpu")
            if one is None
            else to_float64(one).cpu()
            for one in (self.excess, self.condition_number)
        )
        return self.status.cpu(), excess, kappa


def worst_of(status: Tensor, excess: Tensor, condition_number: Tensor) -> Worst:
    """The worst outcome over the matrices of one weight; reads from the device."""

    def largest(x: Tensor) -> float:
        known = [number for number in x.flatten().tolist() if not math.isnan(number)]
        return max(known, default=math.nan)

    code = min(status.flatten().tolist(), default=0)
    return Worst(OutcomeStatus(code), largest(excess), largest(condition_number))
