"""Small real files of every supported format. A sample contains all files of one checkpoint."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import pickle
import re
import struct
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.distributed.checkpoint as dcp
from onnx import helper, numpy_helper
from safetensors.torch import save
from torch import Tensor, nn

# The beginnings of the names of samples whose formats are not copied.
READ_ONLY = ("exported", "flax", "gguf", "keras", "npz", "npy", "onnx", "script")
DATA = Path(__file__).with_name("data")
KERAS = DATA / "keras"  # see write_keras.py
CANARY = "canary"  # the file that code in a pickle would create in the working directory


@dataclass(frozen=True)
class Sample:
    """A checkpoint: the file given to the reader, or "" for the folder, and all files."""

    path: str
    files: dict[str, bytes]

    def write(self, folder: Path) -> Path:
        """Writes the files, and returns the path to read."""
        folder.mkdir()
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        return folder / self.path


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain() -> dict[str, Tensor]:
    """Makes a state dict for both formats, with every kind of weight and other tensors."""
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    kinds += [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]
    tensors = {f"as_{str(kind)[6:]}.weight": randn(4, 6).to(kind) for kind in kinds}
    return tensors | {
        "layer.weight": randn(5, 7),
        "layer.bias": randn(5),
        "experts.weight": randn(2, 3, 4),
        "conv.weight": randn(4, 3, 2, 2),
        "deficient": torch.ones(3, 3),
        "zero": torch.zeros(2, 4),
        "number": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
    }


def quantised() -> dict[str, Tensor]:
    """Makes packed weights with scales, like quantisation tools."""
    return {
        "a.qweight": torch.arange(12, dtype=torch.int32).reshape(3, 4),
        "a.qzeros": torch.ones(1, 4, dtype=torch.int32),
        "a.scales": randn(2, 4).half(),
        "b.weight": randn(4, 4).to(torch.float8_e4m3fn),
        "b.weight_scale_inv": randn(2, 2),
        "c.weight": torch.ones(6, 1, dtype=torch.uint8),
        "c.weight.absmax": randn(3),
        "d.weight": randn(3, 3),
    }


def _views() -> dict[str, Tensor]:
    whole, other = randn(6, 4), randn(4, 3, seed=1)
    return {
        "qkv": whole,
        "k": whole[2:4],
        "tied": whole,
        "transposed": whole.T,
        "left": other[:3],
        "right": other[1:],
        "expanded": randn(1, 4).expand(3, 4),
        "strided": randn(6, 6)[::2, 1::2],
    }


def _reads_nested() -> bool:
    """Returns whether torch.load accepts nested tensors as data; newer versions may not."""
    file = io.BytesIO()
    torch.save(torch.nested.nested_tensor([randn(2, 3), randn(1, 3)]), file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True


NESTED = _reads_nested()


def _rare() -> dict[str, Any]:
    """Makes tensors that are not plain arrays, and other objects."""
    return {
        "weight": nn.Parameter(randn(3, 3)),
        "complex": torch.complex(randn(3, 3), randn(3, 3, seed=1)),
        "sparse": torch.eye(4).to_sparse(),
        "rows": torch.eye(4).to_sparse_csr(),
        **({"uneven": torch.nested.nested_tensor([randn(2, 3), randn(1, 3)])} if NESTED else {}),
        "meta": torch.empty(3, 3, device="meta"),
        "quantised": torch.quantize_per_tensor(randn(3, 3), 0.1, 0, torch.qint8),
        "conjugate": torch.complex(randn(2, 2), randn(2, 2, seed=1)).conj(),
        "nested": {"list": [randn(2, 2), (randn(2, 3), {"deep": randn(3, 2)})], "n": 3},
        "words": ["a", b"b", 1.5, None, {1, 2}, 1 << 70],
    }


def _lightning() -> dict[str, Any]:
    layer = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(randn(2, 4)).sum().backward()
    optimizer.step()
    return {
        "epoch": 1,
        "pytorch-lightning_version": "2.4",
        "state_dict": layer.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "callbacks": {"Regularizer": {"basis": randn(3, 2)}},
        "loops": {"fit_loop": {"state_dict": {}}},
    }


@dataclass
class Settings:
    """An object of a user's class, as many checkpoints contain it."""

    path: Path
    shift: Any
    parent: Any = None


