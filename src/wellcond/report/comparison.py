"""Two audits side by side, as table, JSON, CSV and page."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wellcond.report.base import (
    ROWS,
    SCHEMA,
    WAY_TO_ALL,
    Report,
    format_csv,
    format_remarks,
    list_exceeding,
)
from wellcond.report.findings import Finding
from wellcond.report.not_finite import NotFinite, describe_not_finite, to_list
from wellcond.report.page import Page
from wellcond.report.pairing import Pair, by_label, pair_names
from wellcond.report.report import AuditReport
from wellcond.report.rows import (
    PAIR_COLUMNS,
    PAIR_MEANINGS,
    Row,
    record_of_pair,
    row_of_pair,
)
from wellcond.text import escape, join_remarks, list_some, read_versions, save_text
from wellcond.weights.reasons import Reason, Skipped

# A smaller change counts as none: it is far above the error of a measured kappa.
_SAME = 0.01


@dataclass(frozen=True)
class Comparison(Report):
    """Two audits side by side, in the order of the largest change of kappa.

    Attributes:
        pairs: label, finding before and finding after; None on the side that lacks the weight.
            Weights that only one side has come first.
        before: the source of the first audit.
        after: the source of the second audit.
        versions: of wellcond, torch and Python.
        notes: what else there is to know of a weight, by its label: another dtype, what is the
            matter on a side, why a side skipped it.
        naming: the prefix that only the names of one side have, in words; "" if there is none.
        not_finite_before: the tensors with NaN or infinity of the first audit, by their names.
        not_finite_after: the same of the second audit.
    """

    pairs: list[Pair]
    before: str
    after: str
    versions: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)
    naming: str = ""
    not_finite_before: dict[str, NotFinite] = field(default_factory=dict)
    not_finite_after: dict[str, NotFinite] = field(default_factory=dict)

    _COLUMNS, _MEANINGS = PAIR_COLUMNS, PAIR_MEANINGS

    def exceeding(self, max_condition: float) -> list[Finding]:
        """The findings of the second audit above a limit; see `Finding.exceeds`."""
        return [new for _, _, new in self.pairs if new and new.exceeds(max_condition)]

    def summary(self) -> list[str]:
        """In how many weights kappa rose and fell, and what is on one side only, in words."""
        both = [
            (pair, pair.before, pair.after) for pair in self.pairs if pair.before and pair.after
        ]
        known = [pair for pair, _, _ in both if not math.isnan(pair.ratio)]
        rose = [pair for pair in known if pair.ratio > 1 + _SAME]
        fell = [pair for pair in known if pair.ratio < 1 - _SAME]
        counts = [
            f"rose in {len(rose)}{_most(rose)}",
            f"fell in {len(fell)}{_most(fell)}",
            f"moved by less than 1 % in {len(known) - len(rose) - len(fell)}",
        ]
        if len(known) < len(both):
            counts.append(f"is not known on both sides in {len(both) - len(known)}")
        lines = [f"In the {_count(len(both), 'weight')} of both, κ {', '.join(counts)}"]
        if known:
            median = statistics.median(pair.ratio for pair in known)
            lines[0] += f"; the median of after/before is {median:.4g}"
        for when, names in (
            ("before", [pair.label for pair in self.pairs if pair.after is None]),
            ("after", [pair.label for pair in self.pairs if pair.before is None]),
        ):
            if names:
                lines.append(f"{_count(len(names), 'weight')} only {when}: {list_some(names, 3)}")
        reshaped = [pair.label for pair, old, new in both if old.shape != new.shape]
        if reshaped:
            count = _count(len(reshaped), "weight")
            lines.append(
                f"{count} of another shape, and so perhaps another: {list_some(reshaped, 3)}"
            )
        for when, found in (("Before", self.not_finite_before), ("After", self.not_finite_after)):
            lines += [f"{when}, {describe_not_finite(found)}"] if found else []
        return [*lines, *([self.naming] if self.naming else [])]

    def table(self, *, top: int | None = None) -> str:
        """kappa before and after, and their ratio, of the `top` or 1,000 that changed most."""
        rows = self._rows(top=top or ROWS)
        text = self._text(rows)
        if more := len(self.pairs) - len(rows):
            text += f"... and {more} more with a smaller change{'' if top else WAY_TO_ALL}\n"
        text += format_remarks(rows)
        after = ". ".join([escape(self.after), *self.summary()])
        return f"{text}before: {escape(self.before)}\nafter: {after}\n"

    def to_dict(self, max_condition: float | None = None) -> dict[str, Any]:
        """Plain data; numbers may be inf and nan. With a limit also that, and what is above it."""
        return {
            "schema": SCHEMA,
            "before": self.before,
            "after": self.after,
            **list_exceeding(((pair.label, pair.after) for pair in self.pairs), max_condition),
            "summary": self.summary(),
            "not_finite_before": to_list(self.not_finite_before),
            "not_finite_after": to_list(self.not_finite_after),
            "comparison": [
                {
                    "weight": pair.label,
                    "before": pair.before.to_dict() if pair.before else None,
                    "after": pair.after.to_dict() if pair.after else None,
                    "ratio": pair.ratio if pair.before and pair.after else None,
                    "note": self._note(pair),
                }
                for pair in self.pairs
            ],
            "versions": self.versions,
        }

    def _records(self) -> list[dict[str, Any]]:
        return [record_of_pair(pair, self._note(pair)) for pair in self.pairs]

    def __repr__(self) -> str:
        sides = f"{escape(self.before)} → {escape(self.after)}"
        return f"<Comparison of {sides}: {_count(len(self.pairs), 'weight')}>"

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """One line per weight, empty where a side lacks it; written to path."""
        columns = record_of_pair(Pair("", None, None), "")
        return save_text(format_csv(columns, self._records()), path)

    def _note(self, pair: Pair) -> str:
        return self.notes.get(pair.label, "")

    def _rows(self, max_condition: float | None = None, top: int | None = None) -> list[Row]:
        pairs = self.pairs[:top]
        return [row_of_pair(p, self._note(p), n, max_condition) for n, p in enumerate(pairs)]

    def _page(self, max_condition: float | None) -> Page:
        # The summary counts what only one side has. It has no change, so it comes last here.
        rows = zip(self.pairs, self._rows(max_condition), strict=True)
        ordered = sorted(rows, key=lambda item: None in item[0])
        sources = [f"Before: {self.before}", f"After: {self.after}"]
        return Page(
            title="Condition numbers before and after",
            lead=[*sources, *self.summary()],
            columns=PAIR_COLUMNS,
            meanings=PAIR_MEANINGS,
            rows={row.label: row for _, row in ordered},
            max_condition=max_condition,
            versions=self.versions,
            is_comparison=True,
        )


def compare(before: AuditReport, after: AuditReport) -> Comparison:
    """How the condition number of every weight moved from one audit to another.

    Weights are the same if their names are. Names that differ only by a wrapper of the model
    (`module.`, `_orig_mod.`), or by one prefix of all names (`model.`), count as the same; `naming`
    states the prefix. The summary counts the weights that only one side has.

    Args:
        before: what `wellcond.audit` returned for the first model or checkpoint.
        after: what it returned for the second, such as a later state of a training, a repaired
            copy, or a copy in another dtype or quantised.

    Returns:
        A `Comparison`, the largest change of kappa first.

    Raises:
        ValueError: no weight has the same name in both.
        TypeError: `before` or `after` is not a report, but a path or a model.

    Example:
        >>> import torch, wellcond as wc
        >>> layer = torch.nn.Linear(2, 2)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[8.0, 0.0], [0.0, 2.0]]))
        >>> before = wc.audit(layer)
        >>> with torch.no_grad():
        ...     _ = layer.weight.div_(torch.tensor([4.0, 1.0]))
        >>> comparison = wc.compare(before, wc.audit(layer))
        >>> comparison.pairs[0].label, comparison.pairs[0].ratio
        ('weight', 0.25)
        >>> print(comparison.summary()[0])
        In the 1 weight of both, κ rose in 0, fell in 1 (most in weight, after/before 0.25), ...
    """
    for name, report in (("before", before), ("after", after)):
        if not isinstance(report, AuditReport):
            raise TypeError(
                f"`{name}` must be an AuditReport, got {type(report).__name__}. Audit it first: "
                "wc.compare(wc.audit(before), wc.audit(after))."
            )
    old, new = (by_label(report.findings) for report in (before, after))
    names = pair_names(old, new)
    if not names.paired:
        raise ValueError(
            f"The two must share the name of a weight, but share none: {before.source} has "
            f"{list_some(old, limit=3)}; {after.source} has {list_some(new, limit=3)}. Audit two "
            "states of one model, or rename the weights of one."
        )
    pairs = [Pair(label, old[a], new[b]) for label, a, b in names.paired]
    found_old, found_new = ({name[side] for name in names.paired} for side in (1, 2))
    pairs += [Pair(label, one, None) for label, one in old.items() if label not in found_old]
    pairs += [Pair(label, None, one) for label, one in new.items() if label not in found_new]
    pairs.sort(key=lambda pair: pair.change, reverse=True)
    skipped_before, skipped_after = map(_skipped_weights, (before, after))
    notes = {pair.label: _note_of(pair, skipped_before, skipped_after) for pair in pairs}
    notes = {label: note for label, note in notes.items() if note}
    naming = ""
    if names.prefix:
        naming = f'Names {names.side} begin with "{escape(names.prefix)}", which is left out here'
    return Comparison(
        pairs,
        before.source,
        after.source,
        read_versions(),
        notes,
        naming,
        before.not_finite,
        after.not_finite,
    )


def _skipped_weights(report: AuditReport) -> dict[str, Skipped]:
    """Why weights were skipped; those that are stored as codes, as `q.qweight`, as `q.weight`."""
    skipped = report.coverage.skipped
    codes = {
        f"{name.rpartition('.')[0]}.weight": why
        for name, why in skipped.items()
        if why.reason is Reason.quantised
    }
    return codes | skipped


def _note_of(pair: Pair, before: Mapping[str, Skipped], after: Mapping[str, Skipped]) -> str:
    """Why the side that lacks the weight skipped it, if it did, and the note of the pair."""
    why = None
    if pair.before and not pair.after:
        why = after.get(pair.before.name)
    elif pair.after and not pair.before:
        why = before.get(pair.after.name)
    skipped = f"skipped {'after' if pair.before else 'before'}: {why}" if why else ""
    return join_remarks(skipped, pair.note)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _most(pairs: Sequence[Pair]) -> str:
    if not pairs:
        return ""
    most = max(pairs, key=lambda pair: pair.change)
    return f" (most in {escape(most.label)}, after/before {most.ratio:.4g})"
