"""Evaluation of results: intervals, paired differences, rankings, verdicts, blocks of pages."""

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from wellcond_experiments import evidence, figures, tables
from wellcond_experiments.evidence import Column, Evidence
from wellcond_experiments.methods import METHODS
from wellcond_experiments.tables import Table, interval


def document(scores: dict[str, list[float]], chosen: dict[str, float] | None = None) -> Any:
    """Makes results with one score per method and seed, and with the scores of the search."""
    runs = [
        {"case": "", "method": method, "strength": 1.0, "lr": 0.1, "seed": seed, "search": False}
        | {"metrics": {"accuracy": score, "kappa": 10**seed}, "curves": {"line": [score]}}
        for method, values in scores.items()
        for seed, score in enumerate(values)
    ]
    runs.append(runs[0] | {"search": True, "seed": 10_000, "metrics": {"accuracy": 1e9}})
    search = [
        {"case": "", "method": m, "strength": 1.0, "lr": 0.1, "score": score, "edge": "strength"}
        for m, score in (chosen or {}).items()
    ]
    return {"runs": runs[::-1], "chosen": search, "seeds": 3}


# --- intervals ------------------------------------------------------------------------------------


SCORES = st.integers(-(10**9), 10**9).map(lambda score: score / 1000)


@given(st.lists(SCORES, min_size=2, max_size=9).filter(lambda v: len(set(v)) > 1))
def test_interval_is_students_t(values: list[float]) -> None:
    band = interval(values)
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    slack = 1e-6 * max(map(abs, values))
    assert band.mean == pytest.approx(statistics.fmean(values), abs=slack)
    assert band.high - band.mean == pytest.approx(half, rel=1e-6, abs=slack)
    assert band.mean - band.low == pytest.approx(half, rel=1e-6, abs=slack)


def test_the_interval_of_equal_numbers_is_that_number() -> None:
    assert interval([100.0] * 5) == (100, 100, 100, False)


def test_interval_of_condition_numbers_is_geometric() -> None:
    # Its ends are the geometric mean times and divided by one factor, so both are positive.
    values = [20.0, 50.0, 8000.0]
    band = interval(values, log=True)
    logs = [math.log(value) for value in values]
    half = 4.302653 * statistics.stdev(logs) / math.sqrt(3)
    assert band.mean == pytest.approx(200)
    assert band.high == pytest.approx(200 * math.exp(half), rel=1e-6)
    assert band.low == pytest.approx(200 / math.exp(half), rel=1e-6)
    assert interval(values).low < 0
    assert interval([1e-300, 1e300], log=True).high == math.inf
    assert interval([0.0, 3.0], log=True).mean == 0


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[3.0], [1.0, math.inf], [1.0, math.nan]])
def test_no_interval_for_one_seed_or_infinite_values(values: list[float], log: bool) -> None:
    band = interval(values, log)
    assert math.isnan(band.low)
    assert math.isnan(band.high)
    assert band.mean == pytest.approx(sum(values) / len(values), nan_ok=True)


def test_bands_as_text() -> None:
    assert str(interval([1.0, 2.0])) == "1.5 ± 6.35"
    assert str(interval([10.0, 1e5], log=True)) == "1e+03 [3.87e-23, 2.58e+28]"
    assert str(interval([7.0])) == interval([7.0]).fixed(0) == "7"
    assert interval([1.0, 2.0]).fixed(1) == "1.5 ± 6.4"
    assert interval([1.0, 2.0]).signed(1) == "+1.5 ± 6.4"


def test_interval_of_a_condition_number_begins_at_one() -> None:
    found = Evidence(document({"none": [2.0, 200.0, 2.0]}))
    runs = found.runs.assign(kappa_worst=[2.0, 200.0, 2.0], loss=[2.0, 200.0, 2.0])
    found.runs = runs
    assert found.band("kappa_worst", log=True).low == 1
    assert found.band("loss", log=True).low < 1


def test_tables_escape_bars() -> None:
    table = Table("norms", ["way", "||S||"], [["a|b", "1"]])
    assert table.markdown() == "| way | \\|\\|S\\|\\| |\n| --- | --- |\n| a\\|b | 1 |\n"


# --- evidence -------------------------------------------------------------------------------------


def test_the_search_is_not_reported() -> None:
    found = Evidence(document({"none": [1.0, 2.0, 6.0]}))
    assert found.band("accuracy", method="none").mean == 3
    assert list(found.where(method="none")["seed"]) == [0, 1, 2]  # sorted, in any order of the file
    assert found.band("kappa", log=True, method="none").mean == pytest.approx(10)
    assert list(found.where(method="none")["line"]) == [[1.0], [2.0], [6.0]]


