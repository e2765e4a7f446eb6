"""`enforce`: applies all hard limits of a model once, also to frozen weights such as averages."""

import copy
import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import wellcond as wc

K = wc.ConditionLimit(2.0)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 8), nn.Embedding(5, 4))


def kappa(layer: Any) -> float:
    return float(wc.condition_number(layer.weight.detach()))


class TheirEma(nn.Module):
    """Like EMA of ema-pytorch: a module with the model and its frozen average."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.online_model = model
        self.ema_model = copy.deepcopy(model).requires_grad_(False)


class ModelEma(nn.Module):
    """Like ModelEmaV3 of timm."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).eval()
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)


def test_enforce_on_frozen_average_keeps_it_frozen() -> None:
    model = net()
    ema = TheirEma(model)
    before, trained = copy.deepcopy(ema.state_dict()), model[0].weight.clone()
    assert wc.enforce(ema.ema_model, K) is None
    assert kappa(ema.ema_model[0]) <= 2.0
    assert kappa(ema.ema_model[2]) <= 2.0
    assert torch.equal(model[0].weight, trained)
    assert not any(p.requires_grad for p in ema.ema_model.parameters())
    for name, value in ema.state_dict().items():
        if not name.startswith("ema_model.") or name.endswith("bias") or "3." in name:
            assert torch.equal(value, before[name]), name


def test_enforce_on_ema_wrapper_limits_model_and_average() -> None:
    """A Regularizer selects the trained model and skips the average."""
    ema = TheirEma(net())
    wc.Regularizer(ema, K).enforce()
    assert kappa(ema.online_model[0]) <= 2.0 < kappa(ema.ema_model[0])
    flags = [p.requires_grad for p in ema.parameters()]
    wc.enforce(ema, K)
    assert kappa(ema.ema_model[0]) <= 2.0
    assert flags == [p.requires_grad for p in ema.parameters()]
    other = TheirEma(net())
    wc.enforce(other, {"ema_model.*": K})
    assert kappa(other.ema_model[0]) <= 2.0 < kappa(other.online_model[0])


@pytest.mark.parametrize(
    "average",
    [
        AveragedModel,
        lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
        lambda model: AveragedModel(model).requires_grad_(False),
        ModelEma,
        lambda model: torch.compile(ModelEma(model), backend="eager"),
        lambda model: nn.DataParallel(ModelEma(model)),
    ],
)
def test_enforce_accepts_every_kind_of_average(average: Any) -> None:
    model = average(net())
    wc.enforce(model, K)
    found = [kappa(layer) for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert len(found) == 2
    assert max(found) <= 2.0


def test_enforce_accepts_patterns() -> None:
    model = net().requires_grad_(False)
    before = kappa(model[2])
    wc.enforce(model, {"2.*": None, "*": wc.SingularValueLimit(upper=0.5)})
    assert torch.linalg.svdvals(model[0].weight).max() <= 0.5
    assert kappa(model[2]) == before
    weight = model[0].weight.clone()
    wc.enforce(model, {"0.*": wc.SingularValueLimit(upper=0.5)})
    assert torch.equal(model[0].weight, weight)  # a weight within its limit does not change
    with pytest.raises(ValueError, match="matches no parameter"):
        wc.enforce(model, {"head.*": K})
    with pytest.raises(ValueError, match="all are skipped"):
        wc.enforce(model, {"*": None})


@pytest.mark.parametrize("rule", [wc.ConditionPenalty(0.1), wc.IsometryStep(), None, 10, "K"])
def test_enforce_rejects_penalties_with_a_remedy(rule: Any) -> None:
    for given in (rule, {"0.*": rule, "*": K}):
        if rule is None and given is not None:
            continue  # in a mapping it skips the weights
        with pytest.raises(TypeError, match=r"`rule` must be a hard limit.*ConditionLimit\(10\)"):
            wc.enforce(net(), given)
    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module, got dict"):
        wc.enforce({}, K)  # type: ignore[arg-type]


def test_enforce_warns_of_pruned_weights(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    with torch.no_grad():
        model[0].weight *= torch.rand(12, 12) > 0.7
    with caplog.at_level(logging.WARNING, "wellcond"):
        wc.enforce(model, K)
    assert 'Most entries of "0.weight" were exact zeros, as after pruning' in caplog.text


def test_enforce_on_ema_pytorch() -> None:
    ema_pytorch = pytest.importorskip("ema_pytorch", reason="ema_pytorch is not installed")
    ema = ema_pytorch.EMA(net())
    wc.enforce(ema.ema_model, K)
    assert kappa(ema.ema_model[0]) <= 2.0 < kappa(ema.online_model[0])


@pytest.mark.parametrize("name", ["ModelEmaV2", "ModelEmaV3"])
def test_enforce_on_timm_averages(name: str) -> None:
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        pytest.skip("timm is not installed")
    # Only the file: the package needs torchvision.
    path = Path(spec.origin).parent / "utils" / "model_ema.py"
    loader = importlib.util.spec_from_file_location("model_ema", path)
    assert loader is not None
    assert loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    average = getattr(module, name)(net())
    wc.enforce(average, K)
    assert kappa(average.module[0]) <= 2.0
