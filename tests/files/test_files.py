"""Readers read one tensor at a time, copy files byte for byte, and state why they refuse a file."""

import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import NESTED
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import wellcond as wc
from wellcond.files.checkpoint import Checkpoint
from wellcond.files.tensors import UnreadableError
from wellcond.weights.reasons import Reason, Skipped


def tensors() -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    return {
        "double.weight": randn(6, 4).double(),
        "single.weight": randn(5, 7),
        "half.weight": randn(4, 4).half(),
        "brain.weight": randn(3, 8).bfloat16(),
        "bias": randn(5),
        "scale": randn(1)[0],
        "experts.weight": randn(3, 4, 5),
        "conv.weight": randn(4, 3, 2, 2),
        "conv1d.weight": randn(4, 3, 5),
        "count": torch.tensor(3),
        "packed": torch.arange(12, dtype=torch.int32).reshape(3, 4),
        "mask": torch.ones(2, 2, dtype=torch.bool),
        "empty": torch.zeros(0, 3),
        "eighth": randn(4, 4).to(torch.float8_e4m3fn),
    }


FORMATS = ["safetensors", "pt"]


def saved(folder: Path, kind: str, content: dict[str, Tensor] | None = None) -> Path:
    path = folder / f"model.{kind}"
    content = tensors() if content is None else content
    if kind == "safetensors":
        save_file(content, path, metadata={"format": "pt", "note": "kept"})
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_float_matrices_found_and_others_skipped_with_reason(tmp_path: Path, kind: str) -> None:
    checkpoint = Checkpoint(saved(tmp_path, kind))
    shapes = {
        f"{one.name}:{view}": tuple(S.shape)
        for one in checkpoint.matrices()
        for view, S in one.views(one.read()).items()
    }
    assert shapes == {
        "double.weight:": (6, 4),
        "single.weight:": (5, 7),
        "half.weight:": (4, 4),
        "brain.weight:": (3, 8),
        "experts.weight:0": (4, 5),
        "experts.weight:1": (4, 5),
        "experts.weight:2": (4, 5),
        "conv.weight:kernel": (4, 12),
        "conv1d.weight:kernel": (4, 15),
    }
    skipped = checkpoint.skipped()
    eighth = skipped.pop("eighth")  # safetensors has another name for its dtype
    assert eighth.reason is Reason.quantised
    assert skipped == {
        "bias": Skipped(Reason.vector),
        "scale": Skipped(Reason.number),
        "count": Skipped(Reason.number),
        "packed": Skipped(Reason.packed, "int32"),
        "mask": Skipped(Reason.packed, "bool"),
        "empty": Skipped(Reason.empty, "shape (0, 3)"),
    }


def test_parameter_count_equal_in_both_formats(tmp_path: Path) -> None:
    """In every format, only floating point and complex tensors are parameters."""
    content = tensors() | {"wave": torch.ones(2, 3, dtype=torch.complex64)}
    content["positions"] = torch.arange(1000)
    expected = sum(t.numel() for t in content.values() if t.is_floating_point() or t.is_complex())
    for kind in FORMATS:
        assert sum(Checkpoint(saved(tmp_path, kind, content)).sizes.values()) == expected
    content = {"w": torch.eye(10), "codes": torch.zeros(30, 30, dtype=torch.uint8)}
    for kind in FORMATS:
        report = wc.audit(saved(tmp_path, kind, content))
        assert report.coverage.parameter_share == 1.0
        assert report.coverage.skipped["codes"] == Skipped(Reason.packed, "uint8")


@pytest.mark.parametrize("kind", FORMATS)
def test_read_returns_saved_values(tmp_path: Path, kind: str) -> None:
    expected = tensors()
    found = Checkpoint(saved(tmp_path, kind)).matrices()
    read = {one.name: one.read() for one in found}
    assert {name for name in expected if name.endswith(".weight")} <= set(read)
    for name, tensor in read.items():
        assert torch.equal(tensor, expected[name])


