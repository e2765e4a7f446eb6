"""Hard limits on singular values and on their ratio."""

from __future__ import annotations

import abc
import math
import zlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from wellcond.linalg.checks import as_number
from wellcond.linalg.lapack import SVD_FAILED
from wellcond.linalg.nearest import check_limit, clip
from wellcond.linalg.spectrum import compute_spectrum
from wellcond.operators.base import Operator, SpectralOperator
from wellcond.operators.convolution import Geometry
from wellcond.operators.stacked import unstack
from wellcond.operators.stored import StoredMatrix
from wellcond.operators.subspace import Image
from wellcond.rules.base import Need, Rule, RuleState
from wellcond.rules.convolution import NEARLY, ConvolutionLimit
from wellcond.rules.limit import Limit
from wellcond.rules.outcome import Outcome, OutcomeStatus
from wellcond.rules.project import Bounds, Verdict, approach, project
from wellcond.rules.watch import LARGEST, Ends, EndsWatch, TopWatch, Watch

_HEADROOM = 1.2  # for bounds on singular values
_LEAST_HEADROOM = 1.05  # with less, each projection is measured
_CLUSTER = 1.5  # below this kappa, blocks of singular vectors do not resolve the ends of a spectrum
# If rounding may add more than this share to kappa, a weight is measured after a projection.
_ROUNDING = 0.2
_NO_LOWER = "No lower bound is known for the smallest singular value of a convolution."


def _describe(rule: Any) -> str:
    """The call that creates this rule, without default values."""
    values = [(f.name, getattr(rule, f.name)) for f in fields(rule)]
    defaults = {f.name: f.default for f in fields(rule)}
    given = ", ".join(f"{name}={value!r}" for name, value in values if value != defaults[name])
    return f"{type(rule).__name__}({given})"


def _check_bounds(rule: SpectralLimit, *names: str) -> None:
    """Converts the bounds and the headroom of a rule to numbers; raises if they are invalid."""
    for name in names:
        if (bound := getattr(rule, name)) is None:
            continue
        number = as_number(bound, f"`{name}`", "a number or None")
        object.__setattr__(rule, name, number)
        if not 0 < number < math.inf:
            raise ValueError(f"`{name}` must be positive and finite, got {bound}.")
    headroom = as_number(rule.headroom, "`headroom`")
    object.__setattr__(rule, "headroom", headroom)
    if not 1 <= headroom < math.inf:
        raise ValueError(
            f"`headroom` must be finite and at least 1, got {headroom}. It is the factor by which "
            "a weight is projected inside its limit, so that it can move until the next "
            "application."
        )


