"""The report of an audit as a table, JSON, CSV and HTML."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from wellcond.report.base import (
    ROWS,
    SCHEMA,
    WAY_TO_ALL,
    Report,
    format_csv,
    format_remarks,
    list_exceeding,
)
from wellcond.report.findings import Coverage, Finding, sort_key
from wellcond.report.flags import Flag, find_flags, sort_findings, stand
from wellcond.report.not_finite import NotFinite, describe_not_finite, to_list
from wellcond.report.page import CURVES, Page
from wellcond.report.pairing import by_label
from wellcond.report.plot import draw
from wellcond.report.rows import (
    COLUMNS,
    MEANINGS,
    Row,
    record_of_finding,
    row_of_finding,
    visible_columns,
)
from wellcond.text import escape, format_table, save_text
from wellcond.weights.roles import ROLES, find_role

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES = 5
ORDERS = ("standing", "kappa")


@dataclass(frozen=True)
class AuditReport(Report):
    """The findings of an audit, worst first, and their coverage.

    Attributes:
        findings: one per matrix. Matrices that could not be measured come first, then matrices
            without a condition number, flagged ones, and the others by their standing among trained
            weights.
        coverage: the number of measured matrices, and the reason for every skipped tensor.
        source: the path or the class of the model.
        versions: the versions of wellcond, torch and Python.
        not_finite: the number of NaN and infinite entries of every tensor that contains any, by
            name: matrices, biases, embeddings and buffers. For tensors that are not measured, it
            ignores -inf in masks and in buffers of a model other than running statistics, and the
            infinite ends of ranges (`min_val`, `max_val`).
        exported: whether the weights are from an exported graph, such as an ONNX file. Such a file
            can contain values that differ from those of the checkpoint under the same names,
            because exporters multiply the BatchNorm after a convolution into its kernel.
    """

    findings: list[Finding]
    coverage: Coverage
    source: str
    versions: dict[str, str]
    not_finite: dict[str, NotFinite] = field(default_factory=dict)
    exported: bool = False

    _COLUMNS, _MEANINGS = COLUMNS, MEANINGS

    def exceeding(self, max_condition: float) -> list[Finding]:
        """Returns the findings above a limit of the condition number; see `Finding.exceeds`."""
        return [finding for finding in self.findings if finding.exceeds(max_condition)]

    @cached_property
    def flags(self) -> dict[str, tuple[Flag, ...]]:
        """The flags of each flagged weight by its label, the gravest first."""
        return find_flags(self.findings)

    def sort(self, by: str = "standing") -> AuditReport:
        """Returns the same report with its findings in another order.

        Args:
            by: "standing", with flagged weights first, or "kappa", by descending condition number.

        Raises:
            ValueError: `by` is neither.
        """
        if by not in ORDERS:
            raise ValueError(f'`by` must be one of {", ".join(ORDERS)}, got "{by}".')
        if by == "kappa":
            return replace(self, findings=sorted(self.findings, key=sort_key))
        return replace(self, findings=sort_findings(self.findings, self.flags))

    def by_role(self) -> str:
        """Returns a table with the number of weights, and the worst weight, per role.

        Roles are q, k, v, o, up, gate, down, embedding and head. They follow from the names of the
        weights; all other weights count as "other".

        Example:
            >>> import torch, wellcond as wc
            >>> layers = torch.nn.ModuleDict({"fc1": torch.nn.Linear(8, 4)})
            >>> print(wc.audit(torch.nn.ModuleDict({"mlp": layers})).by_role().split()[:3])
            ['role', 'weights', 'flagged']
        """
        found: dict[str, list[Finding]] = {}
        for finding in self.findings:
            role = find_role(finding.name, finding.view) or "other"
            found.setdefault(role, []).append(finding)
        header = ["role", "weights", "flagged", "worst", "κ", "σ_max", "stable rank"]
        cells = []
        for role in (*ROLES, "other"):
            if role in found:
                worst, *_ = own = found[role]
                flagged = sum(finding.label in self.flags for finding in own)
                numbers = (worst.condition_number, worst.sigma_max, worst.stable_rank)
                texts = [f"{number:.4g}" for number in numbers]
                cells.append([role, str(len(own)), str(flagged), worst.label, *texts])
        return format_table(header, cells)

    def table(self, *, top: int | None = None) -> str:
        """Returns the flags, `top` findings (1,000 by default) and the coverage as text."""
        rows = self._rows(top=top or ROWS)
        # A weight of unknown shape has only a note.
        known = [row for row, f in zip(rows, self.findings, strict=False) if f.shape != (0, 0)]
        text = "".join(f"{escape(line)}\n" for line in self.unusual())
        text += self._text(known)
        if more := len(self.findings) - len(rows):
            text += f"... and {more} more{'' if top else WAY_TO_ALL}\n"
        text += format_remarks(rows)
        text += f"{describe_not_finite(self.not_finite)}\n" if self.not_finite else ""
        return f"{text}{self.coverage}\n"

    def unusual(self) -> list[str]:
        """Returns a line per flagged weight with the facts and advice; after five lines, a count.

        The facts concern numerical properties. They do not predict accuracy.
        """
        return [f"{label}: {facts}" if label else facts for label, facts in self._facts()]

    def _facts(self) -> list[tuple[str, str]]:
        """Returns the lines of `unusual` as pairs of label, "" for the count, and text."""
        flagged = [finding.label for finding in self.findings if finding.label in self.flags]
        lines = []
        advised: set[str] = set()
        for label in flagged[:_LINES]:
            flags = self.flags[label]
            facts = "; ".join(flag.text for flag in flags)
            if flags[0].kind not in advised:  # once per kind
                facts += f". {flags[0].advice} ({flags[0].page})"
            advised.add(flags[0].kind)
            lines.append((label, facts))
        if more := len(flagged) - len(lines):
            lines.append(("", f"{more} more weight{' is' if more == 1 else 's are'} flagged"))
        return lines

    def to_dict(self, max_condition: float | None = None) -> dict[str, Any]:
        """Returns plain data in the documented schema; numbers can be inf or nan.

        With a limit, the data contain the limit and the weights above it.
        """
        return {
            "schema": SCHEMA,
            "source": self.source,
            **({"exported": True} if self.exported else {}),
            **list_exceeding(
                ((finding.label, finding) for finding in self.findings), max_condition
            ),
            "findings": [finding.to_dict() for finding in self.findings],
            "flags": [
                {"weight": label, **asdict(flag), "page": flag.page}
                for label, flags in self.flags.items()
                for flag in flags
            ],
            "standings": self._standings(),
            "coverage": {
                "measured": self.coverage.measured,
                "failed": self.coverage.failed,
                "skipped": [
                    {"name": name, "reason": str(why)}
                    for name, why in self.coverage.skipped.items()
                ],
                "parameter_share": self.coverage.parameter_share,
                "largest_left_out": [
                    {"name": name, "entries": size} for name, size in self.coverage.largest_left_out
                ],
                "note": self.coverage.note,
            },
            "not_finite": to_list(self.not_finite),
            "versions": self.versions,
        }

    def plot(self, *, top: int = 10, axes: Sequence[Axes] | None = None) -> tuple[Axes, Axes]:
        """Draws the spectra of the first `top` weights, and their condition numbers as bars.

        Flagged weights are colored, with the facts printed on their bars. Others are gray.

        Args:
            top: the number of weights, in the order of `findings`.
            axes: two matplotlib axes; by default, it creates two side by side.

        Returns:
            Both axes; save the figure with `axes[0].figure.savefig`.

        Raises:
            ImportError: matplotlib is not installed.

        Example:
            >>> import torch, wellcond as wc
            >>> left, right = wc.audit(torch.nn.Linear(8, 4)).plot()
            >>> left.get_yscale(), right.get_xlabel()
            ('log', 'condition number κ')
        """
        shown = self.findings[:top]
        flags = (self.flags.get(finding.label, ()) for finding in shown)
        return draw(shown, ["; ".join(flag.text for flag in some) for some in flags], axes)

    def _standings(self) -> list[dict[str, Any]]:
        standings = ((finding.label, stand(finding)) for finding in self.findings)
        return [
            {
                "weight": label,
                "share": one.share,
                "words": one.words,
                "class": one.usual.name,
                "count": one.usual.count,
            }
            for label, one in standings
            if one.usual is not None
        ]

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """Returns one line of CSV per finding, and writes all to `path` if one is given.

        The columns are the keys of the JSON.
        """
        columns = record_of_finding(Finding("", "", (0, 0), ""))
        return save_text(format_csv(columns, map(record_of_finding, self.findings)), path)

    def _records(self) -> list[dict[str, Any]]:
        labels = by_label(self.findings)
        return [{"weight": label, **record_of_finding(one)} for label, one in labels.items()]

    def __repr__(self) -> str:
        kappas = [one.condition_number for one in self.findings if one.measured]
        largest = max((kappa for kappa in kappas if not math.isnan(kappa)), default=math.nan)
        number = f"{len(self.findings)} matri{'x' if len(self.findings) == 1 else 'ces'}"
        share = f"{100 * self.coverage.parameter_share:.1f} % of the parameters"
        flagged = f"{len(self.flags)} flagged, largest κ {largest:.4g}"
        return f"<AuditReport of {escape(self.source)}: {number}, {share}, {flagged}>"

    def _rows(self, max_condition: float | None = None, top: int | None = None) -> list[Row]:
        findings = self.findings[:top]
        return [row_of_finding(finding, n, max_condition) for n, finding in enumerate(findings)]

    def _page(self, max_condition: float | None) -> Page:
        rows = dict(zip(by_label(self.findings), self._rows(max_condition), strict=True))
        curves = [
            (finding.label, finding.singular_values)
            for finding in self.findings
            if len(finding.singular_values) > 1 and finding.singular_values[0] > 0
        ]
        not_finite = describe_not_finite(self.not_finite)
        return Page(
            title=f"Condition numbers of {self.source}",
            lead=[f"{line}." for line in (str(self.coverage), not_finite) if line],
            columns=sorted(visible_columns(COLUMNS, rows.values()), key=lambda c: not c.leads),
            meanings=MEANINGS,
            rows=rows,
            max_condition=max_condition,
            versions=self.versions,
            facts=self._facts(),
            curves=curves[:CURVES],
            skipped=self.coverage.skipped,
        )
