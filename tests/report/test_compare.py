"""Comparisons of two audits: pairing of weights, movements, and weights on only one side."""

import copy
import csv
import html
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import wellcond as wc
from wellcond.report.comparison import shorten_sources
from wellcond.report.pairing import Names, pair_names

NAMES = ["a.weight", "b.0.weight", "b.1.weight", "b.1.weight:q"]


def model(*diagonals: list[float]) -> nn.Sequential:
    layers = []
    for entries in diagonals:
        layer = nn.Linear(len(entries), len(entries), bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.diag(torch.tensor(entries)))
        layers.append(layer)
    return nn.Sequential(*layers)


def audit(path: Path, weights: dict[str, Tensor]) -> wc.AuditReport:
    save_file(weights, path)
    return wc.audit(path)


def compared(before: wc.AuditReport, after: wc.AuditReport) -> dict[str, tuple[Any, Any, float]]:
    pairs = wc.compare(before, after).pairs
    return {pair.label: (pair.before, pair.after, pair.ratio) for pair in pairs}


# --- pairing of names -----------------------------------------------------------------------------


@given(
    st.sets(st.text("ab.:0", max_size=6)),
    st.sets(st.text("ab.:0", max_size=6)),
    st.sampled_from(["", "a.", "module.", "_orig_mod."]),
)
def test_pair_names_pairs_each_name_once(before: set[str], after: set[str], prefix: str) -> None:
    before = {prefix + name for name in before}
    paired = pair_names(sorted(before), sorted(after)).paired
    labels, old, new = (
        (list(column) for column in zip(*paired, strict=True)) if paired else ([],) * 3
    )
    assert len(set(labels)) == len(labels)
    assert len(set(old)) == len(old)
    assert len(set(new)) == len(new)
    assert set(old) <= before
    assert set(new) <= after
    equal = {name for name, a, b in paired if a == b}
    assert equal == before & after
    assert not set(labels) & ((before | after) - set(old) - set(new))  # no name for two weights
    back = pair_names(sorted(after), sorted(before)).paired
    assert sorted((label, b, a) for label, a, b in back) == sorted(paired)


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("module.", ""),
        ("_orig_mod.", ""),
        ("module._orig_mod.", ""),
        ("_orig_mod.module.", ""),
        ("model.", "model."),
        ("transformer.", "transformer."),
        ("module.model.", "model."),
        ("base_model.model.", "base_model.model."),
    ],
)
def test_pair_names_ignores_common_prefix(prefix: str, said: str) -> None:
    longer = [prefix + name for name in NAMES]
    expected = [(name, prefix + name, name) for name in NAMES]
    assert pair_names(longer, NAMES) == Names(expected, said, "before" if said else "")
    flipped = [(name, name, prefix + name) for name in NAMES]
    assert pair_names(NAMES, longer) == Names(flipped, said, "after" if said else "")


def test_pair_names_ignores_wrappers() -> None:
    old = ["module.b.0._orig_mod.weight", "module.a._checkpoint_wrapped_module.weight"]
    new = ["_orig_mod.a.weight", "b._fsdp_wrapped_module.0.weight"]
    assert pair_names(old, new).paired == [
        ("b.0.weight", old[0], new[1]),
        ("a.weight", old[1], new[0]),
    ]


def test_pair_names_with_many_extra_names() -> None:
    heads = [f"h.0.attn:qk{head}" for head in range(20)]
    names = pair_names([f"model.{name}" for name in NAMES], [*heads, *NAMES])
    assert [label for label, _, _ in names.paired] == NAMES


def test_pair_names_prefers_equal_names() -> None:
    old, new = ["model.a", "a", "model.b", "head"], ["a", "b", "head"]
    names = pair_names(old, new)
    assert set(names.paired) == {("a", "a", "a"), ("head", "head", "head"), ("b", "model.b", "b")}
    assert (names.prefix, names.side) == ("model.", "before")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["student.a", "student.b", "teacher.a", "teacher.b"], ["a", "b"]),  # ambiguous
        (["x.a", "b", "e"], ["a", "c", "d"]),  # one match of three is too few
        (["module.a", "_orig_mod.a"], ["a.b"]),
    ],
)
def test_pair_names_skips_ambiguous_prefixes(old: list[str], new: list[str]) -> None:
    assert pair_names(old, new) == Names([])
    assert pair_names(new, old) == Names([])


