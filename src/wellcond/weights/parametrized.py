"""The tensors of a file from which torch.nn.utils computes a weight, by their names.

These are `parametrizations.X.original` and all other tensors that torch.nn.utils.parametrize stores
for X, and the parameters of the older hooks: `X_g` and `X_v` (weight_norm), `X_orig` with `X_u` and
`X_v` (spectral_norm) or with `X_mask` (prune).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from wellcond.text import last_part
from wellcond.weights.matrices import entries
from wellcond.weights.quantised import Tensors

Parts = dict[str, str]  # names by their distinguishing ends: "g", "original0", "0._u"

_NEW = re.compile(r"((?:.*?[./])??)parametrizations[./]([^./]+)[./](.+)", re.DOTALL)
_NORMED = re.compile(r"^weight|weight$|kernel$")  # the parameters to which weight_norm is applied
# With one of these partners, a tensor is a part of another weight and not a weight with parts.
_PARTNERS = {"v": {"g"}, "g": {"v"}, "orig": {"u", "v", "mask"}}


def find_parametrized(tensors: Tensors) -> Iterator[tuple[str, Parts]]:
    """The names and parts of weights that are not stored but computed from their parts."""
    for label, parts in (*_join_old(tensors), *_group_new(tensors).items()):
        if label not in tensors:
            yield label, parts


def _join_old(tensors: Tensors) -> Iterator[tuple[str, Parts]]:
    """The parts of the older hooks; a part that has parts itself is replaced by these."""
    found = _group_old(tensors)
    for label, parts in found.items():
        outer, _, own = label.rpartition("_")
        around = found.get(outer, {})
        norms = tensors[parts["g"]][0] if {"g", "v"} <= parts.keys() else (2, 2)
        within = label not in tensors and any(
            part in around or "orig" in found.get(f"{outer}_{part}", {})
            for part in _PARTNERS.get(own, ())
        )
        if "orig" in parts and within:
            yield outer, around | {f"{own}_{part}": name for part, name in parts.items()}
        elif "orig" in parts and not _PARTNERS["orig"].isdisjoint(parts):
            yield label, parts
        elif _NORMED.search(last_part(label)) and entries(norms) == max(norms, default=1):
            yield label, {part: parts[part] for part in ("g", "v")}


def _group_old(names: Iterable[str]) -> Mapping[str, Parts]:
    found: dict[str, Parts] = {}
    for name in names:
        label, _, part = name.rpartition("_")
        if part in ("g", "v", "u", "orig", "mask") and last_part(label) and not _NEW.match(name):
            found.setdefault(label, {})[part] = name
    return found


def _group_new(names: Iterable[str]) -> Mapping[str, Parts]:
    found: dict[str, Parts] = {}
    for name in names:
        if match := _NEW.fullmatch(name):
            module, own, part = match.groups()
            found.setdefault(module + own, {})[part] = name
    return found
