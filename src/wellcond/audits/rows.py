"""Measures the rows of an audit, one source after the other; an error becomes a row's status.

Letters: S (m, n) a weight; sigma_1 >= ... >= sigma_nu its singular values, nu = min(m, n);
kappa = sigma_1/sigma_nu; u the unit roundoff of the dtype in which S is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial, singledispatch
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wellcond.audits.attempt import Trouble, attempt
from wellcond.audits.convolutions import measure_convolution
from wellcond.audits.device import CPU
from wellcond.audits.executor import Executor
from wellcond.audits.facts import stored_numbers, with_comparison, with_entries
from wellcond.audits.plan import Delta, Measurable, Merged, RowSpec
from wellcond.audits.progress import CallbackError, Counter, ProgressCallback, work_of
from wellcond.linalg.certify import certify, combine_certificates
from wellcond.linalg.checks import check_matrices
from wellcond.linalg.interval import Interval
from wellcond.linalg.leading import leading_triplets, measure_share
from wellcond.linalg.product import Product
from wellcond.linalg.products import spectrum_of_product
from wellcond.linalg.scaling import frobenius_norm
from wellcond.linalg.spectrum import (
    Method,
    Spectrum,
    combine_spectra,
    compute_spectrum,
    rank_tolerance,
)
from wellcond.operators.acting import bound_norm_cheaply
from wellcond.operators.convolution import Convolution
from wellcond.report.findings import Finding, Grade, Status
from wellcond.text import join_remarks
from wellcond.weights.adapters import Adapter

Row = tuple[RowSpec, Finding]


class _Options(NamedTuple):
    """The options for each row, and the callback for the finished share of a long one."""

    certify: bool
    all_values: bool
    device: torch.device
    report: Callable[[float], None]


# A note reports a measured kappa that is outside its certificate by more than this relative error.
_ERROR = 1e-6

# A convolution can have millions of singular values; this many are kept for the plot.
_DRAWN = 4096

# The number of leading singular values to compute for the change of an adapter, because many can
# be about as large as the largest.
_LEADING = 64


def measure_rows(
    executor: Executor,
    specs: Sequence[RowSpec],
    certify: bool = False,
    all_values: bool = False,
    progress: ProgressCallback | None = None,
) -> list[Row]:
    """A finding for each row; adjacent rows of the same source share one read.

    With `all_values`, all singular values are computed, whatever the size of the matrix. The device
    of the executor computes the singular values of matrices, the CPU all other numbers.
    """
    groups = [(source, [*rows]) for source, rows in groupby(specs, key=attrgetter("source"))]
    work = work_of(source.tensor for source, _ in groups)

    def measure(chosen: Sequence[int]) -> Iterator[tuple[Finding, ...]]:
        counter = Counter(progress, [work[index] for index in chosen])
        options = _Options(certify, all_values, executor.device, counter.within)
        for index in chosen:
            source, rows = groups[index]
            counter.next(source.name)
            try:
                yield tuple(_measure_source(source.read, rows, options))
            except CallbackError as error:
                raise (error.__cause__ or error) from None

    names = [source.name for source, _ in groups]
    found = executor.map("curves" if all_values else "rows", names, work, measure)
    return [
        row
        for (_, rows), findings in zip(groups, found, strict=True)
        for row in zip(rows, findings, strict=True)
    ]


def _measure_source(
    read: Callable[[], Any], specs: Iterable[RowSpec], options: _Options
) -> Iterator[Finding]:
    values = attempt(read)  # released before the next source is read
    for spec in specs:
        tensor = spec.source.tensor
        stored, parts = (True, ()) if tensor is None else (tensor.stored, tensor.parts)
        row = Finding(
            spec.name, spec.view, (0, 0), "", stored=stored, parts=parts, entries=spec.entries
        )
        S = values if isinstance(values, Trouble) else attempt(partial(spec.matrix, values))
        found: Finding | Trouble
        if isinstance(S, Trouble):
            found = S
        else:
            dtype = str(S.dtype).removeprefix("torch.")
            if tensor is not None and tensor.stored_as and isinstance(S, Tensor):
                dtype = tensor.stored_as
            row = replace(row, shape=tuple(S.shape), dtype=dtype)
            found = attempt(partial(_measured, S, row, options))
        if isinstance(found, Trouble):
            yield replace(row, status=Status.failed, detail=str(found))
        else:
            found = replace(found, detail=join_remarks(found.detail, spec.note))
            yield with_comparison(found)


@singledispatch
def _measured(S: Measurable, finding: Finding, options: _Options) -> Finding:
    """Adds the numbers of S to the finding."""
    raise NotImplementedError(type(S))


def _refuse(S: Tensor) -> None:
    """Raises a ValueError if linalg does not support the dtype or layout of S."""
    try:
        check_matrices(S)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _not_finite(S: Tensor) -> int:
    """The number of entries that are NaN or infinite."""
    ends = stored_numbers(S).aminmax()
    if all(math.isfinite(float(end)) for end in ends):
        return 0
    return int((~torch.isfinite(S)).sum())


def _status_of(kappa: float) -> Status:
    if math.isnan(kappa):
        return Status.zero
    return Status.rank_deficient if math.isinf(kappa) else Status.ok


# --- a matrix, or the blocks of a block-diagonal one ----------------------------------------------


@_measured.register
def _of_matrix(S: Tensor, finding: Finding, options: _Options) -> Finding:
    _refuse(S)
    S = S.detach().cpu()
    if bad := _not_finite(S):
        detail = f"{bad} of {S.numel()} entries"
        return replace(finding, status=Status.not_finite, detail=detail)
    blocks = S.unbind() if S.ndim == 3 else (S,)
    device = options.device
    measured = [_spectrum(block, options.all_values, device) for block in blocks]
    spectra, ranks, devices = zip(*measured, strict=True)
    spectrum = combine_spectra(spectra)
    certificate = None
    if options.certify:
        certificate = combine_certificates([certify(block) for block in blocks])
        known = certificate.condition_number
        if not _near(spectrum.condition_number, known) and spectrum.method is Method.krylov:
            measured = [_spectrum(block, True, device) for block in blocks]
            spectra, ranks, devices = zip(*measured, strict=True)
            spectrum = combine_spectra(spectra)
    sigma, kappa = spectrum.singular_values, spectrum.condition_number
    top, low, norm, nu = float(sigma[0]), float(sigma[-1]), frobenius_norm(S), finding.nu
    notes = [_extreme_groups(spectra)] if len(blocks) > 1 else []
    if certificate is not None:
        if not _near(kappa, known):
            notes.append(f"the measured κ = {kappa:.4g} is outside the certified interval")
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
    grade = Grade.computed if complete else Grade.estimated
    if certificate is not None and certificate.certified:
        grade = Grade.certified
    return replace(
        with_entries(finding, S, norm),
        sigma_max=top,
        sigma_min=low,
        condition_number=kappa,
        stable_rank=(norm / top) ** 2 if top > 0 else math.nan,
        rank=sum(ranks),
        penalty=penalty,
        grade=grade,
        status=_status_of(kappa),
        detail=join_remarks(*notes),
        method=spectrum.method.value + "".join({f" on {d.type}" for d in devices if d != CPU}),
        certificate=certificate,
        singular_values=tuple(sigma.tolist()) if complete else (),
    )


def _near(number: float, interval: Interval) -> bool:
    """Whether the number is in the interval, up to the error of a measured number."""
    if math.isnan(number):
        return True
    return interval.lower * (1 - _ERROR) <= number <= interval.upper * (1 + _ERROR)


def _inside(interval: Interval, *numbers: float) -> float:
    """The first of the numbers in the interval, or else the end nearest to the first number."""
    nearest = min(max(numbers[0], interval.lower), interval.upper)
    return next((number for number in numbers if number in interval), nearest)


class _Measured(NamedTuple):
    """The spectrum, the number of singular values above rounding of the entries, and the device."""

    spectrum: Spectrum
    rank: int
    device: torch.device


def _spectrum(S: Tensor, all_values: bool, device: torch.device) -> _Measured:
    try:
        spectrum = compute_spectrum(S.to(device), all_values)
    except torch.OutOfMemoryError:  # too large for the GPU, and perhaps not for the CPU
        device = CPU
        spectrum = compute_spectrum(S, all_values)
    spectrum = spectrum._replace(scaled=spectrum.scaled.cpu())
    sigma = spectrum.singular_values
    # Rounding to the dtype changes an entry by u times its size, or by half the smallest number.
    dtype = torch.finfo(S.dtype)
    rounding = dtype.eps / 2 * (frobenius_norm(S) + dtype.tiny * math.sqrt(S.numel()))
    zero = max(rounding, rank_tolerance(S.shape) * float(sigma[0]))
    if spectrum.method is not Method.krylov:
        return _Measured(spectrum, int((sigma > zero).sum()), device)
    if float(sigma[-1]) <= zero:
        return _spectrum(S, True, device)
    return _Measured(spectrum, min(S.shape), device)


def _extreme_groups(spectra: Sequence[Spectrum]) -> str:
    """States which of several groups have the extreme singular values."""
    largest, smallest = (
        [float(spectrum.singular_values[end]) for spectrum in spectra] for end in (0, -1)
    )
    first, last = largest.index(max(largest)), smallest.index(min(smallest))
    return f"{len(spectra)} groups: sigma_max in group {first}, sigma_min in group {last}"


@_measured.register
def _of_merged(S: Merged, finding: Finding, options: _Options) -> Finding:
    """Also measures the change by the adapters, and kappa of the sum in the dtype of W."""
    first, *others = (adapter.change(S.W) for adapter in S.adapters)
    change: Tensor = sum(others, first)
    total, part = S.view(S.W.double() + change), S.view(change)
    found = _of_matrix(total, finding, options)
    if found.status is Status.not_finite:
        return replace(found, detail=join_remarks(found.detail, *_not_finite_parts(S.adapters)))
    if total.ndim > 2:
        return found
    W = S.view(S.W)
    leading = sum(adapter.rank(S.W) for adapter in S.adapters)
    # DoRA rescales the rows, so its change can have full rank.
    scaled = any(adapter.magnitude is not None for adapter in S.adapters)
    rank = min(*total.shape, *([] if scaled else [leading]))
    norm, size = frobenius_norm(part), frobenius_norm(W)
    found = replace(
        found,
        base_condition_number=_spectrum(W, False, options.device).spectrum.condition_number,
        base_dtype=str(W.dtype).removeprefix("torch."),
        delta_share=norm / size if size else math.nan,
        delta_rank=rank,
    )
    if norm:
        top = float(leading_triplets(part / norm, min(rank, _LEADING))[1][0])
        found = replace(found, delta_stable_rank=1 / top**2)
    else:
        found = replace(found, detail=join_remarks(found.detail, Status.fresh.value))
    if S.stored:
        found = _with_rounding(found, total.to(W.dtype), options.device)
    if found.status is Status.zero:
        return found
    of_it = measure_share(total, part, leading)
    return replace(found, added_share=of_it.share, added_new=of_it.new, added_of=of_it.among)


def _with_rounding(finding: Finding, rounded: Tensor, device: torch.device) -> Finding:
    """Adds kappa of the sum in the dtype of W to the finding."""
    if bad := _not_finite(rounded):
        note = f"{bad} of its entries are infinite in {finding.base_dtype}"
        return replace(finding, detail=join_remarks(finding.detail, note))
    kappa = _spectrum(rounded, False, device).spectrum.condition_number
    return replace(finding, rounded_condition_number=kappa)


def _not_finite_parts(adapters: Sequence[Adapter]) -> list[str]:
    """The tensors of the adapters that contain NaN or infinity, and how many entries."""
    return [
        f"{bad} of {tensor.numel()} entries of {name}"
        for adapter in adapters
        for name, read in adapter.reads.items()
        if (bad := _not_finite(tensor := read()))
    ]


# --- a product of two factors ---------------------------------------------------------------------


@_measured.register
def _of_product(S: Product, finding: Finding, _options: _Options) -> Finding:
    """Measures the leading nu singular values of the product; all others are zero."""
    factors = S.B.detach().cpu(), S.A.detach().cpu()
    counts = []
    for factor, name in zip(factors, "BA", strict=True):
        _refuse(factor)
        if bad := _not_finite(factor):
            counts.append(f"{bad} of {factor.numel()} entries of its factor {name}")
    if counts:
        return replace(finding, status=Status.not_finite, detail=" and ".join(counts))
    spectrum = spectrum_of_product(*factors)
    sigma, kappa, unit = spectrum.scaled, spectrum.condition_number, spectrum.unit
    top = sigma[0]
    penalty = float(((top - sigma) * (top + sigma)).sum()) / (2 * S.nu)
    return replace(
        finding,
        sigma_max=float(top) * unit,
        sigma_min=float(sigma[-1]) * unit,
        condition_number=kappa,
        stable_rank=float((sigma / top).square().sum()) if top > 0 else math.nan,
        rank=spectrum.rank,
        inner=S.nu,
        penalty=penalty * unit * unit,
        grade=Grade.computed,
        status=_status_of(kappa),
        detail=f"of the leading {S.nu} singular values",
        method="SVD of the product of two triangular factors in float64",
        singular_values=tuple(spectrum.singular_values.tolist()),
    )


@_measured.register
def _of_delta(S: Delta, finding: Finding, options: _Options) -> Finding:
    found = _of_product(S.product, finding, options)
    if found.status is Status.not_finite:
        return replace(found, detail="; ".join(_not_finite_parts([S.adapter])))
    scale, found = S.adapter.setting.scale, replace(found, detail="")
    if S.adapter.magnitude is None and (found.status is Status.zero or scale == 0):
        return replace(found, status=Status.fresh)
    scale = 1.0 if math.isnan(scale) else abs(scale)
    return replace(
        found,
        sigma_max=scale * found.sigma_max,
        sigma_min=scale * found.sigma_min,
        penalty=scale * scale * found.penalty,
        singular_values=tuple(scale * value for value in found.singular_values),
    )


# --- a convolution as a linear operator -----------------------------------------------------------


@_measured.register
def _of_convolution(S: Convolution, finding: Finding, options: _Options) -> Finding:
    S = Convolution(S.kernel.detach().cpu(), S.geometry)
    finding = replace(finding, entries=S.kernel.numel())
    if bad := _not_finite(S.kernel):
        detail = f"{bad} of {S.kernel.numel()} entries"
        return replace(finding, status=Status.not_finite, detail=detail)
    found = measure_convolution(S, options.report)
    (below, above), smallest = found.largest, found.smallest
    squared = float(S.squared_frobenius_norm(torch.float64))
    exact = len(found.singular_values) > 0
    zero = rank_tolerance(S.shape) * below  # smaller values are only rounding
    kappa = math.nan
    if above > 0:
        kappa = math.inf if exact and smallest <= zero else below / max(smallest, zero)
    notes = [f"on {S.geometry}"]
    if not exact:
        notes.append(f"σ_max is between {below:.6g} and {above:.6g}, and κ is a lower bound")
    if not S.disjoint:  # `SingularValueLimit(acting=True)` limits this bound
        everywhere = bound_norm_cheaply(S.kernel, S.geometry)
        notes.append(f"σ_max is at most {everywhere:.4g} for inputs of any size")
    return replace(
        finding,
        sigma_max=below,
        sigma_min=smallest,
        condition_number=kappa,
        stable_rank=squared / below / below if below > 0 else math.nan,
        rank=int((found.singular_values > zero).sum()),
        penalty=max(0.0, (below * below - squared / S.nu) / 2),
        grade=Grade.computed if exact else Grade.bounded,
        status=_status_of(kappa),
        detail=join_remarks(*notes),
        method=found.method,
        singular_values=tuple(found.singular_values[:: -(-S.nu // _DRAWN)].tolist()),
    )
