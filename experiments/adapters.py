"""Usual values of `added` in the audit of an adapter: good and harmed LoRAs of small networks.

    python experiments/adapters.py --data mnist.npz    train and measure: results/adapters.json
    python experiments/adapters.py --table             print the table of docs/audit.md

Needs peft==0.21.2 and transformers==5.24.0, and about ten minutes on one core. A small GPT-2 learns
the characters of Python's documentation, a perceptron learns upright digits. LoRAs of three ranks
are then tuned, at rates from too small to too high, to Python source code and to digits rotated by
90 degrees. Results contain numbers, not weights.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import inspect
import json
import math
import platform
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import wellcond as wc

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "adapters.json"
RANKS, RATES = (2, 8, 32), (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
# Sizes, steps, rates and the two shares below were chosen on seeds 0 and 1.
SEEDS = (2, 3, 4)
CODE = "argparse ast _pydecimal doctest inspect pickletools subprocess tarfile typing".split()  # noqa: SIM905
CONTEXT, BATCH = 64, 8
# Shares of the largest gain.
GOOD, HARMED = 0.9, 0.5
VERDICTS = ("good", "harmed")
# Losses on the first data and on the data of the LoRA, and of a constant guess. Then medians and
# maxima over the weights of the values in the audit.
COLUMNS = (
    *("task", "seed", "rank", "rate", "constant", "first_before", "before", "first_after", "after"),
    *("added", "added_max", "new", "new_max", "delta", "delta_max"),
    *("directions", "directions_max"),
)


@dataclass(frozen=True)
class Task:
    """A network, and its loss on batches of two sets of data.

    Attributes:
        make: makes a new network.
        adapted: names of the modules that a LoRA changes.
        draw: losses on a training batch, of the first and of the second data.
        validate: losses on held-out data of both.
        steps: number of steps of the training from scratch, and of each LoRA.
        lr: learning rate of the training from scratch.
        constant: the loss of the best constant guess on the second data.
    """

    make: Callable[[], nn.Module]
    adapted: Sequence[str]
    draw: Sequence[Callable[[nn.Module, torch.Generator], Tensor]]
    validate: Sequence[Callable[[nn.Module], Tensor]]
    steps: tuple[int, int]
    lr: float
    constant: float


# --- text -----------------------------------------------------------------------------------------


def _characters(text: str) -> Tensor:
    return torch.tensor([min(ord(one), 127) for one in text])


def _loss_of_text(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _windows(data: Tensor, starts: Tensor) -> Tensor:
    return data[starts[:, None] + torch.arange(CONTEXT + 1)]


def _draw_text(data: Tensor, model: nn.Module, source: torch.Generator) -> Tensor:
    starts = torch.randint(len(data) - CONTEXT, (BATCH,), generator=source)
    return _loss_of_text(model, _windows(data, starts))


def _validate_text(data: Tensor, model: nn.Module) -> Tensor:
    starts = torch.linspace(0, len(data) - CONTEXT - 1, 128).long()
    return _loss_of_text(model, _windows(data, starts))


def make_text() -> Task:
    from pydoc_data.topics import topics

    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=128,
        n_positions=CONTEXT,
        n_embd=64,
        n_layer=2,
        n_head=4,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    code = "".join(inspect.getsource(importlib.import_module(name)) for name in CODE)
    both = [_characters(text) for text in ("".join(topics.values()), code)]
    parts = [(data[: 9 * len(data) // 10], data[9 * len(data) // 10 :]) for data in both]
    shares = both[1].bincount() / len(both[1])
    return Task(
        lambda: GPT2LMHeadModel(config),
        ["c_attn", "c_proj", "c_fc"],
        [partial(_draw_text, train) for train, _ in parts],
        [partial(_validate_text, rest) for _, rest in parts],
        (2000, 120),
        lr=3e-3,
        constant=float(torch.special.entr(shares[shares > 0]).sum()),
    )


# --- digits ---------------------------------------------------------------------------------------


def _loss_of_images(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def _draw_images(x: Tensor, y: Tensor, model: nn.Module, source: torch.Generator) -> Tensor:
    rows = torch.randint(len(x), (64,), generator=source)
    return _loss_of_images(model, x[rows], y[rows])


def make_digits(data: Path) -> Task:
    from wellcond_experiments.data import load

    images = load(str(data))
    x = images.normalise(images.x_train)
    turned = x.view(-1, 28, 28).rot90(1, (1, 2)).flatten(1)
    y = images.y_train
    first, then, rest = slice(0, 40_000), slice(40_000, 50_000), slice(50_000, 60_000)
    return Task(
        lambda: nn.Sequential(
            *(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()),
            *(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)),
        ),
        ["0", "2", "4"],
        [partial(_draw_images, x[first], y[first]), partial(_draw_images, turned[then], y[then])],
        [partial(_loss_of_images, x=one[rest], y=y[rest]) for one in (x, turned)],
        (2000, 500),
        lr=1e-3,
        constant=math.log(10),
    )


# --- train and measure ----------------------------------------------------------------------------


def train(model: nn.Module, draw: Callable[..., Tensor], steps: int, lr: float, seed: int) -> None:
    """Trains with AdamW; the rate rises over a tenth of the steps and falls to zero."""
    source = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, steps, pct_start=0.1, anneal_strategy="linear", cycle_momentum=False
    )
    for _ in range(steps):
        optimizer.zero_grad()
        draw(model, source).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rate.step()


@torch.no_grad()
def _validate(model: nn.Module, task: Task) -> list[float]:
    return [float(validate(model)) for validate in task.validate]


def tune(task: Task, base: nn.Module, rank: int, lr: float, seed: int) -> list[float]:
    """Tunes a LoRA; returns the losses, and medians and maxima of its audit over the weights."""
    import peft

    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(task.adapted),
        fan_in_fan_out=any(type(one).__name__ == "Conv1D" for one in base.modules()),
    )
    torch.manual_seed(seed)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    train(model, task.draw[1], task.steps[1], lr, seed + 1000)
    rows = [one for one in wc.audit(model).findings if one.added_of]
    numbers = _validate(model, task)
    for values in (
        [one.added_share for one in rows],
        [one.added_new / one.added_of for one in rows],
        [one.delta_share for one in rows],
        [one.delta_stable_rank for one in rows],
    ):
        numbers += [statistics.median(values), max(values)] if rows else [math.nan, math.nan]
    return numbers


def measure(job: tuple[str, int, Path]) -> list[list[Any]]:
    """Returns a row by COLUMNS per rank and rate, for a task name, a seed and the images."""
    name, seed, data = job
    torch.set_num_threads(1)
    task = make_text() if name == "text" else make_digits(data)
    torch.manual_seed(seed)
    base = task.make()
    train(base, task.draw[0], task.steps[0], task.lr, seed)
    before = [task.constant, *_validate(base, task)]
    rows = [
        [name, seed, rank, lr, *map(_short, [*before, *tune(task, base, rank, lr, seed)])]
        for rank in RANKS
        for lr in RATES
    ]
    for row in rows:
        print(*row, flush=True)
    return rows


def _short(number: float) -> float | None:
    return float(f"{number:.4g}") if math.isfinite(number) else None


# --- evaluation -----------------------------------------------------------------------------------

Run = dict[str, Any]  # a row of the results by COLUMNS; `judge` adds "gain" and "verdict"


def judge(results: dict[str, Any]) -> list[Run]:
    """Returns the runs with their gain and verdict: "good", "harmed", "too small" or "between".

    The gain is relative to that of the best rate of the same task, seed and rank. It starts from
    the loss before tuning, or from the loss of a constant guess if that is less.
    """
    runs: list[Run] = [dict(zip(results["columns"], row, strict=True)) for row in results["runs"]]
    groups: defaultdict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in runs:
        groups[run["task"], run["seed"], run["rank"]].append(run)
    for group in groups.values():
        best = min(group, key=_loss)
        start = min(best["before"], best["constant"])
        for run in group:
            run["gain"] = (start - _loss(run)) / (start - best["after"])
            run["above"] = run["rate"] >= best["rate"]
            if run["gain"] >= GOOD:
                run["verdict"] = "good"
            elif not run["above"]:
                run["verdict"] = "too small"
            else:
                run["verdict"] = "harmed" if run["gain"] < HARMED else "between"
    return runs


def _loss(run: Run) -> float:
    return math.inf if run["after"] is None else run["after"]


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Returns Spearman's correlation of numbers without ties, except by rounding."""
    ranks = np.argsort(np.argsort([x, y], axis=1, kind="stable"), axis=1, kind="stable")
    return float(np.corrcoef(ranks)[0, 1])


