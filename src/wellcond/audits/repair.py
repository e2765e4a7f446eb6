"""Rewrites a checkpoint so that every weight in it satisfies a limit on its condition number.

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
from wellcond.files.formats import ending_of
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

_ATTEMPTS = 8  # tries to find a margin that rounding does not exceed
# Usual names of weights in layers. Other tensors can be constants, or not act as linear maps.
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
    """Copies a checkpoint so that every stored weight has kappa <= max_condition.

    The weights have the same names as in an audit. Each block of a fused projection has its own
    limit (`attn.qkv.weight:q`), and so does each matrix of a stack. A convolution counts as its
    flattened kernel with one group, because a file does not store the number of groups.

    A weight that exceeds the limit is replaced by a nearest one in the Frobenius norm with
    kappa <= K/(1 + margin), where margin is the smallest that was found for which kappa <= K still
    holds after rounding to the dtype of the file. A rank-deficient weight gets full rank. Three
    kinds of weights remain unchanged: zero weights, whose condition number is undefined; complex
    weights; and the factors of low-rank adapters, of which only the product acts. All other
    tensors, the metadata, Python objects next to the tensors and the permissions are kept byte for
    byte. A compressed archive of torch.save is written uncompressed.

    A weight that is built from several tensors is repaired if these can store the result: shards,
    and `weight_norm` and `spectral_norm` of torch. The report describes the effective weight before
    and after. Other built weights, such as codes and scales, remain unchanged, and the report lists
    them. With `dequantise`, the copy stores each of these as one tensor within the limit, in the
    dtype that its parts or config.json specify (float32 by default). The quantisation settings are
    removed from config.json, and the index is rewritten. Such a copy consists of safetensors files;
    of a file of torch.save, it contains only the tensors.

    The copy is written to a temporary folder and renamed. Nothing is ever overwritten, and if two
    repairs write to the same path, one fails. A repair that is killed leaves the temporary folder,
    `.wellcond-unfinished-*` next to path_out, which can be removed.

    Args:
        path_in: a checkpoint that `wellcond.audit` reads.
        path_out: a new file of the same format, or a safetensors file with `dequantise`; for a
            directory or a sharded checkpoint, a new directory outside it.
        max_condition: K, at least 1.
        include: one or more patterns (`fnmatch.fnmatchcase`) of names to repair; all if empty.
        exclude: one or more patterns of names to leave unchanged.
        dequantise: whether weights that are stored as codes or under a mask become plain tensors.
            Those that no pattern matches are also dequantised, but not repaired. With max_condition
            = inf, no weight is repaired. A directory must contain safetensors files.
        progress: True shows a progress bar, of tqdm if it is installed. A function is called with a
            `Progress` before each tensor is read; `print` is such a function.

    Raises:
        ValueError: max_condition < 1; a weight is not finite, or no margin brings it within the
            limit, such as for K below about 1.004 in bfloat16; tensors overlap without one
            containing the other; a pattern matches nothing; a file is unreadable; path_out is
            inside the directory that is read, or has the extension of another format; without
            `dequantise`, all weights are stored as codes; with `dequantise`, no weight is stored as
            codes, or one of them cannot be dequantised. Nothing is written.
        FileExistsError: path_out exists.
        NotADirectoryError: a part of path_out is a file.
        OSError: path_out cannot be written, for example because the disk is full. No part of it
            remains.
        MemoryError: there is not enough memory for a weight, which the error names. Nothing is
            written.

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
    if is_of_torch(Path(path_in)):  # other formats are never copied, whatever the name of the copy
        _check_ending(Path(path_in), Path(path_out), dequantise)
    checkpoint = Checkpoint(path_in)
    for file in checkpoint.files.values():
        if file.not_copied:
            raise ValueError(f"{file.path} cannot be repaired: {file.not_copied}.")
    for name, reason in checkpoint.damaged.items():
        raise ValueError(f"{checkpoint.path} cannot be repaired: {name} {reason}")
    source = source_of_file(checkpoint)
    # A limit on each factor would not limit the effective weight.
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
        if spec.name in unserved:  # a pattern may match the weight, but it remains unchanged
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
        raise ValueError(f"{checkpoint.path} must contain a weight matrix, but has none ({why}).")
    overlapping = [pair for pair in checkpoint.overlapping if wanted.keys() & set(pair)]
    if overlapping:
        raise ValueError(
            f"{checkpoint.path} cannot be repaired, because tensors share memory and cannot be "
            f"changed separately: {list_some(f'{one} and {two}' for one, two in overlapping)}. "
            "Save a copy of each, made with tensor.clone()."
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
                f"enough memory for {name}. To leave a weight unchanged, exclude it."
            ) from None
        repairs.extend(done)
        return new

    def values(label: str, dtype: torch.dtype) -> Iterator[Tensor]:
        """The matrices of a weight that becomes a plain tensor, one after the other."""
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
                f"{list_some(refused, separator='; ')}. To leave a weight unchanged, exclude it."
            )
    # Weights of which every row was repaired.
    changed = wanted.keys() - {spec.name for spec in specs if spec.label in skipped}
    others = {name: read for name, read in source.tensors.items() if name not in changed}
    left = {n for n, e in entries.items() if e.skipped is None or e.skipped.reason.of_adapter}
    not_finite, _ = not_finite_in(others, source.masks, left)
    dequantised = {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}
    versions = read_versions()
    return RepairReport(repairs, skipped, float(max_condition), versions, not_finite, dequantised)


