"""Logs estimates: a few aggregates and the worst weights with their names.

Hundreds of series slow training and hide the important ones, so the series of every weight are
logged only on request.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from wellcond.linalg.checks import as_count
from wellcond.report.estimate import NOT_FINITE, Estimate
from wellcond.text import quote_subject

logger = logging.getLogger("wellcond")

WORST = 5


def log(
    measure: Callable[[], Mapping[str, Estimate]],
    target: Any,
    step: int,
    every: int,
    layers: bool,
    prefix: str,
    named: set[str],
) -> dict[str, float] | None:
    """Measures and logs every `every` steps; see `Regularizer.log`.

    A warning names each weight that is not finite, once: `named` contains those it has named.
    """
    if step % as_count(every, "`every`"):
        return None
    estimates = measure()
    values = report(estimates, layers, prefix)
    lost = [n for n, e in estimates.items() if e.status == NOT_FINITE and n not in named]
    if lost:
        named.update(lost)
        logger.warning("%s not finite at step %d: NaN or infinity.", quote_subject(lost), step)
    send(values, target, step)
    return values


def report(
    estimates: Mapping[str, Estimate], layers: bool = False, prefix: str = "wellcond"
) -> dict[str, float]:
    """Returns the values to log by name; see `Regularizer.log`."""
    sound = {name: e for name, e in estimates.items() if not e.status}
    values: dict[str, float] = {}
    if lost := len(estimates) - len(sound):
        values["not_measurable"] = lost
    if sound:
        shares = {name: e.stable_rank / e.nu for name, e in sound.items()}
        values |= {
            "sigma_max/largest": max(e.sigma_max for e in sound.values()),
            "stable_rank_share/smallest": min(shares.values()),
            "stable_rank_share/median": statistics.median(shares.values()),
        }
        # A limit has no strength, and the weights of a monitor have strength 0.
        penalised = [e for e in sound.values() if e.strength > 0]
        if penalised:
            values |= {
                "penalty/sum": sum(e.penalty for e in penalised),
                "shortened_steps": sum(e.shortened_steps for e in penalised),
                "crowded_blocks": sum(e.crowded for e in penalised),
            }
        excess = [e.excess for e in sound.values() if e.excess is not None]
        intervals = [e.interval for e in sound.values() if e.interval is not None]
        if excess:
            values["limit/excess/largest"] = max(excess)
        before = [e.condition_before for e in sound.values() if e.condition_before is not None]
        if before:
            values["limit/condition_before/largest"] = max(before)
        sigmas = [e.sigma_before for e in sound.values() if e.sigma_before is not None]
        if sigmas:
            values["limit/sigma_before/largest"] = max(sigmas)
        applied = [e.applied_share for e in sound.values() if e.applied_share is not None]
        if applied:
            values["limit/applied_share/largest"] = max(applied)
            counts = (e.applications for e in sound.values() if e.applications is not None)
            values["limit/applications"] = sum(counts)
        if intervals:
            values["limit/interval/median"] = statistics.median(intervals)
        kappas = {n: e.condition_number for n, e in sound.items() if e.condition_number is not None}
        if kappas:
            values["sigma_min/smallest"] = min(
                e.sigma_min for e in sound.values() if e.sigma_min is not None
            )
            values["condition_number/largest"] = max(kappas.values())
            values["condition_number/median"] = statistics.median(kappas.values())
            worst = sorted(kappas, key=lambda name: -kappas[name])[:WORST]
            values |= {f"worst/{name}/condition_number": kappas[name] for name in worst}
        else:
            worst = sorted(shares, key=lambda name: shares[name])[:WORST]
            values |= {f"worst/{name}/stable_rank_share": shares[name] for name in worst}
    if layers:
        for name, e in estimates.items():
            values[f"weights/{name}/sigma_max"] = e.sigma_max
            values[f"weights/{name}/stable_rank_share"] = e.stable_rank / e.nu
            if not math.isnan(e.penalty):  # a hard limit has none
                values[f"weights/{name}/penalty"] = e.penalty
            if e.sigma_min is not None:
                values[f"weights/{name}/sigma_min"] = e.sigma_min
            if e.condition_number is not None:
                values[f"weights/{name}/condition_number"] = e.condition_number
    return {f"{prefix}/{name}": float(value) for name, value in values.items()}


def send(values: Mapping[str, float], target: Any, step: int) -> None:
    """Sends the values to the target.

    Raises:
        TypeError: the target has none of the known methods and is not callable.
    """
    if hasattr(target, "add_scalar"):  # TensorBoard's SummaryWriter
        for name, value in values.items():
            target.add_scalar(name, value, step)
    elif hasattr(target, "log_metrics"):  # a logger of Lightning
        target.log_metrics(dict(values), step)
    elif hasattr(target, "log_dict"):  # a LightningModule, which knows its step
        target.log_dict({n: v for n, v in values.items() if math.isfinite(v)})
    elif hasattr(target, "log"):  # a run of wandb, an Accelerator
        target.log(dict(values), step=step)
    elif callable(target):
        target(dict(values), step)
    else:
        raise TypeError(
            "`target` must have add_scalar, log_metrics, log_dict or log, or be a callable "
            f"(values, step), got {type(target).__name__}."
        )
