"""Importing wellcond is light, and folders import only what the table allows."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import wellcond

SOURCE = Path(wellcond.__file__).parent
# Which folder may import from which; "" stands for the public names. What is not here is refused:
# training and checkpoints never see each other, linalg and operators nothing at all.
ALLOWED: dict[str, set[str]] = {
    "output": set(),
    "text": {"output"},
    "linalg": set(),
    "operators": set(),
    "weights": {"operators", "text"},
    "rules": {"linalg", "operators"},
    "report": {"linalg", "weights", "text"},
    "training": {"linalg", "operators", "weights", "rules", "report", "text"},
    "files": {"weights", "text"},
    "audits": {"linalg", "operators", "weights", "rules", "files", "report", "text", "output"},
    "": {"linalg", "rules", "training", "audits", "report"},
    "integrations": {""},
    "cli": {"", "audits", "report", "text"},
    "__main__": {"cli"},
}


def folder(module: str) -> str:
    """The first name below wellcond; "" for the root itself and the names it lists."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else ""


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module == "wellcond":
            names |= {f"wellcond.{alias.name}" for alias in node.names}
            names -= {"wellcond"} if any(f"{a.name}" in ALLOWED for a in node.names) else set()
    return {name for name in names if name.split(".")[0] == "wellcond"}


MODULES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_imports_only_from_folders_that_it_may(path: Path) -> None:
    inside = path.relative_to(SOURCE).with_suffix("").parts
    own = "" if inside[0] == "__init__" else inside[0]
    assert own in ALLOWED, f"{own} has no place in the table of folders"
    for name in imported(path):
        assert folder(name) in ALLOWED[own] | {own}, f"{'/'.join(inside)} imports {name}"


def test_the_table_of_the_guide_is_this_one() -> None:
    guide = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `(\w+)[./].*\|.*\| (.*) \|$", guide, flags=re.MULTILINE)
    table = {
        name: set(allowed.replace("the public names", "").split(", ")) - {"nothing"}
        for name, allowed in rows
    }
    assert table == {name: ALLOWED[name] for name in ALLOWED if name not in ("", "__main__")}


def test_every_folder_of_the_table_is_there() -> None:
    there = {path.relative_to(SOURCE).with_suffix("").parts[0] for path in MODULES}
    assert there - {"__init__"} == set(ALLOWED) - {""}


def loaded_by(code: str) -> set[str]:
    """The modules that are there after this code and were not after `import torch`."""
    program = f"import sys, torch; before = set(sys.modules); {code}; "
    program += "print(*sorted(set(sys.modules) - before), file=sys.__stderr__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


def test_importing_loads_torch_and_the_standard_library_alone() -> None:
    code = "import wellcond as wc, wellcond.cli; [getattr(wc, name) for name in wc.__all__]"
    loaded = {name.split(".")[0] for name in loaded_by(code)}
    assert loaded - {"wellcond", "torch", "torchgen", "functorch"} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("command", ["audit", "repair"])
def test_help_of_a_command_imports_no_experiment(command: str) -> None:
    code = "import contextlib, wellcond.cli\nwith contextlib.suppress(SystemExit): "
    code += f"wellcond.cli.main(['{command}', '--help'])\n0"
    loaded = loaded_by(code)
    assert "wellcond.cli" in loaded
    assert not [name for name in loaded if name.startswith("wellcond_experiments")]


def test_public_names_exist_and_have_docstrings() -> None:
    assert len(wellcond.__all__) > 30
    for name in wellcond.__all__:
        assert getattr(wellcond, name).__doc__, name
        assert name in dir(wellcond)
    assert set(wellcond._WHERE) == set(wellcond.__all__)
    with pytest.raises(AttributeError, match="no attribute 'auditt'"):
        wellcond.auditt  # noqa: B018


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["audit", "--help"]], ids=str)
def test_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    code = "import contextlib, sys, wellcond.cli\nwith contextlib.suppress(SystemExit):\n"
    code += f"    wellcond.cli.main({arguments})\nprint('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["False"]
    assert done.stdout
