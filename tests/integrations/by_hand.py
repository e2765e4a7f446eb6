"""Trains a small net in a plain loop, as the reference for the trainers of other libraries."""

import functools
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import wellcond as wc

BATCH = 8
# Strong enough that every mode moves the weights visibly within about ten steps.
PENALTIES = {
    "proximal": {"*0.weight": wc.ConditionPenalty(20.0), "*2.weight": wc.TikhonovPenalty(5.0)},
    "gradients": {"*0.weight": wc.ConditionPenalty(0.5), "*2.weight": wc.TikhonovPenalty(0.1)},
}
RELATIVES = {
    "proximal": {"*0.weight": wc.IsometryStep(), "*2.weight": wc.OrthogonalityPenalty(5.0)},
    "gradients": {
        "*0.weight": wc.OrthogonalityPenalty(0.1),
        "*2.weight": wc.StableRankPenalty(0.1),
    },
}
EVERY, BLOCK = 3, 6


@functools.cache
def _images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (256,), generator=generator)
    means = torch.rand(10, 64, generator=generator)
    return (means[labels] + torch.rand(256, 64, generator=generator)) / 2, labels


def images(count: int) -> tuple[Tensor, Tensor]:
    """Noisy copies of ten pictures of 64 pixels, and the index of the picture of each."""
    x, y = _images()
    return x[:count], y[:count]


def net() -> nn.Sequential:
    """Returns the same weights in every call and does not change the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-2)


def scheduler_of(optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Changes the learning rate in every step, so that counting the wrong steps is noticed."""
    return LambdaLR(optimizer, lambda step: 1 / (1 + 0.3 * step))


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor, bf16: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = nn.functional.cross_entropy(model(x), y)
    return loss


def cycles(x: Tensor, y: Tensor, accumulate: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The batches of an epoch in accumulation cycles. The last cycle can be shorter."""
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
    for start in range(0, len(batches), accumulate):
        yield batches[start : start + accumulate]


def train_by_hand(
    model: nn.Module,
    way: str | None,
    *,
    count: int = 96,
    epochs: int = 2,
    accumulate: int = 1,
    short_cycle_is_a_mean: bool = False,
    clip: float = 0.0,
    penalty_is_clipped: bool = False,
    bf16: bool = False,
    named: nn.Module | None = None,
) -> wc.Regularizer | None:
    """Trains in a plain loop with the Regularizer as in the README; without it if `way` is None.

    `named` is the module that gives the names of the weights, by default the model.
    """
    optimizer = optimizer_of(model)
    scheduler = scheduler_of(optimizer)
    reg = None if way is None else wc.Regularizer(named or model, PENALTIES[way], block_size=BLOCK)
    if reg is not None and way == "proximal":
        reg.attach(optimizer, every=EVERY)
    x, y = images(count)
    for _ in range(epochs):
        for cycle in cycles(x, y, accumulate):
            share = len(cycle) if short_cycle_is_a_mean else accumulate
            optimizer.zero_grad()
            for batch in cycle:
                (cross_entropy(model, *batch, bf16) / share).backward()
            if reg is not None and way == "gradients" and penalty_is_clipped:
                reg.add_gradients()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            if reg is not None and way == "gradients" and not penalty_is_clipped:
                reg.add_gradients()
            optimizer.step()
            scheduler.step()
    return reg


def assert_same(actual: object, expected: object) -> None:
    """Compares nested mappings of tensors bit for bit."""
    if isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        return
    assert isinstance(expected, Mapping)
    assert isinstance(actual, Mapping)
    assert list(actual) == list(expected)
    for key in expected:
        assert_same(actual[key], expected[key])


def train_in_two_processes(library: str, path: Path) -> str:
    """Returns what `two_processes.py` writes. A failed assertion in one process ends both."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(Path(__file__).with_name("two_processes.py"))
    done = subprocess.run(
        [sys.executable, *launch, script, library, str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr
