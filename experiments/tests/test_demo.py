"""The demo describes its runs correctly for any results, in few lines."""

import math
from pathlib import Path

import pytest

from wellcond_experiments import demo, figures
from wellcond_experiments.grid import Measured


def make_runs(**numbers: tuple[float, float]) -> demo.Runs:
    """Makes runs from kappa of the first weight and the final error, by method."""
    return {
        method: [Measured({"error": error}, {"epochs": [0.0, 1.0], demo.FIRST: [9.0, kappa]})]
        for method, (kappa, error) in numbers.items()
    }


def runs_of(none: float, decayed: float, limited: float, kappa: float = math.inf) -> demo.Runs:
    return make_runs(
        **{
            "none": (99.0, none),
            "tikhonov": (kappa, decayed),
            "condition-gradient": (7.0, limited),
        }
    )


def test_description_matches_the_runs() -> None:
    text = "\n".join(demo.describe(runs_of(0.4, 0.5, 0.2)))
    assert "above a million" in text
    assert "kept it at 7.\nIts error is 60% smaller than with L2 and 50% smaller" in text
    text = "\n".join(demo.describe(runs_of(0.1, 0.1, 0.2, kappa=30.0)))
    assert "to 30." in text
    assert "100% larger than with L2 and 100% larger than without a regulariser" in text


def test_it_fits_a_screen() -> None:
    lines = [*demo.describe(runs_of(0.4, 0.5, 0.2)), "Picture", *demo.WHERE_TO_GO]
    assert len(lines) <= 15
    assert max(map(len, lines)) <= 100


def test_its_picture_shows_infinite_numbers(tmp_path: Path) -> None:
    drawing = demo.draw(runs_of(0.4, 0.5, 0.2))
    assert figures.save(drawing, tmp_path / "a.png").stat().st_size > 9999
    left, right = drawing.axes
    assert len(left.lines) - 1 == len(right.patches) == 3


@pytest.mark.slow
def test_it_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    demo.main(["--out", str(tmp_path)])
    assert "kept it at" in capsys.readouterr().out
    assert (tmp_path / "demo.png").exists()
