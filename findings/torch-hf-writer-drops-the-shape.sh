#!/usr/bin/env bash
# torch 2.13.0: a shard of HuggingFaceStorageWriter cannot be distinguished from a complete tensor.
#
# With `save_distributed=True`, each process writes a safetensors file with its shard of each tensor
# under the name of the tensor. DCP_SHARDING_INFO in the header gives the offsets of every tensor,
# including unsharded ones, but neither the full shape nor the number of files. The first half of a
# tensor therefore has the same description as a complete tensor. If the other file is missing,
# read_metadata of HuggingFaceStorageReader returns it as a complete tensor.
#
# Seen with safetensors 0.8.0, weight sharded by rows, bias not sharded:
#     weight 4x4 saved by 1 process: [4, 4] {'saved_offsets': [0, 0]}
#     weight 8x4 saved by 2 processes, first file: [4, 4] {'saved_offsets': [0, 0]}
#     both in a file of the same name: True; bias: [3] {'saved_offsets': [0]}
#     read_metadata: both files: [8, 4]; the first file alone: [4, 4]
# Exits with 1 if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def save(rank: int, processes: int, to: str) -> None:
    store = f"file://{Path.cwd()}/{to}.store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))
    whole = torch.arange(16.0 * processes).reshape(4 * processes, 4)
    state = {"weight": distribute_tensor(whole, mesh, [Shard(0)]), "bias": torch.zeros(3)}
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(to, save_distributed=True))
    dist.destroy_process_group()


def described(file: Path) -> dict[str, tuple[list[int], dict[str, list[int]]]]:
    with safe_open(file, "pt") as opened:
        info = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
        return {name: (opened.get_slice(name).get_shape(), info[name]) for name in opened.keys()}


def size_read(folder: str) -> list[int]:
    metadata = dcp.HuggingFaceStorageReader(folder).read_metadata()
    return list(metadata.state_dict_metadata["weight"].size)


for processes, to in ((1, "one"), (2, "two")):
    torch.multiprocessing.start_processes(
        save, args=(processes, to), nprocs=processes, start_method="fork"
    )
(one,), (first, second) = (sorted(Path(to).glob("*.safetensors")) for to in ("one", "two"))
whole, half = described(one), described(first)
print("weight 4x4 saved by 1 process:", *whole["weight"])
print("weight 8x4 saved by 2 processes, first file:", *half["weight"])
print(f"both in a file of the same name: {one.name == first.name};", "bias:", *whole["bias"])
both = size_read("two")
second.unlink()
alone = size_read("two")
print(f"read_metadata: both files: {both}; the first file alone: {alone}")
same = whole["weight"] == half["weight"] and one.name == first.name
raise SystemExit(0 if same and (both, alone) == ([8, 4], [4, 4]) else 1)
PYTHON
