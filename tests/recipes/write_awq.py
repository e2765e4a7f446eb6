"""Writes data/awq_*: layers that autoawq packs, and the weights that it dequantises.

    python tests/recipes/write_awq.py [folder]

Needs the packages in requirements.txt. Everything runs on a CPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from packers import load_autoawq
from safetensors.torch import save_file
from torch import Tensor, nn
from write_gptq import in_order, sample_layer


def pack_gemm(size: int, layer: nn.Linear, s: Tensor, z: Tensor) -> tuple[Any, Tensor]:
    """A layer of the version gemm, and the weight that autoawq dequantises without kernels."""
    module = load_autoawq("gemm")
    packed = module.WQLinear_GEMM.from_linear(layer, 4, size, scales=s.T, zeros=z.T)
    parts = packed.qweight, packed.qzeros, packed.scales
    return packed, module.dequantize_gemm(*parts, 4, size).T.contiguous()


def pack_gemv(size: int, layer: nn.Linear, s: Tensor, z: Tensor) -> tuple[Any, Tensor]:
    """A layer of the version gemv, and the weight that autoawq packs without loss."""
    module = load_autoawq("gemv")
    packed = module.WQLinear_GEMV.from_linear(layer, 4, size, scales=s, zeros=z)
    return packed, layer.weight.data


def save(folder: Path, version: str, size: int, packed: nn.Module, expected: Tensor) -> None:
    """Writes a layer with the settings of autoawq."""
    folder.mkdir(parents=True, exist_ok=True)
    path = "model.layers.0.mlp.up_proj"
    tensors = {f"{path}.{name}": one.contiguous() for name, one in packed.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_file({f"{path}.weight": expected}, folder / "expected.safetensors")
    settings = {
        "quant_method": "awq",
        "zero_point": True,
        "group_size": size,
        "bits": 4,
        "version": version,
        "modules_to_not_convert": None,
    }
    config = {"model_type": "llama", "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def write(folder: Path) -> None:
    torch.manual_seed(0)
    groups = in_order(48, 16)
    save(folder / "awq_gemm", "gemm", 16, *pack_gemm(16, *sample_layer(64, 48, 4, groups, 0)))
    groups = in_order(96, 32)
    save(folder / "awq_gemv", "gemv", 32, *pack_gemv(32, *sample_layer(24, 96, 4, groups, 0)))


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
