"""torch.save files with tensors and Python objects are read, and no code in them runs."""

import argparse
import functools
import io
import struct
import sys
import types
import zipfile
from collections import defaultdict, deque, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attacks import beside_weights, call, edited, get, of_storage, of_torchao, put, text
from corpus import CANARY, CODES, Settings, foreign, records, saved, zipped
from torch import Tensor, nn

import wellcond as wc
from wellcond.cli import main
from wellcond.files import archive
from wellcond.files.archive import Extent, load_saved
from wellcond.files.checkpoint import Checkpoint
from wellcond.files.inert import Foreign, array_of
from wellcond.files.pickled import Pickled
from wellcond.files.slices import local_shard
from wellcond.files.tensors import UnreadableError
from wellcond.recipes.base import TensorClass
from wellcond.weights.reasons import Reason, Skipped

Point = namedtuple("Point", "x y")


def weight(condition: float = 9.0) -> Tensor:
    return torch.diag(torch.tensor([condition, 1.0, 1.0]))


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Returns the tensors that can be measured, and vectors."""
    return {
        name: file.read(entry.name)
        for name, (file, entry) in Checkpoint(path).where.items()
        if entry.skipped is None or entry.skipped.reason is not Reason.array
    }


OBJECTS: dict[str, Any] = {
    "a scalar of numpy": np.float64(1.5),
    "an array of numpy": np.arange(6.0).reshape(2, 3),
    "an array of objects": np.array([None, "a"], dtype=object),
    "a path": Path("data"),
    "a namespace": argparse.Namespace(lr=0.1),
    "a dataclass": Settings(Path("data"), 1.0),
    "a class": nn.GELU,
    "a function": torch.nn.functional.relu,
    "a named tuple": Point(1, [2]),
    "a dict with a default": defaultdict(list, {"a": [1]}),
    "a generator": np.random.default_rng(0),
    "an error": ValueError("x"),
    "a loss": nn.MSELoss(),
    "an optimizer": torch.optim.Adam([nn.Parameter(torch.ones(2))]),
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("what", OBJECTS)
def test_tensors_next_to_object_equal_those_torch_loads(
    tmp_path: Path, what: str, protocol: int
) -> None:
    content = {"model": {"w": weight(), "b": torch.arange(3.0)}, "other": OBJECTS[what]}
    path = written(tmp_path / "a.pt", saved(content, protocol=protocol))
    loaded = torch.load(path, weights_only=False)["model"]
    found = tensors_of(path)
    assert all(torch.equal(found[f"model.{name}"], tensor) for name, tensor in loaded.items())
    report = wc.audit(path)
    assert [(f.name, f.condition_number) for f in report.findings] == [("model.w", 9.0)]
    array = 6 if what == "an array of numpy" else 0
    assert report.coverage.parameter_share == pytest.approx(9 / (12 + array))


@pytest.mark.parametrize("kind", ["stored", "deflated", "legacy"])
def test_every_format_with_objects_is_read(tmp_path: Path, kind: str) -> None:
    content = foreign()
    data = saved(content, legacy=kind == "legacy")
    if kind == "deflated":
        data = zipped(records(data), zipfile.ZIP_DEFLATED)
    found = tensors_of(written(tmp_path / "a.pt", data))
    expected = {f"model.{name}": tensor for name, tensor in content["model"].state_dict().items()}
    expected["arguments.mean"] = content["arguments"].mean
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"conv": nn.Conv2d(2, 3, 3), "norm": nn.BatchNorm2d(3)})
        self.cell = nn.LSTM(4, 5, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("kept", torch.eye(4))
        self.register_buffer("table", torch.eye(5), persistent=False)
        self.plain = torch.eye(6)  # an attribute, which is not in a state dict


def test_saved_module_has_names_of_state_dict(tmp_path: Path) -> None:
    net = Net()
    torch.save(net, tmp_path / "net.pt")
    found = tensors_of(tmp_path / "net.pt")
    assert list(found) != []
    assert set(found) == set(net.state_dict())
    assert all(torch.equal(found[name], tensor) for name, tensor in net.state_dict().items())
    live = {f.label: f.condition_number for f in wc.audit(net).findings}
    file = {f.label: f.condition_number for f in wc.audit(tmp_path / "net.pt").findings}
    assert all(file[label] == pytest.approx(kappa) for label, kappa in live.items())


def test_strides_and_shared_storages_are_preserved(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    content = {"w": whole, "t": whole.T, "part": whole[1:3, ::2], "x": Path("x")}
    torch.save(content, tmp_path / "a.pt")
    found = load_saved(Extent.whole(tmp_path / "a.pt")).content
    for name in ("w", "t", "part"):
        assert (found[name].shape, found[name].stride) == (
            tuple(content[name].shape),
            content[name].stride(),
        )
    assert (found["t"].key, found["t"].start) == (found["w"].key, found["w"].start)
    (file,) = Checkpoint(tmp_path / "a.pt").files.values()
    assert all(torch.equal(file.read(name), content[name]) for name in ("w", "t", "part"))


def test_compressed_storage_is_unpacked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.zeros(1000, 1000)
    content = {"parts": [whole[n] for n in range(1000)], "x": Path("x"), "w": weight()}
    data = zipped(records(saved(content)), zipfile.ZIP_DEFLATED)
    (file,) = Checkpoint(written(tmp_path / "a.pt", data)).files.values()
    opened = []
    read = archive.read_compressed
    monkeypatch.setattr(
        "wellcond.files.stored.read_compressed", lambda *args: opened.append(1) or read(*args)
    )
    assert all(torch.equal(file.read(f"parts.{n}"), whole[n]) for n in range(1000))
    assert len(opened) == 1


def test_objects_are_listed_once(tmp_path: Path) -> None:
    content = {"w": weight(), "config": {str(n): np.float32(n) for n in range(9)}, "p": Path("x")}
    torch.save(content, tmp_path / "a.pt")
    report = wc.audit(tmp_path / "a.pt")
    (skipped,) = report.coverage.skipped.values()
    assert skipped.reason is Reason.objects
    assert skipped.detail.startswith("config (numpy._core.multiarray.scalar), p (pathlib.")
    assert str(report.coverage).startswith("1 of 1 matrices, 100.0 % of the parameters; 1 skipped")


def test_recursive_objects_terminate(tmp_path: Path) -> None:
    first, second = argparse.Namespace(w=weight()), argparse.Namespace()
    first.other, second.other = second, {"back": [first]}
    torch.save({"first": first}, tmp_path / "a.pt")
    assert [f.name for f in wc.audit(tmp_path / "a.pt").findings] == ["first.w"]


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("where", ["value", "key", "element", "state", "argument", "class"])
def test_no_function_of_a_pickle_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: bytes, where: str
) -> None:
    monkeypatch.chdir(tmp_path)
    placed = {
        "value": code,
        "key": b"}" + code + b"K\x01s",
        "element": b"](" + code + b"e",
        "state": call(b"some\nClass") + code + b"b",
        "argument": call(b"torch._utils\n_rebuild_parameter", code, b"I01\n", b"N"),
        "class": code + b")\x81",
    }[where]
    mark = b"X\x06\x00\x00\x00marker"
    sample = edited({"w": weight(), "x": "marker"}, mark, placed, False)
    path = written(tmp_path / "a.pt", sample.files["a.pt"])
    assert wc.audit(path).findings[0].condition_number == 9.0
    assert not Path(CANARY).exists()


def test_no_name_in_a_file_is_imported(tmp_path: Path) -> None:
    mark = b"X\x06\x00\x00\x00marker"
    module = "antigravity"  # the import opens a browser
    sample = edited({"w": weight(), "x": "marker"}, mark, f"c{module}\nfly\n".encode(), False)
    wc.audit(written(tmp_path / "a.pt", sample.files["a.pt"]))
    assert module not in sys.modules


@pytest.mark.parametrize("protocol", [2, 5])
def test_repair_keeps_objects(tmp_path: Path, protocol: int) -> None:
    """Only the bytes of the weight and its checksum differ from those of the file."""
    content = {"model": {"w": weight(), "b": torch.arange(3.0)}, "x": Settings(Path("d"), 2.0)}
    content["model"]["t"] = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).T[1:]
    path = written(tmp_path / "a.pt", saved(content, protocol=protocol))
    before = path.read_bytes()
    report = wc.repair(path, tmp_path / "fixed.pt", 2.0)
    assert [repair.name for repair in report.changed] == ["model.w", "model.t"]
    assert path.read_bytes() == before
    with zipfile.ZipFile(tmp_path / "fixed.pt") as archive:
        assert archive.testzip() is None
        assert archive.read("archive/data.pkl") == records(before)["archive/data.pkl"]
    after = torch.load(tmp_path / "fixed.pt", weights_only=False)
    assert after["x"] == content["x"]
    assert torch.equal(after["model"]["b"], content["model"]["b"])
    for name in ("w", "t"):
        assert float(wc.condition_number(after["model"][name])) <= 2.0
    whole = torch.empty(0).set_(after["model"]["t"].untyped_storage(), 0, (7, 5), (5, 1))
    assert torch.equal(whole[:, 0], content["model"]["t"]._base[:, 0])  # bytes between its entries


def test_repaired_module_runs(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    torch.save(net, tmp_path / "net.pt")
    wc.repair(tmp_path / "net.pt", tmp_path / "fixed.pt", 2.0)
    fixed = torch.load(tmp_path / "fixed.pt", weights_only=False)
    assert fixed(torch.ones(1, 6)).shape == (1, 6)
    assert max(f.condition_number for f in wc.audit(fixed).findings) <= 2.0


@pytest.mark.parametrize("beside", [{}, {"x": Path("x")}])
@pytest.mark.parametrize("kind", ["stored", "deflated", "legacy"])
def test_every_format_is_repaired_in_place(
    tmp_path: Path, kind: str, beside: dict[str, Any]
) -> None:
    """Skips objects with their own classes, and tensors that share memory."""
    whole = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    content = {"w": weight(), "left": whole[:, :5], "right": whole[:, 5:], "b": torch.ones(3)}
    data = saved(content | beside, legacy=kind == "legacy")
    if kind == "deflated":
        data = zipped(records(data), zipfile.ZIP_DEFLATED)
    path = written(tmp_path / "a.pt", data)
    wc.repair(path, tmp_path / "fixed.pt", 2.0)
    after = torch.load(tmp_path / "fixed.pt", weights_only=False)
    assert after["b"].equal(content["b"])
    assert after.get("x") == beside.get("x")
    assert after["left"].untyped_storage().data_ptr() == after["right"].untyped_storage().data_ptr()
    for name in ("w", "left", "right"):
        torch.testing.assert_close(after[name], wc.nearest(content[name], 2.0))
    if kind == "legacy":
        assert len(data) == (tmp_path / "fixed.pt").stat().st_size


class Wrapper(Tensor):
    """A tensor subclass that consists of other tensors, like quantised and sharded ones."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Wrapper":
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, *arguments: Any, **more: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        ("torchao.quantization", "Int8Tensor", None),
        ("torch.distributed.tensor", "DTensor", local_shard("DTensor")),
        ("mine", "Masked", Skipped(Reason.tensor_class, "mine.Masked")),
    ],
)
@pytest.mark.parametrize("loaded", [False, True])
def test_tensors_of_foreign_class_counted_and_skipped(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    name: str,
    expected: Skipped | None,
    loaded: bool,
) -> None:
    """The result does not depend on whether the process has and allows the class."""
    kind = type(name, (Wrapper,), {"__module__": module})
    with monkeypatch.context() as patch:
        package = module.split(".")[0]
        patch.setitem(sys.modules, package, sys.modules.get(package, types.ModuleType(package)))
        patch.setitem(sys.modules, module, types.SimpleNamespace(**{name: kind}))  # type: ignore
        content = {"q": kind(torch.eye(4)), "w": torch.eye(4), "b": torch.ones(8)}
        torch.save(content, tmp_path / "a.pt")
    with torch.serialization.safe_globals([kind] if loaded else []):
        report = wc.audit(tmp_path / "a.pt")
    assert report.coverage.skipped.get("q") == expected
    assert ("_q_inner" in report.coverage.skipped) == (expected is None)
    assert [finding.name for finding in report.findings] == ["w"]
    assert report.coverage.parameter_share == 16 / 40


