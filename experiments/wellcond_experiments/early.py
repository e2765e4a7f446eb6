"""Measures a training after 10 % of its steps, for comparison with its final score."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wellcond_experiments.methods import evaluation, largest, matrices

PART = 10  # the measurement is taken after 1/PART of the steps
QUANTITIES = {
    "early_kappa": "largest κ",
    "early_kappa_growth": "largest growth of κ",
    "early_sigma": "largest σ₁",
    "early_sigma_growth": "largest growth of σ₁",
    "early_stable_rank": "smallest stable rank / min(m, n)",
    "early_stable_rank_fall": "largest decrease of the stable rank",
    "early_gradient": "gradient norm",
    "early_loss": "loss, mean of the last 10 batches",
}


@torch.no_grad()
def _spectra(model: nn.Module) -> list[Tensor]:
    """Returns singular values, in float64, of the effective weights with both sides above 1."""
    with evaluation(model):
        weights = [layer.weight.detach().flatten(1).double() for _, layer in matrices(model)]
    return [
        torch.linalg.svdvals(W) if W.isfinite().all() else torch.full((2,), math.nan)
        for W in weights
        if min(W.shape) > 1
    ]


def _measure(spectra: list[Tensor]) -> dict[str, list[float]]:
    return {
        "kappa": [float(s[0] / s[-1]) for s in spectra],
        "sigma": [float(s[0]) for s in spectra],
        "stable_rank": [float((s / s[0]).square().sum()) / len(s) for s in spectra],
    }


class EarlyLook:
    """Measures a model once, after 10 % of the steps.

    Growth is the ratio of a weight's value to its value before the training, and the largest over
    all weights is kept. The training is not affected: the gradient is computed separately.

    Args:
        model: the model before training.
        steps: the number of steps of the entire training.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model, self.at = model, max(steps // PART, 1)
        self.before = _measure(_spectra(model))
        self.losses: list[float] = []
        self.metrics = dict.fromkeys(QUANTITIES, math.nan)

    def __call__(self, loss: Tensor) -> None:
        """Call it before every step, with the loss of the step."""
        if len(self.losses) < self.at:
            self.losses.append(float(loss.detach()))
            if len(self.losses) == self.at:
                self.metrics = self._look(loss)

    def _look(self, loss: Tensor) -> dict[str, float]:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        norms = [gradient.norm() for gradient in gradients if gradient is not None]
        now = _measure(_spectra(self.model))
        return {
            "early_kappa": largest(now["kappa"]),
            "early_kappa_growth": largest(_quotients(now["kappa"], self.before["kappa"])),
            "early_sigma": largest(now["sigma"]),
            "early_sigma_growth": largest(_quotients(now["sigma"], self.before["sigma"])),
            "early_stable_rank": -largest([-rank for rank in now["stable_rank"]]),
            "early_stable_rank_fall": largest(
                _quotients(self.before["stable_rank"], now["stable_rank"])
            ),
            "early_gradient": float(torch.stack(norms).norm()),
            "early_loss": math.fsum(self.losses[-10:]) / len(self.losses[-10:]),
        }


def _quotients(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b if b else math.inf for a, b in zip(above, below, strict=True)]
