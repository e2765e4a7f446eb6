"""Weights that torch.nn.utils computes from other parameters before each forward pass.

`spectral_norm`, `weight_norm` and `prune` of torch.nn.utils keep parameters such as weight_orig and
store the result in a plain attribute `weight`. This attribute dates from the last forward pass:
after `load_state_dict` and after an optimizer step it is stale. This module therefore recomputes
it as a forward pass in eval mode does, without changing a parameter.
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
class ComputedWeight:
    """A weight that is computed before each forward pass.

    Attributes:
        attribute: its name in the module.
        parts: the names of the parameters from which it is computed.
        method: the name of the method that computes it.
        compute: computes the weight as in eval mode; None if the method is unknown.
    """

    attribute: str
    parts: tuple[str, ...]
    method: str
    compute: Callable[[], Tensor] | None


def find_computed_weights(module: nn.Module) -> Iterator[ComputedWeight]:
    """The computed weights of one module, by the hooks of torch, or by names for unknown hooks."""
    known: set[str] = set()
    if isinstance(module, torch.jit.ScriptModule):
        return
    for hook in module._forward_pre_hooks.values():
        if (found := _read_hook(module, hook)) is not None:
            known.update(found.parts)
            yield found
    unknown: dict[str, list[str]] = {}
    for name in module._parameters.keys() - known:
        for suffix in _SUFFIXES:
            whole = name.removesuffix(suffix)
            if whole != name and isinstance(vars(module).get(whole), Tensor):
                unknown.setdefault(whole, []).append(name)
    for whole, parts in unknown.items():
        yield ComputedWeight(whole, tuple(sorted(parts)), "a hook", None)


def find_weight_computed_from(module: nn.Module, name: str) -> ComputedWeight | None:
    """The weight that is computed from the parameter of this name."""
    return next((one for one in find_computed_weights(module) if name in one.parts), None)


def find_computed_weight(module: nn.Module, attribute: str) -> ComputedWeight | None:
    """The computed weight of this name."""
    return next((one for one in find_computed_weights(module) if one.attribute == attribute), None)


def _read_hook(module: nn.Module, hook: Any) -> ComputedWeight | None:
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
        # nn.MultiheadAttention reads the attribute of its out_proj and never calls its hooks.
        is_stale = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        with torch.no_grad():
            W: Tensor = vars(module)[name] if is_stale else compute(module)
        return W.detach()

    return ComputedWeight(name, tuple(name + suffix for suffix in suffixes), method, value)
