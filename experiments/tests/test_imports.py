"""The experiments use only the public names of wellcond."""

import ast
import sys
from pathlib import Path

import pytest

import wellcond as wc
import wellcond_experiments
from wellcond.cli import main

PACKAGE = Path(*wellcond_experiments.__path__)
PUBLIC = {*wc.__all__, "__version__", "__path__", "report", "rules"}


def wellcond_imports(tree: ast.AST) -> list[str]:
    """Lists all imports from wellcond, as written."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [f"import {one.name} as {one.asname}" for one in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(f"from {node.module}")
    return [one for one in found if one.split()[1].partition(".")[0] == "wellcond"]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_only_public_names_of_wellcond_are_used(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert set(wellcond_imports(tree)) <= {"import wellcond as wc"}
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "wc"
    }
    assert used <= PUBLIC


def test_other_imports_are_detected() -> None:
    tree = ast.parse("import wellcond.text\nfrom wellcond import cli\nimport wellcond_experiments")
    assert wellcond_imports(tree) == ["import wellcond.text as None", "from wellcond"]


@pytest.mark.parametrize("command", ["reproduce", "bench"])
@pytest.mark.parametrize("arguments", [[], ["--help"], ["denoise", "--quick"]], ids=" ".join)
@pytest.mark.parametrize("missing", ["wellcond_experiments", "pandas"])
def test_without_the_experiments_the_command_names_the_remedy(
    command: str,
    arguments: list[str],
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if (command, missing) == ("bench", "pandas"):
        pytest.skip("the benchmarks do not need pandas")
    for name in [*sys.modules]:
        if name.partition(".")[0] == "wellcond_experiments":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main([command, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"({missing}" in err
    assert "`pip install ./experiments`" in err
