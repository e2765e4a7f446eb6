"""Hard limits of sharded weights and of replicas equal those of one process."""

import math
from collections.abc import Callable
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
from wellcond.operators.sharded import operator_of
from wellcond.rules import project

pytestmark = pytest.mark.distributed
LIMITS = [
    wc.ConditionLimit(2.0),
    wc.SingularValueLimit(lower=1.0, upper=3.0),
    wc.SingularValueLimit(upper=2.0),
]
# Tall, wide, square, uneven, and shapes with an empty shard.
SHAPES = [(9, 5), (5, 9), (7, 7), (3, 40), (2, 3), (1, 6)]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.1}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().double()


def same_everywhere(tensor: Tensor) -> None:
    first = tensor.clone()
    dist.broadcast(first, 0)
    assert torch.equal(first, tensor)


def obeys(S: Tensor, limit: Any) -> bool:
    sigma = torch.linalg.svdvals(S.double())
    if isinstance(limit, wc.ConditionLimit):
        return bool((sigma[..., 0] <= limit.max_condition * sigma[..., -1]).all())
    low, high = limit.lower or 0.0, limit.upper or math.inf
    return bool((sigma[..., 0] <= high).all() and (sigma[..., -1] >= low).all())


# --- one weight -----------------------------------------------------------------------------------


def layouts(world: int) -> None:
    flat = mesh(world)
    each = [(flat, [Shard(0)]), (flat, [Shard(1)]), (flat, [Replicate()])]
    if world == 4:
        square = mesh(2, 2)
        each = [
            (square, [Shard(0), Shard(1)]),
            (square, [Replicate(), Shard(0)]),
            (square, [Shard(0), Shard(0)]),
            (square, [Shard(1), Shard(0)]),
        ]
    for where, placements in each:
        for number, shape in enumerate(SHAPES):
            for at, (dtype, tolerance) in enumerate(TOLERANCE.items()):
                # Four processes on one core are slow: one limit per pair.
                for limit in LIMITS if world == 2 else [LIMITS[(number + at) % 3]]:
                    for singular in (False, True):
                        S = matrix(*shape)
                        if singular:
                            S[:, 0], S[0] = S[:, 1], S[-1]
                        S = S.to(dtype)
                        one = Holder(S.clone())
                        many = Holder(distribute_tensor(S.clone(), where, placements))
                        for model in (one, many):
                            wc.Regularizer(model, limit, block_size=2).enforce()
                        X = whole(many.layer.weight)
                        assert obeys(X, limit)
                        same_everywhere(X)
                        if not singular or not isinstance(limit, wc.SingularValueLimit):
                            torch.testing.assert_close(
                                X, whole(one.layer.weight), rtol=0, atol=tolerance
                            )
                        assert list(many.layer.weight.placements) == placements


