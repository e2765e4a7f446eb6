"""The matrices that a model contains, their names and patterns, and the reasons for the others."""

import pytest
import torch
from torch import nn

import wellcond as wc
from wellcond.weights.discover import find_weights

EVERYTHING = wc.ConditionPenalty(0.1)


class Conv1D(nn.Module):
    """A Linear that is stored as (in, out), as in the transformers library."""

    def __init__(self) -> None:
        super().__init__()
        self.nf = 7
        self.weight = nn.Parameter(torch.randn(3, 7))
        self.bias = nn.Parameter(torch.zeros(7))


class Experts(nn.Module):
    """One matrix per expert, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5, 3))


class Mystery(Experts):
    """A class whose use of its weight is unknown."""


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        weight.name: tuple(weight.view(weight.parameters[0]).shape)
        for weight in find_weights(model).weights
        if not weight.reason
    }


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(3, 5), {"weight": (5, 3)}),
        (nn.Bilinear(3, 4, 2), {"weight": (2, 3, 4)}),
        (Conv1D(), {"weight": (7, 3)}),
        (nn.Conv1d(4, 6, 3), {"weight": (6, 12)}),
        (nn.Conv2d(4, 6, 3, groups=2), {"weight": (2, 3, 18)}),
        (nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), {"weight": (6, 36)}),
        (nn.Conv3d(2, 3, 2), {"weight": (3, 16)}),
        (nn.ConvTranspose2d(4, 6, 3), {"weight": (4, 54)}),
        (
            nn.MultiheadAttention(8, 2),
            {f"in_proj_weight:{x}": (8, 8) for x in "qkv"} | {"out_proj.weight": (8, 8)},
        ),
        (
            nn.MultiheadAttention(8, 2, kdim=6, vdim=5),
            {
                "q_proj_weight": (8, 8),
                "k_proj_weight": (8, 6),
                "v_proj_weight": (8, 5),
                "out_proj.weight": (8, 8),
            },
        ),
        (
            nn.GRU(3, 4),
            {f"weight_ih_l0:{x}": (4, 3) for x in "rzn"}
            | {f"weight_hh_l0:{x}": (4, 4) for x in "rzn"},
        ),
        (
            nn.LSTMCell(3, 4),
            {f"weight_{y}:{x}": (4, 4 - (y == "ih")) for y in ("ih", "hh") for x in "ifgo"},
        ),
        (nn.RNN(3, 4), {"weight_ih_l0": (4, 3), "weight_hh_l0": (4, 4)}),
        (nn.LayerNorm(4), {}),
        (nn.Embedding(5, 4), {}),
        (Experts(), {"weight": (4, 5, 3)}),
        (Mystery(), {}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_views_of_each_kind_of_module(
    module: nn.Module, expected: dict[str, tuple[int, ...]]
) -> None:
    assert shapes(module) == expected


def test_every_view_shares_the_memory_of_its_parameter() -> None:
    modules = nn.ModuleList(
        [nn.Linear(3, 5), Conv1D(), nn.Conv2d(4, 6, 3), nn.MultiheadAttention(8, 2), nn.LSTM(3, 4)]
    )
    modules.append(nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last))
    for weight in find_weights(modules).weights:
        with torch.no_grad():
            weight.view(weight.parameters[0].detach()).fill_(7.0)
    for name, parameter in modules.named_parameters():
        if "bias" not in name:
            assert (parameter == 7).all(), name


def test_blocks_of_in_proj_are_those_of_query_key_and_value() -> None:
    attention = nn.MultiheadAttention(4, 2)
    blocks = dict(zip("qkv", attention.in_proj_weight.chunk(3), strict=True))
    first = find_weights(attention).weights[:3]
    assert [weight.name for weight in first] == [f"in_proj_weight:{x}" for x in "qkv"]
    for weight in first:
        torch.testing.assert_close(weight.view(weight.parameters[0]), blocks[weight.name[-1]])


def test_skipped_parameters_have_reasons() -> None:
    model = nn.ModuleDict(
        {
            "emb": nn.Embedding(5, 4),
            "norm": nn.LayerNorm(4),
            "lin": nn.Linear(4, 4),
            "experts": Mystery(),
            "para": nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
            "lazy": nn.LazyLinear(3),
        }
    )
    model["none"] = nn.Linear(4, 4, bias=False)
    model["none"].weight = nn.Parameter(torch.empty(0, 4))
    skipped = wc.Regularizer(model, EVERYTHING).skipped
    for name, text in {
        "emb.weight": "an embedding: its rows are looked up, not multiplied",
        "norm.weight": "not a matrix: a vector",
        "lin.bias": "not a matrix: a vector",
        "experts.weight": "a parameter whose use is unknown: of Mystery",
        "para.parametrizations.weight.original": str(wc.report.Reason.parametrized.value),
        "lazy.weight": "not initialised yet: run the model once first",
        "none.weight": "not a matrix: it has no entries",
    }.items():
        assert str(skipped[name]) == text


def test_tied_weights_count_once_and_match_any_name() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model["b"].weight = model["a"].weight
    assert wc.Regularizer(model, EVERYTHING).names == ["a.weight"]
    assert wc.Regularizer(model, {"b.weight": EVERYTHING}).names == ["a.weight"]


def test_a_weight_tied_to_an_embedding_is_an_embedding() -> None:
    model = nn.ModuleDict({"head": nn.Linear(4, 5, bias=False), "emb": nn.Embedding(5, 4)})
    model["emb"].weight = model["head"].weight
    model["other"] = nn.Linear(2, 2, bias=False)
    reg = wc.Regularizer(model, EVERYTHING)
    assert reg.names == ["other.weight"]
    assert reg.skipped["head.weight"].reason is wc.report.Reason.embedding
    assert wc.Regularizer(model, {"emb.weight": EVERYTHING}).names == ["head.weight"]


def test_frozen_weights_are_skipped_and_listed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    reg = wc.Regularizer(model, EVERYTHING)
    assert reg.names == ["1.weight"]
    assert str(reg.skipped["0.weight"]) == "frozen: requires_grad is False"
    model[1].requires_grad_(False)
    before = model[1].weight.clone()
    reg.proximal_step(1.0)
    reg.add_gradients()
    assert model[1].weight.grad is None
    assert torch.equal(model[1].weight, before)
    assert "now frozen" in repr(reg)


def test_the_first_pattern_that_matches_wins() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    reg = wc.Regularizer(
        model, {"0.*": wc.ConditionPenalty(0.5), "1.weight": None, "*": wc.TikhonovPenalty(0.25)}
    )
    assert {name: estimate.strength for name, estimate in reg.measure().items()} == {
        "0.weight": 0.5,
        "2.weight": 0.25,
    }
    assert str(reg.skipped["1.weight"]) == 'excluded by a pattern: "1.weight"'
    reg = wc.Regularizer(model, {"0.*": EVERYTHING})
    assert reg.skipped["1.weight"].reason is wc.report.Reason.unmatched


def test_stack_is_selected_entirely_or_by_member() -> None:
    experts = Experts()
    reg = wc.Regularizer(experts, {"weight": EVERYTHING})
    assert reg.names == ["weight"]
    assert list(reg.measure()) == [f"weight:{i}" for i in range(4)]
    one = wc.Regularizer(experts, {"weight:2": EVERYTHING})
    assert one.names == ["weight:2"]
    expected = experts.weight.detach().clone()
    expected[2] = wc.proximal_step(expected[2], 0.1 * 0.5)
    one.proximal_step(0.5)
    torch.testing.assert_close(experts.weight.detach(), expected)


@pytest.mark.parametrize(
    ("patterns", "error", "message"),
    [
        ({"nothing.*": EVERYTHING}, ValueError, 'pattern "nothing.\\*" matches no parameter'),
        ({"0": EVERYTHING}, ValueError, r'matches an entire name: write "0\.\*"\.'),
        ({"*": EVERYTHING, "0.*": None}, ValueError, "only those that an earlier pattern"),
        ({"*": None}, ValueError, "must select at least one weight"),
        ({"0.bias": EVERYTHING}, ValueError, "not a matrix: a vector"),
        ({"*.bias": EVERYTHING}, ValueError, "selects no weight"),
        ({}, ValueError, "must select at least one weight"),
        ({"*": 0.1}, TypeError, "must be a rule or map patterns"),
        (0.1, TypeError, "must be a rule or map patterns"),
    ],
)
def test_empty_selections_are_refused(
    patterns: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        wc.Regularizer(nn.Sequential(nn.Linear(3, 3)), patterns)  # type: ignore[arg-type]


def test_a_model_without_matrices_is_refused() -> None:
    for model in (nn.ReLU(), nn.LayerNorm(3)):
        with pytest.raises(ValueError, match="must have at least one weight"):
            wc.Regularizer(model, EVERYTHING)
    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module, got list"):
        wc.Regularizer([], EVERYTHING)  # type: ignore[arg-type]
