#!/usr/bin/env bash
# peft 0.21.2 saves the shared random bases of a RandLoRA adapter once per layer.
#
# All layers share two random bases, which `save_projection=True` (the default) stores as
# `base_model.randlora_A` and `base_model.randlora_B`. In addition, save_pretrained writes both with
# equal values under the name of every adapted layer, so the file grows by two bases per layer. This
# script uses 8 layers of 64 x 64.
#
# Seen with torch 2.13.0:
#     8 layers: 9 copies of randlora_A, 9 of randlora_B, all equal: True
#     trained parameters: 8,704, 18 % of what is stored
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 \
    transformers==5.24.0 peft==0.21.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import peft
import torch
from safetensors.torch import load_file

torch.manual_seed(0)
layers = 8
model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(layers)])
config = peft.RandLoraConfig(r=4, target_modules=[str(i) for i in range(layers)])
adapted = peft.get_peft_model(model, config)
trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
adapted.save_pretrained("adapter")
tensors = load_file("adapter/adapter_model.safetensors")
copies = {
    base: [t for name, t in tensors.items() if name.endswith(base)]
    for base in ("randlora_A", "randlora_B")
}
equal = all(torch.equal(one, some[0]) for some in copies.values() for one in some)
counts = [len(some) for some in copies.values()]
print(
    f"{layers} layers: {counts[0]} copies of randlora_A, {counts[1]} of randlora_B, "
    f"all equal: {equal}"
)
share = trained / sum(t.numel() for t in tensors.values())
print(f"trained parameters: {trained:,}, {100 * share:.0f} % of what is stored")
raise SystemExit(0 if counts == [layers + 1, layers + 1] and equal else 1)
PYTHON
