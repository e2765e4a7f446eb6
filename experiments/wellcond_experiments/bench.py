"""`wellcond bench NAME`: cost and accuracy of regularising and measuring."""

from __future__ import annotations

import argparse

from wellcond_experiments.bench_audit import Audit
from wellcond_experiments.bench_file import File
from wellcond_experiments.bench_limit import Limit
from wellcond_experiments.bench_processes import Processes
from wellcond_experiments.bench_soak import Soak
from wellcond_experiments.bench_step import Step
from wellcond_experiments.bench_train import Fidelity, Strength
from wellcond_experiments.benchmark import Benchmark, add_command

BENCHMARKS: tuple[type[Benchmark], ...] = (
    *(Step, Limit, Fidelity, Strength),
    *(Audit, File, Processes, Soak),
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds a subcommand per benchmark."""
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for kind in BENCHMARKS:
        add_command(benchmarks, kind)
