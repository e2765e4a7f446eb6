"""Weights that torch.nn.utils computes from other parameters before each forward pass.

`spectral_norm`, `weight_norm` and `prune` of torch.nn.utils keep parameters such as weight_orig and
store what they compute in a plain attribute `weight`. It is as old as the last forward pass: after
`load_state_dict` and after a step of the optimizer it is stale. So it is computed from the
parameters here, as a forward pass in eval mode does, which changes none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_SUFFIXES = ("_orig", "_g", "_v", "_raw")


@dataclass(frozen=True)
class Computed:
    """A weight that is computed before each forward pass.

    Attributes:
        attribute: its name in the module.
        parts: the names of the parameters from which it is computed.
        method: by what.
        compute: its value in eval mode; None if it is not known how it is computed.
    """

    attribute: str
    parts: tuple[str, ...]
    method: str
    compute: Callable[[], Tensor] | None


def computed_weights(module: nn.Module) -> Iterator[Computed]:
    """Those of one module, by its hooks; by names where a hook is not one of torch."""
    known: set[str] = set()
    if isinstance(module, torch.jit.ScriptModule):
        return
    for hook in module._forward_pre_hooks.values():
        if (found := _by_hook(module, hook)) is not None:
            known.update(found.parts)
            yield found
    unknown: dict[str, list[str]] = {}
    for name in module._parameters.keys() - known:
        for suffix in _SUFFIXES:
            whole = name.removesuffix(suffix)
            if whole != name and isinstance(vars(module).get(whole), Tensor):
                unknown.setdefault(whole, []).append(name)
    for whole, parts in unknown.items():
        yield Computed(whole, tuple(sorted(parts)), "a hook", None)


def part_of(module: nn.Module, name: str) -> Computed | None:
    """The weight that is computed from a parameter of this name."""
    return next((one for one in computed_weights(module) if name in one.parts), None)


def computed_weight(module: nn.Module, attribute: str) -> Computed | None:
    """The one of this name."""
    return next((one for one in computed_weights(module) if one.attribute == attribute), None)


def _by_hook(module: nn.Module, hook: Any) -> Computed | None:
    compute: Callable[[nn.Module], Any]
    suffixes = ["_orig"]
    if isinstance(hook, SpectralNorm):
        name, method = hook.name, "spectral_norm"
        compute = partial(hook.compute_weight, do_power_iteration=False)
    elif isinstance(hook, WeightNorm):
        name, method, suffixes = hook.name, "weight_norm", ["_g", "_v"]
        compute = hook.compute_weight
    elif isinstance(hook, BasePruningMethod):
        name, method, compute = hook._tensor_name, "pruning", hook.apply_mask
    else:
        return None

    def value() -> Tensor:
        # nn.MultiheadAttention reads the attribute of its out_proj, and never calls its hooks.
        stale = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        with torch.no_grad():
            W: Tensor = vars(module)[name] if stale else compute(module)
        return W.detach()

    return Computed(name, tuple(name + suffix for suffix in suffixes), method, value)
