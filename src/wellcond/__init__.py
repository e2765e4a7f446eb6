"""Measures, certifies and regularises the condition number of the weights of neural networks.

Each name is imported when it is first used, so that `wellcond --help` does not wait for torch.
`__init__.pyi` declares the static types of these names. `wellcond.report` contains the data classes
of audits, repairs and estimates. `wellcond.rules` contains the base classes for custom penalties
and limits.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "audits.audit": ["audit"],
    "audits.compare": ["compare"],
    "audits.repair": ["repair"],
    "linalg.certify": ["Certificate", "certify"],
    "linalg.interval": ["Interval"],
    "linalg.nearest": ["nearest"],
    "linalg.spectrum": ["condition_number"],
    "report.report": ["AuditReport"],
    "rules.condition": ["ConditionPenalty"],
    "rules.exact": [
        "condition_penalty",
        "condition_penalty_bound",
        "condition_penalty_gradient",
        "proximal_step",
    ],
    "rules.isometry": ["IsometryStep", "OrthogonalityPenalty"],
    "rules.spectral": ["ConditionLimit", "SingularValueLimit"],
    "rules.limit": ["Limit"],
    "rules.penalty": ["Penalty"],
    "rules.relatives": ["SpectralNormPenalty", "StableRankPenalty"],
    "rules.tikhonov": ["TikhonovPenalty"],
    "training.enforce": ["enforce"],
    "training.monitor": ["Monitor"],
    "training.regularizer": ["Regularizer"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
_PACKAGES = ("report", "rules")

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES} - {"Any", "importlib"})
