"""Watches of weights under a hard limit: does a weight exceed it after this optimizer step?

Training moves a weight little between two steps. Therefore one to three skinny products with the
blocks of singular vectors from the last check show whether an end of the spectrum has passed its
bound. If it has, or if the blocks cannot decide, the weight is decomposed and projected, which
renews the blocks. A check produces numbers on the device of the weight; the host judges them when
they arrive.

Letters: L (..., m, n), m >= n, the weight or its transpose, the longer side first; V (..., n, k) a
block; sigma_1 >= ... >= sigma_n the singular values; kappa = sigma_1/sigma_n.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from wellcond.linalg.projection import GramDecomposition
from wellcond.linalg.symmetric import Clip, clip_blocks, eigenvalue_range
from wellcond.operators.base import HasGram, Operator
from wellcond.operators.stored import StoredMatrix
from wellcond.rules.base import RuleState

Product = Callable[[Tensor], Tensor]
# The most singular values of a weight that `EndsWatch` follows, because it stores all vectors.
LARGEST = 4096


class Reading(NamedTuple):
    """The result of a check of some weights.

    Attributes:
        numbers: the input of `Watch.judge`, (..., j) per matrix.
        sights: the new state of every weight.
        change: U, V such that every weight becomes L + U V^T at once; None: no change.
        scale: factors by which all matrices are multiplied at once; None: no change.
    """

    numbers: Tensor
    sights: list[RuleState]
    change: tuple[Tensor, Tensor] | None = None
    scale: Tensor | None = None


class Turn(NamedTuple):
    """Weights of one kind that are to be checked.

    Attributes:
        watch: how the weights are watched.
        S: the weights: a stack, or a single one.
        memories: the state of every weight.
        products: the number of products with the weights that refine a block; more than one if the
            weights may have moved far.
        from_right: whether the block that was refined last is on the short side.
    """

    watch: Watch
    S: Operator
    memories: Sequence[RuleState]
    products: int = 1
    from_right: bool = True


class Glance(NamedTuple):
    """The products of a check; `block` (..., m, k) is to be clipped to 1."""

    tensors: tuple[Tensor, ...]
    block: Tensor | None = None


class Judgement(NamedTuple):
    """The conclusions of the host from the numbers of one weight; its values are estimates.

    Attributes:
        due: whether the weight must be decomposed.
        alert: whether the weight must be checked again, more closely, after the next step.
        largest: sigma_1; for a stack, the largest of all.
        smallest: sigma_n; for a stack, the smallest of all; nan if it was not measured.
        excess: the factor by which the limit was exceeded; for a stack, the worst.
        blind: whether the blocks cannot decide.
        unsure: whether the weight must be decomposed unless it is checked often and moves steadily.
    """

    due: bool
    alert: bool
    largest: float
    smallest: float
    excess: float
    blind: bool = False
    unsure: bool = False


class Watch(abc.ABC):
    """How the weights under one limit are watched; the state of a weight is kept elsewhere.

    Attributes:
        period: optimizer steps between two checks while nothing happens.
        check: optimizer steps after which a weight near its limit is decomposed in any case;
            0: never.
        rest: the minimum of optimizer steps between two applications, unless the watch is blind.
        large: the keys of state tensors that are as large as a square weight.
    """

    period: ClassVar[int]
    check: ClassVar[int] = 0
    rest: ClassVar[int] = 0
    large: ClassVar[frozenset[str]] = frozenset()

    @abc.abstractmethod
    def init(self, S: Operator) -> RuleState:
        """The initial state of a weight, in its final shapes."""

    @abc.abstractmethod
    def glance(self, turn: Turn) -> Glance:
        """The first part of a check: products with the weights."""

    @abc.abstractmethod
    def read(self, turn: Turn, glance: Glance, clip: Clip | None) -> Reading:
        """The second part of a check; `clip` belongs to the block of the glance."""

    @abc.abstractmethod
    def blank(self, turn: Turn) -> Reading:
        """A reading of the right shapes, for a process that receives the numbers."""

    def tensors(self, reading: Reading) -> list[Tensor]:
        """All tensors of a reading, in a fixed order."""
        small = [own for one in reading.sights for key, own in one.items() if key not in self.large]
        scale = () if reading.scale is None else (reading.scale,)
        return [reading.numbers, *(reading.change or ()), *scale, *small]

    @abc.abstractmethod
    def judge(self, numbers: Sequence[Sequence[float]], is_one_map: bool) -> Judgement:
        """The judgement on one weight, from the numbers of its matrices."""

    @abc.abstractmethod
    def renew(self, spectrum: GramDecomposition | None) -> RuleState | None:
        """The state of a weight that was just decomposed; None without a decomposition."""


class TopWatch(Watch):
    """An upper bound only: every step refines and clips a block of leading vectors.

    With orthonormal V, the singular values of the part L V V^T of L are clipped to the bound, and
    the left singular vectors U of L V are the block of the next step, on the other side. This costs
    one product, a small eigenvalue problem and an update of rank k. It suffices while fewer than k
    values are near the bound. If all values of a block are near the bound, the block is saturated:
    other values may be above the bound, and the weight is decomposed.
    """

    WIDTH = 16
    # REACH to FAR are in units of the bound.
    REACH = 0.9  # a block whose smallest value is above is saturated
    CROWDED = 0.7  # if the smallest value is above, values outside the block may be near the bound
    SWIFT = 1.15  # a larger value moves so fast that the next check needs a second product
    SURE = 1.25  # the vectors of a larger value may have turned, unless it moves steadily
    FAR = 4.0  # an update of rank k nearly cancels a weight with a larger value
    FLAT = 1e-2  # smallest over largest value; above, eigenvectors give an orthonormal basis
    period = 1
    check = 100

    def __init__(self, upper: float, nu: int) -> None:
        self.upper = upper
        self.nu, self.width = nu, min(self.WIDTH, nu)

    def init(self, S: Operator) -> RuleState:
        def start(side: int) -> Tensor:
            block = torch.eye(side, self.width, dtype=S.dtype, device=S.device)
            return block.expand(*S.shape[:-2], side, self.width).clone()

        if self.width == self.nu:  # the block is an identity: the Gram matrix shows all values
            return {"right": start(self.nu)}
        return {"right": start(self.nu), "left": start(max(S.shape[-2:]))}

    def glance(self, turn: Turn) -> Glance:
        products = _products(turn.S)
        if self.width == self.nu:
            V = _stack(turn.memories, "right")
            image = products[0](V)
            return Glance((image, V), self._scaled(image))
        from_right = turn.from_right
        block = _stack(turn.memories, "right" if from_right else "left")
        image = products[not from_right](block)
        for _ in range(turn.products - 1):
            block, from_right = _orthonormal(image), not from_right
            image = products[not from_right](block)
        return Glance((image, block), self._scaled(image))

    def _scaled(self, image: Tensor) -> Tensor:
        return image if self.upper == 1 else image / self.upper

    def read(self, turn: Turn, glance: Glance, clip: Clip | None) -> Reading:
        assert clip is not None
        image, block = glance.tensors
        from_right = turn.from_right == (turn.products % 2 == 1)
        change = None if clip.factor is None else (image @ clip.factor, block)
        if self.width == self.nu:
            return Reading(clip.extremes, list(turn.memories), change)
        if change and not from_right:
            change = change[::-1]
        root = clip.root
        new = _orthonormal(image) if root is None else cast(Tensor, glance.block) @ root
        sights = _unstack(turn.memories, **{"left" if from_right else "right": new})
        return Reading(clip.extremes, sights, change)

    def blank(self, turn: Turn) -> Reading:
        V = _stack(turn.memories, "right")
        U = V.new_zeros(*V.shape[:-2], max(turn.S.shape[-2:]), self.width)
        sights = [{key: own.clone() for key, own in one.items()} for one in turn.memories]
        numbers = V.new_zeros(*V.shape[:-2], 2)
        return Reading(numbers, sights, (U, torch.zeros_like(V)))

    def judge(self, numbers: Sequence[Sequence[float]], is_one_map: bool) -> Judgement:
        blind = any(math.isnan(most) for _, most in numbers)
        least, most = (
            math.sqrt(max(0.0, *each)) for each in zip(*numbers, (0.0, 0.0), strict=True)
        )
        saturated = least > self.REACH and self.width < self.nu
        due = blind or saturated or most >= self.FAR
        if blind:
            return Judgement(due, False, math.nan, math.nan, math.nan, blind)
        # The values in the block are already clipped.
        excess = most if most >= self.FAR else min(most, 1.0)
        crowded = least > self.CROWDED and self.width < self.nu
        alert = crowded or most > self.SWIFT
        unsure = most >= self.SURE and self.width < self.nu
        return Judgement(due, alert, most * self.upper, math.nan, excess, unsure=unsure)

    def renew(self, spectrum: GramDecomposition | None) -> RuleState | None:
        if spectrum is None:
            return None
        if self.width == self.nu:
            return {}
        return {"right": spectrum.V[..., -self.width :].contiguous()}


class Ends(NamedTuple):
    """Bounds of both ends of a spectrum, in Python numbers."""

    max_condition: float = math.inf
    lower: float = 0.0
    upper: float = math.inf

    def excess(self, largest: float, smallest: float) -> float:
        """The factor by which the bounds are exceeded, at most 1 if they hold.

        For a zero matrix it is inf with a lower bound, otherwise 0.
        """
        if not largest > 0:
            return math.inf if self.lower else 0.0
        # An infinite bound is never exceeded, and inf/inf would hide the other ratios.
        condition_number = largest / smallest if smallest > 0 else math.inf
        ratio = condition_number / self.max_condition if self.max_condition < math.inf else 0.0
        below = self.lower / smallest if smallest > 0 else math.inf if self.lower else 0.0
        return max(ratio, below, largest / self.upper)


class EndsWatch(Watch):
    """Both ends of the spectrum: a block at the top, a block at the bottom, a preconditioner.

    The top block is refined by a product with L L^T, the bottom block by V - P (L^T L V - V theta)
    with theta = V^T L^T L V, where P = (L^T L)^(-1) comes from the last decomposition. Every check
    measures on fixed vectors X whether P is still a preconditioner: rho = ||P L^T L X - X||/||X||.
    A small matrix needs no blocks, because its Gram matrix shows both ends.
    """

    WIDTH = 24
    BLIND = 1.0  # from this rho on, refinement of the bottom does not converge
    OVERSHOT = 1.02  # times the limit: a larger value rises fast
    PROBES = 4
    large = frozenset({"vectors"})

    def __init__(self, limit: Ends, trigger: Ends, nu: int) -> None:
        self.limit, self.trigger, self.nu = limit, trigger, nu

    @property
    def follows(self) -> bool:
        """Whether blocks are kept."""
        return self.nu > self.WIDTH

    @property
    def period(self) -> int:  # type: ignore[override]
        return 5 if self.follows else 1

    def init(self, S: Operator) -> RuleState:
        def zeros(*sides: int) -> Tensor:
            return torch.zeros((*S.shape[:-2], *sides), dtype=S.dtype, device=S.device)

        memory = {"unit": zeros() + 1}
        if self.follows:
            memory |= {"top": zeros(self.nu, self.WIDTH), "bottom": zeros(self.nu, self.WIDTH)}
            memory |= {"values": zeros(self.nu), "vectors": zeros(self.nu, self.nu)}
        return memory

    def glance(self, turn: Turn) -> Glance:
        S, memories = turn.S, turn.memories
        unit = _stack(memories, "unit")
        if not self.follows:
            ends = eigenvalue_range(cast(HasGram, S).gram(unit=unit))
            rest = ends.new_zeros(*ends.shape[:-1], 1)
            numbers = torch.cat([rest, ends.flip(-1), rest + torch.inf, rest], dim=-1)
            return Glance((_append(numbers, unit),))
        k = self.WIDTH
        forward, backward = _products(S)
        top, bottom = _stack(memories, "top"), _stack(memories, "bottom")
        probes = _probes(self.nu, self.PROBES, top.dtype, top.device)
        scale = unit[..., None, None]
        probes = probes.expand(*top.shape[:-1], -1)
        Y = forward(torch.cat([top, bottom, probes], dim=-1)) / scale
        U = torch.linalg.qr(Y[..., :k]).Q
        A = backward(torch.cat([U, Y[..., k:]], dim=-1)) / scale
        Z, Y = A[..., :k], Y[..., k : 2 * k]
        residual = A[..., k : 2 * k] - bottom @ (Y.mT @ Y)
        solved = self._precondition(memories, torch.cat([residual, A[..., 2 * k :]], dim=-1))
        rho = torch.linalg.matrix_norm(solved[..., k:] - probes) / torch.linalg.matrix_norm(probes)
        bottom = torch.linalg.qr(bottom - solved[..., :k]).Q
        Y = forward(bottom) / scale
        ranges = [eigenvalue_range(X.mT @ X) for X in (Z, Y)]
        numbers = torch.cat([ranges[0], ranges[1], rho[..., None]], dim=-1)
        return Glance((_append(numbers, unit), Z, bottom))

    def read(self, turn: Turn, glance: Glance, clip: Clip | None) -> Reading:
        numbers, *blocks = glance.tensors
        new = dict(zip(("top", "bottom"), blocks, strict=False))
        return Reading(numbers, _unstack(turn.memories, **new) if new else list(turn.memories))

    def blank(self, turn: Turn) -> Reading:
        memories = turn.memories
        sights = [
            {key: own if key in self.large else own.clone() for key, own in memory.items()}
            for memory in memories
        ]
        unit = _stack(memories, "unit")
        return Reading(unit.new_zeros(*unit.shape, 6), sights)

    def _precondition(self, memories: Sequence[RuleState], R: Tensor) -> Tensor:
        """P R from the eigenvectors, one weight after the other because these are large."""
        each = R.unbind() if len(memories) > 1 else (R,)
        solved = []
        for memory, own in zip(memories, each, strict=True):
            V, values = memory["vectors"], memory["values"]
            solved.append(V @ ((V.mT @ own) / values.square()[..., None]))
        return torch.stack(solved) if len(memories) > 1 else solved[0]

    def judge(self, numbers: Sequence[Sequence[float]], is_one_map: bool) -> Judgement:
        blind = any(not math.isfinite(n) for row in numbers for n in (*row[:3], row[4]))
        blind = blind or max(row[4] for row in numbers) > self.BLIND
        rows = [(*(math.sqrt(max(0.0, x)) * row[5] for x in row[:4]),) for row in numbers]
        if is_one_map:
            rows = [(0.0, max(r[1] for r in rows), min(r[2] for r in rows), math.inf)]
        pairs = [(largest, smallest) for _, largest, smallest, _ in rows]
        excess = max(self.limit.excess(*pair) for pair in pairs)
        due = blind or any(self.trigger.excess(*pair) > 1 for pair in pairs)
        largest, smallest = max(r[1] for r in rows), min(r[2] for r in rows)
        alert = excess > self.OVERSHOT
        return Judgement(due, alert, largest, smallest, excess, blind)

    def renew(self, spectrum: GramDecomposition | None) -> RuleState | None:
        if spectrum is None:
            return None
        unit = spectrum.sigma[..., -1]
        memory = {"unit": unit}
        if self.follows:
            V, k = spectrum.V, self.WIDTH
            memory |= {"top": V[..., -k:].contiguous(), "bottom": V[..., :k].contiguous()}
            memory |= {"values": spectrum.sigma / unit[..., None], "vectors": V}
        return memory


@functools.cache
def _probes(nu: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The vectors on which a preconditioner is measured, from a separate generator."""
    source = torch.Generator("cpu").manual_seed(nu)
    return torch.randn(nu, count, generator=source, device="cpu").to(device, dtype)


