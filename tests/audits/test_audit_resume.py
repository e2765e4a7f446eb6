"""An interrupted audit continues from its file, and processes share the work."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import wellcond as wc
from wellcond.audits.executor import Executor, deal
from wellcond.audits.progress import Progress
from wellcond.audits.resume import Record
from wellcond.report.findings import Finding, Status

LAYERS = 5


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with finite, infinite and undefined numbers, and tensors to search for NaN."""
    weights = {f"layers.{i}.weight": matrix(6 + i, 5, seed=i) for i in range(LAYERS)}
    weights |= {"zero": torch.zeros(3, 4), "flat": torch.ones(3, 4), "stack": matrix(2, 4, 5)}
    weights |= {"nan": torch.full((3, 3), torch.nan), "bias": torch.tensor([torch.inf, 1.0])}
    path = tmp_path / "model.safetensors"
    save_file({name: one.to(torch.bfloat16) for name, one in weights.items()}, path)
    return path


def same(one: wc.AuditReport, other: wc.AuditReport) -> bool:
    """Equality bit for bit; nan equals nan."""
    return repr([*map(dataclasses.asdict, one.findings), one]) == repr(
        [*map(dataclasses.asdict, other.findings), other]
    )


class Interruption(Exception):
    """Ends an audit between two tensors."""


def interrupted(path: Path, known: Path, after: int, **options: Any) -> None:
    def stop(step: Progress) -> None:
        if step.number > after:
            raise Interruption

    with pytest.raises(Interruption):
        wc.audit(path, progress=stop, resume=known, **options)