def classes_of(path: Path, pickled: bytes) -> dict[str, TensorClass]:
    """Returns the torchao weights of a file with this extra attribute of a weight."""
    file = Pickled(beside_weights(pickled, "as an object").write(path))
    assert all(part in file.entries for one in file.classes.values() for part in one.parts.values())
    return file.classes


def test_torchao_attributes_are_parts_or_settings(tmp_path: Path) -> None:
    vector = of_storage(b"0", 4)
    inner = of_torchao(b"}(" + text(b"scale") + vector + text(b"_layout") + call(b"a\nB") + b"u")
    state = {
        b"qdata": vector,
        b"inner": inner,
        b"inner_scale": vector,
        b"block_size": b"K\x01K\x03\x86",
        b"kind": call(b"a\nKind", b"K\x02"),
        b"elem_dtype": b"ctorch\nfloat8_of_tomorrow\n",
        b"flag": b"\x88",
        b"nothing": b"N",
        b"function": b"ca\nfunction\n",
        b"bytes": b"U\x01x",
        b"dict": b"}",
        b"objects": b"(" + call(b"a\nB") + b"}t",
        b"huge": b"\x8a\x09" + bytes(8) + b"\x01",
    }
    items = b"".join(text(key) + value for key, value in state.items())
    (found,) = classes_of(tmp_path / "a", of_torchao(b"}(" + items + b"K\x01" * 2 + b"u")).values()
    assert found == TensorClass(
        "Int8Tensor",
        {
            "qdata": "_x_qdata",
            "inner_scale": "_x_inner_scale",
            "inner.scale": "_x_inner_scale (2)",
        },
        {
            "shape": [3, 3],
            "dtype": "float32",
            "inner": "Int8Tensor",
            "block_size": [1, 3],
            "kind": ["Kind", 2],
            "elem_dtype": "float8_of_tomorrow",
            "flag": True,
            "nothing": None,
            "function": "function",
            "bytes": "x",
            "dict": None,
            "objects": ["B", None],
            "huge": None,
            "inner._layout": "B",
        },
    )


