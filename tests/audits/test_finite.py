"""NaN and infinity are found in norms, biases, embeddings, positions, buffers and scalars."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import wellcond as wc
from wellcond.audits import finite
from wellcond.cli import main
from wellcond.files.checkpoint import Checkpoint
from wellcond.files.safetensors import Safetensors
from wellcond.report.not_finite import NotFinite

NAN, INF = math.nan, math.inf


def state() -> dict[str, Tensor]:
    """Every kind of tensor that is not a measured matrix, and one measured matrix."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "fc.weight": torch.eye(8),
        "fc.bias": normal(8),
        "norm.weight": normal(8).bfloat16(),
        "norm.running_var": normal(8).half(),
        "embed_tokens.weight": normal(20, 8),
        "wpe.weight": normal(16, 8),
        "pos_embed": normal(1, 17, 8),
        "scale": torch.tensor(1.0),
        "rope.inv_freq": normal(4).double(),
        "wave": torch.complex(normal(3, 3), normal(3, 3)),
        "codes.weight": normal(8, 8).to(torch.float8_e4m3fn),
        "codes.weight_scale_inv": normal(1, 1),
    }


def saved(folder: Path, kind: str, content: dict[str, Any]) -> Path:
    path = folder / f"model.{kind.split()[-1]}"
    if kind == "safetensors":
        save_file(content, path)
    elif kind == "legacy pt":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(content, path)
    return path


def broken(tensor: Tensor, value: float) -> Tensor:
    """A copy with this value as its last entry."""
    copy = tensor.clone()
    copy.view(-1)[-1] = torch.tensor(value).to(tensor.dtype)
    return copy


KINDS = ["safetensors", "pt", "legacy pt"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", state())
def test_every_tensor_of_a_file_is_searched(tmp_path: Path, kind: str, name: str) -> None:
    content = state()
    if kind == "legacy pt":  # a format that is older than float8
        name = "fc.bias" if "codes" in name else name
        content = {n: tensor for n, tensor in content.items() if "codes" not in n}
    assert wc.audit(saved(tmp_path, kind, content)).not_finite == {}
    bad = content | {name: broken(content[name], NAN)}
    if kind == "safetensors":
        (tmp_path / "model.safetensors").unlink()
    path = saved(tmp_path, kind, bad)
    if name == "fc.weight":
        content["other"] = bad["other"] = torch.eye(2)
        path = saved(tmp_path, kind, bad)
    report = wc.audit(path)
    assert report.not_finite == {name: NotFinite(1, 0, content[name].numel())}
    assert f"1 tensor contains NaN or infinity: {name} (1 NaN of" in report.table()
    assert report.to_dict()["not_finite"][0]["name"] == name
    assert f"{name} (1 NaN of" in report.to_html().replace("<wbr>", "")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("table", torch.ones(3, 3), persistent=False)
        self.register_buffer("brain", torch.ones(3).bfloat16())
        self.register_buffer("rows", torch.eye(3).to_sparse_csr())
        self.register_buffer("pairs", torch.eye(3).to_sparse())
        self.register_buffer("wide", torch.ones(1, 1).expand(1 << 20, 1 << 20))


MODEL = dict([*Model().named_parameters(), *Model().named_buffers()])
FLOATS = [n for n, t in MODEL.items() if t.is_floating_point() and t.layout is torch.strided]


@pytest.mark.parametrize("name", [name for name in FLOATS if name not in ("wide", "fc.weight")])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_every_tensor_of_a_model_is_searched(name: str, value: float) -> None:
    model = Model()
    tensor = dict([*model.named_parameters(), *model.named_buffers()])[name]
    tensor.data.view(-1)[0] = value
    counts = NotFinite(int(math.isnan(value)), int(math.isinf(value)), tensor.numel())
    meant = value == -INF and name in ("table", "brain")  # buffers that can be masks
    assert wc.audit(model).not_finite == ({} if meant else {name: counts})


def test_other_layouts_are_searched() -> None:
    model = Model()
    assert wc.audit(model).not_finite == {}
    model.rows.values()[1] = NAN
    model.pairs._values()[:2] = INF
    model.wide.as_strided((1,), (1,))[0] = NAN
    found = wc.audit(model).not_finite
    assert {name: str(one) for name, one in found.items()} == {
        "rows": "1 NaN of 3 entries",
        "pairs": "2 infinite of 3 entries",
        "wide": "1 NaN of 1 entries",
    }


def test_nonfinite_matrices_keep_their_rows(tmp_path: Path) -> None:
    stack = torch.randn(3, 4, 5)
    stack[0, 0, 0], stack[2, 1, :2] = NAN, -INF
    torch.save({"stack": stack, "w": torch.eye(3)}, tmp_path / "a.pt")
    report = wc.audit(tmp_path / "a.pt")
    assert report.not_finite == {"stack": NotFinite(1, 2, 60)}
    rows = {f.label for f in report.findings if f.status is wc.report.Status.not_finite}
    assert rows == {"stack:0", "stack:2"}
    assert len(report.findings) == 4


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("attn.attn_mask", [0.0, -INF]),
        ("causal_mask", [-INF, -INF]),
        ("mask", [0.0, -INF]),
        ("masked_bias", [-1e9]),
        ("attn.causal", [0.0, -INF]),
        ("attn_bias", [0.0, -INF]),
        ("activation_post_process_0.min_val", [INF]),
        ("activation_post_process_0.max_val", [-INF]),
        ("space.low", [-INF, -1.0]),
        ("best_loss", [INF]),
    ],
)
def test_infinity_by_design_is_ignored(name: str, values: list[float]) -> None:
    model = nn.Module()
    model.fc = nn.Linear(3, 3)
    *path, last = name.split(".")
    owner = model
    for part in path:
        owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    owner.register_buffer(last, torch.tensor(values))
    assert wc.audit(model).not_finite == {}
    owner.get_buffer(last)[0] = NAN
    assert list(wc.audit(model).not_finite) == [name]