def test_sharded_checkpoint_read_through_index(tmp_path: Path) -> None:
    content = tensors()
    names = list(content)
    shards = {"a-1.safetensors": names[::2], "a-2.safetensors": names[1::2]}
    for file, inside in shards.items():
        save_file({name: content[name] for name in inside}, tmp_path / file)
    index = {"weight_map": {name: file for file, inside in shards.items() for name in inside}}
    path = tmp_path / "a.safetensors.index.json"
    path.write_text(json.dumps(index))
    for where in (path, tmp_path):
        read = {one.name: one.read() for one in Checkpoint(where).matrices()}
        assert len(read) == 7
        assert all(torch.equal(tensor, content[name]) for name, tensor in read.items())

    index["weight_map"]["bias"] = "a-3.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(UnreadableError, match="does not exist"):
        Checkpoint(path)
    index["weight_map"]["bias"] = "../a-1.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(UnreadableError, match="its own folder"):
        Checkpoint(path)
    index["weight_map"]["bias"] = next(f for f, inside in shards.items() if "bias" not in inside)
    path.write_text(json.dumps(index))
    with pytest.raises(UnreadableError, match="does not contain it"):
        Checkpoint(path)
    path.write_text("{}")
    with pytest.raises(UnreadableError, match="weight_map"):
        Checkpoint(path)


def test_names_in_directory_begin_with_file_if_several(tmp_path: Path) -> None:
    torch.save({"w": torch.eye(2)}, tmp_path / "step1.pt")
    assert [one.name for one in Checkpoint(tmp_path).matrices()] == ["w"]
    torch.save({"w": torch.eye(2)}, tmp_path / "step2.pt")
    names = [one.name for one in Checkpoint(tmp_path).matrices()]
    assert names == ["step1.pt/w", "step2.pt/w"]


def test_training_directory_yields_only_weights(tmp_path: Path) -> None:
    """The folder contains model.safetensors, optimizer.pt and an unsafe pickled object."""
    model = nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save({"arguments": Path("x")}, tmp_path / "training_args.bin")
    checkpoint = Checkpoint(tmp_path)
    assert [one.name for one in checkpoint.matrices()] == ["weight"]
    skipped = checkpoint.skipped()
    assert skipped["optimizer.pt/everything"] == Skipped(Reason.optimizer)
    assert skipped["training_args.bin"] == Skipped(Reason.no_tensors)


def test_nested_dicts_read_and_optimizers_skipped(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    content = {
        "epoch": 3,
        "model": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
    }
    torch.save(content, tmp_path / "last.ckpt")
    checkpoint = Checkpoint(tmp_path / "last.ckpt")
    assert [one.name for one in checkpoint.matrices()] == ["model.weight"]
    assert checkpoint.skipped()["optimizer_states.0"] == Skipped(Reason.optimizer)


def test_tied_tensors_count_once_in_file(tmp_path: Path) -> None:
    w = torch.randn(4, 4)
    path = saved(tmp_path, "pt", {"a": w, "b": w, "c": w.T, "d": w[:2]})
    checkpoint = Checkpoint(path)
    assert [one.name for one in checkpoint.matrices()] == ["a"]
    assert checkpoint.skipped() == {
        "b": Skipped(Reason.same, "a"),
        "c": Skipped(Reason.same, "a"),
        "d": Skipped(Reason.part, "a"),
    }
    assert sum(checkpoint.sizes.values()) == 16


def test_legacy_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"w": torch.eye(3)}, path, _use_new_zipfile_serialization=False)
    assert [one.name for one in Checkpoint(path).matrices()] == ["w"]


# --- refused files --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path: Path, kind: str, keep: float) -> None:
    path = saved(tmp_path, kind)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(UnreadableError, match=str(path)):
        Checkpoint(path)


