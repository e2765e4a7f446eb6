"""Every weight of a model or a checkpoint measured, and what was left out and why.

Letters: S (m, n) a weight; sigma_1 >= ... >= sigma_nu its singular values, nu = min(m, n);
kappa = sigma_1/sigma_nu; u the unit roundoff of the dtype in which S is stored.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor, nn

from wellcond.audits.finite import not_finite_in
from wellcond.audits.progress import Counter, Told, work_of
from wellcond.audits.rows import (
    failed_row,
    finding_of_adapter,
    findings_of,
    findings_of_heads,
)
from wellcond.audits.sources import Source, source_of
from wellcond.files.pieces import Pieces, pieces_of
from wellcond.report.findings import MERGED, Coverage, Finding, Grade, Status, sort_key
from wellcond.report.not_finite import NotFinite
from wellcond.report.report import AuditReport
from wellcond.text import and_more, of_modules, versions
from wellcond.weights.adapters import Adapter
from wellcond.weights.effective import current
from wellcond.weights.heads import Attention
from wellcond.weights.kernels import describe_groups
from wellcond.weights.matrices import Matrices
from wellcond.weights.reasons import Reason, Skipped


def audit(
    model_or_path: nn.Module | str | os.PathLike[str],
    *,
    certify: bool = False,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    curves: int = 0,
    progress: Told | None = None,
    example: Any = None,
    heads: bool = False,
    base: nn.Module | str | os.PathLike[str] | None = None,
) -> AuditReport:
    """Measures every weight of a model, or of a checkpoint without loading it whole.

    All arithmetic is float64 on the CPU. The singular values come from the smaller Gram matrix,
    from inverse iteration and an SVD where that does not resolve sigma_nu, and of weights with
    nu >= 2048 only the extremes, by Krylov spaces; each finding says which. kappa was right to 1e-6
    up to 1e5 (`wellcond bench audit`). Nothing of the model is touched.

    A model is read by its modules: convolution kernels as (out, in/groups * kernel), of several
    groups as one block-diagonal map, attention's in_proj as its three blocks, gates of recurrent
    cells, parametrized weights by their value. So are those that `spectral_norm`, `weight_norm` and
    `prune` of torch.nn.utils compute; of a layer with a forward of its own it is the weight that
    the forward hands to the product, found by a forward pass of a copy. Embeddings and parameters
    of unknown modules are skipped unless their exact name is included.

    A file has no classes, so names decide first, then the tensors of the same module, then shapes;
    a guess is called one in its row. Left out by name, and taken by their exact name alone, are
    embeddings, tokens, positions, fixed transforms, masks, normalisations over several axes and
    parameters that are exponentiated. Slices of larger tensors and codes of quantised weights,
    whatever their dtype, are never measured. Query, key and value are cut where a name or
    config.json says their order, gates and experts by names and shapes that fit. A `kernel` has
    its inputs first, as Keras and Flax store it; a weight of 3 dimensions is a kernel if it is
    called "conv", if its bias has as many entries as it has outputs, or if its last side is small,
    else a stack; of 4 and more a kernel, of one group. Tied weights count once.

    Args:
        model_or_path: a module, wrapped by torch.compile or DistributedDataParallel or not; or a
            .safetensors file, a *.safetensors.index.json, a state dict of torch.save (.pt, .pth,
            .bin, .ckpt, .pth.tar), or a directory of these. Of other Python objects in a file the
            classes are named and not loaded.
        certify: enclose sigma_max, sigma_min and kappa of each by `wellcond.certify` as well.
        include: a pattern (`fnmatch.fnmatchcase`) or several, of names to measure; all if empty.
        exclude: a pattern or several, of names to leave out.
        curves: of so many of the worst weights find all singular values, however large they are.
        progress: called with a `Progress` before each tensor is read: its name, its number, how
            many there are, and about how long the rest will take. `print` will do.
        example: what a model is called with: a tensor, a tuple, or a dict of named arguments. One
            forward pass on it, in eval mode and without gradients, shows on inputs of which size
            the convolutions act, and each that it reaches is measured as that map, with stride,
            dilation, padding and groups, under the view "operator" instead of "kernel". That is
            exact where the kernel sees no input twice, on a torus, and where the dense matrix has
            at most 4096 singular values; else sigma_max is enclosed and kappa is a lower bound, and
            the grade is "bounded".
        heads: measure the heads of attention besides: of head 3 W_Q^T W_K, by which it compares two
            inputs, as `layers.0.self_attn:qk3`, and W_O W_V, what it carries from one to the other,
            as `layers.0.self_attn:vo3`; without biases and 1/sqrt(d_head). Of the many singular
            values of such a product all but d_head are zero: sigma_nu, kappa and the rest are of
            these d_head. The detail says what stands between and is left out, such as a rotation by
            position. Of a file the numbers of heads are read from the config.json beside it. In the
            coverage heads do not count, and none is certified.
        base: of a path that is an adapter of low rank (LoRA) the model, or the path of one, that it
            adapts. To W the adapter adds s B A: measured are `q_proj.weight`, the weight as it is,
            `q_proj.weight:merged`, W + s B A in float64, and `q_proj.weight:delta`, s B A alone,
            of which all but r singular values are zero; and how much of the r largest singular
            values of the sum comes from the adapter. All else of the base is left out. s comes from
            the adapter_config.json beside the adapter. Without a base there is the delta alone, and
            a model of PEFT holds its base.

    Returns:
        An `AuditReport`. A weight that could not be measured is a finding that says why. All other
        floating point tensors that no pattern leaves out, such as biases and embeddings, and the
        buffers of a model, are searched for NaN and infinity: see `AuditReport.not_finite`.

    Raises:
        ValueError: nothing could be measured, a pattern matches nothing, a file is unreadable, the
            model does not take the example, there is no attention if heads are asked for, or the
            base is none for this adapter.
        FileNotFoundError: the path is not there.
        TypeError: neither a module nor a path; an example for a path; a base for a model.

    Example:
        >>> import torch, wellcond as wc
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        >>> report = wc.audit(model)
        >>> sorted(finding.name for finding in report.findings), report.coverage.measured
        (['0.weight', '1.weight'], 2)
        >>> layer = torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
        >>> wc.audit(layer, example=torch.zeros(1, 3, 8, 8)).findings[0].label
        'weight:operator'
        >>> attention = torch.nn.MultiheadAttention(8, 2)
        >>> sorted(f.label for f in wc.audit(attention, include=["qk*"], heads=True).findings)
        ['qk0', 'qk1']
    """
    include, exclude = as_patterns(include), as_patterns(exclude)
    source = source_of(model_or_path, example, base)
    attentions, value = source.heads() if heads else ([], current)
    if heads and not attentions:
        raise ValueError(
            f"`heads` asks for the heads of attention, but {source.name} has none that is known. "
            "Leave it out, or call the projections q_proj, k_proj, v_proj and o_proj."
        )
    rows = [names for one in attentions for names in _rows_of(one).values()]
    rows += [(*_names_of(*one), f"{one[0]}:merged") for one in source.adapters]
    skipped = source.skipped
    wanted = chosen(source.matrices, skipped, include, exclude, rows, [*source.tensors])
    adapters = [one for one in source.adapters if _asked_for(_names_of(*one), include, exclude)]
    bases = [one for one in source.bases if _views_with_adapters(one, include, exclude)]
    heads_of = {id(one): _views_of(one, include, exclude) for one in attentions}
    attentions = [one for one in attentions if heads_of[id(one)]]
    work = work_of([*wanted, *bases])
    # Heads of a module, together, and an adapter take no longer than other matrices in the mean.
    work += [math.fsum(work) / max(1, len(work))] * (len(attentions) + len(adapters))
    counter = Counter(progress, work)

    findings = [
        Finding(name, "", (0, 0), "", status=Status.failed, detail=reason)
        for name, reason in source.failed.items()
    ]
    findings += [
        Finding(name, MERGED, (0, 0), "", status=Status.failed, detail=reason)
        for name, reason in source.baseless.items()
    ]
    where: dict[int, Matrices] = {}

    def measure(matrices: Sequence[Matrices]) -> None:
        for one in matrices:
            counter.next(one.name)
            found = findings_of(one, certify)
            if one.adapters:
                views = _views_with_adapters(one, include, exclude)
                found = [f for f in found if f.with_adapter in views]
            where.update({id(finding): one for finding in found})
            findings.extend(found)

    measure(wanted)
    for name, adapter in adapters:
        counter.next(name)
        findings.append(finding_of_adapter(adapter, name))

    def scan(tensors: Mapping[str, Pieces]) -> dict[str, NotFinite]:
        weights = {f.name for f in findings if f.status is Status.not_finite}
        weights |= {part for _, adapter in source.adapters for part in adapter.parts}
        weights |= {name for name, why in skipped.items() if why.reason.of_adapter}
        found, unread = not_finite_in(tensors, source.masks, weights)
        findings.extend(failed_row(name, error) for name, error in unread.items())
        return found

    not_finite = scan(
        _select_unmeasured(source.tensors, findings, where.values(), include, exclude)
    )
    own = [finding for finding in findings if finding.measured]
    # These stand for parameters that are counted already, or for those of another source.
    measure(bases)
    bad = {
        f.name: where[id(f)] for f in findings if f.status is Status.not_finite and id(f) in where
    }
    not_finite |= scan(
        {n: partial(_read_pieces, one) for n, one in bad.items() if n not in not_finite}
    )
    coverage = _coverage(own, [f for f in findings if not f.measured], source)
    for attention in attentions:
        counter.next(attention.name)
        findings += findings_of_heads(attention, heads_of[id(attention)], value)
    if not any(finding.measured for finding in findings):
        raise ValueError(_nothing(source.name, findings, skipped))
    sums = [finding for finding in findings if finding.with_adapter]
    if base is not None and sums and not any(finding.measured for finding in sums):
        why = f"{sums[0].label}: {sums[0].explanation}"
        raise ValueError(f"With `base` no sum of {source.name} can be measured ({why}).")
    findings.sort(key=sort_key)
    _find_curves(findings, where, curves)
    return AuditReport(findings, coverage, source.name, versions(), not_finite)


def _find_curves(findings: list[Finding], where: Mapping[int, Matrices], curves: int) -> None:
    """Gives all singular values to the first findings that lack them; reads each tensor once."""
    lacking: dict[int, dict[str, int]] = {}
    for index, finding in enumerate(findings[:curves]):
        known = finding.singular_values or finding.grade is Grade.bounded
        if finding.measured and not known:
            lacking.setdefault(id(where[id(finding)]), {})[finding.view] = index
    tensors = {id(one): one for one in where.values()}
    for key, indices in lacking.items():
        # None of these if it cannot be read or measured again.
        for again in findings_of(tensors[key], certify=False, all_values=True, only=indices):
            if again.view in indices:
                index, values = indices[again.view], again.singular_values
                findings[index] = replace(findings[index], singular_values=values)


def as_patterns(given: str | Sequence[str]) -> Sequence[str]:
    """The patterns; a text is one of them."""
    return [given] if isinstance(given, str) else given


def _select_unmeasured(
    tensors: Mapping[str, Pieces],
    findings: Sequence[Finding],
    measured: Iterable[Matrices],
    include: Sequence[str],
    exclude: Sequence[str],
) -> dict[str, Pieces]:
    """The tensors of which it is not known yet that they are finite, as far as they are wanted."""
    finite = {one.name for one in measured}
    finite -= {finding.name for finding in findings if finding.status is Status.not_finite}
    return {
        name: pieces
        for name, pieces in tensors.items()
        if name not in finite and _asked_for((name,), include, exclude)
    }


def _read_pieces(one: Matrices) -> list[Tensor]:
    return [*pieces_of(one.read().detach())]


def _coverage(measured: Sequence[Finding], failed: Sequence[Finding], source: Source) -> Coverage:
    """Measured counts what stands for parameters of its own: no weight a second time, as a sum."""
    own = [finding for finding in measured if not finding.with_adapter]
    covered = sum(finding.entries for finding in own)
    total = source.parameters
    total += sum(source.constants.get(name, 0) for name in {finding.name for finding in own})
    share = min(1.0, covered / total) if total else 0.0
    left_out = [(name, size) for name, size in source.sizes.items() if name in source.skipped]
    left_out.sort(key=lambda pair: -pair[1])
    kernels = sum(finding.view == "kernel" for finding in own) if source.of_file else 0
    note = describe_groups(kernels)
    return Coverage(len(own), len(failed), source.skipped, share, tuple(left_out[:3]), note)


def chosen(
    matrices: list[Matrices],
    skipped: dict[str, Skipped],
    include: Sequence[str],
    exclude: Sequence[str],
    others: Sequence[Sequence[str]] = (),
    tensors: Sequence[str] = (),
) -> list[Matrices]:
    """What is to be measured; adds to `skipped` what is not.

    A pattern may match others alone, and one of `exclude` tensors that are no matrices.
    """
    unused = {*include, *(p for p in exclude if not any(fnmatchcase(n, p) for n in tensors))}
    unused -= {p for p in unused for names in others if any(fnmatchcase(n, p) for n in names)}

    def match(one: Matrices, patterns: Sequence[str]) -> str | None:
        matching = [p for p in patterns if any(fnmatchcase(name, p) for name in one.aliases)]
        unused.difference_update(matching)
        return next(iter(matching), None)

    wanted = []
    for one in matrices:
        included, excluded = match(one, include), match(one, exclude)
        if excluded is not None:
            skipped[one.name] = Skipped(Reason.excluded, f'"{excluded}"')
        elif include and included is None:
            skipped[one.name] = Skipped(Reason.unmatched)
        elif one.name not in skipped or included in one.aliases:
            skipped.pop(one.name, None)
            wanted.append(one)
    if unused:
        why = [f"{n} is left out: {skipped[n]}" for n in sorted(unused & skipped.keys())]
        raise ValueError(
            f"`include` and `exclude` must match a weight, but {', '.join(sorted(unused))} "
            f"matches none. {''.join(f'{one}. ' for one in why)}"
            f"The weights are {and_more(one.name for one in matrices)}."
            f"{of_modules(unused, (one.name for one in matrices))}"
        )
    return wanted


def _views_of(attention: Attention, include: Sequence[str], exclude: Sequence[str]) -> set[str]:
    """The rows that are asked for."""
    rows = _rows_of(attention)
    return {view for view, names in rows.items() if _asked_for(names, include, exclude)}


def _asked_for(names: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> bool:
    included, excluded = (
        any(fnmatchcase(name, pattern) for pattern in patterns for name in names)
        for patterns in (include, exclude)
    )
    return not excluded and (included or not include)


def _names_of(name: str, adapter: Adapter) -> tuple[str, ...]:
    """What a pattern may match of an adapter to the weight of this name."""
    return name, f"{name}:delta", *adapter.parts


def _views_with_adapters(
    one: Matrices, include: Sequence[str], exclude: Sequence[str]
) -> set[bool]:
    """Of a weight with adapters, which rows are asked for: True the sum, False it alone."""
    parts = [part for adapter in one.adapters for part in adapter.parts]
    names = {False: (one.name, *parts), True: (one.name, f"{one.name}:merged", *parts)}
    return {view for view in names if _asked_for(names[view], include, exclude)}


def _rows_of(attention: Attention) -> dict[str, tuple[str, ...]]:
    """The rows of an attention by their view, and what a pattern may match of each."""
    views = [*(head.view for head in attention.heads), *attention.unknown]
    return {view: attention.names(view) for view in views}


def _nothing(source: str, findings: list[Finding], skipped: dict[str, Skipped]) -> str:
    reasons = [f"{finding.label}: {finding.explanation}" for finding in findings]
    others = sorted(skipped.items(), key=lambda item: item[1].reason.no_matrix)
    reasons += [f"{name}: {why}" for name, why in others]
    listed = (
        and_more((one.rstrip(".") for one in reasons), separator="; ") if reasons else "it is empty"
    )
    return f"{source} must hold a weight matrix that can be measured, but has none ({listed})."
