"""Estimates of weights during training: a few products each, no SVD, one copy to the host.

Letters: S (..., m, n) a weight; sigma_1 its largest singular value; nu = min(m, n).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wellcond.linalg.spectrum import compute_spectrum
from wellcond.operators.base import Dense, Operator
from wellcond.operators.norms import squared_norm_over
from wellcond.operators.sharded import ShardedMatrix
from wellcond.operators.subspace import Image, cold_start, refine, residual, warm_up
from wellcond.report.estimate import Estimate
from wellcond.rules.base import Rule
from wellcond.training.batch import group_weights, look
from wellcond.training.state import WeightState, name_meta_weights


def estimate_weights(
    states: Sequence[WeightState], block_size: int, condition_numbers: bool = False
) -> dict[str, Estimate]:
    """Returns an estimate for every matrix by name; the stored states do not change."""
    following = [state for state in states if state.follows_subspace]
    rows: dict[str, Tensor] = {}
    for seen in look(group_weights(following, [state.operator() for state in following])):
        assert seen.image is not None
        columns = _measure_image(seen.batch.rule, seen.S, seen.image)
        for state, (row,) in zip(seen.batch.states, seen.batch.each(columns), strict=True):
            rows[state.name] = row
    for state in states:
        if state.name not in rows:
            # This weight keeps no subspace; for a report a new one is accurate enough.
            S = state.operator()
            cold = cold_start(S, min(block_size, S.nu), state.name)
            rows[state.name] = _measure_image(state.rule, S, refine(S, warm_up(S, cold))[0])
    found: dict[str, Estimate] = {}
    with name_meta_weights(states):
        on_host = _on_host(states, rows)
    for state, numbers in zip(states, on_host, strict=True):
        kappas = _condition_numbers(state) if condition_numbers else [None] * len(numbers)
        names = [member.name for member in state.weight.members()]
        for name, own, kappa in zip(names, numbers, kappas, strict=True):
            found[name] = _estimate(state, own, kappa)
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


def _estimate(state: WeightState, row: list[float], kappa: float | None) -> Estimate:
    sigma, error, stable_rank, value, finite, shortened, crowded = row
    status = "" if sigma > 0 else "zero: every singular value is 0"
    if not finite:
        sigma = error = value = stable_rank = math.nan
        status = "not finite: contains NaN or infinity"
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
        condition_number=kappa,
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


def _condition_numbers(state: WeightState) -> list[float | None]:
    S = state.operator()
    whole = S.gather() if isinstance(S, ShardedMatrix) else S
    assert isinstance(whole, Dense)
    each = whole.dense().reshape(-1, *state.shape[-2:])
    return [
        compute_spectrum(S).condition_number if bool(torch.isfinite(S).all()) else math.nan
        for S in each
    ]
