"""Warnings about limits that other code undoes, or that do not hold for the effective weight."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.prune as prune
from torch import Tensor, nn

import wellcond as wc

K = wc.ConditionLimit(3.0)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 16))


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, after: Callable[[], None] = lambda: None
) -> None:
    inputs = torch.Generator().manual_seed(0)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(4, 24, generator=inputs)).square().mean().backward()
        optimizer.step()
        after()


def pruned(share: float = 0.8) -> nn.Sequential:
    model = net()
    prune.l1_unstructured(model[0], "weight", share)
    prune.remove(model[0], "weight")
    return model


@pytest.mark.parametrize("limit", [K, wc.SingularValueLimit(lower=0.5)], ids=repr)
def test_filled_zeros_warn_once(limit: wc.Limit, said: Callable[[], list[str]]) -> None:
    model = pruned()
    reg = wc.Regularizer(model, limit)
    reg.enforce()
    reg.enforce()
    assert said() == [
        'Most entries of "0.weight" were exact zeros, as after pruning, and the hard limit has '
        "filled them. To keep the zeros, exclude the weight with a pattern."
    ]
    assert int((model[0].weight == 0).sum()) < 24


def test_filled_zeros_warn_at_the_first_filling_step(said: Callable[[], list[str]]) -> None:
    model = pruned()
    keep = model[0].weight.detach() != 0
    model[0].weight.register_hook(lambda grad: grad * keep)  # training keeps the zeros
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wc.Regularizer(model, K).attach(optimizer)
    assert said() == []
    steps(model, optimizer)
    (message,) = said()
    assert 'Most entries of "0.weight" were exact zeros' in message
    assert "has filled them" in message


def test_no_warning_for_zeros_of_a_weight_within_its_limit(said: Callable[[], list[str]]) -> None:
    """I + N/100 with ones in N above the diagonal: kappa is about 1.02."""
    model = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(8) + 0.01 * torch.diag(torch.ones(7), 1))
    before = model.weight.detach().clone()
    reg = wc.Regularizer(model, wc.ConditionLimit(2))
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg.attach(optimizer)
    optimizer.step()
    reg.enforce()
    assert torch.equal(model.weight, before)
    assert said() == []


@pytest.mark.parametrize(
    "made",
    [
        lambda S: S.zero_(),
        nn.init.eye_,
        lambda S: S.copy_(torch.eye(24)[torch.randperm(24)]),  # a permutation
        lambda S: S.copy_(S.tril()),
        lambda S: S.mul_(torch.rand_like(S) > 0.4),
        nn.init.orthogonal_,
    ],
)
def test_no_warning_for_usual_initialisations(
    made: Callable[[Tensor], Tensor], said: Callable[[], list[str]]
) -> None:
    model = net()
    with torch.no_grad():
        made(model[0].weight)
    reg = wc.Regularizer(model, K)
    reg.attach(torch.optim.SGD(model.parameters(), 0.1))
    reg.enforce()
    assert said() == []


def test_no_warning_for_penalties_or_weights_within_limits(said: Callable[[], list[str]]) -> None:
    model = pruned()
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.1))
    reg.attach(torch.optim.SGD(model.parameters(), 0.1))
    blocks = nn.Linear(24, 24)
    with torch.no_grad():
        blocks.weight.copy_(torch.block_diag(*[torch.linalg.qr(torch.randn(4, 4))[0]] * 6))
    wc.Regularizer(blocks, K).enforce()  # mostly zeros, and left unchanged
    assert said() == []


def test_mask_applied_after_each_step_warns(said: Callable[[], list[str]]) -> None:
    """Other code sets rows to zero; only the new zeros reveal it."""
    model = net()
    rows = torch.arange(24)[:, None] < 16
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wc.Regularizer(model, K).attach(optimizer, every=1)

    def mask() -> None:
        with torch.no_grad():
            model[0].weight *= rows

    steps(model, optimizer, mask)
    (message,) = said()
    assert message.startswith('Entries of "0.weight" are set to zero after a hard limit is applied')


def test_no_warning_for_rank_one_weight_lifted_once(
    said: Callable[[], list[str]],
) -> None:
    model = net()
    with torch.no_grad():
        model[0].weight.copy_(torch.ones(24, 24))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wc.Regularizer(model, K).attach(optimizer, every=1)
    steps(model, optimizer)
    assert said() == []


class Masked(nn.Linear):
    """A layer that keeps the mask of its weight as a buffer."""

    def __init__(self, mask: Tensor, name: str = "mask") -> None:
        super().__init__(24, 24)
        self.register_buffer(name, mask)


@pytest.mark.parametrize("name", ["mask", "weight_mask", "pruning_mask_"])
@pytest.mark.parametrize("shape", [(24, 24), (24, 1), (1, 24)])
def test_mask_in_the_module_warns_once(
    name: str, shape: tuple[int, int], said: Callable[[], list[str]]
) -> None:
    model = nn.Sequential(Masked(torch.ones(shape), name), nn.Linear(24, 16))
    reg = wc.Regularizer(model, K)
    reg.attach(torch.optim.SGD(model.parameters(), 0.1))
    reg.enforce()
    (message,) = said()
    assert message.startswith('"0.weight" is under a hard limit and has a mask')


def test_other_buffers_are_not_weight_masks(
    said: Callable[[], list[str]],
) -> None:
    model = nn.Sequential(Masked(torch.ones(1, 1)), Masked(torch.ones(8, 8)), nn.BatchNorm1d(24))
    model.register_buffer("mask", torch.ones(24, 24))
    wc.Regularizer(model, K).enforce()
    assert said() == []


def test_pruned_weight_with_active_mask_is_skipped() -> None:
    model = net()
    prune.l1_unstructured(model[0], "weight", 0.8)
    assert wc.Regularizer(model, K).names == ["2.weight"]


# --- quantisation-aware training ------------------------------------------------------------------


class Quantised(nn.Linear):
    """Quantises its weight in forward, like the layers of torch.ao, torchao and others."""

    def __init__(self, attribute: str) -> None:
        super().__init__(24, 24)
        setattr(self, attribute, nn.Identity())


@pytest.mark.parametrize(
    "attribute",
    ["weight_fake_quant", "weight_fake_quantizer", "weight_quant", "weight_quantizer"],
)
def test_quantised_forward_warns_once(attribute: str, said: Callable[[], list[str]]) -> None:
    model = nn.Sequential(Quantised(attribute), nn.Linear(24, 16))
    reg = wc.Regularizer(model, K)
    reg.attach(torch.optim.SGD(model.parameters(), 0.1))
    reg.enforce()
    wc.Regularizer(model, wc.ConditionPenalty(0.1)).enforce()
    (message,) = said()
    assert message.startswith('"0.weight" is trained for quantisation: the hard limit holds for')


def test_torch_qat_layers_warn(said: Callable[[], list[str]]) -> None:
    from torch.ao.nn.qat import Conv2d, Linear
    from torch.ao.quantization import get_default_qat_qconfig

    config = get_default_qat_qconfig("fbgemm")
    model = nn.Sequential(Linear(24, 24, qconfig=config), Conv2d(3, 4, 3, qconfig=config))
    wc.enforce(model, K)
    (message,) = said()
    assert message.startswith('"0.weight", "1.weight" are trained for quantisation')


def test_no_warning_for_a_disabled_quantiser(said: Callable[[], list[str]]) -> None:
    model = nn.Sequential(Quantised("other"), nn.Linear(24, 24))
    model[1].weight_fake_quantizer = None
    wc.Regularizer(model, K).enforce()
    assert said() == []


def test_copy_warns_again(said: Callable[[], list[str]]) -> None:
    model = nn.Sequential(Quantised("weight_fake_quant"))
    reg = wc.Regularizer(model, K)
    copy.deepcopy(reg).enforce()
    reg.enforce()
    assert len(said()) == 2
