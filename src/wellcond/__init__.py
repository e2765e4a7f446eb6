"""The condition number of the weights of neural networks: measured, certified, regularised."""

from wellcond.checkpoints.audit import audit
from wellcond.linalg.certify import Certificate, Interval, certify
from wellcond.training.estimates import Estimate
from wellcond.checkpoints.findings import AuditReport, Coverage, Finding, Grade, Status
from wellcond.training.monitor import Monitor
from wellcond.linalg.nearest import nearest
from wellcond.penalties.base import (
    Condition,
    ConditionLimit,
    Tikhonov,
    condition_penalty,
    condition_penalty_bound,
    condition_penalty_gradient,
    proximal_step,
)
from wellcond.training.regularizer import Regularizer
from wellcond.checkpoints.repair import Repair, RepairReport, repair
from wellcond.linalg.spectrum import condition_number

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
    "Interval",
    "Monitor",
    "Regularizer",
    "Repair",
    "RepairReport",
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
