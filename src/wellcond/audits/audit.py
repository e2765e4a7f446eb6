"""Every weight of a model or a checkpoint measured, and what was left out and why.

Letters: S (m, n) a weight; sigma_1 >= ... >= sigma_nu its singular values, nu = min(m, n);
kappa = sigma_1/sigma_nu; u the unit roundoff of the dtype in which S is stored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from wellcond.audits.facts import with_comparison
from wellcond.audits.finite import not_finite_in
from wellcond.audits.plan import RowSpec, as_patterns, match, plan, select
from wellcond.audits.progress import Counter, ProgressCallback, work_of
from wellcond.audits.rows import Row, measure_rows
from wellcond.audits.sources import Source, source_of
from wellcond.files.pieces import Pieces, pieces_of
from wellcond.report.findings import Coverage, Finding, Grade, Status, failed_finding, sort_key
from wellcond.report.not_finite import NotFinite
from wellcond.report.report import AuditReport
from wellcond.text import and_more, versions
from wellcond.weights.kernels import describe_groups
from wellcond.weights.reasons import Skipped


def audit(
    model_or_path: nn.Module | str | os.PathLike[str],
    *,
    certify: bool = False,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    curves: int = 0,
    progress: ProgressCallback | None = None,
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
    others = [*source.tensors, *(f"{name}:merged" for name, _ in source.adapters)]
    specs, skipped = select(plan(source, heads), include, exclude, source.skipped, others)
    sources = [key for key, _ in groupby(specs, key=attrgetter("source"))]
    counter = Counter(progress, work_of(one.tensor for one in sources))
    rows = list(measure_rows(specs, certify, counter=counter))
    tensors = {
        name: pieces
        for name, pieces in source.tensors.items()
        if not match((name,), exclude) and (not include or match((name,), include))
    }
    not_finite, unread = _search(tensors, rows, source, skipped)
    failed = [*source.failed, *unread]
    rows.sort(key=lambda row: sort_key(row[1]))
    _add_curves(rows, curves - len(failed))
    findings = sorted([*failed, *(finding for _, finding in rows)], key=sort_key)
    _check_measured(findings, source.name, skipped, base is not None)
    coverage = _coverage(rows, len(failed), source, skipped)
    return AuditReport(findings, coverage, source.name, versions(), not_finite)


def _search(
    tensors: Mapping[str, Pieces],
    rows: Sequence[Row],
    source: Source,
    skipped: Mapping[str, Skipped],
) -> tuple[dict[str, NotFinite], list[Finding]]:
    """What holds NaN or infinity, of these tensors and the measured ones; what is unreadable."""
    of_tensors = [(spec, finding) for spec, finding in rows if spec.source.tensor is not None]
    bad = {spec.name: spec for spec, one in of_tensors if one.status is Status.not_finite}
    finite = {spec.name for spec, _ in of_tensors if spec.covers} - bad.keys()
    unknown = {name: pieces for name, pieces in tensors.items() if name not in finite}
    for name in bad.keys() - unknown.keys():  # of a base, or computed
        unknown[name] = partial(_pieces_of_row, bad[name])
    weights = {*bad, *(part for _, adapter in source.adapters for part in adapter.parts)}
    weights |= {name for name, why in skipped.items() if why.reason.of_adapter}
    found, unread = not_finite_in(unknown, source.masks, weights)
    return found, [failed_finding(name, "", why) for name, why in unread.items()]


def _pieces_of_row(spec: RowSpec) -> Iterator[Tensor]:
    assert spec.source.tensor is not None
    return pieces_of(spec.source.tensor.read().detach())


def _add_curves(rows: list[Row], count: int) -> None:
    """Gives all singular values to the first rows that lack them; reads each tensor once."""
    lacking = [
        index
        for index, (_, finding) in enumerate(rows[: max(0, count)])
        if finding.measured and not finding.singular_values and finding.grade is not Grade.bounded
    ]
    lacking.sort(key=lambda index: rows[index][0].source.name)
    again = measure_rows([rows[index][0] for index in lacking], all_values=True)
    for index, (spec, whole) in zip(lacking, again, strict=True):
        values = whole.singular_values  # none if it cannot be read or measured again
        rows[index] = spec, with_comparison(replace(rows[index][1], singular_values=values))


def _coverage(
    rows: Sequence[Row], failed: int, source: Source, skipped: dict[str, Skipped]
) -> Coverage:
    """What stands for parameters of the source; heads do not count."""
    own = [finding for spec, finding in rows if spec.covers and finding.measured]
    failed += sum(
        not finding.measured and (spec.covers or spec.source.tensor is not None)
        for spec, finding in rows
    )
    total = source.parameters
    total += sum(source.constants.get(name, 0) for name in {finding.name for finding in own})
    share = min(1.0, sum(finding.entries for finding in own) / total) if total else 0.0
    left_out = [(name, size) for name, size in source.sizes.items() if name in skipped]
    left_out.sort(key=lambda pair: -pair[1])
    kernels = sum(finding.view == "kernel" for finding in own) if source.of_file else 0
    return Coverage(len(own), failed, skipped, share, tuple(left_out[:3]), describe_groups(kernels))


def _check_measured(
    findings: Sequence[Finding], source: str, skipped: Mapping[str, Skipped], based: bool
) -> None:
    """Raises if nothing could be measured, or with a base no sum."""
    if not any(finding.measured for finding in findings):
        reasons = [f"{finding.label}: {finding.explanation}" for finding in findings]
        others = sorted(skipped.items(), key=lambda item: item[1].reason.no_matrix)
        reasons += [f"{name}: {why}" for name, why in others]
        listed = and_more((one.rstrip(".") for one in reasons or ["it is empty"]), separator="; ")
        raise ValueError(
            f"{source} must hold a weight matrix that can be measured, but has none ({listed})."
        )
    sums = [finding for finding in findings if finding.with_adapter]
    if based and sums and not any(finding.measured for finding in sums):
        why = f"{sums[0].label}: {sums[0].explanation}"
        raise ValueError(f"With `base` no sum of {source} can be measured ({why}).")
