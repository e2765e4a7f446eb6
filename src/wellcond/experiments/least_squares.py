"""Least squares with an ill-conditioned solution: what the regulariser does to S alone.

Minimises 1/(2p) ||A S - B||_F^2 + lam r(S) over S (32, 16) by gradient descent with a fixed step,
and the same with lam/2 ||S||_F^2, whose minimiser (A^T A/p + lam I)^-1 A^T B/p stands beside it.
All strengths and seeds run at once, as one batch of matrices in float64.

At kappa = 1 the gradient of r does not vanish, so with a large lam the descent on the loss jitters
about it; the proximal step stands still there.
"""

from __future__ import annotations

import argparse
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

import wellcond as wc
from wellcond.experiments import _run

P, M, N = 64, 32, 16
CONDITION_A, CONDITION_TRUE, NOISE = 100.0, 1e3, 1e-3
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
PROTOCOL = "gradient descent with the fixed step 1/(||A||_2^2/p + lam)"
CLOSED = "closed_form:"  # prefix of the metrics of the minimiser under Tikhonov
BLOCK = 1000  # iterations between two looks at the progress


class Problem(NamedTuple):
    """A (p, m) with sigma(A)/sqrt(p) from 1 down to 1/kappa(A); B = A S* + noise."""

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


def configure(experiments: Any) -> None:
    parser: argparse.ArgumentParser = experiments.add_parser(
        "least-squares",
        help="least squares with an ill-conditioned solution",
        description="Gradient descent on a least-squares problem under both penalties over a grid "
        "of strengths.",
        epilog="example: wellcond reproduce least-squares --quick",
    )
    _run.add_common(parser, "least-squares", data=False)
    parser.add_argument(
        "--epochs", type=_run.positive, help="iterations: default 100000, 10000 with --quick"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    _run.prepare(arguments)
    iterations = arguments.epochs or (10_000 if arguments.quick else 100_000)
    results = _run.Results(arguments, "synthetic", PROTOCOL, ("least-squares.png",))
    results.settings.update(
        iterations=iterations,
        p=P,
        m=M,
        n=N,
        kappa_A=CONDITION_A,
        kappa_true=CONDITION_TRUE,
        noise=NOISE,
        strengths=STRENGTHS,
    )
    problems = [Problem.draw(seed) for seed in range(arguments.seeds)]
    total = len(_run.METHODS) * -(-iterations // BLOCK)
    with results.kept(), _run.progress(total, "least squares") as advance:
        for method in _run.METHODS:
            strengths = (0.0,) if method == "none" else STRENGTHS
            started = time.perf_counter()
            S = descend(problems, method, strengths, iterations, advance)
            seconds = (time.perf_counter() - started) / S[..., 0, 0].numel()
            for seed, problem in enumerate(problems):
                for index, strength in enumerate(strengths):
                    results.add(_measured(problem, S[seed, index], method, strength, seed, seconds))
    with results.kept():
        _report(results, arguments.json)
    return 0


def descend(
    problems: list[Problem],
    method: str,
    strengths: tuple[float, ...],
    iterations: int,
    advance: Any = lambda label: None,
) -> Tensor:
    """S (seeds, strengths, m, n) after so many steps from one random start per seed.

    The step is 1/L with L = ||A||_2^2/p + lam, a Lipschitz constant of the smooth part.
    """
    A, B = (torch.stack([problem[i] for problem in problems])[:, None] for i in (0, 1))
    H, G = A.mT @ A / P, A.mT @ B / P
    lam = torch.tensor(strengths, dtype=torch.float64)[:, None, None]
    step = 1 / (torch.linalg.matrix_norm(A, 2)[..., None, None] ** 2 / P + lam)
    start = [
        0.1 * torch.randn(M, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in range(len(problems))
    ]
    S = torch.stack(start)[:, None].repeat(1, len(strengths), 1, 1)
    label = f"{method}, {S.shape[0] * S.shape[1]} problems at once"
    for iteration in range(iterations):
        gradient = H @ S - G
        if method == "tikhonov":
            gradient += lam * S
        elif method == "condition":
            gradient += lam * penalty_gradient(S)
        S = S - step * gradient
        if method == "condition-proximal":
            S = _shrink(S, step * lam)
        if (iteration + 1) % BLOCK == 0 or iteration + 1 == iterations:
            advance(label)
    return S


def penalty_gradient(S: Tensor) -> Tensor:
    """`wellcond.condition_penalty_gradient` of a batch, from the eigenvectors of S^T S: faster."""
    v = torch.linalg.eigh(S.mT @ S).eigenvectors[..., -1:]
    gradient: Tensor = (S @ v) @ v.mT - S / min(S.shape[-2:])
    return gradient


def _shrink(S: Tensor, eta: Tensor) -> Tensor:
    """`wellcond.proximal_step` of a batch in which every matrix has a step of its own."""
    nu = S.shape[-1]
    squares, V = torch.linalg.eigh(S.mT @ S)
    sigma, V = squares.flip(-1).clamp_min(0).sqrt(), V.flip(-1)
    eta = eta[..., 0].expand(*S.shape[:-2], 1)
    j = torch.arange(1, nu + 1, dtype=S.dtype)
    tau = (sigma.cumsum(-1) / (j + eta)).amax(-1, keepdim=True)
    kept = torch.where(sigma > tau, tau / sigma.clamp_min(1e-300), 1.0)
    shrunk: Tensor = (1 + eta[..., None] / nu) * ((S @ V) * kept[..., None, :]) @ V.mT
    return shrunk


def closed_form(problem: Problem, strength: float) -> Tensor:
    """The minimiser under Tikhonov."""
    H = problem.A.mT @ problem.A / P + strength * torch.eye(M, dtype=torch.float64)
    solution: Tensor = torch.linalg.solve(H, problem.A.mT @ problem.B / P)
    return solution


def _measured(
    problem: Problem, S: Tensor, method: str, strength: float, seed: int, seconds: float
) -> dict[str, Any]:
    kappa, scores = _outcome(problem, S)
    run = {
        "method": method,
        "strength": strength,
        "tuned": False,
        "seed": seed,
        "condition_numbers": {"S": kappa},
        "scores": scores,
        "seconds": seconds,
    }
    if method == "tikhonov":
        kappa, scores = _outcome(problem, closed_form(problem, strength))
        run["metrics"] = {f"{CLOSED}condition_number:S": kappa} | {
            f"{CLOSED}score:{name}": value for name, value in scores.items()
        }
    return run


def _outcome(problem: Problem, S: Tensor) -> tuple[float, dict[str, float]]:
    """kappa(S), and how well S fits and how far it is from S*."""
    residual = torch.linalg.matrix_norm(problem.A @ S - problem.B) / P**0.5
    error = torch.linalg.matrix_norm(S - problem.truth)
    scores = {"residual": float(residual), "error": float(error)}
    return float(wc.condition_number(S)), scores


def _report(results: _run.Results, as_json: bool) -> None:
    keys = {
        "kappa(S)": "condition_number:S",
        "residual": "score:residual",
        "||S - S*||": "score:error",
    }
    curves = [(method, "") for method in _run.METHODS]
    curves.insert(2, ("tikhonov", CLOSED))
    rows = []
    for method, prefix in curves:
        for strength in (0.0,) if method == "none" else STRENGTHS:
            bands = [results.row(method, strength, prefix + key) for key in keys.values()]
            name = f"{method}, closed form" if prefix else method
            rows.append([name, f"{strength:g}", *map(_run.with_interval, bands)])
    settings = results.settings
    note = (
        f"Least squares, kappa(A) = {CONDITION_A:g}, kappa(S*) = {CONDITION_TRUE:g}, noise "
        f"{NOISE:g}: {settings['iterations']} steps of {PROTOCOL}. "
        f"{_run.over_seeds(settings['seeds'])} Residual: ||A S - B||_F/sqrt(p)."
    )
    tables = [("By method and strength lam", ["method", "lam", *keys], rows)]
    _run.write_tables(results, note, tables)
    _picture(results, keys, curves)
    _run.finished(results, note, tables, as_json)


def _picture(results: _run.Results, keys: dict[str, str], curves: list[tuple[str, str]]) -> None:
    drawing, panels = _run.figure(columns=3, width=4.4, height=3.8)
    for panel, (name, key) in zip(panels, keys.items(), strict=True):
        unregularised = results.mean("none", 0.0, key)
        panel.axhline(unregularised, color=_run.COLOURS["none"], lw=1, label=_run.LABELS["none"])
        for method, prefix in curves[1:]:
            values = [results.mean(method, strength, prefix + key) for strength in STRENGTHS]
            panel.plot(
                STRENGTHS,
                values,
                color=_run.COLOURS[method] if not prefix else "black",
                marker="x" if prefix else _run.MARKERS[method],
                ls="" if prefix else _run.LINES[method],
                label=_run.LABELS[method] + (", closed form" if prefix else ""),
            )
        panel.set(xscale="log", yscale="log", xlabel="strength lam", title=name)
        _run.logarithmic(panel.yaxis)
    panels[0].legend(fontsize=8, frameon=False)
    drawing.savefig(results.out / "least-squares.png")