BOUNDS = ["low", "high", "min", "max", "lower", "upper", "bound", "best"]


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.parametrize("name", [f"l.{word}_rank_U" for word in BOUNDS] + ["l.mask_proj"])
def test_infinity_in_a_measured_matrix_is_reported(tmp_path: Path, name: str, kind: str) -> None:
    matrix = torch.eye(8, 4)
    matrix[0, 0] = -INF
    other = {"l.weight": torch.eye(8)}
    baseline = tmp_path / "baseline.json"
    baseline.write_text(wc.audit(saved(tmp_path, "pt", other)).to_json())
    path = saved(tmp_path, kind, {name: matrix, **other})
    assert wc.audit(path).not_finite == {name: NotFinite(0, 1, 32)}
    for gate in (["--min-coverage", "0.5"], ["--baseline", str(baseline)]):
        assert main(["audit", str(path), *gate]) == 1
    report = wc.repair(path, tmp_path / f"fixed{path.suffix}", 2.0, exclude=name)
    assert list(report.not_finite) == [name]


def test_infinity_in_adapter_factors_is_reported(tmp_path: Path) -> None:
    """PEFT writes the name of the adapter at the end."""
    B = torch.full((6, 2), INF)
    factors = {"e.lora_embedding_A.best": torch.randn(2, 9), "e.lora_embedding_B.best": B}
    found = wc.audit(saved(tmp_path, "pt", {"w": torch.eye(3), **factors})).not_finite
    assert list(found) == ["e.lora_embedding_B.best"]


@pytest.mark.parametrize("name", ["tril", "bias", "alibi", "future", "neg_inf", "0.weight_bias"])
def test_minus_infinity_in_a_buffer_is_a_mask(name: str) -> None:
    model = nn.ModuleDict({"0": nn.Linear(3, 3)})
    path, _, own = name.rpartition(".")
    owner = model.get_submodule(path)
    owner.register_buffer(own, torch.full((4, 4), -INF).triu(1))
    assert wc.audit(model).not_finite == {}
    for value in (INF, NAN):
        owner.get_buffer(own)[0] = value
        assert list(wc.audit(model).not_finite) == [name]


