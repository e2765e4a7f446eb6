"""`torchrun -m wellcond audit`: several processes, one report, one message if a process dies."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

import processes  # preloads the modules that the processes need  # noqa: F401
import wellcond.audits.rows
from wellcond.cli import main
from wellcond.cli.place import Place, find_place
from wellcond.files.collection import Files

# --- the rank of a process ------------------------------------------------------------------------

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SRUN = {
    "SLURM_PROCID": "2",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-12,15],cpu1",
}


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, None),
        ({"RANK": "0"}, None),
        ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, None),
        (TORCHRUN, Place(1, 4, "env://", 0)),
        (TORCHRUN | SRUN, Place(1, 4, "env://", 0)),
        (TORCHRUN | {"LOCAL_RANK": "1"}, Place(1, 4, "env://", 1)),
        (SRUN, Place(2, 3, "tcp://gpu07:19568", 0)),
        (SRUN | {"SLURM_LOCALID": "1"}, Place(2, 3, "tcp://gpu07:19568", 1)),
        (
            SRUN | {"SLURM_STEP_NODELIST": "one,two"},
            Place(2, 3, "tcp://one:19568", 0),
        ),
        (
            SRUN | {"MASTER_ADDR": "b", "MASTER_PORT": "7"},
            Place(2, 3, "env://", 0),
        ),
        # The commands of an sbatch script are not a step, so there is only one process.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "5"}, None),
    ],
)
def test_find_place_reads_torchrun_and_srun_variables(
    variables: Mapping[str, str], place: Place | None
) -> None:
    assert find_place(variables) == place


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (TORCHRUN | {"RANK": "x"}, "RANK must be a number, got 'x'"),
        (TORCHRUN | {"RANK": "4"}, "RANK must be less than WORLD_SIZE, got 4 and 4"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR must name the machine"),
    ],
)
def test_find_place_refuses_invalid_variables(variables: Mapping[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_place(variables)


# --- several processes ----------------------------------------------------------------------------


def _rank(
    rank: int,
    variables: Mapping[str, str],
    argv: list[str],
    folder: Path,
    before: Callable[[int], None],
) -> None:
    os.environ |= variables
    for stream, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / f"{stream}{rank}", os.O_CREAT | os.O_WRONLY), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    torch.set_num_threads(1)
    before(rank)
    os._exit(main(argv))


def by_torchrun(rank: int, world: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets."""
    own = {"RANK": str(rank), "WORLD_SIZE": str(world)}
    return own | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def by_srun(rank: int, world: int, port: int) -> dict[str, str]:
    """The variables that srun sets, with a free port."""
    own = {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(world)}
    return own | {"SLURM_STEP_NODELIST": "127.0.0.1", "MASTER_PORT": str(port)}


def nothing(rank: int) -> None:
    """Does nothing before the command."""


