"""Folders of torch.distributed.checkpoint are read as torch loads them, and repaired."""

import inspect
import io
import itertools
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from corpus import CODES, records, zipped
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import wellcond as wc
from processes import mesh, needs_fsdp2_on_the_cpu, run
from wellcond.files.checkpoint import Checkpoint
from wellcond.files.tensors import UnreadableError
from wellcond.weights.reasons import Reason, Skipped

needs_forkserver = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no forkserver")
ALONE = "use_collectives" in inspect.signature(dcp.save).parameters
SAFETENSORS = hasattr(filesystem, "SerializationFormat")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole() -> dict[str, Tensor]:
    """Tensors of every kind, with dimensions that no number of processes divides."""
    return {
        "rows": drawn(5, 3),
        "columns": drawn(3, 5, seed=1),
        "both": drawn(7, 6, seed=2),
        "copied": drawn(4, 4, seed=3),
        "one.row": drawn(1, 4, seed=4),  # one process has no rows of it
        "vector": drawn(7, seed=5),
        "number": torch.tensor(2.5),
        "half": drawn(6, 4, seed=6).bfloat16(),
        "integers": torch.arange(12).reshape(4, 3),
        "kernels": drawn(5, 2, 3, 3, seed=7),
        "last": drawn(4, 3, 2, 2, seed=8).to(memory_format=torch.channels_last),
        "complex": torch.complex(drawn(4, 3, seed=9), drawn(4, 3, seed=10)),
        "codes.narrow": drawn(8, 4, seed=11).to(torch.float8_e4m3fn),
        "mask": drawn(4, 3, seed=12) > 0,
        "transposed": drawn(6, 5, seed=13),
        "empty": torch.empty(0, 3),
    }


# How they are sharded over a 1D and a 2D mesh: an int is the sharded dimension.
CUT: dict[str, tuple[list[int | None], list[int | None]]] = {
    "rows": ([0], [None, 0]),
    "columns": ([1], [1, None]),
    "both": ([0], [0, 1]),
    "copied": ([None], [None, None]),
    "one.row": ([0], [0, 1]),
    "vector": ([0], [0, 0]),
    "half": ([0], [0, 0]),
    "integers": ([0], [1, 0]),
    "kernels": ([1], [0, 1]),
    "complex": ([0], [1, 1]),
    "codes.narrow": ([0], [0, None]),
    "mask": ([0], [0, 0]),
    "transposed": ([0], [1, 0]),
}


