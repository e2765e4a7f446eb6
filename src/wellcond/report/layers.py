"""Which layer of a model a weight belongs to, and which kind of weight it is there, by their names.

Of `model.layers.7.mlp.fc1.weight` the layer is `model.layers.7`, the stack in which layers repeat
`model.layers.*`, and the kind `mlp.fc1.weight`. The number of a layer is the outermost one, unless
what it counts are stages, which hold stacks of unequal lengths: then it is the next one. Experts
are no layers.

Where more than four weights of a layer differ by a number alone, as heads and experts do, they are
of one kind, with * for that number: `attn:qk*`, `mlp.experts.*.w1.weight`.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Collection
from typing import NamedTuple

_FEW = 4
# What is smaller is seen at once in a table.
_LAYERS, _CELLS = 3, 6
# A part of a name that counts: 7 of layers.7, layer1, encoder_layer_7, h_7.
_COUNTS = re.compile(r"[0-9]+|(.*(layer|block)s?|h)_?[0-9]+", re.DOTALL)
_DIGITS = re.compile("[0-9]+")
_LAST_DIGITS = re.compile("[0-9]+$")
# A number in a kind: a part of its own, or what a view ends in, as of qk12.
_NUMBER = re.compile(r"(^|\.|:[^:.0-9]*)([0-9]+)(?=[.:]|$)")


class Place(NamedTuple):
    """Where a weight stands.

    Attributes:
        stack: the name of its layer with * for the numbers; "" if it is in none.
        layer: the name of its layer; "" if it is in none.
        kind: the rest of its name, with * for numbers of which there are many.
    """

    stack: str
    layer: str
    kind: str


def natural(name: str) -> list[tuple[int, str]]:
    """The key by which names sort with their numbers by size: h.2 before h.10."""
    parts = re.split("([0-9]+)", name)
    parts[1::2] = [digits.lstrip("0") for digits in parts[1::2]]
    return [(len(part) * (index % 2), part) for index, part in enumerate(parts)]


def places(labels: Collection[str]) -> dict[str, Place]:
    """Where each weight stands, given by `name` or `name:view`; their order does not matter.

    Example:
        >>> from wellcond.report.layers import places
        >>> names = [f"h.{layer}.attn.{x}.weight" for layer in range(3) for x in "qkv"]
        >>> places([*names, "head.weight"])["h.2.attn.k.weight"]
        Place(stack='h.*', layer='h.2', kind='attn.k.weight')
    """
    names = {label: _parts(label) for label in labels}
    ends = {label: _ends(parts) for label, parts in names.items()}
    stages = _stages([(parts, ends[label]) for label, parts in names.items()])
    found = {}
    for label, parts in names.items():
        candidates = ends[label]
        end = next((e for e in candidates if _stack(parts, e) not in stages), 0)
        if candidates and not end:  # of a stage, and in no layer of it
            end = candidates[-1]
        kind = _joined(parts[end:]) if end else label
        found[label] = Place(_stack(parts, end), _joined(parts[:end]), kind)
    return _with_many_as_one(found)


def _parts(label: str) -> list[str]:
    """Of `a.3.b:q` a, 3, b and :q."""
    name, colon, view = label.partition(":")
    return [*name.split("."), *([colon + view] if view else [])]


def _joined(parts: list[str]) -> str:
    return ".".join(parts).replace(".:", ":")


def _stack(parts: list[str], end: int) -> str:
    return ".".join(
        _LAST_DIGITS.sub("*", part) if _COUNTS.fullmatch(part) else part for part in parts[:end]
    )


def _ends(parts: list[str]) -> list[int]:
    """How many parts may be the name of a layer: up to a number, and not all."""
    ends = []
    word = ""
    for end, (part, following) in enumerate(itertools.pairwise(parts), 1):
        word = word if _DIGITS.fullmatch(part) else part
        counts = _COUNTS.fullmatch(part) and not _DIGITS.fullmatch(following)
        if counts and "expert" not in word:
            ends.append(end)
    return ends


def _stages(names: list[tuple[list[str], list[int]]]) -> set[str]:
    """The stacks whose members hold stacks of unequal lengths, of layers with several weights."""
    weights: dict[tuple[str, str], dict[str, Counter[str]]] = {}
    for parts, ends in names:
        for outer, inner in itertools.pairwise(ends):
            stacks = weights.setdefault((_stack(parts, outer), _stack(parts, inner)), {})
            layers = stacks.setdefault(_joined(parts[:outer]), Counter())
            layers[_joined(parts[:inner])] += 1
    return {
        outer
        for (outer, _), stacks in weights.items()
        if len({len(layers) for layers in stacks.values()}) > 1
        and min(count for layers in stacks.values() for count in layers.values()) > 1
    }


def _with_many_as_one(found: dict[str, Place]) -> dict[str, Place]:
    starred = {
        label: (place.stack, _NUMBER.sub(r"\1*", place.kind))
        for label, place in found.items()
        if place.layer
    }
    values: dict[tuple[tuple[str, str], int], set[str]] = defaultdict(set)
    for label, key in starred.items():
        for position, number in enumerate(_NUMBER.finditer(found[label].kind)):
            values[key, position].add(number[2])

    def kind(label: str) -> str:
        positions = itertools.count()

        def star(number: re.Match[str]) -> str:
            many = len(values[starred[label], next(positions)]) > _FEW
            return f"{number[1]}*" if many else number[0]

        return _NUMBER.sub(star, found[label].kind)

    return {
        label: place._replace(kind=kind(label)) if place.layer else place
        for label, place in found.items()
    }


class Stack(NamedTuple):
    """Layers that repeat.

    Attributes:
        name: with * for the numbers.
        layers: their names, in the order of their numbers.
        kinds: of their weights, sorted.
        weights: of a layer and a kind the weights, in the order in which they were given.
    """

    name: str
    layers: list[str]
    kinds: list[str]
    weights: dict[tuple[str, str], list[str]]


def stacks(labels: Collection[str]) -> list[Stack]:
    """The stacks of three layers and more, unless these have hardly a kind in common.

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
