"""Watched limits over processes: sharded and replicated weights train as on one process."""

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
from processes import WORLDS, matrix, mesh, run
from wellcond.training import deferred

KAPPA, UPPER = wc.ConditionLimit(3.0), wc.SingularValueLimit(upper=1.2)
BOTH = wc.SingularValueLimit(lower=0.6, upper=1.5)

pytestmark = pytest.mark.distributed


class Weights(nn.Module):
    """Watched weights: tall, wide, square, experts, and a small one."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"tall": (40, 27), "wide": (26, 40), "square": (30, 30), "small": (8, 6)}
        for seed, (name, shape) in enumerate({**shapes, "experts": (3, 28, 26)}.items()):
            S = torch.linalg.qr(matrix(*shape, seed=seed))[0] if shape[-1] <= shape[-2] else None
            S = matrix(*shape, seed=seed) / shape[-1] ** 0.5 if S is None else S.contiguous()
            self.register_parameter(name, nn.Parameter(S))


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def excess(S: Tensor, limit: Any) -> float:
    sigma = torch.linalg.svdvals(whole(S))
    return float(limit.excess(sigma[..., 0], sigma[..., -1]).max())


def is_the_same(tensor: Tensor) -> bool:
    """Whether it is the same on all processes."""
    tensor = tensor.contiguous()
    first = tensor.clone()
    dist.broadcast(first, 0)
    return torch.equal(first.nan_to_num(7.0), tensor.nan_to_num(7.0))


def limits(limit: Any) -> dict[str, Any]:
    return {name: limit for name, _ in Weights().named_parameters()}


class Training:
    def __init__(self, model: nn.Module, limit: Any, **options: Any) -> None:
        self.model = model
        self.limit = limit
        self.optimizer = torch.optim.Adam(model.parameters(), 1e-2, foreach=False)
        self.reg = wc.Regularizer(model, limits(limit), **options)
        self.reg.attach(self.optimizer)

    def step(self, number: int) -> None:
        for seed, parameter in enumerate(self.model.parameters()):
            gradient = whole(parameter) - 0.2
            gradient += 0.3 * matrix(*parameter.shape, seed=100 * number + seed)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        self.optimizer.step()

    def check(self, single: "Training", late: bool = False) -> None:
        held = 1.01 if self.limit is UPPER else 1.05
        for name, ours in self.model.named_parameters():
            # For a square weight sharded by columns, the blocks are on the other side.
            near = 1e-3 if name == "square" else 1e-7
            theirs = single.model.get_parameter(name).detach()
            torch.testing.assert_close(whole(ours), theirs, rtol=near, atol=near)
            assert late or excess(ours, self.limit) <= held
        for ours, theirs in zip(self.reg._states, single.reg._states, strict=True):
            one, other = ours.record.to_tensor(), theirs.record.to_tensor()
            # Counts and estimates; those of a square weight can be of its other side.
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
            assert is_the_same(one)


def placed(placements: list[Any], where: Any) -> Weights:
    model = Weights()
    for name, parameter in list(model.named_parameters()):
        # Experts are sharded by expert, so one process can have none of them.
        model.register_parameter(
            name, nn.Parameter(distribute_tensor(parameter.detach(), where, placements))
        )
    return model


def sharded(world: int) -> None:
    layouts: list[tuple[list[Any], Any]] = [
        ([Shard(0)], mesh(world)),
        ([Shard(1)], mesh(world)),
    ]
    if world == 4:
        places: list[list[Any]] = [[Replicate(), Shard(0)], [Shard(0), Shard(1)], [Replicate()] * 2]
        layouts = [(each, mesh(2, 2)) for each in places]
    for limit in (KAPPA, UPPER):
        trainings = [Training(placed(*layout), limit) for layout in layouts]
        single = Training(Weights(), limit)
        for number in range(24):
            single.step(number)
            for training in trainings:
                training.step(number)
                training.check(single)
        records = [state.record for state in single.reg._states]
        assert limit is UPPER or sum(record.applications > 0 for record in records) >= 3
        assert min(record.looks for record in records) > 5


def replicas() -> None:
    """Only the owner of a weight checks it."""
    for limit in (KAPPA, UPPER, BOTH):
        for late in (False, True) if limit is KAPPA else (False,):
            deferred.LATE = late
            many = Training(Weights(), limit, process_group=dist.group.WORLD, check_replicas=True)
            single = Training(Weights(), limit)
            for number in range(26):
                single.step(number)
                many.step(number)
                many.check(single, late)
            for name, state in many.reg.state_dict().items():
                for key, tensor in state.items():
                    assert is_the_same(tensor), (name, key)
        deferred.LATE = False
        assert len({state.owner for state in many.reg._states}) == 2


def not_finite() -> None:
    """A weight is not finite on one process: all processes raise, and none waits."""
    trainings = [
        Training(placed([Shard(0)], mesh(2)), KAPPA),
        Training(placed([Shard(1)], mesh(2)), UPPER),
        Training(Weights(), UPPER, process_group=dist.group.WORLD),
        Training(Weights(), KAPPA, process_group=dist.group.WORLD),
    ]
    for training in trainings:
        for number in range(23):
            training.step(number)
        good = [parameter.detach().clone() for parameter in training.model.parameters()]
        for name in ("square", "experts"):
            lost = training.model.get_parameter(name).detach()
            with torch.no_grad():
                if isinstance(lost, DTensor):
                    if dist.get_rank() == 1:
                        lost.to_local().view(-1)[:1] = math.nan
                else:
                    lost.view(-1)[0] = math.nan
        for state in training.reg._states:
            state.record.interval = 1
        for number in (23, 24):
            with pytest.raises(ValueError, match=r'"experts".* "square" contain NaN'):
                training.step(number)
        with torch.no_grad():
            for parameter, values in zip(training.model.parameters(), good, strict=True):
                parameter.copy_(values)
        training.optimizer.state.clear()
        for number in range(30, 34):
            training.step(number)
            for parameter in training.model.parameters():
                assert excess(parameter, training.limit) <= 1.05


def one_expert() -> None:
    """One of several exceeds its limit by far, and only one process has it."""
    for limit in (KAPPA, UPPER):
        many, single = Training(placed([Shard(0)], mesh(2)), limit), Training(Weights(), limit)
        for number in range(22):
            many.step(number)
            single.step(number)
        for training in (many, single):
            experts = whole(training.model.get_parameter("experts"))
            experts[2, :, :2] *= 40.0
            with torch.no_grad():
                own = training.model.get_parameter("experts")
                if isinstance(own, DTensor):
                    experts = distribute_tensor(experts, own.device_mesh, own.placements)
                own.copy_(experts)
            for state in training.reg._states:
                state.record.interval = 1
        for number in range(22, 25):
            many.step(number)
            single.step(number)
            many.check(single)


@pytest.mark.parametrize("worker", [replicas, not_finite, one_expert])
def test_processes_watch_identically(worker: Callable[[], None], tmp_path: Path) -> None:
    run(2, tmp_path, worker)


@pytest.mark.parametrize("world", WORLDS)
def test_watching_shards_equals_unsharded(world: int, tmp_path: Path) -> None:
    """Sharded by rows and columns; on four processes also by blocks, with replicas of shards."""
    run(world, tmp_path, sharded, world)
