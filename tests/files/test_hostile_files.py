"""Damaged or malicious files and directories give one line or one row, never a crash."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

import wellcond as wc
from wellcond.files.checkpoint import Checkpoint
from wellcond.files.tensors import UnreadableError
from wellcond.weights.reasons import Reason, Skipped


@pytest.mark.parametrize(
    "text",
    [
        '{"weight_map": {"w": 3}}',
        '{"weight_map": {"w": ["a"]}}',
        '{"weight_map": {"w": null, "v": "a.safetensors"}}',
        '{"weight_map": [1, 2]}',
        '{"weight_map": 7}',
        "[" * 100_000,
        '{"weight_map": ' + '{"a": ' * 100_000,
        "\x00",
    ],
)
def test_invalid_indices_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(UnreadableError, match="weight_map"):
        Checkpoint(path)


def test_huge_index_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors.index.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(UnreadableError, match="at most 33,554,432 bytes"):
        Checkpoint(path)


@pytest.mark.parametrize("name", ["", ".", "a\x00b", "a/../b"])
def test_shards_must_be_in_folder_of_index(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(UnreadableError, match=r"its own folder|does not exist"):
        Checkpoint(path)


def test_files_not_in_index_are_listed(tmp_path: Path) -> None:
    for name in ("a.safetensors", "adapter.safetensors", "old.bin"):
        save_file({"w": torch.eye(2)}, tmp_path / name)
    path = tmp_path / "x.safetensors.index.json"
    path.write_text('{"weight_map": {"w": "a.safetensors"}}')
    assert wc.audit(tmp_path).coverage.skipped == {
        "adapter.safetensors": Skipped(Reason.beside),
        "old.bin": Skipped(Reason.beside),
    }
    assert wc.audit(path).coverage.skipped == {}  # the named files were read


@pytest.mark.parametrize("shard", ["a.safetensors", "b.safetensors"])
def test_index_selects_one_of_two_tensors(tmp_path: Path, shard: str) -> None:
    save_file({"w": torch.eye(2), "u": torch.eye(4)}, tmp_path / "a.safetensors")
    save_file({"w": torch.eye(3), "v": torch.eye(4)}, tmp_path / "b.safetensors")
    index = {"weight_map": {"u": "a.safetensors", "w": shard, "v": "b.safetensors"}}
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps(index))
    shapes = {finding.name: finding.shape for finding in wc.audit(tmp_path).findings}
    other = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}[shard]
    assert set(shapes) == {"u", "v", "w", f"{other}/w"}
    assert shapes["w"] == ((2, 2) if shard == "a.safetensors" else (3, 3))


def test_unreadable_file_in_folder_is_reported(tmp_path: Path) -> None:
    save_file({"w": torch.eye(2)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "c.pt")
    (tmp_path / "d.bin").write_bytes(b"\x80\x02R")
    (tmp_path / "e.ckpt").mkdir()
    (tmp_path / "f.pt").symlink_to("f.pt")  # a circular link
    report = wc.audit(tmp_path)
    rows = {finding.name: finding.explanation for finding in report.findings}
    assert set(rows) == {"w", "b.safetensors", "c.pt", "d.bin", "f.pt"}
    assert "is a broken link" in rows["b.safetensors"]
    assert "a pipe" in rows["c.pt"]


@pytest.mark.parametrize("name", ["pipe.pt", "pipe.safetensors", "pipe.index.json", "pipe"])
def test_pipes_and_devices_are_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UnreadableError, match="must be a file"):
        wc.audit(tmp_path / name)
    (tmp_path / "device.pt").symlink_to("/dev/zero")
    with pytest.raises(UnreadableError, match="must be a file"):
        wc.repair(tmp_path / "device.pt", tmp_path / "out.pt", 3.0)


def test_index_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors.index.json")
    with pytest.raises(UnreadableError, match="must be a file"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("length", [33_554_433, 100_000_001, 2**63, 2**64 - 1])
def test_huge_headers_are_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length) + b"{")
        file.truncate(200_000_000)  # sparse
    with pytest.raises(UnreadableError, match="at most 33,554,432"):
        Checkpoint(path)


@pytest.mark.parametrize("header", [b"[" * 10_000, b'{"a":' * 10_000, b"7", b"null", b"{}", b'{"'])
def test_invalid_headers_are_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match=r"a\.safetensors (must|is not a valid)"):
        wc.audit(path)


def test_other_tensors_of_huge_file_are_read(tmp_path: Path) -> None:
    path, size = tmp_path / "a.safetensors", 1 << 34
    large = {"dtype": "F32", "shape": [1 << 16, 1 << 16], "data_offsets": [16, 16 + size]}
    small = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    header = json.dumps({"large": large, "small": small}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + np.eye(2, dtype=np.float32).tobytes())
        file.truncate(8 + len(header) + 16 + size)  # sparse
    code = """
import resource, sys
from wellcond.cli import main
resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33))
sys.exit(main(["audit", sys.argv[1]]))
"""
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "contains large of 17,179,869,184 bytes, for which there is not enough" in done.stdout
    assert "1 of 2 matrices" in done.stdout


WRONG = {
    "a dtype that is none": {"dtype": "X", "shape": [2], "data_offsets": [0, 8]},
    "a dtype of another length": {"dtype": "F16", "shape": [2], "data_offsets": [0, 8]},
    "a negative shape": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]},
    "a shape that is no number": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
    "a shape beyond all bounds": {"dtype": "F32", "shape": [1 << 62] * 9, "data_offsets": [0, 8]},
    "a shape that is a text": {"dtype": "F64", "shape": "", "data_offsets": [0, 8]},
    "a gap before it": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    "a gap behind it": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    "an end beyond that of the file": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
    "an end before its start": {"dtype": "F32", "shape": [], "data_offsets": [8, 4]},
    "no place": {"dtype": "F32", "shape": [2]},
    "three places": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]},
    "no description": [1],
}


@pytest.mark.parametrize("what", WRONG)
def test_files_refused_by_safetensors_are_refused(tmp_path: Path, what: str) -> None:
    header = json.dumps({"w": WRONG[what]}).encode()
    data = struct.pack("<Q", len(header)) + header + bytes(8)
    with pytest.raises(SafetensorError):
        load(data)
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(UnreadableError, match="is not a valid safetensors file: "):
        Checkpoint(path)
