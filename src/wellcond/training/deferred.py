"""Flags on a device, read where that costs no waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


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
