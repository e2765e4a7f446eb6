"""Time and memory of a training step with every method."""

from __future__ import annotations

from typing import Any, ClassVar

from wellcond_experiments import figures
from wellcond_experiments.bench_step import Step
from wellcond_experiments.evidence import Evidence
from wellcond_experiments.grid import Cell, Measured, Setting
from wellcond_experiments.tables import Band, Table, interval, number

NETS = {
    "mlp": "784-2048-10, first layer",
    "transformer": "transformer of 24 blocks, all matrices",
}
COUNTED = {
    "temporary": "largest temporary",
    "state": "state",
    "operations": "operations",
    "synchronisations": "host synchronisations",
}


class Cost(Setting):
    name = "cost"
    help = "time and memory of a training step with every method"
    protocol = (
        "Time of a training step with every method, relative to the mean of two networks without "
        "a method; all take turns in one process. Networks: 784-2048-10, batch 32, and a "
        "transformer of 24 blocks, 512 tokens; fused Adam; random data. The seeds are "
        "repetitions. Memory is relative to the size of the weight. Operations and host "
        "synchronisations of a GPU are counted per step."
    )
    default_data = quick_data = ""
    cases = tuple(NETS)
    methods: ClassVar = {"all": (0.0,)}  # type: ignore[misc]
    workers = 1

    def __init__(self, data: str = "", quick: bool = False, seeds: int | None = None) -> None:
        super().__init__(data, quick, seeds)
        self.rounds = {"mlp": 1 if quick else 20, "transformer": 1 if quick else 4}
        self.blocks = 2 if quick else 24
        self.hidden = 64 if quick else 2048

    def settings(self) -> dict[str, Any]:
        sizes = {"rounds": self.rounds, "blocks": self.blocks, "hidden": self.hidden}
        return super().settings() | sizes

    def run(self, cell: Cell) -> Measured:
        """Measures the median over rounds of ten steps; every round has a random order."""
        rounds = self.rounds[cell.case]
        step = Step(model=cell.case, rounds=rounds, hidden=self.hidden, blocks=self.blocks)
        metrics: dict[str, float] = {}
        for row in step.measure(lambda label: None)["ways"]:
            name = row.pop("way")
            metrics |= {f"{name}: {key}": float(value) for key, value in row.items()}
        return Measured(metrics, {})

    def bands(self, evidence: Evidence, case: str) -> dict[str, Band]:
        """Returns the relative step time of each method, the cheapest first."""
        runs = evidence.where(case=case).dropna(axis="columns", how="all")
        names = [key.removesuffix(": ratio") for key in runs.columns if key.endswith(": ratio")]
        bands = {name: interval(list(runs[f"{name}: ratio"])) for name in names}
        return dict(sorted(bands.items(), key=lambda item: item[1].mean))

    def tables(self, evidence: Evidence) -> dict[str, Table]:
        return {case: self._table(evidence, case) for case in self.cases}

    def _table(self, evidence: Evidence, case: str) -> Table:
        """Returns the table of a network, with the counts that were measured for it."""
        runs = evidence.where(case=case).dropna(axis="columns", how="all")
        known = {key: title for key, title in COUNTED.items() if f"attach(every=10): {key}" in runs}
        rows = []
        for name, band in self.bands(evidence, case).items():
            counts = (f"{name}: {key}" for key in known)
            rows.append(
                [name, band.fixed()]
                + [number(float(runs[key].max())) if key in runs else "" for key in counts]
            )
        return Table(NETS[case], ["method", "relative step time", *known.values()], rows)

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        drawing, panels = figures.figure(columns=2, width=6.4, height=4.2)
        for panel, case in zip(panels, self.cases, strict=True):
            bands = self.bands(evidence, case)
            for height, (name, band) in enumerate(reversed(bands.items())):
                ours = name.startswith(("attach", "add_", "in the", "limit"))
                colour = figures.OURS if ours else figures.RIVAL
                colour = figures.NOTHING if name.startswith("none") else colour
                panel.barh([height], [band.mean], color=colour, height=0.7)
                panel.text(band.mean * 1.05, height, f"{band.mean:.2f}", va="center", fontsize=8)
            panel.set_yticks(range(len(bands)), list(reversed(bands)))
            panel.set(xscale="log", xlabel="step time, relative to the baseline", title=NETS[case])
            panel.set_xlim(0.7, 2 * max(band.mean for band in bands.values()))
            figures.use_logarithm(panel.xaxis)
            panel.grid(False, axis="y")
        return {"cost": drawing}
