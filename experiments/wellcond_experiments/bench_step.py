"""Benchmark of a training step: every way of regularising in turn, so that all see one machine.

The figures are medians of ratios pair by pair. What a device would see is counted without one: on
meta tensors, which hold no data, whatever asks for a number fails.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import wellcond as wc
from wellcond.text import dump_json
from wellcond_experiments import _run
from wellcond_experiments.methods import seeded
from wellcond_experiments.tables import Table

FIRST = "0.weight"
BLOCK = 10  # steps in a block: `every=10` acts exactly once in it
_OURS = ("attach", "add_gradients", "in the loss")


def configure(benchmarks: Any) -> None:
    step = benchmarks.add_parser(
        "step",
        help="cost of a training step, and memory",
        description="Time of a training step in every way of applying a penalty, as a multiple of "
        "the step without: of a 784-2048-10 net, batch 32, with the penalty on the first layer, or "
        "of a transformer of 24 blocks with the penalty on all its weights. Fused Adam.",
        epilog="example: wellcond bench step --rounds 60",
    )
    step.add_argument("--model", choices=("mlp", "transformer"), default="mlp")
    step.add_argument("--rounds", type=_run.positive, default=40, help="rounds of 10 steps each")
    step.add_argument("--every", type=_run.positive, default=10, help="for attach (default 10)")
    step.add_argument("--block", type=_run.positive, default=32, help="width (default 32)")
    step.add_argument("--batch", type=_run.positive, default=32, help="batch size (default 32)")
    step.add_argument("--hidden", type=_run.positive, default=2048, help="hidden units of the mlp")
    step.add_argument("--blocks", type=_run.positive, default=24, help="of the transformer")
    step.add_argument("--width", type=_run.positive, default=128, help="of the transformer")
    step.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    _run.add_output(step)
    step.set_defaults(run=run)


class Transformer(nn.Module):
    """A classifier of sequences of 16 tokens."""

    def __init__(self, blocks: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(1000, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.tokens(x)).mean(dim=1))
        return logits


def _model(arguments: argparse.Namespace) -> nn.Module:
    if arguments.model == "transformer":
        return seeded(lambda: Transformer(arguments.blocks, arguments.width), 0)
    hidden = arguments.hidden
    return seeded(
        lambda: nn.Sequential(nn.Linear(784, hidden), nn.Sigmoid(), nn.Linear(hidden, 10)), 0
    )


def _batch(arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    y = torch.randint(10, (arguments.batch,), generator=source)
    if arguments.model == "transformer":
        return torch.randint(1000, (arguments.batch, 16), generator=source), y
    return torch.randn(arguments.batch, 784, generator=source), y


def _names(arguments: argparse.Namespace) -> list[str]:
    every = arguments.every
    names = ["none", "none again", f"attach(every={every})", "add_gradients", "in the loss"]
    names += ["Tikhonov add_gradients", "Tikhonov in the loss"]
    if arguments.model == "mlp":
        names += [
            f"limit that holds, every={every}",
            f"limit kept up, every={every}",
            "exact SVD in the loss",
            "spectral_norm of torch",
            "orthogonality in the loss",
        ]
    return names


class _Way:
    """One way of training, with a network and an optimizer of its own."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self.name = name
        # The exact SVD takes so long that one step a round is enough.
        self.steps = 1 if name.startswith("exact") else BLOCK
        self.device = torch.device(arguments.device)
        self.model = _model(arguments).to(self.device)
        self.penalty: Callable[[], Tensor] | None = None
        self.add: Callable[[], None] | None = None
        self.reg: wc.Regularizer | None = None
        if name.startswith("spectral_norm"):
            nn.utils.parametrizations.spectral_norm(self.model.get_submodule("0"))
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-4, fused=True)
        if name.startswith("exact"):
            self.penalty = self._exact
        elif name.startswith("orthogonality"):
            self.penalty = self._orthogonality
        elif name not in ("none", "none again") and not name.startswith("spectral_norm"):
            penalty: wc.Penalty | wc.Limit = wc.ConditionPenalty(1e-2)
            if name.startswith("Tikhonov"):
                penalty = wc.TikhonovPenalty(1e-4)
            if name.startswith("limit"):
                # kappa is about 4 at the start: one limit that holds, one that has to be kept up.
                penalty = wc.ConditionLimit(3.0 if "kept" in name else 1e3)
            patterns = {"*": penalty} if arguments.model != "mlp" else {FIRST: penalty, "*": None}
            self.reg = reg = wc.Regularizer(self.model, patterns, block_size=arguments.block)
            if name.startswith(("attach", "limit")):
                reg.attach(self.optimizer, every=arguments.every)
            elif name.endswith("add_gradients"):
                self.add = reg.add_gradients
            else:
                self.penalty = reg

    def _weight(self) -> Tensor:
        return self.model.get_submodule("0").weight  # type: ignore[return-value]

    def _exact(self) -> Tensor:
        S = self._weight()
        sigma = torch.linalg.svdvals(S)
        value: Tensor = 1e-2 * (sigma[0] ** 2 / 2 - S.square().sum() / (2 * min(S.shape)))
        return value

    def _orthogonality(self) -> Tensor:
        S = self._weight()
        eye = torch.eye(S.shape[-1], device=S.device)
        return 1e-4 * (S.mT @ S - eye).square().sum()

    def seconds(self, x: Tensor, y: Tensor) -> float:
        """Seconds per step, over one block.

        Two steps come before it: another net has just filled the caches. Any 10 steps in a row hold
        one proximal step of `every=10`, wherever they begin.
        """
        for _ in range(2 if self.steps == BLOCK else 0):
            self._step(x, y)
        self._wait()
        started = time.perf_counter()
        for _ in range(self.steps):
            self._step(x, y)
        self._wait()
        return (time.perf_counter() - started) / self.steps

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(x), y)
        if self.penalty is not None:
            loss = loss + self.penalty()
        torch.autograd.backward(loss)
        if self.add is not None:
            self.add()
        self.optimizer.step()


