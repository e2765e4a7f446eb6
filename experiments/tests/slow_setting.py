"""An experiment with runs slow enough to be killed, in a module that workers can import."""

import time
from typing import Any, ClassVar

import torch

from wellcond_experiments.evidence import Evidence
from wellcond_experiments.grid import Cell, Measured, Setting
from wellcond_experiments.tables import Table


class Slow(Setting):
    name = "slow"
    help = protocol = "Slow."
    methods: ClassVar = {"none": (0.0,)}  # type: ignore[misc]

    def run(self, cell: Cell) -> Measured:
        time.sleep(0.2)
        x = torch.randn(200, 200, generator=torch.Generator().manual_seed(cell.seed))
        return Measured({"accuracy": float((x @ x).sum()), "threads": torch.get_num_threads()}, {})

    def tables(self, evidence: Evidence) -> dict[str, Table]:
        return {}

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        return {}
