"""The finding of an audit for one weight, and the coverage of all findings.

Letters: S (m, n) a weight; sigma_1 >= ... >= sigma_nu its singular values, nu = min(m, n);
kappa = sigma_1/sigma_nu; u the unit roundoff of the dtype in which S is stored.
"""

from __future__ import annotations

import enum
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from wellcond.text import escape, join_remarks, list_some
from wellcond.weights.reasons import Skipped

if TYPE_CHECKING:
    from wellcond.linalg.certify import Certificate

MERGED = "merged"  # the view of a merged weight, or the end of it
USUAL = 0.05  # kappa is usual if a larger share of random matrices exceeds it


class Grade(enum.Enum):
    """How reliable the numbers of a weight are."""

    none = "not measured"
    estimated = (
        "from an iteration that converged: it approaches σ_max from below and σ_min from above"
    )
    bounded = "σ_max is a lower bound, σ_min an upper bound, and so κ a lower bound"
    computed = "from all singular values in float64"
    certified = "computed, and enclosed in proven intervals that account for rounding errors"


class Status(enum.Enum):
    """The status of a weight, in the words that the user reads."""

    ok = "measured"
    rank_deficient = (
        "the smallest singular value is zero to working precision, "
        "so the condition number is infinite"
    )
    zero = "every entry is zero, so the condition number is undefined"
    fresh = "the adapter adds nothing yet: B A is zero"
    not_finite = "contains NaN or infinity"
    failed = "could not be measured"