class SpectralLimit(Bounds, Limit):
    """A hard limit on singular values, which is watched.

    Between two applications, a weight can move from `target` to `trigger`, both inside the limit.
    """

    needs = frozenset({Need.gram})
    fills_zeros = True
    headroom: float

    def group_key(self) -> Hashable:
        return self

    @property
    def mark(self) -> int:
        return zlib.crc32(repr(self).encode())

    @abc.abstractmethod
    def watch(self, nu: int) -> Watch | str:
        """How to watch a weight with nu singular values, or why it cannot be watched."""

    @property
    def bounds(self) -> Bounds:
        return self

    @property
    @abc.abstractmethod
    def target(self) -> SpectralLimit:
        """The limit to which a weight is projected that exceeds `trigger`."""

    @property
    @abc.abstractmethod
    def trigger(self) -> SpectralLimit:
        """The limit that a weight exceeds when it is projected to `target`."""

    def move(self, sigma: Tensor) -> Tensor:
        """The new values of descending singular values (..., nu) at a watched application."""
        largest, smallest = sigma[..., 0], sigma[..., -1]
        due = self.trigger.excess(largest, smallest) > 1
        clipped = self.target.clip(sigma, torch.zeros_like(largest))
        return torch.where(due[..., None], clipped, sigma)

    def survives(self, nu: int, u: float) -> bool:
        """Whether rounding to a dtype with unit roundoff u leaves the target within the limit."""
        rounding = self._spread * math.sqrt(nu) * u
        return self.headroom >= _LEAST_HEADROOM and rounding < min(_ROUNDING, self._room - 1)

    @property
    @abc.abstractmethod
    def _room(self) -> float:
        """The factor by which the target is inside the limit."""

    @property
    @abc.abstractmethod
    def _spread(self) -> float:
        """The largest kappa that the target permits, which determines the effect of rounding."""

    def apply(self, S: Tensor) -> Tensor:
        return _project_copy(S, self)[0]

    def step(self, S: Operator, image: Image | None, eta: Tensor, state: RuleState) -> Outcome:
        return self.project(S, state, exact=True)

    def project(self, S: Operator, state: RuleState, *, exact: bool) -> Outcome:
        weights = cast(Sequence[SpectralOperator], unstack(S))
        if not exact:
            found = approach(weights, self)
            outcome = _outcome(weights, [one.verdict for one in found])
            moved = [one.moved for one in found]
            return replace(
                outcome,
                moved=moved[0] if len(moved) == 1 else torch.stack(moved),
                spectra=[one.spectrum for one in found],
            )
        paces = [self.pace({"pace": row}) for row in state["pace"].reshape(len(weights), -1)]
        kappas = [pace.condition_number for pace in paces]
        verdicts = project(
            weights,
            self,
            gate=all(pace.obeyed for pace in paces),
            condition_number=math.nan if any(map(math.isnan, kappas)) else max(kappas),
        )
        return _outcome(weights, verdicts)

    def explain(self, status: OutcomeStatus, dtype: torch.dtype) -> str:
        if status is not OutcomeStatus.unattainable:
            return SVD_FAILED
        wider = "" if dtype == torch.float64 else ", or store the weight in a wider dtype"
        return (
            f"no nearby weight satisfies {self!r} when rounded to "
            f"{str(dtype).removeprefix('torch.')}. Widen the limit{wider}."
        )


def _outcome(weights: Sequence[SpectralOperator], verdicts: Sequence[Verdict]) -> Outcome:
    """The outcome for weights that are already stored."""
    status = [_status(S, verdict) for S, verdict in zip(weights, verdicts, strict=True)]
    if len(weights) == 1:
        ((excess, kappa, _),) = verdicts
        return Outcome(status[0], None, excess, kappa)
    excesses, numbers, _ = zip(*verdicts, strict=True)
    return Outcome(torch.stack(status), None, torch.stack(excesses), torch.stack(numbers))


def _status(S: SpectralOperator, verdict: Verdict) -> Tensor:
    """The codes of `OutcomeStatus` for a weight with this verdict."""
    excess, _, margin = verdict
    unknown = torch.isnan(excess)
    # The excess is unknown for a matrix that is zero, that passed the gate, or that is not finite.
    code = torch.where(unknown & (margin == 0), int(OutcomeStatus.unchanged), 0)
    code = torch.where(torch.isinf(margin), int(OutcomeStatus.unattainable), code)
    code = torch.where(torch.isnan(margin), int(OutcomeStatus.not_converged), code)
    if bool(unknown.any()):
        lost = unknown & ~S.finite().to(unknown.device)
        code = torch.where(lost & (code >= 0), int(OutcomeStatus.not_finite), code)
    return code.to(torch.int8)


