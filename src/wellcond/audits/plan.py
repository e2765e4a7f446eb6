"""The rows of an audit: planned from names and shapes before a tensor is read, then selected.

Letters: W (m, n) a stored weight, s B A what an adapter adds to it; S (m, n) what a row measures.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, cached_property, partial
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from wellcond.audits.sources import Source
from wellcond.operators.convolution import Convolution, Geometry
from wellcond.operators.product import Product
from wellcond.operators.views import View, shape_of
from wellcond.report.findings import MERGED
from wellcond.text import and_more, joined, of_modules
from wellcond.weights.adapters import Adapter, UnknownAdapterError
from wellcond.weights.heads import Attention, Value
from wellcond.weights.matrices import Matrices, single_views
from wellcond.weights.projections import Unknown
from wellcond.weights.reasons import Reason, Skipped


@dataclass(frozen=True)
class RowSource:
    """What rows are taken from; it is read once for all of them.

    Attributes:
        name: by which progress calls it.
        read: returns its values, or what reads them; may be slow, and return much.
        tensor: that it is, if it is one.
    """

    name: str
    read: Callable[[], Any]
    tensor: Matrices | None = None


@dataclass(frozen=True)
class RowSpec:
    """A row that may be measured.

    Attributes:
        name: of its tensor, or of its module of attention.
        view: which matrix it is; "" if there is only one.
        aliases: what a pattern may match.
        source: of this and of the rows beside it.
        matrix: from what the source reads to the matrix that is measured.
        note: what a reader must know of it.
        stored: whether it is a part of a parameter as it stands.
        covers: whether it stands for parameters of the model or file itself.
        reason: why it is left out unless an exact name asks for it.
    """

    name: str
    view: str
    aliases: tuple[str, ...]
    source: RowSource
    matrix: Callable[[Any], Measurable]
    note: str = ""
    stored: bool = True
    covers: bool = True
    reason: Skipped | None = None

    @property
    def label(self) -> str:
        """name:view, by which it is shown."""
        return f"{self.name}:{self.view}" if self.view else self.name


# --- what is computed from what is stored ---------------------------------------------------------


class Adapted:
    """A weight and what its adapters add to it, which is computed when it is first needed."""

    def __init__(self, W: Tensor, adapters: Sequence[Adapter]) -> None:
        self.W, self.adapters = W.detach().cpu(), adapters

    @cached_property
    def change(self) -> Tensor:
        first, *others = (adapter.change(self.W) for adapter in self.adapters)
        return sum(others, first)

    @cached_property
    def total(self) -> Tensor:
        return self.W.double() + self.change

    @property
    def rank(self) -> int:
        return sum(adapter.product().nu for adapter in self.adapters)


class Merged:
    """W + s B A through a view of W."""

    dtype = torch.float64

    def __init__(self, adapted: Adapted, view: View) -> None:
        self.adapted, self.view = adapted, view
        self.shape = shape_of(view, adapted.W)


class Delta:
    """s B A: a product, its scale, and whether DoRA scales the rows of the sum."""

    def __init__(self, adapter: Adapter) -> None:
        try:
            self.product = adapter.product()
        except IndexError:
            raise UnknownAdapterError("one of its factors is a vector") from None
        self.scale, self.dora = adapter.setting.scale, adapter.magnitude is not None
        self.shape, self.dtype = self.product.shape, self.product.dtype


Measurable = Tensor | Product | Convolution | Merged | Delta


# --- planning -------------------------------------------------------------------------------------


def plan(source: Source, heads: bool = False) -> list[RowSpec]:
    """All rows of a source, with those of the heads of attention if they are asked for.

    Raises:
        ValueError: there is no attention.
    """
    specs: list[RowSpec] = []
    for one in source.matrices:
        specs += rows_of_tensor(one, source.skipped.get(one.name))
    specs += (row_of_adapter(*one) for one in source.adapters)
    for one in source.bases:
        specs += rows_of_tensor(one, covers=False)
    if heads:
        attentions, value = source.find_heads()
        if not attentions:
            raise ValueError(
                f"`heads` asks for the heads of attention, but {source.name} has none that is "
                "known. Leave it out, or call the projections q_proj, k_proj, v_proj and o_proj."
            )
        for attention in attentions:
            specs += rows_of_attention(attention, value)
    return specs


def rows_of_tensor(
    one: Matrices, reason: Skipped | None = None, covers: bool = True
) -> Iterator[RowSpec]:
    """The rows of a tensor, then those of its sum with its adapters."""
    parts = [part for adapter in one.adapters for part in adapter.parts]
    views = single_views(one.views, one.shape)
    read = (lambda: Adapted(one.read(), one.adapters)) if parts else one.read
    source = RowSource(one.name, read, one)

    def names(*labels: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*one.aliases, *labels, *parts)))

    for name, view in views.items():
        matrix: Callable[[Any], Measurable] = view
        note, stored = one.note, one.stored
        if one.geometry is not None:
            name, matrix = "operator", partial(_convolution, geometry=one.geometry)
            note, stored = joined(note, "without its adapter" if parts else ""), True
        label = f"{one.name}:{name}" if name else one.name
        matrix = partial(_unadapted, matrix) if parts else matrix
        yield RowSpec(one.name, name, names(label), source, matrix, note, stored, covers, reason)
    for name, view in views.items() if parts else ():
        merged = f"{name}:{MERGED}".lstrip(":")
        aliases = names(f"{one.name}:{merged}", f"{one.name}:{MERGED}")
        matrix = partial(Merged, view=view)
        yield RowSpec(one.name, merged, aliases, source, matrix, covers=False, reason=reason)


def _unadapted(matrix: Callable[[Tensor], Measurable], adapted: Adapted) -> Measurable:
    return matrix(adapted.W)


def _convolution(kernel: Tensor, geometry: Geometry) -> Convolution:
    return Convolution(kernel.detach().cpu(), geometry)


def row_of_adapter(name: str, adapter: Adapter) -> RowSpec:
    """The row of what an adapter adds to the weight of this name."""
    view = "delta" if adapter.name in ("", "default") else f"delta.{adapter.name}"
    dora = "DoRA brings the rows of the sum to other lengths besides"
    note = joined(adapter.setting.note, dora if adapter.magnitude is not None else "")
    aliases = (name, f"{name}:delta", f"{name}:{view}", *adapter.parts)
    source = RowSource(name, partial(Delta, adapter))
    return RowSpec(name, view, aliases, source, lambda delta: delta, note)


def rows_of_attention(attention: Attention, value: Value) -> Iterator[RowSpec]:
    """The rows of its heads, and one for each kind of which no head is known."""
    source = RowSource(attention.name, lambda: cache(value))  # reads what a head first needs
    rows = [(one.view, partial(_head, attention, one.view), one.note) for one in attention.heads]
    rows += [(view, partial(_unknown, why), "") for view, why in attention.unknown.items()]
    for view, matrix, note in rows:
        # Of a model that is itself attention, the view is the name.
        name, own = (attention.name, view) if attention.name else (view, "")
        yield RowSpec(name, own, attention.names(view), source, matrix, note, covers=False)


def _head(attention: Attention, view: str, value: Value) -> Product:
    ((_, S),) = attention.products(value, view.__eq__)
    return S


def _unknown(why: str, value: Value) -> Product:
    raise Unknown(why)


# --- selection ------------------------------------------------------------------------------------


def as_patterns(given: str | Sequence[str]) -> Sequence[str]:
    """The patterns; a text is one of them."""
    return [given] if isinstance(given, str) else given


def match(names: Collection[str], patterns: Sequence[str]) -> list[str]:
    """The patterns that match one of the names."""
    return [p for p in patterns if any(fnmatchcase(name, p) for name in names)]


def select(
    specs: Sequence[RowSpec],
    include: Sequence[str],
    exclude: Sequence[str],
    skipped: Mapping[str, Skipped],
    others: Collection[str] = (),
) -> tuple[list[RowSpec], dict[str, Skipped]]:
    """The rows to measure, and what is skipped then.

    Args:
        specs: all rows.
        include: patterns of rows to measure; all if empty.
        exclude: patterns of rows to leave out.
        skipped: what has no row, or one with the same reason, by name.
        others: names of what has no row, which a pattern of `exclude` may match as well.

    Raises:
        ValueError: a pattern matches nothing.
    """
    wanted: list[RowSpec] = []
    left_out = dict(skipped)
    unused = {*include, *(pattern for pattern in exclude if not match(others, [pattern]))}
    for source, group in groupby(specs, key=attrgetter("source")):
        reasons: dict[str, Skipped] = {}
        rows = list(group)
        for row in rows:
            included, excluded = match(row.aliases, include), match(row.aliases, exclude)
            unused.difference_update(included, excluded)
            if excluded:
                reasons[row.label] = Skipped(Reason.excluded, f'"{excluded[0]}"')
            elif include and not included:
                reasons[row.label] = Skipped(Reason.unmatched)
            elif row.reason is not None and not set(included) & set(row.aliases):
                reasons[row.label] = row.reason
            else:
                wanted.append(row)
        own = {row.label: reasons.get(row.label) for row in rows if row.covers and source.tensor}
        if own and None not in own.values():
            left_out |= {source.name: next(iter(own.values()))}
        elif own:
            left_out.pop(source.name, None)
            left_out |= {label: why for label, why in own.items() if why is not None}
    if unused:
        tensors = (spec.name for spec in specs if spec.covers and spec.source.tensor)
        names = list(dict.fromkeys(tensors))
        why = [f"{n} is left out: {left_out[n]}" for n in sorted(unused & left_out.keys())]
        raise ValueError(
            f"`include` and `exclude` must match a weight, but {', '.join(sorted(unused))} "
            f"matches none. {''.join(f'{one}. ' for one in why)}"
            f"The weights are {and_more(names)}.{of_modules(unused, names)}"
        )
    return wanted, left_out
