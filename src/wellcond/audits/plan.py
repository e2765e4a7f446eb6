"""Plans the rows of an audit from names and shapes before any tensor is read, and selects them.

Letters: W (m, n) a stored weight, s B A what an adapter adds to it; S (m, n) what a row measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from wellcond.audits.sources import Source
from wellcond.linalg.product import Product
from wellcond.operators.convolution import Convolution
from wellcond.operators.views import View, shape_of
from wellcond.report.findings import MERGED
from wellcond.text import escape, join_remarks, list_some, suggest_patterns
from wellcond.weights.adapters import Adapter
from wellcond.weights.heads import Attention, Value
from wellcond.weights.matrices import Matrices, single_views
from wellcond.weights.projections import UnknownLayoutError
from wellcond.weights.reasons import Reason, Skipped


@dataclass(frozen=True)
class RowSource:
    """A source that adjacent rows share.

    Attributes:
        name: the name that progress reports.
        read: returns the values, or a function that reads them; can be slow and return much data.
        tensor: the tensor, if the source is one.
    """

    name: str
    read: Callable[[], Any]
    tensor: Matrices | None = None


@dataclass(frozen=True)
class RowSpec:
    """A row that can be measured.

    Attributes:
        name: the name of its tensor, or of its attention module.
        view: the view of the matrix; "" if there is only one matrix.
        aliases: the names that a pattern can match.
        source: the source of this row and of the adjacent ones.
        matrix: computes the matrix to measure from the values of the source.
        note: a remark for the reader of the report.
        covers: whether the row counts parameters of the model or file itself.
        reason: why the row is skipped unless a pattern is its exact name.
        adapters: the adapters of a merged weight, or the adapter whose change is measured.
        entries: the number of entries that the row counts, if not those of its matrix.
    """

    name: str
    view: str
    aliases: tuple[str, ...]
    source: RowSource
    matrix: Callable[[Any], Measurable]
    note: str = ""
    covers: bool = True
    reason: Skipped | None = None
    adapters: tuple[Adapter, ...] = ()
    entries: int = 0

    @property
    def label(self) -> str:
        """The label that reports show, name:view."""
        return f"{self.name}:{self.view}" if self.view else self.name

    @property
    def is_sum(self) -> bool:
        """Whether the row is a weight merged with its adapters."""
        return bool(self.adapters) and self.source.tensor is not None


class Merged:
    """A view of W merged with its adapters; `stored` states whether W itself is a stored tensor."""

    dtype = torch.float64

    def __init__(self, W: Tensor, view: View, adapters: Sequence[Adapter], stored: bool) -> None:
        self.W, self.view, self.adapters, self.stored = W.detach().cpu(), view, adapters, stored
        self.shape = shape_of(view, W)


class Delta:
    """The change s B A of an adapter."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter, self.product = adapter, adapter.product()
        self.shape, self.dtype = self.product.shape, self.product.dtype


Measurable = Tensor | Product | Convolution | Merged | Delta


def plan(source: Source, heads: bool = False) -> list[RowSpec]:
    """All rows of a source, and those of its attention heads with `heads`.

    Raises:
        ValueError: no attention layers are recognised.
    """
    specs: list[RowSpec] = []
    for one in source.matrices:
        specs += rows_of_tensor(one, source.skipped.get(one.name))
    sizes = source.sizes.copy()
    specs += (_row_of_adapter(*one, sizes) for one in source.adapters)
    for one in source.bases:
        specs += rows_of_tensor(one, covers=False)
    if heads:
        attentions, value = source.find_heads()
        if not attentions:
            raise ValueError(
                f"`heads` requires attention layers, but none were recognised in {source.name}. "
                "Omit it, or name the projections q_proj, k_proj, v_proj and o_proj."
            )
        for attention in attentions:
            specs += _rows_of_attention(attention, value)
    return specs


