"""Many weights at once: they are grouped, but each is treated independently."""

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wellcond as wc
from oracles import gradient, penalty
from registry import ProductMatrix
from wellcond.operators.base import WeightOperator
from wellcond.training.deferred import DeferredChecks
from wellcond.training.engine import Engine
from wellcond.training.state import WeightState
from wellcond.weights.discover import Source, Weight


class Bound(wc.Penalty):
    """1/2 (sigma_1 - target)_+^2, with a field in addition to the strength."""

    def __init__(self, strength: float, target: float) -> None:
        super().__init__(strength)
        self.target = target

    def evaluate(self, S: Any, image: Any) -> tuple[Tensor, wc.rules.Gradient]:
        sigma = image.top.sigma[..., 0]
        excess = (sigma - self.target).clamp_min(0)
        U = (excess / sigma)[..., None, None] * image.top.left
        return excess.square() / 2, wc.rules.Gradient(
            wc.rules.LowRank(sigma * 0, U, image.top.right)
        )


class Ky(wc.Penalty):
    """1/2 the sum of the squares of the k values of the block: as many columns as the block."""

    def evaluate(self, S: Any, image: Any) -> tuple[Tensor, wc.rules.Gradient]:
        ritz = image.triplets
        c = ritz.sigma[..., 0] * 0
        return ritz.sigma.square().sum(-1) / 2, wc.rules.Gradient(
            wc.rules.LowRank(c, ritz.left, ritz.right)
        )


class Ones(wc.Penalty):
    """1/2 ||S - 1||_F^2, whose gradient S - 1 is dense here."""

    needs = frozenset()

    def evaluate(self, S: Any, image: None) -> tuple[Tensor, wc.rules.Gradient]:
        difference = torch.ones(S.shape, dtype=S.dtype, device=S.device)
        eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device).expand(*S.shape[:-2], -1, -1)
        difference = S.matmat(eye) - difference
        return difference.square().sum((-2, -1)) / 2, wc.rules.Gradient(difference)


def net(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*layers).double()


def gradients(model: nn.Module, reg: wc.Regularizer) -> list[Tensor]:
    """Gradients by backward of reg() and by add_gradients, which must be equal."""
    other = copy.deepcopy(reg)
    model.zero_grad()
    reg().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    copied = [state.weight.parameters[0] for state in other._states]
    other.add_gradients()
    for one, expected in zip(copied, grads, strict=True):
        torch.testing.assert_close(one.grad, expected)
    return grads


def test_weights_are_grouped_by_equality_of_penalties() -> None:
    """A common target would give the second layer the gradient of the first."""
    model = net(6, 6, 6, 6)
    targets = [0.1, 0.5, 0.1]
    reg = wc.Regularizer(
        model, {f"{i}.weight": Bound(2.0, target) for i, target in enumerate(targets)}, block_size=6
    )
    for _ in range(60):
        reg.add_gradients()
    for grad, layer, target in zip(gradients(model, reg), model, targets, strict=True):
        S = layer.weight.detach()
        U, sigma, Vh = torch.linalg.svd(S)
        expected = 2 * (sigma[0] - target).clamp_min(0) * torch.outer(U[:, 0], Vh[0])
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("block_size", [2, 5])
def test_gradient_rank_depending_on_the_block(block_size: int) -> None:
    model = net(5, 5, 5)
    grads = gradients(model, wc.Regularizer(model, Ky(1.0), block_size=block_size))
    assert [int(torch.linalg.matrix_rank(grad)) for grad in grads] == [block_size, block_size]


def test_dense_gradient() -> None:
    model = net(4, 4, 4, 3)
    for grad, layer in zip(gradients(model, wc.Regularizer(model, Ones(0.5))), model, strict=True):
        torch.testing.assert_close(grad, 0.5 * (layer.weight.detach() - 1))


@pytest.mark.parametrize(
    "own", [Bound(1.0, 0.1), Ky(0.3), Ones(0.5)], ids=lambda p: type(p).__name__
)
def test_user_penalties_compile(own: wc.Penalty) -> None:
    model = net(4, 4, 4)
    eager = wc.Regularizer(model, own, block_size=3)
    reg = copy.deepcopy(eager)
    parameters = [state.weight.parameters[0] for state in reg._states]
    torch.compile(lambda: reg(), fullgraph=True, backend="aot_eager")().backward()
    eager().backward()
    for one, other in zip(model.parameters(), parameters, strict=True):
        torch.testing.assert_close(other.grad, one.grad)


