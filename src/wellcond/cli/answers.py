"""Prints the results of auditing one or several checkpoints, and writes them to files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from wellcond.audits.baseline import BaselineComparison
from wellcond.cli.options import error_of_existing, instead_of_table, max_rise
from wellcond.cli.terminal import say
from wellcond.report.comparison import Comparison
from wellcond.report.gate import (
    Verdict,
    count_verdicts,
    format_csv_of_all,
    format_markdown,
    format_sarif,
)
from wellcond.report.report import AuditReport
from wellcond.text import dump_json, escape, list_some, save_text


class Answer(NamedTuple):
    """The verdict on one path, and the comparison with the baseline if there is one."""

    verdict: Verdict
    comparison: BaselineComparison | None = None


def count_weights(weights: Sequence[object]) -> str:
    """The number of weights, such as "1 weight" or "2 weights"."""
    return f"{len(weights)} weight{'s' * (len(weights) != 1)}"


# --- files ----------------------------------------------------------------------------------------


def write_files(answers: Sequence[Answer], arguments: argparse.Namespace) -> None:
    """Writes the files that the options name; without any report, only SARIF and Markdown."""
    verdicts = [answer.verdict for answer in answers]
    limit = arguments.max_condition
    if arguments.sarif is not None:
        text = format_sarif(verdicts, Path.cwd())
        _write(text, arguments.sarif, "--sarif", arguments.overwrite)
    if arguments.markdown not in (None, Path("-")):
        with arguments.markdown.open("a", encoding="utf-8") as file:
            file.write(format_markdown(verdicts, limit))
    reports = [verdict.report for verdict in verdicts if verdict.report is not None]
    if reports and arguments.csv not in (None, Path("-")):
        _write(_csv(verdicts), arguments.csv, "--csv", arguments.overwrite)
    if reports and arguments.html is not None:
        page = reports[0].to_html(max_condition=limit)
        _write(page, arguments.html, "--html", arguments.overwrite)


def _write(text: str, path: Path, option: str, overwrite: bool) -> None:
    try:
        save_text(text, path, overwrite)
    except FileExistsError:  # created after `check_outputs`
        raise error_of_existing(path, option) from None


def _csv(verdicts: Sequence[Verdict]) -> str:
    reports = [verdict.report for verdict in verdicts if verdict.report is not None]
    if len(verdicts) > 1:
        return format_csv_of_all(one for one in reports if isinstance(one, AuditReport))
    return "".join(report.to_csv() for report in reports)


# --- standard output and standard error -----------------------------------------------------------


def print_answers(answers: Sequence[Answer], arguments: argparse.Namespace) -> None:
    """Prints tables or one document on standard output, and faults on standard error."""
    _print_document(answers, arguments)
    is_table = not instead_of_table(arguments)
    several = len(answers) > 1
    gap = ""
    for verdict, comparison in answers:
        if is_table and verdict.report is not None:
            if several:
                print(gap + escape(verdict.path))
                gap = "\n"
            _print_tables(verdict.report, arguments)
        _print_faults(verdict)
        if comparison is not None and (new := comparison.new):
            say(verdict.name(f"{count_weights(new)} not in the baseline: {list_some(new)}"))
    verdicts = [answer.verdict for answer in answers]
    if several and any(verdict.exit_code for verdict in verdicts):
        say(count_verdicts(verdicts))


def _print_document(answers: Sequence[Answer], arguments: argparse.Namespace) -> None:
    """Prints the documents that replace the table; JSON for one path needs its report."""
    verdicts = [answer.verdict for answer in answers]
    limit = arguments.max_condition
    if arguments.markdown == Path("-"):
        print(format_markdown(verdicts, limit), end="")
    if arguments.csv == Path("-"):
        print(_csv(verdicts), end="")
    if not arguments.json:
        return
    documents = []
    for verdict, comparison in answers:
        if verdict.report is not None:
            compared = (
                {"max_rise": max_rise(arguments), "baseline": asdict(comparison)}
                if comparison
                else {}
            )
            documents.append(verdict.report.to_dict(limit) | compared)
    if len(answers) > 1:
        failed = [
            {"source": str(verdict.path), "error": fault.text}
            for verdict in verdicts
            if verdict.report is None
            for fault in verdict.faults
        ]
        print(dump_json({"schema": 1, "reports": documents, "not_audited": failed}), end="")
    elif documents:
        print(dump_json(documents[0]), end="")


def _print_tables(report: AuditReport | Comparison, arguments: argparse.Namespace) -> None:
    print(report.table(top=arguments.top), end="")
    if arguments.roles and isinstance(report, AuditReport):
        print(f"\n{report.by_role()}", end="")
    if arguments.explain:
        print(f"\n{report.legend()}", end="")


def _print_faults(verdict: Verdict) -> None:
    for fault in verdict.faults:
        kind = "error: " if verdict.report is None else "" if fault.is_error else "warning: "
        say(f"{kind}{verdict.name(escape(fault.text))}")
