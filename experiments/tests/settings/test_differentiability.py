"""`wellcond reproduce differentiability`: its output, and that it detects errors."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import wellcond as wc
from wellcond.cli import main
from wellcond_experiments.evidence import Evidence
from wellcond_experiments.grid import read
from wellcond_experiments.settings import differentiability
from wellcond_experiments.settings.differentiability import Known, Tally, extremes_of


@pytest.fixture(autouse=True)
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differentiability, "GAPS", (1.0, 1e-4, 1e-8, 1e-12))
    monkeypatch.setattr(differentiability, "CONDITIONS", (1.0, 3.0, 100.0, 1e4))


def asked(question: str) -> Tally:
    _, ask = differentiability.QUESTIONS[question]
    return ask(torch.Generator().manual_seed(5), 2)


def reproduced(out: Path, *options: str) -> tuple[int, Evidence]:
    """Runs the command in this process, so that patches of the tests apply."""
    argv = ["reproduce", "differentiability", "--quick", "--workers", "1", "--out", str(out)]
    code = main([*argv, *options])
    return code, Evidence(read(out / "results.json"))


def test_writes_all_outputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = reproduced(tmp_path, "--seeds", "2")
    assert code == 0
    for name in ("results.json", "table.md", "differentiability.png"):
        assert (tmp_path / name).stat().st_size
    assert list(zip(found.runs["case"], found.runs["seed"], strict=True)) == [
        (question, seed) for question in differentiability.QUESTIONS for seed in (0, 1)
    ]
    assert (found.runs["cases"] > 0).all()
    assert not found.runs["violations"].any()
    for question in differentiability.QUESTIONS:
        for name, value in extremes_of(found, question).items():
            extreme = min if name.startswith("smallest") else max
            assert value == extreme(found.where(case=question)[name])
    said = f"{int(found.runs['cases'].sum())} checks, 0 violations; 2 seeds"
    assert said in (tmp_path / "table.md").read_text()
    assert said in capsys.readouterr().out


right_gradient = wc.condition_penalty_gradient


def over_n(S: Tensor) -> Tensor:
    """Uses 1/n instead of 1/nu, which differs for wide matrices."""
    right: Tensor = right_gradient(S)
    return right + S / min(S.shape[-2:]) - S / S.shape[-1]


def halved(S: Tensor) -> Tensor:
    return right_gradient(S) / 2


def of_the_second(S: Tensor) -> Tensor:
    U, sigma, Vh = torch.linalg.svd(S, full_matrices=False)
    i = min(1, sigma.shape[-1] - 1)
    top = sigma[..., i, None, None] * U[..., :, i, None] @ Vh[..., i, None, :]
    return top - S / sigma.shape[-1]


@pytest.mark.parametrize(
    ("wrong", "noticing"),
    [
        (over_n, ["gradient", "sides", "jump", "step"]),
        (halved, ["gradient", "sides", "jump", "step"]),
        (of_the_second, ["gradient", "jump", "step"]),  # at a tie as good as the first
    ],
)
def test_a_wrong_gradient_is_detected(
    wrong: Callable[[Tensor], Tensor], noticing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wc, "condition_penalty_gradient", wrong)
    for question in noticing:
        assert asked(question).violations > 0, question
    assert asked("gradient").figures["largest error against differences of r"] > 0.1


@pytest.mark.parametrize("power", [1.9, 2.1])
@pytest.mark.parametrize("question", ["gradient", "sides", "zero-set", "bounds"])
def test_a_wrong_penalty_is_detected(
    question: str, power: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(S: Tensor) -> Tensor:
        sigma = torch.linalg.svdvals(S)
        return (sigma[..., :1] ** power - sigma**power).mean(-1) / 2 - 1e-3 * (power > 2)

    monkeypatch.setattr(wc, "condition_penalty", wrong)
    assert asked(question).violations > 0


def test_a_violation_gives_exit_code_1_and_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wc, "condition_penalty_bound", lambda S: S[..., 0, 0] * math.nan)
    code, found = reproduced(tmp_path)
    assert code == 1
    assert ", 0 violations" not in capsys.readouterr().out
    ratio = extremes_of(found, "bounds")["smallest ratio of exp(nu r/sigma_nu^2) to kappa"]
    assert math.isnan(ratio)
    bounds, step = (found.where(case=case) for case in ("bounds", "step"))
    assert (bounds["violations"] == bounds["cases"] / 3).all()
    assert not step["violations"].any()


def test_nan_is_a_violation_and_is_kept() -> None:
    tally = Tally()
    tally.small("largest error", torch.tensor([0.5, math.nan]), 1.0)
    tally.small("largest error", torch.tensor([2.0]), 1.0)
    assert (tally.cases, tally.violations) == (3, 2)
    assert math.isnan(tally.figures["largest error"])


def test_matrices_have_their_known_triplets() -> None:
    sigma = differentiability.spectrum(5, 1.5, 1.0, scale=2.0, deficient=True)
    known = Known.draw((5, 9), sigma, torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.linalg.svdvals(known.S), sigma, rtol=0, atol=1e-14)
    torch.testing.assert_close(known.S @ known.V, known.U * sigma, rtol=0, atol=1e-14)
    assert sigma[:2].tolist() == [3.0, 2.0]
    assert sigma[-1] == 0
