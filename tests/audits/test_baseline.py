"""A gate for the models of a repository: κ, σ_max and stable rank remain near the baseline."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wellcond.audits.baseline import GATED, Baseline, Rise, compare_with_baseline, ratio
from wellcond.cli import main
from wellcond.report import AuditReport, Coverage, Finding


def model(path: Path, *kappas: float, first: int = 0) -> Path:
    matrices = {
        f"layers.{number}.weight": torch.diag(torch.tensor([kappa, 1.0], dtype=torch.float64))
        for number, kappa in enumerate(kappas, first)
    }
    torch.save(matrices, path)
    return path


@pytest.fixture
def baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["audit", str(model(tmp_path / "old.pt", 10, 20)), "--json"]) == 0
    path = tmp_path / "baseline.json"
    path.write_text(capsys.readouterr().out)
    return path


@pytest.mark.parametrize(
    ("kappas", "options", "code", "said"),
    [
        ((10, 20), [], 0, ""),
        ((19, 1), [], 0, ""),
        (
            (21, 20),
            [],
            1,
            "1 weight got worse by more than a factor of 2 (20 for κ of square weights): "
            "layers.0.weight (σ_max 10 to 21)",
        ),
        (
            (14, 20),
            ["--max-rise", "1.3"],
            1,
            "a factor of 1.3 (13 for κ of square weights): layers.0.weight (σ_max 10 to 14)",
        ),
        (
            (21, 61),
            [],
            1,
            "2 weights got worse by more than a factor of 2 (20 for κ of square weights): "
            "layers.1.weight (σ_max 20 to 61), l",
        ),
        ((math.inf, 20), [], 1, "layers.0.weight (κ 10 to nan)"),
        ((1e300, 20), [], 1, "layers.0.weight (κ 10 to inf)"),
        ((10, 20, 5), [], 0, "new.pt: 1 weight not in the baseline: layers.2.weight"),
        ((10,), [], 1, "new.pt: 1 weight of the baseline missing: layers.1.weight"),
    ],
)
def test_rise_gives_exit_code_1(
    kappas: tuple[float, ...],
    options: list[str],
    code: int,
    said: str,
    baseline: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    new = model(baseline.with_name("new.pt"), *kappas)
    assert main(["audit", str(new), "--baseline", str(baseline), *options]) == code
    err = capsys.readouterr().err
    assert said in err
    assert bool(said) == bool(err)


def test_json_contains_the_comparison_with_the_baseline(
    baseline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = model(baseline.with_name("new.pt"), 50, 20, first=1)
    assert main(["audit", str(new), "--baseline", str(baseline), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["max_rise"] == 2
    assert document["baseline"] == {
        "risen": [
            {"label": "layers.1.weight", "quantity": "sigma_max", "before": 20.0, "after": 50.0}
        ],
        "missing": ["layers.0.weight"],
        "new": ["layers.2.weight"],
    }


@given(st.floats(), st.floats(min_value=1, allow_infinity=False))
def test_nonfinite_baseline_cannot_rise(after: float, before: float) -> None:
    for key in GATED:
        for none in (math.inf, math.nan, 0.0):
            assert ratio(Rise("", key, none, after)) == 1
        assert ratio(Rise("", key, before, math.nan)) == math.inf
        assert ratio(Rise("", key, before, before)) == 1
    assert ratio(Rise("", "sigma_max", before, math.inf)) == math.inf


def held(
    before: dict[str, Any], after: dict[str, Any], shape: tuple[int, int], times: float = 2.0
) -> list[Rise]:
    """The rises of one weight, of which only these numbers change."""
    whole = {"condition_number": 10.0, "sigma_max": 1.0, "stable_rank": 4.0}
    finding = Finding("a", "", shape, "float32", **whole | after)
    report = AuditReport([finding], Coverage(1, 0, {}, 1.0), "Net", {})
    return compare_with_baseline(report, Baseline({"a": before}), times).risen


@pytest.mark.parametrize(
    ("shape", "before", "after", "risen"),
    [
        ((8, 8), {"condition_number": 10.0}, {"condition_number": 199.0}, False),
        ((8, 8), {"condition_number": 10.0}, {"condition_number": 201.0}, True),
        ((12, 10), {"condition_number": 10.0}, {"condition_number": 199.0}, False),
        ((8, 16), {"condition_number": 10.0}, {"condition_number": 19.9}, False),
        ((8, 16), {"condition_number": 10.0}, {"condition_number": 20.1}, True),
        ((8, 8), {"sigma_max": 1.0}, {"sigma_max": 1.99}, False),
        ((8, 8), {"sigma_max": 1.0}, {"sigma_max": 2.01}, True),
        ((8, 8), {"sigma_max": 1.0}, {"sigma_max": 0.01}, False),
        ((8, 8), {"stable_rank": 4.0}, {"stable_rank": 2.01}, False),
        ((8, 8), {"stable_rank": 4.0}, {"stable_rank": 1.99}, True),
        ((8, 8), {"stable_rank": 4.0}, {"stable_rank": 400.0}, False),
        ((8, 8), {"stable_rank": 4.0}, {"stable_rank": math.nan}, True),
    ],
)
def test_limit_of_each_quantity(
    shape: tuple[int, int], before: dict[str, Any], after: dict[str, Any], risen: bool
) -> None:
    found = held(before, after, shape)
    assert [rise.quantity for rise in found] == [*before] * risen
    assert held(before, after, shape, times=math.inf) == []


def test_largest_excess_of_a_weight_is_named() -> None:
    before = {"condition_number": 10.0, "sigma_max": 1.0, "stable_rank": 8.0}
    after = {"condition_number": 300.0, "sigma_max": 20.0, "stable_rank": 1.5}
    assert held(before, after, (8, 8)) == [Rise("a", "sigma_max", 1.0, 20.0)]
    assert held(before, after, (8, 16)) == [Rise("a", "condition_number", 10.0, 300.0)]


def test_baseline_with_only_kappa(baseline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(baseline.read_text())
    for finding in document["findings"]:
        del finding["sigma_max"], finding["stable_rank"]
    baseline.write_text(json.dumps(document))
    new = model(baseline.with_name("new.pt"), 100, 20)
    assert main(["audit", str(new), "--baseline", str(baseline)]) == 0
    new = model(baseline.with_name("new.pt"), 201, 20)
    assert main(["audit", str(new), "--baseline", str(baseline)]) == 1
    assert "layers.0.weight (κ 10 to 201)" in capsys.readouterr().err


def test_invalid_baseline_gives_exit_code_2(
    baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = model(tmp_path / "new.pt", 10, 20)
    for content in ("", "[]", "{}", '{"findings": 3}', '{"findings": [{"name": "a"}]}', "[" * 9999):
        other = tmp_path / "other.json"
        other.write_text(content)
        assert main(["audit", str(new), "--baseline", str(other)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "--baseline must be an output of `wellcond audit PATH --json`" in err
    assert main(["audit", str(new), str(new), "--json"]) == 0
    other.write_text(capsys.readouterr().out)
    assert main(["audit", str(new), "--baseline", str(other)]) == 2
    assert "other.json contains 2. Create one baseline per checkpoint." in capsys.readouterr().err
    assert main(["audit", str(new), "--baseline", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    far = model(tmp_path / "far.pt", 3, first=7)
    assert main(["audit", str(far), "--baseline", str(baseline)]) == 2
    assert "--baseline must contain weights of" in capsys.readouterr().err
    both = ["--baseline", str(baseline), "--compare", str(far)]
    assert main(["audit", str(new), *both]) == 2
    assert "cannot be combined" in capsys.readouterr().err
    assert main(["audit", str(new), "--max-rise", "3"]) == 2
    assert "--max-rise requires --baseline" in capsys.readouterr().err


@pytest.mark.parametrize("kappa", [0, -0.0, -3, 0.999, "-inf", 1e-300])
def test_condition_number_below_one_is_refused(
    baseline: Path, kappa: float, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = {"name": "layers.0.weight", "view": "", "condition_number": kappa}
    other = baseline.with_name("other.json")
    other.write_text(json.dumps({"findings": [finding]}))
    new = model(baseline.with_name("new.pt"), 10, 20)
    assert main(["audit", str(new), "--baseline", str(other)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"which are at least 1, but {other} contains {float(kappa):g} for layers.0.weight" in err


@pytest.mark.parametrize("kappa", [1, 1.0, "inf", "nan", 1e300])
def test_every_valid_condition_number_is_accepted(baseline: Path, kappa: float) -> None:
    findings = [
        {"name": f"layers.{n}.weight", "view": "", "condition_number": k}
        for n, k in enumerate((kappa, 20))
    ]
    other = baseline.with_name("other.json")
    other.write_text(json.dumps({"findings": findings}))
    new = model(baseline.with_name("new.pt"), 1, 20)
    assert main(["audit", str(new), "--baseline", str(other)]) == 0


def test_baseline_with_other_name_prefixes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    stacked = {"mlp.experts.gate_up_proj": torch.cat([experts, 2 * experts], dim=1)}
    stacked["mlp.experts.down_proj"] = experts
    torch.save(stacked, tmp_path / "stacked.pt")
    each = {}
    for i, expert in enumerate(experts):
        names = (("gate_proj", expert), ("up_proj", 2 * expert), ("down_proj", expert))
        each |= {f"module.mlp.experts.{i}.{name}.weight": one.clone() for name, one in names}
    torch.save(each, tmp_path / "each.pt")
    assert main(["audit", str(tmp_path / "stacked.pt"), "--json"]) == 0
    (tmp_path / "baseline.json").write_text(capsys.readouterr().out)
    options = ["--baseline", str(tmp_path / "baseline.json"), "--max-rise", "1.01"]
    assert main(["audit", str(tmp_path / "each.pt"), *options]) == 0
    each["module.mlp.experts.1.up_proj.weight"][:, 0] *= 1e-4
    torch.save(each, tmp_path / "each.pt")
    assert main(["audit", str(tmp_path / "each.pt"), *options]) == 1
    err = capsys.readouterr().err
    assert "1 weight got worse" in err
    assert "module.mlp.experts.1.up_proj.weight (κ" in err
