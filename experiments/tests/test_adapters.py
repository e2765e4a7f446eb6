"""Trained adapters: the statements in the documentation follow from the results."""

import importlib.util
import itertools
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from torch import nn

_PATH = Path(__file__).parents[1] / "adapters.py"
_SPEC = importlib.util.spec_from_file_location("adapters", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
adapters = importlib.util.module_from_spec(_SPEC)
sys.modules["adapters"] = adapters  # dataclasses need it there
_SPEC.loader.exec_module(adapters)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads(adapters.RESULTS.read_text())


def test_every_adapter_is_there_once(results: dict[str, Any]) -> None:
    keys = [tuple(row[:4]) for row in results["runs"]]
    grid = itertools.product(("text", "digits"), adapters.SEEDS, adapters.RANKS, adapters.RATES)
    assert sorted(keys) == sorted(grid)
    assert results["columns"] == list(adapters.COLUMNS)
    assert not {0, 1}.intersection(adapters.SEEDS)  # these seeds were used for all choices


def test_base_networks_had_learned_their_first_task(results: dict[str, Any]) -> None:
    for run in adapters.judge(results):
        assert run["first_before"] < 0.6 * run["constant"]
        assert run["first_before"] < run["before"]


def rows(*losses: float | None) -> dict[str, Any]:
    """Makes results of one seed and rank, with these losses at growing rates; 3 before."""
    columns = ["task", "seed", "rank", "rate", "constant", "before", "after", "added"]
    runs = [["text", 2, 8, 1e-3 * 2**i, 4.0, 3.0, loss, i / 10] for i, loss in enumerate(losses)]
    return {"columns": columns, "runs": runs}


def test_gains_are_relative_to_the_best() -> None:
    judged = adapters.judge(rows(2.5, 1.1, 1.0, 1.5, 2.1, 9.0, None))
    gains = [run["gain"] for run in judged]
    assert gains == pytest.approx([0.25, 0.95, 1, 0.75, 0.45, -3, -math.inf])
    verdicts = ["too small", "good", "good", "between", "harmed", "harmed", "harmed"]
    assert [run["verdict"] for run in judged] == verdicts


def test_a_constant_guess_gains_nothing() -> None:
    results = rows(1.0, 2.0)
    for run in results["runs"]:
        run[4], run[5] = 2.0, 7.0
    assert [run["gain"] for run in adapters.judge(results)] == [1, 0]


def test_pairs_are_counted() -> None:
    judged = adapters.judge(rows(1.1, 1.0, 2.9, 2.8))  # good at 0 and 0.1, harmed at 0.2 and 0.3
    assert adapters.share_above(judged, "added") == 1
    judged[0]["added"] = 0.25
    assert adapters.share_above(judged, "added") == 0.75
    judged[0]["rank"] = judged[2]["rank"] = 2
    assert adapters.share_above(judged, "added", ["rank"]) == 0.5


def test_rank_correlations_are_those_of_scipy() -> None:
    x, y = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).tolist()
    assert adapters.rank_correlation(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic)
    assert adapters.rank_correlation(x, [one**3 for one in x]) == pytest.approx(1)
    assert adapters.rank_correlation(x, [-math.exp(one) for one in x]) == pytest.approx(-1)


@pytest.fixture
def task() -> Any:
    x = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(1))

    def loss(x: torch.Tensor, model: nn.Module, source: Any = None) -> torch.Tensor:
        return (model(x) - x[:, :3].square()).square().mean()

    losses = [partial(loss, one) for one in x]
    return adapters.Task(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
        ["0", "2"],
        losses,
        losses,
        (5, 20),
        1e-2,
        1.0,
    )


def test_an_untrained_lora_adds_nothing_and_a_trained_one_changes_the_loss(
    task: Any,
) -> None:
    pytest.importorskip("peft")
    torch.manual_seed(0)
    base = task.make()
    before = adapters._validate(base, task)
    names = adapters.COLUMNS[-10:]
    none = dict(zip(names, adapters.tune(task, base, 2, 0.0, 0), strict=True))
    assert [none["first_after"], none["after"]] == pytest.approx(before)
    assert none["added"] == none["added_max"] == none["delta"] == none["delta_max"] == 0
    some = dict(zip(names, adapters.tune(task, base, 2, 3e-2, 0), strict=True))
    assert some["after"] < before[1]
    assert 0 < some["delta"] <= some["delta_max"]
    assert 1 <= some["directions"] <= some["directions_max"] <= 2
    assert adapters._validate(base, task) == before  # the network itself is unchanged


def test_the_page_has_the_numbers_of_the_results(results: dict[str, Any]) -> None:
    page = (adapters.ROOT / "docs" / "audit.md").read_text()
    assert adapters.make_table(results) in page
    text = " ".join(page.split())
    verdicts = [run["verdict"] for run in adapters.judge(results)]
    for verdict in ("good", "harmed"):
        assert f"{verdicts.count(verdict)} runs are {verdict}" in text
    assert f"{len(verdicts)} LoRAs" in text
    percent, facts = adapters.percent, adapters.find_facts(results)
    added, delta = facts["added"], facts["delta"]
    assert added["good"] > added["harmed"]  # so no threshold separates good from harmed
    assert f"good runs reach {percent(added['good'])} %" in text
    assert f"harmed ones begin at {percent(added['harmed'])} %" in text
    for one in (added, delta):
        shares = f"{percent(one['pairs'])} % of all pairs of a good and a harmed run"
        alike = f"{percent(one['pairs_alike'])} % of those of one task and rank"
        assert shares in text
        assert alike in text
        assert f"{one['correlation']:.2f}" in text
    assert f"at most {percent(delta['good'])} % in good runs" in text
    assert f"at least {percent(delta['harmed'])} % in harmed ones" in text
