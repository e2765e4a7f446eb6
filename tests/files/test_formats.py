"""Errors for files and folders of other formats name the format and how to convert it."""

import argparse
import filecmp
import json
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp

import wellcond as wc
from wellcond.cli import main
from wellcond.files.checkpoint import Checkpoint
from wellcond.files.tensors import NoTensorsError, UnreadableError
from wellcond.weights.reasons import Reason, Skipped

# Words that no message about a valid file of another format contains.
UNTRUE = ("damaged", "truncated", "vector", "expected 1", "fetch it again")


def of(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


FILES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a.tflite": (of(b"\x1c\0\0\0TFL3" + bytes(99)), "TensorFlow Lite", "--tflite"),
    "saved_model.pb": (of(b"\x08\x01" + bytes(9)), "TensorFlow graph", "--saved-model"),
    "variables.data-00000-of-00001": (of(bytes(99)), "TensorFlow", "--saved-model FOLDER"),
    "a.mlmodel": (of(b"\x08\x04"), "Core ML", "export"),
    "a.pte": (of(b"\x1c\0\0\0ET12" + bytes(9)), "ExecuTorch", "export"),
}


@pytest.mark.parametrize("name", FILES)
def test_file_of_other_format_is_named(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, what, way_out = FILES[name]
    make(tmp_path / name)
    for target in (tmp_path / name, tmp_path):  # also if it is the only file in a folder
        assert main(["audit", str(target)]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"wellcond: error: {tmp_path / name} must be a checkpoint in")
        assert what in err
        assert way_out in err
        assert not any(word in err for word in UNTRUE)


FOLDERS = {
    "tree/_METADATA": ("Orbax", "PyTreeCheckpointer"),
    "run/100/default/manifest.ocdbt": ("Orbax", "msgpack_serialize"),
    "model/saved_model.pb": ("TensorFlow graph", "--saved-model"),
    "a.mlpackage/Data/com.apple.CoreML/weights/weight.bin": ("Core ML", "get_weights_metadata"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_of_other_format_is_named(tmp_path: Path, name: str) -> None:
    what, way_out = FOLDERS[name]
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(b"\x08\x01" + bytes(9))
    with pytest.raises(UnreadableError, match=f"{what}.*{way_out}"):
        wc.audit(tmp_path / Path(name).parts[0])


def test_core_ml_weights_not_reported_as_damaged_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "weight.bin"
    path.write_bytes(bytes([1, 0, 0, 0, 2]) + bytes(59) + b"\xef\xbe\xad\xde" + bytes(60))
    with pytest.raises(UnreadableError, match="is the weights of a Core ML package"):
        wc.audit(path)
    path.write_bytes(b"PK\x03\x04" + bytes(99))  # its name does not tell the format
    with pytest.raises(UnreadableError, match=r"is not a valid torch\.save file"):
        wc.audit(path)


@pytest.mark.parametrize("protocol", [2, 5])
def test_pickle_recognised_under_any_name(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "stats.pkl"
    path.write_bytes(pickle.dumps({"mean": 0.5}, protocol))
    with pytest.raises(UnreadableError, match=r"a pickle that torch\.save did not write"):
        wc.audit(path)
    saved = {"w": torch.diag(torch.tensor([9.0, 1.0]))}
    for as_archive in (True, False):
        torch.save(
            saved,
            path,
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=as_archive,
        )
        assert kappas(path) == {"w": 9.0}


@pytest.mark.parametrize("ending", [".pt", ".bin", ".safetensors", ".ckpt", ""])
@pytest.mark.parametrize("name", ["a.tflite"])
def test_format_recognised_by_content_not_name(tmp_path: Path, name: str, ending: str) -> None:
    make, what, _ = FILES[name]
    make(tmp_path / name)
    (tmp_path / name).rename(tmp_path / f"renamed{ending}")
    with pytest.raises(UnreadableError, match=what):
        wc.audit(tmp_path / f"renamed{ending}")


@pytest.mark.parametrize("ending", [".pt", ".bin", ".safetensors", ".ckpt", ""])
@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
def test_supported_format_read_under_any_name(tmp_path: Path, name: str, ending: str) -> None:
    W = np.diag([9.0, 1.0])
    np.savez(tmp_path / name, w=W) if name == "a.npz" else np.save(tmp_path / name, W)
    (tmp_path / name).rename(tmp_path / f"w{ending}")
    assert kappas(tmp_path / f"w{ending}") == {"w": 9.0}


@pytest.mark.parametrize(
    "ending",
    [".safetensors", ".pt", ".bin", ".gguf", ".npz", ".npy", ".onnx", ".h5", ".pt2", ".jit", ""],
)
@pytest.mark.parametrize("kind", ["safetensors", "torch.save", "legacy"])
def test_weights_read_and_repaired_under_any_name(tmp_path: Path, kind: str, ending: str) -> None:
    path, state = tmp_path / f"w{ending}", {"w": torch.diag(torch.tensor([9.0, 1.0]))}
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "torch.save")
    assert kappas(path) == {"w": 9.0}
    right, wrong = (".safetensors", ".pt")[:: 1 if kind == "safetensors" else -1]
    with pytest.raises(ValueError, match=f"Choose fixed\\{right if ending == wrong else '.'}"):
        wc.repair(path, tmp_path / f"fixed{wrong}", 2.0)
    wc.repair(path, tmp_path / f"fixed{right}", 2.0)
    read = load_file if kind == "safetensors" else torch.load
    assert wc.condition_number(read(tmp_path / f"fixed{right}")["w"]) <= 2.0


def test_truncated_safetensors_file_described_by_content(tmp_path: Path) -> None:
    save_file({"w": torch.eye(9)}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[:-9])
    with pytest.raises(UnreadableError, match="is not a valid safetensors file: it must contain"):
        wc.audit(tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes(whole[:20])  # the header is not complete
    with pytest.raises(UnreadableError, match="its name may have the wrong ending"):
        wc.audit(tmp_path / "a.pt")


@pytest.fixture
def distributed(tmp_path: Path) -> Path:
    folder = tmp_path / "step-5"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no process group
        dcp.save({"w": torch.diag(torch.tensor([9.0, 1.0]))}, checkpoint_id=folder)
    return folder


def kappas(path: Path) -> dict[str, float]:
    return {finding.name: finding.condition_number for finding in wc.audit(path).findings}


def test_distributed_checkpoint_read_by_folder(tmp_path: Path, distributed: Path) -> None:
    for path in (distributed, distributed / ".metadata", tmp_path):
        assert kappas(path) == {"w": 9.0}
    (part,) = distributed.glob("*.distcp")
    match = r"a shard of torch\.distributed\.checkpoint\. Give the path of its folder, which"
    with pytest.raises(UnreadableError, match=match):
        wc.audit(part)
    (distributed / ".metadata").unlink()
    for path in (distributed, tmp_path):
        with pytest.raises(UnreadableError, match=match):
            wc.audit(path)


def test_weights_next_to_distributed_checkpoint_are_read(distributed: Path) -> None:
    save_file({"w": torch.eye(3)}, distributed / "model.safetensors")
    assert kappas(distributed) == {".metadata/w": 9.0, "model.safetensors/w": 1.0}


def test_lightning_trainer_state_is_skipped(distributed: Path) -> None:
    torch.save({"epoch": 1, "pytorch-lightning_version": "2.6"}, distributed / "meta.pt")
    report = wc.audit(distributed)
    assert [f.name for f in report.findings] == ["w"]
    assert report.coverage.skipped == {"meta.pt": Skipped(Reason.no_tensors)}


def test_subfolder_with_weights_is_found(tmp_path: Path, distributed: Path) -> None:
    """FSDP with sharded states writes the weights into a separate folder."""
    torch.save({"last_epoch": 1}, tmp_path / "scheduler.pt")
    assert kappas(tmp_path) == {"w": 9.0}
    torch.save({"cpu": torch.get_rng_state()}, tmp_path / "rng_state.pth")
    shutil.copytree(distributed, tmp_path / "optimizer_0")
    (tmp_path / "config.json").write_text("{}")
    assert kappas(tmp_path) == {"w": 9.0}
    target = tmp_path.with_name(f"{tmp_path.name}-fixed")
    wc.repair(tmp_path, target, 2.0)
    names = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    assert {path.relative_to(target) for path in target.rglob("*")} == names
    for path in names:
        same = (tmp_path / path).is_dir() or filecmp.cmp(tmp_path / path, target / path, False)
        assert same == (path != Path("step-5", "__0_0.distcp"))
    assert kappas(target)["w"] <= 2.0
    shutil.copytree(distributed, tmp_path / "step-6")
    match = (
        r"must contain one checkpoint, but contains several: step-5, step-6\. Give the path of one"
    )
    with pytest.raises(UnreadableError, match=match):
        wc.audit(tmp_path)
    save_file({"v": torch.eye(3)}, tmp_path / "model.safetensors")
    assert kappas(tmp_path) == {"v": 1.0}  # the folder contains weights itself


def test_unreadable_subfolder_is_ignored(tmp_path: Path, distributed: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    assert kappas(tmp_path) == {"w": 9.0}


def test_megatron_checkpoint_is_named(tmp_path: Path, distributed: Path) -> None:
    settings = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (distributed / "metadata.json").write_text(json.dumps(settings))
    torch.save({"args": argparse.Namespace(layers=2)}, distributed / "common.pt")
    for path in (distributed, tmp_path):
        with pytest.raises(ValueError, match="a Megatron Core checkpoint, which stacks layers"):
            wc.audit(path)


class LossScaler:
    """A class in the optimizer states of DeepSpeed."""


def deepspeed(folder: Path, stage: int) -> Path:
    """Writes a folder like DeepSpeed."""
    step = folder / "global_step1"
    step.mkdir(parents=True)
    (folder / "latest").write_text("global_step1")
    (folder / "zero_to_fp32.py").write_text("")
    W = torch.diag(torch.tensor([9.0, 1.0]))
    shapes = [{"0.weight": W.shape, "0.bias": torch.Size([2])}]
    states = "mp_rank_00_model_states.pt"
    if stage == 3:
        empty = {"0.weight": torch.empty(0), "0.bias": torch.empty(0)}
        model = {"module": empty, "param_shapes": shapes, "ds_version": "0.19"}
        torch.save(model, step / f"zero_pp_rank_0_{states}")
        flat: dict[str, Any] = {"fp32_flat_groups": [torch.ones(6)], "optimizer_state_dict": {}}
    else:
        model = {"module": {"0.weight": W, "0.bias": torch.ones(2)}, "param_shapes": shapes}
        torch.save(model, step / states)
        flat = {"single_partition_of_fp32_groups": [torch.full((6,), torch.nan)]}
    flat |= {"zero_stage": stage, "partition_count": 1, "loss_scaler": LossScaler()}
    optimizer = {"optimizer_state_dict": flat, "ds_config": {}, "ds_version": "0.19"}
    torch.save(optimizer, step / f"bf16_zero_pp_rank_0_{states.replace('model', 'optim')}")
    return step


def test_deepspeed_stage_2_is_read(tmp_path: Path) -> None:
    step = deepspeed(tmp_path / "run", 2)
    report = wc.audit(step)
    assert [f.condition_number for f in report.findings] == [9.0]
    assert report.not_finite == {}
    (optimizer,) = step.glob("*optim_states.pt")
    name = f"{optimizer.name}/optimizer_state_dict"
    assert report.coverage.skipped[name] == Skipped(Reason.optimizer)
    with pytest.raises(ValueError, match="the state of an optimizer"):
        wc.audit(optimizer)
    above = wc.audit(tmp_path / "run")
    assert above.findings == report.findings
    assert above.coverage.skipped.keys() == {f"{step.name}/{name}", "module.0.bias"}


DATA = Path(__file__).with_name("data")


def test_deepspeed_data_is_read(tmp_path: Path) -> None:
    """See write_deepspeed.py."""
    expected = load_file(DATA / "zero2.safetensors")
    for folder in (DATA / "zero2", DATA / "zero2" / "global_step2"):
        checkpoint = Checkpoint(folder)
        assert set(checkpoint.where) == set(expected)
        for name, tensor in expected.items():
            holder, entry = checkpoint.where[name]
            assert torch.equal(holder.read(entry.name), tensor)
        assert {why.reason for why in checkpoint.others.values()} == {Reason.optimizer}
    for folder in (DATA / "zero3", DATA / "zero3" / "global_step2"):
        with pytest.raises(ValueError, match=r"zero_to_fp32\.py"):
            wc.audit(folder)


@pytest.mark.slow
@pytest.mark.frameworks
def test_deepspeed_output_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    for stage in ("2", "3"):
        command = [sys.executable, DATA.with_name("write_deepspeed.py"), stage, tmp_path]
        subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setattr(sys.modules[__name__], "DATA", tmp_path)
    test_deepspeed_data_is_read(tmp_path)


@pytest.mark.parametrize(
    ("latest", "read"),
    [
        ("global_step2\n", "global_step2"),
        ("global_step3", ""),  # does not exist
        ("", ""),
        ("..", ""),
        ("../other", ""),
        ("{outside}", ""),
        ("global_step1/../../other", ""),
        ("a\0b", ""),
        ("\xff" * 10_000, ""),
        (None, ""),
    ],
)
def test_deepspeed_latest_step_read_and_nothing_outside(
    tmp_path: Path, latest: str | None, read: str
) -> None:
    run, outside = tmp_path / "run", tmp_path / "other"
    step = deepspeed(run, 2)
    shutil.copytree(step, outside)
    shutil.copytree(step, run / "global_step2")
    torch.save({"module": {"w": torch.eye(3)}}, run / "global_step2/mp_rank_00_model_states.pt")
    (run / "latest").unlink()
    if latest is not None:
        (run / "latest").write_text(latest.format(outside=outside), encoding="latin-1")
    if read:
        assert kappas(run) == {"module.w": 1.0}
        return
    with pytest.raises(UnreadableError, match="contains several: global_step1, global_step2"):
        wc.audit(run)
    shutil.rmtree(run / "global_step2")
    assert kappas(run) == {"module.0.weight": 9.0}  # the only step, whatever `latest` contains


def test_repair_deepspeed_folder_in_place(tmp_path: Path) -> None:
    run = tmp_path / "run"
    step = deepspeed(run, 2)
    step.chmod(0o555)
    wc.repair(run, tmp_path / "fixed", 2.0)
    step.chmod(0o755)
    names = {path.relative_to(run) for path in run.rglob("*")}
    assert {
        path.relative_to(tmp_path / "fixed") for path in (tmp_path / "fixed").rglob("*")
    } == names
    states = "global_step1/mp_rank_00_model_states.pt"
    new, old = (torch.load(folder / states) for folder in (tmp_path / "fixed", run))
    assert wc.condition_number(new["module"]["0.weight"]) <= 2.0
    assert torch.equal(new["module"]["0.bias"], old["module"]["0.bias"])
    changed = {
        n
        for n in names
        if (run / n).is_file() and not filecmp.cmp(run / n, tmp_path / "fixed" / n, False)
    }
    assert changed == {Path(states)}


def test_tensor_parallel_ranks_are_not_joined(tmp_path: Path) -> None:
    step = deepspeed(tmp_path / "run", 2)
    states = step / "mp_rank_00_model_states.pt"
    shutil.copy(states, step / "mp_rank_01_model_states.pt")
    for path in (step, tmp_path / "run"):
        with pytest.raises(ValueError, match="join the ranks with the tool that wrote them"):
            wc.audit(path)


def test_deepspeed_stage_3_error_names_converter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = deepspeed(tmp_path / "run", 3)
    (states,) = step.glob("*model_states.pt")
    for path in (tmp_path / "run", step, states):
        assert main(["audit", str(path)]) == 2
        err = capsys.readouterr().err
        assert "zero_to_fp32.py" in err
        assert "not a matrix" not in err.replace("not a matrix that", "")
        assert not any(word in err for word in UNTRUE)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("ending", [".pth.tar", ".pt.tar"])
def test_double_endings_are_read(tmp_path: Path, ending: str, legacy: bool) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    content = {"w": torch.diag(torch.tensor([9.0, 1.0]))}
    for name in ("first", "second"):
        torch.save(content, folder / f"{name}{ending}", _use_new_zipfile_serialization=not legacy)
    assert wc.audit(folder / f"first{ending}").coverage.measured == 1
    names = {finding.name for finding in wc.audit(folder).findings}
    assert names == {f"first{ending}/w", f"second{ending}/w"}
    wc.repair(folder / f"first{ending}", tmp_path / f"fixed{ending}", 2.0)
    assert wc.audit(tmp_path / f"fixed{ending}").findings[0].condition_number <= 2.0
    with pytest.raises(ValueError, match="must end in"):
        wc.repair(folder / f"first{ending}", tmp_path / "fixed.tar.gz", 2.0)


@pytest.mark.parametrize("ending", [".pt", ".bin", ".ckpt", ".zzz"])
def test_other_zip_archive_not_reported_as_damaged(tmp_path: Path, ending: str) -> None:
    """For example, an archive truncated before its pickle was written."""
    path = tmp_path / f"a{ending}"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(3):
            archive.writestr(f"a/data/{number}", "12345678")
    match = r"zip archive without data\.pkl: it contains a/data/0, a/data/1 and 1 more\. If it was"
    with pytest.raises(UnreadableError, match=match):
        wc.audit(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("content", [{"w": torch.eye(3)}, {"w": np.eye(3)}, [1], Path("x")])
def test_foreign_pickle_named_and_not_read(tmp_path: Path, content: Any, protocol: int) -> None:
    with (tmp_path / "a.pt").open("wb") as file:
        pickle.dump(content, file, protocol=protocol)
    with pytest.raises(
        UnreadableError, match=r"a pickle that torch\.save did not write.*torch\.save\("
    ) as error:
        wc.audit(tmp_path / "a.pt")
    assert not any(word in str(error.value) for word in UNTRUE)
    for legacy in (True, False):  # pickles of torch are read with any protocol
        torch.save(
            {"w": torch.eye(3)},
            tmp_path / "b.pt",
            pickle_protocol=protocol,
            _use_new_zipfile_serialization=not legacy,
        )
        assert wc.audit(tmp_path / "b.pt").coverage.measured == 1


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (3, "an int and no tensor. Save a state dict"),
        ([1], "a list and no tensor. Save a state dict"),
        (None, "None and no tensor. Save a state dict"),
        (argparse.Namespace(a=1), "an argparse.Namespace and no tensor. Save"),
        ({"a": np.float64(1)}, "a dict and no tensor; its Python objects are not read"),
        ({}, r"an empty state dict\. The saved model has no parameters"),
        (torch.nn.ReLU().state_dict(), "an empty state dict"),
        ({"epoch": 1, "model": torch.nn.ReLU().state_dict()}, "an empty state dict"),
        ({"state_dict": {}, "pytorch-lightning_version": "2.6"}, "an empty state dict"),
        ({"epoch": 1}, "a dict and no tensor. Save a state dict"),
        (
            {"epoch": 1, "pytorch-lightning_version": "2.6"},
            "a Lightning trainer and no tensor. The w",
        ),
    ],
)
def test_error_for_file_without_tensors_states_content(
    tmp_path: Path, content: Any, found: str
) -> None:
    torch.save(content, tmp_path / "meta.pt")
    with pytest.raises(NoTensorsError, match=found):
        wc.audit(tmp_path / "meta.pt")


def test_listed_reasons_have_no_full_stop(tmp_path: Path) -> None:
    save_file({"v": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "b.bin").write_bytes(b"text")
    (tmp_path / "c.bin").write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError, match=r"has none \(b\.bin.*; c\.bin.*; v: ") as error:
        wc.audit(tmp_path)
    assert ".;" not in str(error.value)
    assert ".)" not in str(error.value)


def test_unknown_files_refused_by_ending(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_bytes(b"text")
    with pytest.raises(UnreadableError, match=r"must end in \.safetensors"):
        wc.audit(tmp_path / "a.xyz")
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(UnreadableError, match="contains none whose name ends in"):
        wc.audit(tmp_path)
