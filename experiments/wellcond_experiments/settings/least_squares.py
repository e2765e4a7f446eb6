"""Least squares with an ill-conditioned solution: the effect of the regulariser on one matrix.

Minimises 1/(2p) ‖A S − B‖_F² + λ r(S) over S (32, 16) by gradient descent with a fixed step, and
the same with λ/2 ‖S‖_F², whose minimiser is (AᵀA/p + λ I)⁻¹ AᵀB/p.

The gradient of r does not vanish at κ = 1. Therefore, with large λ, gradient descent on the loss
oscillates around κ = 1. The proximal step has a fixed point there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import wellcond as wc
from wellcond_experiments import figures
from wellcond_experiments.evidence import Evidence
from wellcond_experiments.grid import Cell, Measured, Swept
from wellcond_experiments.paper import LOOKS, Look
from wellcond_experiments.tables import Table

P, M, N = 64, 32, 16
CONDITION_A, CONDITION_TRUE, NOISE = 100.0, 1e3, 1e-3
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
WATCHED = (1e-3, 1e-2, 0.1)  # strengths whose κ is drawn over the iterations
CLOSED = "tikhonov-closed"
# This experiment uses the functions of r, not the classes.
LABELS = {"none": "baseline", "tikhonov": "Tikhonov", "condition-gradient": "gradient of r"}
LABELS |= {"condition": "proximal step of r", CLOSED: "Tikhonov, closed form"}
CURVES = LOOKS | {CLOSED: Look("black", "x", "")}
METRICS = {"kappa": "κ(S)", "residual": "‖A S − B‖_F/√p", "error": "‖S − S*‖_F"}


class Problem(NamedTuple):
    """A (p, m) with σ(A)/√p from 1 down to 1/κ(A), and B = A S* + noise."""

    A: Tensor
    B: Tensor
    truth: Tensor

    @classmethod
    def draw(cls, seed: int) -> Problem:
        source = torch.Generator().manual_seed(seed)

        def with_condition(m: int, n: int, kappa: float) -> Tensor:
            nu = min(m, n)
            factors = [
                torch.linalg.qr(torch.randn(rows, nu, generator=source, dtype=torch.float64)).Q
                for rows in (m, n)
            ]
            sigma = torch.logspace(0, -torch.tensor(kappa).log10().item(), nu, dtype=torch.float64)
            product: Tensor = factors[0] * sigma @ factors[1].mT
            return product

        A = with_condition(P, M, CONDITION_A) * P**0.5
        truth = with_condition(M, N, CONDITION_TRUE)
        noise = NOISE * torch.randn(P, N, generator=source, dtype=torch.float64)
        return cls(A, A @ truth + noise, truth)

    def residual(self, S: Tensor) -> float:
        return float(torch.linalg.matrix_norm(self.A @ S - self.B) / math.sqrt(P))

    def closed_form(self, strength: float) -> Tensor:
        """Returns the minimiser under Tikhonov."""
        H = self.A.mT @ self.A / P + strength * torch.eye(M, dtype=torch.float64)
        solution: Tensor = torch.linalg.solve(H, self.A.mT @ self.B / P)
        return solution

    def descend(self, method: str, strength: float, seed: int) -> Iterator[Tensor]:
        """Yields S from a random start, and S after each step.

        The step is 1/L with L = ‖A‖₂²/p + λ, a Lipschitz constant of the gradient of the smooth
        part.
        """
        H, G = self.A.mT @ self.A / P, self.A.mT @ self.B / P
        step = 1 / (float(torch.linalg.matrix_norm(self.A, 2)) ** 2 / P + strength)
        source = torch.Generator().manual_seed(seed)
        S = 0.1 * torch.randn(M, N, generator=source, dtype=torch.float64)
        while True:
            yield S
            gradient = H @ S - G
            if method == "tikhonov":
                gradient += strength * S
            elif method == "condition-gradient":
                gradient += strength * wc.condition_penalty_gradient(S)
            S = S - step * gradient
            if method == "condition":
                S = wc.proximal_step(S, step * strength)


class LeastSquares(Swept):
    name = "least-squares"
    help = "least squares with an ill-conditioned solution"
    protocol = (
        f"Least squares, κ(A) = {CONDITION_A:g}, κ(S*) = {CONDITION_TRUE:g}, noise {NOISE:g}: "
        "gradient descent with the fixed step 1/(‖A‖₂²/p + λ)."
    )
    default_data = quick_data = ""

    def __init__(self, data: str = "", quick: bool = False, seeds: int | None = None) -> None:
        super().__init__(data, quick, seeds)
        self.iterations = 1000 if quick else 100_000
        self.methods = dict.fromkeys(CURVES, STRENGTHS) | {"none": (0.0,)}

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"iterations": self.iterations}

    def run(self, cell: Cell) -> Measured:
        problem = Problem.draw(cell.seed)
        curves: dict[str, list[float]] = {}
        if cell.method == CLOSED:
            S = problem.closed_form(cell.strength)
        else:
            # Four points per decade.
            points = {round(10 ** (k / 4)) for k in range(40)} | {self.iterations}
            curves = {"iterations": [], "kappas": []}
            descent = problem.descend(cell.method, cell.strength, cell.seed)
            for iteration, S in zip(range(self.iterations + 1), descent, strict=False):
                if iteration in points:
                    curves["iterations"].append(iteration)
                    curves["kappas"].append(float(wc.condition_number(S)))
        error = float(torch.linalg.matrix_norm(S - problem.truth))
        kappa = float(wc.condition_number(S))
        metrics = {"kappa": kappa, "residual": problem.residual(S), "error": error}
        return Measured(metrics, curves)

    def note(self, evidence: Evidence) -> str:
        return f"{super().note(evidence)} {self.iterations} steps."

    def tables(self, evidence: Evidence) -> dict[str, Table]:
        rows = [
            [LABELS[method], f"{strength:g}"]
            + [
                str(evidence.band(metric, log=True, method=method, strength=strength))
                for metric in METRICS
            ]
            for method, strengths in self.methods.items()
            for strength in strengths
        ]
        header = ["method", "λ", *METRICS.values()]
        return {"strengths": Table("By method and strength λ", header, rows)}

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        drawing, panels = figures.figure(columns=3, width=4.4, height=3.8)
        for panel, (metric, title) in zip(panels, METRICS.items(), strict=True):
            for method, look in CURVES.items():
                bands = [
                    evidence.band(metric, log=True, method=method, strength=strength)
                    for strength in self.methods[method]
                ]
                if method == "none":
                    panel.axhline(bands[0].mean, color=look.colour, lw=1, label=LABELS[method])
                    continue
                means, low, high = zip(*(band[:3] for band in bands), strict=True)
                panel.plot(
                    STRENGTHS,
                    means,
                    color=look.colour,
                    marker=look.marker,
                    ls=look.line,
                    label=LABELS[method],
                )
                if method != CLOSED:
                    panel.fill_between(STRENGTHS, low, high, color=look.colour, alpha=0.12, lw=0)
            panel.set(xscale="log", yscale="log", xlabel="strength λ", title=title)
            if metric == "kappa":
                panel.set_ylim(1, None)
            figures.use_logarithm(panel.yaxis)
        panels[0].legend(fontsize=8, frameon=False)
        return {"least-squares": drawing, "least-squares-iterations": self._over_time(evidence)}

    def _over_time(self, evidence: Evidence) -> Any:
        drawing, panels = figures.figure(columns=len(WATCHED), width=4.4, height=3.8)
        for panel, watched in zip(panels, WATCHED, strict=True):
            panel.sharey(panels[0])
            panel.tick_params(labelleft=panel is panels[0])
            for method, look in LOOKS.items():
                strength = 0.0 if method == "none" else watched
                runs = evidence.where(method=method, strength=strength)
                kappas = torch.tensor(list(runs["kappas"]), dtype=torch.float64)
                panel.plot(
                    next(iter(runs["iterations"])),
                    [figures.cap(k) for k in kappas.log().mean(0).exp().tolist()],
                    color=look.colour,
                    ls=look.line,
                    label=LABELS[method],
                )
            panel.set(xscale="log", xlabel="iteration", title=f"κ(S), λ = {watched:g}")
        figures.draw_condition_numbers(max(panels, key=lambda panel: panel.dataLim.y1))
        panels[0].legend(fontsize=8, frameon=False)
        return drawing
