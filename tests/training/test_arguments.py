"""Arguments of a Regularizer: numbers of other libraries, patterns, penalties with arrays."""

import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import wellcond as wc
from wellcond.linalg.checks import as_count, as_number

K = wc.ConditionLimit(3.0)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


# --- numbers --------------------------------------------------------------------------------------

NUMBERS = [
    3,
    3.0,
    np.float64(3),
    np.float32(3),
    np.float16(3),
    np.int64(3),
    np.array(3.0),
    torch.tensor(3.0),
    torch.tensor(3),
    Fraction(3),
]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda x: type(x).__name__)
def test_strength_accepts_numbers_of_other_libraries(number: Any) -> None:
    assert as_number(number, "x") == 3
    assert type(as_number(number, "x")) in (int, float)
    assert wc.ConditionLimit(number) == wc.ConditionLimit(3)
    assert wc.SingularValueLimit(lower=number, upper=number) == wc.SingularValueLimit(
        lower=3, upper=3
    )
    assert wc.ConditionPenalty(number) == wc.ConditionPenalty(3)
    assert wc.SpectralNormPenalty(1.0, number) == wc.SpectralNormPenalty(1.0, 3)
    assert wc.OrthogonalityPenalty(1.0, number) == wc.OrthogonalityPenalty(1.0, 3)
    assert wc.IsometryStep(scale=number) == wc.IsometryStep(scale=3)
    S = torch.randn(4, 4)
    assert torch.equal(wc.nearest(S, number), wc.nearest(S, 3))
    reg = wc.Regularizer(net(), K)
    reg.proximal_step(number)
    assert repr(wc.Regularizer(net(), wc.ConditionLimit(number))).count("np.") == 0


@pytest.mark.parametrize("thing", ["3", b"3", True, np.bool_(True), torch.tensor(True), None, [3]])
def test_strength_rejects_non_numbers(thing: Any) -> None:
    rules: list[Any] = [
        wc.ConditionLimit,
        wc.ConditionPenalty,
        wc.OrthogonalityPenalty,
        lambda x: wc.SpectralNormPenalty(1.0, x),
        lambda x: wc.IsometryStep(theta=x),
        lambda x: wc.ConditionPenalty(lambda step: x).strength_at(0),
        lambda x: wc.nearest(torch.eye(2), x),
        lambda x: wc.Regularizer(net(), K).proximal_step(x),
    ]
    if thing is not None:
        rules += [lambda x: wc.SingularValueLimit(upper=x), lambda x: wc.IsometryStep(scale=x)]
    for rule in rules:
        with pytest.raises(TypeError, match=r"` must be a number.*, got "):
            rule(thing)


@pytest.mark.parametrize("number", NUMBERS, ids=lambda x: type(x).__name__)
def test_matrix_step_accepts_numbers_of_other_libraries(number: Any) -> None:
    S = torch.diag(torch.tensor([4.0, 1.0]))
    assert torch.equal(wc.proximal_step(S, number), wc.proximal_step(S, float(number)))


@pytest.mark.parametrize(
    "thing", ["1", True, np.bool_(True), torch.tensor(True), None, [1.0], torch.tensor(1j), 1j]
)
def test_matrix_step_rejects_non_numbers(thing: Any) -> None:
    with pytest.raises(TypeError, match="`step` must be a number, got"):
        wc.proximal_step(torch.eye(3), thing)
    with pytest.raises(TypeError, match="`lr` must be a number, got"):
        wc.Regularizer(net(), wc.ConditionPenalty(0.1)).proximal_step(thing)


@pytest.mark.parametrize("count", [4, np.int64(4), np.uint8(4), np.array(4), torch.tensor(4)])
def test_counts_accept_integers_of_other_libraries(count: Any) -> None:
    assert as_count(count, "x") == 4
    model = net()
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.1), block_size=count)
    assert reg.block_size == 4
    assert type(reg.block_size) is int
    assert wc.Monitor(model, block_size=count).block_size == 4
    reg.proximal_step(0.1, steps=count)
    assert reg.attach(torch.optim.SGD(model.parameters(), 0.1), every=count).every == 4
    assert reg.log(lambda values, step: None, step=8, every=count)


@pytest.mark.parametrize("count", [0, -1, 4.0, "4", True, np.bool_(True), np.float32(4), [4]])
def test_counts_reject_other_values(count: Any) -> None:
    model = net()
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for use in (
        lambda: wc.Regularizer(model, K, block_size=count),
        lambda: wc.Monitor(model, block_size=count),
        lambda: reg.proximal_step(0.1, steps=count),
        lambda: reg.attach(optimizer, every=count),
        lambda: reg.log(lambda values, step: None, every=count),
    ):
        with pytest.raises(ValueError, match=r"` must be a positive integer, got "):
            use()


