"""A training step under a penalty reads no number from the device; see `readback.py`."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import wellcond as wc
from readback import ReadBackError, accelerator

Backward = Callable[[Tensor], None]
PENALTIES = {
    "condition": wc.ConditionPenalty(0.1),
    "tikhonov": wc.TikhonovPenalty(0.1),
    "stable rank": wc.StableRankPenalty(0.1),
    "spectral norm": wc.SpectralNormPenalty(0.1),
    "orthogonality": wc.OrthogonalityPenalty(0.1),
}
STEPS = 4


def in_the_loss(model: nn.Module, penalty: wc.Penalty, optimizer: Optimizer) -> Backward:
    reg = wc.Regularizer(model, penalty)
    return lambda loss: (loss + reg()).backward()


def as_gradients(model: nn.Module, penalty: wc.Penalty, optimizer: Optimizer) -> Backward:
    reg = wc.Regularizer(model, penalty)

    def backward(loss: Tensor) -> None:
        loss.backward()
        reg.add_gradients()

    return backward


def attached(model: nn.Module, penalty: wc.Penalty, optimizer: Optimizer) -> Backward:
    wc.Regularizer(model, penalty).attach(optimizer, every=2)
    return Tensor.backward


def cases() -> Iterator[Any]:
    for method in (in_the_loss, as_gradients, attached):
        for name, penalty in PENALTIES.items():
            # Allowed: one flag per step says whether a singular value has to be clipped.
            reads = method is attached and isinstance(penalty, wc.OrthogonalityPenalty)
            marks = [pytest.mark.xfail(raises=ValueError, strict=True)] if reads else []
            yield pytest.param(method, penalty, id=f"{method.__name__}-{name}", marks=marks)


@pytest.mark.parametrize(("method", "penalty"), [*cases()])
def test_step_reads_no_number_from_the_device(
    method: Callable[..., Backward], penalty: wc.Penalty
) -> None:
    with accelerator() as device:
        model = nn.Sequential(
            nn.Linear(8, 16, device=device), nn.Tanh(), nn.Linear(16, 4, device=device)
        )
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        backward = method(model, penalty, optimizer)
        for _ in range(STEPS):
            optimizer.zero_grad()
            backward(model(torch.zeros(5, 8, device=device)).square().mean())
            optimizer.step()
    if method is attached:  # initialised, each step of the optimizer, some proximal steps
        assert model[0].weight._version > 1 + STEPS


READS: dict[str, Callable[[Tensor], object]] = {
    "item": Tensor.item,
    "bool": bool,
    "int": int,
    "float": float,
    "tolist": Tensor.tolist,
    "cpu": Tensor.cpu,
    "to": lambda x: x.to("cpu"),
    "copy_": lambda x: torch.zeros(()).copy_(x),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": torch.nonzero,
    "mask": lambda x: x.reshape(1)[x.reshape(1) > 0],
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_readback_is_detected(read: Callable[[Tensor], object]) -> None:
    with accelerator() as device:
        x = torch.zeros((), device=device)
        x.to("cpu", non_blocking=True)
        # `tolist` finds no data before any operation of torch is recorded.
        with pytest.raises((ReadBackError, RuntimeError)):
            read(x)
