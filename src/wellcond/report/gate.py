"""The rules of a gate, and the violations as Markdown for people and SARIF for code scanning.

SARIF is the Static Analysis Results Interchange Format 2.1.0 of OASIS. Names come from untrusted
files: they must not act as markup, links or placeholders.
"""

from __future__ import annotations

import enum
import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from wellcond.report.base import Report, format_csv
from wellcond.report.comparison import Comparison
from wellcond.report.findings import Finding, Status
from wellcond.report.not_finite import describe_not_finite
from wellcond.report.report import AuditReport
from wellcond.report.rows import MARK, record_of_finding, visible_columns
from wellcond.text import dump_json, escape, list_some, read_versions

_LOUD = 0.5  # a smaller coverage is a warning even without --min-coverage
_ROWS = 10  # in a Markdown table
_RESULTS = 1000  # per fault in SARIF; GitHub shows 5,000 per run
_SARIF = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)


class Rule(enum.Enum):
    """A rule of the gate: the rule in one sentence, and the remedy for a violation."""

    max_condition = (
        "The condition number of every weight is known and within the limit.",
        "Write a copy within the limit with `wellcond repair`, train with a `ConditionLimit`, or "
        "skip the weight with --exclude.",
    )
    baseline = (
        "No weight has moved further from the baseline than allowed.",
        "Compare both checkpoints with --compare. If the change is intended, write a new baseline.",
    )
    missing = (
        "The checkpoint contains every weight of the baseline.",
        "Write a new baseline if the weight was removed or renamed on purpose.",
    )
    min_coverage = (
        "The measured share of the parameters is large enough.",
        "The report states why tensors were skipped. Dequantise or merge them first.",
    )
    not_finite = (
        "No tensor contains NaN or infinity.",
        "Return to the last finite checkpoint, and inspect the training step after it.",
    )
    not_measured = (
        "Every matrix can be measured.",
        "The finding states why it could not be measured. The file might be damaged.",
    )
    not_audited = (
        "The checkpoint can be audited.",
        "The message states why it could not be audited. The file might be damaged, or not fetched "
        "from Git LFS.",
    )

    def __init__(self, sentence: str, way_out: str) -> None:
        self.sentence = sentence
        self.way_out = way_out

    @property
    def id(self) -> str:
        """The name with hyphens, such as "max-condition"."""
        return self.name.replace("_", "-")


@dataclass(frozen=True)
class Fault:
    """A rule that a checkpoint breaks.

    Attributes:
        rule: the rule.
        text: the violation, in one sentence that names some of the weights; `Verdict.name` adds the
            checkpoint.
        weights: the violation by each weight, by label, the worst first; empty if the violation
            concerns the entire checkpoint.
        is_error: whether it fails the gate; otherwise it is a warning.
    """

    rule: Rule
    text: str
    weights: Mapping[str, str] = field(default_factory=dict)
    is_error: bool = True


@dataclass(frozen=True)
class Verdict:
    """The result of the gate for one checkpoint.

    Attributes:
        path: the path of the checkpoint, as the user gave it.
        report: the audit or the comparison; None if the checkpoint could not be audited.
        faults: the rules that the checkpoint breaks.
        is_gated: whether the user set any rule.
    """

    path: Path
    report: AuditReport | Comparison | None
    faults: Sequence[Fault]
    is_gated: bool = False

    @property
    def exit_code(self) -> int:
        """0 if no rule is broken, 1 if one is, 2 if the checkpoint could not be audited."""
        if self.report is None:
            return 2
        return int(any(fault.is_error for fault in self.faults))

    @property
    def word(self) -> str:
        """The verdict in one or two words."""
        if self.exit_code:
            return ("failed", "not audited")[self.exit_code - 1]
        return "passed" if self.is_gated else "measured"

    def name(self, text: str) -> str:
        """Returns the message, preceded by the path of the checkpoint unless it begins with it."""
        return text if begins_with(text, self.path) else f"{escape(self.path)}: {text}"


def begins_with(text: str, path: Path) -> bool:
    """Returns whether a message begins with exactly this path, not with a longer one."""
    return re.match(rf"{re.escape(escape(path))}(?![\w.-])", text) is not None


def count_verdicts(verdicts: Sequence[Verdict]) -> str:
    """Returns the counts, such as "3 files: 1 failed, 2 passed"."""
    words = sorted({(-one.exit_code, one.word) for one in verdicts})
    counts = (f"{sum(one.word == word for one in verdicts)} {word}" for _, word in words)
    return f"{len(verdicts)} file{'s' * (len(verdicts) != 1)}: {', '.join(counts)}"


