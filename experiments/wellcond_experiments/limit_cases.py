"""Trainings under hard limits: networks, data, losses, optimizers and targets.

Letters: S (m, n) is a weight, sigma_1 its largest singular value, kappa = sigma_1/sigma_nu its
condition number with nu = min(m, n), b an upper bound of sigma_1, and K an upper bound of kappa.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wellcond_experiments.data import load

Batch = tuple[Tensor, Tensor]
Draw = Callable[[torch.Generator], Batch]
SIDE = 32  # side of the images of the convolution


@dataclass(frozen=True)
class Source:
    """Data: how to draw a batch, the width of an input, and optional test data."""

    draw: Draw
    inputs: int
    test: Batch | None = None


@dataclass(frozen=True)
class Target:
    """The target of the limited training.

    Args:
        excess: the largest allowed sigma_1/b or kappa/K from step 20 on.
        reference: the competitor that the time is compared with.
        at_most: the largest allowed ratio of the times; None for no requirement.
        goal: the desired ratio of the times.
    """

    excess: float
    reference: str
    at_most: float | None = None
    goal: float | None = None

    def __str__(self) -> str:
        most = [] if self.at_most is None else [f"≤ {self.at_most:g}"]
        goal = [] if self.goal is None else [f"goal {self.goal:g}"]
        time = ", ".join(most + goal)
        asked = f"{time} of the time of {self.reference}" if time else "no requirement on time"
        return f"excess ≤ {self.excess:g}; {asked}"


@dataclass(frozen=True)
class Case:
    """A training under a limit.

    Args:
        name: the name of the case.
        net: a description of the network.
        quantity: the limited quantity: "sigma", "kappa", or "acting" for sigma_1 of a convolution
            as a linear operator.
        bound: b or K; None for a value from a pilot run that a third of the weights exceed.
        layers: patterns for the names of the limited layers.
        build: makes the network for inputs of this width.
        source: returns the data for a value of `--data`.
        loss: returns the loss of the network on a batch.
        competitors: the compared methods.
        target: the target of `watched`.
        muon: whether torch's Muon updates the matrices and Adam the other parameters.
        steps: default number of steps.
        stretch: number of consecutive steps of one network.
        measures_plain: whether the spectra without a limit are also measured.
    """

    name: str
    net: str
    quantity: str
    bound: float | None
    layers: tuple[str, ...]
    build: Callable[[int], nn.Module]
    source: Callable[[str], Source]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    competitors: tuple[str, ...]
    target: Target
    muon: bool = False
    steps: int = 400
    stretch: int = 25
    measures_plain: bool = False

    def limited(self, model: nn.Module) -> list[str]:
        """Returns the names of the limited layers."""
        return [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
            and any(fnmatch.fnmatchcase(name, pattern) for pattern in self.layers)
        ]

    def optimizers(self, model: nn.Module) -> list[Optimizer]:
        """Returns the optimizers; the first updates the limited weights."""
        parameters = list(model.parameters())
        if not self.muon:
            return [torch.optim.Adam(parameters, 1e-3, fused=True)]
        matrices = [p for p in parameters if p.ndim == 2]
        others = [p for p in parameters if p.ndim != 2]
        muon: Any = torch.optim.Muon(matrices, lr=2e-2)  # other options: torch's defaults
        return [muon, torch.optim.Adam(others, 1e-3, fused=True)]


# --- networks -------------------------------------------------------------------------------------


def chain(activation: Callable[[], nn.Module], *widths: int) -> nn.Sequential:
    """Builds linear layers, named 0, 2, 4, ..., with activations between them."""
    layers: list[nn.Module] = []
    for m, n in zip(widths[1:], widths[:-1], strict=True):
        layers += [nn.Linear(n, m), activation()]
    return nn.Sequential(*layers[:-1])


def critic(*hidden: int, orthogonal: bool = False) -> Callable[[int], nn.Module]:
    def build(inputs: int) -> nn.Module:
        model = chain(lambda: nn.LeakyReLU(0.2), inputs, *hidden, 1)
        if orthogonal:
            for layer in model:
                if isinstance(layer, nn.Linear):
                    nn.init.orthogonal_(layer.weight)
        return model

    return build


class Block(nn.Module):
    """Attention and an MLP, each after a LayerNorm and with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before_attention(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y: Tensor = x + self.down(nn.functional.gelu(self.up(self.before_mlp(x))))
        return y


class GPT(nn.Module):
    """A small GPT."""

    def __init__(self, tokens: int, blocks: int, width: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places.weight[: x.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(x) + places)))
        return logits


