"""Time and memory of an audit of a large checkpoint with one process and with several.

`python -m wellcond_experiments.bench_processes FILE audit ...` runs `wellcond` and writes the peak
memory of its process to FILE, repeatedly.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from wellcond_experiments.bench_file import UNITS, WIDTH, peak_bytes, write_checkpoint
from wellcond_experiments.benchmark import Benchmark, count, option
from wellcond_experiments.command import Advance

_PAUSE = 0.2  # seconds between two writes


@dataclass(frozen=True)
class Processes(Benchmark):
    name = "processes"
    help = "time and memory of an audit of a large checkpoint with several processes"
    description = (
        "Writes a bfloat16 checkpoint with the shapes of a model of 8 billion parameters, and "
        "audits some of its layers with one process and with several, with the same number of "
        "threads per process. Reports the time and the peak memory of each process. The audit "
        "reports must be the same."
    )
    example = "--layers 42 --measured 8 --threads 1"
    columns: ClassVar = {
        "processes": ("processes", "d"),
        "gigabytes": ("GB", ".2f"),
        "seconds": ("seconds", ".0f"),
        "peak_bytes": ("peak of each, bytes", ","),
        "peak": ("largest peak / largest weight in float32", ".2f"),
        "same": ("same report as the first", ""),
    }
    threads: ClassVar = 1

    layers: int = count(42, "written layers: 0.44 GB each, plus 2.1 GB of embeddings")
    measured: int = count(8, "measured layers")
    processes: str = option("1,2", "numbers of processes; the first is the reference")
    shrink: int = count(1, "divides all sizes, for a quick test")
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
                    failures.append(f"the report of {number} processes differs from the first")
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
    """Audits; returns the seconds, the peak bytes of each process, and the report as JSON."""
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
    """Repeatedly writes the peak memory, because the process can end at any time."""
    unfinished = path.with_name(f"{path.name}.new")
    while True:
        unfinished.write_text(str(peak_bytes()))
        unfinished.replace(path)
        time.sleep(_PAUSE)


if __name__ == "__main__":
    noted = Path(f"{sys.argv[1]}.{os.environ.get('RANK', '0')}")
    threading.Thread(target=_note, args=(noted,), daemon=True).start()
    sys.argv[:2] = ["wellcond"]
    runpy.run_module("wellcond", run_name="__main__")
