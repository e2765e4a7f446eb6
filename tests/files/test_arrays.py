"""NumPy files: the readers return what NumPy wrote, without unpickling."""

import math
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import scipy.sparse
import torch
from torch import nn

import wellcond as wc
from wellcond.files import arrays as reader
from wellcond.files.arrays import Array, Arrays
from wellcond.files.tensors import NoTensorsError, UnreadableError
from wellcond.weights.reasons import Reason

KINDS = ["<f2", ">f2", "<f4", ">f4", ">f8", "<c8", ">c16", ">i2", "<u4", ">i8", "|i1", "|b1"]
SHAPES = [(), (0, 3), (5,), (4, 3), (2, 3, 4), (3, 2, 2, 3)]


def same(read: torch.Tensor, array: Any) -> bool:
    expected = array.astype(array.dtype.newbyteorder("="))
    return np.array_equal(read.numpy(), expected) and read.shape == expected.shape


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed, None])
def test_arrays_equal_those_of_numpy(tmp_path: Path, save: Any, order: Any) -> None:
    source = np.random.default_rng(0)
    arrays = {
        f"{kind}{len(shape)}": np.asarray(9 * source.random(shape), kind, order=order)
        for kind in KINDS
        for shape in SHAPES
    }
    if save is not None:
        save(tmp_path / "a.npz", **arrays)
        files: dict[str, Any] = dict.fromkeys(arrays, Arrays(tmp_path / "a.npz"))
    else:
        files = {}
        for name, array in arrays.items():
            np.save(tmp_path / f"{name}.npy", array)
            files[name] = Array(tmp_path / f"{name}.npy")
    for name, array in arrays.items():
        file = files[name]
        assert same(file.read(name), array)
        if array.ndim and len(array):
            assert same(file.read(name, (1, len(array))), array[1:])
            assert same(file.first_row(name), array[(0,) * (array.ndim - 1)])
        pieces = [piece.flatten() for piece in file.pieces(name)]
        entries = sum(len(piece) for piece in pieces)
        assert entries >= array.size if array.dtype.kind in "fc" else not pieces


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_format_version_is_read(tmp_path: Path, version: Any) -> None:
    with (tmp_path / "w.npy").open("wb") as file:
        np.lib.format.write_array(file, np.diag([9.0, 1.0]), version=version)
    (finding,) = wc.audit(tmp_path / "w.npy").findings
    assert (finding.name, finding.condition_number) == ("w", 9.0)


def test_condition_numbers_equal_those_of_float64(tmp_path: Path) -> None:
    source = np.random.default_rng(1)
    kernel, hwio = source.standard_normal((5, 9)), source.standard_normal((3, 3, 16, 20))
    np.savez(tmp_path / "a.npz", **{"d/kernel": kernel, "c/kernel": hwio, "arr_0": hwio[0]})
    report = wc.audit(tmp_path / "a.npz")
    found = {f.name: f.condition_number for f in report.findings}
    assert found.keys() == {"d/kernel", "c/kernel"}
    assert found["d/kernel"] == pytest.approx(np.linalg.cond(kernel), rel=1e-9)
    matrix = hwio.reshape(-1, 20)
    assert found["c/kernel"] == pytest.approx(np.linalg.cond(matrix), rel=1e-9)


class Malicious:
    def __reduce__(self) -> Any:
        return open, ("canary", "w")


@pytest.mark.parametrize("ending", ["npy", "npz"])
def test_python_objects_are_never_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.chdir(tmp_path)
    objects = np.array([Malicious()], dtype=object)
    if ending == "npy":
        np.save("a.npy", objects, allow_pickle=True)
    else:
        np.savez("a.npz", x=objects)
    with pytest.raises(NoTensorsError, match="Python objects"):
        wc.audit(f"a.{ending}")
    np.savez("b.npz", x=objects, w=np.eye(3), r=np.zeros(3, dtype="f4,i4"), t=np.array(["a"]))
    report = wc.audit("b.npz")
    assert [f.name for f in report.findings] == ["w"]
    reasons = {name: why.reason for name, why in report.coverage.skipped.items()}
    assert reasons == {"x": Reason.objects, "r": Reason.no_tensors, "t": Reason.packed}
    assert not Path("canary").exists()