def test_differences_pair_the_seeds() -> None:
    # The seeds differ much more than the methods, so only paired differences are significant.
    found = Evidence(document({"none": [10.0, 50.0, 90.0], "l2": [11.0, 51.1, 91.2]}))
    assert found.band("accuracy", method="l2").low < found.band("accuracy", method="none").high
    change = found.difference("accuracy", {"method": "l2"}, {"method": "none"})
    assert change.mean == pytest.approx(1.1)
    assert change.low > 0.8


def test_ranking_starts_with_the_best() -> None:
    scores = {"none": [1.0, 2.0], "l2": [7.0, 8.0], "isometry": [5.0, 5.5]}
    found = Evidence(document(scores, {"l2": 3.0, "isometry": 4.0}))
    columns = [Column("accuracy", "%"), Column("kappa", "κ", log=True)]
    table = found.ranking("of all", columns)
    assert [row[0] for row in table.rows] == ["L2", "IsometryStep", "baseline"]
    assert [row[4] for row in table.rows] == ["+6.00 ± 0.00", "+3.75 ± 3.18", ""]
    assert [row[-1] for row in table.rows] == ["strength", "strength", ""]
    assert all(len(row) == len(table.header) for row in table.rows)


def test_verdict_compares_the_chosen_method_with_every_other() -> None:
    scores = {
        "none": [1.0, 1.1],
        "l2": [5.0, 5.1],
        "clipping": [1.0, 9.0],
        "isometry": [8.0, 8.1],
        "condition": [20.0, 20.1],
    }
    # IsometryStep is best in the search; that ConditionPenalty is better in the report is ignored.
    found = Evidence(document(scores, {"isometry": 4.0, "condition": 3.0, "l2": 9.0}))
    verdict = found.verdict("accuracy")
    assert (verdict.ours, verdict.rival) == ("isometry", "l2")
    assert verdict.difference.mean == pytest.approx(3)
    # The interval of clipping reaches up to 55, so clipping may be better.
    assert (verdict.wins, verdict.loses) == (False, False)
    scores["clipping"] = [1.0, 1.1]
    verdict = Evidence(document(scores, {"isometry": 4.0})).verdict("accuracy")
    assert (verdict.wins, verdict.loses) == (True, False)
    scores["l2"] = [11.0, 11.1]
    verdict = Evidence(document(scores, {"isometry": 4.0})).verdict("accuracy")
    assert (verdict.wins, verdict.loses) == (False, True)
    (panel,) = evidence.draw_winners({("paper", "accuracy, %"): verdict}).axes
    (label,) = panel.get_yticklabels()
    assert label.get_text() == "accuracy, %:\nIsometryStep against L2"
    spread, mean, zero = panel.lines
    assert (*spread.get_xdata(), *mean.get_xdata()) == (
        verdict.gain.low,
        verdict.gain.high,
        verdict.gain.mean,
    )
    assert verdict.gain.mean == pytest.approx(100 * -3 / 11.05)  # of the score of L2
    assert mean.get_color() == figures.RIVAL
    assert list(zero.get_xdata()) == [0, 0]
    table = evidence.list_winners({("paper", "accuracy, %"): verdict})
    assert table.rows == [
        [
            "[accuracy, %](paper.md)",
            "other",
            "-3.00 ± 0.00",
            "IsometryStep: 8.05 ± 0.64",
            "L2: 11.05 ± 0.64",
        ]
    ]
    # One significantly better method suffices, even if another has a better mean.
    scores |= {"l2": [1.0, 1.1], "clipping": [0.0, 40.0], "weight-decay": [11.0, 11.1]}
    verdict = Evidence(document(scores, {"isometry": 4.0})).verdict("accuracy")
    assert (verdict.rival, verdict.wins, verdict.loses) == ("clipping", False, True)


def test_nan_ranks_last() -> None:
    nan = math.nan
    scores = {"none": [nan, 1.0], "l2": [7.0, 7.1], "isometry": [9.0, 9.1], "condition": [1.0, nan]}
    found = Evidence(document(scores, {"isometry": 4.0}))
    verdict = found.verdict("accuracy")
    assert (verdict.rival, verdict.wins) == ("l2", True)
    verdict = Evidence(document(scores, {"condition": 4.0})).verdict("accuracy")
    assert (verdict.ours, verdict.wins, verdict.loses) == ("condition", False, True)
    table = found.ranking("", [Column("accuracy", "%")])
    assert [row[0] for row in table.rows[:2]] == ["IsometryStep", "L2"]


