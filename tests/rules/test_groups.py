"""Audits and hard limits treat the groups of a convolution as one block-diagonal map."""

import pytest
import torch
from torch import Tensor, nn

import wellcond as wc


def grouped(groups: int = 3, **options: object) -> nn.Sequential:
    """Groups of different scales: each satisfies a limit that their map exceeds by far."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4 * groups, 4 * groups, 3, groups=groups, bias=False, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        for number, group in enumerate(conv.weight.chunk(groups)):
            group.copy_(torch.linalg.qr(group.flatten(1).mT).Q.mT.view_as(group))
            group.mul_(10.0**-number)
    return nn.Sequential(conv)


def block_diagonal(kernel: Tensor, groups: int) -> Tensor:
    return torch.block_diag(*(group.flatten(1) for group in kernel.detach().double().chunk(groups)))


def kappa(model: nn.Module) -> float:
    (found,) = wc.audit(model).findings
    return found.condition_number


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [1.5, 7.0, 50.0])
def test_a_limit_holds_for_the_map_that_an_audit_measures(dtype: torch.dtype, limit: float) -> None:
    model = grouped().to(dtype)
    before = block_diagonal(model[0].weight, 3)
    assert kappa(model) == pytest.approx(100.0, rel=0.02)
    reg = wc.Regularizer(model, wc.ConditionLimit(limit))
    reg.enforce()
    assert kappa(model) <= limit
    after = block_diagonal(model[0].weight, 3)
    nearest = torch.linalg.matrix_norm(wc.nearest(before, limit) - before)
    moved = torch.linalg.matrix_norm(after - before)
    rounding = torch.finfo(dtype).eps * torch.linalg.matrix_norm(before)
    assert float(moved - nearest) <= 1e-6 * float(nearest) + 8 * float(rounding)
    again = model[0].weight.detach().clone()
    reg.enforce()
    assert torch.equal(model[0].weight, again)


def test_satisfied_limit_and_zero_kernel_change_nothing() -> None:
    model = grouped(1 + 1)
    before = model[0].weight.detach().clone()
    wc.Regularizer(model, wc.ConditionLimit(11.0)).enforce()
    assert torch.equal(model[0].weight, before)
    with torch.no_grad():
        model[0].weight.zero_()
    wc.Regularizer(model, wc.ConditionLimit(2.0)).enforce()
    assert not model[0].weight.any()


def test_a_zero_group_gets_full_rank() -> None:
    model = grouped()
    with torch.no_grad():
        model[0].weight[4:8] = 0
    wc.Regularizer(model, wc.ConditionLimit(3.0)).enforce()
    assert kappa(model) <= 3.0


def test_channels_last_kernel_is_limited() -> None:
    model = grouped().to(memory_format=torch.channels_last)
    wc.Regularizer(model, wc.ConditionLimit(3.0)).enforce()
    assert kappa(model) <= 3.0


def test_attached_limits_hold_for_the_map() -> None:
    model = nn.Sequential(grouped(), nn.Flatten(), nn.Linear(12 * 9, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reg = wc.Regularizer(model, {"0.0.weight": wc.ConditionLimit(4.0), "*": None})
    reg.attach(optimizer, every=1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 12, 5, 5)).square().sum().backward()
        optimizer.step()
        assert kappa(model[0]) <= 4.0


def test_limit_of_single_group_and_of_depthwise_layer() -> None:
    model = grouped()
    with torch.no_grad():
        model[0].weight[5] *= 1e-2
    before = model[0].weight.detach().clone()
    wc.Regularizer(model, {"0.weight:group1": wc.ConditionLimit(2.0)}).enforce()
    groups = model[0].weight.detach().flatten(1).chunk(3)
    assert float(wc.condition_number(groups[1])) <= 2.0
    assert torch.equal(model[0].weight[:4], before[:4])
    assert torch.equal(model[0].weight[8:], before[8:])

    depthwise = nn.Sequential(nn.Conv1d(6, 6, 3, groups=6))
    with torch.no_grad():
        depthwise[0].weight[2] *= 1e-3
    assert kappa(depthwise) > 100
    reg = wc.Regularizer(depthwise, wc.ConditionLimit(5.0))
    reg.enforce()
    assert kappa(depthwise) <= 5.0


def test_absolute_bounds_hold_for_every_group() -> None:
    model = grouped()
    wc.Regularizer(model, wc.SingularValueLimit(lower=0.2, upper=0.5)).enforce()
    for group in model[0].weight.detach().double().chunk(3):
        sigma = torch.linalg.svdvals(group.flatten(1))
        assert 0.2 <= float(sigma.min()) <= float(sigma.max()) <= 0.5


def test_nan_in_a_group_is_named() -> None:
    model = grouped()
    with torch.no_grad():
        model[0].weight[4, 0, 0, 0] = torch.nan
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"0\.weight"):
        wc.Regularizer(model, wc.ConditionLimit(2.0)).enforce()
    torch.testing.assert_close(model[0].weight.detach(), before, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("limit", [wc.ConditionLimit(2.0), wc.SingularValueLimit(upper=0.5)])
@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_convolutions_in_one_batch_are_independent(limit: wc.Limit, value: float) -> None:
    """Both are processed in one batch, but each is a separate map."""
    model = nn.Sequential(grouped(2)[0], grouped(2)[0])
    with torch.no_grad():
        model[0].weight.fill_(value)
    reg = wc.Regularizer(model, limit)
    if value == 0:
        reg.enforce()
        assert not model[0].weight.any()
    else:
        with pytest.raises(ValueError, match=r'^"0\.weight" contains NaN'):
            reg.enforce()
    assert kappa(nn.Sequential(model[1])) <= 2.0 or isinstance(limit, wc.SingularValueLimit)
    if value == 0:
        reg.proximal_step(0.1)
