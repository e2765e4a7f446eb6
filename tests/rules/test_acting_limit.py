"""Upper limits on convolutions as linear operators: certified by enforce, near at every step."""

import copy
import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wellcond as wc
from wellcond.operators.acting import bound_norm, flattening_factor
from wellcond.operators.convolution import Geometry

B = 0.7
LAYERS: dict[str, Any] = {
    "plain": lambda: nn.Conv2d(6, 5, 3, padding=1),
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "groups": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=4),
    "depthwise": lambda: nn.Conv1d(5, 5, 4, groups=5),
    "dilated": lambda: nn.Conv2d(3, 4, 3, dilation=2, padding=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 3, 4, stride=2, padding=1),
    "transposed groups": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
    "reflect": lambda: nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
    "patches": lambda: nn.Conv2d(3, 8, 4, stride=4),
    "one by one": lambda: nn.Conv2d(6, 4, 1),
}


def norm(layer: nn.Module, side: int = 8) -> float:
    """sigma_1 of the linear operator on inputs of one size, by the dense matrix in float64."""
    layer = copy.deepcopy(layer).double()
    axes = layer.weight.ndim - 2  # type: ignore[union-attr,operator]
    shape = (layer.in_channels, *[side] * axes)
    count = int(torch.tensor(shape).prod())
    x = torch.eye(count, dtype=torch.float64).reshape(count, *shape)
    with torch.no_grad():
        layer.bias.zero_()  # type: ignore[union-attr,operator]
        return float(torch.linalg.matrix_norm(layer(x).flatten(1), 2))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_enforce_proves_the_limit_for_every_size(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]().to(dtype)
    assert norm(layer) > B
    reg = wc.Regularizer(layer, wc.SingularValueLimit(upper=B, acting=True))
    reg.enforce()
    assert bound_norm(layer.weight, Geometry.of(layer)) <= B
    assert all(norm(layer, side) <= B for side in (4, 9))
    if name != "reflect":  # for which the limit is loose
        assert norm(layer) > 0.85 * B
    before = layer.weight.detach().clone()
    reg.enforce()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("name", LAYERS)
def test_an_attached_limit_holds_at_every_step(name: str) -> None:
    torch.manual_seed(1)
    layer = LAYERS[name]()
    optimizer = torch.optim.Adam(layer.parameters(), 3e-3)
    reg = wc.Regularizer(layer, wc.SingularValueLimit(upper=B, acting=True))
    reg.attach(optimizer)
    shape = (4, layer.in_channels, *[8] * (layer.weight.ndim - 2))
    for step in range(34):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (-layer(x).square().mean()).backward()  # it pushes sigma_1 up
        optimizer.step()
        if step % 3 == 0:
            assert norm(layer) <= (1.02 if step >= 20 else 1.1) * B
    assert norm(layer) > 0.5 * B
    assert "projected once" in repr(reg) or name == "one by one"
    values = reg.log(lambda values, step: None, 0)
    assert values is not None
    assert values["wellcond/limit/excess/largest"] <= 1.01


