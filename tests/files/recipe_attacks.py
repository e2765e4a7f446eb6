"""Checkpoints made by hand to make recipes take memory or time far beyond the size of the files."""

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
    """A tensor of bytes that are zero."""
    size = {"F32": 4, "I32": 4, "U32": 4, "I64": 8, "F16": 2, "U8": 1, "I8": 1, "F8_E4M3": 1}[dtype]
    for side in shape:
        size *= side
    return Part(dtype, list(shape), bytes(size))


def folder(tensors: Parts, config: Any, **others: Any) -> Sample:
    """A model with one file; configs may be JSON, or bytes."""
    files = {"model.safetensors": file_of(tensors, {})}
    for name, content in {"config": config, **others}.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        files[f"{name}.json"] = data
    return Sample("", files)


def of_bitsandbytes(shape: list[Any], **more: Any) -> Sample:
    """A weight of 4 bits that says that it has this shape."""
    said = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": shape} | more
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


def layers(count: int, parts: Callable[[], Parts]) -> dict[str, Part]:
    """The same layer so many times."""
    return {f"layers.{n}.{name}": part for n in range(count) for name, part in parts().items()}


def gptq() -> Parts:
    return {
        "qweight": zeros("I32", 4, 32),
        "qzeros": zeros("I32", 1, 4),
        "scales": zeros("F16", 1, 32),
        "g_idx": zeros("I32", 32),
    }


def packed() -> Parts:
    return {
        "weight_packed": zeros("I32", 8, 4),
        "weight_scale": zeros("F16", 8, 1),
        "weight_shape": numbers("I64", 8, 32),
    }


def float8() -> Parts:
    return {"weight": zeros("F8_E4M3", 8, 8), "weight_scale": zeros("F32", 1, 1)}


def int8() -> Parts:
    return {"weight": zeros("I8", 8, 8), "weight_scale": zeros("F32", 1, 1)}


def deep(levels: int, inner: bytes = b"1") -> bytes:
    return b'{"quantization_config":' * levels + inner + b"}" * levels


def in_config(**settings: Any) -> dict[str, Any]:
    return {"quantization_config": settings}


def recipe_attacks() -> dict[str, tuple[str, Callable[[], Sample]]]:
    """Exit codes of audit, repair, audit with heads, and dequantise; and how to make the files."""
    many, long = 5000, "x" * 900_000
    big = [0] * 300_000
    named = {str(n): {"bits": 4, "group_size": n + 1} for n in range(25_000)}
    groups = {
        str(n): {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "group_size": 32 * (n + 1), "strategy": "group"},
        }
        for n in range(60)
    }
    algorithms = {f"layers.{n}": {"quant_algo": "FP8"} for n in range(20_000)}
    nested = deep(900, json.dumps({"quant_method": "gptq", "bits": 4}).encode())

    def refused(make: Callable[..., Sample], *arguments: Any) -> tuple[str, Callable[[], Sample]]:
        return "2222", lambda: make(*arguments)

    return {
        "a shape of 2^80 entries": refused(of_bitsandbytes, [_HUGE, _HUGE]),
        "a shape of 2^40 entries": refused(of_bitsandbytes, [_HUGE, 1]),
        "a shape of huge numbers": refused(of_bitsandbytes, [10**900, 10**900, 10**900]),
        "a shape of 1,000 sides": refused(of_bitsandbytes, [1] * 1000),
        "an offset of 10^900": refused(lambda: of_bitsandbytes([8, 8], nested_offset=10**900)),
        "packed rows of 2^40 codes": refused(
            lambda: folder(
                {f"l.{k}": v for k, v in packed().items()}
                | {"l.weight_shape": numbers("I64", 8, _HUGE)},
                in_config(quant_method="compressed-tensors", config_groups=groups),
            )
        ),
        "a million levels": refused(folder, layers(1, gptq), deep(1_000_000)),
        "900 levels": refused(folder, layers(1, gptq), nested),
        "900 levels in two configs": refused(
            lambda: folder(
                layers(many, gptq),
                b'{"quantization_config": {"bits": %s}}' % (b"[" * 900 + b"]" * 900),
                quantize_config=b'{"bits": %s}' % (b"[" * 900 + b"]" * 900),
            )
        ),
        "a list for a config": refused(folder, layers(1, gptq), [in_config(bits=4)]),
        "a text for a config": refused(folder, layers(1, gptq), "bits"),
        "a long format": refused(folder, layers(many, gptq), in_config(checkpoint_format=long)),
        "a long method": refused(folder, layers(many, gptq), in_config(quant_method=long)),
        "bits of a long list": refused(folder, layers(many, gptq), in_config(bits=big)),
        "two long lists": refused(
            lambda: folder(
                layers(many, gptq), in_config(dynamic=big), quantize_config={"dynamic": big}
            )
        ),
        "many writers": refused(
            folder, layers(many, gptq), in_config(bits=4, meta={"quantizer": [""] * 200_000})
        ),
        "many layers with group sizes": refused(
            folder,
            {n: p for n, p in layers(many, gptq).items() if not n.endswith("g_idx")},
            in_config(
                quant_method="auto-round",
                packing_format="auto_round:auto_gptq",
                bits=4,
                extra_config=named,
            ),
        ),
        "60 groups": refused(
            folder,
            layers(many, packed),
            in_config(quant_method="compressed-tensors", config_groups=groups),
        ),
        "a long block size": refused(
            folder, layers(many, float8), in_config(quant_method="fp8", weight_block_size=long)
        ),
        "a block size of many numbers": refused(
            folder, layers(many, float8), in_config(quant_method="fp8", weight_block_size=big)
        ),
        "a long algorithm": refused(
            folder, layers(many, int8), in_config(quant_method="modelopt", quant_algo=big)
        ),
        "an algorithm per layer": refused(
            folder,
            layers(many, int8),
            in_config(
                quant_method="modelopt", quant_algo="MIXED_PRECISION", quantized_layers=algorithms
            ),
        ),
        "settings of Quark per layer": refused(
            folder,
            layers(many, lambda: {**int8(), "weight_scale": zeros("U8", 8, 1)}),
            in_config(quant_method="quark", layer_quant_config=named),
        ),
    }
