"""Audits of LoHa, LoKr, VeRA and RandLoRA, compared with merges by PEFT, and of kohya files."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import wellcond as wc

DATA = Path(__file__).parent / "data" / "adapters"
KINDS = sorted(folder.name for folder in DATA.iterdir())
M, N, R = 6, 8, 2


def entries(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def singular_values(S: Tensor) -> Tensor:
    return torch.linalg.svdvals(S.double().flatten(1))


def rows(report: wc.AuditReport) -> dict[str, wc.report.Finding]:
    return {finding.label: finding for finding in report.findings}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of an adapter saved by PEFT, without the bases next to it."""
    name: str = request.param
    (tmp_path / "adapter").mkdir()
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "adapter" / file).write_bytes((DATA / name / file).read_bytes())
    return DATA / name


def test_merged_weights_match_peft(kind: Path, tmp_path: Path) -> None:
    found = rows(wc.audit(tmp_path / "adapter", base=kind / "base.safetensors"))
    before, after = (load_file(kind / f"{one}.safetensors") for one in ("base", "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {finding.name for finding in found.values()} == changed
    assert len(found) == len(changed)
    for label, finding in found.items():
        W, merged = before[finding.name].double(), after[finding.name].double()
        assert label == f"{finding.name}:{'kernel:' if W.ndim > 2 else ''}merged"
        sigma = singular_values(merged)
        assert finding.sigma_max == pytest.approx(float(sigma[0]), rel=1e-5)
        assert finding.sigma_min == pytest.approx(float(sigma[-1]), rel=1e-3)
        assert finding.delta_share == pytest.approx(float((merged - W).norm() / W.norm()), rel=1e-5)
        top = singular_values(merged - W)
        stable = float(top.square().sum() / top[0] ** 2)
        assert finding.delta_stable_rank == pytest.approx(stable, rel=1e-4)
        assert finding.delta_rank >= int((top > 1e-5 * top[0]).sum())
        assert finding.rounded_condition_number == pytest.approx(finding.condition_number, rel=1e-3)


def test_delta_is_measured_without_base_if_known(kind: Path, tmp_path: Path) -> None:
    before, after = (load_file(kind / f"{one}.safetensors") for one in ("base", "merged"))
    if kind.name in ("vera", "randlora"):
        with pytest.raises(ValueError, match="do not give its number of inputs"):
            wc.audit(tmp_path / "adapter")
        return
    report = wc.audit(tmp_path / "adapter")
    assert report.coverage.parameter_share == 1
    for finding in report.findings:
        sigma = singular_values(after[finding.name].double() - before[finding.name].double())
        assert finding.view == "delta"
        assert finding.sigma_max == pytest.approx(float(sigma[0]), rel=1e-5)
        assert finding.sigma_min == pytest.approx(float(sigma[finding.nu - 1]), rel=1e-3, abs=1e-5)


def test_repair_keeps_adapter_tensors(kind: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must contain a weight matrix, but has none"):
        wc.repair(tmp_path / "adapter", tmp_path / "fixed", 2)


def test_tensor_with_nan_is_named(kind: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if not name.endswith(("_A", "_B")))
    tensors[name].view(-1)[0] = math.nan
    save_file(tensors, path)
    if kind.name == "lokr_core":  # this adapter adapts nothing else
        with pytest.raises(ValueError, match=f"1 of 9 entries of {name}"):
            wc.audit(tmp_path / "adapter", base=kind / "base.safetensors")
        return
    report = wc.audit(tmp_path / "adapter", base=kind / "base.safetensors")
    said = [f.detail for f in report.findings if f.status is wc.report.Status.not_finite]
    assert said
    assert all(f"1 of {tensors[name].numel()} entries of {name}" in one for one in said)
    assert name in report.not_finite


@pytest.mark.parametrize("kind", ["vera", "randlora"], indirect=True)
def test_missing_shared_projections_are_a_reason(kind: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    left = {n: t for n, t in load_file(path).items() if not n.endswith(("_A", "_B"))}
    save_file(left, path)
    with pytest.raises(ValueError, match=r"_A and \w+_B, which all layers share, were not saved"):
        wc.audit(tmp_path / "adapter", base=kind / "base.safetensors")


@pytest.mark.parametrize("kind", ["loha", "lokr", "randlora"], indirect=True)
def test_no_merged_weight_without_alpha(kind: Path, tmp_path: Path) -> None:
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    kept = {key: one for key, one in config.items() if "alpha" not in key}
    path.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=r"must yield a merged weight .* its scale is unknown"):
        wc.audit(tmp_path / "adapter", base=kind / "base.safetensors")


@pytest.mark.frameworks
@pytest.mark.parametrize("name", ["LoHaConfig", "LoKrConfig", "VeraConfig", "RandLoraConfig"])
def test_model_in_memory_matches_the_file(name: str) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("q_proj", nn.Linear(12, 9))
    adapted = peft.get_peft_model(model, getattr(peft, name)(r=2, target_modules=["q_proj"]))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    before = model.q_proj.base_layer.weight.detach().double().clone()
    report = wc.audit(adapted)
    (row,) = report.findings
    assert row.label == "base_model.model.q_proj.base_layer.weight:merged"
    assert not [why for why in report.coverage.skipped.values() if not why.reason.no_matrix]
    adapted.merge_adapter()
    merged = model.q_proj.base_layer.weight.detach().double()
    sigma = singular_values(merged)
    assert row.sigma_max == pytest.approx(float(sigma[0]), rel=1e-5)
    share = float((merged - before).norm() / before.norm())
    assert row.delta_share == pytest.approx(share, rel=1e-5)
    assert wc.audit(adapted).findings[-1].sigma_max > 0


# --- kohya, LyCORIS, ComfyUI ----------------------------------------------------------------------


def kron(*parts: Tensor) -> Tensor:
    return torch.kron(*(part.double().contiguous() for part in parts))


def of_files() -> dict[str, tuple[dict[str, Tensor], Tensor]]:
    """The tensors of a module, and the explicit change that they represent."""
    up, down = entries(M, R, seed=1), entries(R, N, seed=2)
    mid, kernel = entries(R, R, 3, 3, seed=3), entries(R, N, 3, 3, seed=4)
    alpha = {"alpha": torch.tensor(3.0)}
    pair = {"lora_up.weight": up, "lora_down.weight": down}
    conv = {"lora_up.weight": up[..., None, None], "lora_down.weight": kernel}
    core = {
        "lora_up.weight": up[..., None, None],
        "lora_mid.weight": mid,
        "lora_down.weight": down[..., None, None],
    }
    a, b = [entries(M, R, seed=i) for i in (5, 6)], [entries(R, N, seed=i) for i in (7, 8)]
    loha = {f"hada_w{i + 1}_{x}": t[i] for i in (0, 1) for x, t in (("a", a), ("b", b))}
    w1, w2 = entries(2, 4, seed=9), entries(3, 2, 3, 3, seed=10)
    w2_a, w2_b = entries(3, R, seed=11), entries(R, 2, seed=12)
    tensors = {
        "linear": (pair | alpha, 1.5 * up.double() @ down.double()),
        "convolution": (
            conv | alpha,
            1.5 * torch.einsum("or,rihw->oihw", up.double(), kernel.double()),
        ),
        "core": (
            core | alpha,
            1.5 * torch.einsum("op,pqhw,qi->oihw", up.double(), mid.double(), down.double()),
        ),
        "LoHa": (loha | alpha, 1.5 * (a[0].double() @ b[0].double()) * (a[1] @ b[1]).double()),
        "whole LoKr": (
            {"lokr_w1": w1, "lokr_w2": w2} | alpha,  # the scale is 1 whatever alpha is
            torch.einsum("ab,cdhw->acbdhw", w1.double(), w2.double()).reshape(M, N, 3, 3),
        ),
        "LoKr": (
            {"lokr_w1": w1, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b} | alpha,
            1.5 * kron(w1, w2_a.double() @ w2_b.double()),
        ),
    }
    return tensors


@pytest.mark.parametrize("kind", of_files())
@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
def test_kohya_and_lycoris_files_match_explicit_changes(
    kind: str, prefix: str, tmp_path: Path
) -> None:
    tensors, change = of_files()[kind]
    file, base = tmp_path / "lora.safetensors", tmp_path / "base.safetensors"
    module = f"{prefix}down_blocks_0_attentions_1_to_q"
    save_file({f"{module}.{name}": t.contiguous() for name, t in tensors.items()}, file)
    W = entries(*change.shape, seed=20)
    save_file({"down_blocks.0.attentions.1.to_q.weight": W, "mid.to_q.weight": W + 1}, base)
    (row,) = wc.audit(file, base=base).findings
    assert row.name == "down_blocks.0.attentions.1.to_q.weight"
    merged = W.double() + change
    sigma = singular_values(merged)
    assert row.sigma_max == pytest.approx(float(sigma[0]), rel=1e-6)
    assert row.sigma_min == pytest.approx(float(sigma[-1]), rel=1e-5)
    assert row.delta_share == pytest.approx(float(change.norm() / W.double().norm()), rel=1e-6)
    (alone,) = wc.audit(file).findings
    top = singular_values(change)
    assert alone.sigma_max == pytest.approx(float(top[0]), rel=1e-6)
    assert alone.stable_rank == pytest.approx(float(top.square().sum() / top[0] ** 2), rel=1e-5)


MORE = [
    ("LoHa", "scalar", "with scalar in addition to its factors, it is not a known LoHa"),
    ("LoKr", "dora_scale", "with dora_scale in addition to its factors, it is not a known LoKr"),
]


@pytest.mark.parametrize(("kind", "more", "why"), MORE)
def test_extra_tensors_are_not_measured_as_one_form(
    kind: str, more: str, why: str, tmp_path: Path
) -> None:
    tensors = of_files()[kind][0] | {more: entries(M, 1)}
    save_file({f"lycoris_q.{n}": t for n, t in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=why):
        wc.audit(tmp_path / "a.safetensors")


def test_mismatched_tensors_are_a_reason(tmp_path: Path) -> None:
    tensors: dict[str, Any] = of_files()["LoHa"][0] | {"hada_w1_a": entries(M + 1, R)}
    save_file({f"lycoris_q.{n}": t for n, t in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"have incompatible shapes: hada_w1_a \(7, 2\), "):
        wc.audit(tmp_path / "a.safetensors")


def test_ambiguous_flat_path_matches_nothing(tmp_path: Path) -> None:
    tensors = {f"lora_te_q.{n}": t for n, t in of_files()["linear"][0].items()}
    save_file(tensors, tmp_path / "lora.safetensors")
    W = entries(M, N)
    save_file({"a.q.weight": W, "b.q.weight": W + 1}, tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match="must contain the weights"):
        wc.audit(tmp_path / "lora.safetensors", base=tmp_path / "base.safetensors")
    save_file({"a.q.weight": W, "b.r.weight": W + 1}, tmp_path / "one.safetensors")
    (row,) = wc.audit(tmp_path / "lora.safetensors", base=tmp_path / "one.safetensors").findings
    assert row.label == "a.q.weight:merged"
