"""Rules applied to batches of weights, and what their outcomes mean for each weight.

Where processes hold the same weights, the owner of a batch applies its rule and sends the others
what the weights have become, with the outcome; each then remembers the same.
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
    """A rule that is to be applied to a batch."""

    batch: Batch
    run: Callable[[], Outcome]
    finite: Tensor | None  # what it must leave alone, where it does not look itself
    # Whether all replicas compute the same: from the image of the subspace, which they exchange.
    shared: bool
    renews: bool = False  # whether it is an application to weights that are watched


def step_task(seen: Look, eta: Tensor) -> Task:
    """A step of length eta."""
    batch, rule = seen.batch, seen.batch.rule
    run = functools.partial(rule.step, seen.S, seen.image, eta, batch.memory)
    return Task(batch, run, seen.finite, not rule.needs & {Need.gram, Need.whole})


def projection_task(batch: Batch, *, exact: bool) -> Task:
    """A hard limit: the limit itself, or of weights that are watched the target inside of it."""
    run = functools.partial(batch.rule.project, batch.S, batch.memory, exact=exact)
    return Task(batch, run, None, False, renews=not exact)


def apply(
    tasks: Sequence[Task], replicas: Replicas | None, due: bool | None
) -> tuple[Failures, list[Exception]]:
    """Applies rules; of replicas, the owner of a weight does so for the others.

    Weights for which that fails are left as they are. `due` says whether the steps follow from the
    movement of the weights; None: they are watched, and nothing is to be learned of their movement.
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
                    fatal = fatal or error  # the others wait: first they must learn of it
                outcome = Outcome.of(batch.S, OutcomeStatus.refused)
                errors.append(error)
                failures |= dict.fromkeys((s.name for s in batch.states), _refusal(batch, error))
        if batch.rule.differentiable and alone:
            _count_shortened(batch, outcome.status)
            continue  # nothing more to know, and nothing read from the device
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
    """Has the weights that were decomposed remember how."""
    spectra = outcome.spectra or [None] * len(batch.states)
    moved = torch.zeros_like(outcome.status) if outcome.moved is None else outcome.moved
    each = zip(batch.states, spectra, batch.each(*numbers), batch.each(moved), strict=True)
    for state, spectrum, own, (changed,) in each:
        worst = worst_of(*own)
        if worst.status >= 0:
            state.renew(worst, bool(changed.any()), spectrum)


def _store_(batch: Batch, outcome: Outcome, finite: Tensor | None) -> None:
    """Stores what a rule has not stored itself."""
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
    """Why a rule was not applied to a weight, by this process or by its owner."""
    if status is OutcomeStatus.not_finite:
        return HOLDS_NAN
    if not mine:
        return ELSEWHERE
    return f": {state.rule.explain(status, state.weight.parameters[0].dtype)}"


def _count_shortened(batch: Batch, status: Tensor) -> None:
    shortened = status == int(OutcomeStatus.shortened)
    for state, (own,) in zip(batch.states, batch.each(shortened), strict=True):
        state.shortened += own.sum().to(state.shortened.device)