def convolutional(inputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),  # "2", the limited layer
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


# --- data and losses ------------------------------------------------------------------------------


def wasserstein(model: nn.Module, real: Tensor, generated: Tensor) -> Tensor:
    """Returns the loss of a critic: mean D(generated) - mean D(real)."""
    loss: Tensor = model(generated).mean() - model(real).mean()
    return loss


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Returns the cross-entropy over the last dimension of the outputs."""
    return nn.functional.cross_entropy(model(x).flatten(0, y.ndim - 1), y.flatten())


def gaussians(inputs: int, batch: int = 64) -> Callable[[str], Source]:
    """Real data: eight Gaussians with random centres. Generated: by a fixed random perceptron."""
    fixed = torch.Generator().manual_seed(0)
    centres = torch.randn(8, inputs, generator=fixed)
    first, second = (torch.randn(inputs, inputs, generator=fixed) / inputs**0.5 for _ in range(2))

    def draw(order: torch.Generator) -> Batch:
        chosen = torch.randint(8, (batch,), generator=order)
        real = centres[chosen] + 0.3 * torch.randn(batch, inputs, generator=order)
        latent = torch.randn(batch, inputs, generator=order)
        return real, torch.tanh(latent @ first) @ second

    return lambda data: Source(draw, inputs)


def images(data: str, batch: int = 32) -> Source:
    """Normalised images with their classes."""
    loaded = load(data)
    x, y = loaded.normalise(loaded.x_train), loaded.y_train

    def draw(order: torch.Generator) -> Batch:
        chosen = torch.randint(len(x), (batch,), generator=order)
        return x[chosen], y[chosen]

    return Source(draw, loaded.pixels, (loaded.normalise(loaded.x_test), loaded.y_test))


def images_and_noise(data: str, batch: int = 64) -> Source:
    """Real data: normalised images. Generated: standard Gaussian noise."""
    source = images(data, batch)

    def draw(order: torch.Generator) -> Batch:
        real, _ = source.draw(order)
        return real, torch.randn(real.shape, generator=order)

    return Source(draw, source.inputs)


def sequences(data: str, batch: int = 16, length: int = 64, tokens: int = 256) -> Source:
    """A Markov chain in which each token has four successors."""
    successors = torch.randint(tokens, (tokens, 4), generator=torch.Generator().manual_seed(0))

    def draw(order: torch.Generator) -> Batch:
        x = [torch.randint(tokens, (batch,), generator=order)]
        for _ in range(length):
            x.append(successors[x[-1], torch.randint(4, (batch,), generator=order)])
        drawn = torch.stack(x, dim=1)
        return drawn[:, :-1], drawn[:, 1:]

    return Source(draw, tokens)


def pictures(data: str, batch: int = 16) -> Source:
    """Ten random images with noise of the same variance."""
    prototypes = torch.randn(10, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))

    def draw(order: torch.Generator) -> Batch:
        y = torch.randint(10, (batch,), generator=order)
        return prototypes[y] + torch.randn(batch, 3, SIDE, SIDE, generator=order), y

    return Source(draw, 3)


# --- cases ----------------------------------------------------------------------------------------

PEERS = ("spectral_norm", "orthogonal", "torchlip", "geotorch", "orthogonium")
SIGMA = ("plain", "watched", "every=1", "before-auto", *PEERS)


def _critic(
    name: str, hidden: tuple[int, ...], target: Target, orthogonal: bool = False, **further: Any
) -> Case:
    wide = further.pop("inputs", 64)
    net = f"critic {wide}-{'-'.join(map(str, hidden))}-1"
    further = {
        "layers": ("*",),
        "source": gaussians(wide),
        "competitors": SIGMA,
        "measures_plain": True,
    } | further
    if orthogonal:
        net += ", orthogonal initialisation"
    net += ", Muon 2e-2" if further.get("muon") else ", Adam 1e-3"
    build = critic(*hidden, orthogonal=orthogonal)
    return Case(name, net, "sigma", 1.0, build=build, loss=wasserstein, target=target, **further)


def _small(target: Target, orthogonal: bool = False, muon: bool = False) -> Case:
    words = ["orthogonal"] * orthogonal + ["muon"] * muon or ["default"]
    return _critic("-".join(["critic", *words]), (128, 128), target, orthogonal, muon=muon)


def _condition(kind: str, K: float) -> Case:
    widths, layer, before = ((2048,), "0", "before-auto")
    target = Target(1.05, before, 1.4 if K == 3 else None, 0.8 if K == 10 else None)
    if kind == "square":
        widths, layer, before = ((512, 512), "2", "before-every=10")
        target = Target(1.05, before, 0.8, 0.65) if K == 10 else Target(1.05, before)
    return Case(
        f"{kind}-k{K:g}",
        f"{'-'.join(map(str, ('pixels', *widths, 10)))}, layer {layer}, κ ≤ {K:g}, Adam 1e-3",
        "kappa",
        K,
        (layer,),
        lambda inputs: chain(nn.ReLU, inputs, *widths, 10),
        images,
        cross_entropy,
        ("plain", "watched", before),
        target,
        steps=600,
    )


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _small(Target(1.01, "spectral_norm", 0.75)),
        _small(Target(1.01, "spectral_norm", 1.0, 0.75), orthogonal=True),
        _small(Target(1.01, "spectral_norm", 1.0, 0.75), muon=True),
        _small(Target(1.01, "spectral_norm", 1.0, 0.75), orthogonal=True, muon=True),
        _critic(
            "critic-784",
            (256,),
            Target(1.01, "spectral_norm", 1.0, 0.75),
            inputs=784,
            source=images_and_noise,
        ),
        _critic(
            "critic-1024",
            (1024,),
            Target(1.01, "spectral_norm", 0.5),
            inputs=1024,
            source=gaussians(1024),
            layers=("0",),
            competitors=("plain", "watched", "before-auto", "spectral_norm", "torchlip"),
            measures_plain=False,
        ),
        *(_condition("mnist", K) for K in (10.0, 3.0)),
        *(_condition("square", K) for K in (10.0, 100.0, 1000.0)),
        Case(
            "gpt",
            "GPT of 24 blocks, width 128, 16 x 64 tokens, Adam 1e-3",
            "sigma",
            None,
            ("blocks.*",),
            lambda tokens: GPT(tokens, 24, 128, 64),
            sequences,
            cross_entropy,
            ("plain", "watched", "before-auto", "spectral_norm"),
            Target(1.01, "plain", 1.25, 1.10),
            steps=60,
            stretch=5,
        ),
        Case(
            "conv",
            "convolution 3x3, 64 to 64 channels, 32x32, as linear operator, Adam 1e-3",
            "acting",
            1.0,
            ("2",),
            convolutional,
            pictures,
            cross_entropy,
            ("plain", "watched", "kernel", "spectral_norm", "torchlip", "orthogonium"),
            Target(1.02, "plain", None, 2.0),
            steps=60,
            stretch=5,
        ),
    )
}


def find_case(name: str) -> Case:
    """Returns the case of this name; `mnist-kK` and `square-kK` exist for every K.

    Raises:
        ValueError: if there is no such case.
    """
    if name in CASES:
        return CASES[name]
    matched = re.fullmatch(r"(mnist|square)-k(\d+(?:\.\d+)?)", name)
    if not matched:
        raise ValueError(
            f"--case must be all, or names from {','.join(CASES)}, or mnist-kK or square-kK with "
            f"a number K, got {name!r}."
        )
    return _condition(matched[1], float(matched[2]))
