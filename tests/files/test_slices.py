"""What says that it is a slice of a tensor is never measured or repaired as a whole."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor

import wellcond as wc
from wellcond.files.checkpoint import Checkpoint
from wellcond.files.slices import saved_offsets
from wellcond.weights.reasons import Reason

SHARDS = ("shard-00001-model-00001-of-00001", "shard-00002-model-00001-of-00001")


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def shard(path: Path, offsets: dict[str, list[int]], **tensors: Tensor) -> None:
    """A file as the writer of torch makes it of the shards of one process."""
    info = json.dumps({name: {"saved_offsets": at} for name, at in offsets.items()})
    metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": info}
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata=metadata)


def two_shards(folder: Path, W: Tensor) -> Path:
    halves = W.chunk(2)
    for file, half, row in zip(SHARDS, halves, (0, len(halves[0])), strict=True):
        shard(folder / f"{file}.safetensors", {"w": [row, 0]}, w=half)
    return folder


def test_slices_are_one_tensor_that_is_left_out(tmp_path: Path) -> None:
    W = drawn(8, 6)
    two_shards(tmp_path, W)
    save_file({"other.weight": drawn(3, 3)}, tmp_path / "z.safetensors")
    report = wc.audit(tmp_path)
    assert [f.name for f in report.findings] == ["other.weight"]
    assert set(report.coverage.skipped) == {"w"}
    why = report.coverage.skipped["w"]
    assert why.reason is Reason.slice
    assert "at (0, 0), (4, 0)" in str(why)
    assert "HuggingFaceStorageReader" in str(why)
    assert report.coverage.parameter_share == 9 / (9 + 48)
    # The way out that it names joins them.
    whole = {"w": torch.empty(8, 6)}
    (tmp_path / "z.safetensors").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a load without processes
        dcp.load(whole, storage_reader=dcp.HuggingFaceStorageReader(str(tmp_path)))
    assert torch.equal(whole["w"], W)


def test_an_index_does_not_make_a_slice_whole(tmp_path: Path) -> None:
    two_shards(tmp_path, drawn(8, 6))
    shard(tmp_path / "x.safetensors", {}, v=drawn(3, 3))
    places = {"w": f"{SHARDS[1]}.safetensors", "v": "x.safetensors"}
    index = json.dumps({"weight_map": places})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    report = wc.audit(tmp_path)
    assert [f.name for f in report.findings] == ["v"]
    assert "at (4, 0)" in str(report.coverage.skipped["w"])


def test_what_is_asked_for_by_name_and_left_out_is_told_why(tmp_path: Path) -> None:
    two_shards(tmp_path, drawn(8, 6))
    codes = {"q.weight": torch.ones(8, 6), "q.weight_scale": torch.ones(8, 1)}
    save_file({"v": drawn(3, 3), **codes}, tmp_path / "z.safetensors")
    for name, why in (("w", "a slice of a tensor"), ("q.weight", "quantised: dequantise it")):
        with pytest.raises(ValueError, match="matches none") as caught:
            wc.audit(tmp_path, include=[name])
        assert f"{name} is left out: {why}" in str(caught.value)
    with pytest.raises(ValueError, match="matches none") as caught:
        wc.audit(tmp_path, include=["nothing"])
    assert "left out" not in str(caught.value)


@pytest.mark.parametrize("alone", [True, False])
def test_slices_are_not_repaired(tmp_path: Path, alone: bool) -> None:
    two_shards(tmp_path, drawn(8, 6))
    path = tmp_path / f"{SHARDS[1]}.safetensors" if alone else tmp_path
    target = tmp_path.parent / ("fixed.safetensors" if alone else "fixed")
    for patterns in ((), ("w",)):
        with pytest.raises(ValueError, match=r"slice|matches none"):
            wc.repair(path, target, 2.0, include=patterns)
    with pytest.raises(ValueError, match=r"at \(4, 0\)"):
        wc.audit(tmp_path / f"{SHARDS[1]}.safetensors")


def test_the_writer_of_torch_is_known(tmp_path: Path) -> None:
    """Alone, as the only process, it writes whole tensors, and says so of none."""
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path / "a"), save_distributed=True)
    joined = dcp.HuggingFaceStorageWriter(
        str(tmp_path / "b"), save_distributed=True, enable_consolidation=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in (writer, joined):
            dcp.save({"w": drawn(4, 3)}, storage_writer=each)
    with pytest.raises(ValueError, match=r"w: a slice .* at \(0, 0\)"):
        wc.audit(tmp_path / "a")
    report = wc.audit(tmp_path / "b")
    assert [f.label for f in report.findings] == ["w"]
    assert not report.coverage.skipped


@pytest.mark.parametrize(
    "said",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        "[" * 100_000,
        '{"w": 3}',
        '{"w": {"saved_offsets": ["a"]}}',
        '{"w": {"saved_offsets": [1.5, 0]}}',
        json.dumps({"w": {"saved_offsets": [0] * 1000}}),
    ],
)
def test_damaged_offsets_are_no_whole_tensor(tmp_path: Path, said: str) -> None:
    assert saved_offsets({"DCP_SHARDING_INFO": said}) is None
    save_file({"w": drawn(4, 3)}, tmp_path / "a.safetensors", {"DCP_SHARDING_INFO": said})
    with pytest.raises(ValueError, match="its offsets are not known"):
        wc.audit(tmp_path / "a.safetensors")


def test_what_is_not_listed_is_whole(tmp_path: Path) -> None:
    shard(tmp_path / "a.safetensors", {"w": [0, 0]}, w=drawn(4, 3), v=drawn(3, 3))
    assert [f.name for f in wc.audit(tmp_path).findings] == ["v"]
    assert saved_offsets({}) == {}


@pytest.mark.parametrize(
    "files",
    [
        ("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"),
        ("mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"),
        ("consolidated.00.pth", "consolidated.01.pth"),
        ("model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"),
    ],
)
def test_a_rank_of_several_holds_slices(tmp_path: Path, files: tuple[str, ...]) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save({"w": drawn(4, 3)}, tmp_path / name)
    with pytest.raises(ValueError, match="join the ranks"):
        wc.audit(tmp_path / files[0])
    (tmp_path / files[1]).unlink()
    if (tmp_path / files[1]).parent != tmp_path:
        (tmp_path / files[1]).parent.rmdir()
    assert wc.audit(tmp_path / files[0]).coverage.measured == 1  # the only rank has all


@pytest.mark.parametrize(
    "files",
    [
        ("step_1.pt", "step_2.pt"),
        ("mp_rank_00_000.pt", "mp_rank_00_001.pt"),  # of pipeline parallelism: whole layers
        ("model-00001-of-00002.safetensors", "other-00002-of-00002.safetensors"),
    ],
)
def test_files_with_the_same_names_are_not_always_slices(
    tmp_path: Path, files: tuple[str, ...]
) -> None:
    for name in files:
        content = {"w": drawn(4, 3)}
        if name.endswith("safetensors"):
            save_file(content, tmp_path / name)
        else:
            torch.save(content, tmp_path / name)
    assert wc.audit(tmp_path).coverage.measured == 2


def test_shards_without_an_index_that_repeat_a_name_hold_slices(tmp_path: Path) -> None:
    for number in (1, 2):
        content = {"w": drawn(4, 3), f"v{number}": drawn(3, 3)}
        save_file(content, tmp_path / f"model-0000{number}-of-00002.safetensors")
    report = wc.audit(tmp_path)
    assert {f.name.rpartition("/")[2] for f in report.findings} == {"v1", "v2"}
    assert report.coverage.skipped["w"].reason is Reason.slice
    assert report.coverage.parameter_share == 18 / 42


def test_flat_parameters_are_called_that(tmp_path: Path) -> None:
    torch.save({"layer._flat_param": drawn(40), "flat_param": drawn(4, 10)}, tmp_path / "a.pt")
    skipped = Checkpoint(tmp_path / "a.pt").skipped()
    assert {why.reason for why in skipped.values()} == {Reason.flat}


def test_a_rank_is_no_end_of_a_word(tmp_path: Path) -> None:
    """Of an adapter r is the rank: temp_rank_4 is none of two processes."""
    for rank in (4, 8):
        save_file({"a.weight": torch.randn(4, 4)}, tmp_path / f"temp_rank_{rank}.safetensors")
    assert len(wc.audit(tmp_path / "temp_rank_4.safetensors").findings) == 1
