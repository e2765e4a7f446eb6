"""A weight that cannot satisfy its limit does not stop others, and one error names all failures."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wellcond as wc

K = 2.0
LIMITS = [
    wc.ConditionLimit(K),
    wc.SingularValueLimit(lower=0.5, upper=1.0),
    wc.SingularValueLimit(upper=0.5),
]


def net(*shapes: tuple[int, int], dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(n, m, bias=False) for m, n in shapes)).to(dtype)


def weights(model: nn.Module) -> list[Tensor]:
    return [layer.weight.detach() for layer in model]  # type: ignore[union-attr]


def obeys(S: Tensor, limit: wc.Limit) -> bool:
    sigma = torch.linalg.svdvals(S.double())
    if isinstance(limit, wc.ConditionLimit):
        return bool(sigma[0] / sigma[-1] <= K * (1 + 1e-9))
    assert isinstance(limit, wc.SingularValueLimit)
    low, high = limit.lower or 0.0, limit.upper or math.inf
    return bool(sigma[0] <= high * (1 + 1e-9)) and bool(sigma[-1] >= low * (1 - 1e-9))


def still(optimizer_of: nn.Module) -> torch.optim.Optimizer:
    """An optimizer whose steps change nothing."""
    for parameter in optimizer_of.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return torch.optim.SGD(optimizer_of.parameters(), 0.1)


def enforce(model: nn.Module, limit: wc.Limit) -> None:
    wc.Regularizer(model, limit).enforce()


def once(model: nn.Module, limit: wc.Limit) -> None:
    wc.enforce(model, limit)


def by_hand(model: nn.Module, limit: wc.Limit) -> None:
    reg = wc.Regularizer(model, limit)
    for _ in range(2):
        reg.proximal_step(0.1)


def attached(model: nn.Module, limit: wc.Limit) -> None:
    """Every step applies all rules that are due, and raises the same error."""
    optimizer = still(model)
    wc.Regularizer(model, limit).attach(optimizer, every=1)
    with pytest.raises(ValueError, match="contains NaN"):
        optimizer.step()
    optimizer.step()


WAYS = [enforce, once, by_hand, attached]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("limit", LIMITS, ids=repr)
def test_weight_that_is_not_finite_does_not_stop_other_limits(
    limit: wc.Limit, way: Callable[[nn.Module, wc.Limit], None], at: int, bad: float
) -> None:
    """The first, one of a batch of equal shapes, and the last."""
    model = net((16, 16), (12, 16), (12, 16), (10, 12))
    with torch.no_grad():
        weights(model)[at][0, 1] = bad
    before = weights(model)[at].clone()
    with pytest.raises(ValueError, match=rf'"{at}\.weight" contains NaN or infinity and was left'):
        way(model, limit)
    for i, S in enumerate(weights(model)):
        if i == at:
            torch.testing.assert_close(S, before, rtol=0, atol=0, equal_nan=True)
        else:
            assert obeys(S, limit)


def test_error_names_all_failures_with_reasons() -> None:
    model = net((64, 64), (16, 16), (64, 64), (8, 8), dtype=torch.bfloat16)
    with torch.no_grad():
        weights(model)[1][0, 0] = math.nan
    rules = {
        "0.*": wc.ConditionLimit(1.0005),
        "2.*": wc.ConditionLimit(1.0005),
        "*": wc.ConditionLimit(K),
    }
    before = [S.clone() for S in weights(model)]
    reg = wc.Regularizer(model, rules)
    with pytest.raises(ValueError, match="contains NaN") as caught:
        reg.enforce()
    said = str(caught.value)
    assert (
        '"0.weight", "2.weight": no nearby weight satisfies ConditionLimit(max_condition=1.0005)'
        in (said)
    )
    assert '"1.weight" contains NaN or infinity and was left unchanged. Restore' in said
    assert said.endswith("All other hard limits hold.")
    for i in range(3):
        torch.testing.assert_close(weights(model)[i], before[i], rtol=0, atol=0, equal_nan=True)
    assert float(wc.condition_number(weights(model)[3])) <= K
    with torch.no_grad():
        weights(model)[1].copy_(torch.eye(16))
    with pytest.raises(ValueError, match=r'^"0\.weight", "2\.weight": no nearby weight') as caught:
        reg.enforce()
    assert "NaN" not in str(caught.value)


class Failing(wc.Limit):
    """A user limit that raises for some weights."""

    def apply(self, S: Tensor) -> Tensor:
        assert torch.isfinite(S).all(), "it must not be asked of such a weight"
        if S.shape[0] == 16:
            raise ValueError("no {such} weight")
        return torch.zeros_like(S)


def test_failing_user_limits_do_not_stop_others() -> None:
    model = net((16, 16), (12, 16), (4, 12))
    with torch.no_grad():
        weights(model)[2][0, 0] = math.nan
    reg = wc.Regularizer(model, Failing())
    with pytest.raises(ValueError, match=r"no \{such\} weight") as caught:
        reg.enforce()
    assert '"0.weight": no {such} weight' in str(caught.value)
    assert '"2.weight" contains NaN' in str(caught.value)
    assert not weights(model)[1].any()


class Answers(wc.Limit):
    """A limit that returns a wrong result for weights of 16 rows, and zeros all others."""

    def __init__(self, wrong: Callable[[Tensor], Any]) -> None:
        self.wrong = wrong

    def apply(self, S: Tensor) -> Tensor:
        answer: Tensor = self.wrong(S) if S.shape[0] == 16 else torch.zeros_like(S)
        return answer


def raising(
    error: type[Exception], before: Callable[[Tensor], Any] = id
) -> Callable[[Tensor], Any]:
    def apply(S: Tensor) -> Any:
        before(S)
        raise error("of no use")

    return apply


@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize(
    "error", [torch.linalg.LinAlgError, RuntimeError, TypeError, ZeroDivisionError, KeyError]
)
def test_errors_of_user_limits_do_not_stop_others(
    error: type[Exception], way: Callable[[nn.Module, wc.Limit], None]
) -> None:
    model = net((12, 16), (16, 12), (4, 16))
    before, name = weights(model)[1].clone(), error.__name__.lstrip("_")
    with pytest.raises(ValueError, match=rf'"1\.weight": {name}: .?of no use'):
        way(model, Answers(raising(error, Tensor.zero_)))  # after it has written to S
    assert torch.equal(weights(model)[1], before)
    assert not weights(model)[0].any()
    assert not weights(model)[2].any()


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "with NaN or infinity": lambda S: S * math.nan,
    "with NaN or infinity.": lambda S: S / 0,
    "the shape (1, 12)": lambda S: S[:1],
    "the shape (12, 16)": lambda S: S.T,
    "in torch.float64": lambda S: S.double(),
    "in torch.bool": lambda S: S > 0,
    "on meta": lambda S: S.to("meta"),
    "got NoneType": lambda S: None,
    "got list": lambda S: S.tolist(),
}


@pytest.mark.parametrize("way", WAYS[:3])
@pytest.mark.parametrize("words", WRONG)
def test_user_limit_must_return_matching_tensor(
    words: str, way: Callable[[nn.Module, wc.Limit], None]
) -> None:
    model = net((12, 16), (16, 12), (4, 16))
    before = weights(model)[1].clone()
    demand = (
        '"1.weight": `Answers.apply` must return a finite tensor of the shape (16, 12), in '
        "torch.float32 on cpu, got "
    )
    with pytest.raises(ValueError, match="must return a finite tensor") as caught:
        way(model, Answers(WRONG[words]))
    assert demand in str(caught.value)
    assert words in str(caught.value)
    assert torch.equal(weights(model)[1], before)
    assert not weights(model)[0].any()
    assert not weights(model)[2].any()


def test_user_limit_can_write_to_its_input() -> None:
    model = net((16, 12))
    wc.enforce(model, Answers(Tensor.zero_))
    assert not weights(model)[0].any()


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_out_of_memory_is_raised_unchanged(error: type[Exception]) -> None:
    def apply(S: Tensor) -> Any:
        raise error("out of memory")

    with pytest.raises(error):
        wc.enforce(net((16, 12)), Answers(apply))


class Picky(wc.ConditionPenalty):
    """A penalty that raises for weights of 16 rows."""

    def gradient(self, S: Any, image: Any) -> Any:
        self._refuse(S)
        return super().gradient(S, image)

    def proximal_step(self, S: Any, image: Any, eta: Tensor) -> Any:
        self._refuse(S)
        return super().proximal_step(S, image, eta)

    def _refuse(self, S: Any) -> None:
        if S.shape[-2] == 16:
            raise torch.linalg.LinAlgError("of no use")


def test_errors_of_user_penalties_do_not_stop_other_steps() -> None:
    model = net((12, 16), (16, 12), (4, 16), (8, 4))
    before = [S.clone() for S in weights(model)]
    reg = wc.Regularizer(model, {"3.weight": wc.ConditionLimit(K), "*": Picky(1.0)})
    with pytest.raises(ValueError, match=r'"1\.weight": its penalty .* LinAlgError: of no use'):
        reg.proximal_step(0.1)
    changed = [not torch.equal(*pair) for pair in zip(weights(model), before, strict=True)]
    assert changed == [True, False, True, True]
    assert obeys(weights(model)[3], wc.ConditionLimit(K))
    assert [state.step for state in reg._states] == [1, 0, 1, 1]


def test_errors_of_user_penalties_leave_gradients_unchanged() -> None:
    model = net((12, 16), (16, 12), (4, 16))
    reg = wc.Regularizer(model, Picky(1.0))
    for call in (reg.add_gradients, reg):
        with pytest.raises(torch.linalg.LinAlgError, match="of no use"):
            call()
    assert not any(layer.weight.grad is not None and layer.weight.grad.any() for layer in model)
    assert [state.step for state in reg._states] == [0, 0, 0]


def test_matrices_of_a_stack_fail_independently() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.stack = nn.Parameter(torch.randn(3, 6, 4))
            self.conv = nn.Conv2d(4, 6, 3, groups=2, bias=False)

    model = Experts()
    with torch.no_grad():
        model.stack[1, 0, 0] = math.nan
        model.conv.weight[0, 0, 0, 0] = math.inf
    with pytest.raises(
        ValueError, match=r'"conv\.weight", "stack" contain NaN or infinity and were left'
    ):
        wc.enforce(model, {"stack": wc.ConditionLimit(K), "conv.*": wc.ConditionLimit(K)})
    assert obeys(model.stack[0].detach(), LIMITS[0])
    assert obeys(model.stack[2].detach(), LIMITS[0])


def test_nonfinite_weight_stops_penalties_not_limits() -> None:
    """No penalty takes a step while a weight under one is not finite, but limits hold."""
    model = net((8, 8), (8, 8), (6, 8))
    rules = {
        "0.*": wc.ConditionPenalty(0.1),
        "1.*": wc.ConditionPenalty(0.1),
        "2.*": wc.ConditionLimit(K),
    }
    reg = wc.Regularizer(model, rules)
    optimizer = still(model)
    reg.attach(optimizer, every=1)
    with torch.no_grad():
        weights(model)[0][0, 0] = math.nan
    before = weights(model)[1].clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=r'"0\.weight" contains NaN'):
            optimizer.step()
    assert torch.equal(weights(model)[1], before)
    assert obeys(weights(model)[2], LIMITS[0])
    pending = {name: int(s["pending_steps"]) for name, s in reg.state_dict().items()}
    assert pending == {"0.weight": 2, "1.weight": 2, "2.weight": 0}
    with torch.no_grad():
        weights(model)[0].copy_(torch.eye(8))
        weights(model)[2][0, 0] = math.nan  # conversely, penalties do not wait
    with pytest.raises(ValueError, match=r'"2\.weight" contains NaN'):
        optimizer.step()
    assert not torch.equal(weights(model)[1], before)


def test_isometry_steps_of_other_weights_are_taken() -> None:
    model = net((8, 8), (8, 8), (6, 8))
    with torch.no_grad():
        weights(model)[0][0, 0] = math.nan
    before = [S.clone() for S in weights(model)]
    reg = wc.Regularizer(model, wc.IsometryStep(theta=1.0, scale=1.0))
    for _ in range(30):
        with pytest.raises(ValueError, match=r'"0\.weight" contains NaN'):
            reg.proximal_step(0.0)
    torch.testing.assert_close(weights(model)[0], before[0], rtol=0, atol=0, equal_nan=True)
    for S in weights(model)[1:]:
        assert float(wc.condition_number(S)) < 1.01


def test_failing_weight_does_not_block_other_shapes() -> None:
    """One shape per step is projected: a weight that remains due must not block the others."""
    model = net((16, 16), (12, 16), (12, 12))
    with torch.no_grad():
        weights(model)[0][0, 0] = math.nan
    optimizer = still(model)
    reg = wc.Regularizer(model, wc.ConditionLimit(K))
    reg.attach(optimizer)
    raised = 0
    for _ in range(12):
        try:
            optimizer.step()
        except ValueError as error:
            raised += '"0.weight" contains NaN' in str(error)
    assert raised >= 5
    assert obeys(weights(model)[1], LIMITS[0])
    assert obeys(weights(model)[2], LIMITS[0])
    with torch.no_grad():
        weights(model)[0].copy_(torch.randn(16, 16))
    optimizer.step()
    assert obeys(weights(model)[0], LIMITS[0])


def test_error_states_infinite_condition_number() -> None:
    layer = net((6, 4))
    with torch.no_grad():
        layer[0].weight[:, 0] = 0.0
    reg = wc.Regularizer(layer, wc.ConditionLimit(K))
    reg.proximal_step(0.0)
    assert "κ inf, inf times its limit" in repr(reg)
    assert reg.measure()["0.weight"].condition_before == math.inf
