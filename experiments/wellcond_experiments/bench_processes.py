"""Time and memory of an audit of a large checkpoint by one process and by several.

As a program it runs `wellcond`, and keeps noting the peak memory of its process in a file:
`python -m wellcond_experiments.bench_processes FILE audit ...`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from wellcond import cli
from wellcond_experiments.bench_file import UNITS, WIDTH, peak_bytes, write_checkpoint
from wellcond_experiments.benchmark import Benchmark, count, option
from wellcond_experiments.command import Advance

_PAUSE = 0.2  # seconds between two notes


@dataclass(frozen=True)
class Processes(Benchmark):
    name = "processes"
    help = "time and memory of an audit of a large checkpoint by several processes"
    description = (
        "Writes a checkpoint in bfloat16 with the shapes of a model of 8 billion parameters, and "
        "audits some of its layers by one process and by several, each with as many threads: "
        "seconds, and the peak memory of each process. The reports must be the same."
    )
    example = "--layers 42 --measured 8 --threads 1"
    columns: ClassVar = {
        "processes": ("processes", "d"),
        "gigabytes": ("GB", ".2f"),
        "seconds": ("seconds", ".0f"),
        "peak_bytes": ("peak of each, bytes", ","),
        "peak": ("largest peak / largest weight in float32", ".2f"),
        "same": ("same report as one", ""),
    }
    threads: ClassVar = 1

    layers: int = count(42, "layers that are written: 0.44 GB each, and 2.1 GB of embeddings")
    measured: int = count(8, "layers that are measured")
    processes: str = option("1,2", "numbers of processes, of which the first is compared with")
    shrink: int = count(1, "divides all sizes, for a try")
    folder: str = option(None, "where to write the checkpoint; a temporary folder by default")

    @property
    def total(self) -> int:
        return 1 + len(self.processes.split(","))

    def measure(self, advance: Advance) -> dict[str, Any]:
        runs: list[dict[str, Any]] = []
        failures: list[str] = []
        threads = torch.get_num_threads()
        largest = 4 * WIDTH * UNITS // self.shrink**2
        with tempfile.TemporaryDirectory(dir=self.folder) as made:
            folder, reports = Path(made, "model"), []
            write_checkpoint(folder, False, self.layers, self.shrink)
            advance("written")
            size = sum(path.stat().st_size for path in folder.iterdir())
            for number in map(int, self.processes.split(",")):
                measured = min(self.measured, self.layers)
                seconds, peaks, report = audit(folder, measured, number, threads)
                reports.append(report)
                same = report == reports[0]
                if not same:
                    failures.append(f"{number} processes report something else than the first")
                runs.append(
                    {"processes": number, "gigabytes": size / 1e9, "seconds": seconds}
                    | {"peak_bytes": peaks, "peak": max(peaks) / largest, "same": str(same)}
                )
                advance(f"{number} processes")
        settings = {"layers": self.layers, "measured": self.measured, "threads": threads}
        return {"settings": settings, "runs": runs, "failures": failures}

    def title(self, document: dict[str, Any]) -> str:
        return (
            f"Audit of {self.measured} of {self.layers} layers with the shapes of an 8B model, "
            f"{document['settings']['threads']} thread(s) per process"
        )


def audit(folder: Path, layers: int, number: int, threads: int) -> tuple[float, list[int], str]:
    """Seconds, peak bytes of each process, and the report as JSON."""
    notes = folder.with_name(f"peak-of-{number}")
    torchrun = (
        ["-m", "torch.distributed.run", "--nproc-per-node", str(number)] if number > 1 else []
    )
    names = [f"--include=model.layers.{layer}.*" for layer in range(layers)]
    command = [*torchrun, "-m", __name__, str(notes), "audit", str(folder), *names, "--json"]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{number} processes failed: {done.stderr}")
    peaks = [int(Path(f"{notes}.{rank}").read_text()) for rank in range(number)]
    return seconds, peaks, done.stdout


def _note(path: Path) -> None:
    """Writes the peak so far, again and again: the process may end at any time."""
    unfinished = path.with_name(f"{path.name}.new")
    while True:
        unfinished.write_text(str(peak_bytes()))
        unfinished.replace(path)
        time.sleep(_PAUSE)


if __name__ == "__main__":
    noted = Path(f"{sys.argv[1]}.{os.environ.get('RANK', '0')}")
    threading.Thread(target=_note, args=(noted,), daemon=True).start()
    sys.exit(cli.main(sys.argv[2:]))
