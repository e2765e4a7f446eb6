"""What a repair writes: in the format of the name, with the mode of the original."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import wellcond as wc

BAD = {"w": torch.diag(torch.tensor([1.0, 1e-3]))}


@pytest.mark.parametrize(
    ("source", "target", "way_out"),
    [
        ("a.safetensors", "b.pt", "Choose b.safetensors"),
        ("a.safetensors", "b", "Choose b.safetensors"),
        ("a.safetensors", "b.v1", "Choose b.safetensors"),
        ("a.pth", "b.safetensors", "Choose b.pth"),
        ("a.pt", "b.onnx", "Choose b.pt"),
        ("folder", "b.safetensors", "`path_out` must be a directory"),
        ("folder", "b.ckpt", "`path_out` must be a directory"),
        ("folder.ckpt", "b.pt", "`path_out` must be a directory"),
        ("folder.ckpt", "b.safetensors", "`path_out` must be a directory"),
    ],
)
def test_the_name_of_another_format_is_refused(
    tmp_path: Path, source: str, target: str, way_out: str
) -> None:
    """Before anything is read: this is no checkpoint at all."""
    if source.startswith("folder"):
        (tmp_path / source).mkdir()
    else:
        (tmp_path / source).write_text("no checkpoint")
    with pytest.raises(ValueError, match=way_out):
        wc.repair(tmp_path / source, tmp_path / target, 3.0)
    assert [path.name for path in tmp_path.iterdir()] == [source]


@pytest.mark.parametrize(
    ("source", "target"),
    [("a.pt", "b.pth"), ("a.bin", "b.ckpt"), ("a.safetensors", "b.safetensors"), ("a.x", "b.x")],
)
def test_what_is_written_can_be_read(tmp_path: Path, source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        save_file(BAD, tmp_path / source)
    else:
        torch.save(BAD, tmp_path / source)
    wc.repair(tmp_path / source, tmp_path / target, 3.0)
    assert wc.audit(tmp_path / target).findings[0].condition_number <= 3.0


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("bits", [0o600, 0o644, 0o440])
def test_a_copy_has_the_mode_of_its_original(tmp_path: Path, name: str, bits: int) -> None:
    folder = tmp_path / "in"
    (folder / "logs").mkdir(parents=True)
    save_file(BAD, folder / name) if name == "a.safetensors" else torch.save(BAD, folder / name)
    for other in ("config.json", "logs/events"):
        (folder / other).write_text("{}")
        (folder / other).chmod(bits)
    (folder / name).chmod(bits)
    (folder / "logs").chmod(0o700)
    folder.chmod(0o750)
    wc.repair(folder, tmp_path / "out", 3.0)
    wc.repair(folder / name, tmp_path / name, 3.0)
    assert mode(tmp_path / name) == mode(tmp_path / "out" / name) == bits
    assert mode(tmp_path / "out" / "config.json") == mode(tmp_path / "out/logs/events") == bits
    assert mode(tmp_path / "out" / "logs") == 0o700
    assert mode(tmp_path / "out") == 0o750


def test_links_that_lead_nowhere_are_copied_and_circles_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "logs").mkdir(parents=True)
    torch.save(BAD, folder / "a.pt")
    (folder / "logs" / "latest").symlink_to("gone")
    wc.repair(folder, tmp_path / "out", 3.0)
    assert os.readlink(tmp_path / "out" / "logs" / "latest") == "gone"
    (folder / "logs" / "up").symlink_to(folder)
    with pytest.raises(ValueError, match=r"is a link to .*, which contains it"):
        wc.repair(folder, tmp_path / "again", 3.0)
    (folder / "logs" / "up").unlink()
    os.mkfifo(folder / "logs" / "pipe")
    with pytest.raises(ValueError, match="a pipe"):
        wc.repair(folder, tmp_path / "again", 3.0)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
