"""Rules by role: "attention", "mlp", "head" and "embedding" in addition to patterns."""

import pytest
import torch
from torch import nn

import wellcond as wc


def encoder() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32) for _ in range(2))
    model.head = nn.Linear(16, 3)
    return model


def test_role_selects_weights() -> None:
    rules = {
        "attention": wc.SingularValueLimit(upper=0.5),
        "mlp": wc.ConditionLimit(3),
        "head": wc.ConditionPenalty(0.1),
    }
    reg = wc.Regularizer(encoder(), rules)
    names = set(reg.names)
    assert {"layers.0.self_attn.out_proj.weight", "layers.1.linear2.weight", "head.weight"} <= names
    assert not any("norm" in name for name in names)
    model = encoder()
    wc.enforce(model, {"mlp": wc.ConditionLimit(3)})
    assert wc.condition_number(model.layers[0].linear1.weight) <= 3
    assert wc.condition_number(model.layers[0].self_attn.out_proj.weight) > 3


def test_patterns_before_a_role_win() -> None:
    reg = wc.Regularizer(encoder(), {"layers.0.*": None, "attention": wc.ConditionLimit(3)})
    assert all(name.startswith("layers.1.self_attn") for name in reg.names)


def test_missing_role_is_an_error() -> None:
    with pytest.raises(ValueError, match='the pattern "attention" matches no parameter'):
        wc.Regularizer(nn.Linear(4, 4), {"attention": wc.ConditionLimit(3)})


def test_parameter_name_takes_precedence_over_a_role() -> None:
    model = nn.Module()
    model.register_parameter("head", nn.Parameter(torch.randn(4, 4)))
    model.classifier = nn.Linear(4, 4)
    assert wc.Regularizer(model, {"head": wc.ConditionLimit(3)}).names == ["head"]
