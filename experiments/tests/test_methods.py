"""The training methods: each has its documented effect, and nothing else differs."""

import math
from collections import OrderedDict

import pytest
import torch
from torch import nn

from wellcond_experiments.methods import METHODS, Training, condition_numbers, spectral_norms


def build(norm: bool) -> nn.Module:
    """Builds a network with weight names by role, because some rules select by role."""
    layers = OrderedDict[str, nn.Module](q_proj=nn.Linear(12, 16))
    layers |= {"first": nn.LayerNorm(16) if norm else nn.Identity(), "relu": nn.ReLU()}
    layers |= {"up_proj": nn.Linear(16, 16)}
    layers |= {"second": nn.LayerNorm(16) if norm else nn.Identity(), "relu_again": nn.ReLU()}
    return nn.Sequential(layers | {"head": nn.Linear(16, 4)})


X = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
Y = torch.randint(4, (64,), generator=torch.Generator().manual_seed(1))


def trained(method: str, strength: float, steps: int = 30, lr: float = 1e-2) -> Training:
    training = METHODS[method](build, strength, lr, seed=3, gain=math.sqrt(2))
    for step in range(steps):
        assert training.step(nn.functional.cross_entropy(training.model(X), Y))
        if step % 10 == 9:
            training.between_tasks()
    training.finish()
    return training


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_is_reproducible(method: str) -> None:
    if method == "torchlip":
        pytest.importorskip("deel.torchlip")
    strength = METHODS[method].strengths[1 if len(METHODS[method].strengths) > 1 else 0]
    state = torch.get_rng_state()
    first, second = (trained(method, strength) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights(first.model), weights(second.model))
    start = METHODS[method](build, strength, 1e-2, seed=3, gain=math.sqrt(2))
    if method != "shrink-perturb":  # it has just lost a part of what it learned
        after, before = (nn.functional.cross_entropy(t.model(X), Y).item() for t in (first, start))
        assert after < 0.9 * before


def test_methods_share_initial_weights() -> None:
    changed = {"orthogonal-init", "spectral-norm-torch", "orthogonal-torch"}
    changed |= {"spectral-norm-all", "spectral-norm-all-sort", "torchlip"}
    changed |= {method for method in METHODS if METHODS[method].normed}
    expected = weights(METHODS["none"](build, 0.0, 1e-2, seed=3).model)
    for method in METHODS.keys() - changed:
        model = METHODS[method](build, METHODS[method].strengths[0], 1e-2, seed=3).model
        assert torch.equal(weights(model), expected), method
    other = METHODS["none"](build, 0.0, 1e-2, seed=4).model
    assert not torch.equal(weights(other), expected)


@pytest.mark.parametrize(
    "method",
    ["l2", "weight-decay", "l2-initial", "shrink-perturb", "condition", "condition-gradient"],
)
def test_strength_zero_equals_the_baseline(method: str) -> None:
    nothing = weights(trained("none", 0.0).model)
    # Adding zero times the weights is exact; weight decay uses another path in the kernel.
    torch.testing.assert_close(weights(trained(method, 0.0).model), nothing)


def test_clipping_bounds_the_gradient() -> None:
    training = METHODS["clipping"](build, 1e-3, 1e-2, seed=3)
    training.step(nn.functional.cross_entropy(training.model(X), Y))
    norms = [float(p.grad.norm()) for p in training.model.parameters() if p.grad is not None]
    assert math.hypot(*norms) == pytest.approx(1e-3, rel=1e-3)


def test_l2_initial_keeps_weights_near_the_start() -> None:
    start = weights(METHODS["none"](build, 0.0, 1e-2, seed=3).model)
    free, held = (weights(trained(*way).model) for way in (("none", 0.0), ("l2-initial", 1.0)))
    assert (held - start).norm() < 0.5 * (free - start).norm()


def test_shrink_and_perturb_of_strength_one_reinitialises() -> None:
    training = METHODS["shrink-perturb"](build, 1.0, 1e-2, seed=3)
    training.step(nn.functional.cross_entropy(training.model(X), Y))
    training.between_tasks()
    new = weights(METHODS["none"](build, 0.0, 1e-2, seed=1_000_003).model)
    assert torch.equal(weights(training.model), new)
    training.between_tasks()
    assert not torch.equal(weights(training.model), new)


@pytest.mark.parametrize("method", ["spectral-norm-torch", "orthogonal-torch"])
def test_parametrised_weights_have_the_given_norm(method: str) -> None:
    norms = list(spectral_norms(trained(method, 2.0).model).values())
    # One power iteration per step lags behind at a learning rate of 1e-2.
    assert norms[:-1] == pytest.approx([2.0, 2.0], rel=0.2)
    if method == "orthogonal-torch":
        kappas = list(condition_numbers(trained(method, 2.0).model).values())
        assert kappas[:-1] == pytest.approx([1.0, 1.0], rel=1e-5)


def test_limits_hold_after_finish() -> None:
    assert max(condition_numbers(trained("condition-limit", 2.0).model).values()) <= 2
    assert max(spectral_norms(trained("upper-limit", 0.7).model).values()) <= 0.7
    model = trained("both-limits", 2.0).model
    for _, layer in model.named_children():
        if isinstance(layer, nn.Linear):
            sigma = torch.linalg.svdvals(layer.weight.detach().double())
            assert sigma.max() <= 2
            assert sigma.min() >= 0.5


def test_a_nonfinite_loss_changes_no_weight() -> None:
    training = METHODS["isometry"](build, 0.5, 1e-2, seed=3)
    before = weights(training.model)
    loss = nn.functional.cross_entropy(training.model(X * math.inf), Y)
    assert not training.step(loss)
    assert torch.equal(weights(training.model), before)


@pytest.mark.parametrize("method", ["none", "condition", "condition-limit", "upper-limit"])
def test_diverged_training_stops_and_can_be_tested(method: str) -> None:
    """A limit refuses non-finite weights; the experiment continues as with other methods."""
    training = METHODS[method](build, 2.0, 1e-2, seed=3)
    with torch.no_grad():
        training.model[0].weight[0, 0] = math.inf
    stepped = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(torch.zeros(4, 4, requires_grad=True), Y[:4])
        stepped.append(training.step(loss))
    # Weights of other shapes take turns with the weight that fails.
    assert all(stepped) == (method in ("none", "condition"))
    training.finish()


def test_warm_up_is_linear() -> None:
    training = METHODS["warm-up"](build, 4.0, 1e-2, seed=3)
    rates = []
    for _ in range(6):
        training.step(nn.functional.cross_entropy(training.model(X), Y))
        rates.append(training.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


@pytest.mark.parametrize("method", ["l2", "weight-decay"])
def test_decay_applies_to_selected_parameters(method: str) -> None:
    training = METHODS[method](build, 0.1, 1e-2, seed=3, decays=lambda p: p.ndim > 1)
    decays = {
        parameter.ndim: group["weight_decay"]
        for group in training.optimizer.param_groups
        for parameter in group["params"]
    }
    assert decays == {1: 0, 2: 0.1}
    (group,) = METHODS[method](build, 0.1, 1e-2, seed=3).optimizer.param_groups
    assert group["weight_decay"] == 0.1


def test_condition_numbers_of_nonfinite_weights_are_nan() -> None:
    model = build(norm=False)
    with torch.no_grad():
        model[0].weight[0, 0] = math.inf
    assert [math.isnan(kappa) for kappa in condition_numbers(model).values()] == [1, 0, 0]
    assert [math.isnan(sigma) for sigma in spectral_norms(model).values()] == [1, 0, 0]
