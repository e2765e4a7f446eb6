"""What results say: means with intervals, paired differences, and the blocks of the documentation.

A block of a page stands between `<!-- NAME: TABLE -->` and `<!-- end -->`, and holds what the
results of NAME say, and nothing else.
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
    """A metric, what stands above it, and whether it counts by factors."""

    metric: str
    title: str
    log: bool = False


class Verdict(NamedTuple):
    """The champion of wellcond's methods, by the search, against the best of all others.

    It wins if its interval lies above that of each of them, and loses if it lies below that of one;
    the other way round where lower is better.
    """

    ours: str
    our_band: Band
    rival: str
    rival_band: Band
    difference: Band  # ours minus the rival, seed by seed, as measured
    wins: bool
    loses: bool
    lower: bool = False  # is better

    @property
    def gain(self) -> Band:
        """The difference in per cent of what the rival reached, positive if ours is better."""
        sign = -1.0 if self.lower else 1.0
        return self.difference.scale(100 * sign / (abs(self.rival_band.mean) or math.nan))

    @property
    def better(self) -> str:
        """Which is better: "not significant" if the intervals do not tell."""
        return "wellcond" if self.wins else "other" if self.loses else "not significant"


class Evidence:
    """The results of an experiment, as `grid.read` returns them.

    `runs` is a table of pandas with a row for each run that is reported: case, method, strength,
    lr, seed, seconds, cpu_seconds, the metrics, and the curves as lists.
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
        """The rows with these values."""
        runs = self.runs
        for name, value in fields.items():
            runs = runs[runs[name] == value]
        return runs.sort_values("seed", kind="stable")

    def methods(self, **fields: Any) -> list[str]:
        """In the order in which they were run."""
        return list(dict.fromkeys(self.where(**fields)["method"]))

    def band(self, metric: str, log: bool = False, **fields: Any) -> Band:
        """Mean and 95 % interval over the seeds of these rows."""
        return interval([float(value) for value in self.where(**fields)[metric]], log)

    def difference(self, metric: str, one: dict[str, Any], other: dict[str, Any]) -> Band:
        """Mean and 95 % interval of one minus other, seed by seed."""
        pairs = self.where(**one).merge(self.where(**other), on="seed", suffixes=("", "_other"))
        return interval([float(v) for v in pairs[metric] - pairs[f"{metric}_other"]])

    def choice(self, contest: str, method: str) -> dict[str, Any] | None:
        """What the search chose, if it had a choice."""
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
        """A row per method, the best by the first column above; seed by seed against nothing.

        The best is the largest, or with `lower` the smallest.
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
        header = ["method", "strength", "lr", columns[0].title, "against nothing"]
        header += [*(c.title for c in columns[1:]), "at the end of the grid"]
        return Table(title, header, rows)

    def _infinite(self, metric: str, fields: dict[str, Any]) -> str:
        """How often it is infinite, as a condition number may be; "" if never."""
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
        """Wellcond's against the others, of these methods or of all.

        Larger is better, or with `lower` smaller; the search has maximised its score all the same.
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
    """By which the best has the largest: its mean, or with `lower` the negative one.

    What is no number is worse than all.
    """
    return -math.inf if math.isnan(band.mean) else -band.mean if lower else band.mean


def list_methods(names: Sequence[str]) -> Table:
    """What they are called, whose they are, and who described them."""
    rows = [
        [METHODS[name].label, "wellcond" if METHODS[name].ours else "", METHODS[name].after]
        for name in names
    ]
    return Table("Methods of training", ["method", "offered by", "after"], rows)


Compared = dict[tuple[str, str], Verdict]  # by the name of the setting, and by what was compared


def list_winners(verdicts: Compared) -> Table:
    """A row for each verdict, with a link to the page of its setting."""
    rows = [
        [
            f"[{compared}](evidence/{setting}.md)",
            v.better,
            v.difference.signed(),
            f"{find_method(v.ours).label}: {v.our_band.fixed()}",
            f"{find_method(v.rival).label}: {v.rival_band.fixed()}",
        ]
        for (setting, compared), v in verdicts.items()
    ]
    header = ["compared", "better", "difference", "of wellcond", "the best other"]
    return Table("Methods of wellcond, as chosen in the search, against all others", header, rows)


def draw_winners(verdicts: Compared) -> Any:
    """The same as a picture: blue where wellcond is better, orange where another is.

    Differences are in per cent of what the rival reached, because units differ, and positive where
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
    """A page with the blocks of this experiment as the tables say.

    Raises:
        ValueError: it asks for a table that there is not, or a block has no end.
    """

    if not len(BEGIN.findall(text)) == text.count("<!-- end -->") == len(BLOCK.findall(text)):
        raise ValueError("every block `<!-- NAME: TABLE -->` of a page must end by `<!-- end -->`.")

    def block(match: re.Match[str]) -> str:
        begin, experiment, table, end = match.groups()
        if experiment != name:
            return match[0]
        if table not in tables:
            raise ValueError(f"{name} has no table {table}, only {', '.join(tables)}.")
        return f"{begin}\n{tables[table].markdown()}\n{end}"

    return BLOCK.sub(block, text)


def fill_pages(pages: list[Path], name: str, tables: dict[str, Table]) -> list[Path]:
    """The pages that have changed."""
    changed = []
    for page in pages:
        before = page.read_text(encoding="utf-8")
        after = fill_text(before, name, tables)
        if after != before:
            write_text(page, after)
            changed.append(page)
    return changed
