"""A small language model at high learning rates: final loss, loss spikes, working rates.

After Wortsman et al. (arXiv 2309.14322), who reproduce instabilities of large transformers in small
ones at high learning rates: growing attention logits and loss spikes.
"""

from __future__ import annotations

import copy
import hashlib
import math
from functools import cached_property
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from wellcond_experiments import figures
from wellcond_experiments.attention import TextTransformer
from wellcond_experiments.early import EarlyLook
from wellcond_experiments.evidence import Column, Evidence, Verdict
from wellcond_experiments.grid import Cell, Measured, Setting, strengths_of
from wellcond_experiments.methods import (
    METHODS,
    condition_numbers,
    evaluation,
    largest,
    spectral_norms,
)
from wellcond_experiments.prediction import Case
from wellcond_experiments.settings.learning_rates import OFTEN
from wellcond_experiments.tables import Table

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
COMPARED = (
    *("none", "clipping", "warm-up", "weight-decay", "qk-norm", "orthogonal-init"),
    "spectral-norm-torch",
    *("upper-limit", "upper-limit-attention", "condition-limit", "isometry"),
)
PLACES, BATCH, STEPS = 64, 8, 800
JUMP, BEFORE = 0.5, 50
NEAR = 1.05  # a rate works if its loss is within this factor of the lowest loss of all
VALIDATION = 256  # number of pieces of text
LOOKS = 10  # measurements of σ₁ and the attention logits


