"""The commands of the experiments: arguments, output and exit codes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wellcond.cli import main

pytestmark = pytest.mark.experiments
EXPERIMENTS = ("denoise", "classify", "least-squares", "differentiability")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["reproduce"], "required: EXPERIMENT"),
        (["reproduce", "nonsense"], "invalid choice: 'nonsense'"),
        (["reproduce", "denoise", "--seeds", "0"], "must be at least 1, got 0"),
        (["reproduce", "denoise", "--workers", "many"], "--workers"),
        (["reproduce", "least-squares", "--data", "digits"], "unrecognized arguments"),
    ],
)
def test_misuse_gives_a_one_line_error(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("wellcond: error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 not quite a zip"])
def test_missing_or_damaged_data_gives_a_one_line_error_and_no_results(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mnist.npz"
    if content is not None:
        path.write_bytes(content)
    for experiment in ("denoise", "classify"):
        out = tmp_path / experiment
        argv = ["reproduce", experiment, "--data", str(path), "--workers", "1", "--out", str(out)]
        assert main(argv) == 2
        stdout, stderr = capsys.readouterr()
        assert stdout == ""
        assert stderr.count("\n") == 1
        assert str(path) in stderr
        assert not (out / "results.json").exists()
        assert not list(out.glob("runs/*"))


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
    assert "Pass --overwrite, or choose another --out." in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is not a signal on Windows")
def test_ctrl_c_keeps_the_finished_runs(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    argv = [sys.executable, "-m", "wellcond", "reproduce", "denoise", "--data", "digits"]
    argv += ["--workers", "1", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # Background jobs ignore SIGINT, and child processes inherit this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while (
            not list(runs.glob("*.json")) and process.poll() is None and time.monotonic() < deadline
        ):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out == ""
    count = len(list(runs.iterdir()))
    assert count >= 1
    assert err == (
        f"wellcond: interrupted. Kept {count} finished run{'s' * (count != 1)} in {runs}: "
        "the same command resumes from there.\n"
    )
    assert not (tmp_path / "results.json").exists()


def test_a_benchmark_ends_when_the_pipe_is_closed() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    argv = [sys.executable, "-m", "wellcond", "bench", "audit", "--sizes", "2x2", "--rounds", "1"]
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(argv, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
