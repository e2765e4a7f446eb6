#!/usr/bin/env bash
# torch 2.13.0: consolidated safetensors contain 0 in place of every 0-d tensor.
#
# HuggingFaceStorageWriter with save_distributed=True and enable_consolidation=True writes the
# shards of all processes to `sharded/`, and then complete tensors next to that folder. A tensor of
# shape (), such as the scale of a layer or a count of batches, is right in the shard and 0 in the
# consolidated file.
#
# Seen with safetensors 0.8.0, one process:
#     scale, sharded: 2.5; consolidated: 0.0
#     weight, sharded and consolidated: equal
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

state = {"scale": torch.tensor(2.5), "weight": torch.ones(3, 2)}
writer = dcp.HuggingFaceStorageWriter("out", save_distributed=True, enable_consolidation=True)
dcp.save(state, storage_writer=writer)
(part,), (whole,) = (list(Path(one).glob("*.safetensors")) for one in ("out/sharded", "out"))
part, whole = load_file(part), load_file(whole)
print(f"scale, sharded: {part['scale'].item()}; consolidated: {whole['scale'].item()}")
equal = torch.equal(part["weight"], whole["weight"])
print("weight, sharded and consolidated:", "equal" if equal else "different")
raise SystemExit(0 if (part["scale"], whole["scale"], equal) == (2.5, 0.0, True) else 1)
PYTHON