def run(arguments: argparse.Namespace) -> int:
    _run.apply_threads(arguments)
    with _run.progress(arguments.rounds + 1, "bench step") as advance:
        document = measured(arguments, advance)
    if arguments.json:
        print(dump_json(document), end="")
        return 0
    settings = document["settings"]
    regularised = f", {settings['weights']} matrices regularised" * (settings["weights"] > 1)
    Table(
        f"A training step of a {settings['net']}, batch {arguments.batch}, fused "
        f"Adam{regularised}, on {arguments.device}, {torch.get_num_threads()} threads: medians of "
        f"{arguments.rounds} interleaved rounds; operations and host synchronisations that a "
        "device sees, per step; memory, as shares of the weight: the largest tensor that is made, "
        "and what is kept",
        ["way", "multiple", "quartiles", "ms per step", "operations", "waits", "made", "kept"],
        [
            [
                row["way"],
                f"{row['ratio']:.2f}",
                f"{row['lower_quartile']:.2f} to {row['upper_quartile']:.2f}",
                f"{row['milliseconds']:.2f}",
                *(
                    f"{row[key]:.{digits}f}" if key in row else ""
                    for key, digits in (
                        *(("operations", 1), ("synchronisations", 1)),
                        *(("temporary", 3), ("state", 3)),
                    )
                ),
            ]
            for row in document["ways"]
        ],
    ).print()
    return 0


