"""Damages samples: `mutated(sample, seed)` returns the same result in every run."""

from __future__ import annotations

import copy
import json
import math
import pickle
import pickletools
import random
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from corpus import CODES, Sample, records, zipped


def mutated(sample: Sample, seed: int) -> Sample:
    """Damages one file of a sample, or moves tensors between two of its files."""
    chance = random.Random(seed)
    name = chance.choice(sorted(sample.files))
    data = sample.files[name]
    ways: list[Callable[[bytes, random.Random], bytes]] = [_damaged_bytes]
    if name.endswith(".safetensors"):
        ways += [_damaged_header] * 2 + [_damaged_tensors] * 4
    elif name.endswith(".json"):
        ways = [_damaged_bytes] + [_damaged_json] * 6 + [_other_json]
    elif name.endswith(".distcp"):
        ways += [_damaged_chunk] * 3
    elif data.startswith(b"PK"):
        ways += [_damaged_records] * 3
    else:
        ways += [_damaged_pickle] * 2
    files = sample.files | {name: chance.choice(ways)(data, chance)}
    others = [one for one in sorted(files) if one.endswith(".safetensors") and one != name]
    if name.endswith(".safetensors") and others and chance.random() < 0.3:
        files = sample.files | _exchanged(sample.files, name, chance.choice(others), chance)
    return replace(sample, files=files)


def _damaged_bytes(data: bytes, chance: random.Random) -> bytes:
    """Flips, removes, adds, doubles or exchanges bytes, mostly near the ends of the file."""
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
_ODD = [None, True, False, 1.5, -0.0, float("nan"), float("inf"), "", "F32", "../a", "a\x00"]
_ODD += ["\ud800", "4", [], {}, [[]], {"bits": 4}, "x" * 5000, "<deep>", "<huge>"]
# In the text of JSON: the depth and length that Python still reads.
_IN_TEXT = {'"<deep>"': "[" * 900 + "]" * 900, '"<huge>"': "9" * 4300}
_NAMES = ["", ".", "__metadata__", "\x1b[2J\n", "\u202ex", "\ud800", "a\x00b"]
_KINDS = ["F64", "F32", "F16", "BF16", "F8_E4M3", "U8", "I64", "BOOL", "X", "C64"]
# The names of formats in configs.
_WORDS = (
    "gptq gptq_v2 gptq_p awq gemm gemv fp8 fbgemm_fp8 modelopt NVFP4 MXFP4 FP8 affine mxfp4 nf4 "
)
_WORDS += "fp4 float32 bfloat16 tensor channel group block int float pack-quantized int-quantized"


def _damaged_json(data: bytes, chance: random.Random) -> bytes:
    """Returns valid JSON with other values and names."""
    tree = json.loads(data)
    for _ in range(chance.choice([1, 1, 3])):
        places = list(_places(tree)) if isinstance(tree, dict | list) else []
        if not places:
            break
        holder, key = chance.choice(places)
        value = holder[key]
        match chance.randrange(6):
            case 0 | 1 | 2 if type(value) is int:
                holder[key] = chance.choice([*_NUMBERS, value + 1, value - 1, value * 2, value + 4])
            case 0 | 1 | 2 if isinstance(value, str):
                other, where = chance.choice(places)
                other = chance.choice([*_KINDS, *_WORDS.split(), copy.deepcopy(other[where])])
                holder[key] = other
            case 3 if isinstance(holder, dict):
                holder[chance.choice([*holder, *_NAMES])] = holder.pop(key)
            case 4:
                del holder[key]
            case _:
                holder[key] = copy.deepcopy(chance.choice([*_ODD, *_NUMBERS, [value, value]]))
    text = json.dumps(tree)
    for short, long in _IN_TEXT.items():
        text = text.replace(short, long)
    if chance.random() < 0.1:
        text = text.replace("\\u", chance.choice(["\\u", "\\\\u", "u"]))
    return text.encode()


