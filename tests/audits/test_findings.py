"""Reports are safe for terminals, browsers and spreadsheets."""

import csv
import io
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

import wellcond as wc
from wellcond.audits.compare import compare

HOSTILE = "a\x1b[2J\nb\x00\u202e<i>\ud800"
ESCAPED = r"a\x1b[2J\nb\x00\u202e<i>\ud800"


def named(*names: str) -> nn.Module:
    model = nn.Module()
    for name in names:
        model.add_module(name, nn.Linear(2, 2))
        with torch.no_grad():
            model.get_submodule(name).weight.fill_(1.0)
    return model


def test_names_are_escaped() -> None:
    report = wc.audit(named(HOSTILE))
    comparison = compare(report, report)
    for text in (report.table(), str(report), comparison.table(), report.to_csv()):
        assert ESCAPED in text
        assert all(line.isprintable() for line in text.split("\n"))
    for text in (report.to_html(), comparison.to_html()):
        assert ESCAPED.replace("<i>", "&lt;i&gt;") in text
        assert all(line.isprintable() for line in text.split("\n"))
    assert json.loads(report.to_json())["findings"][0]["name"] == f"{HOSTILE}.weight"


def test_csv_runs_no_formula() -> None:
    names = ["=1+1", "+1", "-1", "@x", "good"]
    report = wc.audit(named(*names))
    for text in (report.to_csv(), compare(report, report).to_csv()):
        first = [row[0] for row in csv.reader(io.StringIO(text))][1:]
        assert sorted(first) == [
            "'+1.weight",
            "'-1.weight",
            "'=1+1.weight",
            "'@x.weight",
            "good.weight",
        ]


def test_constant_infinity_is_no_change() -> None:
    before, after = named("flat", "other"), named("flat", "other")
    with torch.no_grad():
        before.get_submodule("other").weight.copy_(torch.eye(2))
        after.get_submodule("other").weight.copy_(torch.diag(torch.tensor([2.0, 1.0])))
    pairs = compare(wc.audit(before), wc.audit(after)).pairs
    assert [pair.label for pair in pairs] == ["other.weight", "flat.weight"]


def test_long_table_is_cut_with_a_hint(tmp_path: Path) -> None:
    save_file({f"w{n}": torch.ones(1, 1) for n in range(1200)}, tmp_path / "a.safetensors")
    report = wc.audit(tmp_path / "a.safetensors")
    cut = "... and 200 more; --csv FILE writes all rows"
    lines = report.table().splitlines()
    assert len(lines) < 1010
    assert cut in lines
    assert "... and 1195 more" in report.table(top=5).splitlines()
    assert "more" not in report.table(top=1200)
    compared = compare(report, report)
    assert cut.replace("more;", "more with smaller movements;") in compared.table().splitlines()
    assert len(report.to_csv().splitlines()) == len(compared.to_csv().splitlines()) == 1201
