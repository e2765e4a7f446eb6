"""The command line: arguments in, text and exit code out."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import wellcond
from wellcond._cli import main

EXPERIMENTS = ("denoise", "classify", "least-squares")
COMMANDS = [[], ["reproduce"], *(["reproduce", name] for name in EXPERIMENTS)]
COMMANDS += [["bench"], ["bench", "step"], ["bench", "fidelity"], ["bench", "strength"]]


def exit_of(argv: list[str]) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_has_an_example(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_of([*command, "--help"]) == 0
    assert f"example: wellcond {' '.join(command)}".rstrip() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["reproduce"], "required: EXPERIMENT"),
        (["reproduce", "nonsense"], "invalid choice: 'nonsense'"),
        (["reproduce", "denoise", "--seeds", "0"], "must be at least 1, got 0"),
        (["reproduce", "denoise", "--epochs", "many"], "--epochs"),
        (["reproduce", "denoise", "--protocol", "mine"], "invalid choice: 'mine'"),
        (["reproduce", "least-squares", "--data", "digits"], "unrecognized arguments"),
    ],
)
def test_misuse_is_answered_by_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_of(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("wellcond: error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("noise", ["-1", "nan", "inf"])
def test_a_noise_that_is_none_is_refused(
    noise: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["reproduce", "denoise", f"--noise={noise}", "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    assert "--noise must be finite and not negative" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 not quite a zip"])
def test_missing_or_damaged_data_is_one_line_and_leaves_nothing(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "mnist.npz", tmp_path / "out"
    if content is not None:
        path.write_bytes(content)
    for experiment in ("denoise", "classify"):
        assert main(["reproduce", experiment, "--data", str(path), "--out", str(out)]) == 2
        stdout, stderr = capsys.readouterr()
        assert stdout == ""
        assert stderr.count("\n") == 1
        assert str(path) in stderr
        assert not out.exists()


def test_out_must_be_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("mine")
    assert main(["reproduce", "denoise", "--out", str(tmp_path / "out"), "--overwrite"]) == 2
    assert "must be a directory" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_existing_results_are_refused_and_untouched(
    experiment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: f"kept {name}" for name in ("results.json", "table.md", "images.png")}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert main(["reproduce", experiment, "--quick", "--out", str(tmp_path)]) == 2
    assert "Give --overwrite, or another --out." in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_the_module_runs_as_the_script_does() -> None:
    argv = [sys.executable, "-m", "wellcond", "--version"]
    out = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert out == f"wellcond {wellcond.__version__}\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is no signal there")
def test_ctrl_c_keeps_the_finished_runs(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    argv = [sys.executable, "-m", "wellcond", "reproduce", "denoise", "--epochs", "5"]
    argv += ["--seeds", "10000", "--threads", "1", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        deadline = time.monotonic() + 120
        while not results.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out == ""
    runs = json.loads(results.read_text())["runs"]
    assert len(runs) >= 1
    plural = "s" * (len(runs) != 1)
    assert err == f"wellcond: interrupted. Kept {len(runs)} finished run{plural} in {results}.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