@pytest.mark.parametrize("state", [b"N", b"}", text(b"s"), b"}" + text(b"qdata") + b"K\x01s"])
def test_torchao_weight_without_tensors_not_taken_apart(tmp_path: Path, state: bytes) -> None:
    file = Pickled(beside_weights(of_torchao(state), "as an object").write(tmp_path / "a"))
    assert not file.classes
    assert file.entries["x"].skipped == Skipped(Reason.torchao, "Int8Tensor")


def test_torchao_weight_beyond_limits_not_taken_apart(tmp_path: Path) -> None:
    vector = text(b"qdata") + of_storage(b"0", 4)
    many = b"".join(text(b"%d" % n) + b"K\x01" for n in range(70))
    assert not classes_of(tmp_path / "a", of_torchao(b"}(" + vector + many + b"u"))
    nested = of_torchao(b"}(" + vector + b"u")
    for _ in range(5):
        nested = of_torchao(b"}(" + text(b"inner") + nested + b"u")
    assert not classes_of(tmp_path / "b", nested)
    itself = of_torchao(b"N") + put(9) + b"}(" + vector + text(b"me") + get(9) + b"ub"
    assert not classes_of(tmp_path / "c", itself)


class Frozen:
    """A dict like FrozenDict of Flax, whose `__reduce__` returns its content."""

    def __init__(self, content: dict[str, Any], /, **state: Any) -> None:
        self.content, self.state = content, state

    def __reduce__(self) -> tuple[Any, ...]:
        return Frozen, (self.content,), self.state


