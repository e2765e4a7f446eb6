"""A network learns many tasks in sequence: does it still learn the last one?

Online permuted MNIST: every task has its own permutation of the pixels. The network sees every
image once, and its prediction before the update counts (Dohare et al., Nature 632, 2024, show that
plain Adam loses the ability to learn).
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
    help = "a sequence of tasks: does the network still learn?"
    short = "permuted MNIST"
    protocol = (
        "Permuted MNIST, online: 784-100-100-10 with ReLU, batch 16, Adam, every image once; "
        "accuracy before each step."
    )
    finalists = 3
    part = 10
    words = ("online accuracy", "last tenth")
    window = 5  # because tasks differ in difficulty

    def __init__(self, data: str = "", quick: bool = False, seeds: int | None = None) -> None:
        super().__init__(data, quick, seeds, *((4, 2) if quick else (80, 30)))
        self.per_task = 160 if quick else 10_000

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"images_per_task": self.per_task}

    def material(self, cell: Cell) -> tuple[Tensor, ...]:
        """Returns images and labels; the last sixth of the training set is for the search."""
        images = self.images
        held = len(images.x_train) // 6
        part = slice(-held, None) if cell.search else slice(0, -held)
        return images.normalise(images.x_train)[part], images.y_train[part]

    def learn(self, training: Training, source: torch.Generator, *material: Tensor) -> float:
        """Returns the percentage of images that were classified correctly before their update."""
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
