"""What an audit found of one weight, and what the findings of all stand for.

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

MERGED = "merged"  # the view, or its end
USUAL = 0.05  # a kappa that more random matrices exceed is usual


class Grade(enum.Enum):
    """How far the numbers of a weight can be trusted."""

    none = "there are no numbers"
    estimated = (
        "extremes from an iteration that converged: sigma_max from below, sigma_min from above"
    )
    bounded = "σ_max is at least, and σ_min at most what is shown, so that κ is at least that"
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
    fresh = "the adapter adds nothing yet: B A is zero"
    not_finite = "it holds NaN or infinity"
    failed = "it could not be measured"


@dataclass(frozen=True)
class Finding:
    """What was found of one weight.

    Attributes:
        name: its parameter name.
        view: which matrix of the parameter: "q", "3" of a stack, "kernel"; "operator" for a
            convolution as it acts; "delta" for what an adapter adds, "merged" for the sum; "" if it
            has one.
        shape: (m, n), outputs and inputs; (g, m, n) of the kernel of a convolution in g groups,
            which acts as one block-diagonal matrix and is measured as that.
        dtype: in which it is stored, such as "bfloat16"; of codes as what, such as "int4".
        sigma_max: the largest singular value, the spectral norm.
        sigma_min: the smallest of the nu = min(m, n) singular values, of groups g nu.
        condition_number: sigma_max/sigma_min; inf if sigma_min is zero to working precision, nan
            if there is none.
        stable_rank: ||S||_F^2/sigma_max^2, between 1 and nu.
        rank: how many singular values exceed what rounding the entries to the dtype can move one
            by, u ||S||_F; every matrix that rounds to this one has at least that rank. If it
            is built from `parts`, that is rounding to float32. 0 if the grade is "bounded".
        penalty: r = sigma_max^2/2 - ||S||_F^2/(2 nu), in units of a squared singular value.
        exceedance: how often a random matrix of this shape, of independent Gaussian entries, has a
            larger condition number, 0 to 1; see `wellcond.linalg.gaussian.exceedance`. nan if there
            is no condition number, for vectors, for complex matrices, and for what is no stored
            matrix: groups of a convolution, a convolution as it acts, a head of attention; random
            ones of these follow other laws.
        random_stable_rank: the mean stable rank of random matrices of this shape; nan as above.
        random_condition_number: the median kappa of random matrices of this shape; nan as above.
        grade: "none", "estimated", "bounded", "computed" or "certified"; see `Grade`.
        status: "ok", or what is the matter; its value says it in words.
        detail: more of the status, such as the error.
        method: how the singular values were found.
        certificate: the enclosures, if they were asked for.
        singular_values: all of them, descending, where the method gives all; of a convolution as it
            acts at most 4096, at equal distances.
        entries: of the parameter, how many it stands for.
        inner: of a product of two factors, as of a head, over how many dimensions it goes, of which
            nu counts no more; 0 of others.
        gain: ||S||_F/sqrt(m), the root mean square of the entries times sqrt(n): by what factor the
            weight scales the root mean square of inputs that are independent; nan of what is no
            stored matrix.
        largest_entry: max |w|, of real and imaginary parts; float16 holds up to 65504. This and the
            next two are nan of what is no stored matrix, as a convolution as it acts.
        subnormal_share: of the entries, how many are subnormal in the dtype, or of what is built
            from `parts` in float32, 0 to 1: they have lost digits, and hardware may take them for
            zero.
        float16_zero_share: of the entries, how many are not zero and would be in float16, 0 to 1.
        zero_rows: which rows (outputs) are zero, from 0; of a kernel in groups over all of them.
        zero_columns: which columns (inputs) are zero likewise.
        equal_rows: two rows (outputs) that are equal and not zero; () if none are.
        dominant_entry: where one entry holds more than 99.9 % of ||S||_F^2, its indices; () if none
            does, and of a vector.
        stored: whether it is stored as it is measured, and not computed from parameters, so that a
            file of it could be repaired.
        parts: the names of the tensors of a file from which it is built, such as codes and scales;
            () if it is stored as one tensor.
        added_share: of a weight with what an adapter of rank r adds, which part of the sum of its r
            largest singular values comes from the adapter; nan of others. See
            `wellcond.linalg.leading.added`.
        added_new: of so many of these singular values more than half comes from the adapter.
        added_of: how many they are, r or fewer; 0 of others.
        opposite_rows: whether it has two rows, and these are w and -w up to 5 %, as of a head of
            two classes.
        base_condition_number: of a weight with an adapter, kappa of the weight W without it. This
            and the next five stand for the rows of W and of the change, which are left out beside
            the sum; nan, 0 and "" of others.
        base_dtype: the dtype of W.
        delta_share: ||D||_F/||W||_F, D being the sum minus W.
        delta_stable_rank: ||D||_F^2/sigma_1(D)^2, how many directions D uses; nan if D is zero.
        delta_rank: how many directions the adapters can use: the sum of their ranks, at most nu.
        rounded_condition_number: kappa of the sum once it is rounded to `base_dtype`, as by a
            merge; nan if W is not stored as it is measured.
        gap: how many singular values lie below the widest gap in their lower half, and the ratio
            across it; (0, 1) if they are not known.
        repair_limit: the least power of ten that at most 1 in 20 random matrices of this shape
            exceed, if kappa exceeds it; else nan.
        repair_change: how far the nearest matrix within that limit is, over ||S||_F.
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
        if not self.entries:  # of a convolution as it acts there are fewer
            object.__setattr__(self, "entries", math.prod(self.shape))

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape))
        numbers = f"κ {self.condition_number:.4g}, σ {self.sigma_max:.4g} to {self.sigma_min:.4g}"
        if math.isnan(self.condition_number):
            numbers = self.explanation
        return f"<Finding {escape(self.label)}: {shape} {self.dtype}, {escape(numbers)}>"

    @property
    def label(self) -> str:
        """name:view, by which it is shown."""
        return f"{self.name}:{self.view}" if self.view else self.name

    @property
    def nu(self) -> int:
        """How many singular values there are, of a product how many need not be zero."""
        return self.inner or math.prod(self.shape[:-2]) * min(self.shape[-2:])

    @property
    def with_adapter(self) -> bool:
        """Whether it is a weight with what adapters add, which stands in no file."""
        return self.view == MERGED or self.view.endswith(f":{MERGED}")

    @property
    def measured(self) -> bool:
        return self.status in (Status.ok, Status.rank_deficient, Status.zero, Status.fresh)

    def exceeds(self, max_condition: float) -> bool:
        """Whether kappa is above; the certified upper bound if there is one.

        A kappa that is infinite, undefined or unknown is above every limit; one that is bounded
        from below alone is above those below that. An adapter that adds nothing is above none.
        """
        if self.status is Status.fresh:
            return False
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
    """What the findings stand for.

    Attributes:
        measured: how many matrices have numbers.
        failed: how many could not be measured; each has a finding that says why.
        skipped: everything else by name, and why.
        parameter_share: entries of the measured matrices over those of all parameters, 0 to 1.
        largest_left_out: the names and the entries of the largest parameters that were skipped, at
            most three.
        note: what is to be known of all findings; "" if nothing.
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
        text = f"{self.measured} of {matrices} matrices, {100 * self.parameter_share:.1f} % of "
        text += "the parameters"
        if self.failed:
            text += f"; {self.failed} could not be measured"
        if left_out:
            named = list_some((f"{name} ({why})" for name, why in left_out.items()), limit=3)
            text += f"; {len(left_out)} skipped: {named}"
        reasons = [why.reason for why in self.skipped.values() if why.reason.no_matrix]
        if reasons:
            counted = (f"{n} ({reason.name})" for reason, n in Counter(reasons).items())
            text += f"; no matrices: {', '.join(counted)}"
        return join_remarks(text, self.note)


def sort_key(finding: Finding) -> tuple[bool, bool, float]:
    """Failed ones first, then undefined ones, then by descending kappa; fresh adapters last."""
    if finding.status is Status.fresh:
        return True, True, 0.0
    kappa = finding.condition_number
    return finding.measured, not math.isnan(kappa), -kappa
