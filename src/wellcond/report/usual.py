"""Where a weight stands among trained ones: quantiles of a cohort of trained networks, by class.

The class of a weight follows from its name and shape: kind and aspect ratio, the longer side over
the shorter one. `usual.json` has the quantiles of each class. Per package, the weights of the
matrices in it grow as the root of how many there are, so that no family of checkpoints outvotes the
others. A third of the packages is held out of the table, to test it. docs/cohort.md says which they
are, and `experiments/cohort.py` makes the table.
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
ALL = "all"  # the class of all matrices, for those whose own is too small
_ASPECTS = ((1.0, "square"), (1.5, "up to 1.5"), (3.0, "1.5 to 3"), (6.0, "3 to 6"))
_RECURRENT = re.compile(r"(?:^|[._])weight_[ih]h(?:_|$)|(?:^|[._])(?:gru|lstm|rnn)(?:[._]|$)", re.I)
_EMBEDDING = re.compile(r"embed|(?:^|[._])(?:w[tp]e|emb)(?:[._]|$)", re.I)


def classify(name: str, view: str, shape: Sequence[int]) -> str:
    """The class of a weight: "convolution, 1.5 to 3"; values play no part in it.

    Args:
        name: of the parameter.
        view: which matrix of it; "kernel" of a convolution.
        shape: (m, n), or (g, m, n) of a kernel in g groups.

    Returns:
        the kind ("linear", "convolution", "recurrent" or "embedding") and the aspect ratio: the
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
    """What is usual in a class of trained weights.

    The quantities: "condition_number" is kappa over the median kappa of Gaussian matrices of the
    same shape, "stable_rank" the stable rank over their mean one; "sigma_max" and "gain" are as
    they are.

    Attributes:
        name: of the class; "all" if its own has fewer than 200 matrices.
        count: how many matrices of the cohort it holds.
        packages: from how many packages they come.
        levels: the probabilities of the stored quantiles, from 0 (the least value) to 1.
        quantiles: those of each quantity, ascending.
    """

    name: str
    count: int
    packages: int
    levels: tuple[float, ...]
    quantiles: dict[str, tuple[float, ...]]

    def share_below(self, quantity: str, value: float) -> float:
        """Which share of the class has a smaller value, 0 to 1; nan of nan.

        Between stored quantiles, the level is linear in the logarithm of the value.
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
        """The value of which the share `level` of the class lies below; of stored levels only."""
        if level not in self.levels:
            raise ValueError(f"level must be one of {self.levels}, but is {level}")
        return self.quantiles[quantity][self.levels.index(level)]


def usual_of(name: str, view: str, shape: Sequence[int]) -> Usual:
    """What is usual in the class of a weight; in all classes if its own is too small."""
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
