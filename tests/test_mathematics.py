"""The mathematics page cites an existing test for every statement."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "mathematics.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
PAGES = [ROOT / "docs" / "mathematics.md", *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]


@pytest.mark.parametrize(("file", "test"), NAMED, ids=[test for _, test in NAMED])
def test_cited_tests_exist(file: str, test: str) -> None:
    assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), flags=re.MULTILINE)


def test_every_proof_cites_a_test() -> None:
    """Between each proof and the next, the page cites a test."""
    parts = re.split(r"∎", PAGE)[1:]
    assert len(parts) >= 12
    unheld = [part for part in parts if not re.search(r"`tests/[\w/]+\.py::\w+`", part)]
    assert not unheld


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_formulas_render_alike_on_github_and_site(page: Path) -> None:
    """GitHub treats a backslash before punctuation, and a star, as Markdown."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    formulas = [a or b for a, b in re.findall(r"\$\$(.+?)\$\$|\$([^$]+?)\$", text, flags=re.DOTALL)]
    assert text.count("$") == sum(4 if f"$${formula}$$" in text else 2 for formula in formulas), (
        "a dollar without another"
    )
    for formula in formulas:
        assert formula == formula.strip(), formula
        assert not re.search(r"\\[^a-zA-Z]|[*]|<\S", formula), formula
        assert formula.count("{") == formula.count("}"), formula
        assert len(re.findall(r"\\left\b", formula)) == len(re.findall(r"\\right\b", formula))
