"""A hard limit on sigma_1 of a convolution as a linear operator, for inputs of every size.

An application clips the singular values of the symbol and certifies the result, which costs as much
as tens of optimizer steps. Between applications, a warm-started estimate gives a lower bound of the
factor by which the kernel exceeds the limit, and the kernel is divided by that factor.

Letters: K (o, i/g, *k) the kernel of g groups; b the upper bound of sigma_1.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Hashable, Sequence
from typing import cast

import torch
from torch import Tensor

from wellcond.linalg.projection import GramDecomposition
from wellcond.linalg.symmetric import Clip
from wellcond.operators.acting import NormEstimator, bound_norm, limit_norm, padding_factor
from wellcond.operators.base import Operator
from wellcond.operators.convolution import Geometry
from wellcond.operators.stored import StoredMatrix
from wellcond.rules.base import Need, RuleState
from wellcond.rules.limit import Limit
from wellcond.rules.outcome import Outcome, OutcomeStatus
from wellcond.rules.watch import Glance, Judgement, Reading, Turn, Watch

NEARLY = 0.97  # times the limit: a weight below is not projected


class ConvolutionLimit(Limit):
    """`SingularValueLimit(acting=True)` for a convolution with this geometry.

    Args:
        upper: b.
        geometry: the geometry of the layer; its input size has no effect.
        headroom: an application to a watched kernel clips to upper/headroom.
        text: the rule as the user wrote it.
    """

    needs = frozenset({Need.whole})
    fills_zeros = True

    def __init__(self, upper: float, geometry: Geometry, headroom: float, text: str) -> None:
        self.upper, self.geometry, self.headroom, self.text = upper, geometry, headroom, text

    def __repr__(self) -> str:
        return self.text

    @property
    def mark(self) -> int:
        return zlib.crc32(f"{self.text} {self.geometry}".encode())

    def group_key(self) -> Hashable:
        return self.mark

    def apply(self, S: Tensor) -> Tensor:
        return limit_norm(S, self.geometry, self.upper)

    def watch(self, nu: int) -> Watch:
        return ConvolutionWatch(self.upper, self.geometry)

    def project(self, S: Operator, state: RuleState, *, exact: bool) -> Outcome:
        kernel = cast(StoredMatrix, S).parameter
        if not bool(torch.isfinite(kernel).all()):
            return Outcome.of(S, OutcomeStatus.not_finite)
        bound = bound_norm(kernel, self.geometry)
        excess = torch.full(S.shape[:-2], bound / self.upper, dtype=torch.float64)
        if bound <= self.upper * (1 if exact else NEARLY):
            return self._outcome(OutcomeStatus.unchanged, excess)
        target = self.upper if exact else self.upper / self.headroom
        kernel.copy_(limit_norm(kernel, self.geometry, target))
        return self._outcome(OutcomeStatus.applied, excess)

    def _outcome(self, status: OutcomeStatus, excess: Tensor) -> Outcome:
        codes = torch.full_like(excess, int(status), dtype=torch.int8)
        moved = codes == int(OutcomeStatus.applied)
        return Outcome(codes, None, excess, None, moved, [None])

    def describe_watch(self) -> str:
        return (
            f"the kernel is scaled to σ₁ {self.upper:.4g} of the convolution after every step, and "
            f"occasionally clipped to {self.upper / self.headroom:.4g}"
        )


class ConvolutionWatch(Watch):
    """Warm-started estimates, one per cell of frequencies; a kernel above b is scaled to b.

    The state contains the vectors of the estimates and the product of the scale factors since the
    last clip. If that product is small, the kernel is clipped again, because scaling reduces all
    of its singular values.
    """

    REFINEMENTS = 10  # for a kernel that may have moved far; gives 0.99 sigma_1 or more (measured)
    SHRINKS = 1.2
    period = 1
    rest = 100  # because an application costs as much as tens of steps

    def __init__(self, upper: float, geometry: Geometry) -> None:
        self.upper, self.geometry = upper, geometry
        self._estimator: NormEstimator | None = None

    def init(self, S: Operator) -> RuleState:
        kernel = cast(StoredMatrix, S).parameter
        self._estimator = NormEstimator(kernel, self.geometry)
        start = self._estimator.start(torch.Generator().manual_seed(kernel.numel()))
        shrunk = torch.ones(self.geometry.groups, dtype=start.dtype, device=start.device)
        return {"modes": start, "shrunk": shrunk}

    def glance(self, turn: Turn) -> Glance:
        kernel = cast(StoredMatrix, turn.S).parameter
        ((modes, shrunk),) = ((one["modes"], one["shrunk"]) for one in turn.memories)
        assert self._estimator is not None
        for _ in range(1 if turn.products <= 2 else self.REFINEMENTS):
            sigma, modes = self._estimator.refine(kernel, modes)
        excess = sigma * padding_factor(kernel.shape, self.geometry) / self.upper
        return Glance((excess, modes, shrunk))

    def read(self, turn: Turn, glance: Glance, clip: Clip | None) -> Reading:
        excess, modes, shrunk = glance.tensors
        # A kernel that is not finite is not scaled.
        scale = 1 / torch.where(excess < math.inf, excess, 1.0).clamp_min(1.0)
        shrunk = shrunk * scale
        numbers = _per_matrix(torch.stack([excess, shrunk], dim=-1), turn.S)
        sight = {"modes": modes, "shrunk": shrunk}
        return Reading(numbers, [sight], scale=_per_matrix(scale[:, None], turn.S)[..., 0])

    def blank(self, turn: Turn) -> Reading:
        (memory,) = turn.memories
        ones = torch.ones_like(memory["shrunk"])
        numbers = _per_matrix(torch.stack([ones, ones], dim=-1), turn.S)
        sight = {key: own.clone() for key, own in memory.items()}
        return Reading(numbers, [sight], scale=_per_matrix(ones[:, None], turn.S)[..., 0])

    def judge(self, numbers: Sequence[Sequence[float]], is_one_map: bool) -> Judgement:
        excess = max((n for n, _ in numbers), key=lambda n: math.inf if math.isnan(n) else n)
        if not math.isfinite(excess):
            return Judgement(True, False, math.nan, math.nan, math.nan, True)
        due = min(shrunk for _, shrunk in numbers) * self.SHRINKS < 1
        return Judgement(due, False, excess * self.upper, math.nan, min(excess, 1.0))

    def renew(self, spectrum: GramDecomposition | None) -> RuleState | None:
        return {"shrunk": torch.ones(self.geometry.groups)}


def _per_matrix(numbers: Tensor, S: Operator) -> Tensor:
    """Numbers per group (g, ...) in the shape of the stack of matrices S."""
    return numbers.reshape(*S.shape[:-2], *numbers.shape[1:])
