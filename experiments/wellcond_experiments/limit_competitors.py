"""Methods that bound the spectrum of a weight: wellcond and other libraries, in their default use.

- spectral_norm: `torch.nn.utils.parametrizations.spectral_norm`, one power iteration per step.
- orthogonal: `torch.nn.utils.parametrizations.orthogonal`, with its default map.
- torchlip: `SpectralLinear` and `SpectralConv2d` of deel-torchlip: the weight divided by sigma_1,
  then Björck's iteration.
- geotorch: `geotorch.orthogonal`.
- orthogonium: `OrthoLinear` and `AdaptiveOrthoConv2d`.

All except wellcond make every singular value, or at least the largest, equal to the bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization
from torch.optim import Optimizer

import wellcond as wc
from wellcond_experiments.limit_cases import Case

BEFORE = "before-"  # prefix of the methods of an older wellcond


class Scale(nn.Module):
    """Multiplies the weight by a number."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return self.factor * weight


def spectral_norm(layer: Any) -> nn.Module:
    return parametrizations.spectral_norm(layer)


def orthogonal(layer: Any) -> nn.Module:
    return parametrizations.orthogonal(layer)


def torchlip(layer: Any) -> nn.Module:
    from deel import torchlip

    if isinstance(layer, nn.Conv2d):
        return torchlip.SpectralConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding
        )
    return torchlip.SpectralLinear(layer.in_features, layer.out_features)


def geotorch(layer: Any) -> nn.Module:
    import geotorch

    return geotorch.orthogonal(layer, "weight")


def orthogonium(layer: Any) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        from orthogonium.layers.conv.AOC import AdaptiveOrthoConv2d

        return AdaptiveOrthoConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size[0], padding_mode="zeros"
        )
    from orthogonium.layers.linear import OrthoLinear

    return OrthoLinear(layer.in_features, layer.out_features)


PEERS: dict[str, Callable[[Any], nn.Module]] = {
    one.__name__: one for one in (spectral_norm, orthogonal, torchlip, geotorch, orthogonium)
}
DISTRIBUTIONS = {
    "torchlip": "deel-torchlip",
    "geotorch": "geotorch",
    "orthogonium": "orthogonium",
}


def replace_layers(model: nn.Module, names: list[str], method: str, bound: float) -> None:
    """Replaces the limited layers by those of another library."""
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = PEERS[method](model.get_submodule(name))
        if bound != 1:
            register_parametrization(layer, "weight", Scale(bound))
        setattr(model.get_submodule(parent), child, layer)


def limit(
    model: nn.Module, names: list[str], optimizer: Optimizer, case: Case, method: str, bound: float
) -> wc.Regularizer:
    """Returns an attached regulariser that limits the layers.

    Args:
        model: the network.
        names: names of the layers.
        optimizer: the optimizer to attach to.
        case: the case, which gives the limited quantity.
        method: "watched", the default of `attach`; "auto", the default of an older version;
            "every=N"; or "kernel", which limits the kernel of a convolution as a matrix.
        bound: the bound of sigma_1 or kappa.
    """
    rule: Any
    if case.quantity == "kappa":
        rule = wc.ConditionLimit(bound)
    elif case.quantity == "acting" and method != "kernel":
        further: dict[str, Any] = {"acting": True}
        rule = wc.SingularValueLimit(upper=bound, **further)
    else:
        rule = wc.SingularValueLimit(upper=bound)
    rules: dict[str, Any] = {f"{name}.weight": rule for name in names}
    reg = wc.Regularizer(model, rules | {"*": None})
    every: Any = {"auto": "auto"}.get(method)
    if method.startswith("every="):
        every = int(method.removeprefix("every="))
    reg.attach(optimizer, every=every)
    return reg


def check_method(name: str) -> None:
    """Raises a ValueError for an unknown method."""
    method = name.removeprefix(BEFORE)
    known = method in ("watched", "auto", "kernel") or method.removeprefix("every=").isdigit()
    if not (known or name in ("plain", *PEERS)):
        raise ValueError(
            "--competitors must be names from plain, watched, every=N, kernel, before-auto, "
            f"before-every=N, {', '.join(PEERS)}, got {name!r}."
        )


def version(method: str) -> str:
    """Returns the version of the package of a method; empty for torch."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as find_version

    try:
        return find_version(DISTRIBUTIONS[method]) if method in DISTRIBUTIONS else ""
    except PackageNotFoundError:
        return ""
