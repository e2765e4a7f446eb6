"""Which rules a checkpoint breaks, and that as Markdown for people and as SARIF for code scanning.

SARIF is the Static Analysis Results Interchange Format 2.1.0 of OASIS. Names come from files that
may mean harm: here they also must not act as markup, links or placeholders.
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

_LOUD = 0.5  # a smaller share of the parameters is a warning even if nobody asks
_ROWS = 10  # of a table in Markdown
_RESULTS = 1000  # of a file in SARIF; GitHub shows 5,000 of a run
_SARIF = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)


class Rule(enum.Enum):
    """What a checkpoint can break: the rule in one sentence, and the way out."""

    max_condition = (
        "The condition number of every weight is known and within the limit.",
        "Write a copy within the limit by `wellcond repair`, train with a `ConditionLimit`, or "
        "leave the weight out by --exclude.",
    )
    baseline = (
        "No weight has moved further from the baseline than allowed.",
        "Compare both checkpoints by --compare. If the change is meant, make a new baseline.",
    )
    missing = (
        "Every weight of the baseline is there.",
        "Make a new baseline if the weight was removed or renamed on purpose.",
    )
    min_coverage = (
        "Enough of the parameters are measured.",
        "See in the report why tensors are left out; dequantise or merge them first.",
    )
    not_finite = (
        "No tensor holds NaN or infinity.",
        "Go back to an earlier checkpoint, and look for the step at which it was lost.",
    )
    not_measured = (
        "Every matrix can be measured.",
        "The finding says why it could not be; the file may be damaged.",
    )
    not_audited = (
        "The checkpoint can be audited.",
        "The message says why it could not be. The file may be damaged, or not fetched from Git "
        "LFS.",
    )

    def __init__(self, sentence: str, way_out: str) -> None:
        self.sentence = sentence
        self.way_out = way_out

    @property
    def id(self) -> str:
        """As "max-condition"."""
        return self.name.replace("_", "-")


@dataclass(frozen=True)
class Fault:
    """A rule that a checkpoint breaks.

    Attributes:
        rule: which one.
        text: what is the matter, in one sentence that names some of the weights; `Verdict.name`
            names the checkpoint.
        weights: what is the matter with each weight by its label, the worst first; empty if it is
            about the checkpoint.
        is_error: whether it fails the gate, and not only warns.
    """

    rule: Rule
    text: str
    weights: Mapping[str, str] = field(default_factory=dict)
    is_error: bool = True


@dataclass(frozen=True)
class Verdict:
    """What is the matter with one checkpoint.

    Attributes:
        path: of the checkpoint, as it was given.
        report: its audit, or the comparison with it; None without one.
        faults: the rules that it breaks.
        is_gated: whether there is a rule that it could break.
    """

    path: Path
    report: AuditReport | Comparison | None
    faults: Sequence[Fault]
    is_gated: bool = False

    @property
    def exit_code(self) -> int:
        """0 if nothing is wrong, 1 if a rule is broken, 2 if there is no answer."""
        if self.report is None:
            return 2
        return int(any(fault.is_error for fault in self.faults))

    @property
    def word(self) -> str:
        """In one word or two."""
        if self.exit_code:
            return ("failed", "not audited")[self.exit_code - 1]
        return "passed" if self.is_gated else "measured"

    def name(self, text: str) -> str:
        """The message with the path of the checkpoint before it, unless it begins with that."""
        return text if begins_with(text, self.path) else f"{escape(self.path)}: {text}"


def begins_with(text: str, path: Path) -> bool:
    """Whether a message begins with this path, and not with one that is longer."""
    return re.match(rf"{re.escape(escape(path))}(?![\w.-])", text) is not None


def count_verdicts(verdicts: Sequence[Verdict]) -> str:
    """As "3 files: 1 failed, 2 passed"."""
    words = sorted({(-one.exit_code, one.word) for one in verdicts})
    counts = (f"{sum(one.word == word for one in verdicts)} {word}" for _, word in words)
    return f"{len(verdicts)} file{'s' * (len(verdicts) != 1)}: {', '.join(counts)}"


# --- faults of an audit ---------------------------------------------------------------------------


def find_low_coverage(report: AuditReport, min_coverage: float | None) -> list[Fault]:
    """A fault if less than this share of the parameters is measured; without one a warning."""
    share = report.coverage.parameter_share
    if share >= (_LOUD if min_coverage is None else min_coverage):
        return []
    text = f"only {100 * share:.3g} % of the parameters were measured"
    if min_coverage is not None:
        text += f", less than {100 * min_coverage:.3g} %"
    if largest := report.coverage.largest_left_out:
        why = report.coverage.skipped
        named = (f"{escape(name)} ({size:,} entries, {why[name]})" for name, size in largest)
        text += f"; the largest that were left out: {', '.join(named)}"
    return [Fault(Rule.min_coverage, text, is_error=min_coverage is not None)]


def find_unsound(report: AuditReport, is_error: bool) -> list[Fault]:
    """What could not be measured, and what holds NaN or infinity."""
    faults = []
    if failed := [one for one in report.findings if one.status is Status.failed]:
        named = list_some((f"{one.label} ({one.detail})" for one in failed), limit=3)
        text = f"{len(failed)} could not be measured: {named}"
        weights = {one.label: one.explanation for one in failed}
        faults.append(Fault(Rule.not_measured, text, weights, is_error))
    if report.not_finite:
        text = describe_not_finite(report.not_finite)
        weights = {
            name: f"it holds NaN or infinity: {counts}"
            for name, counts in report.not_finite.items()
        }
        faults.append(Fault(Rule.not_finite, text, weights, is_error))
    return faults


def find_exceeding(
    exceeding: Sequence[Finding], count: int, max_condition: float | None
) -> list[Fault]:
    """The findings above a limit, of `count`."""
    if max_condition is None or not exceeding:
        return []
    worst = list_some(f"{f.label} ({f.condition_number:.4g})" for f in exceeding)
    unknown = any(math.isnan(f.condition_number) for f in exceeding)
    text = f"{len(exceeding)} of {count} matrices exceed {max_condition:g}"
    text += f"{' or have no κ' * unknown}: {worst}"
    weights = {f.label: _describe_exceeding(f, max_condition) for f in exceeding}
    return [Fault(Rule.max_condition, text, weights)]


def _describe_exceeding(finding: Finding, max_condition: float) -> str:
    if math.isnan(finding.condition_number):
        return f"κ is not known: {finding.explanation}"
    text = f"κ is {finding.condition_number:.4g}, the limit is {max_condition:g}"
    return f"{text}: {finding.explanation}" if finding.status is not Status.ok else text


# --- CSV ------------------------------------------------------------------------------------------


def format_csv_of_all(reports: Iterable[AuditReport]) -> str:
    """One line per finding, after the source of its audit; the other columns as of one audit."""
    columns = record_of_finding(Finding("", "", (0, 0), ""))
    records = (
        {"source": report.source} | record_of_finding(finding)
        for report in reports
        for finding in report.findings
    )
    return format_csv(["source", *columns], records)


# --- Markdown -------------------------------------------------------------------------------------


def format_markdown(verdicts: Sequence[Verdict], max_condition: float | None = None) -> str:
    """A summary in the Markdown of GitHub: verdicts, what is broken, the first rows of the table.

    Args:
        verdicts: one per checkpoint; those that failed come first.
        max_condition: the limit; numbers above it are marked in the tables.
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
    """The first rows, with a mark at what exceeds the limit."""
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


