"""A checkpoint rewritten so that every weight in it obeys a limit of the condition number.

Letters: S (m, n) a weight as stored, X its replacement, kappa their condition numbers.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from wellcond.audits.finite import not_finite_in
from wellcond.audits.plan import RowSpec, as_patterns, rows_of_tensor, select
from wellcond.audits.progress import Counter, ProgressCallback, shown, work_of
from wellcond.audits.sources import source_of_file
from wellcond.files.built import BuildError, Built
from wellcond.files.checkpoint import Checkpoint
from wellcond.files.collection import INDEX, PICKLED, is_of_torch
from wellcond.files.plain import PlainWeight, check_plain, dtype_of, write_plain
from wellcond.files.tensors import Holder
from wellcond.linalg.nearest import check_limit
from wellcond.linalg.scaling import frobenius_norm, split_scale
from wellcond.linalg.spectrum import compute_spectrum
from wellcond.operators.views import Member, View
from wellcond.output import new_path, refuse_existing
from wellcond.report.repairs import Repair, RepairReport, describe_kept
from wellcond.rules.spectral import limit_condition_number
from wellcond.text import is_out_of_memory, join_remarks, last_part, list_some, read_versions
from wellcond.weights.reasons import Reason, Skipped

_ATTEMPTS = 8  # at a margin that rounding does not exceed
# What layers call their weights; all else may be a constant, or no linear map.
_CALLED_A_WEIGHT = re.compile("weight|kernel|proj", re.IGNORECASE)


def repair(
    path_in: str | os.PathLike[str],
    path_out: str | os.PathLike[str],
    max_condition: float,
    *,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    dequantise: bool = False,
    progress: ProgressCallback | bool | None = None,
) -> RepairReport:
    """Copies a checkpoint so that every weight has kappa <= max_condition as it is stored.

    The weights have the names that they have in an audit: of a fused projection each block has a
    limit of its own (`attn.qkv.weight:q`), of a stack each matrix. A convolution is its flattened
    kernel of one group, because a file does not say how many groups there are.

    A weight that exceeds the limit is replaced by a nearest one in the Frobenius norm with
    kappa <= K/(1 + margin); margin is the smallest that was found for which kappa <= K still holds
    after rounding to the dtype of the file. A rank-deficient weight gets full rank. A zero weight,
    which has no condition number, a complex one and the factors of an adapter of low rank, which
    act by their product, stay as they are. All other tensors, the metadata, Python objects beside
    the tensors and the permissions are kept byte for byte; a compressed archive of torch.save is
    written unpacked.

    A weight that is built from several tensors is repaired where these can store the result:
    shards, and `weight_norm` and `spectral_norm` of torch; the report has what acts before and
    after. Others, such as codes and scales, stay as they are, and the report says which. With
    `dequantise` the copy stores each of these as one tensor instead, in the dtype that its parts or
    config.json name (float32 where neither does), within the limit; the settings of the
    quantisation are removed from config.json, and the index is rewritten. Such a copy consists of
    safetensors files: of a file of torch.save only the tensors are copied.

    The copy is written into a temporary folder and renamed; nothing is ever overwritten, and of two
    repairs to the same path one fails. A repair that is killed leaves that folder,
    `.wellcond-unfinished-*` beside path_out, which can be removed.

    Args:
        path_in: what `wellcond.audit` reads.
        path_out: a new file of the same format, with `dequantise` of safetensors; for a directory
            or a sharded checkpoint a new directory outside of it.
        max_condition: K, at least 1.
        include: one or more patterns (`fnmatch.fnmatchcase`) of names to repair; all if empty.
        exclude: one or more patterns of names to leave as they are.
        dequantise: whether weights that are stored as codes, or under a mask, become plain tensors,
            also those that no pattern matches, which are not changed otherwise. With max_condition
            = inf none is. A directory must have safetensors files.
        progress: True shows a bar, of tqdm if it is installed. Or a function that is called with a
            `Progress` before each tensor is read; `print` will do.

    Raises:
        ValueError: max_condition < 1; a weight is not finite, or no margin brings it below the
            limit, as for K < 1.004 or so in bfloat16; tensors overlap, neither a part of the other;
            a pattern matches nothing; a file is unreadable; path_out lies inside the directory that
            is read, or has the ending of another format; all weights are stored as codes, without
            `dequantise`; with it, no weight is stored as codes, or one of them cannot be
            dequantised. Nothing is written.
        FileExistsError: path_out exists.
        NotADirectoryError: a part of path_out is a file.
        OSError: path_out cannot be written, as on a full disk. Nothing of it is left.
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
    if is_of_torch(Path(path_in)):  # of others no copy is written, whatever it were called
        _check_ending(Path(path_in), Path(path_out), dequantise)
    checkpoint = Checkpoint(path_in)
    for file in checkpoint.files.values():
        if file.not_copied:
            raise ValueError(f"{file.path} cannot be repaired: {file.not_copied}.")
    for name, reason in checkpoint.damaged.items():
        raise ValueError(f"{checkpoint.path} cannot be repaired: {name} {reason}")
    source = source_of_file(checkpoint)
    # To limit each factor would limit nothing that acts.
    factors = (name for _, adapter in source.adapters for name in adapter.parts)
    unserved = {n: Skipped(Reason.factor) for n in factors if n not in source.skipped}
    entries = {name: entry for name, (_, entry) in checkpoint.where.items()}
    specs: list[RowSpec] = []
    for one in checkpoint.matrices():
        recipe = checkpoint.recipes.get(one.name)
        if recipe is not None and recipe.keeps and not dequantise:
            unserved[one.name] = Skipped(Reason.kept, recipe.keeps)
        elif entries[one.name].dtype.startswith("complex"):
            unserved[one.name] = Skipped(Reason.complex)
        specs += rows_of_tensor(one, source.skipped.get(one.name))
    chosen, skipped = select(specs, include, exclude, source.skipped | unserved)
    wanted: dict[str, list[RowSpec]] = {}
    for spec in chosen:
        if spec.name in unserved:  # a pattern may match it, and leaves it as it is
            skipped[spec.name] = unserved[spec.name]
        else:
            wanted.setdefault(spec.name, []).append(spec)
    plain = [n for n, r in checkpoint.recipes.items() if r.keeps] if dequantise else []
    alone = checkpoint.path.is_file() and checkpoint.index is None
    if dequantise:
        _check_codes(checkpoint, plain)
        check_plain(checkpoint, [checkpoint.recipes[name] for name in plain], alone)
    if not (wanted or plain):
        if kept := describe_kept(skipped):
            raise ValueError(f"{checkpoint.path} has nothing that can be repaired: {kept}.")
        why = list_some((f"{name}: {reason}" for name, reason in skipped.items()), separator="; ")
        raise ValueError(f"{checkpoint.path} must hold a weight matrix, but has none ({why}).")
    overlapping = [pair for pair in checkpoint.overlapping if wanted.keys() & set(pair)]
    if overlapping:
        raise ValueError(
            f"{checkpoint.path} cannot be repaired, because tensors overlap, and what changes one "
            f"changes the other: {list_some(f'{one} and {two}' for one, two in overlapping)}. "
            "Save them apart, each as tensor.clone()."
        )
    config = checkpoint.beside("config.json")
    dtypes = {name: dtype_of(checkpoint.recipes[name], config) for name in plain}
    repairs: list[Repair] = []
    refused: list[str] = []
    counter = Counter(None, work_of(rows[0].source.tensor for rows in wanted.values()))

    def change(name: str) -> Tensor | None:
        if name not in wanted or name in plain:
            return None
        counter.next(name)
        rows = wanted[name]
        try:
            holder, _ = checkpoint.where[name]
            if isinstance(holder, Built):
                new, done = _limit_built(holder, rows, max_condition, refused)
            else:
                tensor = rows[0].source.read().contiguous().clone()
                new, done = _limit_all(tensor, rows, max_condition, refused)
        except BuildError as error:
            refused.append(f"{name}: {error}")
            return None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError(
                f"{checkpoint.path} cannot be repaired, and nothing was written: there is not "
                f"enough memory for {name}. To leave a weight as it is, exclude it."
            ) from None
        repairs.extend(done)
        return new

    def values(label: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """The matrices of a weight that becomes plain, one after the other."""
        rows = wanted.get(label, [])
        if rows:
            counter.next(label)
        try:
            for W, own in _members(checkpoint.where[label][0], rows):
                tensor = W.to(dtype)
                _, done = _limit_all(tensor, own, max_condition, refused)
                repairs.extend(done)
                yield tensor
        except BuildError as error:
            raise ValueError(
                f"{checkpoint.path} cannot be dequantised, and nothing was written: {label}: "
                f"{error}."
            ) from None

    with shown(progress) as counter.callback, new_path(path_out) as copy:
        if not plain:
            checkpoint.copy_with(change, copy)
        else:
            weights = {}
            for name, dtype in dtypes.items():
                recipe = checkpoint.recipes[name]
                weights[name] = PlainWeight(recipe, dtype, partial(values, name, dtype))
            first = copy.with_name(f"codes{checkpoint.path.suffix}") if alone else copy
            checkpoint.copy_with(change, first)
            if not refused:
                write_plain(Checkpoint(first), copy, weights)
        if refused:
            raise ValueError(
                f"{checkpoint.path} cannot be repaired, and nothing was written: "
                f"{list_some(refused, separator='; ')}. To leave a weight as it is, exclude it."
            )
    changed = wanted.keys() - {spec.name for spec in specs if spec.label in skipped}  # as a whole
    others = {name: read for name, read in source.tensors.items() if name not in changed}
    left = {n for n, e in entries.items() if e.skipped is None or e.skipped.reason.of_adapter}
    not_finite, _ = not_finite_in(others, source.masks, left)
    dequantised = {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}
    versions = read_versions()
    return RepairReport(repairs, skipped, float(max_condition), versions, not_finite, dequantised)


def _check_codes(checkpoint: Checkpoint, plain: Sequence[str]) -> None:
    """Raises unless there are weights to dequantise, and none that cannot be."""
    codes = (Reason.quantised, Reason.torchao)
    reasons = ((name, entry.skipped) for name, (_, entry) in checkpoint.where.items())
    left = [f"{name} ({why})" for name, why in reasons if why and why.reason in codes]
    if left:
        raise ValueError(
            f"{checkpoint.path} cannot be dequantised, and nothing was written: "
            f"{list_some(left, limit=2, separator='; ')}."
        )
    if not plain:
        raise ValueError(
            f"`dequantise` asks for weights that are stored as codes, but {checkpoint.path} has "
            "none. Leave it out."
        )


def _members(holder: Holder, rows: list[RowSpec]) -> Iterator[tuple[Tensor, list[RowSpec]]]:
    """A weight with its rows; of a stack that is built in parts each matrix, a stack of one."""
    assert isinstance(holder, Built)
    count, found = holder.recipe.count, holder.matrices()
    if count == 1:
        yield found, rows
        return
    own: dict[int, list[RowSpec]] = {}
    for row in rows:
        if isinstance(row.matrix, Member):
            first = replace(row, matrix=Member(row.matrix.view, 0))
            own.setdefault(row.matrix.index, []).append(first)
    for index in range(count):
        yield found[index][None], own.get(index, [])


def _limit_all(
    tensor: Tensor, rows: list[RowSpec], max_condition: float, refused: list[str]
) -> tuple[Tensor | None, list[Repair]]:
    """Brings these matrices of a tensor within the limit; None if they are; adds what fails."""
    done = []
    for row in rows:
        view = cast(View, row.matrix)  # of tensors without adapters
        S = view(tensor)
        if not torch.isfinite(S).all():
            refused.append(f"{row.label} holds NaN or infinity")
            continue
        try:
            X, before, after, margin = limit_condition_number(S, max_condition)
        except ValueError as error:
            refused.append(f"{row.label}: {error}".rstrip("."))
            continue
        zero = "zero, without a condition number; left as it is" if math.isnan(before) else ""
        notes = [zero, row.note]
        if X is not S and not _CALLED_A_WEIGHT.search(last_part(row.name)):
            notes.append("changed, although its name is not that of a weight")
        if filled := ((S == 0).all(-1) & (X != 0).any(-1)).flatten().nonzero().flatten().tolist():
            notes.append(f"rows that were zero are filled: {list_some(map(str, filled))}")
        moved = 0.0 if X is S else _relative_change(S, X)
        note, shape = join_remarks(*notes), tuple(S.shape)
        dtype = str(S.dtype).removeprefix("torch.")
        done.append(Repair(row.name, row.view, shape, dtype, before, after, moved, margin, note))
        if X is not S:
            view.write_(tensor, X)
    return tensor if any(repair.relative_change for repair in done) else None, done


def _limit_built(
    holder: Built, rows: list[RowSpec], max_condition: float, refused: list[str]
) -> tuple[Tensor | None, list[Repair]]:
    """The same of a weight that is built from several tensors: what acts must obey.

    What acts after its parts have been rounded to their dtypes is measured, and the limit is
    tightened by the excess until that obeys.
    """
    old = holder.read(holder.recipe.label)
    limit = max_condition
    for _ in range(_ATTEMPTS):
        failed: list[str] = []
        new, done = _limit_all(old.clone(), rows, limit, failed)
        if failed or new is None:
            refused.extend(failed)
            return None, done
        acting = holder.read_after(new)
        pairs = [(view(old), view(acting)) for view in (cast(View, row.matrix) for row in rows)]
        kappas = [compute_spectrum(X, extremes=True).condition_number for _, X in pairs]
        excess = max((kappa / max_condition for kappa in kappas), default=0.0)
        if excess <= 1:
            margin = max_condition / limit - 1
            return new, [
                replace(one, after=kappa, relative_change=_relative_change(*pair), margin=margin)
                for one, kappa, pair in zip(done, kappas, pairs, strict=True)
            ]
        limit /= 1 + 2 * (excess - 1)
        if not limit >= 1:
            break
    refused.append(
        f"{holder.recipe.label}: no margin brings κ to at most {max_condition:g} once its parts "
        "are rounded to their dtypes"
    )
    return None, []


def _relative_change(S: Tensor, X: Tensor) -> float:
    wide, unit = split_scale(S)
    return frobenius_norm(X.to(torch.float64) / unit - wide) / frobenius_norm(wide)


def _check_output(source: Path, target: Path) -> None:
    """Raises unless a copy of the source can be written to the target."""
    refuse_existing(target)
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


def _check_ending(source: Path, target: Path, dequantise: bool) -> None:
    """Raises if the target's name promises another format than that of the source."""
    if source.is_dir() or source.name.endswith(INDEX):
        # Lightning calls its folders x.ckpt.
        alike = source.is_dir() and target.suffix == source.suffix
        if target.name.endswith((".safetensors", INDEX, *PICKLED)) and not alike:
            raise ValueError(
                f"`path_out` must be a directory, because {source} is copied with all that belongs "
                f"to it, but {target.name} ends as a file does. Choose a name without an ending."
            )
        return
    if dequantise and source.is_file():
        if target.suffix != ".safetensors":
            raise ValueError(
                "`path_out` must end in .safetensors, because dequantised weights are written in "
                f"that format, but got {target.name}."
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
