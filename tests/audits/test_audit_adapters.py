"""An audit of adapters: W, W + s B A and s B A, of files and models that PEFT creates."""

import json
import math
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import wellcond as wc
from wellcond.cli import main

M, N, R = 7, 10, 3


def entries(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def written(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    if config is not None:
        plain = {"peft_type": "LORA", "r": R, "lora_alpha": 6} | config
        (folder / "adapter_config.json").write_text(json.dumps(plain))
    return folder


def pair(module: str, seed: int = 1) -> dict[str, Tensor]:
    name = f"base_model.model.{module}"
    return {
        f"{name}.lora_A.weight": entries(R, N, seed=seed),
        f"{name}.lora_B.weight": entries(M, R, seed=seed + 1),
    }


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.safetensors"
    weights = {
        "layers.0.q_proj.weight": entries(M, N, seed=3),
        "layers.1.q_proj.weight": entries(M, N, seed=4),
        "layers.0.up_proj.weight": entries(20, M, seed=5),
    }
    save_file(weights, path)
    return path


def rows(report: wc.AuditReport) -> dict[str, wc.report.Finding]:
    return {finding.label: finding for finding in report.findings}


def all_rows(*args: Any, **options: Any) -> dict[str, wc.report.Finding]:
    """All rows, including those of the weights and the changes, which no merged row replaces."""
    apart = rows(wc.audit(*args, **options, exclude="*:merged"))
    return apart | rows(wc.audit(*args, **options))


def dense(S: Tensor) -> Tensor:
    return torch.linalg.svdvals(S.double())


def test_rows_match_dense_twins(base: Path, tmp_path: Path) -> None:
    tensors = pair("layers.0.q_proj")
    adapter = written(tmp_path / "adapter", tensors, {})
    A, B = (t.double() for t in tensors.values())
    W = entries(M, N, seed=3).double()
    found = all_rows(adapter, base=base)
    name = "layers.0.q_proj.weight"
    assert set(found) == {name, f"{name}:merged", f"{name}:delta"}
    assert set(rows(wc.audit(adapter, base=base))) == {f"{name}:merged"}
    for label, S, nu in (
        (name, W, M),
        (f"{name}:merged", W + 2 * B @ A, M),  # s = alpha/r = 6/3
        (f"{name}:delta", 2 * B @ A, R),
    ):
        sigma, row = dense(S)[:nu], found[label]
        assert row.shape == (M, N)
        assert row.sigma_max == pytest.approx(float(sigma[0]), rel=1e-9)
        assert row.sigma_min == pytest.approx(float(sigma[-1]), rel=1e-9)
        assert row.condition_number == pytest.approx(float(sigma[0] / sigma[-1]), rel=1e-9)
        squares = float(sigma.square().sum())
        assert row.stable_rank == pytest.approx(squares / float(sigma[0]) ** 2, rel=1e-9)
        assert row.penalty == pytest.approx((float(sigma[0]) ** 2 - squares / nu) / 2, rel=1e-9)
        assert (row.rank, row.nu) == (nu, nu)
    U, sigma, Vh = torch.linalg.svd(W + 2 * B @ A, full_matrices=False)
    parts = (U * (2 * B @ A @ Vh.mT)).sum(0)[:R]
    merged = found[f"{name}:merged"]
    assert merged.added_share == pytest.approx(float(parts.sum() / sigma[:R].sum()), rel=1e-9)
    assert (merged.added_new, merged.added_of) == (int((parts > sigma[:R] / 2).sum()), R)
    shown = f"{100 * merged.added_share:.2g} %, {merged.added_new} of 3"
    report = wc.audit(adapter, base=base)
    assert shown in report.table()
    assert shown in report.to_html()
    assert "added" in report.columns()
    assert "added" not in wc.audit(base).columns()
    assert math.isnan(found[name].added_share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merged_row_describes_weight_change_and_rounding(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    W = entries(M, N, seed=3).to(dtype)
    save_file({"q_proj.weight": W}, tmp_path / "base.safetensors")
    tensors = pair("q_proj")
    adapter = written(tmp_path / "adapter", tensors, {})
    (row,) = wc.audit(adapter, base=tmp_path / "base.safetensors").findings
    A, B = (t.double() for t in tensors.values())
    wide, change = W.double(), 2 * B @ A
    assert row.base_condition_number == pytest.approx(kappa(wide), rel=1e-9)
    assert row.condition_number == pytest.approx(kappa(wide + change), rel=1e-9)
    rounded = (wide + change).to(dtype)
    assert row.rounded_condition_number == pytest.approx(kappa(rounded), rel=1e-9)
    assert row.base_dtype == str(dtype).removeprefix("torch.")
    assert row.delta_share == pytest.approx(float(change.norm() / wide.norm()), rel=1e-9)
    stable = float((change.norm() / dense(change)[0]) ** 2)
    assert row.delta_stable_rank == pytest.approx(stable, rel=1e-9)
    assert row.delta_rank == R
    report = wc.audit(adapter, base=tmp_path / "base.safetensors")
    for text in (report.table(), report.to_html()):
        assert f"{stable:.2g} of 3" in text
        assert f"{kappa(wide):.4g}" in text
        assert f"{kappa(rounded):.4g}" in text


def kappa(S: Tensor) -> float:
    sigma = dense(S)
    return float(sigma[0] / sigma[-1])


def test_merged_weight_overflowing_its_dtype_is_noted(tmp_path: Path) -> None:
    W = torch.full((M, N), 6e4).half() + torch.eye(M, N).half()
    save_file({"q_proj.weight": W}, tmp_path / "base.safetensors")
    tensors = pair("q_proj")
    name = "base_model.model.q_proj.lora_{}.weight"
    tensors[name.format("A")].zero_()[0, 0] = 1e4
    tensors[name.format("B")].zero_()[0, 0] = 1
    adapter = written(tmp_path / "adapter", tensors, {})
    (row,) = wc.audit(adapter, base=tmp_path / "base.safetensors").findings
    assert row.measured
    assert math.isnan(row.rounded_condition_number)
    assert "1 of its entries are infinite in float16" in row.detail


def test_adapter_of_a_zero_weight_has_no_share(tmp_path: Path) -> None:
    save_file({"q_proj.weight": torch.zeros(M, N)}, tmp_path / "base.safetensors")
    adapter = written(tmp_path / "adapter", pair("q_proj"), {})
    (row,) = wc.audit(adapter, base=tmp_path / "base.safetensors").findings
    assert math.isnan(row.delta_share)
    assert math.isnan(row.base_condition_number)
    assert row.status is wc.report.Status.rank_deficient


def test_merged_row_covers_weight_and_factors(base: Path, tmp_path: Path) -> None:
    """The coverage counts the factors for an adapter file, and also the weight for a model."""
    adapter = written(tmp_path / "adapter", pair("layers.0.q_proj"), {})
    report = wc.audit(adapter, base=base)
    assert (report.coverage.measured, report.coverage.parameter_share) == (1, 1)
    inside = {f"x.{k.removeprefix('base_model.model.')}": t for k, t in pair("q").items()}
    whole = inside | {"x.q.base_layer.weight": entries(M, N), "x.q.bias": entries(M)}
    report = wc.audit(written(tmp_path / "whole", whole, {}))
    own = M * N + R * (M + N)
    assert report.coverage.measured == 1
    assert report.coverage.parameter_share == pytest.approx(own / (own + M))


SCALES = [
    ({}, 2.0),
    ({"use_rslora": True}, 6 / math.sqrt(3)),
    ({"alpha_pattern": {"q_proj": 12}}, 4.0),
    ({"alpha_pattern": {"proj": 12, "0.q_proj": 15}}, 5.0),
    ({"alpha_pattern": {"^layers.0.q_proj": 9}}, 3.0),
    ({"alpha_pattern": {"^q_proj": 9}}, 2.0),
    ({"lora_alpha": -6}, -2.0),
    ({"alpha_pattern": {r"layers\.\d+\..*proj": 9}}, 3.0),
    ({"alpha_pattern": {r"(k|v)_proj": 9}}, 2.0),
]


@pytest.mark.parametrize(("config", "scale"), SCALES)
def test_scale_follows_the_config(
    config: dict[str, Any], scale: float, base: Path, tmp_path: Path
) -> None:
    tensors = pair("layers.0.q_proj")
    found = all_rows(written(tmp_path / "adapter", tensors, config), base=base)
    A, B = (t.double() for t in tensors.values())
    W = entries(M, N, seed=3).double()
    for view, S in (("delta", scale * B @ A), ("merged", W + scale * B @ A)):
        row = found[f"layers.0.q_proj.weight:{view}"]
        assert row.sigma_max == pytest.approx(float(dense(S)[0]), rel=1e-9)


def test_fresh_adapter_is_not_a_fault(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = pair("layers.0.q_proj")
    tensors["base_model.model.layers.0.q_proj.lora_B.weight"].zero_()
    adapter = written(tmp_path / "adapter", tensors, {})
    report = wc.audit(adapter, base=base)
    assert "the adapter adds nothing yet" in report.table()
    found = all_rows(adapter, base=base)
    plain, merged, delta = (found[f"layers.0.q_proj.weight{v}"] for v in ("", ":merged", ":delta"))
    assert merged.condition_number == pytest.approx(plain.condition_number, rel=1e-12)
    assert (merged.added_share, merged.added_new) == (0.0, 0)
    assert delta.status is wc.report.Status.fresh
    apart = wc.audit(adapter, base=base, exclude="*:merged")
    assert apart.findings[-1] == delta, "the last of all"
    assert (merged.delta_share, merged.delta_rank) == (0, R)
    assert math.isnan(merged.delta_stable_rank)
    assert not delta.exceeds(1)
    assert report.coverage.measured == 1
    assert report.coverage.parameter_share == 1
    assert main(["audit", str(adapter), "--max-condition", "1e6"]) == 0
    assert "the adapter adds nothing yet: B A is zero" in capsys.readouterr().out
    assert main(["audit", str(adapter), "--base", str(base), "--max-condition", "1e6"]) == 0
    assert main(["audit", str(adapter), "--base", str(base), "--max-condition", "1.01"]) == 1
    assert ":delta" not in capsys.readouterr().err


def test_adapter_without_base_shows_deltas_and_saved_weights(tmp_path: Path) -> None:
    tensors = pair("layers.0.q_proj") | {"base_model.model.score.weight": entries(2, 7)}
    found = rows(wc.audit(written(tmp_path / "adapter", tensors, {})))
    assert set(found) == {"layers.0.q_proj.weight:delta", "base_model.model.score.weight"}
    without = wc.audit(written(tmp_path / "plain", pair("layers.0.q_proj")))
    (row,) = without.findings
    A, B = (t.double() for t in pair("layers.0.q_proj").values())
    assert row.condition_number == pytest.approx(
        float(dense(B @ A)[0] / dense(B @ A)[R - 1]), rel=1e-9
    )
    assert "its scale is unknown" in row.detail


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        ("layers.0.q_proj", "layers.0.q_proj"),
        ("model.layers.0.q_proj", "layers.0.q_proj"),  # the base has a head around the saved body
        ("layers.0.q_proj", "model.layers.0.q_proj"),
        ("transformer.layers.1.q_proj", "layers.1.q_proj"),
    ],
)
def test_base_names_match_by_suffix(inside: str, outside: str, tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    other = outside.replace("0", "1") if "0" in outside else outside.replace("1", "0")
    save_file({f"{outside}.weight": entries(M, N), f"{other}.weight": entries(M, N)}, path)
    found = rows(wc.audit(written(tmp_path / "adapter", pair(inside), {}), base=path))
    assert {label.partition(":")[0] for label in found} == {f"{outside}.weight"}


def test_missing_or_quantised_base_weight_is_a_failed_row(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    save_file(
        {
            "layers.0.q_proj.weight": entries(M, N),
            "layers.1.q_proj.weight": entries(M, N).to(torch.int8),
            "layers.3.q_proj.weight": entries(M, N + 1),
        },
        path,
    )
    tensors = {k: t for layer in range(4) for k, t in pair(f"layers.{layer}.q_proj").items()}
    adapter = written(tmp_path / "adapter", tensors, {})
    report = wc.audit(adapter, base=path)
    found = rows(report)
    assert found["layers.0.q_proj.weight:merged"].measured
    failed = {label: f.explanation for label, f in found.items() if not f.measured}
    assert set(failed) == {f"layers.{layer}.q_proj.weight:merged" for layer in (1, 2, 3)}
    assert "is skipped (not real floating point" in failed["layers.1.q_proj.weight:merged"]
    assert "it is missing" in failed["layers.2.q_proj.weight:merged"]
    assert "it adds (7, 10) to a weight of (7, 11)" in failed["layers.3.q_proj.weight:merged"]
    assert len(found) == 4  # one each
    assert report.coverage.failed == 3
    apart = rows(wc.audit(adapter, base=path, include="*:delta"))
    assert set(apart) == {f"layers.{layer}.q_proj.weight:delta" for layer in range(4)}
    assert all(one.measured for one in apart.values())
    some = rows(wc.audit(adapter, base=path, exclude=["layers.1.*", "layers.3.*"]))
    assert set(some) == {f"layers.{layer}.q_proj.weight:merged" for layer in (0, 2)}


UNKNOWN = [
    ({"target_parameters": ["layers.0.q_proj.weight"]}, {}, "a stack of matrices"),
    ({"alpha_pattern": {"(.*)*q_proj": 8}}, {}, "is too complex"),
    ({"alpha_pattern": {"[": 8}}, {}, "is not a regular expression"),
    ({"target_parameters": ["experts"], "r": 1}, {}, "a stack of matrices"),
    ({}, {"lora_diag": entries(R)}, "with lora_diag in addition to A and B"),
]


@pytest.mark.parametrize(("config", "more", "why"), UNKNOWN)
def test_changes_other_than_sums_are_not_merged(
    config: dict[str, Any], more: dict[str, Tensor], why: str, base: Path, tmp_path: Path
) -> None:
    tensors = pair("layers.0.q_proj") | pair("layers.1.q_proj")
    tensors |= {f"base_model.model.layers.0.q_proj.{name}": t for name, t in more.items()}
    adapter = written(tmp_path / "adapter", tensors | {"score.weight": entries(2, 7)}, config)
    delta = rows(wc.audit(adapter))["layers.0.q_proj.weight:delta"]
    assert not delta.measured
    assert why in delta.explanation
    try:
        merged = rows(wc.audit(adapter, base=base))["layers.0.q_proj.weight:merged"].explanation
    except ValueError as error:  # if there is no other weight
        merged = str(error)
    assert why in merged


def test_mismatched_factors_and_factors_with_nan(base: Path, tmp_path: Path) -> None:
    tensors = pair("layers.0.q_proj") | pair("layers.1.q_proj")
    tensors["base_model.model.layers.0.q_proj.lora_B.weight"] = entries(M, R + 1)
    tensors["base_model.model.layers.1.q_proj.lora_B.weight"][0, 0] = math.nan
    up = "base_model.model.layers.0.up_proj"
    tensors |= {f"{up}.lora_A.weight": entries(R, M), f"{up}.lora_B.weight": entries(20, R)}
    found = all_rows(written(tmp_path / "adapter", tensors, {}), base=base)
    for view in ("delta", "merged"):
        name = "base_model.model.layers.1.q_proj.lora_B.weight"
        assert f"1 of 21 entries of {name}" in found[f"layers.1.q_proj.weight:{view}"].detail
        assert found[f"layers.0.q_proj.weight:{view}"].status is wc.report.Status.failed
        assert found[f"layers.1.q_proj.weight:{view}"].status is wc.report.Status.not_finite
    assert (
        "its factors (7, 4) and (3, 10) cannot be multiplied"
        in found["layers.0.q_proj.weight:delta"].explanation
    )


def test_factor_with_nan_is_named(tmp_path: Path) -> None:
    tensors = pair("layers.9.q_proj")
    for i, factors in enumerate(("A", "B", "AB")):
        tensors |= pair(f"layers.{i}.q_proj")
        for factor in factors:
            name = f"base_model.model.layers.{i}.q_proj.lora_{factor}.weight"
            tensors[name][0, 0] = math.nan
    found = rows(wc.audit(written(tmp_path / "adapter", tensors, {})))
    says = [finding.explanation for _, finding in sorted(found.items())]
    each = [
        [f"{count} of base_model.model.layers.{i}.q_proj.lora_{factor}.weight" for i in range(3)]
        for factor, count in (("A", "1 of 30 entries"), ("B", "1 of 21 entries"))
    ]
    assert len(says) == 4
    assert says[0].endswith(each[0][0])
    assert "lora_B" not in says[0]
    assert says[1].endswith(each[1][1])
    assert "lora_A" not in says[1]
    assert f"{each[1][2]}; {each[0][2]}" in says[2]


def test_patterns_select_adapters(base: Path, tmp_path: Path) -> None:
    tensors = pair("layers.0.q_proj") | pair("layers.1.q_proj")
    adapter = written(tmp_path / "adapter", tensors, {})
    for patterns in ({"include": ["layers.1.*"]}, {"exclude": ["*layers.0*.lora_A.*"]}):
        found = rows(wc.audit(adapter, base=base, **patterns))
        assert {label.partition(":")[0] for label in found} == {"layers.1.q_proj.weight"}
        assert len(found) == 1


def test_invalid_use_of_base_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", pair("layers.0.q_proj"), {})
    with pytest.raises(ValueError, match="has no adapter that wellcond knows"):
        wc.audit(base, base=base)
    with pytest.raises(
        ValueError, match=r"no weight for far\.away\.weight \(in .* it is missing\); it has lay"
    ):
        wc.audit(written(tmp_path / "other", pair("far.away"), {}), base=base)
    with pytest.raises(TypeError, match="requires the path of an adapter"):
        wc.audit(nn.Linear(3, 2), base=base)
    with pytest.raises(FileNotFoundError):
        wc.audit(adapter, base=tmp_path / "nowhere")


def test_repair_keeps_adapter_factors(tmp_path: Path) -> None:
    tensors = pair("layers.0.q_proj")
    adapter = written(tmp_path / "adapter", tensors, {})
    with pytest.raises(ValueError, match=r"has none \(.*lora_A\.weight: a factor of an adapter"):
        wc.repair(adapter, tmp_path / "fixed", 2)
    assert not (tmp_path / "fixed").exists()
    more = written(tmp_path / "more", tensors | {"score.weight": entries(4, 7)}, {})
    report = wc.repair(more, tmp_path / "fixed", 1.5)
    assert [one.label for one in report.changed] == ["score.weight"]
    after = load_file(tmp_path / "fixed" / "adapter_model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("alpha", [math.inf, math.nan, True, "16", None])
def test_non_numeric_scale_is_unknown(alpha: Any, base: Path, tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", pair("layers.0.q_proj"), {"lora_alpha": alpha})
    (row,) = wc.audit(adapter).findings
    assert "its scale is unknown" in row.detail
    with pytest.raises(
        ValueError,
        match=r"a merged weight that can be measured, but .* has none .*its scale is unknown",
    ):
        wc.audit(adapter, base=base)


def test_huge_scale(base: Path, tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", pair("layers.0.q_proj"), {"lora_alpha": 1e300})
    found = all_rows(adapter, base=base)
    assert found["layers.0.q_proj.weight:delta"].penalty == math.inf


def test_adapter_that_changed_its_base_is_not_merged(base: Path, tmp_path: Path) -> None:
    """PiSSA changes the base when it starts, and that effective base is not saved."""
    config = {"init_lora_weights": "pissa_niter_4"}
    adapter = written(tmp_path / "adapter", pair("layers.0.q_proj"), config)
    (row,) = wc.audit(adapter).findings
    assert "initialised by pissa_niter_4" in row.detail
    with pytest.raises(ValueError, match="Load it with PEFT, and audit that model"):
        wc.audit(adapter, base=base)


def test_two_adapter_files_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = written(tmp_path / "adapter", pair("layers.0.q_proj"), {})
    torch.save(pair("layers.0.q_proj", seed=9), adapter / "adapter_model.bin")
    with pytest.raises(
        ValueError, match=r"must contain one adapter, but it contains several for layers\.0"
    ):
        wc.audit(adapter, base=base)
    found = all_rows(adapter / "adapter_model.bin", base=base)
    A, B = (t.double() for t in pair("layers.0.q_proj", seed=9).values())
    sigma = dense(2 * B @ A)
    row = found["layers.0.q_proj.weight:delta"]
    assert row.sigma_max == pytest.approx(float(sigma[0]), rel=1e-9)


def test_partial_base_in_the_adapter_file(base: Path, tmp_path: Path) -> None:
    """PEFT saves such a file for an adapter of lm_head."""
    inside = {"base_model.model.head.base_layer.weight": entries(M, N, seed=8)}
    tensors = pair("layers.0.q_proj") | pair("head", seed=5) | inside
    found = all_rows(written(tmp_path / "adapter", tensors, {}), base=base)
    for name in ("layers.0.q_proj.weight", "base_model.model.head.base_layer.weight"):
        assert {name, f"{name}:merged", f"{name}:delta"} <= found.keys()
    assert len(found) == 6


def test_quantised_base_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    save_file({"layers.0.q_proj.weight": entries(M, N).to(torch.int8)}, path)
    adapter = written(tmp_path / "adapter", pair("layers.0.q_proj"), {})
    with pytest.raises(ValueError, match=r"is skipped \(not real .* was adapted\. If its file"):
        wc.audit(adapter, base=path)


def test_failed_merged_rows_are_counted(base: Path, tmp_path: Path) -> None:
    tensors = pair("layers.0.q_proj") | pair("layers.1.q_proj")
    tensors["base_model.model.layers.1.q_proj.lora_A.weight"] = entries(R, N + 1)
    report = wc.audit(written(tmp_path / "adapter", tensors, {}), base=base)
    assert not rows(report)["layers.1.q_proj.weight:merged"].measured
    assert (report.coverage.measured, report.coverage.failed) == (1, 1)


ROWS = [
    ({"include": ["*:merged"]}, {"merged"}),
    ({"include": ["*:delta"]}, {"delta"}),
    ({}, {"merged"}),
    ({"include": ["*:merged", "*:delta"]}, {"merged"}),
    ({"exclude": ["*:delta"]}, {"merged"}),
    ({"exclude": ["*:merged"]}, {"", "delta"}),
]


@pytest.mark.parametrize(("patterns", "views"), ROWS)
def test_patterns_select_rows(
    patterns: dict[str, Any], views: set[str], base: Path, tmp_path: Path
) -> None:
    adapter = written(tmp_path / "adapter", pair("layers.0.q_proj"), {})
    assert {f.view for f in wc.audit(adapter, base=base, **patterns).findings} == views


# --- PEFT itself ----------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(N, M)
        self.conv = nn.Conv2d(3, 6, 3)
        self.score = nn.Linear(M, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.score(self.lin(x))
        return y


def adapted(peft: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=R, lora_alpha=6, target_modules=["lin", "conv"], **settings)
    model = peft.get_peft_model(Net(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_peft_merges_to_the_same_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = adapted(peft, **settings)
    torch.manual_seed(0)
    plain = Net()
    torch.save(plain.state_dict(), tmp_path / "base.pt")
    model.save_pretrained(tmp_path / "adapter")
    whole = all_rows(model)
    from_files = all_rows(tmp_path / "adapter", base=tmp_path / "base.pt")
    from_a_model = all_rows(tmp_path / "adapter", base=plain)
    assert from_a_model.keys() == from_files.keys()
    merged = model.merge_and_unload()
    for name in ("lin", "conv"):
        weight = getattr(merged, name).weight.detach().flatten(1)
        view = "kernel:merged" if name == "conv" else "merged"
        inside = f"base_model.model.{name}.base_layer.weight"
        for row in (whole[f"{inside}:{view}"], from_files[f"{name}.weight:{view}"]):
            assert row.sigma_max == pytest.approx(float(dense(weight)[0]), rel=1e-5)
            assert row.sigma_min == pytest.approx(float(dense(weight)[-1]), rel=1e-4)
        ours = from_files[f"{name}.weight:{view}"]
        assert from_a_model[ours.label].condition_number == ours.condition_number
        assert whole[f"{inside}:delta"].sigma_max == from_files[f"{name}.weight:delta"].sigma_max


def test_model_determines_active_adapters(tmp_path: Path) -> None:
    """Two active adapters are summed, an inactive one has its own row, and a merged one is in W."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = adapted(peft)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lin"]))
    nn.init.normal_(model.base_model.model.lin.lora_B["second"].weight)
    name = "base_model.model.lin.base_layer.weight"
    W = model.base_model.model.lin.base_layer.weight.detach().double().clone()
    first, second = (
        model.base_model.model.lin.get_delta_weight(a).detach().double()
        for a in ("default", "second")
    )
    found = rows(wc.audit(model))
    assert found[f"{name}:delta.second"].detail == "not active"
    one = float(dense(W + first)[0])
    assert found[f"{name}:merged"].sigma_max == pytest.approx(one, rel=1e-6)
    model.base_model.set_adapter(["default", "second"])
    both = rows(wc.audit(model))[f"{name}:merged"]
    assert both.sigma_max == pytest.approx(float(dense(W + first + second)[0]), rel=1e-6)
    model.base_model.set_adapter("default")
    model.merge_adapter()
    inside = rows(wc.audit(model))
    assert f"{name}:merged" not in inside
    assert inside[name].sigma_max == pytest.approx(one, rel=1e-6)
    assert inside[f"{name}:delta"].detail == "already merged into the weight"


def test_transposed_weights_of_gpt2(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    plain = transformers.GPT2Model(
        transformers.GPT2Config(n_embd=12, n_layer=1, n_head=2, vocab_size=9, n_positions=8)
    )
    plain.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["attn.c_proj", "c_fc"], fan_in_fan_out=True
    )
    model = peft.get_peft_model(plain, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    found = rows(wc.audit(tmp_path / "adapter", base=tmp_path / "base"))
    merged = model.merge_and_unload()
    for name in ("h.0.attn.c_proj", "h.0.mlp.c_fc"):
        sigma = dense(merged.get_submodule(name).weight.detach())
        row = found[f"{name}.weight:merged"]
        assert row.sigma_max == pytest.approx(float(sigma[0]), rel=1e-5)
        assert row.condition_number == pytest.approx(float(sigma[0] / sigma[-1]), rel=1e-3)


def test_dora_magnitudes_without_factors_count(tmp_path: Path) -> None:
    """In DoRA, the rows can have other lengths even if B = 0."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = adapted(peft, use_dora=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    found = all_rows(model, include=["*lin*"])
    delta = found["base_model.model.lin.base_layer.weight:delta"]
    assert delta.status is wc.report.Status.zero
    assert "DoRA also rescales the rows of the sum" in delta.explanation
    assert found["base_model.model.lin.base_layer.weight:merged"].added_share != 0


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(entries(4, M, N))
        self.lin = nn.Linear(N, M)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = (x @ self.down_proj.mT).sum(0) + self.lin(x)
        return y


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.experts(x)
        return y


@pytest.mark.parametrize("target", ["experts.down_proj", "down_proj"])
def test_adapter_of_a_stack_is_not_one_matrix(target: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    if "target_parameters" not in signature(peft.LoraConfig).parameters:
        pytest.skip("this PEFT adapts no stacks")
    config = peft.LoraConfig(r=2, target_modules=["lin"], target_parameters=[target])
    model = peft.get_peft_model(Mixture(), config)
    model.save_pretrained(tmp_path / "adapter")
    for report in (wc.audit(model), wc.audit(tmp_path / "adapter")):
        of_stack = [f for f in report.findings if f.view == "delta" and "lin" not in f.name]
        assert of_stack
        assert all("a stack of matrices" in f.explanation for f in of_stack)
        assert len({f.label for f in report.findings}) == len(report.findings)


def test_weight_replaced_by_a_trained_copy_is_skipped(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["lin"], modules_to_save=["score"])
    report = wc.audit(peft.get_peft_model(Net(), config))
    names = {finding.name for finding in report.findings}
    assert "base_model.model.score.modules_to_save.default.weight" in names
    assert "base_model.model.score.original_module.weight" not in names
    why = report.coverage.skipped["base_model.model.score.original_module.weight"]
    assert "a trained copy instead" in str(why)


def peft_folder(kind: str, tmp_path: Path) -> tuple[Path, Path]:
    """An adapter of this type saved by PEFT, and the complete state dict of the adapted model."""
    peft = pytest.importorskip("peft")
    layers = {"target_modules": ["q_proj", "up"], "modules_to_save": ["head"]}
    configs: dict[str, Any] = {
        "OFT": lambda: peft.OFTConfig(r=8, oft_block_size=0, **layers),
        "BOFT": lambda: peft.BOFTConfig(boft_block_size=8, **layers),
        "IA3": lambda: peft.IA3Config(feedforward_modules=["up"], **layers),
        "HRA": lambda: peft.HRAConfig(**layers),
        "VBLORA": lambda: peft.VBLoRAConfig(
            vector_length=32, num_vectors=16, r=4, topk=2, **layers
        ),
        "POLY": lambda: peft.PolyConfig(r=4, **layers),
    }
    model = nn.Sequential()
    for name, shape in {"q_proj": (96, 96), "up": (96, 128), "head": (128, 4)}.items():
        model.add_module(name, nn.Linear(*shape))
    adapted = peft.get_peft_model(model, configs[kind]())
    adapted.save_pretrained(tmp_path / "adapter")
    torch.save(adapted.state_dict(), tmp_path / "whole.pt")
    return tmp_path / "adapter", tmp_path / "whole.pt"


OTHERS = ["OFT", "BOFT", "IA3", "HRA", "VBLORA", "POLY"]


@pytest.mark.frameworks
@pytest.mark.parametrize("kind", OTHERS)
def test_parameters_of_other_adapters_are_not_weights(kind: str, tmp_path: Path) -> None:
    """They are not measured, repaired or counted; only the saved copy of a layer is."""
    adapter, whole = peft_folder(kind, tmp_path)
    report = wc.audit(adapter)
    assert [f.label for f in report.findings] == ["base_model.model.head.weight"]
    tensors = load_file(adapter / "adapter_model.safetensors")
    own = {name for name in tensors if ".head." not in name and tensors[name].ndim > 1}
    for name in own:
        assert str(report.coverage.skipped[name]).startswith("a parameter of an adapter"), name
    total = sum(tensor.numel() for tensor in tensors.values())
    assert report.coverage.parameter_share == pytest.approx(4 * 128 / total)
    wc.repair(adapter, tmp_path / "fixed", max_condition=1.01)
    after = load_file(tmp_path / "fixed" / "adapter_model.safetensors")
    assert all(torch.equal(after[name], tensors[name]) for name in own)

    labels = {finding.label: finding for finding in wc.audit(whole).findings}
    assert not any(part in label for label in labels for part in ("oft_", "ia3", "hra"))
    q_proj = labels["base_model.model.q_proj.base_layer.weight"]
    assert "these numbers do not include the effect of" in q_proj.detail


@pytest.mark.frameworks
def test_live_weight_notes_its_adapter() -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential()
    model.add_module("q_proj", nn.Linear(96, 96))
    adapted = peft.get_peft_model(
        model, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    )
    (row,) = wc.audit(adapted).findings
    assert row.detail == "these numbers do not include the effect of IA3"
    adapted.merge_adapter()  # the weight now includes the adapter
    assert wc.audit(adapted).findings[0].detail == ""
    adapted.unmerge_adapter()
    with adapted.disable_adapter():
        assert wc.audit(adapted).findings[0].detail == ""


def test_unknown_adapter_type_is_recognised_by_its_config(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.q_proj.nova_core": entries(8, 8),
        "base_model.model.q_proj.nova_map.weight": entries(8, 8),
        "base_model.model.score.weight": entries(4, 7),
    }
    adapter = written(tmp_path / "adapter", tensors, {"peft_type": "NOVA"})
    report = wc.audit(adapter)
    assert [f.label for f in report.findings] == ["base_model.model.score.weight"]
    assert str(report.coverage.skipped["base_model.model.q_proj.nova_core"]).endswith(": NOVA")


# The names of a factor pair in kohya's scripts, LyCORIS, ComfyUI, and new and old diffusers.
SPELLINGS = [
    ("lora_unet_mid_block_to_q.lora_down.weight", "lora_unet_mid_block_to_q.lora_up.weight"),
    ("unet.mid.attn1.to_q.lora.down.weight", "unet.mid.attn1.to_q.lora.up.weight"),
    ("mid.attn1.processor.to_q_lora.down.weight", "mid.attn1.processor.to_q_lora.up.weight"),
    ("transformer.x.to_q.lora_A.weight", "transformer.x.to_q.lora_B.weight"),
    ("text.q_proj.lora_linear_layer.down.weight", "text.q_proj.lora_linear_layer.up.weight"),
    ("mid.to_q.lora_layer.down.weight", "mid.to_q.lora_layer.up.weight"),
    ("double.processor.proj_lora1.down.weight", "double.processor.proj_lora1.up.weight"),
]


@pytest.mark.parametrize(("down", "up"), SPELLINGS)
@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_spellings_of_a_factor_pair(
    down: str, up: str, kernel: tuple[int, ...], tmp_path: Path
) -> None:
    A, B = entries(R, N, *kernel, seed=1), entries(M, R, *[1] * len(kernel), seed=2)
    save_file({down: A, up: B}, tmp_path / "lora.safetensors")
    (row,) = wc.audit(tmp_path / "lora.safetensors").findings
    sigma = dense(B.double().flatten(1) @ A.double().flatten(1))
    assert row.view in ("delta", "delta.1")
    assert row.condition_number == pytest.approx(float(sigma[0] / sigma[R - 1]), rel=1e-9)
    assert "its scale is unknown" in row.detail
    with pytest.raises(ValueError, match="a factor of an adapter"):
        wc.repair(tmp_path / "lora.safetensors", tmp_path / "fixed.safetensors", 2)


def test_alpha_next_to_a_pair_sets_the_scale(tmp_path: Path) -> None:
    A, B = entries(R, N, seed=1), entries(M, R, seed=2)
    pair = {"x.lora_down.weight": A, "x.lora_up.weight": B, "x.alpha": torch.tensor(6.0)}
    save_file(pair, tmp_path / "lora.safetensors")
    (row,) = wc.audit(tmp_path / "lora.safetensors").findings
    assert row.sigma_max == pytest.approx(float(dense(6 / R * B.double() @ A.double())[0]))
    assert row.detail.endswith("its scale is alpha/r, with the alpha in the file")


@pytest.mark.parametrize("strange", [torch.tensor(math.nan), torch.ones(3), torch.tensor(3)])
def test_non_numeric_alpha_is_unknown(strange: Tensor, tmp_path: Path) -> None:
    A, B = entries(R, N, seed=1), entries(M, R, seed=2)
    pair = {"x.lora_down.weight": A, "x.lora_up.weight": B, "x.alpha": strange}
    save_file(pair, tmp_path / "lora.safetensors")
    (row,) = wc.audit(tmp_path / "lora.safetensors").findings
    known = strange.dtype == torch.int64
    assert ("its scale is unknown" in row.detail) is not known
    assert math.isfinite(row.condition_number)


@pytest.mark.parametrize("more", ["lora_mid.weight", "dora_scale"])
def test_more_than_a_pair_is_not_one_change(more: str, tmp_path: Path) -> None:
    tensors = {"x.lora_down.weight": entries(R, N), "x.lora_up.weight": entries(M, R)}
    save_file(tensors | {f"x.{more}": entries(R, R)}, tmp_path / "lora.safetensors")
    why = f"with {more.removesuffix('.weight')} in addition to A and B"
    with pytest.raises(ValueError, match=why):
        wc.audit(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("name", ["q.lora_A.weight", "q.lora_up.weight", "q.lora.down.weight"])
def test_single_factor_is_not_a_weight(name: str, tmp_path: Path) -> None:
    save_file({name: entries(R, N), "w.weight": entries(4, 7)}, tmp_path / "lora.safetensors")
    report = wc.audit(tmp_path / "lora.safetensors")
    assert [f.label for f in report.findings] == ["w.weight"]
    assert "its other factor is missing" in str(report.coverage.skipped[name])
    repaired = wc.repair(tmp_path / "lora.safetensors", tmp_path / "fixed.safetensors", 1.1)
    assert [one.label for one in repaired.changed] == ["w.weight"]


@pytest.mark.parametrize(
    "name",
    ["road_head.weight", "often.weight", "soft_r.weight", "miss_rate.weight", "hydra.weight"],
)
def test_names_resembling_adapters_are_weights(name: str, tmp_path: Path) -> None:
    save_file({name: entries(4, 7)}, tmp_path / "m.safetensors")
    assert [f.label for f in wc.audit(tmp_path / "m.safetensors").findings] == [name]


# The names that lycoris-lora 4.1.3 writes.
LYCORIS = {
    "LoHa with a core": {"hada_t1": (3, 3, 3, 3), "hada_w1_a": (3, 7), "hada_w1_b": (3, 10)},
    "LoKr without a part": {"lokr_w1": (6, 4), "lokr_w2_a": (8, 2)},
    "GLoRA": {f"{part}.weight": (4, 4) for part in ("a1", "a2", "b1", "b2")},
    "full": {"diff": (7, 10), "diff_b": (7,)},
    "diagonal OFT": {"oft_blocks": (12, 4, 4)},
}


@pytest.mark.parametrize("kind", LYCORIS)
@pytest.mark.parametrize("prefix", ["lycoris_q", "lora_unet_down_blocks_0_to_q"])
def test_lycoris_tensors_are_not_weights_except_pairs(
    kind: str, prefix: str, tmp_path: Path
) -> None:
    tensors = {f"{prefix}.{name}": entries(*shape) for name, shape in LYCORIS[kind].items()}
    tensors |= {f"{prefix}.alpha": torch.tensor(2.0)}
    tensors |= {f"{prefix}_k.lora_down.weight": entries(R, N, seed=4)}
    tensors |= {f"{prefix}_k.lora_up.weight": entries(M, R, seed=5)}
    save_file(tensors, tmp_path / "lora.safetensors")
    report = wc.audit(tmp_path / "lora.safetensors")
    assert [f.label for f in report.findings] == [f"{prefix}_k.weight:delta"]
    with pytest.raises(ValueError, match="must contain a weight matrix, but has none"):
        wc.repair(tmp_path / "lora.safetensors", tmp_path / "fixed.safetensors", 2)


def test_embedding_factors_are_not_weights(tmp_path: Path) -> None:
    tensors = {
        "model.wte.lora_embedding_A.default": entries(R, 20),
        "model.wte.lora_embedding_B.default": entries(N, R),
        "w.weight": entries(4, 7),
    }
    torch.save(tensors, tmp_path / "m.pt")
    assert [f.label for f in wc.audit(tmp_path / "m.pt").findings] == ["w.weight"]
