"""The formats of a gate: names of weights have no effect in Markdown and SARIF."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from markdown_it import MarkdownIt

import wellcond as wc
from wellcond.report.gate import (
    _RESULTS,
    _ROWS,
    Fault,
    Rule,
    Verdict,
    find_exceeding,
    find_unsound,
    format_markdown,
    format_sarif,
)

EVIL = [
    "a|b",
    "a\\|b",
    "`code`",
    "[here](https://evil.example)",
    "![p](x)",
    "<img src=x onerror=alert(1)>",
    "&lt;b&gt;",
    "_a_ __b__ *c* ~~d~~",
    "# title",
    "1. one",
    "- one",
    "+ one",
    "<!-- gone -->",
    "www.evil.example",
    "https://evil.example",
    "a@b.example @someone #12 :smile:",
    "a\nb\r\x1b[2J\u202e",
    "{0} {{1}}",
    "$x$ \\(y\\)",
    "layers.0.q_proj.weight:q",
]


def report_of(tmp_path: Path, weights: dict[str, torch.Tensor]) -> wc.AuditReport:
    torch.save(weights, tmp_path / "x.pt")
    return wc.audit(tmp_path / "x.pt")


def verdict_of(report: wc.AuditReport, limit: float, path: str = "x.pt") -> Verdict:
    found = find_exceeding(report.exceeding(limit), len(report.findings), limit)
    return Verdict(Path(path), report, [*find_unsound(report, True), *found], True)


# --- Markdown -------------------------------------------------------------------------------------


def tokens_of(text: str) -> list[Any]:
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    return [inner for token in parser.parse(text) for inner in [token, *(token.children or ())]]


def shown(text: str) -> str:
    """The visible text of Markdown."""
    lines: list[str] = []
    for token in tokens_of(text):
        if token.type in ("text", "text_special", "code_inline"):
            lines[-1] += token.content
        elif token.type in ("inline", "softbreak"):
            lines.append("")
    return "\n".join(lines)


@pytest.mark.parametrize("name", EVIL)
def test_markdown_shows_names_verbatim(tmp_path: Path, name: str) -> None:
    weights = {name: torch.ones(2, 2), f"{name}.bias": torch.tensor([math.nan])}
    report = report_of(tmp_path, weights)
    text = format_markdown([verdict_of(report, 2, path=f"{name}.pt")], 2)
    plain = name.encode("unicode_escape").decode() if not name.isprintable() else name
    assert text.replace("\n", "").isprintable()
    lines = shown(text).split("\n")
    assert lines[0] == f"{Path(plain)}.pt: failed"
    assert f"1 of 1 matrices exceed 2: {plain} (inf)" in lines
    assert f"1 tensor contains NaN or infinity: {plain}.bias (1 NaN of 1 entries)" in lines
    header = lines.index("weight")
    width = lines.index("grade") - header + 1
    assert lines[header + width] == plain
    assert lines[header + 2 * width] == str(report.coverage).replace("\n", " ")
    tokens = tokens_of(text)
    seen = {token.type for token in tokens}
    assert not seen & {"link_open", "image", "em_open", "strong_open", "s_open", "html_block"}
    html = {token.content for token in tokens if token.type == "html_inline"}
    assert html == {"<code>", "</code>"}
    assert {token.tag for token in tokens if token.type == "heading_open"} == {"h2"}
    assert sum(token.type == "bullet_list_open" for token in tokens) == 1
    assert not re.search(r"https?://|www\.|@\w|#\d|:\w+:", re.sub("&#[0-9]+;", "", text))


def test_markdown_lists_failures_first_and_marks_excess(tmp_path: Path) -> None:
    fine = report_of(tmp_path, {"w": torch.eye(2)})
    bad = report_of(tmp_path, {f"w{i}": torch.diag(torch.tensor([i + 2.0, 1])) for i in range(20)})
    unread = Verdict(Path("half.pt"), None, [Fault(Rule.not_audited, "half.pt is half")])
    text = format_markdown([verdict_of(fine, 15, "a.pt"), verdict_of(bad, 15, "b.pt"), unread], 15)
    assert re.findall(r"^#+ .*", shown_headings(text), flags=re.MULTILINE) == [
        "## wellcond: 3 files: 1 not audited, 1 failed, 1 passed",
        "### half.pt: not audited",
        "### b.pt: failed",
        "### a.pt: passed",
    ]
    rows = re.findall(r"^\| <code>(w\d+)</code> .*?(▲ )?([\d.]+) \|", text, flags=re.MULTILINE)
    table = [row for row in text.splitlines() if row.startswith("| <code>w")]
    assert len(table) == _ROWS + 1
    assert sum("▲" in row for row in table) == len(bad.exceeding(15)) == 6
    assert rows[0][0] == "w19"
    assert f"and {20 - _ROWS} more; 20 of 20 matrices" in text


def shown_headings(text: str) -> str:
    return re.sub("</?code>", "", text)


def test_audit_without_gate_is_measured(tmp_path: Path) -> None:
    report = report_of(tmp_path, {"w": torch.eye(2), "b": torch.tensor([math.nan])})
    verdict = Verdict(Path("x.pt"), report, find_unsound(report, False))
    assert verdict.exit_code == 0
    lines = shown(format_markdown([verdict])).split("\n")
    assert lines[0] == "x.pt: measured"
    assert "warning: 1 tensor contains NaN or infinity: b (1 NaN of 1 entries)" in lines


def test_markdown_of_comparison_names_baseline(tmp_path: Path) -> None:
    before = report_of(tmp_path, {"w": torch.eye(2)})
    after = report_of(tmp_path, {"w": torch.diag(torch.tensor([4.0, 1.0]))})
    result = wc.compare(replace(before, source="old.pt"), after)
    text = format_markdown([Verdict(Path("new.pt"), result, [])])
    assert "new.pt: measured, compared with old.pt" in shown(text)
    assert result.summary()[0] in shown(text)


# --- SARIF ----------------------------------------------------------------------------------------


def run_of(verdicts: list[Verdict], folder: Path) -> dict[str, Any]:
    """The run of a log, checked against the demands of OASIS and GitHub."""
    log = json.loads(format_sarif(verdicts, folder))
    assert set(log) == {"$schema", "version", "runs"}
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    assert driver["name"] == "wellcond"
    assert [rule["id"] for rule in driver["rules"]] == [rule.id for rule in Rule]
    for rule in driver["rules"]:
        assert rule["shortDescription"]["text"].endswith(".")
        assert rule["help"]["text"].endswith(".")
    for result in run["results"]:
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("error", "warning")
        assert result["message"]["text"].isprintable()
        (location,) = result["locations"]
        physical = location["physicalLocation"]
        assert physical["region"] == {"startLine": 1}
        assert re.fullmatch(r"[\w.~/:%-]+", physical["artifactLocation"]["uri"], re.ASCII)
    prints = [r["partialFingerprints"]["primaryLocationLineHash"] for r in run["results"]]
    assert len(set(prints)) == len(prints)
    return dict(run)


def test_sarif_has_one_result_per_weight_and_rule(tmp_path: Path) -> None:
    weights = {
        "bad": torch.diag(torch.tensor([100.0, 1.0])),
        "flat": torch.ones(2, 2),
        "fine": torch.eye(2),
        "lost": torch.full((2, 2), math.nan),
    }
    run = run_of([verdict_of(report_of(tmp_path, weights), 10)], Path.cwd())
    found = [(r["ruleId"], name_of(r), r["message"]["text"]) for r in run["results"]]
    rest = [one for one in found if one[1] == "bad" or one[0] == "not-finite"]
    assert rest == [
        ("not-finite", "lost", "x.pt: lost: contains NaN or infinity: 4 NaN of 4 entries"),
        ("max-condition", "bad", "x.pt: bad: κ is 100, the limit is 10"),
    ]
    assert {(rule, name) for rule, name, _ in found} - {(r, n) for r, n, _ in rest} == {
        ("max-condition", "lost"),
        ("max-condition", "flat"),
    }


def name_of(result: dict[str, Any]) -> str:
    (location,) = result["locations"]
    (logical,) = location["logicalLocations"]
    return str(logical["fullyQualifiedName"])


@pytest.mark.parametrize("name", EVIL)
def test_sarif_escapes_links_and_placeholders(tmp_path: Path, name: str) -> None:
    run = run_of([verdict_of(report_of(tmp_path, {name: torch.ones(2, 2)}), 2)], tmp_path)
    (result,) = run["results"]
    text = result["message"]["text"]
    assert "](" not in text
    without = text.replace("{{", "").replace("}}", "")
    assert "{" not in without
    assert "}" not in without


def test_sarif_uri_relative_to_folder(tmp_path: Path) -> None:
    inside = tmp_path / "checkout" / "models" / ".." / "a b#ü:c.pt"
    unread = [Fault(Rule.not_audited, "it is half")]
    verdicts = [Verdict(path, None, unread) for path in (inside, tmp_path / "other.pt")]
    run = run_of(verdicts, tmp_path / "checkout")
    places = [
        r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for r in run["results"]
    ]
    assert places == ["a%20b%23%C3%BC%3Ac.pt", (tmp_path / "other.pt").as_uri()]


def test_message_does_not_repeat_path(tmp_path: Path) -> None:
    for text, message in [
        ("x.pt must be whole", "x.pt must be whole"),
        ("x.pt/a is gone", "x.pt/a is gone"),
        ("x.pth is gone", "x.pt: x.pth is gone"),
        ("x_pt is gone", "x.pt: x_pt is gone"),
    ]:
        verdict = Verdict(Path("x.pt"), None, [Fault(Rule.not_audited, text)])
        (result,) = run_of([verdict], tmp_path)["results"]
        assert result["message"]["text"] == verdict.name(text) == message


def test_sarif_truncates_results_with_count(tmp_path: Path) -> None:
    weights = {f"w{i}": "κ is inf" for i in range(_RESULTS + 7)}
    verdict = Verdict(Path("x.pt"), None, [Fault(Rule.max_condition, "all exceed 2", weights)])
    results = run_of([verdict], tmp_path)["results"]
    assert len(results) == _RESULTS + 1
    assert results[-1]["message"]["text"] == "x.pt: and 7 more: all exceed 2"
