"""Every weight of a model or a checkpoint measured, and what was left out and why.

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

from torch import Tensor

from wellcond.audits.attempt import failed_finding
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
) -> AuditReport:
    """Measures every weight of a model, a state dict, or a checkpoint without loading it whole.

    All arithmetic is float64 on the CPU, and the model is not changed. Each finding names the
    method that found its singular values; kappa was right to 1e-6 up to 1e5 (`wellcond bench
    audit`). A model is read by its modules, and measured by the weights that act in eval mode. A
    file has no modules: names decide which tensors are weights, then the tensors beside them, then
    shapes; the row of a guess says that it is one. "Reading an audit" in the documentation says
    which matrices a tensor holds, and what each number means.

    A weight that a file stores as several tensors (codes and scales, slices, the parameters of
    weight_norm) is built from them, one at a time, and measured under the name that it has in a
    plain checkpoint; `Finding.parts` has their names. If that cannot be done, `coverage.skipped`
    has the reason under the name of the codes, and no number is given.

    Args:
        model_or_path: a module, also one wrapped by torch.compile or DistributedDataParallel; a
            state dict, which maps names to tensors or NumPy arrays and is read as a file is; or the
            path of a .safetensors file, a *.safetensors.index.json, a state dict of torch.save
            (.pt, .pth, .bin, .ckpt, .pth.tar), a file of Keras, Flax, NumPy, ONNX, GGUF,
            TorchScript or torch.export ("From JAX, Keras, ONNX, GGUF" in the documentation), or a
            directory of these. Classes of other Python objects in a file are named, not loaded.
        certify: also enclose sigma_max, sigma_min and kappa by `wellcond.certify`; not of heads.
        include: one or more patterns (`fnmatch.fnmatchcase`) of names to measure; all if empty.
            A weight that is skipped because of its name is measured if a pattern is that name. A
            pattern may match the name of the codes, as `*.qweight` does.
        exclude: one or more patterns of names to leave out.
        curves: find all singular values of this number of the worst weights, however large.
        progress: True shows a bar, of tqdm if it is installed. Or a function that is called with a
            `Progress` before each tensor is read, and every second within a convolution that is
            measured as it acts; `print` will do.
        example: input of the model: a tensor, a tuple, or a dict of named arguments. One forward
            pass in eval mode shows on which input size each convolution acts, and the convolution
            is measured as that map, under the view "operator" instead of "kernel". The numbers are
            exact where the kernel sees no input twice, on a torus, and up to 4096 singular values;
            else sigma_max is enclosed, kappa is a lower bound, and the grade is "bounded".
        heads: also measure the heads of attention: W_Q^T W_K of head 3, which compares two inputs,
            as `layers.0.self_attn:qk3`, and W_O W_V, which carries one to the other, as
            `layers.0.self_attn:vo3`; without biases and 1/sqrt(d_head). All numbers are those of
            the d_head singular values that need not be zero; the detail names what acts in between.
            A file needs its config.json. Heads do not count in the coverage.
        base: the model, or its path, that the adapter at the path (LoRA, LoHa, ...) adapts. Per
            adapted weight there is one finding, `q_proj.weight:merged`: W + s B A in float64, with
            kappa of W, kappa of the sum in the dtype of W, and the size of what is added. Patterns
            that leave it out (`include="*:delta"`, `exclude="*:merged"`) show `q_proj.weight` and
            `q_proj.weight:delta`, s B A, instead. Without a base only the last is; a model of PEFT
            holds its base. The rest of the base is left out.
        resume: the path of a file to which each weight is appended as soon as it is measured. An
            audit that was killed goes on with the same file, and measures only what is not in it;
            the report is the same. Needs a path, or a base, of files that have not changed.

    Returns:
        An `AuditReport`. A weight that could not be measured is a finding with the reason. All
        other floating-point tensors that no pattern leaves out, also the buffers of a model, are
        searched for NaN and infinity: see `AuditReport.not_finite`.

    Raises:
        ValueError: nothing could be measured, a pattern matches nothing, a file is unreadable, the
            model does not take the example, no attention is known, the base does not fit, or
            `resume` is no file of this audit.
        FileNotFoundError: the path does not exist.
        TypeError: neither a module nor a path nor a state dict, or one with other dicts in it; an
            array of a dtype that torch lacks; an example without a model; a base for a model;
            `resume` for what is no path.

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
    options = Options(certify, [*as_patterns(include)], [*as_patterns(exclude)], curves, heads)
    return audit_together(None, model_or_path, options, progress, example, base, resume)


