"""Random changes of checkpoints, for which every answer must be a weight or a reason."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from support import build_all, content_from
from torch import Tensor

from wellcond.recipes.base import Content, Finder, RecipeError

Configs = Mapping[str, Mapping[str, Any]]

_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 8, 16, 31, 64, 1 << 31, 1 << 62, 1 << 70, -7]),
    st.sampled_from([0.0, -1.5, float("nan"), 4.0]),
    st.sampled_from(
        ["", "4", "gptq", "gptq_v2", "gptq_p", "awq", "gemm", "gemv", "nf4", "float32"]
    ),
    st.lists(st.sampled_from([-1, 0, 1, 4, 7, 1 << 40, "x", None]), max_size=4),
    st.just({"bits": 4}),
)
_SIDES = st.sampled_from([0, 1, 2, 3, 5, 8, 16, 31, 33, 64])
_DTYPES = st.sampled_from(
    [
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
)


def mutate(
    draw: st.DataObject, tensors: Mapping[str, Tensor], configs: Configs
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Returns the tensors and the configs with one to three random changes."""
    tensors, configs = dict(tensors), copy.deepcopy({k: dict(v) for k, v in configs.items()})
    for _ in range(draw.draw(st.integers(1, 3))):
        name = draw.draw(st.sampled_from(sorted(tensors))) if tensors else ""
        kind = draw.draw(st.sampled_from(["drop", "shape", "cut", "values", "setting"]))
        if kind == "setting" or not name:
            _change_setting(draw, tensors, configs)
        elif kind == "drop":
            del tensors[name]
        elif kind == "shape":
            shape = draw.draw(st.lists(_SIDES, max_size=3))
            tensors[name] = torch.ones(shape).to(draw.draw(_DTYPES))
        elif kind == "cut" and tensors[name].ndim:
            tensors[name] = tensors[name][: draw.draw(st.integers(0, len(tensors[name])))]
        elif kind == "values":
            fill = draw.draw(st.sampled_from([-1, 0, 1, 100]))
            dtype = tensors[name].dtype
            tensors[name] = torch.full(tensors[name].shape, fill).to(torch.int64).to(dtype)
    return tensors, configs


def _change_setting(
    draw: st.DataObject, tensors: dict[str, Tensor], configs: dict[str, dict[str, Any]]
) -> None:
    """Changes a setting, in a config or in a description that is stored as a tensor."""
    described = [name for name in tensors if "quant_state" in name]
    name = draw.draw(st.sampled_from([*configs, *described]))
    if name in configs:
        inner = configs[name]
        for key in ("quantization", "quantization_config"):
            inner = inner.get(key, inner) if isinstance(inner, dict) else inner
        if isinstance(inner, dict):
            inner[draw.draw(st.sampled_from(sorted(inner) or ["bits"]))] = draw.draw(_VALUES)
        return
    try:
        inner = json.loads(bytes(tensors[name].flatten().to(torch.uint8).tolist()))
    except ValueError:
        return
    if isinstance(inner, dict):
        inner[draw.draw(st.sampled_from(sorted(inner)))] = draw.draw(_VALUES)
        tensors[name] = torch.tensor(list(json.dumps(inner).encode()), dtype=torch.uint8)


def check_answers(content: Content, find: Finder) -> None:
    """Checks that each candidate gives a weight of its shape, or a reason on one line."""
    for candidate in find(content):
        assert candidate.parts[0] in content.tensors
        reason = ""
        try:
            recipe = candidate.make()
            W = build_all(recipe, content)
        except RecipeError as why:
            reason = str(why) or "\n"
        assert "\n" not in reason
        assert reason or tuple(W.shape) == recipe.shape


def check_mutated(draw: st.DataObject, content: Content, configs: Configs, find: Finder) -> None:
    """Changes a checkpoint at random and checks the answers."""
    tensors = {name: content.read(name) for name in content.tensors}
    changed, beside = mutate(draw, tensors, configs)
    check_answers(content_from(changed, **beside), find)
