"""The paper's experiments: what they compute, and what they leave on disk."""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wellcond as wc
from wellcond.cli import main
from wellcond.experiments import _run, _training, classify, denoise, least_squares
from wellcond.experiments.data import Images, load

METHODS = {"none", "tikhonov", "condition", "condition-proximal"}
PICTURES = {
    "denoise": {"images.png", "curves.png"},
    "classify": {"accuracy.png", "matched.png", "training.png"},
    "least-squares": {"least-squares.png"},
}


def strict(text: str) -> Any:
    """JSON as its standard says: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) or value in ("inf", "-inf", "nan")


def assert_schema(document: dict[str, Any]) -> None:
    assert set(document) == {
        *("experiment", "data", "protocol", "settings", "versions", "runs", "summary"),
    }
    assert {"wellcond", "torch", "python"} <= set(document["versions"])
    for run in document["runs"]:
        assert run["method"] in METHODS
        assert run["tuned"] in (True, False)
        assert isinstance(run["seed"], int)
        assert is_number(run["strength"])
        assert run["seconds"] >= 0
        for values in (run["condition_numbers"], run["scores"]):
            assert values
            assert all(is_number(value) for value in values.values())
    for row in document["summary"]:
        assert set(row) == {"method", "strength", "tuned", "metric", "mean", "low", "high", "log"}
        assert all(is_number(row[key]) for key in ("mean", "low", "high"))
    groups = {(row["method"], row["strength"], row["tuned"]) for row in document["summary"]}
    runs = {(run["method"], run["strength"], run["tuned"]) for run in document["runs"]}
    assert groups == runs


def reproduce(experiment: str, out: Path, *options: str) -> int:
    return main(["reproduce", experiment, "--out", str(out), "--threads", "1", *options])


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> Images:
    """The digits, 192 to train on and 64 to test on."""
    digits = load("digits")
    x, y = digits.x_train, digits.y_train
    few = Images("digits", 8, x[:192], y[:192], x[192:256], y[192:256])
    for experiment in (denoise, classify):
        monkeypatch.setattr(experiment, "load", lambda source: few)
    return few


# --- results on disk ------------------------------------------------------------------------------


@pytest.mark.slow
def test_denoise_writes_all_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path = tmp_path / "runs" / "denoise"  # which is not there yet
    assert reproduce("denoise", tmp_path, "--quick", "--seeds", "1", "--json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    document = strict(out)
    assert out == (tmp_path / "results.json").read_text()
    assert_schema(document)
    assert (document["experiment"], document["data"], document["protocol"]) == (
        *("denoise", "digits", "paper"),
    )
    assert [run["method"] for run in document["runs"]] == list(_run.METHODS)
    for run in document["runs"]:
        assert set(run["scores"]) == {"0.0", "0.25", "0.5", "1.0", "1.5"}
        assert set(run["condition_numbers"]) == {f"{i}.weight" for i in (0, 2, 4, 6)}
    assert {path.name for path in tmp_path.iterdir()} == {
        *("results.json", "table.md", "images.png", "curves.png"),
    }
    # A network that learned nothing would answer about 0.16.
    score = {run["method"]: run["scores"]["1.0"] for run in document["runs"]}
    assert score["none"] < 0.12
    assert score["condition"] < 0.12


@pytest.mark.parametrize("experiment", ["denoise", "classify"])
def test_experiments_print_their_tables(
    experiment: str, tmp_path: Path, few_images: Images, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce(experiment, tmp_path, "--epochs", "1", "--seeds", "2") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"Written to {tmp_path}" in out
    assert "2 seeds" in out
    assert all(method in out for method in METHODS)
    assert_schema(strict((tmp_path / "results.json").read_text()))
    expected = PICTURES[experiment] | {"results.json", "table.md"}
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_least_squares_writes_all_it_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce("least-squares", tmp_path, "--epochs", "20", "--seeds", "2", "--json") == 0
    document = strict(capsys.readouterr().out)
    assert_schema(document)
    assert len(document["runs"]) == 2 * (1 + 3 * len(least_squares.STRENGTHS))
    tikhonov = next(run for run in document["runs"] if run["method"] == "tikhonov")
    assert "closed_form:condition_number:S" in tikhonov["metrics"]
    # The bars of a norm must not end a cell.
    header = next(
        line for line in (tmp_path / "table.md").read_text().split("\n") if "kappa" in line
    )
    for line in (tmp_path / "table.md").read_text().split("\n"):
        if line.startswith("|"):
            assert line.replace(r"\|", "").count("|") == 6, header


def test_an_interruption_in_the_second_run_leaves_the_first(
    tmp_path: Path,
    few_images: Images,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train, calls = _training.train, []

    def interrupted(*args: Any, **kwargs: Any) -> nn.Module:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*args, **kwargs)

    monkeypatch.setattr(_training, "train", interrupted)
    assert reproduce("denoise", tmp_path, "--epochs", "1") == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"wellcond: interrupted. Kept 1 finished run in {tmp_path}/results.json.\n"
    document = strict((tmp_path / "results.json").read_text())
    assert_schema(document)
    assert [run["method"] for run in document["runs"]] == ["none"]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_an_interruption_in_the_first_run_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> nn.Module:
        raise KeyboardInterrupt

    (tmp_path / "results.json").write_text("the result of yesterday")
    (tmp_path / "images.png").write_text("its picture")
    monkeypatch.setattr(_training, "train", interrupted)
    assert reproduce("denoise", tmp_path, "--overwrite") == 130
    assert "Nothing was kept." in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == "the result of yesterday"
    assert (tmp_path / "images.png").read_text() == "its picture"


def test_overwriting_leaves_no_picture_of_other_results(tmp_path: Path) -> None:
    for name in ("results.json", "table.md", "images.png", "notes.txt"):
        (tmp_path / name).write_text("old")
    arguments = argparse.Namespace(out=tmp_path, overwrite=True, experiment="denoise")
    results = _run.Results(arguments, "digits", "paper", ("images.png",))
    assert (tmp_path / "images.png").exists()
    results.add(finished_run("none", 0.0, 0.5))
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "notes.txt"}


def test_results_of_another_process_stay(tmp_path: Path) -> None:
    arguments = argparse.Namespace(out=tmp_path, overwrite=False, experiment="denoise")
    results = _run.Results(arguments, "digits", "paper", ("images.png",))
    for name in ("results.json", "images.png"):
        (tmp_path / name).write_text("precious")
    with pytest.raises(FileExistsError):
        results.add(finished_run("none", 0.0, 0.5))
    assert {path.read_text() for path in tmp_path.iterdir()} == {"precious"}
    (tmp_path / "results.json").unlink()
    for seed in (1, 2):  # the first claims the name, the second replaces its own file
        results.add(finished_run("none", 0.0, 0.5, seed=seed))
    assert len(strict((tmp_path / "results.json").read_text())["runs"]) == 3


# --- summaries ------------------------------------------------------------------------------------


def finished_run(method: str, strength: float, score: float, **more: Any) -> dict[str, Any]:
    return {
        "method": method,
        "strength": strength,
        "tuned": False,
        "seed": 0,
        "condition_numbers": {"0.weight": 2.0},
        "scores": {"0.0": score},
        "seconds": 0.1,
    } | more


def test_the_interval_is_students() -> None:
    # t(0.975, 2 degrees of freedom) = 4.302653 from the tables.
    band = _run.interval([1.0, 2.0, 4.0])
    half = 4.302653 * statistics.stdev([1.0, 2.0, 4.0]) / math.sqrt(3)
    assert band["mean"] == pytest.approx(7 / 3)
    assert band["high"] - band["mean"] == pytest.approx(half, rel=1e-6)
    assert band["mean"] - band["low"] == pytest.approx(half, rel=1e-6)


def test_the_interval_of_a_condition_number_is_one_of_factors() -> None:
    # Its ends are the geometric mean times and over the same factor, so both are positive.
    values = [20.0, 50.0, 8000.0]
    band = _run.interval(values, log=True)
    logs = [math.log(value) for value in values]
    half = 4.302653 * statistics.stdev(logs) / math.sqrt(3)
    assert band["mean"] == pytest.approx(200)
    assert band["high"] == pytest.approx(200 * math.exp(half), rel=1e-6)
    assert band["low"] == pytest.approx(200 / math.exp(half), rel=1e-6)
    assert _run.interval(values)["low"] < 0
    assert _run.interval([1e-300, 1e300], log=True)["high"] == math.inf
    assert _run.interval([0.0, 3.0], log=True)["mean"] == 0


def test_numbers_that_differ_by_factors_are_shown_so() -> None:
    runs = [
        finished_run("none", 0.0, score, condition_numbers={"w": kappa}, metrics={"sigma_max": 2.0})
        for score, kappa in ((1.0, 10.0), (2.0, 1e5))
    ]
    runs[0]["metrics"]["closed_form:condition_number:S"] = 7.0
    shown = {row["metric"]: _run.with_interval(row) for row in _run.summarise(runs)}
    assert shown["condition_number:w"] == "1e+03 [3.87e-23, 2.58e+28]"
    assert shown["score:0.0"] == "1.5 ± 6.35"
    assert shown["sigma_max"] == "2 [2, 2]"
    assert shown["closed_form:condition_number:S"] == "7"


def test_errors_of_least_squares_differ_by_factors() -> None:
    runs = [finished_run("none", 0.0, 0, scores={"error": v, "residual": v}) for v in (1.0, 100.0)]
    means = {row["metric"]: row["mean"] for row in _run.summarise(runs)}
    assert means["score:error"] == means["score:residual"] == pytest.approx(10)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[3.0], [1.0, math.inf], [1.0, math.nan]])
def test_there_is_no_interval_of_one_seed_or_of_infinity(values: list[float], log: bool) -> None:
    band = _run.interval(values, log)
    assert math.isnan(band["low"])
    assert math.isnan(band["high"])
    assert band["mean"] == pytest.approx(sum(values) / len(values), nan_ok=True)


def test_runs_are_summarised_by_method_strength_and_tuning() -> None:
    runs = [
        finished_run("none", 0.0, 1.0),
        finished_run("none", 0.0, 3.0, seed=1),
        finished_run("none", 0.0, 5.0, tuned=True),
        finished_run("condition", 0.1, 7.0, metrics={"sigma_max": 9.0}),
    ]
    means = {
        (row["method"], row["tuned"], row["metric"]): row["mean"] for row in _run.summarise(runs)
    }
    assert means["none", False, "score:0.0"] == 2.0
    assert means["none", True, "score:0.0"] == 5.0
    assert means["condition", False, "sigma_max"] == 9.0
    assert means["condition", False, "condition_number:0.weight"] == 2.0


def results_of(tmp_path: Path, runs: list[dict[str, Any]]) -> _run.Results:
    arguments = argparse.Namespace(out=tmp_path, overwrite=False, experiment="classify")
    results = _run.Results(arguments, "digits", "", ())
    for run in runs:
        results.add(run)
    return results


def classified(method: str, strength: float, clean: float, noisy: float, sigma: float) -> Any:
    scores = {"0.0": clean, "2.0": noisy}
    return finished_run(method, strength, 0.0, scores=scores, metrics={"sigma_max": sigma})


def test_matched_clean_accuracy_costs_each_method_the_same(tmp_path: Path) -> None:
    runs = [
        classified("none", 0.0, 97.0, 50.0, 8.0),
        classified("tikhonov", 0.01, 93.0, 70.0, 1.0),
        classified("condition", 0.01, 96.5, 55.0, 4.0),
        classified("condition", 0.1, 96.2, 60.0, 2.0),
        classified("condition", 1.0, 95.8, 58.0, 1.0),
        classified("condition-proximal", 1.0, 97.0, 49.0, 8.0),
    ]
    plan = [(run["method"], run["strength"]) for run in runs]
    _, rows = classify.matched_accuracy(results_of(tmp_path, runs), plan)
    # Tikhonov crosses 96 a quarter of the way from none. A path that only falls stays at none.
    assert [row[:4] for row in rows] == [
        ["none", "0", "97.0", "50.0"],
        ["tikhonov", "0 to 0.01", "96.0", "55.0"],
        ["condition", "0.1", "96.2", "60.0"],
        ["condition-proximal", "0", "97.0", "50.0"],
    ]


def test_matched_norm_interpolates_in_log_sigma(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classify, "STRENGTHS", (0.01, 0.1))
    monkeypatch.setattr(classify, "PROXIMAL_STRENGTHS", (1.0, 10.0))
    runs = [
        classified("none", 0.0, 97.0, 50.0, 8.0),
        classified("tikhonov", 0.01, 90.0, 61.0, 4.0),
        classified("tikhonov", 0.1, 90.0, 62.0, 1.0),
        classified("condition", 0.01, 96.5, 70.0, 2.0),
        classified("condition", 0.1, 96.1, 80.0, 0.5),
        classified("condition-proximal", 1.0, 97.0, 52.0, 4.0),
        classified("condition-proximal", 10.0, 97.0, 54.0, 2.0),
    ]
    _, rows = classify.matched_norm(results_of(tmp_path, runs))
    # 4 is half way from 8 to 2, and 1 half way from 2 to 0.5; no proximal run comes down to 1.
    assert [row[2:] for row in rows] == [["61.0", "60.0", "52.0"], ["62.0", "75.0", "outside"]]


# --- training -------------------------------------------------------------------------------------


def small_recipe(images: Images, epochs: int = 2, lr: float = 5e-3) -> _training.Recipe:
    setting = denoise.Setting(images, (64, 16, 64), "paper", 1.0, epochs)
    return setting.recipe(lr)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("method", _run.METHODS)
def test_the_same_seed_gives_the_same_network(method: str, few_images: Images) -> None:
    before = torch.get_rng_state()
    first, second = (
        weights(_training.train(small_recipe(few_images), method, {"0.weight": 0.1}, seed=3))
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    other = _training.train(small_recipe(few_images), method, {"0.weight": 0.1}, seed=4)
    assert not torch.equal(weights(other), first)


@pytest.mark.parametrize("method", ["tikhonov", "condition", "condition-proximal"])
def test_strength_zero_is_no_regulariser(method: str, few_images: Images) -> None:
    recipe = small_recipe(few_images)
    none = _training.train(recipe, "none", {}, seed=0)
    zero = _training.train(recipe, method, {"0.weight": 0.0}, seed=0)
    # A proximal step of length 0 multiplies by 1; adding 0 to a loss changes nothing.
    torch.testing.assert_close(weights(zero), weights(none))


@pytest.mark.parametrize(("method", "strength"), [("condition", 1.0), ("condition-proximal", 100)])
def test_the_condition_penalty_lowers_the_condition_number(
    method: str, strength: float, few_images: Images
) -> None:
    recipe = small_recipe(few_images, epochs=6)
    none = _training.condition_numbers(_training.train(recipe, "none", {}, seed=0))
    kept = _training.condition_numbers(
        _training.train(recipe, method, {"0.weight": strength}, seed=0)
    )
    assert kept["0.weight"] < 0.7 * none["0.weight"]


def test_training_that_diverges_ends_with_nan_and_no_error(few_images: Images) -> None:
    def loss(model: nn.Module, indices: torch.Tensor, source: torch.Generator) -> torch.Tensor:
        return -model(few_images.x_train[indices]).square().mean() * 1e30

    build = lambda: nn.Sequential(nn.Linear(64, 4))  # noqa: E731
    recipe = _training.Recipe(build, loss, 192, 400, lr=1e10)
    for method in _run.METHODS:
        model = _training.train(recipe, method, {"0.weight": 0.01}, seed=0)
        assert not loss(model, torch.arange(192), torch.Generator()).isfinite()
    S = torch.full((2, 2), math.nan)
    assert math.isnan(_training.condition_number(S))
    assert math.isnan(_training.spectral_norm(S))


@pytest.mark.parametrize("protocol", denoise.PROTOCOLS)
def test_protocols_differ_in_input_and_target(protocol: str, few_images: Images) -> None:
    setting = denoise.Setting(few_images, (64, 64), protocol, 0.5, 1)
    seen: list[torch.Tensor] = []

    class Recorder(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return torch.zeros_like(x)

    indices = torch.arange(8)
    value = setting.recipe(1e-3).loss(Recorder(), indices, torch.Generator().manual_seed(1))
    clean = few_images.normalised(few_images.x_train[:8])
    noisy = clean + 0.5 * torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    put_in, target = {
        "paper": (noisy, clean),
        "authors-code": (clean, noisy),
        "standard": (noisy, few_images.x_train[:8]),
    }[protocol]
    torch.testing.assert_close(seen[0], put_in)
    torch.testing.assert_close(value, target.square().mean())
    # The score's target is one that a sigmoid can reach.
    assert 0 <= float(setting.target().min()) <= float(setting.target().max()) <= 1


def test_tuning_never_sees_the_test_images_and_reports_its_search(
    tmp_path: Path, few_images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoise, "SCALES", dict.fromkeys(_run.METHODS, (0.1, 1.0)))
    tested = []
    scores = denoise.Setting.scores

    def recorded(self: denoise.Setting, model: nn.Module) -> dict[str, float]:
        tested.append(self.images)
        return scores(self, model)

    monkeypatch.setattr(denoise.Setting, "scores", recorded)
    assert reproduce("denoise", tmp_path, "--epochs", "1", "--seeds", "1", "--tuned") == 0
    document = strict((tmp_path / "results.json").read_text())
    assert_schema(document)
    tuned = {run["method"]: run for run in document["runs"] if run["tuned"]}
    assert set(tuned) == METHODS
    for method, trials in document["settings"]["search"].items():
        best = min(trials, key=lambda trial: trial["score"])
        assert tuned[method]["lr"] == best["lr"]
        if method != "none":
            assert tuned[method]["strength"] == pytest.approx(best["scale"] * denoise.OUTER)
    searched = [images for images in tested if images is not few_images]
    assert len(searched) == 4 * 2 * 2
    assert all(len(images.x_train) + len(images.x_test) == 192 for images in searched)
    assert "condition (tuned)" in (tmp_path / "table.md").read_text()


# --- least squares --------------------------------------------------------------------------------


def test_the_problem_has_the_conditions_it_claims() -> None:
    problem = least_squares.Problem.draw(0)
    assert problem.A.shape == (64, 32)
    assert problem.truth.shape == (32, 16)
    # The SVD's own error: eps kappa, far below 1e-9.
    assert float(wc.condition_number(problem.A)) == pytest.approx(100, rel=1e-9)
    assert float(wc.condition_number(problem.truth)) == pytest.approx(1000, rel=1e-9)


def batch() -> torch.Tensor:
    source = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 32, 16, generator=source, dtype=torch.float64)


def test_the_fast_gradient_is_the_public_one() -> None:
    S = batch()
    expected = wc.condition_penalty_gradient(S)
    torch.testing.assert_close(least_squares.penalty_gradient(S), expected)


@pytest.mark.parametrize("eta", [0.0, 1e-3, 0.5, 10.0, 1e6])
def test_the_fast_proximal_step_is_the_public_one(eta: float) -> None:
    S = batch()
    steps = torch.full((3, 1, 1), eta, dtype=torch.float64)
    torch.testing.assert_close(least_squares._shrink(S, steps), wc.proximal_step(S, eta))


def test_every_matrix_of_the_batch_has_a_step_of_its_own() -> None:
    S, etas = batch(), (0.1, 1.0, 5.0)
    shrunk = least_squares._shrink(S, torch.tensor(etas, dtype=torch.float64)[:, None, None])
    for index, eta in enumerate(etas):
        torch.testing.assert_close(shrunk[:, index], wc.proximal_step(S[:, index], eta))


def test_descent_reaches_the_closed_form() -> None:
    problem, strength = least_squares.Problem.draw(1), 0.1
    (S,) = least_squares.descend([problem], "tikhonov", (strength,), 400)[0]
    # Contraction by 1 - (sigma_min^2/p + lam)/(1 + lam) < 0.91 per step: 0.91^400 < 1e-16.
    torch.testing.assert_close(S, least_squares.closed_form(problem, strength))


def objective(problem: least_squares.Problem, S: torch.Tensor, strength: float) -> float:
    residual = problem.A @ S - problem.B
    return float(residual.square().sum() / (2 * 64) + strength * wc.condition_penalty(S))


@pytest.mark.parametrize("method", ["condition", "condition-proximal"])
def test_descent_lowers_its_own_objective(method: str) -> None:
    problem, strengths = least_squares.Problem.draw(0), (1e-3, 1e-2)
    few, many = (least_squares.descend([problem], method, strengths, n)[0] for n in (5, 200))
    for index, strength in enumerate(strengths):
        assert objective(problem, many[index], strength) < objective(problem, few[index], strength)


def test_problems_in_a_batch_do_not_mix() -> None:
    problems = [least_squares.Problem.draw(seed) for seed in (0, 1)]
    together = least_squares.descend(problems, "condition", (0.01, 0.1), 50)
    alone = least_squares.descend(problems[:1], "condition", (0.1,), 50)
    # The same arithmetic in batches of other sizes: rounding only, amplified by 50 steps.
    torch.testing.assert_close(together[0, 1], alone[0, 0], rtol=1e-9, atol=1e-11)
