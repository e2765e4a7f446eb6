"""The condition number of the weights of neural networks: measured, certified, regularised."""

from wellcond._audit import audit
from wellcond._bounds import Certificate, Interval, certify
from wellcond._estimates import Estimate
from wellcond._findings import AuditReport, Coverage, Finding, Grade, Status
from wellcond._monitor import Monitor
from wellcond._nearest import nearest
from wellcond._penalties import (
    Condition,
    ConditionLimit,
    Tikhonov,
    condition_penalty,
    condition_penalty_bound,
    condition_penalty_gradient,
    proximal_step,
)
from wellcond._regularizer import Regularizer
from wellcond._repair import Repair, RepairReport, repair
from wellcond._spectrum import condition_number

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
