"""Cost of a training step. All methods take turns, so that load on the machine affects all.

The results are medians of paired ratios. Operations on a GPU are counted without one, on meta
tensors. They contain no data, so any operation that reads a value fails.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import wellcond as wc
from wellcond_experiments.benchmark import Benchmark, count, option
from wellcond_experiments.command import Advance
from wellcond_experiments.methods import run_seeded

FIRST = "0.weight"
BLOCK = 10  # steps per block: `every=10` acts exactly once per block


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


@dataclass(frozen=True)
class Method:
    """A method of training.

    Args:
        name: the name in the table.
        rule: the rule of wellcond, if any.
        mode: how the rule is applied: "attach", "add_gradients" or "loss".
        penalty: a function of the first weight that is added to the loss.
        normalised: whether the first layer uses `spectral_norm` of torch.
        steps: the number of steps that are timed together.
    """

    name: str
    rule: wc.Penalty | wc.Limit | None = None
    mode: str = ""
    penalty: Callable[[Tensor], Tensor] | None = None
    normalised: bool = False
    steps: int = BLOCK

    def act(self, reg: wc.Regularizer) -> None:
        """Does the work of the rule for one step, without the step."""
        if self.mode == "loss":
            torch.autograd.backward(reg())
        elif self.mode == "add_gradients":
            reg.add_gradients()
        elif isinstance(self.rule, wc.Limit):
            reg.enforce()
        else:
            reg.proximal_step(1e-3)


def exact_penalty(S: Tensor) -> Tensor:
    """Returns 0.01 r(S), computed by an SVD."""
    sigma = torch.linalg.svdvals(S)
    value: Tensor = 1e-2 * (sigma[0] ** 2 / 2 - S.square().sum() / (2 * min(S.shape)))
    return value


def orthogonality_penalty(S: Tensor) -> Tensor:
    return 1e-4 * (S.mT @ S - torch.eye(S.shape[-1], device=S.device)).square().sum()


@dataclass(frozen=True)
class Step(Benchmark):
    name = "step"
    help = "time and memory of a training step"
    description = (
        "Time of a training step with every mode of applying a penalty, relative to a step without "
        "it: for a 784-2048-10 network, batch 32, with the penalty on the first layer, or for a "
        "transformer of 24 blocks with the penalty on all weights. Fused Adam."
    )
    example = "--rounds 60"
    rows = "ways"
    columns: ClassVar = {
        "way": ("method", ""),
        "ratio": ("relative time", ".2f"),
        "lower_quartile": ("from", ".2f"),
        "upper_quartile": ("to", ".2f"),
        "milliseconds": ("ms per step", ".2f"),
        "operations": ("operations", ".1f"),
        "synchronisations": ("host syncs", ".1f"),
        "temporary": ("largest temporary", ".3f"),
        "state": ("state", ".3f"),
    }

    model: str = option("mlp", choices=("mlp", "transformer"))
    rounds: int = count(40, "rounds of 10 steps each")
    every: int = count(10, "interval of attach")
    block: int = count(32, "width of the warm-started block")
    batch: int = count(32, "batch size")
    hidden: int = count(2048, "hidden units of the mlp")
    blocks: int = count(24, "blocks of the transformer")
    width: int = count(128, "width of the transformer")
    device: str = option("cpu", "cpu or cuda")

    @property
    def total(self) -> int:
        return self.rounds + 1

    def methods(self) -> list[Method]:
        r, tikhonov = wc.ConditionPenalty(1e-2), wc.TikhonovPenalty(1e-4)
        every = f"every={self.every}"
        methods = [
            Method("none"),
            Method("none again"),
            Method(f"attach({every})", r, "attach"),
            Method("add_gradients", r, "add_gradients"),
            Method("in the loss", r, "loss"),
            Method("TikhonovPenalty, add_gradients", tikhonov, "add_gradients"),
            Method("TikhonovPenalty, in the loss", tikhonov, "loss"),
        ]
        if self.model == "mlp":
            # kappa is about 4 at the start: one limit is inactive, one is active at every step.
            methods += [
                Method(f"limit that holds, {every}", wc.ConditionLimit(1e3), "attach"),
                Method(f"limit kept up, {every}", wc.ConditionLimit(3.0), "attach"),
                # This step is so slow that one per round is enough.
                Method("exact SVD in the loss", penalty=exact_penalty, steps=1),
                Method("spectral_norm of torch", normalised=True),
                Method("orthogonality in the loss", penalty=orthogonality_penalty),
            ]
        return methods

    def build(self) -> nn.Module:
        if self.model == "transformer":
            return run_seeded(lambda: Transformer(self.blocks, self.width), 0)
        layers = (784, self.hidden), (self.hidden, 10)
        return run_seeded(
            lambda: nn.Sequential(nn.Linear(*layers[0]), nn.Sigmoid(), nn.Linear(*layers[1])), 0
        )

    def regularizer(self, model: nn.Module, rule: wc.Penalty | wc.Limit) -> wc.Regularizer:
        rules = {FIRST: rule, "*": None} if self.model == "mlp" else {"*": rule}
        return wc.Regularizer(model, rules, block_size=self.block)

    def draw_batch(self) -> tuple[Tensor, Tensor]:
        source = torch.Generator().manual_seed(0)
        y = torch.randint(10, (self.batch,), generator=source)
        if self.model == "transformer":
            return torch.randint(1000, (self.batch, 16), generator=source), y
        return torch.randn(self.batch, 784, generator=source), y

    def measure(self, advance: Advance) -> dict[str, Any]:
        """Measures, per method, the relative time, GPU operations, and memory."""
        x, y = (tensor.to(self.device) for tensor in self.draw_batch())
        trainings = [Training(self, method) for method in self.methods()]
        order, shuffled = random.Random(0), list(trainings)
        for round_ in range(self.rounds + 1):
            order.shuffle(shuffled)
            for training in shuffled:
                seconds = training.time_step(x, y)
                if round_:  # the first round warms up
                    training.times.append(seconds)
            advance("")
        none, again, *_ = (training.times for training in trainings)
        unregularised = [(one + other) / 2 for one, other in zip(none, again, strict=True)]
        net = f"784-{self.hidden}-10 net"
        if self.model == "transformer":
            net = f"transformer of {self.blocks} blocks of width {self.width}"
        regularised = self.regularizer(trainings[0].model, wc.ConditionPenalty(0.0)).names
        return {
            "settings": {"rounds": self.rounds, "steps": BLOCK, "block": self.block}
            | {"net": net, "batch": self.batch, "device": self.device}
            | {"weights": len(regularised)},
            "ways": [self._row(training, unregularised) for training in trainings],
        }

    def _row(self, training: Training, unregularised: list[float]) -> dict[str, Any]:
        method = training.method
        ratios = [t / n for t, n in zip(training.times, unregularised, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        row = {
            "way": method.name,
            "ratio": middle,
            "lower_quartile": low,
            "upper_quartile": high,
            "milliseconds": 1e3 * statistics.median(training.times),
        }
        if isinstance(method.rule, wc.ConditionPenalty):
            row |= self.count_operations(method)
        if self.model == "mlp":
            row |= training.measure_memory()
        return row

    def count_operations(self, method: Method) -> dict[str, float]:
        """Counts operations and synchronisations of the regulariser per step after a warm-up."""
        assert method.rule is not None
        reg = self.regularizer(self.build().to("meta"), method.rule)
        steps = self.every if method.mode == "attach" else 1
        with on_a_device():
            method.act(reg)
        with on_a_device() as device:
            method.act(reg)
        return {
            "operations": device.operations / steps,
            "synchronisations": device.synchronisations / steps,
        }

    def title(self, document: dict[str, Any]) -> str:
        settings = document["settings"]
        several = settings["weights"] > 1
        regularised = f", {settings['weights']} matrices regularised" if several else ""
        return (
            f"A training step of a {settings['net']}, batch {self.batch}, fused "
            f"Adam{regularised}, on {self.device}, {torch.get_num_threads()} threads: medians and "
            f"quartiles of {self.rounds} interleaved rounds; operations and host synchronisations "
            "of a GPU, per step; memory relative to the weight: the largest temporary tensor and "
            "the state"
        )


class Training:
    """A network with its optimizer, trained by one method."""

    def __init__(self, step: Step, method: Method) -> None:
        self.method = method
        self.times: list[float] = []
        self.device = torch.device(step.device)
        self.model = step.build().to(self.device)
        if method.normalised:
            nn.utils.parametrizations.spectral_norm(self.model.get_submodule("0"))
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-4, fused=True)
        self.reg = step.regularizer(self.model, method.rule) if method.rule else None
        if self.reg and method.mode == "attach":
            self.reg.attach(self.optimizer, every=step.every)

    @property
    def weight(self) -> Tensor:
        return self.model.get_submodule("0").weight  # type: ignore[return-value]

    def time_step(self, x: Tensor, y: Tensor) -> float:
        """Measures the seconds per step over one block.

        Two untimed steps come first, because another network has just filled the caches. Any 10
        consecutive steps contain one proximal step of `every=10`.
        """
        for _ in range(2 if self.method.steps == BLOCK else 0):
            self._step(x, y)
        self._wait()
        started = time.perf_counter()
        for _ in range(self.method.steps):
            self._step(x, y)
        self._wait()
        return (time.perf_counter() - started) / self.method.steps

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(x), y)
        if self.method.penalty is not None:
            loss = loss + self.method.penalty(self.weight)
        elif self.reg and self.method.mode == "loss":
            loss = loss + self.reg()
        torch.autograd.backward(loss)
        if self.reg and self.method.mode == "add_gradients":
            self.reg.add_gradients()
        self.optimizer.step()

    def measure_memory(self) -> dict[str, float]:
        """Measures the largest temporary tensor of the method and its state, both relative to the
        bytes of the weight."""
        size = self.weight.nbytes
        with _LargestAllocation() as largest:
            if self.reg:
                self.method.act(self.reg)
            elif self.method.penalty is not None:
                torch.autograd.backward(self.method.penalty(self.weight))
            elif self.method.normalised:
                _ = self.weight  # a parametrization computes it
        states = self.reg.state_dict().values() if self.reg else []
        kept = [tensor for state in states for tensor in state.values()]
        kept += self.model.buffers()
        return {"temporary": largest.bytes / size, "state": sum(t.nbytes for t in kept) / size}


# --- operations of a GPU --------------------------------------------------------------------------

# Factorisations whose status the host reads on a CUDA device. Views are not operations there.
_WAITING = ("_linalg_eigh", "_linalg_svd", "linalg_cholesky.", "nonzero", "_local_scalar_dense")
_VIEWS = (
    *("view", "transpose", "permute", "unbind", "slice", "select", "unsqueeze", "squeeze"),
    *("detach", "expand", "alias", "as_strided", "narrow", "diagonal", "t.default", "split"),
)


class _Device(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations on meta tensors, and those for which the host would wait."""

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
    """Replaces a device event, which meta tensors do not support."""

    def __init__(self, device: torch.device) -> None: ...

    def record(self) -> None: ...

    def query(self) -> bool:
        return False


@contextlib.contextmanager
def on_a_device() -> Iterator[_Device]:
    """Counts operations on a device without data."""
    with mock.patch("torch.Event", _NoEvent), _Device() as device:
        yield device


# --- memory ---------------------------------------------------------------------------------------


class _LargestAllocation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the largest storage that any operation allocates, in bytes."""

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
