"""Least squares: the problem, gradient descent, and the output."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

import wellcond as wc
from wellcond_experiments.evidence import Evidence
from wellcond_experiments.grid import Runner
from wellcond_experiments.settings import least_squares
from wellcond_experiments.settings.least_squares import CLOSED, STRENGTHS, LeastSquares, Problem

METHODS = ("none", "tikhonov", "condition-gradient", "condition")


def after(problem: Problem, method: str, strength: float, steps: int) -> Tensor:
    return next(islice(problem.descend(method, strength, 0), steps, None))


def test_the_problem_has_its_condition_numbers() -> None:
    problem = Problem.draw(0)
    assert problem.A.shape == (64, 32)
    assert problem.truth.shape == (32, 16)
    # The error of the SVD is eps kappa, far below 1e-9.
    assert float(wc.condition_number(problem.A)) == pytest.approx(100, rel=1e-9)
    assert float(wc.condition_number(problem.truth)) == pytest.approx(1000, rel=1e-9)


def test_descent_reaches_the_closed_form() -> None:
    problem, strength = Problem.draw(1), 0.1
    # Contraction by 1 - (sigma_min^2/p + lam)/(1 + lam) < 0.91 per step: 0.91^400 < 1e-16.
    S = after(problem, "tikhonov", strength, 400)
    torch.testing.assert_close(S, problem.closed_form(strength))


def test_methods_share_the_start_and_agree_at_strength_zero() -> None:
    problem = Problem.draw(0)
    starts = [after(problem, method, 0.1, 0) for method in METHODS]
    assert all(torch.equal(S, starts[0]) for S in starts)
    expected = after(problem, "none", 0.0, 20)
    for method in METHODS[1:]:
        torch.testing.assert_close(after(problem, method, 0.0, 20), expected)


def objective(problem: Problem, S: Tensor, strength: float) -> float:
    return problem.residual(S) ** 2 / 2 + strength * float(wc.condition_penalty(S))


@pytest.mark.parametrize("strength", [1e-3, 1e-2])
@pytest.mark.parametrize("method", ["condition-gradient", "condition"])
def test_descent_lowers_its_own_objective(method: str, strength: float) -> None:
    problem = Problem.draw(0)
    few, many = (after(problem, method, strength, steps) for steps in (5, 200))
    assert objective(problem, many, strength) < objective(problem, few, strength)


def test_every_strength_is_reported_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = LeastSquares.__init__

    def shorter(self: LeastSquares, *args: object) -> None:
        init(self, *args)  # type: ignore[arg-type]
        self.iterations = 20

    monkeypatch.setattr(LeastSquares, "__init__", shorter)
    setting = LeastSquares("", True, 2)
    document = Runner(setting, tmp_path, 1, overwrite=False).results()
    assert len(document["runs"]) == 2 * (1 + 4 * len(STRENGTHS))
    found = Evidence(document)
    (run,) = found.where(method="condition", strength=0.1, seed=1).to_dict("records")
    # The last point of a curve equals the reported value, up to the digits of curves.
    assert run["iterations"] == [1, 2, 3, 6, 10, 18, 20]
    assert run["kappas"][-1] == pytest.approx(run["kappa"], rel=1e-5)
    (run,) = found.where(method=CLOSED, strength=1.0, seed=1).to_dict("records")
    expected = wc.condition_number(Problem.draw(1).closed_form(1.0))
    assert run["kappa"] == pytest.approx(float(expected), rel=1e-6)
    (table,) = setting.tables(found).values()
    assert len(table.rows) == 1 + 4 * len(STRENGTHS)
    # The bars of norms do not separate columns of the table.
    lines = table.markdown().splitlines()
    assert all(line.replace(r"\|", "").count("|") == 6 for line in lines)
    assert set(setting.figures(found)) == {"least-squares", "least-squares-iterations"}
    assert set(least_squares.WATCHED) <= set(STRENGTHS)
