#!/usr/bin/env bash
# diffusers 0.42.1: a LoRA that is converted to the layout of kohya's scripts loses its scale.
#
# That layout stores an `alpha` per layer, and every reader multiplies by alpha/rank.
# `convert_state_dict_to_kohya` takes a state dict of PEFT, which does not contain lora_alpha, and
# stores the rank as alpha. The converted adapter is therefore always applied at scale 1. With rank
# 4 and lora_alpha 16, that is a quarter of its strength. There is no warning.
#
# Seen with peft 0.21.2 and torch 2.13.0:
#     trained at scale 4.0; the converted file says alpha 4 (torch.int64), scale 1.0
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0 \
    transformers==5.24.0 peft==0.21.2 diffusers==0.42.1
"$folder/venv/bin/python" - <<'PYTHON'
import peft
import torch
from diffusers.utils import convert_state_dict_to_kohya
from peft.utils import get_peft_model_state_dict

torch.manual_seed(0)
rank, alpha = 4, 16
model = torch.nn.ModuleDict({"to_q": torch.nn.Linear(32, 48)})
model.forward = model["to_q"].forward
adapted = peft.get_peft_model(
    model, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["to_q"])
)
converted = convert_state_dict_to_kohya(get_peft_model_state_dict(adapted))
(found,) = [tensor for name, tensor in converted.items() if name.endswith(".alpha")]
print(
    f"trained at scale {alpha / rank}; the converted file says alpha {found.item()} "
    f"({found.dtype}), scale {found.item() / rank}"
)
raise SystemExit(0 if found.item() == rank else 1)
PYTHON