def test_one_eigenproblem_per_group(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda A: calls.append(A.shape) or real(A))
    model = net(6, 6, 6, 4)
    reg = wc.Regularizer(model, wc.ConditionPenalty(1.0), block_size=3)
    reg().backward()
    assert sorted(map(tuple, calls)) == [(2, 3, 3), (3, 3)]


def test_unfrozen_weight_rejoins_its_group() -> None:
    """After an odd number of frozen steps its block is on the other side, and is moved."""
    model = net(9, 9, 9, 9)
    reg = wc.Regularizer(model, wc.ConditionPenalty(1.0), block_size=4)
    for frozen in (True, False):
        model[1].weight.requires_grad_(not frozen)
        for _ in range(3 if frozen else 60):
            reg.add_gradients()
    assert len({state.subspace.from_right for state in reg._states}) == 1
    model.zero_grad()
    reg.add_gradients()
    for layer in model:
        S = layer.weight.detach()
        torch.testing.assert_close(layer.weight.grad, gradient(S), rtol=1e-3, atol=1e-4)
    assert {name: e.step for name, e in reg.measure().items()} == {
        "0.weight": 64,
        "1.weight": 61,
        "2.weight": 64,
    }


@dataclass(frozen=True)
class Factored(Weight):
    """B A, like an adapter of two parameters."""

    def operator(self, parameters: Sequence[Tensor], seed: int = 0) -> WeightOperator:
        return ProductMatrix(*(one.detach() for one in parameters))


class Adapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(3)
        self.B = nn.Parameter(torch.randn(9, 3, generator=source, dtype=torch.float64))
        self.A = nn.Parameter(torch.randn(3, 7, generator=source, dtype=torch.float64))

    def weight(self, name: str = "ba") -> Factored:
        return Factored(name, (name,), (Source(self, "B"), Source(self, "A")))


