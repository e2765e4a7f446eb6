"""A small transformer on images: which learning rates of Adam work, and which weights to limit?"""

from __future__ import annotations

from typing import Any

from torch import nn

from wellcond_experiments import figures
from wellcond_experiments.attention import ImageTransformer
from wellcond_experiments.evidence import Evidence
from wellcond_experiments.grid import strengths_of
from wellcond_experiments.prediction import Case
from wellcond_experiments.settings.learning_rates import (
    LearningRates,
    average_rates,
)

CASE = "transformer"
COMPARED = (
    *("none", "warm-up", "weight-decay", "clipping", "layer-norm", "orthogonal-init"),
    *("spectral-norm-torch", "condition", "isometry"),
    *("condition-limit", "upper-limit", "upper-limit-attention", "upper-limit-blocks"),
)


class Transformer(LearningRates):
    name = "transformer"
    help = "a small transformer: which learning rates work, and which weights to limit?"
    protocol = (
        "One epoch of 12,800 images of MNIST, batch 64, Adam at five constant learning rates: a "
        "transformer of two blocks and width 64 over 16 patches of the image; accuracy on the test "
        "images. Weight decay applies to matrices only. IsometryStep acts after every step, "
        "ConditionPenalty every ten steps, the limits are watched. The method LayerNorm adds "
        "LayerNorm to queries and keys; all blocks have LayerNorm before attention and MLP. The "
        "search chooses strengths by the mean over the rates. Because the trainings are short, "
        "this mean favours methods that learn fast at the lowest rate."
    )

    def __init__(self, data: str = "", quick: bool = False, seeds: int | None = None) -> None:
        super().__init__(data, quick, seeds)
        self.compared = ("none", "upper-limit-attention") if quick else COMPARED
        self.cases = self.searched_cases = (CASE,)
        self.depths = ()

    def strengths(self, case: str) -> dict[str, tuple[float, ...]]:
        strengths = strengths_of(*self.compared)
        if "weight-decay" in strengths:
            strengths["weight-decay"] = (0.01, 0.1, 0.3, 1.0)
        return strengths

    def gain(self, case: str) -> float:
        return 1.0

    def build(self, case: str, norm: bool) -> nn.Module:
        return ImageTransformer(self.images.side, norm)

    def early(self, evidence: Evidence) -> list[Case]:
        return [Case("transformer on images", evidence.runs, self.score)]

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        found = average_rates(evidence)
        bands = {m: found.band("accuracy", method=m) for m in found.methods()}
        drawing, (left, right) = figures.figure(columns=2, width=6.0, height=4.4)
        figures.draw_bands(left, list(bands.items()), {m: figures.label(m) for m in bands})
        left.set_xlabel("accuracy, mean over the learning rates, %")
        shown = figures.select_lines({method: band.mean for method, band in bands.items()})
        figures.draw_rates(right, evidence.runs, shown, "accuracy")
        right.set_ylim(0, 100)
        right.set_xlabel("learning rate")
        right.set_ylabel("accuracy, %")
        right.legend(fontsize=8, frameon=False)
        return {self.name: drawing}