def save(state: dict[str, Any], folder: Path | str, **settings: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without a process group, torch warns
        dcp.save(state, checkpoint_id=str(folder), **settings)


def load(folder: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loads tensors of these shapes and dtypes with torch."""
    state = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=str(folder))
    return state


def write_all(folder: Path, sides: int) -> None:
    """Shards the tensors, and saves them in every format, in each process."""
    grid = mesh(*[2] * sides)
    state = {}
    for name, tensor in whole().items():
        if name not in CUT:
            state[name] = tensor
            continue
        placements = [Replicate() if d is None else Shard(d) for d in CUT[name][sides - 1]]
        if name == "transposed":  # each process has contiguous columns
            turned = [Shard(1 - p.dim) if isinstance(p, Shard) else p for p in placements]
            stored = tensor.mT.contiguous()
            state[name] = distribute_tensor(stored, grid, turned, src_data_rank=None).mT
        else:
            state[name] = distribute_tensor(tensor, grid, placements, src_data_rank=None)
    adam = {"state": {"rows": {"exp_avg": state["rows"]}}, "param_groups": [{"lr": 0.1}]}
    save({"model": state, "optim": adam, "epoch": 3}, folder / "nested")
    writer = dcp.FileSystemWriter(folder / "files", single_file_per_rank=False)
    dcp.save(state, storage_writer=writer)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "threads", thread_count=3))
    if ALONE:
        save(state, folder / "alone", use_collectives=False)
    if SAFETENSORS:
        plain = {n: t for n, t in state.items() if t.is_contiguous() and n not in UNKNOWN}
        shards = dcp.HuggingFaceStorageWriter(str(folder / "safetensors"), save_distributed=True)
        dcp.save(plain, storage_writer=shards)


UNKNOWN = ("complex", "codes.narrow", "mask", "empty")  # the writer of safetensors


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run(2, folder, write_all, folder, 1)
    return folder


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    run(4, folder, write_all, folder, 2)
    return folder


def same(one: Tensor, other: Tensor) -> bool:
    """Returns whether dtype, shape and all bits are equal."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    first, second = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(first, second)


def check_entries(checkpoint: Checkpoint, prefix: str, expected: dict[str, Tensor]) -> None:
    """Raises unless all tensors, and rows of them, equal these."""
    assert set(checkpoint.where) == {prefix + name for name in expected}
    for name, tensor in expected.items():
        holder, entry = checkpoint.where[prefix + name]
        assert entry.shape == tuple(tensor.shape)
        assert entry.dtype == str(tensor.dtype).removeprefix("torch.")
        assert same(holder.read(entry.name), tensor)
        if not tensor.numel() or not tensor.ndim:
            continue
        assert same(holder.first_row(entry.name), tensor.flatten()[: tensor.shape[-1]])
        for rows in itertools.combinations(range(len(tensor) + 1), 2):
            assert same(holder.read(entry.name, rows), tensor[slice(*rows)])
        if tensor.is_floating_point():
            pieces = torch.cat([piece.flatten().double() for piece in holder.pieces(entry.name)])
            assert torch.equal(pieces.sort().values, tensor.double().flatten().sort().values)


WAYS = ["nested", "files", "threads", *(["alone"] if ALONE else [])]
WAYS += ["safetensors"] if SAFETENSORS else []
SIZES = ["two", pytest.param("four", marks=pytest.mark.slow)]


@needs_forkserver
@pytest.mark.distributed
@pytest.mark.parametrize("processes", SIZES)
@pytest.mark.parametrize("way", WAYS)
def test_tensors_of_several_processes_are_joined(
    request: pytest.FixtureRequest, processes: str, way: str
) -> None:
    """Covers uneven shards by rows, columns and both, copies, and tensors on one process only."""
    folder = request.getfixturevalue(processes) / way
    checkpoint, expected = Checkpoint(folder), whole()
    if way == "safetensors":
        left_out = (*UNKNOWN, "transposed", "last")
        expected = {name: t for name, t in expected.items() if name not in left_out}
    check_entries(checkpoint, "model." if way == "nested" else "", expected)
    assert checkpoint.others == ({"optim": Skipped(Reason.optimizer)} if way == "nested" else {})
    assert not checkpoint.slices
    if way in ("files", "threads"):
        for name, tensor in load(folder, expected).items():
            assert same(tensor, expected[name])


@needs_forkserver
@pytest.mark.distributed
@pytest.mark.parametrize("processes", SIZES)
@pytest.mark.parametrize("way", ["files", "threads", "nested"])
def test_torch_loads_repaired_checkpoint(
    request: pytest.FixtureRequest, tmp_path: Path, processes: str, way: str
) -> None:
    folder, target = request.getfixturevalue(processes) / way, tmp_path / "fixed"
    check_repair(folder, target, "model." if way == "nested" else "", whole())


def check_repair(folder: Path, target: Path, prefix: str, expected: dict[str, Tensor]) -> None:
    """Raises unless torch loads a repaired copy, in which all other tensors are unchanged."""
    report = wc.repair(folder, target, 1.5)
    changed = {change.name for change in report.changed}
    assert {prefix + name for name in ("rows", "columns", "both", "kernels", "half")} <= changed
    state = {prefix + name: tensor for name, tensor in expected.items()}
    for name, tensor in load(target, state).items():
        assert same(tensor, state[name]) == (name not in changed)
        if name in changed:
            assert (tensor.shape, tensor.dtype) == (state[name].shape, state[name].dtype)
    (finding,) = wc.audit(target, include=[f"{prefix}rows"]).findings
    assert finding.condition_number <= 1.5
    old, new = ((one / ".metadata").read_bytes() for one in (folder, target))
    assert old == new
    assert {path.name for path in folder.iterdir()} == {path.name for path in target.iterdir()}
    for index, place in description(folder).storage_data.items():
        before, after = (stored(one, place) for one in (folder, target))
        assert (before == after) == (index.fqn not in changed)
        assert zipfile.ZipFile(io.BytesIO(after)).testzip() is None
        assert torch.load(io.BytesIO(after), weights_only=True) is not None


def description(folder: Path) -> Metadata:
    with (folder / ".metadata").open("rb") as file:
        found = pickle.load(file)
    assert isinstance(found, Metadata)
    return found


def stored(folder: Path, place: Any) -> bytes:
    data = (folder / place.relative_path).read_bytes()
    return data[place.offset : place.offset + place.length]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x).relu())
        return out