def test_training_resumes_bit_for_bit() -> None:
    def build() -> tuple[nn.Conv2d, torch.optim.Optimizer, wc.Regularizer]:
        torch.manual_seed(2)
        layer = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
        reg = wc.Regularizer(layer, wc.SingularValueLimit(upper=B, acting=True))
        reg.attach(optimizer)
        return layer, optimizer, reg

    def train(layer: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (-layer(x).square().mean()).backward()
            optimizer.step()

    layer, optimizer, reg = build()
    train(layer, optimizer, range(8))
    saved = copy.deepcopy((layer.state_dict(), optimizer.state_dict(), reg.state_dict()))
    train(layer, optimizer, range(8, 14))
    other, its_optimizer, its_reg = build()
    for one, state in zip((other, its_optimizer, its_reg), saved, strict=True):
        one.load_state_dict(state)  # type: ignore[arg-type]
    train(other, its_optimizer, range(8, 14))
    assert torch.equal(layer.weight, other.weight)


def test_acting_has_no_effect_on_linear_layers() -> None:
    weights = []
    for acting in (False, True):
        torch.manual_seed(3)
        layer = nn.Linear(40, 30)
        wc.Regularizer(layer, wc.SingularValueLimit(upper=0.5, acting=acting)).enforce()
        weights.append(layer.weight.detach())
    assert torch.equal(*weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_kernel_raises_and_is_unchanged(value: float) -> None:
    layer = nn.Conv2d(2, 2, 3)
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = value
    before = layer.weight.detach().clone()
    reg = wc.Regularizer(layer, wc.SingularValueLimit(upper=B, acting=True))
    with pytest.raises(ValueError, match='"weight" contains NaN or infinity'):
        reg.enforce()
    assert torch.equal(layer.weight.nan_to_num(), before.nan_to_num())


def test_a_zero_kernel_stays_zero() -> None:
    layer = nn.Conv2d(2, 2, 3)
    nn.init.zeros_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    reg = wc.Regularizer(layer, wc.SingularValueLimit(upper=B, acting=True))
    reg.attach(optimizer)
    for _ in range(3):
        layer(torch.ones(1, 2, 4, 4)).sum().backward()
        optimizer.step()
    reg.enforce()
    assert not layer.weight.any()


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def test_acting_raises_where_unsupported() -> None:
    with pytest.raises(ValueError, match="`lower` must be None if `acting`"):
        wc.SingularValueLimit(lower=0.1, upper=1.0, acting=True)
    with pytest.raises(ValueError, match="No lower bound is known for the smallest") as error:
        wc.ConditionLimit(10, acting=True)
    assert "use SingularValueLimit(upper=..., acting=True)" in str(error.value)
    with pytest.raises(ValueError, match="No lower bound is known for the smallest"):
        wc.ConditionLimit(10, upper=1.0, acting=True)
    assert wc.ConditionLimit(10, acting=False) == wc.ConditionLimit(10)
    assert repr(wc.ConditionLimit(10, acting=False)) == repr(wc.ConditionLimit(10))
    with pytest.raises(TypeError, match="`acting` must be a bool"):
        wc.SingularValueLimit(upper=1.0, acting=1)  # type: ignore[arg-type]
    limit = wc.SingularValueLimit(upper=1.0, acting=True)
    with pytest.raises(ValueError, match='"weight" cannot be limited as a convolution'):
        wc.Regularizer(Standardised(2, 2, 3), limit)
    with pytest.raises(ValueError, match='"weight:group1" cannot be limited'):
        wc.Regularizer(nn.Conv2d(4, 4, 3, groups=2), {"weight:group1": limit})


def test_warning_names_kernel_limited_as_matrix_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4, 4))
    reg = wc.Regularizer(model, wc.SingularValueLimit(upper=1.0))
    with caplog.at_level(logging.WARNING, "wellcond"):
        reg.enforce()
        reg.enforce()
    (record,) = caplog.records
    text = record.getMessage()
    assert re.search(r'upper limit of "0\.weight" holds for the kernel as a matrix', text)
    assert "up to 3 times as large" in text
    assert "acting=True" in text
    caplog.clear()
    for quiet in (
        wc.SingularValueLimit(upper=1.0, acting=True),
        wc.SingularValueLimit(lower=0.1),
        wc.ConditionLimit(10),
    ):
        wc.Regularizer(model, quiet).enforce()
    assert not caplog.records


def test_factor_in_warning_is_attained() -> None:
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=True)
    nn.init.ones_(layer.weight)
    matrix = float(torch.linalg.vector_norm(layer.weight))
    factor = flattening_factor(layer.weight.shape, Geometry.of(layer))
    assert 0.95 * factor * matrix < norm(layer, 24) <= factor * matrix
