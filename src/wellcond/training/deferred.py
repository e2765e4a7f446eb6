"""Numbers on a device that are read without waiting, or one step late."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wellcond.training.state import WeightState

# For tests: evaluate estimates of weights on the CPU at the next step, as on other devices.
LATE = False


class DeferredChecks:
    """Flags that must all be true: read at once on the CPU, elsewhere when that needs no waiting.

    A device runs behind the host, so several copies can be pending; each is read once it arrived.
    """

    def __init__(self) -> None:
        self._waiting: deque[_Check] = deque()

    def add(self, flags: Tensor, refuse: Callable[[list[bool]], None]) -> None:
        """Adds flags; `refuse` takes them and raises unless all are true."""
        if flags.is_cpu:
            refuse(flags.tolist())
            return
        copied = flags.to("cpu", non_blocking=True)
        event = torch.Event(flags.device)
        event.record()
        self._waiting.append(_Check(copied, event, refuse))

    def raise_ready(self) -> None:
        """Reads all flags that have arrived, the oldest first."""
        while self._waiting and self._waiting[0].event.query():
            check = self._waiting.popleft()
            check.refuse(check.flags.tolist())


class _Check(NamedTuple):
    flags: Tensor
    event: Any
    refuse: Callable[[list[bool]], None]


class Sight:
    """Estimates of watched weights on their way to the host, which evaluates them."""

    def __init__(self, states: list[WeightState], numbers: Tensor) -> None:
        self.states = states
        self._records = [state.record for state in states]
        self.is_here = numbers.is_cpu and not LATE
        self._event = None
        if numbers.is_cpu:
            self._numbers = numbers
            return
        self._numbers = numbers.to("cpu", non_blocking=True)
        self._event = torch.Event(numbers.device)
        self._event.record()

    def judge(self) -> None:
        """Updates the weights, except those whose record was replaced in the meantime."""
        for state, record, own in zip(self.states, self._records, self.read(), strict=True):
            if state.record is record:
                state.judge(own)

    def read(self) -> list[list[list[float]]]:
        """Returns the numbers per weight and matrix. Waits for the estimate, not for later work."""
        if self._event is not None:
            self._event.synchronize()
        shape = len(self.states), -1, self._numbers.shape[-1]
        rows: list[list[list[float]]] = self._numbers.reshape(shape).tolist()
        return rows