def _other_json(data: bytes, chance: random.Random) -> bytes:
    """Returns JSON that is not an object, or nested deeper than any reader follows."""
    deep = chance.choice([400, 900, 1_000_000])
    inner = b'{"quantization_config":'
    whole = [b"[]", b'"text"', b"3", b"null", b"NaN", b"-1e999", b"[%s]" % data, b"", b"\xff"]
    whole += [b"[" * deep + b"]" * deep, inner * deep + b"1" + b"}" * deep]
    whole += [b'{"quantization_config": %s}' % data, data + data]
    return chance.choice(whole)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yields each value in nested dicts and lists, as its container and its key."""
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


@dataclass
class Part:
    """A tensor in a safetensors file."""

    dtype: str
    shape: list[int]
    data: bytes


def parts_of(data: bytes) -> tuple[dict[str, Part], dict[str, str]]:
    """Returns the tensors and the metadata of a valid safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    places = {name: (8 + length + a, 8 + length + b) for name, (a, b) in _offsets(header)}
    return {
        name: Part(one["dtype"], one["shape"], data[slice(*places[name])])
        for name, one in header.items()
    }, metadata


def _offsets(header: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, int]]]:
    for name, one in header.items():
        yield name, one["data_offsets"]


def file_of(parts: Mapping[str, Part], metadata: Mapping[str, str]) -> bytes:
    """Returns a safetensors file of these tensors."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, part in parts.items():
        start, end = end, end + len(part.data)
        header[name] = {"dtype": part.dtype, "shape": part.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(part.data for part in parts.values())


_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2}
_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1}
# The bytes of NaN, infinity, the largest and the smallest positive number.
_EXTREMES = {
    "F32": ["0000c07f", "0000807f", "ffff7f7f", "01000000", "000080ff"],
    "F16": ["007e", "007c", "ff7b", "0100", "00fc"],
    "BF16": ["c07f", "807f", "7f7f", "0100", "80ff"],
    "F8_E4M3": ["7f", "7e", "01", "ff"],
    "F8_E5M2": ["7f", "7c", "7b", "01"],
    "F8_E8M0": ["ff", "fe", "00"],
}
_PARTS = """
    weight weight_scale weight_scale_inv scale weight_scale_2 weight_zero_point weight_shape
    weight_packed weight_g_idx weight_global_scale input_scale qweight qzeros scales g_idx biases
    SCB weight_format weight.absmax weight.quant_map weight.nested_absmax bias
    weight.quant_state.bitsandbytes__nf4 weight_g weight_v weight_u weight_orig weight_mask
