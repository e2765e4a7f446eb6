"""What a repair writes: in the format of the name."""

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
    ],
)
def test_the_name_of_another_format_is_refused(
    tmp_path: Path, source: str, target: str, way_out: str
) -> None:
    """Before anything is read: this is no checkpoint at all."""
    if source == "folder":
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
