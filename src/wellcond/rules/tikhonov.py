"""Tikhonov regularisation, a baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from wellcond.operators.base import Gradient, LowRank, NewWeight, Operator
from wellcond.operators.norms import squared_norm_over
from wellcond.operators.subspace import Image
from wellcond.rules.penalty import Penalty


class TikhonovPenalty(Penalty):
    """Tikhonov regularisation 1/2 ||S||_F^2, also known as L2 or weight decay.

    S is the weight, and eta = learning rate * strength is the length of a proximal step. The
    gradient is S, and the proximal step is S/(1 + eta). The penalty shrinks all singular values
    by the same factor, so it does not lower the condition number by itself. It is the baseline of
    arXiv 2410.00169.

    Args:
        strength: factor of the penalty, as for `ConditionPenalty`.

    Raises:
        ValueError: the strength is negative or not finite.
        TypeError: the strength is neither a number nor a callable.

    Example:
        >>> import wellcond as wc
        >>> wc.TikhonovPenalty(lambda step: 1e-4 * min(1, step / 100)).strength_at(50)
        5e-05
    """

    needs = frozenset()

    def evaluate(self, S: Operator, image: Image | None) -> tuple[Tensor, Gradient]:
        one = torch.ones(S.shape[:-2], dtype=S.dtype, device=S.device)
        return (squared_norm_over(S, one) / 2).to(S.dtype), self.gradient(S, image)

    def gradient(self, S: Operator, image: Image | None) -> Gradient:
        return Gradient(_multiple(S, torch.ones(S.shape[:-2], dtype=S.dtype, device=S.device)))

    def proximal_step(
        self, S: Operator, image: Image | None, eta: Tensor
    ) -> tuple[NewWeight, Tensor]:
        c = (1 / (1 + eta)).expand(S.shape[:-2])
        return NewWeight(_multiple(S, c)), torch.zeros_like(c, dtype=torch.bool)


def _multiple(S: Operator, c: Tensor) -> LowRank:
    *stack, m, n = S.shape
    return LowRank(c, c.new_zeros(*stack, m, 0), c.new_zeros(*stack, n, 0))
