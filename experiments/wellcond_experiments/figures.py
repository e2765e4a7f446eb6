"""Pictures: panels, axes, and the colours and labels of the methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from wellcond_experiments.methods import find_method
from wellcond_experiments.tables import Band

OURS, RIVAL, NOTHING = "#1f6fb4", "#d98c1f", "#7f7f7f"
# Colours of the lines in one panel; more would be hard to distinguish.
CYCLE = ("#1f6fb4", "#d98c1f", "#2a9d6f", "#a64ca6", "#c0392b", "#7f7f7f", "#8c6d31", "#17a2b8")
MARKERS = "osD^vPX*"
HUGE = 1e6  # pictures show larger condition numbers as one value

# A picture follows the color scheme of the page that shows it. Text has no color of its own.
_STYLE = '<style type="text/css">'
_DARK = """
@media (prefers-color-scheme: dark) {
  svg { fill: #cfd0d0 }
  [style*="fill: #ffffff"] { fill: #131416 !important }
  [style*="stroke: #ffffff"] { stroke: #131416 !important }
  [style*="stroke: #000000"] { stroke: #cfd0d0 !important }
  [style*="stroke: #dddddd"] { stroke: #3b3d40 !important }
}
"""


def colour(method: str) -> str:
    """Returns blue for wellcond, orange for other methods, grey for the baseline."""
    kind = find_method(method)
    return NOTHING if method == "none" else OURS if kind.ours else RIVAL


def colours(methods: Sequence[str]) -> list[str]:
    """Returns the line colours of methods in one panel; grey for the baseline."""
    others = (color for color in CYCLE if color != NOTHING)
    return [NOTHING if method == "none" else next(others) for method in methods]


def label(method: str) -> str:
    return find_method(method).label


def figure(
    columns: int = 1, width: float = 6.4, height: float = 4.2, rows: int = 1
) -> tuple[Any, list[Any]]:
    """Makes a figure and its panels, listed by row. Width and height are those of a panel."""
    drawing = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=130)
    panels = list(drawing.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.grid(True, which="major", color="#dddddd", linewidth=0.7)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_axisbelow(True)
    return drawing, panels


def save(drawing: Any, path: Path) -> Path:
    """Writes a figure. An .svg of the same numbers has the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        options = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
        drawing.savefig(path, **options)
    if path.suffix == ".svg":
        path.write_text(path.read_text().replace(_STYLE, _STYLE + _DARK, 1))
    return path


def select_lines(scores: dict[str, float], each: int = 3) -> list[str]:
    """Returns the best methods of wellcond, the best others, and the baseline."""
    best = sorted(scores, key=lambda m: -math.inf if math.isnan(scores[m]) else scores[m])[::-1]
    ours = [m for m in best if find_method(m).ours]
    others = [m for m in best if not find_method(m).ours and m != "none"]
    return [*ours[:each], *others[:each], "none"]


def draw_over_tasks(panel: Any, curves: dict[str, list[list[float]]], window: int = 1) -> None:
    """Draws a line per method: the mean over its seeds and over the last `window` tasks."""
    for (method, runs), color in zip(curves.items(), colours(list(curves)), strict=True):
        means = [math.fsum(values) / len(values) for values in zip(*runs, strict=True)]
        parts = [means[max(0, i - window + 1) : i + 1] for i in range(len(means))]
        smooth = [math.fsum(part) / len(part) for part in parts]
        panel.plot(range(1, len(smooth) + 1), smooth, color=color, label=label(method))
    panel.set_xlabel("task")
    panel.xaxis.get_major_locator().set_params(integer=True)


def draw_rates(
    panel: Any, runs: Any, methods: Sequence[str], metric: str, middle: str = "mean"
) -> None:
    """Draws the mean or the median of a metric by learning rate, one line per method.

    Args:
        panel: the panel to draw in.
        runs: the rows of `Evidence.runs` of one case.
        methods: the methods, in the order of their colours.
        metric: a column of the runs.
        middle: "mean" or "median" over the seeds.
    """
    for method, color, marker in zip(methods, colours(methods), MARKERS, strict=False):
        values = runs[runs["method"] == method].groupby("lr")[metric].agg(middle)
        panel.plot(values.index, values, color=color, marker=marker, ms=4, label=label(method))
    panel.set_xscale("log")


def draw_bands(
    panel: Any, rows: Sequence[tuple[str, Band]], names: dict[str, str], lower: bool = False
) -> None:
    """Draws means with their intervals, one line per method, the best at the top.

    Args:
        panel: the panel to draw in.
        rows: methods with their bands.
        names: labels of the methods.
        lower: whether the lowest mean is the best; otherwise the largest is.
    """

    def rank(row: tuple[str, Band]) -> float:
        mean = row[1].mean
        return -math.inf if math.isnan(mean) else -mean if lower else mean

    rows = sorted(rows, key=rank)
    for height, (method, band) in enumerate(rows):
        _draw_mark(panel, height, band, colour(method))
    panel.set_yticks(range(len(rows)), [names[method] for method, _ in rows])
    for tick, (method, _) in zip(panel.get_yticklabels(), rows, strict=True):
        tick.set_color(colour(method))
    panel.grid(False, axis="y")


def _draw_mark(panel: Any, height: float, band: Band, color: str) -> None:
    """Draws a mean as a dot and its interval as a line."""
    panel.plot([band.low, band.high], [height] * 2, color=color, lw=2, alpha=0.6)
    panel.plot([band.mean], [height], color=color, marker="o", ms=6, ls="")


def draw_differences(rows: Sequence[tuple[str, str, Band]]) -> Any:
    """Draws differences with intervals from (label, colour, band), the first at the top."""
    drawing, (panel,) = figure(width=9.6, height=0.8 + 0.5 * len(rows))
    for height, (_, color, band) in enumerate(reversed(rows)):
        _draw_mark(panel, height, band, color)
    panel.axvline(0, color="black", lw=0.9)
    panel.set_yticks(range(len(rows)), [label for label, _, _ in reversed(rows)], fontsize=9)
    panel.set_ylim(-0.6, len(rows) - 0.4)
    panel.grid(False, axis="y")
    panel.set_xlabel("difference in %, positive: wellcond is better")
    return drawing


def use_logarithm(axis: Any) -> None:
    """Labels a logarithmic axis at 1, 2, 5, ..., or at powers of ten if its range is wide."""
    low, high = axis.get_view_interval()
    if high / low < 200:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, position: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def draw_condition_numbers(panel: Any) -> None:
    """Makes a logarithmic axis from 1 on. Values above `HUGE` share one tick."""
    top = panel.dataLim.y1
    panel.set_yscale("log")
    if top < HUGE:
        panel.set_ylim(1, None)
        use_logarithm(panel.yaxis)
        return
    ticks = [10.0**k for k in range(6)] + [3 * HUGE]
    panel.set_yticks(ticks, [f"$10^{k}$" for k in range(6)] + ["over $10^6$\nor infinite"])
    panel.set_ylim(1, 8 * HUGE)
    panel.axhline(HUGE, color="#999999", ls=":", lw=0.9)


def draw_layers(rows: dict[str, list[float]], names: Sequence[str]) -> Any:
    """Draws κ of each weight (columns, in the order of names) for each method (rows, from the top).

    Values above `HUGE` share one colour. NaN has none.
    """
    drawing, (panel,) = figure(width=2.6 + 0.42 * len(names), height=1.6 + 0.3 * len(rows))
    values = [[cap(kappa) for kappa in row] for row in reversed(rows.values())]
    largest = max([10.0, *(kappa for row in values for kappa in row if not math.isnan(kappa))])
    scale = LogNorm(1, largest)
    mesh = panel.pcolormesh(values, norm=scale, cmap="viridis", edgecolors="white", linewidth=1)
    panel.grid(False)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    panel.set_yticks([i + 0.5 for i in range(len(rows))], [label(m) for m in reversed(rows)])
    panel.set_xticks([i + 0.5 for i in range(len(names))], names, rotation=60, ha="right")
    for tick, method in zip(panel.get_yticklabels(), reversed(rows), strict=True):
        tick.set_color(colour(method))
    bar = drawing.colorbar(mesh, ax=panel, label="κ")
    bar.outline.set_visible(False)
    use_logarithm(bar.ax.yaxis)
    return drawing


def cap(kappa: float) -> float:
    """Returns the value at which `draw_condition_numbers` draws kappa. NaN is not drawn."""
    return 3 * HUGE if kappa > HUGE else kappa
