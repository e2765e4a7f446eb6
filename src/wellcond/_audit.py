"""Every weight of a model or a checkpoint measured, and what was left out and why.

Letters: S (m, n) a weight; sigma_1 >= ... >= sigma_nu its singular values, nu = min(m, n);
kappa = sigma_1/sigma_nu; u the unit roundoff of the dtype in which S is stored.
"""

from __future__ import annotations

import csv
import enum
import io
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wellcond._bounds import Certificate, certify
from wellcond._checkpoint import Checkpoint
from wellcond._page import CURVES, Row, render
from wellcond._spectrum import Method, measure, negligible
from wellcond._weights import NOT_A_MATRIX, Matrices, effective_matrices

SCHEMA = 1


class Grade(enum.Enum):
    """How far the numbers of a weight can be trusted."""

    none = "there are no numbers"
    estimated = (
        "extremes from an iteration that converged: sigma_max from below, sigma_min from above"
    )
    computed = "from all singular values in float64"
    certified = "computed, and enclosed by intervals that rounding errors cannot break"


class Status(enum.Enum):
    """What is the matter with a weight, in the words that the user reads."""

    ok = "measured"
    rank_deficient = (
        "the smallest singular value is zero to working precision, "
        "so the condition number is infinite"
    )
    zero = "every entry is zero, so there is no condition number"
    not_finite = "it holds NaN or infinity"
    failed = "it could not be measured"


@dataclass(frozen=True)
class Finding:
    """What was found of one weight.

    Attributes:
        name: its parameter name.
        view: which matrix of the parameter: "q", "3" of a stack, "kernel"; "" if it has one.
        shape: (m, n), outputs and inputs.
        dtype: in which it is stored, such as "bfloat16".
        sigma_max: the largest singular value, the spectral norm.
        sigma_min: the smallest of the nu = min(m, n) singular values.
        condition_number: sigma_max/sigma_min; inf if sigma_min is zero to working precision, nan
            if there is none.
        stable_rank: ||S||_F^2/sigma_max^2, between 1 and nu.
        rank: how many singular values exceed u ||S||_F, the most that rounding the entries to
            the dtype can move one; every matrix that rounds to this one has at least that rank.
        penalty: r = sigma_max^2/2 - ||S||_F^2/(2 nu), in units of a squared singular value.
        grade: "none", "estimated", "computed" or "certified"; see `Grade`.
        status: "ok", or what is the matter; its value says it in words.
        detail: more of the status, such as the error.
        method: how the singular values were found.
        certificate: the enclosures, if they were asked for.
        singular_values: all of them, descending, where the method gives all.
    """

    name: str
    view: str
    shape: tuple[int, ...]
    dtype: str
    sigma_max: float = math.nan
    sigma_min: float = math.nan
    condition_number: float = math.nan
    stable_rank: float = math.nan
    rank: int = 0
    penalty: float = math.nan
    grade: Grade = Grade.none
    status: Status = Status.ok
    detail: str = ""
    method: str = ""
    certificate: Certificate | None = None
    singular_values: tuple[float, ...] = field(default=(), repr=False)

    @property
    def label(self) -> str:
        """name:view, by which it is shown."""
        return f"{self.name}:{self.view}" if self.view else self.name

    @property
    def measured(self) -> bool:
        return self.status in (Status.ok, Status.rank_deficient, Status.zero)

    def exceeds(self, max_condition: float) -> bool:
        """Whether kappa is above; the certified upper bound if there is one.

        A kappa that is infinite, undefined or unknown is above every limit.
        """
        kappa = self.condition_number
        if self.certificate is not None:
            kappa = self.certificate.condition_number.upper
        return not (math.isfinite(kappa) and kappa <= max_condition)

    @property
    def explanation(self) -> str:
        """Status and detail in words; "" if all is well."""
        if self.status is Status.ok:
            return self.detail
        return f"{self.status.value}: {self.detail}" if self.detail else self.status.value

    def to_dict(self) -> dict[str, Any]:
        """All but the singular values, as JSON takes it: inf and nan as strings."""
        plain: dict[str, Any] = {
            "name": self.name,
            "view": self.view,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "sigma_max": self.sigma_max,
            "sigma_min": self.sigma_min,
            "condition_number": self.condition_number,
            "stable_rank": self.stable_rank,
            "rank": self.rank,
            "penalty": self.penalty,
            "grade": self.grade.name,
            "status": self.status.name,
            "detail": self.explanation,
            "method": self.method,
        }
        if self.certificate is not None:
            c = self.certificate
            plain["certificate"] = {
                "certified": c.certified,
                "method": c.method,
                "reason": c.reason,
                "sigma_max": [c.sigma_max.lower, c.sigma_max.upper],
                "sigma_min": [c.sigma_min.lower, c.sigma_min.upper],
                "condition_number": [c.condition_number.lower, c.condition_number.upper],
            }
        return plain


@dataclass(frozen=True)
class Coverage:
    """What the findings stand for.

    Attributes:
        measured: how many matrices have numbers.
        failed: how many could not be measured; each has a finding that says why.
        skipped: everything else by name, and why.
        parameter_share: entries of the measured matrices over those of all parameters, 0 to 1.
    """

    measured: int
    failed: int
    skipped: dict[str, str]
    parameter_share: float

    def __str__(self) -> str:
        left_out = {n: r for n, r in self.skipped.items() if not r.startswith(NOT_A_MATRIX)}
        matrices = self.measured + self.failed + len(left_out)
        text = f"{self.measured} of {matrices} matrices, {100 * self.parameter_share:.1f} % of "
        text += "the parameters"
        if self.failed:
            text += f"; {self.failed} could not be measured"
        if left_out:
            shown = [f"{name} ({reason})" for name, reason in list(left_out.items())[:3]]
            more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
            text += f"; {len(left_out)} skipped: {', '.join(shown)}{more}"
        kinds = Counter(r for r in self.skipped.values() if r.startswith(NOT_A_MATRIX))
        if kinds:
            counted = (f"{n} ({r.removeprefix(f'{NOT_A_MATRIX}: ')})" for r, n in kinds.items())
            text += f"; no matrices: {', '.join(counted)}"
        return text


