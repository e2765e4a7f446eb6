"""The methods that the paper compares: Adam with a strength of its own for every weight.

They share names with those of `methods` where they are the same, and differ in that no strength is
meant for all weights. κ is watched while they train.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import wellcond as wc
from wellcond_experiments.methods import Training

BATCH = 32
EVERY = 10  # steps between two lazy proximal ones


class Look(NamedTuple):
    """How a method is drawn."""

    colour: str
    marker: str
    line: str


LOOKS = {
    "none": Look("#7f7f7f", "s", "-"),
    "tikhonov": Look("#d98c1f", "^", "-"),
    "condition-gradient": Look("#1f6fb4", "o", "-"),
    "condition": Look("#2a9d6f", "D", "--"),
}
REGULARISED = tuple(LOOKS)[1:]


class PaperTraining(Training):
    """Adam with one of the methods.

    Args:
        build: makes the network.
        method: one of `LOOKS`.
        by_weight: names of weights, with the strength of the penalty on each.
        lr: learning rate.
        seed: of the initial weights, and of the order of the images.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        method: str,
        by_weight: dict[str, float],
        lr: float,
        seed: int,
    ) -> None:
        self.method, self.by_weight = method, by_weight
        super().__init__(lambda normed: build(), math.nan, lr, seed)

    def attach(self) -> None:
        if self.method == "none":
            return
        penalty = wc.TikhonovPenalty if self.method == "tikhonov" else wc.ConditionPenalty
        rules: dict[str, Any] = {name: penalty(s) for name, s in self.by_weight.items()}
        self.reg = wc.Regularizer(self.model, {**rules, "*": None})
        if self.method == "condition":
            self.reg.attach(self.optimizer, every=EVERY)

    def before_step(self) -> None:
        if self.method in ("tikhonov", "condition-gradient"):
            self.reg.add_gradients()

    def learn(
        self, loss: Callable[[Tensor], Tensor], samples: int, epochs: int, looks: int
    ) -> Iterator[float]:
        """Trains, and comes back at the start, `looks` times an epoch and at the end.

        From where the loss is no longer finite, the weights stay: what follows would only be NaN.

        Args:
            loss: of the images with these indices.
            samples: how many images there are.
            epochs: how often each is seen.
            looks: into how many parts an epoch is cut.

        Yields:
            The epochs so far.
        """
        order = torch.Generator().manual_seed(self.seed)
        finite = True
        for epoch in range(epochs):
            batches = torch.split(torch.randperm(samples, generator=order), BATCH)
            stops = {part * len(batches) // looks: part / looks for part in range(looks)}
            for index, indices in enumerate(batches):
                if index in stops:
                    yield epoch + stops[index]
                finite = finite and self.step(loss(indices))
        yield float(epochs)