@dataclass(frozen=True, repr=False)
class ConditionLimit(SpectralLimit):
    """The hard limit kappa <= K, and sigma_1 <= upper if `upper` is given.

    kappa = sigma_1/sigma_nu is the condition number of the weight, the ratio of its largest to its
    smallest singular value. K is `max_condition`.

    `reg.enforce()` and `attach(optimizer, every=N)` replace a weight that exceeds the limit by a
    nearest one that satisfies it (see `nearest`), as measured in float64 after rounding to the
    dtype of the weight. `attach(optimizer)` watches the weight by estimates of kappa: when the
    estimate exceeds 1 + 0.97 (K - 1), the weight is projected to kappa = 1 + (K - 1)/headroom, so
    that kappa is about K or less after every step: at most 1.05 K from the 20th step on, as
    measured, not proven. Without `upper`, the limit is scale-invariant: nonzero multiples of a
    weight within the limit are within it too. A zero weight has no condition number and remains
    zero.

    A limit is not a `Penalty`: it has neither a value nor a gradient, so `reg()` and
    `reg.add_gradients()` raise an error.

    Args:
        max_condition: K, at least 1.
        upper: bound of the largest singular value, positive; None for no bound. A watched weight is
            projected to upper/min(1.2, headroom) when sigma_1 exceeds 0.97 upper.
        headroom: the factor by which a watched weight is projected inside the limit, at least 1. A
            larger headroom makes projections rarer. Below 1.05, each projection is measured in
            float64.
        acting: must be False; only `SingularValueLimit` limits a convolution as a linear operator.

    Raises:
        ValueError: K < 1 or nan; upper is not positive and finite; headroom < 1; acting is True.
            When the limit is applied: no weight that is rounded to the dtype can satisfy K, as in
            bfloat16 for K below about 1.004.
        TypeError: an argument is not a number.

    Example:
        >>> import torch, wellcond as wc
        >>> layer = torch.nn.Linear(8, 8, bias=False)
        >>> reg = wc.Regularizer(layer, wc.ConditionLimit(3.0))
        >>> reg.enforce()
        >>> bool(wc.condition_number(layer.weight) <= 3.0)
        True
    """

    max_condition: float
    upper: float | None = field(default=None, kw_only=True)
    headroom: float = field(default=1.5, kw_only=True)
    acting: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.acting:
            raise ValueError(
                f"`acting` must be False for ConditionLimit, got {self.acting!r}. {_NO_LOWER} To "
                "limit its largest singular value, use SingularValueLimit(upper=..., acting=True)."
            )
        object.__setattr__(self, "max_condition", check_limit(self.max_condition))
        _check_bounds(self, "upper")

    __repr__ = _describe

    @property
    def _ends(self) -> Ends:
        return Ends(self.max_condition, upper=self._upper)

    @property
    def _upper(self) -> float:
        return math.inf if self.upper is None else self.upper

    @cached_property
    def target(self) -> ConditionLimit:
        upper = None if self.upper is None else self.upper / min(self.headroom, _HEADROOM)
        K = 1 + (self.max_condition - 1) / self.headroom
        return ConditionLimit(K, upper=upper, headroom=1)

    @cached_property
    def trigger(self) -> ConditionLimit:
        upper = None if self.upper is None else self.upper * NEARLY
        K = 1 + (self.max_condition - 1) * NEARLY if self.headroom > 1 else self.max_condition
        return ConditionLimit(K, upper=upper if self.headroom > 1 else self.upper, headroom=1)

    @property
    def _room(self) -> float:
        K = self.max_condition
        return self.headroom if math.inf == K else K / self.target.max_condition

    def watch(self, nu: int) -> Watch | str:
        if self.max_condition < _CLUSTER and nu > EndsWatch.WIDTH:
            return f"K is below {_CLUSTER}, so all singular values are close together"
        if nu > LARGEST:
            return f"it has more than {LARGEST} singular values"
        return EndsWatch(self._ends, self.trigger._ends, nu)

    @property
    def _spread(self) -> float:
        return self.max_condition

    def clip(self, sigma: Tensor, margin: Tensor, unit: float = 1.0) -> Tensor:
        K = (self.max_condition / (1 + margin)).clamp_min(1.0)
        clipped = clip(sigma, K)
        if self.upper is None:
            return clipped
        # The best interval [t/K, t] is the one without `upper`, or has the largest allowed t.
        top = (self.upper / unit / (1 + margin))[..., None]
        return torch.where(clipped[..., :1] <= top, clipped, sigma.clamp(top / K[..., None], top))

    def excess(self, largest: Tensor, smallest: Tensor, unit: float = 1.0) -> Tensor:
        ratio = largest / smallest / self.max_condition
        return ratio if self.upper is None else ratio.maximum(largest / (self.upper / unit))

    def interval(self, largest: Tensor) -> tuple[Tensor, Tensor]:
        largest = largest.clamp_max(self._upper)
        return largest / self.max_condition, largest

    def describe_watch(self) -> str:
        at, to = self.trigger, self.target
        text = f"projected to κ {to.max_condition:.4g} when κ exceeds {at.max_condition:.4g}"
        if at.upper is None:
            return text
        return f"{text}, or to σ₁ {to.upper:.4g} when σ₁ exceeds {at.upper:.4g}"

    def describe_excess(self, excess: float, condition_number: float) -> str:
        return "" if math.isnan(condition_number) else f"κ {condition_number:.4g}, "


