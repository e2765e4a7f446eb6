"""The command line runs the paper's experiments and the benchmarks, and keeps what was finished."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import wellcond as wc
from wellcond import _cli
from wellcond.experiments import _run, _training, bench, denoise, least_squares


def wellcond(*arguments: object) -> int:
    return _cli.main([str(argument) for argument in arguments])


def check_schema(document: dict[str, Any], methods: set[str]) -> None:
    assert {"experiment", "data", "protocol", "settings", "versions", "runs", "summary"} == set(
        document
    )
    assert {run["method"] for run in document["runs"]} == methods
    for run in document["runs"]:
        keys = {"method", "strength", "tuned", "seed", "condition_numbers", "scores", "seconds"}
        assert keys <= set(run)
        assert all(float(kappa) >= 1 for kappa in run["condition_numbers"].values())
        assert run["scores"]
    for row in document["summary"]:
        assert set(row) == {"method", "strength", "tuned", "metric", "mean", "low", "high"}


def test_denoise_writes_results_table_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "denoise"
    command = ["reproduce", "denoise", "--quick", "--epochs", 4, "--out", out, "--json"]
    assert wellcond(*command) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert printed.err == ""
    check_schema(document, set(_run.METHODS))
    assert document == json.loads((out / "results.json").read_text())
    for picture in ("images.png", "curves.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    assert "| condition |" in (out / "table.md").read_text()
    # The coupled regulariser lowers the condition number of the last layer, on real images.
    kappa = {r["method"]: float(r["condition_numbers"]["6.weight"]) for r in document["runs"]}
    assert kappa["condition"] < kappa["none"] / 2

    before = {path: path.read_bytes() for path in out.iterdir()}
    assert wellcond(*command) == 2
    refused = capsys.readouterr()
    assert "exists. Give --overwrite" in refused.err
    assert refused.out == ""
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert wellcond(*command[:-1], "--overwrite") == 0
    assert "condition-proximal" in capsys.readouterr().out


@pytest.mark.parametrize("protocol", ["authors-code", "standard"])
def test_other_protocols_and_tuning_run(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object
) -> None:
    monkeypatch.setattr(denoise, "SCALES", (0.1, 1.0))
    monkeypatch.setattr(denoise, "RATES", (1e-3,))
    out = tmp_path / "out"
    tuned = ["--tuned"] if protocol == "standard" else []
    short = ["--seeds", 1, "--epochs", 1, "--out", out]
    assert wellcond("reproduce", "denoise", "--protocol", protocol, *short, *tuned) == 0
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert {run["tuned"] for run in runs} == ({False, True} if tuned else {False})
    assert all(run["lr"] == 1e-3 for run in runs if run["tuned"])


def test_an_interruption_keeps_what_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, calls = _training.train, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(_training, "train", interrupted)
    out = tmp_path / "out"
    assert wellcond("reproduce", "denoise", "--epochs", 1, "--out", out) == 130
    assert "2 finished runs are in" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["results.json"]
    assert len(json.loads((out / "results.json").read_text())["runs"]) == 2


def test_classify_compares_at_matched_accuracy_and_norm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "classify"
    assert wellcond("reproduce", "classify", "--quick", "--epochs", 2, "--out", out) == 0
    document = json.loads((out / "results.json").read_text())
    check_schema(document, set(_run.METHODS))
    assert len(document["runs"]) == 13
    for run in document["runs"]:
        assert len(run["history"]) == 2
        assert set(run["scores"]) == {"0.0", "0.5", "1.0", "1.5", "2.0", "3.0"}
        assert 5 < run["scores"]["0.0"] <= 100
    text = (out / "table.md").read_text()
    assert "within one point" in text
    assert "log sigma_1" in text
    for picture in ("accuracy.png", "training.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_least_squares_finds_the_closed_form_and_lowers_kappa(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "least-squares"
    assert wellcond("reproduce", "least-squares", "--seeds", 1, "--epochs", 500, "--out", out) == 0
    document = json.loads((out / "results.json").read_text())
    check_schema(document, {*_run.METHODS, "tikhonov-closed-form"})
    kappa = {
        (run["method"], run["strength"]): float(run["condition_numbers"]["S"])
        for run in document["runs"]
    }
    assert kappa["condition-proximal", 1.0] < 1.1
    problem = least_squares.Problem.draw(0)
    torch.testing.assert_close(
        least_squares.descend([problem], "tikhonov", (0.3,), 500)[0, 0],
        least_squares.closed_form(problem, 0.3),
    )


def test_batched_formulas_equal_the_public_functions() -> None:
    source = torch.Generator().manual_seed(0)
    S = torch.randn(4, 32, 16, generator=source, dtype=torch.float64)
    torch.testing.assert_close(least_squares.penalty_gradient(S), wc.condition_penalty_gradient(S))
    torch.testing.assert_close(
        least_squares._shrink(S, torch.full((4, 1, 1), 0.3, dtype=torch.float64)),
        wc.proximal_step(S, 0.3),
    )
    for matrix in (S[0], S[1].mT.contiguous()):
        torch.testing.assert_close(
            bench.exact_gradient(matrix), wc.condition_penalty_gradient(matrix)
        )


def test_bench_step_measures_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert wellcond("bench", "step", "--rounds", 2, "--hidden", 96, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    ways = {row["way"] for row in document["ways"]}
    assert {"none", "attach(every=10)", "add_gradients_", "in the loss"} <= ways
    assert all(row["ratio"] > 0 for row in document["ways"])
    assert wellcond("bench", "step", "--rounds", 1, "--hidden", 64) == 0
    assert "exact SVD in the loss" in capsys.readouterr().out
    shares = bench.memory(2048, 784, 32)
    # The largest temporary is the larger of the two skinny factors: k of min(m, n).
    assert all(share <= 0.06 for share in shares.values())


def test_bench_fidelity_compares_with_an_exact_decomposition(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert wellcond("bench", "fidelity", "--epochs", 1, "--block", "4,32", "--json") == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert len(runs) == 12
    wide = [run["ratio"] for run in runs if run["block"] == 32 and run["how"] == "gradient"]
    assert all(abs(ratio - 1) < 0.1 for ratio in wide)


@pytest.mark.parametrize(
    "arguments",
    [
        ["reproduce", "denoise", "--data", "/nowhere/mnist"],
        ["reproduce", "denoise", "--noise", "-1"],
    ],
)
def test_misuse_is_one_clear_line_and_writes_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wellcond(*arguments, "--out", tmp_path / "out") == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("wellcond: error: ")
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["reproduce"],
        ["reproduce", "denoise"],
        ["reproduce", "classify"],
        ["reproduce", "least-squares"],
        ["bench"],
        ["bench", "step"],
        ["bench", "fidelity"],
    ],
    ids=" ".join,
)
def test_every_command_has_help_with_an_example(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        wellcond(*arguments, "--help")
    assert end.value.code == 0
    assert "example: wellcond" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["reproduce", "denoise", "--seeds", "0"], ["nonsense"]])
def test_unknown_arguments_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        wellcond(*arguments)
    assert end.value.code == 2


def test_the_console_script_and_the_module_start() -> None:
    script = Path(sys.executable).with_name("wellcond")
    for command in ([str(script)], [sys.executable, "-m", "wellcond"]):
        out = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert out.stdout.strip() == f"wellcond {wc.__version__}"


def test_numbers_that_json_lacks_are_strings() -> None:
    value = {"a": [float("inf"), float("nan"), -float("inf"), 1.5]}
    assert json.dumps(_run.in_json(value)) == '{"a": ["inf", "nan", "-inf", 1.5]}'


def test_intervals_are_those_of_student() -> None:
    # t(2 degrees of freedom, 97.5 %) = 4.302653; the standard error of 1, 2, 3 is 1/sqrt(3).
    interval = _run.interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / 3**0.5
    torch.testing.assert_close(interval["low"], 2 - half, rtol=1e-9, atol=0)
    assert str(_run.interval([1.0])["low"]) == "nan"
