"""Writes data/torchao, a state dict as safetensors and as a pickle, and data/torchao_older.

    python tests/recipes/write_torchao.py [folder]

Needs the packages in requirements.txt. The script writes torchao_older only with an older torchao,
which still has the class AffineQuantizedTensor:

    pip install --no-deps --target OLD torchao==0.9.0
    PYTHONPATH=OLD python tests/recipes/write_torchao.py [folder]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

PICKLED = ("int8.weight", "float8.weight", "int4.weight")
Layers = dict[str, tuple[tuple[int, int], torch.dtype, Callable[[], Any]]]


def uneven(seed: int, m: int, n: int) -> Tensor:
    """Entries in rows and columns of different scales, most with a mean other than 0."""
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)) + 0.4
    return W * torch.logspace(-1.5, 1.5, m)[:, None] * torch.logspace(0.3, -0.3, n)


def layers() -> Layers:
    from torchao import quantization
    from torchao.prototype.mx_formats import (
        MXDynamicActivationMXWeightConfig,
        NVFP4WeightOnlyConfig,
    )
    from torchao.quantization import granularity as per

    def integers(bits: str, **more: Any) -> Any:
        return quantization.IntxWeightOnlyConfig(getattr(torch, bits), **more)

    def mx(kind: torch.dtype) -> Any:
        return MXDynamicActivationMXWeightConfig(activation_dtype=kind, weight_dtype=kind)

    float32, bfloat16 = torch.float32, torch.bfloat16
    asymmetric = quantization.MappingType.ASYMMETRIC
    return {
        "int8": ((5, 12), bfloat16, quantization.Int8WeightOnlyConfig),
        "int8_groups": (
            (6, 24),
            float32,
            lambda: quantization.Int8WeightOnlyConfig(granularity=per.PerGroup(8)),
        ),
        "int8_tensor": (
            (4, 9),
            float32,
            lambda: quantization.Int8WeightOnlyConfig(granularity=per.PerTensor()),
        ),
        "float8": ((7, 10), bfloat16, quantization.Float8WeightOnlyConfig),
        "int4": (
            (6, 24),
            bfloat16,
            lambda: integers("int4", granularity=per.PerGroup(6), mapping_type=asymmetric),
        ),
        "int3": ((5, 7), float32, lambda: integers("int3", granularity=per.PerAxis(0))),
        "mxfp8": ((6, 64), bfloat16, lambda: mx(torch.float8_e4m3fn)),
        "mxfp4": ((6, 64), bfloat16, lambda: mx(torch.float4_e2m1fn_x2)),
        "nvfp4": ((16, 32), float32, NVFP4WeightOnlyConfig),
    }


def older_layers() -> Layers:
    from torchao import quantization

    later = {
        "intx": ((6, 12), torch.float32, lambda: quantization.IntxWeightOnlyConfig(torch.int5))
    }
    return (later if hasattr(quantization, "IntxWeightOnlyConfig") else {}) | {
        "int8": ((5, 12), torch.bfloat16, quantization.Int8WeightOnlyConfig),
        "dynamic": (
            (4, 18),  # it would not quantise a layer of 16 inputs
            torch.float32,
            quantization.Int8DynamicActivationInt8WeightConfig,
        ),
        "int4": (
            (6, 24),
            torch.bfloat16,
            lambda: quantization.Int8DynamicActivationInt4WeightConfig(group_size=8),
        ),
        "float8": ((7, 10), torch.float32, quantization.Float8WeightOnlyConfig),
        "uintx": (
            (8, 24),
            torch.float32,
            lambda: quantization.UIntXWeightOnlyConfig(torch.uint4, group_size=8),
        ),
    }


def quantised(layers: Layers, scale: int = 1) -> nn.Module:
    """One layer per setting, with sides `scale` times as long."""
    from torchao.quantization import quantize_

    model = nn.ModuleDict()
    for seed, (name, ((m, n), dtype, config)) in enumerate(layers.items()):
        model[name] = nn.Linear(scale * n, scale * m, bias=False, dtype=dtype)
        model[name].weight.data = uneven(seed, scale * m, scale * n).to(dtype)
        quantize_(model[name], config())
    return model.requires_grad_(False)


def dequantised(one: Tensor) -> Tensor:
    """Dequantises to float32, without rounding to the dtype of the weight."""
    one = getattr(one, "original_weight_tensor", one)
    kind = type(one).__name__
    if kind == "AffineQuantizedTensor":
        return one.to(dtype=torch.float32).dequantize().float()
    if kind == "IntxUnpackedToInt8Tensor":
        return one.to(torch.float32).dequantize()
    return one.dequantize(torch.float32)


def write(folder: Path, scale: int = 1) -> None:
    """Writes layers with sides `scale` times as long."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    state = quantised(layers(), scale).state_dict()
    tensors, metadata = flatten_tensor_state_dict(dict(state))
    save_file(tensors, folder / "model.safetensors", metadata)
    pickled = PICKLED if scale == 1 else state  # to save bytes
    torch.save({name: one for name, one in state.items() if name in pickled}, folder / "state.pt")
    keep_expected(folder, state)


def write_older(folder: Path, scale: int = 1) -> None:
    state = quantised(older_layers(), scale).state_dict()
    torch.save(state, folder / "state.pt")
    keep_expected(folder, state)


def keep_expected(folder: Path, state: dict[str, Tensor]) -> None:
    expected = {name: dequantised(one).contiguous() for name, one in state.items()}
    for name, one in expected.items():
        if torch.equal(one.bfloat16().float(), one):
            expected[name] = one.bfloat16()
    save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    from torchao import quantization

    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data"
    older = not hasattr(quantization, "Int8Tensor")
    target /= "torchao_older" if older else "torchao"
    target.mkdir(parents=True, exist_ok=True)
    (write_older if older else write)(target)
    print(target.name, sum(path.stat().st_size for path in target.iterdir()))
