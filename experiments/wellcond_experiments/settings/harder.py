"""Deeper networks on CIFAR-10: how accurate is each method on clean and on corrupted images?

Few training images, and three networks: convolutions with and without batch norm, and a small
vision transformer. All methods are tested on the same corrupted test images.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from wellcond_experiments import figures
from wellcond_experiments.data import Images, load
from wellcond_experiments.evidence import Column, Evidence, Verdict, rank
from wellcond_experiments.grid import Cell, Measured, Setting
from wellcond_experiments.methods import (
    METHODS,
    Training,
    condition_numbers,
    largest,
    spectral_norms,
)
from wellcond_experiments.tables import Table, interval

# Width and stride of the 3x3 convolutions.
CONVOLUTIONS = ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (64, 2), (64, 1), (64, 1))
LAYERS = (*(f"convolution {i + 1}" for i in range(len(CONVOLUTIONS))), "head")
WIDTH, HEADS, BLOCKS, PATCH = 64, 2, 4, 4  # of the vision transformer
PARTS = ("query", "key", "value", "out", "up", "down")  # weights of one of its blocks


# --- networks -------------------------------------------------------------------------------------


class _ChannelsLast(nn.Module):
    """Converts to channels-last, which makes convolutions on a CPU 25 % faster."""

    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)


def convolutions(images: Images, norm: Callable[[int], nn.Module] | None = None) -> nn.Module:
    """Builds eight convolutions with ReLU and average pooling, initialised after He et al."""
    layers: list[nn.Module] = [_ChannelsLast()]
    channels = images.channels
    for width, stride in CONVOLUTIONS:
        convolution = nn.Conv2d(channels, width, 3, stride, padding=1)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        layers += [convolution, *([norm(width)] if norm else []), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class _Attention(nn.Module):
    """Attention with separate matrices for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class _Residual(nn.Module):
    """x + f(LayerNorm(x))."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(WIDTH), f

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.f(self.norm(x))
        return out


class _Tokens(nn.Module):
    """Embeds an image as patches with positions."""

    def __init__(self, images: Images) -> None:
        super().__init__()
        self.patches = nn.Conv2d(images.channels, WIDTH, PATCH, PATCH)
        count = (images.side // PATCH) ** 2
        self.position = nn.Parameter(0.02 * torch.randn(count, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT.contiguous()  # otherwise every block is slower
        out: Tensor = tokens + self.position
        return out


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def transformer(images: Images) -> nn.Module:
    """Builds a vision transformer with LayerNorm before attention and MLP."""
    blocks: list[nn.Module] = []
    for _ in range(BLOCKS):
        mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        blocks += [_Residual(_Attention()), _Residual(mlp)]
    head = [nn.LayerNorm(WIDTH), _Mean(), nn.Linear(WIDTH, 10)]
    return nn.Sequential(_Tokens(images), *blocks, *head)


# --- training and testing -------------------------------------------------------------------------


def square(images: Images, x: Tensor) -> Tensor:
    """Reshapes flat images to (N, channels, side, side)."""
    return x.view(-1, images.channels, images.side, images.side)


def shift(x: Tensor, source: torch.Generator) -> Tensor:
    """Shifts images (N, c, h, w) by up to an eighth of their side and mirrors half of them."""
    count, most = len(x), x.shape[3] // 8
    where = torch.randint(0, 2 * most + 1, (2, count), generator=source)
    mirrored = torch.rand(count, 1, 1, 1, generator=source) < 0.5
    x = torch.where(mirrored, x.flip(3), x)
    windows = nn.functional.pad(x, [most] * 4).unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)
    return windows[torch.arange(count), :, where[0], where[1]]


def fit(
    training: Training,
    x: Tensor,
    y: Tensor,
    epochs: int,
    batch: int,
    change: Callable[[Tensor, torch.Generator], Tensor] | None = None,
) -> float:
    """Trains on images (N, c, h, w), with batches drawn by the seed; returns the CPU seconds.

    The learning rate rises linearly in the first tenth of the steps and falls linearly to 0.
    Training stops at a non-finite loss.
    """
    source = torch.Generator().manual_seed(training.seed)
    steps = epochs * math.ceil(len(x) / batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        training.optimizer, lambda step: min(10 * (step + 1) / steps, (1 - step / steps) / 0.9, 1)
    )
    began = time.process_time()
    for indices in _batches(len(x), epochs, batch, source):
        images = change(x[indices], source) if change else x[indices]
        loss = nn.functional.cross_entropy(training.model(images), y[indices])
        if not training.step(loss):
            break
        schedule.step()
    training.finish()
    training.model.eval()
    return time.process_time() - began


def _batches(count: int, epochs: int, batch: int, source: torch.Generator) -> Iterator[Tensor]:
    for _ in range(epochs):
        yield from torch.split(torch.randperm(count, generator=source), batch)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Returns the accuracy in per cent."""
    found = torch.cat([model(part).argmax(1) for part in torch.split(x, 500)])
    return 100 * float((found == y).double().mean())


