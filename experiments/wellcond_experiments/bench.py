"""Benchmarks: how close a regularised training comes to an exact SVD, and what strengths do.

`fidelity` trains with the warm subspace
and with an exact decomposition in every step, from the same seed, and compares condition numbers.
`strength` trains over a grid of strengths and hard limits: the way from a condition number to one.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn

import wellcond as wc
from wellcond.text import dump_json
from wellcond_experiments import _run, bench_audit, bench_limit, bench_soak, bench_step
from wellcond_experiments.data import Images, load
from wellcond_experiments.methods import seeded
from wellcond_experiments.tables import Table

FIRST = "0.weight"
SIDE = 28  # of the images, to which digits are scaled


def configure(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    bench_step.configure(benchmarks)
    bench_limit.configure(benchmarks)
    fidelity = benchmarks.add_parser(
        "fidelity",
        help="the warm subspace against an exact SVD in every step",
        description="Condition number of the first layer of a 784-512-10 net after training, with "
        "the warm subspace and with an exact decomposition in every step.",
        epilog="example: wellcond bench fidelity --block 16,32 --every 5,10,20",
    )
    fidelity.add_argument("--data", default="digits", help="digits (scaled to 28x28), mnist, PATH")
    fidelity.add_argument("--epochs", type=_run.positive, default=10)
    fidelity.add_argument("--seeds", type=_run.positive, default=1)
    fidelity.add_argument("--block", type=_numbers, default=[32], help="widths, as 16,32")
    fidelity.add_argument("--every", type=_numbers, default=[10], help="for attach, as 5,10,20")
    fidelity.set_defaults(run=run_fidelity)
    strength = benchmarks.add_parser(
        "strength",
        help="which strength leads to which condition number",
        description="Condition number of the first layer of a 784-512-10 net and accuracy after "
        "training, over a grid of strengths.",
        epilog="example: wellcond bench strength --data mnist --epochs 3",
    )
    strength.add_argument("--data", default="digits", help="digits (scaled to 28x28), mnist, PATH")
    strength.add_argument("--epochs", type=_run.positive, default=10)
    strength.set_defaults(run=run_strength)
    for benchmark in (fidelity, strength):
        _run.add_output(benchmark)
    bench_audit.configure(benchmarks)
    bench_soak.configure(benchmarks)


def _numbers(text: str) -> list[int]:
    return [_run.positive(part) for part in text.split(",")]


# --- fidelity -------------------------------------------------------------------------------------


def exact_gradient(S: Tensor) -> Tensor:
    """`wellcond.condition_penalty_gradient` by eigenvectors of the float64 Gram matrix: exact to
    rounding, and faster than an SVD."""
    wide = S.double() if S.shape[0] <= S.shape[1] else S.double().mT
    u = torch.linalg.eigh(wide @ wide.mT).eigenvectors[:, -1:]
    gradient: Tensor = u @ (u.mT @ wide) - wide / len(wide)
    return (gradient if S.shape[0] <= S.shape[1] else gradient.mT).to(S.dtype)


def run_fidelity(arguments: argparse.Namespace) -> int:
    _run.apply_threads(arguments)
    images = _scaled(load(arguments.data), SIDE)
    gradient = [("gradient", s, "exact", 0, 0) for s in (0.1, 1.0)]
    gradient += [("gradient", s, "warm", b, 0) for s in (0.1, 1.0) for b in arguments.block]
    proximal = [("proximal", s, "exact", 0, 1) for s in (10.0, 100.0)]
    proximal += [
        ("proximal", s, "warm", b, every)
        for s in (10.0, 100.0)
        for b in arguments.block
        for every in arguments.every
    ]
    plan = [(*p, seed) for p in gradient + proximal for seed in range(arguments.seeds)]
    runs: list[dict[str, Any]] = []
    with _run.progress(len(plan), "bench fidelity") as advance:
        for how, strength, vectors, block, every, seed in plan:
            kappa, accuracy, shortened = _train(
                images, arguments.epochs, how, strength, vectors == "exact", block, every, seed
            )
            runs.append(
                {
                    "how": how,
                    "strength": strength,
                    "vectors": vectors,
                    "block": block,
                    "every": every,
                    "seed": seed,
                    "condition_number": kappa,
                    "accuracy": accuracy,
                    "shortened_steps": shortened,
                }
            )
            advance(f"{how} {strength:g} {vectors}")
    exact = {
        (r["how"], r["strength"], r["seed"]): r["condition_number"]
        for r in runs
        if r["vectors"] == "exact"
    }
    for run in runs:
        run["ratio"] = run["condition_number"] / exact[run["how"], run["strength"], run["seed"]]
    document = {
        "benchmark": "fidelity",
        "settings": {"data": images.name, "epochs": arguments.epochs, "lr": 1e-3, "batch": 32},
        "versions": _run.versions(),
        "runs": runs,
    }
    if arguments.json:
        print(dump_json(document), end="")
        return 0
    Table(
        f"Condition number of layer 1 after {arguments.epochs} epochs of Adam 1e-3, batch 32, "
        f"784-512-10 sigmoid on {images.name}; ratio to an exact decomposition in every step",
        [
            "way",
            "strength",
            "vectors",
            "every",
            "seed",
            "kappa",
            "ratio",
            "accuracy, %",
            "shortened",
        ],
        [
            [
                run["how"],
                f"{run['strength']:g}",
                "exact" if run["vectors"] == "exact" else f"block {run['block']}",
                str(run["every"] or 1),
                str(run["seed"]),
                f"{run['condition_number']:.2f}",
                f"{run['ratio']:.3f}",
                f"{run['accuracy']:.1f}",
                str(run["shortened_steps"]),
            ]
            for run in runs
        ],
    ).print()
    return 0


GRID = {"gradient": (1e-3, 1e-2, 0.1, 1.0, 10.0), "proximal": (1.0, 10.0, 100.0, 1e3)}
LIMITS = (30.0, 10.0, 3.0)


def run_strength(arguments: argparse.Namespace) -> int:
    _run.apply_threads(arguments)
    images = _scaled(load(arguments.data), SIDE)
    plan = [(how, s) for how, grid in GRID.items() for s in grid]
    plan += [("limit", limit) for limit in LIMITS]

    def timed(how: str, strength: float, epochs: int = arguments.epochs) -> dict[str, Any]:
        started = time.perf_counter()
        kappa, accuracy, shortened = _train(
            images, epochs, how, strength, False, block=32, every=None, seed=0
        )
        return {
            "how": how,
            "strength": strength,
            "condition_number": kappa,
            "accuracy": accuracy,
            "shortened_steps": shortened,
            "seconds": time.perf_counter() - started,
        }

    runs: list[dict[str, Any]] = []
    timed("none", 0.0, epochs=1)  # so that no row pays for what is done once
    with _run.progress(len(plan), "bench strength") as advance:
        for how, strength in plan:
            # In turn with a training without a penalty: other work on the machine slows both.
            base = timed("none", 0.0)
            run = timed(how, strength)
            runs += [run] if runs else [base, run]
            run["cost"] = run["seconds"] / base["seconds"]
            advance(f"{how} {strength:g}")
    runs[0]["cost"] = 1.0
    document = {
        "benchmark": "strength",
        "settings": {"data": images.name, "epochs": arguments.epochs, "lr": 1e-3, "batch": 32},
        "versions": _run.versions(),
        "runs": runs,
    }
    if arguments.json:
        print(dump_json(document), end="")
        return 0
    Table(
        f"Condition number of layer 1 after {arguments.epochs} epochs of Adam 1e-3, batch 32, "
        f"784-512-10 sigmoid on {images.name}; proximal and limit: attach; cost: seconds as a "
        "multiple of those of a training without a penalty just before",
        ["way", "strength or limit", "kappa", "accuracy, %", "shortened", "cost"],
        [
            [
                run["how"],
                f"{run['strength']:g}",
                f"{run['condition_number']:.3g}",
                f"{run['accuracy']:.1f}",
                str(run["shortened_steps"]),
                f"{run['cost']:.1f}",
            ]
            for run in runs
        ],
    ).print()
    return 0


def _scaled(images: Images, side: int) -> Images:
    """The images in another size, by bilinear interpolation."""
    if images.side == side:
        return images

    def scaled(x: Tensor) -> Tensor:
        square = x.reshape(-1, 1, images.side, images.side)
        return nn.functional.interpolate(square, size=(side, side), mode="bilinear").flatten(1)

    return Images(
        f"{images.name} scaled to {side}x{side}",
        side,
        scaled(images.x_train),
        images.y_train,
        scaled(images.x_test),
        images.y_test,
    )


def _train(
    images: Images,
    epochs: int,
    how: str,
    strength: float,
    exact: bool,
    block: int,
    every: int | None,
    seed: int,
) -> tuple[float, float, int]:
    """kappa of the first layer, accuracy in per cent, shortened steps.

    The strength is that of a gradient, of a proximal step, or the limit of a hard one.
    """
    model = seeded(
        lambda: nn.Sequential(nn.Linear(images.pixels, 512), nn.Sigmoid(), nn.Linear(512, 10)), seed
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    W = model.get_parameter(FIRST)
    reg = None
    if not exact and how != "none":
        penalty = wc.ConditionLimit(strength) if how == "limit" else wc.ConditionPenalty(strength)
        reg = wc.Regularizer(model, {FIRST: penalty, "*": None}, block_size=block)
        if how != "gradient":
            reg.attach(optimizer, every=every)
    x, y = images.normalised(images.x_train), images.y_train
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for indices in torch.split(torch.randperm(len(x), generator=order), 32):
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(model(x[indices]), y[indices]))
            if how == "gradient" and reg is not None:
                reg.add_gradients()
            elif how == "gradient" and W.grad is not None:
                W.grad.add_(exact_gradient(W.detach()), alpha=strength)
            optimizer.step()
            if how == "proximal" and exact:
                with torch.no_grad():
                    W.copy_(wc.proximal_step(W, 1e-3 * strength))
    shortened = 0
    if reg is not None:
        reg.detach()
        reg.enforce()  # as before every checkpoint
        shortened = reg.measure()[FIRST].shortened_steps
    with torch.no_grad():
        right = model(images.normalised(images.x_test)).argmax(1) == images.y_test
    return float(wc.condition_number(W)), 100 * float(right.double().mean()), shortened
