"""Running a tutorial block by block prints the output that the page shows below each block."""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from programs import fresh_process, run_python, run_shell

PAGES = sorted((Path(__file__).parents[1] / "docs" / "tutorials").glob("*.md"))
# A Python or shell program, and its output, indented directly below it.
BLOCK = re.compile(
    r"^```(python|bash)\n((?:.*\n)*?)```\n(?:\n((?:(?:    .*)?\n)*    .*\n))?", re.MULTILINE
)

# These pages train for more than a few seconds.
LONG = {"audit", "keeps-learning", "limit", "repair"}


def printed_by(page: Path, folder: Path) -> list[str]:
    """The output of each program of a page in an empty folder; Python programs share names."""
    printed = []
    with fresh_process(folder) as names:
        for language, code, _ in BLOCK.findall(page.read_text()):
            if language == "python":
                printed.append(run_python(code, names))
            else:
                exit_code, text = run_shell(code)
                assert exit_code == 0, text
                printed.append(text)
    return printed


def pages() -> Iterator[Any]:
    for page in PAGES:
        marks = [pytest.mark.slow] if page.stem in LONG else []
        yield pytest.param(page, id=page.stem, marks=marks)


@pytest.mark.parametrize("page", [*pages()])
def test_programs_print_the_shown_output(page: Path, tmp_path: Path) -> None:
    shown = [textwrap.dedent(output) for _, _, output in BLOCK.findall(page.read_text())]
    printed = printed_by(page, tmp_path)
    assert [each.strip() for each in printed] == [each.strip() for each in shown]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_program_is_skipped(page: Path) -> None:
    text = page.read_text()
    assert len(BLOCK.findall(text)) == len(re.findall(r"^```\w", text, flags=re.M)) > 2


def test_comparison_uses_installed_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Path(__file__).parents[1] / "examples" / "compare.py"
    monkeypatch.setattr("sys.argv", [str(script), "--size", "12", "--steps", "10"])
    with fresh_process(tmp_path) as names:
        printed = run_python(script.read_text(), names)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()]
    enforced = {name: kappa for name, *_, kappa in rows[2:]}
    assert len(enforced) >= 10
    assert float(enforced["wellcond: ConditionLimit(10)"]) <= 10
    assert enforced["wellcond: IsometryStep(scale=1)"] == enforced["torch: spectral_norm"] == ""