def _check_codes(checkpoint: Checkpoint, plain: Sequence[str]) -> None:
    """Raises unless there are quantised weights and all of them can be dequantised."""
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
            f"`dequantise` requires weights that are stored as codes, but {checkpoint.path} "
            "contains none. Omit it."
        )


def _members(holder: Holder, rows: list[RowSpec]) -> Iterator[tuple[Tensor, list[RowSpec]]]:
    """Yields a weight with its rows; for a stack that is built in parts, each matrix as a stack."""
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
    """Brings these matrices of a tensor within the limit, and appends failures to `refused`.

    Returns the tensor, or None if nothing changed, and the repairs.
    """
    done = []
    for row in rows:
        view = cast(View, row.matrix)  # of tensors without adapters
        S = view(tensor)
        if not torch.isfinite(S).all():
            refused.append(f"{row.label} contains NaN or infinity")
            continue
        try:
            X, before, after, margin = limit_condition_number(S, max_condition)
        except ValueError as error:
            refused.append(f"{row.label}: {error}".rstrip("."))
            continue
        zero = "zero, so κ is undefined; unchanged" if math.isnan(before) else ""
        notes = [zero, row.note]
        if X is not S and not _CALLED_A_WEIGHT.search(last_part(row.name)):
            notes.append("changed, although its name does not look like a weight")
        if filled := ((S == 0).all(-1) & (X != 0).any(-1)).flatten().nonzero().flatten().tolist():
            notes.append(f"zero rows became nonzero: {list_some(map(str, filled))}")
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
    """Brings a weight that is built from several tensors within the limit, like `_limit_all`.

    The effective weight is measured after its parts are rounded to their dtypes. The limit is
    tightened by the excess until the effective weight satisfies `max_condition`.
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
        f"{holder.recipe.label}: no margin brings κ to at most {max_condition:g} after its parts "
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
                f"`path_out` must be in a directory, but {parent} is a file. Choose another path."
            )
    resolved = target.resolve()
    # Copying follows links, which can lead to the folder where the copy is written.
    seen: set[Path] = set()
    for folder, below, _ in os.walk(source, followlinks=True):
        real = Path(folder).resolve()
        if resolved.is_relative_to(real):
            raise ValueError(
                f"`path_out` must be outside the directory that is copied, but {target} is in "
                f"{folder}. Choose a path next to {source}."
            )
        if real in seen:
            below.clear()
        seen.add(real)


def _check_ending(source: Path, target: Path, dequantise: bool) -> None:
    """Raises if the extension of the target does not fit the format of the source."""
    if source.is_dir() or source.name.endswith(INDEX):
        # Lightning calls its folders x.ckpt.
        alike = source.is_dir() and target.suffix == source.suffix
        if target.name.endswith((".safetensors", INDEX, *PICKLED)) and not alike:
            raise ValueError(
                f"`path_out` must be a directory, because all files of {source} are copied, but "
                f"{target.name} has the extension of a file. Choose a name without an extension."
            )
        return
    if dequantise and source.is_file():
        if target.suffix != ".safetensors":
            raise ValueError(
                "`path_out` must end in .safetensors, because dequantised weights are written in "
                f"that format, got {target.name}."
            )
        return
    if not source.is_file():
        return
    endings: tuple[str, ...] = PICKLED
    kind, fits = "torch.save", target.suffix == source.suffix != ".safetensors"
    if ending_of(source).lower().endswith(".safetensors"):
        kind, fits, endings = "safetensors", False, (".safetensors",)
    if not (fits or target.name.endswith(endings)) or target.name.endswith(INDEX):
        kept = source.suffix if source.suffix in endings else endings[0]
        raise ValueError(
            f"`path_out` must end in {' or '.join(sorted(endings))}, because the copy has the "
            f"format of {source.name}, which is a {kind} file, got {target.name}. Choose "
            f"{target.with_suffix(kept).name}."
        )