def train_and_save(folder: Path) -> None:
    """FSDP2 over tensor parallelism shards rows twice, in the opposite order."""
    torch.manual_seed(0)
    block, grid = Block(), mesh(2, 2)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(block, grid["inner"], plan)
    fully_shard(block, mesh=grid["outer"])
    optimizer = torch.optim.AdamW(block.parameters())
    block(torch.ones(3, 6)).sum().backward()
    optimizer.step()
    model, optim = get_state_dict(block, optimizer)
    save({"model": model, "optimizer_0": optim}, folder / "saved")
    full = {name: tensor.full_tensor() for name, tensor in model.items()}
    if torch.distributed.get_rank() == 0:
        torch.save(full, folder / "full.pt")


@needs_forkserver
@needs_fsdp2_on_the_cpu
@pytest.mark.slow
@pytest.mark.distributed
def test_weights_of_fsdp_over_tensor_parallelism_are_joined(tmp_path: Path) -> None:
    run(4, tmp_path, train_and_save, tmp_path)
    checkpoint, full = Checkpoint(tmp_path / "saved"), torch.load(tmp_path / "full.pt")
    check_entries(checkpoint, "model.", full)
    assert checkpoint.others == {"optimizer_0": Skipped(Reason.optimizer)}


DATA = Path(__file__).with_name("data")
SCRIPT = Path(__file__).with_name("write_lightning.py")


def check_lightning(folder: Path, tmp_path: Path) -> None:
    """Raises unless the weights equal those gathered from the processes."""
    expected = load_file(folder / "lightning.safetensors")
    checkpoint = Checkpoint(folder / "lightning")
    check_entries(checkpoint, "", expected)
    report = wc.audit(folder / "lightning")
    assert {f.name: f.shape for f in report.findings} == {
        "state_dict.first.weight": (3, 5),
        "state_dict.second.weight": (2, 3),
    }
    assert report.coverage.skipped == {
        "meta.pt": Skipped(Reason.no_tensors),
        "optimizer_0": Skipped(Reason.optimizer),
    }
    wc.repair(folder / "lightning", tmp_path / "fixed", 1.2)
    for name, tensor in load(tmp_path / "fixed", expected).items():
        assert not torch.equal(tensor, expected[name])
        assert wc.condition_number(tensor) <= 1.2
    momentum = {"optimizer_0.state.first.weight.momentum_buffer": torch.empty(3, 5)}
    before, after = (load(one, momentum) for one in (folder / "lightning", tmp_path / "fixed"))
    assert same(*(next(iter(one.values())) for one in (before, after)))


def test_repair_folder_named_like_file(tmp_path: Path) -> None:
    """Lightning gives folders names such as last.ckpt."""
    folder, target = tmp_path / "last.ckpt", tmp_path / "fixed.ckpt"
    shutil.copytree(DATA / "lightning", folder)
    assert wc.repair(folder, target, 1.2).changed
    assert target.is_dir()
    assert all(one.condition_number <= 1.2 for one in wc.audit(target).findings)


def test_lightning_data_is_read(tmp_path: Path) -> None:
    """ModelParallelStrategy saved the data from two processes; see write_lightning.py."""
    check_lightning(DATA, tmp_path)


@pytest.mark.slow
@pytest.mark.frameworks
def test_lightning_output_is_read(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    subprocess.run([sys.executable, SCRIPT, tmp_path], check=True, capture_output=True)
    check_lightning(tmp_path, tmp_path)


# --- one process ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of one process: two matrices, other tensors, and an object that is not a tensor."""
    state = {"a": drawn(4, 3), "b": drawn(3, 3, seed=1), "v": torch.ones(5), "epoch": 3}
    save(state, tmp_path / "saved")
    return tmp_path / "saved"


def part(folder: Path) -> Path:
    return folder / "__0_0.distcp"


def describe(folder: Path, content: Any) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(content))


def written(content: Any, **settings: Any) -> bytes:
    """Returns the output of torch.save."""
    torch.save(content, file := io.BytesIO(), **settings)
    return file.getvalue()


