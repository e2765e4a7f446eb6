"""Plots of the spectra and condition numbers of a few weights, with matplotlib."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wellcond.report.findings import Finding
from wellcond.text import escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABEL, _REMARK = 40, 70  # letters


def draw(
    findings: Sequence[Finding], remarks: Sequence[str], axes: Sequence[Any] | None = None
) -> tuple[Axes, Axes]:
    """Draws spectra on the first axes and condition numbers on the second.

    Weights with a remark are colored, and the remark is printed on their bars. By default it
    creates two axes side by side.
    """
    if axes is None:
        try:
            from matplotlib import pyplot
        except ImportError:
            raise ImportError("plot() needs matplotlib: pip install matplotlib.") from None
        height = max(3.0, 1.5 + 0.3 * len(findings))
        _, axes = pyplot.subplots(1, 2, figsize=(12, height), layout="constrained")
    left, right = axes
    # If no weight has a remark, all are colored. C7 is gray.
    marked = [bool(remark) or not any(remarks) for remark in remarks]
    numbers = itertools.count()
    colors = [f"C{next(numbers) % 7}" if one else "0.6" for one in marked]
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
        handles = [line for line in left.get_lines() if line.get_color() != "0.6"]
        if handles:
            left.legend(handles=handles, fontsize="small")
    else:
        why = "no singular values are available: audit(..., curves=10) computes all"
        left.text(0.5, 0.5, why, ha="center", va="center", wrap=True, transform=left.transAxes)
    kappas = [finding.condition_number for finding in findings]
    ends = [kappa for kappa in kappas if math.isfinite(kappa)]
    end = 10 * max(ends, default=1.0)  # as long as an infinite bar
    for place, (kappa, color, remark) in enumerate(zip(kappas, colors, remarks, strict=True)):
        infinite = math.isinf(kappa)
        if not math.isnan(kappa):
            right.barh(place, end if infinite else kappa, color=color, alpha=0.6)
        known = "" if math.isfinite(kappa) else "κ = ∞" if infinite else "no κ"
        text = "; ".join(filter(None, [known, remark]))
        right.text(
            1, place, f" {_short(text, _REMARK)}", va="center", fontsize="small", clip_on=True
        )
    right.set(xscale="log", xlim=(1, 2 * end), xlabel="condition number κ")
    right.set_yticks(range(len(findings)), labels)
    right.set_ylim(len(findings) - 0.4, -0.6)  # the first on top
    return left, right


def _short(text: str, letters: int = 0) -> str:
    """Shortens a text, and escapes a leading "_" and "$", which matplotlib would interpret.

    By default it keeps the end, as for a label; with `letters` it keeps the beginning.
    """
    text = escape(text)
    if letters and len(text) > letters:
        text = f"{text[: letters - 1]}…"
    elif not letters and len(text) > _LABEL:
        text = f"…{text[1 - _LABEL :]}"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
