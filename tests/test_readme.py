"""The programs of the README run unchanged, and its numbers match the pages that it links."""

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import wellcond as wc

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_training_loop_runs_with_added_lines() -> None:
    (diff,) = blocks("diff")
    assert sum(line.startswith("+") for line in diff.splitlines()) == 4
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        exec("\n".join(line[1:] for line in diff.splitlines()), names)
    assert names["reg"].measure()["0.weight"].step == 100
    assert float(wc.condition_number(names["model"][0].weight)) <= 10


def test_python_blocks_print_the_shown_output(capsys: pytest.CaptureFixture[str]) -> None:
    found = re.findall(
        r"^```python\n(.*?)^```\n\n((?:    [^\n]*\n)+)", README, re.DOTALL | re.MULTILINE
    )
    assert len(found) == len(blocks("python")) > 0
    for program, output in found:
        exec(program, {})
        assert capsys.readouterr().out == textwrap.dedent(output)


def test_numbers_match_the_evidence_pages() -> None:
    """The README has them by hand, and the pages have them from the results."""
    why = README.partition("\n## ")[0]
    pages = [ROOT / "docs" / "evidence.md", *(ROOT / "docs" / "evidence").glob("*.md")]
    pages.append(ROOT / "docs" / "cohort.md")
    evidence = "".join(page.read_text() for page in pages)
    numbers = re.findall(r"\d+\.\d+(?: ± \d+\.\d+)?", why)
    assert len(numbers) > 3
    assert [number for number in numbers if number not in evidence] == []
    costs = (ROOT / "docs" / "costs.md").read_text()
    told = README.partition("reg.enforce()")[2].partition("\n## ")[0].partition("```python")[0]
    numbers = re.findall(r"\d+\.\d+", told)
    assert len(numbers) > 1
    assert [number for number in numbers if number not in costs] == []
