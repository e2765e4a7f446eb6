"""GGUF files: tensors that the package `gguf` writes are read as this package reads them."""

import json
import struct
import sys
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpus import Block, corpus, gguf_file, randn
from safetensors.torch import save_file
from torch import nn

import wellcond as wc
from wellcond.cli import main
from wellcond.files.checkpoint import Checkpoint
from wellcond.files.gguf import Gguf
from wellcond.files.tensors import UnreadableError
from wellcond.weights.reasons import Reason, Skipped
from wellcond.weights.roles import find_role

gguf = pytest.importorskip("gguf")
Kind = gguf.GGMLQuantizationType
SIZES = gguf.GGML_QUANT_SIZES


def is_decoded(kind: Any) -> bool:
    try:
        gguf.quants.dequantize(np.zeros((1, SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


DECODED = [kind for kind in Kind if is_decoded(kind)]
NUMBERS = {Kind.F32: np.float32, Kind.F16: np.float16, Kind.F64: np.float64}


def stored(array: torch.Tensor, kind: Any) -> Any:
    """Quantises to this type, or makes random blocks if the package cannot quantise to it."""
    numbers = array.numpy().astype(np.float32)
    if kind in NUMBERS:
        return numbers.astype(NUMBERS[kind])
    try:
        return gguf.quants.quantize(numbers, kind)
    except NotImplementedError:
        length, size = SIZES[kind]
        shape = (*numbers.shape[:-1], numbers.shape[-1] // length * size)
        return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def write(
    path: Path,
    tensors: Mapping[str, tuple[torch.Tensor, Any]],
    architecture: str = "llama",
    heads: tuple[int, int] | None = None,
    **options: Any,
) -> Path:
    """Writes a file of these tensors in these types with the package."""
    writer = gguf.GGUFWriter(path, architecture, **options)
    if heads:
        writer.add_head_count(heads[0])
        writer.add_head_count_kv(heads[1])
        writer.add_embedding_length(64)
        writer.add_rope_dimension_count(16)
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, stored(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def of(array: torch.Tensor) -> Block:
    return 0, tuple(array.shape), array.numpy().tobytes()


def save(path: Path, tensors: Mapping[str, Block], **settings: Any) -> Path:
    """Writes a file without the package."""
    path.write_bytes(gguf_file(tensors, settings))
    return path


def by_library(path: Path) -> dict[str, Any]:
    return {
        one.name: gguf.quants.dequantize(one.data, one.tensor_type)
        for one in gguf.GGUFReader(path).tensors
    }


def same(tensor: torch.Tensor, array: Any) -> bool:
    """Compares bits, including those of NaN."""
    return tensor.shape == array.shape and tensor.float().numpy().tobytes() == array.tobytes()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the package warns about scales that are NaN
@pytest.mark.parametrize("kind", DECODED, ids=lambda kind: kind.name)
def test_entries_equal_those_of_package(
    tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wellcond.files.gguf._PIECE", 1024)
    arrays = {"matrix": randn(5, 512), "stack": randn(3, 7, 256)}
    path = write(tmp_path / "a.gguf", {name: (array, kind) for name, array in arrays.items()})
    expected, file = by_library(path), Gguf(path)
    assert {*expected} == {*file.entries}
    for name, array in expected.items():
        assert file.entries[name].shape == array.shape
        assert same(file.read(name), array)
        assert same(file.read(name, (1, 3)), array[1:3])
        assert same(file.first_row(name), array.reshape(-1, array.shape[-1])[0])
        assert same(torch.cat([*file.pieces(name)]), array.flatten())
    plain = {Kind.F32: "float32", Kind.F16: "float16", Kind.BF16: "bfloat16"}
    (row, *_) = wc.audit(path).findings
    assert row.dtype.lower() == plain.get(kind, kind.name.lower())


def test_types_have_usual_names(tmp_path: Path) -> None:
    tensors = {"a": (randn(4, 256), Kind.Q4_K), "b": (randn(4, 256), Kind.Q5_1)}
    report = wc.audit(write(tmp_path / "a.gguf", tensors))
    assert {f.name: f.dtype for f in report.findings} == {"a": "q4_K", "b": "q5_1"}


def test_float64_is_preserved(tmp_path: Path) -> None:
    array = randn(4, 3).double() / 3
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("a", array.numpy())
    writer.add_tensor("n", np.arange(6, dtype=np.int32).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = Gguf(tmp_path / "a.gguf")
    assert torch.equal(file.read("a"), array)
    assert torch.equal(file.read("n"), torch.arange(6, dtype=torch.int32).reshape(2, 3))
    assert [*file.pieces("n")] == []


@pytest.mark.parametrize("kind", [Kind.Q8_1, Kind.Q8_K, 99], ids=str)
def test_undecoded_type_skipped_with_reason(tmp_path: Path, kind: int) -> None:
    length, size = SIZES.get(kind, (32, 11))
    w = torch.diag(torch.tensor([9.0, 1.0]))
    other = kind, (2, length), b"\xff" * 2 * size
    report = wc.audit(save(tmp_path / "a.gguf", {"x": other, "w": of(w)}))
    assert [(f.name, f.condition_number) for f in report.findings] == [("w", 9.0)]
    assert report.coverage.skipped["x"].reason is Reason.undecoded
    assert "pip install --upgrade gguf" in str(report.coverage.skipped["x"])
    assert report.coverage.parameter_share == pytest.approx(4 / (4 + 2 * length))
    assert not report.not_finite


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 8, 64])
def test_versions_and_alignments_are_read(tmp_path: Path, version: int, alignment: int) -> None:
    tensors = {"a": of(randn(3, 5)), "number": of(torch.tensor(2.0)), "b": of(randn(2, 3, 4))}
    settings = {"a.list": ["x", "y" * 5000], "general.alignment": alignment, "a.long": "z" * 5000}
    settings |= {"a.many": [1.5] * 2000}
    data = gguf_file(tensors, settings, version, alignment)
    (tmp_path / "a.gguf").write_bytes(data)
    file = Gguf(tmp_path / "a.gguf")
    for name, (_, shape, values) in tensors.items():
        assert file.read(name).numpy().tobytes() == values
        assert file.entries[name].shape == shape


def test_tensors_in_any_order_but_not_overlapping(tmp_path: Path) -> None:
    a, b = randn(2, 4), randn(2, 4, seed=1)
    data = gguf_file({"a": of(a), "b": of(b)}, {})
    first, second = (struct.pack("<QQIQ", 4, 2, 0, offset) for offset in (0, 32))
    assert data.count(first) == data.count(second) == 1
    path = tmp_path / "a.gguf"
    path.write_bytes(
        data.replace(second, b"?" * 28).replace(first, second).replace(b"?" * 28, first)
    )
    assert torch.equal(Gguf(path).read("a"), b)
    assert torch.equal(Gguf(path).read("b"), a)
    for offset in (0, 31, 33, 1 << 40, (1 << 64) - 1):
        path.write_bytes(data.replace(second, struct.pack("<QQIQ", 4, 2, 0, offset)))
        with pytest.raises(UnreadableError, match=r"begins within another|beyond the end|any file"):
            wc.audit(path)


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    data = corpus()["gguf"].files["a.gguf"]
    path = tmp_path / "a.gguf"
    for size in [*range(len(data) - 64, len(data)), *range(0, 900)]:
        path.write_bytes(data[:size])
        with pytest.raises(UnreadableError, match="is not a valid GGUF file"):
            Gguf(path)


HEADER = struct.pack("<4sI", b"GGUF", 3)
NAME = struct.pack("<Q", 1) + b"a"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (HEADER + struct.pack("<QQ", 1 << 62, 0), "declares 4,611,686,018,427,387,904 tensors"),
        (HEADER + struct.pack("<QQ", 0, 1 << 62), "settings, but the limit is"),
        (HEADER + struct.pack("<QQQ", 1, 0, 1 << 63), "a name in its header has"),
        (HEADER + struct.pack("<QQQ", 1, 0, 1) + b"\xff", "is not UTF-8"),
        (HEADER + struct.pack("<QQ", 1, 0) + NAME + struct.pack("<I", 5), "5 dimensions"),
        (HEADER + struct.pack("<QQ", 1, 0) + NAME + struct.pack("<I2Q", 2, 4, 4), "ends within"),
        (
            HEADER
            + struct.pack("<QQ", 1, 0)
            + NAME
            + struct.pack("<I2QIQ", 2, *[1 << 40] * 2, 0, 0),
            "exceeds that of any file",
        ),
        (
            HEADER + struct.pack("<QQ", 1, 0) + NAME + struct.pack("<I2QIQ", 2, 33, 2, 8, 0),
            "not a multiple of",
        ),
        (
            HEADER + struct.pack("<QQ", 0, 1) + NAME + struct.pack("<I", 13),
            "value of the unknown type 13",
        ),
        (
            HEADER + struct.pack("<QQ", 0, 1) + NAME + struct.pack("<IIQ", 9, 8, 1 << 60),
            "an invalid list of 1,152,921,504,606,846,976 values",
        ),
        (HEADER + struct.pack("<QQ", 0, 1) + NAME + struct.pack("<IIQ", 9, 9, 1), "list of 1"),
        (HEADER + struct.pack("<QQ", 0, 1) + NAME + struct.pack("<IIQ", 9, 0, 1 << 62), "ends wit"),
        (gguf_file({}, {"general.alignment": 3}), "not a power of two"),
        (gguf_file({}, {"general.alignment": "x"}), "not a power of two"),
        (gguf_file({"a": of(torch.ones(2, 2))}, {}).replace(b"GGUF", b"GGML"), "begin with GGUF"),
        (b"", "it is empty"),
    ],
)
def test_contradictory_files_are_refused(tmp_path: Path, data: bytes, why: str) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(UnreadableError, match=f"is not a valid GGUF file: .*{why}"):
        wc.audit(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("double", ["tensors", "settings"])
def test_duplicate_names_are_refused(tmp_path: Path, double: str) -> None:
    data = gguf_file({"a.x": of(randn(2, 4)), "a.y": of(randn(2, 4))}, {"b.x": 1, "b.y": 2})
    (tmp_path / "a.gguf").write_bytes(
        data.replace(b"a.y", b"a.x") if double == "tensors" else data.replace(b"b.y", b"b.x")
    )
    with pytest.raises(UnreadableError, match=f"two of its {double} are called [ab]\\.x"):
        Gguf(tmp_path / "a.gguf")


def test_big_endian_and_old_versions_are_refused(tmp_path: Path) -> None:
    big = gguf.GGUFEndian.BIG
    path = write(tmp_path / "a.gguf", {"a": (randn(2, 4), Kind.F32)}, endianess=big)
    with pytest.raises(UnreadableError, match="big-endian: convert it with gguf-convert-endian"):
        wc.audit(path)
    path.write_bytes(struct.pack("<4sIII", b"GGUF", 1, 0, 0))
    with pytest.raises(UnreadableError, match="has version 1"):
        wc.audit(path)


def test_format_recognised_by_content_not_name(tmp_path: Path) -> None:
    data = gguf_file({"w": of(torch.diag(torch.tensor([9.0, 1.0])))}, {})
    for name in ("a.bin", "b.safetensors", "c", "D.GGUF"):
        (tmp_path / name).write_bytes(data)
        assert wc.audit(tmp_path / name).findings[0].condition_number == 9.0


def test_error_without_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.gguf", {"w": of(torch.eye(2))})
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    with pytest.raises(UnreadableError, match=r"requires the package gguf, but.*pip install"):
        wc.audit(path)


def test_nan_scales_are_reported(tmp_path: Path) -> None:
    codes = stored(randn(4, 64), Kind.Q8_0)
    codes[2, 34:36] = [0, 0x7E]  # the scale of the second block: NaN as float16
    data = {"w": (int(Kind.Q8_0), (4, 64), codes.tobytes()), "v": of(torch.eye(3))}
    report = wc.audit(save(tmp_path / "a.gguf", data))
    assert report.not_finite["w"].nan == 32
    status = {f.name: f.status.name for f in report.findings}
    assert status == {"w": "not_finite", "v": "ok"}


def test_repair_error_gives_remedy(tmp_path: Path) -> None:
    path = save(tmp_path / "a.gguf", {"w": of(torch.diag(torch.tensor([9.0, 1.0])))})
    for target in ("b.gguf", "b.safetensors", "b"):
        for dequantise in (False, True):
            with pytest.raises(
                ValueError, match="Repair the checkpoint from which it was converted"
            ):
                wc.repair(path, tmp_path / target, 2.0, dequantise=dequantise)
    assert [one.name for one in tmp_path.iterdir()] == ["a.gguf"]


def kappas(path: Path) -> dict[str, float]:
    return {f.name: f.condition_number for f in wc.audit(path).findings}


def test_split_files_are_one_model(tmp_path: Path) -> None:
    tensors = {f"blk.{n}.ffn_up.weight": (randn(6, 32, seed=n), Kind.Q8_0) for n in range(5)}
    whole = kappas(write(tmp_path / "whole.gguf", tensors))
    folder = tmp_path / "split"
    folder.mkdir()
    write(folder / "m.gguf", tensors, split_max_tensors=2)
    parts = sorted(folder.iterdir())
    assert [part.name for part in parts] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert kappas(folder) == whole
    assert not wc.audit(folder).coverage.skipped
    one = wc.audit(parts[1])
    assert {f.name for f in one.findings} == {f"blk.{n}.ffn_up.weight" for n in (2, 3)}
    assert one.coverage.skipped == {"part 1, 3 of 3": Skipped(Reason.absent)}
    parts[1].unlink()
    report = wc.audit(folder)
    assert {f.name for f in report.findings} == {f"blk.{n}.ffn_up.weight" for n in (0, 1, 4)}
    assert report.coverage.skipped == {"part 2 of 3": Skipped(Reason.absent)}
    (tmp_path / "whole.gguf").rename(folder / "whole.gguf")
    assert f"{parts[0].name}/blk.0.ffn_up.weight" in kappas(folder)  # not parts of one model


def test_several_copies_distinguished_by_file(tmp_path: Path) -> None:
    for kind in (Kind.F16, Kind.Q8_0):
        write(tmp_path / f"{kind.name}.gguf", {"output.weight": (randn(4, 32), kind)})
    assert {*kappas(tmp_path)} == {"F16.gguf/output.weight", "Q8_0.gguf/output.weight"}
    save_file({"w": torch.eye(2)}, tmp_path / "model.safetensors")
    report = wc.audit(tmp_path)
    assert [f.name for f in report.findings] == ["w"]
    assert report.coverage.skipped["F16.gguf"].reason is Reason.unread
    assert "give its path" in str(report.coverage.skipped["F16.gguf"])


SHAPES = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64)}
SHAPES |= {"gate": (96, 64), "up": (96, 64), "down": (64, 96)}
LAYERS = {
    f"model.layers.{n}.{'self_attn' if key in 'qkvo' else 'mlp'}.{key}_proj.weight": randn(
        *shape, seed=9 * n + len(key) + ord(key[0])
    )
    for n in (0, 1)
    for key, shape in SHAPES.items()
}
HEADS = 4, 2
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": HEADS[0],
    "num_key_value_heads": HEADS[1],
    "rope_theta": 10000.0,
}


def permuted(W: torch.Tensor, heads: int) -> torch.Tensor:
    """Orders rows by pairs of the rotation, like the llama.cpp converter for q and k."""
    return W.reshape(heads, 2, len(W) // heads // 2, -1).transpose(1, 2).reshape(W.shape)


def converted(state: Mapping[str, torch.Tensor], kind: Any) -> dict[str, tuple[torch.Tensor, Any]]:
    """Converts a Llama model like llama.cpp."""
    others = {"lm_head.weight": "output.weight", "model.embed_tokens.weight": "token_embd.weight"}
    others["model.norm.weight"] = "output_norm.weight"
    found = {}
    for name, W in state.items():
        if name in others:
            found[others[name]] = W, kind if W.ndim > 1 else Kind.F32
            continue
        layer, own = name.removeprefix("model.layers.").split(".", 1)
        key = own.removesuffix("_proj.weight").split(".")[-1]
        own = {
            "o": "attn_output",
            "input_layernorm.weight": "attn_norm",
            "post_attention_layernorm.weight": "ffn_norm",
        }.get(key if key == "o" else own, f"{'attn' if key in 'qkv' else 'ffn'}_{key}")
        if key in "qk":
            W = permuted(W, HEADS[key == "k"])
        found[f"blk.{layer}.{own}.weight"] = W, kind if W.ndim > 1 else Kind.F32
    return found


@pytest.fixture
def original(tmp_path: Path) -> Path:
    folder = tmp_path / "original"
    folder.mkdir()
    save_file(LAYERS | {"lm_head.weight": randn(80, 64)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def test_heads_equal_those_of_converted_checkpoint(tmp_path: Path, original: Path) -> None:
    path = write(tmp_path / "a.gguf", converted(LAYERS, Kind.F32), heads=HEADS)
    assert Gguf(path).settings == {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "rotary_dim": 16,
    }
    ours, theirs = (wc.audit(one, heads=True).findings for one in (path, original))
    found = {(f.name, f.view): f for f in ours if f.view}
    expected = {(f.name, f.view): f for f in theirs if f.view}
    assert len(found) == len(expected) == 16
    for (name, view), finding in expected.items():
        layer = name.split(".")[2]
        other = found[f"blk.{layer}", view]
        for key in ("sigma_max", "condition_number", "stable_rank"):
            assert getattr(other, key) == pytest.approx(getattr(finding, key), rel=1e-6)
        assert "keys of head" in other.detail or view.startswith("vo")


def test_compare_with_quantised_file(tmp_path: Path, original: Path) -> None:
    state = LAYERS | {"lm_head.weight": randn(80, 64)}
    path = write(tmp_path / "a.gguf", converted(state, Kind.Q8_0), heads=HEADS)
    comparison = wc.compare(original, path, heads=True)
    assert len(comparison.pairs) == 15 + 16
    assert all(pair.before and pair.after for pair in comparison.pairs)
    for pair in comparison.pairs:
        assert pair.before is not None
        assert pair.before.name == pair.label or pair.before.name.endswith(pair.label.split(":")[0])
        square = pair.before.shape[0] == pair.before.shape[1]
        assert pair.ratio == pytest.approx(1, rel=0.5 if square else 0.01)
        if pair.before.view:
            continue
        assert pair.change is not None
        assert 0.001 < pair.change.relative < 0.01
    back = {pair.label: pair.change for pair in wc.compare(path, original).pairs}
    for pair in comparison.pairs:
        if pair.change:
            change = back[pair.label]
            assert change is not None
            assert change.relative == pytest.approx(pair.change.relative, rel=0.01)
    other = write(tmp_path / "b.gguf", converted(state, Kind.Q4_0), heads=HEADS)
    changes = {pair.label: pair.change for pair in wc.compare(path, other).pairs}
    q = changes["blk.0.attn_q.weight"]
    assert q is not None
    assert 0.02 < q.relative < 0.2


@pytest.mark.parametrize("moved", [False, True])
def test_compare_reorders_rows_of_q_and_k(tmp_path: Path, moved: bool) -> None:
    """Files converted from Mistral's own format keep the order of rows."""
    q, k = randn(64, 8), randn(32, 8, seed=1)
    state = {"layers.0.self_attn.q_proj.weight": q, "layers.0.self_attn.k_proj.weight": k}
    save_file(state, tmp_path / "a.safetensors")
    tensors = {
        f"blk.0.attn_{name}.weight": (permuted(W, heads) if moved else W, Kind.F32)
        for name, W, heads in (("q", q, 4), ("k", k, 2))
    }
    path = write(tmp_path / "a.gguf", tensors)
    for before, after in ((tmp_path / "a.safetensors", path), (path, tmp_path / "a.safetensors")):
        changes = [pair.change for pair in wc.compare(before, after).pairs]
        assert [change and change.relative for change in changes] == [0.0, 0.0]


@pytest.mark.frameworks
def test_order_of_rows_equals_that_of_converter(tmp_path: Path) -> None:
    """The loader of transformers reverses the order, and returns the original weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS[0],
        num_key_value_heads=HEADS[1],
        vocab_size=80,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(HEADS[0])
    writer.add_head_count_kv(HEADS[1])
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_block_count(2)
    writer.add_vocab_size(80)
    writer.add_context_length(64)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    for name, (array, _) in converted(state, Kind.F32).items():
        writer.add_tensor(name, array.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    ours, theirs = wc.audit(path, heads=True).findings, wc.audit(loaded, heads=True).findings
    kappa = sorted(f.condition_number for f in ours if f.view)
    expected = sorted(f.condition_number for f in theirs if f.view)
    assert kappa == pytest.approx(expected, rel=1e-6)


def test_experts_measured_separately_and_compared(tmp_path: Path) -> None:
    stem = "model.layers.0.block_sparse_moe"
    experts = {
        f"{stem}.experts.{n}.{name}.weight": randn(*shape, seed=n + shape[0])
        for n in range(3)
        for name, shape in {"w1": (48, 32), "w2": (32, 64), "w3": (40, 32)}.items()
    }
    gate = f"{stem}.gate.weight"
    save_file(experts | {gate: randn(3, 32)}, tmp_path / "a.safetensors")
    stacks = {
        f"blk.0.ffn_{own}_exps.weight": torch.stack(
            [experts[f"{stem}.experts.{n}.{name}.weight"] for n in range(3)]
        )
        for name, own in {"w1": "gate", "w2": "down", "w3": "up"}.items()
    }
    tensors = {name: (W, Kind.Q8_0) for name, W in stacks.items()}
    tensors["blk.0.ffn_gate_inp.weight"] = randn(3, 32), Kind.F32
    path = write(tmp_path / "a.gguf", tensors)
    report = wc.audit(path)
    assert {f.label for f in report.findings} == {
        *(f"{name}:{n}" for name in stacks for n in range(3)),
        "blk.0.ffn_gate_inp.weight",
    }
    assert not any("guess" in f.detail for f in report.findings)
    pairs = wc.compare(tmp_path / "a.safetensors", path).pairs
    assert len(pairs) == 10
    assert all(pair.change and pair.change.relative < 0.01 for pair in pairs)


def test_fused_qkv_is_split(tmp_path: Path) -> None:
    q, k, v = randn(64, 64), randn(32, 64, seed=1), randn(32, 64, seed=2)
    tensors = {
        "blk.0.attn_qkv.weight": (torch.cat([q, k, v]), Kind.F32),
        "blk.0.attn_output.weight": (randn(64, 64), Kind.F32),
        "blk.0.ffn_up.weight": (torch.cat([randn(48, 64), randn(48, 64, seed=3)]), Kind.F32),
        "blk.0.ffn_down.weight": (randn(64, 48), Kind.F32),
    }
    path = write(tmp_path / "a.gguf", tensors, "phi3", heads=HEADS)
    report = wc.audit(path, heads=True)
    found = {f.label: f.condition_number for f in report.findings}
    for name, W in {"q": q, "k": k, "v": v}.items():
        expected = wc.condition_number(W.double()).item()
        assert found[f"blk.0.attn_qkv.weight:{name}"] == pytest.approx(expected, rel=1e-6)
    gate = wc.condition_number(randn(48, 64).double()).item()
    assert found["blk.0.ffn_up.weight:gate"] == pytest.approx(gate, rel=1e-6)
    assert {label for label in found if label.startswith("blk.0:")} == {
        f"blk.0:{kind}{n}" for kind in ("qk", "vo") for n in range(4)
    }


def test_per_layer_settings_used_if_equal(tmp_path: Path) -> None:
    for counts, expected in (([4, 4], 4), ([4, 2], None)):
        path = save(
            tmp_path / "a.gguf",
            {"a": of(torch.eye(2))},
            **{"general.architecture": "x", "x.attention.head_count": counts},
        )
        assert Gguf(path).settings.get("num_attention_heads") == expected


def test_tensors_that_are_not_matrices_are_skipped(tmp_path: Path) -> None:
    reasons = {
        "token_embd.weight": (Reason.embedding, (9, 8)),
        "position_embd.weight": (Reason.embedding, (9, 8)),
        "token_types.weight": (Reason.embedding, (2, 8)),
        "per_layer_token_embd.weight": (Reason.embedding, (9, 8)),
        "enc.blk.0.attn_rel_b.weight": (Reason.embedding, (9, 8)),
        "rope_freqs.weight": (Reason.vector, (8,)),
        "output_norm.weight": (Reason.vector, (8,)),
        "blk.0.attn_sinks.weight": (Reason.vector, (8,)),
        "blk.0.ssm_a": (Reason.exponentiated, (8, 4)),
        "blk.0.ssm_d": (Reason.vector, (8,)),
    }
    weights = ["output", "blk.0.ssm_in", "blk.0.ssm_out", "blk.0.ssm_x", "blk.0.ssm_dt"]
    weights += ["blk.0.ffn_gate_inp", "blk.0.attn_q_a", "v.patch_embd", "cls.output"]
    tensors = {name: of(randn(*shape)) for name, (_, shape) in reasons.items()}
    tensors |= {f"{name}.weight": of(randn(8, 6)) for name in weights}
    tensors["v.patch_embd.weight"] = of(randn(32, 3, 4, 4))
    report = wc.audit(save(tmp_path / "a.gguf", tensors))
    found = {name: why.reason for name, why in report.coverage.skipped.items()}
    assert found == {name: reason for name, (reason, _) in reasons.items()}
    assert {f.name for f in report.findings} == {f"{name}.weight" for name in weights}


@pytest.mark.parametrize("name", ["ssm_conv1d", "ssm_conv1d_q", "shortconv.conv"])
def test_depthwise_kernel_measured_like_model(tmp_path: Path, name: str) -> None:
    """GGUF omits the axis of length 1 of the kernel."""
    model = nn.Conv1d(8, 8, 4, groups=8)
    kernel = of(model.weight.detach()[:, 0].contiguous())
    (alone,) = wc.audit(model).findings
    (found,) = wc.audit(save(tmp_path / "a.gguf", {f"blk.0.{name}.weight": kernel})).findings
    assert found.shape == alone.shape == (8, 1, 4)
    assert found.condition_number == alone.condition_number > 1


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("token_embd", "embedding"),
        ("output", "head"),
        ("blk.0.attn_q", "q"),
        ("blk.0.attn_k", "k"),
        ("blk.0.attn_v", "v"),
        ("blk.0.attn_output", "o"),
        ("v.blk.0.attn_out", "o"),
        ("enc.blk.0.attn_o", "o"),
        ("dec.blk.0.cross_attn_k", "k"),
        ("blk.0.ffn_gate", "gate"),
        ("blk.0.ffn_up_exps", "up"),
        ("blk.0.ffn_down_shexp", "down"),
        ("blk.0.attn_qkv", "qkv"),
        ("blk.0.ffn_gate_inp", ""),
        ("encoder.layer.0.output", ""),
        ("blk.0.ssm_out", ""),
    ],
)
def test_roles_of_names(name: str, role: str) -> None:
    assert find_role(f"{name}.weight") == role


def test_scale_tensors_multiply_weights(tmp_path: Path) -> None:
    """A layer has one factor, as in BitNet and NVFP4; each expert has its own."""
    layer, stack = stored(randn(4, 64), Kind.Q8_0), stored(randn(3, 4, 32), Kind.Q8_0)
    half = randn(4, 8).half()
    factors = torch.tensor([0.5, 2.0, 3.0])
    tensors: dict[str, Block] = {
        "a.weight": (int(Kind.Q8_0), (4, 64), layer.tobytes()),
        "a.scale": of(torch.tensor([0.3])),
        "b_exps.weight": (int(Kind.Q8_0), (3, 4, 32), stack.tobytes()),
        "b_exps.scale": of(factors),
        "c.weight": (1, (4, 8), half.numpy().tobytes()),
        "c.scale": of(torch.tensor([3.0])),
        "d.weight": of(randn(4, 8)),
        "d.scale": of(torch.ones(7)),
    }
    path = save(tmp_path / "a.gguf", tensors)
    expected, file = by_library(path), Gguf(path)
    assert torch.equal(file.read("a.weight"), torch.from_numpy(expected["a.weight"]) * 0.3)
    b = torch.from_numpy(expected["b_exps.weight"]) * factors[:, None, None]
    assert torch.equal(file.read("b_exps.weight"), b)
    assert torch.equal(file.read("b_exps.weight", (1, 2)), b[1:2])
    assert torch.equal(file.read("c.weight"), half.float() * 3)
    assert torch.equal(file.read("d.weight"), randn(4, 8))
    dtypes = {f.name: f.dtype for f in wc.audit(path).findings}
    assert dtypes["a.weight"] == "q8_0"
    assert dtypes["c.weight"] == "float16"


def test_command_line_reads_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = corpus()["gguf"].write(tmp_path / "folder")
    assert main(["audit", str(path), "--heads"]) == 0
    out = capsys.readouterr().out
    assert "blk.0.ffn_gate_exps.weight:1" in out
    assert "q4_0" in out
    assert main(["repair", str(path), str(tmp_path / "b.gguf"), "--max-condition", "3"]) == 2
    assert "wellcond does not write GGUF files" in capsys.readouterr().err


def test_names_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "a.gguf", {"\x1b[2J\n.weight": of(randn(3, 4))})
    assert {*Checkpoint(path).where} == {"\x1b[2J\n.weight"}
    assert main(["audit", str(path)]) == 0
    assert "\x1b[2J" not in capsys.readouterr().out