def foreign() -> dict[str, Any]:
    """Makes a complete module, and objects of other classes."""
    torch.manual_seed(0)
    settings = Settings(Path("data"), np.float64(1.5))
    settings.parent = {"again": settings}
    return {
        "model": nn.Sequential(
            nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(8, 8)
        ),
        "arguments": argparse.Namespace(lr=0.1, mean=randn(3)),
        "settings": settings,
        "array": np.arange(6.0).reshape(2, 3),
    }


def saved(content: Any, legacy: bool = False, protocol: int = 2) -> bytes:
    """Returns the output of torch.save."""
    file = io.BytesIO()
    torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def distributed() -> Sample:
    """Makes the output of torch.distributed.checkpoint for one process."""
    state = {"model": plain() | {"linear.weight": randn(4, 3).mT}, "epoch": 3}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about missing processes
        dcp.save(state, checkpoint_id=folder)
        return Sample("", {path.name: path.read_bytes() for path in Path(folder).iterdir()})


def slices() -> Sample:
    """Makes the safetensors output of torch.distributed.checkpoint for two processes."""
    files = {}
    for number, rows in enumerate((slice(0, 3), slice(3, 5)), 1):
        tensors = {"w": randn(5, 4)[rows], "v": randn(5)[rows]}
        offsets = {"w": {"saved_offsets": [rows.start, 0]}, "v": {"saved_offsets": [rows.start]}}
        metadata = {"DCP_SHARDING_INFO": json.dumps(offsets)}
        files[f"shard-0000{number}-model-00001-of-00001.safetensors"] = save(tensors, metadata)
    return Sample("", files)


def _arrays(save: Any) -> bytes:
    """Makes the output of NumPy with both orders of axes and bytes."""
    file = io.BytesIO()
    kernel = randn(4, 6).numpy()
    others = {"b": kernel.T, "c": kernel.astype(">f8"), "bias": kernel[0], "n": np.arange(3)}
    save(file, **{"d/kernel": kernel, **others})
    return file.getvalue()


def _array() -> bytes:
    file = io.BytesIO()
    np.save(file, randn(4, 6).numpy())
    return file.getvalue()


def of_flax(name: str) -> Sample:
    """Reads a file of flax.serialization; see write_flax.py."""
    path = DATA / "flax" / name
    return Sample(name, {name: path.read_bytes()})