# --- penalties with other attributes than numbers -------------------------------------------------


class Target(wc.Penalty):
    needs = frozenset()

    def __init__(self, strength: float, target: Any) -> None:
        super().__init__(strength)
        self.target = target

    def evaluate(self, S: Any, image: Any) -> tuple[Tensor, wc.rules.Gradient]:
        X = S.dense()
        return X.sum(dim=(-2, -1)), wc.rules.Gradient(torch.ones_like(X))


@dataclasses.dataclass(eq=True)
class Bounded(wc.Limit):
    bound: Any

    def apply(self, S: Tensor) -> Tensor:
        return S.clamp(max=0.0)


@pytest.mark.parametrize("array", [torch.ones(3), np.ones(3), [torch.ones(3)], (torch.ones(3), 1)])
def test_rules_with_arrays_are_grouped_by_identity(array: Any) -> None:
    def copied(x: Any) -> Any:
        if isinstance(x, list | tuple):
            return type(x)(map(copied, x))
        return x.clone() if isinstance(x, Tensor) else x.copy() if hasattr(x, "copy") else x

    model = net()
    for kind in (lambda x: Target(1.0, x), Bounded):
        one, same, other = kind(array), kind(array), kind(copied(array))
        if isinstance(one, wc.Penalty):
            assert one == same or not isinstance(array, tuple | Tensor | np.ndarray)
            assert one != other
            assert len({one, same, other}) >= 2
        for rules in ({"0.*": one, "2.*": other}, {"*": one}):
            reg = wc.Regularizer(model, rules)
            reg.add_gradients() if isinstance(one, wc.Penalty) else reg.enforce()


def test_penalties_with_equal_numbers_are_equal() -> None:
    assert wc.ConditionPenalty(1.0) == wc.ConditionPenalty(1)
    assert hash(wc.ConditionPenalty(1.0)) == hash(wc.ConditionPenalty(1))
    assert wc.ConditionPenalty(1.0) != wc.ConditionPenalty(2.0)
    assert wc.ConditionPenalty(1.0) != wc.TikhonovPenalty(1.0)
    schedule = math.exp
    assert wc.ConditionPenalty(schedule) == wc.ConditionPenalty(schedule)
    assert wc.ConditionPenalty(schedule) != wc.ConditionPenalty(lambda step: 1.0)
    assert wc.OrthogonalityPenalty(1.0, 1.0) != wc.OrthogonalityPenalty(1.0, 2.0)


# --- patterns -------------------------------------------------------------------------------------


def test_pattern_mapped_to_none_may_match_nothing() -> None:
    layer = nn.Linear(4, 4, bias=False)
    for patterns in (
        {"weight": K, "*": None},
        {"head.*": None, "*": K},
        {"weight": K, "weight:q": None, "bias": None},
    ):
        assert wc.Regularizer(layer, patterns).names == ["weight"]
    with pytest.raises(ValueError, match="matches no parameter"):
        wc.Regularizer(layer, {"head.*": K, "*": None})


@pytest.mark.parametrize("given", [None, 3.0, "Condition", K.max_condition, [K], {"*": "K"}])
def test_rules_of_wrong_type_are_rejected(given: Any) -> None:
    with pytest.raises(TypeError, match=r"`rules` must be a rule or map"):
        wc.Regularizer(net(), given)


@pytest.mark.parametrize("view", ["operator", "merged", "delta", "qk3", "vo"])
def test_pattern_for_an_audit_view_is_explained(view: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    for pattern in (f"0.weight:{view}", f"*:{view}"):
        with pytest.raises(ValueError, match=rf'":{view}" can be measured by audit\(\), but'):
            wc.Regularizer(model, {pattern: K})
    with pytest.raises(ValueError, match="matches no parameter") as caught:
        wc.Regularizer(model, {"1.weight": K})
    assert "audit()" not in str(caught.value)


def test_pattern_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="`patterns`: the pattern"):
        wc.Monitor(net(), "head.*")
    with pytest.raises(ValueError, match="`rule`: the pattern"):
        wc.enforce(net(), {"head.*": K})


# --- states ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [1, None, b"*", ("0.weight",)])
def test_pattern_must_be_str(pattern: Any) -> None:
    for call, parameter in (
        (lambda: wc.enforce(net(), {pattern: K}), "rule"),
        (lambda: wc.Regularizer(net(), {pattern: wc.ConditionPenalty(0.1)}), "rules"),
        (lambda: wc.Monitor(net(), [pattern]), "patterns"),
    ):
        with pytest.raises(TypeError, match=f"`{parameter}` must have patterns of type str, got"):
            call()


