"""A scale in the forward of a layer is part of the effective weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import wellcond as wc
from wellcond.weights.forward import COMPUTED, UNKNOWN, find_effective_weight

Forward = Callable[[Any, Tensor], Tensor]
linear, convolution = nn.Linear.forward, nn.Conv2d.forward


def layer_of(forward: Forward, base: type[Any] = nn.Linear, *sizes: int, **options: int) -> Any:
    """A layer with this forward and, for each output, a scale g and an offset b."""

    class Own(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(*(sizes or (8, 8)), **options)
            self.g = nn.Parameter(torch.logspace(0, 2, self.weight.shape[0]))
            self.b = nn.Parameter(torch.randn(self.weight.shape[0]))

    Own.forward = forward
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Own()


def found(layer: nn.Module, **options: Any) -> wc.report.Finding:
    return next(f for f in wc.audit(layer, **options).findings if f.name == "weight")


def stored_kappa(layer: Any) -> float:
    return float(wc.condition_number(layer.weight.detach().flatten(1)))


AFFINE: dict[str, Forward] = {
    "scale and offset": lambda s, x: s.g * F.linear(x, s.weight) + s.b,
    "scale of a shifted input": lambda s, x: linear(s, s.g * (x - s.b)),
    "output scaled in place": lambda s, x: F.linear(x, s.weight).mul_(s.g),
    "input scaled in place": lambda s, x: F.linear(x.mul_(s.g), s.weight),
    "scale among the arguments": lambda s, x: torch.addmm(s.b, x, s.weight.T, alpha=3),
    "bias of the input": lambda s, x: F.linear(x, s.weight, x * s.g),
    "residual": lambda s, x: x + linear(s, x),
    "centred outputs": lambda s, x: linear(s, x) - linear(s, x).mean(-1, keepdim=True) / 2,
    "sign": lambda s, x: -linear(s, x),
    "masked input": lambda s, x: linear(s, x * (s.b > -1)),
}


@pytest.mark.parametrize("name", AFFINE)
def test_scales_of_linear_layers_are_part_of_effective_weight(name: str) -> None:
    layer = layer_of(AFFINE[name])
    twin = copy.deepcopy(layer).double()
    with torch.no_grad():
        map_ = twin(torch.eye(8).double()) - twin(torch.zeros(1, 8).double())
    row = found(layer)
    sigma = torch.linalg.svdvals(map_)
    assert row.detail == COMPUTED
    assert row.sigma_max == pytest.approx(float(sigma[0]), rel=1e-5)
    assert row.sigma_min == pytest.approx(float(sigma[-1]), rel=1e-3, abs=1e-5)
    assert find_effective_weight(layer, layer.weight.detach(), thorough=False).note == UNKNOWN


NONLINEAR: dict[str, Forward] = {
    "activation of a scale": lambda s, x: F.silu(s.g * F.linear(x, s.weight)),
    "scale of an activation": lambda s, x: s.g * F.silu(linear(s, x)),
    "one scale for all": lambda s, x: F.silu(25 * linear(s, x)),
    "masked input": lambda s, x: torch.sigmoid(linear(s, x * (torch.arange(8) < 6))),
    "a branch of rank one": lambda s, x: F.gelu(linear(s, x) + (x * s.b).sum(-1, True) * s.g),
    "residual": lambda s, x: x + F.gelu(linear(s, x)),
    "gains of inputs": lambda s, x: linear(s, F.rms_norm(x, (8,), s.g)),
    "centred inputs": lambda s, x: linear(s, F.layer_norm(x, (8,))),
    "some outputs": lambda s, x: linear(s, x)[..., :5],
}


@pytest.mark.parametrize("name", NONLINEAR)
def test_scale_before_an_activation_is_unknown(name: str) -> None:
    assert found(layer_of(NONLINEAR[name])).detail == UNKNOWN


HARMLESS: dict[str, Forward] = {
    "offset": lambda s, x: F.linear(x, s.weight) + s.b,
    "bias by another name": lambda s, x: F.linear(x, s.weight, s.b),
    "shifted input": lambda s, x: linear(s, x - s.b),
    "stored, otherwise computed": lambda s, x: torch.einsum("bi,oi->bo", x, s.weight) + s.b,
    "sum of products": lambda s, x: (x[:, None] * s.weight).sum(-1) + s.b,
}
HARMLESS |= {
    f.__name__: (lambda s, x, f=f: f(linear(s, x)))
    for f in (F.relu, F.gelu, F.silu, torch.sigmoid, torch.tanh, F.elu, F.softplus, F.leaky_relu)
}
HARMLESS["norm of inputs"] = lambda s, x: linear(s, F.rms_norm(x, (8,), eps=1e-6))
HARMLESS["softmax"] = lambda s, x: linear(s, x).softmax(-1)
HARMLESS["gate"] = lambda s, x: F.glu(linear(s, x))


@pytest.mark.parametrize("name", HARMLESS)
def test_offset_or_activation_keeps_the_stored_weight(name: str) -> None:
    layer = layer_of(HARMLESS[name])
    row = found(layer)
    assert row.detail == ""
    assert row.condition_number == pytest.approx(stored_kappa(layer), rel=1e-9)
    assert find_effective_weight(layer, layer.weight.detach(), thorough=False).note == ""


CONVOLUTIONS: dict[str, tuple[Forward, str, str]] = {
    "offset": (lambda s, x: convolution(s, x) + s.b[:, None, None], "", "operator"),
    "activation": (lambda s, x: F.gelu(convolution(s, x)), "", "operator"),
    "trimmed": (lambda s, x: convolution(s, x)[..., :-1], "", "kernel"),
    "trimmed activation": (lambda s, x: F.gelu(convolution(s, x)[..., :-1]), "", "kernel"),
    "causal": (lambda s, x: convolution(s, F.pad(x, (2, 0)))[..., :-2], "", "kernel"),
    "scale": (lambda s, x: convolution(s, x) * s.g[:, None, None] + 1, UNKNOWN, "kernel"),
    "scaled input": (lambda s, x: convolution(s, F.pad(2 * x, (1, 1))), UNKNOWN, "kernel"),
    "mean": (lambda s, x: F.avg_pool2d(convolution(s, x), 2, 1), UNKNOWN, "kernel"),
    "some channels": (lambda s, x: convolution(s, x)[:, :3], UNKNOWN, "kernel"),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_kernel_is_trusted_if_the_layer_is_its_product(name: str) -> None:
    forward, note, view = CONVOLUTIONS[name]
    layer = layer_of(forward, nn.Conv2d, 4, 4, 3, padding=1)
    row = found(layer)
    assert row.detail == note
    assert row.condition_number == pytest.approx(stored_kappa(layer), rel=1e-9)
    slid = found(layer, example=torch.zeros(1, 4, 6, 6))
    assert slid.label == f"weight:{view}"
    assert (UNKNOWN in slid.detail) == (note == UNKNOWN)


@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_convolution_with_inner_norm_is_unknown(activated: bool, trained: bool) -> None:
    class Normalised(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(4, 8, 3, bias=False)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(super().forward(x))
            return F.relu(y) if activated else y

    layer = Normalised()
    if trained:
        layer.norm.running_mean.normal_()
        layer.norm.running_var.copy_(torch.logspace(0, 4, 8))
    assert found(layer).detail == UNKNOWN


def test_norm_after_linear_is_part_of_effective_weight() -> None:
    layer = layer_of(lambda s, x: s.norm(linear(s, x)))
    layer.norm = nn.BatchNorm1d(8)
    layer.norm.running_mean.normal_()
    layer.norm.running_var.copy_(torch.logspace(0, 4, 8))
    scale = (layer.norm.running_var + layer.norm.eps).rsqrt()
    expected = float(wc.condition_number(scale[:, None] * layer.weight.detach()))
    assert found(layer).condition_number == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_random_forward_is_detected_for_every_seed(seed: int) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        if torch.rand(()) < 0.5:
            return linear(self, x)
        return F.linear(x, self.weight * torch.arange(1.0, 9))

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        assert found(layer_of(forward)).detail == UNKNOWN


def test_random_numbers_that_change_nothing_are_harmless() -> None:
    assert found(layer_of(lambda s, x: linear(s, x + 0 * torch.rand_like(x)))).detail == ""


def test_effective_weight_can_contain_infinity() -> None:
    layer = layer_of(lambda s, x: F.linear(x, s.weight * torch.tensor(float("inf"))))
    first, _ = wc.audit(nn.Sequential(layer, nn.Linear(8, 8))).findings
    assert first.status is wc.report.Status.not_finite


@pytest.mark.parametrize("forward", [AFFINE["residual"], HARMLESS["gelu"]])
def test_default_meta_device_changes_nothing(forward: Forward) -> None:
    layer = layer_of(forward)
    with torch.device("meta"):
        row = found(layer)
    assert row == found(layer)


def test_shared_weight_with_different_effective_weights_is_noted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = nn.Linear(8, 8)
    masked = layer_of(lambda s, x: F.linear(x, s.weight.tril()))
    masked.weight = plain.weight
    for net in (nn.Sequential(plain, masked), nn.Sequential(masked, plain)):
        (row,) = wc.audit(net).findings
        assert 'shared with "1.weight", where the effective weight is different' in row.detail
        caplog.clear()
        wc.Regularizer(net, wc.ConditionPenalty(0.1))
        (record,) = caplog.records
        assert "the forward of a layer that shares it changes" in record.getMessage()
    caplog.clear()
    again = nn.Linear(8, 8)
    again.weight = plain.weight
    (row,) = wc.audit(nn.Sequential(plain, again)).findings
    assert row.detail == ""
    wc.Regularizer(nn.Sequential(plain, again), wc.ConditionPenalty(0.1))
    assert not caplog.records


@pytest.mark.parametrize("how", ["Regularizer", "Monitor", "enforce"])
def test_one_warning_lists_all_weights_of_a_kind(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    net = nn.Sequential(*(layer_of(lambda s, x: F.linear(x, s.weight.tril())) for _ in range(7)))
    if how == "Monitor":
        wc.Monitor(net)
    else:
        getattr(wc, how)(net, wc.ConditionLimit(1e9))
    (record,) = caplog.records
    assert '"0.weight", "1.weight"' in record.getMessage()
    assert "and 2 more are each the stored parameter" in record.getMessage()


def test_caution_does_not_run_unit_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("unit vectors")

    monkeypatch.setattr("wellcond.weights.forward._Trial._from_unit_vectors", refuse)
    wc.Regularizer(layer_of(AFFINE["residual"]), wc.ConditionPenalty(0.1))
