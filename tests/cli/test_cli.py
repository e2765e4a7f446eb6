"""The command line: arguments, printed text and exit codes."""

import argparse
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import wellcond
from processes import call
from wellcond.cli import main
from wellcond.cli.options import make_parser


def exit_of(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parser and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from parsers(one)


def test_help_of_every_command_has_a_valid_example(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = {one.prog: one for one in parsers(make_parser(""))}
    assert found.keys() > {"wellcond audit", "wellcond repair", "wellcond reproduce"}
    for program, parser in found.items():
        assert exit_of([*program.split()[1:], "--help"]) == 0
        assert parser.epilog
        assert (
            parser.epilog.split() == capsys.readouterr().out.split()[-len(parser.epilog.split()) :]
        )
        label, name, command, *arguments = parser.epilog.split()
        assert (label, name) == ("example:", "wellcond")
        if command in ("audit", "repair"):  # the other commands belong to the experiments
            make_parser(command).parse_args([command, *arguments])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["audit", "x.pt", "--maxcondition", "5"], "--maxcondition 5 (see wellcond audit --help)"),
        (["audit"], "required: PATH"),
        (["audit", "x.pt", "--max-condition", "0.5"], "must be a number >= 1, got 0.5"),
        (["audit", "x.pt", "--max-condition", "nan"], "must be a number >= 1, got nan"),
        (["audit", "x.pt", "--max-condition", "many"], "must be a number >= 1, got many"),
        (["audit", "x.pt", "--top", "0"], "must be a positive integer, got 0"),
        (["audit", "x.pt", "--top", "3.5"], "must be a positive integer, got 3.5"),
        (["audit", "x.pt", "--top", "nan"], "must be a positive integer, got nan"),
        (["audit", "x.pt", "--threads", "inf"], "must be a positive integer, got inf"),
        (["audit", "x.pt", "--min-coverage", "1.1"], "must be a number from 0 to 1, got 1.1"),
        (["audit", "x.pt", "--min-coverage", "nan"], "must be a number from 0 to 1, got nan"),
        (["repair", "x.pt", "y.pt", "--max-condition", ""], "must be a number >= 1"),
        (["repair", "x.pt", "y.pt"], "required: --max-condition"),
    ],
)
def test_misuse_prints_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_of(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("wellcond: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_module_runs_like_the_script() -> None:
    argv = [sys.executable, "-m", "wellcond", "--version"]
    out = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert out == f"wellcond {wellcond.__version__}\n"


# --- audit and repair -----------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """kappa 1, 100, and a matrix of rank one."""
    path = tmp_path / "model.pt"
    weights = {
        "good": torch.eye(3),
        "bad": torch.diag(torch.tensor([100.0, 1.0])),
        "b": torch.ones(3),
    }
    torch.save(weights, path)
    return path


def test_audit_prints_table_and_coverage(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(checkpoint)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    start = "bad: one entry, 1e+02 at (0, 0), contributes more than 99.9 % of ‖S‖². "
    assert lines[0].startswith(start)
    assert lines[2].split()[:4] == ["bad", "2x2", "float32", "100"]
    assert lines[3].startswith("good")
    assert (
        lines[-1] == "2 of 2 matrices measured, 81.2 % of the parameters; not matrices: 1 (vector)"
    )
    assert err == ""


@pytest.mark.parametrize(("limit", "code"), [("1000", 0), ("100", 0), ("99", 1), ("inf", 0)])
def test_max_condition_sets_the_exit_code(
    checkpoint: Path, limit: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(checkpoint), "--max-condition", limit]) == code
    _, err = capsys.readouterr()
    assert ("1 of 2 matrices exceed 99: bad (100)" in err) == (code == 1)


LONG = "; the largest skipped: long (12 entries, not a matrix: a vector)\n"


@pytest.mark.parametrize(
    ("share", "code", "message"),
    [
        (None, 0, f"wellcond: warning: {{}}: only 25 % of the parameters were measured{LONG}"),
        (
            "0.3",
            1,
            f"wellcond: {{}}: only 25 % of the parameters were measured, less than 30 %{LONG}",
        ),
        ("0.25", 0, ""),
        ("0", 0, ""),
    ],
)
def test_min_coverage_sets_the_exit_code(
    tmp_path: Path,
    share: str | None,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    low, whole = tmp_path / "low.pt", tmp_path / "whole.pt"
    torch.save({"w": torch.eye(2), "long": torch.ones(12)}, low)
    torch.save({"w": torch.eye(2)}, whole)
    options = [] if share is None else ["--min-coverage", share]
    for paths in ([low], [whole, "--compare", low]):
        assert main(["audit", *map(str, paths), *options]) == code
        assert capsys.readouterr().err == message.format(low)
    assert main(["audit", str(whole), *options]) == 0
    assert capsys.readouterr().err == ""
    assert main(["audit", str(low), "--compare", str(whole), *options]) == 0
    assert f"wellcond: warning: {low}: only 25 %" in capsys.readouterr().err


def test_low_coverage_names_the_largest_skipped_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"a.weight": 6, "b.weight": 9, "c.weight": 7, "d.weight": 8}
    content = {"w": torch.eye(2)}
    for name, size in sizes.items():
        content |= {name: torch.ones(size, 200), f"{name}_scale": torch.ones(size, 1)}
    torch.save(content, tmp_path / "x.pt")
    assert main(["audit", str(tmp_path / "x.pt")]) == 0
    err = capsys.readouterr().err
    found = re.findall(r"(\S+) \(([\d,]+) entries, quantised", err)
    assert found == [("b.weight", "1,800"), ("d.weight", "1,600"), ("c.weight", "1,400")]
    assert "; the largest skipped: b.weight" in err


def test_low_coverage_names_weights_that_could_not_be_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"w": torch.full((9, 9), torch.inf), "v": torch.eye(2)}, tmp_path / "x.pt")
    assert main(["audit", str(tmp_path / "x.pt"), "--min-coverage", "0.9"]) == 1
    assert "less than 90 %; not measured: w\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "worst", [torch.ones(2, 2), torch.zeros(2, 2), torch.full((2, 2), torch.nan)]
)
def test_infinite_undefined_and_unknown_kappa_exceed_every_limit(
    tmp_path: Path, worst: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"fine": torch.eye(2), "worst": worst}, tmp_path / "x.pt")
    assert main(["audit", str(tmp_path / "x.pt"), "--max-condition", "inf"]) == 1
    said = "exceed inf: worst" if worst[0, 0] == 1 else "exceed inf or have no known κ: worst"
    assert said in capsys.readouterr().err


