"""The runner: cells, choices, stored runs, and independence of the number of workers."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from wellcond_experiments import grid
from wellcond_experiments.evidence import Evidence
from wellcond_experiments.grid import Cell, Measured, Runner, Setting
from wellcond_experiments.tables import Table


class Parabola(Setting):
    """The score is best at strength 2 and rate 0.1, and slightly better for larger seeds."""

    name = "parabola"
    help = protocol = "A parabola."
    methods: ClassVar = {"none": (0.0,), "l2": (1.0, 2.0, 3.0)}  # type: ignore[misc]
    rates = (0.1, 0.2)
    size = 1
    ran: ClassVar[list[str]] = []

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"size": self.size}

    def run(self, cell: Cell) -> Measured:
        Parabola.ran.append(cell.name)
        score = -((cell.strength - 2) ** 2) - cell.lr + cell.seed / 1e6
        noise = float(torch.randn((), generator=torch.Generator().manual_seed(cell.seed)))
        return Measured({"accuracy": score, "noise": noise}, {"line": [noise, math.pi, math.nan]})

    def tables(self, evidence: Evidence) -> dict[str, Table]:
        return {}

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        return {}


@pytest.fixture(autouse=True)
def nothing_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Parabola, "ran", [])
    monkeypatch.setattr(grid, "_settings", {})


def results(folder: Path, overwrite: bool = False, **changed: Any) -> dict[str, Any]:
    setting = Parabola("", quick=False, seeds=changed.pop("seeds", 3))
    for name, value in changed.items():
        setattr(setting, name, value)
    return Runner(setting, folder, 1, overwrite).results()


def test_the_best_of_the_search_is_reported_on_other_seeds(tmp_path: Path) -> None:
    document = results(tmp_path)
    searched = [run for run in document["runs"] if run["search"]]
    reported = [run for run in document["runs"] if not run["search"]]
    assert len(searched) == 2 + 3 * 2
    assert {run["seed"] for run in searched} == {grid.SEARCH}
    assert [(run["method"], run["strength"], run["lr"], run["seed"]) for run in reported] == [
        *(("none", 0.0, 0.1, seed) for seed in range(3)),
        *(("l2", 2.0, 0.1, seed) for seed in range(3)),
    ]
    chosen = {c["method"]: (c["strength"], c["lr"], c["edge"]) for c in document["chosen"]}
    # Each of two rates is at the edge; the middle strength is not.
    assert chosen == {"none": (0.0, 0.1, "lr"), "l2": (2.0, 0.1, "lr")}


def test_every_rate_is_reported_if_rates_are_not_searched(tmp_path: Path) -> None:
    document = results(tmp_path, rate_is_chosen=False, seeds=1)
    assert {c["method"]: c["strength"] for c in document["chosen"]} == {"l2": 2.0}
    reported = [run for run in document["runs"] if not run["search"]]
    assert [(run["method"], run["lr"]) for run in reported] == [
        *(("none", 0.1), ("none", 0.2), ("l2", 0.1), ("l2", 0.2)),
    ]


def test_the_second_round_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Parabola, "finalists", 2)
    run = Parabola.run

    def later(self: Parabola, cell: Cell) -> Measured:
        """The larger rate is better in the second round, by less than it is worse in the first."""
        metrics, curves = run(self, cell)
        metrics["accuracy"] += 1.5 * cell.lr if cell.final else 0.0
        return Measured(metrics, curves)

    monkeypatch.setattr(Parabola, "run", later)
    document = results(tmp_path)
    assert [name for name in Parabola.ran if name.endswith(f"-{grid.FINAL}")] == [
        *("search-none-0-0.1-20000", "search-none-0-0.2-20000"),
        *("search-l2-2-0.1-20000", "search-l2-2-0.2-20000"),
    ]
    chosen = {c["method"]: (c["strength"], c["lr"], c["edge"]) for c in document["chosen"]}
    assert chosen == {"none": (0.0, 0.2, "lr"), "l2": (2.0, 0.2, "lr")}
    assert len(document["runs"]) == 8 + 4 + 6


def test_a_nan_score_loses() -> None:
    def run(strength: float, score: float) -> dict[str, Any]:
        cell = {"case": "", "method": "l2", "strength": strength, "lr": 0.1, "seed": 10_000}
        return cell | {"metrics": {"accuracy": score}}

    runs = [run(1, math.nan), run(2, -5.0), run(2, math.nan), run(3, -7.0)]
    (chosen,) = grid.choose(Parabola(), runs)
    assert (chosen.strength, chosen.edge) == (3, "strength")
    (chosen,) = grid.choose(Parabola(), [run(1, math.nan), run(2, math.nan)])
    assert chosen.strength == 1  # all failed: the first one, without an error


def test_existing_runs_are_not_repeated(tmp_path: Path) -> None:
    first = results(tmp_path)
    count = len(Parabola.ran)
    assert count == 8 + 6
    assert grid.dump_results(results(tmp_path)) == grid.dump_results(first)
    assert len(Parabola.ran) == count
    (tmp_path / "runs" / "report-l2-2-0.1-1.json").unlink()
    results(tmp_path)
    assert Parabola.ran[count:] == ["report-l2-2-0.1-1"]
    results(tmp_path, seeds=5)  # more seeds add runs and change none
    assert len(Parabola.ran) == count + 1 + 4


def test_runs_under_other_settings_are_refused_and_kept(tmp_path: Path) -> None:
    results(tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(size: 1 there, 2 requested\)"):
        results(tmp_path, size=2)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"but no settings.json.*--overwrite"):
        results(tmp_path)
    assert len(list((tmp_path / "runs").iterdir())) == 14
    results(tmp_path, size=2, overwrite=True)
    assert json.loads((tmp_path / "settings.json").read_text())["size"] == 2
    assert len(Parabola.ran) == 28


def test_a_setting_that_never_ran_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(self: Parabola, cell: Cell) -> Measured:
        raise ValueError("no such data")

    with monkeypatch.context() as patched:
        patched.setattr(Parabola, "run", unreadable)
        with pytest.raises(ValueError, match="no such data"):
            results(tmp_path, data="mnsit")
    assert results(tmp_path, data="mnist")["settings"]["data"] == "mnist"


def test_results_without_runs_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("of yesterday")
    with pytest.raises(ValueError, match="Pass --overwrite"):
        results(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    (tmp_path / "a file").write_text("")
    with pytest.raises(ValueError, match="must be a directory"):
        results(tmp_path / "a file")


def test_a_damaged_run_is_named(tmp_path: Path) -> None:
    results(tmp_path)
    (tmp_path / "runs" / "report-none-0-0.1-0.json").write_text('{"case": ')
    with pytest.raises(ValueError, match=r"report-none-0-0.1-0.json is damaged.*Remove it"):
        results(tmp_path)


def test_an_error_names_the_run_and_keeps_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Parabola, cell: Cell) -> Measured:
        if cell.seed == 1:
            raise RuntimeError("out of luck")
        return Measured({"accuracy": 0.0}, {})

    monkeypatch.setattr(Parabola, "run", failing)
    with pytest.raises(RuntimeError, match="out of luck") as error:
        results(tmp_path)
    assert error.value.__notes__ == ["in the run report-none-0-0.1-1"]
    assert len(list((tmp_path / "runs").iterdir())) == 9


def test_an_interruption_reports_the_kept_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Parabola.run

    def interrupted(self: Parabola, cell: Cell) -> Measured:
        if len(Parabola.ran) == 3:
            raise KeyboardInterrupt
        return run(self, cell)

    with monkeypatch.context() as patched:
        patched.setattr(Parabola, "run", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"Kept 3 finished runs in .*resumes"):
            results(tmp_path)
    results(tmp_path)
    assert len(Parabola.ran) == 14  # no run twice
    with monkeypatch.context() as patched:
        patched.setattr(Parabola, "run", interrupted)
        Parabola.ran[:] = ["a", "b", "c"]
        with pytest.raises(KeyboardInterrupt, match="No run was finished"):
            results(tmp_path / "new")


def test_results_are_read_back_unchanged(tmp_path: Path) -> None:
    document = results(tmp_path)
    read = grid.read(tmp_path / "results.json")
    assert grid.dump_results(read) == grid.dump_results(document)
    run = read["runs"][0]
    assert math.isnan(run["curves"]["line"][2])
    assert run["curves"]["line"][1] == 3.14159
    lines = (tmp_path / "results.json").read_text().splitlines()
    assert sum(line.startswith('  {"case"') for line in lines) == len(document["runs"])
    with pytest.raises(ValueError, match="does not exist"):
        grid.read(tmp_path / "nothing.json")


KILLED = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from slow_setting import Slow
from wellcond_experiments.grid import Runner
Runner(Slow("", False, 20), Path(sys.argv[1]), 1, False).results()
"""


