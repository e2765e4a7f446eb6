#!/usr/bin/env bash
# transformers 5.24.0 does not load 4-bit weights with zero points that compressed-tensors packs.
#
# `pack-quantized` with `symmetric: false` also packs zero points in 32-bit words, along the rows:
# 8 x 1 words for a weight of 64 x 64 with one group of inputs. transformers creates a model with
# zero points of 64 x 1 and therefore refuses the file. compressed-tensors itself unpacks them.
#
# Seen with torch 2.13.0 and compressed-tensors 0.20.1:
#     weight_zero_point in the file: torch.Size([8, 1]) of torch.int32
#     compressed-tensors reads its own weight: True
#     transformers refuses the file: True; it expects torch.Size([64, 1])
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 \
    transformers==5.24.0 accelerate==1.15.0 compressed-tensors==0.20.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=64,
)
model = LlamaForCausalLM(config)
args = QuantizationArgs(num_bits=4, strategy="group", group_size=64, symmetric=False)
scheme = QuantizationScheme(targets=["Linear"], weights=args)
apply_quantization_config(
    model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
)
layer = model.model.layers[0].mlp.up_proj
for module in model.modules():
    if getattr(module, "quantization_scheme", None) is not None:
        module.weight_scale.data.fill_(0.01)
        module.weight_zero_point.data.fill_(2)
codes = (layer.weight / 0.01).round() + 2
expected = (codes.clamp(-8, 7) - 2) * 0.01
compressor = ModelCompressor.from_pretrained_model(model)
compressor.compress_model(model)
model.save_pretrained("model")
compressor.update_config("model")
name = "model.layers.0.mlp.up_proj.weight_zero_point"
stored = load_file("model/model.safetensors")[name]
print(f"weight_zero_point in the file: {stored.shape} of {stored.dtype}")
compressor.decompress_model(model)
same = torch.allclose(layer.weight, expected)
print(f"compressed-tensors reads its own weight: {same}")
refused = False
try:
    AutoModelForCausalLM.from_pretrained("model")
except RuntimeError:
    refused = True
_, info = AutoModelForCausalLM.from_pretrained(
    "model", ignore_mismatched_sizes=True, output_loading_info=True
)
shapes = {key: (stored, made) for key, stored, made in info["mismatched_keys"]}
print(f"transformers refuses the file: {refused}; it expects {shapes.get(name, (0, 0))[1]}")
raise SystemExit(0 if same and refused and name in shapes else 1)
PYTHON