def test_lower_is_better_equals_higher_for_negated_scores() -> None:
    scores = {
        "none": [math.nan, 9.0],
        "l2": [5.0, 5.1],
        "clipping": [6.0, 6.1],
        "isometry": [3.0, 3.1],
        "condition": [1.0, 1.1],
    }
    negative = {method: [-score for score in values] for method, values in scores.items()}
    search = {"isometry": 4.0, "condition": 3.0}
    title, columns = "errors", [Column("accuracy", "%")]
    better = []
    for l2 in ([5.0, 5.1], [3.0, 3.2], [2.0, 2.01]):
        scores["l2"], negative["l2"] = l2, [-score for score in l2]
        lower, higher = (Evidence(document(values, search)) for values in (scores, negative))
        found = lower.verdict("accuracy", lower=True)
        expected = higher.verdict("accuracy")
        assert (found.ours, found.rival) == (expected.ours, expected.rival) == ("isometry", "l2")
        assert (found.wins, found.loses) == (expected.wins, expected.loses)
        better.append(found.better)
        assert found.difference == -expected.difference
        assert found.our_band == -expected.our_band
        # In the picture, better is always to the right.
        drawn, twin = (
            [
                list(line.get_xdata())
                for line in evidence.draw_winners({("", ""): one}).axes[0].lines
            ]
            for one in (found, expected)
        )
        assert drawn == twin
        rows, twins = (
            [row[0] for row in table.rows]
            for table in (
                lower.ranking(title, columns, lower=True),
                higher.ranking(title, columns),
            )
        )
        assert rows == twins
        assert rows[-1] == "baseline"  # whose score is nan
    assert better == ["wellcond", "not significant", "other"]
    assert rows[0] == "ConditionPenalty, attached"


def test_infinite_condition_numbers_are_counted() -> None:
    content = document({"none": [1.0, 2.0, 3.0]})
    content["runs"][1]["metrics"]["kappa"] = math.inf
    table = Evidence(content).ranking("", [Column("accuracy", "%"), Column("kappa", "κ", log=True)])
    assert table.rows[0][5] == "inf in 1 of 3"


def test_verdict_among_some_methods() -> None:
    scores = {"none-tuned": [1.0, 1.1], "l2": [7.0, 7.1], "condition-tuned": [5.0, 5.1]}
    verdict = Evidence(document(scores)).verdict(
        "accuracy", among=("none-tuned", "condition-tuned")
    )
    assert (verdict.ours, verdict.rival, verdict.wins) == ("condition-tuned", "none-tuned", True)


def test_methods_name_their_source() -> None:
    table = evidence.list_methods([*METHODS])
    assert {row[0] for row in table.rows if not row[2]} <= {
        *(
            "baseline",
            "L2",
            "LayerNorm and L2",
            "ConditionLimit",
            "torch orthogonal, hidden weights",
        ),
    }


# --- pages ----------------------------------------------------------------------------------------

PAGE = """# A page
<!-- one: numbers -->
| old |
<!-- end -->
between
<!-- other: numbers -->
kept
<!-- end -->
"""


def test_blocks_are_replaced_by_tables(tmp_path: Path) -> None:
    table = Table("", ["a"], [["1"]])
    page, quiet = tmp_path / "page.md", tmp_path / "quiet.md"
    page.write_text(PAGE)
    quiet.write_text("nothing here")
    assert evidence.fill_pages([page, quiet], "one", {"numbers": table}) == [page]
    new = page.read_text()
    assert new == PAGE.replace("| old |\n", "\n| a |\n| --- |\n| 1 |\n\n")
    assert evidence.fill_pages([page, quiet], "one", {"numbers": table}) == []
    with pytest.raises(ValueError, match="must end with"):
        evidence.fill_text(PAGE.replace("<!-- end -->", "", 1), "one", {"numbers": table})
    with pytest.raises(ValueError, match=r"one has no table numbers\. Its tables are more"):
        evidence.fill_text(PAGE, "one", {"more": table})


def test_numbers_have_three_digits() -> None:
    assert [tables.number(x) for x in (0.0, 1234.0, 0.00012345, 1e5, math.inf)] == [
        *("0", "1.23e+03", "1.23e-04", "1.00e+05", "inf"),
    ]
