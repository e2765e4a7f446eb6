"""The site of docs/: what is public is told once, and no link leads nowhere.

Most needs no Sphinx; what does is skipped where `make docs` has not installed it.
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
from wellcond import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "_extensions"))
command_line: Any = importlib.import_module("command_line")

PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*PAGES, *sorted(ROOT.glob("*.md"))]
INTEGRATIONS = ROOT / "src" / "wellcond" / "integrations"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- the reference -------------------------------------------------------------------------------


def public_names() -> set[str]:
    """Those of the package, and of the integrations, of which none is imported here."""
    names = {f"wellcond.{name}" for name in wellcond.__all__}
    for module in INTEGRATIONS.glob("[!_]*.py"):
        tree = ast.parse(module.read_text())
        defined = [d.name for d in tree.body if isinstance(d, ast.ClassDef | ast.FunctionDef)]
        names |= {
            f"wellcond.integrations.{module.stem}.{name}"
            for name in defined
            if not name.startswith("_")
        }
    return names


def test_the_reference_has_every_public_name_once() -> None:
    text = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    told = Counter(re.findall(r"^\.\. auto\w+:: (\S+)$", text, flags=re.MULTILINE))
    assert max(told.values()) == 1
    # What is private beside them is what public functions hand to the user.
    private = {name for name in told if name.count(".") > 1 and ".integrations." not in name}
    assert set(told) - private == public_names()


@pytest.fixture(scope="module")
def commands() -> dict[str, str]:
    """The reference of every command on the page."""
    page = (DOCS / "reference" / "command-line.md").read_text()
    told = re.findall(r"^\.\. command:: (\w+)$", page, flags=re.MULTILINE)
    assert told == [*command_line.subcommands(cli._parser(""))]
    return {command: "\n".join(command_line.reference(command)) for command in told}


def options(text: str) -> dict[str, dict[str, str]]:
    """Of every program its options and arguments, with what is said of them."""
    told = {}
    for part in re.split(r"^\.\. program:: ", text, flags=re.MULTILINE)[1:]:
        program, _, rest = part.partition("\n")
        found = re.findall(r"\.\. option:: (\S+).*\n\n   (.*)\n", rest)
        assert len(found) == len(dict(found))
        told[program] = dict(found)
    return told


def test_every_option_of_every_command_is_told_with_its_help(commands: dict[str, str]) -> None:
    for command, text in commands.items():
        told = options(text)
        parser = command_line.subcommands(cli._parser(command))[command]
        for one in command_line.subcommands(parser).values() or [parser]:
            common = told[parser.prog] if one is not parser else {}
            own = told[one.prog]
            assert not common.keys() & own.keys()
            actions = command_line.arguments(one)
            names = {(action.option_strings or [action.dest])[0]: action for action in actions}
            names |= {a.metavar: a for a in names.values() if not a.option_strings and a.metavar}
            assert common.keys() | own.keys() <= names.keys()
            assert len(common) + len(own) == len(actions)
            for name, said in (common | own).items():
                plain = re.sub(r"\\(.)|``", r"\1", said)
                assert plain.startswith((names[name].help or "") % {"default": names[name].default})


def test_the_page_has_the_exit_codes_of_the_command_line() -> None:
    page = (DOCS / "reference" / "command-line.md").read_text()
    told = re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE)
    _, _, said = (cli.__doc__ or "").partition("Exit codes: ")
    assert told == re.findall(r"(?:^|; )(\d+) ", " ".join(said.split("\n\n")[0].split()))


# --- pages and links -----------------------------------------------------------------------------


def test_every_page_has_its_place_once() -> None:
    """One that is in no table of contents would be found by nobody."""
    index = (DOCS / "index.md").read_text()
    entries = [
        line.partition("<")[2].rstrip(">") or line
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```$", index, re.DOTALL | re.MULTILINE)
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
    """Where links and pictures lead, also those written as HTML; none of code."""
    found = []
    for token in tokens(text):
        found += [str(token.attrs[key]) for key in ("href", "src") if key in token.attrs]
        if token.type.startswith("html_"):
            found += re.findall(r'(?:href|src|srcset)="([^" ]+)', token.content)
    return found


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub and the site make them; and those written as HTML."""
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


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_relative_links_lead_to_what_is_there(path: Path) -> None:
    for link in links(path.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        where, _, anchor = link.partition("#")
        target = (path.parent / where).resolve() if where else path
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        assert target.exists(), f"{link} leads nowhere"
        if anchor:
            assert anchor in anchors(target), f"{link} names no heading"


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_links_to_elsewhere_are_by_https(path: Path) -> None:
    """They are not fetched here; `sphinx-build -b linkcheck` does."""
    elsewhere = [link for link in links(path.read_text()) if re.match(r"[a-z]+:", link)]
    assert [link for link in elsewhere if not re.match(r"https://[\w.-]+(/|$)", link)] == []


def test_links_and_anchors_are_found_as_github_finds_them(tmp_path: Path) -> None:
    text = "# A `b_c`: d, e\n\n## A b\n\n## A b\n\n"
    text += '<img src="x">[t](u.md#v) ![p](q.png)\n\n    [no](x)\n\n`[no](y)`\n'
    (tmp_path / "page.md").write_text(text)
    assert anchors(tmp_path / "page.md") == {"a-b_c-d-e", "a-b", "a-b-1"}
    assert links((tmp_path / "page.md").read_text()) == ["x", "u.md#v", "q.png"]


# --- the site itself -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` does."""
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
def test_the_site_is_built_and_tells_all_that_is_public(
    site: Path, commands: dict[str, str]
) -> None:
    ids: list[str] = []
    for page in (site / "reference").glob("*.html"):
        ids += re.findall(r' id="([^"]+)"', page.read_text())
    assert Counter(one for one in ids if one in public_names()) == Counter(public_names())
    for text in commands.values():
        for program, told in options(text).items():
            for name in told:
                plain = name.lstrip("-") if name.startswith("-") else f"arg-{name}"
                place = f"cmdoption-{program}-{plain}".replace(" ", "-")
                assert ids.count(place) == 1, place


@pytest.mark.slow
def test_the_site_needs_no_network_and_serves_the_schemas(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert re.findall(r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//[^"]*"', text) == []
        assert re.findall(r'<link[^>]* href="(?:https?:)?//[^"]*"', text) == []
    served = {path.name: path.read_text() for path in (site / "schemas").iterdir()}
    assert served == {path.name: path.read_text() for path in (DOCS / "schemas").iterdir()}
