"""Hard limits of singular values and of their ratio."""

from __future__ import annotations

import math
import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from wellcond.linalg.checks import as_number
from wellcond.linalg.lapack import SVD_FAILED
from wellcond.linalg.nearest import check_limit, clip
from wellcond.linalg.spectrum import compute_spectrum
from wellcond.operators.base import LowRank, NewWeight, Operator, SpectralOperator, Updatable
from wellcond.operators.stacked import unstack
from wellcond.operators.stored import StoredMatrix
from wellcond.operators.subspace import Image
from wellcond.rules.base import Need, RuleState
from wellcond.rules.limit import Limit
from wellcond.rules.outcome import Outcome, OutcomeStatus
from wellcond.rules.project import CANCELS, Bounds, Verdict, obey_nearly, project

# How far below the upper bound the block must see before it is believed.
_REACH = 0.9


class SpectralLimit(Bounds, Limit):
    """A hard limit of singular values."""

    needs = frozenset({Need.gram})
    fills_zeros = True

    def group_key(self) -> Hashable:
        return self

    @property
    def mark(self) -> int:
        return zlib.crc32(repr(self).encode())

    def apply(self, S: Tensor) -> Tensor:
        return _project_copy(S, self)[0]

    def project(self, S: Operator, state: RuleState, *, exact: bool) -> Outcome:
        weights = cast(Sequence[SpectralOperator], unstack(S))
        paces = [self.pace({"pace": row}) for row in state["pace"].reshape(len(weights), -1)]
        kappas = [pace.condition_number for pace in paces]
        verdicts = project(
            weights,
            self,
            gate=all(pace.obeyed for pace in paces),
            condition_number=math.nan if any(map(math.isnan, kappas)) else max(kappas),
        )
        status = [_status(S, verdict) for S, verdict in zip(weights, verdicts, strict=True)]
        if len(weights) == 1:
            ((excess, kappa, _),) = verdicts
            return Outcome(status[0], None, excess, kappa)
        excesses, numbers, _ = zip(*verdicts, strict=True)
        return Outcome(torch.stack(status), None, torch.stack(excesses), torch.stack(numbers))

    def explain(self, status: OutcomeStatus, dtype: torch.dtype) -> str:
        if status is not OutcomeStatus.unattainable:
            return SVD_FAILED
        wider = "" if dtype == torch.float64 else ", or store the weight in a wider dtype"
        return (
            f"no weight near it obeys {self!r} once it is rounded to "
            f"{str(dtype).removeprefix('torch.')}. Widen the limit{wider}."
        )


def _status(S: SpectralOperator, verdict: Verdict) -> Tensor:
    """The codes of `OutcomeStatus` of a weight with this verdict."""
    excess, _, margin = verdict
    unknown = torch.isnan(excess)
    # Nothing is known of a matrix that is zero, that passed the gate, or that is not finite.
    code = torch.where(unknown & (margin == 0), int(OutcomeStatus.unchanged), 0)
    code = torch.where(torch.isinf(margin), int(OutcomeStatus.unattainable), code)
    code = torch.where(torch.isnan(margin), int(OutcomeStatus.not_converged), code)
    if bool(unknown.any()):
        lost = unknown & ~S.finite().to(unknown.device)
        code = torch.where(lost & (code >= 0), int(OutcomeStatus.not_finite), code)
    return code.to(torch.int8)