@pytest.mark.parametrize(
    ("method", "computed", "parts"),
    [
        ("spectral_norm", nn.utils.spectral_norm, '"0.weight_orig"'),
        ("weight_norm", nn.utils.weight_norm, '"0.weight_g", "0.weight_v"'),
        ("pruning", lambda m: prune.l1_unstructured(m, "weight", 0.5), '"0.weight_orig"'),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_pattern_for_a_computed_weight_names_its_parts(
    method: str, computed: Any, parts: str
) -> None:
    model = net()
    computed(model[0])
    for call in (
        lambda: wc.Regularizer(model, {"0.weight": K}),
        lambda: wc.enforce(model, {"0.weight": K}),
        lambda: wc.Monitor(model, ["0.weight"]),
    ):
        with pytest.raises(ValueError, match=f'"0.weight" is computed by {method} from {parts}'):
            call()


def test_checksums_name_meta_weights() -> None:
    with torch.device("meta"):
        model = net()
    with pytest.raises(ValueError, match=r'"0\.weight", "2\.weight" .*a meta tensor'):
        wc.Regularizer(model, K).checksums()


def test_load_state_dict_rejects_wrong_types() -> None:
    reg = wc.Regularizer(nn.Linear(4, 4, bias=False), wc.ConditionPenalty(0.1))
    good = reg.state_dict()
    for bad, says in (
        (None, "`state` must be a mapping of weight names"),
        ([1], "`state` must be a mapping of weight names"),
        ({"weight": None}, r'`state\["weight"\]` must be a mapping of tensors, got NoneType'),
        ({"weight": torch.ones(3)}, r'`state\["weight"\]` must be a mapping of tensors, got Tens'),
        ({"weight": {**good["weight"], "step": 3}}, r'\["step"\]` must be a tensor, got int'),
        ({"weight": {**good["weight"], "basis": [[1.0]]}}, r'\["basis"\]` must be a tensor, got l'),
    ):
        with pytest.raises(TypeError, match=says):
            reg.load_state_dict(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must have exactly the weights of this regulariser"):
        reg.load_state_dict({})
    reg.load_state_dict(good)


# --- print(reg) under limits ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        (K, "before the last application: κ 8, 2.667 times its limit"),
        (wc.SingularValueLimit(upper=2.0), "before the last application: σ₁ 4, 2 times its limit"),
        (wc.SingularValueLimit(lower=1.0), "before the last application: σ_ν 0.5, 2 times its lim"),
        (wc.SingularValueLimit(lower=1.0, upper=2.0), "before the last application: 2 times its "),
    ],
)
def test_repr_prints_the_limited_value(limit: wc.Limit, says: str) -> None:
    layer = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5])))
    reg = wc.Regularizer(layer, limit)
    reg.proximal_step(0.0)
    assert says in repr(reg)


def test_repr_is_about_ten_lines() -> None:
    layers = [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(40)]
    model = nn.Sequential(nn.Embedding(3, 4), *layers)
    limit = wc.SingularValueLimit(upper=2.0)
    with torch.no_grad():
        for k, layer in enumerate(model[1:]):
            layer[0].weight.copy_(torch.eye(4) * (1 + (7 * k) % 40))
    reg = wc.Regularizer(model, limit)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    reg.attach(optimizer)
    model(torch.tensor([0, 1])).sum().backward()
    for _ in range(2):
        optimizer.step()
    text = repr(reg)
    assert len(text.splitlines()) <= 10
    assert f"all: {limit!r}; watched" in text
    assert "and 35 more, see reg.names" in text
    assert "skipped 121, see reg.skipped: 0.weight (an embedding: its rows are looked up" in text
    assert "and 118 more (not a matrix: a vector)" in text
    estimates = reg.measure()
    worst = sorted(reg.names, key=lambda name: -(estimates[name].excess or 0))[:5]
    assert [line.split()[0] for line in text.splitlines() if "4x4" in line] == worst
    model[1][0].weight.requires_grad_(False)
    assert "1.0.weight" in repr(reg).splitlines()[2]  # problems come first
    assert "now frozen" in repr(reg)


def test_repr_after_detach() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reg = wc.Regularizer(model, K)
    reg.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    reg.detach()
    end = "detached after 3 steps: only enforce() applies the limits"
    assert repr(reg).endswith(end)
