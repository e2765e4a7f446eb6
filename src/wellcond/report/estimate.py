"""Estimates of a weight during training.

Letters: S (m, n) a weight; sigma_1 >= ... >= sigma_nu its singular values, nu = min(m, n); kappa =
sigma_1/sigma_nu.
"""

from __future__ import annotations

from dataclasses import dataclass

NOT_FINITE = "not finite: contains NaN or infinity"


@dataclass(frozen=True)
class Estimate:
    """Estimates from a few products with a weight, computed in float32 or wider.

    Attributes:
        sigma_max: ||S v|| for a unit vector v, an estimate of sigma_1 from below; if the condition
            number was requested, sigma_1 itself, measured in float64.
        residual: ||S^T u - sigma_max v||; some singular value is within this distance of
            sigma_max. It is 0 if sigma_max was measured.
        stable_rank: ||S||_F^2/sigma_max^2, between 1 and nu, estimated from above; nu means
            kappa = 1.
        penalty: the penalty at strength 1 for that vector, a lower bound; nan under a hard limit
            and under `IsometryStep`, which have no penalty.
        strength: the strength that was or would be applied at this step; nan under a hard limit
            and under `IsometryStep`.
        step: the number of applications (optimizer steps when attached) to the weight.
        shortened_steps: the number of proximal steps that were shortened because the block is too
            narrow.
        crowded: whether all singular values of the block were near the largest at the last check
            of the gradients. Singular values outside the block might then be as large and get no
            gradient; widen the block.
        nu: min(m, n).
        condition_number: sigma_1/sigma_nu, measured in float64; None if it was not requested.
        sigma_min: sigma_nu, measured in float64 together with the condition number; else None.
        excess: the factor by which the weight exceeded its hard limit, for a stack the largest;
            None if it is unknown. For a watched weight, it is the largest factor that checks and
            decompositions have found since the last report of `log`, after immediate clipping. For
            other weights, it is the factor before the last application, or None if the weight was
            only found within its limit.
        condition_before: kappa at the last check or before the last application; None if it is
            unknown.
        sigma_before: sigma_1 at the last check, before clipping; None if it is unknown.
        interval: the number of optimizer steps between the last two applications of the limit;
            None before the first, and for a watched weight.
        applications: how often a watched weight was projected after a decomposition.
        applied_share: the share of the last steps, about 40, at which it was projected.
        status: "" if there is no problem, else the problem with the weight.
    """

    sigma_max: float
    residual: float
    stable_rank: float
    penalty: float
    strength: float
    step: int
    shortened_steps: int
    nu: int
    condition_number: float | None = None
    sigma_min: float | None = None
    crowded: bool = False
    excess: float | None = None
    condition_before: float | None = None
    sigma_before: float | None = None
    interval: int | None = None
    applications: int | None = None
    applied_share: float | None = None
    status: str = ""
