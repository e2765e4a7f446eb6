"""Slices of a tensor are joined if they tile it; otherwise they are not measured."""

import itertools
import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import wellcond as wc
from wellcond.files.checkpoint import Checkpoint
from wellcond.files.joined import explain_misfit
from wellcond.files.slices import saved_offsets
from wellcond.files.tensors import UnreadableError
from wellcond.weights.reasons import Reason

SHARDS = ("shard-00001-model-00001-of-00001", "shard-00002-model-00001-of-00001")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of the slices, next to which a test may write a copy."""
    made = tmp_path / "slices"
    made.mkdir()
    return made


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def shard(path: Path, offsets: dict[str, list[int]], **tensors: Tensor) -> None:
    """Writes the shards of one process like torch."""
    info = json.dumps({name: {"saved_offsets": at} for name, at in offsets.items()})
    metadata = {"format": "pt", "DCP_VERSION": "1.0", "DCP_SHARDING_INFO": info}
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata=metadata)


def two_shards(folder: Path, W: Tensor, dim: int = 0) -> Path:
    first, second = W.chunk(2, dim)
    at = [0] * W.ndim
    at[dim] = first.shape[dim]
    for file, half, offsets in zip(SHARDS, (first, second), ([0] * W.ndim, at), strict=True):
        shard(folder / f"{file}.safetensors", {"w": offsets}, w=half)
    return folder


def grid(W: Tensor, *cuts: list[int]) -> dict[tuple[int, ...], Tensor]:
    """Returns the slices of W by their offsets, with its dimensions cut into these lengths."""
    ends = [list(itertools.accumulate(lengths, initial=0)) for lengths in cuts]
    rest = W.ndim - len(cuts)
    found = {}
    for part in itertools.product(*(range(len(lengths)) for lengths in cuts)):
        box = tuple(slice(e[k], e[k + 1]) for e, k in zip(ends, part, strict=True))
        found[(*(side.start for side in box), *(0,) * rest)] = W[box]
    return found


def shards(folder: Path, slices: Iterable[tuple[tuple[int, ...], Tensor]], name: str = "w") -> Path:
    """Writes one file per slice."""
    for number, (at, part) in enumerate(slices, 1):
        file = f"shard-{number:05}-model-00001-of-00001.safetensors"
        shard(folder / file, {name: list(at)}, **{name: part})
    return folder


def loaded(folder: Path, like: Tensor, name: str = "w") -> Tensor:
    """Loads the joined slices with torch."""
    whole = {name: torch.empty_like(like)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a load without a process group
        dcp.load(whole, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    return whole[name]


def read(folder: Path, name: str = "w") -> Tensor:
    holder, entry = Checkpoint(folder).where[name]
    assert entry.offsets is None
    return holder.read(entry.name)


CUTS = {
    "rows": (drawn(8, 6), [4, 4]),
    "uneven rows": (drawn(7, 6), [3, 3, 1]),
    "columns": (drawn(4, 7), [4], [3, 4]),
    "both": (drawn(7, 5), [2, 5], [1, 1, 3]),
    "a vector": (drawn(5), [3, 2]),
    "the inside of a stack": (drawn(3, 4, 5), [3], [1, 3], [2, 3]),
    "codes": (torch.arange(12, dtype=torch.int8).reshape(6, 2), [3, 3]),
    "bfloat16": (drawn(6, 3).bfloat16(), [1, 5]),
}


@pytest.mark.parametrize("cut", CUTS)
def test_slices_joined_like_torch(tmp_path: Path, cut: str) -> None:
    W, *cuts = CUTS[cut]
    shards(tmp_path, grid(W, *cuts).items())
    assert torch.equal(read(tmp_path), W)
    assert torch.equal(loaded(tmp_path, W), W)
    holder, entry = Checkpoint(tmp_path).where["w"]
    assert (entry.shape, entry.dtype) == (tuple(W.shape), str(W.dtype).removeprefix("torch."))
    assert torch.equal(holder.first_row("w"), W.flatten()[: W.shape[-1]])
    for start, stop in itertools.combinations(range(len(W) + 1), 2):
        assert torch.equal(holder.read("w", (start, stop)), W[start:stop])
    pieces = torch.cat([piece.flatten() for piece in holder.pieces("w")] or [W.flatten()])
    assert torch.equal(pieces.sort().values, W.flatten().sort().values)


def test_joined_slices_measured_as_one_weight(tmp_path: Path) -> None:
    W = drawn(8, 6)
    two_shards(tmp_path, W)
    save_file({"other.weight": drawn(3, 3)}, tmp_path / "z.safetensors")
    report = wc.audit(tmp_path)
    assert {f.name: f.shape for f in report.findings} == {"w": (8, 6), "other.weight": (3, 3)}
    kappa = {f.name: f.condition_number for f in report.findings}["w"]
    assert kappa == pytest.approx(float(wc.condition_number(W)))
    assert report.coverage.parameter_share == 1.0
    assert not report.coverage.skipped


def test_slices_of_quantised_weight_are_joined(tmp_path: Path) -> None:
    codes, scales = drawn(8, 6).to(torch.float8_e4m3fn), drawn(8, 1)
    for file, rows in zip(SHARDS, (slice(0, 5), slice(5, 8)), strict=True):
        at = [rows.start, 0]
        shard(
            tmp_path / f"{file}.safetensors",
            {"w": at, "w_scale": at},
            **{"w": codes[rows], "w_scale": scales[rows]},
        )
    (finding,) = wc.audit(tmp_path).findings
    W = codes.float() * scales
    assert finding.condition_number == pytest.approx(float(wc.condition_number(W)), rel=1e-5)
    assert finding.parts == ("w", "w_scale")


def test_bias_is_joined(folder: Path, tmp_path: Path) -> None:
    """The length of the bias shows that the weight belongs to a 1D convolution."""
    W, b = drawn(4, 3, 2), drawn(4)
    for file, rows in zip(SHARDS, (slice(0, 2), slice(2, 4)), strict=True):
        at = {"c.weight": [rows.start, 0, 0], "c.bias": [rows.start]}
        shard(folder / f"{file}.safetensors", at, **{"c.weight": W[rows], "c.bias": b[rows]})
    save_file({"c.weight": W, "c.bias": b}, tmp_path / "whole.safetensors")
    joined, whole = wc.audit(folder), wc.audit(tmp_path / "whole.safetensors")
    assert joined.findings == whole.findings
    assert joined.coverage.skipped == whole.coverage.skipped
    assert torch.equal(read(folder, "c.bias"), b)


def test_copies_of_slice_count_once_and_must_agree(folder: Path, tmp_path: Path) -> None:
    W = drawn(6, 4)
    parts = [*grid(W, [3, 3]).items()]
    shards(folder, [*parts, *parts])
    assert torch.equal(read(folder), W)
    assert wc.audit(folder).coverage.parameter_share == 1.0
    assert sum(Checkpoint(folder).sizes.values()) == 24
    wc.repair(folder, tmp_path / "fixed", 1.5)
    fixed = [load_file(file)["w"] for file in sorted((tmp_path / "fixed").iterdir())]
    assert torch.equal(fixed[0], fixed[2])
    assert torch.equal(fixed[1], fixed[3])
    shards(folder, [*parts, parts[0], (parts[1][0], parts[1][1] + 1)])
    match = r"must contain the same values of w at \(3, 0\), but contain different ones"
    with pytest.raises(ValueError, match=match):
        wc.audit(folder)
    with pytest.raises(UnreadableError, match=match):
        wc.repair(folder, tmp_path / "again", 1.5)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("cut", ["rows", "uneven rows", "columns", "both", "bfloat16"])
def test_repair_writes_each_slice(folder: Path, tmp_path: Path, cut: str) -> None:
    W, *cuts = CUTS[cut]
    target = tmp_path / "fixed"
    shards(folder, grid(W, *cuts).items())
    report = wc.repair(folder, target, 1.5)
    assert [change.name for change in report.changed] == ["w"]
    save_file({"w": W}, tmp_path / "whole.safetensors")
    wc.repair(tmp_path / "whole.safetensors", tmp_path / "one.safetensors", 1.5)
    assert torch.equal(read(target), load_file(tmp_path / "one.safetensors")["w"])
    assert torch.equal(loaded(target, W), read(target))
    for file in folder.iterdir():
        old, new = file.read_bytes(), (target / file.name).read_bytes()
        header = 8 + int.from_bytes(old[:8], "little")
        assert old[:header] == new[:header]


@pytest.mark.parametrize(("kept", "missing"), [([1, 2], (0, 0)), ([0, 2], (2, 0))])
def test_missing_slice_is_named(
    folder: Path, tmp_path: Path, kept: list[int], missing: tuple[int, int]
) -> None:
    parts = [*grid(drawn(6, 4), [2, 2, 2]).items()]
    shards(folder, [parts[n] for n in kept])
    with pytest.raises(ValueError, match="a slice of a tensor") as error:
        wc.audit(folder)
    assert f"no slice contains the entry at {missing}" in str(error.value)
    with pytest.raises(ValueError, match="no slice contains"):
        wc.repair(folder, tmp_path / "fixed", 2.0)


def test_slices_that_do_not_tile_skipped_with_reason(tmp_path: Path) -> None:
    W = drawn(6, 4)
    cases = {
        "several slices contain the entry at (3, 0)": [((0, 0), W[:4]), ((3, 0), W[3:])],
        "different dtypes: float32, float64": [((0, 0), W[:3]), ((3, 0), W[3:].double())],
        "not all have the same number of dimensions": [((0, 0), W[:3]), ((12,), W[3:].flatten())],
        "no slice contains the entry at (3, 2)": [((0, 0), W[:3]), ((3, 0), W[3:, :2])],
        "an entry at (-1, 0), outside of the shape": [((-1, 0), W[:3]), ((2, 0), W[2:])],
        "no slice contains the entry at (3, 0)": [((0, 0), W[:3]), ((10**30, 0), W[3:])],
        "its offsets are unknown": [((0, 0), W[:3]), ((3,), W[3:])],
        "no slice contains the entry at (0, 0, 0)": [((5, 5, 5), W.reshape(2, 3, 4))],
    }
    for number, (why, slices) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        shards(folder, slices)
        save_file({"other": drawn(3, 3)}, folder / "z.safetensors")
        report = wc.audit(folder)
        assert [f.name for f in report.findings] == ["other"]
        skipped = report.coverage.skipped["w"]
        assert skipped.reason is Reason.slice
        assert why in str(skipped)


def test_many_cut_dimensions_are_refused(tmp_path: Path) -> None:
    """A box has 2^60 corners here, which do not fit into memory."""
    shape = (1,) * 60
    shards(tmp_path, [((0,) * 60, drawn(*shape)), ((1,) * 60, drawn(*shape))])
    with pytest.raises(ValueError, match="cut 60 of its dimensions are too many"):
        wc.audit(tmp_path)


boxes = st.integers(1, 4).flatmap(
    lambda d: st.lists(
        st.tuples(
            st.tuples(*[st.integers(-1, 4)] * d),
            st.tuples(*[st.integers(0, 4)] * d),
        ),
        max_size=5,
    ).map(lambda found: (d, found))
)


@given(boxes, st.data())
def test_boxes_tile_tensor_if_each_entry_is_in_one(
    found: tuple[int, list[tuple[tuple[int, ...], tuple[int, ...]]]], data: st.DataObject
) -> None:
    sides, some = found
    shape = data.draw(st.tuples(*[st.integers(1, 4)] * sides))
    if data.draw(st.booleans()):  # a valid tiling, made by repeated cuts
        some = [((0,) * sides, shape)]
        for _ in range(data.draw(st.integers(0, 3))):
            offsets, sizes = some.pop(data.draw(st.integers(0, len(some) - 1)))
            d = data.draw(st.integers(0, sides - 1))
            at = data.draw(st.integers(0, sizes[d]))
            low = (*sizes[:d], at, *sizes[d + 1 :])
            high = (*sizes[:d], sizes[d] - at, *sizes[d + 1 :])
            begin = (*offsets[:d], offsets[d] + at, *offsets[d + 1 :])
            some += [(offsets, low), (begin, high)]
    count = torch.zeros([12] * sides)
    for offsets, sizes in some:
        count[tuple(slice(o + 2, o + 2 + n) for o, n in zip(offsets, sizes, strict=True))] += 1
    count[tuple(slice(2, 2 + n) for n in shape)] -= 1
    why = explain_misfit(some, shape)
    assert (why == "") == (not count.any())
    if why:  # the message names the first entry that is not in exactly one box
        first = tuple(int(n) - 2 for n in count.nonzero()[0])
        assert str(first) in why
        assert ("no slice" in why) == (count[tuple(n + 2 for n in first)] < 0)


def test_index_does_not_make_slice_complete(tmp_path: Path) -> None:
    two_shards(tmp_path, drawn(8, 6))
    shard(tmp_path / "x.safetensors", {}, v=drawn(3, 3))
    for number in (0, 1):
        places = {"w": f"{SHARDS[number]}.safetensors", "v": "x.safetensors"}
        index = json.dumps({"weight_map": places})
        (tmp_path / "model.safetensors.index.json").write_text(index)
        report = wc.audit(tmp_path)
        assert [f.name for f in report.findings] == ["v"]
        assert "must be read with it" in str(report.coverage.skipped["w"])


def test_single_shard_of_several_is_not_measured(tmp_path: Path) -> None:
    """Only the existence of other shards shows that the tensor is incomplete."""
    two_shards(tmp_path, drawn(8, 6))
    first, second = (tmp_path / f"{file}.safetensors" for file in SHARDS)
    with pytest.raises(ValueError, match=r"shard-00002.* must be read with it: give the path"):
        wc.audit(first)
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"shard-00002.* must be read with it"):
        wc.audit(tmp_path)
    second.rename(tmp_path / second.name.replace("00002", "00003"))
    second = two_shards(tmp_path, drawn(8, 6)) / second.name
    second.unlink()
    (tmp_path / second.name.replace("00002", "00003")).unlink()
    assert wc.audit(first).coverage.measured == 1  # nothing shows that shards are missing


@pytest.mark.parametrize("numbers", [(1, 3), (2, 3), (1, 10**200)])
def test_gap_in_process_numbers_is_reported(tmp_path: Path, numbers: tuple[int, int]) -> None:
    W = drawn(8, 6)
    for number, (at, part) in zip(numbers, grid(W, [4, 4]).items(), strict=True):
        shard(tmp_path / f"shard-{number:05}-a.safetensors", {"w": list(at)}, w=part)
    with pytest.raises(ValueError, match=r"only 2 of \d+ processes have a file"):
        wc.audit(tmp_path)


def test_ranks_are_counted_from_zero(tmp_path: Path) -> None:
    for number, (at, part) in enumerate(grid(drawn(8, 6), [4, 4]).items()):
        shard(tmp_path / f"model_rank_{number}.safetensors", {"w": list(at)}, w=part)
    assert wc.audit(tmp_path).coverage.measured == 1
    (tmp_path / "model_rank_0.safetensors").rename(tmp_path / "model_rank_2.safetensors")
    with pytest.raises(ValueError, match="only 2 of 3 processes have a file"):
        wc.audit(tmp_path)


def test_slice_next_to_complete_tensor_is_renamed(tmp_path: Path) -> None:
    two_shards(tmp_path, drawn(8, 6))
    save_file({"w": drawn(3, 3)}, tmp_path / "a.safetensors")
    report = wc.audit(tmp_path)
    assert {f.shape for f in report.findings} == {(8, 6), (3, 3)}
    assert len({f.name for f in report.findings}) == 2
    (tmp_path / f"{SHARDS[0]}.safetensors").unlink()
    report = wc.audit(tmp_path)
    assert [f.shape for f in report.findings] == [(3, 3)]
    assert report.coverage.parameter_share == 9 / (9 + 24)


def test_error_for_included_slice_gives_reason(tmp_path: Path) -> None:
    (two_shards(tmp_path, drawn(8, 6)) / f"{SHARDS[0]}.safetensors").unlink()
    codes = {"q.weight": torch.ones(8, 6), "q.weight_scale": torch.ones(8, 1)}
    save_file({"v": drawn(3, 3), **codes}, tmp_path / "z.safetensors")
    for name, why in (("w", "a slice of a tensor"), ("q.weight", "quantised, and cannot be")):
        with pytest.raises(ValueError, match="matches none") as caught:
            wc.audit(tmp_path, include=[name])
        assert f"{name} is left out: {why}" in str(caught.value)
    with pytest.raises(ValueError, match="matches none") as caught:
        wc.audit(tmp_path, include=["nothing"])
    assert "left out" not in str(caught.value)


def test_single_slice_is_not_repaired(folder: Path, tmp_path: Path) -> None:
    path = two_shards(folder, drawn(8, 6)) / f"{SHARDS[1]}.safetensors"
    for patterns in ((), ("w",)):
        with pytest.raises(ValueError, match=r"slice|matches none"):
            wc.repair(path, tmp_path / "fixed.safetensors", 2.0, include=patterns)
    with pytest.raises(ValueError, match=r"at \(4, 0\)"):
        wc.audit(path)


def test_output_of_torch_writer_is_read(tmp_path: Path) -> None:
    """As the only process, the writer stores complete tensors with offsets."""
    W = drawn(4, 3)
    writer = dcp.HuggingFaceStorageWriter(str(tmp_path / "a"), save_distributed=True)
    joined = dcp.HuggingFaceStorageWriter(
        str(tmp_path / "b"), save_distributed=True, enable_consolidation=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for each in (writer, joined):
            dcp.save({"w": W}, storage_writer=each)
    for folder in ("a", "b"):
        report = wc.audit(tmp_path / folder)
        assert [f.label for f in report.findings] == ["w"]
        assert not report.coverage.skipped
        assert torch.equal(read(tmp_path / folder), W)


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
def test_damaged_offsets_are_not_measured(tmp_path: Path, said: str) -> None:
    assert saved_offsets({"DCP_SHARDING_INFO": said}) is None
    save_file({"w": drawn(4, 3)}, tmp_path / "a.safetensors", {"DCP_SHARDING_INFO": said})
    with pytest.raises(ValueError, match="its offsets are unknown"):
        wc.audit(tmp_path / "a.safetensors")


def test_unlisted_tensor_is_complete(tmp_path: Path) -> None:
    shard(tmp_path / "a.safetensors", {"w": [0, 0]}, w=drawn(4, 3), v=drawn(3, 3))
    assert {f.name for f in wc.audit(tmp_path).findings} == {"v", "w"}
    assert saved_offsets({}) == {}


@pytest.mark.parametrize("unlisted", [0, 1])
def test_slice_unlisted_in_one_file_is_not_measured(tmp_path: Path, unlisted: int) -> None:
    for number in (0, 1):
        offsets = {"w": [2 * number, 0], "v": [2 * number, 0]}
        if number == unlisted:
            del offsets["w"]
        path = tmp_path / f"shard-0000{number + 1}-model-00001-of-00001.safetensors"
        shard(path, offsets, w=drawn(2, 3), v=drawn(2, 4))
    report = wc.audit(tmp_path)
    assert [(f.label, f.shape) for f in report.findings] == [("v", (4, 4))]
    assert "its offsets are unknown" in str(report.coverage.skipped["w"])


@pytest.mark.parametrize(
    "files",
    [
        ("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"),
        ("mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"),
        ("consolidated.00.pth", "consolidated.01.pth"),
        ("model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"),
    ],
)
def test_rank_of_several_contains_slices(tmp_path: Path, files: tuple[str, ...]) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save({"w": drawn(4, 3)}, tmp_path / name)
    with pytest.raises(ValueError, match="join the ranks"):
        wc.audit(tmp_path / files[0])
    (tmp_path / files[1]).unlink()
    if (tmp_path / files[1]).parent != tmp_path:
        (tmp_path / files[1]).parent.rmdir()
    # The only rank contains complete tensors.
    assert wc.audit(tmp_path / files[0]).coverage.measured == 1


@pytest.mark.parametrize(
    "files",
    [
        ("step_1.pt", "step_2.pt"),
        ("mp_rank_00_000.pt", "mp_rank_00_001.pt"),  # pipeline parallelism: complete layers
        ("model-00001-of-00002.safetensors", "other-00002-of-00002.safetensors"),
    ],
)
def test_files_with_equal_names_are_not_always_slices(
    tmp_path: Path, files: tuple[str, ...]
) -> None:
    for name in files:
        content = {"w": drawn(4, 3)}
        if name.endswith("safetensors"):
            save_file(content, tmp_path / name)
        else:
            torch.save(content, tmp_path / name)
    assert wc.audit(tmp_path).coverage.measured == 2


def test_names_repeated_in_shards_without_index_are_slices(tmp_path: Path) -> None:
    for number in (1, 2):
        content = {"w": drawn(4, 3), f"v{number}": drawn(3, 3)}
        save_file(content, tmp_path / f"model-0000{number}-of-00002.safetensors")
    report = wc.audit(tmp_path)
    assert {f.name.rpartition("/")[2] for f in report.findings} == {"v1", "v2"}
    assert report.coverage.skipped["w"].reason is Reason.slice
    assert report.coverage.parameter_share == 18 / 42


def test_flat_parameters_are_named(tmp_path: Path) -> None:
    torch.save({"layer._flat_param": drawn(40), "flat_param": drawn(4, 10)}, tmp_path / "a.pt")
    skipped = Checkpoint(tmp_path / "a.pt").skipped()
    assert {why.reason for why in skipped.values()} == {Reason.flat}


def test_rank_at_end_of_word_is_ignored(tmp_path: Path) -> None:
    """In the name of an adapter, temp_rank_4 is the rank r, not the rank of a process."""
    for rank in (4, 8):
        save_file({"a.weight": torch.randn(4, 4)}, tmp_path / f"temp_rank_{rank}.safetensors")
    assert len(wc.audit(tmp_path / "temp_rank_4.safetensors").findings) == 1
