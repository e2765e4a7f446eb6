"""The relatives of r on sharded weights and on replicas equal those of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import wellcond as wc
from processes import (
    WORLDS,
    Holder,
    compare_models,
    distributed,
    matrix,
    mesh,
    needs_fsdp2_on_the_cpu,
    net,
    run,
    zoo,
)
from registry import OPERATORS
from wellcond.operators.base import Gradient, NewWeight, Rescaled
from wellcond.operators.sharded import operator_of

pytestmark = pytest.mark.distributed
PENALTIES = [
    wc.OrthogonalityPenalty(0.1, 0.7),
    wc.StableRankPenalty(0.3),
    wc.SpectralNormPenalty(0.3, 0.5),
]
RULES = [*PENALTIES, wc.IsometryStep()]
# Tall, wide, square, uneven, and shapes with an empty shard.
SHAPES = [(9, 5), (5, 9), (7, 7), (2, 3), (1, 6)]


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().double()


def compare_all_ways(one: nn.Module, many: nn.Module, rule: Any) -> None:
    reg, sharded = wc.Regularizer(one, rule), wc.Regularizer(many, rule)
    for _ in range(2):
        if isinstance(rule, wc.Penalty):
            value, other = reg(), sharded()
            torch.testing.assert_close(whole(other), value.detach().double(), rtol=1e-4, atol=0)
            for each in (value, other):
                each.backward()
            for each in (reg, sharded):
                each.add_gradients()
            for p, q in zip(one.parameters(), many.parameters(), strict=True):
                assert isinstance(q.grad, DTensor)
                torch.testing.assert_close(whole(q.grad), whole(p.grad), rtol=1e-4, atol=1e-6)
        for each in (reg, sharded):
            each.proximal_step(0.3)
        for p, q in zip(one.parameters(), many.parameters(), strict=True):
            torch.testing.assert_close(whole(q), whole(p), rtol=1e-4, atol=1e-6)
    for name, fields in reg.state_dict().items():
        if "scale" in fields:
            torch.testing.assert_close(sharded.state_dict()[name]["scale"], fields["scale"])


def layouts(world: int) -> None:
    flat = mesh(world)
    each = [(flat, [Shard(0)]), (flat, [Shard(1)]), (flat, [Replicate()])]
    if world == 4:
        square = mesh(2, 2)
        each = [
            (square, [Shard(0), Shard(1)]),
            (square, [Replicate(), Shard(0)]),
            (square, [Shard(1), Shard(0)]),
        ]
    for where, placements in each:
        for shape in SHAPES:
            for dtype in (torch.float64, torch.float32):
                for rule in RULES:
                    S = matrix(*shape, dtype=dtype)
                    many = Holder(distribute_tensor(S.clone(), where, placements))
                    compare_all_ways(Holder(S), many, rule)
                    assert list(many.layer.weight.placements) == placements


@pytest.mark.parametrize("world", WORLDS)
def test_sharded_weight_equals_unsharded(world: int, tmp_path: Path) -> None:
    run(world, tmp_path, layouts, world)


class Experts(nn.Module):
    def __init__(self, experts: Tensor) -> None:
        super().__init__()
        self.experts = nn.Parameter(experts)


def views() -> None:
    checked = 0
    for name, case in OPERATORS.items():
        parameters = case.parameters()
        if len(parameters) > 1 or "channels last" in name:  # distribute the shards again
            continue
        S = case.operator(parameters)
        form = Rescaled(torch.full(S.shape[:-2], 0.5, dtype=torch.float64), S.gram())
        for placement in (Shard(0), Shard(1), Replicate()):
            if ("kernel" in name or "groups" in name) and placement == Shard(1):
                continue
            one, into = parameters[0].clone(), torch.zeros_like(parameters[0])
            part = distribute_tensor(one.clone(), mesh(2), [placement])
            part_into = torch.zeros_like(part)
            ours, theirs = operator_of(part, S.view), operator_of(one, S.view)
            # For a square matrix each takes the side that suits it.
            own = Rescaled(form.c, ours.gram())
            ours.pullback_(Gradient(own), [part_into])
            theirs.pullback_(Gradient(form), [into])
            torch.testing.assert_close(whole(part_into), into, rtol=1e-9, atol=1e-9)
            ours.update_(NewWeight(own))
            theirs.update_(NewWeight(form))
            torch.testing.assert_close(whole(part), one, rtol=1e-9, atol=1e-9)
            checked += 1
    assert checked > 40
    for rule in RULES:
        for shape in ((3, 6, 4), (1, 4, 6)):
            for placement in map(Shard, range(3)):
                S = matrix(*shape)
                many = Experts(distribute_tensor(S.clone(), mesh(2), [placement]))
                compare_all_ways(Experts(S), many, {"experts": rule})
        one, many = zoo(), distributed(zoo(), mesh(2), [Shard(0)])
        for model in (one, many):
            wc.Regularizer(model, {"experts": rule, "*": rule}).proximal_step(0.1)
        compare_models(many, one)


@pytest.mark.slow
def test_sharded_views_and_experts_equal_unsharded(tmp_path: Path) -> None:
    run(2, tmp_path, views)


def nothing_large() -> None:
    """If the long side is sharded, only Gram matrices are summed."""
    reduce, full_tensor, redistribute = dist.all_reduce, DTensor.full_tensor, DTensor.redistribute
    sent: list[int] = []

    def counted(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sent.append(tensor.numel())
        return reduce(tensor, *args, **options)

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was gathered")

    for shape, placement in (((300, 9), Shard(0)), ((9, 300), Shard(1))):
        for rule in (wc.OrthogonalityPenalty(0.1), wc.IsometryStep()):
            model = Holder(distribute_tensor(matrix(*shape), mesh(2), [placement]))
            reg = wc.Regularizer(model, rule)
            dist.all_reduce = counted
            DTensor.full_tensor = DTensor.redistribute = refused  # type: ignore[method-assign]
            try:
                reg.proximal_step(0.1)
                if isinstance(rule, wc.Penalty):
                    reg.add_gradients()
            finally:
                dist.all_reduce = reduce
                DTensor.full_tensor = full_tensor  # type: ignore[method-assign]
                DTensor.redistribute = redistribute  # type: ignore[method-assign]
    assert max(sent) == 9 * 9


def nothing_of_experts() -> None:
    """Isometry steps of experts are local to their process."""
    S = matrix(3, 6, 4)
    many = Experts(distribute_tensor(S, mesh(2), [Shard(0)]))
    reg = wc.Regularizer(many, {"experts": wc.IsometryStep(scale=1.0)})
    reduce, sent = dist.all_reduce, []

    def counted(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sent.append(tensor.numel())
        return reduce(tensor, *args, **options)

    dist.all_reduce = counted
    try:
        reg.proximal_step(0.1)
    finally:
        dist.all_reduce = reduce
    assert max(sent) == 3  # whether they are finite


@pytest.mark.slow
def test_experts_send_nothing(tmp_path: Path) -> None:
    run(2, tmp_path, nothing_of_experts)


def test_sharded_weight_sends_only_gram_matrices(tmp_path: Path) -> None:
    run(2, tmp_path, nothing_large)


# --- trainings ------------------------------------------------------------------------------------


def train(
    model: nn.Module, rule: Any, way: str, rank: int = 0, world: int = 1, **options: Any
) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), 5e-2)
    reg = wc.Regularizer(model, rule, **options)
    if way == "attach":
        reg.attach(optimizer, every=2)
    source = torch.Generator().manual_seed(5)
    for _ in range(6):
        x = torch.randn(8, 10, generator=source, dtype=torch.float64)[rank::world]
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if way == "gradients":
            reg.add_gradients()
        optimizer.step()
    return reg


def ways(rule: Any) -> list[str]:
    return ["attach", "gradients"] if isinstance(rule, wc.Penalty) else ["attach"]


def sharded_models() -> None:
    from torch.distributed.fsdp import fully_shard

    for rule in RULES:
        for way in ways(rule):
            single, model = net(), net()
            train(single, rule, way)
            for layer in (model[0], model[2]):  # the last one belongs to the root
                fully_shard(layer)
            fully_shard(model)
            train(model, rule, way, dist.get_rank(), 2)
            compare_models(model, single)


@needs_fsdp2_on_the_cpu
def test_training_sharded_models_equals_one_process(tmp_path: Path) -> None:
    run(2, tmp_path, sharded_models)


def replicas() -> None:
    from torch.nn.parallel import DistributedDataParallel

    for rule in RULES:
        for way in ways(rule):
            model, single = net(), net()
            many = DistributedDataParallel(model)
            reg = train(many, rule, way, dist.get_rank(), 2, check_replicas=True)
            alone = train(single, rule, way)
            compare_models(model, single)
            states = reg.state_dict()
            for tensor in (*model.parameters(), *(t for s in states.values() for t in s.values())):
                first = tensor.detach().clone()
                dist.broadcast(first, 0)
                assert torch.equal(first, tensor)
            for name, fields in alone.state_dict().items():
                if "scale" in fields:
                    torch.testing.assert_close(states[name]["scale"], fields["scale"])


def test_replicas_remain_identical(tmp_path: Path) -> None:
    run(2, tmp_path, replicas)
