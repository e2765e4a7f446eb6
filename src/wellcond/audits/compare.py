"""Compares two models or checkpoints: audits both, and measures the change of each matrix.

Letters: W (m, n) a weight before, dW its change.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from wellcond.audits.attempt import Trouble, attempt
from wellcond.audits.audit import audit
from wellcond.audits.executor import Executor
from wellcond.audits.plan import RowSource, plan
from wellcond.audits.progress import Counter as ProgressCounter
from wellcond.audits.progress import ProgressCallback, work_of
from wellcond.audits.sources import Source, source_of
from wellcond.linalg.change import measure_change
from wellcond.report.comparison import Comparison, compare_reports, with_changes
from wellcond.report.pairing import Change
from wellcond.report.report import AuditReport

# q and k of GGUF files, whose rows can be in another order.
_REORDERED = re.compile(r"(.*\.)?attn_[qk]\.weight", re.DOTALL)
_COLUMNS = 64  # enough to determine the nearest order

Comparable = AuditReport | nn.Module | str | os.PathLike[str] | Mapping[str, Any]


def compare(
    before: Comparable,
    after: Comparable,
    *,
    names: Sequence[str] | None = None,
    **options: Any,
) -> Comparison:
    """Compares every weight of one model or checkpoint with the same weight of another.

    Weights are paired by name. Names match even if they differ by a wrapper of the model
    (`module.`, `_orig_mod.`) or by one prefix of all names (`model.`); `naming` states the prefix.
    The names of a GGUF file match those of a Llama-like model. The summary names the weight that
    moved most for its class, see `Pair.moves`, and counts the weights that only one side has.

    If neither side is a report, each pair has a `wellcond.report.Change`: the norm of the change,
    its share in the leading directions, and the angles by which the leading and the trailing
    directions turned. One pair of tensors is in memory at a time. Directions are computed for
    weights with at most 1024 singular values. A GGUF file can store the rows of q and k in another
    order; they are compared in the nearest order.

    Args:
        before: a model, the path of a checkpoint, or a report of `wellcond.audit`.
        after: the second one, such as a later state of a training run, a repaired copy, or a copy
            that is quantised or in another dtype. If a model is trained in place, pass an earlier
            report or copy as `before`.
        names: the names of the two sides; by default the ends of their paths that differ.
        options: the options of `wellcond.audit` for a side that is not a report.

    Returns:
        A `Comparison`, in which the weight that moved most for its class is first.

    Raises:
        ValueError: no weight has the same name on both sides, or `wellcond.audit` raises it.
        TypeError: a side is neither a report nor a model nor a path.

    Example:
        >>> import copy, torch, wellcond as wc
        >>> layer = torch.nn.Linear(2, 2)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[8.0, 0.0], [0.0, 2.0]]))
        >>> later = copy.deepcopy(layer)
        >>> with torch.no_grad():
        ...     _ = later.weight.div_(torch.tensor([4.0, 1.0]))
        >>> comparison = wc.compare(layer, later, names=("first", "second"))
        >>> (pair,) = comparison.pairs
        >>> pair.label, pair.ratio, round(pair.change.relative, 4)
        ('weight', 0.25, 0.7276)
        >>> print(comparison.summary()[0])
        Largest movement: weight, σ_max 8 → 2 (0.25 times)
    """
    sides: tuple[Any, Any] = before, after
    for name, side in zip(("before", "after"), sides, strict=True):
        if not isinstance(side, AuditReport | nn.Module | str | os.PathLike | Mapping):
            raise TypeError(
                f"`{name}` must be an AuditReport, a model or a path, got {type(side).__name__}. "
                "To compare tensors, audit layers that contain them."
            )
    called = check_names(names)
    first, second = (
        side if isinstance(side, AuditReport) else audit(side, **options) for side in sides
    )
    comparison = compare_reports(first, second, called)
    if any(isinstance(side, AuditReport) for side in sides):
        return comparison
    given = {key: options[key] for key in ("example", "base") if key in options}
    old, new = (source_of(side, **given) for side in sides)
    return measure_changes(comparison, old, new, progress=options.get("progress"))


def check_names(names: Sequence[str] | None) -> tuple[str, str] | None:
    """Returns the two names; raises ValueError unless there are two different ones."""
    if names is None:
        return None
    if isinstance(names, str) or len(names) != 2 or names[0] == names[1]:
        raise ValueError(f"`names` must be two different names, got {names!r}.")
    return str(names[0]), str(names[1])


def measure_changes(
    comparison: Comparison,
    before: Source,
    after: Source,
    progress: ProgressCallback | None = None,
    executor: Executor | None = None,
) -> Comparison:
    """Adds to a comparison the change of each weight that is a matrix in both sources."""
    old, new = _Side(before), _Side(after)
    both = [
        (pair.label, pair.before.label, pair.after.label)
        for pair in comparison.pairs
        if pair.before and pair.after
    ]
    both = [labels for labels in both if labels[1] in old.specs and labels[2] in new.specs]
    # In the order of the first source, rows of one tensor share one reading.
    order = {label: number for number, label in enumerate(old.specs)}
    both.sort(key=lambda labels: order[labels[1]])
    groups = [[*of_one] for _, of_one in groupby(both, lambda labels: old.specs[labels[1]].source)]

    def measure(chosen: Sequence[int]) -> Iterator[list[Change | None]]:
        counter = ProgressCounter(progress, [1.0] * sum(len(groups[index]) for index in chosen))
        for index in chosen:
            found = []
            for label, one, other in groups[index]:
                counter.next(label)
                change = attempt(partial(_measure, old, new, one, other))
                if isinstance(change, Trouble):
                    change = Change(reasons={"relative": str(change)})
                found.append(change)
            yield found

    work = work_of(old.specs[one].source.tensor for (_, one, _), *_ in groups)
    names = [label for (label, _, _), *_ in groups]
    measured = (executor or Executor()).map("changes", names, work, measure)
    changes = {
        label: change
        for of_one, found in zip(groups, measured, strict=True)
        for (label, _, _), change in zip(of_one, found, strict=True)
    }
    return with_changes(comparison, lambda pair: changes.get(pair.label))


class _Side:
    """The matrices of a source by their labels; keeps the tensor that was read last."""

    def __init__(self, source: Source) -> None:
        specs = plan(source)
        counts = Counter(spec.label for spec in specs)
        self.specs = {spec.label: spec for spec in specs if counts[spec.label] == 1}
        self.last: tuple[RowSource | None, Any] = None, None

    def matrix(self, label: str) -> Tensor | None:
        """The matrix; None for a convolution as a linear operator, which is not stored as one."""
        spec = self.specs[label]
        if self.last[0] is not spec.source:
            self.last = None, None  # release the tensor before the next one is read
            self.last = spec.source, spec.source.read()
        S = spec.matrix(self.last[1])
        return S.detach() if isinstance(S, Tensor) else None


def _measure(before: _Side, after: _Side, old: str, new: str) -> Change | None:
    S, T = before.matrix(old), after.matrix(new)
    if S is None or T is None:
        return None
    if S.shape != T.shape:
        return Change(reasons={"relative": "the shapes differ"})
    reordered = [_REORDERED.fullmatch(name) is not None for name in (old, new)]
    if reordered == [True, False]:
        S = _reorder_like(T, S)
    elif reordered == [False, True]:
        T = _reorder_like(S, T)
    found = measure_change(S, T)._asdict()
    return Change(**found | {"reasons": dict(found["reasons"])})


def _reorder_like(S: Tensor, T: Tensor) -> Tensor:
    """T with its rows in the order nearest to S, among the orders that llama.cpp uses for q and k.

    For most models that rotate rows i and i + d/2 of a head of d rows by one angle, the converter
    of llama.cpp stores these rows next to each other. The file does not state whether it did, and
    the number of heads can be unknown here.
    """
    rows = torch.arange(len(T))
    orders = [rows]
    for heads in range(1, len(T) // 2 + 1):
        half, rest = divmod(len(T), 2 * heads)
        if not rest:
            orders.append(rows.reshape(heads, half, 2).mT.flatten())
    some, others = (one[:, :_COLUMNS].double() for one in (S, T))
    nearest = min(orders, key=lambda order: float((others[order] - some).square().sum()))
    return T[nearest]
