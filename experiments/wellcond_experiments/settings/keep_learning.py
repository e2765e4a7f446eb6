"""A network that must learn one task after another: does it still learn the last one?

Permuted MNIST, online: every task has a permutation of the pixels of its own, every image is seen
once, and counts as right if the network says so before it learns from it (Dohare et al., Nature
632, 2024, which shows that Adam alone loses the ability).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wellcond_experiments.grid import Cell
from wellcond_experiments.methods import Training
from wellcond_experiments.settings.tasks import BATCH, CHANCE, Tasks


class KeepLearning(Tasks):
    name = "keep-learning"
    help = "one task after another: does the network still learn?"
    protocol = (
        "Permuted MNIST, online: 784-100-100-10 with ReLU, batch 16, Adam, every image once; "
        "accuracy before each step."
    )
    finalists = 3
    part = 10
    words = ("accuracy at first sight", "last tenth")
    window = 5  # one task is easier than another

    def __init__(self, data: str = "", quick: bool = False, seeds: int | None = None) -> None:
        super().__init__(data, quick, seeds, *((4, 2) if quick else (80, 30)))
        self.per_task = 160 if quick else 10_000

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"images_per_task": self.per_task}

    def material(self, cell: Cell) -> tuple[Tensor, ...]:
        """Images and labels: in the search the last sixth of those for training, else the rest."""
        images = self.images
        held = len(images.x_train) // 6
        part = slice(-held, None) if cell.search else slice(0, -held)
        return images.normalise(images.x_train)[part], images.y_train[part]

    def learn(self, training: Training, source: torch.Generator, *material: Tensor) -> float:
        """The share of the images that were right at first sight."""
        x, y = material
        order = torch.randperm(len(x), generator=source)[: self.per_task]
        pixels = torch.randperm(x.shape[1], generator=source)
        x, y = x[order][:, pixels], y[order]
        right = torch.zeros((), dtype=torch.int64)
        for images, labels in zip(torch.split(x, BATCH), torch.split(y, BATCH), strict=True):
            logits = training.model(images)
            right += (logits.detach().argmax(1) == labels).sum()
            if not training.step(nn.functional.cross_entropy(logits, labels)):
                return CHANCE
        return 100 * float(right) / len(x)
