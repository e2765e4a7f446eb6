"""Writes data/gptq_*: layers that three libraries pack, and the weights that they dequantise.

    python tests/recipes/write_gptq.py [folder]

Needs the packages in requirements.txt. Everything runs on a CPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from packers import load_auto_gptq, load_auto_round, load_gptqmodel
from safetensors.torch import save_file
from torch import Tensor, nn

# The settings that BaseQuantizeConfig of auto-gptq 0.7.1 writes.
AUTO_GPTQ = {
    "damp_percent": 0.01,
    "static_groups": False,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": None,
    "is_marlin_format": False,
    "quant_method": "gptq",
    "checkpoint_format": "gptq",
}


def sample_layer(
    m: int, n: int, bits: int, groups: Tensor, lowest: int, dtype: torch.dtype = torch.float16
) -> tuple[nn.Linear, Tensor, Tensor]:
    """A layer whose weight has exact values of codes, and their scales and zero points.

    Args:
        m: the number of outputs.
        n: the number of inputs.
        bits: the number of bits per code.
        groups: the groups of the inputs, (n,).
        lowest: the lowest zero point.
        dtype: the dtype of the weight.

    Returns:
        The layer, and its scales and zero points (m, number of groups).
    """
    count = int(groups.max()) + 1
    codes = torch.randint(0, 1 << bits, (m, n))
    z = torch.randint(lowest, 1 << bits, (m, count))
    rows, columns = (0.5 ** (torch.arange(side) % 3) for side in (m, count))
    s = ((1 + torch.rand(m, count)) * rows[:, None] * columns / 16).to(dtype)
    layer = nn.Linear(n, m, bias=False)
    layer.weight.data = ((codes - z[:, groups]) * s[:, groups].float()).to(dtype)
    return layer, s, z


def in_order(n: int, size: int) -> Tensor:
    return (torch.arange(n) // size).to(torch.int32)


def act_order(n: int, size: int) -> Tensor:
    return in_order(n, size)[torch.randperm(n)]


def pack_auto_gptq(
    bits: int, size: int, layer: nn.Linear, s: Tensor, z: Tensor, groups: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors that auto-gptq stores, and the weight by which its layer multiplies."""
    m, n = layer.weight.shape
    packed = load_auto_gptq()(bits, size, n, m, bias=False, weight_dtype=layer.weight.dtype)
    packed.pack(layer, s, z.float(), groups)
    return packed.state_dict(), packed(torch.eye(n, dtype=s.dtype)).T.contiguous()


def pack_gptqmodel(
    bits: int, size: int, layer: nn.Linear, s: Tensor, z: Tensor, groups: Tensor, kind: str
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors that gptqmodel stores in this format, and the weight that it dequantises."""
    m, n = layer.weight.shape
    linear, convert = load_gptqmodel(), load_gptqmodel("utils.model")
    formats = load_gptqmodel("quantization")
    packed = linear.TorchLinear(
        bits=bits, group_size=size, sym=False, desc_act=True, in_features=n, out_features=m,
        bias=False, pack_dtype=torch.int32, register_buffers=True, format=formats.FORMAT(kind),
    )  # fmt: skip
    packed.pack_original(layer, s, z, groups)
    packed.qzero_format(format=2)
    packed.eval()
    expected = packed.dequantize_weight().T.contiguous()
    if kind == "gptq":
        settings = formats.QuantizeConfig(bits=bits)
        convert.convert_gptq_v2_to_v1_format_module(packed, settings)
    return {name: one.clone() for name, one in packed.state_dict().items()}, expected


def pack_auto_round(
    bits: int, size: int, layer: nn.Linear, s: Tensor, z: Tensor, kind: str
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors that AutoRound stores, and the weight by which its layer multiplies."""
    m, n = layer.weight.shape
    linear = load_auto_round("qlinear_torch_zp" if kind.endswith("gptq") else "qlinear_torch")
    packed = linear(bits, size, n, m, bias=False)
    packed.device = "cpu"
    layer.weight.data = layer.weight.data.float()
    packed.pack(layer, s.float(), z.float())
    return packed.state_dict(), packed(torch.eye(n, dtype=torch.float16)).T.contiguous()


def save(
    folder: Path,
    layers: Mapping[str, tuple[dict[str, Tensor], Tensor]],
    settings: Mapping[str, Any],
) -> None:
    """Writes layers, their weights, and the settings in both configs."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{path}.{name}": one.contiguous()
        for path, (packed, _) in layers.items()
        for name, one in packed.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    expected = {f"{path}.weight": W for path, (_, W) in layers.items()}
    save_file(expected, folder / "expected.safetensors")
    config = {"model_type": "llama", "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if settings["quant_method"] == "gptq":
        (folder / "quantize_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def describe_gptqmodel(kind: str, bits: int, size: int, **more: Any) -> dict[str, Any]:
    """The settings as gptqmodel writes them."""
    formats = load_gptqmodel("quantization")
    settings = formats.QuantizeConfig(
        bits=bits, group_size=size, sym=False, desc_act=True, format=formats.FORMAT(kind), **more
    )  # fmt: skip
    settings.meta_set_versionable("quantizer", ["gptqmodel:7.7.0"])
    described = json.loads(json.dumps(settings.to_dict(), default=str))
    described["meta"] = {"quantizer": described["meta"]["quantizer"]}
    return described


def write(folder: Path) -> None:
    torch.manual_seed(0)
    # 3 bits across words, groups of 20 of which the last is short, inputs in another order.
    groups = act_order(64, 20)
    packed = pack_auto_gptq(3, 20, *sample_layer(32, 64, 3, groups, lowest=1), groups)
    settings = {"bits": 3, "group_size": 20, "desc_act": True, "sym": False, **AUTO_GPTQ}
    save(folder / "gptq_3_bits", {"layers.0.q_proj": packed}, settings)
    # Zero points of 0, for which gptqmodel borrows from their neighbours.
    groups = act_order(32, 16)
    packed = pack_gptqmodel(4, 16, *sample_layer(32, 32, 4, groups, lowest=0), groups, "gptq")
    save(folder / "gptq_borrows", {"q_proj": packed}, describe_gptqmodel("gptq", 4, 16))
    # Layers with bits of their own.
    layers = {}
    for bits in (2, 8):
        groups = in_order(32, 16)
        one = sample_layer(16 if bits == 2 else 20, 32, bits, groups, lowest=0)
        layers[f"layers.{bits}.up_proj"] = pack_gptqmodel(bits, 16, *one, groups, "gptq_v2")
    dynamic = {r"+:.*\.8\..*": {"bits": 8}}
    save(folder / "gptq_v2", layers, describe_gptqmodel("gptq_v2", 2, 16, dynamic=dynamic))
    layers = {}
    for bits in (3, 5, 7):
        groups = act_order(32, 16)
        one = sample_layer(32, 32, bits, groups, lowest=0)
        layers[f"layers.{bits}.up_proj"] = pack_gptqmodel(bits, 16, *one, groups, "gptq_p")
    dynamic = {rf"+:.*\.{bits}\..*": {"bits": bits} for bits in (3, 7)}
    save(folder / "gptq_planes", layers, describe_gptqmodel("gptq_p", 5, 16, dynamic=dynamic))
    layer = sample_layer(32, 32, 5, in_order(32, 16), lowest=0)
    layers = {"layers.5.up_proj": pack_auto_round(5, 16, *layer, "auto_round")}
    settings = {"quant_method": "auto-round", "packing_format": "auto_round"}
    settings |= {"bits": 5, "group_size": 16, "sym": False, "data_type": "int"}
    save(folder / "gptq_auto_round", layers, settings)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data")
