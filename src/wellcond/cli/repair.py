"""The command `repair`."""

from __future__ import annotations

import argparse

import torch

from wellcond.audits.repair import repair
from wellcond.cli.terminal import say, show_progress
from wellcond.report.not_finite import describe_not_finite
from wellcond.report.repairs import describe_kept


def run_repair(arguments: argparse.Namespace) -> int:
    """Writes the repaired copy and prints what changed; returns the exit code."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    with show_progress("repairing") as progress:
        report = repair(
            arguments.path,
            arguments.out,
            arguments.max_condition,
            include=arguments.include,
            exclude=arguments.exclude,
            dequantise=arguments.dequantise,
            progress=progress,
        )
    print(report.to_json() if arguments.json else report.table(), end="")
    if arguments.json and (kept := describe_kept(report.skipped)):
        say(f"warning: {kept}")
    if report.not_finite:
        say(f"warning: copied: {describe_not_finite(report.not_finite)}")
    return 0
