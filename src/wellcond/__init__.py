"""The condition number of the weights of neural networks: measured, certified, regularised."""

from wellcond.checkpoints.audit import audit
from wellcond.checkpoints.findings import AuditReport, Coverage, Finding, Grade, Status
from wellcond.checkpoints.repair import Repair, RepairReport, repair
from wellcond.linalg.certify import Certificate, certify
from wellcond.linalg.interval import Interval
from wellcond.linalg.nearest import nearest
from wellcond.linalg.spectrum import condition_number
from wellcond.operators.base import Gradient, LowRank, NewWeight
from wellcond.penalties.base import Limit, Penalty
from wellcond.penalties.condition import Condition
from wellcond.penalties.exact import (
    condition_penalty,
    condition_penalty_bound,
    condition_penalty_gradient,
    proximal_step,
)
from wellcond.penalties.limit import ConditionLimit
from wellcond.penalties.tikhonov import Tikhonov
from wellcond.training.estimates import Estimate
from wellcond.training.monitor import Monitor
from wellcond.training.regularizer import Regularizer
from wellcond.weights.reasons import Reason, Skipped

__version__ = "0.1.0"

__all__ = [
    "AuditReport",
    "Certificate",
    "Condition",
    "ConditionLimit",
    "Coverage",
    "Estimate",
    "Finding",
    "Grade",
    "Gradient",
    "Interval",
    "Limit",
    "LowRank",
    "Monitor",
    "NewWeight",
    "Penalty",
    "Reason",
    "Regularizer",
    "Repair",
    "RepairReport",
    "Skipped",
    "Status",
    "Tikhonov",
    "audit",
    "certify",
    "condition_number",
    "condition_penalty",
    "condition_penalty_bound",
    "condition_penalty_gradient",
    "nearest",
    "proximal_step",
    "repair",
]
