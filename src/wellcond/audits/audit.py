"""Measures every weight of a model or a checkpoint, and lists what it skips and why.

Letters: S (m, n) a weight; sigma_1 >= ... >= sigma_nu its singular values, nu = min(m, n);
kappa = sigma_1/sigma_nu; u the unit roundoff of the dtype in which S is stored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from wellcond.audits.attempt import failed_finding
from wellcond.audits.device import as_device
from wellcond.audits.executor import Executor
from wellcond.audits.facts import with_comparison
from wellcond.audits.finite import not_finite_in
from wellcond.audits.plan import (
    RowSpec,
    as_patterns,
    merge_rows,
    plan,
    reason_to_skip,
    select,
)
from wellcond.audits.progress import ProgressCallback, shown
from wellcond.audits.resume import Record
from wellcond.audits.rows import Row, measure_rows
from wellcond.audits.sources import Auditable, Source, source_of
from wellcond.files.pieces import pieces_of
from wellcond.report.findings import Coverage, Finding, Grade, Status
from wellcond.report.flags import find_flags, sort_findings
from wellcond.report.not_finite import NotFinite
from wellcond.report.report import AuditReport
from wellcond.text import list_some, read_versions
from wellcond.weights.kernels import describe_groups
from wellcond.weights.reasons import Skipped

if TYPE_CHECKING:
    from wellcond.audits.processes import Group


def audit(
    model_or_path: Auditable,
    *,
    certify: bool = False,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    curves: int = 0,
    progress: ProgressCallback | bool | None = None,
    example: Any = None,
    heads: bool = False,
    base: Auditable | None = None,
    resume: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
) -> AuditReport:
    """Measures every weight of a model, a state dict or a checkpoint.

    A checkpoint is read one tensor at a time. All arithmetic is in float64, and on the CPU unless
    `device` is a GPU. The model is not changed. Each finding names the method that computed its
    singular values; kappa is accurate to 1e-6 up to kappa = 1e5 (`wellcond bench audit`).

    The modules of a model determine its weights, and the effective weights in eval mode are
    measured. A file has no modules, so its weights are identified by name, then by neighbouring
    tensors, then by shape; the row of a guess states that it is one. "Reading an audit" in the
    documentation explains which matrices a tensor contains and what each number means.

    A weight that a file stores as several tensors (codes and scales, slices, the parameters of
    weight_norm) is built from them, one weight at a time, and measured under its name in a plain
    checkpoint. `Finding.parts` lists these tensors. If the weight cannot be built, it has no
    finding, and `coverage.skipped` gives the reason under the name of the codes.

    Args:
        model_or_path: a module, which torch.compile or DistributedDataParallel may wrap; a state
            dict, which maps names to tensors or NumPy arrays and is treated like a file; or the
            path of a .safetensors file, a *.safetensors.index.json file, a state dict saved by
            torch.save (.pt, .pth, .bin, .ckpt, .pth.tar), a Keras, Flax, NumPy, ONNX, GGUF,
            TorchScript or torch.export file ("From JAX, Keras, ONNX, GGUF" in the documentation),
            or a directory of these. The report names the classes of other Python objects in a file,
            which are not loaded.
        certify: also enclose sigma_max, sigma_min and kappa by `wellcond.certify`; not for heads.
        include: one or more patterns (`fnmatch.fnmatchcase`) of names to measure; all if empty.
            A weight that is skipped because of its name is measured if a pattern equals that name.
            A pattern can also match the name of the codes, such as `*.qweight`.
        exclude: one or more patterns of names to skip.
        curves: the number of worst weights for which to compute all singular values, whatever the
            size.
        progress: True shows a progress bar, of tqdm if it is installed. A function is called with a
            `Progress` before each tensor is read, and every second while a convolution is measured
            as a linear operator; `print` is such a function.
        example: an input of the model: a tensor, a tuple, or a dict of named arguments. One forward
            pass in eval mode records the input size of each convolution. The convolution is then
            measured as a linear operator on that size, under the view "operator" instead of
            "kernel". The numbers are exact if the kernel uses no input twice, on a torus, and up to
            4096 singular values. Otherwise sigma_max is enclosed, kappa is a lower bound, and the
            grade is "bounded".
        heads: also measure the attention heads: for head 3, W_Q^T W_K, which compares two inputs,
            as `layers.0.self_attn:qk3`, and W_O W_V, which carries one input to the other, as
            `layers.0.self_attn:vo3`, without biases and 1/sqrt(d_head). All numbers refer to the
            d_head singular values that can be nonzero; the detail names the operations in between.
            A file requires its config.json. Heads do not count in the coverage.
        base: the base model, or its path, of the adapter at the path (LoRA, LoHa, ...). Each
            adapted weight has one finding, `q_proj.weight:merged`: W + s B A in float64, with kappa
            of W, kappa of the sum in the dtype of W, and the size of the change. Patterns that skip
            it (`include="*:delta"`, `exclude="*:merged"`) show `q_proj.weight` and
            `q_proj.weight:delta`, which is s B A, instead. Without a base, only `:delta` is
            measured; a PEFT model contains its base. The other weights of the base are skipped.
        resume: the path of a file to which each weight is appended as soon as it is measured. After
            an interruption, an audit with the same file measures only the missing weights and
            returns the same report. The model and the base must be paths of unchanged files.
        device: "cpu" or "cuda" (or a GPU with its index): where the singular values of matrices are
            computed. The method of each finding names a GPU. Certificates, convolutions as linear
            operators, heads and adapters without a base are computed on the CPU, and so is a matrix
            that does not fit on the GPU. Before the audit, the GPU must give the same kappa for a
            test matrix as the CPU.

    Returns:
        An `AuditReport`. A weight that could not be measured is a finding with the reason. All
        other floating-point tensors that no pattern excludes, including the buffers of a model, are
        searched for NaN and infinity: see `AuditReport.not_finite`.

    Raises:
        ValueError: nothing could be measured, a pattern matches nothing, a file is unreadable, the
            model does not accept the example, no attention is recognised, the base does not fit,
            `resume` is not a file of this audit, or the device is missing or fails its check.
        FileNotFoundError: the path does not exist.
        TypeError: `model_or_path` is not a module, a path or a flat state dict; an array has a
            dtype that torch lacks; `example` is given without a model; `base` is given for a model;
            `resume` is given without a path.

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
    patterns = [*as_patterns(include)], [*as_patterns(exclude)]
    options = Options(certify, *patterns, curves, heads, str(device))
    return audit_together(None, model_or_path, options, progress, example, base, resume)


