"""Time and error of measuring a matrix, compared with `torch.linalg.svdvals`.

Both are timed alternately, best of several rounds. The reference is an SVD in float64.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import wellcond as wc
from wellcond_experiments.benchmark import Benchmark, count, option
from wellcond_experiments.command import Advance

SIZES = (
    "1x1,8x8,32x32,64x64,128x128,256x256,512x512,1024x1024,2048x2048,4096x4096,"
    "64x4096,2048x784,30000x512"
)
KINDS = ("gaussian", "kappa=1e5", "deficient")
# Making a matrix with a prescribed spectrum requires two QR factorisations.
_PRESCRIBED = 2048


@dataclass(frozen=True)
class Audit(Benchmark):
    name = "audit"
    help = "time and error of measuring a weight"
    description = (
        "Condition number of float32 matrices: alternating times of wellcond and of "
        "torch.linalg.svdvals on the same tensor, and the relative errors of both."
    )
    example = "--sizes 1024x1024,4096x4096 --rounds 3"
    columns: ClassVar = {
        "matrix": ("matrix", ""),
        "size": ("size", ""),
        "condition_number": ("kappa", ".3g"),
        "seconds_svdvals": ("svdvals, s", ".3g"),
        "seconds": ("wellcond, s", ".3g"),
        "ratio": ("speed-up", ".2f"),
        "error": ("error of kappa", ".1e"),
        "error_sigma_max": ("of sigma_1", ".1e"),
        "error_svdvals": ("of svdvals' kappa", ".1e"),
    }

    sizes: str = option(SIZES, "such as 64x64,4096x4096")
    rounds: int = count(3, "number of rounds; the best counts")

    @cached_property
    def plan(self) -> list[tuple[str, int, int]]:
        """Returns the kind and the size of every matrix."""
        sizes = [parse_size(part) for part in self.sizes.split(",")]
        return [
            (kind, m, n)
            for (m, n), kind in itertools.product(sizes, KINDS)
            if kind == "gaussian" or (min(m, n) >= 64 and max(m, n) <= _PRESCRIBED)
        ]

    @property
    def total(self) -> int:
        return len(self.plan)

    def measure(self, advance: Advance) -> dict[str, Any]:
        runs = []
        for kind, m, n in self.plan:
            runs.append(measure_matrix(kind, m, n, self.rounds))
            advance(f"{kind} {m}x{n}")
        settings = {"rounds": self.rounds, "threads": torch.get_num_threads()}
        return {"settings": settings, "runs": runs}

    def title(self, document: dict[str, Any]) -> str:
        return (
            f"Condition number of float32 matrices, {document['settings']['threads']} threads, "
            f"best of {self.rounds} interleaved rounds; errors relative to a float64 SVD"
        )


def parse_size(text: str) -> tuple[int, int]:
    """Parses "64x4096" into rows and columns."""
    m, cross, n = text.partition("x")
    if not (cross and m.isdigit() and n.isdigit() and int(m) and int(n)):
        raise ValueError(f"--sizes must be of the form 64x64,4096x4096, got {text!r}.")
    return int(m), int(n)


def matrix(kind: str, m: int, n: int) -> Tensor:
    """Makes a float32 matrix: Gaussian, with geometric singular values, or of half rank."""
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


def measure_matrix(kind: str, m: int, n: int, rounds: int) -> dict[str, Any]:
    """Measures seconds and errors for one matrix."""
    S = matrix(kind, m, n)
    exact = torch.linalg.svdvals(S.double())
    # Calls of microseconds are timed in loops of milliseconds.
    loops = max(1, int(1e6 / (m * n * min(m, n) + 1e3)))
    functions = {"svdvals": torch.linalg.svdvals, "wellcond": wc.condition_number}
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            started = time.perf_counter()
            for _ in range(loops):
                function(S)
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
        "error": relative_error(kappa, truth),
        "error_sigma_max": relative_error(finding.sigma_max, float(exact[0])),
        "error_svdvals": relative_error(float(theirs[0] / theirs[-1]), truth),
        "method": finding.method,
    }


def relative_error(value: float, truth: float) -> float:
    return 0.0 if value == truth else abs(value / truth - 1)
