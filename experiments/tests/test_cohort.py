"""The cohort of trained weights: the committed table follows from the committed measurements."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_PATH = Path(__file__).parents[1] / "cohort.py"
_SPEC = importlib.util.spec_from_file_location("cohort", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
cohort = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(cohort)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads(cohort.RESULTS.read_text())


def test_the_table_follows_from_the_results(results: dict[str, Any]) -> None:
    table = cohort.make_table(cohort.matrices(results, held_out=False))
    assert json.loads(json.dumps(table)) == json.loads(cohort.TABLE.read_text())


def test_both_parts_have_squares_and_convolutions(results: dict[str, Any]) -> None:
    parts = [cohort.matrices(results, held_out=held_out) for held_out in (False, True)]
    packages = [{row["package"] for row in part} for part in parts]
    assert packages[0].isdisjoint(packages[1])
    assert len(packages[1]) >= sum(map(len, packages)) // 3
    for part in parts:
        assert len({row["class"] for row in part if "square" in row["class"]}) >= 2
        assert sum(row["class"].startswith("convolution") for row in part) >= 100


def test_the_arithmetic_agreed_with_numpy(results: dict[str, Any]) -> None:
    assert sum(bool(one["matrices"]) for one in results["packages"]) >= 28
    assert max(one["largest_deviation"] for one in results["packages"]) < 1e-7


def test_quantiles_of_one_package_are_those_of_numpy() -> None:
    numbers = np.exp(np.linspace(0, 1, 1001))
    found = cohort.quantiles(np.random.default_rng(0).permutation(numbers), ["a"] * 1001)
    np.testing.assert_allclose(found, np.quantile(numbers, cohort.LEVELS), rtol=1e-3)


def test_a_large_package_does_not_dominate() -> None:
    numbers = np.array([1.0] * 10_000 + [10.0] * 100)
    packages = ["a"] * 10_000 + ["b"] * 100
    at = {power: cohort.quantiles(numbers, packages, power) for power in (0.0, 0.5, 1.0)}
    level = cohort.LEVELS.index(0.95)
    assert [at[power][level] for power in at] == pytest.approx([10, 10, 1])


def test_faults_change_the_weight() -> None:
    import torch

    for name, change in cohort.FAULTS.items():
        W = torch.randn(8, 4, 3)
        before = W.clone()
        change(W)
        assert not W.equal(before), name
        if name == "rank one":
            assert torch.linalg.matrix_rank(W.flatten(1)) == 1


def test_the_page_has_the_numbers_of_the_results(results: dict[str, Any]) -> None:
    page = " ".join((cohort.ROOT / "docs" / "cohort.md").read_text().split())
    checked = json.loads(cohort.CHECKED.read_text())
    flags, faults = checked["flags"], checked["faults"]
    assert f"{flags['flagged']} of {flags['matrices']}, " in page
    assert f"{100 * flags['flagged'] / flags['matrices']:.1f} %" in page
    for name, one in faults.items():
        assert f"| {name} | {one['flagged']} of {one['planted']} |" in page
    assert not any(checked["fresh"].values())
    for one in results["packages"]:
        if one["matrices"]:
            assert f"{one['package']} {one['version']} ({len(one['matrices'])})" in page
    for name, one in json.loads(cohort.TABLE.read_text())["classes"].items():
        assert f"| {name} | {one['count']:,} | {one['packages']} |" in page
