"""Flax files: arrays equal those that Flax reads, and singular values those of its layers.

write_flax.py writes the data; the tests pack damaged files themselves.
"""

import json
import math
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors.torch import save_file

import wellcond as wc
from wellcond.files.flax import Flax
from wellcond.files.msgpack import Unpacker
from wellcond.files.tensors import NoTensorsError, UnreadableError
from wellcond.weights.reasons import Reason

DATA = Path(__file__).with_name("data") / "flax"


def packed(value: Any) -> bytes:
    """Packs a value with msgpack, and an array like Flax."""
    match value:
        case np.ndarray():
            inner = packed([[*value.shape], value.dtype.name, value.tobytes()])
            return b"\xc9" + struct.pack(">I", len(inner)) + b"\x01" + inner
        case dict():
            pairs = [packed(one) for item in value.items() for one in item]
            return b"\xde" + struct.pack(">H", len(value)) + b"".join(pairs)
        case list():
            return b"\xdc" + struct.pack(">H", len(value)) + b"".join(packed(n) for n in value)
        case str():
            return b"\xda" + struct.pack(">H", len(value.encode())) + value.encode()
        case bytes():
            return b"\xc6" + struct.pack(">I", len(value)) + value
        case None | bool():
            return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
        case int():
            return b"\xd3" + struct.pack(">q", value)
        case _:
            return b"\xcb" + struct.pack(">d", value)


def extension(shape: Any, dtype: Any, data: Any, code: int = 1) -> bytes:
    inner = packed([shape, dtype, data])
    return b"\xc9" + struct.pack(">Ib", len(inner), code) + inner


def tree_of(**members: bytes) -> bytes:
    """Joins packed values to a map."""
    return bytes([0x80 + len(members)]) + b"".join(
        packed(name) + value for name, value in members.items()
    )


# --- comparison with Flax -------------------------------------------------------------------------


def test_singular_values_equal_those_of_flax_layers() -> None:
    expected = json.loads((DATA / "expected.json").read_text())["singular values"]
    report = wc.audit(DATA / "state.msgpack")
    found = {f.label.removesuffix(":kernel"): f for f in report.findings}
    assert found.keys() == expected.keys()
    for label, values in expected.items():
        finding = found[label]
        assert len(values) == min(finding.shape), label
        assert finding.sigma_max == pytest.approx(values[0], rel=1e-4), label
        assert finding.sigma_min == pytest.approx(values[-1], rel=1e-3), label
    reasons = {name: why.reason for name, why in report.coverage.skipped.items()}
    assert reasons["opt_state"] is Reason.optimizer
    assert reasons["batch_stats/BatchNorm_0/mean"] is Reason.normalisation
    assert reasons["params/Embed_0/embedding"] is Reason.embedding
    assert reasons["params/encoderblock/LayerNorm_0/scale"] is Reason.exponentiated
    assert Reason.layout not in reasons.values()


def test_every_kind_of_array_is_read() -> None:
    """This includes arrays in chunks, into which Flax splits arrays above 1 GB."""
    kernel = torch.tensor(json.loads((DATA / "expected.json").read_text())["kernel"])
    file = Flax(DATA / "chunked.msgpack")
    assert torch.equal(file.read("float32"), kernel)
    assert torch.equal(file.read("float32", (2, 6)), kernel[2:6])
    assert torch.equal(file.read("float32", (3, 3)), kernel[3:3])
    assert torch.equal(file.read("bfloat16"), kernel.bfloat16())
    assert torch.equal(file.read("list/0"), kernel)
    assert torch.equal(file.read("list/1/kernel"), kernel.T)
    assert torch.equal(file.read("complex"), torch.tensor([[9, 1j], [0, 1]]))
    assert torch.equal(file.first_row("float32"), kernel[0])
    assert torch.equal(torch.cat([*file.pieces("float32")]), kernel.flatten())
    assert len(file._stored["float32"].places) > 1
    assert file.entries["empty"].shape == (0, 3)
    assert file.entries["float8"].skipped is not None
    assert file.entries.keys().isdisjoint({"native", "scalar", "text", "none"})
    assert wc.audit(DATA / "array.msgpack").findings[0].condition_number == pytest.approx(9.0)