def test_damaged_file_in_folder_reported_and_repair_refused(tmp_path: Path) -> None:
    save_file({"w": torch.eye(2)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-3])
    report = wc.audit(tmp_path)
    assert [f.name for f in report.findings] == ["b.safetensors", "w"]
    assert "not a valid safetensors file" in report.findings[0].explanation
    assert [f.name for f in report.exceeding(10.0)] == ["b.safetensors"]
    with pytest.raises(ValueError, match=r"b\.safetensors is not a valid"):
        wc.repair(tmp_path, tmp_path.parent / "repaired", 10.0)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.bin"])
def test_text_files_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"This is a text, no checkpoint. " * 100)
    with pytest.raises(UnreadableError, match="damaged"):
        Checkpoint(path)


def test_unknown_endings_and_folders_without_weights_refused(tmp_path: Path) -> None:
    (tmp_path / "x.xyz").write_bytes(b"text")
    with pytest.raises(UnreadableError, match="must end in"):
        Checkpoint(tmp_path / "x.xyz")
    with pytest.raises(UnreadableError, match="contains none whose name ends in"):
        Checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Checkpoint(tmp_path / "nothing.pt")


def test_folder_of_a_trainer_names_its_checkpoints(tmp_path: Path) -> None:
    for step in (50, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        torch.save({"w": torch.eye(2)}, tmp_path / f"checkpoint-{step}" / "model.pt")
    (tmp_path / "logs").mkdir()
    with pytest.raises(
        UnreadableError, match="only its subfolders do: checkpoint-100, checkpoint-50"
    ):
        Checkpoint(tmp_path)


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (os.environ["WELLCOND_TEST_FOLDER"],)


def test_pickled_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WELLCOND_TEST_FOLDER", str(tmp_path / "broken-in"))
    torch.save({"w": torch.eye(2), "x": Malicious()}, tmp_path / "m.pt")
    checkpoint = Checkpoint(tmp_path / "m.pt")
    assert [one.name for one in checkpoint.matrices()] == ["w"]
    assert checkpoint.skipped()["Python objects"] == Skipped(Reason.objects, "x (posix.mkdir)")
    wc.repair(tmp_path / "m.pt", tmp_path / "fixed.pt", 2.0)
    assert not (tmp_path / "broken-in").exists()


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UnreadableError, match="must contain a dict of tensors"):
        Checkpoint(tmp_path / "list.pt")


# --- memory ---------------------------------------------------------------------------------------

