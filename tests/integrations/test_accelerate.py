"""The Regularizer in a training loop of accelerate, as in docs/accelerate.md.

The tests run accelerate itself on small images on the CPU.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import (
    BATCH,
    BLOCK,
    EVERY,
    PENALTIES,
    assert_same,
    images,
    net,
    optimizer_of,
    scheduler_of,
    train_by_hand,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import wellcond as wc

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from accelerate.state import AcceleratorState, GradientState  # noqa: E402

WAYS = ["proximal", "gradients"]


@pytest.fixture(autouse=True)
def _no_state_of_another_test() -> Iterator[None]:
    """Resets the singletons of accelerate, which refuse another precision in the same process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


class Loop:
    """The training loop of docs/accelerate.md."""

    def __init__(
        self, way: str, accumulate: int = 1, bf16: bool = False, every: int = EVERY, count: int = 96
    ) -> None:
        self.mode = way
        self.accelerator = accelerate.Accelerator(
            cpu=True,
            gradient_accumulation_steps=accumulate,
            mixed_precision="bf16" if bf16 else "no",
        )
        model = net()
        # Before prepare, so that the names have no prefix of a wrapper.
        self.reg = wc.Regularizer(model, PENALTIES[way], block_size=BLOCK)
        optimizer = optimizer_of(model)
        loader = DataLoader(TensorDataset(*images(count)), BATCH)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            model, optimizer, scheduler_of(optimizer), loader
        )
        if way == "proximal":
            self.reg.attach(self.optimizer.optimizer, every=every)
        self.accelerator.register_for_checkpointing(self.reg)

    def run(self, epochs: int, clip: float = 0.0, penalty_is_clipped: bool = False) -> None:
        accelerator = self.accelerator
        for _ in range(epochs):
            for x, y in self.loader:
                with accelerator.accumulate(self.model):
                    loss = nn.functional.cross_entropy(self.model(x), y)
                    accelerator.backward(loss)
                    on_gradients = self.mode == "gradients" and accelerator.sync_gradients
                    if on_gradients and penalty_is_clipped:
                        self.reg.add_gradients()
                    if accelerator.sync_gradients and clip:
                        accelerator.clip_grad_norm_(self.model.parameters(), clip)
                    if on_gradients and not penalty_is_clipped:
                        self.reg.add_gradients()
                    self.optimizer.step()
                    self.scheduler.step()
                    self.optimizer.zero_grad()


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("clip", "penalty_is_clipped"),
    [(0.0, False), (0.2, True), (0.2, False)],
    ids=["unclipped", "clipped with it", "clipped before it"],
)
@pytest.mark.parametrize("accumulate", [1, 2, 3, 4])  # with 4 of 6 batches the last cycle is short
@pytest.mark.parametrize("way", WAYS)
def test_accelerate_loop_equals_plain_loop(
    way: str, accumulate: int, clip: float, penalty_is_clipped: bool, bf16: bool
) -> None:
    loop = Loop(way, accumulate, bf16, count=48)
    loop.run(2, clip, penalty_is_clipped)
    expected = net()
    reg = train_by_hand(
        expected,
        way,
        count=48,
        accumulate=accumulate,
        clip=clip,
        penalty_is_clipped=penalty_is_clipped,
        bf16=bf16,
    )
    assert_same(loop.model.state_dict(), expected.state_dict())
    assert_same(loop.reg.state_dict(), reg.state_dict())


@pytest.mark.parametrize("way", WAYS)
def test_training_resumes_bit_for_bit(tmp_path: Path, way: str) -> None:
    """Twelve batches in cycles of two give six steps. With every=4, two of them are pending."""
    whole = Loop(way, accumulate=2, every=4)
    whole.run(1, clip=0.2)
    whole.accelerator.save_state(str(tmp_path))
    whole.run(2, clip=0.2)
    resumed = Loop(way, accumulate=2, every=4)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.run(2, clip=0.2)
    assert_same(resumed.model.state_dict(), whole.model.state_dict())
    assert_same(resumed.reg.state_dict(), whole.reg.state_dict())
    assert {estimate.step for estimate in resumed.reg.measure().values()} == {18}


def test_attach_refuses_accelerated_optimizer() -> None:
    """AcceleratedOptimizer is a subclass of torch's Optimizer, but has no hooks."""
    loop = Loop("gradients")
    with pytest.raises((TypeError, ValueError), match=r"`optimizer\.optimizer`"):
        loop.reg.attach(loop.optimizer)
    assert loop.reg.attachments == []


@pytest.mark.parametrize("way", WAYS)
def test_only_weights_change(way: str) -> None:
    """Keys, modes, hooks and the global random numbers do not change."""
    loop = Loop(way)

    def seen() -> Any:
        modules = [(m.training, m._forward_hooks) for m in loop.model.modules()]
        return list(loop.model.state_dict()), modules, torch.get_rng_state().tolist()

    with torch.random.fork_rng(devices=[]):
        # The loader draws the seed of each epoch.
        torch.manual_seed(0)
        list(loop.loader)
        expected = seen()
        torch.manual_seed(0)
        loop.run(1)
        assert seen() == expected


def test_limits_hold_in_saved_weights_of_schedulefree_and_training_resumes(tmp_path: Path) -> None:
    schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed")

    class Limited(Loop):
        def __init__(self) -> None:
            self.mode = "proximal"
            self.accelerator = accelerate.Accelerator(cpu=True)
            model = net()
            self.reg = wc.Regularizer(model, wc.ConditionLimit(3.0))
            optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2)
            loader = DataLoader(TensorDataset(*images(96)), BATCH)
            self.scheduler = scheduler_of(torch.optim.SGD([torch.zeros(1)], 0.1))
            prepared = self.accelerator.prepare(model, optimizer, loader)
            self.model, self.optimizer, self.loader = prepared
            self.reg.attach(self.optimizer.optimizer)
            self.accelerator.register_for_checkpointing(self.reg)

        def epoch(self) -> dict[str, torch.Tensor]:
            self.optimizer.train()
            self.run(1)
            self.optimizer.eval()
            self.reg.enforce()
            state = self.accelerator.unwrap_model(self.model).state_dict()
            weights = [weight for weight in state.values() if weight.ndim == 2]
            assert max(float(wc.condition_number(weight)) for weight in weights) <= 3.0
            return {name: value.clone() for name, value in state.items()}

    loop = Limited()
    loop.epoch()
    loop.accelerator.save_state(str(tmp_path / "one"))
    whole = loop.epoch()
    resumed = Limited()
    resumed.accelerator.load_state(str(tmp_path / "one"))
    assert_same(whole, resumed.epoch())
