"""Small real files of every format that is read, and what damage makes of them.

A sample is all files of one checkpoint as bytes. `mutated(sample, seed)` is the same in every run.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import pickle
import pickletools
import random
import struct
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save
from torch import Tensor, nn

CANARY = "canary"  # the file that code in a pickle makes in the working directory


@dataclass(frozen=True)
class Sample:
    """A checkpoint: what is given to the reader, a file or "" for all of them, and the files."""

    path: str
    files: dict[str, bytes]

    def write(self, folder: Path) -> Path:
        """Writes it, and returns what is to be read."""
        folder.mkdir()
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        return folder / self.path


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain() -> dict[str, Tensor]:
    """A state dict that both formats take: every kind of weight, and what is none."""
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    kinds += [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]
    tensors = {f"as_{str(kind)[6:]}.weight": _randn(4, 6).to(kind) for kind in kinds}
    return tensors | {
        "layer.weight": _randn(5, 7),
        "layer.bias": _randn(5),
        "experts.weight": _randn(2, 3, 4),
        "conv.weight": _randn(4, 3, 2, 2),
        "deficient": torch.ones(3, 3),
        "zero": torch.zeros(2, 4),
        "number": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
    }


def quantised() -> dict[str, Tensor]:
    """What quantising tools write: packed weights beside their scales."""
    return {
        "a.qweight": torch.arange(12, dtype=torch.int32).reshape(3, 4),
        "a.qzeros": torch.ones(1, 4, dtype=torch.int32),
        "a.scales": _randn(2, 4).half(),
        "b.weight": _randn(4, 4).to(torch.float8_e4m3fn),
        "b.weight_scale_inv": _randn(2, 2),
        "c.weight": torch.ones(6, 1, dtype=torch.uint8),
        "c.weight.absmax": _randn(3),
        "d.weight": _randn(3, 3),
    }


def _views() -> dict[str, Tensor]:
    whole, other = _randn(6, 4), _randn(4, 3, seed=1)
    return {
        "qkv": whole,
        "k": whole[2:4],
        "tied": whole,
        "transposed": whole.T,
        "left": other[:3],
        "right": other[1:],
        "expanded": _randn(1, 4).expand(3, 4),
        "strided": _randn(6, 6)[::2, 1::2],
    }


def _reads_nested() -> bool:
    """Whether torch.load takes nested tensors for mere data: newer ones may not."""
    file = io.BytesIO()
    torch.save(torch.nested.nested_tensor([_randn(2, 3), _randn(1, 3)]), file)
    file.seek(0)
    try:
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True


NESTED = _reads_nested()


def _rare() -> dict[str, Any]:
    """Tensors that are no plain arrays, and what else may stand beside them."""
    return {
        "weight": nn.Parameter(_randn(3, 3)),
        "complex": torch.complex(_randn(3, 3), _randn(3, 3, seed=1)),
        "sparse": torch.eye(4).to_sparse(),
        "rows": torch.eye(4).to_sparse_csr(),
        **({"uneven": torch.nested.nested_tensor([_randn(2, 3), _randn(1, 3)])} if NESTED else {}),
        "meta": torch.empty(3, 3, device="meta"),
        "quantised": torch.quantize_per_tensor(_randn(3, 3), 0.1, 0, torch.qint8),
        "conjugate": torch.complex(_randn(2, 2), _randn(2, 2, seed=1)).conj(),
        "nested": {"list": [_randn(2, 2), (_randn(2, 3), {"deep": _randn(3, 2)})], "n": 3},
        "words": ["a", b"b", 1.5, None, {1, 2}, 1 << 70],
    }


def _lightning() -> dict[str, Any]:
    layer = nn.Linear(4, 3)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(_randn(2, 4)).sum().backward()
    optimizer.step()
    return {
        "epoch": 1,
        "pytorch-lightning_version": "2.4",
        "state_dict": layer.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "callbacks": {"Regularizer": {"basis": _randn(3, 2)}},
        "loops": {"fit_loop": {"state_dict": {}}},
    }


@dataclass
class Settings:
    """What stands beside the weights in many checkpoints: an object of a class of its own."""

    path: Path
    shift: Any
    parent: Any = None


def foreign() -> dict[str, Any]:
    """A module that was saved whole, and objects of other classes."""
    torch.manual_seed(0)
    settings = Settings(Path("data"), np.float64(1.5))
    settings.parent = {"again": settings}
    return {
        "model": nn.Sequential(
            nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(8, 8)
        ),
        "arguments": argparse.Namespace(lr=0.1, mean=_randn(3)),
        "settings": settings,
        "array": np.arange(6.0).reshape(2, 3),
    }


def saved(content: Any, legacy: bool = False, protocol: int = 2) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def distributed() -> Sample:
    """What torch.distributed.checkpoint saves of a process."""
    state = {"model": plain() | {"linear.weight": _randn(4, 3).mT}, "epoch": 3}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no others
        dcp.save(state, checkpoint_id=folder)
        return Sample("", {path.name: path.read_bytes() for path in Path(folder).iterdir()})


def slices() -> Sample:
    """What torch.distributed.checkpoint saves of two processes as safetensors."""
    files = {}
    for number, rows in enumerate((slice(0, 3), slice(3, 5)), 1):
        tensors = {"w": _randn(5, 4)[rows], "v": _randn(5)[rows]}
        offsets = {"w": {"saved_offsets": [rows.start, 0]}, "v": {"saved_offsets": [rows.start]}}
        metadata = {"DCP_SHARDING_INFO": json.dumps(offsets)}
        files[f"shard-0000{number}-model-00001-of-00001.safetensors"] = save(tensors, metadata)
    return Sample("", files)


def corpus() -> dict[str, Sample]:
    """Whole files by what they are."""
    torch.manual_seed(0)

    def one(name: str, data: bytes) -> Sample:
        return Sample(name, {name: data})

    state = plain()
    older = {name: tensor for name, tensor in state.items() if "float8" not in name}
    names = sorted(state)
    parts = [{name: state[name] for name in names[start::2]} for start in (0, 1)]
    shards = {f"model-{n}.safetensors": save(part) for n, part in enumerate(parts)}
    index = {name: shard for shard, part in zip(shards, parts, strict=True) for name in part}
    index_file = "model.safetensors.index.json"
    shards[index_file] = json.dumps({"metadata": {}, "weight_map": index}).encode()
    adam = {"state": {0: {"exp_avg": _randn(3, 3)}}, "param_groups": [{"lr": 0.1}]}
    trainer = {
        "model.safetensors": save({"a.weight": _randn(3, 4)}),
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
        "legacy": one("a.pt", saved(older, legacy=True)),
        "legacy views": one("a.bin", saved(_views(), legacy=True)),
        "lightning": one("a.ckpt", saved(_lightning())),
        "trainer": Sample("", trainer),
        "distributed": distributed(),
        "slices": slices(),
    }


def records(data: bytes) -> dict[str, bytes]:
    """The records of an archive, by name."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {record.filename: archive.read(record) for record in archive.infolist()}


