"""Finds tensors that are slices of larger tensors, and explains how to join them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from wellcond.text import list_some
from wellcond.weights.reasons import Reason, Skipped

_KEY = "DCP_SHARDING_INFO"  # of torch.distributed.checkpoint, in the metadata of safetensors
_JOIN = (
    "join them with torch.distributed.checkpoint.load and a HuggingFaceStorageReader, or save with "
    "enable_consolidation=True"
)
# Tensor parallelism writes mp_rank_00_model_states.pt, mp_rank_00/model_optim_rng.pt or
# consolidated.00.pth; verl writes world_size_2_rank_0 for FSDP.
_RANK = re.compile(
    r"((?<![A-Za-z0-9])(?:mp|tp|model_parallel)_rank_|^consolidated\.|world_size_\d+_rank_)(\d+)"
)
_DIMENSIONS = 64
_SHARD = re.compile(r"\d{5}-of-(\d{5})")
# A file of one of several processes: torch writes shard-00001-model-00001-of-00001.safetensors.
_OF_PROCESS = re.compile(r"(?<![A-Za-z])(shard|rank)[-_]?(\d+)")
_DIGITS = re.compile(r"\d+")

OF_RANK = Skipped(Reason.slice, "join the ranks with the tool that wrote them")
REPEATED = Skipped(Reason.slice, "several shards contain it, and no index selects one of them")

Offsets = tuple[int, ...]


def saved_offsets(metadata: Mapping[str, str]) -> dict[str, Offsets] | None:
    """Returns where the tensors of a file begin in larger tensors; {} if they are not slices.

    Returns:
        None if the file contains slices, but does not state their offsets.
    """
    if _KEY not in metadata:
        return {}
    try:
        said = json.loads(metadata[_KEY])
        found = {name: tuple(one["saved_offsets"]) for name, one in said.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    known = all(
        len(offsets) <= _DIMENSIONS and all(type(start) is int for start in offsets)
        for offsets in found.values()
    )
    return found if known else None


def local_shard(kind: str) -> Skipped:
    """Returns why a tensor of a distributed class, the part of one process, is skipped."""
    return Skipped(Reason.slice, f"a {kind}: save its full_tensor()")


def slice_at(offsets: Sequence[Offsets], why: str = "") -> Skipped:
    """Returns why a tensor with slices at these offsets is skipped."""
    if not offsets:
        return Skipped(Reason.slice, f"its offsets are unknown; {_JOIN}")
    return Skipped(Reason.slice, f"at {list_some(map(str, offsets))}; {why or _JOIN}")


def find_missing_processes(files: Collection[Path]) -> dict[Path, str]:
    """Finds files of one of several processes for which files of other processes are missing.

    The tensors cannot show this, because a file does not state the shape of the complete tensor.

    Args:
        files: the files that are read.

    Returns:
        For each such file, what is missing and the remedy.
    """
    families: dict[tuple[Path, str], list[tuple[int, Path]]] = {}
    for file in files:
        if found := _OF_PROCESS.search(file.name):
            family = file.parent, _DIGITS.sub("#", file.name)
            families.setdefault(family, []).append((int(found[2]) + (found[1] == "rank"), file))
    missing: dict[Path, str] = {}
    for (folder, pattern), members in families.items():
        beside = [one for one in folder.iterdir() if _DIGITS.sub("#", one.name) == pattern]
        unread = sorted(one.name for one in beside if one not in files)
        numbers = {number for number, _ in members}
        lowest = next(number for number in itertools.count(1) if number not in numbers)
        why = ""
        if unread:
            why = (
                f"{list_some(unread, limit=2)} must be read with it: give the path of the folder, "
                "with undamaged files"
            )
        elif lowest < max(numbers):
            why = f"only {len(numbers)} of {max(numbers)} processes have a file: fetch the others"
        missing |= {file: why for _, file in members if why}
    return missing


def one_of_ranks(path: Path) -> bool:
    """Returns whether a file or its folder is one of several ranks, each with a part of weights."""
    for one in (path, path.parent):
        found = _RANK.search(one.name)
        if found is None:
            continue
        ranks = {found[2]}
        for other in one.absolute().parent.iterdir():
            begin, end = one.name[: found.start(2)], one.name[found.end(2) :]
            rank = other.name.removeprefix(begin).removesuffix(end)
            if other.name == f"{begin}{rank}{end}" and rank.isdigit():
                ranks.add(rank)
        return len(ranks) > 1
    return False


def repeated_in_shards(files: Mapping[str, Iterable[str]]) -> set[str]:
    """Returns the names that several shards of one checkpoint, *-00002-of-00003, contain.

    Args:
        files: the names in each file.
    """
    seen: set[tuple[str, str]] = set()
    repeated = set()
    for file_name, names in files.items():
        if not _SHARD.search(file_name):
            continue
        checkpoint = _SHARD.sub(r"*-of-\1", file_name)
        for name in names:
            if (checkpoint, name) in seen:
                repeated.add(name)
            seen.add((checkpoint, name))
    return repeated
