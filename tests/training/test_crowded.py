"""Ritz values show when a block is too narrow for gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wellcond as wc


def layer(sigma: Tensor) -> nn.Linear:
    n = len(sigma)
    made = nn.Linear(n, n, bias=False)
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=g)).Q for g in [_source(0), _source(1)])
    with torch.no_grad():
        made.weight.copy_(U @ torch.diag(sigma) @ V.mT)
    return made


def _source(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("way", ["add_gradients", "loss"])
@pytest.mark.parametrize(
    ("sigma", "block_size", "crowded"),
    [
        (torch.linspace(1.0, 0.9, 40), 8, True),
        (torch.linspace(1.0, 0.1, 40), 8, False),
        (torch.linspace(1.0, 0.9, 40), 40, False),  # all of the space
        (torch.zeros(40), 8, False),
    ],
)
def test_crowded_block_is_reported(way: str, sigma: Tensor, block_size: int, crowded: bool) -> None:
    reg = wc.Regularizer(layer(sigma), wc.ConditionPenalty(1.0), block_size=block_size)
    for _ in range(20):
        if way == "loss":
            reg()
        else:
            reg.add_gradients()
    assert ("are near the largest" in repr(reg)) is crowded
    assert reg.measure()["weight"].crowded is crowded
    logged: Any = reg.log(lambda values, step: None, step=0)
    assert logged.get("wellcond/crowded_blocks", 0) == crowded


def test_one_crowded_matrix_marks_the_stack() -> None:
    model = nn.Module()
    flat, steep = (layer(torch.linspace(1.0, last, 20)).weight.detach() for last in (0.95, 0.05))
    model.register_parameter("experts", nn.Parameter(torch.stack([steep, flat])))
    reg = wc.Regularizer(model, {"experts": wc.ConditionPenalty(1.0)}, block_size=4)
    for _ in range(2):
        reg.add_gradients()
    assert reg.measure()["experts:0"].crowded


def test_repr_marks_weights_outside_attached_optimizers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    reg = wc.Regularizer(model, wc.ConditionPenalty(1.0))
    assert "not in an attached optimizer" not in repr(reg)
    reg.attach(torch.optim.SGD(model[0].parameters(), 0.1))
    first, second = (line for line in repr(reg).splitlines() if ".weight" in line)
    assert "not in an attached optimizer" not in first
    assert "not in an attached optimizer" in second