def store(folder: Path, name: str, data: bytes) -> None:
    """Replaces the bytes of the chunk of a tensor."""
    (folder / "x.distcp").write_bytes(data)
    about = description(folder)
    edit(about, name, relative_path="x.distcp", offset=0, length=len(data))
    describe(folder, about)


def cut(folder: Path, name: str, *cuts: tuple[tuple[int, ...], Tensor]) -> None:
    """Stores a tensor in other chunks in a separate file, whether they tile it or not."""
    about, data = description(folder), b""
    one = about.state_dict_metadata[name]
    assert isinstance(one, TensorStorageMetadata)
    for index in [index for index in about.storage_data if index.fqn == name]:
        del about.storage_data[index]
    one.chunks = []
    for offsets, tensor in cuts:
        one.chunks.append(ChunkStorageMetadata(torch.Size(offsets), tensor.shape))
        file = io.BytesIO()
        torch.save(tensor, file)
        place = filesystem._StorageInfo("other.distcp", len(data), len(file.getvalue()))
        about.storage_data[MetadataIndex(name, offsets)] = place
        data += file.getvalue()
    (folder / "other.distcp").write_bytes(data)
    describe(folder, about)


def test_only_weights_of_distributed_checkpoint_are_measured(folder: Path) -> None:
    report = wc.audit(folder)
    assert [f.name for f in report.findings] == ["a", "b"]
    assert report.coverage.skipped == {"v": Skipped(Reason.vector)}
    assert report.coverage.parameter_share == 21 / 26


def test_repair_checkpoint_of_one_process(tmp_path: Path) -> None:
    expected = {**whole(), "transposed": whole()["transposed"].mT.contiguous().mT}
    save(expected, tmp_path / "saved")
    check_entries(Checkpoint(tmp_path / "saved"), "", expected)
    check_repair(tmp_path / "saved", tmp_path / "fixed", "", expected)


def test_chunks_of_any_grid_are_joined_exactly(folder: Path) -> None:
    W = drawn(4, 3)
    cut(folder, "a", ((0, 0), W[:1]), ((1, 0), W[1:, :2].clone()), ((1, 2), W[1:, 2:].clone()))
    holder, _ = Checkpoint(folder).where["a"]
    assert torch.equal(holder.read("a"), W)
    assert torch.equal(load(folder, {"a": W})["a"], W)


MATRIX = drawn(3, 3)
STATES: dict[str, dict[str, Any]] = {
    "optim": {"state": {"w": {"exp_avg": MATRIX}}, "param_groups": [{"lr": 0.1}]},
    "optimizer_0": {"state": {"w": {"exp_avg": MATRIX}}},
    "optimizer": {"state.w.exp_avg": MATRIX, "param_groups.w.lr": 0.1},
    "my_adam": {"state": [{"exp_avg": MATRIX}], "param_groups": [{"lr": 0.1}]},
    "optimizers": {"exp_avg.w": MATRIX},
}


@pytest.mark.parametrize("name", STATES)
def test_optimizer_states_are_skipped(tmp_path: Path, name: str) -> None:
    save({"model": {"state": {"w": MATRIX}}, name: STATES[name]}, tmp_path / "a")
    report = wc.audit(tmp_path / "a")
    assert [f.name for f in report.findings] == ["model.state.w"]
    assert report.coverage.skipped == {name: Skipped(Reason.optimizer)}
    save({name: STATES[name]}, tmp_path / "b")
    with pytest.raises(ValueError, match=f"{name}: the state of an optimizer"):
        wc.audit(tmp_path / "b")


def test_optimizer_state_next_to_weights_is_skipped(
    tmp_path: Path,
) -> None:
    flat = {"state.w.exp_avg": MATRIX, "param_groups.w.lr": 0.1}
    save({"w": MATRIX, "x.weight": MATRIX, **flat}, tmp_path / "a")
    report = wc.audit(tmp_path / "a")
    assert [f.name for f in report.findings] == ["w", "x.weight"]
    assert report.coverage.skipped == {"state": Skipped(Reason.optimizer)}


def test_regularizer_state_is_skipped(tmp_path: Path) -> None:
    layer = nn.Linear(4, 3)
    reg = wc.Regularizer(layer, wc.ConditionPenalty(0.1))
    save({"model": layer.state_dict(), "reg": reg}, tmp_path / "a")
    report = wc.audit(tmp_path / "a")
    assert [f.name for f in report.findings] == ["model.weight"]
    assert report.coverage.skipped["reg.weight"] == Skipped(Reason.regularizer)