class Options(NamedTuple):
    """The options of `audit` that determine its numbers."""

    certify: bool
    include: Sequence[str]
    exclude: Sequence[str]
    curves: int
    heads: bool
    device: str


class _Plan(NamedTuple):
    source: Source
    specs: list[RowSpec]
    skipped: dict[str, Skipped]
    record: Record | None
    device: torch.device

    def states(self) -> dict[str, list[int]]:
        return self.source.states()


def audit_together(
    group: Group | None,
    model_or_path: Auditable,
    options: Options,
    progress: ProgressCallback | bool | None = None,
    example: Any = None,
    base: Auditable | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> AuditReport:
    """Runs `audit` on all processes of a group; each process gets the same report."""
    for name, one in (("model_or_path", model_or_path), ("base", base)):
        if resume is not None and not isinstance(one, str | os.PathLike | None):
            raise TypeError(
                f"`resume` requires paths, because it checks that the files have not changed, but "
                f"`{name}` is a {type(one).__name__}. Save it to a file, or omit `resume`."
            )

    path, base_path = (
        str(Path(one).resolve()) if isinstance(one, str | os.PathLike) else ""
        for one in (model_or_path, base)
    )

    def prepare() -> _Plan:
        device = as_device(options.device, None if group is None else group.local_rank)
        source = source_of(model_or_path, example, base)
        rows = plan(source, options.heads)
        patterns = options.include, options.exclude
        specs, skipped = select(rows, *patterns, source.skipped, source.others)
        record = None
        if resume is not None:
            what = {
                "versions": read_versions(),
                "options": {"path": path, **options._asdict(), "base": base_path},
                "files": source.states(),
            }
            record = Record(Path(resume), what, 0 if group is None else group.rank)
        return _Plan(source, merge_rows(specs), skipped, record, device)

    planned = prepare() if group is None else group.together(prepare, _Plan.states)
    executor = Executor(group, planned.record, planned.device)
    with shown(progress) as callback, planned.record or nullcontext():
        return _measure(planned, options, executor, callback, base is not None)


def _measure(
    planned: _Plan,
    options: Options,
    executor: Executor,
    progress: ProgressCallback | None,
    based: bool,
) -> AuditReport:
    source, specs, skipped, *_ = planned
    rows = measure_rows(executor, specs, options.certify, progress=progress)
    not_finite, unread = _search(executor, source, rows, skipped, options.include, options.exclude)
    failed = [*source.failed, *unread]
    if options.curves:
        by_label = {finding.label: spec for spec, finding in rows}
        first = _sort([finding for _, finding in rows])
        rows = [(by_label[finding.label], finding) for finding in first]
        _add_curves(executor, rows, options.curves - len(failed))
    findings = _sort([*failed, *(finding for _, finding in rows)])
    _check_measured(findings, source.name, skipped, based)
    coverage = _coverage(rows, len(failed), source, skipped)
    return AuditReport(
        findings, coverage, source.name, read_versions(), not_finite, source.of_graph
    )


def _search(
    executor: Executor,
    source: Source,
    rows: Sequence[Row],
    skipped: Mapping[str, Skipped],
    include: Sequence[str],
    exclude: Sequence[str],
) -> tuple[dict[str, NotFinite], list[Finding]]:
    """The tensors that contain NaN or infinity, measured or not, and rows of unreadable tensors."""
    of_tensors = [(spec, finding) for spec, finding in rows if spec.source.tensor is not None]
    bad = {spec.name: spec for spec, one in of_tensors if one.status is Status.not_finite}
    sound = [spec for spec, _ in of_tensors if spec.covers and spec.name not in bad]
    finite = {spec.name for spec in sound}
    finite |= {part for spec in sound for part in _parts_of(spec)}
    tensors = {
        name: pieces
        for name, pieces in source.tensors.items()
        if name not in finite and reason_to_skip([name], include, exclude) is None
    }
    # Weights of a base and computed weights. For built weights, their parts are more specific.
    for name, spec in bad.items():
        if name not in tensors and not _parts_of(spec):
            tensors[name] = partial(_pieces_of_row, spec)
    weights = {*bad, *(part for _, adapter in source.adapters for part in adapter.parts)}
    weights |= {name for name, why in skipped.items() if why.reason.of_adapter}
    found, unread = not_finite_in(tensors, source.masks, weights, source.sizes, executor)
    whole = {
        name: partial(_pieces_of_row, spec)
        for name, spec in bad.items()
        if _parts_of(spec) and found.keys().isdisjoint(_parts_of(spec))
    }
    found |= not_finite_in(whole, set(), weights, source.sizes, executor, "wholes")[0]
    return found, [failed_finding(name, "", why) for name, why in unread.items()]


def _sort(findings: Sequence[Finding]) -> list[Finding]:
    return sort_findings(findings, find_flags(findings))


def _parts_of(spec: RowSpec) -> tuple[str, ...]:
    return () if spec.source.tensor is None else spec.source.tensor.parts


def _pieces_of_row(spec: RowSpec) -> Iterator[Tensor]:
    assert spec.source.tensor is not None
    values = spec.source.tensor.read()
    S = values if isinstance(values, Tensor) else spec.matrix(values)
    assert isinstance(S, Tensor)
    return pieces_of(S.detach())


def _add_curves(executor: Executor, rows: list[Row], count: int) -> None:
    """Adds all singular values to the first rows that lack them; reads each tensor once."""
    lacking = [
        index
        for index, (_, finding) in enumerate(rows[: max(0, count)])
        if finding.measured and not finding.singular_values and finding.grade is not Grade.bounded
    ]
    lacking.sort(key=lambda index: rows[index][0].source.name)
    again = measure_rows(executor, [rows[index][0] for index in lacking], all_values=True)
    for index, (spec, whole) in zip(lacking, again, strict=True):
        values = whole.singular_values  # empty if the tensor cannot be read or measured again
        rows[index] = spec, with_comparison(replace(rows[index][1], singular_values=values))


def _coverage(
    rows: Sequence[Row], failed: int, source: Source, skipped: dict[str, Skipped]
) -> Coverage:
    """How many parameters of the source are measured; heads do not count."""
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
    of_file = source.of_file and not source.of_graph
    kernels = sum(map(_in_unknown_groups, rows)) if of_file else 0
    return Coverage(len(own), failed, skipped, share, tuple(left_out[:3]), describe_groups(kernels))


def _in_unknown_groups(row: Row) -> bool:
    """Whether the row is a kernel in a file that does not store its number of groups."""
    spec, finding = row
    if spec.source.tensor is None or not (spec.covers and finding.measured):
        return False
    view, known = spec.source.tensor.views.get("kernel"), spec.source.tensor.grouped
    return finding.view == "kernel" and not known and getattr(view, "groups", None) is None


def _check_measured(
    findings: Sequence[Finding], source: str, skipped: Mapping[str, Skipped], based: bool
) -> None:
    """Raises ValueError if nothing could be measured, or with a base, no merged weight."""
    sums = [finding for finding in findings if finding.with_adapter]
    if based and sums and not any(finding.measured for finding in sums):
        why = f"{sums[0].label}: {sums[0].explanation}"
        raise ValueError(
            f"`base` must yield a merged weight that can be measured, but {source} has none "
            f"({why})."
        )
    if not any(finding.measured for finding in findings):
        reasons = [f"{finding.label}: {finding.explanation}" for finding in findings]
        others = sorted(skipped.items(), key=lambda item: item[1].reason.no_matrix)
        reasons += [f"{name}: {why}" for name, why in others]
        listed = list_some((one.rstrip(".") for one in reasons or ["it is empty"]), separator="; ")
        raise ValueError(
            f"{source} must contain a weight matrix that can be measured, but has none ({listed})."
        )