@dataclass(frozen=True)
class ConditionLimit(SpectralLimit):
    """The hard limit kappa <= K.

    A weight above it is replaced by a nearest one that obeys (see `nearest`), as measured in
    float64 after rounding to the dtype of the weight. `attach` does so when it is due, between two
    applications kappa rises; `reg.enforce()` before saving makes sure. It is scale free: c S obeys
    if S does. A zero weight has no condition number and stays zero.

    A limit is no `Penalty`: it has neither a value nor a gradient, so `reg()` and
    `reg.add_gradients()` refuse it.

    Args:
        max_condition: K, at least 1.

    Raises:
        ValueError: K < 1 or nan; when it is applied, rounding to the dtype of a weight lifts its
            kappa above K whatever is done, as in bfloat16 for K below 1.004 or so.
        TypeError: K is not a number.

    Example:
        >>> import torch, wellcond as wc
        >>> layer = torch.nn.Linear(8, 8, bias=False)
        >>> reg = wc.Regularizer(layer, wc.ConditionLimit(3.0))
        >>> reg.enforce()
        >>> bool(wc.condition_number(layer.weight) <= 3.0)
        True
    """

    max_condition: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_condition", check_limit(self.max_condition))

    def clip(self, sigma: Tensor, margin: Tensor, unit: float = 1.0) -> Tensor:
        return clip(sigma, (self.max_condition / (1 + margin)).clamp_min(1.0))

    def excess(self, largest: Tensor, smallest: Tensor, unit: float = 1.0) -> Tensor:
        return largest / smallest / self.max_condition

    def interval(self, largest: Tensor) -> tuple[Tensor, Tensor]:
        return largest / self.max_condition, largest

    def describe_excess(self, excess: float, condition_number: float) -> str:
        return "" if math.isnan(condition_number) else f"κ {condition_number:.4g}, "