FORMS = [
    ("m.block_sparse_moe.experts.0.w1.weight", "m.mlp.experts.gate_up_proj:gate:0"),
    ("m.block_sparse_moe.experts.11.w2.weight", "m.mlp.experts.down_proj:11"),
    ("m.block_sparse_moe.gate.weight", "m.mlp.gate.weight"),
    ("m.mlp.experts.3.up_proj.weight", "m.mlp.experts.gate_up_proj:up:3"),
    ("feed_forward.experts.3.down_proj.weight", "feed_forward.experts.down_proj:3"),
    ("self_attn.k_proj.weight", "self_attn.qkv_proj.weight:k"),
    ("mlp.up_proj.weight", "mlp.gate_up_proj.weight:up"),
    ("module.experts.0.w3.weight", "experts.gate_up_proj:up:0"),  # within a wrapper
]


@pytest.mark.parametrize(("one", "other"), FORMS)
def test_separate_and_fused_names_are_paired(one: str, other: str) -> None:
    for before, after in ((one, other), (other, one)):
        ((_, old, new),) = pair_names([before, "x.weight"], [after, "y.weight"]).paired
        assert (old, new) == (before, after)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("experts.0.w1.weight", "experts.gate_up_proj:gate:1"),  # another expert
        ("experts.0.w1.weight", "experts.gate_up_proj:up:0"),  # w3 is up
        ("a.q_proj.weight", "b.qkv_proj.weight:q"),
        ("experts.w1.weight", "experts.gate_up_proj:gate:0"),
        ("experts.0.w1", "experts.gate_up_proj:gate:0"),
    ],
)
def test_names_of_different_parts_are_not_paired(one: str, other: str) -> None:
    assert pair_names([one], [other]).paired == []


@pytest.mark.frameworks
@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_saved_and_loaded_mixture_of_experts_compare_equal(kind: str, tmp_path: Path) -> None:
    """save_pretrained writes separate experts; the state dict of the model contains stacks."""
    transformers = pytest.importorskip("transformers", minversion="5")
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    sizes |= {"num_local_experts": 3, "num_experts": 3, "moe_intermediate_size": 16}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    model.save_pretrained(tmp_path / "saved")
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    comparison = wc.compare(wc.audit(tmp_path / "saved"), wc.audit(tmp_path / "whole.pt"))
    assert len(comparison.pairs) == 15
    assert all(pair.ratio == 1 for pair in comparison.pairs)


def test_summary_names_the_prefix(tmp_path: Path) -> None:
    weights = {f"layers.{i}.weight": torch.eye(2) * (i + 1) for i in range(3)}
    before = audit(tmp_path / "a.safetensors", {f"model.{n}": w for n, w in weights.items()})
    comparison = wc.compare(before, audit(tmp_path / "b.safetensors", weights))
    assert {pair.label for pair in comparison.pairs} == set(weights)
    said = 'The prefix "model." of the names before is omitted'
    assert comparison.naming == said
    for text in (comparison.table(), html.unescape(comparison.to_html())):
        assert said in text
    first = comparison.to_dict()["comparison"][0]
    assert first["before"]["name"] == f"model.{first['weight']}"


def test_wrapped_and_plain_checkpoints_are_compared(tmp_path: Path) -> None:
    plain = model([2.0, 1.0], [3.0, 1.0])
    torch.save(plain.state_dict(), tmp_path / "first.pt")
    torch.save(nn.DataParallel(plain).state_dict(), tmp_path / "second.pt")
    found = compared(wc.audit(tmp_path / "first.pt"), wc.audit(tmp_path / "second.pt"))
    assert {label: ratio for label, (_, _, ratio) in found.items()} == {
        "0.weight": 1,
        "1.weight": 1,
    }
    assert set(compared(wc.audit(plain), wc.audit(tmp_path / "second.pt"))) == set(found)


# --- ratios of kappa ------------------------------------------------------------------------------


def test_ratio_of_condition_numbers() -> None:
    before = wc.audit(model([2.0, 1.0], [8.0, 2.0], [3.0, 1.0]))
    after = wc.audit(model([2.0, 1.0], [2.0, 2.0], [30.0, 1.0]))
    comparison = wc.compare(before, after)
    pairs = [(pair.label, pair.ratio) for pair in comparison.pairs]
    assert pairs == [("2.weight", 10.0), ("1.weight", 0.25), ("0.weight", 1.0)]
    header, first, second, *_ = comparison.table().splitlines()
    assert header.split("  ")[0] == "weight"
    assert first.split()[:6] == ["2.weight", "σ_max", "×10", "15.4", "3", "30"]
    assert first.split()[6:] == ["3", "→", "30", "1.11", "→", "1", "2x2"]
    assert second.split()[:6] == ["1.weight", "σ_max", "×0.25", "9.24", "4", "1"]
    back = {pair.label: pair.ratio for pair in wc.compare(after, before).pairs}
    assert back == {label: 1 / ratio for label, ratio in pairs}


