"""One network trained with one method, and the exact spectra of its effective weights."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from wellcond_experiments.limit_cases import SIDE, Batch, Case, Source
from wellcond_experiments.limit_competitors import BEFORE, PEERS, limit, replace_layers
from wellcond_experiments.methods import run_seeded

TOLERANCE = 1e-5  # relative, of the squared sigma_1 of an operator


class Training:
    """A training. The bound can be None for methods that do not need it."""

    def __init__(
        self, case: Case, source: Source, method: str, bound: float | None, seed: int
    ) -> None:
        self.case, self.source = case, source
        method = method.removeprefix(BEFORE)

        def build() -> nn.Module:
            model = case.build(source.inputs)
            self.names = case.limited(model)
            if method in PEERS:
                assert bound is not None
                replace_layers(model, self.names, method, bound)
            return model

        self.model = run_seeded(build, seed)
        self.optimizers = case.optimizers(self.model)
        self.order = torch.Generator().manual_seed(seed)
        self.reg: Any = None
        if method not in ("plain", *PEERS):
            assert bound is not None
            self.reg = limit(self.model, self.names, self.optimizers[0], case, method, bound)
        self._leading: dict[str, Any] = {}  # start vectors: those of the last step

    def draw(self) -> Batch:
        return self.source.draw(self.order)

    def step(self, batch: Batch | None = None) -> None:
        x, y = batch or self.draw()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        torch.autograd.backward(self.case.loss(self.model, x, y))
        for optimizer in self.optimizers:
            optimizer.step()

    @torch.no_grad()
    def weights(self) -> list[Tensor]:
        """Returns the weights that the limited layers use in `eval()`."""
        self.model.eval()
        found = [self.model.get_submodule(name).weight.detach().clone() for name in self.names]  # type: ignore[operator, union-attr]
        self.model.train()
        return found

    def spectra(self) -> list[float]:
        """Returns sigma_1 or kappa per limited layer, in float64; nan for non-finite weights."""
        weights = [weight.double() for weight in self.weights()]
        if not all(bool(weight.isfinite().all()) for weight in weights):
            return [math.nan] * len(weights)
        if self.case.quantity == "acting":
            return [self._map_norm(*pair) for pair in zip(self.names, weights, strict=True)]
        values = [0.0] * len(weights)
        for shape in {weight.shape for weight in weights}:
            places = [i for i, weight in enumerate(weights) if weight.shape == shape]
            sigma = torch.linalg.svdvals(torch.stack([weights[i] for i in places]))
            value = sigma[:, 0] / sigma[:, -1] if self.case.quantity == "kappa" else sigma[:, 0]
            for i, one in zip(places, value.tolist(), strict=True):
                values[i] = one
        return values

    def _map_norm(self, name: str, kernel: Tensor) -> float:
        """Returns sigma_1 of the convolution with zero padding, by the Lanczos method."""
        from scipy.sparse.linalg import LinearOperator, eigsh

        (_, n, *size), side = kernel.shape, SIDE
        padding = [k // 2 for k in size]

        def apply(x: Any) -> Any:
            field = torch.as_tensor(x).reshape(1, n, side, side)
            image = nn.functional.conv2d(field, kernel, padding=padding)
            back = nn.functional.conv_transpose2d(image, kernel, padding=padding)
            return back.flatten().numpy()

        count = n * side**2
        gram = LinearOperator((count, count), matvec=apply, dtype="float64")
        start = self._leading.get(name, torch.ones(count, dtype=torch.float64).numpy())
        values, vectors = eigsh(gram, 1, which="LA", v0=start, tol=TOLERANCE)
        self._leading[name] = vectors[:, 0]
        return math.sqrt(values[0])

    def printed(self) -> str:
        """Returns the text of `print(reg)`."""
        return "" if self.reg is None else str(self.reg)

    @torch.no_grad()
    def accuracy(self) -> float | None:
        """Returns the test accuracy in per cent, or None without test data."""
        if self.source.test is None:
            return None
        x, y = self.source.test
        self.model.eval()
        right = (self.model(x).argmax(dim=1) == y).double().mean()
        self.model.train()
        return 100 * float(right)

    @torch.no_grad()
    def time_enforce(self) -> dict[str, float]:
        """Times a projection, and a check of a weight within its limit."""
        seconds = {}
        self.reg.enforce()
        for name in self.names:
            self.model.get_submodule(name).weight.mul_(2)  # type: ignore[operator, union-attr]
        for what in ("clip", "bound"):
            started = time.perf_counter()
            self.reg.enforce()
            seconds[what] = time.perf_counter() - started
        return seconds