# All that Markdown or HTML could act on; _ within a word is only a letter.
_MARKUP = re.compile(
    r"(?<![^\W_])_|_(?![^\W_])|[!#$&*<>@\[\\\]`{|}~]|:(?=\S)|(?<=www)\.|^[-+]"
    r"|(?<=\d)[.)](?=\s)"
)


def _plain(text: object) -> str:
    """As text that Markdown shows as it is."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", escape(text))


def _code(text: object) -> str:
    return f"<code>{_plain(text)}</code>"


# --- SARIF ----------------------------------------------------------------------------------------


def format_sarif(verdicts: Iterable[Verdict], folder: Path) -> str:
    """A log in SARIF 2.1.0: a result for each weight and rule, located at the first line of a file.

    Args:
        verdicts: one per checkpoint.
        folder: to which paths are relative; those outside are absolute.
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
    # All results of a file are at its first line: GitHub tells them apart by this.
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
    """With braces that are no placeholder, and brackets that are no link."""
    plain = escape(text).replace("{", "{{").replace("}", "}}")
    return plain.replace("](", "] (")


def _uri(path: Path, folder: Path) -> str:
    path, folder = (Path(os.path.abspath(one)) for one in (path, folder))  # without ".."
    if path.is_relative_to(folder):
        return quote(os.fsencode(path.relative_to(folder).as_posix()))
    return path.as_uri()
