"""Keras files: matrices equal the action of layers in Keras; nothing outside a file is opened.

data/keras contains files that Keras saved; see write_keras.py.
"""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import wellcond as wc
from wellcond.cli import main
from wellcond.files.checkpoint import Checkpoint
from wellcond.files.tensors import UnreadableError
from wellcond.weights.reasons import Reason

h5py = pytest.importorskip("h5py")
np = pytest.importorskip("numpy")

DATA = Path(__file__).with_name("data") / "keras"
Matrices = dict[str, Tensor]


def matrices(path: Path) -> Matrices:
    """Returns the findings by label, with the groups of a stack in one list."""
    checkpoint = Checkpoint(path)
    skipped = checkpoint.skipped()
    return {
        f"{one.name}:{view}".rstrip(":"): matrix.double()
        for one in checkpoint.matrices()
        if one.name not in skipped
        for view, matrix in one.views(one.read()).items()
    }


def spectrum(*blocks: Tensor) -> Tensor:
    """Returns the singular values of a block-diagonal matrix."""
    values = torch.cat([torch.linalg.svdvals(block).flatten() for block in blocks])
    return values.sort(descending=True).values


def unpack(name: str, folder: Path) -> Path:
    """Extracts only the weights of an archive."""
    with zipfile.ZipFile(DATA / f"{name}.keras") as archive:
        archive.extract("model.weights.h5", folder)
    return (folder / "model.weights.h5").rename(folder / f"{name}.weights.h5")


def actions(model: str) -> dict[str, Tensor]:
    expected = load_file(DATA / "expected.safetensors")
    return {
        name.removeprefix(f"{model}/"): matrix.double()
        for name, matrix in expected.items()
        if name.startswith(f"{model}/")
    }


def agree(blocks: list[Tensor], action: Tensor) -> None:
    values, own = torch.linalg.svdvals(action), spectrum(*blocks)
    torch.testing.assert_close(own, values[: len(own)], rtol=0, atol=3e-6 * float(values[0]))
    assert (values[len(own) :] < 1e-5 * values[0]).all()
    assert sum(block.numel() for block in blocks) == int((action != 0).sum())


@pytest.mark.parametrize("file", ["convolutions.keras", "convolutions.h5"])
def test_convolutions_equal_action_of_layers(file: str) -> None:
    found, action = matrices(DATA / file), actions("convolutions")
    for name in ("grouped", "depthwise", "transposed", "inner/line"):
        agree([found[f"{name}/kernel:kernel"]], action[name.removeprefix("inner/")])
    agree([found["dense/kernel"]], action["dense"])
    assert found["grouped/kernel:kernel"].shape == (2, 3, 12)
    assert found["depthwise/kernel:kernel"].shape == (6, 3, 4)
    assert found["transposed/kernel:kernel"].shape == (5, 18)
    first = found["separable/depthwise_kernel:kernel"]
    second = found["separable/pointwise_kernel:kernel"]
    assert first.shape == (18, 2, 4)
    agree([second @ torch.block_diag(*first)], action["separable"])
    assert "groups" not in str(wc.audit(DATA / file).coverage)


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_depthwise_kernel_measured_like_model(
    tmp_path: Path, dimensions: int, multiplier: int
) -> None:
    convolution = (nn.Conv1d, nn.Conv2d)[dimensions - 1]
    model = convolution(4, 4 * multiplier, 3, groups=4)
    kernel = model.weight.detach().unflatten(0, (4, multiplier)).squeeze(2)
    layer = f"depthwise_conv{dimensions}d"
    name = f"{layer}/{layer}/depthwise_kernel:0"
    path = of_keras_2(tmp_path / "a.h5", {name: kernel.movedim((0, 1), (-2, -1)).numpy()})
    (alone,), (found,) = wc.audit(model).findings, wc.audit(path).findings
    assert found.shape == alone.shape
    assert found.condition_number == pytest.approx(alone.condition_number)
    assert found.condition_number > 1