def add_noise(x: Tensor, deviation: float) -> Tensor:
    """Adds Gaussian noise from a fixed seed."""
    return x + deviation * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def blur(x: Tensor, deviation: float) -> Tensor:
    """Blurs images (N, c, h, w) by a Gaussian (deviation in pixels) with replicated borders."""
    radius = math.ceil(3 * deviation)
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / deviation) ** 2)
    weights = (weights / weights.sum()).view(1, 1, 1, -1)
    for _ in range(2):  # once along each axis
        padded = nn.functional.pad(x, (radius, radius, 0, 0), mode="replicate")
        x = nn.functional.conv2d(padded.flatten(0, 1).unsqueeze(1), weights).view_as(x).mT
    return x


def fade(x: Tensor, factor: float) -> Tensor:
    """Multiplies the contrast of every image by a factor."""
    return torch.lerp(x.mean((1, 2, 3), keepdim=True), x, factor)


Corruption = tuple[Callable[[Tensor, float], Tensor], tuple[float, ...]]
CORRUPTIONS: dict[str, Corruption] = {
    "noise": (add_noise, (0.1, 0.2)),
    "blur": (blur, (1.0, 2.0)),
    "contrast": (fade, (0.5, 0.3)),
}


# --- settings -------------------------------------------------------------------------------------


