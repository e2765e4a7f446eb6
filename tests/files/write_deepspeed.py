"""Writes tests/files/data/zero2 and zero3: files of DeepSpeed in its stages 2 and 3.

    python tests/files/write_deepspeed.py STAGE [FOLDER]    # deepspeed 0.19.8, torch 2.13.0

`data/zero2.safetensors` contains the weights of the live model. The scripts that DeepSpeed copies
into each checkpoint are removed.
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
ONE_PROCESS |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512", "DS_ACCELERATOR": "cpu"}
SETTINGS = {
    "train_batch_size": 2,
    "bf16": {"enabled": True},
    "zero_allow_untested_optimizer": True,  # an optimizer of torch, which needs no compilation
}


def write(stage: int, folder: Path) -> None:
    """Trains for two steps and saves."""
    import deepspeed

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    engine, *_ = deepspeed.initialize(
        model=net,
        optimizer=torch.optim.AdamW(net.parameters(), lr=0.01),
        config=SETTINGS | {"zero_optimization": {"stage": stage}},
    )
    for _ in range(2):
        engine.backward(engine(torch.randn(2, 6).bfloat16()).square().mean())
        engine.step()
    run = folder / f"zero{stage}"
    engine.save_checkpoint(str(run))
    for script in run.glob("*.py"):
        script.unlink()
    if stage == 2:
        live = {f"module.{name}": tensor for name, tensor in engine.module.state_dict().items()}
        save_file(live, folder / "zero2.safetensors")


if __name__ == "__main__":
    os.environ |= ONE_PROCESS
    where = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_name("data")
    write(int(sys.argv[1]), where)
