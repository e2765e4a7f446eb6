"""Evaluates results: means with intervals, paired differences, verdicts, and tables of the pages.

A block of a page is enclosed by `<!-- NAME: TABLE -->` and `<!-- end -->`. It contains only the
table TABLE made from the results of NAME.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas

from wellcond_experiments import figures
from wellcond_experiments.command import write_text
from wellcond_experiments.methods import METHODS, find_method
from wellcond_experiments.tables import Band, Table, interval

BEGIN = re.compile(r"<!-- ([\w-]+): ([\w-]+) -->\n")
BLOCK = re.compile(rf"({BEGIN.pattern}).*?(<!-- end -->)", re.DOTALL)


class Column(NamedTuple):
    """A metric, its column title, and whether it is averaged geometrically."""

    metric: str
    title: str
    log: bool = False


class Verdict(NamedTuple):
    """The method of wellcond that the search chose, compared with the best other method.

    It wins if its interval is above the interval of every other method, and loses if its interval
    is below the interval of one of them. If lower is better, the reverse holds.
    """

    ours: str
    our_band: Band
    rival: str
    rival_band: Band
    difference: Band  # ours minus the rival, paired by seed, in the units of the metric
    wins: bool
    loses: bool
    lower: bool = False  # whether lower is better

    @property
    def gain(self) -> Band:
        """The difference in per cent of the rival's value, positive if ours is better."""
        sign = -1.0 if self.lower else 1.0
        return self.difference.scale(100 * sign / (abs(self.rival_band.mean) or math.nan))

    @property
    def better(self) -> str:
        """Which is better; "not significant" if ours neither wins nor loses."""
        return "wellcond" if self.wins else "other" if self.loses else "not significant"