@pytest.mark.parametrize("options", [{}, {"certify": True, "curves": 9}, {"include": "layers.*"}])
def test_resumed_audit_equals_uninterrupted_audit(
    path: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    known = tmp_path / "known"
    expected = wc.audit(path, **options)
    interrupted(path, known, 2, **options)
    interrupted(path, known, 1, **options)
    names: list[str] = []
    found = wc.audit(path, resume=known, progress=lambda step: names.append(step.name), **options)
    assert same(found, expected)
    measured = {finding.name for finding in expected.findings} - {"bias"}
    assert len(names) == len(measured) - 3  # the values of the other tensors are kept
    names.clear()
    again = wc.audit(path, resume=known, progress=lambda step: names.append(step.name), **options)
    assert same(again, expected)
    assert not names


def test_known_tensors_are_not_read(path: Path, tmp_path: Path) -> None:
    known = tmp_path / "known"
    expected = wc.audit(path, resume=known)
    state = path.stat()
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    content[start:] = bytes(
        len(content) - start
    )  # zero all tensors, but keep the modification time
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert same(wc.audit(path, resume=known), expected)


@pytest.mark.parametrize("cut", [1, 40])
def test_cut_line_is_measured_again(path: Path, tmp_path: Path, cut: int) -> None:
    known = tmp_path / "known"
    expected = wc.audit(path, resume=known)
    whole = known.read_bytes()
    known.write_bytes(whole[:-cut])
    assert same(wc.audit(path, resume=known), expected)
    assert known.read_bytes() == whole  # the last tensor was searched again


@pytest.mark.parametrize("size", [0, 10])
def test_file_cut_in_its_first_line_starts_anew(path: Path, tmp_path: Path, size: int) -> None:
    known = tmp_path / "known"
    wc.audit(path, resume=known)
    whole = known.read_bytes()
    known.write_bytes(whole[:size])
    wc.audit(path, resume=known)
    assert known.read_bytes() == whole


def test_files_of_other_processes_are_used(path: Path, tmp_path: Path) -> None:
    known = tmp_path / "kno[w]n*"
    expected = wc.audit(path, resume=known)
    head, *lines = known.read_bytes().splitlines(keepends=True)
    known.write_bytes(head + lines[0])
    known.with_name(f"{known.name}.12").write_bytes(head + b"".join(lines[1:]))
    known.with_name(f"{known.name}.md").write_bytes(b"something else")
    before = known.read_bytes()
    assert same(wc.audit(path, resume=known), expected)
    assert known.read_bytes() == before


def test_failures_are_tried_again(path: Path, tmp_path: Path) -> None:
    record = Record(tmp_path / "known", {"versions": {}, "options": {}, "files": {}})
    failed = Finding("w", "", (0, 0), "", status=Status.failed, detail="no memory")
    record.add(("rows", 0, "w"), (failed,))
    record.add(("search", 0, "w"), "no memory")
    record.add(("search", 1, "v"), (0, 0, 4, True))
    again = Record(tmp_path / "known", {"versions": {}, "options": {}, "files": {}})
    assert again.known == {("search", 1, "v"): (0, 0, 4, True)}


def test_record_of_another_audit_is_refused(path: Path, tmp_path: Path) -> None:
    known = tmp_path / "known"
    wc.audit(path, resume=known)
    with pytest.raises(
        ValueError, match=r"to another audit \(include was \[\] and is now \['zero'\]\)"
    ):
        wc.audit(path, include="zero", resume=known)
    with pytest.raises(ValueError, match=f"or delete {known}"):
        wc.audit(path, certify=True, resume=known)
    os.utime(path, ns=(5, 5))
    with pytest.raises(ValueError, match=r"model.safetensors has changed\). Give another path"):
        wc.audit(path, resume=known)


def test_settings_files_belong_to_the_audit(path: Path, tmp_path: Path) -> None:
    known = tmp_path / "known"
    wc.audit(path, resume=known)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json has changed"):
        wc.audit(path, resume=known)


@pytest.mark.parametrize(
    "content", [b"weights", b"{}\n", b"[1]\nx", b"\xff\xfe\n", b'{"a":' * 9999]
)
def test_other_file_is_refused_and_kept(path: Path, tmp_path: Path, content: bytes) -> None:
    known = tmp_path / "known"
    known.write_bytes(content)
    with pytest.raises(ValueError, match=r"`resume` must be a new file or .* is something else"):
        wc.audit(path, resume=known)
    assert known.read_bytes() == content


def test_resume_requires_paths(path: Path, tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="`model_or_path` is a Linear"):
        wc.audit(layer, resume=tmp_path / "known")
    with pytest.raises(TypeError, match="`base` is a Linear"):
        wc.audit(path, base=layer, resume=tmp_path / "known")
    with pytest.raises(ValueError, match="`resume` must be a file, but"):
        wc.audit(path, resume=tmp_path)
    assert not (tmp_path / "known").exists()


def test_line_with_another_structure_is_measured_again(path: Path, tmp_path: Path) -> None:
    known = tmp_path / "known"
    expected = wc.audit(path, resume=known)
    head, first, *rest = known.read_bytes().splitlines(keepends=True)
    number = json.loads(first)
    number[3][0]["class"] = "Path"
    bad = [b"\0\0\n", b"[1, 2]\n", json.dumps(number).encode() + b"\n"]
    known.write_bytes(head + b"".join([*bad, *rest]))
    assert same(wc.audit(path, resume=known), expected)


# --- shares of the work ---------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e9)), st.integers(1, 5))
def test_deal_is_within_half_of_a_lower_bound(work: list[float], count: int) -> None:
    """The last item of the largest load is at most half the sum of two of `count` + 1 items."""
    shares = deal(work, count)
    assert sorted(index for share in shares for index in share) == [*range(len(work))]
    assert all(share == sorted(share) for share in shares)
    loads = sorted(sum(work[index] for index in share) for share in shares)
    if len(work) > count:  # a lower bound of the optimum: the mean, one item, two of count + 1
        ordered = sorted(work, reverse=True)
        best = max(sum(work) / count, ordered[0], ordered[count - 1] + ordered[count])
        assert loads[-1] <= best * 1.5 * (1 + 1e-9)
    else:
        assert loads[-1] == max(work, default=0.0)


def test_executor_returns_values_in_order() -> None:
    def square(chosen: Any) -> Iterator[int]:
        return (index * index for index in chosen)

    assert Executor().map("squares", ["a", "b", "c"], [1.0, 3.0, 2.0], square) == [0, 1, 4]
