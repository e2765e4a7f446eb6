"""A convolution as an operator equals its dense twin, which is built tap by tap."""

import pytest
import torch
from torch import nn

from convolutions import CASES, dense
from wellcond.operators.convolution import Convolution, Geometry


def made(name: str) -> Convolution:
    layer, size = CASES[name]
    return Convolution(layer.weight.detach(), Geometry.of(layer, size))


@pytest.mark.parametrize("name", CASES)
def test_convolution_equals_dense_twin(name: str) -> None:
    S = made(name)
    twin = dense(S.kernel, S.geometry)
    assert S.shape == twin.shape
    assert S.nu == min(twin.shape)
    source = torch.Generator().manual_seed(0)
    V, U = (torch.randn(n, 3, generator=source, dtype=torch.float64) for n in twin.mT.shape)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(S.matmat(V), twin @ V, **close)
    torch.testing.assert_close(S.rmatmat(U), twin.mT @ U, **close)
    torch.testing.assert_close(S.dense(), twin, **close)
    torch.testing.assert_close(S.squared_frobenius_norm(), twin.square().sum(), **close)


@pytest.mark.parametrize("name", CASES)
def test_operator_equals_layer(name: str) -> None:
    layer, size = CASES[name]
    S = made(name)
    if layer.transposed:
        steps = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        sizes = zip(size, *steps, strict=True)
        size = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)
    x = torch.randn(2, layer.in_channels, *size, dtype=torch.float64)
    with torch.no_grad():
        y = layer(x)
    torch.testing.assert_close(S.matmat(x.flatten(1).mT).mT, y.flatten(1))


def test_groups_are_blocks() -> None:
    S = made("Conv2d (3, 2, 1, 1, 2) zeros (4, 6)")
    blocks = torch.block_diag(*(S.group(index).dense() for index in range(2)))
    torch.testing.assert_close(S.dense(), blocks)


def test_geometry_without_padding_has_mode_zeros() -> None:
    layer = nn.Conv2d(2, 3, 3, padding_mode="circular")
    assert Geometry.of(layer, (5, 5)).mode == "zeros"
    assert str(Geometry.of(layer, (5, 7))) == "inputs of 5x7"
    assert str(Geometry.of(nn.ConvTranspose1d(2, 3, 3), (5,))) == "outputs of 5"
