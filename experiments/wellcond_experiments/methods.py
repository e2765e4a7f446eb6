"""Training methods: the baseline, common alternatives, and the methods of wellcond.

All methods share one loop over `Training.step`. A method overrides hooks: it can change the network
before training, the gradients before a step, the weights after a step, or the state between tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, parametrizations
from torch.nn.utils.parametrize import register_parametrization

import wellcond as wc

Made = TypeVar("Made")
WIDEST = 512  # longest side of the weights that torch keeps orthogonal
Build = Callable[[bool], nn.Module]  # argument: whether LayerNorm precedes every activation


def run_seeded(build: Callable[[], Made], seed: int) -> Made:
    """Calls `build` with a seeded global generator, and restores the state of the generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


@contextmanager
def without_subnormals() -> Iterator[None]:
    """Flushes subnormal numbers to zero.

    Dead units leave decaying averages in the optimizer, and processors work many times slower on
    subnormal numbers. This would distort the measured cost of a method. Enter the context before
    the first parallel operation, because threads inherit the mode from the thread that starts them.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Yields the linear and convolutional layers with their names."""
    modules = model.named_modules()
    return ((name, module) for name, module in modules if isinstance(module, nn.Linear | nn.Conv2d))


@torch.no_grad()
def condition_numbers(model: nn.Module) -> dict[str, float]:
    """Returns κ of every effective weight, in float64; nan for non-finite weights."""
    weights = {name: m.weight.detach().flatten(1) for name, m in matrices(model)}
    return {
        name: float(wc.condition_number(S)) if S.isfinite().all() else math.nan
        for name, S in weights.items()
    }


