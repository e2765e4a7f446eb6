"""What the application of a rule to weights has done, per matrix.

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
    """What became of one matrix; negative where the rule was not applied."""

    unattainable = -4
    not_converged = -3
    refused = -2
    not_finite = -1
    applied = 0
    unchanged = 1  # it obeyed
    shortened = 2  # the step was as long as the block of singular vectors reaches


class Worst(NamedTuple):
    """What became of a weight, of a stack of matrices that of the worst; numbers of the host."""

    status: OutcomeStatus
    excess: float
    condition_number: float


@dataclass(frozen=True)
class Outcome:
    """What a rule has done to each of the matrices S (..., m, n).

    Attributes:
        status: an int8 code of `OutcomeStatus` per matrix, on the device of the weight.
        new: what S is to become; None where the rule has stored it already.
        excess: by what factor a limit was exceeded before, nan where that is not known; None: of
            no matrix.
        condition_number: kappa before, likewise.
        moved: whether the matrix was changed; None: not known.
        spectra: how every weight is decomposed now, None where that is not known; None: of none.
    """

    status: Tensor
    new: NewWeight | None = None
    excess: Tensor | None = None
    condition_number: Tensor | None = None
    moved: Tensor | None = None
    spectra: Sequence[GramDecomposition | None] | None = None

    @classmethod
    def of(cls, S: Operator, status: OutcomeStatus, new: NewWeight | None = None) -> Outcome:
        """The same status for all matrices of S."""
        codes = torch.full(S.shape[:-2], int(status), dtype=torch.int8, device=S.device)
        return cls(codes, new)

    def numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Status, excess and kappa, as tensors of fixed shape and dtype on the CPU."""
        shape = self.status.shape
        excess, kappa = (
            # A tensor for each: they may be written to.
            torch.full(shape, math.nan, dtype=torch.float64, device="cpu")
            if one is None
            else to_float64(one).cpu()
            for one in (self.excess, self.condition_number)
        )
        return self.status.cpu(), excess, kappa


def worst_of(status: Tensor, excess: Tensor, condition_number: Tensor) -> Worst:
    """Of the matrices of one weight the worst; reads from the device."""

    def largest(x: Tensor) -> float:
        known = [number for number in x.flatten().tolist() if not math.isnan(number)]
        return max(known, default=math.nan)

    code = min(status.flatten().tolist(), default=0)
    return Worst(OutcomeStatus(code), largest(excess), largest(condition_number))
