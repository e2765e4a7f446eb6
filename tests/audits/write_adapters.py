"""Writes data/adapters: adapters of each kind saved by PEFT, their bases and their changes.

    python tests/audits/write_adapters.py [folder]

Requires PEFT 0.21.2, and runs on a CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import nn


class Net(nn.Module):
    """A wide, a tall and a square layer, and a convolution."""

    def __init__(self, conv: bool) -> None:
        super().__init__()
        self.wide = nn.Linear(12, 8, bias=False)
        self.tall = nn.Linear(8, 12, bias=False)
        self.even = nn.Linear(8, 8, bias=False)
        if conv:
            self.conv = nn.Conv2d(4, 6, 3, bias=False)


LINEAR = ["wide", "tall", "even"]
# The name, the configuration, and whether it adapts convolutions.
KINDS: dict[str, tuple[Any, bool]] = {
    "loha": (peft.LoHaConfig(r=2, alpha=6, target_modules=[*LINEAR, "conv"]), True),
    "loha_core": (
        peft.LoHaConfig(r=2, alpha=3, target_modules=[*LINEAR, "conv"], use_effective_conv2d=True),
        True,
    ),
    "lokr": (
        peft.LoKrConfig(
            r=2,
            alpha=6,
            target_modules=[*LINEAR, "conv"],
            decompose_both=True,
            decompose_factor=4,
            alpha_pattern={"tall": 8},
            rank_pattern={"even": 1},
        ),
        True,
    ),
    "lokr_whole": (peft.LoKrConfig(r=32, alpha=8, target_modules=[*LINEAR, "conv"]), True),
    "lokr_core": (
        peft.LoKrConfig(r=1, alpha=2, target_modules=["conv"], use_effective_conv2d=True),
        True,
    ),
    "vera": (peft.VeraConfig(r=4, target_modules=LINEAR), False),
    "randlora": (peft.RandLoraConfig(r=3, randlora_alpha=12, target_modules=LINEAR), False),
}


def write(folder: Path) -> None:
    for kind, (config, conv) in KINDS.items():
        torch.manual_seed(0)
        net = Net(conv)
        target = folder / kind
        target.mkdir(parents=True, exist_ok=True)
        save_file(net.state_dict(), target / "base.safetensors")
        model = peft.get_peft_model(net, config)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.manual_seed(len(name))
                nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(target)
        (target / "README.md").unlink()
        merged = model.merge_and_unload()
        save_file(merged.state_dict(), target / "merged.safetensors")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "data" / "adapters")
