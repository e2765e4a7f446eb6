"""Applies rules to batches of weights and records the outcome for each weight.

Among processes with the same weights, the owner of a batch applies its rule and sends the new
weights and the outcome to the others. Every process then records the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, empty_like

from wellcond.operators.base import Dense, NewWeight, Updatable
from wellcond.rules.base import Need
from wellcond.rules.outcome import Outcome, OutcomeStatus, worst_of
from wellcond.text import is_out_of_memory
from wellcond.training.batch import Batch, Look
from wellcond.training.failures import ELSEWHERE, HOLDS_NAN, Failures, describe_error
from wellcond.training.record import Record
from wellcond.training.replicas import Replicas
from wellcond.training.state import WeightState


class Task(NamedTuple):
    """A rule to apply to a batch."""

    batch: Batch
    run: Callable[[], Outcome]
    finite: Tensor | None  # which weights are finite; None if the rule checks this itself
    # Whether all replicas compute the same, from the image of the subspace that they exchange.
    shared: bool
    renews: bool = False  # whether the weights are watched


def step_task(seen: Look, eta: Tensor) -> Task:
    """A proximal step of length eta."""
    batch, rule = seen.batch, seen.batch.rule
    run = functools.partial(rule.step, seen.S, seen.image, eta, batch.memory)
    return Task(batch, run, seen.finite, not rule.needs & {Need.gram, Need.whole})


def projection_task(batch: Batch, *, exact: bool) -> Task:
    """A projection to a hard limit, or, for watched weights, to the target inside the limit."""
    run = functools.partial(batch.rule.project, batch.S, batch.memory, exact=exact)
    return Task(batch, run, None, False, renews=not exact)


def apply(
    tasks: Sequence[Task], replicas: Replicas | None, due: bool | None
) -> tuple[Failures, list[Exception]]:
    """Applies rules; among replicas, the owner of a weight applies its rule for the others.

    If that fails for a weight, the weight does not change. `due` is whether the weights were due by
    their movement; None if they are watched, so that there is nothing to learn about it.
    """
    failures: Failures = {}
    errors: list[Exception] = []
    fatal: Exception | None = None
    received: list[tuple[Batch, Sequence[Tensor], list[Tensor]]] = []
    exchanged: list[tuple[int, Tensor]] = []
    results: list[tuple[Batch, Sequence[Tensor], bool]] = []
    renewed: list[tuple[WeightState, Tensor]] = []
    for batch, run, finite, shared, renews in tasks:
        owner = batch.states[0].owner
        alone = replicas is None or shared
        mine = replicas is None or shared or replicas.rank == owner
        outcome = Outcome.of(batch.S, OutcomeStatus.refused)
        if mine:
            try:
                outcome = run()
                _store_(batch, outcome, finite)
            except Exception as error:
                if is_out_of_memory(error) or batch.lacks_values():
                    if replicas is None:
                        raise
                    fatal = fatal or error  # raised after the exchange, for which the others wait
                outcome = Outcome.of(batch.S, OutcomeStatus.refused)
                errors.append(error)
                failures |= dict.fromkeys((s.name for s in batch.states), _refusal(batch, error))
        if batch.rule.differentiable and alone:
            _count_shortened(batch, outcome.status)
            continue  # the rest is known already, so nothing is read from the device
        numbers: Sequence[Tensor] = outcome.numbers()
        if not alone:
            device = batch.operators[0].device
            numbers = [one.to(device) for one in numbers]
            values = [cast(Dense, S).dense().contiguous() for S in batch.operators]
            if not mine:
                values = [empty_like(one) for one in values]
                received.append((batch, numbers, values))
            exchanged += [(owner, one) for one in (*numbers, *values)]
        if renews:
            if mine:
                _renew(batch, outcome, numbers)
            records = [state.record.to_tensor() for state in batch.states]
            if not alone:
                records = [one.to(batch.operators[0].device) for one in records]
                exchanged += [(owner, one) for one in records]
                exchanged += [(owner, one) for s in batch.states for one in s.sight.values()]
            renewed += zip(batch.states, records, strict=True)
        results.append((batch, numbers, mine))
    if replicas is not None:
        replicas.exchange_(exchanged)
    for batch, numbers, values in received:
        for S, new, (own, *_) in zip(batch.operators, values, batch.each(*numbers), strict=True):
            if int(own.min()) >= 0:
                cast(Updatable, S).update_(NewWeight(new))
    for state, record in renewed:
        state.record = Record.from_tensor(record)
    if fatal is not None:
        raise fatal
    for batch, numbers, mine in results:
        if batch.rule.differentiable:
            _count_shortened(batch, numbers[0])
        for state, each in zip(batch.states, batch.each(*numbers), strict=True):
            worst = worst_of(*each)
            if worst.status >= 0:
                if due is not None:
                    state.learn(worst, due)
            elif state.name not in failures:
                failures[state.name] = _explain(state, worst.status, mine)
    return failures, errors


def _renew(batch: Batch, outcome: Outcome, numbers: Sequence[Tensor]) -> None:
    """Records the decompositions of the weights."""
    spectra = outcome.spectra or [None] * len(batch.states)
    moved = torch.zeros_like(outcome.status) if outcome.moved is None else outcome.moved
    each = zip(batch.states, spectra, batch.each(*numbers), batch.each(moved), strict=True)
    for state, spectrum, own, (changed,) in each:
        worst = worst_of(*own)
        if worst.status >= 0:
            state.renew(worst, bool(changed.any()), spectrum)


def _store_(batch: Batch, outcome: Outcome, finite: Tensor | None) -> None:
    """Stores the new weights, unless the rule has done so itself."""
    new = outcome.new
    if new is None:
        return
    if finite is not None and not (finite.is_cpu and bool(finite.all())):
        new = new.where(finite, cast(Dense, batch.S))
    cast(Updatable, batch.S).update_(new)


def _refusal(batch: Batch, error: Exception) -> str:
    if batch.rule.differentiable:
        return f": its penalty could not take a step: {describe_error(error)}"
    return f": {describe_error(error)}"


def _explain(state: WeightState, status: OutcomeStatus, mine: bool) -> str:
    """Why this process, or the owner of a weight, could not apply a rule to it."""
    if status is OutcomeStatus.not_finite:
        return HOLDS_NAN
    if not mine:
        return ELSEWHERE
    return f": {state.rule.explain(status, state.weight.parameters[0].dtype)}"


def _count_shortened(batch: Batch, status: Tensor) -> None:
    shortened = status == int(OutcomeStatus.shortened)
    for state, (own,) in zip(batch.states, batch.each(shortened), strict=True):
        state.shortened += own.sum().to(state.shortened.device)
