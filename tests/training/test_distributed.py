"""Many processes compute the same as one: sharded weights, replicas, real FSDP2, DDP and TP.

The tests start processes on the CPU with gloo.
"""

import copy
import datetime
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import wellcond as wc
from processes import (
    WORLDS,
    Holder,
    compare,
    compare_models,
    distributed,
    matrix,
    mesh,
    needs_fsdp2_on_the_cpu,
    net,
    run,
    zoo,
)
from registry import OF_FILES, OPERATORS
from wellcond.operators.base import Gradient, LowRank, NewWeight
from wellcond.operators.sharded import operator_of
from wellcond.operators.stored import StoredMatrix

pytestmark = pytest.mark.distributed


def compare_all_ways(one: nn.Module, many: nn.Module, penalties: Any, block_size: int = 4) -> None:
    """Value, gradients and proximal steps of a sharded model equal those of the unsharded one."""
    reg, sharded = (wc.Regularizer(m, penalties, block_size=block_size) for m in (one, many))
    for step in range(3):
        value, other = reg(), sharded()
        compare(other, value)
        value.backward()
        other.backward()
        if step == 1:
            reg.add_gradients()
            sharded.add_gradients()
        reg.proximal_step(0.05)
        sharded.proximal_step(0.05)
        for (name, p), q in zip(one.named_parameters(), many.parameters(), strict=True):
            if p.grad is not None:
                assert isinstance(q.grad, type(q.data)), name
                compare(q.grad, p.grad)
            compare(q.detach(), p.detach())
    ours, theirs = sharded.measure(), reg.measure()
    assert list(ours) == list(theirs)
    for name, estimate in theirs.items():
        assert math.isclose(ours[name].sigma_max, estimate.sigma_max, rel_tol=1e-5)
        assert math.isclose(ours[name].stable_rank, estimate.stable_rank, rel_tol=1e-5)
    for key, state in reg.state_dict().items():
        for field, tensor in state.items():
            if tensor.ndim < 2:
                assert torch.equal(sharded.state_dict()[key][field], tensor)


# --- sharded weights ------------------------------------------------------------------------------


def sharded_matrices(world: int) -> None:
    flat = mesh(world)
    layouts = [(flat, [Shard(0)]), (flat, [Shard(1)]), (flat, [Replicate()])]
    if world == 4:
        square = mesh(2, 2)
        layouts += [
            (square, [Shard(0), Shard(1)]),
            (square, [Replicate(), Shard(0)]),
            (square, [Shard(1), Replicate()]),
            (square, [Shard(0), Shard(0)]),
        ]
    # Even, uneven, with empty shards.
    for shape, dtype in [
        ((16, 8), torch.float32),
        ((13, 7), torch.float64),
        ((3, 10), torch.float64),
    ]:
        whole = matrix(*shape, dtype=dtype)
        for where, placements in layouts:
            part = distribute_tensor(whole.clone(), where, placements)
            compare_all_ways(Holder(whole.clone()), Holder(part), wc.ConditionPenalty(0.3))
            part = distribute_tensor(whole.clone(), where, placements)
            compare_all_ways(Holder(whole.clone()), Holder(part), wc.TikhonovPenalty(0.2))


@pytest.mark.parametrize("world", WORLDS)
def test_sharded_weight_equals_unsharded(world: int, tmp_path: Path) -> None:
    run(world, tmp_path, sharded_matrices, world)


