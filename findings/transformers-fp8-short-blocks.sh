#!/usr/bin/env bash
# transformers 5.24.0: FP8 weights with a short last block are dequantised with wrong scales.
#
# A checkpoint with quant_method "fp8" and weight_block_size [128, 128] stores a scale_inv of 2 x 2
# for a weight of 192 x 192: each side has a block of 128 and a short one of 64, as in DeepSeek V3.
# When transformers dequantises such a file (always on a CPU), it uses the block size 192/2 = 96
# instead of 128 from the config, without a warning. Rows and columns 96 to 127 get the scales of
# the next block. If the number of blocks does not divide a side, it raises a ValueError.
#
# Seen with torch 2.13.0:
#     11257 of 192 x 192 entries differ from codes * scales of blocks of 128;
#     equal to blocks of 96: True
#     all of them in rows or columns 96 to 127: True
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 \
    transformers==5.24.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
SIDE, BLOCK = 192, 128
config = LlamaConfig(
    hidden_size=SIDE,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=64,
)
LlamaForCausalLM(config).save_pretrained("model")
tensors = load_file("model/model.safetensors")
name = "model.layers.0.self_attn.o_proj.weight"
scales = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
codes = torch.randn(SIDE, SIDE).to(torch.float8_e4m3fn)
blocks = torch.arange(SIDE) // BLOCK
right = codes.float() * scales[blocks][:, blocks]
fp8 = {}
for key, tensor in tensors.items():
    if not key.endswith("_proj.weight"):
        fp8[key] = tensor
        continue
    rows, columns = (-(-side // BLOCK) for side in tensor.shape)
    fp8[key] = tensor.to(torch.float8_e4m3fn)
    fp8[f"{key}_scale_inv"] = torch.ones(rows, columns)
fp8[name], fp8[f"{name}_scale_inv"] = codes, scales
save_file(fp8, "model/model.safetensors", {"format": "pt"})
with open("model/config.json") as file:
    written = json.load(file)
written["quantization_config"] = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
with open("model/config.json", "w") as file:
    json.dump(written, file)
model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
loaded = model.model.layers[0].self_attn.o_proj.weight.detach().float()
wrong = loaded != right
at = torch.arange(SIDE) // (SIDE // 2)
as_found = codes.float() * scales[at][:, at]
print(f"{int(wrong.sum())} of {SIDE} x {SIDE} entries differ from codes * scales of blocks of {BLOCK};")
print(f"equal to blocks of {SIDE // 2}: {torch.equal(loaded, as_found)}")
between = (torch.arange(SIDE) >= SIDE // 2) & (torch.arange(SIDE) < BLOCK)
print(f"all of them in rows or columns 96 to 127: {not bool(wrong[~between][:, ~between].any())}")
raise SystemExit(0 if wrong.any() and torch.equal(loaded, as_found) else 1)
PYTHON