def test_weight_of_several_parameters_gets_gradients() -> None:
    first, second = Adapter(), Adapter()
    states = [
        WeightState(one.weight(name), wc.ConditionPenalty(0.7), block_size=3)
        for one, name in ((first, "first"), (second, "second"))
    ]
    engine = Engine(states, None, check_replicas=False)
    for _ in range(40):
        engine.total(engine.parameters(), remember=True)
    engine.penalty().backward()
    for one in (first, second):
        B, A = (p.detach().clone().requires_grad_() for p in (one.B, one.A))
        S = B @ A
        # nu = min(m, n) of the product, though its rank is 3.
        value = torch.linalg.matrix_norm(S, 2).square() / 2 - S.square().sum() / (2 * 7)
        expected = torch.autograd.grad(0.7 * value, (B, A))
        torch.testing.assert_close(one.B.grad, expected[0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(one.A.grad, expected[1], rtol=1e-5, atol=1e-7)


def test_frozen_parameter_of_trained_weight_gets_no_gradient() -> None:
    one = Adapter()
    one.A.requires_grad_(False)
    state = WeightState(one.weight(), wc.ConditionPenalty(1.0), block_size=3)
    Engine([state], None, check_replicas=False).penalty().backward()
    assert one.A.grad is None
    assert one.B.grad is not None
    assert one.B.grad.any()


# --- deferred reads -------------------------------------------------------------------------------


class Elsewhere:
    """Flags on a device that runs behind the host."""

    is_cpu, device = False, torch.device("cpu")

    def __init__(self, *flags: bool) -> None:
        self.flags = torch.tensor(flags)

    def to(self, device: str, non_blocking: bool) -> Tensor:
        return self.flags


class Event:
    made: list["Event"]

    def __init__(self, device: torch.device) -> None:
        self.done = False
        Event.made.append(self)

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return self.done


def test_no_flag_is_lost_when_the_host_runs_ahead_of_a_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three checks are pending before the first arrives; the second one fails."""
    monkeypatch.setattr(torch, "Event", Event)
    Event.made = []
    checks, refused = DeferredChecks(), []
    for step in range(3):
        flags = Elsewhere(True, step != 1)
        checks.add(flags, lambda f, step=step: refused.append(step) if not all(f) else None)  # type: ignore[arg-type,misc]
    checks.raise_ready()
    assert refused == []
    for event in Event.made:
        event.done = True
    checks.raise_ready()
    assert refused == [1]
    checks.raise_ready()
    assert refused == [1]


@pytest.mark.parametrize("lr", [-0.1, math.nan, math.inf])
def test_tensor_learning_rate_is_checked(lr: float) -> None:
    layer = net(4, 4)
    before = layer[0].weight.clone()
    reg = wc.Regularizer(layer, wc.ConditionPenalty(1.0))
    with pytest.raises(ValueError, match="`lr` must be finite and not negative"):
        reg.proximal_step(torch.tensor(lr))
    assert torch.equal(layer[0].weight, before)
    with pytest.raises(ValueError, match="`lr` must be one number"):
        reg.proximal_step(torch.tensor([0.1, 0.2]))


def test_device_learning_rate_is_checked_without_waiting() -> None:
    """It counts as 0 until the flag arrives, and then raises."""
    layer = net(4, 4)
    engine = wc.Regularizer(layer, wc.ConditionPenalty(1.0))._engine
    seen: list[Any] = []
    engine._checks.add = lambda flags, refuse: seen.append((flags, refuse))  # type: ignore[method-assign]
    assert [float(engine.check_rates(torch.tensor(x))) for x in (0.5, -0.5, math.nan)] == [
        0.5,
        0,
        0,
    ]
    for (flags, refuse), good in zip(seen, (True, False, False), strict=True):
        assert flags.tolist() == [good]
        if good:
            refuse(flags.tolist())
        else:
            with pytest.raises(ValueError, match="`lr` must be finite and not negative"):
                refuse(flags.tolist())


# --- unusual kernels ------------------------------------------------------------------------------


def with_gaps(groups: int = 1) -> nn.Conv2d:
    """A convolution whose kernel is a slice of a larger one, which no view can flatten."""
    torch.manual_seed(1)
    conv = nn.Conv2d(4 * groups, 8, 3, groups=groups, bias=False)
    conv.weight = nn.Parameter(torch.randn(8, 4, 5, 5)[:, :, :3, :3])
    assert not conv.weight.is_contiguous()
    return conv


def plain(conv: nn.Conv2d) -> nn.Conv2d:
    other = copy.deepcopy(conv)
    other.weight = nn.Parameter(conv.weight.detach().clone(memory_format=torch.contiguous_format))
    return other


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "penalty", [wc.ConditionPenalty(0.5), wc.TikhonovPenalty(0.5), wc.ConditionLimit(1.5)], ids=str
)
def test_rules_on_a_noncontiguous_kernel(penalty: Any, groups: int) -> None:
    gaps = with_gaps(groups)
    whole = plain(gaps)
    before = gaps.weight.detach().clone()
    for conv in (gaps, whole):
        reg = wc.Regularizer(conv, penalty, block_size=8)
        if isinstance(penalty, wc.Penalty):
            reg().backward()
            reg.add_gradients()
        reg.proximal_step(0.3)
    torch.testing.assert_close(gaps.weight, whole.weight)
    assert not torch.equal(gaps.weight, before)
    if isinstance(penalty, wc.Penalty):
        torch.testing.assert_close(gaps.weight.grad, whole.weight.grad)
        assert whole.weight.grad.any()


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d])
def test_convolution_groups_are_separate_matrices(kind: type[nn.Module]) -> None:
    conv = kind(6, 12, 3, groups=3, bias=False).double()
    reg = wc.Regularizer(conv, wc.ConditionPenalty(1.0), block_size=8)
    assert reg.names == ["weight"]
    kernels = conv.weight.detach().flatten(1).chunk(3)
    assert list(reg.measure()) == ["weight:group0", "weight:group1", "weight:group2"]
    total = sum(float(penalty(S)) for S in kernels)
    torch.testing.assert_close(float(reg().detach()), total, rtol=1e-6, atol=0)
    one = wc.Regularizer(conv, {"weight:group1": wc.ConditionPenalty(1.0), "*": None}, block_size=8)
    assert one.names == ["weight:group1"]
    torch.testing.assert_close(float(one().detach()), float(penalty(kernels[1])), rtol=1e-6, atol=0)


def test_depthwise_convolution_is_skipped_unless_named() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1))
    reg = wc.Regularizer(model, wc.ConditionPenalty(1.0))
    assert reg.names == ["1.weight"]
    assert reg.skipped["0.weight"] == wc.report.Skipped(wc.report.Reason.one_row, "4 groups")
    # Its filters are the blocks of one map. A limit acts on the map, and an audit measures it.
    assert wc.Regularizer(model, wc.ConditionLimit(5.0)).names == ["0.weight", "1.weight"]
    assert wc.Regularizer(model, {"0.weight": wc.TikhonovPenalty(1.0)}).names == ["0.weight"]
    with pytest.raises(ValueError, match="one row per group"):
        wc.Regularizer(model, {"0.*": wc.ConditionPenalty(1.0), "*": None})


# --- penalties without a proximal step ------------------------------------------------------------


def test_missing_proximal_step_error_names_alternatives() -> None:
    model = net(4, 4)
    reg = wc.Regularizer(model, Bound(1.0, 0.1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for call in (lambda: reg.attach(optimizer), lambda: reg.proximal_step(0.1)):
        with pytest.raises(ValueError, match=r'"0\.weight" is under Bound\(.*add_gradients'):
            call()


class Careless(wc.Penalty):
    """Returns wrong shapes or types, or ignores that weights form a stack."""

    def __init__(self, returns: Any) -> None:
        super().__init__(1.0)
        self.returns = returns

    def evaluate(self, S: Any, image: Any) -> Any:
        return self.returns(S, image.top)


@pytest.mark.parametrize(
    ("returns", "error", "message"),
    [
        (
            lambda S, top: (
                top.sigma,
                wc.rules.Gradient(wc.rules.LowRank(top.sigma, top.left, top.right)),
            ),
            ValueError,
            r"\(2,\), \(2, 4, 1\), \(2, 4, 1\)\] for a weight of shape .*, got \[\(2, 1\),",
        ),
        (
            lambda S, top: (top.sigma[..., 0], wc.rules.Gradient(top.left)),
            ValueError,
            r"\(2, 4, 4\)\] for a weight.*got \[.*\(2, 4, 1\)\]",
        ),
        (
            lambda S, top: (top.sigma[..., 0], wc.rules.NewWeight(S.dense())),
            TypeError,
            r"\(Tensor, Gradient\), got one with a NewWeight",
        ),
        (lambda S, top: (1.0, None), TypeError, "got one with a NoneType"),
    ],
    ids=["a vector for a number", "a dense gradient of another shape", "a new weight", "nothing"],
)
def test_penalty_with_wrong_shapes_is_rejected(
    returns: Any, error: type[Exception], message: str
) -> None:
    reg = wc.Regularizer(net(4, 4, 4), Careless(returns))
    for call in (reg, reg.add_gradients):
        with pytest.raises(error, match=f"Careless.evaluate must return.*{message}"):
            call()


# --- guarantees of a step -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(26, 8), (8, 26), (12, 12)], ids=str)
def test_full_block_never_raises_kappa_after_replacement(
    shape: tuple[int, int],
) -> None:
    """It spans the entire shorter side: every step is exact, whatever came before."""
    layer = nn.Linear(*shape, bias=False).double()
    reg = wc.Regularizer(layer, wc.ConditionPenalty(1.0))
    source = torch.Generator().manual_seed(0)
    for trial in range(60):
        eta = float(torch.rand((), generator=source)) * 10 ** (trial % 4 - 2)
        with torch.no_grad():
            if trial % 3 == 0:
                Q, _ = torch.linalg.qr(torch.randn(26, 26, generator=source, dtype=torch.float64))
                layer.weight.copy_(Q[: shape[1], : shape[0]])
            elif trial % 3 == 1:
                layer.weight.normal_(generator=source)
        before = layer.weight.detach().clone()
        reg.proximal_step(eta)
        torch.testing.assert_close(layer.weight.detach(), wc.proximal_step(before, eta))
        kappas = [float(wc.condition_number(w)) for w in (before, layer.weight)]
        assert kappas[1] <= kappas[0] * (1 + 1e-9)


@pytest.mark.parametrize("way", ["reg", "add_gradients", "proximal_step"])
def test_failing_schedule_changes_nothing(way: str) -> None:
    def schedule(step: int) -> float:
        raise OverflowError("on purpose")

    model = net(5, 4, 3)
    reg = wc.Regularizer(
        model, {"0.*": wc.ConditionPenalty(1.0), "1.*": wc.ConditionPenalty(schedule)}
    )
    before, state = copy.deepcopy(model.state_dict()), reg.state_dict()
    calls = {"reg": reg, "add_gradients": reg.add_gradients}
    with pytest.raises(OverflowError, match="on purpose"):
        calls.get(way, lambda: reg.proximal_step(0.5))()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())
    for name, fields in reg.state_dict().items():
        for key, value in fields.items():
            assert torch.equal(value, state[name][key])