def test_json_is_the_only_standard_output(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(checkpoint), "--json", "--certify", "--threads", "1"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [finding["name"] for finding in content["findings"]] == ["bad", "good"]
    assert content["findings"][0]["grade"] == "certified"


def test_reports_are_written_but_not_overwritten(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, sheet = checkpoint.with_name("r.html"), checkpoint.with_name("r.csv")
    command = ["audit", str(checkpoint), "--html", str(page), "--csv", str(sheet), "--top", "1"]
    assert main(command) == 0
    assert "good" in page.read_text()
    assert sheet.read_text().count("\n") == 3
    page.write_text("precious")
    assert main(command) == 2
    assert "not overwritten" in capsys.readouterr().err
    assert page.read_text() == "precious"
    assert main([*command, "--overwrite"]) == 0
    assert page.read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("option", ["--csv", "--html"])
def test_unwritable_output_fails_before_measuring(
    checkpoint: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint.parent
    before = checkpoint.read_bytes()
    (folder / "exists").write_text("mine")
    (folder / "link.csv").symlink_to(checkpoint)
    for name, message in (
        ("missing/r", "missing is not one. Create it first."),
        (".", "is a directory"),
        ("exists", "already exists and is not overwritten. Use --overwrite"),
    ):
        argv = ["audit", str(folder / "no.pt"), option, str(folder / name)]
        assert main(argv) == 2
        assert message in capsys.readouterr().err
    for name in (checkpoint.name, "link.csv"):
        target = str(folder / name)
        assert main(["audit", str(checkpoint), option, target, "--overwrite"]) == 2
        assert "given twice" in capsys.readouterr().err
    # The output is one of the files of the audited directory.
    assert main(["audit", str(folder), option, str(checkpoint), "--overwrite"]) == 2
    assert "must not replace a checkpoint" in capsys.readouterr().err
    assert checkpoint.read_bytes() == before
    assert (folder / "exists").read_text() == "mine"


def test_html_and_csv_must_be_different_files(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = str(checkpoint.with_name("r"))
    assert main(["audit", str(checkpoint), "--csv", same, "--html", same]) == 2
    assert "given twice" in capsys.readouterr().err


def test_csv_to_standard_output(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["audit", str(checkpoint), "--csv", "-"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["name"] for row in rows] == ["bad", "good"]
    assert not Path("-").exists()
    assert main(["audit", str(checkpoint), "--csv", "-", "--json"]) == 2
    assert "cannot be combined" in capsys.readouterr().err


def test_explain_describes_the_columns(
    checkpoint: Path, moved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(checkpoint)]) == 0
    plain = capsys.readouterr().out
    assert main(["audit", str(checkpoint), "--explain"]) == 0
    explained = capsys.readouterr().out
    assert explained.startswith(plain + "\n")
    legend = explained.removeprefix(plain)
    for words in ("stable rank  ", "the position among trained weights", '"estimated":'):
        assert words in legend
    assert main(["audit", str(checkpoint), "--explain", "--compare", str(moved)]) == 0
    assert "\nmovement  " in capsys.readouterr().out
    for other in (["--json"], ["--csv", "-"]):
        assert main(["audit", str(checkpoint), "--explain", *other]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert f"--explain cannot be combined with {' '.join(other)}, which" in err


def test_include_and_exclude_select_weights(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(checkpoint), "--exclude", "b*", "--max-condition", "2"]) == 0
    assert main(["audit", str(checkpoint), "--include", "goo*", "--include", "bad"]) == 0
    assert "bad" in capsys.readouterr().out
    assert main(["audit", str(checkpoint), "--include", "nothing"]) == 2
    assert "no weight matches nothing" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all"])
def test_errors_give_exit_code_two(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert main(["audit", str(path)]) == 2
    assert main(["repair", str(path), str(tmp_path / "y"), "--max-condition", "2"]) == 2
    assert main(["audit", str(tmp_path / "missing.pt")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("wellcond: error: ") == 3
    assert "Traceback" not in err


def test_repaired_checkpoint_passes_the_failed_audit(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = checkpoint.with_name("fixed.pt")
    assert main(["audit", str(checkpoint), "--max-condition", "7"]) == 1
    assert main(["repair", str(checkpoint), str(fixed), "--max-condition", "7"]) == 0
    assert "1 of 2 matrices changed, 1 unchanged" in capsys.readouterr().out
    assert main(["audit", str(fixed), "--max-condition", "7"]) == 0
    capsys.readouterr()
    assert main(["audit", str(checkpoint), "--compare", str(fixed)]) == 0
    first = capsys.readouterr().out.splitlines()[1].split()
    assert first[:3] == ["bad", "κ", "×0.07"]
    assert first[4] == "100"
    assert float(first[5]) == pytest.approx(7, rel=1e-3)
    assert main(["repair", str(checkpoint), str(fixed), "--max-condition", "7"]) == 2
    assert "not overwritten" in capsys.readouterr().err


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """A later checkpoint: kappa of good rises from 1 to 5, bad falls from 100 to 50, one is new."""
    path = tmp_path / "later.pt"
    weights = {"good": [5.0, 1.0], "bad": [50.0, 1.0], "new": [2.0, 1.0]}
    torch.save({name: torch.diag(torch.tensor(d)) for name, d in weights.items()}, path)
    return path


def test_top_and_files_work_with_compare(
    checkpoint: Path, moved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, sheet = checkpoint.with_name("r.html"), checkpoint.with_name("r.csv")
    command = ["audit", str(checkpoint), "--compare", str(moved), "--max-condition", "60"]
    assert main([*command, "--top", "2", "--html", str(page), "--csv", str(sheet)]) == 0
    out, err = capsys.readouterr()
    names = [line.split()[0] for line in out.splitlines()]
    assert names == ["weight", "new", "good", "...", "before:", "after:"]
    assert "and 1 more with smaller movements" in out
    assert "exceed" not in err  # 100 is its earlier kappa
    rows = {row["weight"]: row for row in csv.DictReader(sheet.open())}
    assert list(rows) == ["new", "good", "bad"]
    assert float(rows["bad"]["condition_number_before"]) == pytest.approx(100)
    assert float(rows["bad"]["condition_number_after"]) == pytest.approx(50)
    assert rows["new"]["condition_number_before"] == rows["new"]["ratio"] == ""
    text = page.read_text()
    assert str(checkpoint) in text
    assert str(moved) in text
    assert len(re.findall(r'<div class="fill( before)?"', text)) == 5
    assert text.count('<tr class="over">') == 1
    assert re.search(r'data-label="κ before"><span class="mark".*?</span> 100</td>', text)
    assert text.count('<span class="mark"') == 1  # 50 is below the limit
    assert main([*command[:-1], "40", "--json"]) == 1
    out, err = capsys.readouterr()
    assert "1 of 3 matrices exceed 40: bad (50)" in err
    content = json.loads(out)
    assert content["max_condition"] == 40
    assert content["exceeding"] == ["bad"]


def test_compare_requires_a_common_name(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"other": torch.eye(2)}, tmp_path / "other.pt")
    assert main(["audit", str(checkpoint), "--compare", str(tmp_path / "other.pt")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "must contain a weight of the same name" in err
    assert "contains other" in err


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
def test_unencodable_characters_do_not_fail(tmp_path: Path, form: list[str]) -> None:
    name = "größe\ud800\x1b[2J\nforged"
    torch.save({name: torch.ones(2, 2)}, tmp_path / "x.pt")
    argv = [sys.executable, "-m", "wellcond", "audit", str(tmp_path / "x.pt"), *form]
    environment = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    argv += ["--max-condition", "2"]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "gr\\xf6\\xdfe\\ud800\\x1b[2J\\nforged (inf)" in done.stderr
    if form:
        assert json.loads(done.stdout)["findings"][0]["name"] == name
    else:
        assert done.stdout.splitlines()[2].startswith("gr\\xf6\\xdfe\\ud800\\x1b[2J\\nforged ")


def test_repair_prints_json(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = str(checkpoint.with_name("fixed.pt"))
    assert main(["repair", str(checkpoint), fixed, "--max-condition", "7", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [repair["before"] for repair in content["repairs"]] == pytest.approx([1.0, 100.0])
    assert content["repairs"][1]["after"] <= 7


def test_console_script_audits(checkpoint: Path) -> None:
    script = Path(sys.executable).with_name("wellcond")
    done = subprocess.run(
        [script, "audit", checkpoint, "--max-condition", "7"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "\nweight " in done.stdout
    assert "exceed 7" in done.stderr


# --- several checkpoints, and what a gate writes -------------------------------------------------


@pytest.fixture
def several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three files in the current folder: kappa 2, kappa 100 with a NaN bias, and no checkpoint."""
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.diag(torch.tensor([2.0, 1.0]))}, "fine.pt")
    bad = {"w": torch.diag(torch.tensor([100.0, 1.0])), "b": torch.tensor([torch.nan])}
    torch.save(bad, "bad.pt")
    Path("half.pt").write_bytes(b"half")
    return ["fine.pt", "bad.pt", "half.pt"]


def test_several_checkpoints_are_audited_separately(
    several: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    tables = []
    for path in several[:2]:
        assert main(["audit", path]) == 0
        tables.append(f"{path}\n{capsys.readouterr().out}")
    assert main(["audit", *several[:2]]) == 0
    out, err = capsys.readouterr()
    assert out == "\n".join(tables)
    assert (
        err
        == "wellcond: warning: bad.pt: 1 tensor contains NaN or infinity: b (1 NaN of 1 entries)\n"
    )
    assert main(["audit", *several]) == 2
    out, err = capsys.readouterr()
    assert out == "\n".join(tables)
    assert "wellcond: error: half.pt" in err
    assert err.endswith("wellcond: 3 files: 1 not audited, 2 measured\n")
    assert main(["audit", *reversed(several)]) == 2
    assert capsys.readouterr().out == "\n".join(reversed(tables))


@pytest.mark.parametrize(
    ("limit", "which", "code", "counts"),
    [
        ("99", [0], 0, ""),
        ("99", [0, 1], 1, "2 files: 1 failed, 1 passed"),
        ("99", [2, 1, 0], 2, "3 files: 1 not audited, 1 failed, 1 passed"),
        ("1", [0, 1], 1, "2 files: 2 failed"),
    ],
)
def test_exit_code_is_the_largest(
    several: list[str],
    limit: str,
    which: list[int],
    code: int,
    counts: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["audit", "--max-condition", limit, *(several[n] for n in which)]) == code
    err = capsys.readouterr().err
    assert err.count(f"wellcond: {counts}\n") == (1 if counts else err.count("wellcond: "))
    assert ("wellcond: bad.pt: 1 of 1 matrices exceed 99: w (100)\n" in err) == (
        limit == "99" and 1 in which
    )


def test_documents_of_several_checkpoints(
    several: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", *several, "--json", "--max-condition", "99"]) == 2
    content = json.loads(capsys.readouterr().out)
    assert main(["audit", "bad.pt", "--json", "--max-condition", "99"]) == 1
    assert content["reports"][1] == json.loads(capsys.readouterr().out)
    assert [one["source"] for one in content["reports"]] == several[:2]
    assert [one["source"] for one in content["not_audited"]] == several[2:]
    assert "half.pt" in content["not_audited"][0]["error"]
    assert main(["audit", *several, "--csv", "-"]) == 2
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["source"], row["name"]) for row in rows] == [("fine.pt", "w"), ("bad.pt", "w")]
    assert float(rows[1]["condition_number"]) == pytest.approx(100)


@pytest.mark.parametrize("option", ["--baseline", "--compare", "--base", "--html"])
def test_options_for_one_checkpoint_refuse_several(
    several: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", *several, option, "other"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"wellcond: error: {option} requires exactly one PATH, got 3.")


def test_internal_error_is_not_reported_as_unreadable_file(
    several: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wellcond.audits.sources.Checkpoint", raising(RuntimeError("a mistake")))
    with pytest.raises(RuntimeError, match="a mistake"):
        main(["audit", *several])


def test_markdown_is_appended(several: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("summary.md").write_text("before\n")
    options = ["--max-condition", "99", "--markdown"]
    assert main(["audit", *several, *options, "-"]) == 2
    printed = capsys.readouterr().out
    assert printed.startswith("## wellcond: 3 files: 1 not audited, 1 failed, 1 passed\n")
    for _ in range(2):
        assert main(["audit", *several, *options, "summary.md"]) == 2
        assert "weight" in capsys.readouterr().out
    assert Path("summary.md").read_text() == f"before\n{printed}{printed}"
    before = Path("bad.pt").read_bytes()
    assert main(["audit", "fine.pt", *options, "bad.pt", "--overwrite"]) == 2
    assert "must not replace a checkpoint" in capsys.readouterr().err
    assert Path("bad.pt").read_bytes() == before
    for other in (["--json"], ["--csv", "-"], ["--explain"]):
        assert main(["audit", "fine.pt", *options, "-", *other]) == 2
        assert "cannot be combined" in capsys.readouterr().err


def test_sarif_includes_unreadable_checkpoints(
    several: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["audit", *several, "--max-condition", "99", "--sarif", "out.sarif"]
    assert main(command) == 2
    (run,) = json.loads(Path("out.sarif").read_text())["runs"]
    found = [(r["ruleId"], r["level"], uri_of(r)) for r in run["results"]]
    assert found == [
        ("not-finite", "error", "bad.pt"),
        ("max-condition", "error", "bad.pt"),
        ("not-audited", "error", "half.pt"),
    ]
    capsys.readouterr()
    assert main(command) == 2
    assert "Use --overwrite, or another --sarif." in capsys.readouterr().err
    assert main(["audit", "fine.pt", "--sarif", "out.sarif", "--overwrite"]) == 0
    assert json.loads(Path("out.sarif").read_text())["runs"][0]["results"] == []


def test_every_fault_names_its_checkpoint(
    several: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", "fine.pt", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    one = content["findings"][0]
    content["findings"] = [one | {"condition_number": 1.0}, one | {"name": "gone"}]
    Path("audit.json").write_text(json.dumps(content))
    gates = ["--max-condition", "99", "--min-coverage", "1", "--baseline", "audit.json"]
    for path, rules in [
        ("bad.pt", {"max-condition", "min-coverage", "not-finite", "baseline", "missing"}),
        ("half.pt", {"not-audited"}),
    ]:
        Path("summary.md").unlink(missing_ok=True)
        files = ["--markdown", "summary.md", "--sarif", "out.sarif", "--overwrite"]
        assert main(["audit", path, *gates, *files]) > 0
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == len(rules)
        kind = "error: " if path == "half.pt" else ""
        for line in lines:
            assert line.startswith(f"wellcond: {kind}{path}")
            assert line.count(path) == 1
        assert Path("summary.md").read_text().startswith(f"## <code>{path}</code>: ")
        (run,) = json.loads(Path("out.sarif").read_text())["runs"]
        assert {result["ruleId"] for result in run["results"]} == rules
        for result in run["results"]:
            assert result["message"]["text"].startswith(path)
            assert uri_of(result) == path


@pytest.mark.parametrize("option", ["--compare", "--base"])
def test_unreadable_second_file_is_named(
    several: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", "fine.pt", option, "half.pt", "--sarif", "out.sarif"]) == 2
    assert capsys.readouterr().err.startswith("wellcond: error: half.pt is not a valid ")
    (run,) = json.loads(Path("out.sarif").read_text())["runs"]
    assert [uri_of(result) for result in run["results"]] == ["half.pt"]


def uri_of(result: dict[str, Any]) -> str:
    (location,) = result["locations"]
    uri: str = location["physicalLocation"]["artifactLocation"]["uri"]
    return uri


def test_sarif_has_results_of_the_baseline(
    checkpoint: Path, moved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", str(checkpoint), "--json"]) == 0
    baseline, log = checkpoint.with_name("audit.json"), checkpoint.with_name("out.sarif")
    content = json.loads(capsys.readouterr().out)
    gone = content["findings"][0] | {"name": "gone"}
    baseline.write_text(json.dumps(content | {"findings": [*content["findings"], gone]}))
    assert main(["audit", str(moved), "--baseline", str(baseline), "--sarif", str(log)]) == 1
    (run,) = json.loads(log.read_text())["runs"]
    texts = {r["ruleId"]: r["message"]["text"] for r in run["results"]}
    assert texts.keys() == {"baseline", "missing"}
    assert texts["baseline"].startswith(f"{moved}: good: ")
    assert texts["missing"].startswith(f"{moved}: gone: ")


# --- output that cannot be written ----------------------------------------------------------------


def run_module(*argv: object, **how: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wellcond", *map(str, argv)]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, env=buffered, **how)


COMMANDS_THAT_PRINT = [["--help"], ["audit", "{}"], ["audit", "{}", "--json"]]


@pytest.mark.parametrize("argv", COMMANDS_THAT_PRINT, ids=" ".join)
def test_closed_pipe_gives_exit_code_141(checkpoint: Path, argv: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = run_module(*(word.format(checkpoint) for word in argv), stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_files_are_written_despite_closed_pipe(checkpoint: Path) -> None:
    many = {f"layer{i}.weight": torch.eye(2) for i in range(200)}  # more than a pipe's buffer
    torch.save(many, checkpoint)
    page = checkpoint.with_name("r.html")
    reader, writer = os.pipe()
    os.close(reader)
    done = run_module("audit", checkpoint, "--html", page, "--json", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
    assert page.read_text().rstrip().endswith("</html>")


full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")


@full
@pytest.mark.slow
@pytest.mark.parametrize("argv", COMMANDS_THAT_PRINT, ids=" ".join)
def test_full_standard_output_is_an_error(checkpoint: Path, argv: list[str]) -> None:
    with Path("/dev/full").open("w") as stdout:
        done = run_module(*(word.format(checkpoint) for word in argv), stdout=stdout)
    assert done.returncode == 2
    assert done.stderr == "wellcond: error: [Errno 28] No space left on device\n"


@full
@pytest.mark.slow
def test_full_standard_error_does_not_raise(checkpoint: Path) -> None:
    with Path("/dev/full").open("w") as out:
        command = [sys.executable, "-m", "wellcond", "audit", str(checkpoint)]
        assert subprocess.run(command, stdout=out, stderr=out).returncode == 2


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits of a process there")
@pytest.mark.parametrize("option", ["--csv", "--html"])
def test_incomplete_report_is_not_written(checkpoint: Path, option: str) -> None:
    path = checkpoint.with_name("report")
    path.write_text("old")
    argv = ["audit", str(checkpoint), option, str(path), "--overwrite"]
    said = f"wellcond: error: [Errno 27] File too large: '{path}'\n"
    assert call(with_short_files, 64, argv) == (2, "", said)
    assert path.read_text() == "old"
    assert {file.name for file in path.parent.iterdir()} == {"model.pt", "report"}


def with_short_files(size: int, argv: list[str]) -> int:
    """Limits the size of files that this process writes, as on a full disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return main(argv)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits of a process there")
@pytest.mark.parametrize("kind", ["pt", "safetensors", "folder"])
def test_incomplete_repair_is_not_written(tmp_path: Path, kind: str) -> None:
    weights = {"w": torch.diag(torch.linspace(1.0, 9.0, 100))}
    folder = tmp_path / "in"
    folder.mkdir()
    path, out = folder, tmp_path / "out"
    if kind != "folder":
        path, out = folder / f"model.{kind}", tmp_path / f"out.{kind}"
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, folder / "model.pt")
    argv = ["repair", str(path), str(out), "--max-condition", "2"]
    code, printed, said = call(with_short_files, 20_000, argv)
    assert (code, printed) == (2, "")
    assert re.fullmatch(rf"wellcond: error: .*{out}.*\n", said)
    assert "wellcond-unfinished" not in said
    assert [file.name for file in tmp_path.iterdir()] == ["in"]


def test_report_of_another_process_is_not_overwritten(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = checkpoint.with_name("r.html")
    to_html = wellcond.AuditReport.to_html

    def meanwhile(*args: Any, **options: Any) -> str:
        page.write_text("precious")
        return to_html(*args, **options)

    monkeypatch.setattr(wellcond.AuditReport, "to_html", meanwhile)
    assert main(["audit", str(checkpoint), "--html", str(page)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "already exists and is not overwritten. Use --overwrite, or another --html." in err
    assert page.read_text() == "precious"
    assert main(["audit", str(checkpoint), "--html", str(page), "--overwrite"]) == 0
    assert page.read_text() != "precious"


def repair_and_be_killed(path: Path, out: Path) -> int:
    def kill(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    wellcond.repair(path, out, 7, progress=kill)
    return 0


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals there")
def test_killed_repair_does_not_block_the_next(checkpoint: Path) -> None:
    fixed = checkpoint.with_name("fixed.pt")
    assert call(repair_and_be_killed, checkpoint, fixed)[0] == -signal.SIGKILL
    (left,) = checkpoint.parent.glob(".*")
    assert left.name.startswith(".wellcond-unfinished-")
    assert main(["repair", str(checkpoint), str(fixed), "--max-condition", "7"]) == 0
    names = {file.name for file in checkpoint.parent.iterdir()}
    assert names == {"model.pt", "fixed.pt", left.name}


# --- memory ---------------------------------------------------------------------------------------

ALLOCATION = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)"
)


ERRORS = [MemoryError(), RuntimeError(ALLOCATION), RuntimeError("std::bad_alloc")]


@pytest.mark.parametrize("error", ERRORS, ids=["Python", "torch", "LAPACK"])
def test_out_of_memory_prints_one_line(
    checkpoint: Path,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("wellcond.audits.sources.Checkpoint", raising(error))
    assert main(["audit", str(checkpoint)]) == 2
    said = f"wellcond: error: {checkpoint}: there is not enough memory\n"
    assert capsys.readouterr().err == said
    monkeypatch.setattr("wellcond.audits.repair.limit_condition_number", raising(error))
    fixed = checkpoint.with_name("fixed.pt")
    assert main(["repair", str(checkpoint), str(fixed), "--max-condition", "7"]) == 2
    assert "there is not enough memory for good. To leave" in capsys.readouterr().err
    assert {file.name for file in checkpoint.parent.iterdir()} == {"model.pt"}


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*args: Any) -> Any:
        raise error

    return fail


def test_other_errors_are_not_reported_as_out_of_memory(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("a mistake of the program")
    monkeypatch.setattr("wellcond.audits.repair.limit_condition_number", raising(error))
    with pytest.raises(RuntimeError, match="a mistake"):
        main(["repair", str(checkpoint), str(checkpoint.with_name("b.pt")), "--max-condition", "7"])


def with_memory(size: int, argv: list[str]) -> int:
    """Limits the memory that this process can allocate in addition to its present memory."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + size, used + size))
    return main(argv)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    ("kind", "times"),
    [
        ("pt", 2),
        ("safetensors", 5),
        pytest.param("pt", 5, marks=pytest.mark.slow),
        pytest.param("safetensors", 2, marks=pytest.mark.slow),
    ],
)
def test_repair_out_of_memory_writes_nothing(tmp_path: Path, kind: str, times: int) -> None:
    path, fixed = tmp_path / f"a.{kind}", tmp_path / f"b.{kind}"
    weights = {"w": torch.ones(2048, 2048)}
    save_file(weights, path) if kind == "safetensors" else torch.save(weights, path)
    argv = ["repair", str(path), str(fixed), "--max-condition", "2"]
    code, printed, said = call(with_memory, times * path.stat().st_size, argv)
    assert (code, printed) == (2, "")
    assert re.fullmatch("wellcond: error: .*not enough memory.*\n", said)
    assert {file.name for file in tmp_path.iterdir()} == {path.name}


def test_output_never_replaces_a_checkpoint_of_any_format() -> None:
    from wellcond.cli.options import _WEIGHTS
    from wellcond.files.collection import READERS

    endings = {ending for reader in READERS for ending in reader.endings}
    assert {one for one in endings if not one.endswith(_WEIGHTS)} == set()