@pytest.mark.parametrize(
    ("old", "new", "ratio", "first"),
    [
        ([1.0, 0.0], [1.1, 0.0], 1.0, False),  # infinite as before
        ([1.0, 0.0], [2.0, 1.0], 0.0, True),
        ([2.0, 1.0], [1.0, 0.0], math.inf, True),
        ([0.0, 0.0], [0.0, 0.0], math.nan, False),  # no kappa as before
        ([0.0, 0.0], [2.0, 1.0], math.nan, True),
        ([2.0, 1.0], [math.nan, 1.0], math.nan, True),
    ],
)
def test_ratio_of_infinite_and_unknown_kappa(
    old: list[float], new: list[float], ratio: float, first: bool
) -> None:
    comparison = wc.compare(wc.audit(model(old, [4.0, 1.0])), wc.audit(model(new, [5.0, 1.0])))
    found = {pair.label: pair.ratio for pair in comparison.pairs}
    assert found["0.weight"] == pytest.approx(ratio, nan_ok=True)
    assert (comparison.pairs[0].label == "0.weight") == first
    json.loads(comparison.to_json())
    comparison.to_html()


def test_lower_bound_has_no_ratio() -> None:
    finding = wc.audit(model([4.0, 1.0])).findings[0]
    bounded = replace(finding, grade=wc.report.Grade.bounded)
    coverage = wc.report.Coverage(1, 0, {}, 1.0)
    exact, bound = (wc.AuditReport([f], coverage, "m", {}) for f in (finding, bounded))
    for before, after in ((exact, bound), (bound, exact), (bound, bound)):
        comparison = wc.compare(before, after)
        assert math.isnan(comparison.pairs[0].ratio)
        assert "is unknown on a side in 1" in comparison.summary()[0]
        assert "≥4" in comparison.table()
        assert "≥4" in comparison.to_html()


def test_summary_counts_changes_above_one_percent() -> None:
    before = wc.audit(model(*[[100.0, 1.0]] * 6))
    after = wc.audit(model(*[[kappa, 1.0] for kappa in (98.0, 99.5, 100.0, 100.5, 103.0, 150.0)]))
    assert wc.compare(before, after).summary() == [
        "Largest movement: 5.weight, σ_max 100 → 150 (1.5 times)",
        "In the 6 weights on both sides, κ rose in 2 (most in 5.weight, after/before 1.5), "
        "fell in 1 (most in 0.weight, after/before 0.98), moved by less than 1 % in 3; "
        "the median ratio after/before is 1.002",
    ]


def test_different_dtype_noted_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {f"layers.{i}.weight": torch.randn(6, 6) for i in range(9)}
    before = audit(tmp_path / "a.safetensors", weights)
    after = audit(tmp_path / "b.safetensors", {n: w.bfloat16() for n, w in weights.items()})
    comparison = wc.compare(before, after)
    for text in (comparison.table(), comparison.to_html()):
        assert text.count("float32 before, bfloat16 after") == 1
    assert all(pair.ratio == pytest.approx(1, abs=0.5) for pair in comparison.pairs)
    assert comparison.pairs[0].ratio != 1


def test_repaired_checkpoint_is_compared(tmp_path: Path) -> None:
    torch.save(model([100.0, 1.0], [3.0, 1.0]).state_dict(), tmp_path / "a.pt")
    wc.repair(tmp_path / "a.pt", tmp_path / "b.pt", 10.0)
    comparison = wc.compare(wc.audit(tmp_path / "a.pt"), wc.audit(tmp_path / "b.pt"))
    assert comparison.pairs[0].label == "0.weight"
    assert comparison.pairs[0].ratio == pytest.approx(0.1, rel=1e-3)
    said = "fell in 1 (most in 0.weight, after/before 0.1), moved by less than 1 % in 1"
    assert said in comparison.summary()[1]


# --- weights on only one side, and different shapes -----------------------------------------------


