"""Writes tests/files/data/lightning: files of Lightning's ModelParallelStrategy.

    python tests/files/write_lightning.py [FOLDER]      # lightning 2.6.6, torch 2.13.0, safetensors

`data/lightning.safetensors` contains the weights, which torch gathers from the processes.
"""

import os
import sys
import warnings
from pathlib import Path

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

DATA = Path(__file__).with_name("data")


class Net(lightning.LightningModule):
    """Weights with three rows, two in one process and one in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 3, bias=False)
        self.second = nn.Linear(3, 2, bias=False).requires_grad_(False)

    def configure_model(self) -> None:
        """Shards the weights."""
        for layer in (self.first, self.second, self):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        """Returns an arbitrary loss."""
        return self.second(self.first(batch)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns an optimizer with a state."""
        return Momentum(self.first.parameters(), {"lr": 0.1})

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Returns random inputs."""
        return DataLoader(torch.randn(8, 5), batch_size=2)


class Momentum(torch.optim.Optimizer):
    """An optimizer with few settings, each of which needs 1 kB in the file."""

    @torch.no_grad()
    def step(self, closure: object = None) -> Tensor:
        """Runs one step of SGD with momentum."""
        loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(0.9).add_(p.grad)
                p.add_(buffer, alpha=-group["lr"])
        return loss


def write(folder: Path) -> None:
    """Trains for two steps and saves."""
    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    net = Net()
    trainer.fit(net)
    trainer.save_checkpoint(folder / "lightning")
    full = {f"state_dict.{name}": part.full_tensor() for name, part in net.state_dict().items()}
    if trainer.global_rank == 0:
        save_file(full, folder / "lightning.safetensors")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    target = Path(sys.argv[1] if len(sys.argv) > 1 else DATA).absolute()
    sys.argv[:] = [
        str(Path(__file__).absolute()),
        str(target),
    ]  # for the other process, which this process starts
    target.mkdir(exist_ok=True)
    os.chdir(target)  # the saved files contain this path
    write(Path())
