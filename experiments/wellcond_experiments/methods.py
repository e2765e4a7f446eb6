"""Methods of training: nothing, the baselines that people use, and those of wellcond.

All share one loop: `Training.step` of a loss. A method changes what it must: the network before it
is trained, the gradient before a step, the weights after it, or what happens between two tasks.
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
WIDEST = 512  # of the weights that torch is to keep orthogonal
Build = Callable[[bool], nn.Module]  # with LayerNorm before every activation, or without


def run_seeded(build: Callable[[], Made], seed: int) -> Made:
    """What is made with random numbers of that seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


@contextmanager
def without_subnormals() -> Iterator[None]:
    """Numbers below the normal ones of their dtype count as zero.

    Units that die in a training leave ever smaller averages behind, on which processors work many
    times slower: they would decide what a method seems to cost. Enter it before the first parallel
    operation, because threads inherit it from the one that starts them.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def matrices(model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """The layers whose weights are matrices, those of convolutions flattened."""
    modules = model.named_modules()
    return ((name, module) for name, module in modules if isinstance(module, nn.Linear | nn.Conv2d))


@torch.no_grad()
def condition_numbers(model: nn.Module) -> dict[str, float]:
    """κ of every weight matrix as it acts, in float64; nan where training has diverged."""
    weights = {name: m.weight.detach().flatten(1) for name, m in matrices(model)}
    return {
        name: float(wc.condition_number(S)) if S.isfinite().all() else math.nan
        for name, S in weights.items()
    }


@torch.no_grad()
def spectral_norms(model: nn.Module) -> dict[str, float]:
    """σ₁ of every weight matrix as it acts, in float64; nan where training has diverged."""
    weights = {name: m.weight.detach().flatten(1).double() for name, m in matrices(model)}
    return {
        name: float(torch.linalg.matrix_norm(S, 2)) if S.isfinite().all() else math.nan
        for name, S in weights.items()
    }


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """The model as it is evaluated: where it is looked at, spectral_norm takes no iteration."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def largest(values: Iterable[float]) -> float:
    """The largest; nan if one is, which `max` does not promise."""
    return float(torch.tensor(list(values), dtype=torch.float64).max())


class Training:
    """Adam alone, as it is.

    Args:
        build: makes the network, with LayerNorm before its activations or without.
        strength: that of the method, in its own units.
        lr: learning rate of Adam.
        seed: of the initial weights.
        gain: what an isometric weight is to be multiplied by: √2 before ReLU, else 1.
        decays: whether a parameter is decayed, where the method is a decay; all if None.
    """

    label: ClassVar[str] = "nothing"
    after: ClassVar[str] = ""  # who described it
    ours: ClassVar[bool] = False  # whether wellcond offers it
    strengths: ClassVar[tuple[float, ...]] = (0.0,)  # searched unless an experiment says otherwise
    normed: ClassVar[bool] = False
    sorts: ClassVar[bool] = False  # whether a critic has GroupSort in place of LeakyReLU

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
        """The parameters in two groups, with the strength as their decay and with none."""
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for parameter in self.model.parameters():
            groups[self.decays(parameter)].append(parameter)
        return [
            {"params": group, "weight_decay": self.strength * decayed}
            for decayed, group in groups.items()
            if group
        ]

    def prepare(self) -> None:
        """Changes the network before it is trained."""

    def attach(self) -> None:
        """What is to happen with every step of the optimizer."""

    def set_rate(self, lr: float) -> None:
        """The learning rate from now on, where an experiment changes it."""
        self.lr = lr
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def before_step(self) -> None:
        """Changes the gradients."""

    def between_tasks(self) -> None:
        """The data change, or an epoch ends."""

    def finish(self) -> None:
        """The weights are about to be tested."""

    def step(self, loss: Tensor) -> bool:
        """One step on this loss; False, and none, where it is no longer finite."""
        if not loss.isfinite():
            return False
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.before_step()
        try:
            self.optimizer.step()
        except ValueError:  # what has diverged obeys no limit
            if self.finite():
                raise
            return False
        return True

    def finite(self) -> bool:
        """Whether all parameters are."""
        return all(bool(p.isfinite().all()) for p in self.model.parameters())


