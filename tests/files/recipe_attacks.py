"""Checkpoints that try to make recipes use memory or time far beyond the size of the files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from corpus import Sample
from damage import Part, file_of

Parts = Mapping[str, Part]
_HUGE = 1 << 40
_TABLE = b"".join(
    int.to_bytes(bits, 4, "little")
    for bits in (
        *(0xBF800000, 0xBF3239B1, 0xBF066B30, 0xBECA32A0, 0xBE91A2A8, 0xBE3D353F, 0xBDBA7871, 0),
        *(0x3DA2FAFF, 0x3E24CCE2, 0x3E7C04D1, 0x3EAD033A, 0x3EE1A3F9, 0x3F1007AD, 0x3F391355),
        0x3F800000,
    )
)


def zeros(dtype: str, *shape: int) -> Part:
    """Makes a tensor of zero bytes."""
    size = {"F32": 4, "I32": 4, "U32": 4, "I64": 8, "F16": 2, "U8": 1, "I8": 1, "F8_E4M3": 1}[dtype]
    for side in shape:
        size *= side
    return Part(dtype, list(shape), bytes(size))


def folder(tensors: Parts, config: Any, **others: Any) -> Sample:
    """Makes a model with one file; configs can be JSON or bytes."""
    files = {"model.safetensors": file_of(tensors, {})}
    for name, content in {"config": config, **others}.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        files[f"{name}.json"] = data
    return Sample("", files)


def of_bitsandbytes(shape: list[Any]) -> Sample:
    """Makes a weight of 4 bits that declares this shape."""
    said = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": shape}
    data = json.dumps(said).encode()
    parts = {
        "l.weight": zeros("U8", 32, 1),
        "l.weight.absmax": zeros("F32", 1),
        "l.weight.quant_map": Part("F32", [16], _TABLE),
        "l.weight.quant_state.bitsandbytes__nf4": Part("U8", [len(data)], data),
    }
    return Sample("a.safetensors", {"a.safetensors": file_of(parts, {})})


def numbers(dtype: str, *values: int) -> Part:
    width = {"I64": 8, "I32": 4}[dtype]
    data = b"".join(value.to_bytes(width, "little", signed=True) for value in values)
    return Part(dtype, [len(values)], data)


def gptq() -> Parts:
    return {
        "l.qweight": zeros("I32", 4, 32),
        "l.qzeros": zeros("I32", 1, 4),
        "l.scales": zeros("F16", 1, 32),
        "l.g_idx": zeros("I32", 32),
    }


def packed(n: int) -> Parts:
    """Makes 8 rows of 4 words, which declare this number of codes each."""
    return {
        "l.weight_packed": zeros("I32", 8, 4),
        "l.weight_scale": zeros("F16", 8, 1),
        "l.weight_shape": numbers("I64", 8, n),
    }


def hqq(*shape: int) -> Parts:
    """Makes a weight that declares this shape."""
    packing = b"4bit_u8"
    return {
        "l.W_q": zeros("U8", 4, 8),
        "l.scale": zeros("F16", 8, 1),
        "l.zero": zeros("F16", 8, 1),
        "l.shape": numbers("I64", *shape),
        "l.axis": numbers("I32", 1),
        "l.group_size": numbers("I32", 8),
        "l.packing": Part("U8", [len(packing)], packing),
    }


def in_config(**settings: Any) -> dict[str, Any]:
    return {"quantization_config": settings}


def deep(levels: int, inner: bytes) -> bytes:
    return b'{"quantization_config":' * levels + inner + b"}" * levels


def recipe_attacks() -> dict[str, tuple[str, Callable[[], Sample]]]:
    """Returns the exit codes of the four commands of a thorough check, and the samples."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel"}}
    groups = in_config(quant_method="compressed-tensors", config_groups={"a": group})
    settings = b'{"quant_method": "gptq", "bits": %s}'
    lists = settings % (b"[" * 900 + b"]" * 900)

    def refused(make: Callable[..., Sample], *arguments: Any) -> tuple[str, Callable[[], Sample]]:
        return "2222", lambda: make(*arguments)

    return {
        "a shape of 2^80 entries": refused(of_bitsandbytes, [_HUGE, _HUGE]),
        "a shape of 2^40 entries": refused(of_bitsandbytes, [_HUGE, 1]),
        "a shape of huge numbers": refused(of_bitsandbytes, [10**900, 10**900, 10**900]),
        "a shape of 1,000 sides": refused(of_bitsandbytes, [1] * 1000),
        "packed rows of 2^40 codes": refused(folder, packed(_HUGE), groups),
        "HQQ of 2^60 entries": refused(folder, hqq(1 << 30, 1 << 30), {}),
        "a million levels": refused(folder, gptq(), deep(1_000_000, b"1")),
        "900 levels": ("0220", lambda: folder(gptq(), deep(900, settings % b"4"))),
        "900 levels of a setting": refused(folder, gptq(), deep(1, lists)),
        "900 levels in two configs": refused(
            lambda: folder(gptq(), deep(1, lists), quantize_config=lists)
        ),
        "a list for a config": refused(folder, gptq(), [in_config(bits=4)]),
        "a text for a config": refused(folder, gptq(), "bits"),
        "a config of a long word": refused(folder, gptq(), in_config(bits=4, format="x" * 900_000)),
    }
