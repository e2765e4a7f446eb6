"""Importing wellcond is fast, and folders import only from the folders that the table allows.

`make table` writes the table to CONTRIBUTING.md.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import wellcond
import wellcond.report
import wellcond.rules

SOURCE = Path(wellcond.__file__).parent
GUIDE = Path(__file__).parents[1] / "CONTRIBUTING.md"
# The folders from which each folder may import, lowest layer first; "" means the public names.
ALLOWED: dict[str, set[str]] = {
    "output": set(),
    "text": {"output"},
    "linalg": set(),
    "operators": {"linalg"},
    "weights": {"linalg", "operators", "text"},
    "rules": {"linalg", "operators"},
    "report": {"weights", "text"},
    "training": {"linalg", "operators", "weights", "rules", "report", "text"},
    "recipes": {"weights"},
    "files": {"weights", "recipes", "text"},
    "audits": {"linalg", "operators", "weights", "rules", "files", "report", "text", "output"},
    "": {"linalg", "rules", "training", "audits", "report"},
    "integrations": {""},
    "testing": {""},
    "cli": {"", "audits", "report", "text"},
    "__main__": {"cli"},
}


# --- layers ---------------------------------------------------------------------------------------


def modules() -> dict[str, Path]:
    """The source of every module of wellcond; the root has the list of public names instead."""
    found = {"wellcond": SOURCE / "__init__.pyi"}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        found.setdefault(".".join(parts).removesuffix(".__init__"), path)
    return found


MODULES = modules()


class WithoutTypes(ast.NodeTransformer):
    """Removes imports for type checkers only."""

    def visit_If(self, node: ast.If) -> ast.If | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else node


def imported(path: Path, types: bool = True) -> Iterator[str]:
    """The modules of wellcond that a module imports, also within functions."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree if types else WithoutTypes().visit(tree)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            # A name that is imported from a module can itself be a module.
            module = name if name in MODULES else name.rpartition(".")[0]
            if module in MODULES:
                yield module
            else:
                assert name.split(".")[0] != "wellcond", f"{path} imports {name}"


def folder(module: str) -> str:
    """The first name below wellcond; "" for the root itself."""
    return module.removeprefix("wellcond").removeprefix(".").partition(".")[0]


def test_imports_follow_the_table() -> None:
    assert {folder(module) for module in MODULES} == set(ALLOWED)
    wrong = [
        f"{module} imports {other}"
        for module, path in MODULES.items()
        for other in imported(path, types=False)
        if folder(other) not in ALLOWED[folder(module)] | {folder(module)}
    ]
    assert not wrong


def test_no_import_from_a_higher_layer() -> None:
    below: set[str] = set()
    for name, allowed in ALLOWED.items():
        assert allowed <= below, name
        below.add(name)


def test_no_circular_imports() -> None:
    graph = {module: {*imported(path, types=False)} - {module} for module, path in MODULES.items()}
    TopologicalSorter(graph).prepare()


def table() -> str:
    """ALLOWED as a table of CONTRIBUTING.md, with the first sentence of each docstring."""
    rows = ["| folder | what it is for | may import from |", "|---|---|---|"]
    for name, allowed in ALLOWED.items():
        if name in ("", "__main__"):
            continue
        path = MODULES[f"wellcond.{name}"]
        purpose = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
        purpose = " ".join(purpose.split()).removesuffix(".")
        shown = f"{name}/" if path.stem == "__init__" else path.name
        order = [other or "the public names" for other in ALLOWED if other in allowed]
        rows.append(f"| `{shown}` | {purpose} | {', '.join(order) or 'nothing'} |")
    return "\n".join(rows) + "\n"


IN_GUIDE = re.compile(r"^\| folder \|.*\n(?:\|.*\n)+", re.MULTILINE)


def test_table_in_contributing_is_current() -> None:
    (written,) = IN_GUIDE.findall(GUIDE.read_text())
    assert written == table(), "run `make table`"


# --- modules that an import loads -----------------------------------------------------------------

LOADS = """
import contextlib, io, json, sys

def loaded():
    return sorted(sys.modules)

def run(*arguments):
    printed = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(printed):
        wellcond.cli.main([*arguments])
    assert printed.getvalue(), arguments

facts = {}
import wellcond.cli
for arguments in (["--help"], ["--version"], ["audit", "--help"], ["repair", "--help"]):
    run(*arguments)
facts["after help"] = loaded()
import torch
facts["after torch"] = loaded()
for module in ("wellcond", "wellcond.report", "wellcond.rules"):
    exec(f"from {module} import *")
facts["after all"] = loaded()
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts() -> dict[str, set[str]]:
    """The modules that a process has loaded after each of several actions."""
    done = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: set(loaded) for name, loaded in json.loads(done.stdout).items()}


def test_help_loads_neither_torch_nor_an_experiment(facts: dict[str, set[str]]) -> None:
    first = {name.partition(".")[0] for name in facts["after help"]}
    assert "wellcond" in first
    assert not first & {"torch", "numpy", "rich", "safetensors", "wellcond_experiments"}


def test_public_names_load_only_torch_and_standard_library(
    facts: dict[str, set[str]],
) -> None:
    first = {name.partition(".")[0] for name in facts["after all"] - facts["after torch"]}
    assert first - {"wellcond", "torch", "torchgen", "functorch"} <= set(sys.stdlib_module_names)


# --- public names ---------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [wellcond, wellcond.report, wellcond.rules])
def test_public_names_are_documented_and_listed(module: ModuleType) -> None:
    undocumented = [name for name in module.__all__ if not getattr(module, name).__doc__]
    assert not undocumented
    assert set(module.__all__) <= set(dir(module))
    names: dict[str, Any] = {}
    exec(f"from {module.__name__} import *", names)
    assert names.keys() - {"__builtins__"} == set(module.__all__)


def test_stub_lists_the_public_names() -> None:
    stub = ast.parse(MODULES["wellcond"].read_text())
    seen = {
        (node.module, alias.asname)
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    there = {(f"wellcond.{module}", name) for name, module in wellcond._MODULE_OF.items()}
    assert seen == there | {("wellcond", name) for name in wellcond._PACKAGES}


def test_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'auditt'"):
        wellcond.auditt  # noqa: B018


if __name__ == "__main__":
    GUIDE.write_text(IN_GUIDE.sub(lambda _: table(), GUIDE.read_text()))
