"""Names and numbers in the lines of reports, and options of reports."""

import csv
import importlib.metadata
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wellcond as wc
from wellcond.audits import rows
from wellcond.cli import main
from wellcond.text import format_percent, format_table, read_versions

NAMES = ["a:v:merged", "experts.gate_up_proj:up:1", "block:x:w", "t:heart:", ":smiley:"]


@pytest.mark.parametrize("name", NAMES)
def test_names_do_not_become_emoji(name: str, tmp_path: Path) -> None:
    assert name in format_table(["weight", "κ"], [[name, "1"]])
    path = tmp_path / "a.pt"
    torch.save({name: torch.diag(torch.tensor([9.0, 1.0]))}, path)
    report = wc.audit(path)
    for text in (report.table(), wc.compare(report, report).table()):
        assert name in text
    assert name in wc.repair(path, tmp_path / "b.pt", 2.0).table()


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0 %"), (1.0, "100 %"), (0.996, "100 %"), (0.0723, "7.2 %"), (3.1e-4, "0.031 %")],
)
def test_format_percent(share: float, text: str) -> None:
    assert format_percent(share) == text


def test_float16_underflow_of_all_entries(tmp_path: Path) -> None:
    torch.save({"w": torch.eye(3) * 1e-9 + 1e-10}, tmp_path / "a.pt")
    assert "100 % of the entries underflow to zero in float16" in str(wc.audit(tmp_path / "a.pt"))


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_string_is_one_pattern(option: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    chosen: dict[str, Any] = {option: "0.*"}
    names = ["0.weight"] if option == "include" else ["1.weight"]
    assert [f.name for f in wc.audit(model, **chosen).findings] == names
    torch.save(model.state_dict(), tmp_path / "a.pt")
    done = wc.repair(tmp_path / "a.pt", tmp_path / "b.pt", 1.5, **chosen)
    assert [repair.name for repair in done.repairs] == names


def test_empty_reports_are_written() -> None:
    coverage = wc.report.Coverage(0, 0, {}, 0.0)
    report = wc.AuditReport([], coverage, "nothing", read_versions())
    comparison = wc.report.Comparison([], "a", "b", read_versions())
    for document in (report, comparison):
        assert "weight" in str(document)
        assert "<html" in document.to_html()
        assert json.loads(document.to_json())["schema"] == 1
        header, *lines = csv.reader(io.StringIO(document.to_csv()))
        assert header[0] in ("name", "weight")
        assert lines == []


def test_csv_columns_independent_of_rows(tmp_path: Path) -> None:
    layer = nn.Linear(3, 3)
    for certify in (False, True):
        report = wc.audit(layer, certify=certify)
        empty = wc.AuditReport([], report.coverage, "", read_versions())
        assert report.to_csv().splitlines()[0] == empty.to_csv().splitlines()[0]
    both = wc.compare(report, report)
    assert (
        both.to_csv().splitlines()[0]
        == wc.report.Comparison([], "", "", {}).to_csv().splitlines()[0]
    )


def test_curves_decompose_only_drawn_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor is read once, and each matrix decomposed once."""
    monkeypatch.setattr("wellcond.linalg.spectrum._SMALL", 8)
    monkeypatch.setattr("wellcond.linalg.spectrum._LARGE", 16)
    model = nn.Module()
    model.register_parameter("experts", nn.Parameter(torch.randn(8, 20, 24)))
    model.register_parameter("other", nn.Parameter(torch.randn(3, 20, 24)))
    measured: list[bool] = []
    whole = rows.compute_spectrum

    def spy(S: torch.Tensor, all_values: bool = False) -> Any:
        measured.append(all_values)
        return whole(S, all_values)

    monkeypatch.setattr(rows, "compute_spectrum", spy)
    report = wc.audit(model, include=["experts", "other"], curves=4)
    assert measured.count(True) == 4
    drawn = [len(f.singular_values) for f in report.findings]
    assert drawn == [20] * 4 + [0] * 7


def test_package_without_metadata_has_unknown_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("wellcond.text.version", missing)
    assert wc.audit(nn.Linear(3, 3)).versions["wellcond"] == "unknown"


def test_missing_baseline_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": torch.eye(2)}, tmp_path / "a.pt")
    assert main(["audit", str(tmp_path / "a.pt"), "--baseline", str(tmp_path / "b.json")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(
        "wellcond: error: --baseline must be an output of `wellcond audit PATH --json`"
    )
    assert "b.json does not exist" in err


def test_unknown_heads_share_a_line(tmp_path: Path) -> None:
    content = {
        f"layers.{layer}.self_attn.{x}_proj.weight": torch.randn(8, 8)
        for layer in range(5)
        for x in "qkvo"
    }
    torch.save(content, tmp_path / "a.pt")
    text = wc.audit(tmp_path / "a.pt", heads=True).table()
    assert "0x0" not in text
    (line,) = [one for one in text.splitlines() if "number of its heads" in one]
    assert "and 2 more: could not be measured" in line


def test_dir_lists_public_names() -> None:
    assert {"audit", "certify", "__version__"} <= set(dir(wc))
    assert {"Any", "TYPE_CHECKING", "importlib"}.isdisjoint(dir(wc))


def test_report_does_not_import_linalg() -> None:
    code = "import sys, wellcond.report; print(*(m for m in sys.modules if '.linalg' in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "wellcond.linalg" not in done.stdout
