"""Rules for weights: penalties, steps and hard limits, and the types that they use."""

from wellcond.operators.base import Gradient, LowRank, NewWeight
from wellcond.rules.base import Need, Rule, Schedule
from wellcond.rules.condition import ConditionPenalty
from wellcond.rules.isometry import IsometryStep, OrthogonalityPenalty
from wellcond.rules.limit import Limit
from wellcond.rules.outcome import Outcome, OutcomeStatus
from wellcond.rules.penalty import Penalty
from wellcond.rules.relatives import SpectralNormPenalty, StableRankPenalty
from wellcond.rules.spectral import ConditionLimit, SingularValueLimit
from wellcond.rules.tikhonov import TikhonovPenalty

__all__ = [
    "ConditionLimit",
    "ConditionPenalty",
    "Gradient",
    "IsometryStep",
    "Limit",
    "LowRank",
    "Need",
    "NewWeight",
    "OrthogonalityPenalty",
    "Outcome",
    "OutcomeStatus",
    "Penalty",
    "Rule",
    "Schedule",
    "SingularValueLimit",
    "SpectralNormPenalty",
    "StableRankPenalty",
    "TikhonovPenalty",
]
