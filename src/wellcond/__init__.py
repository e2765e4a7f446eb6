"""The condition number of the weights of neural networks: measured, certified, regularised.

A name is imported when it is first used, so that `wellcond --help` need not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wellcond.checkpoints.audit import audit
    from wellcond.checkpoints.findings import Coverage, Finding, Grade, Status
    from wellcond.checkpoints.finite import NotFinite
    from wellcond.checkpoints.repair import Repair, RepairReport, repair
    from wellcond.checkpoints.report import AuditReport, Comparison, compare
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
    from wellcond.penalties.isometry import Isometry, Orthogonality
    from wellcond.penalties.limit import ConditionLimit, SingularValueLimit
    from wellcond.penalties.relatives import SpectralNorm, StableRank
    from wellcond.penalties.tikhonov import Tikhonov
    from wellcond.training.enforce import enforce
    from wellcond.training.estimates import Estimate
    from wellcond.training.monitor import Monitor
    from wellcond.training.regularizer import Regularizer
    from wellcond.weights.reasons import Reason, Skipped

__version__ = "0.1.0"

_NAMES = {
    "checkpoints.audit": ["audit"],
    "checkpoints.findings": ["Coverage", "Finding", "Grade", "Status"],
    "checkpoints.finite": ["NotFinite"],
    "checkpoints.repair": ["Repair", "RepairReport", "repair"],
    "checkpoints.report": ["AuditReport", "Comparison", "compare"],
    "linalg.certify": ["Certificate", "certify"],
    "linalg.interval": ["Interval"],
    "linalg.nearest": ["nearest"],
    "linalg.spectrum": ["condition_number"],
    "operators.base": ["Gradient", "LowRank", "NewWeight"],
    "penalties.base": ["Limit", "Penalty"],
    "penalties.condition": ["Condition"],
    "penalties.exact": [
        *("condition_penalty", "condition_penalty_bound"),
        *("condition_penalty_gradient", "proximal_step"),
    ],
    "penalties.isometry": ["Isometry", "Orthogonality"],
    "penalties.limit": ["ConditionLimit", "SingularValueLimit"],
    "penalties.relatives": ["SpectralNorm", "StableRank"],
    "penalties.tikhonov": ["Tikhonov"],
    "training.enforce": ["enforce"],
    "training.estimates": ["Estimate"],
    "training.monitor": ["Monitor"],
    "training.regularizer": ["Regularizer"],
    "weights.reasons": ["Reason", "Skipped"],
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "AuditReport",
    "Certificate",
    "Comparison",
    "Condition",
    "ConditionLimit",
    "Coverage",
    "Estimate",
    "Finding",
    "Grade",
    "Gradient",
    "Interval",
    "Isometry",
    "Limit",
    "LowRank",
    "Monitor",
    "NewWeight",
    "NotFinite",
    "Orthogonality",
    "Penalty",
    "Reason",
    "Regularizer",
    "Repair",
    "RepairReport",
    "SingularValueLimit",
    "Skipped",
    "SpectralNorm",
    "StableRank",
    "Status",
    "Tikhonov",
    "audit",
    "certify",
    "compare",
    "condition_number",
    "condition_penalty",
    "condition_penalty_bound",
    "condition_penalty_gradient",
    "enforce",
    "nearest",
    "proximal_step",
    "repair",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__} - {"Any", "TYPE_CHECKING", "importlib"})