@dataclass(frozen=True, kw_only=True)
class SingularValueLimit(SpectralLimit):
    """The hard limit lower <= sigma_nu and sigma_1 <= upper, either or both.

    For layers that are Lipschitz (upper), invertible (lower) or nearly isometric (both): a weight
    outside is replaced by the nearest one in the Frobenius norm, with its singular values clipped,
    as measured in float64 after rounding to the dtype of the weight. Unlike `ConditionLimit` it
    fixes the scale.

    With `upper` alone a step of `attach` clips the leading singular values that the block of the
    `Regularizer` follows, and looks at a Gram matrix, in float32 or wider, whether all are below
    1.001 upper. Where they are not, where the block does not reach down to 0.9 upper, and at first
    it decomposes as for other bounds. `reg.enforce()` is exact.

    Under `lower` a zero weight becomes one with all singular values at `lower`; its vectors are
    arbitrary, the same each time.

    Args:
        lower: bound of the smallest singular value, positive; None for no bound.
        upper: bound of the largest, positive; None for no bound.

    Raises:
        ValueError: neither is given; one is not positive and finite; lower > upper; when it is
            applied, rounding to the dtype leaves no such weight, as for lower = upper.
        TypeError: a bound is not a number.

    Example:
        >>> import torch, wellcond as wc
        >>> layer = torch.nn.Linear(8, 8, bias=False)
        >>> reg = wc.Regularizer(layer, wc.SingularValueLimit(lower=0.5, upper=2.0))
        >>> reg.enforce()
        >>> sigma = torch.linalg.svdvals(layer.weight.detach().double())
        >>> bool(sigma.max() <= 2.0 and sigma.min() >= 0.5)
        True
    """

    lower: float | None = None
    upper: float | None = None

    def __post_init__(self) -> None:
        if self.lower is None and self.upper is None:
            raise ValueError("`lower` or `upper` must be given, got neither.")
        for name, bound in (("lower", self.lower), ("upper", self.upper)):
            if bound is None:
                continue
            number = as_number(bound, f"`{name}`", "a number or None")
            object.__setattr__(self, name, number)
            if not 0 < number < math.inf:
                raise ValueError(f"`{name}` must be positive and finite, got {bound}.")
        if not self._lower <= self._upper:
            raise ValueError(
                f"`lower` must be at most `upper`, got lower={self.lower} and upper={self.upper}."
            )

    @property
    def _lower(self) -> float:
        return 0.0 if self.lower is None else self.lower

    @property
    def _upper(self) -> float:
        return math.inf if self.upper is None else self.upper

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({Need.gram, Need.subspace} if self.lower is None else {Need.gram})

    def clip(self, sigma: Tensor, margin: Tensor, unit: float = 1.0) -> Tensor:
        grown = 1 + margin[..., None]
        low, high = self._lower / unit * grown, self._upper / unit / grown
        return sigma.clamp(min=low.minimum(high), max=high)

    def excess(self, largest: Tensor, smallest: Tensor, unit: float = 1.0) -> Tensor:
        above = largest / (self._upper / unit)
        below = self._lower / unit / smallest
        return above if self.lower is None else torch.maximum(above, below)

    def interval(self, largest: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(largest, self._lower), torch.full_like(largest, self._upper)

    def describe_excess(self, excess: float, condition_number: float) -> str:
        if self.lower is None:
            return f"σ₁ {excess * self._upper:.4g}, "
        return f"σ_ν {self.lower / excess:.4g}, " if self.upper is None else ""

    def matters(self, smallest: Tensor) -> Tensor:
        return smallest if self.lower is not None else smallest.clamp_min(self._upper)

    def step(self, S: Operator, image: Image | None, eta: Tensor, state: RuleState) -> Outcome:
        weights = cast(Sequence[SpectralOperator], unstack(S))
        paces = state["pace"].reshape(len(weights), -1)
        if image is None or not all(self.pace({"pace": row}).known for row in paces):
            return self.project(S, state, exact=False)  # the block is hardly warm
        new, excess, reached = self.clip_leading(image, S.nu)
        if bool(reached.all()):
            cast(Updatable, S).update_(new.where(image.finite))
            # A block may lag behind a weight that moves fast, or not reach far enough.
            if obey_nearly(weights, self):
                return replace(Outcome.of(S, OutcomeStatus.applied), excess=excess)
        outcome = self.project(S, state, exact=False)
        assert outcome.excess is not None
        return replace(outcome, excess=torch.fmax(outcome.excess, excess.to(outcome.excess)))

    def clip_leading(self, image: Image, nu: int) -> tuple[NewWeight, Tensor, Tensor]:
        """The leading values clipped; per matrix the excess, and whether the block reached so far.

        Every Ritz value is a lower bound of the singular value of its rank.
        """
        ritz = image.triplets
        sigma = ritz.sigma
        excess = sigma[..., 0] / self._upper
        reached = (sigma[..., -1] <= _REACH * self._upper) | (sigma.shape[-1] == nu)
        # What exceeds the bound by far is nearly cancelled by an update of S.
        reached &= excess < CANCELS / torch.finfo(sigma.dtype).eps
        share = (1 - self._upper / sigma.clamp_min(self._upper))[..., None, :]
        return (
            NewWeight(LowRank(torch.ones_like(excess), -ritz.left * share, ritz.right)),
            excess,
            reached,
        )


class LimitedMatrix(NamedTuple):
    """A matrix with kappa <= K as measured in its dtype, and the margin below K that it took."""

    S: Tensor
    before: float  # kappa of what was given
    after: float
    margin: float


def limit_condition_number(S: Tensor, max_condition: float) -> LimitedMatrix:
    """A matrix of the dtype of S with kappa <= K after rounding, nearest but for a small margin.

    S itself where it obeys. A zero matrix stays zero, with kappa nan.

    Raises:
        ValueError: rounding to the dtype lifts kappa above K whatever the margin, or LAPACK does
            not converge.
    """
    before = compute_spectrum(S, extremes=True).condition_number
    if before <= max_condition or math.isnan(before):
        return LimitedMatrix(S, before, before, 0.0)
    X, verdict = _project_copy(S, ConditionLimit(max_condition))
    after = compute_spectrum(X, extremes=True).condition_number
    return LimitedMatrix(X, before, after, float(verdict.margin))


def _project_copy(S: Tensor, limit: SpectralLimit) -> tuple[Tensor, Verdict]:
    """A copy of S that obeys, and the verdict on S; ValueError if there is none."""
    weight = StoredMatrix(S.clone())
    (verdict,) = project([weight], limit)
    code = OutcomeStatus(int(_status(weight, verdict).min()))
    if code in (OutcomeStatus.unattainable, OutcomeStatus.not_converged):
        raise ValueError(limit.explain(code, S.dtype))
    return weight.S, verdict
