"""What training knows of a weight without a decomposition.

Letters: S (m, n) a weight; sigma_1 >= ... >= sigma_nu its singular values, nu = min(m, n); kappa =
sigma_1/sigma_nu.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """What one product with a weight tells of it; numbers are estimates, in float32 or wider.

    Attributes:
        sigma_max: ||S v|| for a unit vector v: a lower bound of the spectral norm sigma_1.
        residual: ||S^T u - sigma_max v||; some singular value lies this close to sigma_max.
        stable_rank: ||S||_F^2/sigma_max^2, from above, between 1 and nu; nu means kappa = 1.
        penalty: the penalty at strength 1, from below, for that vector; nan under a hard limit
            and under `IsometryStep`, which have no value.
        strength: the strength that was or would be applied at this step; nan under those.
        step: how many applications (optimizer steps when attached) the weight has seen.
        shortened_steps: proximal steps that the width of the block cut short.
        crowded: whether the singular values that the block follows were all near the largest when
            gradients were last looked at: more may be, which get no gradient; widen the block.
        nu: min(m, n).
        condition_number: sigma_1/sigma_nu as measured in float64; None where that was not asked.
        excess: by what factor its hard limit was exceeded; for a stack the worst; None if that is
            not known. For a weight that is watched, the largest since the last report of `log`, as
            looks and decompositions have shown, after what was clipped at once; for others, before
            the last application, None if the weight was only seen to obey.
        condition_before: kappa at the last look, or before the last application; None if not known.
        sigma_before: sigma_1 at the last look, before it was clipped; None if not known.
        interval: optimizer steps between the last two applications of its limit, None if there
            were none or it is watched.
        applications: how often a weight that is watched was projected after a decomposition.
        applied_share: at which share of the last steps, of about 40.
        status: "" when all is well, else what is the matter with the weight.
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
    crowded: bool = False
    excess: float | None = None
    condition_before: float | None = None
    sigma_before: float | None = None
    interval: int | None = None
    applications: int | None = None
    applied_share: float | None = None
    status: str = ""