def share_above(runs: Sequence[Run], key: str, alike: Sequence[str] = ()) -> float:
    """Returns the share of pairs of a good and a harmed run in which the harmed value is larger.

    Args:
        runs: the runs of `judge`.
        key: the column of the value.
        alike: restricts the pairs to those that agree in these columns.
    """
    good, harmed = ([run for run in runs if run["verdict"] == one] for one in VERDICTS)
    return statistics.fmean(
        float(bad[key] > one[key])
        for one in good
        for bad in harmed
        if all(one[column] == bad[column] for column in alike)
    )


def find_facts(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Computes whether medians of "added" and ‖Δ‖/‖W‖ separate good from harmed runs.

    Returns:
        Per column: the share of all pairs, and of pairs of one task and rank, in which the harmed
        run has the larger value; the rank correlation with the missing gain, over the runs at the
        best rate and above; the largest value of a good run and the smallest of a harmed run.
    """
    runs = [run for run in judge(results) if run["added"] is not None]
    above = [run for run in runs if run["above"]]
    missing = [-run["gain"] for run in above]
    return {
        key: {
            "pairs": share_above(runs, key),
            "pairs_alike": share_above(runs, key, ("task", "rank")),
            "correlation": rank_correlation([run[key] for run in above], missing),
            "good": max(run[key] for run in runs if run["verdict"] == "good"),
            "harmed": min(run[key] for run in runs if run["verdict"] == "harmed"),
        }
        for key in ("added", "added_max", "delta", "delta_max", "directions")
    }


def make_table(results: dict[str, Any]) -> str:
    """Returns the table of docs/audit.md: ranges over good and harmed runs per task and rank."""
    runs = judge(results)
    lines = [
        "| adapters | good: n | added | ‖Δ‖/‖W‖ | harmed: n | added | ‖Δ‖/‖W‖ |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, rank in dict.fromkeys((run["task"], run["rank"]) for run in runs):
        cells = [f"{task}, rank {rank}"]
        for verdict in VERDICTS:
            some = [
                run
                for run in runs
                if (run["task"], run["rank"], run["verdict"]) == (task, rank, verdict)
            ]
            cells += [str(len(some)), *(_range(some, key) for key in ("added", "delta"))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _range(runs: Sequence[Run], key: str) -> str:
    """Formats the smallest and the largest value in per cent."""
    numbers = [run[key] for run in runs if run[key] is not None]
    ends = (min(numbers), max(numbers)) if numbers else ()
    return " to ".join(dict.fromkeys(map(percent, ends))) + " %" if ends else "-"


def percent(share: float) -> str:
    """Formats a share in per cent with two digits: "0", "12" or "1,200"."""
    return f"{round(float(f'{100 * share:.2g}')):,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="mnist.npz")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    parser.add_argument("--table", action="store_true", help="print the table and derived numbers")
    options = parser.parse_args()
    if options.table:
        results = json.loads(RESULTS.read_text())
        print(make_table(results))
        print(json.dumps(find_facts(results), indent=1))
        return
    if options.data is None:
        parser.error("the digits need --data mnist.npz")
    jobs = [(name, seed, options.data) for seed in SEEDS for name in ("text", "digits")]
    with ProcessPoolExecutor(options.jobs) as pool:
        runs = [row for rows in pool.map(measure, jobs) for row in rows]
    results = {
        "wellcond": wc.__version__,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "python": platform.python_version(),
        "columns": COLUMNS,
        "runs": runs,
    }
    RESULTS.write_text(json.dumps(results, separators=(",", ":")).replace("],[", "],\n[") + "\n")


if __name__ == "__main__":
    main()
