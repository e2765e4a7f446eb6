"""A tensor that is stored as slices: checks that the slices tile it, and reads them as one tensor.

A box consists of the offsets at which a slice begins in the tensor, and the shape of the slice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wellcond.files.tensors import (
    Entry,
    Holder,
    Rows,
    TensorFile,
    UnreadableError,
    explain_non_weight,
)
from wellcond.text import list_some

Sides = tuple[int, ...]
Box = tuple[Sides, Sides]
_CORNERS = 1 << 22  # of all boxes of a tensor, at about 200 bytes each


@dataclass(frozen=True)
class Slice:
    """A slice of a tensor: its box, and the files that store it.

    Attributes:
        copies: one or more files, each with the name of the slice in it. All store the same values.
    """

    offsets: Sides
    shape: Sides
    copies: tuple[tuple[TensorFile, str], ...]

    def read(self, rows: Rows | None = None) -> Tensor:
        """Reads the slice, or rows of it.

        Raises:
            UnreadableError: its copies differ.
        """
        (file, name), *others = self.copies
        values = file.read(name, rows)
        for other, called in others:
            if not _same_bytes(values, other.read(called, rows)):
                raise UnreadableError(
                    f"{file.path} and {other.path} must contain the same values of {name} at "
                    f"{self.offsets}, but contain different ones. They belong to two checkpoints: "
                    "put the files of each into a separate folder."
                )
        return values

    def box(self, start: int = 0, rows: Rows | None = None) -> tuple[slice, ...]:
        """Returns its place, or that of some rows, in the rows of the tensor from `start` on."""
        first, last = rows or (0, self.shape[0])
        sides = zip(self.offsets[1:], self.shape[1:], strict=True)
        top = self.offsets[0] - start
        return slice(top + first, top + last), *(slice(o, o + n) for o, n in sides)


class Joined(Holder):
    """One tensor, joined from slices that tile it."""

    def __init__(self, slices: Iterable[Slice], shape: Sides, dtype: torch.dtype) -> None:
        kept = (one for one in slices if 0 not in one.shape)
        self._slices = sorted(kept, key=lambda one: one.offsets)
        self._shape, self._dtype = shape, dtype

    def read(self, name: str, rows: Rows | None = None) -> Tensor:
        if len(self._slices) == 1:
            return self._slices[0].read(rows)
        start, stop = rows or (0, self._shape[0])
        whole = torch.empty((stop - start, *self._shape[1:]), dtype=self._dtype, device="cpu")
        for one in self._slices:
            at, length = one.offsets[0], one.shape[0]
            first, last = max(0, start - at), min(length, stop - at)
            if first < last:
                inside = (first, last)
                whole[one.box(start, inside)] = one.read(inside)
        return whole

    def pieces(self, name: str) -> Iterator[Tensor]:
        for one in self._slices:
            file, called = one.copies[0]
            yield from file.pieces(called)

    def first_row(self, name: str) -> Tensor:
        first = [one.copies[0] for one in self._slices if not any(one.offsets[:-1])]
        return torch.cat([file.first_row(called) for file, called in first])

    def split(self, name: str, new: Tensor) -> Iterator[tuple[TensorFile, str, Tensor]]:
        for one in self._slices:
            for file, called in one.copies:
                yield file, called, new[one.box()] if one.shape else new


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Compares bytes, and so also NaN and dtypes that torch does not compare."""
    first, second = (t.resolve_conj().contiguous().view(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(first, second)


def explain_misfit(boxes: Sequence[Box], shape: Sides) -> str:
    """Returns why the boxes do not tile a tensor of this shape exactly; "" if they do.

    The boxes tile the tensor if and only if the number of boxes that cover a point is 1 within the
    tensor and 0 elsewhere. The covering number of boxes is a sum of steps, up at some corners and
    down at others, so it is enough to compare the steps with those of the tensor. At the first
    corner where the steps differ, the covering numbers differ.
    """
    whole: Box = ((0,) * len(shape), shape)
    boxes = [box for box in boxes if 0 not in box[1]]
    if 0 in shape:
        return "it has no entries, but a slice of it has" if boxes else ""
    cut = [d for d, n in enumerate(shape) if any(o[d] or s[d] != n for o, s in boxes)]
    if (len(boxes) + 1) << len(cut) > _CORNERS:
        return f"{len(boxes):,} slices that cut {len(cut)} of its dimensions are too many"
    steps: Counter[Sides] = Counter()
    for (offsets, sizes), sign in [*((box, 1) for box in boxes), (whole, -1)]:
        corners: list[tuple[Sides, int]] = [((), sign)]
        for d in cut:
            low, high = offsets[d], offsets[d] + sizes[d]
            corners = [step for c, s in corners for step in (((*c, low), s), ((*c, high), -s))]
        for corner, step in corners:
            steps[corner] += step
    different = [corner for corner, step in steps.items() if step]
    if not different:
        return ""
    first = min(different)
    at = dict(zip(cut, first, strict=True))
    place = tuple(at.get(d, 0) for d in range(len(shape)))
    if steps[first] < 0:
        return f"no slice contains the entry at {place}"
    inside = all(0 <= p < n for p, n in zip(place, shape, strict=True))
    if inside:
        return f"several slices contain the entry at {place}"
    return f"a slice contains an entry at {place}, outside of the shape {shape}"


def join(parts: Sequence[tuple[TensorFile, Entry]]) -> tuple[Holder, Entry] | str:
    """Returns the joined tensor of these slices, or why they cannot be joined."""
    entries = [entry for _, entry in parts]
    if len({len(one.shape) for one in entries}) > 1:
        return "not all have the same number of dimensions"
    if len(dtypes := {one.dtype for one in entries}) > 1:
        return f"they have different dtypes: {list_some(sorted(dtypes))}"
    copies: dict[Box, list[tuple[TensorFile, str]]] = {}
    for file, entry in parts:
        copies.setdefault((entry.offsets or (), entry.shape), []).append((file, entry.name))
    ends = [[o + n for o, n in zip(*box, strict=True)] for box in copies]
    shape = tuple(max(side) for side in zip(*ends, strict=True))
    if why := explain_misfit(list(copies), shape):
        return why
    entry = entries[0]
    skipped = explain_non_weight(shape, entry.dtype)
    entry = replace(entry, shape=shape, skipped=skipped, offsets=None)
    if len(parts) == 1:
        return parts[0][0], entry
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        return f"their dtype {entry.dtype} is not a dtype of torch"
    slices = [Slice(*box, tuple(same)) for box, same in copies.items()]
    return Joined(slices, shape, dtype), entry
