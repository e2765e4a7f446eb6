"""What the `MonitorCallback`s have in common: their settings, and the `Monitor` that has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

import wellcond as wc


class Watcher:
    """The settings of a `Monitor` of a model that is there only when training starts."""

    def __init__(
        self, patterns: Sequence[str], block_size: int, condition_numbers: bool, layers: bool
    ) -> None:
        self.patterns = patterns
        self.block_size = block_size
        self.condition_numbers = condition_numbers
        self.layers = layers
        self.monitor: wc.Monitor | None = None

    def _watch(self, model: nn.Module) -> None:
        self.monitor = wc.Monitor(
            model,
            self.patterns,
            block_size=self.block_size,
            condition_numbers=self.condition_numbers,
        )

    def _measure(self, target: Any, step: int, every: int = 1) -> dict[str, float] | None:
        """Measures, logs to the target, and returns what was logged; None before the start."""
        if self.monitor is None:
            return None
        return self.monitor.log(target, step, every=every, layers=self.layers)
