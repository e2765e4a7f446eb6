"""Training a small network under one of the methods, seeded so that nothing else differs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import wellcond as wc

Batch = Callable[[Tensor, torch.Generator], Tensor]


class Recipe(NamedTuple):
    """How to train: everything but the method."""

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Tensor, torch.Generator], Tensor]  # of model, indices, noise source
    samples: int
    epochs: int
    lr: float
    batch: int = 32
    every: int = 10


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """The model with the initial weights of that seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def penalty(method: str, strength: float) -> wc.Condition | wc.Tikhonov:
    return wc.Tikhonov(strength) if method == "tikhonov" else wc.Condition(strength)


def train(
    recipe: Recipe,
    method: str,
    strengths: dict[str, float],
    seed: int,
    after_epoch: Callable[[nn.Module, int], None] | None = None,
) -> nn.Module:
    """Trains with Adam; `strengths` maps parameter names to the strength of the penalty.

    Stops where the loss is no longer finite: what follows would only be NaN.
    """
    model = seeded(recipe.build, seed)
    optimizer = torch.optim.Adam(model.parameters(), recipe.lr)
    reg = None
    if method != "none":
        patterns = {name: penalty(method, strength) for name, strength in strengths.items()}
        reg = wc.Regularizer(model, {**patterns, "*": None})
        if method == "condition-proximal":
            reg.attach(optimizer, every=recipe.every)
    in_loss = reg is not None and method != "condition-proximal"
    order = torch.Generator().manual_seed(seed)
    noise = torch.Generator().manual_seed(seed + 1_000_000)
    for epoch in range(recipe.epochs):
        for indices in torch.split(torch.randperm(recipe.samples, generator=order), recipe.batch):
            loss = recipe.loss(model, indices, noise)
            if not loss.isfinite():
                return model
            if reg is not None and in_loss:
                loss = loss + reg()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        if after_epoch is not None:
            after_epoch(model, epoch)
    return model


def condition_number(S: Tensor) -> float:
    """kappa by a float64 SVD; nan where training has diverged."""
    return float(wc.condition_number(S)) if S.isfinite().all() else math.nan


def condition_numbers(model: nn.Module) -> dict[str, float]:
    """kappa of every weight matrix."""
    return {
        name: condition_number(parameter.detach())
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2
    }


def spectral_norm(S: Tensor) -> float:
    """sigma_1 by a float64 SVD; nan where training has diverged."""
    return float(torch.linalg.matrix_norm(S.double(), 2)) if S.isfinite().all() else math.nan