class L2(Training):
    """As the optimizer does it, on all parameters unless an experiment says otherwise."""

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
    """strength/2 ‖p − p₀‖² of every parameter (Kumar, Marklund & Van Roy, arXiv 2308.11958)."""

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
    """(1 − strength) p + strength · new initial weights, as data change (Ash & Adams, 1910.08475).

    The setting tells it when a task begins, and tells no other method.
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
    """W/σ₁ in place of every W but the last, times strength."""

    label = "spectral_norm of torch"
    after = "Miyato et al., 1802.05957"
    strengths = (0.5, 0.7, 1.0, 1.4, 2.0, 4.0)

    def prepare(self) -> None:
        for _, layer in list(matrices(self.model))[:-1]:
            parametrizations.spectral_norm(layer)
            register_parametrization(layer, "weight", _Times(self.strength), unsafe=True)


class OrthogonalTorch(Training):
    """Orthogonal weights times strength in place of every W but the last.

    Wide ones are left as they are: of 100x784 it takes a hundred times as long as all else.
    """

    label = "orthogonal of torch, hidden weights"
    strengths = (1.0, 1.4, 2.0)

    def prepare(self) -> None:
        for _, layer in list(matrices(self.model))[:-1]:
            W = layer.weight
            if W.ndim == 2 and max(W.shape) <= WIDEST:  # torch has none for a convolution
                # Cayley's map is five times cheaper, but only of square weights.
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
    """A rule of wellcond on every weight matrix, attached to the optimizer."""

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
    """strength · r in the loss, of which `add_gradients` adds the gradient."""

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
    """Down to the gain."""

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
    """θ is the strength; scale is the gain."""

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
    """σ₁ ≤ strength of queries, keys, values and outputs."""

    label = "SingularValueLimit, upper, of attention"

    def rule(self) -> Any:
        return {"attention": super().rule(), "*": None}


class UpperLimitOfBlocks(UpperLimit):
    """σ₁ ≤ strength of attention and MLP; embedding and head stay free."""

    label = "SingularValueLimit, upper, of attention and MLP"

    def rule(self) -> Any:
        return {"attention": super().rule(), "mlp": super().rule(), "*": None}


class QKNorm(Training):
    """The network has LayerNorm of queries and keys."""

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
    """The learning rate grows linearly over so many first steps."""

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
    """Every entry of every parameter between ±strength, after every step."""

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
    """strength · (‖∇f‖ − 1)² between real and generated samples, which the setting adds."""

    label = "gradient penalty"
    after = "Gulrajani et al., 1704.00028"
    strengths = (0.1, 1.0, 10.0)

    def attach(self) -> None:
        self.source = torch.Generator().manual_seed(self.seed)

    def penalty(self, real: Tensor, fake: Tensor) -> Tensor:
        """At a point between each pair, drawn uniformly."""
        part = torch.rand(len(real), *[1] * (real.ndim - 1), generator=self.source)
        between = torch.lerp(real, fake, part).requires_grad_()
        values = self.model(between).sum()
        (gradient,) = torch.autograd.grad(values, between, create_graph=True)
        return self.strength * (gradient.flatten(1).norm(dim=1) - 1).square().mean()


class SpectralNormOfAll(Training):
    """W/σ₁ in place of every W, the last also, times strength."""

    label = "spectral_norm of torch, all weights"
    after = "Miyato et al., 1802.05957"
    strengths = (1.0, 1.4, 2.0)

    def prepare(self) -> None:
        for _, layer in list(matrices(self.model)):
            parametrizations.spectral_norm(layer)
            register_parametrization(layer, "weight", _Times(self.strength), unsafe=True)


class SpectralNormOfAllGroupSort(SpectralNormOfAll):
    label = "spectral_norm of torch, all weights, GroupSort"
    after = "Miyato et al., 1802.05957; Anil, Lucas & Grosse, 1811.05381"
    sorts = True


class Torchlip(Training):
    """The layers of deel-torchlip, each Lipschitz with the constant strength."""

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
    """σ₁ ≤ strength of convolutions as they act, and of all other matrices."""

    label = "SingularValueLimit, upper, acting"

    def rule(self) -> Any:
        acting = wc.SingularValueLimit(upper=self.strength, acting=True)
        names = [n for n, layer in matrices(self.model) if isinstance(layer, nn.Conv2d)]
        return {f"{name}.weight": acting for name in names} | {"*": super().rule()}


class UpperLimitActingGroupSort(UpperLimitActing):
    label = "SingularValueLimit, upper, acting, GroupSort"
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
# Those that make sense in any experiment.
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
TUNED = "-tuned"  # of names of the same method, once with strengths that are given, once searched


def find_method(name: str) -> type[Training]:
    """The one of this name, tuned or not."""
    return METHODS[name.removesuffix(TUNED)]
