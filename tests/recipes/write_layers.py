"""Writes data/hqq, data/quanto and data/bitnet: layers of three libraries, and their weights.

    python tests/recipes/write_layers.py [folder]

Needs the packages in requirements.txt. Everything runs on a CPU.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # transformers would compile functions that run only once

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from optimum.quanto import freeze, qfloat8_e4m3fn, qint8, quantize
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.integrations.bitnet import BitLinear, pack_weights, unpack_weights

Layers = dict[str, tuple[dict[str, Tensor], Tensor]]  # the tensors and the weight of each layer


def sample(m: int, n: int) -> Tensor:
    """Distinct entries in rows and columns of different scales."""
    rows, columns = (0.75 ** (torch.arange(side) % 5) for side in (m, n))
    return torch.randn(m, n) * rows[:, None] * columns


def pack_hqq(m: int, n: int, dtype: torch.dtype, **settings: Any) -> tuple[dict, Tensor]:
    """The tensors of an HQQ layer in its layout for safetensors, and its weight."""
    linear = nn.Linear(n, m, bias=False)
    linear.weight.data = sample(m, n)
    config = BaseQuantizeConfig(**settings)
    layer = HQQLinear(linear, config, compute_dtype=dtype, device="cpu")
    tensors = {name: one.contiguous() for name, one in layer.state_dict().items()}
    # In float32, because the layer would round twice to its own dtype.
    wide = {key: layer.meta[key].float() for key in ("scale", "zero")}
    meta = layer.meta | wide | {"compute_dtype": torch.float32}
    return tensors, Quantizer.dequantize(layer.W_q, meta)


def pack_quanto(m: int, n: int, dtype: torch.dtype, kind: Any) -> tuple[dict, Tensor]:
    """An 8-bit layer of quanto."""
    model = nn.Sequential(nn.Linear(n, m, bias=False, dtype=dtype))
    model[0].weight.data = sample(m, n).to(dtype)
    quantize(model, weights=kind)
    freeze(model)
    weight = model[0].weight
    tensors = {name.removeprefix("0."): one for name, one in model.state_dict().items()}
    return tensors, weight._data.float() * weight._scale.float()


def pack_bitnet(m: int, n: int) -> tuple[dict, Tensor]:
    """A layer of BitNet, and the weight by which the layer multiplies."""
    codes = torch.randint(-1, 2, (m, n)).float()
    layer = BitLinear(n, m, bias=False, dtype=torch.float32)
    layer.weight = pack_weights(codes.clone())
    layer.weight_scale = torch.tensor([3.7])
    identity = torch.eye(n)  # quantised without loss to 127 of 127
    assert torch.equal(unpack_weights(layer.weight, torch.float32), codes)
    return layer.state_dict(), layer(identity).T.contiguous()


def save(folder: Path, layers: Layers, settings: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{path}.{k}": one for path, (parts, _) in layers.items() for k, one in parts.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_file({f"{p}.weight": W for p, (_, W) in layers.items()}, folder / "expected.safetensors")
    config = {"model_type": "llama", "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def write(folder: Path) -> None:
    torch.manual_seed(0)
    half = torch.float16
    layers = {
        "rows": pack_hqq(5, 32, half, nbits=4, group_size=16, axis=1),
        "columns": pack_hqq(8, 12, half, nbits=2, group_size=8, axis=0),
        "three": pack_hqq(8, 24, torch.float32, nbits=3, group_size=16, axis=1),
        "viewed": pack_hqq(4, 16, half, nbits=8, group_size=8, axis=1, view_as_float=True),
    }
    save(folder / "hqq", layers, {"quant_method": "hqq"})
    layers = {
        "integers": pack_quanto(5, 12, torch.bfloat16, qint8),
        "floats": pack_quanto(4, 9, torch.float32, qfloat8_e4m3fn),
    }
    save(folder / "quanto", layers, {"quant_method": "quanto", "weights": "int8"})
    layers = {"up_proj": pack_bitnet(12, 7)}
    save(folder / "bitnet", layers, {"quant_method": "bitnet", "linear_class": "bitlinear"})


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