def sharded_operators() -> None:
    """Every view of the registry, sharded over its rows, its columns, or not at all."""
    checked = []
    for name, case in OPERATORS.items():
        parameters = case.parameters()
        if len(parameters) > 1 or "channels last" in name:  # distribute the shards again
            continue
        whole = case.operator(parameters)
        if isinstance(whole.view, OF_FILES):
            continue
        for placement in (Shard(0), Shard(1), Replicate()):
            if ("kernel" in name or "groups" in name) and placement == Shard(1):
                continue
            part = distribute_tensor(parameters[0].clone(), mesh(2), [placement])
            S = operator_of(part, whole.view)
            *stack, m, n = whole.shape
            U, V = matrix(*stack, m, 3), matrix(*stack, n, 3, seed=1)
            compare(S.matmat(V), whole.matmat(V))
            compare(S.rmatmat(U), whole.rmatmat(U))
            compare(S.squared_frobenius_norm(), whole.squared_frobenius_norm())
            assert S.finite().all()
            assert S.finite().shape == whole.finite().shape
            c = torch.full(stack, 0.5, dtype=torch.float64)
            for form in (LowRank(c, U, V), matrix(*whole.shape, seed=2)):
                into, expected = torch.zeros_like(part), torch.zeros_like(parameters[0])
                S.pullback_(Gradient(form), [into])
                whole.pullback_(Gradient(form), [expected])
                compare(into, expected)
                other, new = part.clone(), parameters[0].clone()
                operator_of(other, whole.view).update_(NewWeight(form))
                operator_of(new, whole.view).update_(NewWeight(form))
                compare(other, new)
            checked.append((name, placement))
    assert len(checked) > 40


def test_operators_sharded_equal_unsharded(tmp_path: Path) -> None:
    run(2, tmp_path, sharded_operators)


def sharded_gram() -> None:
    for shape in ((9, 4), (4, 9), (5, 5), (3, 9, 4), (3, 4, 9)):
        whole, unit = matrix(*shape), torch.full(shape[:-2], 3.0)
        gram = StoredMatrix(whole).gram(torch.float64)
        for placement in (*map(Shard, range(len(shape))), Replicate()):
            S = operator_of(distribute_tensor(whole, mesh(2), [placement]))
            expected = whole @ whole.mT if not S.upright else gram
            compare(S.gram(), expected)
            compare(S.gram(unit=unit), expected / 9)


def test_gram_matrices_of_shards_are_summed(tmp_path: Path) -> None:
    run(2, tmp_path, sharded_gram)


def grouped_convolution() -> None:
    torch.manual_seed(0)
    whole = nn.Conv2d(8, 12, 3, groups=4, bias=False).double()
    many = copy.deepcopy(whole)
    part = distribute_tensor(many.weight.detach().clone(), mesh(2), [Shard(0)])
    many.weight = nn.Parameter(part)
    compare_all_ways(whole, many, wc.ConditionPenalty(0.3))
    compare_all_ways(whole, many, {"weight:group2": wc.ConditionPenalty(0.3), "*": None})
    odd = nn.Conv2d(6, 12, 3, groups=3, bias=False).double()
    odd.weight = nn.Parameter(distribute_tensor(odd.weight.detach(), mesh(2), [Shard(0)]))
    with pytest.raises(
        ValueError, match='"weight": a convolution kernel with 3 groups must be sharded'
    ):
        wc.Regularizer(odd, wc.ConditionPenalty(0.3))


@pytest.mark.slow
def test_grouped_convolution_is_sharded_by_groups(tmp_path: Path) -> None:
    run(2, tmp_path, grouped_convolution)


ZOO = {"experts": wc.ConditionPenalty(0.3), "*": wc.ConditionPenalty(0.3)}


def sharded_views() -> None:
    for placements in ([Shard(0)], [Replicate()]):
        compare_all_ways(zoo(), distributed(zoo(), mesh(2), placements), ZOO)
    # A part of the stack: the other matrices have no penalty.
    some = {"experts:1": wc.ConditionPenalty(0.3), "*": None}
    compare_all_ways(zoo(), distributed(zoo(), mesh(2), [Shard(0)]), some)
    with pytest.raises(ValueError, match="sharded over its first dimension only"):
        wc.Regularizer(
            distributed(zoo(), mesh(2), [Shard(1)]), {"conv*": wc.ConditionPenalty(1.0), "*": None}
        )
    with pytest.raises(ValueError, match="sharded across processes"):
        wc.audit(distributed(zoo(), mesh(2), [Shard(0)]))


