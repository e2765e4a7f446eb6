"""Penalties of many weights at once: first look at all of them, then act.

A weight that is not finite stops everything before anything is half done. What is computed here is
the same whether it is called eagerly or from within a compiled graph.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from wellcond.linalg.checks import in_float64
from wellcond.operators.base import Dense, Gradient, NewWeight, Updatable, WeightOperator
from wellcond.operators.rounding import full_precision, widest_dtype
from wellcond.operators.stored import StoredMatrix
from wellcond.operators.subspace import Subspace, refine
from wellcond.penalties.base import Limit, Penalty, Proximal, check_answer
from wellcond.penalties.enforce import enforce_, obey_nearly
from wellcond.penalties.isometry import Isometry
from wellcond.penalties.limit import SingularValueLimit, SpectralLimit
from wellcond.text import quoted, subject
from wellcond.training.batch import Batch, Look, batches, look
from wellcond.training.deferred import DeferredChecks
from wellcond.training.replicas import Replicas
from wellcond.training.state import WeightState, reading

_FAILED = -1.0  # instead of whether a weight passed: its limit was not applied


class Engine:
    """The weights under penalties and limits, and what is done to all of them together."""

    def __init__(
        self, states: list[WeightState], replicas: Replicas | None, check_replicas: bool
    ) -> None:
        self.states = states
        self.replicas = replicas
        self.check_replicas = check_replicas
        self._checks = DeferredChecks()
        slots: dict[tuple[int, str], int] = {}
        for state in states:
            keys = [(id(source.owner), source.attribute) for source in state.weight.sources]
            state.slots = tuple(slots.setdefault(key, len(slots)) for key in keys)
        if replicas is not None:
            costs = [math.prod(state.shape) * state.width for state in states]
            for state, owner in zip(states, replicas.owners(costs), strict=True):
                state.owner = owner

    def active(self) -> list[WeightState]:
        """The weights that are not frozen."""
        return [state for state in self.states if state.active]

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the active weights, those that several rest on once."""
        by_slot = {
            slot: parameter
            for state in self.active()
            for slot, parameter in zip(state.slots, state.weight.parameters, strict=True)
        }
        return [by_slot[slot] for slot in sorted(by_slot)]

    def _slots(self) -> list[int]:
        """The numbers of `parameters()`."""
        return sorted({slot for state in self.active() for slot in state.slots})

    def penalty(self) -> Tensor:
        """The sum of strength * penalty, differentiable."""
        parameters = self.parameters()
        total, factors = self.total(parameters, torch.is_grad_enabled())
        result: Tensor = _Total.apply(self, total, len(factors), *factors, *parameters)  # type: ignore[no-untyped-call]
        return result

    def total(self, parameters: Sequence[Tensor], remember: bool) -> tuple[Tensor, list[Tensor]]:
        """The penalties of these parameters, and what their gradients consist of, by batch."""
        with self._quietly():
            found = self._batches(parameters)
            strengths = [_strengths(batch) for batch in found]  # a schedule may raise: before all
            looks = self._look(found, remember)
            first = self.states[0].strength
            total = torch.zeros((), dtype=first.dtype, device=first.device)
            factors: list[Tensor] = []
            for seen, strength in zip(looks, strengths, strict=True):
                value, gradient = _evaluated(seen, strength)
                total = total + value.sum().to(total)
                factors += gradient.tensors
                if remember:
                    _watch(seen)
                for state in seen.batch.states if remember else ():
                    state.advance()
            return total, factors

    def blank_total(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the shapes of what `total` returns: found on matrices without data."""
        with self._quietly():
            found = self._batches(parameters)
            blank = [parameters[0].new_empty((), dtype=self.states[0].strength.dtype)]
            for batch in found:
                penalty, first = cast(Penalty, batch.rule), batch.states[0]
                shape = (*batch.operators[0].shape,)
                if len(batch.states) > 1:
                    shape = (len(batch.states), *shape)
                S = StoredMatrix(torch.empty(shape, dtype=first.strength.dtype, device="meta"))
                image = None
                if first.follows_subspace:
                    image, _ = refine(S, _blank_start(S, first.width))
                gradient = penalty.gradient(S, image)
                blank += [
                    torch.empty(one.shape, dtype=one.dtype, device=batch.operators[0].device)
                    for one in gradient.tensors
                ]
        return blank

    def gradients(
        self, weight: Tensor, factors: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> list[Tensor]:
        """weight times the gradient of `total` with respect to each of the parameters."""
        with self._quietly():
            gradients = [torch.zeros_like(parameter) for parameter in parameters]
            rest = list(factors)
            into = dict(zip(self._slots(), gradients, strict=True))
            for batch in self._batches(parameters):
                count = 3 - (rest[0].ndim - batch.leading)  # see `Gradient.tensors`
                own, rest = rest[:count], rest[count:]
                gradient = Gradient.of(own).times(weight.to(own[0].device))
                _pull_back_(batch, gradient, into)
            return gradients

    def add_gradients_(self, gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        """Adds strength * gradient at these parameters to these gradients."""
        with self._quietly():
            into = dict(zip(self._slots(), gradients, strict=True))
            found = self._batches(parameters)
            strengths = [_strengths(batch) for batch in found]
            for seen, strength in zip(self._look(found), strengths, strict=True):
                _pull_back_(seen.batch, _gradient(seen, strength), into)
                _watch(seen)
                for state in seen.batch.states:
                    state.advance()

    def proximal_step_(self, states: list[WeightState], rates: Sequence[float | Tensor]) -> None:
        """A proximal step of length strength * rate on every one of these weights; limits hold."""
        with self._quietly():
            rate_of = dict(zip((state.name for state in states), rates, strict=True))
            found = batches(states, [state.operator() for state in states])
            etas = [_lengths(one, [rate_of[s.name] for s in one.states]) for one in found]
            limited = []
            for seen, eta in zip(self._look(found), etas, strict=True):
                batch, rule = seen.batch, seen.batch.rule
                if isinstance(rule, Isometry):
                    _learn_scales(batch)
                if isinstance(rule, Limit | Isometry):
                    limited.append(seen)
                    continue
                new, shortened = cast(Proximal, rule).proximal_step(seen.S, seen.image, eta)
                self._update_(seen, new)
                for state, (short,) in zip(batch.states, batch.each(shortened), strict=True):
                    state.shortened += short.sum()
            self._apply_limits_([self._clipped_(seen) for seen in limited])

    def enforce_(self, states: list[WeightState]) -> None:
        """The hard limits of these weights, exactly."""
        with self._quietly():
            found = batches(states, [state.operator() for state in states])
            self._checks.raise_ready()
            self._compare_replicas(states)
            self._check_finite([(batch, batch.S.finite()) for batch in found])
            self._apply_limits_([_Limited(batch) for batch in found])
            for state in states:
                state.begin_anew()  # else the next application would take it for a slow weight

    def _update_(self, seen: Look, new: NewWeight) -> None:
        if not seen.finite.is_cpu:  # on the CPU such a weight has been refused already
            new = new.where(seen.finite, cast(Dense, seen.S))
        _store_(seen.batch, new)

    def _clipped_(self, seen: Look) -> _Limited:
        """What the block of an upper bound can do alone, and whether that was enough.

        A block may lag behind a weight that moves fast, and a narrow one not reach far enough: one
        Gram matrix tells.
        """
        batch, rule = seen.batch, seen.batch.rule
        if seen.image is None or not isinstance(rule, SingularValueLimit):
            return _Limited(batch)
        if not all(state.pace.known for state in batch.states):  # the block is hardly warm
            return _Limited(batch)
        new, excess, reached = rule.clip_leading(seen.S, seen.image)
        if not bool(reached.all()):
            return _Limited(batch, excess)
        self._update_(seen, new)
        owner = batch.states[0].owner
        held = torch.zeros(1, device=batch.operators[0].device)
        if self.replicas is None or self.replicas.rank == owner:
            held.fill_(obey_nearly(_stored(batch), rule))
        if self.replicas is not None:  # all must take the same way from here
            self.replicas.exchange_([(owner, held)])
        return _Limited(batch, excess, bool(held))

    def _apply_limits_(self, limited: Sequence[_Limited]) -> None:
        """Applies hard limits where it has not been done; of replicas, one does for the others.

        And takes isometry steps.
        """
        told: list[tuple[WeightState, Tensor]] = []
        exchanged: list[tuple[int, Tensor]] = []
        received: list[tuple[WeightOperator, Tensor]] = []
        failure: Exception | None = None
        for batch, excess, done in limited:
            owner = batch.states[0].owner
            mine = self.replicas is None or self.replicas.rank == owner
            if done:
                assert excess is not None
                each = [_seen(one, torch.full_like(one, math.nan)) for (one,) in batch.each(excess)]
            else:
                # Where nothing is exchanged numbers may stay here, as some devices have no float64.
                device = batch.operators[0].device if self.replicas is not None else "cpu"
                blank = torch.full((3,), _FAILED, dtype=torch.float64, device=device)
                each = [blank.clone() for _ in batch.states]
                try:
                    each = [one.to(device) for one in _apply_(batch)] if mine else each
                except Exception as error:
                    if self.replicas is None:
                        raise
                    failure = failure or error  # the others wait: first they must learn of it
                if excess is not None:
                    for numbers, (clipped,) in zip(each, batch.each(excess), strict=True):
                        numbers[0] = torch.fmax(numbers[0], clipped.max().to(numbers))
            told += zip(batch.states, each, strict=True)
            if self.replicas is None or done:  # all have done it alike
                continue
            for S, numbers in zip(batch.operators, each, strict=True):
                values = cast(Dense, S).dense().contiguous()
                if not mine:
                    values = torch.empty_like(values)
                    received.append((S, values))
                exchanged += [(owner, numbers), (owner, values)]
        if self.replicas is not None:
            self.replicas.exchange_(exchanged)
        for S, values in received:
            cast(Updatable, S).update_(NewWeight(values))
        if failure is not None:
            raise failure
        if self.replicas is not None:
            _raise_failed_elsewhere(told)
        for state, numbers in told:
            excess_before, kappa, passed = numbers.tolist()
            state.pace.saw(excess_before, kappa, bool(passed))

    def check_rates(self, lr: Tensor) -> Tensor:
        """A learning rate on a device, 0 if it is none, which is raised once it is free to read."""
        valid = (lr >= 0) & torch.isfinite(lr)
        self._checks.add(valid[None], _raise_not_a_rate)
        return torch.where(valid, lr, 0.0)

    def _batches(self, parameters: Sequence[Tensor]) -> list[Batch]:
        """The active weights with these values for their parameters."""
        active, of = self.active(), dict(zip(self._slots(), parameters, strict=True))
        operators = [state.operator([of[slot] for slot in state.slots]) for state in active]
        return batches(active, operators)

    def _look(self, batches: list[Batch], remember: bool = True) -> list[Look]:
        """One product with every weight; raises before anything is remembered or changed."""
        self._checks.raise_ready()
        if remember:
            self._compare_replicas([state for batch in batches for state in batch.states])
        looks = look(batches, self.replicas if remember else None)
        self._check_finite([(seen.batch, seen.finite) for seen in looks])
        if remember:
            for seen in looks:
                seen.remember()
        return looks

    def _check_finite(self, found: Sequence[tuple[Batch, Tensor]]) -> None:
        if not found:
            return
        device = found[0][1].device
        names = [state.name for batch, _ in found for state in batch.states]
        each = [good.reshape(len(batch.states), -1).all(-1).to(device) for batch, good in found]
        self._checks.add(torch.cat(each), lambda finite: _raise_not_finite(names, finite))

    def _compare_replicas(self, states: list[WeightState]) -> None:
        if self.replicas is None or not self.check_replicas:
            return
        pairs = [(state.name, p) for state in states for p in state.weight.parameters]
        different = self.replicas.differing([parameter for _, parameter in pairs])
        if different:
            raise RuntimeError(
                f"{subject({pairs[index][0] for index in different})} not the same on all "
                "processes of the group. Look for a step that not all of them take, or for numbers "
                "drawn from another seed."
            )

    @contextlib.contextmanager
    def _quietly(self) -> Iterator[None]:
        device = self.states[0].weight.parameters[0].device.type
        with full_precision(device), reading(self.states):
            yield


class _Limited(NamedTuple):
    """A batch under a limit; what its block has clipped beforehand, and whether that is all."""

    batch: Batch
    excess: Tensor | None = None
    done: bool = False


def _stored(batch: Batch) -> list[StoredMatrix]:
    return [cast(StoredMatrix, S) for S in batch.operators]


def _store_(batch: Batch, new: NewWeight) -> None:
    for S, own in zip(batch.operators, batch.each(*new.tensors), strict=True):
        cast(Updatable, S).update_(NewWeight.of(own))


def _learn_scales(batch: Batch) -> None:
    """Finds the scale of the weights under `Isometry` that have none yet."""
    if all(bool((state.scale > 0).all()) for state in batch.states):
        return
    found = cast(Isometry, batch.rule).scale_of(batch.S)
    for state, (own,) in zip(batch.states, batch.each(found), strict=True):
        state.learn_scale(own)


def _apply_(batch: Batch) -> list[Tensor]:
    """Applies the hard limit or the isometry step of a batch; what was seen of every weight."""
    rule, states = batch.rule, batch.states
    unknown = torch.full((), math.nan, dtype=torch.float64, device="cpu")
    if isinstance(rule, Isometry):
        with contextlib.ExitStack() as opened:
            spread = [opened.enter_context(cast(StoredMatrix, S).spread()) for S in batch.operators]
            there = Batch(states, list(spread))
            device = spread[0].device
            scales = [S.held(state.scale) for S, state in zip(spread, states, strict=True)]
            scale = scales[0] if len(scales) == 1 else torch.stack(scales)
            _store_(there, rule.step(there.S, scale.to(device, widest_dtype(device))))
        return [_seen(unknown, unknown) for _ in states]
    if isinstance(rule, SpectralLimit):
        weights = _stored(batch)
        try:
            found = enforce_(
                weights,
                rule,
                gate=all(state.pace.obeyed for state in states),
                condition_number=_worst([state.pace.condition_number for state in states]),
            )
        except ValueError as error:
            raise ValueError(f"{quoted([state.name for state in states])}: {error}") from None
        return [_seen(one.excess, one.condition_number, one.passed) for one in found]
    ((_,), (S,)) = states, batch.operators
    stored = cast(Dense, S).dense()
    values = cast(Limit, rule).apply(stored)
    obeys = torch.equal(values, stored)
    if not obeys:
        cast(Updatable, S).update_(NewWeight(values))
    return [_seen(unknown, unknown, obeys)]


def _raise_failed_elsewhere(told: Sequence[tuple[WeightState, Tensor]]) -> None:
    failed = [state.name for state, numbers in told if numbers.tolist()[2] == _FAILED]
    if failed:
        raise ValueError(
            f"{quoted(failed)}: the limit could not be applied by the process of the group that "
            "does so for all of them. See the error of that one."
        )


def _worst(numbers: Sequence[float]) -> float:
    """The largest, nan if one is."""
    return math.nan if any(map(math.isnan, numbers)) else max(numbers)


def _seen(excess: Tensor, condition_number: Tensor, passed: bool = False) -> Tensor:
    """Excess and kappa, the worst of a stack, and whether it passed, as three numbers."""
    worst = [
        torch.nan_to_num(in_float64(x), nan=-math.inf).max() for x in (excess, condition_number)
    ]
    known = [torch.where(x == -math.inf, math.nan, x) for x in worst]
    return torch.stack([*known, torch.full_like(known[0], float(passed))])


# A block is too narrow for gradients if its last value is above this share of the first: at 0.82
# kappa ended 1 % higher than with a wider one, at 0.87 7 %, at 0.91 and more 25 % and more (a net
# of 512 hidden units on MNIST and digits, strength 1). Looked for in every so many applications.
CROWDED, _WATCH = 0.85, 16


def _watch(seen: Look) -> None:
    """Looks now and then whether the block holds all that the gradient should act on.

    Where every value that is followed is near the largest, more of them may be.
    """
    states = seen.batch.states
    if seen.image is None or states[0].width == seen.S.nu or states[0].step % _WATCH:
        return
    crowded = seen.image.crowded(CROWDED)
    for state, (own,) in zip(states, seen.batch.each(crowded), strict=True):
        state.crowded = own.any()


def _strengths(batch: Batch) -> Tensor:
    """The strengths of the weights at the steps where they are."""
    return _lengths(batch, [1.0] * len(batch.states))


def _evaluated(seen: Look, strength: Tensor) -> tuple[Tensor, Gradient]:
    """strength * penalty and strength * gradient."""
    penalty = cast(Penalty, seen.batch.rule)
    value, gradient = penalty.evaluate(seen.S, seen.image)
    check_answer(penalty, seen.S, gradient, value)
    weighted = torch.where(strength > 0, strength * value, 0.0)  # of a value that overflows too
    return weighted, _where_finite(seen, gradient).times(strength)


def _gradient(seen: Look, strength: Tensor) -> Gradient:
    """strength * gradient alone."""
    penalty = cast(Penalty, seen.batch.rule)
    gradient = penalty.gradient(seen.S, seen.image)
    check_answer(penalty, seen.S, gradient, None)
    return _where_finite(seen, gradient).times(strength)


def _where_finite(seen: Look, gradient: Gradient) -> Gradient:
    # On the CPU a weight that is not finite has been refused already.
    return gradient if seen.finite.is_cpu else gradient.where(seen.finite)


def _lengths(batch: Batch, rates: Sequence[float | Tensor]) -> Tensor:
    """strength * rate: one number if all are equal, else one a weight. Asks nothing of the host."""
    states = batch.states
    strengths = [
        state.rule.strength_at(state.step) if isinstance(state.rule, Penalty) else 1.0
        for state in states
    ]
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
    """Adds the gradients of a batch to those of the parameters that its weights rest on."""
    parts = batch.each(*gradient.tensors)
    for state, S, own in zip(batch.states, batch.operators, parts, strict=True):
        S.pullback_(Gradient.of(own), [into[slot] for slot in state.slots])


class _Total(torch.autograd.Function):
    """The total of the penalties, whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, engine: Engine, total: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.engine, ctx.count = engine, count
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Any, ...]:
        factors, parameters = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        gradients = ctx.engine.gradients(weight, factors, parameters)
        return None, None, None, *[None] * ctx.count, *gradients


def _raise_not_finite(names: list[str], finite: list[bool]) -> None:
    bad = [name for name, good in zip(names, finite, strict=True) if not good]
    if bad:
        raise ValueError(
            f"{quoted(bad)} holds NaN or infinity and was left as it is. "
            "Restore the last good checkpoint, or lower the learning rate."
        )


def _raise_not_a_rate(valid: list[bool]) -> None:
    if not all(valid):
        raise ValueError("`lr` must be finite and not negative, got a tensor that is not.")