@torch.no_grad()
def spectral_norms(model: nn.Module) -> dict[str, float]:
    """Returns σ₁ of every effective weight, in float64; nan for non-finite weights."""
    weights = {name: m.weight.detach().flatten(1).double() for name, m in matrices(model)}
    return {
        name: float(torch.linalg.matrix_norm(S, 2)) if S.isfinite().all() else math.nan
        for name, S in weights.items()
    }


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Sets the model to eval mode, so that spectral_norm of torch does no power iteration."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def largest(values: Iterable[float]) -> float:
    """Returns the largest value, or nan if any value is nan (`max` does not ensure this)."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


class Training:
    """The baseline: plain Adam. Methods are subclasses.

    Args:
        build: makes the network, with or without LayerNorm before its activations.
        strength: the strength of the method, in its own units.
        lr: learning rate of Adam.
        seed: seed of the initial weights.
        gain: scale of an isometric weight: √2 before ReLU, else 1.
        decays: selects the parameters to which weight decay or L2 applies; all if None.
    """

    label: ClassVar[str] = "baseline"
    after: ClassVar[str] = ""  # the publication that described it
    ours: ClassVar[bool] = False  # whether wellcond offers it
    strengths: ClassVar[tuple[float, ...]] = (0.0,)  # default grid of the search
    normed: ClassVar[bool] = False
    sorts: ClassVar[bool] = False  # whether a critic uses GroupSort instead of LeakyReLU

    def __init__(
        self,
        build: Build,
        strength: float,
        lr: float,
        seed: int,
        gain: float = 1.0,
        decays: Callable[[Tensor], bool] | None = None,
    ) -> None:
        self.build, self.strength, self.lr, self.seed, self.gain = build, strength, lr, seed, gain
        self.decays = decays or (lambda parameter: True)
        self.model = run_seeded(lambda: build(self.normed), seed)
        run_seeded(self.prepare, seed)
        self.optimizer = self.adam()
        self.attach()

    def adam(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.model.parameters(), self.lr, fused=True)

    def decay_groups(self) -> list[dict[str, Any]]:
        """Splits the parameters into a group with decay and a group without."""
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for parameter in self.model.parameters():
            groups[self.decays(parameter)].append(parameter)
        return [
            {"params": group, "weight_decay": self.strength * decayed}
            for decayed, group in groups.items()
            if group
        ]

    def prepare(self) -> None:
        """Changes the network before training."""

    def attach(self) -> None:
        """Registers what the method does at every step of the optimizer."""

    def set_rate(self, lr: float) -> None:
        """Sets the learning rate; experiments with a schedule call it."""
        self.lr = lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def before_step(self) -> None:
        """Changes the gradients before a step of the optimizer."""

    def between_tasks(self) -> None:
        """Called when the data change."""

    def finish(self) -> None:
        """Called before the weights are tested."""

    def step(self, loss: Tensor) -> bool:
        """Does one step; returns False if the loss or the weights are not finite."""
        if not loss.isfinite():
            return False
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.before_step()
        try:
            self.optimizer.step()
        except ValueError:  # raised for non-finite weights under a limit
            if self.finite():
                raise
            return False
        return True

    def finite(self) -> bool:
        """Returns whether all parameters are finite."""
        return all(bool(p.isfinite().all()) for p in self.model.parameters())


class L2(Training):
    """`weight_decay` of Adam, on the parameters that `decays` selects."""

    label = "L2"
    strengths = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)

    def adam(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.decay_groups(), self.lr, fused=True)


class WeightDecay(Training):
    label = "decoupled weight decay"
    after = "Loshchilov & Hutter, 1711.05101"
    strengths = (0.01, 0.03, 0.1, 0.3, 1.0, 10.0)

    def adam(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.decay_groups(), self.lr, fused=True)


class L2Initial(Training):
    """Adds strength/2 ‖p − p₀‖² per parameter (Kumar, Marklund & Van Roy, arXiv 2308.11958)."""

    label = "L2 towards initial weights"
    after = "Kumar, Marklund & Van Roy, 2308.11958"
    strengths = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 0.1)

    def attach(self) -> None:
        self.parameters: list[Tensor] = list(self.model.parameters())
        self.initial = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def before_step(self) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_add_(gradients, self.parameters, alpha=self.strength)
        torch._foreach_add_(gradients, self.initial, alpha=-self.strength)


class ShrinkAndPerturb(Training):
    """(1 − strength) p + strength · new initial weights, per task (Ash & Adams, 1910.08475).

    It is the only method that uses the boundaries of the tasks.
    """

    label = "shrink and perturb"
    after = "Ash & Adams, 1910.08475"
    strengths = (0.01, 0.03, 0.1, 0.3, 0.6, 1.0)

    def attach(self) -> None:
        self.times = 0

    @torch.no_grad()
    def between_tasks(self) -> None:
        self.times += 1
        fresh = run_seeded(lambda: self.build(self.normed), 1_000_000 * self.times + self.seed)
        for p, new in zip(self.model.parameters(), fresh.parameters(), strict=True):
            p.lerp_(new, self.strength)


class GradientClipping(Training):
    label = "gradient clipping"
    after = "Pascanu, Mikolov & Bengio, 1211.5063"
    strengths = (0.01, 0.1, 1.0, 10.0)

    def before_step(self) -> None:
        clip_grad_norm_(self.model.parameters(), self.strength, foreach=True)


class OrthogonalInitialisation(Training):
    label = "orthogonal initialisation"
    after = "Saxe, McClelland & Ganguli, 1312.6120"

    def prepare(self) -> None:
        for _, layer in matrices(self.model):
            nn.init.orthogonal_(layer.weight, self.gain)


class LayerNorm(Training):
    label = "LayerNorm"
    after = "Ba, Kiros & Hinton, 1607.06450"
    normed = True


class LayerNormL2(L2):
    label = "LayerNorm and L2"
    normed = True


class SpectralNormTorch(Training):
    """Replaces every weight W except the last by strength · W/σ₁."""

    label = "torch spectral_norm"
    after = "Miyato et al., 1802.05957"
    strengths = (0.5, 0.7, 1.0, 1.4, 2.0, 4.0)

    def prepare(self) -> None:
        for _, layer in list(matrices(self.model))[:-1]:
            parametrizations.spectral_norm(layer)
            register_parametrization(layer, "weight", _Times(self.strength), unsafe=True)


class OrthogonalTorch(Training):
    """Replaces every weight except the last by an orthogonal matrix times strength.

    Wide weights remain unchanged: for 100x784 the parametrization takes a hundred times as long as
    the rest of the step.
    """

    label = "torch orthogonal, hidden weights"
    strengths = (1.0, 1.4, 2.0)

    def prepare(self) -> None:
        for _, layer in list(matrices(self.model))[:-1]:
            W = layer.weight
            if W.ndim == 2 and max(W.shape) <= WIDEST:  # torch does not support convolutions
                # Cayley's map is five times cheaper, but requires square weights.
                name = "cayley" if W.shape[0] == W.shape[1] else "householder"
                parametrizations.orthogonal(layer, orthogonal_map=name)
                register_parametrization(layer, "weight", _Times(self.strength), unsafe=True)


class _Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, W: Tensor) -> Tensor:
        return self.factor * W


class Attached(Training):
    """Applies a rule of wellcond to every weight matrix, attached to the optimizer."""

    ours = True
    every: int | None = None

    def rule(self) -> Any:
        raise NotImplementedError

    def attach(self) -> None:
        self.reg = wc.Regularizer(self.model, self.rule())
        self.reg.attach(self.optimizer, every=self.every)

    def finish(self) -> None:
        if self.finite():
            self.reg.enforce()


class ConditionPenalty(Attached):
    label = "ConditionPenalty, attached"
    after = "Nenov, Haider & Balazs, 2410.00169; the proximal step is new"
    strengths = (1.0, 10.0, 100.0, 1000.0)

    def rule(self) -> Any:
        return wc.ConditionPenalty(self.strength)


class ConditionGradient(Training):
    """Adds the gradient of strength · r with `add_gradients`."""

    label = "ConditionPenalty, in the loss"
    after = "Nenov, Haider & Balazs, 2410.00169"
    ours = True
    strengths = (1e-4, 1e-3, 1e-2, 0.1)

    def attach(self) -> None:
        self.reg = wc.Regularizer(self.model, wc.ConditionPenalty(self.strength))

    def before_step(self) -> None:
        self.reg.add_gradients()


class StableRankPenalty(Attached):
    label = "StableRankPenalty"
    after = "Sanyal, Torr & Dokania, 1906.04659, as a penalty"
    strengths = (1.0, 10.0, 100.0, 1000.0)

    def rule(self) -> Any:
        return wc.StableRankPenalty(self.strength)


class SpectralNormPenalty(Attached):
    """Penalises σ₁ above the gain."""

    label = "SpectralNormPenalty"
    after = "Yoshida & Miyato, 1705.10941"
    strengths = (1.0, 10.0, 100.0, 1000.0)

    def rule(self) -> Any:
        return wc.SpectralNormPenalty(self.strength, target=self.gain)


class OrthogonalityPenalty(Attached):
    label = "OrthogonalityPenalty"
    after = "Brock et al., 1609.07093; Bansal, Chen & Wang, 1810.09102"
    strengths = (0.1, 1.0, 10.0, 100.0)

    def rule(self) -> Any:
        return wc.OrthogonalityPenalty(self.strength, scale=self.gain)


class IsometryStep(Attached):
    """IsometryStep with theta = strength and scale = gain."""

    label = "IsometryStep"
    after = "Cissé et al., 1704.08847, with a clip of the largest"
    strengths = (0.01, 0.03, 0.1, 0.5)

    def rule(self) -> Any:
        return wc.IsometryStep(theta=self.strength, scale=self.gain)


class ConditionLimit(Attached):
    label = "ConditionLimit"
    strengths = (1.1, 2.0, 5.0, 20.0)

    def rule(self) -> Any:
        return wc.ConditionLimit(self.strength)


class UpperLimit(Attached):
    """σ₁ ≤ strength."""

    label = "SingularValueLimit, upper"
    after = "Gouk et al., 1804.04368; Sedghi, Gupta & Long, 1805.10408"
    strengths = (0.7, 1.0, 1.5, 2.0)

    def rule(self) -> Any:
        return wc.SingularValueLimit(upper=self.strength)


class BothLimits(Attached):
    """strength/4 ≤ σᵢ ≤ strength."""

    label = "SingularValueLimit, both"
    after = "Jia et al., 1611.05594"
    strengths = (0.7, 1.0, 1.5, 2.0)

    def rule(self) -> Any:
        return wc.SingularValueLimit(lower=self.strength / 4, upper=self.strength)


class UpperLimitOfAttention(UpperLimit):
    """σ₁ ≤ strength for queries, keys, values and outputs."""

    label = "SingularValueLimit, upper, attention only"

    def rule(self) -> Any:
        return {"attention": super().rule(), "*": None}


class UpperLimitOfBlocks(UpperLimit):
    """σ₁ ≤ strength for attention and MLP; embedding and head have no limit."""

    label = "SingularValueLimit, upper, attention and MLP"

    def rule(self) -> Any:
        return {"attention": super().rule(), "mlp": super().rule(), "*": None}


class QKNorm(Training):
    """The network applies LayerNorm to queries and keys."""

    label = "QK norm"
    after = "Dehghani et al., 2302.05442"
    normed = True


class LayerNormIsometry(IsometryStep):
    label = "LayerNorm and IsometryStep"
    normed = True


class LayerNormUpperLimit(UpperLimit):
    label = "LayerNorm and SingularValueLimit, upper"
    normed = True


class WarmUp(Training):
    """The learning rate grows linearly over the first `strength` steps."""

    label = "linear warm-up"
    after = "Goyal et al., 1706.02677"
    strengths = (10.0, 30.0, 100.0)

    def attach(self) -> None:
        self.steps = 0

    def before_step(self) -> None:
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1.0, self.steps / self.strength)


class WeightClipping(Training):
    """Clamps every entry of every parameter to ±strength after every step."""

    label = "weight clipping"
    after = "Arjovsky, Chintala & Bottou, 1701.07875"
    strengths = (0.1, 0.3)

    def attach(self) -> None:
        self.optimizer.register_step_post_hook(lambda *_: self.clip())

    @torch.no_grad()
    def clip(self) -> None:
        for parameter in self.model.parameters():
            parameter.clamp_(-self.strength, self.strength)


class GradientPenalty(Training):
    """strength · (‖∇f‖ − 1)² between real and generated samples, added by the setting."""

    label = "gradient penalty"
    after = "Gulrajani et al., 1704.00028"
    strengths = (0.1, 1.0, 10.0)

    def attach(self) -> None:
        self.source = torch.Generator().manual_seed(self.seed)

    def penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        """Evaluates the penalty at a uniformly drawn point between each pair."""
        part = torch.rand(len(real), *[1] * (real.ndim - 1), generator=self.source)
        between = torch.lerp(real, fake, part).requires_grad_()
        values = self.model(between).sum()
        (gradient,) = torch.autograd.grad(values, between, create_graph=True)
        return self.strength * (gradient.flatten(1).norm(dim=1) - 1).square().mean()


class SpectralNormOfAll(Training):
    """Replaces every weight W, including the last, by strength · W/σ₁."""

    label = "torch spectral_norm, all weights"
    after = "Miyato et al., 1802.05957"
    strengths = (1.0, 1.4, 2.0)

    def prepare(self) -> None:
        for _, layer in list(matrices(self.model)):
            parametrizations.spectral_norm(layer)
            register_parametrization(layer, "weight", _Times(self.strength), unsafe=True)


class SpectralNormOfAllGroupSort(SpectralNormOfAll):
    label = "torch spectral_norm, all weights, GroupSort"
    after = "Miyato et al., 1802.05957; Anil, Lucas & Grosse, 1811.05381"
    sorts = True


class Torchlip(Training):
    """Uses the layers of deel-torchlip, each with Lipschitz constant strength."""

    label = "deel-torchlip, GroupSort"
    after = "Serrurier et al., 2006.06520"
    strengths = (1.0, 1.4, 2.0)
    sorts = True

    def prepare(self) -> None:
        from deel import torchlip

        for name, layer in list(matrices(self.model)):
            parent, _, child = name.rpartition(".")
            made: nn.Module
            if isinstance(layer, nn.Conv2d):
                made = torchlip.SpectralConv2d(
                    *(layer.in_channels, layer.out_channels, layer.kernel_size),
                    stride=layer.stride,
                    padding=layer.padding,
                    k_coef_lip=self.strength,
                )
            else:
                made = torchlip.SpectralLinear(
                    layer.in_features, layer.out_features, k_coef_lip=self.strength
                )
            setattr(self.model.get_submodule(parent), child, made)


class UpperLimitGroupSort(UpperLimit):
    label = "SingularValueLimit, upper, GroupSort"
    after = f"{UpperLimit.after}; Anil, Lucas & Grosse, 1811.05381"
    sorts = True


class UpperLimitActing(UpperLimit):
    """σ₁ ≤ strength for convolutions as linear operators, and for all other matrices."""

    label = "SingularValueLimit, upper, acting=True"

    def rule(self) -> Any:
        acting = wc.SingularValueLimit(upper=self.strength, acting=True)
        names = [n for n, layer in matrices(self.model) if isinstance(layer, nn.Conv2d)]
        return {f"{name}.weight": acting for name in names} | {"*": super().rule()}


class UpperLimitActingGroupSort(UpperLimitActing):
    label = "SingularValueLimit, upper, acting=True, GroupSort"
    after = UpperLimitGroupSort.after
    sorts = True


class Tikhonov(L2):
    label = "Tikhonov"
    after = "Krogh & Hertz, 1991"


METHODS: dict[str, type[Training]] = {
    "none": Training,
    "l2": L2,
    "weight-decay": WeightDecay,
    "l2-initial": L2Initial,
    "shrink-perturb": ShrinkAndPerturb,
    "clipping": GradientClipping,
    "orthogonal-init": OrthogonalInitialisation,
    "layer-norm": LayerNorm,
    "layer-norm-l2": LayerNormL2,
    "spectral-norm-torch": SpectralNormTorch,
    "orthogonal-torch": OrthogonalTorch,
    "condition": ConditionPenalty,
    "condition-gradient": ConditionGradient,
    "stable-rank": StableRankPenalty,
    "spectral-norm": SpectralNormPenalty,
    "orthogonality": OrthogonalityPenalty,
    "isometry": IsometryStep,
    "condition-limit": ConditionLimit,
    "upper-limit": UpperLimit,
    "both-limits": BothLimits,
    "layer-norm-isometry": LayerNormIsometry,
    "layer-norm-upper-limit": LayerNormUpperLimit,
}
# Methods that make sense in any experiment.
COMPARED = tuple(METHODS)
METHODS |= {
    "warm-up": WarmUp,
    "tikhonov": Tikhonov,
    "qk-norm": QKNorm,
    "upper-limit-attention": UpperLimitOfAttention,
    "upper-limit-blocks": UpperLimitOfBlocks,
    "weight-clipping": WeightClipping,
    "gradient-penalty": GradientPenalty,
    "spectral-norm-all": SpectralNormOfAll,
    "spectral-norm-all-sort": SpectralNormOfAllGroupSort,
    "torchlip": Torchlip,
    "upper-limit-sort": UpperLimitGroupSort,
    "upper-limit-acting": UpperLimitActing,
    "upper-limit-acting-sort": UpperLimitActingGroupSort,
}
TUNED = "-tuned"  # suffix of a method whose strength is searched; without it the strength is given


def find_method(name: str) -> type[Training]:
    """Returns the method of this name, with or without the suffix `TUNED`."""
    return METHODS[name.removesuffix(TUNED)]
