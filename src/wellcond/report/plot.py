"""The spectra of a few weights, and their condition numbers as bars, drawn by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wellcond.report.findings import Finding
from wellcond.text import escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LETTERS = 40  # of a label; the end says more than the beginning


def draw(findings: Sequence[Finding], axes: Sequence[Any] | None = None) -> tuple[Axes, Axes]:
    """Spectra on the first axes, bars on the second; new ones beside each other by default."""
    if axes is None:
        try:
            from matplotlib import pyplot
        except ImportError:
            raise ImportError("plot() needs matplotlib: pip install matplotlib.") from None
        height = max(3.0, 1.5 + 0.3 * len(findings))
        _, axes = pyplot.subplots(1, 2, figsize=(12, height), layout="constrained")
    left, right = axes
    colors = [f"C{number % 10}" for number in range(len(findings))]
    labels = [_short(finding.label) for finding in findings]
    drawn = 0
    for finding, label, color in zip(findings, labels, colors, strict=True):
        sigma = finding.singular_values
        if len(sigma) > 1 and 0 < sigma[0] < math.inf:
            shares = [k / (len(sigma) - 1) for k in range(len(sigma))]
            positive = [value if value > 0 else math.nan for value in sigma]
            left.plot(shares, positive, color=color, label=label)
            drawn += 1
    left.set(xlabel="position, from the largest to the smallest", ylabel="singular values σ")
    if drawn:
        left.set_yscale("log")
        left.legend(fontsize="small")
    else:
        why = "no singular values are known here: audit(..., curves=10) finds them all"
        left.text(0.5, 0.5, why, ha="center", va="center", wrap=True, transform=left.transAxes)
    kappas = [finding.condition_number for finding in findings]
    ends = [kappa for kappa in kappas if math.isfinite(kappa)]
    end = 10 * max(ends, default=1.0)  # as long as an infinite bar, which is hatched
    for place, (kappa, color) in enumerate(zip(kappas, colors, strict=True)):
        if math.isnan(kappa):
            right.text(1, place, " none", va="center")
        else:
            infinite = math.isinf(kappa)
            bar = right.barh(place, end if infinite else kappa, color=color)
            for one in bar if infinite else ():
                one.set(hatch="//", alpha=0.5)
            if infinite:
                right.text(1, place, " ∞", va="center")
    right.set(xscale="log", xlim=(1, 2 * end), xlabel="condition number κ")
    right.set_yticks(range(len(findings)), labels)
    right.set_ylim(len(findings) - 0.4, -0.6)  # the first on top
    return left, right


def _short(label: str) -> str:
    """A label without what matplotlib takes for mathematics, or for no entry of a legend."""
    text = escape(label)
    text = text if len(text) <= _LETTERS else f"…{text[1 - _LETTERS :]}"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