@dataclass(frozen=True, kw_only=True, repr=False)
class SingularValueLimit(SpectralLimit):
    """The hard limits lower <= sigma_nu and sigma_1 <= upper, either or both.

    sigma_1 is the largest singular value of the weight, and sigma_nu the smallest.

    Use them for layers that must be Lipschitz (upper), invertible (lower) or nearly isometric
    (both). `reg.enforce()` and `attach(optimizer, every=N)` clip the singular values of a weight
    outside the bounds, which gives the nearest weight in the Frobenius norm, as measured in float64
    after rounding to the dtype of the weight. Unlike `ConditionLimit`, the bounds fix the scale.

    `attach(optimizer)` watches the weight by estimates, so that the bounds nearly hold after every
    step: sigma_1 is at most 1.01 upper from the 20th step on, as measured, not proven. With `upper`
    only, each step refines a block of 16 leading singular vectors and clips their singular values.
    If all of them are near the bound, others may be near it too, and the weight is decomposed and
    projected to upper/headroom. With `lower`, a weight that comes near a bound is projected inside
    both bounds, by the smaller of headroom and (upper/lower)^(1/4).

    With `lower`, all singular values of a zero weight become `lower`. Its singular vectors are
    arbitrary, but the same each time.

    Args:
        lower: bound of the smallest singular value, positive; None for no bound.
        upper: bound of the largest singular value, positive; None for no bound.
        acting: whether to limit a convolution as a linear operator, on inputs of every size,
            instead of its kernel as a matrix (out, in * taps). sigma_1 of the matrix may be smaller
            by a factor of up to the root of the number of taps. `reg.enforce()` certifies the
            bound, which is tight to 1 % for zero padding of images and loose for other paddings; it
            gives a nearby kernel, not the nearest one. An attached limit scales the kernel by an
            estimate after every step. Other layers are limited as matrices. Not supported with
            `lower` or for sharded kernels.
        headroom: the factor by which a watched weight is projected inside the bounds, at least 1.

    Raises:
        ValueError: neither bound is given; a bound is not positive and finite; lower > upper;
            headroom < 1; `acting` with `lower`, or for a convolution whose linear operator is
            unknown. When the limit is applied: no nearby weight is within the bounds after rounding
            to the dtype, as for lower = upper.
        TypeError: a bound or the headroom is not a number; acting is not a bool.

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
    acting: bool = False
    headroom: float = _HEADROOM

    def __post_init__(self) -> None:
        if self.lower is None and self.upper is None:
            raise ValueError("`lower` or `upper` must be given, got neither.")
        if not isinstance(self.acting, bool):
            raise TypeError(f"`acting` must be a bool, got {type(self.acting).__name__}.")
        if self.acting and self.lower is not None:
            raise ValueError(
                f"`lower` must be None if `acting` is True, got {self.lower}. {_NO_LOWER} Use "
                "`upper` only."
            )
        _check_bounds(self, "lower", "upper")
        if not self._lower <= self._upper:
            raise ValueError(
                f"`lower` must be at most `upper`, got lower={self.lower} and upper={self.upper}."
            )

    __repr__ = _describe

    @property
    def _lower(self) -> float:
        return 0.0 if self.lower is None else self.lower

    @property
    def _upper(self) -> float:
        return math.inf if self.upper is None else self.upper

    @property
    def bounds_kernel(self) -> bool:  # type: ignore[override]
        return self.upper is not None and not self.acting

    def on_convolution(self, geometry: Geometry) -> Rule:
        return ConvolutionLimit(self._upper, geometry, self.headroom, repr(self))

    def _inside(self, factor: float) -> SingularValueLimit:
        """The limit with both bounds moved inside by this factor."""
        lower = None if self.lower is None else self.lower * factor
        upper = None if self.upper is None else self.upper / factor
        return SingularValueLimit(lower=lower, upper=upper, headroom=1)

    @property
    def _room(self) -> float:
        """The headroom at each bound; less if two bounds are close to each other."""
        return (
            min(self.headroom, (self._upper / self._lower) ** 0.25) if self.lower else self.headroom
        )

    @cached_property
    def target(self) -> SingularValueLimit:
        return self._inside(self._room)

    @cached_property
    def trigger(self) -> SingularValueLimit:
        return self._inside(self._room ** (1 - NEARLY) ** 0.5)

    def move(self, sigma: Tensor) -> Tensor:
        if self.lower is not None:
            return super().move(sigma)
        # To the bound itself, as a block does; inside the bound only if a block is saturated.
        near = (sigma > TopWatch.REACH * self._upper).sum(dim=-1, keepdim=True)
        saturated = (near >= TopWatch.WIDTH) & (sigma.shape[-1] > TopWatch.WIDTH)
        top = torch.where(saturated, 1 / self.headroom, 1.0).to(sigma) * self._upper
        return sigma.minimum(top)

    def watch(self, nu: int) -> Watch | str:
        if self.lower is None:
            return TopWatch(self._upper, nu)
        if self._upper / self._lower < _CLUSTER and nu > EndsWatch.WIDTH:
            return f"upper/lower is below {_CLUSTER}, so all singular values are close together"
        if nu > LARGEST:
            return f"it has more than {LARGEST} singular values"
        return EndsWatch(self._ends, self.trigger._ends, nu)

    @property
    def _ends(self) -> Ends:
        return Ends(lower=self._lower, upper=self._upper)

    @property
    def _spread(self) -> float:
        return self._upper / self._lower if self.upper and self.lower else 1.0

    @property
    def is_separable(self) -> bool:  # type: ignore[override]
        return True

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

    def describe_watch(self) -> str:
        if self.lower is None:
            return f"σ₁ is clipped to {self._upper:.4g} after every step"
        at, to = self.trigger, self.target
        parts = [f"σ_ν is raised to {to._lower:.4g} when it falls below {at._lower:.4g}"]
        if self.upper is not None:
            parts.append(f"σ₁ is lowered to {to._upper:.4g} when it exceeds {at._upper:.4g}")
        return ", ".join(parts)

    def describe_excess(self, excess: float, condition_number: float) -> str:
        if self.lower is None:
            return f"σ₁ {excess * self._upper:.4g}, "
        return f"σ_ν {self.lower / excess:.4g}, " if self.upper is None else ""

    def matters(self, smallest: Tensor) -> Tensor:
        return smallest if self.lower is not None else smallest.clamp_min(self._upper)


class LimitedMatrix(NamedTuple):
    """A matrix with kappa <= K as measured in its dtype, and the margin below K that it needed."""

    S: Tensor
    before: float  # kappa of the input
    after: float
    margin: float


def limit_condition_number(S: Tensor, max_condition: float) -> LimitedMatrix:
    """A matrix in the dtype of S with kappa <= K after rounding, nearest up to a small margin.

    Returns S itself if it satisfies the limit. A zero matrix remains zero, with kappa nan.

    Raises:
        ValueError: rounding to the dtype raises kappa above K with every margin, or LAPACK does not
            converge.
    """
    before = compute_spectrum(S, extremes=True).condition_number
    if before <= max_condition or math.isnan(before):
        return LimitedMatrix(S, before, before, 0.0)
    X, verdict = _project_copy(S, ConditionLimit(max_condition))
    after = compute_spectrum(X, extremes=True).condition_number
    return LimitedMatrix(X, before, after, float(verdict.margin))


def _project_copy(S: Tensor, limit: SpectralLimit) -> tuple[Tensor, Verdict]:
    """A copy of S that satisfies the limit, and the verdict on S.

    Raises:
        ValueError: no copy satisfies the limit once it is rounded to the dtype of S.
    """
    weight = StoredMatrix(S.clone())
    (verdict,) = project([weight], limit)
    code = OutcomeStatus(int(_status(weight, verdict).min()))
    if code in (OutcomeStatus.unattainable, OutcomeStatus.not_converged):
        raise ValueError(limit.explain(code, S.dtype))
    return weight.S, verdict
