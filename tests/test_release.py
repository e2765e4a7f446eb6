"""The files of a release are consistent."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import wellcond as wc

ROOT = Path(__file__).parents[1]


def test_version_is_consistent() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "src/wellcond/__init__.py"
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    assert cited is not None
    assert cited[1] == wc.__version__
    newest = re.search(r"^## \[?(\S+?)\]?[ (]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == wc.__version__


def test_workflows_and_forms_use_existing_make_targets() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    called = set()
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        workflow = yaml.safe_load(path.read_text())
        for job in workflow["jobs"].values():
            runs = [step.get("run", "") for step in job["steps"]]
            called |= {word for run in runs for word in re.findall(r"^make (\S+)", run)}
    assert called >= {"lint", "unit", "test-all", "release-check", "docs"}
    assert called <= targets
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        if path.stem != "config":
            assert {"name", "description", "body"} <= form.keys()
            ids = [part["id"] for part in form["body"]]
            assert len(ids) == len(set(ids))


def test_uploaded_readme_links_to_the_repository(tmp_path: Path) -> None:
    """PyPI shows only the text, so relative links and pictures would be broken there."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    (step,) = [s for s in release["jobs"]["build"]["steps"] if "README.md" in s.get("run", "")]
    shutil.copy(ROOT / "README.md", tmp_path)
    environment = os.environ | {"PLACE": "someone/wellcond", "TAG": "v1"}
    subprocess.run(["bash", "-euc", step["run"]], cwd=tmp_path, env=environment, check=True)
    before, after = (
        re.findall(r"(!?)\[[^]]*\]\(([^)]+)\)", (folder / "README.md").read_text())
        for folder in (ROOT, tmp_path)
    )
    places = {
        "!": "https://raw.githubusercontent.com/someone/wellcond/v1/",
        "": "https://github.com/someone/wellcond/blob/v1/",
    }
    assert after == [
        (mark, link if link.startswith("https:") else places[mark] + link) for mark, link in before
    ]
    assert any(mark for mark, _ in before)