class Harder(Setting):
    """CIFAR-10 with few images; a subclass builds the network."""

    score = "accuracy"
    finalists = 2
    default_data = "cifar10"
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    layers: tuple[str, ...]  # the weights of the network, from input to output
    epochs: int
    gain = math.sqrt(2)

    def __init__(self, data: str = "", quick: bool = False, seeds: int | None = None) -> None:
        super().__init__(data, quick, seeds)
        self.samples, self.batch = (512, 32) if quick else (10_000, 64)
        if quick:
            self.epochs, self.rates = 6, (3e-3,)
            self.methods = {name: self.methods[name][:2] for name in ("none", "l2", "isometry")}

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "samples": self.samples,
            "epochs": self.epochs,
            "batch": self.batch,
        }

    @abstractmethod
    def build(self, norm: bool) -> nn.Module:
        """Builds the network, with LayerNorm if `norm`."""

    @cached_property
    def images(self) -> Images:
        return load(self.data, colour=True)

    def parts(self, cell: Cell) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Returns training and test data. The search tests on the last sixth of the training set,
        which is never used for training."""
        images = self.images
        held = len(images.x_train) // 6
        source = torch.Generator().manual_seed(cell.seed)
        drawn = torch.randperm(len(images.x_train) - held, generator=source)[: self.samples]
        tested = (images.x_train[-held:], images.y_train[-held:])
        if not cell.search:
            tested = (images.x_test, images.y_test)
        return (images.x_train[drawn], images.y_train[drawn]), tested

    def run(self, cell: Cell) -> Measured:
        """Trains and tests; the search tests only clean images, its first round trains shorter."""
        images = self.images
        (x, y), (x_test, y_test) = self.parts(cell)
        x, x_test = square(images, x), square(images, x_test)
        training = METHODS[cell.method](
            self.build,
            cell.strength,
            cell.lr,
            cell.seed,
            gain=self.gain,
            decays=lambda parameter: parameter.ndim > 1,
        )
        short = cell.search and not cell.final
        epochs = max(self.epochs // 3, 1) if short else self.epochs
        seconds = fit(training, images.normalise(x), y, epochs, self.batch, shift)
        model = training.model

        def tested(x: Tensor) -> float:
            return accuracy(model, images.normalise(x), y_test[: len(x)])

        metrics = {"accuracy": tested(x_test), "train_seconds": seconds}
        curves = {}
        if not cell.search:
            few = x_test[: len(x_test) // 4]
            for name, (corrupt, levels) in CORRUPTIONS.items():
                curves[f"{name}_levels"] = [tested(corrupt(few, level)) for level in levels]
                metrics[name] = math.fsum(curves[f"{name}_levels"]) / len(levels)
            kinds = [metrics[name] for name in CORRUPTIONS]
            metrics["corrupted"] = math.fsum(kinds) / len(kinds)
            curves["kappa"] = list(condition_numbers(model).values())
            curves["sigma_max"] = list(spectral_norms(model).values())
            metrics["kappa_worst"] = largest(curves["kappa"])
            metrics["sigma_max"] = largest(curves["sigma_max"])
        return Measured(metrics, curves)

    def tables(self, evidence: Evidence) -> dict[str, Table]:
        alone = evidence.band("train_seconds", method="none").mean
        evidence.runs["cost"] = evidence.runs["train_seconds"] / alone
        columns = [
            Column("accuracy", "clean, %"),
            Column("noise", "noise, %"),
            Column("blur", "blur, %"),
            Column("contrast", "contrast, %"),
            Column("corrupted", "mean of the three, %"),
            Column("kappa_worst", "largest κ", log=True),
            Column("cost", "CPU time"),
        ]
        return {"accuracy": evidence.ranking(f"Accuracy, {self.help}", columns)}

    def verdicts(self, evidence: Evidence) -> dict[str, Verdict]:
        return {
            f"{self.short}, {what}, %": evidence.verdict(metric)
            for what, metric in (("clean", "accuracy"), ("corrupted", "corrupted"))
        }

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        drawing, panels = figures.figure(columns=2, width=6.4, height=4.8)
        names = {method: figures.label(method) for method in evidence.methods()}
        for panel, metric, title in zip(
            panels,
            ("accuracy", "corrupted"),
            ("clean images", "noisy, blurred or low-contrast images"),
            strict=True,
        ):
            bands = [(method, evidence.band(metric, method=method)) for method in names]
            figures.draw_bands(panel, bands, names)
            panel.set_xlabel(f"accuracy on {title}, %")
        return {self.name: drawing, f"{self.name}-kappa": self._kappa(evidence)}

    def _kappa(self, evidence: Evidence) -> Any:
        """Draws κ of each weight (geometric mean over seeds), the most accurate method on top."""
        scores = {m: rank(evidence.band("accuracy", method=m)) for m in evidence.methods()}
        rows = {
            method: [
                interval(list(kappas), log=True).mean
                for kappas in zip(*evidence.where(method=method)["kappa"], strict=True)
            ]
            for method in sorted(scores, key=lambda method: -scores[method])
        }
        return figures.draw_layers(rows, self.layers)


PROTOCOL = (
    "{} on 10,000 images of CIFAR-10, randomly cropped and mirrored, batch 64, {} epochs of Adam, "
    "whose rate rises and falls linearly; weight decay applies to matrices only; the first round "
    "of the search trains for a third of the epochs. The test uses 10,000 clean images, and a "
    "quarter of them with Gaussian noise of deviation 0.1 and 0.2, Gaussian blur of 1 and 2 "
    "pixels, and contrast reduced to 0.5 and 0.3, averaged over the two levels. κ is the largest "
    "of all weights, with kernels flattened to matrices. The CPU time of the training is relative "
    "to the baseline."
)
# Grids around the best values of pilot runs, at a fifth of the length, on the search seed.
SEARCHED: dict[str, tuple[float, ...]] = {
    "none": (0.0,),
    "l2": (1e-5, 1e-4, 1e-3),
    "weight-decay": (0.01, 0.1, 1.0),
    "clipping": (0.1, 1.0, 10.0),
    "orthogonal-init": (0.0,),
    "spectral-norm-torch": (1.0, 2.0, 4.0),
    "condition": (1.0, 10.0, 100.0),
    "condition-gradient": (1e-3, 1e-2, 0.1),
    "stable-rank": (10.0, 100.0, 1000.0),
    "orthogonality": (1.0, 5.0, 25.0),
    "isometry": (0.1, 0.5, 1.0),
    "condition-limit": (1.5, 3.0, 10.0),
    "upper-limit": (1.5, 2.0, 3.0),
}


class Plain(Harder):
    name = "cifar10-plain"
    help = "eight convolutions without normalisation"
    short = "convolutions"
    protocol = PROTOCOL.format("Eight 3x3 convolutions with ReLU, initialised after He et al.,", 8)
    layers = LAYERS
    epochs = 8
    methods = SEARCHED | {"layer-norm": (0.0,)}

    def build(self, norm: bool) -> nn.Module:
        return convolutions(self.images, (lambda n: nn.GroupNorm(1, n)) if norm else None)


class BatchNorm(Harder):
    name = "cifar10-batch-norm"
    help = "eight convolutions with batch norm"
    short = "batch norm"
    protocol = PROTOCOL.format("Eight 3x3 convolutions with batch norm and ReLU", 8)
    layers = LAYERS
    epochs = 8
    rates = (*Harder.rates, 3e-2)  # batch norm allows higher rates
    finalists = 4  # short runs often prefer a lower rate than full-length runs
    # On the grid of the other networks, several choices were at its edge.
    methods = SEARCHED | {
        "weight-decay": (0.1, 1.0, 3.0),
        "clipping": (0.01, 0.1, 1.0),
        "orthogonality": (5.0, 25.0, 100.0),
        "condition-limit": (1.2, 1.5, 3.0),
        "upper-limit": (1.0, 1.5, 2.0),
    }

    def build(self, norm: bool) -> nn.Module:
        return convolutions(self.images, nn.BatchNorm2d)


class ViT(Harder):
    name = "cifar10-vit"
    help = "a small vision transformer"
    short = "vision transformer"
    protocol = PROTOCOL.format("A vision transformer (patches of 4, width 64, four blocks)", 5)
    layers = ("patches", *(f"{part} {i + 1}" for i in range(BLOCKS) for part in PARTS), "head")
    epochs = 5
    gain = 1.0
    finalists = 3  # the first round trains for one epoch
    # The bounds for the convolutions would never be active here: σ₁ starts near 1.
    methods = SEARCHED | dict.fromkeys(("upper-limit", "spectral-norm-torch"), (0.7, 1.0, 1.4))

    def build(self, norm: bool) -> nn.Module:
        return transformer(self.images)
