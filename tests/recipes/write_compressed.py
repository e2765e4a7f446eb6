"""Writes data/compressed_*: layers that compressed-tensors quantises, compresses and decompresses.

    python tests/recipes/write_compressed.py [folder]

Needs the packages in requirements.txt. Older versions of compressed-tensors write the old formats:
0.9.4 its layout of packed words and the order of columns, 0.8.1 zero points that are not packed:

    pip install --no-deps --target OLD compressed-tensors==0.9.4
    PYTHONPATH=OLD python tests/recipes/write_compressed.py [folder]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from safetensors.torch import save_file
from torch import Tensor, nn

Setting = tuple[tuple[int, int], dict[str, Any]]
TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
MX = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
NV = {
    "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
    "scale_dtype": torch.float8_e4m3fn,
}  # fmt: skip
FP8 = {"num_bits": 8, "type": "float"}
# Shapes are not square, not multiples of a word, and smaller and larger than a block.
PACKED: dict[str, Setting] = {
    "four": ((10, 24), {"num_bits": 4, "strategy": "group", "group_size": 8}),
    "asymmetric": (
        (10, 24), {"num_bits": 4, "strategy": "group", "group_size": 8, "symmetric": False}
    ),
    "eight": ((5, 9), {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    "three": ((7, 40), {"num_bits": 3, "strategy": "group", "group_size": 20}),
    "five": ((13, 37), {"num_bits": 5, "strategy": "channel", "symmetric": False}),
    "six": ((3, 22), {"num_bits": 6, "strategy": "tensor"}),
    "seven": ((9, 33), {"num_bits": 7, "strategy": "group", "group_size": 11, "symmetric": False}),
    "two": ((3, 35), {"num_bits": 2, "strategy": "channel"}),
    "blocks": ((7, 13), {"num_bits": 4, "strategy": "block", "block_structure": [3, 5]}),
}  # fmt: skip
PLAIN: dict[str, Setting] = {
    "rows": ((7, 12), {"num_bits": 8, "strategy": "channel", "input": TOKEN}),
    "asymmetric": (
        (6, 12), {"num_bits": 8, "strategy": "channel", "symmetric": False, "input": TOKEN}
    ),
    "groups": ((5, 24), {"num_bits": 4, "strategy": "group", "group_size": 6, "input": TOKEN}),
    "float_tensor": ((7, 12), {**FP8, "strategy": "tensor"}),
    "float_rows": ((8, 11), {**FP8, "strategy": "channel", "input": TOKEN | {"type": "float"}}),
    "float_groups": ((5, 24), {**FP8, "strategy": "group", "group_size": 8}),
    "float_blocks": ((11, 20), {**FP8, "strategy": "block", "block_structure": [4, 8]}),
}  # fmt: skip
# In older versions, zero points are packed only if the rows fill complete words.
OLD: dict[str, dict[str, Setting]] = {
    "0.9": {
        "three": ((5, 44), {"num_bits": 3, "strategy": "group", "group_size": 11}),
        "asymmetric": (
            (12, 33), {"num_bits": 5, "strategy": "group", "group_size": 11, "symmetric": False}
        ),
        "ordered": (
            (7, 40), {"num_bits": 4, "strategy": "group", "group_size": 8, "actorder": "group"}
        ),
        "wide": ((2, 96), {"num_bits": 3, "strategy": "channel"}),
        "short": ((3, 10), {"num_bits": 6, "strategy": "group", "group_size": 10}),
    },
    "0.8": {
        "asymmetric": (
            (7, 24), {"num_bits": 4, "strategy": "group", "group_size": 8, "symmetric": False}
        ),
        "rows": ((7, 11), {"num_bits": 8, "strategy": "channel", "symmetric": False}),
    },
}  # fmt: skip
FLOATS: dict[str, Setting] = {
    "nv": ((6, 48), NV),
    "mx4": ((5, 64), {**MX, "num_bits": 4}),
    "mx6": ((5, 64), {**MX, "num_bits": 6}),
    "mx8": ((5, 64), {**MX, "num_bits": 8}),
}


def sample(*shape: int) -> Tensor:
    """Distinct entries in rows and columns of different scales."""
    m, n = shape
    rows, columns = (0.5 ** (torch.arange(side) % 5) for side in (m, n))
    return torch.randn(m, n) * rows[:, None] * columns


def configure(settings: dict[str, Setting], **others: Any) -> QuantizationConfig:
    groups = {}
    for number, (name, (_, args)) in enumerate(settings.items()):
        args = dict(args)
        inputs = args.pop("input", None)
        groups[f"group_{number}"] = QuantizationScheme(
            targets=[name],
            weights=QuantizationArgs(**args),
            input_activations=inputs and QuantizationArgs(**inputs),
        )
    return QuantizationConfig(config_groups=groups, **others)


@torch.no_grad()
def set_scales(layer: nn.Module, args: QuantizationArgs) -> None:
    """Sets a different scale for every block, and zero points if the format has them."""
    scale = layer.weight_scale
    values = (torch.rand(scale.shape) + 0.5) * layer.weight.abs().mean() * 4 / 2**args.num_bits
    if args.type == "float":
        values = (torch.rand(scale.shape) + 0.5) / 8
    if args.scale_dtype == torch.uint8:
        values = 2.0 ** torch.randint(-9, 3, scale.shape)
    if args.scale_dtype == torch.float8_e4m3fn:
        layer.weight_global_scale.fill_(771.3)
        values = (values * 64).to(args.scale_dtype).float()
    scale.copy_(values)
    if not args.symmetric:
        half = 2 ** (args.num_bits - 1)
        layer.weight_zero_point.copy_(torch.randint(-half, half, scale.shape))


def write(folder: Path, settings: dict[str, Setting], dtype: torch.dtype, **others: Any) -> None:
    torch.manual_seed(0)
    model = nn.Module()
    for name, ((m, n), _) in settings.items():
        layer = nn.Linear(n, m, bias=False, dtype=dtype)
        layer.weight.data = sample(m, n).to(dtype)
        model.add_module(name, layer)
    apply_quantization_config(model, configure(settings))
    for layer in model.children():
        set_scales(layer, layer.quantization_scheme.weights)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    stored = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").unlink(missing_ok=True)
    compressor.update_config(folder)
    shrink(folder, **others)
    compressor.decompress_model(model)
    weights = {f"{name}.weight": one.weight.contiguous() for name, one in model.named_children()}
    save_file(weights, folder / "expected.safetensors")


def write_old(folder: Path, settings: dict[str, Setting]) -> None:
    """Packs codes with the class of an older version, which packs one weight at a time."""
    from compressed_tensors import compressors
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    torch.manual_seed(0)
    pack = compressors.PackedQuantizationCompressor.__new__(
        compressors.PackedQuantizationCompressor
    )
    stored, weights = {}, {}
    for name, ((m, n), kwargs) in settings.items():
        args = QuantizationArgs(**kwargs)
        groups = 1 if args.strategy == "channel" else n // args.group_size
        scale = (torch.rand(m, groups) + 0.5) / 2**args.num_bits
        parts = {"scale": scale}
        if not args.symmetric:
            half = 2 ** (args.num_bits - 1)
            parts["zero_point"] = torch.randint(-half, half, scale.shape, dtype=torch.int8)
        if args.actorder:
            parts["g_idx"] = torch.randperm(n, dtype=torch.int32) // args.group_size
        W = sample(m, n)
        codes = quantize(W, args=args, dtype=torch.int8, **{"zero_point": None} | parts)
        # The compressor also omits `args`: the shapes determine the strategy.
        weights[f"{name}.weight"] = dequantize(codes, **parts)
        packed = {f"weight_{part}": tensor for part, tensor in parts.items()}
        packed |= pack.compress_weight(W, quantization_args=args, **parts)
        stored |= {f"{name}.{part}": tensor.contiguous() for part, tensor in packed.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    save_file(weights, folder / "expected.safetensors")
    config = configure(settings, format="pack-quantized", quantization_status="compressed")
    settings = json.loads(config.model_dump_json())
    settings["version"] = compressed_tensors.__version__
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}) + "\n")


def shrink(folder: Path, **others: Any) -> None:
    """Writes the config on one line."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | others) + "\n")


if __name__ == "__main__":
    data = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data"
    version = compressed_tensors.__version__
    if version.startswith("0.20"):
        write(data / "compressed_packed", PACKED, torch.float32)
        write(data / "compressed_plain", PLAIN, torch.float32)
        write(data / "compressed_floats", FLOATS, torch.bfloat16)
    elif version[:3] in OLD:
        write_old(data / f"compressed_{version.replace('.', '_')}", OLD[version[:3]])
