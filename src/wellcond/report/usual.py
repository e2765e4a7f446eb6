"""Quantiles of a cohort of trained networks, by class of weight.

The class of a weight follows from its name and shape: the kind, and the aspect ratio of the longer
side to the shorter one. `usual.json` contains the quantiles of each class. The total weight of a
package in the quantiles grows as the square root of its number of matrices, so that no family of
checkpoints dominates. One third of the packages is held out as a test set. docs/cohort.md lists
the packages, and `experiments/cohort.py` computes the table.
"""

from __future__ import annotations

import bisect
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

QUANTITIES = ("condition_number", "stable_rank", "sigma_max", "gain")
ALL = "all"  # the class of all matrices, used if the class of a weight is too small
_ASPECTS = ((1.0, "square"), (1.5, "up to 1.5"), (3.0, "1.5 to 3"), (6.0, "3 to 6"))
_RECURRENT = re.compile(r"(?:^|[._])weight_[ih]h(?:_|$)|(?:^|[._])(?:gru|lstm|rnn)(?:[._]|$)", re.I)
_EMBEDDING = re.compile(r"embed|(?:^|[._])(?:w[tp]e|emb)(?:[._]|$)", re.I)


def classify(name: str, view: str, shape: Sequence[int]) -> str:
    """Returns the class of a weight, such as "convolution, 1.5 to 3".

    Args:
        name: the parameter name.
        view: the matrix within the parameter; "kernel" for a convolution.
        shape: (m, n), or (g, m, n) for a kernel in g groups.

    Returns:
        The kind ("linear", "convolution", "recurrent" or "embedding") and the aspect ratio: the
        longer of m and n over the shorter.

    Examples:
        >>> from wellcond.report.usual import classify
        >>> classify("layers.0.conv1.weight", "kernel", (64, 27))
        'convolution, 1.5 to 3'
    """
    if view.partition(":")[0] in ("kernel", "operator"):
        kind = "convolution"
    elif _RECURRENT.search(name):
        kind = "recurrent"
    else:
        kind = "embedding" if _EMBEDDING.search(name) else "linear"
    shorter, longer = sorted(shape[-2:])
    ratio = longer / shorter if shorter else math.inf
    aspect = next((words for limit, words in _ASPECTS if ratio <= limit), "above 6")
    return f"{kind}, {aspect}"


@dataclass(frozen=True)
class Usual:
    """The quantiles of a class of trained weights.

    The quantity "condition_number" is kappa over the median kappa of Gaussian matrices of the same
    shape, and "stable_rank" is the stable rank over their mean stable rank. "sigma_max" and "gain"
    are not normalised.

    Attributes:
        name: the name of the class; "all" if the class of the weight has fewer than 200 matrices.
        count: the number of its matrices in the cohort.
        packages: the number of packages that contain them.
        levels: the probabilities of the stored quantiles, from 0 (the smallest value) to 1.
        quantiles: the quantiles of each quantity, in ascending order.
    """

    name: str
    count: int
    packages: int
    levels: tuple[float, ...]
    quantiles: dict[str, tuple[float, ...]]

    def share_below(self, quantity: str, value: float) -> float:
        """Returns the share of the class with smaller values, 0 to 1; nan for nan.

        It interpolates between stored quantiles linearly in the logarithm of the value.
        """
        quantiles = self.quantiles[quantity]
        if math.isnan(value):
            return math.nan
        if value <= quantiles[0]:
            return 0.0
        if value >= quantiles[-1]:
            return 1.0
        after = bisect.bisect_right(quantiles, value)
        low, high = quantiles[after - 1], quantiles[after]
        part = math.log(value / low) / math.log(high / low)
        return self.levels[after - 1] + part * (self.levels[after] - self.levels[after - 1])

    def quantile(self, quantity: str, level: float) -> float:
        """Returns the quantile at a stored level.

        Raises:
            ValueError: the level is not stored.
        """
        if level not in self.levels:
            raise ValueError(f"`level` must be one of {self.levels}, got {level}.")
        return self.quantiles[quantity][self.levels.index(level)]


def usual_of(name: str, view: str, shape: Sequence[int]) -> Usual:
    """Returns the quantiles for a weight; those of all classes if its class is too small."""
    classes = _table()
    return classes.get(classify(name, view, shape), classes[ALL])


def _read() -> dict[str, Any]:
    text = resources.files("wellcond.report").joinpath("usual.json").read_text("utf-8")
    read: dict[str, Any] = json.loads(text)
    return read


@cache
def _table() -> dict[str, Usual]:
    table = _read()
    levels = tuple(table["levels"])
    return {
        name: Usual(
            name,
            one["count"],
            one["packages"],
            levels,
            {quantity: tuple(one[quantity]) for quantity in QUANTITIES},
        )
        for name, one in table["classes"].items()
    }


def _describe() -> str:
    pooled = _table()[ALL]
    return f"trained cohort: {pooled.count:,} matrices of {pooled.packages} packages"


COHORT = _describe()
