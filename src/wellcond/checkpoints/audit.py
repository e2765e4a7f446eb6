"""Every weight of a model or a checkpoint measured, and what was left out and why.

Letters: S (m, n) a weight; sigma_1 >= ... >= sigma_nu its singular values, nu = min(m, n);
kappa = sigma_1/sigma_nu; u the unit roundoff of the dtype in which S is stored.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wellcond.checkpoints.acting import acting
from wellcond.checkpoints.files import Checkpoint
from wellcond.checkpoints.findings import (
    Coverage,
    Finding,
    Grade,
    Status,
    sort_key,
    with_entries,
)
from wellcond.checkpoints.progress import Counter, Told, work_of
from wellcond.checkpoints.report import AuditReport
from wellcond.linalg.certify import certificate_of_blocks, certify
from wellcond.linalg.interval import Interval
from wellcond.linalg.products import spectrum_of_product
from wellcond.linalg.scaling import frobenius_norm
from wellcond.linalg.spectrum import Method, Spectrum, measure, negligible, spectrum_of_blocks
from wellcond.operators.convolution import Convolution, Geometry
from wellcond.operators.product import Product
from wellcond.text import and_more, out_of_memory, versions
from wellcond.weights.discover import current, effective_matrices, heads_of, unwrapped
from wellcond.weights.heads import Attention, Head, Value, heads_by_name
from wellcond.weights.matrices import Matrices
from wellcond.weights.reasons import Reason, Skipped
from wellcond.weights.sizes import geometries

# A measured kappa so far from its certificate, relatively, is worth a word.
_ERROR = 1e-6

# Of a convolution there may be millions of singular values: so many are kept to be drawn.
_DRAWN = 4096

_CONFIG = 1 << 20  # bytes; those of large models have some thousand

_Find = Callable[[], tuple[list[Attention], Value]]


def audit(
    model_or_path: nn.Module | str | os.PathLike[str],
    certify: bool = False,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    curves: int = 0,
    progress: Told | None = None,
    example: Any = None,
    heads: bool = False,
) -> AuditReport:
    """Measures every weight of a model, or of a checkpoint without loading it whole.

    All arithmetic is float64 on the CPU. The singular values come from the smaller Gram matrix,
    from inverse iteration and an SVD where that does not resolve sigma_nu, and of weights with
    nu >= 2048 only the extremes, by Krylov spaces; each finding says which. kappa was right to 1e-6
    up to 1e5 (`wellcond bench audit`). Nothing of the model is touched.

    A model is read by its modules: convolution kernels as (out, in/groups * kernel), of several
    groups as one block-diagonal map, attention's in_proj as its three blocks, gates of recurrent
    cells, parametrized weights by their value. Embeddings and parameters of unknown modules are
    skipped unless their exact name is included. A file has no classes: embeddings, tokens,
    positions and what a parametrized weight is computed from are known by their names; every other
    float tensor of 2 dimensions is measured, of 3 a stack unless its name contains "conv", of 4 and
    more a kernel, as if of one group. Tied weights count once.

    Args:
        model_or_path: a module, wrapped by torch.compile or DistributedDataParallel or not; or a
            .safetensors file, a *.safetensors.index.json, a state dict of torch.save (.pt, .pth,
            .bin, .ckpt), or a directory of these.
        certify: enclose sigma_max, sigma_min and kappa of each by `wellcond.certify` as well.
        include: patterns (`fnmatch.fnmatchcase`) of names to measure; all if empty.
        exclude: patterns of names to leave out.
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

    Returns:
        An `AuditReport`. A weight that could not be measured is a finding that says why.

    Raises:
        ValueError: nothing could be measured, a pattern matches nothing, a file is unreadable, the
            model does not take the example, or there is no attention if heads are asked for.
        FileNotFoundError: the path is not there.
        TypeError: neither a module nor a path; an example for a path.

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
    matrices, skipped, damaged, total, source, find = _source(model_or_path, example)
    attentions, value = find() if heads else ([], current)
    if heads and not attentions:
        raise ValueError(
            f"`heads` asks for the heads of attention, but {source} has none that is known. Leave "
            "it out, or call the projections q_proj, k_proj, v_proj and o_proj."
        )
    rows = [names for one in attentions for names in _rows_of(one).values()]
    wanted = chosen(matrices, skipped, include, exclude, rows)
    findings = [
        Finding(name, "", (0, 0), "", status=Status.failed, detail=reason)
        for name, reason in damaged.items()
    ]
    where: dict[int, Matrices] = {}
    covered = 0
    views = {id(one): _views_of(one, include, exclude) for one in attentions}
    attentions = [one for one in attentions if views[id(one)]]
    work = work_of(wanted)
    # The heads of a module together take about as long as one of its matrices.
    work += [math.fsum(work) / max(1, len(work))] * len(attentions)
    counter = Counter(progress, work)
    for one in wanted:
        counter.next(one.name)
        found = _findings(one, certify)
        where |= {id(finding): one for finding in found}
        covered += sum(finding.entries for finding in found if finding.measured)
        findings += found
    measured = sum(finding.measured for finding in findings)
    failed = len(findings) - measured
    for attention in attentions:
        counter.next(attention.name)
        findings += _of_heads(attention, views[id(attention)], value)
    if not any(finding.measured for finding in findings):
        raise ValueError(_nothing(source, findings, skipped))
    findings.sort(key=sort_key)
    for index, finding in enumerate(findings[:curves]):
        known = finding.singular_values or finding.grade is Grade.bounded
        if finding.measured and not known:
            # None of these if it cannot be read or measured again.
            again = _findings(where[id(finding)], certify=False, all_values=True)
            values = [other.singular_values for other in again if other.view == finding.view]
            findings[index] = replace(finding, singular_values=values[0] if values else ())
    coverage = Coverage(measured, failed, skipped, min(1.0, covered / total) if total else 0.0)
    return AuditReport(findings, coverage, source, versions())