def test_checkpoint_without_tensors_is_refused(tmp_path: Path) -> None:
    save({"epoch": 3}, tmp_path / "a")
    with pytest.raises(UnreadableError, match="must describe tensors, but describes none"):
        wc.audit(tmp_path / "a")


@pytest.mark.skipif(not ALONE, reason="this torch has no saving without a coordinator")
def test_contradictory_processes_are_refused(tmp_path: Path) -> None:
    save({"w": MATRIX}, tmp_path / "a", use_collectives=False)
    save({"w": MATRIX + 1}, tmp_path / "b", use_collectives=False)
    (tmp_path / "b" / "__0_0.distcp").rename(tmp_path / "a" / "__1_0.distcp")
    data = (tmp_path / "b" / "__0.metadata").read_bytes()
    other = tmp_path / "a" / "__1.metadata"
    other.write_bytes(data.replace(b"__0_0.distcp", b"__1_0.distcp"))
    with pytest.raises(ValueError, match="must contain the same values of tensor at"):
        wc.audit(tmp_path / "a")
    other.write_bytes(other.read_bytes().replace(b"K\x03K\x03", b"K\x03K\x02"))
    with pytest.raises(UnreadableError, match="processes differ in the shape or the dtype of w"):
        wc.audit(tmp_path / "a")


class Odd(Tensor):
    """A tensor subclass of which only the values are stored."""


FOREIGN: dict[Reason, Callable[[Tensor], Any]] = {
    Reason.tensor_class: lambda W: W.as_subclass(Odd),
    Reason.no_values: lambda W: W.to("meta"),
    Reason.array: lambda W: W.numpy(),
    Reason.not_dense: lambda W: W[:1].expand(4, 3),
}


@pytest.mark.parametrize("reason", FOREIGN)
def test_foreign_chunk_skipped_with_reason(folder: Path, reason: Reason) -> None:
    store(folder, "a", written(FOREIGN[reason](drawn(4, 3))))
    report = wc.audit(folder)
    assert [f.name for f in report.findings] == ["b"]
    assert report.coverage.skipped["a"].reason is reason
    assert len(wc.repair(folder, folder.with_name("fixed"), 1.5).changed) == 1


@pytest.mark.skipif(not SAFETENSORS, reason="this torch has one format")
def test_error_for_safetensors_shards_gives_working_remedy(tmp_path: Path) -> None:
    """torch writes such shards, but does not load them."""
    form = filesystem.SerializationFormat.SAFETENSORS
    state = {"w": drawn(3, 3), "v": drawn(2, 2)}
    folder = tmp_path / "a"
    writer = dcp.FileSystemWriter(folder, serialization_format=form)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=writer)
    with pytest.raises(UnreadableError, match=r"is a safetensors file\. Copy all such files into"):
        wc.audit(folder)
    (tmp_path / "b").mkdir()
    for file in folder.glob("*.distcp"):
        shutil.copy(file, tmp_path / "b" / f"{file.stem}.safetensors")
    assert {f.name for f in wc.audit(tmp_path / "b").findings} == {"w", "v"}


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_folder_changed_while_read_is_refused(folder: Path, name: str) -> None:
    checkpoint = Checkpoint(folder)
    a, _ = checkpoint.matrices()
    with (folder / name).open("ab") as file:
        file.write(b"\0")
    if name != ".metadata":
        with pytest.raises(UnreadableError, match="has changed while it was read"):
            a.read()
    with pytest.raises(UnreadableError, match="has changed while it was read"):
        checkpoint.copy_with(lambda name: None, folder.with_name("copy"))