@pytest.mark.libraries
def test_flax_output_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flax")
    command = [sys.executable, DATA.parent.with_name("write_flax.py"), tmp_path]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setattr(sys.modules[__name__], "DATA", tmp_path)
    test_singular_values_equal_those_of_flax_layers()
    test_every_kind_of_array_is_read()


# --- files and folders ----------------------------------------------------------------------------


def test_checkpoint_without_ending_recognised_by_content(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_100").write_bytes(packed({"params": {"w": np.diag([9.0, 1.0])}}))
    found = wc.audit(tmp_path / "checkpoint_100").findings
    assert [(f.name, f.condition_number) for f in found] == [("params/w", 9.0)]
    (tmp_path / "checkpoint_101").write_bytes(b"text")
    with pytest.raises(UnreadableError, match="must end in"):
        wc.audit(tmp_path / "checkpoint_101")


def test_optimizer_state_is_skipped(tmp_path: Path) -> None:
    match = "only the state of an optimizer"
    shutil.copy(DATA / "opt_state.msgpack", tmp_path / "other.msgpack")
    (tmp_path / "opt_state.msgpack").write_bytes(packed({"0": {"trace": {"w": np.eye(3)}}}))
    for name in ("opt_state", "other"):
        with pytest.raises(NoTensorsError, match=match):
            wc.audit(tmp_path / f"{name}.msgpack")
    (tmp_path / "flax_model.msgpack").write_bytes(packed({"d": {"kernel": np.eye(3)}}))
    report = wc.audit(tmp_path)
    assert [f.name for f in report.findings] == ["d/kernel"]
    skipped = {name: why.reason for name, why in report.coverage.skipped.items()}
    assert skipped == dict.fromkeys(("opt_state.msgpack", "other.msgpack"), Reason.no_tensors)


def test_shards_read_through_index(tmp_path: Path) -> None:
    """transformers 4 saved large Flax models in shards."""
    for number in (1, 2):
        content = {"model": {str(number): {"kernel": np.diag([9.0, number])}}}
        (tmp_path / f"flax_model-0000{number}-of-00002.msgpack").write_bytes(packed(content))
    index = {f"model/{n}/kernel": f"flax_model-0000{n}-of-00002.msgpack" for n in (1, 2)}
    text = json.dumps({"weight_map": index})
    (tmp_path / "flax_model.msgpack.index.json").write_text(text)
    found = {f.name: f.condition_number for f in wc.audit(tmp_path).findings}
    assert found == {"model/1/kernel": 9.0, "model/2/kernel": 4.5}
    save_file({"w": torch.eye(2)}, tmp_path / "model.safetensors")
    report = wc.audit(tmp_path)
    assert [f.name for f in report.findings] == ["w"]
    assert {why.reason for why in report.coverage.skipped.values()} == {Reason.unread}


def test_repair_error_explains_conversion(tmp_path: Path) -> None:
    path, other = tmp_path / "a.msgpack", tmp_path / "b.safetensors"
    path.write_bytes(packed({"d": {"kernel": np.diag([9.0, 1.0])}}))
    with pytest.raises(ValueError, match="cannot be repaired: it is a Flax msgpack file") as error:
        wc.repair(path, other, 2.0)
    assert not other.exists()
    _, _, code = str(error.value).rstrip(".").partition("as safetensors: ")
    compile(code, "", "eval")


@pytest.mark.libraries
def test_conversion_from_flax_works(tmp_path: Path) -> None:
    flax = pytest.importorskip("flax")
    path, other = DATA / "state.msgpack", tmp_path / "b.safetensors"
    _, _, code = Flax.not_copied.partition("as safetensors: ")
    exec(code, {"flax": flax, "safetensors": safetensors, "path": path, "other": other})
    before, after = ({f.label: f.sigma_max for f in wc.audit(p).findings} for p in (path, other))
    assert before.items() <= after.items()


def test_unknown_order_of_axes_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.msgpack"
    drawn = np.random.default_rng(0).standard_normal
    content = {
        "mlp": {"kernel": drawn((4, 8, 16))},  # layers without a bias or a window
        "ConvTranspose_0": {"kernel": drawn((3, 3, 8, 8)), "bias": drawn(8)},
        "query": {"kernel": drawn((3, 8, 8))},
        "Conv_0": {"kernel": drawn((3, 8, 16))},
    }
    path.write_bytes(packed(content))
    report = wc.audit(path)
    assert [f.name for f in report.findings] == ["Conv_0/kernel"]
    reasons = {name: why.reason for name, why in report.coverage.skipped.items()}
    assert [name for name, why in reasons.items() if why is Reason.layout] == [
        "mlp/kernel",
        "ConvTranspose_0/kernel",
        "query/kernel",
    ]
    (asked,) = wc.audit(path, include=["mlp/kernel"]).findings
    assert "guess" in asked.detail


# --- damage ---------------------------------------------------------------------------------------


EYE = np.eye(2, dtype="float32")
GOOD = extension([2, 2], "float32", EYE.tobytes())
CHUNKED = "__msgpack_chunked_array__"


def chunked(shape: Any, chunks: Any, name: str = CHUNKED) -> bytes:
    return tree_of(w=tree_of(**{name: b"\xc3", "shape": packed(shape), "chunks": chunks}))


def test_packed_test_data_is_read(tmp_path: Path) -> None:
    half = extension([2], "float32", EYE[0].tobytes())
    for data in (tree_of(w=GOOD), chunked({"0": 2, "1": 2}, tree_of(**{"0": half, "1": half}))):
        (tmp_path / "a.msgpack").write_bytes(data)
        assert Flax(tmp_path / "a.msgpack").read("w").shape == (2, 2)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "ends within a value"),
        (tree_of(w=GOOD)[:-1], "beyond its end"),
        (tree_of(w=GOOD) + b"\xc0", "1 bytes follow"),
        (b"\xc1", "has an unknown kind"),
        (b"\xdf\xff\xff\xff\xff", "beyond its end"),
        (b"\xdd\xff\xff\xff\xff" + bytes(99), "beyond its end"),
        (b"\xc6\xff\xff\xff\xff", "beyond its end"),
        (b"\x91" * 5000 + b"\xc0", "levels"),
        (b"\x81\xa1w" * 5000 + b"\xc0", "levels"),
        (b"\x82\xa1w\xc0\xa1w\xc0", "keys are the same"),
        (b"\x82\xa11\xc0\x01\xc0", "keys are the same"),
        (b"\x81\x90\xc0", "neither a string"),
        (b"\x81\xa2\xff\xff\xc0", "are inconsistent"),
        (tree_of(w=extension([2, 2], "float32", b"123")), "size of an array"),
        (tree_of(w=extension([2, -2], "float32", b"")), "shape of an array"),
        (tree_of(w=extension([True, 4], "float32", EYE.tobytes())), "shape of an array"),
        (tree_of(w=extension([1 << 62, 1 << 62], "float32", b"")), "shape of an array"),
        (tree_of(w=extension(4, "float32", EYE.tobytes())), "no shape, dtype or entries"),
        (tree_of(w=extension([2, 2], 5, EYE.tobytes())), "no shape, dtype or entries"),
        (tree_of(w=extension([2, 2], "float32", "text")), "no shape, dtype or entries"),
        (tree_of(w=b"\xd4\x01\xc0"), "no shape, dtype or entries"),
        (b"\x82" + packed("a/b") + GOOD + packed("a") + tree_of(b=GOOD), "the same name"),
        (chunked({"0": 2}, tree_of(**{"0": GOOD})), "differ from it"),
        (chunked({"0": 4}, tree_of(**{"1": GOOD})), "differ from it"),
        (chunked({"0": 0}, tree_of()), "differ from it"),
        (chunked({"1": 4}, tree_of(**{"0": GOOD})), "shape of an array"),
        (chunked([4], tree_of(**{"0": GOOD})), "no shape or no chunks"),
        (tree_of(w=tree_of(**{CHUNKED: b"\xc3"})), "no shape or no chunks"),
    ],
)
def test_contradictory_files_are_refused(tmp_path: Path, data: bytes, what: str) -> None:
    (tmp_path / "a.msgpack").write_bytes(data)
    with pytest.raises(UnreadableError, match=f"is not a valid Flax msgpack file.*{what}"):
        wc.audit(tmp_path / "a.msgpack")


