"""Audits and repairs damaged files, and prints the outcome of each as a line of JSON.

    python tests/files/fuzz.py FOLDER 0 5000            # damage with these seeds
    python tests/files/fuzz.py FOLDER 1234 1235         # repeats one of them

For each file, the commands must give an answer or one line on standard error, within limits of time
and memory. `wrong` in the line of a file states what they did instead. A file that kills or hangs
the process has only the line that announces it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import math
import os
import resource
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attacks import attacks
from corpus import CANARY, Sample, corpus
from damage import mutated
from recipe_attacks import recipe_attacks
from recipe_samples import recipe_samples

from wellcond.cli import main

SECONDS = 40
# Limits beyond the memory after the valid files: resident memory, and address space.
RESIDENT, ADDRESSES = 200 << 20, 1 << 30


def run(argv: list[str]) -> tuple[int | None, str, str]:
    """Returns the exit code, or None after an exception; stderr or the traceback; and stdout."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: int | None = main(argv)
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        except BaseException:
            return None, traceback.format_exc(), ""
    return code, err.getvalue(), out.getvalue()


def wrong_with(path: Path, folder: Path, thorough: bool) -> tuple[str, str]:
    """Returns what the commands do wrong with a file and its kind, or "" and their exit codes.

    The commands are an audit and a repair, and if `thorough`, also an audit with heads and a plain
    copy.
    """
    alone = path.is_file() and path.suffix != ".json"
    fixed = folder / (f"fixed{path.suffix}" if alone else "fixed")
    plain = folder / ("plain.safetensors" if alone else "plain")
    commands = [["audit", str(path)], ["repair", str(path), str(fixed), "--max-condition", "3"]]
    if thorough:
        commands.append(["audit", str(path), "--heads"])
        limit = ["--max-condition", "inf", "--dequantise"]
        commands.append(["repair", str(path), str(plain), *limit])
    codes = []
    for argv in commands:
        code, err, out = run(argv)
        codes.append(str(code))
        if code not in (0, 1, 2):
            return err, "traceback"
        if code == 2 and (err.count("\n") != 1 or out or not err.startswith("wellcond: error: ")):
            return f"{argv[0]}: not one line: {err!r} {out!r}", "lines"
        if any(not (c.isprintable() or c == "\n") for c in out + err):
            return f"{argv[0]}: control characters in the output: {out + err!r}", "escapes"
        if argv[0] == "repair" and Path(argv[2]).exists() != (code == 0):
            return f"repair ended with {code}, and its output is {fixed.exists()}", "output"
    found: dict[Path, dict[str, Any]] = {}
    written = [copy for copy in (fixed, plain) if copy.exists()]
    for one in [path, *written] if thorough and codes[0] == "0" else written:
        code, err, out = run(["audit", str(one), "--json"])
        if code != 0:
            return f"the output cannot be read: {err}", "output"
        found[one] = {f"{row['name']}:{row['view']}": row for row in json.loads(out)["findings"]}
        for label, row in found[one].items():
            if why := unexplained(row):
                return f"{label}: {why}", "numbers"
    for copy in written if path in found else []:
        if {label: row["shape"] for label, row in found[copy].items()} != {
            label: row["shape"] for label, row in found[path].items()
        }:
            return f"{copy.name} has other weights: {[*found[path]]} {[*found[copy]]}", "output"
    for label, row in found.get(plain, {}).items() if path in found else ():
        if not same_up_to_rounding(row, found[path][label]):
            return f"{label} is another weight in the plain copy", "numbers"
    left = {entry.name for entry in folder.iterdir()} - {"sample", fixed.name, plain.name}
    if left:
        return f"left behind: {left}", "output"
    if Path(CANARY).exists():
        return "code was run", "code"
    return "", "".join(codes)


def same_up_to_rounding(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Returns whether two rows can belong to one weight, of which one is stored in 16 bits."""
    one, two = (float(one["sigma_max"]) for one in (row, other))
    known = all(1e-3 < size < 1e4 for size in (one, two))  # without loss of precision in float16
    return not known or math.isclose(one, two, rel_tol=0.02)


def unexplained(row: dict[str, Any]) -> str:
    """Returns how the numbers of a row contradict its status; "" if they do not."""
    numbers = {key: float(row[key]) for key in ("sigma_max", "sigma_min", "condition_number")}
    numbers |= {key: float(row[key]) for key in ("stable_rank", "rank")}
    if row["status"] == "ok":
        wrong = {key: one for key, one in numbers.items() if not math.isfinite(one) or one < 0}
        return f"{wrong} of {row['status']}" if wrong or numbers["condition_number"] < 1 else ""
    if row["status"] in ("failed", "not_finite"):
        known = {key: one for key, one in numbers.items() if one and not math.isnan(one)}
        return f"{known} of {row['status']}" if known or not (row["detail"] or row["dtype"]) else ""
    return ""


def peak() -> int:
    """Returns the peak resident memory in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def examined(sample: Sample, work: Path, thorough: bool) -> tuple[str, str]:
    """Acts as `wrong_with`, in an empty folder and within the time limit."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        return wrong_with(sample.write(work / "sample"), work, thorough)
    finally:
        faulthandler.cancel_dump_traceback_later()


def serve(folder: Path, seeds: range) -> None:
    """Processes valid files, attacks and damaged files, with a line before and after each."""
    built = recipe_samples()
    samples = corpus() | built
    kinds = list(samples)
    bound = sys.maxsize

    def one(part: str, label: str, make: Callable[[], Sample], thorough: bool = False) -> None:
        nonlocal bound
        print(json.dumps({"label": label}), flush=True)
        wrong, codes = examined(make(), folder / "work", thorough)
        if peak() > bound:
            wrong = wrong or f"took {(peak() - bound) >> 20} MB more than it may"
            bound = peak()
        row = {"part": part, "label": label, "codes": codes, "wrong": wrong}
        print(json.dumps(row), flush=True)

    for kind in kinds:
        one("whole", kind, partial(samples.__getitem__, kind), kind in built)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES,) * 2)
    bound = peak() + RESIDENT
    for label, (_, make) in attacks().items():
        one("attack", label, make)
    for label, (_, make) in recipe_attacks().items():
        one("attack", label, make, True)
    for seed in seeds:
        kind = kinds[seed % len(kinds)]
        one("damaged", f"{seed} {kind}", partial(mutated, samples[kind], seed), kind in built)


if __name__ == "__main__":
    faulthandler.enable()
    warnings.simplefilter("ignore")  # warnings of torch about itself
    torch.set_num_threads(1)
    os.chdir(sys.argv[1])
    serve(Path.cwd(), range(int(sys.argv[2]), int(sys.argv[3])))
