"""The demo: the paper's denoising autoencoder on scikit-learn's digits.

Three methods at the strengths and the learning rate of the paper, without a search. `wellcond
reproduce denoise` runs the complete protocol.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from joblib import Parallel, cpu_count, delayed

from wellcond_experiments import figures
from wellcond_experiments.grid import Cell, Measured
from wellcond_experiments.paper import LOOKS
from wellcond_experiments.settings.denoise import DEFAULT_LR, KAPPAS, OUTER, Denoise

CASE, SEEDS = "snr-10", 3
METHODS = {
    "none": "baseline",
    "tikhonov": "L2 (Tikhonov) 0.01",
    "condition-gradient": "ConditionPenalty(0.01) in the loss",
}
FIRST = KAPPAS[0]  # the curve of the first weight
BEYOND = 1e6
Runs = dict[str, list[Measured]]


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, draws the picture and prints the results."""
    parser = argparse.ArgumentParser("python -m wellcond_experiments.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs", "demo"), help="default runs/demo")
    folder: Path = parser.parse_args(argv).out
    runs = train()
    picture = figures.save(draw(runs), folder / "demo.png")
    print("\n".join([*describe(runs), f"Picture: {picture}", *WHERE_TO_GO]))


def train() -> Runs:
    """Runs every method with every seed, one process per core."""
    cells = [
        Cell(CASE, method, OUTER if method != "none" else 0.0, DEFAULT_LR, seed)
        for method in METHODS
        for seed in range(SEEDS)
    ]
    setting = Denoise("digits")
    done = Parallel(n_jobs=min(cpu_count(), len(cells)))(
        delayed(setting.run)(cell) for cell in cells
    )
    return {
        method: [found for cell, found in zip(cells, done, strict=True) if cell.method == method]
        for method in METHODS
    }


def describe(runs: Runs) -> list[str]:
    """Describes the results in at most twelve lines."""
    lines = [
        "A denoising autoencoder on 8x8 digits at a high learning rate (Adam, 0.005), "
        f"{SEEDS} seeds.",
        "κ: ratio of the largest to the smallest singular value of the first weight, at the end.",
        "",
        f"{'':36}{'κ':>9}  error of the restored images",
    ]
    for method, label in METHODS.items():
        lines.append(f"{label:36}{_number(kappa(runs[method])):>9}  {error(runs[method]):.4f}")
    decayed, limited = METHODS["tikhonov"], METHODS["condition-gradient"]
    worst, kept = kappa(runs["tikhonov"]), kappa(runs["condition-gradient"])
    what = f"raised κ of the first layer to {_number(worst)}"
    if worst > BEYOND:
        what = "raised κ of the first layer above a million: the weight is rank-deficient"
    gains = [
        f"{_compare(error(runs['condition-gradient']), error(runs[method]))} than {than}"
        for method, than in (("tikhonov", "with L2"), ("none", "without a regulariser"))
    ]
    lines += [
        "",
        f"{decayed} {what}.",
        f"{limited} kept it at {_number(kept)}.",
        f"Its error is {' and '.join(gains)}.",
        "With tuned strengths and rates, the differences are small: docs/evidence/denoise.md.",
    ]
    return lines


WHERE_TO_GO = [
    "All methods, tuned, with intervals: wellcond reproduce denoise",
    "Your own checkpoint: wellcond audit FILE    Your own training: README.md",
]


def kappa(runs: Sequence[Measured]) -> float:
    """Returns κ of the first weight at the end, the median over the seeds."""
    return statistics.median(run.curves[FIRST][-1] for run in runs)


def error(runs: Sequence[Measured]) -> float:
    """Returns the mean squared error at the training noise, the mean over the seeds."""
    return statistics.fmean(run.metrics["error"] for run in runs)


def _compare(one: float, other: float) -> str:
    return f"{abs(1 - one / other):.0%} {'smaller' if one < other else 'larger'}"


def _number(kappa: float) -> str:
    return "infinity" if math.isinf(kappa) else f"{kappa:.3g}"


def draw(runs: Runs) -> Any:
    """Draws κ of the first weight during training, and the final errors."""
    drawing, (left, right) = figures.figure(columns=2, width=4.4, height=3.4)
    for method, label in METHODS.items():
        found = runs[method]
        medians = map(statistics.median, zip(*(one.curves[FIRST] for one in found), strict=True))
        look = LOOKS[method]
        left.plot(
            found[0].curves["epochs"],
            [figures.cap(one) for one in medians],
            color=look.colour,
            ls=look.line,
            label=label,
        )
        at = len(right.patches)
        right.barh(at, error(found), color=look.colour)
        right.annotate(f" {error(found):.3f}", (error(found), at), va="center", fontsize=9)
    figures.draw_condition_numbers(left)
    left.set(title="κ of the first weight", xlabel="epoch")
    left.legend(fontsize=8, frameon=False)
    right.set(title="error of the restored images", yticks=[])
    right.margins(x=0.15)
    right.invert_yaxis()
    return drawing


if __name__ == "__main__":
    main()