def test_chunk_read_by_offset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader reads only the requested bytes of a large file."""
    W = drawn(1000, 100)
    cut(folder, "a", ((0, 0), W[:4, :3].clone()))
    save({"w": W}, folder)
    checkpoint, sizes = Checkpoint(folder), []
    read = type(next(iter(checkpoint.files.values())))._read_bytes

    def spy(self: Any, start: int, size: int, name: str) -> bytearray:
        sizes.append(size)
        return read(self, start, size, name)

    monkeypatch.setattr("wellcond.files.tensors.TensorFile._read_bytes", spy)
    holder, _ = checkpoint.where["w"]
    assert torch.equal(holder.read("w", (500, 503)), W[500:503])
    assert torch.equal(holder.first_row("w"), W[0])
    assert sizes == [1200, 400]


# --- damage ---------------------------------------------------------------------------------------


def edit(about: Metadata, name: str, **attributes: Any) -> None:
    """Changes the place of a chunk in the metadata."""
    for index, place in about.storage_data.items():
        if index.fqn == name:
            for key, value in attributes.items():
                setattr(place, key, value)


def of(about: Metadata, name: str) -> TensorStorageMetadata:
    found = about.state_dict_metadata[name]
    assert isinstance(found, TensorStorageMetadata)
    return found


def place(about: Metadata, name: str) -> Any:
    """Returns the place of the only chunk of a tensor."""
    (found,) = [found for index, found in about.storage_data.items() if index.fqn == name]
    return found


def repeat(about: Metadata, name: str) -> None:
    """Also stores the chunk of a tensor under the name of another tensor."""
    about.state_dict_metadata["again"] = of(about, name)
    about.storage_data[MetadataIndex("again", (0, 0))] = place(about, name)


Change = Callable[[Metadata], object]


def chunk(offsets: Any, sizes: Any) -> Change:
    def change(about: Metadata) -> None:
        of(about, "a").chunks = [ChunkStorageMetadata(offsets, sizes)]
        (index,) = [index for index in about.storage_data if index.fqn == "a"]
        object.__setattr__(index, "offset", offsets)
        about.storage_data = dict(about.storage_data.items())  # under its new hash

    return change


def size(*shape: int) -> torch.Size:
    return torch.Size(shape)


def many(about: Metadata) -> None:
    """A shape of a million times a million, in few bytes."""
    of(about, "a").chunks *= 100_000
    about.state_dict_metadata = {str(n): of(about, "a") for n in range(100_000)}


DAMAGE: dict[str, tuple[Change, str]] = {
    "a chunk too short": (lambda m: edit(m, "a", length=700), r"the bytes of a at byte \d"),
    "a chunk too long": (
        lambda m: edit(m, "v", length=9000),
        "must contain .* bytes, but contains",
    ),
    "no length": (lambda m: edit(m, "a", length=0), "of a at byte"),
    "a negative length": (lambda m: edit(m, "a", length=-1), "must have a file and a place"),
    "a huge length": (lambda m: edit(m, "a", length=2**70), "must have a file and a place"),
    "a text as length": (lambda m: edit(m, "a", length="9"), "must have a file and a place"),
    "a negative place": (lambda m: edit(m, "a", offset=-1), "must have a file and a place"),
    "a place beyond the file": (lambda m: edit(m, "a", offset=2**40), "must contain .* bytes"),
    "bytes of another": (lambda m: edit(m, "b", offset=place(m, "a").offset + 9), "share bytes"),
    "the same place twice": (lambda m: repeat(m, "a"), "two chunks share bytes of __0_0.distcp"),
    "a file above": (lambda m: edit(m, "a", relative_path="../x"), r"names \.\./x"),
    "a file anywhere": (lambda m: edit(m, "a", relative_path="/etc/passwd"), "names /etc/passwd"),
    "the folder above": (lambda m: edit(m, "a", relative_path=".."), r"names \.\."),
    "the folder itself": (
        lambda m: edit(m, "a", relative_path="."),
        "must name files in its own folder",
    ),
    "a file below": (
        lambda m: edit(m, "a", relative_path="a/b"),
        "must name files in its own folder",
    ),
    "no file": (lambda m: edit(m, "a", relative_path=""), "must name files in its own folder"),
    "a zero": (lambda m: edit(m, "a", relative_path="a\0b"), r"names a\\x00b"),
    "a file that is not there": (lambda m: edit(m, "a", relative_path="x.distcp"), "Fetch it"),
    "the description": (
        lambda m: edit(m, "a", relative_path=".metadata", offset=0, length=9),
        "tensor",
    ),
    "a number as a file": (lambda m: edit(m, "a", relative_path=3), "a file and a place in it"),
    "compression": (
        lambda m: edit(m, "a", transform_descriptors=["stream.zstd/1"]),
        r"are transformed: stream\.zstd/1\. Load it with",
    ),
    "a gap": (chunk(size(0, 0), size(3, 3)), r"no slice contains the entry at \(3, 0\)"),
    "a chunk elsewhere": (
        chunk(size(1, 0), size(4, 3)),
        r"no slice contains the entry at \(0, 0\)",
    ),
    "a chunk beyond": (chunk(size(0, 0), size(5, 3)), r"\(4, 0\), outside of the shape \(4, 3\)"),
    "a chunk of other sides": (chunk(size(0), size(12)), "a chunk of a must have 2 dimensions"),
    "a huge chunk": (chunk(size(0, 0), (2**62, 2**62)), "must have offsets and sizes"),
    "a negative chunk": (chunk(size(0, 0), (-4, 3)), "must have offsets and sizes"),
    "a chunk of texts": (chunk(size(0, 0), ("4", "3")), "must have offsets and sizes"),
    "a shape of the same size": (
        lambda m: (setattr(of(m, "a"), "size", size(2, 6)), chunk(size(0, 0), size(2, 6))(m)),
        r"a chunk of a must be \(2, 6\) of float32, but is \(4, 3\) of float32",
    ),
    "another dtype": (
        lambda m: setattr(of(m, "a").properties, "dtype", torch.int32),
        r"must be \(4, 3\) of int32, but is \(4, 3\) of float32",
    ),
    "no dtype": (lambda m: setattr(of(m, "a").properties, "dtype", 3), "a shape, a dtype and chu"),
    "no shape": (lambda m: setattr(of(m, "a"), "size", None), "a shape, a dtype and chunks"),
    "a shape of 10^12": (
        lambda m: setattr(of(m, "a"), "size", size(10**6, 10**6)),
        r"do not tile its shape \(1000000, 1000000\)",
    ),
    "no chunks": (
        lambda m: setattr(of(m, "a"), "chunks", []),
        r"no slice contains the entry at \(0, 0\)",
    ),
    "chunks of a text": (lambda m: setattr(of(m, "a"), "chunks", "abc"), "dtype and chunks"),
    "a chunk twice": (lambda m: of(m, "a").chunks.extend(of(m, "a").chunks), "listed, but not"),
    "10^10 chunks": (many, "lists more chunks than the 3 that are stored"),
    "a chunk that is not stored": (
        lambda m: m.storage_data.pop(next(i for i in m.storage_data if i.fqn == "a")),
        r"a chunk of a at \(0, 0\) is listed, but not stored",
    ),
    "a foreign chunk": (lambda m: of(m, "a").chunks.append(Path("x")), "PosixPath"),  # type: ignore[arg-type]
    "a number as a chunk": (lambda m: of(m, "a").chunks.append(3), "but contains int"),  # type: ignore[arg-type]
    "a foreign tensor": (
        lambda m: m.state_dict_metadata.update(a=Path("x")),  # type: ignore[call-overload]
        "must contain a TensorStorageMetadata, but contains pathlib",
    ),
    "a foreign place": (
        lambda m: m.storage_data.update(dict.fromkeys(m.storage_data, Path("x"))),
        "must contain a _StorageInfo, but contains pathlib",
    ),
    "a text as a key": (lambda m: m.storage_data.update(a=3), "must contain a MetadataIndex"),
    "no storage": (lambda m: setattr(m, "storage_data", None), "does not state where chunks are"),
    "no tensors": (lambda m: setattr(m, "state_dict_metadata", 3), "has no list of tensors"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_contradictory_metadata_is_refused(folder: Path, what: str) -> None:
    change, match = DAMAGE[what]
    (folder.parent / "x").write_bytes(part(folder).read_bytes())  # the folder above is not read
    about = description(folder)
    change(about)
    describe(folder, about)
    check_refused(folder, match)


def check_refused(folder: Path, match: str) -> None:
    """Raises unless audit and repair refuse the folder with one sentence."""
    target = folder.with_name("fixed")
    for refuse in (lambda: wc.audit(folder), lambda: wc.repair(folder, target, 2.0)):
        with pytest.raises(UnreadableError, match=match) as error:
            refuse()
        assert "\n" not in str(error.value)
        assert str(folder) in str(error.value)
    assert not target.exists()


OTHERS = {
    "nothing": b"",
    "no complete pickle": b"text",
    "a number": b"\x80\x04K\x03.",
    "a list": b"].",
}


@pytest.mark.parametrize("what", OTHERS)
def test_invalid_metadata_is_refused(folder: Path, what: str) -> None:
    (folder / ".metadata").write_bytes(OTHERS[what])
    check_refused(folder, "is not a valid metadata file of torch")


def test_truncated_metadata_is_refused(folder: Path) -> None:
    data = (folder / ".metadata").read_bytes()
    for length in range(0, len(data) - 1, 61):
        (folder / ".metadata").write_bytes(data[:length])
        with pytest.raises(UnreadableError, match="is not a valid metadata file"):
            Checkpoint(folder)


@pytest.mark.parametrize("length", [0, 1, 500, 1500, -1])
def test_truncated_shard_is_refused(folder: Path, length: int) -> None:
    part(folder).write_bytes(part(folder).read_bytes()[:length])
    check_refused(folder, r"__0_0\.distcp is not a valid shard .* bytes, but contains")


class Evil:
    """A function that torch would call while loading the metadata."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.mark)!r}, 'w')",)


