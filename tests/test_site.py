"""The site of docs/: every public name is documented once, and every link has a target.

Most tests do not need Sphinx. The others are skipped if `make docs` has not installed it.
"""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

import wellcond
import wellcond.report
import wellcond.rules
from wellcond.cli.options import make_parser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "_extensions"))
command_line: Any = importlib.import_module("command_line")

PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*PAGES, *sorted(ROOT.glob("*.md"))]
INTEGRATIONS = ROOT / "src" / "wellcond" / "integrations"


# --- the reference -------------------------------------------------------------------------------


def public_names() -> set[str]:
    """The public names of the packages, without repetitions, and of the integrations.

    The integrations are not imported.
    """
    found = {
        name: f"{module.__name__}.{name}"
        for module in (wellcond.rules, wellcond.report, wellcond)
        for name in module.__all__
    }
    names = {*found.values()}
    for module in INTEGRATIONS.glob("[!_]*.py"):
        for one in ast.parse(module.read_text()).body:
            if isinstance(one, ast.ClassDef | ast.FunctionDef) and not one.name.startswith("_"):
                names.add(f"wellcond.integrations.{module.stem}.{one.name}")
    return names


def test_reference_has_every_public_name_once() -> None:
    text = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    documented = Counter(re.findall(r"^\.\. auto\w+:: (\S+)$", text, flags=re.MULTILINE))
    assert max(documented.values()) == 1
    assert public_names() <= set(documented)
    # The other names belong to private modules; public functions return them.
    for name in set(documented) - public_names():
        module, _, attribute = name.rpartition(".")
        assert module not in ("wellcond", "wellcond.report", "wellcond.rules")
        assert hasattr(importlib.import_module(module), attribute), name


def commands() -> list[str]:
    page = (DOCS / "reference" / "command-line.md").read_text()
    return re.findall(r"^\.\. command:: (\w+)$", page, flags=re.MULTILINE)


def test_reference_has_every_command_and_option() -> None:
    assert commands() == [*command_line.subcommands(make_parser(""))]
    for command in commands():
        text = "\n".join(command_line.reference(command))
        parser = command_line.subcommands(make_parser(command))[command]
        for one in command_line.subcommands(parser).values() or [parser]:
            for action in command_line.arguments(one):
                name = (action.option_strings or [action.metavar or action.dest])[0]
                assert f".. option:: {name}" in text, f"{one.prog} {name}"


# --- pages and links -----------------------------------------------------------------------------


def test_every_page_is_in_the_contents_once() -> None:
    """A page that is in no table of contents cannot be found."""
    texts = "".join(page.read_text() for page in PAGES)
    entries = [
        line.partition("<")[2].rstrip(">") or line
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```$", texts, re.DOTALL | re.MULTILINE)
        for line in block.splitlines()
        if line and not line.startswith(":")
    ]
    pages = {str(path.relative_to(DOCS).with_suffix("")) for path in PAGES} - {"index"}
    for page in sorted(pages):
        assert sum(fnmatchcase(page, entry) for entry in entries) == 1, page
    assert {entry for entry in entries if "*" not in entry} <= pages


def tokens(text: str) -> Iterator[Any]:
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        yield token
        yield from token.children or ()


def links(text: str) -> list[str]:
    """The targets of links and pictures, in Markdown and in HTML, but not in code."""
    found = []
    for token in tokens(text):
        found += [str(token.attrs[key]) for key in ("href", "src") if key in token.attrs]
        if token.type.startswith("html_"):
            found += re.findall(r'(?:href|src|srcset)="([^" ]+)', token.content)
    return found


def anchors(path: Path) -> set[str]:
    """The anchors of headings, as GitHub and the site create them, and anchors in HTML."""
    listed = [*tokens(path.read_text())]
    found: set[str] = set()
    for token, inline in pairwise(listed):
        if token.type == "heading_open":
            plain = "".join(t.content for t in inline.children if t.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
            number = sum(bool(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", one)) for one in found)
            found.add(f"{slug}-{number}" if number else slug)
        if token.type.startswith("html_"):
            found |= set(re.findall(r'(?:id|name)="([^"]+)"', token.content))
    return found


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_have_existing_targets_or_https(path: Path) -> None:
    """Does not fetch other sites; `sphinx-build -b linkcheck` does."""
    for link in links(path.read_text()):
        if re.match(r"[a-z]+:", link):
            assert re.match(r"https://[\w.-]+(/|$)", link), link
            continue
        where, _, anchor = link.partition("#")
        target = (path.parent / where).resolve() if where else path
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        assert target.exists(), f"{link} leads nowhere"
        if anchor:
            assert anchor in anchors(target), f"{link} names no heading"


def test_links_and_anchors_follow_github(tmp_path: Path) -> None:
    text = "# A `b_c`: d, e\n\n## A b\n\n## A b\n\n"
    text += '<img src="x">[t](u.md#v) ![p](q.png)\n\n    [no](x)\n\n`[no](y)`\n'
    (tmp_path / "page.md").write_text(text)
    assert anchors(tmp_path / "page.md") == {"a-b_c-d-e", "a-b", "a-b-1"}
    assert links((tmp_path / "page.md").read_text()) == ["x", "u.md#v", "q.png"]


# --- the site itself -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    needed = ["furo", "myst_parser", "sphinx_copybutton", "sphinx-mathjax-offline"]
    for name in [*needed, "lightning", "transformers"]:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed; `make docs` installs it")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", str(DOCS), str(out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
def test_site_has_an_anchor_for_each_name_and_option(site: Path) -> None:
    pages = [page.read_text() for page in (site / "reference").glob("*.html")]
    ids = Counter(one for page in pages for one in re.findall(r' id="([^"]+)"', page))
    assert {name: ids[name] for name in public_names()} == dict.fromkeys(public_names(), 1)
    text = "\n".join(line for command in commands() for line in command_line.reference(command))
    programs = re.split(r"^\.\. program:: ", text, flags=re.MULTILINE)[1:]
    for program, _, rest in (part.partition("\n") for part in programs):
        for name in re.findall(r"\.\. option:: ([^\s,]+)", rest):
            plain = name.lstrip("-") if name.startswith("-") else f"arg-{name}"
            assert ids[f"cmdoption-{program}-{plain}".replace(" ", "-")] == 1


@pytest.mark.slow
def test_site_needs_no_network_and_serves_schemas(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert re.findall(r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//[^"]*"', text) == []
        assert re.findall(r'<link[^>]* href="(?:https?:)?//[^"]*"', text) == []
    served = {path.name: path.read_text() for path in (site / "schemas").iterdir()}
    assert served == {path.name: path.read_text() for path in (DOCS / "schemas").iterdir()}