def test_weights_on_one_side_shown_and_counted(tmp_path: Path) -> None:
    eye = torch.eye(2)
    before = audit(tmp_path / "a.safetensors", {"both": eye, "old1": eye * 2, "old2": eye * 3})
    after = audit(tmp_path / "b.safetensors", {"both": eye, "new": eye * 2})
    comparison = wc.compare(before, after)
    lines = comparison.summary()
    assert lines[1:] == [
        "2 weights only in a.safetensors: old1, old2",
        "1 weight only in b.safetensors: new",
    ]
    table, page = comparison.table(), comparison.to_html()
    for line in lines:
        assert line in table
        assert line in page
    found = {pair.label: (pair.before is None, pair.after is None) for pair in comparison.pairs}
    assert found == {
        "both": (False, False),
        "old1": (False, True),
        "old2": (False, True),
        "new": (True, False),
    }
    assert comparison.to_dict()["summary"] == lines
    for name in found:
        assert f">{name}<" in page


def test_reason_for_missing_weight_is_noted(tmp_path: Path) -> None:
    eye = torch.eye(2)
    before = audit(tmp_path / "a.safetensors", {"both.weight": eye, "q.weight": eye * 2})
    packed = torch.zeros(2, 2, dtype=torch.int8)
    after = audit(tmp_path / "b.safetensors", {"both.weight": eye * 3, "q.weight": packed})
    comparison = wc.compare(before, after)
    why = str(after.coverage.skipped["q.weight"])
    assert comparison.notes == {"q.weight": f"skipped after: {why}"}
    assert f"q.weight: skipped after: {why}" in comparison.table()
    assert f"skipped after: {why}" in comparison.to_html()
    assert comparison.to_dict()["comparison"][0]["note"] == f"skipped after: {why}"


def test_different_shape_shown_and_counted() -> None:
    before, after = (
        wc.audit(model([2.0, 1.0], [3.0, 1.0])),
        wc.audit(model([2.0, 1.0, 1.0], [3.0, 1.0])),
    )
    comparison = wc.compare(before, after)
    assert (
        comparison.summary()[-1] == "1 weight with different shapes, possibly unrelated: 0.weight"
    )
    for text in (comparison.table(), comparison.to_html()):
        assert "2x2 → 3x3" in text
    rows = {row["weight"]: row for row in csv.DictReader(io.StringIO(comparison.to_csv()))}
    assert (rows["0.weight"]["shape_before"], rows["0.weight"]["shape_after"]) == ("2x2", "3x3")
    assert rows["1.weight"]["dtype_after"] == "float32"


def test_exceeding_uses_labels_of_comparison(tmp_path: Path) -> None:
    weights = {"a.weight": torch.diag(torch.tensor([9.0, 1.0])), "b.weight": torch.eye(2)}
    before = audit(tmp_path / "a.safetensors", {f"model.{n}": w for n, w in weights.items()})
    comparison = wc.compare(before, audit(tmp_path / "b.safetensors", weights))
    assert comparison.to_dict(5.0)["exceeding"] == ["a.weight"]
    assert len(comparison.exceeding(5.0)) == 1


def test_str_is_the_table() -> None:
    report = wc.audit(model([2.0, 1.0]))
    comparison = wc.compare(report, report)
    assert str(comparison) == comparison.table()


# --- misuse ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [3, torch.eye(2), None])
def test_compare_refuses_other_types(wrong: Any) -> None:
    report = wc.audit(nn.Linear(2, 2))
    for arguments, name in (((wrong, report), "before"), ((report, wrong), "after")):
        with pytest.raises(TypeError, match=rf"`{name}` must be an AuditReport, a model or a path"):
            wc.compare(*arguments)


@pytest.mark.parametrize("names", ["ab", ("a",), ("a", "a"), ("a", "b", "c")])
def test_compare_refuses_invalid_names(names: Any) -> None:
    report = wc.audit(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="`names` must be two different names, got"):
        wc.compare(report, report, names=names)