@pytest.mark.slow
def test_views_of_sharded_weights_equal_unsharded(tmp_path: Path) -> None:
    run(2, tmp_path, sharded_views)


def nothing_large_is_sent() -> None:
    largest = 0
    reduce, gather = dist.all_reduce, dist.all_gather

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return reduce(tensor, *args, **kwargs)

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a weight was gathered")

    m, n, k = 200, 150, 4
    model = Holder(distribute_tensor(matrix(m, n), mesh(2), [Shard(0)]))
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.1), block_size=k)
    dist.all_reduce, dist.all_gather = counted, refused
    try:
        reg().backward()
        reg.add_gradients()
        reg.proximal_step(0.1)
    finally:
        dist.all_reduce, dist.all_gather = reduce, gather
    assert 0 < largest <= max(m, n) * k


def test_processes_sum_only_skinny_factors(tmp_path: Path) -> None:
    run(2, tmp_path, nothing_large_is_sent)


def one_bad_shard() -> None:
    whole = matrix(8, 6)
    whole[7, 0] = math.nan  # only on the last process
    for penalty in (wc.ConditionPenalty(0.1), wc.TikhonovPenalty(0.1)):
        model = Holder(distribute_tensor(whole.clone(), mesh(2), [Shard(0)]))
        reg = wc.Regularizer(model, penalty, block_size=2)
        with pytest.raises(ValueError, match=r'"layer.weight" contains NaN'):
            reg.proximal_step(0.1)
        assert torch.equal(model.layer.weight.full_tensor().isnan(), whole.isnan())


def test_shard_that_is_not_finite_raises_on_all_processes(tmp_path: Path) -> None:
    run(2, tmp_path, one_bad_shard)


# --- FSDP2 and tensor parallel --------------------------------------------------------------------


