"""Importing wellcond is light, and arrows between its rooms point down."""

import ast
import subprocess
import sys
from pathlib import Path

import wellcond

SOURCE = Path(wellcond.__file__).parent
# From the ground up: a room may import only what stands before it.
ROOMS = [
    "_operators",
    "_sharded",
    "_bounds",
    "_leading",
    "_spectrum",
    "_nearest",
    "_penalties",
    "_weights",
    "_checkpoint",
    "_memory",
    "_compiled",
    "_estimates",
    "_selection",
    "_passes",
    "_attachment",
    "_report",
    "_monitor",
    "_regularizer",
    "_page",
    "_findings",
    "_audit",
    "_repair",
]


def test_importing_loads_torch_and_the_standard_library_alone() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import wellcond, wellcond.cli; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(out.stdout.split()) - {"wellcond", "torch", "torchgen", "functorch"}
    assert loaded <= set(sys.stdlib_module_names)


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("wellcond")}


def test_arrows_point_down() -> None:
    for height, room in enumerate(ROOMS):
        allowed = {f"wellcond.{below}" for below in ROOMS[:height]}
        for name in imported(SOURCE / f"{room}.py"):
            assert ".".join(name.split(".")[:2]) in allowed, f"{room} imports {name}"


def test_every_room_has_its_place() -> None:
    rooms = {path.stem for path in SOURCE.glob("_*.py")} - {"__init__", "__main__", "_cli"}
    assert rooms == set(ROOMS)


def test_experiments_see_only_public_names() -> None:
    for path in (SOURCE / "experiments").glob("*.py"):
        for name in imported(path):
            assert name == "wellcond" or name.startswith("wellcond.experiments"), path


def test_public_names_exist_and_have_docstrings() -> None:
    for name in wellcond.__all__:
        assert getattr(wellcond, name).__doc__, name


def test_integrations_see_only_public_names() -> None:
    for path in (SOURCE / "integrations").glob("*.py"):
        for name in imported(path):
            assert name == "wellcond" or name.startswith("wellcond.integrations"), path