class LossSpikes(Setting):
    name = "loss-spikes"
    help = "a small language model: which learning rates work, and does the loss spike?"
    protocol = (
        "Characters of the help texts that ship with Python (pydoc_data.topics); a transformer of "
        "two blocks, width 64, four heads and context 64; 800 steps of Adam with 8 sequences each, "
        "at four learning rates that decay linearly to a tenth; loss in nats per character on the "
        "last tenth of the text. A spike begins when the loss of a batch exceeds the median of the "
        "previous 50 by more than half a nat, and ends when it does not. A rate works if its loss "
        "is within 5 % of the lowest loss of all methods. The search chooses strengths by the mean "
        "over the rates, on the second last tenth of the text, which it does not train on. "
        "IsometryStep acts after every step, the limits are watched. Weight decay applies to "
        "matrices only. QK norm is LayerNorm of queries and keys; all blocks have LayerNorm before "
        "attention and MLP."
    )
    score = "quality"
    default_data = ""
    rate_is_chosen = False

    def __init__(self, data: str = "", quick: bool = False, seeds: int | None = None) -> None:
        super().__init__(data, quick, seeds)
        self.steps = 20 if quick else STEPS
        self.rates = (1e-3, 1e-2) if quick else RATES
        self.compared = ("none", "upper-limit") if quick else COMPARED
        self.methods = strengths_of(*self.compared) | {
            method: strengths
            for method, strengths in {
                "clipping": (0.1, 0.3, 1.0),
                "warm-up": (40.0, 100.0, 200.0, 400.0),
                "weight-decay": (0.01, 0.1, 0.3, 1.0),
                "spectral-norm-torch": (0.5, 1.0, 1.4, 2.0, 4.0),
                "upper-limit": (0.5, 1.0, 1.4, 2.0, 4.0),
                "upper-limit-attention": (0.5, 1.0, 1.4, 2.0, 4.0),
                "condition-limit": (1.2, 1.5, 2.0, 5.0, 20.0),
                "isometry": (0.03, 0.1, 0.5),
            }.items()
            if method in self.compared
        }

    def settings(self) -> dict[str, Any]:
        text = hashlib.sha256(self.text.numpy().tobytes()).hexdigest()[:12]
        return super().settings() | {
            "steps": self.steps,
            "rates": list(self.rates),
            "ways": list(self.compared),
            "text": text,
        }

    @cached_property
    def text(self) -> Tensor:
        """Returns the text as character indices; all non-ASCII characters share one index."""
        from pydoc_data.topics import topics

        whole = "\n".join(topics[name] for name in sorted(topics))
        kinds = {
            character: i for i, character in enumerate(sorted(filter(str.isascii, set(whole))))
        }
        return torch.tensor([kinds.get(character, len(kinds)) for character in whole])

    @property
    def characters(self) -> int:
        return int(self.text.max()) + 1

    def parts(self, search: bool) -> tuple[Tensor, Tensor]:
        """Returns training and test text. The search tests on the second last tenth."""
        tenth = len(self.text) // 10
        end = len(self.text) - tenth * search
        return self.text[: end - tenth], self.text[end - tenth : end]

    def run(self, cell: Cell) -> Measured:
        train, test = self.parts(cell.search)
        kind = OFTEN.get(cell.method, METHODS[cell.method])
        training = kind(
            lambda norm: TextTransformer(self.characters, PLACES, norm),
            cell.strength,
            cell.lr,
            cell.seed,
            decays=lambda parameter: parameter.ndim > 1,
        )
        model = training.model
        assert isinstance(model, TextTransformer)
        tested = pieces(test, range(0, len(test) - PLACES, len(test) // VALIDATION))
        source = torch.Generator().manual_seed(cell.seed)
        look = EarlyLook(model, self.steps)
        losses: list[float] = []
        curves: dict[str, list[float]] = {"norms": [], "logits": []}
        every = max(self.steps // LOOKS, 1)
        for step in range(self.steps):
            training.set_rate(cell.lr * (1 - 0.9 * step / self.steps))
            starts = torch.randint(len(train) - PLACES, (BATCH,), generator=source).tolist()
            loss = measure_loss(model, *pieces(train, starts))
            look(loss)
            losses.append(float(loss.detach()))
            if not training.step(loss):
                break
            if (step + 1) % every == 0:
                with evaluation(model):
                    curves["norms"].append(largest(spectral_norms(model).values()))
                    curves["logits"].append(model.largest_logit(tested[0][:BATCH]))
        finite = len(losses) == self.steps and math.isfinite(losses[-1])
        training.finish()
        model.eval()
        final = math.log(self.characters)  # a diverged model counts as guessing
        if finite:
            with torch.no_grad():
                final = float(measure_loss(model, *tested))
        curves["losses"] = [median(losses[i : i + 10]) for i in range(0, len(losses), 10)]
        metrics = {
            "quality": -final,
            "loss": final,
            "spikes": count_spikes(losses),
            "diverged": float(not finite),
            "sigma_max": largest(curves["norms"] or [math.nan]),
            "logit": largest(curves["logits"] or [math.nan]),
            "kappa_worst": largest(condition_numbers(model).values()),
        }
        return Measured(metrics | look.metrics, curves)

    def tables(self, evidence: Evidence) -> dict[str, Table]:
        found = average_rates(evidence)
        columns = [
            Column("loss", "mean over the rates, nats"),
            Column("best", "best rate"),
            *(Column(f"{lr:g}", f"at {lr:g}") for lr in self.rates),
            Column("working", f"working rates, of {len(self.rates)}"),
            Column("spikes", "spikes per run"),
            Column("cost", "CPU time"),
        ]
        high = max(self.rates)
        details = [
            Column("loss", "loss, nats"),
            Column("spikes", "spikes"),
            Column("diverged", "share of diverged runs"),
            Column("sigma_max", "largest σ₁", log=True),
            Column("logit", "largest attention logit", log=True),
            Column("kappa_worst", "largest κ", log=True),
        ]
        tables = {
            "loss": found.ranking("Loss on held-out text", columns, lower=True),
            "highest": evidence.ranking(
                f"At a learning rate of {high:g}", details, lower=True, lr=high
            ),
        }
        return {name: table.drop("lr") for name, table in tables.items()}

    def verdicts(self, evidence: Evidence) -> dict[str, Verdict]:
        found = average_rates(evidence)
        return {
            "language model, mean over rates, nats": found.verdict("loss", lower=True),
            "language model, best rate, nats": found.verdict("best", lower=True),
        }

    def early(self, evidence: Evidence) -> list[Case]:
        return [Case("language model", evidence.runs, self.score)]

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        found = average_rates(evidence)
        bands = {m: found.band("loss", method=m) for m in found.methods()}
        drawing, (left, right) = figures.figure(columns=2, width=6.0, height=4.2)
        shown = figures.select_lines({method: -band.mean for method, band in bands.items()})
        for panel, metric, middle in ((left, "loss", "mean"), (right, "logit", "median")):
            figures.draw_rates(panel, evidence.runs, shown, metric, middle)
            panel.set_xlabel("learning rate")
        left.set_ylabel("loss, nats per character")
        left.legend(fontsize=8, frameon=False)
        right.set_yscale("log")
        right.set_ylabel("largest attention logit")
        return {self.name: drawing}


def average_rates(evidence: Evidence) -> Evidence:
    """Returns one row per method and seed, over all learning rates.

    Columns: loss and spikes are means over the rates; best is the loss at the best rate of the
    method (mean over the seeds); working is the number of rates within 5 % of the lowest mean loss
    of all methods; cost is the CPU time relative to the baseline; plus one column per rate.
    """
    runs = evidence.runs
    losses = runs.pivot_table("loss", ["method", "seed"], "lr", sort=False)
    means = losses.groupby("method").mean()
    best = means.idxmin(axis=1)
    groups = runs.groupby(["method", "seed"], sort=False)
    alone = runs[runs["method"] == "none"]["cpu_seconds"].mean()
    found = copy.copy(evidence)
    found.runs = (
        losses.rename(columns=lambda lr: f"{lr:g}")
        .assign(
            loss=losses.mean(axis=1),
            best=[losses.loc[key, best[key[0]]] for key in losses.index],
            working=losses.le(NEAR * means.min().min()).sum(axis=1),
            spikes=groups["spikes"].mean(),
            cost=groups["cpu_seconds"].mean() / alone,
        )
        .reset_index()
    )
    return found


def pieces(text: Tensor, starts: Any) -> tuple[Tensor, Tensor]:
    """Returns pieces of a text, and the same pieces shifted by one character."""
    x = torch.stack([text[start : start + PLACES + 1] for start in starts])
    return x[:, :-1], x[:, 1:]


def measure_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Returns the loss in nats per character."""
    return cross_entropy(model(x).flatten(0, 1), y.flatten())


def count_spikes(losses: list[float]) -> float:
    """Counts the spikes of the loss; nan losses are skipped.

    A spike begins when a loss exceeds the median of the previous `BEFORE` losses (at least ten) by
    `JUMP`, and ends when a loss does not.
    """
    count, inside = 0, False
    for step, loss in enumerate(losses):
        if step < 10 or math.isnan(loss):
            continue
        above = loss > median(losses[max(step - BEFORE, 0) : step]) + JUMP
        count += above and not inside
        inside = above
    return float(count)