class Options(NamedTuple):
    """What `audit` is asked for, and what decides its numbers."""

    certify: bool
    include: Sequence[str]
    exclude: Sequence[str]
    curves: int
    heads: bool


class _Plan(NamedTuple):
    source: Source
    specs: list[RowSpec]
    skipped: dict[str, Skipped]
    record: Record | None

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
    """What `audit` does, by all processes of a group, which get the same report."""
    for name, one in (("model_or_path", model_or_path), ("base", base)):
        if resume is not None and not isinstance(one, str | os.PathLike | None):
            raise TypeError(
                f"`resume` must come with paths, whose files can be told apart from others, but "
                f"`{name}` is a {type(one).__name__}. Save it, or leave `resume` out."
            )

    path, base_path = (
        str(Path(one).resolve()) if isinstance(one, str | os.PathLike) else ""
        for one in (model_or_path, base)
    )

    def prepare() -> _Plan:
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
        return _Plan(source, merge_rows(specs), skipped, record)

    planned = prepare() if group is None else group.together(prepare, _Plan.states)
    executor = Executor(group, planned.record)
    with shown(progress) as callback, planned.record or nullcontext():
        return _measure(planned, options, executor, callback, base is not None)


def _measure(
    planned: _Plan,
    options: Options,
    executor: Executor,
    progress: ProgressCallback | None,
    based: bool,
) -> AuditReport:
    source, specs, skipped, _ = planned
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
    """The tensors that hold NaN or infinity, measured or not, and rows of unreadable ones."""
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
    for name, spec in bad.items():  # of a base, or computed; of what is built, its parts say more
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
    """Gives all singular values to the first rows that lack them; reads each tensor once."""
    lacking = [
        index
        for index, (_, finding) in enumerate(rows[: max(0, count)])
        if finding.measured and not finding.singular_values and finding.grade is not Grade.bounded
    ]
    lacking.sort(key=lambda index: rows[index][0].source.name)
    again = measure_rows(executor, [rows[index][0] for index in lacking], all_values=True)
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
    of_file = source.of_file and not source.of_graph
    kernels = sum(map(_in_unknown_groups, rows)) if of_file else 0
    return Coverage(len(own), failed, skipped, share, tuple(left_out[:3]), describe_groups(kernels))


def _in_unknown_groups(row: Row) -> bool:
    """Whether it is a kernel of which the file does not say how many groups it has."""
    spec, finding = row
    if spec.source.tensor is None or not (spec.covers and finding.measured):
        return False
    view = spec.source.tensor.views.get("kernel")
    return finding.view == "kernel" and getattr(view, "groups", None) is None


def _check_measured(
    findings: Sequence[Finding], source: str, skipped: Mapping[str, Skipped], based: bool
) -> None:
    """Raises if nothing could be measured, or with a base no sum."""
    sums = [finding for finding in findings if finding.with_adapter]
    if based and sums and not any(finding.measured for finding in sums):
        why = f"{sums[0].label}: {sums[0].explanation}"
        raise ValueError(
            f"`base` must give a sum that can be measured, but {source} has none ({why})."
        )
    if not any(finding.measured for finding in findings):
        reasons = [f"{finding.label}: {finding.explanation}" for finding in findings]
        others = sorted(skipped.items(), key=lambda item: item[1].reason.no_matrix)
        reasons += [f"{name}: {why}" for name, why in others]
        listed = list_some((one.rstrip(".") for one in reasons or ["it is empty"]), separator="; ")
        raise ValueError(
            f"{source} must hold a weight matrix that can be measured, but has none ({listed})."
        )
