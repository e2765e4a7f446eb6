"""Where r is differentiable: numerical checks of the theorems of the paper.

The matrices have known singular triplets, in float64. Every check compares a public function with
a finite difference of r, or with a formula for the triplets. A violation is a deviation larger than
rounding explains. Errors are relative to the scale, which is sigma_2 of most matrices.

h is the step of a difference, t the distance along a path, p the multiplicity of sigma_1.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

import wellcond as wc
from wellcond_experiments import figures
from wellcond_experiments.evidence import Evidence
from wellcond_experiments.grid import Cell, Measured, Setting
from wellcond_experiments.tables import Table, number

EPS = torch.finfo(torch.float64).eps
SHAPES = ((6, 6), (9, 5), (5, 9), (1, 9), (9, 1))
MATRICES = [shape for shape in SHAPES if min(shape) > 1]
SCALES = (1e-30, 1.0, 1e30)
GAPS = tuple(float(f"1e-{k}") for k in range(13))
STEPS = (1e-3, 1e-6, 1e-9)
CONDITIONS = tuple(10.0 ** (k / 4) for k in range(17))
SLACK = 100  # allowed error, as a multiple of the estimated rounding error


class Tally:
    """Counts checks and violations; collects extremes of measured values and points to draw."""

    def __init__(self) -> None:
        self.cases = self.violations = 0
        self.figures: dict[str, float] = {}
        self.points: dict[str, list[float]] = {}

    def check(self, holds: Tensor) -> None:
        self.cases += holds.numel()
        self.violations += int((~holds).sum())

    def figure(self, name: str, values: Tensor) -> float:
        """Updates the extreme value of this name (smallest or largest); nan is kept."""
        if not values.numel():
            return math.nan
        value = float(values.amin() if name.startswith("smallest") else values.amax())
        self.figures[name] = extreme(name, [self.figures.get(name, value), value])
        return value

    def point(self, **values: float) -> None:
        """Adds a point to draw."""
        for name, value in values.items():
            self.points.setdefault(name, []).append(value)

    def small(self, name: str, error: Tensor, allowed: float) -> float:
        self.check(error.abs() <= allowed)
        return self.figure(name, error.abs())


class Known(NamedTuple):
    """S = U diag(sigma) V^T, up to rounding of the product."""

    S: Tensor
    U: Tensor
    sigma: Tensor
    V: Tensor

    @classmethod
    def draw(cls, shape: tuple[int, int], sigma: Tensor, source: torch.Generator) -> Known:
        U, V = (
            torch.linalg.qr(normal((*sigma.shape[:-1], rows, sigma.shape[-1]), source)).Q
            for rows in shape
        )
        return cls(U * sigma[..., None, :] @ V.mT, U, sigma, V)


def normal(shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=source, dtype=torch.float64)


def spectrum(nu: int, *leading: float, scale: float = 1.0, deficient: bool = False) -> Tensor:
    """Returns the leading values, then values from 0.4 down; with `deficient` the last is 0."""
    rest = torch.linspace(0.4, 0.2, max(nu - len(leading), 0), dtype=torch.float64)
    sigma = torch.cat([torch.tensor(leading, dtype=torch.float64), rest])[:nu]
    if deficient:
        sigma[-1] = 0
    return scale * sigma


def inner(A: Tensor, B: Tensor) -> Tensor:
    return (A * B).sum(dim=(-2, -1))


def extreme(name: str, values: list[float]) -> float:
    both = torch.tensor(values, dtype=torch.float64)  # amin and amax keep a nan
    return float(both.amin() if name.startswith("smallest") else both.amax())


def gradient(source: torch.Generator, directions: int) -> Tally:
    """Checks by central differences whose step balances rounding and truncation errors."""
    tally = Tally()
    for shape, scale, deficient, gap in product(SHAPES, SCALES, (False, True), GAPS):
        nu = min(shape)
        if nu == 1 and (deficient or gap < 1):  # no second singular value
            continue
        sigma = spectrum(nu, 1 + gap, 1, scale=scale, deficient=deficient)
        S, U, sigma, V = Known.draw(shape, sigma, source)
        found = wc.condition_penalty_gradient(S)
        H = scale * normal((directions, *shape), source)
        h = (EPS * gap**2) ** (1 / 3)
        slope = (wc.condition_penalty(S + h * H) - wc.condition_penalty(S - h * H)) / (2 * h)
        formula = sigma[0] * torch.outer(U[:, 0], V[:, 0]) - S / nu
        difference = tally.small(
            "largest error against differences of r",
            (slope - inner(found, H)) / scale**2,
            SLACK * (EPS / gap) ** (2 / 3),
        )
        error = tally.small(
            "largest error against the formula", (found - formula) / scale, SLACK * EPS / gap
        )
        if gap >= 0.1:
            tally.figure(
                "largest error against differences, gap 0.1 and 1",
                torch.tensor(difference),
            )
        if nu > 1:
            tally.point(gap=gap, difference=difference, formula=error)
    return tally


def sides(source: torch.Generator, directions: int) -> Tally:
    """Checks the derivative along H: sigma_1 lambda_max(sym(U_1^T H V_1)) - <S, H>/nu."""
    tally = Tally()
    h = 1e-6  # small against the gap to the next value, 0.4 or more
    allowed = 1e-7
    kinds = {"simple": (2.0, 1.0), "tie of 2": (1.0,) * 2, "tie of 3": (1.0,) * 3}
    kinds |= {"all tied": (1.0,) * 9, "zero": (0.0,) * 9}
    for shape, scale, deficient in product(SHAPES, SCALES, (False, True)):
        for kind, leading in kinds.items():
            nu = min(shape)
            if nu == 1 and (deficient or kind not in ("simple", "zero")):
                continue
            sigma = spectrum(nu, *leading, scale=scale, deficient=deficient)
            S, U, sigma, V = Known.draw(shape, sigma, source)
            H = scale * normal((directions, *shape), source)

            def derivative(H: Tensor, S: Tensor = S) -> Tensor:
                near, far = (wc.condition_penalty(S + k * h * H) for k in (1, 2))
                return (4 * near - far - 3 * wc.condition_penalty(S)) / (2 * h)

            tied = sigma == sigma[0]
            block = U[:, tied].mT @ H @ V[:, tied]
            slopes = sigma[0] * torch.linalg.eigvalsh((block + block.mT) / 2)
            linear = inner(S, H) / nu
            before, after = -derivative(-H), derivative(H)
            unit = scale**2
            error = torch.stack([before - slopes[:, 0] + linear, after - slopes[:, -1] + linear])
            tally.small("largest error against the subdifferential", error / unit, allowed)
            difference = (after - before) / unit
            at_tie = kind not in ("simple", "zero")
            if at_tie:  # the sides differ only at ties
                tally.check(difference > 10 * allowed)
                tally.figure(f"smallest difference of the sides, {kind}", difference)
                tally.figure(f"largest difference of the sides, {kind}", difference)
            else:
                tally.small(f"largest difference of the sides, {kind}", difference, allowed)
            # The returned gradient is between the two sides, also at ties.
            found = inner(wc.condition_penalty_gradient(S), H)
            tally.check(found <= after + allowed * unit)
            tally.check(found >= before - allowed * unit)
    return tally


def resolution(source: torch.Generator, directions: int) -> Tally:
    """Checks that differences see a kink if the step is far above the gap, and none far below."""
    tally = Tally()
    for shape in MATRICES:
        _, U, _, V = Known.draw(shape, spectrum(min(shape), 1, 1), source)
        H = normal((directions, *shape), source)
        block = U[:, :2].mT @ H @ V[:, :2]
        slopes = torch.linalg.eigvalsh((block + block.mT) / 2)
        kink = slopes[:, 1] - slopes[:, 0]
        for gap, h in product(GAPS, STEPS):
            S = U * spectrum(min(shape), 1 + gap, 1) @ V.mT
            r = [wc.condition_penalty(S + k * h * H) for k in (-1, 0, 1)]
            # Means over the directions, because the ratio of a tiny kink would only show rounding.
            seen = float(((r[2] - 2 * r[1] + r[0]) / h).mean() / kink.mean())
            tally.point(gap=gap, step=h, difference=seen)
            if h <= 1e-6 and gap <= h / 1000:
                name = "largest deviation from the kink, gap up to step/1000"
                tally.small(name, torch.tensor(seen - 1), 0.01)
            if gap >= 1000 * h:
                name = "largest share of the kink seen, gap from 1000 steps"
                tally.small(name, torch.tensor(seen), 0.1)
    return tally


def jump(source: torch.Generator, directions: int) -> Tally:
    """Checks the gradient along S(t) = S(0) + t (u_1 v_1^T - u_2 v_2^T).

    The gap at t is sqrt(gap^2 + 4 t^2). From -t to t the gradient changes by
    sqrt(2) |sigma_1 t/sqrt(t^2 + gap^2/4) - 2 t/nu|: at a tie it jumps by sqrt(2) sigma_1,
    otherwise the change extends over |t| of about the gap.
    """
    tally = Tally()
    for shape, gap, t in product(MATRICES, GAPS, STEPS):
        nu = min(shape)
        middle, U, _, V = Known.draw(shape, spectrum(nu, 1, 1), source)
        crossed = torch.outer(U[:, 0], V[:, 1]) + torch.outer(U[:, 1], V[:, 0])
        across = torch.outer(U[:, 0], V[:, 0]) - torch.outer(U[:, 1], V[:, 1])
        S = middle + gap / 2 * crossed
        before, after = (wc.condition_penalty_gradient(S + k * t * across) for k in (-1, 1))
        found = torch.linalg.matrix_norm(after - before)
        radius = math.hypot(t, gap / 2)
        expected = math.sqrt(2) * abs((1 + radius) * t / radius - 2 * t / nu)
        tally.small("largest error against the formula", found - expected, SLACK * EPS / radius)
        tally.figure("largest jump, relative to sigma_1", found / (1 + radius))
        tally.point(gap=gap, step=t, jump=float(found))
    return tally


def zero_set(source: torch.Generator, directions: int) -> Tally:
    """Checks that r grows like t away from the zero set, and like t^2 along a tangent."""
    tally = Tally()
    for shape, scale in product(SHAPES, SCALES):
        nu, unit = min(shape), scale**2
        S, U, sigma, V = Known.draw(shape, spectrum(nu, *(1.0,) * nu, scale=scale), source)
        tally.small("largest r/sigma_1^2 on the set", wc.condition_penalty(S) / unit, SLACK * EPS)
        H = scale * normal((directions, *shape), source)
        if nu == 1:  # every row or column vector is in the zero set
            tally.small("largest r/sigma_1^2 on the set", wc.condition_penalty(H) / unit, 0)
            continue
        missing = spectrum(nu, *(1.0,) * nu, scale=scale, deficient=True)
        off = [H, Known.draw(shape, missing, source).S[None]]
        off += [S + t * H for t in (1e-1, 1e-3, 1e-6, 1e-9, 1e-12)]
        for T in off:
            tally.check(wc.condition_penalty(T) > 0)
        block = U.mT @ H @ V
        slopes = sigma[0] * torch.linalg.eigvalsh((block + block.mT) / 2)
        growth = slopes[:, -1] - slopes.mean(-1)
        rate = wc.condition_penalty(S + 1e-8 * H) / 1e-8
        tally.small("largest error of r/t against its limit", (rate - growth) / unit, 1e-5)
        tangent = U @ (block - block.mT) @ V.mT
        for name, D, exponent in (("away", H, 1), ("along a tangent", tangent, 2)):
            far, near = (wc.condition_penalty(S + t * D) for t in (1e-3, 1e-5))
            measured = (far / near).log10() / 2
            tally.check((measured - exponent).abs() < 0.05)
            for end in ("smallest", "largest"):
                tally.figure(f"{end} exponent of t, {name}", measured)
    return tally


def _spectra(nu: int, source: torch.Generator, trials: int) -> Tensor:
    """Returns spectra (..., nu) from 1 to 1/kappa: random, and all 1 except the last."""
    exponents = torch.rand(len(CONDITIONS), trials, nu, generator=source, dtype=torch.float64)
    exponents[..., 0], exponents[..., -1] = 0, 1
    exponents[:, 0, 1:-1] = 0  # a bound is tight for these
    kappa = torch.tensor(CONDITIONS, dtype=torch.float64)[:, None, None]
    sigma: Tensor = kappa**-exponents
    return sigma.sort(-1, descending=True).values


def bounds(source: torch.Generator, directions: int) -> Tally:
    tally = Tally()
    for shape, scale in product(MATRICES, SCALES):
        nu = min(shape)
        S, _, sigma, _ = Known.draw(shape, scale * _spectra(nu, source, directions), source)
        kappa, r = wc.condition_number(S), wc.condition_penalty(S)
        paper = wc.condition_penalty_bound(S)
        inside = (1 - 2 * nu * r / sigma[..., 0] ** 2).clamp_min(0)  # 0: no bound
        ratios = {
            "exp(nu r/sigma_nu^2)": paper / kappa,
            "sqrt(1 + 2 nu r/sigma_nu^2)": (1 + 2 * nu * r / sigma[..., -1] ** 2).sqrt() / kappa,
            "1/sqrt(1 - 2 nu r/sigma_1^2)": inside.rsqrt() / kappa,
        }
        for name, ratio in ratios.items():
            # Where the last bound is tight, 1 cancels to 1/kappa^2 under its root.
            tally.check(ratio >= 1 - SLACK * EPS * kappa**2)
            tally.figure(f"smallest ratio of {name} to kappa", ratio)
            tally.figure(f"largest finite ratio of {name} to kappa", ratio[ratio.isfinite()])
        tally.figure("smallest kappa at which the exponential overflows", kappa[paper.isinf()])
    return tally


def step(source: torch.Generator, directions: int) -> Tally:
    """Checks gradient steps with lam up to the maximum of the theorem."""
    tally = Tally()
    for shape, scale, share in product(MATRICES, SCALES, (1e-3, 0.03, 0.3, 0.7, 1.0)):
        nu = min(shape)
        sigma = _spectra(nu, source, directions)[1:]  # kappa > 1
        sigma[..., 0] *= 1.05  # simple
        S, *_ = Known.draw(shape, scale * sigma, source)
        first, second, last = sigma[..., 0], sigma[..., 1], sigma[..., -1]
        lam = share * (first - last) / (first - (first - last) / nu)
        c = 1 + lam / nu
        expected = torch.maximum(first * (c - lam), second * c) / (last * c)
        stepped = S - lam[..., None, None] * wc.condition_penalty_gradient(S)
        before, after = wc.condition_number(S), wc.condition_number(stepped)
        tally.check(after < before)
        error = after / expected - 1
        tally.check(error.abs() <= SLACK * EPS * before**2)  # kappa may come from squares
        tally.figure("largest deviation from the formula", error.abs())
        tally.figure("largest kappa after / kappa before", after / before)
        tally.figure("smallest kappa after / kappa before", after / before)
    return tally


QUESTIONS = {
    "gradient": ("Theorem 3.1: the gradient where sigma_1 is simple", gradient),
    "sides": ("one-sided derivatives at ties, at simple sigma_1 and at 0", sides),
    "resolution": ("difference of the two one-sided derivatives, by gap and step", resolution),
    "jump": ("jump of the gradient along a path through a tie", jump),
    "zero-set": ("Theorem 2.1: r = 0 only for multiples of semi-orthogonal matrices", zero_set),
    "bounds": ("Theorem 2.2 and two sharper bounds", bounds),
    "step": ("Theorem 3.2: a gradient step lowers kappa as predicted", step),
}


class Differentiability(Setting):
    name = "differentiability"
    help = "numerical checks of the paper's theorems and of where r is differentiable"
    protocol = (
        "Checks gradient, one-sided derivatives, zero set, bounds and gradient steps against "
        "differences and formulas, in float64, with random singular vectors and directions. The "
        "exit code is 1 if a number violates a theorem."
    )
    default_data = quick_data = ""
    cases = tuple(QUESTIONS)

    def __init__(self, data: str = "", quick: bool = False, seeds: int | None = None) -> None:
        super().__init__(data, quick, seeds)
        self.directions = 3 if quick else 16
        self.methods = {"": (0.0,)}

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"directions": self.directions}

    def run(self, cell: Cell) -> Measured:
        _, ask = QUESTIONS[cell.case]
        tally = ask(torch.Generator().manual_seed(cell.seed), self.directions)
        counts = {"cases": float(tally.cases), "violations": float(tally.violations)}
        return Measured(counts | tally.figures, tally.points)

    def failed(self, evidence: Evidence) -> bool:
        return _total(evidence, "violations") > 0

    def note(self, evidence: Evidence) -> str:
        cases, violations = (_total(evidence, name) for name in ("cases", "violations"))
        return (
            f"{self.protocol} {cases} checks, {violations} violations; "
            f"{evidence.document['seeds']} seeds. Errors are relative to the scale of the matrix."
        )

    def tables(self, evidence: Evidence) -> dict[str, Table]:
        checked = [
            [title, *(str(_total(evidence, name, case)) for name in ("cases", "violations"))]
            for case, (title, _) in QUESTIONS.items()
        ]
        extremes = [
            [f"{case}: {name}", number(value)]
            for case in QUESTIONS
            for name, value in extremes_of(evidence, case).items()
        ]
        return {
            "theorems": Table("By theorem", ["statement", "checks", "violations"], checked),
            "extremes": Table(
                "Extremes over all seeds and configurations", ["quantity", "value"], extremes
            ),
        }

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        drawing, panels = figures.figure(columns=3, width=4.6, height=4.2)
        errors, kinks, jumps = panels

        def worst(case: str, name: str, step: float | None = None) -> list[float]:
            """Returns the largest value per gap, over all other parameters."""
            largest = dict.fromkeys(GAPS, 0.0)
            for run in evidence.where(case=case).to_dict("records"):
                steps = run["step"] if step else [step] * len(run["gap"])
                for gap, one, value in zip(run["gap"], steps, run[name], strict=True):
                    if one == step:
                        largest[gap] = max(largest[gap], abs(value))
            return list(largest.values())

        for (key, label, power), colour, marker in zip(
            (
                ("difference", "against central differences", 2 / 3),
                ("formula", "against σ₁u₁v₁ᵀ − S/ν", 1),
            ),
            figures.CYCLE,
            figures.MARKERS,
            strict=False,
        ):
            found = worst("gradient", key)
            errors.plot(GAPS, found, color=colour, marker=marker, label=label)
            name = "(eps/gap)$^{2/3}$" if power < 1 else "eps/gap"
            estimate = [(EPS / gap) ** power for gap in GAPS]
            errors.plot(GAPS, estimate, color=colour, ls=":", lw=1, label=name)
        errors.set(title="error of the gradient, largest")
        for h, colour, marker in zip(STEPS, figures.CYCLE, figures.MARKERS, strict=False):
            seen = worst("resolution", "difference", step=h)
            kinks.plot(GAPS, seen, color=colour, marker=marker, label=f"step {h:g}")
            jumped = worst("jump", "jump", step=h)
            jumps.plot(GAPS, jumped, color=colour, marker=marker, label=f"from t = {-h:g} to {h:g}")
        kinks.set(title="right minus left difference / kink of the tie", ylim=(1e-8, 10))
        kinks.axhline(1, color="black", ls=":", lw=1, label="on the tie")
        jumps.set(title="change of the gradient along a path")
        jumps.axhline(math.sqrt(2), color="black", ls=":", lw=1, label="on the tie: √2 σ₁")
        for panel in panels:
            panel.set(xscale="log", yscale="log", xlabel="gap σ₁ − σ₂, σ₂ = 1")
            panel.legend(fontsize=8, frameon=False, loc="lower left")
        jumps.set(xlabel="gap σ₁ − σ₂ at t = 0")
        errors.legend(fontsize=8, frameon=False, loc="upper right")
        return {"differentiability": drawing}


def extremes_of(evidence: Evidence, case: str) -> dict[str, float]:
    """Returns the extremes of all measured values over the seeds."""
    runs = [run["metrics"] for run in evidence.document["runs"] if run["case"] == case]
    return {
        name: extreme(name, [run[name] for run in runs])
        for name in runs[0]
        if name not in ("cases", "violations")
    }


def _total(evidence: Evidence, name: str, case: str | None = None) -> int:
    rows = evidence.runs if case is None else evidence.where(case=case)
    return int(rows[name].sum())
