"""Detects training that bypasses the hooks of the attached optimizer.

If another library or a user replaces the step of an optimizer, the new step runs no hooks. Such a
step is recognised by its code or by the changes of the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from wellcond.linalg.checks import lacks_values
from wellcond.operators.sharded import is_sharded
from wellcond.training.state import WeightState

# In-place changes per weight that indicate training. An optimizer makes one or two per step,
# load_state_dict one, and an initialisation up to five, but before there is a gradient.
_CHANGES, _WITHOUT_GRADIENT = 3, 10
_ENTRIES = 8  # compared per weight
_LOOKS = 3  # that find changed entries: loading weights or an average explains one or two


class Changes:
    """Changes of weights, except by the regulariser, before the optimizer takes a step.

    A tensor counts its in-place changes, but not writes to its `.data`. A few entries of each
    weight are compared to detect those.
    """

    def __init__(self, states: Sequence[WeightState]) -> None:
        self._states = states
        self._version = self._count()
        self._sample = self._entries()
        self._looks = 0

    def _parameters(self) -> list[Tensor]:
        each = {id(p): p for state in self._states for p in state.weight.parameters}
        return list(each.values())

    def _count(self) -> int:
        return sum(p._version for p in self._parameters() if not p.is_inference())

    def _entries(self) -> list[Tensor]:
        return [_some(p) for p in self._parameters() if not lacks_values(p)]

    def look(self) -> None:
        """Compares entries with those at the last call: reads from the device once."""
        before, self._sample = self._sample, self._entries()
        pairs = list(zip(before, self._sample, strict=False))
        if len(before) != len(self._sample) or any(a.shape != b.shape for a, b in pairs):
            return  # a weight was on the meta device, or is now sharded differently
        device = torch.device("cpu") if not pairs else pairs[0][1].device
        moved = [(a.to(b) != b).any().to(device) for a, b in pairs]
        self._looks += bool(moved) and bool(torch.stack(moved).any())

    @contextlib.contextmanager
    def own(self) -> Iterator[None]:
        """A context in which the regulariser changes the weights."""
        before = self._count()
        try:
            yield
        finally:
            self._version += self._count() - before
            self._sample = self._entries()

    def show_training(self, optimizer: Optimizer | None) -> bool:
        """Whether the changes so far indicate training."""
        parameters = self._parameters()
        least = _CHANGES if any(p.grad is not None for p in parameters) else _WITHOUT_GRADIENT
        if self._count() - self._version >= least * len(parameters):
            return True
        replaced = optimizer is not None and is_replaced(optimizer)
        return self._looks >= (1 if replaced else _LOOKS)


def _some(parameter: Any) -> Tensor:
    """A copy of a few entries, spread over the part that this process has."""
    local: Tensor = parameter.detach()
    if is_sharded(local):
        local = local.to_local()  # type: ignore[attr-defined]
    if not local.numel():
        return local.flatten()
    count = min(_ENTRIES, local.numel())
    numbers = torch.linspace(0, local.numel() - 1, count, dtype=torch.float64, device="cpu").long()
    entries = local[torch.unravel_index(numbers.to(local.device), local.shape)]
    return entries.nan_to_num()  # NaN equals nothing


def is_replaced(optimizer: Optimizer) -> bool:
    """Whether the `step` of this object was replaced by one that runs no hooks.

    A scheduler, torch.compile and GradScaler wrap the step, and the wrapper leads to the original.
    Code that calls some `step`, and code that cannot be read, is assumed to run the hooks.
    """
    own = vars(optimizer).get("step")
    return own is not None and not _leads_to_a_step(own)


def _leads_to_a_step(function: Callable[..., Any]) -> bool:
    waiting: list[Any] = [function]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        code = getattr(one, "__code__", None)
        inner = [
            getattr(one, name, None)
            for name in ("__wrapped__", "__func__", "func", "_torchdynamo_orig_callable")
        ]
        inner = [found for found in inner if callable(found)]
        calls = code is not None and "step" in code.co_names
        if getattr(one, "hooked", False) or calls or (code is None and not inner):
            return True
        for cell in getattr(one, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # an empty cell
                inner += [cell.cell_contents] if hasattr(cell.cell_contents, "__code__") else []
        waiting += inner
    return False
