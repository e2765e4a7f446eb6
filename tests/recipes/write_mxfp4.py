"""Writes small checkpoints with microscaled weights: data/gpt_oss, deepseek_v4, quark and mxfp8.

torchao (gpt-oss, DeepSeek V4), Quark and transformers (MXFP8) quantise the values, which the script
stores in the layouts of the published checkpoints. transformers dequantises them, for Quark with
Quark's code. Needs the packages in requirements.txt, and Quark only for its folder:
`python tests/recipes/write_mxfp4.py [FOLDER [NAME ...]]`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

DATA = Path(__file__).parent / "data"


def uneven(generator: torch.Generator, *shape: int) -> Tensor:
    """Entries in rows and columns of different scales."""
    *stack, m, n = shape
    rows = torch.logspace(-1.5, 1.5, m)[:, None]
    columns = torch.logspace(0.3, -0.3, n)
    return torch.randn(*stack, m, n, generator=generator) * rows * columns


def to_float4(W: Tensor) -> tuple[Tensor, Tensor]:
    """Quantises with torchao to bytes (..., m, n/2) and exponents as bytes (..., m, n/32)."""
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    scales, codes = to_mx(W.contiguous(), torch.float4_e2m1fn_x2, 32)
    shape = (*W.shape[:-1], W.shape[-1] // 32)
    return codes.view(*W.shape[:-1], -1), scales.view(torch.uint8).view(shape)


def smallest(W: Tensor) -> Tensor:
    """The same values in the narrowest dtype that represents all of them."""
    return next(
        (
            narrow
            for narrow in (W.to(torch.float8_e4m3fn), W.to(torch.float8_e5m2), W.bfloat16())
            if torch.equal(narrow.to(W.dtype), W)
        ),
        W,
    )


def write_gpt_oss(
    folder: Path, hidden: int = 32, inner: int = 64, experts: int = 2, last: int = 1
) -> None:
    """Writes a gpt-oss, with the expected weights of the last `last` experts."""
    from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config

    config = GptOssConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_local_experts=experts,
        num_experts_per_tok=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        vocab_size=4,
        layer_types=["full_attention"],
        attention_bias=False,
    )
    generator = torch.Generator().manual_seed(0)
    model = GptOssForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in ("gate_up_proj", "down_proj"):
        label = f"model.layers.0.mlp.experts.{name}"
        m, n = tensors.pop(label).mT.shape[-2:]
        codes, scales = to_float4(uneven(generator, experts, m, n))
        tensors[f"{label}_blocks"] = codes.view(experts, m, n // 32, 16)
        tensors[f"{label}_scales"] = scales
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"}
    set_in_config(folder, quantization_config=settings)
    read = GptOssForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    stacks = {name: one for name, one in read.state_dict().items() if name.endswith("_proj")}
    keep_expected(folder, {name: one[-last:] for name, one in stacks.items() if "experts" in name})


def write_deepseek_v4(
    folder: Path, hidden: int = 64, inner: int = 32, experts: int = 2, last: int = 1
) -> None:
    """Writes the experts of a DeepSeek V4, with the expected weights of the last `last` ones."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    config = DeepseekV4Config(
        hidden_size=hidden,
        moe_intermediate_size=inner,
        n_routed_experts=experts,
        num_experts_per_tok=1,
        num_hidden_layers=1,
        layer_types=["sliding_attention"],
        mlp_layer_types=["moe"],
        num_attention_heads=1,
        head_dim=4,
        qk_rope_head_dim=2,
        q_lora_rank=2,
        o_groups=1,
        o_lora_rank=2,
        hc_mult=1,
        vocab_size=4,
    )
    generator = torch.Generator().manual_seed(0)
    DeepseekV4ForCausalLM(config).bfloat16().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        codes, scales = to_float4(uneven(generator, *tensors[name].shape))
        tensors[name] = codes.view(torch.int8)
        tensors[name.replace("weight", "scale")] = scales.view(torch.float8_e8m0fnu)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    settings |= {"scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    set_in_config(folder, quantization_config=settings, expert_dtype="fp4")
    read = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layer = read.get_submodule("model.layers.0.mlp.experts")
    first, third = layer.gate_up_proj.detach().chunk(2, dim=1)
    weights = {"w1": first, "w2": layer.down_proj.detach(), "w3": third}
    stem = next(name for name in tensors if ".experts." in name).partition(".experts.")[0]
    keep_expected(
        folder,
        {
            f"{stem}.experts.{i}.{name}.weight": stack[i]
            for i in range(experts)[-last:]
            for name, stack in weights.items()
        },
    )
    kept = {name: one for name, one in tensors.items() if ".experts." in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def write_quark(folder: Path, hidden: int = 64, inner: int = 32) -> None:
    from quark.torch import ModelQuantizer, export_safetensors
    from quark.torch.quantization.config.config import OCP_MXFP4Spec, QConfig, QLayerConfig
    from transformers import AutoModelForCausalLM

    model = small_llama(hidden, inner)
    spec = OCP_MXFP4Spec(ch_axis=-1, is_dynamic=False).to_quantization_spec()
    exclude = ["lm_head", "*self_attn*"]
    quantizer = ModelQuantizer(QConfig(QLayerConfig(weight=spec), exclude=exclude))
    with torch.no_grad():
        export_safetensors(quantizer.freeze(quantizer.quantize_model(model)), str(folder))
        read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        layers = {
            name: one for name, one in read.named_modules() if "QParams" in type(one).__name__
        }
        keep_expected(
            folder,
            # Each entry of the product with the identity is one entry of the weight.
            {
                f"{name}.weight": layer(torch.eye(layer.in_features, dtype=torch.bfloat16)).mT
                for name, layer in layers.items()
            },
        )


def write_mxfp8(folder: Path, hidden: int = 64, inner: int = 32) -> None:
    from transformers import LlamaForCausalLM
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    small_llama(hidden, inner).save_pretrained(folder)
    settings = SimpleNamespace(weight_block_size=(1, 32), scale_fmt="ue8m0")
    quantize = Fp8Quantize(SimpleNamespace(quantization_config=settings))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".mlp." in name]:
        tensors |= quantize.convert({name: tensors[name].float()})
        scales = name.replace("weight", "weight_scale_inv")
        tensors[scales] = tensors[scales].view(torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    skipped = ["lm_head", "model.layers.0.self_attn"]
    set_in_config(
        folder, quantization_config={"quant_method": "mxfp8", "modules_to_not_convert": skipped}
    )
    read = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kept = ("gate_proj.weight", "down_proj.weight")  # to save bytes
    keep_expected(folder, {n: one for n, one in read.state_dict().items() if n.endswith(kept)})


def small_llama(hidden: int, inner: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        vocab_size=4,
        architectures=["LlamaForCausalLM"],
    )
    generator = torch.Generator().manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = uneven(generator, *parameter.shape).bfloat16()
    return model


def set_in_config(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings, indent=1) + "\n")


def keep_expected(folder: Path, tensors: dict[str, Tensor]) -> None:
    kept = {name: smallest(one).contiguous() for name, one in tensors.items()}
    save_file(kept, folder / "expected.safetensors")
    (folder / "generation_config.json").unlink(missing_ok=True)


WRITERS = {
    "gpt_oss": write_gpt_oss,
    "deepseek_v4": write_deepseek_v4,
    "quark": write_quark,
    "mxfp8": write_mxfp8,
}

if __name__ == "__main__":
    for name in sys.argv[2:] or WRITERS:
        target = Path(sys.argv[1] if len(sys.argv) > 1 else DATA) / name
        target.mkdir(parents=True, exist_ok=True)
        WRITERS[name](target)
        print(name, sum(path.stat().st_size for path in target.iterdir()))