def test_compare_refuses_comparison() -> None:
    report = wc.audit(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got Comparison"):
        wc.compare(wc.compare(report, report), report)


def test_compare_without_common_names_is_an_error(tmp_path: Path) -> None:
    one = audit(tmp_path / "a.safetensors", {"x": torch.eye(2)})
    other = audit(tmp_path / "b.safetensors", {"y": torch.eye(2)})
    with pytest.raises(ValueError, match=r"a.safetensors contains x, and .* contains y. Comp"):
        wc.compare(one, other)


# --- movement -------------------------------------------------------------------------------------


def finding(label: str, kappa: float, top: float, stable: float, m: int, n: int) -> Any:
    return wc.report.Finding(
        label,
        "",
        (m, n),
        "float32",
        sigma_max=top,
        sigma_min=top / kappa,
        condition_number=kappa,
        stable_rank=stable,
        grade=wc.report.Grade.computed,
    )


def reports(*sides: list[Any]) -> list[wc.AuditReport]:
    coverage = wc.report.Coverage(1, 0, {}, 1.0)
    return [wc.AuditReport(findings, coverage, "Net", {}) for findings in sides]


def test_usual_variation_of_squares_does_not_come_first() -> None:
    """A factor of 30 in κ is usual for a square; 1.5 is unusual for a rectangle."""
    before, after = reports(
        [
            finding("square", 1e3, 1.0, 10.0, 64, 64),
            finding("grown", 3.0, 0.67, 58.0, 256, 64),
            finding("wide", 3.0, 1.0, 10.0, 64, 256),
        ],
        [
            finding("square", 3e4, 1.0, 10.0, 64, 64),
            finding("grown", 17.0, 13.4, 3.8, 256, 64),
            finding("wide", 6.0, 1.0, 10.0, 64, 256),
        ],
    )
    comparison = wc.compare(before, after)
    assert [pair.label for pair in comparison.pairs] == ["grown", "wide", "square"]
    moved = "Largest movement: grown, σ_max 0.67 → 13.4 (20 times)"
    assert comparison.summary()[0] == moved
    assert moved in comparison.table()
    assert moved in html.unescape(comparison.to_html())
    first = comparison.to_dict()["comparison"][0]
    assert first["moved"] == "sigma_max"
    assert first["movement"] == pytest.approx(math.log(20) / 0.15)
    assert first["change"] is None
    assert [pair.moved for pair in comparison.pairs[1:]] == ["condition_number"] * 2


@given(st.floats(1.02, 1e6), st.sampled_from(["sigma_max", "stable_rank", "condition_number"]))
def test_movement_is_symmetric(factor: float, key: str) -> None:
    one = finding("a", 10.0, 1.0, 2.0, 8, 4)
    other = replace(one, **{key: factor * getattr(one, key)})
    forth, back = (
        wc.compare(*reports([first], [second])).pairs[0]
        for first, second in ((one, other), (other, one))
    )
    assert forth.movement == pytest.approx(back.movement)
    assert forth.movement == pytest.approx(math.log(factor) / 0.15)
    assert forth.moved == back.moved == key


def test_summary_states_that_movement_is_usual() -> None:
    before, after = reports(
        [finding("a", 1e3, 1.0, 2.0, 8, 8)], [finding("a", 2e3, 1.0, 2.0, 8, 8)]
    )
    line = "Largest movement: a, κ 1e+03 → 2e+03 (2 times), which is usual between two trainings"
    assert wc.compare(before, after).summary()[0] == line
    assert wc.compare(before, before).summary()[0].startswith("In the 1 weight on both sides")


def test_summary_compares_no_rounding_with_trainings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    W = torch.randn(8, 8)
    torch.save({"w": W}, tmp_path / "a.pt")
    torch.save({"w": (W * 1.05).bfloat16()}, tmp_path / "b.pt")
    first, *_ = wc.compare(tmp_path / "a.pt", tmp_path / "b.pt").summary()
    assert first.startswith("Largest movement: w, σ_max")
    assert "usual" not in first


@pytest.mark.parametrize(("factor", "is_named"), [(2.0, True), (1.4, False), (1.0, False)])
def test_summary_names_a_wrong_scale(tmp_path: Path, factor: float, is_named: bool) -> None:
    torch.manual_seed(0)
    W = torch.randn(8, 6)
    torch.save({"w": W, "v": W}, tmp_path / "a.pt")
    torch.save({"w": (factor * W).half(), "v": W.half()}, tmp_path / "b.pt")
    lines = wc.compare(tmp_path / "a.pt", tmp_path / "b.pt").summary()
    line = "In 1 weight, rounding changed more than half of the norm: w ("
    assert any(one.startswith(line) for one in lines) is is_named
    torch.save({"w": factor * W, "v": W}, tmp_path / "c.pt")  # a training
    assert not any(
        "rounding" in one for one in wc.compare(tmp_path / "a.pt", tmp_path / "c.pt").summary()
    )


def test_few_weights_have_no_median_ratio() -> None:
    before, after = (wc.audit(model(*[[kappa, 1.0]] * 4)) for kappa in (10.0, 20.0))
    assert "median" not in "".join(wc.compare(before, after).summary())


# --- names of the sides ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "names"),
    [
        ("/a/x.pt", "/a/y.pt", ("x.pt", "y.pt")),
        ("/runs/1/model.pt", "/runs/2/model.pt", ("1/model.pt", "2/model.pt")),
        ("model.pt", "old/model.pt", ("model.pt", "old/model.pt")),
        ("GPT2", "GPT2", ("before", "after")),
    ],
)
def test_shorten_sources_returns_different_ends(
    before: str, after: str, names: tuple[str, str]
) -> None:
    assert shorten_sources(before, after) == names
    assert shorten_sources(after, before)[0] != shorten_sources(after, before)[1]


