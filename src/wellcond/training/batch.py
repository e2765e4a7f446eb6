"""One product with every weight, before any rule acts; weights of one kind form a stack.

`look` changes nothing: it returns the images and the refined subspaces. Weights under equal rules
are processed together, so that everything but the products is done once for all of them.

Letters: S (..., m, n) a weight, or a stack of weights of one kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wellcond.linalg.checks import lacks_values
from wellcond.operators.base import Operator, WeightOperator
from wellcond.operators.stacked import stack
from wellcond.operators.subspace import (
    Image,
    Subspace,
    align_sides,
    by_columns,
    krylov_image,
    read_image,
    refine,
    warm_up,
)
from wellcond.rules.base import Need, Rule, RuleState
from wellcond.training.replicas import Replicas
from wellcond.training.state import WeightState


class Batch(NamedTuple):
    """Weights of one kind under one rule; a single weight is not stacked."""

    states: list[WeightState]
    operators: list[WeightOperator]

    @property
    def S(self) -> Operator:
        """All weights as one operator."""
        return stack(self.operators)

    @property
    def rule(self) -> Rule:
        return self.states[0].rule

    @property
    def leading(self) -> int:
        """The number of dimensions before those of a matrix."""
        return len(self.states[0].shape) - 2 + (len(self.states) > 1)

    @property
    def memory(self) -> RuleState:
        """The state of the rule for all weights."""
        own = [state.memory for state in self.states]
        if len(own) == 1:
            return own[0]
        return {key: torch.stack([one[key] for one in own]) for key in own[0]}

    def prepare(self) -> None:
        """Lets the rule complete its state before its first step."""
        memory = self.rule.prepare(self.S, self.memory)
        each = self.each(*memory.values())
        for state, own in zip(self.states, each if memory else (), strict=False):
            state.memory = dict(zip(memory, own, strict=True))

    def remember(self, subspace: Subspace) -> None:
        """Stores the subspaces of the batch in the states of its weights."""
        basis, from_right = subspace
        for state, (own,) in zip(self.states, self.each(basis), strict=True):
            state.remember(Subspace(own, from_right))

    def lacks_values(self) -> bool:
        """Whether a weight is on the meta device."""
        return any(lacks_values(p) for state in self.states for p in state.weight.parameters)

    def each(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Splits tensors of the batch into those of every weight."""
        if len(self.states) == 1:
            return [tensors]
        return list(zip(*(tensor.unbind() for tensor in tensors), strict=True))


class Look(NamedTuple):
    """The image and the refined subspace of a batch, and which weights are finite."""

    batch: Batch
    S: Operator
    image: Image | None
    subspace: Subspace | None
    finite: Tensor

    def remember(self) -> None:
        """Stores the refined subspaces in the states of the weights."""
        if self.subspace is not None:
            self.batch.remember(self.subspace)


def group_weights(
    states: Sequence[WeightState], operators: Sequence[WeightOperator]
) -> list[Batch]:
    """Groups the weights by kind and rule, independently of their history."""
    groups: dict[object, Batch] = {}
    for state, S in zip(states, operators, strict=True):
        state.follow(S)
        apart = state.name if Need.whole in state.rule.needs else ""
        key = (S.kind, state.rule.group_key(), state.width, state.owner, apart)
        batch = groups.setdefault(key, Batch([], []))
        batch.states.append(state)
        batch.operators.append(S)
    return list(groups.values())


def look_closely(batch: Batch, sweeps: int) -> tuple[Operator, Image]:
    """The image of a block Krylov space of every weight of a batch; no state changes."""
    S, starts = batch.S, [state.subspace for state in batch.states]
    if len(starts) > 1:
        starts = [_stack_subspaces(align_sides(batch.operators, starts))]
    return S, krylov_image(S, starts[0], sweeps)


def look(group_weights: Sequence[Batch], replicas: Replicas | None = None) -> list[Look]:
    """One product with every weight."""
    shared = [] if replicas is None else [_SharedLook(batch, replicas) for batch in group_weights]
    if replicas is not None:
        replicas.exchange_([pair for one in shared for pair in one.exchanged])
    looks = []
    for index, batch in enumerate(group_weights):
        S, image, refined = batch.S, None, None
        if not batch.states[0].follows_subspace:
            finite = S.finite()
        elif replicas is not None:
            image, refined = shared[index].read_image()
            finite = image.finite
        else:
            image, refined = refine(S, _start(batch, S))
            finite = image.finite
        looks.append(Look(batch, S, image, refined, finite))
    return looks


def _start(batch: Batch, S: Operator) -> Subspace:
    """The subspaces of a batch as one stack: warm, and all on the same side."""
    states = batch.states
    if len(states) == 1:
        return states[0].subspace if states[0].warm else warm_up(S, states[0].subspace)
    if not any(state.warm for state in states):
        return warm_up(S, _stack_subspaces([state.subspace for state in states]))
    pairs = list(zip(states, batch.operators, strict=True))
    starts = [s.subspace if s.warm else warm_up(one, s.subspace) for s, one in pairs]
    return _stack_subspaces(align_sides(batch.operators, starts))


def _stack_subspaces(subspaces: list[Subspace]) -> Subspace:
    return Subspace(torch.stack([s.basis for s in subspaces]), subspaces[0].from_right)


class _SharedLook:
    """A batch of which one process computes the image and the basis for all replicas."""

    def __init__(self, batch: Batch, replicas: Replicas) -> None:
        self.exchanged: list[tuple[int, Tensor]] = []
        first, S = batch.states[0], batch.S
        if not first.follows_subspace:
            return
        mine = first.owner == replicas.rank
        sides = {state.subspace.from_right for state in batch.states}
        ready = all(state.warm for state in batch.states) and len(sides) == 1
        # Only the owner knows a start that is not warm yet: the others know its shape.
        start = _start(batch, S) if mine or ready else _blank_start(batch)
        if not ready:
            start = Subspace(by_columns(start.basis).clone(), start.from_right)
            self.exchanged.append((first.owner, start.basis))
        *_, m, n = S.shape
        rows = m if start.from_right else n
        shape = (*start.basis.shape[:-2], rows, first.width)
        image = torch.empty(shape, dtype=S.dtype, device=S.device)
        basis = by_columns(torch.empty_like(image))
        if mine:
            seen, refined = refine(S, start)
            image.copy_(seen.left if start.from_right else seen.right)
            if refined.basis.shape == basis.shape:  # else the basis remains the start
                basis.copy_(refined.basis)
        self.start, self.image, self.basis = start, image, basis
        self.exchanged += [(first.owner, image), (first.owner, basis)]

    def read_image(self) -> tuple[Image, Subspace]:
        return read_image(self.image, self.start, self.basis)


def _blank_start(batch: Batch) -> Subspace:
    """A subspace with the shape and the side of the start that the owner computes."""
    first = batch.states[0]
    basis = torch.empty_like(first.subspace.basis)
    if len(batch.states) > 1:
        basis = basis.expand(len(batch.states), *basis.shape).clone()
    return Subspace(basis, first.subspace.from_right)
