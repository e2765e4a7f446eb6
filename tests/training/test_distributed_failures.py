"""Several processes: one bad weight stops no other and no process waits; kappa of shards."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

import wellcond as wc
from processes import Zoo, distributed, mesh, needs_fsdp2_on_the_cpu, net, run, zoo

pytestmark = pytest.mark.distributed
K = wc.ConditionLimit(2.0)


def kappa(weight: Any) -> float:
    whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
    return float(wc.condition_number(whole.detach()))


def replicas() -> None:
    """All processes raise the same error, whichever of them has the bad weight."""
    for holders in ((0, 1), (0,), (1,)):
        for at in (0, 2, 4):
            model = net()
            if dist.get_rank() in holders:
                with torch.no_grad():
                    model[at].weight[0, 0] = math.nan
            reg = wc.Regularizer(model, K, process_group=dist.group.WORLD)
            owner = next(s.owner for s in reg._states if s.name == f"{at}.weight")
            raised = 0
            for enforcing in (reg.enforce, lambda reg=reg: reg.proximal_step(0.1)):
                says = ""
                try:
                    enforcing()
                except ValueError as error:
                    says = str(error)
                raised += f'"{at}.weight" contains NaN or infinity' in says
            # The process that applies the limit decides, and sends its result to all others.
            assert raised == (2 if owner in holders else 0)
            for i in {0, 2, 4} - {at}:
                assert kappa(model[i].weight) <= 2.0


def test_replicas_apply_other_limits_and_raise_the_same_error(tmp_path: Path) -> None:
    run(2, tmp_path, replicas)


class Raising(wc.Limit):
    """A limit that fails for weights of certain numbers of rows, each in a different way."""

    def __init__(self, rows: int, answer: Any) -> None:
        self.rows, self.answer = rows, answer

    def apply(self, S: torch.Tensor) -> torch.Tensor:
        if S.shape[0] != self.rows:
            return torch.zeros_like(S)
        if isinstance(self.answer, Exception):
            raise self.answer
        changed: torch.Tensor = self.answer(S)
        return changed


def limits_of_users() -> None:
    linalg = torch.linalg.LinAlgError("of no use")
    for answer in (linalg, KeyError("of no use"), lambda S: S * math.nan, lambda S: S[:1]):
        model = net()
        sizes = [layer.weight.shape[0] for layer in model if isinstance(layer, nn.Linear)]
        before = model[0].weight.detach().clone()
        reg = wc.Regularizer(model, Raising(sizes[0], answer), process_group=dist.group.WORLD)
        for enforcing in (reg.enforce, lambda reg=reg: reg.proximal_step(0.1)):
            with pytest.raises(ValueError, match=r'"0\.weight": ') as caught:
                enforcing()
            mine = reg._states[0].owner == dist.get_rank()
            assert ("for the entire group" in str(caught.value)) != mine
            assert torch.equal(model[0].weight, before)
            assert not any(model[i].weight.any() for i in (2, 4))


def test_replicas_share_errors_of_user_limits(tmp_path: Path) -> None:
    run(2, tmp_path, limits_of_users)


def shards() -> None:
    for placement in (Shard(0), Shard(1), Replicate()):
        model = net()
        for layer in model:
            layer.register_parameter("bias", None)  # a vector has no second dimension to shard
        distributed(model, mesh(2), [placement])
        with torch.no_grad():
            local = model[2].weight.to_local()  # type: ignore[index]
            if dist.get_rank() == 0 or placement == Replicate():
                local[0, 0] = math.nan
        for enforcing in (
            wc.Regularizer(model, K).enforce,
            lambda model=model: wc.Regularizer(model, K).proximal_step(0.1),
            lambda model=model: wc.enforce(model.requires_grad_(False), K),
        ):
            with pytest.raises(ValueError, match=r'"2\.weight" contains NaN or infinity'):
                enforcing()
        assert max(kappa(model[i].weight) for i in (0, 4)) <= 2.0  # type: ignore[index]


def test_shards_apply_other_limits_and_raise_the_same_error(tmp_path: Path) -> None:
    run(2, tmp_path, shards)


def watched() -> None:
    """Kappa of sharded weights equals that of the full weight, on every process."""
    for placement in (Shard(0), Shard(1), Replicate()):
        one = zoo()
        many = distributed(zoo(), mesh(2), [placement])
        patterns = ["experts", "attention.*"]
        if placement != Shard(1):  # a kernel can be sharded only over its first dimension
            patterns += ["convolution.*", "sequence.*"]
        expected, found = (
            wc.Monitor(model, patterns, condition_numbers=True).measure() for model in (one, many)
        )
        assert expected.keys() == found.keys()
        assert any(":" in name for name in found)
        for name, estimate in expected.items():
            assert found[name].condition_number == pytest.approx(
                estimate.condition_number, rel=1e-9
            ), name
    assert isinstance(many, Zoo)


def test_monitor_measures_kappa_of_shards(tmp_path: Path) -> None:
    run(2, tmp_path, watched)


def fully_sharded() -> None:
    from torch.distributed.fsdp import fully_shard

    one, many = net(torch.float32), net(torch.float32)
    fully_shard(many[0], mesh=mesh(2))
    fully_shard(many, mesh=mesh(2))
    monitor = wc.Monitor(many, condition_numbers=True)
    logged: dict[str, float] = {}
    monitor.log(lambda values, step: logged.update(values), step=0)
    largest = max(kappa(layer.weight) for layer in one if isinstance(layer, nn.Linear))
    assert logged["wellcond/condition_number/largest"] == pytest.approx(largest, rel=1e-6)
    many(torch.ones(2, 10)).sum().backward()
    monitor.measure()
    wc.enforce(many, K)
    assert max(kappa(p) for p in many.parameters() if p.ndim == 2) <= 2.0


@pytest.mark.slow
@needs_fsdp2_on_the_cpu
def test_a_monitor_measures_condition_numbers_under_fsdp2(tmp_path: Path) -> None:
    run(2, tmp_path, fully_sharded)


def wrapped() -> None:
    """Under DistributedDataParallel one process enforces each weight for all."""
    model = nn.parallel.DistributedDataParallel(net())
    wc.enforce(model, K)
    weights = [p.detach() for p in model.parameters() if p.ndim == 2]
    assert max(map(kappa, weights)) <= 2.0
    for weight in weights:
        same = weight.clone()
        dist.broadcast(same, 0)
        assert torch.equal(same, weight)


def test_enforce_shares_work_between_replicas(tmp_path: Path) -> None:
    run(2, tmp_path, wrapped)
