"""Weights that hooks of torch.nn.utils compute are measured as in a forward pass in eval mode."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import wellcond as wc
from wellcond.weights.reasons import Reason

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def moved(layer: nn.Module) -> nn.Module:
    """Changes the parameters like an optimizer step, so that the computed attribute is stale."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    return layer


def pruned(layer: nn.Module) -> nn.Module:
    prune.ln_structured(layer, "weight", amount=0.3, n=2, dim=0)
    return layer


def pruned_twice(layer: nn.Module) -> nn.Module:
    prune.l1_unstructured(layer, "weight", amount=0.2)
    prune.random_unstructured(layer, "weight", amount=0.2)
    return layer


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "spectral_norm": torch.nn.utils.spectral_norm,
    "weight_norm": torch.nn.utils.weight_norm,
    "weight_norm of the whole": lambda layer: torch.nn.utils.weight_norm(layer, dim=None),
    "pruning": pruned,
    "pruning twice": pruned_twice,
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(9, 6), (9,)),
    "convolution": (lambda: nn.Conv2d(3, 5, 2), (3, 4, 4)),
    "groups": (lambda: nn.Conv1d(4, 6, 3, groups=2), (4, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(3, 4, 2), (3, 5)),
}


def acting(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The weight that a forward pass in eval mode leaves in the attribute."""
    layer.eval()
    with torch.no_grad():
        layer(torch.zeros(1, *shape))
    weight: Tensor = layer.weight
    return weight.detach().clone()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_computed_weight_is_measured_without_changes(way: str, kind: str, training: bool) -> None:
    make, shape = LAYERS[kind]
    layer = make()
    layer(torch.randn(2, *shape))
    layer = moved(WAYS[way](layer)).train(training)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    stale = layer.weight.detach().clone()
    report = wc.audit(nn.Sequential(layer))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert torch.equal(layer.weight, stale)
    assert layer.training is training

    expected = make()
    expected.weight.data = acting(layer, shape)
    assert not torch.equal(expected.weight, stale)
    plain = wc.audit(nn.Sequential(expected))
    assert [f.label for f in report.findings] == [f.label for f in plain.findings]
    for found, wanted in zip(report.findings, plain.findings, strict=True):
        assert found.sigma_max == pytest.approx(wanted.sigma_max, rel=1e-6)
        assert found.sigma_min == pytest.approx(wanted.sigma_min, rel=1e-6, abs=1e-12)
        assert found.detail == wanted.detail
    assert report.coverage.measured == plain.coverage.measured
    assert report.coverage.parameter_share == plain.coverage.parameter_share
    parts = {n: s for n, s in report.coverage.skipped.items() if s.reason is Reason.component}
    assert parts
    assert all(name.startswith("0.weight_") for name in parts)


def test_computed_weight_after_load_state_dict_is_current() -> None:
    first, second = (torch.nn.utils.spectral_norm(nn.Linear(7, 5)) for _ in range(2))
    first(torch.randn(3, 7)), second(torch.randn(3, 7))
    first.load_state_dict(second.state_dict())
    (found,) = wc.audit(first).findings
    expected = wc.condition_number(acting(second, (7,)))
    assert found.condition_number == pytest.approx(float(expected), rel=1e-6)


def test_pruned_row_gives_infinite_kappa() -> None:
    layer = pruned(nn.Linear(20, 12))
    (found,) = wc.audit(layer).findings
    assert (found.label, found.condition_number) == ("weight", torch.inf)
    prune.remove(layer, "weight")
    (found,) = wc.audit(layer).findings
    assert (found.label, found.condition_number) == ("weight", torch.inf)


def test_computed_weights_of_lstm_and_attention_are_split() -> None:
    lstm = torch.nn.utils.weight_norm(nn.LSTM(4, 3), "weight_hh_l0")
    labels = {f.label for f in wc.audit(moved(lstm)).findings}
    assert labels == {f"weight_{side}_l0:{gate}" for side in ("ih", "hh") for gate in "ifgo"}
    attention = nn.MultiheadAttention(8, 2)
    prune.l1_unstructured(attention, "in_proj_weight", amount=0.5)
    report = wc.audit(attention)
    assert {f.label for f in report.findings} == {
        *(f"in_proj_weight:{block}" for block in "qkv"),
        "out_proj.weight",
    }
    q = next(f for f in report.findings if f.view == "q")
    kept = attention.in_proj_weight_orig * attention.in_proj_weight_mask
    assert q.condition_number == pytest.approx(float(wc.condition_number(kept[:8])), rel=1e-9)


def test_stale_out_proj_of_attention_is_used() -> None:
    """Attention never calls the layer, so no hook updates the attribute."""
    attention = nn.MultiheadAttention(8, 2).eval()
    torch.nn.utils.weight_norm(attention.out_proj)
    attention.out_proj.weight_g.data.mul_(torch.rand(8, 1) + 0.1)
    x = torch.randn(1, 3, 8)
    with torch.no_grad():
        y = attention(x, x, x, need_weights=False)[0]
        plain = nn.MultiheadAttention(8, 2).eval()
        state = {k: v for k, v in attention.state_dict().items() if "out_proj.w" not in k}
        plain.load_state_dict(state | {"out_proj.weight": attention.out_proj.weight})
        torch.testing.assert_close(plain(x, x, x, need_weights=False)[0], y)
    found = next(f for f in wc.audit(attention).findings if f.name == "out_proj.weight")
    expected = wc.condition_number(attention.out_proj.weight.detach())
    assert found.condition_number == pytest.approx(float(expected), rel=1e-9)


def test_normed_embedding_is_skipped() -> None:
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Embedding(8, 4)), nn.Linear(4, 3))
    report = wc.audit(model)
    assert [f.label for f in report.findings] == ["1.weight"]
    assert report.coverage.skipped["0.weight"].reason is Reason.embedding


def test_weight_of_unknown_hook_is_skipped() -> None:
    layer = nn.Linear(4, 4)
    orig = layer.weight
    del layer._parameters["weight"]
    layer.register_parameter("weight_orig", orig)
    layer.weight = 2 * orig.detach()
    layer.register_forward_pre_hook(lambda m, _: setattr(m, "weight", 2 * m.weight_orig))
    report = wc.audit(nn.Sequential(layer, nn.Linear(4, 3)))
    assert [f.label for f in report.findings] == ["1.weight"]
    skipped = report.coverage.skipped
    assert str(skipped["0.weight"]) == (
        "computed before each forward pass by an unknown method: from weight_orig"
    )
    assert skipped["0.weight_orig"].reason is Reason.component
    assert report.coverage.parameter_share == pytest.approx(12 / (16 + 4 + 12 + 3))


def test_missing_part_of_computed_weight_is_a_reason() -> None:
    layer = torch.nn.utils.spectral_norm(nn.Linear(4, 4))
    del layer._buffers["weight_u"]
    report = wc.audit(nn.Sequential(layer, nn.Linear(4, 3)))
    assert report.coverage.skipped["0.weight"].reason is Reason.uncomputed
    assert [f.label for f in report.findings] == ["1.weight"]


@pytest.mark.parametrize("way", WAYS)
def test_limits_skip_parts_of_computed_weights(way: str) -> None:
    model = nn.Sequential(WAYS[way](nn.Linear(5, 5)), nn.Linear(5, 5))
    reg = wc.Regularizer(model, wc.ConditionLimit(3.0))
    assert reg.names == ["1.weight"]
    parts = [why for why in reg.skipped.values() if why.reason is Reason.component]
    assert parts
    for why in parts:
        assert str(why).startswith(f"{Reason.component.value}: weight by")


def test_limit_on_a_part_by_exact_name_warns(
    caplog: pytest.LogCaptureFixture,
) -> None:
    layer = pruned(nn.Linear(20, 12))
    with caplog.at_level(logging.WARNING, logger="wellcond"):
        reg = wc.Regularizer(layer, {"weight_orig": wc.ConditionLimit(3.0)})
    (record,) = caplog.records
    assert record.getMessage().startswith(
        '"weight_orig" is a part from which weight is computed by pruning: wellcond regularises '
    )
    assert "a part from which weight is computed by pruning: the rule acts on that" in repr(reg)
    reg.enforce()
    assert float(wc.condition_number(layer.weight_orig.detach())) <= 3
    (found,) = wc.audit(layer).findings
    assert found.condition_number == torch.inf
    (found,) = wc.audit(layer, include=["weight_orig"]).findings
    assert found.detail == "a part from which weight is computed, not the effective weight"


def test_computed_weight_passes_through_own_forward() -> None:
    class Masked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.tril())

    layer = moved(torch.nn.utils.weight_norm(Masked(6, 6)))
    (found,) = wc.audit(layer).findings
    expected = wc.condition_number(acting(layer, (6,)).tril())
    assert found.condition_number == pytest.approx(float(expected), rel=1e-6)


def test_operator_of_convolution_uses_computed_kernel() -> None:
    layer = moved(torch.nn.utils.spectral_norm(nn.Conv2d(3, 4, 2)))
    plain = nn.Conv2d(3, 4, 2)
    plain.weight.data = acting(layer, (3, 5, 5))
    example = torch.zeros(1, 3, 5, 5)
    found, expected = (wc.audit(one, example=example).findings[0] for one in (layer, plain))
    assert found.label == "weight:operator"
    assert found.sigma_max == pytest.approx(expected.sigma_max, rel=1e-6)
    assert found.condition_number == pytest.approx(expected.condition_number, rel=1e-6)