@pytest.mark.parametrize("file", ["sequences.keras", "sequences.h5"])
def test_attention_and_einsum_equal_action_of_layers(file: str) -> None:
    found, action = matrices(DATA / file), actions("sequences")
    for layer in ("attention", "grouped"):
        for part in ("query", "key", "value", "attention_output"):
            agree([found[f"{layer}/{part}/kernel"]], action[f"{layer}/{part}"])
    agree([found["einsum/kernel"]], action["einsum"])
    stack = [found[f"stack/kernel:{i}"] for i in range(5)]
    torch.testing.assert_close(torch.block_diag(*stack), action["stack"], rtol=1e-6, atol=1e-6)
    skipped = Checkpoint(DATA / file).skipped()
    assert skipped["table/embeddings"].reason is Reason.embedding
    assert Reason.optimizer in {why.reason for why in skipped.values()}


def cell(found: Matrices, name: str, gates: str) -> tuple[Tensor, Tensor]:
    return tuple(
        torch.cat([found[f"{name}/{kernel}:{gate}"] for gate in gates])
        for kernel in ("kernel", "recurrent_kernel")
    )  # type: ignore[return-value]


@pytest.mark.parametrize("file", ["sequences.keras", "sequences.h5"])
def test_gates_equal_those_of_torch(file: str) -> None:
    """Cells of Keras and torch return the same outputs."""
    found, action = matrices(DATA / file), actions("sequences")
    checkpoint = Checkpoint(DATA / file)

    def bias_of(name: str) -> Tensor:
        holder, entry = checkpoint.where[f"{name}/bias"]
        return holder.read(entry.name).double()

    both = next(n.rpartition("/")[0] for n in checkpoint.where if "forward_lstm" in n)
    lstm = nn.LSTM(6, 3, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        lstm.weight_ih_l0[:], lstm.weight_hh_l0[:] = cell(found, both, "ifgo")
        lstm.bias_ih_l0[:], lstm.bias_hh_l0[:] = bias_of(both), 0
        torch.testing.assert_close(
            lstm(action["lstm.in"])[0], action["lstm.out"], rtol=0, atol=1e-6
        )
    gru = nn.GRU(4, 4, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        gru.weight_ih_l0[:], gru.weight_hh_l0[:] = cell(found, "gru/gru_cell", "rzn")
        swap = torch.tensor([*range(4, 8), *range(4), *range(8, 12)])
        gru.bias_ih_l0[:], gru.bias_hh_l0[:] = bias_of("gru/gru_cell")[:, swap]
        torch.testing.assert_close(gru(action["gru.in"])[0], action["gru.out"], rtol=0, atol=1e-6)


def test_weights_without_config_classified_by_groups(tmp_path: Path) -> None:
    whole, alone = matrices(DATA / "convolutions.keras"), unpack("convolutions", tmp_path)
    found = matrices(alone)
    assert found.keys() == whole.keys()
    for name in whole.keys() - {"grouped/kernel:kernel"}:
        assert torch.equal(found[name], whole[name])
    assert found["grouped/kernel:kernel"].shape == (6, 12)
    assert "2 kernels are read as one group" in str(wc.audit(alone).coverage)
    whole, alone = matrices(DATA / "sequences.keras"), unpack("sequences", tmp_path)
    found = matrices(alone)
    lost = {"einsum/kernel", *(f"stack/kernel:{i}" for i in range(5))}
    assert torch.equal(found.pop("steps/each/vars/0"), whole.pop("steps/each/kernel"))
    assert whole.keys() - found.keys() == lost
    assert all(torch.equal(found[name], whole[name]) for name in found)
    skipped = Checkpoint(alone).skipped()
    for name in ("einsum/kernel", "stack/kernel"):
        expected = (
            "its equation is unknown, because there is no config.json: save the model as .keras"
        )
        assert expected in str(skipped[name])


def test_config_next_to_weights_is_used(tmp_path: Path) -> None:
    """`save` writes such a folder, also to a hub."""
    with zipfile.ZipFile(DATA / "convolutions.keras") as archive:
        archive.extractall(tmp_path)
    whole, found = matrices(DATA / "convolutions.keras"), matrices(tmp_path)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_subclassed_model_classified_by_names(tmp_path: Path) -> None:
    for path in (DATA / "own.keras", unpack("own", tmp_path)):
        found = matrices(path)
        assert {name: tuple(matrix.shape) for name, matrix in found.items()} == {
            "first/kernel": (3, 4),
            "blocks/dense/kernel": (4, 3),
            "blocks/conv2d/kernel:kernel": (2, 4),
            "vars/0": (4, 3),
        }
        reason = str(Checkpoint(path).skipped()["patch_of_own/vars/0"])
        assert reason.startswith("a parameter whose use is unknown: ")
        described = path.suffix == ".keras"
        assert ("config.json does not describe it" in reason) == described
        assert ("save the model as .keras" in reason) != described


def test_bfloat16_and_integer_codes() -> None:
    checkpoint = Checkpoint(DATA / "half.weights.h5")
    holder, entry = checkpoint.where["half/kernel"]
    assert entry.dtype == "bfloat16"
    with h5py.File(DATA / "half.weights.h5") as file:
        bits = file["layers/dense/vars/0"][()].view("uint16").astype("uint32") << 16
    assert torch.equal(holder.read("half/kernel").float(), torch.from_numpy(bits.view("float32")))
    codes = Checkpoint(DATA / "codes.keras")
    assert not list(codes.matrices())
    assert codes.skipped()["codes/kernel"].reason is Reason.codes
    with pytest.raises(ValueError, match="codes, which mean nothing without their scales"):
        wc.audit(DATA / "codes.keras")


@pytest.mark.parametrize("file", ["convolutions.keras", "sequences.h5", "half.weights.h5"])
def test_rows_and_pieces_equal_array(file: str) -> None:
    for holder, entry in Checkpoint(DATA / file).where.values():
        whole = holder.read(entry.name)
        assert tuple(whole.shape) == entry.shape
        if entry.shape:
            half = entry.shape[0] // 2
            assert torch.equal(holder.read(entry.name, (half, entry.shape[0])), whole[half:])
            assert torch.equal(holder.first_row(entry.name), whole.reshape(-1)[: entry.shape[-1]])
        pieces = [piece.flatten() for piece in holder.pieces(entry.name)]
        assert whole.is_floating_point() == bool(pieces)
        assert not pieces or torch.equal(torch.cat(pieces), whole.flatten())


def of_keras_2(path: Path, arrays: dict[str, Any]) -> Path:
    """Writes weights like Keras 2 and transformers; the first part of a name is the layer."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = sorted({name.partition("/")[0].encode() for name in arrays})
        for name, array in arrays.items():
            file[name] = array
    return path


def test_keras_2_file_read_by_names(tmp_path: Path) -> None:
    random = np.random.default_rng(0).normal
    arrays = {
        "conv/conv/kernel:0": random(size=(3, 3, 4, 5)).astype("float32"),
        "conv/conv/bias:0": np.ones(5, ">f4"),
        "lstm_1/lstm_1/lstm_cell/kernel:0": random(size=(4, 8)),
        "lstm_1/lstm_1/lstm_cell/recurrent_kernel:0": random(size=(2, 8)).astype(">f8"),
        "multi_head_attention/multi_head_attention/query/kernel:0": random(size=(6, 2, 5)),
        "multi_head_attention/multi_head_attention/attention_output/kernel:0": random(
            size=(2, 5, 6)
        ),
        "bert/tf_bert_model/bert/encoder/layer_._0/attention/self/query/kernel:0": random(
            size=(6, 6)
        ),
        "bert/tf_bert_model/bert/embeddings/word_embeddings/weight:0": random(size=(9, 6)),
        "top_level_model_weights/scale:0": np.float64(3.0),
    }
    found = matrices(of_keras_2(tmp_path / "tf_model.h5", arrays))
    conv = torch.from_numpy(arrays["conv/conv/kernel:0"]).double()
    torch.testing.assert_close(found["conv/kernel:kernel"], conv.reshape(36, 5).mT)
    kernel = torch.from_numpy(
        arrays["lstm_1/lstm_1/lstm_cell/recurrent_kernel:0"].astype("float64")
    )
    for i, gate in enumerate("ifgo"):
        name = f"lstm_1/lstm_cell/recurrent_kernel:{gate}"
        assert torch.equal(found[name], kernel[:, 2 * i : 2 * i + 2].mT)
    assert found["multi_head_attention/query/kernel"].shape == (10, 6)
    assert found["multi_head_attention/attention_output/kernel"].shape == (6, 10)
    name = "tf_bert_model/bert/encoder/layer_._0/attention/self/query/kernel"
    assert name in found
    assert not any("word_embeddings" in name for name in found)


def lonely(path: Path, make: Callable[[Any], object]) -> Path:
    """Writes a Keras file with one valid kernel and the additions of `make`."""
    with h5py.File(path, "w", libver="latest") as file:
        file["layers/dense/vars/0"] = np.diag([9.0, 1.0])
        make(file.create_group("layers/dense_1/vars"))
    return path


def virtual(group: Any) -> None:
    layout = h5py.VirtualLayout((2, 2), "f8")
    layout[:] = h5py.VirtualSource("secret.h5", "secret", (2, 2))
    group.create_virtual_dataset("0", layout)


SECRET = np.diag([7.0, 1.0])
ELSEWHERE: dict[str, Callable[[Any], object]] = {
    "external link": lambda group: group.__setitem__("0", h5py.ExternalLink("secret.h5", "secret")),
    "soft link": lambda group: group.__setitem__("0", h5py.SoftLink("/layers/dense/vars/0")),
    "hanging link": lambda group: group.__setitem__("0", h5py.SoftLink("/nowhere")),
    "hard link": lambda group: group.__setitem__("0", group.file["layers/dense/vars/0"]),
    "virtual": virtual,
    "external": lambda group: group.create_dataset(
        "0", (2, 2), "f8", external=[("secret.bin", 0, 32)]
    ),
    "nothing stored": lambda group: group.create_dataset("0", (1 << 20, 1 << 30), "f8"),
    "no chunk": lambda group: group.create_dataset("0", (2, 2), "f8", chunks=(1, 2)),
}


@pytest.mark.parametrize("how", ELSEWHERE)
def test_nothing_outside_file_is_opened(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    SECRET.tofile("secret.bin")
    with h5py.File("secret.h5", "w") as file:
        file["secret"] = SECRET
    path = lonely(tmp_path / "a.weights.h5", ELSEWHERE[how])
    report = wc.audit(path)
    assert [finding.condition_number for finding in report.findings] == [9.0]
    (why,) = report.coverage.skipped.values()
    assert why.reason is Reason.no_values


def circle(group: Any) -> None:
    group["again"] = group.file["layers"]


def deep(group: Any) -> None:
    for _ in range(300):
        group = group.create_group("a")


def bomb(group: Any) -> None:
    group.create_dataset("0", data=np.zeros((3000, 3000)), compression="gzip", chunks=(500, 500))


def wide_chunk(group: Any) -> None:
    shape = {"chunks": (3000, 3000), "maxshape": (None, None), "compression": "gzip"}
    group.create_dataset("0", data=np.ones((2, 2)), **shape)


def test_circular_groups_are_read_once(tmp_path: Path) -> None:
    assert wc.audit(lonely(tmp_path / "a.h5", circle)).coverage.measured == 1


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (deep, "its groups are nested more than"),
        (bomb, "would unpack from"),
        (wide_chunk, "would unpack from"),
    ],
)
def test_hdf5_bomb_is_refused(tmp_path: Path, make: Callable[[Any], object], match: str) -> None:
    with pytest.raises(UnreadableError, match=match):
        wc.audit(lonely(tmp_path / "a.h5", make))


def test_compressed_arrays_are_read_by_rows(tmp_path: Path) -> None:
    W = torch.randn(300, 40, dtype=torch.float64)

    def make(group: Any) -> None:
        group.create_dataset("0", data=W.numpy(), chunks=(64, 40), compression="gzip")

    holder, entry = Checkpoint(lonely(tmp_path / "a.h5", make)).where["dense_1/kernel"]
    assert torch.equal(holder.read(entry.name, (100, 170)), W[100:170])


def test_attributes_that_are_not_texts_are_ignored(tmp_path: Path) -> None:
    def make(group: Any) -> None:
        group["0"] = np.eye(2)
        group.attrs["name"] = np.arange(3)
        group.file["layers/dense/vars"].attrs["name"] = "a\n\x1b[2Jb"

    path = lonely(tmp_path / "a.h5", make)
    names = {name for name, _ in Checkpoint(path).where.items()}
    assert names == {"a\n\x1b[2Jb/kernel", "dense_1/kernel"}


def test_other_hdf5_file_is_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "data.h5ad", "w") as file:
        file["X"] = np.eye(3)
    match = (
        "must be a file of weights that Keras saved, but is another HDF5 file. Convert its weights"
    )
    with pytest.raises(UnreadableError, match=match):
        wc.audit(tmp_path / "data.h5ad")
    for name in ("empty.h5", "cut.keras"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UnreadableError, match="it is empty"):
            wc.audit(tmp_path / name)


def test_error_for_compressed_keras_archive_explains_unpacking(tmp_path: Path) -> None:
    path = tmp_path / "a.keras"
    with (
        zipfile.ZipFile(DATA / "convolutions.keras") as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(
        UnreadableError, match=r"compressed\. Unpack it with `python -m zipfile -e a\.keras"
    ):
        wc.audit(path)
    command = [sys.executable, "-m", "zipfile", "-e", path.name, "folder"]
    subprocess.run(command, check=True, cwd=tmp_path)
    found = matrices(tmp_path / "folder" / "model.weights.h5")
    assert found.keys() == matrices(DATA / "convolutions.keras").keys()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps({}))
        archive.writestr("metadata.json", "{}")
    with pytest.raises(UnreadableError, match=r"it has no model\.weights\.h5"):
        wc.audit(path)


def test_error_for_keras_index_names_folder(tmp_path: Path) -> None:
    (tmp_path / "x.weights.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(
        UnreadableError, match=r"index of sharded Keras weights\. Give the path of the fol"
    ):
        wc.audit(tmp_path / "x.weights.json")
    for number in range(2):
        path = lonely(tmp_path / f"x_0000{number}.weights.h5", lambda group: None)
        assert wc.audit(path).coverage.measured == 1
    names = {finding.name for finding in wc.audit(tmp_path).findings}
    assert names == {f"x_0000{number}.weights.h5/dense/kernel" for number in range(2)}


def test_keras_files_are_not_repaired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(DATA / "convolutions.keras")
    assert main(["repair", source, str(tmp_path / "a.keras"), "--max-condition", "3"]) == 2
    assert "wellcond only reads Keras files. Repair its kernels" in capsys.readouterr().err
    assert not (tmp_path / "a.keras").exists()


def test_error_without_h5py_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    for file in ("convolutions.keras", "convolutions.h5"):
        with pytest.raises(UnreadableError, match="Run `pip install h5py`"):
            wc.audit(DATA / file)
    shutil.copy(DATA / "convolutions.keras", tmp_path)
    save_file({"w": torch.eye(2)}, tmp_path / "model.safetensors")
    report = wc.audit(tmp_path)  # a folder in which the other file is read
    assert report.coverage.measured == 1
    assert report.coverage.skipped["convolutions.keras"].reason is Reason.unread


@pytest.mark.libraries
def test_keras_output_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Covers another version than that of the stored files, and the repair of a model."""
    pytest.importorskip("keras")
    command = [sys.executable, str(DATA.parent.with_name("write_keras.py")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    monkeypatch.setattr(sys.modules[__name__], "DATA", tmp_path)
    for kind in ("keras", "h5"):
        test_convolutions_equal_action_of_layers(f"convolutions.{kind}")
        test_attention_and_einsum_equal_action_of_layers(f"sequences.{kind}")
        test_gates_equal_those_of_torch(f"sequences.{kind}")
    test_bfloat16_and_integer_codes()