def measured(
    arguments: argparse.Namespace, advance: Callable[[str], None] = lambda label: None
) -> dict[str, Any]:
    """All ways in turn: settings, and per way its ratio to none, what a device sees, and memory."""
    x, y = (tensor.to(arguments.device) for tensor in _batch(arguments))
    names = _names(arguments)
    ways = [_Way(name, arguments) for name in names]
    order, shuffled = random.Random(0), list(ways)
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(arguments.rounds + 1):
        order.shuffle(shuffled)
        for way in shuffled:
            seconds = way.seconds(x, y)
            if round_:  # the first round warms up
                times[way.name].append(seconds)
        advance("")
    pairs = zip(times["none"], times["none again"], strict=True)
    unregularised = [(one + other) / 2 for one, other in pairs]
    table: list[dict[str, Any]] = []
    for way in ways:
        ratios = [t / n for t, n in zip(times[way.name], unregularised, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        table.append(
            {
                "way": way.name,
                "ratio": middle,
                "lower_quartile": low,
                "upper_quartile": high,
                "milliseconds": 1e3 * statistics.median(times[way.name]),
            }
            | (count(way.name, arguments) if way.name.startswith(_OURS) else {})
            | (memory(way) if arguments.model == "mlp" else {})
        )
    net = f"784-{arguments.hidden}-10 net"
    if arguments.model == "transformer":
        net = f"transformer of {arguments.blocks} blocks of width {arguments.width}"
    weights = wc.Regularizer(ways[0].model, wc.ConditionPenalty(0.0)).names
    return {
        "benchmark": "step",
        "settings": {"rounds": arguments.rounds, "steps": BLOCK, "block": arguments.block}
        | {"net": net, "batch": arguments.batch, "device": arguments.device}
        | {"weights": 1 if arguments.model == "mlp" else len(weights)},
        "versions": _run.versions(),
        "ways": table,
    }


# --- what a device sees ---------------------------------------------------------------------------

# Factorisations whose status the host reads on a CUDA device; a view is no operation there.
_WAITING = ("_linalg_eigh", "_linalg_svd", "linalg_cholesky.", "nonzero", "_local_scalar_dense")
_VIEWS = (
    *("view", "transpose", "permute", "unbind", "slice", "select", "unsqueeze", "squeeze"),
    *("detach", "expand", "alias", "as_strided", "narrow", "diagonal", "t.default", "split"),
)


class _Device(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, and those for which the host would wait, on meta tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = self.synchronisations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).removeprefix("aten.")
        to_host = name.startswith("_to_copy") and kwargs.get("device") == torch.device("cpu")
        waiting = name.startswith(_WAITING)
        if waiting or (to_host and not kwargs.get("non_blocking")):
            self.synchronisations += 1
        if any(x.is_meta for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)):
            self.operations += not name.startswith(_VIEWS)
        if to_host and args[0].is_meta:
            return torch.zeros_like(args[0], device="cpu")
        return func(*args, **kwargs)


class _NoEvent:
    """Stands for an event of a device, which meta tensors have not."""

    def __init__(self, device: torch.device) -> None: ...

    def record(self) -> None: ...

    def query(self) -> bool:
        return False


@contextlib.contextmanager
def on_a_device() -> Iterator[_Device]:
    """Counts what is asked of a device that holds no data."""
    with mock.patch("torch.Event", _NoEvent), _Device() as device:
        yield device


def count(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Operations and synchronisations of the regulariser per step, once it is warm."""
    model = _model(arguments).to("meta")
    patterns: dict[str, wc.ConditionPenalty | None] = {"*": wc.ConditionPenalty(1e-2)}
    if arguments.model == "mlp":
        patterns = {FIRST: wc.ConditionPenalty(1e-2), "*": None}
    reg = wc.Regularizer(model, patterns, block_size=arguments.block)
    per_step = 1
    ways: dict[str, Callable[[], Any]] = {"add_gradients": reg.add_gradients}
    ways["in the loss"] = lambda: torch.autograd.backward(reg())
    if name.startswith("attach"):
        per_step = arguments.every
    way = ways.get(name, lambda: reg.proximal_step(1e-3))
    with on_a_device():
        way()
    with on_a_device() as device:
        way()
    return {
        "operations": device.operations / per_step,
        "synchronisations": device.synchronisations / per_step,
    }


# --- memory ---------------------------------------------------------------------------------------


class _LargestAllocation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The largest storage that any operation makes anew, in bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_storage(x) for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and _storage(made) not in known:
                self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def memory(way: _Way) -> dict[str, float]:
    """The largest tensor that a way makes in a step, and what it keeps, over the weight's bytes."""
    reg, size = way.reg, way._weight().nbytes
    with _LargestAllocation() as largest:
        if way.penalty is not None:
            torch.autograd.backward(way.penalty())
        elif way.add is not None:
            way.add()
        elif reg is not None and way.name.startswith("limit"):
            reg.enforce()
        elif reg is not None:
            reg.proximal_step(1e-3)
        elif way.name.startswith("spectral_norm"):
            way._weight()
    kept = (
        [tensor for entry in reg.state_dict().values() for tensor in entry.values()] if reg else []
    )
    kept += list(way.model.buffers())
    return {"temporary": largest.bytes / size, "state": sum(t.nbytes for t in kept) / size}
