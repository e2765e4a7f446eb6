"""The measurement after 10 % of a training: its values, its time, and no effect on training."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from wellcond_experiments.early import QUANTITIES, EarlyLook
from wellcond_experiments.methods import METHODS, Training, run_seeded


def build(norm: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def train(method: str, steps: int, look: EarlyLook | None, training: Training) -> list[float]:
    source = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 6, generator=source)
        loss = mse_loss(training.model(x), x[:, :3])
        if look:
            look(loss)
        losses.append(float(loss.detach()))
        training.step(loss)
    return losses


def spectra(model: nn.Module) -> list[Tensor]:
    weights = [model.get_submodule(name).weight for name in "02"]
    return [torch.linalg.svdvals(W.detach().double()) for W in weights]


def test_measures_after_ten_per_cent() -> None:
    training = METHODS["none"](build, 0.0, 0.1, seed=3)
    before = spectra(training.model)
    look = EarlyLook(training.model, steps=60)
    losses = train("none", 5, look, training)  # the measurement is before the sixth step
    assert all(math.isnan(value) for value in look.metrics.values())
    after = spectra(training.model)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(9))
    loss = mse_loss(training.model(x), x[:, :3])
    look(loss)
    training.optimizer.zero_grad()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in training.model.parameters()]).norm()
    ranks = [[float((s**2).sum() / s[0] ** 2) / len(s) for s in both] for both in (before, after)]
    assert look.metrics == pytest.approx(
        {
            "early_kappa": max(float(s[0] / s[-1]) for s in after),
            "early_kappa_growth": max(
                float(a[0] / a[-1] / (b[0] / b[-1])) for a, b in zip(after, before, strict=True)
            ),
            "early_sigma": max(float(s[0]) for s in after),
            "early_sigma_growth": max(
                float(a[0] / b[0]) for a, b in zip(after, before, strict=True)
            ),
            "early_stable_rank": min(ranks[1]),
            "early_stable_rank_fall": max(b / a for b, a in zip(*ranks, strict=True)),
            "early_gradient": float(norm),
            "early_loss": (sum(losses) + float(loss.detach())) / 6,
        }
    )
    assert set(look.metrics) == set(QUANTITIES)


@pytest.mark.parametrize("method", ["none", "spectral-norm-torch", "upper-limit"])
def test_measurement_does_not_change_the_training(method: str) -> None:
    losses = []
    for looks in (False, True):
        training = METHODS[method](build, 1.0, 0.1, seed=3)
        look = EarlyLook(training.model, steps=20) if looks else None
        losses.append(train(method, 8, look, training))
    assert losses[0] == losses[1]


def test_diverged_weights_give_nan() -> None:
    model = run_seeded(lambda: build(False), 0)
    look = EarlyLook(model, steps=1)
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    look(model(torch.ones(1, 6)).sum())
    assert math.isnan(look.metrics["early_sigma"])
    assert math.isnan(look.metrics["early_kappa"])
