"""Numbers on a device, read where that costs no waiting, or one step late."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wellcond.training.state import WeightState

# Whether looks at weights on the CPU are judged at the next step too, as on a device; for tests.
LATE = False


class DeferredChecks:
    """Flags that must all be true: on the CPU read at once, elsewhere where that is free.

    A device runs behind the host, so several may be under way; each is read once its copy is there.
    """

    def __init__(self) -> None:
        self._waiting: deque[_Check] = deque()

    def add(self, flags: Tensor, refuse: Callable[[list[bool]], None]) -> None:
        """`refuse` is given the flags and raises unless all are true."""
        if flags.is_cpu:
            refuse(flags.tolist())
            return
        copied = flags.to("cpu", non_blocking=True)
        event = torch.Event(flags.device)
        event.record()
        self._waiting.append(_Check(copied, event, refuse))

    def raise_ready(self) -> None:
        """Reads all that have arrived, the oldest first."""
        while self._waiting and self._waiting[0].event.query():
            check = self._waiting.popleft()
            check.refuse(check.flags.tolist())


class _Check(NamedTuple):
    flags: Tensor
    event: Any
    refuse: Callable[[list[bool]], None]


class Sight:
    """What a look has found of some weights, on its way to the host, which judges it."""

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
        """Has the weights take it in, but those whose record was replaced meanwhile."""
        for state, record, own in zip(self.states, self._records, self.read(), strict=True):
            if state.record is record:
                state.judge(own)

    def read(self) -> list[list[list[float]]]:
        """Per weight the numbers of its matrices. It waits for the look, not for what follows."""
        if self._event is not None:
            self._event.synchronize()
        shape = len(self.states), -1, self._numbers.shape[-1]
        rows: list[list[list[float]]] = self._numbers.reshape(shape).tolist()
        return rows