def _source(
    model_or_path: nn.Module | str | os.PathLike[str], example: Any
) -> tuple[list[Matrices], dict[str, Skipped], dict[str, str], int, str, _Find]:
    """The matrices, what is none, what is damaged, how many parameters there are, a name, and how
    to find heads."""
    if isinstance(model_or_path, nn.Module):
        model = unwrapped(model_or_path)
        sliding = {} if example is None else geometries(model, example)
        matrices, skipped, total = effective_matrices(model, sliding)
        name = type(model).__name__
        return matrices, skipped, {}, total, name, lambda: (heads_of(model), current)
    if isinstance(model_or_path, str | os.PathLike):
        if example is not None:
            raise TypeError(
                "`example` must come with a model, got a path: a file does not say how its "
                "convolutions slide. Load the model, and audit that."
            )
        file = Checkpoint(model_or_path)
        found, name = list(file.matrices()), str(file.path)
        heads = partial(_heads_in, file, found)
        return found, file.skipped(), file.damaged, file.parameters, name, heads
    raise TypeError(
        "`model_or_path` must be a torch.nn.Module or a path, got "
        f"{type(model_or_path).__name__}. Of a state dict save a file, or audit its model."
    )


def chosen(
    matrices: list[Matrices],
    skipped: dict[str, Skipped],
    include: Sequence[str],
    exclude: Sequence[str],
    others: Sequence[Sequence[str]] = (),
) -> list[Matrices]:
    """What is to be measured; adds to `skipped` what is not. A pattern may match others alone."""
    unused = {*include, *exclude}
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
        raise ValueError(
            f"`include` and `exclude` must match a weight, but {', '.join(sorted(unused))} "
            f"matches none. The weights are {and_more(one.name for one in matrices)}."
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


def _heads_in(file: Checkpoint, matrices: Sequence[Matrices]) -> tuple[list[Attention], Value]:
    """The heads in a file, and how to read its tensors by their names."""
    read = {alias: one.read for one in matrices for alias in one.aliases}
    entries = {name: entry for name, (_, entry) in file.where.items()}
    shapes = {alias: entries[one.name].shape for one in matrices for alias in one.aliases}
    shapes |= {name: entry.shape for name, entry in entries.items() if len(entry.shape) == 1}
    return heads_by_name(shapes, _config(file.directory)), lambda _, name: read[name]()


def _config(directory: Path) -> dict[str, Any]:
    """What config.json says there; nothing if it is none."""
    path = directory / "config.json"
    try:
        if not path.is_file() or path.stat().st_size > _CONFIG:
            return {}
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _rows_of(attention: Attention) -> dict[str, tuple[str, ...]]:
    """The rows of an attention by their view, and what a pattern may match of each."""
    views = [*(head.view for head in attention.heads), *attention.unknown]
    return {view: attention.names(view) for view in views}


def _nothing(source: str, findings: list[Finding], skipped: dict[str, Skipped]) -> str:
    reasons = [f"{finding.label}: {finding.explanation}" for finding in findings]
    reasons += [f"{name}: {why}" for name, why in skipped.items()]
    listed = and_more(reasons, separator="; ") if reasons else "it is empty"
    return f"{source} must hold a weight matrix that can be measured, but has none ({listed})."


def _findings(one: Matrices, certify: bool, all_values: bool = False) -> list[Finding]:
    """A row for each matrix of a tensor; trouble with one is its status."""
    try:
        tensor = one.read()
        views = one.views(tensor)
    except Exception as error:  # whatever it is, the other weights are still to be measured
        return [Finding(one.name, "", (0, 0), "", status=Status.failed, detail=_in_words(error))]
    found = []
    for view, S in views.items():
        if one.geometry is not None:
            found.append(_acting(one.name, tensor.detach().cpu(), one.geometry))
            continue
        blank = Finding(one.name, view, tuple(S.shape), str(S.dtype).removeprefix("torch."))
        try:
            found.append(_finding(blank, S.detach().cpu(), certify, all_values))
        except Exception as error:
            found.append(replace(blank, status=Status.failed, detail=_in_words(error)))
    return found


def _acting(name: str, kernel: Tensor, geometry: Geometry) -> Finding:
    """The row of a convolution as it acts; trouble with it is its status."""
    S = Convolution(kernel, geometry)
    dtype = str(S.dtype).removeprefix("torch.")
    blank = Finding(name, "operator", tuple(S.shape), dtype, entries=kernel.numel())
    if not bool(torch.isfinite(kernel).all()):
        detail = f"{int((~torch.isfinite(kernel)).sum())} of {kernel.numel()} entries"
        return replace(blank, status=Status.not_finite, detail=detail)
    try:
        found = acting(S)
    except Exception as error:
        return replace(blank, status=Status.failed, detail=_in_words(error))
    (below, above), (_, smallest) = found.largest, found.smallest
    squared = float(S.squared_frobenius_norm(torch.float64))
    exact = len(found.singular_values) > 0
    status, kappa = Status.ok, math.nan
    if above == 0:
        status = Status.zero
    elif exact and smallest <= negligible(S.shape) * below:
        status, kappa = Status.rank_deficient, math.inf
    else:
        kappa = below / smallest if smallest > 0 else math.inf
    notes = [f"on {geometry}"]
    if not exact:
        notes.append(f"σ_max lies between {below:.6g} and {above:.6g}, and κ is at least this")
    return replace(
        blank,
        sigma_max=below,
        sigma_min=smallest,
        condition_number=kappa,
        stable_rank=squared / below**2 if below > 0 else math.nan,
        rank=int((found.singular_values > negligible(S.shape) * below).sum()),
        penalty=max(0.0, (below**2 - squared / S.nu) / 2),
        grade=Grade.computed if exact else Grade.bounded,
        status=status,
        detail="; ".join(notes),
        method=found.how,
        singular_values=tuple(found.singular_values[:: -(-S.nu // _DRAWN)].tolist()),
    )


def _of_heads(attention: Attention, views: set[str], value: Value) -> list[Finding]:
    """The rows of these heads of a module; trouble with one is its status."""

    def blank(view: str, shape: tuple[int, ...] = (0, 0), dtype: str = "") -> Finding:
        name = attention.name or view  # of a model that is itself attention, as `weight` of one
        return Finding(name, view if attention.name else "", shape, dtype)

    found = [
        replace(blank(view), status=Status.failed, detail=why)
        for view, why in attention.unknown.items()
        if view in views
    ]
    try:
        for head, S in attention.products(value, views.__contains__):
            views = views - {head.view}
            row = blank(head.view, tuple(S.shape), str(S.dtype).removeprefix("torch."))
            try:
                found.append(_of_head(row, head, S))
            except Exception as error:
                found.append(replace(row, status=Status.failed, detail=_in_words(error)))
    except Exception as error:  # a parameter that cannot be read
        unread = [head.view for head in attention.heads if head.view in views]
        found += [
            replace(blank(view), status=Status.failed, detail=_in_words(error)) for view in unread
        ]
    return found


def _of_head(blank: Finding, head: Head, S: Product) -> Finding:
    factors = S.B.cpu(), S.A.cpu()
    bad = sum(int((~torch.isfinite(factor)).sum()) for factor in factors)
    if bad:
        detail = f"{bad} of {sum(factor.numel() for factor in factors)} entries of its factors"
        return replace(blank, status=Status.not_finite, detail=detail)
    spectrum = spectrum_of_product(*factors)
    sigma, kappa, unit = spectrum.scaled, spectrum.condition_number, spectrum.unit
    status = Status.ok
    if math.isnan(kappa):
        status = Status.zero
    elif math.isinf(kappa):
        status = Status.rank_deficient
    top = sigma[0]
    return replace(
        blank,
        sigma_max=float(top) * unit,
        sigma_min=float(sigma[-1]) * unit,
        condition_number=kappa,
        stable_rank=float((sigma / top).square().sum()) if top > 0 else math.nan,
        rank=spectrum.rank,
        inner=S.nu,
        penalty=float(((top - sigma) * (top + sigma)).sum()) / (2 * S.nu) * unit**2,
        grade=Grade.computed,
        status=status,
        detail="; ".join(filter(None, (f"of the leading {S.nu} singular values", head.note))),
        method="SVD of the product of two triangular factors in float64",
        singular_values=tuple(spectrum.singular_values.tolist()),
    )


def _in_words(error: Exception) -> str:
    if out_of_memory(error):
        return "there is not enough memory to measure it"
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0] if first else 'without a message'}"


def _finding(blank: Finding, S: Tensor, want_certificate: bool, all_values: bool) -> Finding:
    spread = S.aminmax()
    if not math.isfinite(float(spread.min)) or not math.isfinite(float(spread.max)):
        bad = int((~torch.isfinite(S)).sum())
        detail = f"{bad} of {S.numel()} entries"
        return replace(blank, status=Status.not_finite, detail=detail)
    blank = with_entries(blank, S)
    blocks = S.unbind() if S.ndim == 3 else (S,)
    spectra, ranks = zip(*(_spectrum(block, all_values) for block in blocks), strict=True)
    spectrum = spectrum_of_blocks(spectra)
    certificate = None
    if want_certificate:
        certificate = certificate_of_blocks([certify(block) for block in blocks])
        known = certificate.condition_number
        if not _near(spectrum.condition_number, known) and spectrum.method is Method.krylov:
            spectra, ranks = zip(*(_spectrum(block, True) for block in blocks), strict=True)
            spectrum = spectrum_of_blocks(spectra)
    sigma, kappa = spectrum.singular_values, spectrum.condition_number
    top, low, norm, nu = float(sigma[0]), float(sigma[-1]), frobenius_norm(S), blank.nu
    notes = [_where(spectra)] if len(blocks) > 1 else []
    if certificate is not None:
        if not _near(kappa, known):
            notes.append(f"κ = {kappa:.4g} was measured, and lies outside of what is certified")
        top = _inside(certificate.sigma_max, top)
        low = _inside(certificate.sigma_min, low)
        kappa = _inside(known, kappa, certificate.computed)
        if top > 0:
            notes.append(certificate.reason)
    complete = spectrum.method is not Method.krylov
    if complete:
        penalty = float(((sigma[0] - sigma) * (sigma[0] + sigma)).sum()) / (2 * nu)
    else:
        mean = norm / math.sqrt(nu)
        penalty = max(0.0, (top - mean) * (top + mean) / 2)
    status = Status.ok
    if math.isnan(kappa):
        status = Status.zero
    elif math.isinf(kappa):
        status = Status.rank_deficient
    grade = Grade.computed if complete else Grade.estimated
    if certificate is not None and certificate.certified:
        grade = Grade.certified
    return replace(
        blank,
        sigma_max=top,
        sigma_min=low,
        condition_number=kappa,
        stable_rank=(norm / top) ** 2 if top > 0 else math.nan,
        rank=sum(ranks),
        penalty=penalty,
        grade=grade,
        status=status,
        detail="; ".join(filter(None, notes)),
        method=spectrum.method.value,
        certificate=certificate,
        singular_values=tuple(sigma.tolist()) if complete else (),
    )


def _near(number: float, interval: Interval) -> bool:
    """Whether it lies there, but for the error that a measured number may have."""
    if math.isnan(number):
        return True
    return interval.lower * (1 - _ERROR) <= number <= interval.upper * (1 + _ERROR)


def _inside(interval: Interval, *numbers: float) -> float:
    """The first of the numbers that lies there, else its end nearest to the first."""
    nearest = min(max(numbers[0], interval.lower), interval.upper)
    return next((number for number in numbers if number in interval), nearest)


def _spectrum(S: Tensor, all_values: bool) -> tuple[Spectrum, int]:
    """Of one matrix, and how many singular values no rounding of its entries could have made."""
    spectrum = measure(S, all_values)
    sigma = spectrum.singular_values
    # Rounding to the dtype moves an entry by u times its size, or half the smallest number.
    dtype = torch.finfo(S.dtype)
    rounding = dtype.eps / 2 * (frobenius_norm(S) + dtype.tiny * math.sqrt(S.numel()))
    zero = max(rounding, negligible(S.shape) * float(sigma[0]))
    if spectrum.method is not Method.krylov:
        return spectrum, int((sigma > zero).sum())
    if float(sigma[-1]) <= zero:
        return _spectrum(S, all_values=True)
    return spectrum, min(S.shape)


def _where(spectra: Sequence[Spectrum]) -> str:
    """Which of several groups have the extremes."""
    groups = range(len(spectra))
    largest, smallest = (
        [float(spectrum.singular_values[end]) for spectrum in spectra] for end in (0, -1)
    )
    first, last = max(groups, key=largest.__getitem__), min(groups, key=smallest.__getitem__)
    return f"{len(groups)} groups: sigma_max in group {first}, sigma_min in group {last}"
