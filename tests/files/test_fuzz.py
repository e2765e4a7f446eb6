"""Damaged files and attacks give an answer or one line, in bounded time and memory.

A separate process reads them, and is killed if a file exceeds the limits; see `fuzz.py`.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from attacks import attacks
from corpus import READ_ONLY
from recipe_attacks import recipe_attacks

WORKER = Path(__file__).with_name("fuzz.py")
Rows = dict[str, dict[str, Any]]


def served(folder: Path, first: int, last: int) -> tuple[Rows, str]:
    """Returns the outcome for each file, and what stopped the process, or ""."""
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder), str(first), str(last)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    rows = {line["label"]: line for line in lines if "codes" in line}
    stopped = [line["label"] for line in lines if line["label"] not in rows]
    return rows, "" if done.returncode == 0 else f"{stopped}: {done.stderr}"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    rows, stopped = served(tmp_path_factory.mktemp("fuzz"), 0, 40)
    assert not stopped
    return rows


def test_valid_files_of_every_format_are_read(rows: Rows) -> None:
    codes = {label: row["codes"] for label, row in rows.items() if row["part"] == "whole"}
    # `left` and `right` cannot be repaired separately; other formats are not copied.
    kept = ("pt views", "legacy views", *READ_ONLY)
    plain = {label: code for label, code in codes.items() if len(code) == 2}
    assert len(plain) >= 30
    assert plain == {kind: "02" if kind.startswith(kept) else "00" for kind in plain}
    # For weights that recipes build: an audit, a repair, heads, a plain copy.
    built = {label: code for label, code in codes.items() if len(code) == 4}
    assert len(built) >= 45
    assert {code[0] for code in built.values()} == {"0"}
    # Weights split over files, and a weight that the format of the copy cannot store.
    whole = {label for label, code in built.items() if code[3] == "0"}
    split = {label for label in built if "slices" in label or "distributed" in label}
    assert built.keys() - whole <= split | {"torchao, older"}


def test_attacks_are_answered(rows: Rows) -> None:
    made = attacks() | recipe_attacks()
    expected = {label: (codes, "") for label, (codes, _) in made.items()}
    assert {label: (rows[label]["codes"], rows[label]["wrong"]) for label in expected} == expected


def test_damaged_files_are_answered(rows: Rows) -> None:
    wrong = {label: row["wrong"] for label, row in rows.items() if row["wrong"]}
    assert not wrong
    # Most damage is detected, but not that of values of weights.
    codes = Counter(row["codes"][:2] for row in rows.values() if row["part"] == "damaged")
    assert codes["22"] > codes["00"] > 2


@pytest.mark.slow
@pytest.mark.parametrize(("first", "last"), [(40, 200), (1000, 1200), (2000, 2200)])
def test_many_damaged_files_are_answered(tmp_path: Path, first: int, last: int) -> None:
    rows, stopped = served(tmp_path, first, last)
    assert not stopped
    assert not {label: row["wrong"] for label, row in rows.items() if row["wrong"]}
