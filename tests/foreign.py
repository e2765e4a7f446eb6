"""Short versions of optimizers of other packages, which `attach` must distinguish."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer


def evaluate(closure: Callable[[], Tensor] | None) -> None:
    if closure is not None:
        with torch.enable_grad():
            closure()


class RelativeStep(Optimizer):
    """Like Adafactor of transformers in its relative-step mode: its learning rate is None."""

    rate: ClassVar[dict[str, Any]] = {"lr": None}

    def __init__(self, params: Any) -> None:
        super().__init__(params, dict(self.rate))

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        evaluate(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.1)


class Rateless(RelativeStep):
    """Like A2Grad and AliG of pytorch_optimizer: it has no learning rate."""

    rate: ClassVar[dict[str, Any]] = {}


class TwoStep(Optimizer):
    """Like SAM of pytorch_optimizer: `step` takes a closure, and may never be called."""

    def __init__(self, params: Any, base: type[Optimizer], **kwargs: Any) -> None:
        super().__init__(params, {})
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.clone()
                p.add_(p.grad, alpha=0.05)

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old"]
        self.base_optimizer.step()

    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        self.first_step()
        evaluate(closure)
        self.second_step()


class Lookahead(Optimizer):
    """Like Lookahead of timm: creates the hook tables without calling Optimizer.__init__."""

    def __init__(self, base_optimizer: Optimizer) -> None:
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._base_optimizer = base_optimizer
        self.param_groups = base_optimizer.param_groups
        self.defaults = base_optimizer.defaults
        self.state = defaultdict(dict)

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        self._base_optimizer.step(closure)


class NoTables(Optimizer):
    """Like Lookahead of torch-optimizer: an optimizer only by its name."""

    def __init__(self, base_optimizer: Optimizer) -> None:
        self.optimizer = base_optimizer
        self.param_groups = base_optimizer.param_groups


class Within(torch.optim.SGD):
    """A subclass whose step calls the step of its base class, which can also run hooks."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        super().step(closure)  # type: ignore[arg-type]


class ScheduleFree(Optimizer):
    """Like schedulefree: it steps z and y, and eval() sets x = y + (y - z)(1/beta - 1)."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "train_mode": False, "k": 0})

    @torch.no_grad()
    def _move(self, train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train:
                group["train_mode"] = train
                weight = 1 - group["beta"] if train else 1 - 1 / group["beta"]
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight)

    def eval(self) -> None:
        self._move(False)

    def train(self) -> None:
        self._move(True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        evaluate(closure)
        for group in self.param_groups:
            assert group["train_mode"], "call train() first"
            group["k"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.clone())
                c, beta, lr = 1 / group["k"], group["beta"], group["lr"]
                p.lerp_(z, c)
                p.add_(p.grad, alpha=lr * (beta * (1 - c) - 1))
                z.sub_(p.grad, alpha=lr)


class Swapping(torch.optim.SGD):
    """Like MSAM of heavyball: eval() restores plain weights, to which no limit was ever applied.

    No key of the state shows the mode before the first call.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        weights = [p for group in self.param_groups for p in group["params"]]
        for p in weights:
            self.state[p].setdefault("z", p.clone())
        super().step(closure)  # type: ignore[arg-type]
        for p in weights:
            if p.grad is not None:
                self.state[p]["z"].sub_(p.grad, alpha=self.param_groups[0]["lr"])

    @torch.no_grad()
    def _swap(self, train: bool) -> None:
        for group in self.param_groups:
            if group.get("train_mode", True) != train:
                group["train_mode"] = train
                for p in group["params"]:
                    if "z" in self.state[p]:
                        now = p.clone()
                        p.copy_(self.state[p]["z"])
                        self.state[p]["z"].copy_(now)

    def eval(self) -> None:
        self._swap(False)

    def train(self) -> None:
        self._swap(True)