# --- faults of an audit ---------------------------------------------------------------------------


def find_low_coverage(report: AuditReport, min_coverage: float | None) -> list[Fault]:
    """Returns a fault if the measured share of the parameters is less than `min_coverage`.

    If `min_coverage` is None, it returns a warning for a share below one half.
    """
    share = report.coverage.parameter_share
    if share >= (_LOUD if min_coverage is None else min_coverage):
        return []
    text = f"only {100 * share:.3g} % of the parameters were measured"
    if min_coverage is not None:
        text += f", less than {100 * min_coverage:.3g} %"
    if failed := [one for one in report.findings if not one.measured]:
        text += f"; not measured: {list_some((one.label for one in failed), limit=3)}"
    if largest := report.coverage.largest_left_out:
        why = report.coverage.skipped
        named = (f"{escape(name)} ({size:,} entries, {why[name]})" for name, size in largest)
        text += f"; the largest skipped: {', '.join(named)}"
    return [Fault(Rule.min_coverage, text, is_error=min_coverage is not None)]


def find_unsound(report: AuditReport, is_error: bool) -> list[Fault]:
    """Returns faults for matrices that could not be measured and tensors with NaN or infinity."""
    faults = []
    if failed := [one for one in report.findings if one.status is Status.failed]:
        named = list_some((f"{one.label} ({one.detail})" for one in failed), limit=3)
        text = f"{len(failed)} could not be measured: {named}"
        weights = {one.label: one.explanation for one in failed}
        faults.append(Fault(Rule.not_measured, text, weights, is_error))
    if report.not_finite:
        text = describe_not_finite(report.not_finite)
        weights = {
            name: f"contains NaN or infinity: {counts}"
            for name, counts in report.not_finite.items()
        }
        faults.append(Fault(Rule.not_finite, text, weights, is_error))
    return faults


def find_exceeding(
    exceeding: Sequence[Finding], count: int, max_condition: float | None
) -> list[Fault]:
    """Returns a fault for the findings above a limit, out of `count` findings."""
    if max_condition is None or not exceeding:
        return []
    worst = list_some(f"{f.label} ({f.condition_number:.4g})" for f in exceeding)
    unknown = any(math.isnan(f.condition_number) for f in exceeding)
    text = f"{len(exceeding)} of {count} matrices exceed {max_condition:g}"
    text += f"{' or have no known κ' * unknown}: {worst}"
    weights = {f.label: _describe_exceeding(f, max_condition) for f in exceeding}
    return [Fault(Rule.max_condition, text, weights)]


def _describe_exceeding(finding: Finding, max_condition: float) -> str:
    if math.isnan(finding.condition_number):
        return f"κ is unknown: {finding.explanation}"
    text = f"κ is {finding.condition_number:.4g}, the limit is {max_condition:g}"
    return f"{text}: {finding.explanation}" if finding.status is not Status.ok else text


# --- CSV ------------------------------------------------------------------------------------------


def format_csv_of_all(reports: Iterable[AuditReport]) -> str:
    """Returns one line per finding, with the source of its audit as the first column."""
    columns = record_of_finding(Finding("", "", (0, 0), ""))
    records = (
        {"source": report.source} | record_of_finding(finding)
        for report in reports
        for finding in report.findings
    )
    return format_csv(["source", *columns], records)


# --- Markdown -------------------------------------------------------------------------------------


def format_markdown(verdicts: Sequence[Verdict], max_condition: float | None = None) -> str:
    """Returns a summary in GitHub Markdown: verdicts, violations, the first rows of the tables.

    Args:
        verdicts: one per checkpoint; the summary lists failed ones first.
        max_condition: the limit; the tables mark numbers above it.
    """
    parts = []
    if len(verdicts) > 1:
        parts.append(f"## wellcond: {count_verdicts(verdicts)}\n")
    for verdict in sorted(verdicts, key=lambda one: -one.exit_code):
        parts.append(_section(verdict, max_condition, "##" if len(verdicts) == 1 else "###"))
    return "\n".join(parts) + "\n"


def _section(verdict: Verdict, max_condition: float | None, heading: str) -> str:
    report = verdict.report
    title = f"{heading} {_code(verdict.path)}: {verdict.word}"
    if isinstance(report, Comparison):
        title += f", compared with {_code(report.before)}"
    lines = [title, ""]
    for fault in sorted(verdict.faults, key=lambda one: not one.is_error):
        warning = "" if fault.is_error else "warning: "
        lines.append(f"- {warning}{_plain(fault.text)}")
    if isinstance(report, AuditReport):
        lines += [f"- {_plain(line)}" for line in report.unusual()]
        lines += _table(report, max_condition)
        more = len(report.findings) - _ROWS
        lines += ["", f"{f'and {more} more; ' * (more > 0)}{_plain(report.coverage)}"]
    elif isinstance(report, Comparison):
        lines += [f"- {_plain(line)}" for line in report.summary()]
        lines += _table(report, max_condition)
    return "\n".join([*lines, ""])


