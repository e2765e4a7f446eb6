"""A network must fit new random labels in every task: can it still do so at the end?

Every task gives the same images new random labels, so earlier tasks do not help with later ones
(Lyle et al., arXiv 2303.01486; Kumar, Marklund & Van Roy, arXiv 2308.11958).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wellcond_experiments.grid import Cell
from wellcond_experiments.methods import Training
from wellcond_experiments.settings.tasks import BATCH, CHANCE, RATES, Tasks

# On the grid of the other tasks, many choices were at its edge: here the grid is wider.
SLOWEST = 1e-4
BEYOND = {
    "l2": (3e-2, 0.1),
    "orthogonal-torch": (0.5, 0.7),
    "condition": (1e4,),
    "condition-gradient": (1.0, 10.0),
    "stable-rank": (1e4,),
    "spectral-norm": (1e4,),
    "orthogonality": (1e3,),
    "isometry": (1.0,),
    "layer-norm-isometry": (1.0,),
    "condition-limit": (1.01,),
}


class Memorise(Tasks):
    name = "memorise"
    help = "a sequence of tasks with random labels: does the network still fit them?"
    short = "random labels"
    protocol = (
        "1,280 images of MNIST with new random labels in every task of 10 epochs: 784-100-100-10 "
        "with ReLU, batch 16, Adam; accuracy on these images at the end of each task."
    )
    finalists = 2
    part = 5
    words = ("random labels fitted", "last fifth")

    def __init__(self, data: str = "", quick: bool = False, seeds: int | None = None) -> None:
        super().__init__(data, quick, seeds, *((3, 2) if quick else (30, 15)))
        self.count = 160 if quick else 1280
        self.epochs = 10
        if not quick:
            self.rates = (SLOWEST, *RATES)
            self.methods |= {name: self.methods[name] + more for name, more in BEYOND.items()}

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"images": self.count, "epochs": self.epochs}

    def draw(self, cell: Cell) -> Tensor:
        """Draws the images to learn; the search draws from a sixth that is reserved for it."""
        total = len(self.images.x_train)
        held = total // 6
        source = torch.Generator().manual_seed(cell.seed)
        if cell.search:
            return total - held + torch.randperm(held, generator=source)[: self.count]
        return torch.randperm(total - held, generator=source)[: self.count]

    def material(self, cell: Cell) -> tuple[Tensor, ...]:
        return (self.images.normalise(self.images.x_train[self.draw(cell)]),)

    def learn(self, training: Training, source: torch.Generator, *material: Tensor) -> float:
        """Returns the percentage of the new labels that the network fits at the end of the task."""
        (x,) = material
        y = torch.randint(10, (len(x),), generator=source)
        training.model.train()
        for _ in range(self.epochs):
            for index in torch.split(torch.randperm(len(x), generator=source), BATCH):
                loss = nn.functional.cross_entropy(training.model(x[index]), y[index])
                if not training.step(loss):
                    return CHANCE
        training.model.eval()  # so that spectral_norm of torch does not update its vectors
        with torch.no_grad():
            return 100 * float((training.model(x).argmax(1) == y).float().mean())
