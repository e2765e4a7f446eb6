"""Convolutions as linear operators: all singular values if the grade says so, or valid bounds."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wellcond as wc
from convolutions import CASES, dense
from wellcond.audits import convolutions as module
from wellcond.audits.convolutions import measure_convolution
from wellcond.operators.convolution import Convolution, Geometry


def made(name: str) -> tuple[Convolution, torch.Tensor]:
    layer, size = CASES[name]
    S = Convolution(layer.weight.detach(), Geometry.of(layer, size))
    return S, torch.linalg.svdvals(dense(S.kernel, S.geometry))


@pytest.mark.parametrize("name", CASES)
def test_singular_values_of_small_convolutions(name: str) -> None:
    S, expected = made(name)
    found = measure_convolution(S)
    assert len(found.singular_values) == S.nu
    atol = 1e-9 * float(expected[0])
    torch.testing.assert_close(found.singular_values, expected, rtol=0, atol=atol)
    assert found.largest[0] == found.largest[1] == float(found.singular_values[0])


@pytest.mark.parametrize("name", CASES)
def test_bounds_of_large_convolutions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    S, expected = made(name)
    monkeypatch.setattr(module, "_DENSE", 0)
    monkeypatch.setattr(module, "_CORNER", 16)
    found = measure_convolution(S)
    if len(found.singular_values):
        assert S.disjoint or S.periodic
        return
    below, above = found.largest
    assert below <= float(expected[0]) * (1 + 1e-12)
    assert above >= float(expected[0]) * (1 - 1e-12)
    assert found.smallest >= float(expected[-1]) - 1e-13
    if S.geometry.mode == "zeros":
        assert above <= 2 * below


@pytest.mark.parametrize(("taps", "padding"), [((0.5, 1.0), (0, 1)), ((1.0, 0.5), (1, 0))])
def test_corner_bounds_below_the_symbol(
    taps: tuple[float, float], padding: tuple[int, int]
) -> None:
    """Taps 1/2 and 1: the symbol has κ = 3, but σ_min is halved with every further input.

    This happens at the end that is cut off, which is the opposite end for taps in reverse order.
    """
    kernel = torch.tensor([[taps]], dtype=torch.float64)
    S = Convolution(kernel, Geometry((24,), (1,), (1,), (padding,)))
    assert float(torch.linalg.svdvals(S.dense())[-1]) < 1e-7
    corners = module._corners(S.geometry)
    assert min(module._in_corner(S, 20, corner) for corner in corners) < 2e-6


@pytest.mark.parametrize("stride", [1, 2])
def test_strided_shortcut_is_rank_deficient(stride: int) -> None:
    """As in every ResNet: the kernel is well-conditioned, but uses a quarter of its inputs."""
    layer = nn.Conv2d(4, 8, 1, stride)
    report = wc.audit(layer, example=torch.zeros(1, 4, 6, 6))
    (finding,) = report.findings
    assert wc.audit(layer).findings[0].condition_number < 100
    assert math.isinf(finding.condition_number) == (stride == 2)
    assert finding.rank == (144 if stride == 1 else 36)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, 2, 1))
        self.unused = nn.Conv2d(8, 8, 3)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        x = self.parametrized(self.drop(self.norm(self.first(scale * x))))
        return self.head(self.up(x).mean((2, 3)))


EXAMPLES: dict[str, Any] = {
    "tensor": torch.ones(2, 3, 8, 8),
    "tuple": (torch.ones(2, 3, 8, 8), 2.0),
    "dict": {"x": torch.ones(2, 3, 8, 8), "scale": 2.0},
}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_example_measures_operators_and_changes_nothing(kind: str) -> None:
    torch.manual_seed(0)
    model = Net().train()
    model.drop.eval()  # the norm remains in train mode, in which it would count the example
    flags = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    source = torch.get_rng_state()
    report = wc.audit(model, example=EXAMPLES[kind])
    assert {f.label: f.shape for f in report.findings} == {
        "first.weight:operator": (8 * 64, 3 * 64),
        "parametrized.weight:operator": (8 * 16, 8 * 64),
        "unused.weight:kernel": (8, 72),  # the example does not reach it
        "up.weight:operator": (4 * 64, 8 * 16),
        "head.weight": (2, 4),
    }
    found = {f.label: f for f in report.findings}
    W = model.parametrized.weight.detach()
    twin = dense(W, Geometry((8, 8), (2, 2), (1, 1), ((1, 1), (1, 1))))
    sigma = torch.linalg.svdvals(twin)
    finding = found["parametrized.weight:operator"]
    assert finding.condition_number == pytest.approx(float(sigma[0] / sigma[-1]), rel=1e-6)
    assert finding.stable_rank == pytest.approx(float(twin.square().sum() / sigma[0] ** 2))
    assert finding.grade is wc.report.Grade.computed
    assert "inputs of 8x8" in finding.explanation
    assert report.coverage.parameter_share == wc.audit(model).coverage.parameter_share
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), source)
    assert not any(module._forward_hooks for module in model.modules())


def test_bounds_have_grade_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DENSE", 0)
    report = wc.audit(nn.Conv2d(3, 4, 3, padding=1), example=torch.zeros(1, 3, 9, 9), curves=3)
    (finding,) = report.findings
    assert finding.grade is wc.report.Grade.bounded
    assert finding.to_dict()["grade"] == "bounded"
    assert "σ_max is between" in finding.explanation
    assert not finding.singular_values
    row = report.table().splitlines()[1]
    assert "≥" in row
    assert "≤" in row
    assert "≥" in report.to_html()


def test_zero_or_nonfinite_kernel_has_a_status() -> None:
    for value, status in ((0.0, wc.report.Status.zero), (math.inf, wc.report.Status.not_finite)):
        layer = nn.Conv2d(2, 3, 3, padding=1)
        nn.init.constant_(layer.weight, value)
        model = nn.Sequential(layer, nn.Flatten(), nn.Linear(48, 2))
        report = wc.audit(model, example=torch.zeros(1, 2, 4, 4))
        (finding,) = (f for f in report.findings if f.view == "operator")
        assert finding.status is status


def test_example_with_a_wrapped_model() -> None:
    model = torch.compile(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1)), backend="eager")
    (finding,) = wc.audit(model, example=torch.zeros(1, 2, 4, 4)).findings
    assert finding.label == "0.weight:operator"


def test_example_does_not_initialise_lazy_modules() -> None:
    model = nn.Sequential(nn.LazyConv2d(3, 3), nn.Conv2d(3, 3, 3))
    with pytest.raises(ValueError, match="weights are all initialised"):
        wc.audit(model, example=torch.zeros(1, 2, 9, 9))
    assert isinstance(model[0].weight, nn.parameter.UninitializedParameter)


def test_invalid_example_is_refused_and_leaves_no_hook(tmp_path: Any) -> None:
    model = Net().train()
    with pytest.raises(ValueError, match=r"`example` must be a valid input.*RuntimeError"):
        wc.audit(model, example=torch.zeros(2, 5, 8, 8))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    torch.save(model.state_dict(), tmp_path / "net.pt")
    with pytest.raises(TypeError, match="`example` requires a model"):
        wc.audit(tmp_path / "net.pt", example=torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("stride", "dilation", "extra"), [(1, 2, 1), (2, 3, 2), (1, 3, 2), (2, 1, 1), (3, 1, 2)]
)
@pytest.mark.parametrize("padding", [0, 1])
def test_unreached_outputs_are_zero_rows(
    stride: int, dilation: int, extra: int, padding: int
) -> None:
    """output_padding can add output positions that no input reaches."""
    torch.manual_seed(0)
    layer = nn.ConvTranspose1d(
        2, 3, 3, stride, padding, output_padding=extra, dilation=dilation, bias=False
    ).double()
    (found,) = wc.audit(layer, example=torch.zeros(1, 2, 5, dtype=torch.float64)).findings
    twin = torch.cat([layer(e.view(1, 2, 5)).flatten()[:, None] for e in torch.eye(10).double()], 1)
    sigma = torch.linalg.svdvals(twin.detach())
    assert found.shape == tuple(twin.shape)
    assert found.sigma_max == pytest.approx(float(sigma[0]), rel=1e-9)
    assert found.sigma_min == pytest.approx(float(sigma[-1]), rel=1e-9)


class Twice(nn.Module):
    """Like the heads of a detector, which act on several feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x).sum() + self.conv(x[..., ::2, ::4]).sum() + self.conv(x).sum()
        return y


def test_several_input_sizes_are_noted() -> None:
    (found,) = wc.audit(Twice(), example=torch.zeros(1, 2, 8, 8)).findings
    assert found.shape == (128, 128)
    assert found.detail.startswith("on inputs of 8x8, but not of 4x2, on which it also acts")


def test_bound_for_any_size_is_shown() -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1)
    shown = set()
    for size in (3, 8, 13):
        (found,) = wc.audit(layer, example=torch.zeros(1, 2, size, size)).findings
        note = found.detail.partition("σ_max is at most ")[2]
        bound = float(note.removesuffix(" for inputs of any size"))
        assert found.sigma_max <= bound * (1 + 1e-3)  # the bound is rounded to four digits
        shown.add(bound)
    assert len(shown) == 1
    assert found.sigma_max >= 0.9 * bound
    (whole,) = wc.audit(nn.Conv2d(2, 3, 1), example=torch.zeros(1, 2, 4, 4)).findings
    assert "any size" not in whole.detail  # the operator is a matrix at each position