"""


def _damaged_tensors(data: bytes, chance: random.Random) -> bytes:
    """Returns a valid file whose tensors are missing, doubled or changed."""
    parts, metadata = parts_of(data)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        if not parts:
            break
        name = chance.choice(list(parts))
        part = parts[name]
        stem = name.rpartition(".")[0]
        renamed = f"{stem}.{chance.choice(_PARTS.split())}"
        match chance.randrange(12):
            case 0:
                del parts[name]
            case 1:
                parts[chance.choice([renamed, f"again.{name}", *_NAMES[1:]])] = replace(part)
            case 2:
                parts[renamed] = parts.pop(name)
            case 3:
                part.shape = _other_shape(part.shape, chance)
            case 4:
                _change_length(part, chance)
            case 5:
                _change_dtype(part, chance)
            case 6:
                other = parts[chance.choice(list(parts))]
                part.data, other.data = other.data, part.data
                part.shape, other.shape = other.shape, part.shape
                part.dtype, other.dtype = other.dtype, part.dtype
            case 7 if metadata:
                key = chance.choice(list(metadata))
                metadata[key] = chance.choice(["", "[]", "{}", "null", "9" * 5000, "[" * 900])
            case _ if part.data[:1] == b"{" and part.dtype == "U8":
                _change_description(part, chance)
            case _:
                _change_values(part, chance)
    return file_of(parts, metadata)


def _other_shape(shape: list[int], chance: random.Random) -> list[int]:
    """Returns another shape with the same number of entries."""
    size = math.prod(shape)
    sides = [n for n in range(1, size + 1) if size % n == 0] or [0]
    side = chance.choice(sides)
    others = [shape[::-1], [size], [1, size], [size, 1], [side, size // (side or 1)]]
    others += [[1, *shape], [*shape, 1], [side, 1, size // (side or 1)]]
    return chance.choice(others)


def _change_length(part: Part, chance: random.Random) -> None:
    """Changes the length of one dimension, which may become 0."""
    if not part.shape:
        return
    at = chance.choice([0, -1, chance.randrange(len(part.shape))])
    width = len(part.data) // max(1, math.prod(part.shape))
    n = part.shape[at]
    part.shape[at] = chance.choice([0, 1, n - 1, n + 1, 2 * n, n // 2, 4096])
    part.shape[at] = max(0, part.shape[at])
    size = math.prod(part.shape) * width
    part.data = (part.data * (size // max(1, len(part.data)) + 1) + bytes(size))[:size]


def _change_dtype(part: Part, chance: random.Random) -> None:
    """Changes the dtype, and keeps the bytes or the number of entries."""
    part.dtype = chance.choice(list(_BYTES))
    width, size = _BYTES[part.dtype], len(part.data)
    if chance.random() < 0.5 and part.shape and size % width == 0:
        entries = size // width
        lead = math.prod(part.shape[:-1])
        even = lead and entries % lead == 0
        part.shape = [*part.shape[:-1], entries // lead] if even else [entries]
    size = math.prod(part.shape) * width
    part.data = (part.data + bytes(size))[:size]


def _change_values(part: Part, chance: random.Random) -> None:
    """Sets some or all entries to zero, extreme or arbitrary values."""
    width = _BYTES.get(part.dtype, 1)
    values = [bytes(width), b"\xff" * width, b"\x80" * width, chance.randbytes(width)]
    values += [b"\x7f" * width, bytes(width - 1) + b"\x80", b"\xff" * (width - 1) + b"\x7f"]
    values += map(bytes.fromhex, _EXTREMES.get(part.dtype, []) * 2)
    value, count = chance.choice(values), len(part.data) // width
    if chance.random() < 0.5 or not count:
        part.data = value * count
    else:
        at = chance.choice([0, count - 1, chance.randrange(count)]) * width
        part.data = part.data[:at] + value + part.data[at + width :]


def _change_description(part: Part, chance: random.Random) -> None:
    """Changes the JSON that a tensor contains."""
    other = chance.choice([_damaged_json, _damaged_json, _other_json, _damaged_bytes])
    part.data = other(part.data, chance)
    part.shape = [len(part.data)]


def _exchanged(
    files: Mapping[str, bytes], name: str, other: str, chance: random.Random
) -> dict[str, bytes]:
    """Moves or copies a tensor from one safetensors file to another."""
    (ours, said), (theirs, there) = parts_of(files[name]), parts_of(files[other])
    moved = chance.choice(list(ours))
    theirs[moved] = replace(ours[moved]) if chance.random() < 0.5 else ours.pop(moved)
    if chance.random() < 0.5:
        said, there = there, said
    return {name: file_of(ours, said), other: file_of(theirs, there)}


def _damaged_chunk(data: bytes, chance: random.Random) -> bytes:
    """Damages one of several archives in a row, and keeps its length."""
    ends = [found.end() + 18 for found in re.finditer(b"PK\x05\x06", data)]
    starts = [0, *ends[:-1]]
    start, end = chance.choice(list(zip(starts, ends, strict=True)))
    old = data[start:end]
    damage = chance.choice([_damaged_records, _damaged_bytes])
    new = damage(old, chance)
    new = new[: len(old)] if chance.random() < 0.5 else new[-len(old) :]
    return data[:start] + new.ljust(len(old), b"\0") + data[end:]


def _damaged_records(data: bytes, chance: random.Random) -> bytes:
    """Returns a valid archive, with correct checksums, of damaged records."""
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


# Allowed callables, for calls with arguments that no program writes.
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
    """Changes, removes, doubles or adds instructions of one or several pickles in a row."""
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
    """Returns the instructions of the pickles at the beginning of the data, and the rest."""
    pieces: list[bytes] = []
    start = 0
    while start < len(data):
        try:
            places = [place for _, _, place in pickletools.genops(data[start:])]
        except Exception:  # the rest is not a pickle, or is already damaged
            break
        stop = places[-1] + 1  # STOP is one byte
        ends = [*places[1:], stop]
        pieces += [data[start + a : start + b] for a, b in zip(places, ends, strict=True)]
        start += stop
    return pieces, data[start:]
