"""The methods that the paper compares."""

import math

import pytest
import torch
from torch import Tensor, nn

from wellcond_experiments.data import load
from wellcond_experiments.methods import condition_numbers, spectral_norms
from wellcond_experiments.paper import LOOKS, REGULARISED, PaperTraining

FIRST = "0.weight"


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 64), nn.Sigmoid())


def trained(method: str, strength: float, seed: int = 0, epochs: int = 2) -> PaperTraining:
    """Trains an autoencoder on digits."""
    x = load("digits").x_train[:192]
    training = PaperTraining(build, method, {FIRST: strength}, 5e-3, seed)

    def loss(indices: Tensor) -> Tensor:
        return nn.functional.mse_loss(training.model(x[indices]), x[indices])

    for _ in training.learn(loss, len(x), epochs, looks=1):
        pass
    return training


def weights(training: PaperTraining) -> Tensor:
    return torch.cat([p.detach().flatten() for p in training.model.parameters()])


@pytest.mark.parametrize("method", LOOKS)
def test_the_same_seed_gives_the_same_network(method: str) -> None:
    before = torch.get_rng_state()
    first, second = (weights(trained(method, 0.1, seed=3)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(weights(trained(method, 0.1, seed=4)), first)


@pytest.mark.parametrize("method", REGULARISED)
def test_strength_zero_equals_no_regulariser(method: str) -> None:
    # A proximal step of length 0 multiplies by 1; adding 0 to a gradient changes nothing.
    expected = weights(trained("none", 0.0))
    torch.testing.assert_close(weights(trained(method, 0.0)), expected)


@pytest.mark.parametrize(
    ("method", "strength"), [("condition-gradient", 1.0), ("condition", 100.0)]
)
def test_the_condition_penalty_lowers_the_condition_number(method: str, strength: float) -> None:
    none, kept = (trained(m, s, epochs=6) for m, s in (("none", 0.0), (method, strength)))
    kappa, free = (condition_numbers(training.model) for training in (kept, none))
    assert kappa["0"] < 0.7 * free["0"]
    # A weight without penalty is not affected.
    assert kappa["2"] > 0.7 * free["2"]


def test_tikhonov_lowers_the_spectral_norm() -> None:
    kept, free = (trained(m, s, epochs=6) for m, s in (("tikhonov", 0.1), ("none", 0.0)))
    assert spectral_norms(kept.model)["0"] < 0.7 * spectral_norms(free.model)["0"]


@pytest.mark.parametrize("method", LOOKS)
def test_diverged_training_ends_with_nan_without_error(method: str) -> None:
    x = load("digits").x_train[:192]
    training = PaperTraining(
        lambda: nn.Sequential(nn.Linear(64, 4)), method, {FIRST: 0.01}, lr=1e10, seed=0
    )

    def loss(indices: Tensor) -> Tensor:
        return -training.model(x[indices]).square().mean() * 1e30

    looked = list(training.learn(loss, len(x), epochs=400, looks=1))
    assert not loss(torch.arange(192)).isfinite()
    # The same number of measurements as without divergence, so that seeds can be averaged.
    assert looked == [float(epoch) for epoch in range(401)]
    with torch.no_grad():
        training.model.get_parameter(FIRST).fill_(math.nan)
    assert math.isnan(condition_numbers(training.model)["0"])
    assert math.isnan(spectral_norms(training.model)["0"])


def test_every_image_is_seen_once_per_epoch() -> None:
    training = PaperTraining(build, "none", {}, 1e-3, seed=0)
    seen: list[Tensor] = []
    at = {}

    def loss(indices: Tensor) -> Tensor:
        seen.append(indices)
        return training.model(torch.zeros(1, 64)).sum()

    for epochs in training.learn(loss, 128, epochs=2, looks=4):
        at[epochs] = sum(map(len, seen))
    assert at == {k / 4: 32 * k for k in range(9)}
    for epoch in (seen[:4], seen[4:]):
        assert torch.equal(torch.cat(epoch).sort().values, torch.arange(128))
    assert not torch.equal(torch.cat(seen[:4]), torch.cat(seen[4:]))