def test_file_with_only_records_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(3, dtype="f4,i4"))
    with pytest.raises(NoTensorsError, match="records"):
        wc.audit(tmp_path / "a.npy")


def test_dtypes_missing_in_torch_counted_and_skipped(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "a.npz", a=np.eye(3, dtype=np.longdouble), b=np.zeros((3, 3), "V2"), w=np.eye(3)
    )
    report = wc.audit(tmp_path / "a.npz")
    assert [f.name for f in report.findings] == ["w"]
    assert "bfloat16" in str(report.coverage.skipped["b"])
    assert "float64" in str(report.coverage.skipped["a"])
    assert report.coverage.parameter_share == pytest.approx(1 / 3)


def header(text: str, version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text.encode()


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2)}"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUM",
        header(GOOD),
        header(GOOD) + bytes(15),
        header(GOOD, b"\x04\x00") + bytes(16),
        header(GOOD + "x" * 11_000) + bytes(16),
        header("(" * 5000) + bytes(16),
        header("-" * 9000 + "1") + bytes(16),
        header("__import__('os')"),
        header(GOOD.replace("'shape': (2, 2)", "'shape': (-2, -2)")) + bytes(16),
        header(GOOD.replace("'shape': (2, 2)", "'shape': [2, 2]")) + bytes(16),
        header(GOOD.replace("(2, 2)", "(2, 1 << 90)")) + bytes(16),
        header(GOOD.replace("(2, 2)", "(2**62, 2**62)")),
        header(GOOD.replace("<f4", "<q4")) + bytes(16),
        header(GOOD.replace("False", "0")) + bytes(16),
    ],
)
def test_contradictory_headers_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(UnreadableError, match=r"is not a valid NumPy file: "):
        wc.audit(tmp_path / "a.npy")