class Evidence:
    """The results of an experiment, from a document that `grid.read` returns.

    `runs` is a pandas table with one row per reported run: case, method, strength, lr, seed,
    seconds, cpu_seconds, the metrics, and the curves as lists.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        rows = [
            {key: value for key, value in run.items() if key not in ("metrics", "curves")}
            | run["metrics"]
            | run["curves"]
            for run in document["runs"]
            if not run["search"]
        ]
        self.runs: Any = pandas.DataFrame(rows)
        self.chosen: list[dict[str, Any]] = document["chosen"]

    def where(self, **fields: Any) -> Any:
        """Returns the runs with these values, sorted by seed."""
        runs = self.runs
        for name, value in fields.items():
            runs = runs[runs[name] == value]
        return runs.sort_values("seed", kind="stable")

    def methods(self, **fields: Any) -> list[str]:
        """Returns the methods of these runs, in the order in which they were run."""
        return list(dict.fromkeys(self.where(**fields)["method"]))

    def band(self, metric: str, log: bool = False, **fields: Any) -> Band:
        """Returns the mean and the 95 % interval over the seeds of these runs."""
        band = interval([float(value) for value in self.where(**fields)[metric]], log)
        # Student's interval of few seeds can include values that no condition number has.
        return band._replace(low=max(1.0, band.low)) if band.low < 1 and "kappa" in metric else band

    def difference(self, metric: str, one: dict[str, Any], other: dict[str, Any]) -> Band:
        """Returns the mean and the 95 % interval of one minus other, paired by seed."""
        pairs = self.where(**one).merge(self.where(**other), on="seed", suffixes=("", "_other"))
        return interval([float(v) for v in pairs[metric] - pairs[f"{metric}_other"]])

    def choice(self, contest: str, method: str) -> dict[str, Any] | None:
        """Returns the entry that the search chose, or None if the method was not searched."""
        found = [c for c in self.chosen if (c["case"], c["method"]) == (contest, method)]
        return found[0] if found else None

    def ranking(
        self,
        title: str,
        columns: list[Column],
        contest: str = "",
        lower: bool = False,
        **fields: Any,
    ) -> Table:
        """Returns a table with one row per method, the best in the first column at the top.

        The best has the largest value, or with `lower` the smallest. Differences from the baseline
        are paired by seed.
        """
        first = columns[0].metric
        bands = {
            method: [self.band(c.metric, c.log, method=method, **fields) for c in columns]
            for method in self.methods(**fields)
        }
        rows = []
        order = sorted(bands, key=lambda method: -rank(bands[method][0], lower))
        for method, (score, *others) in ((method, bands[method]) for method in order):
            best = self.choice(contest, method)
            here, nothing = ({"method": name} | fields for name in (method, "none"))
            change = self.difference(first, here, nothing)
            rows.append(
                [
                    find_method(method).label,
                    f"{best['strength']:g}" if best and best["strength"] else "",
                    f"{best['lr']:g}" if best and best["lr"] else "",
                    score.fixed(),
                    change.signed() if method != "none" else "",
                    *(
                        self._infinite(column.metric, here) or band.fixed()
                        for column, band in zip(columns[1:], others, strict=True)
                    ),
                    best["edge"] if best else "",
                ]
            )
        header = ["method", "strength", "lr", columns[0].title, "vs. baseline"]
        header += [*(c.title for c in columns[1:]), "at grid edge"]
        return Table(title, header, rows)

    def _infinite(self, metric: str, fields: dict[str, Any]) -> str:
        """Counts the infinite values of a metric, as text, or ""."""
        values = [math.isinf(value) for value in self.where(**fields)[metric]]
        return f"inf in {sum(values)} of {len(values)}" if any(values) else ""

    def verdict(
        self,
        metric: str,
        contest: str = "",
        among: Sequence[str] = (),
        lower: bool = False,
        **fields: Any,
    ) -> Verdict:
        """Compares the chosen method of wellcond with all others, among these methods or all.

        Larger is better, or with `lower` smaller. The search maximises its score in both cases.
        """
        methods = [m for m in self.methods(**fields) if not among or m in among]
        ours = [m for m in methods if find_method(m).ours]
        scores = {m: (self.choice(contest, m) or {"score": -math.inf})["score"] for m in ours}
        champion = max(ours, key=lambda m: scores[m])
        bands = {m: self.band(metric, method=m, **fields) for m in methods}
        others = [m for m in methods if not find_method(m).ours]
        rival = max(others, key=lambda m: rank(bands[m], lower))
        one, other = ({"method": m} | fields for m in (champion, rival))
        high_is_better = {m: -band if lower else band for m, band in bands.items()}
        ends = high_is_better[champion][1:3]
        low, high = (end if end == end else rank(high_is_better[champion]) for end in ends)
        return Verdict(
            champion,
            bands[champion],
            rival,
            bands[rival],
            self.difference(metric, one, other),
            wins=all(
                low > high_is_better[m].high for m in others if rank(high_is_better[m]) > -math.inf
            ),
            loses=any(high < high_is_better[m].low for m in others),
            lower=lower,
        )


def rank(band: Band, lower: bool = False) -> float:
    """Returns a sort key that is largest for the best: the mean, with `lower` its negative.

    NaN ranks below every number.
    """
    return -math.inf if math.isnan(band.mean) else -band.mean if lower else band.mean


def list_methods(names: Sequence[str]) -> Table:
    """Lists methods with their labels, whether wellcond offers them, and their sources."""
    rows = [
        [METHODS[name].label, "wellcond" if METHODS[name].ours else "", METHODS[name].after]
        for name in names
    ]
    return Table("Methods of training", ["method", "offered by", "described by"], rows)


Compared = dict[tuple[str, str], Verdict]  # keys: name of the setting, and the comparison


def list_winners(verdicts: Compared) -> Table:
    """Returns a table with one row per verdict, which links to the page of its setting."""
    rows = [
        [
            f"[{compared}]({setting}.md)",
            v.better,
            v.difference.signed(),
            f"{find_method(v.ours).label}: {v.our_band.fixed()}",
            f"{find_method(v.rival).label}: {v.rival_band.fixed()}",
        ]
        for (setting, compared), v in verdicts.items()
    ]
    header = [
        "comparison",
        "better",
        "difference",
        "method of wellcond",
        "best other method",
    ]
    return Table("The chosen method of wellcond against the best other method", header, rows)


def draw_winners(verdicts: Compared) -> Any:
    """Draws the verdicts: blue where wellcond is better, orange where another method is.

    Differences are in per cent of the rival's value, because units differ. They are positive where
    wellcond is better.
    """
    colours = {"wellcond": figures.OURS, "other": figures.RIVAL}
    return figures.draw_differences(
        [
            (
                f"{compared}:\n{find_method(v.ours).label} against {find_method(v.rival).label}",
                colours.get(v.better, figures.NOTHING),
                v.gain,
            )
            for (_, compared), v in verdicts.items()
        ]
    )


def fill_text(text: str, name: str, tables: dict[str, Table]) -> str:
    """Returns a page with the blocks of this experiment replaced by the tables.

    Raises:
        ValueError: if a block names an unknown table, or if a block is not closed.
    """

    if not len(BEGIN.findall(text)) == text.count("<!-- end -->") == len(BLOCK.findall(text)):
        raise ValueError(
            "every block `<!-- NAME: TABLE -->` of a page must end with `<!-- end -->`."
        )

    def block(match: re.Match[str]) -> str:
        begin, experiment, table, end = match.groups()
        if experiment != name:
            return match[0]
        if table not in tables:
            raise ValueError(f"{name} has no table {table}. Its tables are {', '.join(tables)}.")
        return f"{begin}\n{tables[table].markdown()}\n{end}"

    return BLOCK.sub(block, text)


def fill_pages(pages: list[Path], name: str, tables: dict[str, Table]) -> list[Path]:
    """Fills the blocks of all pages and returns the pages that changed."""
    changed = []
    for page in pages:
        before = page.read_text(encoding="utf-8")
        after = fill_text(before, name, tables)
        if after != before:
            write_text(page, after)
            changed.append(page)
    return changed
