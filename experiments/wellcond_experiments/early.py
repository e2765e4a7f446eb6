"""What a training shows at a tenth of its length, to be compared with what it ends with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wellcond_experiments.methods import evaluation, largest, matrices

PART = 10  # of the training: after so large a part of it the look is taken
QUANTITIES = {
    "early_kappa": "κ, the largest",
    "early_kappa_growth": "growth of κ, the largest",
    "early_sigma": "σ₁, the largest",
    "early_sigma_growth": "growth of σ₁, the largest",
    "early_stable_rank": "stable rank over min(m, n), the smallest",
    "early_stable_rank_fall": "fall of the stable rank, the largest",
    "early_gradient": "norm of the gradient",
    "early_loss": "loss, mean of the last ten batches",
}


@torch.no_grad()
def _spectra(model: nn.Module) -> list[Tensor]:
    """Singular values in float64 of every weight that acts as a matrix with two sides above 1."""
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
    """Takes the look once, after a tenth of the steps.

    Growth is the quotient of a weight's value by that before the training; of all weights the
    largest counts. Nothing of the training changes: the gradient is computed beside it.

    Args:
        model: before it is trained.
        steps: of the whole training.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model, self.at = model, max(steps // PART, 1)
        self.before = _measure(_spectra(model))
        self.losses: list[float] = []
        self.metrics = dict.fromkeys(QUANTITIES, math.nan)

    def __call__(self, loss: Tensor) -> None:
        """Before every step, with its loss."""
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