class Packed:
    """A class whose state is a list."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def __getstate__(self) -> list[Any]:
        return [1, self.content]


class Named:
    """A class that is created with keyword arguments."""

    def __new__(cls, *, weight: Tensor) -> "Named":
        made = super().__new__(cls)
        made.kept = weight
        return made

    def __getnewargs_ex__(self) -> tuple[Any, ...]:
        return (), {"weight": self.kept}

    def __getstate__(self) -> None:
        return None


HOLDERS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "a named tuple": (lambda w: Point(w, 1), "p.0"),
    "within another": (lambda w: Point(Point(1, w), 1), "p.0.0"),
    "arguments of a reduction": (lambda w: Frozen({"fc.weight": w}), "p.fc.weight"),
    "arguments beside attributes": (lambda w: Frozen({"content": w}, content=1), "p.0.content"),
    "keywords": (lambda w: Named(weight=w), "p.weight"),
    "a state that is a list": (lambda w: Packed({"weight": w}), "p.0.1.weight"),
    "a partial function": (lambda w: functools.partial(print, w), "p.2.0"),
    "a deque": (lambda w: deque([w]), "p.0"),
    "an array of objects": (lambda w: np.array([None, [w]], dtype=object), ""),
}


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("what", HOLDERS)
def test_tensors_in_arguments_of_object_are_found(tmp_path: Path, what: str, protocol: int) -> None:
    make, name = HOLDERS[what]
    content = {"w": torch.eye(3), "p": make(weight(5.0))}
    path = written(tmp_path / "a.pt", saved(content, protocol=protocol))
    (found,) = [f for f in wc.audit(path).findings if f.name != "w"]
    assert found.condition_number == 5.0
    if (what, protocol) != ("keywords", 2):  # the kind is a partial function then
        assert not name or found.name == name
    content["p"] = make(torch.full((9, 9), torch.nan))
    report = wc.audit(written(path, saved(content, protocol=protocol)))
    assert [str(one) for one in report.not_finite.values()] == ["81 NaN of 81 entries"]
    assert report.coverage.parameter_share == 9 / 90


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize(
    ("array", "size"),
    [
        (np.ones((4, 8)), 32),
        (np.ones((4, 8), dtype=np.float16, order="F"), 32),
        (np.ones(32, dtype=np.complex64)[::2], 16),
        (np.ma.array(np.ones((4, 8)), mask=False), 32),
        (np.float32(1) * np.ones(()), 0),  # a number in a configuration
        (np.ones((4, 8), dtype=np.int64), 0),
        (np.ones((4, 8), dtype=bool), 0),
        (np.array(["a", None]), 0),
    ],
)
def test_numpy_arrays_counted_and_skipped(
    tmp_path: Path, array: Any, size: int, protocol: int, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"w": torch.eye(4), "body": {"weight": array}}
    path = written(tmp_path / "a.pt", saved(content, protocol=protocol))
    report = wc.audit(path)
    assert report.coverage.parameter_share == 16 / (16 + size)
    if size:
        assert report.coverage.skipped == {"body.weight": Skipped(Reason.array)}
        assert report.coverage.largest_left_out == (("body.weight", size),)
        assert main(["audit", str(path), "--min-coverage", "0.9"]) == 1
        assert "were measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("f2", torch.float16),
        ("c16", torch.complex128),
        ("f16", torch.float64),
        (Foreign("ml_dtypes.bfloat16"), torch.bfloat16),
        (Foreign("ml_dtypes.int4"), None),
        ("i8", None),
        ("O8", None),
        (None, None),
    ],
)
def test_numpy_arrays_of_every_dtype_and_package(code: Any, expected: torch.dtype | None) -> None:
    dtype = Foreign("numpy.dtype", arguments=(code, False, True))
    state = (1, (5, 2), dtype, False, b"")
    objects = (
        Foreign("numpy.core.multiarray._reconstruct", state=state),
        Foreign("numpy._core.numeric._frombuffer", arguments=(b"", dtype, (5, 2), "C")),
        Foreign("jax._src.array._reconstruct_array", arguments=(None, (), state, {})),
    )
    for one in objects:
        found = array_of(one)
        assert (found and (found.shape, found.dtype)) == (expected and ((5, 2), expected))


@pytest.mark.parametrize("shape", [(-1, 2), (2.5,), "ab", None, (1,) * 99, (1 << 40, 1 << 40)])
def test_damaged_numpy_array_is_ignored(shape: Any) -> None:
    dtype = Foreign("numpy.dtype", arguments=("f8",))
    kind = "numpy.core.multiarray._reconstruct"
    for state in ((1, shape, dtype, False, b""), (1, shape), shape, (1, (2, 2), shape, 0, 0)):
        assert array_of(Foreign(kind, state=state)) is None


def test_file_with_only_numpy_arrays_is_refused(tmp_path: Path) -> None:
    torch.save({"w": np.eye(3)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"has none \(w: a NumPy array, which is not read"):
        wc.audit(tmp_path / "a.pt")


@pytest.mark.parametrize("beside", [{}, {"n": np.float64(1)}])
@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr"])
def test_sparse_tensors_counted_and_checked_next_to_objects(
    tmp_path: Path, layout: str, beside: dict[str, Any]
) -> None:
    W = torch.eye(8)
    W[3, 3] = torch.nan
    size = (2, 2) if layout == "sparse_bsr" else None
    sparse = W.to_sparse(layout=getattr(torch, layout), blocksize=size)
    torch.save({"a": sparse, "w": torch.eye(4), **beside}, tmp_path / "a.pt")
    report = wc.audit(tmp_path / "a.pt")
    assert report.coverage.skipped["a"] == Skipped(Reason.not_dense, layout)
    assert report.coverage.parameter_share == 16 / 80
    assert report.not_finite["a"].nan == 1


@pytest.mark.parametrize("legacy", [False, True])
def test_lazy_conjugates_resolved_next_to_objects(tmp_path: Path, legacy: bool) -> None:
    real, imaginary = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    lazy, other, transposed = (torch.complex(real, imaginary).conj() for _ in range(3))
    content = {"lazy": lazy, "negative": other.imag, "rows": transposed.T.imag[1:]}
    path = written(tmp_path / "a.pt", saved({**content, "n": Path("x")}, legacy=legacy))
    found = tensors_of(path)
    for name, tensor in content.items():
        assert torch.equal(found[name].resolve_conj(), tensor.resolve_conj())


def test_repair_writes_through_negative_bit(tmp_path: Path) -> None:
    negative = torch.complex(torch.zeros(3, 3), weight()).conj().imag
    torch.save({"negative": negative, "n": Path("x")}, tmp_path / "a.pt")
    wc.repair(tmp_path / "a.pt", tmp_path / "fixed.pt", 2.0)
    fixed = torch.load(tmp_path / "fixed.pt", weights_only=False)["negative"]
    assert torch.allclose(fixed, wc.nearest(negative.resolve_neg(), 2.0))


def test_tensor_beyond_storage_is_refused(tmp_path: Path) -> None:
    three, many = b"K\x03K\x03\x86", b"M\x20\x4eM\x20\x4e\x86"
    sample = edited({"x": Path("x"), "w": torch.eye(3)}, three, many, False)
    with pytest.raises(UnreadableError, match="beyond its storage"):
        Checkpoint(written(tmp_path / "a.pt", sample.files["a.pt"]))


@pytest.mark.parametrize("beside", [{}, {"x": Path("x")}])
def test_other_byte_order_read_and_repaired(tmp_path: Path, beside: dict[str, Any]) -> None:
    contents = records(saved({"w": weight(), **beside}))
    contents["archive/byteorder"] = b"big" if sys.byteorder == "little" else b"little"
    numbers = np.frombuffer(contents["archive/data/0"], np.float32)
    contents["archive/data/0"] = numbers.byteswap().tobytes()
    path = written(tmp_path / "a.pt", zipped(contents))
    assert torch.equal(tensors_of(path)["w"], weight())
    assert [f.condition_number for f in wc.audit(path).findings] == [9.0]
    wc.repair(path, tmp_path / "fixed.pt", 2.0)
    fixed = torch.load(tmp_path / "fixed.pt", weights_only=False)["w"]
    torch.testing.assert_close(fixed, wc.nearest(weight(), 2.0))


@pytest.mark.parametrize("order", [b"", b"middle", b"little\n"])
def test_unknown_byte_order_is_refused(tmp_path: Path, order: bytes) -> None:
    contents = records(saved({"w": weight()})) | {"archive/byteorder": order}
    with pytest.raises(UnreadableError, match="byteorder must be"):
        Checkpoint(written(tmp_path / "a.pt", zipped(contents)))


def test_module_in_legacy_format_is_read(tmp_path: Path) -> None:
    """Such files contain the source text of each class."""
    layer = nn.Linear(3, 2)
    path = written(tmp_path / "a.pt", saved(layer, legacy=True))
    assert b"module" in path.read_bytes()
    assert torch.equal(tensors_of(path)["weight"], layer.weight)


def test_checksums_corrected_in_every_layout(tmp_path: Path) -> None:
    """torch writes a descriptor after the bytes of a record, and zipfile does not."""
    data = saved({"w": weight(), "x": Path("x")})
    for number, data_of in enumerate((data, zipped(records(data)))):
        flags = struct.unpack("<H", data_of[6:8])[0] & 8
        assert bool(flags) == (number == 0)
        path = written(tmp_path / f"{number}.pt", data_of)
        wc.repair(path, tmp_path / f"fixed{number}.pt", 2.0)
        fixed = (tmp_path / f"fixed{number}.pt").read_bytes()
        assert zipfile.ZipFile(io.BytesIO(fixed)).testzip() is None
