"""Conflicts with a hard limit on a weight: masks, exact zeros, quantisation in forward."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from wellcond.operators.stored import StoredMatrix
from wellcond.training.state import WeightState

# The attributes in which layers of torch.ao, torchao, Brevitas, ModelOpt and pytorch-quantization
# store the module that quantises their weight in forward.
_QUANTISERS = (
    *("weight_fake_quant", "weight_fake_quantizer"),
    *("weight_quant", "weight_quantizer", "_weight_quantizer"),
)


def find_masked(states: Iterable[WeightState]) -> list[str]:
    """The weights whose module has a mask of their shape."""
    return [
        state.name
        for state in states
        if any(
            "mask" in name and _covers(mask, source.parameter)
            for source in state.weight.sources
            for name, mask in source.owner._buffers.items()
        )
    ]


def _covers(mask: Tensor | None, weight: Tensor) -> bool:
    """Whether a mask applies to every entry of a weight, or to its rows or columns."""
    if mask is None or mask.ndim != weight.ndim or mask.numel() == 1:
        return False
    return all(a in (1, b) for a, b in zip(mask.shape, weight.shape, strict=True))


def find_quantised(states: Iterable[WeightState]) -> list[str]:
    """The weights that their module quantises in forward."""
    return [
        state.name
        for state in states
        if any(
            isinstance(getattr(source.owner, name, None), nn.Module)
            for source in state.weight.sources
            for name in _QUANTISERS
        )
    ]


def count_nonzeros(states: Iterable[WeightState]) -> dict[str, tuple[int, int]]:
    """Returns the numbers of nonzero entries and of all entries per weight, or per local shard.

    Reads from the device.
    """
    return {
        state.name: (int(torch.count_nonzero(S.S)), S.S.numel())
        for state in states
        if isinstance(S := state.operator(), StoredMatrix) and not S.S.is_meta
    }