def rows_of_tensor(
    one: Matrices, reason: Skipped | None = None, covers: bool = True
) -> Iterator[RowSpec]:
    """The rows of a tensor, then those of the tensor merged with its adapters."""
    source = RowSource(one.name, one.read, one)
    parts = [part for adapter in one.adapters for part in adapter.parts]
    views = single_views(one.views, one.shape)
    for name, view in views.items():
        matrix: Callable[[Any], Measurable] = view
        note = one.note
        if one.geometry is not None:
            name, matrix = "operator", partial(Convolution, geometry=one.geometry)
            note = join_remarks(note, "without its adapter" if parts else "")
        aliases = (*one.aliases, f"{one.name}:{name}", *parts)
        entries = math.prod(shape_of(view, torch.empty(one.shape, device="meta"))) if parts else 0
        yield RowSpec(
            one.name, name, aliases, source, matrix, note, covers, reason, entries=entries
        )
    for name, view in views.items() if parts else ():
        merged = f"{name}:{MERGED}".lstrip(":")
        aliases = (*one.aliases, f"{one.name}:{merged}", f"{one.name}:{MERGED}", *parts)
        stored = one.stored and not one.parts
        matrix = partial(Merged, view=view, adapters=one.adapters, stored=stored)
        yield RowSpec(one.name, merged, aliases, source, matrix, "", False, reason, one.adapters)


def _row_of_adapter(name: str, adapter: Adapter, sizes: dict[str, int]) -> RowSpec:
    """The row of the change that an adapter adds to the weight of this name.

    The row removes the sizes of its tensors from `sizes`, so that tensors that several adapters
    share count only for the first.
    """
    view = "delta" if adapter.name in ("", "default") else f"delta.{adapter.name}"
    dora = "DoRA also rescales the rows of the sum"
    note = join_remarks(adapter.setting.note, dora if adapter.magnitude is not None else "")
    aliases = (name, f"{name}:delta", f"{name}:{view}", *adapter.parts)
    source = RowSource(name, partial(Delta, adapter))
    entries = sum(sizes.pop(part, 0) for part in adapter.parts)
    return RowSpec(
        name, view, aliases, source, lambda delta: delta, note, adapters=(adapter,), entries=entries
    )


def merge_rows(specs: Sequence[RowSpec]) -> list[RowSpec]:
    """Keeps one row per adapted matrix: the merged weight replaces the weight and the change.

    The row of the merged weight takes over their entries and notes. A convolution as a linear
    operator is a different matrix and keeps its row.
    """
    own = {
        (spec.name, f"{spec.view}:{MERGED}".lstrip(":")): spec
        for spec in specs
        if not spec.adapters and spec.source.tensor is not None
    }
    deltas = {spec.adapters[0].parts: spec for spec in specs if spec.adapters and not spec.is_sum}
    sums: dict[int, RowSpec] = {}
    replaced: set[int] = set()
    for spec in specs:
        if spec.is_sum:
            parts = [own.get((spec.name, spec.view))]
            parts += [deltas.get(adapter.parts) for adapter in spec.adapters]
            found = [part for part in parts if part is not None]
            sums[id(spec)] = replace(
                spec,
                note=join_remarks(*(part.note for part in found)),
                covers=any(part.covers for part in found),
                # One adapter can belong to several matrices of a tensor.
                entries=sum(p.entries for p in found if p.covers and id(p) not in replaced),
            )
            replaced |= {id(part) for part in found}
    return [sums.get(id(spec), spec) for spec in specs if id(spec) not in replaced]


def _rows_of_attention(attention: Attention, value: Value) -> Iterator[RowSpec]:
    """The rows of the heads, and one row for each kind whose heads are unknown."""
    source = RowSource(attention.name, lambda: cache(value))  # reads tensors when a head needs them
    rows = [(one.view, partial(_head, attention, one.view), one.note) for one in attention.heads]
    rows += [(view, partial(_unknown, why), "") for view, why in attention.unknown.items()]
    for view, matrix, note in rows:
        # If the model itself is the attention module, the view is the name.
        name, own = (attention.name, view) if attention.name else (view, "")
        yield RowSpec(name, own, attention.names(view), source, matrix, note, covers=False)