def test_names_of_sides_are_escaped() -> None:
    before, after = reports(
        [finding("a", 2.0, 1.0, 1.0, 2, 2), finding("old", 2.0, 1.0, 1.0, 2, 2)],
        [finding("a", 2.0, 1.0, 1.0, 2, 2)],
    )
    comparison = wc.compare(before, after, names=("start", "<i>\x1b[31m"))
    text, page = comparison.table(), comparison.to_html()
    assert "before: start, Net" in text
    assert "1 weight only in start: old" in text
    assert "\x1b" not in text + page
    assert "<i>\\x1b" not in page
    assert comparison.to_dict()["names"] == ["start", "<i>\x1b[31m"]


# --- changes of matrices --------------------------------------------------------------------------


def test_change_computed_for_models_and_files(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    fused = nn.MultiheadAttention(8, 2)
    first = nn.ModuleDict({"a": fused, "k": nn.Conv2d(4, 6, 3, groups=2), "l": nn.Linear(8, 5)})
    second = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    torch.save(first.state_dict(), tmp_path / "a.pt")
    torch.save(second.state_dict(), tmp_path / "b.pt")
    of_models = wc.compare(first, second)
    of_files = wc.compare(tmp_path / "a.pt", str(tmp_path / "b.pt"))
    for comparison in (of_models, of_files):
        changes = {pair.label: pair.change for pair in comparison.pairs}
        assert None not in changes.values()
        for label, rows in {
            "a.in_proj_weight:q": slice(8),
            "a.in_proj_weight:v": slice(16, 24),
        }.items():
            S, T = (
                one["a"].in_proj_weight[rows].double()
                for one in (first, second)  # type: ignore
            )
            found = changes[label]
            assert found is not None
            assert found.relative == pytest.approx(float((T - S).norm() / S.norm()))
            assert found.sqnr == pytest.approx(-20 * math.log10(found.relative))
        columns = csv.DictReader(io.StringIO(comparison.to_csv()))
        assert all(float(row["relative"]) > 0 for row in columns)
        assert "‖ΔW‖/‖W‖" in comparison.table()
        assert "SQNR" not in comparison.table()  # both sides are stored alike
        json.loads(comparison.to_json())
    halves = wc.compare(wc.audit(first), second)
    assert all(pair.change is None for pair in halves.pairs)
    assert "‖ΔW‖" not in halves.table()


def test_sqnr_of_int8_rounding(tmp_path: Path) -> None:
    """Rounding to full-range int8 codes has the noise step/√12, so the SQNR is known."""
    W = torch.rand(64, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    W[:, 0] = 0.5  # so that the step is 0.5/127
    scale = W.abs().amax(1, keepdim=True) / 127
    rounded = ((W / scale).round() * scale).float()
    audit(tmp_path / "a.safetensors", {"w": W, "gone.bias": torch.ones(3)})
    audit(tmp_path / "b.safetensors", {"w": rounded})
    comparison = wc.compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    (pair,) = comparison.pairs
    assert pair.change is not None
    expected = 20 * math.log10(math.sqrt(12) * float(W.norm()) / 128 / (0.5 / 127))
    assert pair.change.sqnr == pytest.approx(expected, abs=0.2)
    assert f"{pair.change.sqnr:.1f}" in comparison.table()
    assert "SQNR dB" in comparison.to_html()


def test_missing_change_has_reason(tmp_path: Path) -> None:
    nan = torch.eye(3)
    nan[0, 0] = math.nan
    audit(tmp_path / "a.safetensors", {"x": torch.eye(2), "y": torch.eye(3), "z": torch.eye(2)})
    audit(tmp_path / "b.safetensors", {"x": torch.eye(3), "y": nan, "z": torch.eye(2)})
    comparison = wc.compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    reasons = {row["weight"]: row["change"]["reason"] for row in comparison.to_dict()["comparison"]}
    assert reasons["x"] == "the shapes differ"
    assert "must be finite" in reasons["y"]
    assert reasons["z"] == "nothing has changed"
