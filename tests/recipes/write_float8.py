"""Writes data/float8_*: FP8 weights of transformers, its FBGEMM layers, and DeepSeek.

    python tests/recipes/write_float8.py [folder]

Needs the packages in requirements.txt. Everything runs on a CPU, on which transformers reads FP8
but does not quantise models. The script therefore applies its operation to one weight at a time.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from compressed_tensors.entrypoints.convert.converters import FP8BlockDequantizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Qwen3MoeConfig
from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear, FbgemmFp8Llama4TextExperts
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

E8M0 = torch.float8_e8m0fnu
CONFIG = {
    "vocab_size": 8, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "num_experts": 2, "num_experts_per_tok": 1,
}  # fmt: skip


def sample(*shape: int) -> Tensor:
    """Distinct entries in rows and columns of different scales."""
    *_, m, n = shape
    rows, columns = (0.5 ** (torch.arange(side) % 5) for side in (m, n))
    return torch.randn(shape) * rows[:, None] * columns


def write_model(folder: Path) -> None:
    """Writes a Qwen3-MoE with blocks of 4x8, and the weights that transformers reads."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**CONFIG))
    for parameter in model.parameters():
        parameter.data = sample(*parameter.shape) if parameter.ndim > 1 else parameter.data
    settings = FineGrainedFP8Config(weight_block_size=[4, 8])
    settings.modules_to_not_convert = ["lm_head", "model.embed_tokens", "model.layers.0.mlp.gate"]
    with tempfile.TemporaryDirectory() as temporary:
        plain = Path(temporary)
        model.save_pretrained(plain)
        tensors = load_file(plain / "model.safetensors")
        for name, tensor in list(tensors.items()):
            if name.endswith("proj.weight"):
                tensors |= quantise(settings, name, tensor)
        save_file(tensors, plain / "model.safetensors", {"format": "pt"})
        config = json.loads((plain / "config.json").read_text())
        config["quantization_config"] = settings.to_dict()
        (plain / "config.json").write_text(json.dumps(config))
        read = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).state_dict()
    weights = {}
    for name in [name for name, one in tensors.items() if one.dtype == torch.float8_e4m3fn]:
        module, number, projection = name.removesuffix(".weight").rsplit(".", 2)
        if name in read:
            weights[name] = read[name]
        elif projection == "down_proj":
            weights[name] = read[f"{module}.down_proj"][int(number)].clone()
        else:
            both = read[f"{module}.gate_up_proj"][int(number)].chunk(2)
            weights[name] = both[projection == "up_proj"].clone()
    stored = {name: one for name, one in tensors.items() if "_proj" in name}
    write_folder(folder, stored, settings.to_dict(), weights)


def quantise(settings: FineGrainedFP8Config, name: str, tensor: Tensor) -> dict[str, Tensor]:
    return Fp8Quantize(SimpleNamespace(quantization_config=settings)).convert({name: tensor})


def write_stacks(folder: Path) -> None:
    """Writes stacks of experts, with scales that are powers of two."""
    torch.manual_seed(0)
    settings = FineGrainedFP8Config(weight_block_size=[8, 4], scale_fmt="ue8m0")
    tensors, weights = {}, {}
    for name, shape in (("gate_up_proj", (3, 16, 12)), ("down_proj", (3, 24, 8))):
        both = quantise(settings, f"mlp.experts.{name}", sample(*shape))
        codes, scales = both.values()
        tensors |= both
        read = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
        weights[f"mlp.experts.{name}"] = read
    write_folder(folder, tensors, settings.to_dict(), weights)


def write_folder(folder: Path, tensors: dict[str, Any], config: Any, weights: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}) + "\n")
    save_file(weights, folder / "expected.safetensors")


def write_deepseek(folder: Path) -> None:
    """Writes weights with short last blocks under the names of DeepSeek V3 and V4."""
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, (m, n), kind in (
        ("v3.short", (20, 27), torch.float32),
        ("v3.full", (16, 24), torch.float32),
        ("v3.row", (1, 19), torch.float32),
        ("v3.small", (5, 3), torch.bfloat16),
        ("v4.bytes", (10, 26), torch.uint8),
        ("v4.powers", (17, 9), E8M0),
    ):
        scales = torch.rand(-(-m // 8), -(-n // 12)) + 0.5
        if name.startswith("v4"):
            scales = 2.0 ** torch.randint(-12, 3, scales.shape)
        own = "weight_scale_inv" if name.startswith("v3") else "scale"
        codes = sample(m, n).to(torch.float8_e4m3fn)
        stored = scales.to(torch.float32 if kind == torch.uint8 else kind)
        both = {"x.weight": codes, "x.weight_scale_inv": stored}
        converter = FP8BlockDequantizer(weight_block_size=(8, 12), dtype=torch.float32)
        weights[f"{name}.weight"] = converter.process(dict(both))["x.weight"]
        if kind == torch.uint8:
            stored = (scales.log2() + 127).to(torch.uint8)
        tensors |= {f"{name}.weight": codes, f"{name}.{own}": stored}
    config = {"quant_method": "fp8", "weight_block_size": [8, 12], "activation_scheme": "dynamic"}
    write_folder(folder, tensors, config, {k: w.contiguous() for k, w in weights.items()})


def write_fbgemm(folder: Path) -> None:
    """Writes the parameters of FBGEMM layers. Experts have one scale per output."""
    torch.manual_seed(0)
    layer = FbgemmFp8Linear(11, 7, bias=True)
    sizes = {"num_local_experts": 2, "intermediate_size": 6, "hidden_size": 9, "hidden_act": "silu"}
    experts = FbgemmFp8Llama4TextExperts(SimpleNamespace(**sizes))
    tensors, weights = {}, {}
    for module, prefix in ((layer, "fc"), (experts, "experts")):
        for name, parameter in module.named_parameters():
            codes = sample(1, *parameter.shape)[0].to(parameter.dtype)
            scaled = name.endswith("_scale")
            tensors[f"{prefix}.{name}"] = torch.rand(parameter.shape) if scaled else codes
    for name, codes in tensors.items():
        if (scales := tensors.get(f"{name}_scale")) is not None:
            rows = name.endswith("weight")  # rows are outputs; for experts, columns are
            each = scales if rows else scales.reshape(len(scales), 1, -1)
            weights[name] = codes.float() * each
    write_folder(folder, tensors, {"quant_method": "fbgemm_fp8"}, weights)


if __name__ == "__main__":
    data = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data"
    write_model(data / "float8_experts")
    write_stacks(data / "float8_stacks")
    write_deepseek(data / "float8_deepseek")
    write_fbgemm(data / "float8_fbgemm")
