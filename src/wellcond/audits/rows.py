"""How a tensor becomes findings: each of its matrices measured, trouble with one as its status.

Letters: S (m, n) a weight; sigma_1 >= ... >= sigma_nu its singular values, nu = min(m, n);
kappa = sigma_1/sigma_nu; u the unit roundoff of the dtype in which S is stored.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wellcond.audits.acting import acting
from wellcond.linalg.certify import certificate_of_blocks, certify
from wellcond.linalg.interval import Interval
from wellcond.linalg.leading import added
from wellcond.linalg.products import spectrum_of_product
from wellcond.linalg.scaling import frobenius_norm
from wellcond.linalg.spectrum import Method, Spectrum, measure, negligible, spectrum_of_blocks
from wellcond.operators.convolution import Convolution, Geometry
from wellcond.operators.product import Product
from wellcond.report.findings import (
    MERGED,
    Finding,
    Grade,
    Status,
    dominant_entry,
    numbers,
    with_entries,
)
from wellcond.text import joined, out_of_memory
from wellcond.weights.adapters import Adapter, UnknownAdapterError
from wellcond.weights.heads import Attention, Value
from wellcond.weights.matrices import Matrices
from wellcond.weights.reasons import Reason

# A measured kappa so far from its certificate, relatively, is worth a word.
_ERROR = 1e-6

# Of a convolution there may be millions of singular values: so many are kept to be drawn.
_DRAWN = 4096


def findings_of(
    one: Matrices, certify: bool, all_values: bool = False, only: Collection[str] | None = None
) -> list[Finding]:
    """A row for each matrix of a tensor, or only for these views; trouble with one is its status.

    With `all_values` all singular values are computed, whatever the size of the matrix.
    """
    try:
        tensor = one.read()
        if tensor.is_meta:
            raise ValueError(Reason.no_values.value)
        views = one.views(tensor)
    except Exception as error:  # whatever it is, the other weights are still to be measured
        return [failed_row(one.name, error)]
    found = []
    for view, S in views.items():
        if only is not None and view not in only:
            continue
        if one.geometry is not None:
            row = _acting(one.name, tensor.detach().cpu(), one.geometry)
            alone = "without its adapter" if one.adapters else ""
            found.append(replace(row, detail=joined(row.detail, one.note, alone)))
            continue
        blank = Finding(one.name, view, tuple(S.shape), _dtype(S))
        try:
            row = _finding(blank, S.detach().cpu(), certify, all_values)
            found.append(replace(row, detail=joined(row.detail, one.note), stored=one.stored))
        except Exception as error:
            found.append(replace(blank, status=Status.failed, detail=_in_words(error)))
    if one.adapters:
        found += _merged(one, tensor.detach().cpu(), certify, all_values, only)
    return found


def failed_row(name: str, error: Exception) -> Finding:
    """The row of a tensor that cannot be read or measured."""
    return Finding(name, "", (0, 0), "", status=Status.failed, detail=_in_words(error))


def _merged(
    one: Matrices, W: Tensor, certify: bool, all_values: bool, only: Collection[str] | None
) -> list[Finding]:
    """The rows of a weight with what its adapters add; trouble with one is its status."""
    blank = Finding(one.name, MERGED, tuple(W.shape), "float64")
    try:
        added_to_it = sum(adapter.change(W) for adapter in one.adapters)
        assert isinstance(added_to_it, Tensor)
        parts, sums = one.views(added_to_it), one.views(W.double() + added_to_it)
        rank = sum(adapter.product().nu for adapter in one.adapters)
        found = []
        for view, S in sums.items():
            blank = Finding(one.name, f"{view}:{MERGED}".lstrip(":"), tuple(S.shape), "float64")
            if only is not None and blank.view not in only:
                continue
            row = _finding(blank, S, certify, all_values)
            found.append(_with_share(row, S, parts[view], rank))
        return found
    except Exception as error:
        return [replace(blank, status=Status.failed, detail=_in_words(error))]


def _with_share(finding: Finding, S: Tensor, D: Tensor, rank: int) -> Finding:
    """The finding with how much of the leading singular values of S comes from D."""
    if finding.status not in (Status.ok, Status.rank_deficient) or S.ndim > 2:
        return finding
    of_it = added(S, D, rank)
    return replace(finding, added_share=of_it.share, added_new=of_it.new, added_of=of_it.among)


def finding_of_adapter(adapter: Adapter, name: str) -> Finding:
    """The row of what an adapter adds to the weight of this name, as it is stored: s B A."""
    view = "delta" if adapter.name in ("", "default") else f"delta.{adapter.name}"
    blank = Finding(name, view, (0, 0), "")
    try:
        S, scale = adapter.product(), adapter.setting.scale
        size = S.B.numel() + S.A.numel()
        blank = Finding(name, view, tuple(S.shape), _dtype(S.B), entries=size)
        besides = "DoRA brings the rows of the sum to other lengths besides"
        notes = (adapter.setting.note, besides if adapter.magnitude is not None else "")
        found = _of_product(blank, S, *notes)
    except Exception as error:
        return replace(blank, status=Status.failed, detail=_in_words(error))
    if adapter.magnitude is None and (found.status is Status.zero or scale == 0):
        return replace(found, status=Status.fresh)
    scale = 1.0 if math.isnan(scale) else abs(scale)
    return replace(
        found,
        sigma_max=scale * found.sigma_max,
        sigma_min=scale * found.sigma_min,
        penalty=scale * scale * found.penalty,
        singular_values=tuple(scale * value for value in found.singular_values),
    )


def _acting(name: str, kernel: Tensor, geometry: Geometry) -> Finding:
    """The row of a convolution as it acts; trouble with it is its status."""
    S = Convolution(kernel, geometry)
    dtype = _dtype(S)
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
        # What lies below that is rounding, whatever it is.
        kappa = below / max(smallest, negligible(S.shape) * below)
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


def findings_of_heads(attention: Attention, views: set[str], value: Value) -> list[Finding]:
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
            row = blank(head.view, tuple(S.shape), _dtype(S))
            try:
                found.append(
                    _of_product(row, S, f"of the leading {S.nu} singular values", head.note)
                )
            except Exception as error:
                found.append(replace(row, status=Status.failed, detail=_in_words(error)))
    except Exception as error:  # a parameter that cannot be read
        unread = [head.view for head in attention.heads if head.view in views]
        found += [
            replace(blank(view), status=Status.failed, detail=_in_words(error)) for view in unread
        ]
    return found


def _of_product(blank: Finding, S: Product, *notes: str) -> Finding:
    """Of the leading singular values, which alone need not be zero."""
    factors = S.B.cpu(), S.A.cpu()
    bad = [int((~torch.isfinite(factor)).sum()) for factor in factors]
    if any(bad):
        each = zip(bad, factors, "BA", strict=True)
        counts = (
            f"{n} of {factor.numel()} entries of its factor {name}" for n, factor, name in each if n
        )
        return replace(blank, status=Status.not_finite, detail=" and ".join(counts))
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
        detail=joined(*notes),
        method="SVD of the product of two triangular factors in float64",
        singular_values=tuple(spectrum.singular_values.tolist()),
    )


def _dtype(S: Tensor | Product | Convolution) -> str:
    return str(S.dtype).removeprefix("torch.")


def _in_words(error: Exception) -> str:
    if out_of_memory(error):
        return "there is not enough memory to measure it"
    if isinstance(error, UnknownAdapterError):
        return str(error)
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0] if first else 'without a message'}"


def _finding(blank: Finding, S: Tensor, want_certificate: bool, all_values: bool) -> Finding:
    spread = numbers(S).aminmax()
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
        detail=joined(*notes),
        method=spectrum.method.value,
        certificate=certificate,
        singular_values=tuple(sigma.tolist()) if complete else (),
        dominant_entry=dominant_entry(S, blank.largest_entry, norm),
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
