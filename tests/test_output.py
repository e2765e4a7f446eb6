"""Files and folders appear complete under their name, or not at all."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wellcond import output
from wellcond.output import new_path


def make(path: Path, folder: bool, content: str) -> None:
    if folder:
        path.mkdir()
        path /= "x"
    path.write_text(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def race(monkeypatch: pytest.MonkeyPatch, run: Callable[[int], None]) -> list[object]:
    """The results, None or an error, of two threads that both find that the name is free."""
    barrier = threading.Barrier(2, timeout=10)
    checks = threading.local()
    real = output.refuse_existing

    def check(target: Path) -> None:
        checks.count = getattr(checks, "count", 0) + 1
        real(target)
        if checks.count <= 2:
            barrier.wait()

    monkeypatch.setattr(output, "refuse_existing", check)
    ends: list[object] = [None, None]

    def thread(number: int) -> None:
        try:
            run(number)
        except BaseException as error:
            ends[number] = error

    threads = [threading.Thread(target=thread, args=(number,)) for number in (0, 1)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return ends


def no_hard_links(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("kind", ["file", "file without hard links", "folder"])
def test_first_of_two_writers_wins(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "above" / "out"
    if kind == "file without hard links":
        monkeypatch.setattr(os, "link", no_hard_links)

    def run(number: int) -> None:
        with new_path(target) as path:
            make(path, kind == "folder", f"{number}" * 100)

    ends = race(monkeypatch, run)
    (winner,) = (number for number in (0, 1) if ends[number] is None)
    assert isinstance(ends[1 - winner], FileExistsError)
    assert "already exists and is not overwritten" in str(ends[1 - winner])
    file = target / "x" if kind == "folder" else target
    assert file.read_text() == f"{winner}" * 100
    assert names(tmp_path) == ["above"]
    assert names(target.parent) == ["out"]


def test_last_writer_with_overwrite_wins(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with new_path(target, overwrite=True) as first:
        first.write_text("first")
        with new_path(target, overwrite=True) as second:
            second.write_text("second")
        assert target.read_text() == "second"
    assert target.read_text() == "first"
    assert names(tmp_path) == ["out"]


def test_existing_target_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("gone")
    with pytest.raises(FileExistsError), new_path(tmp_path / "out"):
        pytest.fail("too late")
    assert os.readlink(tmp_path / "out") == "gone"


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with new_path(tmp_path / "above" / "out") as path:
            path.mkdir()
            (path / "read-only").mkdir(0o500)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path) == []


KILLED = """
import os, signal, sys
from wellcond.output import new_path
with new_path(sys.argv[1]) as path:
    (path / "inside").mkdir(parents=True)
    (path / "inside" / "x").touch()
    (path / "inside").chmod(0o500)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals there")
def test_killed_process_leaves_only_its_folder(tmp_path: Path) -> None:
    """The name remains free for the next process, which does not touch folders of others."""
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")])
    assert killed.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.startswith(".wellcond-unfinished-")
    with new_path(tmp_path / "out") as one:
        one.write_text("1")
        with new_path(tmp_path / "two") as two:
            two.write_text("2")
        assert one.read_text() == "1"
    assert names(tmp_path) == [left, "out", "two"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
def test_device_is_written_directly_and_error_names_it(tmp_path: Path) -> None:
    (tmp_path / "device").symlink_to("/dev/full")
    for overwrite in (True, False):
        target = tmp_path / ("device" if overwrite else "out")
        with pytest.raises(OSError, match="No space left on device") as error:  # noqa: SIM117
            with new_path(target, overwrite) as path:
                (path if overwrite else Path("/dev/full")).write_text("x")
        assert error.value.errno == errno.ENOSPC
        assert error.value.filename == str(target)
    assert names(tmp_path) == ["device"]