class ActNorm(nn.Module):
    """A normalisation whose statistics have unusual names."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(4))
        self.register_buffer("running_cov", torch.zeros(4, 4))
        self.register_buffer("future", torch.zeros(4, 4))


@pytest.mark.parametrize("make", [ActNorm, lambda: nn.BatchNorm1d(4), lambda: nn.InstanceNorm1d(4)])
def test_infinity_in_norm_statistics_is_reported(make: Callable[[], nn.Module]) -> None:
    norm = make()
    model = nn.Sequential(nn.Linear(4, 4), norm)
    for name, buffer in norm.named_buffers():
        if buffer.is_floating_point():
            buffer.view(-1)[2] = -INF
            assert list(wc.audit(model).not_finite) == [f"1.{name}"] * (name != "future")
            buffer.zero_()


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_square_table_in_a_file_can_be_a_mask(tmp_path: Path, kind: str) -> None:
    masks = {"tril": torch.full((4, 4), -INF).triu(1), "a.triu": torch.full((1, 4, 4), -INF)}
    content = {"w": torch.eye(3), **masks}
    assert wc.audit(saved(tmp_path, kind, content)).not_finite == {}
    statistics = {
        "norm.running_mean": torch.tensor([0, 0, -INF, 0]),
        "norm.running_var": torch.full((2, 2), -INF),
        "mel_basis": torch.full((3, 4), -INF),
    }
    content = {"w": torch.eye(3), **statistics}
    assert set(wc.audit(saved(tmp_path, kind, content)).not_finite) == set(statistics)


@pytest.mark.parametrize("beside", [{}, {"path": Path("x")}])
def test_unconvertible_dtypes_are_not_searched(tmp_path: Path, beside: dict[str, Any]) -> None:
    pairs = torch.zeros(4, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    path = saved(tmp_path, "pt", {"pairs": pairs, "w": torch.eye(4), **beside})
    assert [f.status.name for f in wc.audit(path).findings] == ["ok"]
    assert main(["audit", str(path), "--max-condition", "9", "--min-coverage", "0.5"]) == 0
    model = nn.Linear(4, 4)
    model.register_buffer("pairs", pairs)
    assert wc.audit(model).not_finite == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beside", [{}, {"path": Path("x")}])
def test_tensors_without_entries_are_read(
    tmp_path: Path, kind: str, beside: dict[str, Any]
) -> None:
    """For example, the alpha of an adapter."""
    factors = {"lora_unet_x.lora_down.weight": torch.eye(2, 6)}
    factors["lora_unet_x.lora_up.weight"] = torch.eye(6, 2)
    content = {**factors, "lora_unet_x.alpha": torch.zeros(0), "none.weight": torch.zeros(0, 3)}
    report = wc.audit(saved(tmp_path, kind, content | (beside if kind != "safetensors" else {})))
    assert [finding.name for finding in report.findings] == ["lora_unet_x.weight"]
    assert report.not_finite == {}


@pytest.mark.parametrize("name", ["attn_mask", "mask.weight", "max.bias", "alibi", "running_max_w"])
def test_other_infinities_are_reported(name: str) -> None:
    plus = name == "attn_mask"  # in a mask, only -inf is by design
    tensor = torch.tensor([1.0, INF if plus else -INF])
    expected = {} if name == "running_max_w" else {name: NotFinite(0, 1, 2)}
    for pieces in ([tensor], [*tensor.split(1)]):
        assert finite.not_finite_in({name: lambda p=pieces: p}) == (expected, {})


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.parametrize("entries", [1, 63, 64, 65, 1000])
def test_tensor_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, entries: int
) -> None:
    """Tensors of all sizes are read in pieces."""
    monkeypatch.setattr("wellcond.files.tensors._PIECE", 256)
    bias = torch.arange(float(entries))
    bias[-1] = NAN
    path = saved(tmp_path, kind, {"w": torch.eye(3), "bias": bias})
    (file,) = Checkpoint(path).files.values()
    pieces = list(file.pieces("bias"))
    assert len(pieces) == -(-entries // 64)
    assert torch.equal(torch.cat(pieces).nan_to_num(7.0), bias.nan_to_num(7.0))
    assert wc.audit(path).not_finite == {"bias": NotFinite(1, 0, entries)}


def test_measured_tensors_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"w": torch.eye(3), "b": torch.ones(3)}, tmp_path / "a.safetensors")
    searched = []
    pieces = Safetensors.pieces

    def spy(self: Safetensors, name: str) -> Any:
        searched.append(name)
        return pieces(self, name)

    monkeypatch.setattr(Safetensors, "pieces", spy)
    wc.audit(tmp_path / "a.safetensors")
    assert searched == ["b"]


def test_patterns_limit_the_search(tmp_path: Path) -> None:
    bad = {"a.weight": torch.eye(2), "b.weight": torch.eye(2), "b.bias": torch.full((2,), NAN)}
    torch.save(bad, tmp_path / "a.pt")
    assert list(wc.audit(tmp_path / "a.pt").not_finite) == ["b.bias"]
    assert wc.audit(tmp_path / "a.pt", include="a.*").not_finite == {}
    assert wc.audit(tmp_path / "a.pt", exclude="b.bias").not_finite == {}
    assert wc.audit(tmp_path / "a.pt", exclude=["*.bias"]).coverage.measured == 2


def test_unreadable_tensor_becomes_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path, "safetensors", {"w": torch.eye(3), "b": torch.ones(3)})

    def fail(self: Safetensors, name: str) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Safetensors, "pieces", fail)
    report = wc.audit(path)
    assert [(f.name, f.status.name) for f in report.findings] == [("b", "failed"), ("w", "ok")]
    assert (report.coverage.measured, report.coverage.failed) == (1, 1)
    assert main(["audit", str(path)]) == 0
    assert f"warning: {path}: 1 could not be measured: b (OSError:" in capsys.readouterr().err
    for gate in (["--max-condition", "9"], ["--min-coverage", "0.1"]):
        assert main(["audit", str(path), *gate]) == 1


@pytest.fixture
def sick(tmp_path: Path) -> Path:
    content = {"w": torch.diag(torch.tensor([9.0, 1.0])), "norm.weight": torch.tensor([1.0, INF])}
    torch.save(content, tmp_path / "sick.pt")
    return tmp_path / "sick.pt"


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    content = {"w": torch.diag(torch.tensor([9.0, 1.0])), "norm.weight": torch.ones(2)}
    torch.save(content, tmp_path / "sound.pt")
    return tmp_path / "sound.pt"


def test_every_gate_fails(sick: Path, sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baseline = sick.with_name("baseline.json")
    baseline.write_text(wc.audit(sound).to_json())
    gates = [
        ["--max-condition", "10"],
        ["--min-coverage", "0.1"],
        ["--baseline", str(baseline)],
    ]
    line = f"{sick}: 1 tensor contains NaN or infinity: norm.weight (1 infinite of 2 entries)"
    for gate in gates:
        assert main(["audit", str(sound), *gate]) == 0
        assert capsys.readouterr().err == ""
        assert main(["audit", str(sick), *gate]) == 1
        assert capsys.readouterr().err == f"wellcond: {line}\n"
    assert main(["audit", str(sick)]) == 0
    assert capsys.readouterr().err == f"wellcond: warning: {line}\n"


def test_comparison_reports_the_later_side(
    sick: Path, sound: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = ["--max-condition", "10"]
    assert main(["audit", str(sick), "--compare", str(sound), *gate]) == 0
    out, err = capsys.readouterr()
    assert f"In {sick.name}, 1 tensor contains NaN or infinity: norm.weight" in out
    assert err == ""
    assert main(["audit", str(sound), "--compare", str(sick), *gate, "--json"]) == 1
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["not_finite_before"] == []
    assert document["not_finite_after"] == [
        {"name": "norm.weight", "nan": 0, "infinite": 1, "entries": 2}
    ]
    assert "norm.weight" in err


@pytest.mark.parametrize("kind", KINDS)
def test_repair_names_copied_nonfinite_tensors(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {
        "w": torch.diag(torch.tensor([9.0, 1.0])),
        "v": torch.full((2, 2), NAN),
        "norm.weight": torch.tensor([1.0, INF]),
    }
    path = saved(tmp_path, kind, content)
    fixed = tmp_path / f"fixed{path.suffix}"
    with pytest.raises(ValueError, match="v contains NaN"):
        wc.repair(path, fixed, 2.0)
    report = wc.repair(path, fixed, 2.0, exclude="v")
    assert report.not_finite == {"v": NotFinite(4, 0, 4), "norm.weight": NotFinite(0, 1, 2)}
    assert "2 tensors contain NaN or infinity: " in report.table()
    assert "v (4 NaN of 4 entries)" in report.table()
    assert {one["name"] for one in report.to_dict()["not_finite"]} == {"v", "norm.weight"}
    fixed.unlink()
    assert main(["repair", str(path), str(fixed), "--max-condition", "2", "--exclude", "v"]) == 0
    assert "warning: copied: 2 tensors contain NaN or infinity" in capsys.readouterr().err


def test_nonfinite_factors_and_base_are_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    adapter, base = tmp_path / "adapter.safetensors", tmp_path / "base.safetensors"
    A, B = torch.randn(2, 6), torch.randn(5, 2)
    W = torch.randn(5, 6)
    A[1, 3], W[0, 0] = INF, NAN
    factors = {f"{layer}.lora_{x}.weight": F for layer in "qv" for x, F in (("A", A), ("B", B))}
    factors["v.lora_A.weight"] = torch.randn(2, 6)
    save_file({name: factor.clone() for name, factor in factors.items()}, adapter)
    save_file({"k.weight": W, "v.weight": torch.ones(5, 6), "q.weight": W.clone()}, base)
    report = wc.audit(adapter, base=base)
    assert report.not_finite == {
        "q.lora_A.weight": NotFinite(0, 1, 12),
        "q.weight": NotFinite(1, 0, 30),  # only the adapted weights of the base
    }


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(3), lambda: nn.Linear(3, 3, device="meta")])
def test_tensors_without_values_are_ignored(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), make())
    assert wc.audit(model).not_finite == {}


def test_shared_parts_are_searched_once(tmp_path: Path) -> None:
    whole = torch.ones(4, 4)
    whole[0, 0] = NAN
    content = {"w": torch.eye(2), "whole": whole, "tied": whole, "part": whole[:2]}
    torch.save(content, tmp_path / "a.pt")
    assert wc.audit(tmp_path / "a.pt").not_finite == {"whole": NotFinite(1, 0, 16)}