@pytest.mark.parametrize(
    "data", [b"\xc0", b"\x05", b"\x80", packed({"a": "text"}), tree_of(w=b"\xd4\x09\xc0")]
)
def test_file_without_arrays_not_reported_as_damaged(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.msgpack").write_bytes(data)
    with pytest.raises(NoTensorsError, match="but contains none"):
        wc.audit(tmp_path / "a.msgpack")


def test_too_many_values_are_refused(tmp_path: Path) -> None:
    """A value of one byte would need 50 bytes of memory."""
    count = 3 << 20
    (tmp_path / "a.msgpack").write_bytes(b"\xdd" + struct.pack(">I", count) + b"\xc0" * count)
    with pytest.raises(UnreadableError, match="more than 1,048,576 values"):
        wc.audit(tmp_path / "a.msgpack")


def test_rows_of_file_larger_than_memory_are_read(tmp_path: Path) -> None:
    """The file is sparse; msgpack has no longer strings."""
    rows, path = (1 << 30) - 16, tmp_path / "a.msgpack"
    whole = packed({"w": np.zeros((0, 1), "float32")})
    inner = b"\x93\x92" + packed(rows) + b"\x01" + packed("float32")
    inner += b"\xc6" + struct.pack(">I", 4 * rows)
    assert math.log2(4 * rows) < 32
    with path.open("wb") as file:
        head = whole[: whole.index(b"\xc9")]
        file.write(head + b"\xc9" + struct.pack(">Ib", len(inner) + 4 * rows, 1) + inner)
        file.seek(4 * (rows - 1), 1)
        file.write(np.float32(7).tobytes())
    assert Flax(path).read("w", (rows - 2, rows)).tolist() == [[0.0], [7.0]]


def test_numbers_equal_packed_numbers(tmp_path: Path) -> None:
    """The examples are those of the specification of msgpack."""
    examples = {
        b"\x7f": 127,
        b"\xe0": -32,
        b"\xcc\xff": 255,
        b"\xcd\x01\x00": 256,
        b"\xce\x00\x01\x00\x00": 65536,
        b"\xcf" + b"\xff" * 8: 2**64 - 1,
        b"\xd0\x80": -128,
        b"\xd1\x80\x00": -32768,
        b"\xd2\xff\xff\xff\xff": -1,
        b"\xd3" + b"\xff" * 8: -1,
        b"\xca\x3f\x80\x00\x00": 1.0,
        b"\xcb\x3f\xf0" + bytes(6): 1.0,
        b"\xc2": False,
        b"\xd9\x01a": "a",
        b"\xda\x00\x01a": "a",
        b"\xdb\x00\x00\x00\x01a": "a",
        b"\xdc\x00\x01\x01": [1],
        b"\xde\x00\x01\xa1a\x01": {"a": 1},
    }
    for data, value in examples.items():
        (tmp_path / "a").write_bytes(data)
        with (tmp_path / "a").open("rb") as file:
            assert Unpacker(file).read(0, len(data)) == value
