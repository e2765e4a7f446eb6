"""The layer and the kind of a weight, derived from its name.

For example, `model.layers.7.mlp.fc1.weight` belongs to the layer `model.layers.7` of the stack
`model.layers.*` of repeated layers, and its kind is `mlp.fc1.weight`. The outermost number of a
name is the number of the layer. If that number counts stages, which contain stacks of unequal
lengths, the next number is. The number of an expert never is.

If more than four weights of a layer differ only by a number, as heads and experts do, they are of
one kind, with * for that number: `attn:qk*`, `mlp.experts.*.w1.weight`.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from typing import NamedTuple

_FEW = 4
# Smaller stacks are readable in a table and get no map.
_LAYERS, _CELLS = 3, 6
# A numbered part of a name, such as the 7 in layers.7, layer1, encoder_layer_7 or h_7.
_COUNTS = re.compile(r"(?<![^.])(?:[0-9]+|(?:[^.:]*(?:layer|block)s?|h)_?[0-9]+)(?=[.:]|$)")
_DIGITS = re.compile(r"[0-9]+$")
_NEXT_COUNTS = re.compile(r"\.[0-9]+(?:[.:]|$)")
# A number in a kind: a separate part, or the end of a view such as qk12.
_NUMBER = re.compile(r"(^|\.|:[^:.0-9]*)([0-9]+)(?=[.:]|$)")


class Place(NamedTuple):
    """The stack, the layer and the kind of a weight.

    Attributes:
        stack: the name of the layer with * for its numbers; "" if the weight is in no layer.
        layer: the name of the layer; "" if the weight is in no layer.
        kind: the rest of the name, with * for a number that takes many values.
    """

    stack: str
    layer: str
    kind: str


def natural(name: str) -> list[tuple[int, str]]:
    """Returns a sort key that orders numbers by value: h.2 before h.10."""
    parts = re.split("([0-9]+)", name)
    parts[1::2] = [digits.lstrip("0") for digits in parts[1::2]]
    return [(len(part) * (index % 2), part) for index, part in enumerate(parts)]


def places(labels: Collection[str]) -> dict[str, Place]:
    """Returns the place of each weight, given as `name` or `name:view` in any order.

    Example:
        >>> from wellcond.report.layers import places
        >>> names = [f"h.{layer}.attn.{x}.weight" for layer in range(3) for x in "qkv"]
        >>> places([*names, "head.weight"])["h.2.attn.k.weight"]
        Place(stack='h.*', layer='h.2', kind='attn.k.weight')
    """
    candidates = {label: _candidates(label) for label in labels}
    stages = _stages(candidates.values())
    found = {}
    for label, layers in candidates.items():
        # A weight in a stage, but in no layer of the stage, belongs to the stage.
        last = layers[-1] if layers else ""
        layer = next((one for one in layers if _stack(one) not in stages), last)
        kind = label[len(layer) :].removeprefix(".") if layer else label
        found[label] = Place(_stack(layer), layer, kind)
    return _star_many(found)


def _candidates(label: str) -> list[str]:
    """Returns the possible names of the layer, outermost first; each ends in a number."""
    name, _, view = label.partition(":")
    layers = []
    for match in _COUNTS.finditer(name):
        layer = name[: match.end()]
        word = re.sub(r"(\.[0-9]+)+$", "", layer).rpartition(".")[2]
        is_whole = layer == name and not view
        # Of consecutive numbers, as in blocks.3.1, only the last counts layers.
        is_followed = _NEXT_COUNTS.match(name, match.end())
        if not (is_whole or is_followed or "expert" in word):
            layers.append(layer)
    return layers


def _stack(layer: str) -> str:
    return _COUNTS.sub(lambda part: _DIGITS.sub("*", part[0]), layer)


def _stages(candidates: Iterable[list[str]]) -> set[str]:
    """Returns the stacks whose members contain stacks of unequal lengths.

    The layers of the inner stacks must have several weights.
    """
    weights: dict[tuple[str, str], dict[str, Counter[str]]] = {}
    for layers in candidates:
        for outer, inner in itertools.pairwise(layers):
            members = weights.setdefault((_stack(outer), _stack(inner)), {})
            members.setdefault(outer, Counter())[inner] += 1
    return {
        outer
        for (outer, _), members in weights.items()
        if len({len(inner) for inner in members.values()}) > 1
        and min(min(inner.values()) for inner in members.values()) > 1
    }


def _star_many(found: dict[str, Place]) -> dict[str, Place]:
    """Returns the places, with * for each number of a kind that takes many values in its stack."""
    pieces = {label: _NUMBER.split(place.kind) for label, place in found.items() if place.layer}
    alike: dict[tuple[str, ...], list[list[str]]] = defaultdict(list)
    for label, parts in pieces.items():  # text, separator before the number, number, text ...
        key = ["*" if index % 3 == 2 else part for index, part in enumerate(parts)]
        alike[found[label].stack, *key].append(parts)
    for members in alike.values():
        for position in range(2, len(members[0]), 3):
            if len({parts[position] for parts in members}) > _FEW:
                for parts in members:
                    parts[position] = "*"
    starred = {label: found[label]._replace(kind="".join(parts)) for label, parts in pieces.items()}
    return found | starred


class Stack(NamedTuple):
    """Repeated layers.

    Attributes:
        name: the name of the layers, with * for their numbers.
        layers: the names of the layers, in the order of their numbers.
        kinds: the kinds of their weights, sorted.
        weights: the labels of the weights by layer and kind, in the given order.
    """

    name: str
    layers: list[str]
    kinds: list[str]
    weights: dict[tuple[str, str], list[str]]


def stacks(labels: Collection[str]) -> list[Stack]:
    """Returns the stacks of at least three layers that have enough kinds in common.

    Example:
        >>> from wellcond.report.layers import stacks
        >>> names = [f"h.{layer}.attn.{x}.weight" for layer in (1, 0, 10) for x in "qkv"]
        >>> (stack,) = stacks([*names, "head.weight"])
        >>> stack.name, stack.layers, stack.kinds[0]
        ('h.*', ['h.0', 'h.1', 'h.10'], 'attn.k.weight')
    """
    weights: dict[str, dict[tuple[str, str], list[str]]] = {}
    for label, (stack, layer, kind) in places(labels).items():
        if layer:
            weights.setdefault(stack, {}).setdefault((layer, kind), []).append(label)
    found = []
    for name in sorted(weights, key=lambda stack: (natural(stack), stack)):
        layers, kinds = (
            sorted(set(names), key=lambda name: (natural(name), name))
            for names in zip(*weights[name], strict=True)
        )
        filled = len(weights[name])
        if len(layers) >= _LAYERS and filled >= max(_CELLS, len(layers) * len(kinds) / 4):
            found.append(Stack(name, layers, kinds, weights[name]))
    return found
