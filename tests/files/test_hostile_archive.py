"""Archives that are compressed, truncated or malicious."""

import os
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import wellcond as wc
from wellcond.files.checkpoint import Checkpoint
from wellcond.files.tensors import UnreadableError


def content() -> dict[str, Tensor]:
    z = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    return {"w": 2 * torch.eye(4), "b": torch.arange(4.0), "z": z}


def rezipped(
    path: Path,
    compression: int = zipfile.ZIP_STORED,
    change: Callable[[str, bytes], bytes] = lambda name, data: data,
) -> Path:
    other = path.with_name(f"rezipped-{path.name}")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w", compression) as target:
        for record in source.infolist():
            name = record.filename
            target.writestr(name, change(name, source.read(record)))
    return other


def test_compressed_archive_read_like_torch(tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "a.pt")
    path = rezipped(tmp_path / "a.pt", zipfile.ZIP_DEFLATED)
    for one in Checkpoint(path).matrices():
        assert torch.equal(one.read(), content()[one.name])
    wc.repair(path, tmp_path / "fixed.pt", 2.0)
    after = torch.load(tmp_path / "fixed.pt")
    assert torch.equal(after["b"], content()["b"])
    assert float(wc.condition_number(after["z"])) <= 2.0


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_storage_longer_than_record_is_refused(tmp_path: Path, compression: int) -> None:
    """Otherwise the reader would read the following bytes as weights."""

    def cut(name: str, data: bytes) -> bytes:
        return data[:16] if name.endswith("data/0") else data

    torch.save(content(), tmp_path / "a.pt")
    path = rezipped(tmp_path / "a.pt", compression, cut)
    with pytest.raises(UnreadableError, match=r"64.*16|16.*64"):
        Checkpoint(path)


def test_archive_bomb_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(5000, 5000)}, tmp_path / "a.pt")
    path = rezipped(tmp_path / "a.pt", zipfile.ZIP_DEFLATED)
    with pytest.raises(UnreadableError, match="would unpack from"):
        Checkpoint(path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.int64, torch.uint16])
def test_storages_of_every_dtype_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = torch.zeros(12, dtype=dtype)
    torch.save({"w": torch.eye(3), "a": whole, "b": whole[3:9]}, tmp_path / "a.pt")
    assert [one.name for one in Checkpoint(tmp_path / "a.pt").matrices()] == ["w"]


