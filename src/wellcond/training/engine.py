"""Applies rules to many weights at once: first one product with all of them, then the changes.

A weight that is not finite stops all penalties before any of them has acted. Hard limits are
applied to all other weights first, and then one error names those that have failed. The engine
computes the same in eager mode and within a compiled graph.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from wellcond.operators.base import (
    Gradient,
    HasGram,
    NewWeight,
    SpectralOperator,
    WeightOperator,
)
from wellcond.operators.rounding import full_precision
from wellcond.operators.stored import StoredMatrix
from wellcond.operators.subspace import Subspace, refine
from wellcond.rules.penalty import check_answer
from wellcond.rules.watch import Reading, Turn, Watch, look_at
from wellcond.text import quote_subject
from wellcond.training.application import apply, projection_task, step_task
from wellcond.training.batch import Batch, Look, group_weights, look
from wellcond.training.deferred import DeferredChecks, Sight
from wellcond.training.failures import HOLDS_NAN, Failures, raise_failures
from wellcond.training.replicas import Replicas
from wellcond.training.state import WeightState, raise_meta_weights

_GROUPINGS = 8  # batches of watched weights that are cached


class Engine:
    """The weights under rules, and the operations on all of them together."""

    def __init__(
        self, states: list[WeightState], replicas: Replicas | None, check_replicas: bool
    ) -> None:
        self.states = states
        self.replicas = replicas
        self.check_replicas = check_replicas
        self._checks = DeferredChecks()
        self._grouped: dict[object, tuple[list[WeightOperator], list[Batch]]] = {}
        self._sights: list[Sight] = []  # estimates that the host has not evaluated yet
        slots: dict[tuple[int, str], int] = {}
        for state in states:
            keys = [(id(source.owner), source.attribute) for source in state.weight.sources]
            state.slots = tuple(slots.setdefault(key, len(slots)) for key in keys)
        if replicas is not None:
            # Limits have no block (width 0) but decompose, so nu stands in for the width.
            costs = [math.prod(s.shape) * (s.width or min(s.shape[-2:])) for s in states]
            for state, owner in zip(states, replicas.owners(costs), strict=True):
                state.owner = owner

    def active(self) -> list[WeightState]:
        """The weights that are not frozen."""
        return [state for state in self.states if state.active]

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the active weights; those that several weights share occur once."""
        by_slot = {
            slot: parameter
            for state in self.active()
            for slot, parameter in zip(state.slots, state.weight.parameters, strict=True)
        }
        return [by_slot[slot] for slot in sorted(by_slot)]

    def _slots(self) -> list[int]:
        """The slots of `parameters()`."""
        return sorted({slot for state in self.active() for slot in state.slots})

    def penalty(self) -> Tensor:
        """Returns the sum of strength * penalty, differentiable."""
        parameters = self.parameters()
        total, codes, factors = self.total(parameters, torch.is_grad_enabled())
        result: Tensor = _Total.apply(self, total, codes, len(factors), *factors, *parameters)  # type: ignore[no-untyped-call]
        return result

    def total(
        self, parameters: Sequence[Tensor], remember: bool
    ) -> tuple[Tensor, list[int], list[Tensor]]:
        """Returns the sum of penalties, and the form and the factors of the gradient per batch."""
        with self._quietly():
            groups = self._batches(parameters)
            strengths = [_strengths(batch) for batch in groups]  # first, as a schedule can raise
            looks = self._look(groups, remember)
            evaluated = [_evaluate(*one) for one in zip(looks, strengths, strict=True)]
            first = self.states[0].strength
            total = torch.zeros((), dtype=first.dtype, device=first.device)
            codes: list[int] = []
            factors: list[Tensor] = []
            for seen, (value, gradient) in zip(looks, evaluated, strict=True):
                total = total + value.sum().to(total)
                codes.append(gradient.code)
                factors += gradient.tensors
                if remember:
                    _watch(seen)
                for state in seen.batch.states if remember else ():
                    state.advance()
            return total, codes, factors

    def blank_total(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Tensors with the shapes of the results of `total`, computed on meta tensors."""
        with self._quietly():
            groups = self._batches(parameters)
            blank = [
                parameters[0].new_empty((), dtype=self.states[0].strength.dtype),
                torch.empty(len(groups), dtype=torch.int64, device="cpu"),
            ]
            for batch in groups:
                first = batch.states[0]
                shape = (*batch.operators[0].shape,)
                if len(batch.states) > 1:
                    shape = (len(batch.states), *shape)
                S = StoredMatrix(torch.empty(shape, dtype=first.strength.dtype, device="meta"))
                image = None
                if first.follows_subspace:
                    image, _ = refine(S, _blank_start(S, first.width))
                gradient = batch.rule.gradient(S, image)
                blank += [
                    torch.empty(one.shape, dtype=one.dtype, device=batch.operators[0].device)
                    for one in gradient.tensors
                ]
        return blank

    def gradients(
        self,
        weight: Tensor,
        codes: Sequence[int],
        factors: Sequence[Tensor],
        parameters: Sequence[Tensor],
    ) -> list[Tensor]:
        """Returns weight times the gradient of `total` with respect to each parameter."""
        with self._quietly():
            gradients = [torch.zeros_like(parameter) for parameter in parameters]
            rest = list(factors)
            into = dict(zip(self._slots(), gradients, strict=True))
            for batch, code in zip(self._batches(parameters), codes, strict=True):
                gradient = Gradient.take(code, rest)
                _pull_back_(batch, gradient.times(weight.to(gradient.tensors[0].device)), into)
            return gradients

    def add_gradients(self, gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        """Adds strength * gradient of the penalties at the parameters to `gradients`."""
        with self._quietly():
            into = dict(zip(self._slots(), gradients, strict=True))
            groups = self._batches(parameters)
            strengths = [_strengths(batch) for batch in groups]
            looks = self._look(groups)
            # Compute all before adding any: if a penalty raises, no gradient has changed.
            each = [_gradient(*one) for one in zip(looks, strengths, strict=True)]
            for seen, gradient in zip(looks, each, strict=True):
                _pull_back_(seen.batch, gradient, into)
                _watch(seen)
                for state in seen.batch.states:
                    state.advance()

    def proximal_step(
        self,
        states: list[WeightState],
        rates: Sequence[float | Tensor],
        *,
        due: bool,
        done: Callable[[WeightState], None],
    ) -> None:
        """Takes a step of length strength * rate of the rule of each of these weights.

        Calls `done` for every weight whose rule was applied. If a weight under a penalty is not
        finite, no penalty takes a step, but other rules are applied before the error is raised.
        `due` is whether the weights were due by their movement.
        """
        with self._quietly():
            rate_of = dict(zip((state.name for state in states), rates, strict=True))
            groups = group_weights(states, [state.operator() for state in states])
            etas = [_lengths(one, [rate_of[s.name] for s in one.states]) for one in groups]
            self._compare_replicas(states)
            looks = look(groups, self.replicas)
            # Other rules check by themselves whether a weight is finite, equally on all replicas.
            soft = [seen for seen in looks if seen.batch.rule.differentiable]
            failures: Failures = dict.fromkeys(self._not_finite(soft), HOLDS_NAN)
            tasks = []
            for seen, eta in zip(looks, etas, strict=True):
                if failures and seen.batch.rule.differentiable:
                    continue
                seen.remember()
                seen.batch.prepare()
                tasks.append(step_task(seen, eta))
            failed, errors = apply(tasks, self.replicas, due)
            failures |= failed
            for state in states:
                state.failed = state.name in failures
            for state in (state for task in tasks for state in task.batch.states):
                if not state.failed:
                    done(state)
            rest = "All other hard limits that were due have been applied."
            others = any(not task.batch.rule.differentiable for task in tasks)
            raise_failures(failures, rest if others else "", errors)
            self._checks.raise_ready()

    def enforce(self, states: list[WeightState]) -> None:
        """Applies the hard limits of these weights exactly."""
        self._project(states, exact=True, rest="All other hard limits hold.")

    def watch(self, states: Sequence[WeightState], rates: Sequence[float]) -> list[WeightState]:
        """Counts a step of the optimizer and estimates the weights that are due for a check.

        Returns:
            The weights to project now. On a device the host reads an estimate one step later.
        """
        with full_precision(self._device):
            self.settle()
            turns: dict[tuple[int, bool], list[WeightState]] = {}
            for state, rate in zip(states, rates, strict=True):
                record = state.record
                state.step += 1
                products = record.count(rate)
                if record.due or not state.is_followed:
                    record.due = True
                elif products and record.known:
                    turn = products, record.products % 2 == 0
                    turns.setdefault(turn, []).append(state)
                    record.products += products
                elif products:
                    record.due = True
            if turns:
                self._look_at(turns)
            return [state for state in states if state.record.due and state.active]

    def _group(self, states: list[WeightState]) -> list[Batch]:
        """The weights in batches, from the cache if the operators have not changed."""
        operators = [state.operator() for state in states]
        key = tuple(map(id, states))
        before, batches = self._grouped.get(key, ([], []))
        if len(before) != len(operators) or any(map(operator.is_not, before, operators)):
            batches = group_weights(states, operators)
            if len(self._grouped) >= _GROUPINGS:
                self._grouped.clear()
            self._grouped[key] = operators, batches
        return batches

    def _look_at(self, states: Mapping[tuple[int, bool], list[WeightState]]) -> None:
        """Estimates the singular values of watched weights."""
        batches, turns = [], []
        for how, own in states.items():
            for batch in self._group(own):
                batches.append(batch)
                watch = batch.states[0].watch
                assert isinstance(watch, Watch)
                sights = [state.sight for state in batch.states]
                turns.append(Turn(watch, batch.S, sights, *how))
        readings = self._readings(batches, turns)
        for batch, turn, reading in zip(batches, turns, readings, strict=True):
            for state, memory in zip(batch.states, reading.sights, strict=True):
                state.sight = memory
            if reading.change is not None:
                pair = reading.change if cast(HasGram, turn.S).upright else reading.change[::-1]
                for one, (U, V) in zip(batch.operators, batch.each(*pair), strict=True):
                    cast(SpectralOperator, one).add_(U, V)
            if reading.scale is not None:
                for one, (scale,) in zip(batch.operators, batch.each(reading.scale), strict=True):
                    cast(SpectralOperator, one).update_(NewWeight.scaled(one, scale))
            found = (reading.numbers,)
            (numbers,) = cast(HasGram, batch.operators[0]).agree(
                functools.partial(tuple, found), *found
            )
            sight = Sight(batch.states, numbers)
            if sight.is_here:
                sight.judge()
            else:
                self._sights.append(sight)

    def _readings(self, batches: Sequence[Batch], turns: Sequence[Turn]) -> list[Reading]:
        """Estimates weights, or receives the estimates of another process."""
        if self.replicas is None:
            return look_at(turns)
        owners = [batch.states[0].owner for batch in batches]
        readings = [turn.watch.blank(turn) for turn in turns]
        mine = [index for index, owner in enumerate(owners) if owner == self.replicas.rank]
        for index, own in zip(mine, look_at([turns[i] for i in mine]), strict=True):
            readings[index] = own._replace(change=own.change or readings[index].change)
        self.replicas.exchange_(
            [
                (owner, tensor)
                for owner, turn, reading in zip(owners, turns, readings, strict=True)
                for tensor in turn.watch.tensors(reading)
            ]
        )
        return readings

    def settle(self) -> None:
        """Evaluates the estimates of the last step that the host has not read yet."""
        sights, self._sights = self._sights, []
        for sight in sights:
            sight.judge()

    def __getstate__(self) -> dict[str, Any]:
        """Drops the caches, which a copy builds again."""
        return {**self.__dict__, "_grouped": {}, "_sights": []}

    def project(self, states: list[WeightState]) -> None:
        """Projects these watched weights to the target inside their limits."""
        rest = "All other hard limits that were due have been applied."
        self._project(states, exact=False, rest=rest)

    def _project(self, states: list[WeightState], *, exact: bool, rest: str) -> None:
        """Applies hard limits; `rest` is the sentence about the other weights in an error."""
        with self._quietly():
            self._compare_replicas(states)
            groups = group_weights(states, [state.operator() for state in states])
            tasks = [projection_task(batch, exact=exact) for batch in groups]
            failures, errors = apply(tasks, self.replicas, due=False if exact else None)
            for state in states:
                state.failed = state.name in failures
                if exact and not state.failed:
                    state.settle()  # else the next application would underestimate its movement
            raise_failures(failures, rest if len(failures) < len(states) else "", errors)
            self._checks.raise_ready()

    def check_rates(self, lr: Tensor) -> Tensor:
        """Returns a learning rate on a device, or 0 if it is invalid; the error is raised later."""
        valid = (lr >= 0) & torch.isfinite(lr)
        self._checks.add(valid[None], _raise_not_a_rate)
        return torch.where(valid, lr, 0.0)

    def _batches(self, parameters: Sequence[Tensor]) -> list[Batch]:
        """The active weights with these values for their parameters."""
        active, of = self.active(), dict(zip(self._slots(), parameters, strict=True))
        operators = [state.operator([of[slot] for slot in state.slots]) for state in active]
        return group_weights(active, operators)

    def _look(self, group_weights: list[Batch], remember: bool = True) -> list[Look]:
        """Computes one product with every weight; raises before any state changes."""
        self._checks.raise_ready()
        if remember:
            self._compare_replicas([state for batch in group_weights for state in batch.states])
        looks = look(group_weights, self.replicas if remember else None)
        raise_failures(dict.fromkeys(self._not_finite(looks), HOLDS_NAN))
        if remember:
            for seen in looks:
                seen.remember()
        return looks

    def _not_finite(self, looks: Sequence[Look]) -> list[str]:
        """The names of weights with NaN or infinity; for a device the error is raised later."""
        if not looks:
            return []
        device = looks[0].finite.device
        states = [state for seen in looks for state in seen.batch.states]
        each = [
            seen.finite.reshape(len(seen.batch.states), -1).all(-1).to(device) for seen in looks
        ]
        flags = torch.cat(each)

        def bad(finite: list[bool]) -> list[str]:
            return [s.name for s, good in zip(states, finite, strict=True) if not good]

        if flags.is_cpu:
            return bad(flags.tolist())
        self._checks.add(flags, lambda f: raise_failures(dict.fromkeys(bad(f), HOLDS_NAN)))
        return []

    def _compare_replicas(self, states: list[WeightState]) -> None:
        if self.replicas is None or not self.check_replicas:
            return
        pairs = [(state.name, p) for state in states for p in state.weight.parameters]
        different = self.replicas.differing([parameter for _, parameter in pairs])
        if different:
            raise RuntimeError(
                f"{quote_subject({pairs[index][0] for index in different})} not the same on all "
                "processes of the group. Check that all processes take the same steps and use the "
                "same random seeds."
            )

    @property
    def _device(self) -> str:
        return self.states[0].weight.parameters[0].device.type

    @contextlib.contextmanager
    def _quietly(self) -> Iterator[None]:
        with full_precision(self._device):
            try:
                yield
            except RuntimeError as error:
                raise_meta_weights(self.states, error)
                raise


# A block is too narrow for gradients if its last singular value is above this share of the first:
# at a share of 0.82 the final kappa was 1 % higher than with a wider block, at 0.87 7 %, at 0.91
# and more at least 25 % (a network of 512 hidden units on MNIST and digits, strength 1). Checked
# every _WATCH applications.
CROWDED, _WATCH = 0.85, 16


def _watch(seen: Look) -> None:
    """Checks every _WATCH steps whether the block covers all values the gradient should act on.

    If every singular value of the block is near the largest, others outside it might be too.
    """
    states = seen.batch.states
    if seen.image is None or states[0].width == seen.S.nu or states[0].step % _WATCH:
        return
    crowded = seen.image.crowded(CROWDED)
    for state, (own,) in zip(states, seen.batch.each(crowded), strict=True):
        state.crowded = own.any()


def _strengths(batch: Batch) -> Tensor:
    """The strengths of the weights at their current steps."""
    return _lengths(batch, [1.0] * len(batch.states))


def _evaluate(seen: Look, strength: Tensor) -> tuple[Tensor, Gradient]:
    """strength * penalty and strength * gradient."""
    rule = seen.batch.rule
    value, gradient = rule.evaluate(seen.S, seen.image)
    check_answer(rule, seen.S, gradient, value)
    weighted = torch.where(strength > 0, strength * value, 0.0)  # also if the value overflows
    return weighted, _where_finite(seen, gradient).times(strength)


def _gradient(seen: Look, strength: Tensor) -> Gradient:
    """strength * gradient only."""
    rule = seen.batch.rule
    gradient = rule.gradient(seen.S, seen.image)
    check_answer(rule, seen.S, gradient, None)
    return _where_finite(seen, gradient).times(strength)


def _where_finite(seen: Look, gradient: Gradient) -> Gradient:
    # On the CPU a weight that is not finite has been refused already.
    return gradient if seen.finite.is_cpu else gradient.where(seen.finite)


def _lengths(batch: Batch, rates: Sequence[float | Tensor]) -> Tensor:
    """strength * rate: one number if all are equal, else one per weight. Never waits."""
    states = batch.states
    strengths = [state.rule.strength_at(state.step) for state in states]
    rates = [rate.reshape(()) if isinstance(rate, Tensor) else rate for rate in rates]
    keys = [id(rate) if isinstance(rate, Tensor) else rate for rate in rates]
    if len(set(zip(strengths, keys, strict=True))) == 1:
        return states[0].strength.fill_(strengths[0]) * rates[0]
    each = [m.strength.fill_(s) * r for m, s, r in zip(states, strengths, rates, strict=True)]
    return torch.stack(each).reshape(-1, *[1] * (batch.leading - 1))


def _blank_start(S: StoredMatrix, width: int) -> Subspace:
    basis = torch.empty(*S.shape[:-2], S.shape[-1], width, dtype=S.dtype, device="meta")
    return Subspace(basis, from_right=True)


def _pull_back_(batch: Batch, gradient: Gradient, into: dict[int, Tensor]) -> None:
    """Adds the gradients of a batch to those of the parameters behind its weights."""
    parts = batch.each(*gradient.tensors)
    for state, S, own in zip(batch.states, batch.operators, parts, strict=True):
        share = Gradient.from_tensors(gradient.code, own)
        S.pullback_(share, [into[slot] for slot in state.slots])


class _Total(torch.autograd.Function):
    """The sum of the penalties, with known gradients."""

    @staticmethod
    def forward(
        ctx: Any, engine: Engine, total: Tensor, codes: list[int], count: int, *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.engine, ctx.codes, ctx.count = engine, codes, count
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Any, ...]:
        factors, parameters = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        gradients = ctx.engine.gradients(weight, ctx.codes, factors, parameters)
        return None, None, None, None, *[None] * ctx.count, *gradients


def _raise_not_a_rate(valid: list[bool]) -> None:
    if not all(valid):
        raise ValueError("`lr` must be finite and not negative, got a tensor with another value.")
