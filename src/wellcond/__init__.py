"""Measure and regularise the condition number of the weight matrices of neural networks."""

from wellcond._bounds import Certificate, Interval, certify
from wellcond._penalties import (
    Condition,
    Tikhonov,
    condition_penalty,
    condition_penalty_bound,
    condition_penalty_gradient,
    proximal_step,
)
from wellcond._regularizer import Estimate, Regularizer
from wellcond._spectrum import condition_number

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "Condition",
    "Estimate",
    "Interval",
    "Regularizer",
    "Tikhonov",
    "certify",
    "condition_number",
    "condition_penalty",
    "condition_penalty_bound",
    "condition_penalty_gradient",
    "proximal_step",
]