@pytest.mark.parametrize("start", [b"\x80\x02R.", b"\x80\x02R", b"\x80\x02.", b"\x80\x02K\x01b."])
def test_damaged_pickles_are_refused(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(start)
    with pytest.raises(UnreadableError, match=r"must be a torch|is not a valid torch"):
        Checkpoint(path)
    torch.save(content(), path)
    path = rezipped(path, change=lambda name, data: start if "data.pkl" in name else data)
    with pytest.raises(UnreadableError, match=r"must be a torch|is not a valid torch"):
        Checkpoint(path)


def run(code: str, *arguments: Path) -> str:
    """Returns the output of a separate process, which the system may kill."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


CUT = """
import os, sys, torch
from wellcond.files.checkpoint import Checkpoint
one, other = Checkpoint(sys.argv[1]).matrices()
assert torch.equal(one.read(), torch.ones(500, 500))
os.truncate(sys.argv[1], 1_100_000)
for matrix in (one, other):
    try:
        matrix.read()
        print("read")
    except ValueError as error:
        print(error)
"""


def test_file_truncated_while_read_does_not_end_process(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(500, 500), "b": torch.ones(500, 500)}, tmp_path / "a.pt")
    lines = run(CUT, tmp_path / "a.pt").splitlines()
    shorter = f"{tmp_path / 'a.pt'} has become shorter while it was read. "
    assert lines == 2 * [f"{shorter}Try again when no program writes to it."]


FULL = """
import resource, sys
from wellcond.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
print(main(["repair", *sys.argv[1:], "--max-condition", "2"]))
"""


def test_full_disk_is_reported(tmp_path: Path) -> None:
    torch.save({"a": torch.randn(300, 300)}, tmp_path / "a.pt")
    code, error = run(FULL, tmp_path / "a.pt", tmp_path / "b.pt").splitlines()
    assert code == "2"
    assert error == f"wellcond: error: [Errno 27] File too large: '{tmp_path / 'b.pt'}'"
    assert {path.name for path in tmp_path.iterdir()} == {"a.pt"}


@pytest.mark.parametrize("ending", ["pt", "legacy.pt", "deflated.pt", "safetensors"])
@pytest.mark.parametrize("how", ["replaced", "written to"])
def test_file_changed_while_read_is_refused(tmp_path: Path, ending: str, how: str) -> None:
    """Unchanged bytes are refused too, because the other bytes belong to other weights."""

    def save(path: Path, tensors: dict[str, Tensor]) -> Path:
        if ending == "safetensors":
            save_file(tensors, path)
        else:
            torch.save(tensors, path, _use_new_zipfile_serialization="legacy" not in ending)
        return rezipped(path, zipfile.ZIP_DEFLATED) if "deflated" in ending else path

    path = save(tmp_path / f"a.{ending}", content())
    other = save(tmp_path / f"b.{ending}", content() | {"z": content()["z"] + 1})
    os.utime(path, ns=(0, 0))
    checkpoint = Checkpoint(path)
    w, z = checkpoint.matrices()
    assert torch.equal(w.read(), content()["w"])
    if how == "replaced":
        other.rename(path)
    else:
        path.write_bytes(other.read_bytes())
    for read in (w.read, z.read, lambda: checkpoint.copy_with(lambda name: None, tmp_path / "c")):
        with pytest.raises(UnreadableError, match=r"has .* while it was read"):
            read()
    with pytest.raises(UnreadableError, match="while it was read"):
        list(next(iter(checkpoint.files.values())).pieces("b"))


@pytest.mark.parametrize("name", ["archive/DATA.PKL", "x/data.pkl", "archive/data.pkl"])
def test_archive_with_two_pickles_is_refused(tmp_path: Path, name: str) -> None:
    """torch might load one of two pickles, while wellcond measures the other."""
    torch.save(content(), tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (record,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
        archive.writestr(name.replace("archive", record.partition("/")[0]), b"\x80\x02}.")
    with pytest.raises(UnreadableError, match=r"is not a valid torch\.save file"):
        Checkpoint(tmp_path / "a.pt")


def test_repair_refuses_archive_that_cannot_be_unpacked(tmp_path: Path) -> None:
    """A measurement of the weights does not need the damaged record."""
    torch.save(content(), tmp_path / "a.pt")
    path = rezipped(tmp_path / "a.pt", zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    name = b"archive/version" if b"archive/version" in data else b"a/version"
    path.write_bytes(data.replace(name, name.replace(b"r", b"i", 1), 1))
    assert len(wc.audit(path).findings) == 2
    with pytest.raises(UnreadableError, match="differ"):
        wc.repair(path, tmp_path / "fixed.pt", 2.0)
    assert not (tmp_path / "fixed.pt").exists()


def test_storage_shorter_than_record_is_refused(tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "a.pt")
    longer = rezipped(
        tmp_path / "a.pt", change=lambda name, data: data + b"\0" if "data/0" in name else data
    )
    with pytest.raises(UnreadableError, match=r"64 .*, but contains 65"):
        Checkpoint(longer)


def test_legacy_file_without_storage_is_refused(tmp_path: Path) -> None:
    """torch leaves such a storage uninitialised."""
    path = tmp_path / "a.pt"
    torch.save({"w": torch.eye(3)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    start, _, end = data.rpartition(b"]q\x00X")
    path.write_bytes(start + b"]q\x00." + end[-44:])  # an empty list, then the same entries
    assert torch.load(path)["w"].shape == (3, 3)
    with pytest.raises(UnreadableError, match="its storages are not those of its tensors"):
        Checkpoint(path)
    path.write_bytes(data[:-4])
    with pytest.raises(UnreadableError, match="44 bytes for its storages, but contains 40"):
        Checkpoint(path)