def _table(report: Report, max_condition: float | None) -> list[str]:
    """Returns the first rows, with a mark at numbers above the limit."""
    rows = report._rows(max_condition, top=_ROWS)
    if not rows:
        return []
    columns = visible_columns(report._COLUMNS, rows)
    lines = [
        "",
        _row(_plain(column.header) for column in columns),
        _row("---" if column.is_text else "--:" for column in columns),
    ]
    for row in rows:
        marks = [f"{MARK} " if column.key in row.exceeds else "" for column in columns]
        cells = [(_code if c.key == "label" else _plain)(row.cells[c.key]) for c in columns]
        lines.append(_row(map("".join, zip(marks, cells, strict=True))))
    return lines


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


# All characters that can act as Markdown or HTML; _ within a word cannot.
_MARKUP = re.compile(
    r"(?<![^\W_])_|_(?![^\W_])|[!#$&*<>@\[\\\]`{|}~]|:(?=\S)|(?<=www)\.|^[-+]"
    r"|(?<=\d)[.)](?=\s)"
)


def _plain(text: object) -> str:
    """Escapes text so that Markdown shows it unchanged."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", escape(text))


def _code(text: object) -> str:
    return f"<code>{_plain(text)}</code>"


# --- SARIF ----------------------------------------------------------------------------------------


def format_sarif(verdicts: Iterable[Verdict], folder: Path) -> str:
    """Returns a SARIF 2.1.0 log with one result per weight and rule, at the first line of a file.

    Args:
        verdicts: one per checkpoint.
        folder: the folder to which paths are relative; paths outside are absolute.
    """
    rules = [
        {
            "id": rule.id,
            "shortDescription": {"text": rule.sentence},
            "fullDescription": {"text": rule.sentence},
            "help": {"text": rule.way_out},
            "defaultConfiguration": {"level": "error"},
        }
        for rule in Rule
    ]
    driver = {"name": "wellcond", "version": read_versions()["wellcond"], "rules": rules}
    results = [result for verdict in verdicts for result in _results(verdict, folder)]
    run = {"tool": {"driver": driver}, "results": results, "columnKind": "unicodeCodePoints"}
    return dump_json({"$schema": _SARIF, "version": "2.1.0", "runs": [run]})


def _results(verdict: Verdict, folder: Path) -> list[dict[str, Any]]:
    results = []
    for fault in verdict.faults:
        named = [(label, f"{label}: {text}") for label, text in fault.weights.items()]
        about = named[:_RESULTS] or [("", fault.text)]
        if more := len(named[_RESULTS:]):
            about.append(("", f"and {more} more: {fault.text}"))
        results += [_result(verdict, fault, label, text, folder) for label, text in about]
    return results


def _result(verdict: Verdict, fault: Fault, label: str, text: str, folder: Path) -> dict[str, Any]:
    uri = _uri(verdict.path, folder)
    location: dict[str, Any] = {
        "physicalLocation": {"artifactLocation": {"uri": uri}, "region": {"startLine": 1}}
    }
    if label:
        location["logicalLocations"] = [{"fullyQualifiedName": escape(label), "kind": "variable"}]
    # All results of a file are at its first line: GitHub distinguishes them by this fingerprint.
    key = hashlib.sha256(f"{fault.rule.id}\n{uri}\n{escape(label)}".encode()).hexdigest()
    return {
        "ruleId": fault.rule.id,
        "ruleIndex": list(Rule).index(fault.rule),
        "level": "error" if fault.is_error else "warning",
        "message": {"text": _message(verdict.name(text))},
        "locations": [location],
        "partialFingerprints": {"primaryLocationLineHash": f"{key[:16]}:1"},
    }


def _message(text: str) -> str:
    """Escapes braces, which would be placeholders, and brackets, which would be links."""
    plain = escape(text).replace("{", "{{").replace("}", "}}")
    return plain.replace("](", "] (")


def _uri(path: Path, folder: Path) -> str:
    path, folder = (Path(os.path.abspath(one)) for one in (path, folder))  # without ".."
    if path.is_relative_to(folder):
        return quote(os.fsencode(path.relative_to(folder).as_posix()))
    return path.as_uri()
