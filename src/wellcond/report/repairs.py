"""The result of `repair` for every matrix of a file, as data and as a table."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from wellcond.report.not_finite import NotFinite, describe_not_finite, to_list
from wellcond.text import dump_json, format_table, list_some, save_text
from wellcond.weights.kernels import describe_groups
from wellcond.weights.reasons import Reason, Skipped


@dataclass(frozen=True)
class Repair:
    """The repair of one weight S, with the result X.

    Attributes:
        name: the parameter name.
        view: the matrix within the parameter; "" if the parameter is one matrix.
        shape: (m, n).
        dtype: the stored dtype.
        before: kappa before; inf for a rank-deficient weight.
        after: kappa of the written weight, measured in its dtype.
        relative_change: ||X - S||_F/||S||_F, 0 for a weight that was within the limit.
        margin: X is the nearest matrix with kappa <= K/(1 + margin), so that it remains within the
            limit after rounding.
        note: a note on the weight, or "".
    """

    name: str
    view: str
    shape: tuple[int, ...]
    dtype: str
    before: float
    after: float
    relative_change: float = 0.0
    margin: float = 0.0
    note: str = ""

    @property
    def label(self) -> str:
        """The displayed name, "name:view"."""
        return f"{self.name}:{self.view}" if self.view else self.name


@dataclass(frozen=True)
class RepairReport:
    """The result of `repair`: one entry per matrix, and the tensors that were copied unchanged.

    Attributes:
        repairs: every measured matrix, in the order of the file.
        skipped: all other tensors, copied byte for byte, with the reasons.
        max_condition: the limit.
        versions: the versions of wellcond, torch and Python.
        not_finite: the copied tensors with NaN or infinity, by name; see `AuditReport`.
        dequantised: the written dtypes, by name, of the weights that were stored as codes or with a
            mask and are written as one tensor.
    """

    repairs: list[Repair]
    skipped: dict[str, Skipped]
    max_condition: float
    versions: dict[str, str]
    not_finite: dict[str, NotFinite] = field(default_factory=dict)
    dequantised: dict[str, str] = field(default_factory=dict)

    @property
    def changed(self) -> list[Repair]:
        """The matrices that were changed."""
        return [repair for repair in self.repairs if repair.relative_change > 0]

    def table(self) -> str:
        """Returns the changed matrices as text, and the number of unchanged ones."""
        rows = [
            (
                repair.label,
                "x".join(map(str, repair.shape)),
                repair.dtype,
                f"{repair.before:.6g}",
                f"{repair.after:.6g}",
                f"{repair.relative_change:.3g}",
            )
            for repair in self.changed
        ]
        headers = ("weight", "shape", "dtype", "κ before", "κ after", "‖X − S‖/‖S‖")
        text = format_table(headers, rows) if rows else ""
        labels: dict[str, list[str]] = {}
        for repair in self.repairs:
            if repair.note:
                labels.setdefault(repair.note, []).append(repair.label)
        for note, noted in labels.items():
            text += f"{list_some(noted, 3)}: {note}\n"
        kernels = sum(repair.view == "kernel" for repair in self.changed)
        text += f"{describe_groups(kernels)}\n" if kernels else ""
        for dtype in dict.fromkeys(self.dequantised.values()):
            names = [name for name, other in self.dequantised.items() if other == dtype]
            text += f"{_count_weights(names)} written as plain {dtype}: {list_some(names, 3)}\n"
        if kept := describe_kept(self.skipped):
            text += f"{kept}\n"
        obeyed = len(self.repairs) - len(self.changed)
        others = self.skipped.keys() - self.dequantised.keys()
        copied = sum(self.skipped[name].reason is not Reason.kept for name in others)
        text += f"{len(self.changed)} of {len(self.repairs)} matrices changed, {obeyed} "
        text += f"unchanged; {copied} other tensors copied\n"
        return f"{text}{describe_not_finite(self.not_finite)}\n" if self.not_finite else text

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data; numbers can be inf or nan."""
        return {
            "schema": 1,
            "max_condition": self.max_condition,
            "repairs": [asdict(repair) for repair in self.repairs],
            "skipped": [{"name": n, "reason": str(why)} for n, why in self.skipped.items()],
            "not_finite": to_list(self.not_finite),
            "dequantised": [{"name": n, "dtype": dtype} for n, dtype in self.dequantised.items()],
            "versions": self.versions,
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Returns `to_dict` as strict JSON, and writes it to `path` if one is given.

        inf and nan become the strings "inf" and "nan".
        """
        return save_text(dump_json(self.to_dict()), path)

    def __str__(self) -> str:
        return self.table()


def describe_kept(skipped: Mapping[str, Skipped]) -> str:
    """Describes the weights that a repair cannot change, with the remedy; "" without any."""
    kept = {name: why.detail for name, why in skipped.items() if why.reason is Reason.kept}
    if not kept:
        return ""
    said = []
    for why in dict.fromkeys(kept.values()):
        names = [name for name, other in kept.items() if other == why]
        said.append(f"{list_some(names, 3)} ({why})")
    return (
        f"{_count_weights(kept)} left as stored: {'; '.join(said)}. With --dequantise "
        "(dequantise=True), the copy contains plain tensors within the limit instead"
    )


def _count_weights(names: Collection[str]) -> str:
    return f"{len(names)} weight{'' if len(names) == 1 else 's'}"