@pytest.mark.slow
def test_a_killed_experiment_resumes_with_the_same_results_for_any_workers(
    tmp_path: Path,
) -> None:
    from slow_setting import Slow

    tests = str(Path(__file__).parent)
    program = [sys.executable, "-c", KILLED.format(tests=tests), str(tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": tests}
    process = subprocess.Popen(program, start_new_session=True, env=environment)
    while len(list(tmp_path.glob("killed/runs/*.json"))) < 4:
        time.sleep(0.02)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    runs = list(tmp_path.glob("killed/runs/*.json"))
    assert 4 <= len(runs) < 20
    before = {path: path.read_text() for path in runs}
    assert all(json.loads(text)["metrics"] for text in before.values())  # no file is incomplete
    killed = Runner(Slow("", False, 20), tmp_path / "killed", 2, False).results()
    assert {path: path.read_text() for path in runs} == before
    alone = Runner(Slow("", False, 20), tmp_path / "alone", 1, False).results()

    def measured(document: dict[str, Any]) -> list[Any]:
        return [(run["seed"], run["metrics"], run["curves"]) for run in document["runs"]]

    assert measured(killed) == measured(alone)


def test_progress_prints_the_remaining_time_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter((0.0, 0.0, 20.0, 40.0, 41.0))
    monkeypatch.setattr(grid.time, "monotonic", lambda: next(times))
    with grid.progress(11, "parabola") as ended:
        ended(None)
        for seed in range(3):
            ended(Cell("", "none", 0.0, 0.1, seed))
    # 20 s per run, nine left; lines are at least 30 s apart.
    assert capsys.readouterr().err == "parabola: 3 of 11 runs, about 3 min left\n"


def test_subnormal_numbers_are_flushed_during_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tiny:
        workers = 1

        def run(self, cell: Cell) -> Measured:
            return Measured({"tiny": (torch.tensor([2.0**-130]) * 1.5).item()}, {})

    key: Any = (Tiny, "", False, 1)
    monkeypatch.setitem(grid._settings, key, Tiny())  # type: ignore[arg-type]
    grid._work(key, Cell("", "none", 0.0, 0.1, 0), tmp_path / "run.json")
    assert grid.read(tmp_path / "run.json")["metrics"]["tiny"] == 0
    assert (torch.tensor([2.0**-130]) * 1.5).item() > 0