def launch(
    world: int,
    argv: list[Any],
    folder: Path,
    before: Callable[[int], None] = nothing,
    start: Callable[[int, int, int], dict[str, str]] = by_torchrun,
) -> tuple[list[int | None], str, str]:
    """The exit codes, and the output of all processes; the codes are None if the command hangs."""
    folder = folder / f"{time.monotonic_ns()}"
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    words = [str(word) for word in argv]
    started = [
        context.Process(target=_rank, args=(rank, start(rank, world, port), words, folder, before))
        for rank in range(world)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    out, err = (
        "".join((folder / f"{stream}{rank}").read_text() for rank in range(world))
        for stream in ("out", "err")
    )
    return codes, out, err


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two shards with a stack and NaN in a vector, and a damaged file."""
    folder = tmp_path / "model"
    folder.mkdir()
    layers = {f"layers.{i}.weight": matrix(20 + 9 * i, 30, seed=i) for i in range(5)}
    save_file({**layers, "layers.0.bias": torch.tensor([1.0, torch.nan])}, folder / "a.safetensors")
    others = {"experts": matrix(3, 8, 12), "norm.weight": torch.ones(4), "flat": torch.ones(6, 6)}
    save_file(others, folder / "b.safetensors")
    (folder / "c.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0damaged!")
    return folder


def alone(argv: list[Any], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main([str(word) for word in argv])
    return code, *capsys.readouterr()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "options", "start"),
    [
        (2, ["--json", "--certify"], by_torchrun),
        (3, ["--max-condition", "30"], by_srun),
    ],
)
def test_several_processes_report_the_same_as_one(
    world: int,
    options: list[str],
    start: Callable[[int, int, int], dict[str, str]],
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Compares every number, the order, nonfinite and damaged tensors, and the exit code."""
    argv = ["audit", checkpoint, *options]
    code, out, err = alone(argv, capsys)
    assert launch(world, argv, tmp_path, start=start) == ([code] * world, out, err)
    assert "NaN" in err + out
    assert code == ("--max-condition" in options)


@pytest.mark.distributed
def test_files_comparisons_and_paths_match_one_process(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = tmp_path / "later.safetensors"
    shapes = {f"a.safetensors/layers.{i}.weight": (20 + 9 * i, 30) for i in range(5)}
    save_file({name: matrix(*shape, seed=9) for name, shape in shapes.items()}, later)
    argv = ["audit", checkpoint, "--compare", later, "--csv", "-", "--names", "old", "new"]
    code, out, err = alone(argv, capsys)
    assert "relative" in out
    assert launch(2, argv, tmp_path) == ([code] * 2, out, err)
    argv = ["audit", later, tmp_path / "absent.pt", later, "--json"]
    code, out, err = alone(argv, capsys)
    assert code == 2
    assert launch(2, argv, tmp_path) == ([2, 2], out, err)
    pages = [tmp_path / "one.html", tmp_path / "two.html"]
    alone(["audit", later, "--html", pages[0]], capsys)
    codes, _, err = launch(2, ["audit", later, "--html", pages[1]], tmp_path)
    assert (codes, err) == ([0, 0], "")
    assert pages[0].read_text() == pages[1].read_text()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["audit", "{}", "--maxcondition", "5"], "wellcond: error: unrecognized arguments"),
        (
            ["audit", "{}", "--include", "nothing"],
            "model: each pattern of `include` and `exclude` must",
        ),
        (["audit", "{}", "--csv", "{}"], "is a directory"),
        (
            ["repair", "{}", "x", "--max-condition", "5"],
            "`wellcond repair` must run as a single process",
        ),
    ],
)
def test_common_error_is_printed_once(
    argv: list[str], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    codes, out, err = launch(2, [word.format(checkpoint) for word in argv], tmp_path)
    assert (codes, out) == ([2, 2], "")
    assert err.count("\n") == 1
    assert message in err


def _measure_first(last: Callable[[], Any], wait: bool) -> Any:
    """Measures one tensor and then runs the given action, while other processes may wait."""
    measure, done = wellcond.audits.rows._measure_source, []

    def measure_some(*args: Any) -> Any:
        done.append(1)
        if len(done) > 1 or wait:
            last()
        return measure(*args)

    return mock.patch("wellcond.audits.rows._measure_source", measure_some).start()


def _kill(rank: int, which: int) -> None:
    if rank == which:
        _measure_first(lambda: os.kill(os.getpid(), signal.SIGKILL), False)
    else:  # this process does not know of the failure by itself
        _measure_first(lambda: time.sleep(600), True)


def kill_the_first(rank: int) -> None:
    _kill(rank, 0)


def kill_the_last(rank: int) -> None:
    _kill(rank, 2)


def _raise() -> None:
    raise OSError("the disk is full")


def raise_in_the_last(rank: int) -> None:
    _measure_first(_raise if rank == 1 else lambda: time.sleep(600), rank == 0)


def see_another_file(rank: int) -> None:
    states = Files.states

    def changed(self: Files) -> dict[str, list[int]]:
        return {path: [rank, *state] for path, state in states(self).items()}

    mock.patch.object(Files, "states", changed).start()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("before", "codes", "message"),
    [
        (kill_the_first, [-9, 2, 2], "process 0 of 3 ended without a message"),
        (kill_the_last, [2, 2, -9], "process 2 of 3 ended without a message"),
        (raise_in_the_last, [2, 2], "process 1 of 2 failed: OSError: the disk is full"),
        (see_another_file, [2, 2], "all processes must read the same files, but"),
    ],
)
def test_end_of_one_process_ends_all_with_one_message(
    before: Callable[[int], None],
    codes: list[int],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    began = time.monotonic()
    found, out, err = launch(len(codes), ["audit", checkpoint], tmp_path, before)
    assert (found, out) == (codes, "")
    assert err.startswith("wellcond: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert time.monotonic() - began < 150  # a busy machine needs most of this to start them


@pytest.mark.distributed
@pytest.mark.parametrize("world", [1, 3])
def test_killed_audit_resumes_with_another_number_of_processes(
    world: int, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = tmp_path / "known"
    argv = ["audit", checkpoint, "--json"]
    code, out, err = alone(argv, capsys)
    argv += ["--resume", known]
    codes, *_ = launch(2, argv, tmp_path, kill_in_the_middle)
    assert codes in ([-9, 2], [-9, -9])
    lines = [
        *known.read_bytes().splitlines(),
        *known.with_name("known.1").read_bytes().splitlines(),
    ]
    measured = [json.loads(line)[2] for line in lines if line[:1] == b"["]
    assert 1 <= len(measured) < 7
    if world == 1:
        assert alone(argv, capsys) == (code, out, err)
    else:
        assert launch(world, argv, tmp_path) == ([code] * world, out, err)


def kill_in_the_middle(rank: int) -> None:
    end = (lambda: os.kill(os.getpid(), signal.SIGKILL)) if rank == 0 else lambda: time.sleep(600)
    _measure_first(end, False)