@dataclass(frozen=True)
class Finding:
    """The measured numbers of one weight, its status, and the grade of the numbers.

    Attributes:
        name: the parameter name.
        view: the matrix within the parameter: "q", "3" in a stack, "kernel"; "operator" for a
            convolution as a linear operator; "delta" for the change by an adapter, "merged" for the
            sum; "" if the parameter is one matrix.
        shape: (m, n), outputs and inputs; (g, m, n) for the kernel of a convolution in g groups,
            which acts and is measured as one block-diagonal matrix.
        dtype: the stored dtype, such as "bfloat16"; for codes their format, such as "int4".
        sigma_max: the largest singular value, the spectral norm.
        sigma_min: the smallest of the nu = min(m, n) singular values, g nu for g groups.
        condition_number: sigma_max/sigma_min; inf if sigma_min is zero to working precision, nan
            if it is undefined or unknown.
        stable_rank: ||S||_F^2/sigma_max^2, between 1 and nu.
        rank: the number of singular values above u ||S||_F, the largest change that rounding the
            entries to the dtype can make. Every matrix that rounds to this one has at least that
            rank. For a weight built from `parts`, u is that of float32. 0 if the grade is
            "bounded".
        penalty: r = sigma_max^2/2 - ||S||_F^2/(2 nu), in units of a squared singular value.
        exceedance: the probability that a random matrix of this shape, with independent Gaussian
            entries, has a larger condition number; see `wellcond.linalg.gaussian.exceedance`. nan
            if the condition number is nan, for vectors and complex matrices, and for matrices that
            are not stored: convolutions in groups or as linear operators, and attention heads.
            Random matrices of these kinds follow other laws.
        random_stable_rank: the mean stable rank of random matrices of this shape; nan as above.
        random_condition_number: the median kappa of random matrices of this shape; nan as above.
        grade: "none", "estimated", "bounded", "computed" or "certified"; see `Grade`.
        status: "ok" or the problem; the value of the member describes it in words.
        detail: further information on the status, such as the error.
        method: the method that computed the singular values.
        certificate: the enclosures, if they were requested.
        singular_values: all singular values in descending order if the method computes all. For a
            convolution as a linear operator, at most 4096 of them at equal distances.
        entries: the number of entries of the parameter that the weight represents.
        inner: for a product of two factors, such as a head, the inner dimension, which bounds nu; 0
            for other weights.
        gain: ||S||_F/sqrt(m), the root mean square of the entries times sqrt(n). It is the factor
            by which the weight scales the root mean square of independent inputs. nan for a matrix
            that is not stored.
        largest_entry: max |w| over real and imaginary parts; the maximum of float16 is 65504. This
            and the next two are nan for a matrix that is not stored, such as a convolution as a
            linear operator.
        subnormal_share: the share of entries that are subnormal in the dtype, or in float32 for a
            weight built from `parts`, 0 to 1. They have lost digits, and hardware might flush them
            to zero.
        float16_zero_share: the share of nonzero entries that would be zero in float16, 0 to 1.
        zero_rows: the indices of zero rows (outputs); for a kernel in groups, over all groups.
        zero_columns: the indices of zero columns (inputs), likewise.
        equal_rows: the indices of two rows (outputs) that are equal and not zero; () if there are
            none.
        dominant_entry: the indices of an entry with more than 99.9 % of ||S||_F^2; () if there is
            none, and for vectors.
        stored: whether the measured matrix is stored and not computed from parameters, so that it
            can be repaired in a file.
        parts: the names of the tensors of a file from which it is built, such as codes and scales;
            () if it is stored as one tensor.
        added_share: for a weight merged with an adapter of rank r, the share of the sum of the r
            largest singular values that the adapter contributes; nan for other weights. See
            `wellcond.linalg.leading.measure_share`.
        added_new: how many of these singular values come more than half from the adapter.
        added_of: how many singular values are considered, at most r; 0 for other weights.
        opposite_rows: whether the weight has exactly two rows, w and -w up to 5 %, as the head of
            a classifier with two classes can have.
        base_condition_number: for a weight with an adapter, kappa of the weight W without it. This
            and the next five replace the rows of W and of the change, which are omitted when the
            sum is reported. nan, 0 or "" for other weights.
        base_dtype: the dtype of W.
        delta_share: ||D||_F/||W||_F, where D is the sum minus W.
        delta_stable_rank: ||D||_F^2/sigma_1(D)^2, the number of directions that D uses; nan if D
            is zero.
        delta_rank: the number of directions that the adapters can use: the sum of their ranks, at
            most nu.
        rounded_condition_number: kappa of the sum rounded to `base_dtype`, as by a merge; nan if W
            is not stored.
        gap: the number of singular values below the widest gap in their lower half, and the ratio
            across the gap; (0, 1) if the singular values are unknown.
        repair_limit: the smallest power of ten that at most 1 in 20 random matrices of this shape
            exceed, if kappa exceeds it; else nan.
        repair_change: the distance to the nearest matrix within that limit, over ||S||_F.
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
    exceedance: float = math.nan
    random_stable_rank: float = math.nan
    random_condition_number: float = math.nan
    grade: Grade = Grade.none
    status: Status = Status.ok
    detail: str = ""
    method: str = ""
    certificate: Certificate | None = None
    singular_values: tuple[float, ...] = field(default=(), repr=False)
    entries: int = 0
    inner: int = 0
    largest_entry: float = math.nan
    gain: float = math.nan
    subnormal_share: float = math.nan
    float16_zero_share: float = math.nan
    zero_rows: tuple[int, ...] = ()
    zero_columns: tuple[int, ...] = ()
    equal_rows: tuple[int, ...] = ()
    dominant_entry: tuple[int, ...] = ()
    stored: bool = True
    parts: tuple[str, ...] = ()
    added_share: float = math.nan
    added_new: int = 0
    added_of: int = 0
    opposite_rows: bool = False
    base_condition_number: float = math.nan
    base_dtype: str = ""
    delta_share: float = math.nan
    delta_stable_rank: float = math.nan
    delta_rank: int = 0
    rounded_condition_number: float = math.nan
    gap: tuple[int, float] = (0, 1.0)
    repair_limit: float = math.nan
    repair_change: float = math.nan

    def __post_init__(self) -> None:
        if (
            not self.entries
        ):  # given for convolutions as linear operators: the entries of the kernel
            object.__setattr__(self, "entries", math.prod(self.shape))

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        numbers = f"κ {self.condition_number:.4g}, σ {self.sigma_max:.4g} to {self.sigma_min:.4g}"
        if math.isnan(self.condition_number):
            numbers = self.explanation
        return f"<Finding {escape(self.label)}: {shape} {self.dtype}, {escape(numbers)}>"

    @property
    def label(self) -> str:
        """The displayed name, "name:view"."""
        return f"{self.name}:{self.view}" if self.view else self.name

    @property
    def nu(self) -> int:
        """The number of singular values; for a product, of those that need not be zero."""
        return self.inner or math.prod(self.shape[:-2]) * min(self.shape[-2:])

    @property
    def with_adapter(self) -> bool:
        """Whether it is a weight merged with adapters, which no file contains."""
        return self.view == MERGED or self.view.endswith(f":{MERGED}")

    @property
    def measured(self) -> bool:
        return self.status in (Status.ok, Status.rank_deficient, Status.zero, Status.fresh)

    def exceeds(self, max_condition: float) -> bool:
        """Returns whether kappa, or its certified upper bound if there is one, exceeds the limit.

        An infinite, undefined or unknown kappa exceeds every limit. A kappa with only a lower bound
        exceeds the limits below that bound. An adapter that adds nothing exceeds no limit.
        """
        if self.status is Status.fresh:
            return False
        kappa = self.condition_number
        if self.certificate is not None:
            kappa = self.certificate.condition_number.upper
        return not (math.isfinite(kappa) and kappa <= max_condition)

    @property
    def explanation(self) -> str:
        """The status in words and the detail; only the detail if the status is "ok"."""
        if self.status is Status.ok:
            return self.detail
        return f"{self.status.value}: {self.detail}" if self.detail else self.status.value

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data without the singular values; numbers can be inf or nan."""
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
            "exceedance": self.exceedance,
            "random_stable_rank": self.random_stable_rank,
            "random_condition_number": self.random_condition_number,
            "gain": self.gain,
            "largest_entry": self.largest_entry,
            "subnormal_share": self.subnormal_share,
            "float16_zero_share": self.float16_zero_share,
            "zero_rows": list(self.zero_rows),
            "zero_columns": list(self.zero_columns),
            "equal_rows": list(self.equal_rows),
            "dominant_entry": list(self.dominant_entry),
            "stored": self.stored,
            "parts": list(self.parts),
            "added_share": self.added_share,
            "added_new": self.added_new,
            "added_of": self.added_of,
            "base_condition_number": self.base_condition_number,
            "base_dtype": self.base_dtype,
            "delta_share": self.delta_share,
            "delta_stable_rank": self.delta_stable_rank,
            "delta_rank": self.delta_rank,
            "rounded_condition_number": self.rounded_condition_number,
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
    """The part of a model that the findings cover.

    Attributes:
        measured: the number of measured matrices.
        failed: the number of matrices that could not be measured; each has a finding with the
            reason.
        skipped: every other tensor by name, with the reason.
        parameter_share: the entries of the measured matrices over those of all parameters, 0 to 1.
        largest_left_out: the names and the numbers of entries of the largest skipped parameters, at
            most three.
        note: a note that applies to all findings, or "".
    """

    measured: int
    failed: int
    skipped: dict[str, Skipped]
    parameter_share: float
    largest_left_out: tuple[tuple[str, int], ...] = ()
    note: str = ""

    def __str__(self) -> str:
        left_out = {n: why for n, why in self.skipped.items() if not why.reason.no_matrix}
        lacking = sum(not why.reason.no_tensor for why in left_out.values())
        matrices = self.measured + self.failed + lacking
        text = (
            f"{self.measured} of {matrices} matrices measured, {100 * self.parameter_share:.1f} % "
        )
        text += "of the parameters"
        if self.failed:
            text += f"; {self.failed} could not be measured"
        if left_out:
            named = list_some((f"{name} ({why})" for name, why in left_out.items()), limit=3)
            text += f"; {len(left_out)} skipped: {named}"
        reasons = [why.reason for why in self.skipped.values() if why.reason.no_matrix]
        if reasons:
            counted = (f"{n} ({reason.name})" for reason, n in Counter(reasons).items())
            text += f"; not matrices: {', '.join(counted)}"
        return join_remarks(text, self.note)


def sort_key(finding: Finding) -> tuple[bool, bool, float]:
    """Returns the sort key: failed, undefined, by descending kappa; fresh adapters last."""
    if finding.status is Status.fresh:
        return True, True, 0.0
    kappa = finding.condition_number
    return finding.measured, not math.isnan(kappa), -kappa
