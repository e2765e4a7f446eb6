"""A small language model at high learning rates: final loss, loss spikes, rates that work.

After Wortsman et al. (arXiv 2309.14322), who find the instabilities of large transformers in small
ones at high learning rates: attention logits that grow, and a loss that jumps.
"""

from __future__ import annotations

import hashlib
import math
from functools import cached_property
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from wellcond_experiments.attention import TextTransformer
from wellcond_experiments.early import EarlyLook
from wellcond_experiments.evidence import Evidence
from wellcond_experiments.grid import Cell, Measured, Setting, strengths_of
from wellcond_experiments.methods import (
    METHODS,
    IsometryStep,
    condition_numbers,
    evaluation,
    largest,
    spectral_norms,
)
from wellcond_experiments.tables import Table

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
COMPARED = (
    *("none", "clipping", "warm-up", "weight-decay", "qk-norm", "spectral-norm-torch"),
    *("upper-limit", "upper-limit-attention", "condition-limit", "isometry"),
)
PLACES, BATCH, STEPS = 64, 8, 800
JUMP, BEFORE = 0.5, 50
NEAR = 1.05  # times the lowest loss of all: a rate works
VALIDATION = 256  # pieces of the text
LOOKS = 10  # at σ₁ and the attention logits


class IsometryEveryStep(IsometryStep):
    """At a high rate ten steps lead too far from an isometry to come back."""

    every = 1


class LossSpikes(Setting):
    name = "loss-spikes"
    help = "a small language model: which learning rates work, and where does the loss jump?"
    protocol = (
        "Characters of the help texts that ship with Python (pydoc_data.topics); a transformer of "
        "two blocks, width 64, four heads and 64 places; 800 steps of Adam with 8 pieces each, "
        "at four learning rates that fall linearly to a tenth; loss in nats per character on the "
        "last tenth of the text. A spike begins where the loss of a batch lies more than half a "
        "nat above the median of the 50 before it, and ends where it no longer does. A rate works "
        "that comes within 5 % of the lowest loss of all methods. Strengths by the mean over the "
        "rates on the tenth before the last, which the search does not train on. IsometryStep "
        "acts after every step, the limits are watched. Decay on matrices only. QK norm is "
        "LayerNorm of queries and keys; all blocks have LayerNorm before attention and MLP."
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
                "warm-up": (40.0, 100.0, 200.0),
                "weight-decay": (0.01, 0.1, 1.0),
                "spectral-norm-torch": (0.5, 1.0, 2.0, 4.0),
                "upper-limit": (0.5, 1.0, 2.0, 4.0),
                "upper-limit-attention": (0.5, 1.0, 2.0, 4.0),
                "condition-limit": (2.0, 5.0, 20.0),
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
        """The characters as numbers; those outside of ASCII are one."""
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
        """For training and for testing: in the search the tenth before the last is tested."""
        tenth = len(self.text) // 10
        end = len(self.text) - tenth * search
        return self.text[: end - tenth], self.text[end - tenth : end]

    def run(self, cell: Cell) -> Measured:
        train, test = self.parts(cell.search)
        kind = IsometryEveryStep if cell.method == "isometry" else METHODS[cell.method]
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
        curves: dict[str, list[float]] = {"sigma_max": [], "logit": []}
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
                    curves["sigma_max"].append(largest(spectral_norms(model).values()))
                    curves["logit"].append(model.largest_logit(tested[0][:BATCH]))
        finite = len(losses) == self.steps and math.isfinite(losses[-1])
        training.finish()
        model.eval()
        final = math.log(self.characters)  # one that has diverged guesses
        if finite:
            with torch.no_grad():
                final = float(measure_loss(model, *tested))
        curves["losses"] = [median(losses[i : i + 10]) for i in range(0, len(losses), 10)]
        metrics = {
            "quality": -final,
            "loss": final,
            "spikes": count_spikes(losses),
            "diverged": float(not finite),
            "sigma_max": largest(curves["sigma_max"] or [math.nan]),
            "logit": largest(curves["logit"] or [math.nan]),
            "kappa_worst": largest(condition_numbers(model).values()),
        }
        return Measured(metrics | look.metrics, curves)

    def tables(self, evidence: Evidence) -> dict[str, Table]:
        return {}

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        return {}


def pieces(text: Tensor, starts: Any) -> tuple[Tensor, Tensor]:
    """Pieces of a text, and the same one character on."""
    x = torch.stack([text[start : start + PLACES + 1] for start in starts])
    return x[:, :-1], x[:, 1:]


def measure_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Nats per character."""
    return cross_entropy(model(x).flatten(0, 1), y.flatten())


def count_spikes(losses: list[float]) -> float:
    """How often the loss jumps; a loss that is no number ends the count.

    A spike begins where a loss exceeds by `JUMP` the median of the `BEFORE` before it (of all, if
    there are fewer, at least ten), and ends where one no longer does.
    """
    count, inside = 0, False
    for step, loss in enumerate(losses):
        if step < 10 or math.isnan(loss):
            continue
        above = loss > median(losses[max(step - BEFORE, 0) : step]) + JUMP
        count += above and not inside
        inside = above
    return float(count)
