"""Bounds on singular values, enforced on weights as they are stored.

One decomposition of the smaller Gram matrix shows which singular values must move (see
`linalg.projection`), and one update moves them. The result is rounded to the dtype of the weight
and measured in float64. If it is outside the bounds, the margin grows by the excess, and the
original weight is projected again. The precision depends on the weight: float32 if it is already
well-conditioned, as in training; otherwise float64; and an SVD if rounding of the Gram matrix hides
the smallest singular values.

Letters: S (..., m, n) a weight; sigma its singular values, descending; kappa = sigma_1/sigma_nu; t
the margin: before rounding, the weight satisfies bounds that are tighter by 1 + t.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from wellcond.linalg.lapack import svd
from wellcond.linalg.projection import (
    GramDecomposition,
    are_within_bounds,
    decompose_gram,
    resolvable_condition_number,
)
from wellcond.linalg.scaling import split_scale
from wellcond.linalg.spectrum import Spectrum, combine_spectra, compute_spectrum, rank_tolerance
from wellcond.operators.base import NewWeight, SpectralOperator

# A limit must also hold if it is measured with another number of threads, which changes less.
_SLACK = 1e-8
_ROUNDS = 8
# The error of kappa of a projection in float32, in units of u kappa^2: 1 to 5 for most spectra, up
# to 25 if all values but one are equal.
_NARROW_MISS = 10
# The error of kappa, _NEAR u kappa^2 in float32, that is accepted at a target inside the limit.
_NEAR, _NEAR_MISS = 10, 0.05
_NEAR_WIDE = 5e4  # demands n u kappa^2 < 1e-6 in float64
# The accepted relative error of a singular value by rounding of an update.
CANCELS = 1e-6
# The number of Gram matrix entries that are processed at once: 128 MB of float64.
_TOGETHER = 1 << 24


class Bounds(abc.ABC):
    """Bounds on the singular values of a matrix."""

    # Whether the bounds of each singular value are independent of the other values.
    is_separable: ClassVar[bool] = False

    @abc.abstractmethod
    def clip(self, sigma: Tensor, margin: Tensor, unit: float = 1.0) -> Tensor:
        """The values nearest to sigma (..., nu), in this unit, in bounds tighter by the margin."""

    @abc.abstractmethod
    def excess(self, largest: Tensor, smallest: Tensor, unit: float = 1.0) -> Tensor:
        """The factor by which the bounds are exceeded: at most 1 if they hold, nan if S = 0."""

    def matters(self, smallest: Tensor) -> Tensor:
        """The size down to which singular values must be resolved, given the smallest one."""
        return smallest

    @abc.abstractmethod
    def interval(self, largest: Tensor) -> tuple[Tensor, Tensor]:
        """The interval [low, high] of allowed values, given the largest singular value."""


class Aim(Protocol):
    """Bounds that must hold until the next application, and therefore a target inside them."""

    @property
    def bounds(self) -> Bounds: ...

    @property
    def target(self) -> Bounds: ...

    def move(self, sigma: Tensor) -> Tensor:
        """The new values of descending singular values (..., nu), equal for those that stay."""

    def survives(self, nu: int, u: float) -> bool:
        """Whether rounding to a dtype with unit roundoff u leaves the target within the bounds."""


class Verdict(NamedTuple):
    """The measurements of every matrix before, and the margin that it needed; float64 (...).

    The margin is inf if no nearby matrix satisfies the bounds after rounding to the dtype, and nan
    if LAPACK does not converge. Such matrices remain unchanged.
    """

    excess: Tensor
    condition_number: Tensor
    margin: Tensor


def project(
    weights: Sequence[SpectralOperator],
    bounds: Bounds,
    *,
    gate: bool = False,
    condition_number: float = math.nan,
) -> list[Verdict]:
    """Replaces every weight outside the bounds by a nearest one that is within them as stored.

    The bounds apply to each matrix of a stack separately. The groups of a convolution are blocks of
    one map, so the bounds apply to them together. If the groups are spread over processes, the
    bounds apply to each group separately.

    Args:
        weights: of one shape and dtype, complete or sharded; those within the bounds remain
            unchanged bit for bit.
        gate: first check by two Cholesky factorisations whether the weights are within the bounds.
            The measurements of a weight that passes are nan.
        condition_number: kappa before the last projection, if known; it predicts whether float32
            suffices.

    Returns:
        One verdict per weight.
    """
    if weights[0].is_one_map:
        return [_project_map(S, bounds) for S in weights]
    several = _count_together(weights[0])
    narrow = 1.5 * condition_number < resolvable_condition_number(torch.float32)
    verdicts = []
    for first in range(0, len(weights), several):
        verdicts += _project_chunk(weights[first : first + several], bounds, gate, narrow)
    return verdicts


def _project_chunk(
    weights: Sequence[SpectralOperator], bounds: Bounds, gate: bool, narrow: bool
) -> list[Verdict]:
    with contextlib.ExitStack() as opened:
        spread = [opened.enter_context(S.spread()) for S in weights]
        chunk = _Chunk(spread, bounds)
        verdict, done = chunk.project(gate, narrow)
        each = [Verdict(*own) for own in zip(*verdict, strict=True)]
    for i, S in enumerate(weights):
        with contextlib.ExitStack() as opened:
            one = spread[i]
            if not bool((done[i] | torch.isinf(verdict.margin[i])).all()):
                one = opened.enter_context(S.spread(whole=True))
                each[i] = _project_by_svd(one, bounds, done[i], each[i])
            each[i] = Verdict(*(one.all_of(number) for number in each[i]))
    return each


class Approach(NamedTuple):
    """What was done to one weight, per matrix.

    Attributes:
        verdict: the measurements before, relative to the bounds, not to the target.
        moved: whether the matrix was projected.
        spectrum: the new decomposition of the weight; None if unknown.
    """

    verdict: Verdict
    moved: Tensor
    spectrum: GramDecomposition | None


def approach(weights: Sequence[SpectralOperator], aim: Aim) -> list[Approach]:
    """Moves the weights to a target inside their bounds, without measuring them afterwards.

    Because the target leaves room, a Gram matrix in float32 suffices for a well-conditioned weight.
    `project` handles the weights that no Gram matrix resolves.
    """
    if weights[0].is_one_map and not aim.bounds.is_separable:
        maps = [_project_map(S, aim.target) for S in weights]
        return [Approach(one, one.excess > 1, None) for one in maps]
    found = []
    several = _count_together(weights[0])
    for first in range(0, len(weights), several):
        found += _approach_chunk(weights[first : first + several], aim)
    return found


def _approach_chunk(weights: Sequence[SpectralOperator], aim: Aim) -> list[Approach]:
    with contextlib.ExitStack() as opened:
        spread = [opened.enter_context(S.spread()) for S in weights]
        chunk = _Chunk(spread, aim.bounds)
        pair = chunk.approach(aim)
        if pair is not None:
            before, after = pair
            stays = torch.ones(chunk.shape, dtype=torch.float64, device=chunk.device)
        else:  # decomposed in float64 to find the weights that stay
            after = chunk._decompose(chunk._gram(torch.float64))
            before = after.sigma
            same = (aim.move(before.flip(-1)).flip(-1) == before).all(-1)
            stays = (chunk._is_fine(after) & same).double()
        found = _report(spread, aim, before, after)
        # If a stack is spread over processes, each process has decided on its own matrices only.
        each = zip(spread, stays, strict=True)
        stay = [bool((S.all_of(one) > 0).all()) for S, one in each]
    left = [S for S, one in zip(weights, stay, strict=True) if not one]
    verdicts = iter(project(left, aim.target) if left else [])
    for i, own in enumerate(found):
        if not stay[i]:
            verdict = next(verdicts)
            numbers = own.verdict._replace(margin=verdict.margin)
            found[i] = Approach(numbers, own.moved | (verdict.excess > 1), None)
    return found


def _report(
    weights: Sequence[SpectralOperator], aim: Aim, before: Tensor, after: GramDecomposition
) -> list[Approach]:
    """The results for all weights, from their ascending singular values before."""
    largest, smallest = before[..., -1], before[..., 0]
    excess = aim.bounds.excess(largest, smallest)
    numbers = excess, largest / smallest, torch.zeros_like(excess)
    moved = (after.sigma != before).any(dim=-1)
    return [
        Approach(
            Verdict(*(S.all_of(number[i]) for number in numbers)),
            S.all_of(moved[i].double()) > 0,
            # In one dtype, because processes may decompose their matrices in different dtypes.
            GramDecomposition(S.all_of(after.sigma[i]), S.all_of(after.V[i].to(S.dtype))),
        )
        for i, S in enumerate(weights)
    ]


def _count_together(S: SpectralOperator) -> int:
    """The number of weights like this one that are processed at once."""
    *stack, m, n = S.shape
    return max(1, _TOGETHER // max(1, math.prod(stack) * min(m, n) ** 2))


def _project_map(S: SpectralOperator, bounds: Bounds) -> Verdict:
    """Projects one map by an SVD, because the groups of a convolution are small."""
    with S.spread() as whole:
        X, numbers = _try_svd(whole.S.clone(), bounds)
        if not torch.equal(X, whole.S):
            whole.update_(NewWeight(X))
    return Verdict(*(number.expand(S.shape[:-2]) for number in numbers))


class _Chunk:
    """Weights whose Gram matrices are processed as one batch."""

    def __init__(self, weights: Sequence[SpectralOperator], bounds: Bounds) -> None:
        self.weights, self.bounds = weights, bounds
        self.shape = (len(weights), *weights[0].shape[:-2])
        self.u = torch.finfo(weights[0].S.dtype).eps / 2
        self.device = weights[0].device

    def project(self, gate: bool, narrow: bool) -> tuple[Verdict, Tensor]:
        """The verdicts, and which matrices are done; the others need more than a Gram matrix."""
        unknown = torch.full(self.shape, math.nan, dtype=torch.float64, device=self.device)
        if gate:
            G = self._gram(torch.float64)
            if bool(self._agree(lambda: self._passes(G)).bool().all()):
                margin = torch.zeros_like(unknown)
                return Verdict(unknown, unknown, margin), torch.ones_like(unknown).bool()
        for dtype in (torch.float32, torch.float64):
            if dtype == torch.float32 and (not narrow or self.weights[0].dtype == torch.float64):
                continue
            spectrum = self._decompose(self._gram(dtype))
            if bool(self._is_resolved(spectrum).all()):
                break
        return self._project(spectrum)

    def approach(self, aim: Aim) -> tuple[Tensor, GramDecomposition] | None:
        """The singular values before, and the decomposition after; None if both are unresolved."""
        if not aim.survives(self.weights[0].nu, self.u):
            return None
        for dtype in (torch.float32, torch.float64):
            if dtype == torch.float32 and self.weights[0].dtype == torch.float64:
                continue
            spectrum = self._decompose(self._gram(dtype))
            sigma, u = spectrum.sigma, torch.finfo(dtype).eps / 2
            error = _NEAR * u if dtype == torch.float32 else _NEAR_WIDE * sigma.shape[-1] * u
            kappa = sigma[..., -1] / self.bounds.matters(sigma[..., 0])
            # An update nearly cancels a weight that exceeds its bound by far.
            excess = self.bounds.excess(sigma[..., -1], sigma[..., 0])
            near = excess < CANCELS / torch.finfo(dtype).eps
            if bool((near & (error * kappa.square() < _NEAR_MISS)).all()):
                break
        else:
            return None
        target = aim.move(sigma.flip(-1)).flip(-1)
        moved = (target != sigma).any(dim=-1)
        if bool(moved.any()):
            V, d = spectrum.move(target)
            for i, S in enumerate(self.weights):
                S.rescale_(V[i], d[i], S.S, moved[i])
        return sigma, GramDecomposition(target, spectrum.V)

    def _is_resolved(self, spectrum: GramDecomposition) -> Tensor:
        """Whether the Gram matrix decides the case; it does not for a matrix on the bound."""
        least, most = (self.bounds.excess(*spectrum.extremes(apart)) for apart in (-1, 1))
        # An update of S nearly cancels a matrix that exceeds its bound by far.
        near = most < CANCELS / torch.finfo(spectrum.V.dtype).eps
        return self._is_fine(spectrum) & (((least > 1) & near) | (most <= 1))

    def _is_fine(self, spectrum: GramDecomposition) -> Tensor:
        return spectrum.resolved(self.bounds.matters(spectrum.sigma[..., 0]))

    def _project(self, spectrum: GramDecomposition) -> tuple[Verdict, Tensor]:
        sigma = spectrum.sigma.flip(-1)
        largest, smallest = sigma[..., 0], sigma[..., -1]
        excess, kappa = self.bounds.excess(largest, smallest), largest / smallest
        resolved = self._is_resolved(spectrum)
        margin = torch.zeros_like(excess)
        moved = resolved & (excess > 1)
        done = resolved & ~moved
        if not bool(moved.any()):
            return Verdict(excess, kappa, margin), done
        originals = [S.S.clone() for S in self.weights]
        most = largest

        def store(margin: Tensor) -> None:
            nonlocal most
            target = torch.where(moved[..., None], self.bounds.clip(sigma, margin), sigma)
            # The larger part of the margin is for the smallest value.
            most = target[..., 0] * (1 + margin / 4)
            V, d = spectrum.move(target.flip(-1))
            for i, S in enumerate(self.weights):
                S.rescale_(V[i], d[i], originals[i], moved[i])

        def after() -> Tensor:
            G = self._gram(torch.float64)
            return self._agree(lambda: self._excess(G, most)).where(moved, 0.0)

        # The effect of rounding on the smallest singular value grows with kappa.
        target = self.bounds.clip(sigma, margin)
        share = 4 + 0.02 * target[..., 0] / self.bounds.matters(target[..., -1])
        first = (self.u * share if self.u < 1e-6 else 0 * share).clamp_min(2 * _SLACK)
        if spectrum.V.dtype == torch.float32:  # an initial margin saves a round
            u, ratio = torch.finfo(torch.float32).eps / 2, largest / self.bounds.matters(smallest)
            first = first.maximum((_NARROW_MISS * u * (ratio.square() + 1)).where(moved, 0.0))
        try:
            stored, margin = _store_with_margin(first, store, after, self.u)
        except _NoMarginError:
            # The caller falls back to an SVD, which avoids the cancellation in S + S V D V^T.
            self._restore(originals, moved)
            return Verdict(excess, kappa, margin), done
        self._restore(originals, moved & ~stored)
        return Verdict(excess, kappa, margin), done | (moved & stored)

    def _restore(self, originals: list[Tensor], chosen: Tensor) -> None:
        for i, S in enumerate(self.weights):
            if bool(chosen[i].any()):
                nothing = originals[i].new_zeros(*self.shape[1:], S.nu, 0)
                S.rescale_(nothing, nothing[..., 0, :], originals[i], chosen[i])

    def _gram(self, dtype: torch.dtype) -> Tensor:
        return torch.stack([S.gram(dtype) for S in self.weights])

    def _decompose(self, G: Tensor) -> GramDecomposition:
        def parts() -> tuple[Tensor, Tensor]:
            # NaN, which is never resolved, marks values out of range or without a decomposition.
            fit = _is_in_range(G)[..., None]
            spectrum = decompose_gram(torch.where(fit[..., None], G, 0.0))
            if spectrum is None:
                return torch.full_like(sigma, torch.nan), G
            return spectrum.sigma.where(fit, torch.nan), spectrum.V

        sigma = G.new_empty(G.shape[:-1], dtype=torch.float64)
        return GramDecomposition(*self.weights[0].agree(parts, sigma, G))

    def _passes(self, G: Tensor) -> Tensor:
        """1 if two Cholesky factorisations show that a matrix is within the bounds, else 0."""
        x = G.diagonal(dim1=-2, dim2=-1).clone()[..., None]
        for _ in range(30):
            x = G @ (x / torch.linalg.vector_norm(x, dim=-2, keepdim=True))
        largest = torch.linalg.vector_norm(x, dim=(-2, -1)).sqrt() * 1.01
        return (are_within_bounds(G, *self.bounds.interval(largest)) & _is_in_range(G)).double()

    def _excess(self, G: Tensor, largest: Tensor) -> Tensor:
        """The factor by which stored matrices exceed the bounds: 0 if they do not, nan if unknown.

        Their largest singular value is `largest` or slightly less.
        """
        holds = are_within_bounds(G, *self.bounds.interval(largest))
        if bool(holds.all()):
            return torch.zeros_like(largest)
        spectrum = decompose_gram(G, vectors=False)
        if spectrum is None:
            return torch.full_like(largest, torch.nan).where(~holds, 0.0)
        excess = self.bounds.excess(*spectrum.extremes(1))
        return torch.where(holds, 0.0, excess.where(self._is_fine(spectrum), torch.nan))

    def _agree(self, compute: Callable[[], Tensor]) -> Tensor:
        like = torch.empty(self.shape, dtype=torch.float64, device=self.device)
        (result,) = self.weights[0].agree(lambda: (compute(),), like)
        return result


def _is_in_range(G: Tensor) -> Tensor:
    """Whether the squares in a Gram matrix have neither overflowed nor vanished."""
    largest, tiny = G.abs().amax(dim=(-2, -1)), torch.finfo(G.dtype).tiny
    fit: Tensor = (largest > tiny**0.6) & (largest < tiny**-0.6)
    return fit


def _project_by_svd(S: SpectralOperator, bounds: Bounds, done: Tensor, before: Verdict) -> Verdict:
    """Projects the matrices of a complete weight that are not done, by one SVD each in float64."""
    verdict, values = [one.clone() for one in before], S.S.clone()
    for index in (~done).nonzero().tolist():
        at = tuple(index)
        three = torch.empty(3, dtype=torch.float64, device=S.device)
        X, numbers = S.agree(functools.partial(_try_svd, values[at], bounds), values[at], three)
        values[at] = X
        for one, number in zip(verdict, numbers, strict=True):
            one[at] = number
    S.update_(NewWeight(values))
    return Verdict(*verdict)


def _try_svd(S: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """`_nearest_stored`; the margin is nan if LAPACK fails, so that all processes learn of it."""
    try:
        return _nearest_stored(S, bounds)
    except ValueError:
        return S, torch.full((3,), math.nan, dtype=torch.float64, device=S.device)


def _nearest_stored(S: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """A nearest matrix (m, n) that is within the bounds as stored, and a verdict.

    Without such a matrix the margin is inf. For (g, m, n), a nearest block-diagonal matrix.
    """
    unknown = torch.tensor([math.nan, math.nan, 0.0], dtype=torch.float64, device=S.device)
    if not bool(torch.isfinite(S).all()):
        return S, unknown
    spectrum = _spectrum(S)
    excess = _excess_of(spectrum, bounds)
    unknown[0], unknown[1] = excess, spectrum.condition_number
    if not bool(excess > 1):
        return S, unknown
    wide, unit = split_scale(S)
    U, values, Vh = svd(wide)
    sigma, order = values.flatten().sort(descending=True, stable=True)
    X = S

    def store(margin: Tensor) -> None:
        nonlocal X
        clipped = sigma.scatter(0, order, bounds.clip(sigma, margin, unit)).view_as(values)
        X = ((U * clipped[..., None, :]) @ Vh * unit).to(S.device, S.dtype)

    def after() -> Tensor:
        if not bool(torch.isfinite(X).all()):
            return torch.full_like(excess, torch.inf)
        return _excess_of(_spectrum(X), bounds)

    try:
        first, u = torch.full_like(excess, 2 * _SLACK), torch.finfo(S.dtype).eps / 2
        _, unknown[2] = _store_with_margin(first, store, after, u)
    except _NoMarginError:
        X, unknown[2] = S, torch.inf
    return X, unknown


def _spectrum(S: Tensor) -> Spectrum:
    if S.ndim == 2:
        return compute_spectrum(S, extremes=True)
    return combine_spectra([compute_spectrum(block, extremes=True) for block in S])


def _excess_of(spectrum: Spectrum, bounds: Bounds) -> Tensor:
    largest, smallest = spectrum.scaled[0], spectrum.scaled[-1]
    zero = smallest <= rank_tolerance(spectrum.shape) * largest
    return bounds.excess(largest, torch.where(zero, 0.0, smallest), spectrum.unit)


class _NoMarginError(Exception):
    """No margin was large enough."""


def _store_with_margin(
    margin: Tensor, store: Callable[[Tensor], None], excess: Callable[[], Tensor], u: float
) -> tuple[Tensor, Tensor]:
    """Stores with growing margins until no bound is exceeded.

    Returns for which matrices the result was measured, and the margins. The margin first grows by
    1.25 times the excess of the stored matrix, then by 2, 8, 64, ... times that, because the effect
    of rounding changes, or does not change if rounding removes the growth. It grows by at least u/4
    times these factors, where u is the unit roundoff of the stored dtype.
    """
    for round in range(_ROUNDS):
        store(margin)
        reached = excess() * (1 + _SLACK)
        over = reached > 1
        if not bool(over.any()):
            return ~torch.isnan(reached), margin
        times = 2 ** (round * (round + 1) // 2)
        growth = (1 + times * (1.25 * (reached - 1)).clamp_min(u / 4)).clamp_max(16.0)
        margin = torch.where(over, (1 + margin) * growth - 1, margin)
    raise _NoMarginError
