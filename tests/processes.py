"""Processes on the CPU that communicate with gloo, and models that are sharded over them."""

import contextlib
import datetime
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

if sys.platform != "win32":  # Windows has no forkserver
    # The processes are forked from one that has imported these, which takes seconds. Optimizers
    # import torch._dynamo.
    multiprocessing.set_forkserver_preload(
        [
            "torch._dynamo",
            "torch.distributed.fsdp",
            "torch.distributed.tensor.parallel",
            "torch.distributed.checkpoint",
            "wellcond",
            "wellcond.cli",
            "wellcond.audits.repair",
        ]
    )
# Four processes, where shards can be empty, take twice as long as two.
WORLDS = [2, pytest.param(4, marks=pytest.mark.slow)]
TIMEOUT = datetime.timedelta(seconds=60)
needs_fsdp2_on_the_cpu = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="fully_shard of this torch records events on streams, which the CPU lacks",
)


def _start(rank: int, world: int, store: str, worker: Callable[..., None], *args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=TIMEOUT
    )
    worker(*args)
    dist.barrier()
    # Threads of gloo that still run when the interpreter ends abort it.
    os._exit(0)


def run(world: int, tmp_path: Path, worker: Callable[..., None], *args: Any) -> None:
    mp.start_processes(
        _start,
        (world, str(tmp_path / "store"), worker, *args),
        nprocs=world,
        start_method="forkserver",
    )


def _execute(rank: int, code: str, folder: Path) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    with (folder / "printed").open("w") as printed, contextlib.redirect_stdout(printed):
        exec(compile(code, "<program>", "exec"), {"__name__": "__main__"})
    os._exit(0)  # see `_start`


def run_program(code: str, folder: Path) -> str:
    """Runs a program in `folder` in a separate process; returns its output."""
    mp.start_processes(_execute, (code, folder), nprocs=1, start_method="forkserver")
    return (folder / "printed").read_text()


def _call(function: Callable[..., int], args: tuple[Any, ...], out: Any, err: Any) -> None:
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    code = function(*args)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def call(function: Callable[..., int], *args: Any) -> tuple[int, str, str]:
    """Calls a function in a separate process; returns its exit code and its output.

    The code is the return value of the function, or minus the signal that ended the process. The
    output must fit into a pipe.
    """
    context = multiprocessing.get_context("forkserver")
    (out, out_end), (err, err_end) = context.Pipe(duplex=False), context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(function, args, out_end, err_end))
    process.start()
    out_end.close()
    err_end.close()
    process.join()
    assert process.exitcode is not None
    printed, said = (os.fdopen(end.fileno(), closefd=False).read() for end in (out, err))
    return process.exitcode, printed, said


def mesh(*shape: int) -> Any:
    names = ("outer", "inner")[: len(shape)]
    return dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)


def matrix(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Holder(nn.Module):
    """One weight, as in a Linear layer."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        self.layer.weight = nn.Parameter(weight)


def compare(sharded: Tensor, single: Tensor) -> None:
    whole = sharded.full_tensor() if isinstance(sharded, DTensor) else sharded
    tolerance = 1e-12 if single.dtype == torch.float64 else 1e-5
    scale = float(single.detach().abs().max())
    torch.testing.assert_close(whole, single, rtol=0, atol=tolerance * max(scale, 1.0))


class Zoo(nn.Module):
    """Weights with views: blocks, kernels, stacks, and a transposed weight of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, bias=False)
        self.convolution = nn.Conv2d(3, 5, 3, bias=False)
        self.sequence = nn.Conv1d(4, 6, 3, bias=False)
        self.experts = nn.Parameter(torch.empty(3, 4, 6))


def zoo(dtype: torch.dtype = torch.float64) -> Zoo:
    model = Zoo().to(dtype)
    for index, parameter in enumerate(model.parameters()):
        parameter.data = matrix(*parameter.shape, dtype=dtype, seed=index)
    return model


def distributed(model: nn.Module, where: Any, placements: list[Any]) -> nn.Module:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                part = distribute_tensor(parameter.data, where, placements)
                module._parameters[name] = nn.Parameter(part)
    return model


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 5)
        ).to(dtype)


def compare_models(many: nn.Module, one: nn.Module) -> None:
    for p, q in zip(many.parameters(), one.parameters(), strict=True):
        whole = p.full_tensor() if isinstance(p, DTensor) else p
        torch.testing.assert_close(whole, q, rtol=1e-9, atol=1e-9)
