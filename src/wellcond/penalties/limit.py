"""A hard limit of the condition number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wellcond.linalg.nearest import check_limit, limited
from wellcond.penalties.base import Limit


@dataclass(frozen=True)
class ConditionLimit(Limit):
    """The hard limit kappa <= K.

    Where a `Regularizer` takes proximal steps, a weight under a limit is replaced by a nearest one
    that obeys (see `nearest`), as measured after rounding to the dtype of the weight; the length of
    the step does not matter. So every checkpoint that is saved after such a step obeys;
    `reg.proximal_step_(0.0)` before saving makes sure. A zero weight has no condition number and
    stays zero.

    A limit is no `Penalty`: it has neither a value nor a gradient, so `reg()` and
    `reg.add_gradients_()` refuse it; use `attach` or `proximal_step_`. Applying it measures the
    weight in float64 on the CPU, and where it is above the limit decomposes it: that is expensive,
    so `every` should be large.

    Args:
        max_condition: K, at least 1.

    Raises:
        ValueError: K < 1 or nan; when it is applied, rounding to the dtype of a weight lifts its
            kappa above K whatever is done, as in bfloat16 for K below 1.004 or so.
        TypeError: K is not a number.

    Example:
        >>> import torch, wellcond as wc
        >>> layer = torch.nn.Linear(8, 8, bias=False)
        >>> reg = wc.Regularizer(layer, wc.ConditionLimit(3.0))
        >>> reg.proximal_step_(lr=0.0)
        >>> bool(wc.condition_number(layer.weight) <= 3.0)
        True
    """

    max_condition: float

    def __post_init__(self) -> None:
        check_limit(self.max_condition)

    def apply(self, S: Tensor) -> Tensor:
        each = S.reshape(-1, *S.shape[-2:]).cpu()
        # What is not finite stays as it is: the caller says so.
        obeying = [
            limited(one, self.max_condition).S if bool(torch.isfinite(one).all()) else one
            for one in each
        ]
        return torch.stack(obeying).reshape(S.shape).to(S.device)
