"""The command `audit`: measures checkpoints one by one and applies the gates to each."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from wellcond.audits.audit import Options, audit_together
from wellcond.audits.baseline import (
    SQUARES,
    Baseline,
    BaselineComparison,
    compare_with_baseline,
    read_baseline,
)
from wellcond.audits.compare import check_names, measure_changes
from wellcond.audits.executor import Executor
from wellcond.audits.sources import source_of
from wellcond.cli.answers import Answer, count_weights, print_answers, write_files
from wellcond.cli.options import max_rise
from wellcond.cli.terminal import describe_error, say, show_progress
from wellcond.report.comparison import Comparison, compare_reports
from wellcond.report.gate import (
    Fault,
    Rule,
    Verdict,
    begins_with,
    find_exceeding,
    find_low_coverage,
    find_unsound,
)
from wellcond.report.page import CURVES
from wellcond.report.pairing import QUANTITIES
from wellcond.report.report import AuditReport
from wellcond.text import escape, list_some

if TYPE_CHECKING:
    from wellcond.audits.processes import Group


def run_audit(arguments: argparse.Namespace, group: Group | None = None) -> int:
    """Audits, writes and prints as the options request; returns the exit code.

    In a group of processes, only the first one writes and prints.
    """
    check_names(arguments.names)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    baseline = read_baseline(arguments.baseline) if arguments.baseline is not None else None
    answers = [_audit_or_fail(path, arguments, baseline, group) for path in arguments.paths]
    if group is None or group.rank == 0:
        # Write files first, because the reader of the output can close the pipe, as `head` does.
        write_files(answers, arguments)
        print_answers(answers, arguments)
    return max(answer.verdict.exit_code for answer in answers)


def _audit_or_fail(
    path: Path, arguments: argparse.Namespace, baseline: Baseline | None, group: Group | None
) -> Answer:
    """The answer for one path; if the audit fails, its verdict contains the error."""
    answer = _try_audit(path, arguments, baseline, group)
    if group is not None:  # an error in one process leaves the others at another exchange
        group.exchange(f"the end of {path}", None)
    return answer


def _try_audit(
    path: Path, arguments: argparse.Namespace, baseline: Baseline | None, group: Group | None
) -> Answer:
    try:
        return _audit_one(path, arguments, baseline, group)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        text = describe_error(error)
        # If the error begins with another path, it is about that path.
        others = (arguments.compare, arguments.base)
        about = next((one for one in others if one and begins_with(text, one)), path)
        return Answer(Verdict(about, None, [Fault(Rule.not_audited, text)]))


def _audit_one(
    path: Path, arguments: argparse.Namespace, baseline: Baseline | None, group: Group | None
) -> Answer:
    before = _measure(path, arguments, group) if arguments.compare is not None else None
    later = _measure(arguments.compare or path, arguments, group)
    result: AuditReport | Comparison = later
    if before is not None:
        old, new = (source_of(one, base=arguments.base) for one in (path, arguments.compare))
        result = compare_reports(before, later, check_names(arguments.names))
        with show_progress("comparing") as progress:
            result = measure_changes(result, old, new, progress, Executor(group))
    comparison = None
    if baseline is not None:
        comparison = compare_with_baseline(later, baseline, max_rise(arguments))
    limit, min_coverage = arguments.max_condition, arguments.min_coverage
    is_gated = any(gate is not None for gate in (limit, min_coverage, baseline))
    exceeding = [] if limit is None else result.exceeding(limit)
    faults = [
        *find_low_coverage(later, min_coverage),
        *find_unsound(later, is_gated),
        *find_exceeding(exceeding, len(later.findings), limit),
        *(_find_worse(comparison, max_rise(arguments)) if comparison is not None else ()),
    ]
    for fault in find_low_coverage(before, None) if before is not None else ():
        say(f"warning: {escape(path)}: {fault.text}")
    return Answer(Verdict(arguments.compare or path, result, faults, is_gated), comparison)


def _measure(path: Path, arguments: argparse.Namespace, group: Group | None) -> AuditReport:
    options = Options(
        certify=arguments.certify,
        include=arguments.include,
        exclude=arguments.exclude,
        curves=CURVES if arguments.html and not arguments.compare else 0,
        heads=arguments.heads,
        device=arguments.device,
    )
    with show_progress("measuring") as progress:
        report = audit_together(
            group, path, options, progress, base=arguments.base, resume=arguments.resume
        )
    return report if arguments.sort == "standing" else report.sort(arguments.sort)


def _find_worse(comparison: BaselineComparison, rise: float) -> Iterator[Fault]:
    """The faults of weights that are worse than in the baseline or missing."""
    if comparison.risen:
        quantities = [QUANTITIES[one.quantity] for one in comparison.risen]
        named = [*zip(comparison.risen, quantities, strict=True)]
        worst = list_some(f"{o.label} ({q} {o.before:.4g} to {o.after:.4g})" for o, q in named)
        text = f"{count_weights(comparison.risen)} got worse by more than a factor of {rise:g}"
        text += f" ({SQUARES * rise:g} for κ of square weights): {worst}"
        weights = {
            one.label: f"{quantity} was {one.before:.4g} in the baseline and is now {one.after:.4g}"
            for one, quantity in named
        }
        yield Fault(Rule.baseline, text, weights)
    if comparison.missing:
        text = f"{count_weights(comparison.missing)} of the baseline missing"
        weights = dict.fromkeys(comparison.missing, "it is in the baseline but not in the file")
        yield Fault(Rule.missing, f"{text}: {list_some(comparison.missing)}", weights)