_PEAK = """
import resource, sys
import torch, wellcond as wc
torch.set_num_threads(1)
wc.audit({small!r})  # what importing and computing need in any case
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
wc.audit({large!r})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str) -> None:
    """For 400 MB of 2 MB tensors, the peak grows by a few tensors and mapped memory at most."""
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    tensor = torch.randn(16, 32768, generator=torch.Generator().manual_seed(0))
    paths = [
        saved(folder, kind, {f"w{i}": tensor.clone() for i in range(count)})
        for folder, count in ((small, 2), (large, 200))
    ]
    code = _PEAK.format(small=str(paths[0]), large=str(paths[1]))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 120 << 10  # kilobytes


# --- repair ---------------------------------------------------------------------------------------


def raw(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


def test_repair_safetensors_changes_only_repaired_tensors(tmp_path: Path) -> None:
    path, fixed = saved(tmp_path, "safetensors"), tmp_path / "fixed.safetensors"
    report = wc.repair(path, fixed, 3.0)
    assert {r.name for r in report.changed} >= {"single.weight", "double.weight"}
    changed = {repair.name for repair in report.changed}
    before, after = load_file(path), load_file(fixed)
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert (raw(tensor) == raw(after[name])) == (name not in changed)
    with safe_open(fixed, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}
    old, new = path.read_bytes(), fixed.read_bytes()
    length = 8 + int.from_bytes(old[:8], "little")
    assert old[:length] == new[:length]
    for finding in wc.audit(fixed).findings:
        assert finding.condition_number <= 3.0


def test_repair_state_dict_keeps_other_content(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    with torch.no_grad():
        model[0].weight[0] *= 1e-6
    shared = torch.randn(3, 3)
    shared[0] *= 1e-3
    content = {
        "model": model.state_dict(),
        "tied": [shared, shared],
        "transposed": shared.T.clone().T,
        "epoch": 7,
        "name": "x",
    }
    path, fixed = tmp_path / "a.pt", tmp_path / "b.pt"
    torch.save(content, path)
    wc.repair(path, fixed, 10.0)
    after = torch.load(fixed, weights_only=True)
    assert isinstance(after["model"], OrderedDict)
    assert after["model"]._metadata == content["model"]._metadata
    assert list(after) == list(content)
    assert (after["epoch"], after["name"]) == (7, "x")
    assert after["tied"][0].data_ptr() == after["tied"][1].data_ptr()
    assert after["transposed"].stride() == content["transposed"].stride()
    for name in ("0.bias", "1.weight", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(after["model"][name], content["model"][name])
    for S in (after["model"]["0.weight"], after["tied"][0], after["transposed"]):
        assert float(wc.condition_number(S)) <= 10.0
    assert torch.equal(torch.load(path)["tied"][0], shared)  # the input is unchanged


def test_repair_views_in_place(tmp_path: Path) -> None:
    path, fixed = saved(tmp_path, "safetensors"), tmp_path / "fixed.safetensors"
    before = tensors()["experts.weight"]
    report = wc.repair(path, fixed, 2.0, include=["experts.*", "conv*"])
    changed = {repair.label for repair in report.changed}
    after = load_file(fixed)["experts.weight"]
    for index in range(3):
        expected = before[index]
        if f"experts.weight:{index}" in changed:
            expected = wc.nearest(before[index], 2.0)
        torch.testing.assert_close(after[index], expected, rtol=1e-5, atol=1e-6)


def test_repair_copies_entire_directory(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    save_file({"w": torch.diag(torch.tensor([1.0, 1e-3]))}, folder / "a-1.safetensors")
    save_file({"v": torch.eye(2)}, folder / "a-2.safetensors")
    weight_map = {"w": "a-1.safetensors", "v": "a-2.safetensors"}
    (folder / "a.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    wc.repair(folder, tmp_path / "out", 5.0)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        p.name for p in folder.iterdir()
    )
    assert (tmp_path / "out" / "a-2.safetensors").read_bytes() == (
        folder / "a-2.safetensors"
    ).read_bytes()
    assert wc.audit(tmp_path / "out").findings[0].condition_number <= 5.0
    # The path of the index copies its shards and no other file.
    wc.repair(folder / "a.safetensors.index.json", tmp_path / "shards", 5.0)
    assert {p.name for p in (tmp_path / "shards").iterdir()} == {
        "a.safetensors.index.json",
        "a-1.safetensors",
        "a-2.safetensors",
    }


def test_repair_never_overwrites_or_leaves_partial_output(tmp_path: Path) -> None:
    path = saved(tmp_path, "pt", {"w": torch.tensor([[1.0, 0.0], [0.0, 1e-3]])})
    taken = tmp_path / "taken.pt"
    taken.write_text("precious")
    with pytest.raises(FileExistsError, match="not overwritten"):
        wc.repair(path, taken, 2.0)
    assert taken.read_text() == "precious"
    bad = {"good": torch.eye(2), "bad": torch.tensor([[1.0, float("nan")]])}
    bad["tight"] = torch.randn(64, 64).bfloat16()
    torch.save(bad, path)
    with pytest.raises(ValueError, match=r"bad contains NaN.*tight.*rounded to bfloat16"):
        wc.repair(path, tmp_path / "out.pt", 1.001)
    assert {p.name for p in tmp_path.iterdir()} == {"model.pt", "taken.pt"}


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("inside", ["fixed", "deep/er/fixed", "../in/fixed", "link/fixed"])
def test_repair_refuses_output_inside_copied_directory(tmp_path: Path, inside: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    saved(folder, "pt", {"w": torch.diag(torch.tensor([1.0, 1e-3]))})
    (folder / "link").symlink_to(folder)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"must be outside the directory .* a path next to"):
        wc.repair(folder, folder / inside, 5.0)
    with pytest.raises(ValueError, match="must be outside"):
        wc.repair(folder / "link", folder / inside, 5.0)
    assert tree(tmp_path) == before


def test_repair_refuses_output_inside_linked_directory(tmp_path: Path) -> None:
    """A repair also copies the target of a link in the directory."""
    folder, other = tmp_path / "in", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    saved(folder, "pt", {"w": torch.diag(torch.tensor([1.0, 1e-3]))})
    (other / "notes").write_text("kept")
    (folder / "logs").symlink_to(other)
    with pytest.raises(ValueError, match="must be outside"):
        wc.repair(folder, other / "fixed", 5.0)
    wc.repair(folder, tmp_path / "fixed", 5.0)
    assert tree(tmp_path / "fixed") == {"model.pt", "logs", "logs/notes"}
    (folder / "model.pt").rename(folder / "moved.pt")
    # The output for a single file can be in the same folder.
    wc.repair(folder / "moved.pt", folder / "fixed.pt", 5.0)


@pytest.mark.parametrize("out", ["file/out.pt", "file/deep/out.pt"])
def test_repair_refuses_output_below_file(tmp_path: Path, out: str) -> None:
    path = saved(tmp_path, "pt", {"w": torch.eye(2)})
    (tmp_path / "file").write_text("precious")
    with pytest.raises(NotADirectoryError, match=r"`path_out` must be in a directory.*another"):
        wc.repair(path, tmp_path / out, 5.0)
    assert tree(tmp_path) == {"model.pt", "file"}


def test_refused_repair_creates_no_directory(tmp_path: Path) -> None:
    path = saved(tmp_path, "pt", {"w": torch.tensor([[1.0, float("nan")]])})
    with pytest.raises(ValueError, match="nothing was written"):
        wc.repair(path, tmp_path / "new" / "er" / "out.pt", 5.0)
    assert tree(tmp_path) == {"model.pt"}
    path = saved(tmp_path, "pt", {"w": torch.eye(2)})
    wc.repair(path, tmp_path / "new" / "er" / "out.pt", 5.0)
    assert tree(tmp_path / "new") == {"er", "er/out.pt"}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("scale", [1e-310, 1e-180, 1e-30, 1e30, 1e180, 1e308])
def test_repair_independent_of_scale(tmp_path: Path, kind: str, scale: float) -> None:
    """The square of 1e-180 underflows to zero, and that of 1e180 overflows."""
    S = torch.tensor([[1.0, 0.3], [0.0, 0.1]], dtype=torch.float64) * scale
    path, fixed = saved(tmp_path, kind, {"w": S}), tmp_path / f"fixed.{kind}"
    (repair,) = wc.repair(path, fixed, 2.0).repairs
    (read,) = Checkpoint(fixed).matrices()
    X = read.read()
    assert float(wc.condition_number(X)) <= 2.0
    moved = torch.linalg.vector_norm(X / scale - S / scale) / torch.linalg.vector_norm(S / scale)
    assert repair.relative_change == pytest.approx(float(moved), rel=1e-6)
    assert repair.relative_change > 0.1


@pytest.mark.parametrize("kind", FORMATS)
def test_default_device_has_no_effect(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path, kind)
    wc.repair(path, tmp_path / f"expected.{kind}", 3.0)
    expected = wc.audit(path, certify=True)
    with torch.device("meta"):
        assert torch.empty(1).device.type == "meta"
        report = wc.audit(path, certify=True)
        wc.repair(path, tmp_path / f"found.{kind}", 3.0)
    assert report.to_json() == expected.to_json()
    files = [Checkpoint(tmp_path / f"{name}.{kind}") for name in ("found", "expected")]
    for one, other in zip(*(file.matrices() for file in files), strict=True):
        assert one.name == other.name
        assert torch.equal(one.read(), other.read())


def test_repair_zero_and_rank_deficient_weights(tmp_path: Path) -> None:
    path = saved(tmp_path, "pt", {"zero": torch.zeros(3, 3), "flat": torch.ones(3, 3)})
    zero, flat = wc.repair(path, tmp_path / "out.pt", 4.0).repairs
    assert "zero" in zero.note
    assert zero.relative_change == 0
    assert flat.before == float("inf")
    assert flat.after <= 4.0
    assert flat.relative_change > 0


@pytest.mark.skipif(not NESTED, reason="torch.load of this torch refuses nested tensors")
def test_nested_tensors_are_skipped(tmp_path: Path) -> None:
    rows = [torch.ones(2, 3), torch.ones(4, 3)]
    nested = {layout: torch.nested.nested_tensor(rows, layout=layout) for layout in LAYOUTS}
    content = {"w": torch.eye(3), **{str(layout): each for layout, each in nested.items()}}
    torch.save(content, tmp_path / "a.pt")
    skipped = {str(layout): Skipped(Reason.not_dense, "nested") for layout in LAYOUTS}
    assert wc.audit(tmp_path / "a.pt").coverage.skipped == skipped
    wc.repair(tmp_path / "a.pt", tmp_path / "b.pt", 3.0)
    assert torch.load(tmp_path / "b.pt")[str(torch.jagged)].is_nested


LAYOUTS = (torch.strided, torch.jagged)


def test_config_defines_views_and_invalid_config_ignored(tmp_path: Path) -> None:
    content = {"a.query_key_value.weight": torch.randn(20, 12), "a.dense.weight": torch.eye(12)}
    torch.save(content, tmp_path / "model.pt")

    def views() -> set[str]:
        return {f.view for f in wc.audit(tmp_path).findings if "query" in f.name}

    said = '{"multi_query": true, "text_config": {"num_heads": 3}}'
    assert views() == {""}
    (tmp_path / "config.json").write_text(said)
    assert Checkpoint(tmp_path).beside("config.json")["multi_query"] is True
    assert views() == {"q", "k", "v"}
    for bad in ("[" * 100_000, "[1]", said[:-1], '{"multi_query": "' + "x" * (1 << 20) + '"}'):
        (tmp_path / "config.json").write_text(bad)
        assert Checkpoint(tmp_path).beside("config.json") == {}
        assert views() == {""}
    deep = '{"a_config": ' * 300 + "{}" + "}" * 300
    (tmp_path / "config.json").write_text(deep)
    assert views() == {""}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    assert Checkpoint(tmp_path / "model.pt").beside("config.json") == {}


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_git_lfs_pointer_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 132735\n")
    with pytest.raises(ValueError, match=r"is a Git LFS pointer.*`git lfs pull`"):
        wc.audit(path)
    torch.save({"weight": torch.eye(3)}, tmp_path / "other.pt")
    report = wc.audit(tmp_path)
    assert {finding.name: finding.measured for finding in report.findings} == {
        name: False,
        "weight": True,
    }


@pytest.mark.parametrize("scales", [{}, {"b.SCB": torch.ones(7)}], ids=["alone", "with scales"])
def test_quantised_weight_counts_as_not_measured(scales: dict[str, Tensor], tmp_path: Path) -> None:
    """Otherwise a file that is mostly quantised would have full coverage."""
    codes = torch.ones(8, 9, dtype=torch.int8)
    save_file(
        {"a.weight": torch.eye(8, 3).contiguous(), "b.weight": codes} | scales,
        tmp_path / "model.safetensors",
    )
    share = wc.audit(tmp_path / "model.safetensors").coverage.parameter_share
    others = sum(tensor.numel() for tensor in scales.values())
    assert share == pytest.approx(24 / (24 + 72 + others))


def test_positions_and_masks_are_not_parameters(tmp_path: Path) -> None:
    buffers = {"ids": torch.arange(12), "attn.bias": torch.ones(9, 9, dtype=torch.uint8)}
    torch.save({"a.weight": torch.eye(8, 3)} | buffers, tmp_path / "model.pt")
    assert wc.audit(tmp_path / "model.pt").coverage.parameter_share == 1


def test_header_length_with_zip_signature_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a.weight": torch.eye(3)}, path)
    content = path.read_bytes()
    length = int.from_bytes(b"PK\0\0\0\0\0\0", "little")
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    rest = content[8 + len(header) :]
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + rest)
    assert wc.audit(path).findings[0].condition_number == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.pt", b"", "it is empty"),
        ("a.pt", b"not a checkpoint", "its name may have the wrong ending"),
        ("a.pt", b"x\x00\x00\x00\x00\x00\x00\x00{}", "its name may have the wrong ending"),
        ("a.pt", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "it contains no complete pickle"),
        ("a.safetensors", b"PK\x03\x04 and so on", "its name ends in .pt"),
        ("a.safetensors", b"no header at all", "It is another kind of file, damaged"),
    ],
)
def test_file_that_is_not_a_checkpoint_is_refused(
    name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        wc.audit(tmp_path / name)


def test_weight_without_values_counts_as_not_measured(tmp_path: Path) -> None:
    absent = torch.empty(4, 4, device="meta")
    content = {"w": torch.eye(3), "absent.weight": absent, "count": absent.int()}
    for beside in ({}, {"config": Path("x")}):  # a file with Python objects is read differently
        torch.save(content | beside, tmp_path / "a.pt")
        coverage = wc.audit(tmp_path / "a.pt").coverage
        assert coverage.skipped["absent.weight"].reason is Reason.no_values
        assert coverage.parameter_share == 9 / (9 + 16)


@pytest.mark.parametrize("index", [True, False])
def test_files_of_other_formats_in_folder_are_listed(tmp_path: Path, index: bool) -> None:
    save_file({"w": torch.eye(3)}, tmp_path / "model.safetensors")
    if index:
        places = {"weight_map": {"w": "model.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(places))
    (tmp_path / "m.onnx").write_bytes(b"x")
    (tmp_path / "README.md").write_text("x")
    report = wc.audit(tmp_path)
    assert [finding.name for finding in report.findings] == ["w"]
    assert report.coverage.skipped == {
        "m.onnx": Skipped(Reason.unread, "an ONNX model: give its path")
    }


def language_model(
    folder: Path, *, index: bool = True, head: bool = False, **config: object
) -> Path:
    content = {"model.embed_tokens.weight": torch.randn(9, 4), "model.q.weight": torch.randn(4, 4)}
    content |= {"lm_head.weight": torch.randn(9, 4)} if head else {}
    shard = "model-00001-of-00001.safetensors" if index else "model.safetensors"
    save_file(content, folder / shard)
    if index:
        places = {"weight_map": dict.fromkeys(content, shard)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(places))
    plain = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False} | config
    (folder / "config.json").write_text(json.dumps(plain))
    return folder / shard


@pytest.mark.parametrize("index", [True, False])
def test_missing_head_is_reported(tmp_path: Path, index: bool) -> None:
    language_model(tmp_path, index=index)
    skipped = wc.audit(tmp_path).coverage.skipped
    assert skipped["lm_head.weight"] == Skipped(Reason.missing)


@pytest.mark.parametrize(
    "config",
    [
        {"head": True},
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": None},
        {"architectures": ["LlamaModel"]},
        {"architectures": None},
        {"architectures": "LlamaForCausalLM"},
    ],
    ids=str,
)
def test_present_tied_or_unneeded_head_is_not_missing(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    language_model(tmp_path, **config)
    assert Reason.missing not in {
        why.reason for why in wc.audit(tmp_path).coverage.skipped.values()
    }


def test_single_shard_and_adapter_do_not_lack_head(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    shard = language_model(tmp_path)
    assert "lm_head.weight" not in wc.audit(shard).coverage.skipped
    name = "base_model.model.q"
    pair = {f"{name}.lora_A.weight": torch.randn(2, 4), f"{name}.lora_B.weight": torch.randn(4, 2)}
    save_file(pair, tmp_path / "adapter" / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(plain))
    (tmp_path / "adapter" / "config.json").write_text((tmp_path / "config.json").read_text())
    assert "lm_head.weight" not in wc.audit(tmp_path / "adapter").coverage.skipped
