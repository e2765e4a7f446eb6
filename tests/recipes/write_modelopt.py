"""Writes data/modelopt_*: models that ModelOpt quantises and exports, and their weights.

    python tests/recipes/write_modelopt.py [folder]

Needs the packages in requirements.txt. Everything runs on a CPU.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor, NVFP4QTensor
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Llama4TextConfig, LlamaConfig, PretrainedConfig

SIZES = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 8,
}
DENSE = LlamaConfig(
    **SIZES, hidden_size=32, intermediate_size=64, head_dim=16, architectures=["LlamaForCausalLM"]
)
EXPERTS = Llama4TextConfig(
    **SIZES,
    hidden_size=48,
    intermediate_size=32,
    intermediate_size_mlp=32,
    head_dim=16,
    num_local_experts=2,
    num_experts_per_tok=2,
    interleave_moe_layer_step=1,
    architectures=["Llama4ForCausalLM"],
)


def sample(*shape: int) -> Tensor:
    """Distinct entries in rows and columns of different scales."""
    *_, m, n = shape
    rows, columns = (0.5 ** (torch.arange(side) % 5) for side in (m, n))
    return torch.randn(shape) * rows[:, None] * columns


def dequantise(codes: Tensor, scales: Tensor, second: Tensor | None) -> Tensor:
    """Dequantises with the classes of ModelOpt. NVFP4 stacks are packed along their rows."""
    f32 = torch.float32
    if codes.dtype == torch.uint8 and codes.ndim == 3:
        both = zip(codes, scales, strict=True)
        if second is None:
            return torch.stack([dequantise(q, s, second) for q, s in both])
        return torch.stack([dequantise(q.T, s.T, second).T for q, s in both])
    if codes.dtype == torch.uint8:
        shape = torch.Size((len(codes), 2 * codes.shape[1]))
        if second is None:
            stored = MXFP4QTensor(shape, f32, codes.contiguous())
            return stored.dequantize(f32, scale=scales.contiguous(), block_sizes={-1: 32})
        stored = NVFP4QTensor(shape, f32, codes.contiguous())
        return stored.dequantize(f32, scale=scales, double_scale=second, block_sizes={-1: 16})
    if scales.dtype == torch.uint8:
        return MXFP8QTensor(codes.shape, f32, codes).dequantize(f32, scale=scales)
    rows = scales.ndim == 1 and codes.ndim == 2
    return codes.float() * (
        scales[:, None] if rows else scales.reshape(-1, *[1] * (codes.ndim - 1))
    )


def write(folder: Path, config: PretrainedConfig, algorithm: str, *kept: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = sample(*parameter.shape).to(torch.bfloat16)
    mtq.quantize(
        model,
        getattr(mtq, algorithm),
        lambda model: model(torch.arange(8, dtype=torch.int64)[None]),
    )
    with tempfile.TemporaryDirectory() as exported:
        export_hf_checkpoint(model, export_dir=exported)
        tensors = load_file(Path(exported) / "model.safetensors")
        settings = json.loads((Path(exported) / "config.json").read_text())["quantization_config"]
        beside = (Path(exported) / "hf_quant_config.json").read_text()
    stored, weights = {}, {}
    for name, tensor in tensors.items():
        if any(part in name for part in kept):
            stored[name] = tensor
            scales = tensors.get(f"{name}_scale", tensors.get(f"{name}_weight_scale"))
            second = tensors.get(f"{name}_scale_2", tensors.get(f"{name}_weight_scale_2"))
            if scales is not None:
                weights[name] = dequantise(tensor, scales, second).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    save_file(weights, folder / "expected.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}) + "\n")
    (folder / "hf_quant_config.json").write_text(json.dumps(json.loads(beside)) + "\n")


if __name__ == "__main__":
    data = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data"
    write(data / "modelopt_fp8", DENSE, "FP8_DEFAULT_CFG", "k_proj", "q_proj")
    write(data / "modelopt_rows", DENSE, "FP8_PER_CHANNEL_PER_TOKEN_CFG", "k_proj", "q_proj")
    write(data / "modelopt_mxfp8", DENSE, "MXFP8_DEFAULT_CFG", "k_proj", "down_proj")
    write(data / "modelopt_nvfp4", DENSE, "NVFP4_DEFAULT_CFG", "k_proj", "down_proj")
    write(data / "modelopt_mxfp4", DENSE, "MXFP4_DEFAULT_CFG", "k_proj", "down_proj")
    write(data / "modelopt_stacks", EXPERTS, "NVFP4_DEFAULT_CFG", "experts.down")
    write(data / "modelopt_stacks_fp8", EXPERTS, "FP8_PER_CHANNEL_PER_TOKEN_CFG", "experts.down")