def zipped(contents: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive of these records."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in contents.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return file.getvalue()


def mutated(sample: Sample, seed: int) -> Sample:
    """The sample with one of its files damaged."""
    chance = random.Random(seed)
    name = chance.choice(sorted(sample.files))
    data = sample.files[name]
    ways: list[Callable[[bytes, random.Random], bytes]] = [_damaged_bytes]
    if name.endswith(".safetensors"):
        ways += [_damaged_header] * 2
    elif name.endswith(".json"):
        ways += [_damaged_json] * 2
    elif data.startswith(b"PK"):
        ways += [_damaged_records] * 3
    else:
        ways += [_damaged_pickle] * 2
    damaged = chance.choice(ways)(data, chance)
    return replace(sample, files=sample.files | {name: damaged})


def _damaged_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bytes flipped, lost, added, doubled or exchanged; most often near the ends of the file."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 8])):
        size = len(changed)
        near = min(size, chance.choice([16, 256, 4096, size]))
        at = (
            chance.randrange(near + 1)
            if chance.random() < 0.6
            else size - chance.randrange(near + 1)
        )
        length = chance.choice([1, 2, 8, 64, 1024])
        stop = min(size, at + length)
        other = chance.randrange(size + 1)
        match chance.randrange(8):
            case 0 | 1 if at < size:
                changed[at] ^= 1 << chance.randrange(8)
            case 2:
                changed[at:stop] = chance.choice([b"\x00", b"\xff", b"\x7f"]) * (stop - at)
            case 3:
                del changed[at:]
            case 4:
                changed[at:at] = chance.randbytes(length)
            case 5:
                del changed[at:stop]
            case 6:
                changed[other:other] = changed[at:stop]
            case _:
                changed[at:stop], changed[other : other + stop - at] = (
                    changed[other : other + stop - at],
                    changed[at:stop],
                )
    return bytes(changed)


_NUMBERS = [0, 1, -1, 2, 7, 255, 10**30]
_NUMBERS += [2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64]
_ODD = [None, True, 1.5, float("nan"), "", "F32", "../a", "a\x00", "\ud800", [], {}]
_NAMES = ["", ".", "__metadata__", "\x1b[2J\n", "\u202ex", "\ud800", "a\x00b"]
_KINDS = ["F64", "F32", "F16", "BF16", "F8_E4M3", "U8", "I64", "BOOL", "X", "C64"]


def _damaged_json(data: bytes, chance: random.Random) -> bytes:
    """Valid JSON with other values and names."""
    tree = json.loads(data)
    for _ in range(chance.choice([1, 1, 3])):
        places = list(_places(tree))
        holder, key = chance.choice(places)
        value = holder[key]
        match chance.randrange(6):
            case 0 | 1 | 2 if type(value) is int:
                holder[key] = chance.choice([*_NUMBERS, value + 1, value - 1, value * 2, value + 4])
            case 0 | 1 | 2 if isinstance(value, str):
                other, where = chance.choice(places)
                holder[key] = chance.choice([*_KINDS, copy.deepcopy(other[where])])
            case 3 if isinstance(holder, dict):
                holder[chance.choice([*holder, *_NAMES])] = holder.pop(key)
            case 4:
                del holder[key]
            case _:
                holder[key] = copy.deepcopy(chance.choice([*_ODD, *_NUMBERS, [value, value]]))
        if not tree:
            break
    text = json.dumps(tree)
    if chance.random() < 0.1:
        text = text.replace("\\u", chance.choice(["\\u", "\\\\u", "u"]))
    return text.encode()


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every value in nested dicts and lists, as what holds it and its key there."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


def _damaged_header(data: bytes, chance: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = _damaged_json(data[8 : 8 + length], chance)
    payload = data[8 + length :]
    if chance.random() < 0.2:
        payload = payload[: chance.randrange(len(payload))]
    return struct.pack("<Q", len(header)) + header + payload


def _damaged_records(data: bytes, chance: random.Random) -> bytes:
    """A whole archive, with right check sums, of records that are damaged."""
    contents = records(data)
    for _ in range(chance.choice([1, 1, 2])):
        names = list(contents)
        if not names:
            break
        pickled = next((name for name in names if name.endswith("data.pkl")), names[0])
        name, other = chance.choice(names), chance.choice(names)
        match chance.randrange(8):
            case 0 | 1 | 2 | 3:
                contents[pickled] = _damaged_pickle(contents[pickled], chance)
            case 4:
                contents[name] = _damaged_bytes(contents[name], chance)
            case 5:
                contents[name], contents[other] = contents[other], contents[name]
            case 6:
                del contents[name]
            case _:
                renamed = chance.choice([f"x/{name}", name.upper(), "", other, "archive/version"])
                contents[renamed] = contents.pop(name)
    return zipped(contents, chance.choice([zipfile.ZIP_STORED] * 3 + [zipfile.ZIP_DEFLATED]))


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, (CANARY, "w")


CODES = [pickle.dumps(_Code(), protocol=protocol)[:-1] for protocol in (0, 2, 4)]
CODES += [
    b"cos\nsystem\nU\x0ctouch canary\x85R",
    b"cbuiltins\nexec\nU\x13open('canary', 'w')\x85R",
]
# Callables that are allowed, with arguments that nobody writes.
_GLOBALS = [
    b"cbuiltins\nbytearray\n",
    b"cbuiltins\nset\n",
    b"ctorch\nTensor\n",
    b"ctorch\nSize\n",
    b"ctorch\ndevice\n",
    b"ccollections\nOrderedDict\n",
    b"ccollections\nCounter\n",
    b"c_codecs\nencode\n",
    b"ctorch\nFloatTensor\n",
    b"ctorch.storage\nUntypedStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n",
    b"ctorch._utils\n_rebuild_sparse_tensor\n",
    b"ctorch._utils\n_rebuild_qtensor\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch\nfloat32\n",
    b"ctorch\nLongStorage\n",
    b"ctorch\nDoubleStorage\n",
]
_OPCODES = [code.code.encode("latin-1") for code in pickletools.opcodes]
_WITHOUT_ARGUMENT = [c.code.encode("latin-1") for c in pickletools.opcodes if c.arg is None]


def _number(number: int) -> bytes:
    if -(2**31) <= number < 2**31:
        return b"J" + struct.pack("<i", number)
    return pickle.dumps(number, protocol=2)[2:-1]


def _damaged_pickle(data: bytes, chance: random.Random) -> bytes:
    """One pickle, or several in a row, with instructions changed, lost, doubled or added."""
    pieces, rest = _instructions(data)
    if not pieces:
        return _damaged_bytes(data, chance)
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        at, other = chance.randrange(len(pieces)), chance.randrange(len(pieces))
        numbers = [n for n, piece in enumerate(pieces) if piece[:1] in (b"K", b"M", b"J", b"\x8a")]
        names = [n for n, piece in enumerate(pieces) if piece[:1] in (b"X", b"c")]
        match chance.randrange(12):
            case 0 | 1 | 2 | 3 if numbers:
                number = chance.choice([*_NUMBERS, chance.randrange(64)])
                pieces[chance.choice(numbers)] = _number(number)
            case 4 if names:
                pieces[chance.choice(names)] = pieces[chance.choice(names)]
            case 5:
                pieces[at] = chance.choice(_WITHOUT_ARGUMENT)
            case 6:
                pieces[at], pieces[other] = pieces[other], pieces[at]
            case 7:
                pieces.insert(at, pieces[other])
            case 8 if len(pieces) > 1:
                del pieces[at]
            case 9:
                call = chance.choice(_GLOBALS) + _number(chance.choice(_NUMBERS))
                pieces.insert(at, call + chance.choice([b"\x85R", b")R", b"\x85\x81"]))
            case 10:
                pieces.insert(at, chance.choice(CODES))
            case _:
                pieces[at] = chance.choice(_OPCODES) + pieces[at][1:]
    return b"".join(pieces) + rest


def _instructions(data: bytes) -> tuple[list[bytes], bytes]:
    """The instructions of the pickles that the data begins with, and what follows these."""
    pieces: list[bytes] = []
    start = 0
    while start < len(data):
        try:
            places = [place for _, _, place in pickletools.genops(data[start:])]
        except Exception:  # what follows is no pickle, or it is damaged already
            break
        stop = places[-1] + 1  # STOP is one byte
        ends = [*places[1:], stop]
        pieces += [data[start + a : start + b] for a, b in zip(places, ends, strict=True)]
        start += stop
    return pieces, data[start:]
