"""The methods that the paper compares: Adam, with a separate penalty strength per weight.

Methods that are the same as in `methods` have the same names, but here each weight has its own
strength. κ is measured during training.
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
EVERY = 10  # steps between two proximal steps


class Look(NamedTuple):
    """The colour, marker and line of a method."""

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
        by_weight: the strength of the penalty by name of the weight.
        lr: learning rate.
        seed: seed of the initial weights and of the order of the images.
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
        """Trains, and yields at the start, `looks` times per epoch, and at the end.

        At a non-finite loss the updates stop, because all later weights would be nan.

        Args:
            loss: returns the loss of the images with these indices.
            samples: number of images.
            epochs: number of epochs.
            looks: number of yields per epoch.

        Yields:
            The number of epochs trained.
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