PLACES: dict[str, tuple[Callable[[Metadata, Any], object], bool]] = {
    "as a tensor": (lambda m, evil: m.state_dict_metadata.update(a=evil), False),
    "as a chunk": (lambda m, evil: of(m, "a").chunks.append(evil), False),
    "as a place": (lambda m, evil: m.storage_data.update({MetadataIndex("x", (0,)): evil}), False),
    "as a key": (lambda m, evil: m.storage_data.update({evil: 3}), False),
    "as a shape": (lambda m, evil: setattr(of(m, "a"), "size", evil), False),
    "as a dtype": (lambda m, evil: setattr(of(m, "a").properties, "dtype", evil), False),
    "as a file": (lambda m, evil: edit(m, "a", relative_path=evil), False),
    "as what the planner knows": (lambda m, evil: setattr(m, "planner_data", evil), True),
    "as the layout": (lambda m, evil: setattr(of(m, "a").properties, "layout", evil), True),
}


@pytest.mark.parametrize("where", PLACES)
def test_code_in_metadata_does_not_run(folder: Path, where: str) -> None:
    change, harmless = PLACES[where]
    evil = Evil(folder.parent / "canary")
    about = description(folder)
    change(about, evil)
    describe(folder, about)
    if harmless:
        assert wc.audit(folder).coverage.measured == 2
    else:
        check_refused(folder, "is not a valid metadata file")
    assert not evil.mark.exists()
    pickle.loads((folder / ".metadata").read_bytes())  # torch would run it
    assert evil.mark.exists()


