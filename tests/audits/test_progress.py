"""Progress reports the next tensor, the number of tensors and the remaining time."""

import math
import sys
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn

import wellcond as wc
from wellcond.audits.progress import Counter, Progress, shown, work_of


def test_time_left_follows_from_finished_work(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = count(0.0, 5.0)  # seconds between two readings of the clock
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    seen: list[Progress] = []
    counter = Counter(seen.append, [1.0, 3.0, 4.0])
    for name in "abc":
        counter.next(name)
    assert [(step.name, step.number, step.total) for step in seen] == [
        ("a", 1, 3),
        ("b", 2, 3),
        ("c", 3, 3),
    ]
    assert math.isnan(seen[0].seconds_left)
    # After 10 seconds, 1 of 8 is done; after 15 seconds, half of the next.
    assert [step.seconds_left for step in seen[1:]] == [70.0, 15.0]
    assert str(seen[0]) == "1 of 3: a"
    assert str(seen[1]) == "2 of 3, about 1 min left: b"


def test_share_counts_and_is_reported_once_per_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    seen: list[Progress] = []
    counter = Counter(seen.append, [2.0, 6.0])
    for at, share in ((0.5, 0.1), (4.0, 0.5), (4.9, 0.6), (6.0, 0.75)):
        if not seen:
            counter.next("a")
        now[0] = at
        counter.within(share)
    counter.next("b")
    assert [(step.name, step.number, step.share) for step in seen] == [
        ("a", 1, 0.0),
        ("a", 1, 0.5),
        ("a", 1, 0.75),
        ("b", 2, 0.0),
    ]
    # After 4 seconds, 1 of 8 is done; after 6 seconds, 1.5; and then 2.
    assert [step.seconds_left for step in seen[1:]] == pytest.approx([28.0, 26.0, 18.0])
    assert str(seen[1]) == "1 of 2, 50 % of it done, about 28 s left: a"


def test_operator_reports_its_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = count(0.0, 5.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    bounded = nn.Conv2d(2, 2, 3, padding=1, groups=2)
    exact = nn.Conv2d(2, 2, 3, padding=1, groups=2, padding_mode="circular")
    seen: list[Progress] = []
    x = torch.zeros(1, 2, 70, 70)
    wc.audit(nn.Sequential(bounded, exact), example=x, include="*:operator", progress=seen.append)
    # Each group of one layer has two bounds of sigma_max and four corners. The other layer reports
    # once per group.
    expected = [(1, k / 12) for k in range(13)] + [(2, 0.0), (2, 0.5), (2, 1.0)]
    assert [(step.number, step.share) for step in seen] == expected


@pytest.mark.parametrize("kind", [ValueError, OSError, KeyError])
def test_callback_error_is_raised(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = count(0.0, 5.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))

    def fail(step: Progress) -> None:
        if step.share:
            raise kind("mine")

    layer = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")
    with pytest.raises(kind, match="mine"):
        wc.audit(layer, example=torch.zeros(1, 2, 8, 8), progress=fail)


def test_work_estimates(tmp_path: Path) -> None:
    """A stack counts its matrices, a kernel counts as (out, rest), a large matrix its entries."""
    from wellcond.files.checkpoint import Checkpoint

    shapes = {
        "a.weight": (4, 8),
        "experts": (3, 4, 8),
        "conv.weight": (4, 2, 2, 2),
        "large.weight": (2049, 3000),
    }
    torch.save({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "a.pt")
    found = list(Checkpoint(tmp_path / "a.pt").matrices())
    assert {one.name: one.shape for one in found} == shapes
    assert work_of(found) == [128.0, 384.0, 128.0, 2049 * 3000 * 2048.0]


def test_audit_and_repair_count_measured_tensors(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    seen: list[Progress] = []
    wc.audit(model, progress=seen.append)
    wc.audit(path, progress=seen.append)
    wc.repair(path, tmp_path / "fixed.pt", 2, progress=seen.append)
    names = [(step.name, step.number, step.total) for step in seen]
    assert names == 3 * [("0.weight", 1, 2), ("2.weight", 2, 2)]
    seen.clear()
    wc.audit(path, exclude=["2.*"], progress=seen.append)
    assert [(step.name, step.number, step.total) for step in seen] == [("0.weight", 1, 1)]


def test_line_fits_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wellcond.cli import main

    path = tmp_path / "model.pt"
    torch.save({"x" * 300 + ".weight": torch.eye(3), "b.weight": torch.eye(3)}, path)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["audit", str(path)]) == 0
    shown = capsys.readouterr().err
    lines = [line for line in shown.split("\r\x1b[K") if line]
    assert [line[:17] for line in lines] == ["measuring 1 of 2:", "measuring 2 of 2,"]
    assert all(len(line) < 60 for line in lines)
    assert shown.endswith("\r\x1b[K"), "nothing is left of it"


def hide_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tqdm.auto", "tqdm.std"):
        monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize("has_tqdm", [True, False])
def test_progress_true_shows_every_tensor(
    has_tqdm: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if has_tqdm:
        monkeypatch.setenv("TQDM_MININTERVAL", "0")
        pytest.importorskip("tqdm")
    else:
        hide_tqdm(monkeypatch)
    model = nn.Sequential(nn.Linear(8, 4), nn.Conv2d(1, 2, 3), nn.Linear(4, 2))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    wc.audit(model, progress=False)
    assert capsys.readouterr() == ("", "")
    wc.audit(model, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert all(name in err for name in ("0.weight", "1.weight", "2.weight"))
    assert err.endswith("\r")  # the line is empty again
    wc.repair(tmp_path / "model.pt", tmp_path / "fixed.pt", 2, progress=True)
    assert "2.weight" in capsys.readouterr().err


def test_line_is_cleared_after_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide_tqdm(monkeypatch)

    def fail() -> None:
        with shown(True) as show:
            assert show is not None
            show(Progress("w\x1b[31m", 1, 2, math.nan))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert capsys.readouterr().err.split("\r")[1:] == [
        f"{'1 of 2: w' + chr(92) + 'x1b[31m':79}",
        " " * 79,
        "",
    ]