@dataclass(frozen=True)
class AuditReport:
    """The findings of an audit, worst first, with what they cover.

    Attributes:
        findings: one a matrix, by descending condition number; unknown ones before all others.
        coverage: what was measured, what not and why.
        source: the path or the class of the model.
        versions: of wellcond, torch and Python.
    """

    findings: list[Finding]
    coverage: Coverage
    source: str
    versions: dict[str, str]

    def exceeding(self, max_condition: float) -> list[Finding]:
        """The findings above a limit of the condition number; see `Finding.exceeds`."""
        return [finding for finding in self.findings if finding.exceeds(max_condition)]

    def table(self, top: int | None = None) -> str:
        """The findings as text, the worst `top` of them, with what they cover."""
        shown = self.findings[:top]
        rows = [_cells(finding) for finding in shown]
        certified = any(finding.certificate for finding in shown)
        text = text_table(_HEADERS if certified else _HEADERS[:-1], rows)
        if len(shown) < len(self.findings):
            text += f"... and {len(self.findings) - len(shown)} more with a smaller κ\n"
        for finding in shown:
            if finding.explanation:
                text += f"{finding.label}: {finding.explanation}\n"
        return f"{text}{self.coverage}\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain data in the documented schema; numbers may be inf and nan."""
        return {
            "schema": SCHEMA,
            "source": self.source,
            "findings": [finding.to_dict() for finding in self.findings],
            "coverage": {
                "measured": self.coverage.measured,
                "failed": self.coverage.failed,
                "skipped": [
                    {"name": name, "reason": reason}
                    for name, reason in self.coverage.skipped.items()
                ],
                "parameter_share": self.coverage.parameter_share,
            },
            "versions": self.versions,
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """`to_dict` as strict JSON, inf and nan as the strings "inf" and "nan"; written to path."""
        return written(dump_json(self.to_dict()), path)

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """One line a finding, columns as in the JSON; written to path."""
        text = io.StringIO()
        plain = [finding.to_dict() for finding in self.findings]
        columns = [key for key in plain[0] if key != "certificate"]
        ends = [f"{key}_{end}" for key in _ENCLOSED for end in ("lower", "upper")]
        rows = csv.DictWriter(text, columns + ends, lineterminator="\n")
        rows.writeheader()
        for row in plain:
            enclosures = row.pop("certificate", {})
            row["shape"] = "x".join(map(str, row["shape"]))
            for key in _ENCLOSED if enclosures else ():
                row[f"{key}_lower"], row[f"{key}_upper"] = enclosures[key]
            rows.writerow(row)
        return written(text.getvalue(), path)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """One page that needs neither network nor script; written to path."""
        curves = [(f.label, f.singular_values) for f in self.findings if f.sigma_max > 0]
        page = render(
            source=self.source,
            headers=_HEADERS,
            rows=[
                Row(_cells(finding), finding.condition_number, finding.explanation)
                for finding in self.findings
            ],
            coverage=str(self.coverage),
            skipped=self.coverage.skipped,
            grades={grade.name: grade.value for grade in Grade},
            curves=[curve for curve in curves if len(curve[1]) > 1][:CURVES],
            versions=self.versions,
        )
        return written(page, path)

    def __str__(self) -> str:
        return self.table()


@dataclass(frozen=True)
class Comparison:
    """Two audits side by side, in the order of the largest change of kappa.

    Attributes:
        pairs: label, finding before and finding after; None on the side where it is missing.
        before: the source of the first audit.
        after: that of the second.
        versions: of wellcond, torch and Python.
    """

    pairs: list[tuple[str, Finding | None, Finding | None]]
    before: str
    after: str
    versions: dict[str, str]

    def table(self) -> str:
        """kappa before and after, and their ratio."""
        rows = []
        for label, old, new in self.pairs:
            kappas = [f"{side.condition_number:.4g}" if side else "-" for side in (old, new)]
            rows.append((label, *kappas, f"{_ratio(old, new):.4g}" if old and new else "-"))
        headers = ("weight", "κ before", "κ after", "after/before")
        return f"{text_table(headers, rows)}before: {self.before}\nafter: {self.after}\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain data; numbers may be inf and nan."""
        return {
            "schema": SCHEMA,
            "before": self.before,
            "after": self.after,
            "comparison": [
                {
                    "weight": label,
                    "before": old.to_dict() if old else None,
                    "after": new.to_dict() if new else None,
                    "ratio": _ratio(old, new) if old and new else None,
                }
                for label, old, new in self.pairs
            ],
            "versions": self.versions,
        }


def _ratio(old: Finding, new: Finding) -> float:
    return new.condition_number / old.condition_number if old.condition_number else math.nan


def compare(before: AuditReport, after: AuditReport) -> Comparison:
    """How the condition number of every weight moved from one audit to another."""
    old, new = ({f.label: f for f in report.findings} for report in (before, after))
    labels = list(old) + [label for label in new if label not in old]
    pairs = [(label, old.get(label), new.get(label)) for label in labels]

    def change(pair: tuple[str, Finding | None, Finding | None]) -> float:
        ratio = _ratio(pair[1], pair[2]) if pair[1] and pair[2] else math.nan
        return abs(math.log(ratio)) if 0 < ratio < math.inf else math.inf

    pairs.sort(key=change, reverse=True)
    return Comparison(pairs, before.source, after.source, versions())


_NUMBERS = ("κ", "σ_max", "σ_min", "stable rank", "rank", "r")
_HEADERS = ("weight", "shape", "dtype", *_NUMBERS, "grade", "κ certified")
_ENCLOSED = ("sigma_max", "sigma_min", "condition_number")


def _cells(finding: Finding) -> tuple[str, ...]:
    numbers = (finding.condition_number, finding.sigma_max, finding.sigma_min, finding.stable_rank)
    kappa, high, low, stable = (f"{number:.4g}" for number in numbers)
    enclosure = str(finding.certificate.condition_number) if finding.certificate else ""
    return (
        finding.label,
        "x".join(map(str, finding.shape)),
        finding.dtype,
        *(kappa, high, low, stable),
        f"{finding.rank}/{min(finding.shape)}" if finding.measured else "-",
        f"{finding.penalty:.3g}",
        finding.grade.name,
        enclosure,
    )


def text_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain text table, the first column to the left and numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for header in headers:
        left = header in ("weight", "dtype", "grade", "changed")
        table.add_column(header, justify="left" if left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row[: len(headers)])
    text = io.StringIO()
    # As wide as it needs to be: a table that is cut to the terminal would hide numbers.
    Console(file=text, width=1000, color_system=None, markup=False, highlight=False).print(table)
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


def dump_json(content: Any) -> str:
    """Strict JSON with inf, -inf and nan as strings."""

    def strict(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        if isinstance(value, dict):
            return {key: strict(item) for key, item in value.items()}
        return [strict(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps(strict(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def written(text: str, path: str | os.PathLike[str] | None) -> str:
    """The text, and into a file if there is a path."""
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


Progress = Callable[[str, int], None]


def audit(
    model_or_path: nn.Module | str | os.PathLike[str],
    certify: bool = False,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    curves: int = 0,
    progress: Progress | None = None,
) -> AuditReport:
    """Measures every weight of a model, or of a checkpoint without loading it whole.

    All arithmetic is float64 on the CPU. The singular values come from the smaller Gram matrix,
    from inverse iteration and an SVD where that does not resolve sigma_nu, and of weights with
    nu >= 2048 only the extremes, by Krylov spaces; each finding says which. kappa was right to 1e-6
    up to 1e5 (`wellcond bench audit`). Nothing of the model is touched.

    A model is read by its modules: convolution kernels as (out, in/groups * kernel), attention's
    in_proj as its three blocks, gates of recurrent cells, parametrized weights by their value.
    Embeddings and parameters of unknown modules are skipped unless their exact name is included. A
    file has no classes: every float tensor of 2 dimensions is measured, of 3 a stack unless its
    name contains "conv", of 4 and more a kernel. Tied weights count once.

    Args:
        model_or_path: a module; or a .safetensors file, a *.safetensors.index.json, a state dict of
            torch.save (.pt, .pth, .bin, .ckpt), or a directory of these.
        certify: enclose sigma_max, sigma_min and kappa of each by `wellcond.certify` as well.
        include: patterns (`fnmatch.fnmatchcase`) of names to measure; all if empty.
        exclude: patterns of names to leave out.
        curves: of so many of the worst weights find all singular values, however large they are.
        progress: called with the name of each tensor before it is read, and its number from 1.

    Returns:
        An `AuditReport`. A weight that could not be measured is a finding that says why.

    Raises:
        ValueError: nothing could be measured, a pattern matches nothing, or a file is unreadable.
        FileNotFoundError: the path is not there.
        TypeError: neither a module nor a path.

    Example:
        >>> import torch, wellcond as wc
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        >>> report = wc.audit(model)
        >>> sorted(finding.name for finding in report.findings), report.coverage.measured
        (['0.weight', '1.weight'], 2)
    """
    matrices, skipped, damaged, total, source = _source(model_or_path)
    wanted = chosen(matrices, skipped, include, exclude)
    findings = [
        Finding(name, "", (0, 0), "", status=Status.failed, detail=reason)
        for name, reason in damaged.items()
    ]
    where: dict[int, Matrices] = {}
    covered = 0
    for number, one in enumerate(wanted, 1):
        if progress is not None:
            progress(one.name, number)
        found = _findings(one, certify)
        where |= {id(finding): one for finding in found}
        covered += sum(math.prod(finding.shape) for finding in found if finding.measured)
        findings += found
    measured = sum(finding.measured for finding in findings)
    if not measured:
        raise ValueError(_nothing(source, findings, skipped))
    findings.sort(key=_badness)
    for index, finding in enumerate(findings[:curves]):
        if finding.measured and not finding.singular_values:
            (again,) = (
                other
                for other in _findings(where[id(finding)], certify=False, all_values=True)
                if other.view == finding.view
            )
            findings[index] = replace(finding, singular_values=again.singular_values)
    coverage = Coverage(
        measured, len(findings) - measured, skipped, min(1.0, covered / total) if total else 0.0
    )
    return AuditReport(findings, coverage, source, versions())


def _source(
    model_or_path: nn.Module | str | os.PathLike[str],
) -> tuple[list[Matrices], dict[str, str], dict[str, str], int, str]:
    """The matrices, what is none, what is damaged, how many parameters there are, and a name."""
    if isinstance(model_or_path, nn.Module):
        matrices, rest, total = effective_matrices(model_or_path)
        return matrices, rest, {}, total, type(model_or_path).__name__
    if isinstance(model_or_path, str | os.PathLike):
        file = Checkpoint(model_or_path)
        found = list(file.matrices())
        return found, file.skipped(), file.damaged, file.parameters, str(file.path)
    raise TypeError(
        "`model_or_path` must be a torch.nn.Module or a path, got "
        f"{type(model_or_path).__name__}. Of a state dict save a file, or audit its model."
    )


def chosen(
    matrices: list[Matrices],
    skipped: dict[str, str],
    include: Sequence[str],
    exclude: Sequence[str],
) -> list[Matrices]:
    """What is to be measured; adds to `skipped` what is not."""
    unused = {*include, *exclude}

    def match(one: Matrices, patterns: Sequence[str]) -> str | None:
        matching = [p for p in patterns if any(fnmatchcase(name, p) for name in one.aliases)]
        unused.difference_update(matching)
        return next(iter(matching), None)

    wanted = []
    for one in matrices:
        included, excluded = match(one, include), match(one, exclude)
        if excluded is not None:
            skipped[one.name] = f'left out by the pattern "{excluded}"'
        elif include and included is None:
            skipped[one.name] = "matched by no pattern of those to include"
        elif one.name not in skipped or included in one.aliases:
            skipped.pop(one.name, None)
            wanted.append(one)
    if unused:
        names = [one.name for one in matrices]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise ValueError(
            f"`include` and `exclude` must match a weight, but {', '.join(sorted(unused))} "
            f"matches none. The weights are {shown or 'none'}."
        )
    return wanted


def _nothing(source: str, findings: list[Finding], skipped: dict[str, str]) -> str:
    reasons = [f"{finding.label}: {finding.explanation}" for finding in findings]
    reasons += [f"{name}: {reason}" for name, reason in skipped.items()]
    more = f" and {len(reasons) - 5} more" if len(reasons) > 5 else ""
    listed = "; ".join(reasons[:5]) or "it is empty"
    return (
        f"{source} must hold a weight matrix that can be measured, but has none ({listed}{more})."
    )


def _badness(finding: Finding) -> tuple[bool, bool, float]:
    """Failed ones first, then undefined ones, then by descending kappa."""
    kappa = finding.condition_number
    return finding.measured, not math.isnan(kappa), -kappa


def versions() -> dict[str, str]:
    """Of wellcond, torch and Python."""
    return {
        "wellcond": version("wellcond"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _findings(one: Matrices, certify: bool, all_values: bool = False) -> list[Finding]:
    """A row for each matrix of a tensor; trouble with one is its status."""
    try:
        tensor = one.read()
        views = one.views(tensor)
    except Exception as error:  # whatever it is, the other weights are still to be measured
        return [Finding(one.name, "", (0, 0), "", status=Status.failed, detail=_in_words(error))]
    found = []
    for view, S in views.items():
        blank = Finding(one.name, view, tuple(S.shape), str(S.dtype).removeprefix("torch."))
        try:
            found.append(_finding(blank, S.detach().cpu(), certify, all_values))
        except Exception as error:
            found.append(replace(blank, status=Status.failed, detail=_in_words(error)))
    return found


def _in_words(error: Exception) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0] if first else 'without a message'}"


def _finding(blank: Finding, S: Tensor, want_certificate: bool, all_values: bool) -> Finding:
    spread = S.aminmax()
    if not math.isfinite(float(spread.min)) or not math.isfinite(float(spread.max)):
        bad = int((~torch.isfinite(S)).sum())
        detail = f"{bad} of {S.numel()} entries"
        return replace(blank, status=Status.not_finite, detail=detail)
    spectrum = measure(S, all_values)
    norm = _frobenius(S)
    # Up to here a singular value could be the work of rounding to the dtype, or of float64.
    sigma_max, sigma_min = (float(spectrum.singular_values[i]) for i in (0, -1))
    zero = max(torch.finfo(S.dtype).eps / 2 * norm, negligible(S.shape) * sigma_max)
    if spectrum.method is Method.krylov and sigma_min <= zero:
        spectrum = measure(S, all_values=True)
    sigma, nu = spectrum.singular_values, min(S.shape)
    top, kappa = float(sigma[0]), spectrum.condition_number
    complete = spectrum.method is not Method.krylov
    rank = int((sigma > zero).sum()) if complete else nu
    if complete:
        penalty = float(((top - sigma) * (top + sigma)).sum()) / (2 * nu)
    else:
        penalty = max(0.0, (top**2 - norm**2 / nu) / 2)
    status = Status.ok
    if math.isnan(kappa):
        status = Status.zero
    elif math.isinf(kappa):
        status = Status.rank_deficient
    certificate = certify(S) if want_certificate else None
    grade = Grade.computed if complete else Grade.estimated
    if certificate is not None and certificate.certified:
        grade = Grade.certified
    return replace(
        blank,
        sigma_max=top,
        sigma_min=float(sigma[-1]),
        condition_number=kappa,
        stable_rank=(norm / top) ** 2 if top > 0 else math.nan,
        rank=rank,
        penalty=penalty,
        grade=grade,
        status=status,
        detail=certificate.reason if certificate is not None and top > 0 else "",
        method=spectrum.method.value,
        certificate=certificate,
        singular_values=tuple(sigma.tolist()) if complete else (),
    )


def _frobenius(S: Tensor) -> float:
    """||S||_F in float64, of entries whose squares may overflow."""
    wide = S.double()
    unit = float(torch.linalg.vector_norm(wide, math.inf)) or 1.0
    if 1e-100 < unit < 1e100:
        unit = 1.0
    return float(torch.linalg.vector_norm(wide / unit if unit != 1 else wide)) * unit
