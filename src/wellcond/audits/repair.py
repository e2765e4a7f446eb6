"""A checkpoint rewritten so that every weight in it obeys a limit of the condition number.

Letters: S (m, n) a weight as stored, X its replacement, kappa their condition numbers.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from wellcond.audits.audit import as_patterns, chosen
from wellcond.audits.finite import not_finite_in
from wellcond.audits.progress import Counter, Told, work_of
from wellcond.audits.sources import adapters_in, masks_in, searchable_tensors
from wellcond.files.checkpoint import INDEX, PICKLED, Checkpoint
from wellcond.linalg.nearest import check_limit
from wellcond.linalg.scaling import frobenius_norm, scaled
from wellcond.operators.views import shares_memory
from wellcond.output import new_path, refuse_existing
from wellcond.report.repairs import Repair, RepairReport
from wellcond.rules.limit import limited
from wellcond.text import (
    and_more,
    joined,
    last_part,
    out_of_memory,
    versions,
)
from wellcond.weights.matrices import Matrices
from wellcond.weights.reasons import Reason, Skipped

# What layers call their weights; all else may be a constant, or no linear map.
_CALLED_A_WEIGHT = re.compile("weight|kernel|proj", re.IGNORECASE)


def repair(
    path_in: str | os.PathLike[str],
    path_out: str | os.PathLike[str],
    max_condition: float,
    *,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    progress: Told | None = None,
) -> RepairReport:
    """Copies a checkpoint so that every weight has kappa <= max_condition as it is stored.

    The weights are those of an audit, and are named in the same way: of a fused projection each
    block has a limit of its own (`attn.qkv.weight:q`), and of a stack each matrix; a convolution is
    its flattened kernel, as if of one group, as a file does not say how many there are.

    A weight that exceeds the limit is replaced by a nearest one in the Frobenius norm with
    kappa <= K/(1 + margin), where margin is the smallest that was found for which kappa <= K still
    holds after rounding to the dtype of the file. A rank-deficient weight gets full rank; a zero
    one has no condition number and stays zero. A complex weight is left as it is, and so are the
    factors of an adapter of low rank, which act by their product. All other tensors and the
    metadata of a safetensors file are kept byte for byte, of a file of torch.save value for value,
    Python objects beside them as they are, and who may read it.

    The copy is written into a temporary folder and renamed; nothing is ever overwritten,
    and of two repairs that want the same name one fails. A repair that is killed leaves that
    folder, `.wellcond-unfinished-*` beside path_out, which can be removed.

    Args:
        path_in: whatever `wellcond.audit` reads.
        path_out: a file of the same format that is not there yet; of a directory or a sharded
            checkpoint a directory, outside of the one that is read.
        max_condition: K, at least 1.
        include: a pattern (`fnmatch.fnmatchcase`) or several, of names to repair; all if empty.
        exclude: a pattern or several, of names to leave alone.
        progress: called with a `Progress` before each tensor is read: its name, its number, how
            many there are, and about how long the rest will take. `print` will do.

    Raises:
        ValueError: max_condition < 1; a weight that is not finite, or that no margin brings below
            the limit, as K < 1.004 or so in bfloat16; tensors that overlap, neither a part of the
            other; a pattern that matches nothing; an unreadable file; Python objects in a file that
            is compressed or older than torch 1.6; path_out inside the directory that is read, or
            with the ending of another format. Nothing is written.
        FileExistsError: path_out is there already.
        NotADirectoryError: a part of path_out is a file.
        OSError: path_out cannot be written, as on a full disk. Nothing is left of it.
        MemoryError: there is not enough for a weight, which is named. Nothing is written.

    Example:
        >>> import os, tempfile, torch, wellcond as wc
        >>> folder = tempfile.mkdtemp()
        >>> path, fixed = os.path.join(folder, "model.pt"), os.path.join(folder, "fixed.pt")
        >>> torch.save({"weight": torch.tensor([[9.0, 0.0], [0.0, 1.0]])}, path)
        >>> print(wc.repair(path, fixed, max_condition=3.0).changed[0].before)
        9.0
        >>> bool(wc.condition_number(torch.load(fixed)["weight"]) <= 3)
        True
    """
    check_limit(max_condition)
    include, exclude = as_patterns(include), as_patterns(exclude)
    _check_output(Path(path_in), Path(path_out))
    checkpoint = Checkpoint(path_in)
    for name, reason in checkpoint.damaged.items():
        raise ValueError(f"{checkpoint.path} cannot be repaired: {name} {reason}")
    skipped = checkpoint.skipped()
    # To limit each factor would limit nothing that acts.
    factors = {name for adapter in adapters_in(checkpoint) for name in adapter.parts}
    skipped |= {name: Skipped(Reason.factor) for name in factors if name not in skipped}
    matrices = list(checkpoint.matrices())
    unserved = {m.name for m in matrices if checkpoint.where[m.name][1].dtype.startswith("complex")}
    skipped |= dict.fromkeys(unserved, Skipped(Reason.complex))
    real = [one for one in matrices if one.name not in unserved]
    wanted = {one.name: one for one in chosen(real, skipped, include, exclude)}
    if not wanted:
        why = and_more((f"{name}: {reason}" for name, reason in skipped.items()), separator="; ")
        raise ValueError(f"{checkpoint.path} must hold a weight matrix, but has none ({why}).")
    overlapping = [pair for pair in checkpoint.overlapping if wanted.keys() & set(pair)]
    if overlapping:
        raise ValueError(
            f"{checkpoint.path} cannot be repaired, because tensors overlap, and what changes one "
            f"changes the other: {and_more(f'{one} and {two}' for one, two in overlapping)}. "
            "Save them apart, each as tensor.clone()."
        )
    repairs: list[Repair] = []
    refused: list[str] = []
    counter = Counter(progress, work_of(wanted.values()))

    def change(name: str) -> Tensor | None:
        if name not in wanted:
            return None
        counter.next(name)
        try:
            new, done = _limit_all(wanted[name], max_condition, refused)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise MemoryError(
                f"{checkpoint.path} cannot be repaired, and nothing was written: there is not "
                f"enough memory for {name}. To leave a weight as it is, exclude it."
            ) from None
        repairs.extend(done)
        return new

    with new_path(path_out) as copy:
        checkpoint.copy_with(change, copy)
        if refused:
            raise ValueError(
                f"{checkpoint.path} cannot be repaired, and nothing was written: "
                f"{and_more(refused, separator='; ')}. To leave a weight as it is, exclude it."
            )
    others = {
        name: read for name, read in searchable_tensors(checkpoint).items() if name not in wanted
    }
    left = {
        name
        for name, (_, entry) in checkpoint.where.items()
        if entry.skipped is None or entry.skipped.reason.of_adapter
    }
    not_finite, _ = not_finite_in(others, masks_in(checkpoint), left)
    return RepairReport(repairs, skipped, float(max_condition), versions(), not_finite)


def _limit_all(
    one: Matrices, max_condition: float, refused: list[str]
) -> tuple[Tensor | None, list[Repair]]:
    """The tensor with all its matrices within the limit, None if they are; adds what fails."""
    tensor = one.read().contiguous().clone()
    done = []
    for view, S in one.views(tensor).items():
        label = f"{one.name}:{view}" if view else one.name
        if not torch.isfinite(S).all():
            refused.append(f"{label} holds NaN or infinity")
            continue
        try:
            X, before, after, margin = limited(S, max_condition)
        except ValueError as error:
            refused.append(f"{label}: {error}".rstrip("."))
            continue
        moved = 0.0 if X is S else _relative_change(S, X)
        zero = "zero, without a condition number; left as it is" if math.isnan(before) else ""
        own = last_part(one.name)
        notes = [zero, one.note]
        if X is not S and not _CALLED_A_WEIGHT.search(own):
            notes.append("changed, though not called a weight")
        if rows := ((S == 0).all(-1) & (X != 0).any(-1)).flatten().nonzero().flatten().tolist():
            notes.append(f"rows that were zero are filled: {and_more(map(str, rows))}")
        note = joined(*notes)
        dtype = str(S.dtype).removeprefix("torch.")
        done.append(
            Repair(one.name, view, tuple(S.shape), dtype, before, after, moved, margin, note)
        )
        if X is not S:
            assert shares_memory(S, tensor)  # else what is written to a view would be lost
            S.copy_(X)
    return tensor if any(repair.relative_change for repair in done) else None, done


def _relative_change(S: Tensor, X: Tensor) -> float:
    wide, unit = scaled(S)
    return frobenius_norm(X.to(torch.float64) / unit - wide) / frobenius_norm(wide)


def _check_output(source: Path, target: Path) -> None:
    """Raises unless a copy of the source can be written to the target."""
    refuse_existing(target)
    _check_ending(source, target)
    for parent in target.parents:
        if parent.exists() and not parent.is_dir():
            raise NotADirectoryError(
                f"`path_out` must lie in a directory, but {parent} is a file. Choose another path."
            )
    resolved = target.resolve()
    # Copying follows links, and so they may lead to where the copy is written.
    seen: set[Path] = set()
    for folder, below, _ in os.walk(source, followlinks=True):
        real = Path(folder).resolve()
        if resolved.is_relative_to(real):
            raise ValueError(
                f"`path_out` must lie outside of the directory that is copied, but {target} lies "
                f"in {folder}. Choose a path beside {source}."
            )
        if real in seen:
            below.clear()
        seen.add(real)


def _check_ending(source: Path, target: Path) -> None:
    """Raises if the target's name promises another format than that of the source."""
    if source.is_dir() or source.name.endswith(INDEX):
        if target.name.endswith((".safetensors", INDEX, *PICKLED)):
            raise ValueError(
                f"`path_out` must be a directory, as {source} is copied with all that belongs to "
                f"it, but {target.name} ends as a file does. Choose a name without an ending."
            )
        return
    same = {source.suffix} if source.suffix == ".safetensors" else {source.suffix, *PICKLED}
    fits = target.name.endswith(tuple(same)) and not target.name.endswith(INDEX)
    if source.is_file() and not fits:
        raise ValueError(
            f"`path_out` must end in {' or '.join(sorted(same))}, because the copy has the format "
            f"of {source.name}, but got {target.name}. "
            f"Choose {target.with_suffix(source.suffix).name}."
        )
