"""README and docs match the committed results: tables and pictures are made again and compared."""

import re
import shutil
from dataclasses import asdict
from pathlib import Path

import matplotlib
import pytest

from wellcond.cli import main
from wellcond_experiments import evidence, grid, reproduce
from wellcond_experiments.settings import SETTINGS

ROOT = Path(__file__).parents[2]
RESULTS = [path for name in SETTINGS if (path := ROOT / "results" / f"{name}.json").exists()]
PAGES = [page for pattern in reproduce.PAGES for page in sorted(ROOT.glob(pattern))]
# Another version of matplotlib writes other bytes.
DRAWN_BY = re.compile(rb"<dc:title>Matplotlib v([\d.]+)")


def drawn_here(picture: bytes) -> bool:
    found = DRAWN_BY.search(picture)
    assert found, "a picture that was not drawn by --report"
    return found[1].decode() == matplotlib.__version__


@pytest.mark.slow
@pytest.mark.parametrize("results", RESULTS, ids=lambda path: path.stem)
def test_report_changes_nothing(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for page in PAGES:
        copy = tmp_path / page.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(page, copy)
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", results.stem, "--report", str(results.parent)]) == 0
    for page in PAGES:
        assert (tmp_path / page.relative_to(ROOT)).read_text() == page.read_text(), page.name
    pictures = list((tmp_path / "docs" / "evidence").glob("*.svg"))
    assert pictures
    for picture in pictures:
        committed = (ROOT / "docs" / "evidence" / picture.name).read_bytes()
        if drawn_here(committed):
            assert picture.read_bytes() == committed, picture.name


def test_results_are_complete() -> None:
    """All declared cells exist, with at least five seeds, and the files are small."""
    for path in RESULTS:
        document = grid.read(path)
        setting = SETTINGS[path.stem].of(document)
        assert not setting.quick
        assert document["seeds"] >= 5
        assert document["protocol"] == setting.protocol
        declared = grid.plain({"experiment": setting.name} | setting.settings())
        assert document["settings"] == declared, path.name
        searched = [run for run in document["runs"] if run["search"]]
        assert [asdict(one) for one in grid.choose(setting, searched)] == document["chosen"]
        best = {(c["case"], c["method"]): grid.Chosen(**c) for c in document["chosen"]}
        cells = {cell.name for cell in [*setting.search_cells(), *setting.report_cells(best)]}
        there = [grid.cell(run).name for run in document["runs"]]
        assert len(there) == len(set(there))
        first = [run for run in searched if not grid.cell(run).final]
        assert set(there) == cells | {cell.name for cell in grid.finals(setting, first)}, path.name
    assert sum(path.stat().st_size for path in RESULTS) < 5_000_000


def test_every_block_of_a_page_has_its_results() -> None:
    names = {match[2] for page in PAGES for match in evidence.BLOCK.finditer(page.read_text())}
    assert names - {"winners", "methods", "early"} <= {path.stem for path in RESULTS}
    pictures = {path.name for path in (ROOT / "docs" / "evidence").glob("*.svg")}
    shown = {
        name
        for page in PAGES
        for name in re.findall(r"\]\((?:(?:docs/)?evidence/)?([\w-]+\.svg)\)", page.read_text())
    }
    assert shown == pictures