def _head(attention: Attention, view: str, value: Value) -> Product:
    ((_, S),) = attention.products(value, view.__eq__)
    return S


def _unknown(why: str, value: Value) -> Product:
    raise UnknownLayoutError(why)


def as_patterns(given: str | Sequence[str]) -> Sequence[str]:
    """The patterns as a sequence; a string is a single pattern."""
    return [given] if isinstance(given, str) else given


def match(names: Collection[str], patterns: Sequence[str]) -> list[str]:
    """The patterns that match one of the names."""
    return [p for p in patterns if any(fnmatchcase(name, p) for name in names)]


def reason_to_skip(
    names: Collection[str], include: Sequence[str], exclude: Sequence[str]
) -> Skipped | None:
    """Why the patterns skip a row with these names; None if they do not."""
    if excluded := match(names, exclude):
        return Skipped(Reason.excluded, f'"{excluded[0]}"')
    return Skipped(Reason.unmatched) if include and not match(names, include) else None


def select(
    specs: Sequence[RowSpec],
    include: Sequence[str],
    exclude: Sequence[str],
    skipped: Mapping[str, Skipped],
    others: Collection[str] = (),
) -> tuple[list[RowSpec], dict[str, Skipped]]:
    """The rows to measure, and the skipped tensors, or rows of tensors, with their reasons.

    Args:
        specs: all rows.
        include: patterns of rows to measure; all if empty.
        exclude: patterns of rows to skip.
        skipped: the reasons before the selection, by name.
        others: names without a row that a pattern of `exclude` can match.

    Raises:
        ValueError: a pattern matches nothing.
    """
    used = {p for row in specs for p in match(row.aliases, [*include, *exclude])}
    unused = {*include, *exclude} - used - {p for p in exclude if match(others, [p])}
    wanted: list[RowSpec] = []
    left_out = dict(skipped)
    for source, group in groupby(specs, key=attrgetter("source")):
        own: dict[str, Skipped | None] = {}
        for row in group:
            why = reason_to_skip(row.aliases, include, exclude)
            if why is None and row.reason is not None and set(include).isdisjoint(row.aliases):
                why = row.reason
            if why is None:
                wanted.append(row)
            if row.covers and source.tensor is not None:
                own[row.label] = why
        left = {label: why for label, why in own.items() if why is not None}
        if left and len(left) == len(own):
            left_out[source.name] = next(iter(left.values()))
        elif own:
            left_out.pop(source.name, None)
            left_out |= left
    if unused:
        tensors = (row.name for row in specs if row.covers and row.source.tensor is not None)
        names = list(dict.fromkeys(tensors))
        raise ValueError(
            "each pattern of `include` and `exclude` must match a weight, but no weight matches "
            f"{', '.join(sorted(unused))}. {_hint(sorted(unused), specs, left_out)}"
            f"The weights are {list_some(names)}.{suggest_patterns(unused, names)}"
        )
    return wanted, left_out


def _hint(
    patterns: Sequence[str], specs: Sequence[RowSpec], left_out: Mapping[str, Skipped]
) -> str:
    """For each pattern, the first name that it matches and that is not a measured weight."""
    tensors = (spec.source.tensor for spec in specs)
    parts = {part: one.name for one in tensors if one is not None for part in one.parts}
    hints = ""
    for pattern in patterns:
        if found := next((name for name in left_out if fnmatchcase(name, pattern)), None):
            hints += f"{escape(found)} is skipped: {left_out[found]}. "
        elif found := next((name for name in parts if fnmatchcase(name, pattern)), None):
            hints += f"{escape(found)} is part of {escape(parts[found])}. "
    return hints
