"""Estimates of weights while they train: two products each, no SVD, one copy to the host.

Letters: S (..., m, n) a weight; sigma_1 its largest singular value; nu = min(m, n).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wellcond.linalg.spectrum import measure
from wellcond.operators.stored import Operator
from wellcond.operators.subspace import Product, cold_start, refine, residual, top_pair, warmed
from wellcond.training.state import Memory, look


@dataclass(frozen=True)
class Estimate:
    """What one product with a weight tells of it; numbers are estimates, in float32 or wider.

    Attributes:
        sigma_max: ||S v|| for a unit vector v: a lower bound of the spectral norm sigma_1.
        residual: ||S^T u - sigma_max v||; some singular value lies this close to sigma_max.
        stable_rank: ||S||_F^2/sigma_max^2, from above, between 1 and nu; nu means kappa = 1.
        penalty: the penalty at strength 1, from below, for that vector.
        strength: the strength that was or would be applied at this step.
        step: how many applications (optimizer steps when attached) the weight has seen.
        shortened_steps: proximal steps that the width of the block cut short.
        nu: min(m, n).
        condition_number: sigma_1/sigma_nu as measured in float64; None where that was not asked.
        status: "" when all is well, else what is the matter with the weight.
    """

    sigma_max: float
    residual: float
    stable_rank: float
    penalty: float
    strength: float
    step: int
    shortened_steps: int
    nu: int
    condition_number: float | None = None
    status: str = ""


def estimates(
    memories: Sequence[Memory], block: int, condition_numbers: bool = False
) -> dict[str, Estimate]:
    """An estimate for every matrix by name; what is remembered stays as it is."""
    rows: dict[str, Tensor] = {}
    for seen in look([memory for memory in memories if memory.penalty.needs_subspace]):
        assert seen.product is not None
        told = _told(seen.memories[0], seen.S, seen.product)
        for memory, (row,) in zip(seen.memories, seen.each(told), strict=True):
            rows[memory.name] = row
    for memory in memories:
        if memory.name not in rows:
            # It keeps no subspace; for a report a fresh one is good enough.
            S = memory.operator()
            cold = cold_start(S, min(block, S.nu), memory.name)
            rows[memory.name] = _told(memory, S, refine(S, warmed(S, cold))[0])
    found: dict[str, Estimate] = {}
    for memory, numbers in zip(memories, _on_host(memories, rows), strict=True):
        kappas = _condition_numbers(memory) if condition_numbers else [None] * len(numbers)
        for index, (own, kappa) in enumerate(zip(numbers, kappas, strict=True)):
            name = memory.name if len(memory.shape) == 2 else f"{memory.name}:{index}"
            found[name] = _estimate(memory, own, kappa)
    return found


def _on_host(memories: Sequence[Memory], rows: dict[str, Tensor]) -> list[list[list[float]]]:
    """Per weight the numbers of its matrices, all in one copy from the device."""
    each = [rows[m.name].reshape(-1, rows[m.name].shape[-1]) for m in memories]
    counts = [m.shortened.double().expand(len(r), 1) for m, r in zip(memories, each, strict=True)]
    together = [torch.cat(pair, dim=1) for pair in zip(each, counts, strict=True)]
    numbers: list[list[float]] = torch.cat(together).tolist() if together else []
    return [[numbers.pop(0) for _ in one] for one in each]


def _told(memory: Memory, S: Operator, product: Product) -> Tensor:
    columns = [
        top_pair(product).sigma[..., 0],
        residual(S, product),
        S.squared_frobenius_norm(),
        memory.penalty.value(S, product),
        product.finite,
    ]
    return torch.stack([column.double() for column in columns], dim=-1)


def _estimate(memory: Memory, row: list[float], kappa: float | None) -> Estimate:
    sigma, error, squared_norm, value, finite, shortened = row
    status = "" if sigma > 0 else "zero: every singular value is 0"
    if not finite:
        sigma = error = value = squared_norm = math.nan
        status = "not finite: it holds NaN or infinity"
    return Estimate(
        sigma_max=sigma,
        residual=error,
        stable_rank=squared_norm / sigma / sigma if sigma else math.nan,
        penalty=value,
        strength=memory.penalty.strength_at(memory.step),
        step=memory.step,
        shortened_steps=int(shortened),
        nu=min(memory.shape[-2:]),
        condition_number=kappa,
        status=status,
    )


def _condition_numbers(memory: Memory) -> list[float | None]:
    each = memory.operator().dense().reshape(-1, *memory.shape[-2:])
    return [
        measure(S).condition_number if bool(torch.isfinite(S).all()) else math.nan for S in each
    ]