def train(
    model: nn.Module, way: str, rank: int = 0, world: int = 1, steps: int = 12, **options: Any
) -> wc.Regularizer:
    """Trains a few steps on the rows of each batch that belong to this process."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.5), block_size=4, **options)
    if way == "proximal":
        reg.attach(optimizer, every=3)
    source = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x = torch.randn(8, 10, generator=source, dtype=torch.float64)[rank::world]
        optimizer.zero_grad()
        loss = model(x).square().mean()
        (loss + reg() if way == "loss" else loss).backward()
        if way == "gradients":
            reg.add_gradients()
        optimizer.step()
    return reg


def fully_sharded(world: int) -> None:
    from torch.distributed.fsdp import fully_shard

    for way in ("loss", "gradients", "proximal"):
        model, single = net(), net()
        for layer in (model[0], model[2]):  # the last one belongs to the root
            fully_shard(layer)
        fully_shard(model)
        train(model, way, dist.get_rank(), world)
        train(single, way)
        compare_models(model, single)


def made_before_and_after() -> None:
    from torch.distributed.fsdp import fully_shard

    weights = []
    for before in (True, False):
        model = net()
        if before:
            reg = wc.Regularizer(model, wc.ConditionPenalty(0.5), block_size=4)
        fully_shard(model)
        if not before:
            reg = wc.Regularizer(model, wc.ConditionPenalty(0.5), block_size=4)
        reg.attach(torch.optim.SGD(model.parameters(), 0.1))
        reg.proximal_step(0.1)
        weights.append([p.full_tensor() for p in model.parameters()])
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)


def test_regulariser_created_before_or_after_sharding(tmp_path: Path) -> None:
    run(2, tmp_path, made_before_and_after)


def measured_in_part() -> None:
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model)
    weight = model[0].weight
    with pytest.raises(TypeError, match=r"Pass S\.full_tensor\(\)"):
        wc.condition_number(weight)
    assert wc.condition_number(weight.full_tensor()) == wc.condition_number(net()[0].weight)


def test_shard_is_not_measured_as_the_full_weight(tmp_path: Path) -> None:
    run(2, tmp_path, measured_in_part)


@needs_fsdp2_on_the_cpu
@pytest.mark.parametrize("world", WORLDS)
def test_training_under_fsdp2_equals_one_process(world: int, tmp_path: Path) -> None:
    run(world, tmp_path, fully_sharded, world)


def tensor_parallel_and_both() -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    for way in ("loss", "gradients", "proximal"):
        single = net()
        train(single, way)
        model = parallelize_module(net(), mesh(4), plan)
        train(model, way)
        compare_models(model, single)
        square = mesh(2, 2)
        both = parallelize_module(net(), square["inner"], plan)
        for layer in (both[0], both[2]):
            fully_shard(layer, mesh=square["outer"])
        fully_shard(both, mesh=square["outer"])
        train(both, way, square.get_local_rank("outer"), 2)
        compare_models(both, single)


@needs_fsdp2_on_the_cpu
def test_training_under_tensor_parallelism_and_on_a_mesh_of_both_equals_one_process(
    tmp_path: Path,
) -> None:
    run(4, tmp_path, tensor_parallel_and_both)


def test_fsdp1_is_rejected_with_a_remedy(tmp_path: Path) -> None:
    run(1, tmp_path, flat_parameters)


def flat_parameters() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="fully_shard, which"):
        wc.Regularizer(model, wc.ConditionPenalty(1.0))


# --- replicas -------------------------------------------------------------------------------------


def replicated(world: int) -> None:
    from torch.nn.parallel import DistributedDataParallel

    rank = dist.get_rank()
    for way in ("loss", "gradients", "proximal"):
        model, single = net(), net()
        wrapped = DistributedDataParallel(model)
        reg = train(wrapped, way, rank, world, check_replicas=True)
        assert reg.names == ["0.weight", "2.weight", "4.weight"]
        alone = train(single, way)
        compare_models(model, single)
        # Bit for bit the same on all ranks: weights and memory.
        tensors = [*model.parameters(), *(t for s in reg.state_dict().values() for t in s.values())]
        for tensor in tensors:
            first = tensor.detach().clone()
            dist.broadcast(first, 0)
            assert torch.equal(first, tensor)
        for name, state in alone.state_dict().items():
            assert torch.equal(reg.state_dict()[name]["step"], state["step"])

    # Every weight is multiplied on one rank, and no rank has all of them.
    reg = wc.Regularizer(DistributedDataParallel(net()), wc.ConditionPenalty(0.5), block_size=4)
    reg.proximal_step(0.0)
    products = torch.zeros(1)
    owners = [state.owner for state in reg._states]
    assert set(owners) == set(range(min(world, 3)))
    multiplied: list[str] = []
    for state in reg._states:
        state.operator = _counting(state.operator, state.name, multiplied)
    reg.proximal_step(0.1)
    assert multiplied == [s.name for s in reg._states if s.owner == rank]
    products += len(multiplied)
    dist.all_reduce(products)
    assert int(products) == 3


def _counting(operator: Callable[..., Any], name: str, multiplied: list[str]) -> Callable[..., Any]:
    def wrapped(*args: Any) -> Any:
        S = operator(*args)
        for way in ("partial_matmat", "partial_rmatmat"):
            product = getattr(S, way)

            def counted(X: Tensor, product: Callable[[Tensor], Tensor] = product) -> Tensor:
                multiplied.append(name)
                return product(X)

            setattr(S, way, counted)
        return S

    return wrapped


@pytest.mark.parametrize("world", WORLDS)
def test_replicas_share_the_work_and_stay_identical(world: int, tmp_path: Path) -> None:
    run(world, tmp_path, replicated, world)


def diverged() -> None:
    model = net()
    reg = wc.Regularizer(
        model, wc.ConditionPenalty(0.5), process_group=dist.group.WORLD, check_replicas=True
    )
    reg.proximal_step(0.1)
    if dist.get_rank() == 1:
        with torch.no_grad():
            model[2].weight[0, 0] += 1e-12
    with pytest.raises(RuntimeError, match=r'"2.weight" is not the same on all'):
        reg.proximal_step(0.1)
    limit = wc.Regularizer(
        model, wc.ConditionLimit(1.1), process_group=dist.group.WORLD, check_replicas=True
    )
    before = model[2].weight.clone()
    with pytest.raises(RuntimeError, match=r'"2.weight" is not the same on all'):
        limit.enforce()
    assert torch.equal(model[2].weight, before)
    with pytest.raises(ValueError, match="`check_replicas` needs the group of processes"):
        wc.Regularizer(model, wc.ConditionLimit(1.1), check_replicas=True)


def test_check_replicas_names_different_weights(tmp_path: Path) -> None:
    run(2, tmp_path, diverged)


def limited_replicas() -> None:
    model, single = net(), net()
    reg = wc.Regularizer(model, wc.ConditionLimit(2.0), process_group=dist.group.WORLD)
    reg.proximal_step(0.0)
    wc.Regularizer(single, wc.ConditionLimit(2.0)).proximal_step(0.0)
    compare_models(model, single)
    for name in reg.names:
        assert wc.condition_number(model.get_parameter(name)) <= 2.0


def test_hard_limit_is_computed_once_and_sent(tmp_path: Path) -> None:
    run(2, tmp_path, limited_replicas)


# --- failures and checkpoints ---------------------------------------------------------------------


def _failing(rank: int, store: str, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=5),
    )
    model = Holder(distribute_tensor(matrix(8, 6), mesh(2), [Shard(0)]))
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.1), block_size=2)
    reg.proximal_step(0.1)
    if rank == 1:
        os._exit(3)  # without an error, like a killed process
    started = time.monotonic()
    try:
        reg.proximal_step(0.1)
    except RuntimeError as error:
        Path(result).write_text(f"{time.monotonic() - started:.0f} {error}")
    os._exit(0)


@pytest.mark.slow
def test_dead_process_blocks_others_at_most_for_the_timeout(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    result = tmp_path / "result"
    processes = [
        context.Process(target=_failing, args=(rank, str(tmp_path / "store"), str(result)))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert not process.is_alive()
    seconds, message = result.read_text().split(" ", 1)
    assert int(seconds) <= 10
    assert message


def saved(path: str) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    reg = wc.Regularizer(model, wc.ConditionPenalty(0.5), block_size=4)
    existing = Path(path).exists()
    if existing:
        state = {"model": model.state_dict(), "reg": reg}
        dcp.load(state, checkpoint_id=path)
        model.load_state_dict(state["model"])
    else:
        reg.attach(optimizer, every=2)
        _descend(model, optimizer, 5)
        dcp.save({"model": model.state_dict(), "reg": reg}, checkpoint_id=path)
        reg.detach()
    reg.attach(optimizer, every=2)
    _descend(model, optimizer, 4)
    whole = {name: p.full_tensor() for name, p in model.named_parameters()}
    if dist.get_rank() == 0:
        torch.save((whole, reg.state_dict()), f"{path}-{dist.get_world_size()}.pt")


def _descend(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x = matrix(8, 10, seed=9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.slow
@needs_fsdp2_on_the_cpu
def test_distributed_checkpoint_with_another_number_of_processes(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    for world in (4, 2, 1):
        (tmp_path / str(world)).mkdir()
        run(world, tmp_path / str(world), saved, str(path))
    whole, state = torch.load(f"{path}-4.pt")
    for world in (2, 1):
        other, restored = torch.load(f"{path}-{world}.pt")
        for name, weight in whole.items():
            torch.testing.assert_close(other[name], weight, rtol=1e-11, atol=1e-12)
        for name, fields in state.items():
            for field in ("step", "pending_steps", "warm", "from_right"):
                assert torch.equal(restored[name][field], fields[field])
    assert copy.copy(int(state["0.weight"]["step"])) == 9
