"""The results of audits, repairs and estimates as data, tables, JSON, CSV and HTML."""

from wellcond.report.comparison import Comparison
from wellcond.report.estimate import Estimate
from wellcond.report.findings import Coverage, Finding, Grade, Status
from wellcond.report.flags import Flag
from wellcond.report.not_finite import NotFinite
from wellcond.report.pairing import Change, Pair
from wellcond.report.repairs import Repair, RepairReport
from wellcond.report.report import AuditReport
from wellcond.weights.reasons import Reason, Skipped

__all__ = [
    "AuditReport",
    "Change",
    "Comparison",
    "Coverage",
    "Estimate",
    "Finding",
    "Flag",
    "Grade",
    "NotFinite",
    "Pair",
    "Reason",
    "Repair",
    "RepairReport",
    "Skipped",
    "Status",
]
