"""The cost of a step: every method in every network, the cheapest first."""

from pathlib import Path

import pytest

from wellcond_experiments import grid
from wellcond_experiments.evidence import Evidence
from wellcond_experiments.grid import Runner
from wellcond_experiments.settings.cost import Cost


@pytest.mark.slow
def test_table_contains_every_method_with_its_memory(tmp_path: Path) -> None:
    setting = Cost(quick=True, seeds=1)
    Runner(setting, tmp_path, 1, overwrite=False).results()
    found = Evidence(grid.read(tmp_path / "results.json"))
    for case, table in setting.tables(found).items():
        ratios = [float(row[1]) for row in table.rows]
        assert ratios == sorted(ratios)
        ways = {row[0]: row for row in table.rows}
        both = {"none", "none again", "attach(every=10)", "TikhonovPenalty, in the loss"}
        assert both <= ways.keys()
        assert ("exact SVD in the loss" in ways) == (case == "mlp")
        assert ("state" in table.header) == (case == "mlp")  # memory is relative to one weight
        assert "operations" in table.header
    (drawing,) = setting.figures(found).values()
    assert [len(panel.patches) for panel in drawing.axes] == [12, 7]
