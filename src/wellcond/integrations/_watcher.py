"""The common base of the `MonitorCallback`s: their settings and their `Monitor`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

import wellcond as wc


class Watcher:
    """Stores the settings of a `Monitor` until training starts and provides the model."""

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
        """Measures, logs to the target, and returns the logged values; None before training."""
        if self.monitor is None:
            return None
        return self.monitor.log(target, step, every=every, layers=self.layers)
