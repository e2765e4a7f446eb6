"""Estimates of weights during training: a few products each, one copy to the host.

Letters: S (..., m, n) a weight; sigma_1 its largest singular value; nu = min(m, n).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wellcond.linalg.spectrum import Method, Spectrum, compute_spectrum
from wellcond.operators.base import Dense, Operator
from wellcond.operators.norms import squared_norm_over
from wellcond.operators.sharded import ShardedMatrix
from wellcond.operators.subspace import Image, cold_start, krylov_image, lead, residual
from wellcond.report.estimate import NOT_FINITE, Estimate
from wellcond.rules.base import Rule
from wellcond.training.batch import group_weights, look_closely
from wellcond.training.state import WeightState, name_meta_weights

# A cold block of _WIDTH vectors is within 0.5 % of sigma_1 of a Gaussian matrix (1024, 1024) after
# _SWEEPS sweeps, and within 7 % after 2; one of _WIDE vectors needs only _WIDE_SWEEPS.
_WIDTH, _SWEEPS = 8, 8
_WIDE, _WIDE_SWEEPS = 32, 5


def estimate_weights(
    states: Sequence[WeightState],
    block_size: int,
    condition_numbers: bool = False,
    *,
    remember: bool = False,
) -> dict[str, Estimate]:
    """Returns an estimate for every matrix by name; the states change only if `remember`."""
    following = [state for state in states if state.follows_subspace]
    rows: dict[str, Tensor] = {}
    for batch in group_weights(following, [state.operator() for state in following]):
        width = batch.states[0].width
        S, image = look_closely(batch, _SWEEPS if width < _WIDE else _WIDE_SWEEPS)
        columns = _measure_image(batch.rule, S, image)
        for state, (row,) in zip(batch.states, batch.each(columns), strict=True):
            rows[state.name] = row
        if remember:
            batch.remember(lead(image, width))
    for state in states:
        if state.name not in rows:
            # This weight keeps no subspace; for a report a new one is accurate enough.
            S = state.operator()
            cold = cold_start(S, min(block_size, _WIDTH, S.nu), state.name)
            rows[state.name] = _measure_image(state.rule, S, krylov_image(S, cold, _SWEEPS))
    found: dict[str, Estimate] = {}
    with name_meta_weights(states):
        on_host = _on_host(states, rows)
    for state, numbers in zip(states, on_host, strict=True):
        spectra = _spectra(state) if condition_numbers else [None] * len(numbers)
        names = [member.name for member in state.weight.members()]
        for name, own, spectrum in zip(names, numbers, spectra, strict=True):
            found[name] = _estimate(state, own, spectrum)
    return found


def _on_host(states: Sequence[WeightState], rows: dict[str, Tensor]) -> list[list[list[float]]]:
    """Copies the numbers of all weights to the host at once: rows per weight and matrix."""
    each = [rows[s.name].reshape(-1, rows[s.name].shape[-1]) for s in states]
    device = each[0].device
    together = []
    for state, own in zip(states, each, strict=True):
        counts = torch.stack([state.shortened.double(), state.crowded.double()])
        together.append(torch.cat([own, counts.expand(len(own), 2)], dim=1).to(device))
    numbers: list[list[float]] = torch.cat(together).tolist()
    return [[numbers.pop(0) for _ in one] for one in each]


def _measure_image(rule: Rule, S: Operator, image: Image) -> Tensor:
    sigma = image.top.sigma[..., 0]
    value = torch.full_like(sigma, math.nan)
    if rule.differentiable:
        value = rule.evaluate(S, image)[0]
    columns = [sigma, residual(S, image), squared_norm_over(S, sigma), value, image.finite]
    return torch.stack([column.double() for column in columns], dim=-1)


def _estimate(state: WeightState, row: list[float], spectrum: Spectrum | None) -> Estimate:
    sigma, error, stable_rank, value, finite, shortened, crowded = row
    status = "" if sigma > 0 else "zero: every singular value is 0"
    smallest = None
    if spectrum is not None and not status:
        # Exact up to rounding in float64; the penalty remains the bound from the estimate.
        largest, smallest = spectrum.singular_values[[0, -1]].tolist()
        stable_rank *= (sigma / largest) ** 2
        sigma, error = largest, 0.0
    if not finite:
        sigma = error = value = stable_rank = math.nan
        status = NOT_FINITE
    rule, pace, record = state.rule, state.pace, state.record
    watched = record.steps > 0
    excess = record.largest if watched else pace.excess
    kappa_before = record.condition_number if watched else pace.condition_number
    return Estimate(
        sigma_max=sigma,
        residual=error,
        stable_rank=stable_rank if sigma else math.nan,
        penalty=value,
        strength=rule.strength_at(state.step) if rule.differentiable else math.nan,
        step=state.step,
        shortened_steps=int(shortened),
        nu=min(state.shape[-2:]),
        condition_number=None if spectrum is None else spectrum.condition_number,
        sigma_min=smallest,
        crowded=bool(crowded),
        excess=_none_if_nan(excess),
        condition_before=_none_if_nan(kappa_before),
        sigma_before=_none_if_nan(record.value),
        interval=pace.interval or None,
        applications=record.applications if watched else None,
        applied_share=record.recent if watched else None,
        status=status,
    )


def _none_if_nan(number: float) -> float | None:
    return None if math.isnan(number) else number


def _spectra(state: WeightState) -> list[Spectrum]:
    S = state.operator()
    whole = S.gather() if isinstance(S, ShardedMatrix) else S
    assert isinstance(whole, Dense)
    each = whole.dense().reshape(-1, *state.shape[-2:])
    return [_spectrum(S) for S in each]


def _spectrum(S: Tensor) -> Spectrum:
    if not bool(torch.isfinite(S).all()):
        return Spectrum(torch.full((2,), math.nan), Method.svd, S.shape)
    return compute_spectrum(S)
