"""Files that try to use memory or time far beyond their size, or to pass as weights."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from typing import Any

import torch
from corpus import CODES, Sample, distributed, records, saved, zipped

_START = b"\x80\x02"


def get(index: int) -> bytes:
    """Returns the instruction that pushes an object from the memo."""
    return b"h" + bytes([index])


def put(index: int) -> bytes:
    return b"q" + bytes([index])


def text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


def call(name: bytes, *arguments: bytes) -> bytes:
    return b"c" + name + b"\n(" + b"".join(arguments) + b"tR"


def doubled(first: bytes, join: bytes, times: int) -> bytes:
    """Nests objects, each of which contains the previous one twice; the last is `get(times)`."""
    return first + put(0) + b"".join(join % (get(n), get(n)) + put(n + 1) for n in range(times))


def archive(pickled: bytes) -> Sample:
    contents = {"archive/data.pkl": _START + pickled, "archive/version": b"3\n"}
    return Sample("a.pt", {"a.pt": zipped(contents)})


def edited(content: Any, old: bytes, new: bytes, legacy: bool, compression: int = 0) -> Sample:
    """Makes a torch.save file with a part of its pickle replaced."""
    data = saved(content, legacy)
    if legacy:
        assert old in data
        return Sample("a.pt", {"a.pt": data.replace(old, new, 1)})
    contents = records(data)
    (name,) = [name for name in contents if name.endswith("data.pkl")]
    assert old in contents[name]
    contents[name] = contents[name].replace(old, new, 1)
    return Sample("a.pt", {"a.pt": zipped(contents, compression)})


def compressed(pickled: bytes) -> Sample:
    """Makes an archive that compresses the pickle to a thousandth of its length."""
    contents = {"archive/data.pkl": _START + pickled, "archive/version": b"3\n"}
    return Sample("a.pt", {"a.pt": zipped(contents, 8)})


def in_a_row(first: Any, second: Any) -> Sample:
    """Joins two archives in one file: Python reads the last one, torch may find the first."""
    return Sample("a.pt", {"a.pt": saved(first) + saved(second)})


def torch_file(content: Any) -> Sample:
    return Sample("a.pt", {"a.pt": saved(content)})


def safetensors(header: bytes, payload: bytes = b"") -> Sample:
    data = struct.pack("<Q", len(header)) + header + payload
    return Sample("a.safetensors", {"a.safetensors": data})


def beside_weights(pickled: bytes, where: str) -> Sample:
    """Makes a torch.save file with the content of a pickle next to its weights."""
    around = {
        "as an object": (b"", b""),
        "as a key": (b"}", b"K\x01s"),
        "as a state": (call(b"some\nClass"), b"b"),
        "to be appended to": (b"", b"(K\x01e"),
    }
    before, after = around[where]
    mark = b"X\x06\x00\x00\x00marker"
    content = {"w": torch.diag(torch.tensor([9.0, 1.0])), "x": "marker"}
    return edited(content, mark, before + pickled + after, False)


def described(change: Callable[[Any], object]) -> Sample:
    """Makes a torch.distributed.checkpoint folder with changed metadata."""
    whole = distributed()
    about = pickle.loads(whole.files[".metadata"])
    change(about.state_dict_metadata)
    return Sample("", whole.files | {".metadata": pickle.dumps(about)})


def repeat_chunks(tensors: Any) -> None:
    """Puts one list of many chunks in many places."""
    one = tensors["model.layer.weight"]
    one.chunks *= 200_000
    tensors.update({f"model.{n}": one for n in range(200_000)})


def cut_sides(tensors: Any) -> None:
    """Makes a chunk with more corners than fit into memory."""
    one = tensors["model.layer.weight"]
    one.size = torch.Size([2] * 60)
    one.chunks[0].offsets, one.chunks[0].sizes = torch.Size([0, 0]), torch.Size([1] * 60)


def of_torchao(state: bytes) -> bytes:
    """Makes a weight of a torchao class with these attributes."""
    kind = b"ctorchao.quantization\nInt8Tensor\n"
    return call(
        b"torch._tensor\n_rebuild_from_type_v2",
        b"ctorch._utils\n_rebuild_wrapper_subclass\n",
        kind,
        b"(" + kind + b"ctorch\nfloat32\nK\x03K\x03\x86tR"[:-1],
        state,
    )


def of_storage(key: bytes, count: int) -> bytes:
    """Makes a float32 vector in a storage of the file."""
    named = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(key) + text(b"cpu")
    storage, length = named + b"K" + bytes([count]) + b"tQ", b"K" + bytes([count]) + b"\x85"
    return call(
        b"torch._utils\n_rebuild_tensor_v2", storage, b"K\x00", length, b"K\x01\x85", b"\x89", b"N"
    )


def attacks() -> dict[str, tuple[str, Callable[[], Sample]]]:
    """Returns the exit codes of audit and repair, and the samples, by name."""
    tuples = doubled(b")", b"%s%s\x86", 40)
    short = doubled(b")", b"%s%s\x86", 17)
    # The lists are popped from the stack, but remain in the memo.
    lists = doubled(b"]", b"](%s%se", 40) + b"0" * 41
    small = b"M\x03\x03"
    large, huge = b"M\x20\x4e", b"\x8a\x06\x00\x00\x00\x00\x10\x00"
    one = torch.ones(())
    eye = {"w": torch.eye(3)}
    shape, wide = b"K\x03K\x03\x86", large + large + b"\x86"
    cycle: dict[str, Any] = {"w": torch.eye(3)}
    cycle["again"] = cycle
    named = {"k" * 100_000: {str(n): torch.eye(2)[:0] for n in range(2000)}}
    repeated = [[torch.eye(2)[0]] * 3000] * 200
    nan = b"G\x7f\xf8" + bytes(6)
    empty = call(b"torch\nTensor")
    hidden = b"PK\x05\x06" + bytes(18)
    deep = b'{"a":' * 100_000
    dimensions = json.dumps({"dtype": "F32", "shape": [1] * 20_000, "data_offsets": [0, 4]})
    many = json.dumps({"dtype": "F32", "shape": [2] * 3_000_000 + [0], "data_offsets": [0, 0]})
    tensor = json.dumps({"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]})
    long = "_embed" * 200_000
    names = ["\ud800", "a\nb", "\x1b[2J", "\u202ex", "nul\0", "κ", ("t", 1), b"b", 1.5]

    def instructions(pickled: bytes) -> tuple[str, Callable[[], Sample]]:
        return "22", lambda: archive(pickled + b".")

    def refused(make: Callable[..., Sample], *arguments: Any) -> tuple[str, Callable[[], Sample]]:
        return "22", lambda: make(*arguments)

    return {
        "nothing but a call": instructions(b"R"),
        "shared lists": instructions(doubled(b"]", b"](%s%se", 40)),
        "shared tuples as a key": instructions(tuples + b"}" + get(40) + b"K\x01s"),
        "shared tuples in a set": instructions(
            call(b"builtins\nset", tuples, b"]" + get(40) + b"a")
        ),
        "shared tuples as a storage": instructions(tuples + b"Q"),
        "shared tuples in a storage": instructions(
            tuples + b"(" + text(b"storage") + get(40) + small * 3 + b"tQ"
        ),
        "a long key a thousand times": instructions(
            short + b"}(" + (get(17) + b"K\x01") * 100_000 + b"u"
        ),
        "long keys one by one": instructions(short + b"}" + (get(17) + b"K\x01s") * 100_000),
        "a long bytearray": instructions(call(b"builtins\nbytearray", b"J\x00\x00\x00\x70")),
        "a tensor from nothing": instructions(
            b"}" + text(b"w") + call(b"torch\nTensor", large, large) + b"s"
        ),
        "an endless tensor from nothing": instructions(
            b"}" + text(b"w") + call(b"torch\nTensor", huge) + b"s"
        ),
        "a tensor from nothing by another": instructions(
            b"}"
            + text(b"w")
            + call(
                b"torch._tensor\n_rebuild_from_type_v2",
                b"ctorch\nTensor\n",
                b"ctorch\nTensor\n",
                wide,
                b"}",
            )
            + b"s"
        ),
        "a storage from nothing": instructions(call(b"torch.storage\nUntypedStorage", huge)),
        "codes of codes": instructions(
            call(b"_codecs\nencode", text(b"a" * 9), text(b"latin1"))
            + put(0)
            + b"".join(
                call(b"_codecs\nencode", get(n), text(b"hex")) + put(n + 1) for n in range(30)
            )
        ),
        "codes of one text": instructions(
            text(b"a" * 1_000_000)
            + put(0)
            + b"]("
            + call(b"_codecs\nencode", get(0), text(b"latin1")) * 1000
            + b"e"
        ),
        "a class with a long name": instructions(
            text(b"a" * 1_000_000) + put(0) + b"](" + (get(0) * 2 + b"\x93") * 1000 + b"e"
        ),
        "a class with a name of shared tuples": instructions(tuples + get(40) + b"\x93"),
        "dicts of one list": instructions(
            b"]("
            + b"](K\x01K\x02e" * 100_000
            + b"e"
            + put(0)
            + b"0]("
            + (b"ccollections\nOrderedDict\n" + get(0) + b"\x85R") * 1000
            + b"e"
        ),
        "objects with many arguments": instructions(
            b"("
            + b"K\x01" * 1_000_000
            + b"t"
            + put(0)
            + b"0]("
            + call(b"a\nB")
            + put(1)
            + b"0"
            + (get(1) + get(0) + b"}K\x01K\x01s\x92") * 1000
            + b"e"
        ),
        "a call with many arguments": instructions(
            b"("
            + b"K\x01" * 1_000_000
            + b"t"
            + put(0)
            + b"0]("
            + (b"ctorch._utils\n_rebuild_parameter\n" + get(0) + b"R") * 1000
            + b"e"
        ),
        "objects of one long tuple": instructions(
            b"("
            + b"K\x01" * 1_000_000
            + b"t"
            + put(0)
            + b"0ca\nB\n"
            + put(1)
            + b"0]("
            + (get(1) + get(0) + b"R") * 10_000
            + b"e"
        ),
        "objects of one long dict": instructions(
            b"}("
            + b"".join(text(b"%d" % n) + b"K\x01" for n in range(100_000))
            + b"u"
            + put(0)
            + b"0ca\nBTensor\n"
            + put(1)
            + b"0]("
            + (get(1) + b")R" + get(0) + b"b") * 10_000
            + b"e"
        ),
        "storages by one long tuple": instructions(
            b"("
            + text(b"module")
            + b"K\x01" * 1_000_000
            + b"t"
            + put(0)
            + b"0]("
            + (get(0) + b"Q") * 100_000
            + b"e"
        ),
        "keys of one hash": instructions(
            b"}("
            + b"".join(
                b"\x8a\x10" + (n * (2**61 - 1)).to_bytes(16, "little") + b"K\x01"
                for n in range(50_000)
            )
            + b"u"
        ),
        "many lists in a few bytes": refused(compressed, b"]" * 8_000_000 + b"."),
        "many objects in a few bytes": refused(compressed, b"](" + b"c\n\n)R" * 1_500_000 + b"e."),
        "two archives in a row": refused(in_a_row, {"w": torch.eye(3)}, {"w": torch.eye(3)}),
        "many keys that are no number": instructions(b"}(" + (nan + empty) * 8_000 + b"u"),
        "lists within lists": instructions(b"]" * 20_001 + b"a" * 20_000),
        "itself": refused(torch_file, cycle),
        "long names": refused(torch_file, named),
        "the same tensor many times": refused(torch_file, repeated),
        "no values": refused(torch_file, {"w": torch.empty(2**40, 2**10, device="meta")}),
        "one value everywhere": refused(torch_file, {"w": one.expand(2**20, 2**20)}),
        "20,000 dimensions": refused(torch_file, {"w": one.expand((1,) * 20_000)}),
        "a shape beyond its storage": refused(edited, eye, shape, wide, False),
        "a shape beyond its storage, deflated": refused(edited, eye, shape, wide, False, 8),
        "a shape beyond its storage, legacy": refused(edited, eye, shape, wide, True),
        "a storage beyond its file, legacy": refused(edited, eye, b"K\x09", b"J\0\0\0\x40", True),
        "a pickle with an archive behind it": refused(
            lambda: Sample("a.pt", {"a.pt": _START + tuples + b"}" + get(40) + b"K\x01s." + hidden})
        ),
        "JSON within JSON": refused(safetensors, deep),
        "20,000 dimensions, safetensors": refused(
            safetensors, f'{{"w": {dimensions}}}'.encode(), bytes(4)
        ),
        "3,000,000 lengths of an empty tensor": refused(safetensors, f'{{"w": {many}}}'.encode()),
        "a name of a million letters": refused(
            safetensors, f'{{"{long}\\n": {tensor}}}'.encode(), bytes(16)
        ),
        "an index within itself": refused(
            lambda: Sample("a.safetensors.index.json", {"a.safetensors.index.json": deep})
        ),
        "an index of numbers": refused(
            lambda: Sample("", {"a.safetensors.index.json": b'{"weight_map": {"w": 1}}'})
        ),
        "chunks of one list": refused(described, repeat_chunks),
        "a chunk of 60 sides": refused(described, cut_sides),
        "a tensor of 2^62 entries": refused(
            described,
            lambda tensors: setattr(tensors["model.layer.weight"], "size", (2**31, 2**31)),
        ),
        "slices of 60 sides": refused(
            safetensors,
            json.dumps(
                {
                    "__metadata__": {
                        "DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [1] * 60}})
                    },
                    "w": {"dtype": "F32", "shape": [1] * 60, "data_offsets": [0, 4]},
                }
            ).encode(),
            bytes(4),
        ),
        **{
            f"code {number}, {where}": ("00", lambda c=code, w=where: beside_weights(c, w))
            for number, code in enumerate(CODES)
            for where in ("as an object", "as a key", "as a state", "to be appended to")
        },
        "shared lists as a state": (
            "00",
            lambda: beside_weights(lists + call(b"some\nClass") + get(40) + b"b", "as an object"),
        ),
        "shared lists as an attribute": refused(
            beside_weights,
            lists + call(b"some\nClass") + b"}" + text(b"a") + get(40) + b"sb",
            "as an object",
        ),
        "shared lists in the name of a tensor": (
            "00",
            lambda: beside_weights(
                lists + b"}" + call(b"some\nClass") + get(40) + b"b]s", "as an object"
            ),
        ),
        "shared tuples in the name of a tensor": (
            "00",
            lambda: beside_weights(tuples + b"0" * 41 + b"}" + get(40) + b"]s", "as an object"),
        ),
        "shared lists as an argument": refused(
            beside_weights, lists + call(b"some\nClass", get(40), get(40)) * 3000, "as an object"
        ),
        "a foreign tensor from nothing": refused(
            beside_weights,
            call(
                b"torch._tensor\n_rebuild_from_type_v2",
                b"ctorch._utils\n_rebuild_wrapper_subclass\n",
                b"ca\nB\n",
                b"(ca\nB\nctorch\nfloat32\n" + huge + b"\x85tR",
                b"N",
            ),
            "as an object",
        ),
        "a weight of torchao that holds itself": (
            "00",
            lambda: beside_weights(
                of_torchao(b"N") + put(0) + b"}" + text(b"qdata") + get(0) + b"sb", "as an object"
            ),
        ),
        "weights of torchao within each other": (
            "00",
            lambda: beside_weights(
                of_torchao(b"N")
                + put(0)
                + b"".join(
                    b"0"
                    + of_torchao(b"}(" + (text(b"a") + get(n) + text(b"b") + get(n)) + b"u")
                    + put(n + 1)
                    for n in range(40)
                ),
                "as an object",
            ),
        ),
        "settings of torchao without end": (
            "00",
            lambda: beside_weights(
                lists + of_torchao(b"}(" + text(b"a") + get(40) + text(b"b") + tuples[:1] + b"u"),
                "as an object",
            ),
        ),
        "many weights of torchao with one state": refused(
            beside_weights,
            b"}("
            + b"".join(text(b"%d" % n) + b"(" + b"K\x01" * 16 + b"t" for n in range(60))
            + text(b"qdata")
            + of_storage(b"0", 4)
            + b"u"
            + put(0)
            + b"0]("
            + of_torchao(get(0)) * 20_000
            + b"e",
            "as an object",
        ),
        "odd names": ("00", lambda: torch_file({name: torch.eye(2) + 0.5 for name in names})),
    }
