"""Values, gradients and estimates at scales whose squares overflow or vanish.

For 2^k S, the stable rank is that of S, and the penalties are those of S times 4^k. They are exact
where the dtype can represent them, infinite elsewhere, and never NaN or of another sign.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wellcond as wc

SCALES = [
    *((torch.float32, k) for k in (-118, -80, -66, -61, 0, 58, 61, 62, 63, 90, 124)),
    *((torch.float64, k) for k in (-1000, -900, -520, 0, 500, 515, 900, 1020)),
]
S = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def layer_at(dtype: torch.dtype, k: int, count: int = 1) -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(4, 6, bias=False, dtype=dtype) for _ in range(count)))
    for layer in model:
        layer.weight.data = S.to(dtype) * 2.0**k
    return model


def held(value: float, dtype: torch.dtype, k: int = 0) -> Any:
    """value 4^k as the dtype represents it: infinite, or with an absolute error if it is tiny."""
    try:
        exact = math.ldexp(value, 2 * k)
    except OverflowError:
        exact = math.inf
    number = float(torch.tensor(exact, dtype=torch.float64).to(dtype))
    return pytest.approx(number, rel=2e-5, abs=8 * least(dtype))


def least(dtype: torch.dtype) -> float:
    """The smallest subnormal number."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


@pytest.mark.parametrize("count", [1, 3], ids=["alone", "a stack"])
@pytest.mark.parametrize(("dtype", "k"), SCALES, ids=str)
def test_penalties_and_stable_ranks_scale(dtype: torch.dtype, k: int, count: int) -> None:
    sigma = torch.linalg.svdvals(S)
    squares, top = float(sigma.square().sum()), float(sigma[0])
    srank = squares / top**2
    expected = {
        wc.ConditionPenalty(1.0): ((top**2 - squares / 4) / 2, k),
        wc.TikhonovPenalty(1.0): (squares / 2, k),
        wc.SpectralNormPenalty(1.0, target=0.0): (top**2 / 2, k),
        wc.StableRankPenalty(1.0): ((1 - srank / 4) / 2, 0),
    }
    model = layer_at(dtype, k, count)
    for rule, (value, power) in expected.items():
        reg = wc.Regularizer(model, rule)
        for estimate in reg.measure().values():
            assert estimate.stable_rank == pytest.approx(srank, rel=2e-5)
            assert estimate.penalty == held(value, dtype, power)
            assert 0 <= estimate.residual <= 1e-4 * estimate.sigma_max
            assert estimate.status == ""
        with torch.no_grad():
            assert float(reg()) == held(count * value, dtype, power)
            assert float(wc.Regularizer(model, type(rule)(0.0))()) == 0


@pytest.mark.parametrize("rule", [wc.ConditionPenalty(1.0), wc.TikhonovPenalty(1.0)], ids=repr)
@pytest.mark.parametrize(("dtype", "k"), SCALES, ids=str)
def test_gradients_of_quadratic_penalties_scale_with_the_weight(
    rule: wc.Penalty, dtype: torch.dtype, k: int
) -> None:
    gradients: list[Tensor] = []
    for at in (0, k):
        model = layer_at(dtype, at)
        reg = wc.Regularizer(model, rule)
        reg().backward()
        gradients.append(model[0].weight.grad.clone())
        model.zero_grad()
        reg.add_gradients()
        torch.testing.assert_close(model[0].weight.grad, gradients[-1], rtol=1e-3, atol=1e-43)
    expected = gradients[0] * 2.0**k
    torch.testing.assert_close(gradients[1], expected, rtol=1e-3, atol=32 * least(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_gradient_of_the_stable_rank_is_never_nan(dtype: torch.dtype) -> None:
    for of, k in SCALES:
        if of == dtype:
            model = layer_at(dtype, k)
            wc.Regularizer(model, wc.StableRankPenalty(1.0)).add_gradients()
            assert bool(torch.isfinite(model[0].weight.grad).all()), k


@pytest.mark.parametrize(("dtype", "k"), SCALES, ids=str)
def test_orthogonality_is_infinite_where_fourth_powers_overflow(dtype: torch.dtype, k: int) -> None:
    reg = wc.Regularizer(layer_at(dtype, k), wc.OrthogonalityPenalty(1.0))
    sigma = torch.linalg.svdvals(S)
    fourth = float(sigma.pow(4).sum()) / 4
    with torch.no_grad():
        value = float(reg())
    if k < 0:
        assert value == pytest.approx(1.0)  # the value for S = 0: nu/4
    elif k > 0:
        assert value == held(fourth, dtype, 2 * k)


@pytest.mark.parametrize("count", [1, 3], ids=["alone", "a stack"])
@pytest.mark.parametrize("strength", [1.0, 1e5])
@pytest.mark.parametrize(
    ("dtype", "k"),
    [*((torch.float32, 2 * k) for k in range(14, 63)), *SCALES],
    ids=str,
)
def test_the_gradient_of_orthogonality_is_right_or_zero_and_never_nan(
    dtype: torch.dtype, k: int, strength: float, count: int
) -> None:
    model = layer_at(dtype, k, count)
    reg = wc.Regularizer(model, wc.OrthogonalityPenalty(strength))
    reg.add_gradients()
    added = [layer.weight.grad.clone() for layer in model]  # type: ignore[union-attr,operator]
    model.zero_grad()
    reg().backward()
    for layer, by_hand in zip(model, added, strict=True):
        W = layer.weight.detach().double()
        grad = layer.weight.grad
        assert torch.equal(grad, by_hand)  # type: ignore[arg-type]
        if k < (31 if dtype == torch.float32 else 300):
            exact = strength * W @ (W.T @ W - torch.eye(4, dtype=torch.float64))
            torch.testing.assert_close(grad.double(), exact, rtol=1e-4, atol=1e-30)  # type: ignore[union-attr]
        else:
            assert torch.isfinite(grad).all()  # type: ignore[arg-type]


def test_block_orthogonal_to_weight_gives_no_nan() -> None:
    """The value from a warm block that no longer sees the weight is only a lower bound."""
    layer = nn.Linear(8, 8, bias=False)
    layer.weight.data = torch.diag(torch.tensor([1.0, *[0.0] * 7]))
    reg = wc.Regularizer(layer, wc.ConditionPenalty(1.0), block_size=1)
    for _ in range(3):
        reg.add_gradients()
    layer.weight.data = torch.diag(torch.tensor([*[0.0] * 7, 1.0]))
    with torch.no_grad():
        assert math.isfinite(float(reg()))
