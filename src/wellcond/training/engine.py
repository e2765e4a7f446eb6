"""Penalties of many weights at once: first look at all of them, then act.

A weight that is not finite stops a pass before anything is half done. What is computed here is the
same whether it is called eagerly or from within a compiled graph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from wellcond.operators.sharded import Replicas, operator_of
from wellcond.penalties.base import LowRankChange
from wellcond.training.compiled import compiled_add_gradients_, compiled_penalty, register
from wellcond.training.selection import listed
from wellcond.training.state import Look, Memory, look, quietly

_Result = TypeVar("_Result")


def _quietly(method: Callable[..., _Result]) -> Callable[..., _Result]:
    @functools.wraps(method)
    def wrapped(self: Passes, *args: Any, **kwargs: Any) -> _Result:
        with quietly(self.memories):
            return method(self, *args, **kwargs)

    return wrapped


class Passes:
    """The weights under penalties, and what is done to all of them together."""

    def __init__(
        self, memories: list[Memory], replicas: Replicas | None, check_replicas: bool
    ) -> None:
        self.memories = memories
        self.replicas = replicas
        self.check_replicas = check_replicas
        self._flags: tuple[list[str], Tensor, Any] | None = None
        slots: dict[tuple[int, str], int] = {}
        for memory in memories:
            parameter = id(memory.weight.owner), memory.weight.attribute
            memory.slot = slots.setdefault(parameter, len(slots))
        if replicas is not None:
            costs = [math.prod(memory.shape) * memory.width for memory in memories]
            for memory, owner in zip(memories, replicas.owners(costs), strict=True):
                memory.owner = owner
        self.number = register(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy needs a number of its own.
        self.__dict__.update(state)
        self.number = register(self)

    def active(self) -> list[Memory]:
        """The weights that are not frozen."""
        return [memory for memory in self.memories if memory.active]

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the active weights, those of several views once."""
        first = {memory.slot: memory for memory in reversed(self.active())}
        return [first[slot].weight.parameter for slot in sorted(first)]

    def penalty(self) -> Tensor:
        """The sum of strength * penalty, differentiable."""
        parameters, remember = self.parameters(), torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            return compiled_penalty(parameters, self.number, remember)
        total, factors = self.total(parameters, remember)
        result: Tensor = _Total.apply(self, total, len(factors), *factors, *parameters)  # type: ignore[no-untyped-call]
        return result

    def add_gradients(self) -> None:
        """Adds strength * gradient to the gradients of the parameters."""
        parameters = self.parameters()
        gradients = [_gradient(parameter) for parameter in parameters]
        if torch.compiler.is_compiling():
            compiled_add_gradients_(gradients, parameters, self.number)
        else:
            self.add_gradients_(gradients, parameters)

    @_quietly
    def total(self, parameters: Sequence[Tensor], remember: bool) -> tuple[Tensor, list[Tensor]]:
        """The penalties of these parameters, and of each weight its gradient's c, U and V."""
        active = self.active()
        first = self.memories[0].strength
        total = torch.zeros((), dtype=first.dtype, device=first.device)
        changes: dict[str, LowRankChange] = {}
        for seen in self._look(active, _given(active, parameters), remember):
            strength, change = _gradient_of(seen)
            value = seen.memories[0].penalty.value(seen.S, seen.product)
            total = total + (strength * value).sum().to(total)
            for memory, one in zip(seen.memories, seen.each(*change), strict=True):
                changes[memory.name] = LowRankChange(*one)
                if remember:
                    memory.step += 1
        return total, [factor for memory in active for factor in changes[memory.name]]

    def shapes_of_total(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the shapes of what `total` returns."""
        first = self.memories[0].strength
        shapes = [parameters[0].new_empty((), dtype=first.dtype)]
        active = self.active()
        for memory, parameter in zip(active, _given(active, parameters), strict=True):
            *stack, m, n = memory.shape
            r, dtype = memory.penalty.gradient_rank, memory.strength.dtype
            for shape in (stack, (*stack, m, r), (*stack, n, r)):
                shapes.append(parameter.new_empty(shape, dtype=dtype))
        return shapes

    @_quietly
    def gradients(
        self, weight: Tensor, factors: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> list[Tensor]:
        """weight times the gradient of `total` with respect to each of the parameters."""
        active = self.active()
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        at = _positions(active)
        cs, Us = (_multiplied(factors[i::3], weight) for i in (0, 1))
        for memory, c, U, V in zip(active, cs, Us, factors[2::3], strict=True):
            S = memory.operator(parameters[at[memory.slot]])
            G = operator_of(memory.weight.view, gradients[at[memory.slot]])
            G.add_(c, S, U, V)
        return gradients

    @_quietly
    def add_gradients_(self, gradients: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        """Adds strength * gradient at these parameters to these gradients."""
        active = self.active()
        at = _positions(active)
        for seen in self._look(active, _given(active, parameters)):
            _, change = _gradient_of(seen)
            parts = zip(seen.memories, seen.operators, seen.each(*change), strict=True)
            for memory, S, (c, U, V) in parts:
                G = operator_of(memory.weight.view, gradients[at[memory.slot]])
                G.add_(c, S, U, V)
                memory.step += 1

    @_quietly
    def proximal_step_(self, memories: list[Memory], rates: Iterable[float | Tensor]) -> None:
        """A proximal step of length strength * rate on every one of these weights."""
        rate_of = dict(zip((memory.name for memory in memories), rates, strict=True))
        for seen in self._look(memories):
            penalty = seen.memories[0].penalty
            if not penalty.has_gradient:
                self._limit(seen)
                continue
            eta = _lengths(seen, [rate_of[memory.name] for memory in seen.memories])
            change, shortened = penalty.proximal_step(seen.S, seen.product, eta)
            assert isinstance(change, LowRankChange)
            changes = seen.each(*_masked(seen, change, identity=1.0), shortened)
            parts = zip(seen.memories, seen.operators, changes, strict=True)
            for memory, S, (c, U, V, short) in parts:
                S.update_(c, U, V)
                memory.shortened += short.sum()

    def _limit(self, seen: Look) -> None:
        """A hard limit gives the values to store; of replicas, one finds them."""
        (memory,), (S,) = seen.memories, seen.operators
        if self.replicas is None or self.replicas.rank == memory.owner:
            values, _ = memory.penalty.proximal_step(S, None, memory.strength)
            assert isinstance(values, Tensor)
            values = values.contiguous()
        else:
            values = torch.empty(S.shape, dtype=S.dense().dtype, device=S.device)
        if self.replicas is not None:
            self.replicas.exchange_([(memory.owner, values)])
        S.store_(values)

    def _look(
        self,
        memories: list[Memory],
        parameters: Sequence[Tensor] | None = None,
        remember: bool = True,
    ) -> list[Look]:
        """One product with every weight; raises before anything is remembered or changed."""
        self._raise_earlier()
        if self.check_replicas and remember:
            self._compare_replicas(memories)
        looks = look(memories, parameters, self.replicas if remember else None)
        self._check(looks)
        if remember:
            for seen in looks:
                seen.remember()
        return looks

    def _check(self, looks: list[Look]) -> None:
        """Raises for weights that are not finite: now on the CPU, elsewhere at the next call."""
        if not looks:
            return
        names = [memory.name for seen in looks for memory in seen.memories]
        device = looks[0].finite.device
        each = [seen.finite.reshape(len(seen.memories), -1).all(-1) for seen in looks]
        flags = torch.cat([one.to(device) for one in each])
        if flags.is_cpu:
            _raise_not_finite(names, flags)
            return
        copied = flags.to("cpu", non_blocking=True)
        event = torch.Event(device)
        event.record()
        self._flags = names, copied, event

    def _raise_earlier(self) -> None:
        if self._flags is not None and self._flags[2].query():
            names, flags, _ = self._flags
            self._flags = None
            _raise_not_finite(names, flags)

    def _compare_replicas(self, memories: list[Memory]) -> None:
        if self.replicas is None:
            return
        parameters = [memory.weight.parameter for memory in memories]
        names = [memories[index].name for index in self.replicas.differing(parameters)]
        if names:
            raise RuntimeError(
                f"{listed(names)} is not the same on all processes of the group. Look for a step "
                "that not all of them take, or for numbers drawn from another seed."
            )


def _positions(active: list[Memory]) -> dict[int, int]:
    """Where in `parameters()` that of a slot is."""
    return {slot: index for index, slot in enumerate(sorted({m.slot for m in active}))}


def _given(active: list[Memory], parameters: Sequence[Tensor]) -> list[Tensor]:
    at = _positions(active)
    return [parameters[at[memory.slot]] for memory in active]


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient in the memory layout of its parameter, so that one view serves both."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    if parameter.grad.stride() != parameter.stride():
        parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
    return parameter.grad


def _masked(seen: Look, change: LowRankChange, identity: float) -> LowRankChange:
    """The change, or none where the weight is not finite; without asking the host.

    On the CPU such a weight has been refused already.
    """
    finite = seen.finite
    if finite.is_cpu:
        return change
    c = torch.where(finite, change.c, identity)
    U, V = (torch.where(_wide(finite), x, 0.0) for x in (change.U, change.V))
    return LowRankChange(c, U, V)


def _multiplied(tensors: Sequence[Tensor], factor: Tensor) -> list[Tensor]:
    """All of them times a number, in one operation for each device."""
    products = list(tensors)
    for device in {tensor.device for tensor in tensors}:
        there = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        done = torch._foreach_mul([tensors[i] for i in there], factor.to(device))
        for i, product in zip(there, done, strict=True):
            products[i] = product
    return products


def _wide(x: Tensor) -> Tensor:
    return x[..., None, None]


def _gradient_of(seen: Look) -> tuple[Tensor, LowRankChange]:
    """The strengths of the weights at their steps, and strength * gradient."""
    strength = _lengths(seen, [1.0] * len(seen.memories))
    gradient = seen.memories[0].penalty.gradient(seen.S, seen.product)
    c, U, V = _masked(seen, gradient, identity=0.0)
    return strength, LowRankChange(strength * c, _wide(strength) * U, V)


def _lengths(seen: Look, rates: Sequence[float | Tensor]) -> Tensor:
    """strength * rate: one number if all are equal, else one a weight. Asks nothing of the host."""
    memories = seen.memories
    strengths = [memory.penalty.strength_at(memory.step) for memory in memories]
    rates = [rate.reshape(()) if isinstance(rate, Tensor) else rate for rate in rates]
    keys = [id(rate) if isinstance(rate, Tensor) else rate for rate in rates]
    if len(set(zip(strengths, keys, strict=True))) == 1:
        return memories[0].strength.fill_(strengths[0]) * rates[0]
    each = [m.strength.fill_(s) * r for m, s, r in zip(memories, strengths, rates, strict=True)]
    return torch.stack(each).reshape(-1, *[1] * (seen.finite.ndim - 1))


class _Total(torch.autograd.Function):
    """The total of the penalties, whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, passes: Passes, total: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.passes, ctx.count = passes, count
        return total.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Any, ...]:
        factors, parameters = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        gradients = ctx.passes.gradients(weight, factors, parameters)
        return None, None, None, *[None] * ctx.count, *gradients


def _raise_not_finite(names: list[str], finite: Tensor) -> None:
    bad = [name for name, good in zip(names, finite.tolist(), strict=True) if not good]
    if bad:
        raise ValueError(
            f"{listed(bad)} holds NaN or infinity and was left as it is. "
            "Restore the last good checkpoint, or lower the learning rate."
        )