def look_at(turns: Sequence[Turn]) -> list[Reading]:
    """Checks weights; operations on small matrices run once per device and dtype."""
    glances = [turn.watch.glance(turn) for turn in turns]
    together: dict[object, list[int]] = {}
    for index, glance in enumerate(glances):
        if (Z := glance.block) is not None:
            together.setdefault((Z.device, Z.dtype), []).append(index)
    clips: dict[int, Clip] = {}
    for indices in together.values():
        blocks = [cast(Tensor, glances[index].block) for index in indices]
        found = clip_blocks(blocks, TopWatch.FAR, TopWatch.FLAT)
        clips.update(zip(indices, found, strict=True))
    each = enumerate(zip(turns, glances, strict=True))
    return [turn.watch.read(turn, glance, clips.get(index)) for index, (turn, glance) in each]


def _append(numbers: Tensor, unit: Tensor) -> Tensor:
    return torch.cat([numbers, unit[..., None]], dim=-1)


def _products(S: Operator) -> tuple[Product, Product]:
    """The products with L and with its transpose."""
    pair: tuple[Product, Product] = S.matmat, S.rmatmat
    if type(S) is StoredMatrix and S.S.dtype == S.dtype:  # with less overhead
        # U^T S reads the rows in the order of memory: up to 1.4 times as fast as S^T U.
        pair = S.S.matmul, lambda U: torch.matmul(U.mT, S.S).mT
    return pair if cast(HasGram, S).upright else pair[::-1]


def _orthonormal(X: Tensor) -> Tensor:
    # In the memory layout of a product, so that replicas round later results identically.
    basis: Tensor = torch.linalg.qr(X).Q.contiguous()
    return basis


def _stack(memories: Sequence[RuleState], key: str) -> Tensor:
    """The state of all weights under this key; that of a single weight is not stacked."""
    if len(memories) == 1:
        return memories[0][key]
    return torch.stack([memory[key] for memory in memories])


def _unstack(memories: Sequence[RuleState], **new: Tensor) -> list[RuleState]:
    """The memories, with new tensors under these keys."""
    if len(memories) == 1:
        return [memories[0] | new]
    each = zip(*(tensor.unbind() for tensor in new.values()), strict=True)
    return [
        memory | dict(zip(new, own, strict=True))
        for memory, own in zip(memories, each, strict=True)
    ]
