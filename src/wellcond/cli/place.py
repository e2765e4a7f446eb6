"""The rank of this process, from the environment variables that torchrun and srun set."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

_PORT = 15000  # and the next 10,000


class Place(NamedTuple):
    """The rank of this process, the number of processes, and the address where they meet.

    `local_rank` is the number of this process on its machine.
    """

    rank: int
    size: int
    meeting: str
    local_rank: int


def find_place(variables: Mapping[str, str]) -> Place | None:
    """The place that torchrun or srun assigns to this process; None if it is the only one.

    Raises:
        ValueError: a variable is not a number, or no variable gives the address.
    """
    if {"RANK", "WORLD_SIZE"} <= variables.keys():
        names, address = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), ""
    elif {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS"} <= variables.keys():
        names = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"
        address = _first_machine(variables.get("SLURM_STEP_NODELIST", ""))
    else:
        return None
    rank, size, local_rank = (_number(variables, name) for name in names)
    if size == 1:
        return None
    if rank >= size:
        raise ValueError(
            f"{names[0]} must be less than {names[1]}, got {rank} and {size}. "
            "Start with torchrun or srun."
        )
    if {"MASTER_ADDR", "MASTER_PORT"} <= variables.keys():
        return Place(rank, size, "env://", local_rank)
    address = variables.get("MASTER_ADDR", address)
    if not address:
        raise ValueError(
            "MASTER_ADDR must name the machine of process 0 because there are several processes, "
            "but it is not set. Start them with torchrun, or set it."
        )
    step = sum(_number(variables, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    port = variables.get("MASTER_PORT", str(_PORT + step % 10_000))
    return Place(rank, size, f"tcp://{address}:{port}", local_rank)


def _number(variables: Mapping[str, str], name: str) -> int:
    text = variables.get(name, "0")
    if not text.isdecimal():
        raise ValueError(f"{name} must be a number, got {text!r}. Start with torchrun or srun.")
    return int(text)


def _first_machine(names: str) -> str:
    """The first machine of a list such as node[07-12,15],other."""
    found = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\]([^,\[]*))?", names)
    return "".join(part or "" for part in found.groups()) if found else ""