def stacks_on_a_square() -> None:
    """Experts on some processes, each of them sharded or replicated."""
    where = mesh(2, 2)
    for placements in (
        [Shard(0), Shard(1)],
        [Shard(0), Shard(2)],
        [Shard(1), Shard(0)],
        [Replicate(), Shard(0)],
    ):
        for shape in ((3, 6, 4), (1, 4, 6)):
            S = matrix(*shape)
            S[0, 0] = S[0, 1]
            for limit in LIMITS[:2]:
                one, many = S.clone(), distribute_tensor(S.clone(), where, placements)
                limited(one, limit)
                limited(many, limit)
                assert obeys(whole(many), limit)
                same_everywhere(whole(many))
                if isinstance(limit, wc.ConditionLimit) or shape[1] > shape[2]:
                    torch.testing.assert_close(whole(many), one, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_limits_of_experts_that_are_also_sharded(tmp_path: Path) -> None:
    run(4, tmp_path, stacks_on_a_square)


@pytest.mark.parametrize("world", WORLDS)
def test_limit_of_sharded_weight_equals_unsharded(world: int, tmp_path: Path) -> None:
    run(world, tmp_path, layouts, world)


def nothing_large() -> None:
    reduce, broadcast, full_tensor = dist.all_reduce, dist.broadcast, DTensor.full_tensor
    sent: list[int] = []

    def counted(send: Any) -> Any:
        def wrapped(tensor: Tensor, *args: Any, **options: Any) -> Any:
            sent.append(tensor.numel())
            return send(tensor, *args, **options)

        return wrapped

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was gathered")

    redistribute = DTensor.redistribute
    for shape, placement in (((300, 9), Shard(0)), ((9, 300), Shard(1)), ((9, 300), Shard(0))):
        for limit in (wc.ConditionLimit(1.1), wc.SingularValueLimit(lower=10.0, upper=15.0)):
            model = Holder(distribute_tensor(matrix(*shape), mesh(2), [placement]))
            reg = wc.Regularizer(model, limit)
            dist.all_reduce, dist.broadcast = counted(reduce), counted(broadcast)
            DTensor.full_tensor = refused  # type: ignore[method-assign]
            if placement.dim == (0 if shape[0] > shape[1] else 1):
                DTensor.redistribute = refused  # type: ignore[method-assign]
            try:
                reg.enforce()
            finally:
                dist.all_reduce, dist.broadcast = reduce, broadcast
                DTensor.full_tensor = full_tensor  # type: ignore[method-assign]
                DTensor.redistribute = redistribute  # type: ignore[method-assign]
            assert obeys(whole(model.layer.weight), limit)
    assert max(sent) == 9 * 9


def test_sharded_weight_sends_only_gram_matrices(tmp_path: Path) -> None:
    run(2, tmp_path, nothing_large)


# --- views and stacks -----------------------------------------------------------------------------


def views() -> None:
    checked = 0
    for name, case in OPERATORS.items():
        parameters = case.parameters()
        if len(parameters) > 1 or "channels last" in name:  # distribute the shards again
            continue
        view = case.operator(parameters).view
        for placement in (Shard(0), Shard(1), Replicate()):
            if ("kernel" in name or "groups" in name) and placement == Shard(1):
                continue
            for limit in LIMITS[:2]:
                (S,) = case.parameters()
                part = distribute_tensor(S.clone(), mesh(2), [placement])
                project.project([operator_of(part, view)], limit)
                project.project([operator_of(S, view)], limit)
                assert obeys(case.twin(whole(part)), limit)
                torch.testing.assert_close(whole(part), S, rtol=0, atol=1e-9)
                checked += 1
    assert checked > 80
    for placement in (Shard(0), Replicate()):
        one, many = zoo(), distributed(zoo(), mesh(2), [placement])
        for model in (one, many):
            rules = {"experts": wc.ConditionLimit(1.5), "*": wc.ConditionLimit(1.5)}
            wc.Regularizer(model, rules).enforce()
        compare_models(many, one)


@pytest.mark.slow
def test_limits_of_views_sharded_equal_unsharded(tmp_path: Path) -> None:
    run(2, tmp_path, views)


class Experts(nn.Module):
    def __init__(self, experts: Tensor) -> None:
        super().__init__()
        self.experts = nn.Parameter(experts)


def limited(experts: Tensor, limit: wc.Limit) -> wc.Regularizer:
    reg = wc.Regularizer(Experts(experts), {"experts": limit})
    optimizer = torch.optim.SGD(reg._states[0].weight.parameters, 0.1)
    reg.attach(optimizer)
    optimizer.step()  # there are no gradients: this only applies the limit
    return reg


def stacks() -> None:
    for count in (1, 2, 3, 5):  # even, uneven, and one expert, of which a process has none
        for dtype, tolerance in TOLERANCE.items():
            for limit in LIMITS[:2]:
                S = matrix(count, 6, 4).to(dtype)
                S[0, :, 0] = S[0, :, 1]  # one of them by an SVD
                if isinstance(limit, wc.SingularValueLimit):
                    S = matrix(count, 6, 4).to(dtype)
                one = limited(S.clone(), limit)
                many = limited(distribute_tensor(S.clone(), mesh(2), [Shard(0)]), limit)
                X = whole(many._states[0].weight.parameters[0])
                assert obeys(X, limit)
                expected = whole(one._states[0].weight.parameters[0])
                torch.testing.assert_close(X, expected, rtol=0, atol=tolerance)
                # All processes know the worst weight, wherever it is.
                pace = many._states[0].pace
                torch.testing.assert_close(
                    pace.to_tensor(), one._states[0].pace.to_tensor(), rtol=1e-3, atol=0
                )
                same_everywhere(pace.to_tensor())
    inner = distribute_tensor(matrix(3, 6, 4), mesh(2), [Shard(1)])
    assert obeys(whole(limited(inner, LIMITS[0])._states[0].weight.parameters[0]), LIMITS[0])


def one_bad_expert() -> None:
    """A failure on one process stops all, and no process waits for another."""
    S = torch.stack([torch.eye(64), matrix(64, 64, dtype=torch.float32)]).bfloat16()
    many = distribute_tensor(S.clone(), mesh(2), [Shard(0)])
    with pytest.raises(ValueError, match=r'"experts".*rounded to bfloat16'):
        limited(many, wc.ConditionLimit(1.0005))
    assert torch.equal(whole(many), S.double())
    S[1, 0, 0] = math.nan
    many = distribute_tensor(S.clone(), mesh(2), [Shard(0)])
    with pytest.raises(ValueError, match=r'"experts" contains NaN'):
        limited(many, wc.ConditionLimit(2.0))
    torch.testing.assert_close(whole(many), S.double(), rtol=0, atol=0, equal_nan=True)


def members() -> None:
    """Matrices of a stack under separate rules, each on one process."""
    rules = {"experts:0": LIMITS[0], "experts:2": LIMITS[0], "experts:1": LIMITS[1], "*": None}
    for singular in (False, True):
        S = matrix(4, 6, 4)
        if singular:
            S[0, :, 0] = S[0, :, 1]
        one, many = Experts(S.clone()), Experts(distribute_tensor(S.clone(), mesh(2), [Shard(0)]))
        for model in (one, many):
            wc.Regularizer(model, rules).enforce()
        compare_models(many, one)
        X = whole(many.experts)
        assert obeys(X[[0, 2]], LIMITS[0])
        assert obeys(X[1], LIMITS[1])
        assert torch.equal(X[3], S[3])


def failing_decomposition() -> None:
    """LAPACK fails on the process that decomposes, and the others do not wait for it."""

    def failing(*_: Any) -> None:
        raise ValueError("LAPACK")

    if dist.get_rank() == 0:
        project.svd = failing  # type: ignore[assignment]
    S = torch.ones(6, 4, dtype=torch.float64)
    for placement in (Shard(0), Replicate()):
        part = distribute_tensor(S.clone(), mesh(2), [placement])
        with pytest.raises(ValueError, match=r'"layer.weight".*LAPACK does not converge'):
            wc.Regularizer(Holder(part), LIMITS[0]).proximal_step(0.0)
        assert torch.equal(whole(part), S)


@pytest.mark.parametrize("worker", [members, failing_decomposition])
def test_failure_on_one_process_reaches_all(worker: Callable[[], None], tmp_path: Path) -> None:
    run(2, tmp_path, worker)


@pytest.mark.slow
def test_stacks_are_limited_in_place(tmp_path: Path) -> None:
    run(2, tmp_path, stacks)


def test_expert_that_cannot_satisfy_its_limit_raises_on_all_processes(tmp_path: Path) -> None:
    run(2, tmp_path, one_bad_expert)


# --- trainings ------------------------------------------------------------------------------------


def train(
    model: nn.Module, limit: wc.Limit, rank: int = 0, world: int = 1, **options: Any
) -> tuple[wc.Regularizer, list[list[int]]]:
    """Trains on the rows that belong to this process; returns when limits were applied."""
    optimizer = torch.optim.AdamW(model.parameters(), 2e-2)
    reg = wc.Regularizer(model, limit, block_size=4, **options)
    reg.attach(optimizer)
    source = torch.Generator().manual_seed(5)
    times: list[list[int]] = []
    for _ in range(36):
        x = torch.randn(8, 10, generator=source, dtype=torch.float64)[rank::world]
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        times.append([state.record.applications for state in reg._states])
    if isinstance(limit, wc.ConditionLimit):  # all have moved again
        assert min(times[-1]) >= 2
    return reg, times


def compare_trainings(
    many: tuple[wc.Regularizer, Any], one: tuple[wc.Regularizer, Any], *models: nn.Module
) -> None:
    assert many[1] == one[1]
    compare_models(*models)
    for ours, theirs in zip(many[0]._states, one[0]._states, strict=True):
        both = ours.record.to_tensor(), theirs.record.to_tensor()
        torch.testing.assert_close(*both, rtol=1e-6, atol=1e-12)
        same_everywhere(both[0])


def sharded_models(world: int) -> None:
    from torch.distributed.fsdp import fully_shard

    rank = dist.get_rank()
    for limit in (wc.ConditionLimit(2.0), wc.SingularValueLimit(lower=0.5, upper=1.1)):
        single = net()
        alone = train(single, limit)
        # The second case: replicas of shards.
        for where in [None] if world == 2 else [mesh(2, 2)]:
            model = net()
            for layer in (model[0], model[2]):  # the last one belongs to the root
                fully_shard(layer, **({} if where is None else {"mesh": where}))
            fully_shard(model, **({} if where is None else {"mesh": where}))
            compare_trainings(train(model, limit, rank, world), alone, model, single)
        if world == 4:
            return


@needs_fsdp2_on_the_cpu
@pytest.mark.parametrize("world", WORLDS)
def test_training_sharded_models_under_limits_equals_one_process(
    world: int, tmp_path: Path
) -> None:
    """Under FSDP2, and for four processes as two replicas of two shards."""
    run(world, tmp_path, sharded_models, world)


def tensor_parallel() -> None:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    for limit in (wc.ConditionLimit(2.0), wc.SingularValueLimit(upper=0.8)):
        single = net()
        alone = train(single, limit)
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        model = parallelize_module(net(), mesh(2), plan)
        compare_trainings(train(model, limit), alone, model, single)


def test_training_in_parallel_tensors_under_limits_equals_one_process(tmp_path: Path) -> None:
    run(2, tmp_path, tensor_parallel)


def replicas() -> None:
    from torch.nn.parallel import DistributedDataParallel

    rank = dist.get_rank()
    for limit in (wc.ConditionLimit(2.0), wc.SingularValueLimit(upper=0.8)):
        model, single = net(), net()
        many = train(DistributedDataParallel(model), limit, rank, 2, check_replicas=True)
        compare_trainings(many, train(single, limit), model, single)
        for state in many[0].state_dict().values():
            for tensor in (*model.parameters(), *state.values()):
                same_everywhere(tensor.detach())


def test_replicas_under_limits_remain_identical(tmp_path: Path) -> None:
    run(2, tmp_path, replicas)


class Exhausted(wc.Limit):
    def apply(self, S: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")


def replicas_of_groups() -> None:
    """Grouped convolutions, each one map, and a rule that runs out of memory on one process."""
    torch.manual_seed(0)
    convolutions = [torch.nn.Conv2d(8, 8, 3, groups=4, bias=False) for _ in range(2)]
    model = torch.nn.Sequential(*convolutions, torch.nn.Linear(6, 5), torch.nn.Linear(6, 5))
    reg = wc.Regularizer(model, wc.ConditionLimit(2.0), process_group=dist.group.WORLD)
    reg.enforce()
    reg.proximal_step(0.1)
    for parameter in model.parameters():
        same_everywhere(parameter.detach())
    for state in reg.state_dict().values():
        for tensor in state.values():
            same_everywhere(tensor)
    assert max(f.condition_number for f in wc.audit(model).findings) <= 2.0
    reg = wc.Regularizer(model[2], Exhausted(), process_group=dist.group.WORLD)
    mine = dist.get_rank() == reg._states[0].owner
    with pytest.raises(torch.OutOfMemoryError if mine else ValueError):
        reg.enforce()


def test_replicas_limit_grouped_convolutions_and_fail_together(tmp_path: Path) -> None:
    run(2, tmp_path, replicas_of_groups)


def failing_replica() -> None:
    """The others do not wait for the failing process, and all remain identical."""
    model = net().bfloat16()
    rules = {"0.*": wc.ConditionLimit(1.0005), "2.*": wc.ConditionLimit(2.0), "*": None}
    reg = wc.Regularizer(model, rules, process_group=dist.group.WORLD)
    owner = reg._states[0].owner
    ours = dist.get_rank() == owner
    says = "rounded to bfloat16" if ours else "See the error of that process"
    for enforcing in (reg.enforce, lambda: reg.proximal_step(0.1)):
        with pytest.raises(ValueError, match=rf'"0\.weight".*{says}'):
            enforcing()
        for parameter in model.parameters():
            same_everywhere(parameter.detach())
    assert float(wc.condition_number(model[2].weight)) <= 2.0


def test_failing_replica_stops_all(tmp_path: Path) -> None:
    run(2, tmp_path, failing_replica)
