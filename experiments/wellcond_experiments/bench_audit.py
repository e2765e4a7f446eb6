"""Benchmark of measuring: time and error against `torch.linalg.svdvals` of the same tensor.

Every size is timed in turn with both, best of several rounds; a float64 SVD is the reference.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import wellcond as wc
from wellcond.text import dump_json
from wellcond_experiments import _run
from wellcond_experiments.tables import Table, number

SIZES = (
    "1x1,8x8,32x32,64x64,128x128,256x256,512x512,1024x1024,2048x2048,4096x4096,"
    "64x4096,2048x784,30000x512"
)
KINDS = ("gaussian", "kappa=1e5", "deficient")
# A matrix with a prescribed spectrum takes two QR factorisations to make.
_PRESCRIBED = 2048


def configure(benchmarks: Any) -> None:
    parser: argparse.ArgumentParser = benchmarks.add_parser(
        "audit",
        help="time and error of measuring a weight",
        description="Condition number of float32 matrices: seconds of wellcond and of "
        "torch.linalg.svdvals on the same tensor, in turn, and the relative errors of both.",
        epilog="example: wellcond bench audit --sizes 1024x1024,4096x4096 --rounds 3",
    )
    parser.add_argument("--sizes", default=SIZES, help="as 64x64,4096x4096")
    parser.add_argument("--rounds", type=_run.positive, default=3, help="best of (default 3)")
    _run.add_output(parser)
    parser.set_defaults(run=run)


def _sizes(text: str) -> list[tuple[int, int]]:
    sizes = []
    for part in text.split(","):
        m, cross, n = part.partition("x")
        if not (cross and m.isdigit() and n.isdigit() and int(m) and int(n)):
            raise ValueError(f"--sizes must be like 64x64,4096x4096, got {part!r}.")
        sizes.append((int(m), int(n)))
    return sizes


def matrix(kind: str, m: int, n: int) -> Tensor:
    """A float32 matrix: Gaussian, with geometric singular values, or of half the rank."""
    source = torch.Generator().manual_seed(0)
    nu = min(m, n)
    if kind == "gaussian":
        return torch.randn(m, n, generator=source)
    if kind == "deficient":
        rank = -(-nu // 2)
        left = torch.randint(-8, 9, (m, rank), generator=source).float()
        return left @ torch.randint(-8, 9, (rank, n), generator=source).float()
    U, V = (
        torch.linalg.qr(torch.randn(rows, nu, generator=source, dtype=torch.float64)).Q
        for rows in (m, n)
    )
    sigma = 1e5 ** -torch.linspace(0, 1, nu, dtype=torch.float64)
    S: Tensor = (U * sigma) @ V.mT
    return S.float()


def run(arguments: argparse.Namespace) -> int:
    _run.apply_threads(arguments)
    sizes = _sizes(arguments.sizes)
    plan = [
        (kind, m, n)
        for (m, n), kind in itertools.product(sizes, KINDS)
        if kind == "gaussian" or (min(m, n) >= 64 and max(m, n) <= _PRESCRIBED)
    ]
    rows: list[dict[str, Any]] = []
    with _run.progress(len(plan), "bench audit") as advance:
        for kind, m, n in plan:
            rows.append(_measure(kind, m, n, arguments.rounds))
            advance(f"{kind} {m}x{n}")
    if arguments.json:
        document = {
            "benchmark": "audit",
            "settings": {"rounds": arguments.rounds, "threads": torch.get_num_threads()},
            "versions": _run.versions(),
            "runs": rows,
        }
        print(dump_json(document), end="")
        return 0
    Table(
        f"Condition number of float32 matrices, {torch.get_num_threads()} threads, best of "
        f"{arguments.rounds} interleaved rounds; errors relative to a float64 SVD",
        [
            *("matrix", "size", "kappa", "svdvals, ms", "wellcond, ms", "faster"),
            *("error of kappa", "of sigma_1", "of svdvals' kappa"),
        ],
        [
            [
                row["matrix"],
                row["size"],
                number(row["condition_number"]),
                f"{1e3 * row['seconds_svdvals']:.3g}",
                f"{1e3 * row['seconds']:.3g}",
                f"{row['ratio']:.2f}",
                f"{row['error']:.1e}",
                f"{row['error_sigma_max']:.1e}",
                f"{row['error_svdvals']:.1e}",
            ]
            for row in rows
        ],
    ).print()
    return 0


def _measure(kind: str, m: int, n: int, rounds: int) -> dict[str, Any]:
    S = matrix(kind, m, n)
    exact = torch.linalg.svdvals(S.double())
    # What takes microseconds is timed in loops of milliseconds.
    loops = max(1, int(1e6 / (m * n * min(m, n) + 1e3)))
    ways: dict[str, Callable[[], Tensor]] = {
        "svdvals": lambda: torch.linalg.svdvals(S),
        "wellcond": lambda: wc.condition_number(S),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            for _ in range(loops):
                way()
            best[name] = min(best[name], (time.perf_counter() - started) / loops)
    theirs = torch.linalg.svdvals(S).double()
    layer = nn.Linear(n, m, bias=False)
    layer.weight = nn.Parameter(S)
    (finding,) = wc.audit(layer).findings
    kappa = float(wc.condition_number(S))
    truth = float(exact[0] / exact[-1]) if kind != "deficient" else float("inf")
    return {
        "matrix": kind,
        "size": f"{m}x{n}",
        "condition_number": kappa,
        "seconds_svdvals": best["svdvals"],
        "seconds": best["wellcond"],
        "ratio": best["svdvals"] / best["wellcond"],
        "error": _error(kappa, truth),
        "error_sigma_max": _error(finding.sigma_max, float(exact[0])),
        "error_svdvals": _error(float(theirs[0] / theirs[-1]), truth),
        "method": finding.method,
    }


def _error(number: float, truth: float) -> float:
    return 0.0 if number == truth else abs(number / truth - 1)
