"""The device on which an audit computes singular values: the CPU, or a GPU that passes a check."""

from __future__ import annotations

import torch

from wellcond.linalg.spectrum import compute_spectrum

CPU = torch.device("cpu")
# Two float64 computations of kappa = 1e4 agree to about 1e-12; TF32 or float32 do not reach this.
_AGREEMENT = 1e-9


def as_device(device: str | torch.device, local_rank: int | None = None) -> torch.device:
    """The device, after a check of its float64 arithmetic against the CPU.

    Args:
        device: "cpu", "cuda", or a GPU with its index.
        local_rank: the number of this process on its machine, which is the index of its GPU unless
            `device` has one; None if there is a single process.

    Raises:
        ValueError: the device is unknown, has no float64, is not there, or computes other numbers
            than the CPU.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'`device` must be "cpu" or "cuda", got {device!r}.') from error
    if found.type == "cpu":
        return CPU
    if found.type != "cuda":
        raise ValueError(
            f'`device` must be "cpu" or "cuda", because an audit needs float64 and LAPACK, got '
            f'"{found}". Omit it to compute on the CPU.'
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ValueError(
            f'`device` must be available, but torch finds no GPU for "{found}". Install a build of '
            "torch for this GPU, or omit `device` to compute on the CPU."
        )
    if found.index is None:
        found = torch.device("cuda", local_rank or 0)
    if found.index >= count:
        raise ValueError(
            f'`device` must give each process its own GPU, but "{found}" is not one of the {count} '
            "of this machine. Start at most one process per GPU."
        )
    _check_arithmetic(found)
    return found


def _check_arithmetic(device: torch.device) -> None:
    source = torch.Generator().manual_seed(0)
    S = torch.randn(320, 288, generator=source, dtype=torch.float64)
    S *= torch.logspace(0, -3, 288, dtype=torch.float64)
    expected, found = (
        compute_spectrum(one, all_values=True).condition_number for one in (S, S.to(device))
    )
    if not abs(found - expected) <= _AGREEMENT * expected:
        raise ValueError(
            f'`device` must compute in float64 as the CPU does, but "{device}" found κ = {found!r} '
            f"instead of {expected!r} for a test matrix. Omit it to compute on the CPU."
        )
