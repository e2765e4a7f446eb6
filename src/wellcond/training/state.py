"""What is remembered of each regularised weight, and one product with all of them.

Looking at the weights changes nothing: it returns what the products tell and the subspaces refined
by them. Weights of one kind are looked at as one stack, so that all but the products themselves is
done once for all of them.

Letters: S (..., m, n) a weight, or a stack of weights of one kind; k the width of its subspace.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from wellcond.operators.sharded import Replicas, operator_of
from wellcond.operators.stored import Operator, SeparateMatrices, StoredMatrix
from wellcond.operators.subspace import (
    Product,
    Subspace,
    by_columns,
    cold_start,
    completed,
    refine,
    warmed,
)
from wellcond.penalties.base import Penalty
from wellcond.weights.discover import Weight


class Memory:
    """A regularised weight and what is remembered of it."""

    def __init__(self, weight: Weight, penalty: Penalty, block: int) -> None:
        self.weight = weight
        self.penalty = penalty
        self.step = 0
        try:
            S = self.operator()
        except ValueError as error:
            raise ValueError(f'"{weight.name}": {error}') from None
        self.shape = S.shape
        self.width = min(block, S.nu) if penalty.needs_subspace else 0
        # Cold until first used: the weights may be loaded after the regulariser is made.
        self.subspace = cold_start(S, self.width, weight.name)
        self.warm = False
        self.owner = 0  # the process that refines it, among replicas
        self.slot = 0  # the number of its parameter, which several views may share
        self.strength = torch.zeros((), dtype=S.dtype, device=S.device)
        self.shortened = torch.zeros((), dtype=torch.int64, device=S.device)
        # Since the last proximal step: optimizer steps, and the sum of their learning rates.
        self.pending_steps = 0
        self.pending_lr: float | Tensor = 0.0

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def active(self) -> bool:
        return self.weight.parameter.requires_grad

    def operator(self, parameter: Tensor | None = None) -> StoredMatrix:
        """The weight, or what is given in place of its parameter, as a linear map."""
        tensor = self.weight.parameter if parameter is None else parameter
        seed = (zlib.crc32(self.name.encode()) << 31) + self.step
        return operator_of(self.weight.view, tensor.detach(), seed)

    def follow(self, device: torch.device) -> None:
        """Moves the memory to where the weight is now."""
        if self.strength.device != device:
            left, right, from_right = self.subspace
            self.subspace = Subspace(left.to(device), right.to(device), from_right)
            self.strength = self.strength.to(device)
            self.shortened = self.shortened.to(device)

    def state(self) -> dict[str, Tensor]:
        """The memory as tensors of fixed shape."""
        return {
            "left": self.subspace.left,
            "right": self.subspace.right,
            "from_right": torch.tensor(self.subspace.from_right),
            "warm": torch.tensor(self.warm),
            "step": torch.tensor(self.step),
            "shortened_steps": self.shortened,
            "pending_steps": torch.tensor(self.pending_steps),
            "pending_lr": torch.as_tensor(self.pending_lr, dtype=torch.float64).detach().cpu(),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        device, dtype = self.strength.device, self.strength.dtype
        left, right = (state[side].to(device, dtype, copy=True) for side in ("left", "right"))
        self.subspace = Subspace(by_columns(left), by_columns(right), bool(state["from_right"]))
        self.warm = bool(state["warm"])
        self.shortened = state["shortened_steps"].to(device, copy=True)
        self.step = int(state["step"])
        self.pending_steps = int(state["pending_steps"])
        self.pending_lr = float(state["pending_lr"])


@contextlib.contextmanager
def quietly(memories: Sequence[Memory]) -> Iterator[None]:
    """Outside of autograd, and in full precision under autocast."""
    kind = memories[0].weight.parameter.device.type
    cast = torch.amp.is_autocast_available(kind)
    precise = torch.autocast(kind, enabled=False) if cast else contextlib.nullcontext()
    with torch.no_grad(), precise:
        yield


class Look(NamedTuple):
    """What was seen of weights of one kind, before anything is done to them.

    One weight is seen as it is; several as a stack, in whose first dimension they lie.
    """

    memories: list[Memory]
    operators: list[StoredMatrix]
    S: Operator
    product: Product | None
    subspace: Subspace | None
    finite: Tensor

    def each(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """The tensors of every weight."""
        if len(self.memories) == 1:
            return [tensors]
        return list(zip(*(tensor.unbind() for tensor in tensors), strict=True))

    def remember(self) -> None:
        """Keeps the refined subspaces."""
        if self.subspace is None:
            return
        left, right, from_right = self.subspace
        sides = self.each(left, right)
        for memory, (own_left, own_right) in zip(self.memories, sides, strict=True):
            memory.subspace = Subspace(own_left, own_right, from_right)
            memory.warm = True


def look(
    memories: Sequence[Memory],
    parameters: Sequence[Tensor] | None = None,
    replicas: Replicas | None = None,
) -> list[Look]:
    """One product with every weight, or with what is given in place of their parameters."""
    tensors = parameters or [memory.weight.parameter for memory in memories]
    groups: dict[object, list[tuple[Memory, StoredMatrix]]] = {}
    for memory, tensor in zip(memories, tensors, strict=True):
        S = memory.operator(tensor)
        memory.follow(S.device)
        groups.setdefault(_kind(memory, S), []).append((memory, S))
    started = []
    exchanged: list[tuple[int, Tensor]] = []
    for group in groups.values():
        first = group[0][0]
        operators = [S for _, S in group]
        stack: Operator = operators[0] if len(group) == 1 else SeparateMatrices(operators)
        subspace = image = basis = None
        if first.penalty.needs_subspace:
            subspace = _stacked([memory.subspace for memory, _ in group])
            if replicas is not None:
                subspace, image, basis = _shared(stack, subspace, first, replicas, exchanged)
        started.append(([memory for memory, _ in group], operators, stack, subspace, image, basis))
    if replicas is not None:
        replicas.exchange_(exchanged)
    looks = []
    for members, operators, stack, subspace, image, basis in started:
        product, refined = None, None
        if subspace is None:
            finite = operators[0].finite()
        else:
            if image is not None:
                product, refined = completed(image, subspace, basis)
            else:
                start = subspace if members[0].warm else warmed(stack, subspace)
                product, refined = refine(stack, start)
            finite = product.finite
        looks.append(Look(members, operators, stack, product, refined, finite))
    return looks


def _kind(memory: Memory, S: StoredMatrix) -> object:
    """What weights that are looked at as one stack have in common."""
    if not memory.penalty.needs_subspace:
        return memory.name
    from_right = memory.subspace.from_right
    return (
        *(S.kind, type(memory.penalty), memory.width, memory.warm, from_right),
        memory.owner,
    )


def _stacked(subspaces: list[Subspace]) -> Subspace:
    if len(subspaces) == 1:
        return subspaces[0]
    left, right = (torch.stack([getattr(s, side) for s in subspaces]) for side in ("left", "right"))
    return Subspace(left, right, subspaces[0].from_right)


def _shared(
    S: Operator,
    subspace: Subspace,
    first: Memory,
    replicas: Replicas,
    exchanged: list[tuple[int, Tensor]],
) -> tuple[Subspace, Tensor, Tensor]:
    """The start, its image and the basis of that: found here, or to be filled by their owner."""
    mine = first.owner == replicas.rank
    left, right, from_right = subspace
    if not first.warm:
        if mine:
            left, right, _ = warmed(S, subspace)
        left, right = by_columns(left).clone(), by_columns(right).clone()
        exchanged += [(first.owner, left), (first.owner, right)]
        subspace = Subspace(left, right, from_right)
    opposite = left if from_right else right
    image, basis = torch.empty(opposite.shape, dtype=S.dtype, device=S.device), opposite.clone()
    if mine:
        product, refined = refine(S, subspace)
        image.copy_(product.left if from_right else product.right)
        basis.copy_(refined.left if from_right else refined.right)
    exchanged += [(first.owner, image), (first.owner, basis)]
    return subspace, image, basis
