"""The geometry of a layer without an input size equals that with a size, except for the size."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from convolutions import CASES
from wellcond.operators.acting import bound_norm
from wellcond.operators.convolution import Geometry
from wellcond.weights.reasons import Reason
from wellcond.weights.sizes import geometry_of


@pytest.mark.parametrize("name", CASES)
def test_geometry_without_size_matches_geometry_of(name: str) -> None:
    layer, size = CASES[name]
    found = geometry_of(layer)
    assert isinstance(found, Geometry)
    assert replace(found, size=size) == Geometry.of(layer, size)
    assert str(found).endswith("puts of every size")


class Padded(nn.Conv2d):
    """Pads depending on the size of its input, like timm's Conv2dSame."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


class Standardised(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Named(nn.Conv2d):
    """A subclass with the forward of torch."""


def replaced() -> nn.Conv2d:
    layer = nn.Conv2d(2, 3, 3)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Padded(2, 3, 3), Reason.own_forward),
        (Standardised(2, 3, 3), Reason.own_forward),
        (replaced(), Reason.own_forward),
        (nn.LazyConv2d(3, 3), Reason.uninitialised),
        (nn.Conv2d(2, 3, 3, dtype=torch.complex64), Reason.not_real),
    ],
    ids=lambda value: type(value).__name__,
)
def test_geometry_of_layer_with_own_forward_is_unknown(
    layer: nn.modules.conv._ConvNd, reason: Reason
) -> None:
    assert geometry_of(layer) is reason


def test_subclasses_with_torch_forward_have_a_geometry() -> None:
    plain = geometry_of(nn.Conv2d(2, 3, 3, padding="same"))
    assert geometry_of(Named(2, 3, 3, padding="same")) == plain
    normed = parametrizations.weight_norm(nn.Conv2d(2, 3, 3, padding="same"))
    assert geometry_of(normed) == plain


@pytest.mark.parametrize("k", [2, 3, 4])
def test_same_padding_of_even_kernels_is_asymmetric(k: int) -> None:
    layer = nn.Conv1d(1, 1, k, padding="same", padding_mode="replicate", bias=False).double()
    nn.init.ones_(layer.weight)
    found = geometry_of(layer)
    assert isinstance(found, Geometry)
    assert sum(found.padding[0]) == k - 1
    S = layer(torch.eye(9, dtype=torch.float64)[:, None])[:, 0].detach()
    assert float(torch.linalg.matrix_norm(S, 2)) <= bound_norm(layer.weight, found)