def test_code_in_chunk_does_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    for code in CODES:
        pickled = code + b"0" + pickle.dumps({}, protocol=4)[2:] if code[:1] == b"\x80" else code
        store(folder, "a", zipped({"a/data.pkl": pickled + b"."}))
        check_refused(folder, "the bytes of a at byte 0 are not a tensor")
    assert not (folder.parent / "canary").exists()


def flipped(data: bytes) -> bytes:
    """The archive directory gives the first record an offset beyond the chunk."""
    at = data.rindex(b"PK\x05\x06")
    start = int.from_bytes(data[at + 16 : at + 20], "little")
    return data[: start + 42] + (10**9).to_bytes(4, "little") + data[start + 46 :]


CHUNKS: dict[str, Callable[[Tensor], bytes]] = {
    "a dict": lambda W: written({"W": W}),
    "two tensors": lambda W: written([W, W]),
    "a part of a tensor": lambda W: written(W[:2].clone()),
    "no tensor": lambda W: written(3),
    "the older format": lambda W: written(W, _use_new_zipfile_serialization=False),
    "compressed records": lambda W: zipped(records(written(W)), zipfile.ZIP_DEFLATED),
    "a record elsewhere": lambda W: flipped(written(W)),
    "a pickle alone": lambda W: pickle.dumps(W.tolist()),
    "two archives": lambda W: written(W) + written(W),
}


@pytest.mark.parametrize("what", CHUNKS)
def test_chunk_that_does_not_fit_tensor_is_refused(folder: Path, what: str) -> None:
    store(folder, "a", CHUNKS[what](drawn(4, 3)))
    check_refused(folder, r"x\.distcp is not a valid shard of torch")


def test_stored_objects_are_not_read(folder: Path) -> None:
    """The reader does not open objects that the metadata describe as bytes."""
    about = description(folder)
    about.state_dict_metadata["a"] = BytesStorageMetadata()
    describe(folder, about)
    assert [f.name for f in wc.audit(folder).findings] == ["b"]
