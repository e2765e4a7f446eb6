"""A hard limit or an isometry step applied to the weights of a batch, and what was seen of them.

What was seen of a weight are three numbers: by what factor it exceeded its limit, its condition
number, and the outcome: 1 if the weight passed unchanged, negative if its limit was not applied,
else 0. As numbers they travel between processes that hold the same weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from wellcond.linalg.checks import in_float64
from wellcond.operators.base import Dense, NewWeight, Updatable, WeightOperator
from wellcond.operators.rounding import widest_dtype
from wellcond.operators.stored import StoredMatrix
from wellcond.rules.base import Limit
from wellcond.rules.enforce import Enforced, enforce
from wellcond.rules.isometry import IsometryStep
from wellcond.rules.limit import SpectralLimit
from wellcond.text import out_of_memory
from wellcond.training.batch import Batch
from wellcond.training.failures import Failures, reason
from wellcond.training.state import WeightState

FAILED, NOT_FINITE = -1.0, -2.0  # outcomes of a limit that was not applied


def stored_matrices(batch: Batch) -> list[StoredMatrix]:
    return [cast(StoredMatrix, S) for S in batch.operators]


def store_(batch: Batch, new: NewWeight) -> None:
    for S, own in zip(batch.operators, batch.each(*new.tensors), strict=True):
        cast(Updatable, S).update_(NewWeight.of(own))


def learn_scales(batch: Batch) -> None:
    """Finds the scale of the weights under `IsometryStep` that have none yet."""
    if all(bool((state.scale > 0).all()) for state in batch.states):
        return
    found = cast(IsometryStep, batch.rule).scale_of(batch.S)
    for state, (own,) in zip(batch.states, batch.each(found), strict=True):
        state.learn_scale(own)


def apply_(batch: Batch, failures: Failures) -> list[Tensor]:
    """Applies the hard limit or the isometry step of a batch; what was seen of every weight."""
    rule, states = batch.rule, batch.states
    unknown = torch.full((), math.nan, dtype=torch.float64, device="cpu")
    if isinstance(rule, IsometryStep):
        finite = [bool(S.finite().all()) for S in batch.operators]
        _step_([pair for pair, fit in zip(zip(*batch, strict=True), finite, strict=True) if fit])
        return [observation(unknown, unknown, 0.0 if fit else NOT_FINITE) for fit in finite]
    if isinstance(rule, SpectralLimit):
        weights = stored_matrices(batch)
        found = enforce(
            weights,
            rule,
            gate=all(state.pace.obeyed for state in states),
            condition_number=_worst([state.pace.condition_number for state in states]),
        )
        return [
            _outcome(state, S, rule, one, failures)
            for state, S, one in zip(states, weights, found, strict=True)
        ]
    ((state,), (S,)) = states, batch.operators
    stored = cast(Dense, S).dense()
    if not bool(torch.isfinite(stored).all()):
        return [observation(unknown, unknown, NOT_FINITE)]
    try:
        # A copy: an `apply` that writes to S and then fails must leave the weight as it is.
        values = cast(Limit, rule).apply(stored.clone())
    except Exception as error:
        if out_of_memory(error):
            raise
        failures[state.name] = f": {reason(error)}"
        return [observation(unknown, unknown, FAILED)]
    if not _fits(values, stored):
        failures[state.name] = (
            f": `{type(rule).__name__}.apply` must return a finite tensor of the shape "
            f"{tuple(stored.shape)}, in {stored.dtype} on {stored.device}, got {_words(values)}. "
            "The weight was left as it is."
        )
        return [observation(unknown, unknown, FAILED)]
    obeys = torch.equal(values, stored)
    if not obeys:
        cast(Updatable, S).update_(NewWeight(values.detach()))
    return [observation(unknown, unknown, float(obeys))]


def _fits(values: object, S: Tensor) -> bool:
    """Whether what the `apply` of a limit returned can be stored in place of S."""
    return (
        isinstance(values, Tensor)
        and (values.shape, values.dtype, values.device) == (S.shape, S.dtype, S.device)
        and bool(torch.isfinite(values).all())
    )


def _words(values: object) -> str:
    if not isinstance(values, Tensor):
        return type(values).__name__
    found = f"the shape {tuple(values.shape)}, in {values.dtype} on {values.device}"
    if values.is_meta or bool(torch.isfinite(values).all()):
        return found
    return f"{found}, with NaN or infinity"


def _step_(batch: Sequence[tuple[WeightState, WeightOperator]]) -> None:
    """An isometry step of these weights under one rule."""
    if not batch:
        return
    states = [state for state, _ in batch]
    with contextlib.ExitStack() as opened:
        spread = [opened.enter_context(cast(StoredMatrix, S).spread()) for _, S in batch]
        there = Batch(states, list(spread))
        device = spread[0].device
        scales = [S.held(state.scale) for S, state in zip(spread, states, strict=True)]
        scale = scales[0] if len(scales) == 1 else torch.stack(scales)
        rule = cast(IsometryStep, there.rule)
        store_(there, rule.step(there.S, scale.to(device, widest_dtype(device))))


def _outcome(
    state: WeightState, S: StoredMatrix, rule: SpectralLimit, found: Enforced, failures: Failures
) -> Tensor:
    """What was seen of a weight to which a limit was applied; why it has failed, if so."""
    outcome = float(found.passed)
    if (failure := found.failure(rule, S.S.dtype)) is not None:
        failures[state.name], outcome = f": {failure}", FAILED
    # Nothing is known of a matrix that is zero, that passed, or that is not finite.
    elif bool(torch.isnan(found.excess).any()) and not bool(S.finite().all()):
        outcome = NOT_FINITE
    return observation(found.excess, found.condition_number, outcome)


def _worst(numbers: Sequence[float]) -> float:
    """The largest, nan if one is."""
    return math.nan if any(map(math.isnan, numbers)) else max(numbers)


def observation(excess: Tensor, condition_number: Tensor, outcome: float = 0.0) -> Tensor:
    """Excess and kappa, the worst of a stack, and the outcome, as three numbers.

    The outcome is 1 if the weight passed unchanged, negative if its limit was not applied, else 0.
    """
    worst = [
        torch.nan_to_num(in_float64(x), nan=-math.inf, posinf=math.inf).max()
        for x in (excess, condition_number)
    ]
    known = [torch.where(x == -math.inf, math.nan, x) for x in worst]
    return torch.stack([*known, torch.full_like(known[0], outcome)])