def changed(path: Path, name: str, data: bytes, more: dict[str, bytes] | None = None) -> None:
    """Replaces or adds members of an archive."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two members with one name
        for one, content in [*(records | {name: data}).items(), *(more or {}).items()]:
            archive.writestr(one, content)


@pytest.mark.parametrize(
    ("name", "data", "more", "what"),
    [
        ("w.npy", b"", {}, "no header"),
        ("w.npy", header(GOOD), {}, "size of an array"),
        ("w.npy", header(GOOD) + bytes(17), {}, "size of an array"),
        ("w.npy", header(GOOD.replace("<f4", "<q4")) + bytes(16), {}, "not a NumPy dtype"),
        ("w", header(GOOD) + bytes(16), {}, "same name"),
        ("x.npy", header(GOOD) + bytes(16), {"x.npy": header(GOOD) + bytes(16)}, "same name"),
    ],
)
def test_contradictory_archives_are_refused(
    tmp_path: Path, name: str, data: bytes, more: dict[str, bytes], what: str
) -> None:
    np.savez(tmp_path / "a.npz", w=np.eye(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        changed(tmp_path / "a.npz", name, data, more)
    with pytest.raises(UnreadableError, match=f"is not a valid NumPy file: .*{what}"):
        wc.audit(tmp_path / "a.npz")


def test_folders_and_other_files_in_archive_are_skipped(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **{"params/w": np.eye(2)})
    changed(tmp_path / "a.npz", "params/", b"", {"notes.txt": b"text"})
    report = wc.audit(tmp_path / "a.npz")
    assert [f.name for f in report.findings] == ["params/w"]
    assert [*report.coverage.skipped] == ["notes.txt"]


def test_archive_bomb_is_refused(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", w=np.zeros((4096, 4096)))
    with pytest.raises(UnreadableError, match="would unpack from"):
        wc.audit(tmp_path / "a.npz")


def test_bytes_after_array_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(header(GOOD) + bytes(20))
    with pytest.raises(UnreadableError, match=r"4 bytes follow it.*numpy\.savez"):
        wc.audit(tmp_path / "a.npy")


def test_arrays_next_to_weights_are_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.eye(3))
    assert [f.name for f in wc.audit(tmp_path).findings] == ["x"]
    torch.save({"w": torch.eye(2)}, tmp_path / "a.pt")
    report = wc.audit(tmp_path)
    assert [f.name for f in report.findings] == ["w"]
    assert report.coverage.skipped["x.npy"].reason is Reason.unread


@pytest.mark.parametrize("ending", ["npz", "npy"])
def test_repair_error_explains_conversion(tmp_path: Path, ending: str) -> None:
    path, other = tmp_path / f"a.{ending}", tmp_path / "b.safetensors"
    W = np.asfortranarray(np.diag([9.0, 1.0, 4.0]).astype(">f4"))
    np.savez(path, w=W) if ending == "npz" else np.save(path, W)
    for target in (other, tmp_path / f"b.{ending}"):
        with pytest.raises(ValueError, match=r"cannot be repaired: it is a NumPy ar") as error:
            wc.repair(path, target, 2.0)
        assert not target.exists()
    _, _, code = str(error.value).rstrip(".").partition("as safetensors: ")
    exec(code, {"safetensors": safetensors, "numpy": np, "path": path, "other": other})
    assert [f.condition_number for f in wc.audit(other).findings] == [9.0]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_rows_of_fortran_array_need_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Any
) -> None:
    """Covers pieces of several columns, of one column, and of less than one."""
    W = np.asfortranarray(np.random.default_rng(2).standard_normal((50, 3, 7)))
    save(tmp_path / "a.npz", W=W)
    file = Arrays(tmp_path / "a.npz")
    asked: list[int] = []
    memory_for = Arrays._memory_for
    monkeypatch.setattr(
        Arrays, "_memory_for", lambda self, n, name: asked.append(n) or memory_for(self, n, name)
    )
    for piece in (16, 8 * 50, 8 * 50 * 4, 1 << 20):
        monkeypatch.setattr(reader, "_PIECE", piece)
        for start, stop in [(0, 50), (3, 5), (49, 50), (7, 7)]:
            asked.clear()
            assert same(file.read("W", (start, stop)), W[start:stop])
            assert max(asked, default=0) <= max(piece, 8 * (stop - start))


@pytest.mark.parametrize("fortran", [False, True])
def test_rows_of_file_larger_than_memory_are_read(tmp_path: Path, fortran: bool) -> None:
    """The file is sparse on the disk."""
    long, row, path = 1 << 34, 3 << 32, tmp_path / "w.npy"
    text = header(f"{{'descr': '<f4', 'fortran_order': {fortran}, 'shape': ({long}, 4)}}")
    with path.open("wb") as file:
        file.write(text)
        for column in range(4):
            file.seek(len(text) + 4 * (column * long + row if fortran else row * 4 + column))
            file.write(np.float32(column + 1).tobytes())
        file.truncate(len(text) + 16 * long)
    rows = Array(path).read("w", (row - 1, row + 2))
    assert rows.tolist() == [[0.0] * 4, [1.0, 2.0, 3.0, 4.0], [0.0] * 4]
    assert Array(path).first_row("w").tolist() == [0.0] * 4


# --- unknown order of axes ------------------------------------------------------------------------


def test_unknown_order_of_axes_is_skipped(tmp_path: Path) -> None:
    """A NumPy file does not tell OIHW of torch from HWIO of TensorFlow and JAX."""
    source = np.random.default_rng(3)
    arrays = {
        "arr_0": source.standard_normal((3, 3, 8, 16)),
        "conv1_1_W": source.standard_normal((3, 3, 3, 64)),
        "conv2d/w": source.standard_normal((3, 3, 16, 16)),
        "stack": source.standard_normal((5, 6, 7)),
        "c.weight": source.standard_normal((8, 4, 3, 3)),
        "experts": source.standard_normal((2, 4, 6)),
        "pos_embedding": source.standard_normal((1, 8, 6)),
        "cls": source.standard_normal((1, 1, 6)),
        "W": source.standard_normal((6, 6)),
    }
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    report = wc.audit(path)
    assert {f.label for f in report.findings} == {"c.weight:kernel", "experts:0", "experts:1", "W"}
    reasons = {name: why.reason for name, why in report.coverage.skipped.items()}
    unknown = dict.fromkeys(("arr_0", "conv1_1_W", "conv2d/w", "stack"), Reason.layout)
    assert reasons == unknown | {"pos_embedding": Reason.added, "cls": Reason.vector}
    asked = wc.audit(path, include=["arr_0", "conv1_1_W", "stack"])
    assert {f.name for f in asked.findings} == {"arr_0", "conv1_1_W", "stack"}
    assert all("guess" in f.detail for f in asked.findings)


# Names and shapes of weights and biases in other libraries, and the number of input axes.
RELATIVES: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    # Google's vision transformers and BiT
    "embedding/kernel": ((4, 4, 3, 12), (12,), 3),
    "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel": ((12, 24), (24,), 1),
    "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel": (
        (12, 3, 4),
        (3, 4),
        1,
    ),
    "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/kernel": ((3, 4, 12), (12,), 2),
    "resnet/root_block/standardized_conv2d/kernel": ((7, 7, 3, 8), (), 3),
    "head/conv2d/kernel": ((1, 1, 8, 5), (5,), 3),
    # VGG16, Haiku, TF-Slim and Lasagne
    "conv1_1_W": ((3, 3, 3, 64), (64,), 3),
    "res_net/~/conv2_d/w": ((3, 3, 4, 6), (6,), 3),
    "InceptionV1/Conv2d_1a_7x7/weights": ((7, 7, 3, 16), (16,), 3),
    "Conv2d_transpose/weights": ((3, 3, 4, 6), (4,), 3),
    # AlphaFold
    "alphafold/attention//query_w": ((6, 2, 3), (), 1),
    "alphafold/attention//output_w": ((2, 3, 6), (6,), 2),
}


def test_layouts_of_other_libraries_are_recognised(tmp_path: Path) -> None:
    source, arrays, expected = np.random.default_rng(4), {}, {}
    for name, (shape, bias, inputs) in RELATIVES.items():
        arrays[name] = W = source.standard_normal(shape)
        expected[name] = np.linalg.cond(W.reshape(math.prod(shape[:inputs]), -1))
        if bias:
            other = re.sub("w$", "b", name, flags=re.IGNORECASE)
            stem = name.rpartition("/")[0]
            arrays[f"{stem}/bias" if other == name else other] = source.standard_normal(bias)
    arrays["cls"] = source.standard_normal((1, 1, 12))
    arrays["Transformer/posembed_input/pos_embedding"] = source.standard_normal((1, 9, 12))
    np.savez(tmp_path / "a.npz", **arrays)
    report = wc.audit(tmp_path / "a.npz")
    assert {f.name: f.condition_number for f in report.findings} == pytest.approx(expected)
    assert Reason.layout not in {why.reason for why in report.coverage.skipped.values()}


CELLS = {"lstm": (nn.LSTM(3, 5), "ifgo", "ifgo"), "gru": (nn.GRU(3, 5), "rzn", "zrn")}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("path", ["{0}/{0}_cell/", "model/{0}_2/{0}_cell_1/", "{0}.{0}_cell."])
@pytest.mark.parametrize("suffix", ["", ":0"])
def test_gates_of_keras_measured_like_model(
    tmp_path: Path, cell: str, path: str, suffix: str
) -> None:
    """Keras stores the gates in another order, and the inputs first."""
    model, gates, order = CELLS[cell]
    names = {"weight_ih_l0": "kernel", "weight_hh_l0": "recurrent_kernel"}
    names = {name: f"{path.format(cell)}{own}{suffix}" for name, own in names.items()}
    arrays = {}
    for name, other in names.items():
        blocks = dict(zip(gates, getattr(model, name).detach().chunk(len(gates)), strict=True))
        arrays[other] = torch.cat([blocks[gate] for gate in order]).mT.contiguous().numpy()
    expected = {
        f"{names[one.name]}:{one.view}": one.condition_number for one in wc.audit(model).findings
    }
    np.savez(tmp_path / "a.npz", **arrays)
    for source in (tmp_path / "a.npz", arrays):
        found = {one.label: one.condition_number for one in wc.audit(source).findings}
        assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    "shapes",
    [
        {"lstm/lstm_cell/kernel": (3, 20)},  # no recurrent kernel confirms the number of units
        {"lstm/lstm_cell/kernel": (3, 20), "lstm/lstm_cell/recurrent_kernel": (4, 20)},
        {"gru/gru_cell/kernel": (3, 20), "gru/gru_cell/recurrent_kernel": (5, 20)},
        {"lstm/cell/kernel": (3, 20), "lstm/cell/recurrent_kernel": (5, 20)},
        {"rnn/simple_rnn_cell/kernel": (3, 5), "rnn/simple_rnn_cell/recurrent_kernel": (5, 5)},
    ],
)
def test_kernels_without_known_gates_are_single_matrices(
    shapes: dict[str, tuple[int, int]],
) -> None:
    arrays = {name: np.ones(shape) for name, shape in shapes.items()}
    assert {one.label for one in wc.audit(arrays).findings} == shapes.keys()


def test_scanned_layers_are_stacks_and_biases_skipped(tmp_path: Path) -> None:
    """big_vision and AlphaFold store such layers."""
    drawn = np.random.default_rng(5).standard_normal
    shapes = {
        "params/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel": (2, 6, 8),
        "params/Transformer/encoderblock/MlpBlock_0/Dense_0/bias": (2, 8),
        "params/Transformer/encoderblock/LayerNorm_0/scale": (2, 6),
        "evoformer_iteration/transition//weights": (2, 6, 8),
        "evoformer_iteration/transition//bias": (2, 8),
        "evoformer_iteration/input_layer_norm//scale": (2, 6),
        "evoformer_iteration/input_layer_norm//offset": (2, 6),
        "evoformer_iteration/attention//gating_w": (2, 6, 3, 4),
        "evoformer_iteration/attention//gating_b": (2, 3, 4),
        "evoformer_iteration/attention//output_w": (2, 3, 4, 6),
        "evoformer_iteration/attention//output_b": (2, 6),
    }
    arrays = {name: drawn(shape) for name, shape in shapes.items()}
    np.savez(tmp_path / "a.npz", **arrays)
    report = wc.audit(tmp_path / "a.npz")
    found = {f.label: f.condition_number for f in report.findings}
    expected = {}
    for name, inputs in [
        *((name, 1) for name in shapes if name.endswith(("kernel", "weights", "gating_w"))),
        ("evoformer_iteration/attention//output_w", 2),
    ]:
        for number, W in enumerate(arrays[name]):
            matrix = W.reshape(math.prod(W.shape[:inputs]), -1)
            expected[f"{name}:{number}"] = np.linalg.cond(matrix)
    assert found == pytest.approx(expected)
    assert Reason.layout not in {why.reason for why in report.coverage.skipped.values()}


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "bsr", "dia"])
def test_sparse_matrix_is_refused(tmp_path: Path, kind: str) -> None:
    """The blocks of bsr and the diagonals of dia have two or more axes."""
    scipy.sparse.save_npz(tmp_path / "a.npz", scipy.sparse.eye(6).asformat(kind))
    with pytest.raises(NoTensorsError, match="is a sparse SciPy matrix") as error:
        wc.audit(tmp_path / "a.npz")
    _, _, code = str(error.value).rstrip(".").partition("dense one: ")
    path, other = tmp_path / "a.npz", tmp_path / "b.npz"
    exec(code, {"numpy": np, "scipy": scipy, "path": path, "other": other})
    assert [f.condition_number for f in wc.audit(other).findings] == [1.0]