def program(freeze: bool = False) -> bytes:
    """Returns the output of torch.jit.save."""
    file, model = io.BytesIO(), nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(8, 3))
    model.register_buffer("basis", randn(3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about deprecation
        script = torch.jit.script(model.eval())
        torch.jit.save(torch.jit.freeze(script) if freeze else script, file)
    return file.getvalue()


_CODES_OF_GGUF = {int: (4, "I"), float: (6, "f"), bool: (7, "?")}
Block = tuple[int, tuple[int, ...], bytes]  # type, shape and bytes


def gguf_file(
    tensors: Mapping[str, Block], settings: Mapping[str, Any], version: int = 3, alignment: int = 32
) -> bytes:
    """Makes a GGUF file by the specification of the format."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def value_of(value: Any) -> bytes:
        if isinstance(value, list):
            inner = [value_of(one) for one in value]
            return struct.pack("<I4sQ", 9, inner[0][:4], len(inner)) + b"".join(
                one[4:] for one in inner
            )
        if isinstance(value, str):
            return struct.pack("<I", 8) + text(value)
        number, code = _CODES_OF_GGUF[type(value)]
        return struct.pack(f"<I{code}", number, value)

    header = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(settings))
    header += b"".join(text(name) + value_of(value) for name, value in settings.items())
    content = b""
    for name, (kind, shape, data) in tensors.items():
        content += bytes(-len(content) % alignment)
        header += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        header += struct.pack("<IQ", kind, len(content))
        content += data
    return header + bytes(-len(header) % alignment) + content


def _gguf() -> bytes:
    """Makes numbers, blocks of q8_0 and q4_0, a stack of experts, and a vocabulary."""

    def numbers(*shape: int) -> Block:
        return 0, shape, randn(*shape).numpy().tobytes()

    def blocks(kind: int, size: int, *shape: int) -> Block:
        count = int(np.prod(shape)) // 32
        codes = torch.randint(0, 100, (count, size), generator=torch.Generator().manual_seed(0))
        scales = np.full((count, 1), 0.25, np.float16).view(np.uint8)
        return kind, shape, np.hstack([scales, codes.byte().numpy()]).tobytes()

    settings = {
        "general.architecture": "llama",
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": [1, 1],
        "llama.embedding_length": 32,
        "llama.rope.freq_base": 1e4,
        "tokenizer.ggml.tokens": ["a", "b", "c"],
        "tokenizer.ggml.scores": [0.5, 1.5, 2.5],
        "tokenizer.ggml.add_bos_token": True,
    }
    tensors = {
        "token_embd.weight": blocks(8, 32, 3, 32),
        "blk.0.attn_q.weight": blocks(8, 32, 32, 32),
        "blk.0.attn_k.weight": numbers(16, 32),
        "blk.0.attn_v.weight": blocks(2, 16, 16, 32),
        "blk.0.attn_output.weight": numbers(32, 32),
        "blk.0.ffn_gate_exps.weight": blocks(2, 16, 2, 8, 32),
        "blk.0.attn_norm.weight": numbers(32),
        "rope_freqs.weight": numbers(8),
    }
    return gguf_file(tensors, settings)


def _onnx() -> Sample:
    """Makes a model with external data and codes of 4 bits."""
    codes = helper.make_tensor("c", onnx.TensorProto.INT4, (4, 6), [*range(-8, 4)] * 2)
    scales = numpy_helper.from_array(randn(4, 2).numpy(), "s")
    weight = numpy_helper.from_array(randn(6, 5).numpy(), "w")
    nodes = [
        helper.make_node("DequantizeLinear", ["c", "s"], ["d"], axis=1, block_size=3),
        helper.make_node("MatMul", ["x", "d"], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, 1, None) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], [codes, scales, weight])
    data = b""
    for tensor in graph.initializer:
        if tensor.HasField("raw_data"):
            for key, value in {"location": "a.data", "offset": f"{len(data)}"}.items():
                tensor.external_data.add(key=key, value=value)
            data += tensor.raw_data
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
    model = helper.make_model(graph).SerializeToString()
    return Sample("a.onnx", {"a.onnx": model, "a.data": data})


def exported() -> bytes:
    """Returns the output of torch.export.save for a module whose parameters share memory."""

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = randn(6, 4)
            self.layer = nn.Linear(4, 3)
            self.first, self.last = nn.Parameter(whole[:4].T), nn.Parameter(whole[4:])
            self.register_buffer("basis", randn(3, 4))
            self.register_buffer("passing", randn(4, 4), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x + self.passing.sum()) + self.first.sum() + self.basis.sum()

    file = io.BytesIO()
    torch.export.save(torch.export.export(Module(), (randn(2, 4),)), file)
    return file.getvalue()


def older(data: bytes, flat: bool) -> bytes:
    """Converts a torch.export program to the format of torch 2.8, or an earlier one if `flat`."""
    program = torch.export.load(io.BytesIO(data))
    parts = records(data)
    state, constants = (saved(dict(one)) for one in (program.state_dict, program.constants))
    folder = next(iter(parts)).partition("/")[0]
    model = parts[f"{folder}/models/model.json"]
    if flat:
        version = json.loads(model)["schema_version"]
        return zipped(
            {
                "version": f"{version['major']}.{version['minor']}".encode(),
                "serialized_exported_program.json": model,
                "serialized_state_dict.pt": state,
                "serialized_constants.pt": constants,
                "serialized_example_inputs.pt": parts[f"{folder}/data/sample_inputs/model.pt"],
            }
        )
    kept = {n: one for n, one in parts.items() if not re.search("data/(weights|constants)", n)}
    kept |= {f"{folder}/data/weights/model.pt": state}
    return zipped(kept | {f"{folder}/data/constants/model.pt": constants})


DESCRIBES_WEIGHTS = (
    importlib.util.find_spec("torch.export.pt2_archive._package_weights") is not None
)


def _older_exports(data: bytes) -> dict[str, Sample]:
    """Returns the program in the formats of older torch; {} if this torch is old itself."""
    if not DESCRIBES_WEIGHTS:
        return {}
    kinds = {"exported, older": False, "exported, oldest": True}
    return {kind: Sample("a.pt2", {"a.pt2": older(data, flat)}) for kind, flat in kinds.items()}


def corpus() -> dict[str, Sample]:
    """Returns the valid files by name."""
    torch.manual_seed(0)

    def one(name: str, data: bytes) -> Sample:
        return Sample(name, {name: data})

    state = plain()
    without_float8 = {name: tensor for name, tensor in state.items() if "float8" not in name}
    program_of_export = exported()
    names = sorted(state)
    parts = [{name: state[name] for name in names[start::2]} for start in (0, 1)]
    shards = {f"model-{n}.safetensors": save(part) for n, part in enumerate(parts)}
    index = {name: shard for shard, part in zip(shards, parts, strict=True) for name in part}
    index_file = "model.safetensors.index.json"
    shards[index_file] = json.dumps({"metadata": {}, "weight_map": index}).encode()
    adam = {"state": {0: {"exp_avg": randn(3, 3)}}, "param_groups": [{"lr": 0.1}]}
    trainer = {
        "model.safetensors": save({"a.weight": randn(3, 4)}),
        "optimizer.pt": saved(adam),
        "scheduler.pt": saved({"last_epoch": 3}),
        "rng_state.pth": saved({"cpu": torch.get_rng_state()[:64]}),
        "trainer_state.json": b'{"epoch": 1}',
        "training_args.bin": saved(nn.Identity()),
    }
    return {
        "safetensors": one("a.safetensors", save(state, metadata={"format": "pt"})),
        "safetensors quantised": one("a.safetensors", save(quantised())),
        "sharded": Sample(index_file, shards),
        "sharded directory": Sample("", shards),
        "pt": one("a.pt", saved(state)),
        "pt quantised": one("a.pth", saved(OrderedDict(quantised()))),
        "pt views": one("a.pt", saved(_views())),
        "pt rare": one("a.bin", saved(_rare())),
        "pt foreign": one("a.pt", saved(foreign())),
        "pt foreign, protocol 5": one("a.pt", saved(foreign(), protocol=5)),
        "pt deflated": one("a.pt", zipped(records(saved(state)), zipfile.ZIP_DEFLATED)),
        "legacy": one("a.pt", saved(without_float8, legacy=True)),
        "legacy views": one("a.bin", saved(_views(), legacy=True)),
        "lightning": one("a.ckpt", saved(_lightning())),
        "trainer": Sample("", trainer),
        "distributed": distributed(),
        "slices": slices(),
        "npz": one("a.npz", _arrays(np.savez)),
        "npz deflated": one("a.npz", _arrays(np.savez_compressed)),
        "npy": one("a.npy", _array()),
        "flax": of_flax("state.msgpack"),
        "flax in chunks": of_flax("chunked.msgpack"),
        "script": one("a.jit", program()),
        "script frozen": one("a.pt", program(freeze=True)),
        # The package that decodes GGUF is an extra.
        **({"gguf": one("a.gguf", _gguf())} if importlib.util.find_spec("gguf") else {}),
        "keras": one("a.keras", (KERAS / "convolutions.keras").read_bytes()),
        "keras weights": one("a.weights.h5", (KERAS / "half.weights.h5").read_bytes()),
        "keras 2": one("a.h5", (KERAS / "convolutions.h5").read_bytes()),
        "onnx": one("a.onnx", (DATA / "exported.onnx").read_bytes()),
        "onnx beside": _onnx(),
        "exported": one("a.pt2", program_of_export),
        **_older_exports(program_of_export),
    }


def records(data: bytes) -> dict[str, bytes]:
    """Returns the records of an archive by name."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {record.filename: archive.read(record) for record in archive.infolist()}


def zipped(contents: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """Returns an archive of these records."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in contents.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return file.getvalue()


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, (CANARY, "w")


CODES = [pickle.dumps(_Code(), protocol=protocol)[:-1] for protocol in (0, 2, 4)]
CODES += [
    b"cos\nsystem\nU\x0ctouch canary\x85R",
    b"cbuiltins\nexec\nU\x13open('canary', 'w')\x85R",
]
