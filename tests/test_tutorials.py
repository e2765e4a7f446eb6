"""Whoever copies a tutorial block by block sees below each block what the page shows there."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[1] / "docs" / "tutorials").glob("*.md"))
# A program of Python or of the shell; indented right below it, what it prints.
BLOCK = re.compile(
    r"^```(python|bash)\n((?:.*\n)*?)```\n(?:\n((?:(?:    .*)?\n)*    .*\n))?", re.MULTILINE
)

# All programs of a page share one process and one folder, as those of a reader do.
READER = """
import contextlib, io, json, subprocess, sys

printed, names = [], {"__name__": "__main__"}
for language, code in json.load(sys.stdin):
    shown = io.StringIO()
    if language == "python":
        with contextlib.redirect_stdout(shown):
            exec(compile(code, f"<program {len(printed) + 1}>", "exec"), names)
        printed.append(shown.getvalue())
    else:
        command = ["bash", "-ec", f"exec 2>&1\\n{code}"]
        printed.append(subprocess.run(command, check=True, stdout=-1, text=True).stdout)
print(json.dumps(printed))
"""


def printed_by(page: Path, folder: Path) -> list[str]:
    """What each program of a page prints in an empty folder."""
    programs = [(language, code) for language, code, _ in BLOCK.findall(page.read_text())]
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-c", READER],
        input=json.dumps(programs),
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": tools},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed: list[str] = json.loads(done.stdout)
    return printed


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_program_of_a_page_prints_what_is_shown_below_it(page: Path, tmp_path: Path) -> None:
    shown = [textwrap.dedent(output) for _, _, output in BLOCK.findall(page.read_text())]
    printed = printed_by(page, tmp_path)
    assert [each.strip() for each in printed] == [each.strip() for each in shown]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_program_of_a_page_is_passed_over(page: Path) -> None:
    text = page.read_text()
    assert len(BLOCK.findall(text)) == len(re.findall(r"^```\w", text, flags=re.M)) > 2


def test_the_comparison_compares_what_is_installed(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "examples" / "compare.py"
    done = subprocess.run(
        [sys.executable, str(script), "--size", "12", "--steps", "10"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    enforced = {name: kappa for name, *_, kappa in rows[2:]}
    assert len(enforced) >= 10
    assert float(enforced["wellcond: ConditionLimit(10)"]) <= 10
    assert enforced["wellcond: IsometryStep(scale=1)"] == enforced["torch: spectral_norm"] == ""
