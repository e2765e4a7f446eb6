"""torch.compile: no additional graph breaks, no recompilation, the numbers of eager mode."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import wellcond as wc
from wellcond.training.compiled import _penalty


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 12)
        )


PENALTIES = {
    "0.*": wc.TikhonovPenalty(0.1),
    "*": wc.ConditionPenalty(lambda step: 0.3 / (1 + step)),
}


def batches() -> list[Tensor]:
    source = torch.Generator().manual_seed(1)
    return [torch.randn(8, 1, 4, 4, generator=source) for _ in range(8)]


def loss_of(model: nn.Module, reg: wc.Regularizer | None) -> Callable[[Tensor], Tensor]:
    def loss(x: Tensor) -> Tensor:
        value = model(x).square().mean()
        return value if reg is None else value + reg()

    return loss


def train(way: str, compiled: Callable[[Any], Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """Trains with the loss or `add_gradients`, compiled by `compiled`."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    reg = wc.Regularizer(model, PENALTIES, block_size=6)
    loss = loss_of(model, reg if way == "loss" else None)
    add = reg.add_gradients
    if way == "loss":
        loss = compiled(loss)
    else:
        add = compiled(lambda: reg.add_gradients())
    for x in batches():
        optimizer.zero_grad()
        loss(x).backward()
        if way == "gradients":
            add()
        optimizer.step()
    return [p.detach() for p in model.parameters()], reg.state_dict()


@pytest.mark.parametrize("way", ["loss", "gradients"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_is_one_graph_and_equals_eager(way: str, backend: str) -> None:
    """`fullgraph=True` raises at a graph break; schedules and sides change in every step."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    weights, state = train(way, lambda f: torch.compile(f, backend=counter, fullgraph=True))
    assert counter.frame_count == 1
    expected, eager_state = train(way, lambda f: f)
    for compiled, eager in zip(weights, expected, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    assert list(eager_state) == list(state) != []
    for name, fields in eager_state.items():
        assert state[name]["step"] == fields["step"] == 8
        assert torch.equal(state[name]["from_right"], fields["from_right"])


def test_regularisers_do_not_interfere_in_compiled_graphs() -> None:
    torch._dynamo.reset()
    values = []
    for strength in (0.1, 0.2):
        reg = wc.Regularizer(net(), {"2.*": wc.ConditionPenalty(strength), "*": None})
        values.append(torch.compile(lambda reg=reg: reg(), fullgraph=True)())
    torch.testing.assert_close(values[1], 2 * values[0])


def test_copy_is_a_separate_regulariser_in_graphs() -> None:
    torch._dynamo.reset()
    model = net()
    reg = wc.Regularizer(model, {"2.*": wc.ConditionPenalty(0.1), "*": None})
    copied_model, copied = copy.deepcopy((model, reg))
    add = torch.compile(lambda: copied.add_gradients(), backend="aot_eager", fullgraph=True)
    add()
    assert model[2].weight.grad is None
    assert copied_model[2].weight.grad is not None
    assert (copied.measure()["2.weight"].step, reg.measure()["2.weight"].step) == (1, 0)


def test_compiled_step_adds_no_graph_breaks() -> None:
    """Optimizer hooks are called between graphs; the rest of the breaks are in torch's code."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, plain = net(), net()
    for one in (model, plain):
        optimizer = torch.optim.Adam(one.parameters(), 1e-2)
        reg = wc.Regularizer(one, wc.ConditionPenalty(0.3), block_size=6)
        reg.attach(optimizer, every=3)

        def step(x: Tensor, one: nn.Module = one, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            one(x).square().mean().backward()
            optimizer.step()

        step = torch.compile(step, backend="aot_eager") if one is model else step
        for x in batches():
            step(x)
        assert reg.measure()["2.weight"].step == 8
    for compiled, eager in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    breaks = " ".join(torch._dynamo.utils.counters["graph_break"])
    assert breaks
    assert "wellcond" not in breaks


def test_compiled_graph_names_weights_that_are_not_finite() -> None:
    torch._dynamo.reset()
    model = net()
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.1))
    loss = torch.compile(loss_of(model, reg), backend="aot_eager", fullgraph=True)
    loss(batches()[0])
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r'"2.weight" contains NaN'):
        loss(batches()[0])


def test_compiled_model_keeps_weight_names() -> None:
    model = net()
    names = wc.Regularizer(model, wc.ConditionPenalty(0.1)).names
    assert wc.Regularizer(torch.compile(model), wc.ConditionPenalty(0.1)).names == names
    model[2] = torch.compile(model[2])
    assert wc.Regularizer(model, wc.ConditionPenalty(0.1)).names == names


def test_each_version_has_its_own_operators() -> None:
    """A graph of another version in torch's cache must not be used."""
    version = wc.__version__.replace(".", "_")
    assert _penalty._qualname == f"wellcond_{version}::penalty"


def test_operators_pass_opcheck() -> None:
    """torch's own check: schema, fake kernels, autograd."""
    model = net()
    reg = wc.Regularizer(
        model, {"0.*": wc.TikhonovPenalty(0.1), "*": wc.ConditionPenalty(0.3)}, block_size=12
    )
    for _ in range(60):  # until another product changes nothing
        reg()
    parameters = [model.get_parameter(name).detach().clone() for name in reg.names]
    for parameter in parameters:
        parameter.requires_grad_()
    results = torch.library.opcheck(
        _penalty,
        (parameters, reg._compilable.number, False),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    assert set(results.values()) == {"SUCCESS"}
