"""An audit of heads: additional rows with the singular values that can be nonzero."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import wellcond as wc
from wellcond.audits.progress import Progress
from wellcond.cli import main


def made(width: int = 12, heads: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, heads, 16, batch_first=True)
    return nn.Sequential(layer, nn.Linear(width, 2))


def test_heads_add_rows_to_those_of_the_weights() -> None:
    model = made()
    plain, report = wc.audit(model), wc.audit(model, heads=True)
    rows = {f.label: f for f in report.findings}
    heads = {f"0.self_attn:{kind}{h}" for kind in ("qk", "vo") for h in range(3)}
    assert set(rows) == {f.label for f in plain.findings} | heads
    assert str(report.coverage) == str(plain.coverage)
    assert report.coverage == plain.coverage
    others = [f for f in report.findings if f.label not in heads]
    assert list(map(repr, others)) == list(map(repr, plain.findings))  # nan does not equal nan
    attention = model[0].self_attn
    W_Q, W_K, W_V = (block.double() for block in attention.in_proj_weight.detach().chunk(3))
    W_O = attention.out_proj.weight.detach().double()
    rows_of = {h: slice(4 * h, 4 * h + 4) for h in range(3)}
    for h, own in rows_of.items():
        for kind, S in (("qk", W_Q[own].mT @ W_K[own]), ("vo", W_O[:, own] @ W_V[own])):
            sigma = torch.linalg.svdvals(S)[:4]
            found = rows[f"0.self_attn:{kind}{h}"]
            assert found.name == "0.self_attn"
            assert found.shape == (12, 12)
            assert found.dtype == "float32"
            assert found.singular_values == pytest.approx(sigma.tolist())
            assert found.condition_number == pytest.approx(float(sigma[0] / sigma[-1]))
            assert found.stable_rank == pytest.approx(float(S.square().sum() / sigma[0] ** 2))
            r = float(sigma[0] ** 2 / 2 - S.square().sum() / 8)
            assert found.penalty == pytest.approx(r)
            assert found.rank == 4
            assert found.grade is wc.report.Grade.computed
            assert "of the leading 4 singular values" in found.explanation
    assert "0.self_attn:qk1" in report.table()
    assert "qk1" in report.to_html()


def test_patterns_select_heads() -> None:
    model = made()

    def labels(**patterns: list[str]) -> set[str]:
        return {f.label for f in wc.audit(model, heads=True, **patterns).findings}

    assert labels(include=["*:qk?"]) == {f"0.self_attn:qk{h}" for h in range(3)}
    assert labels(include=["*:qk1", "1.weight"]) == {"0.self_attn:qk1", "1.weight"}
    assert labels(include=["0.self_attn"], exclude=["*:vo*"]) == {
        f"0.self_attn:qk{h}" for h in range(3)
    }
    assert labels(exclude=["0.self_attn"]) == {f.label for f in wc.audit(model).findings}
    with pytest.raises(ValueError, match=r"no weight matches \*:qk9"):
        labels(include=["*:qk9"])


def test_progress_includes_attention_modules() -> None:
    seen: list[Progress] = []
    wc.audit(made(), heads=True, progress=seen.append)
    assert (seen[-1].name, seen[-1].number) == ("0.self_attn", 6)
    assert [(step.number, step.total) for step in seen] == [(n, 6) for n in range(1, 7)]
    seen.clear()
    wc.audit(made(), heads=True, progress=seen.append, include=["*.weight"])
    assert {step.total for step in seen} == {len(seen)}, "heads that nobody asked for do not count"


def test_error_of_a_head_is_its_status() -> None:
    model = made()
    attention = model[0].self_attn
    with torch.no_grad():
        attention.in_proj_weight[0:4] = 0  # the queries of head 0
        attention.in_proj_weight[12 + 4] = 0  # a key of head 1
        attention.in_proj_weight[24 + 8, 0] = math.nan  # a value of head 2
    report = wc.audit(model, heads=True, certify=True)
    rows = {f.view: f for f in report.findings if f.name == "0.self_attn"}
    assert rows["qk0"].status is wc.report.Status.zero
    assert math.isnan(rows["qk0"].condition_number)
    assert rows["qk1"].status is wc.report.Status.rank_deficient
    assert rows["qk1"].condition_number == math.inf
    assert rows["qk1"].rank == 3
    assert rows["vo2"].status is wc.report.Status.not_finite
    assert rows["vo2"].explanation.endswith("entries of its factor A")
    assert rows["vo1"].status is wc.report.Status.ok
    assert rows["vo1"].certificate is None


def test_unknown_heads_are_rows_with_a_reason() -> None:
    model = made()
    model[0].self_attn = nn.Module()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(model[0].self_attn, name, nn.Linear(12, 12))
    report = wc.audit(model, heads=True)
    (row,) = (f for f in report.findings if f.name == "0.self_attn")
    assert row.label == "0.self_attn:heads"
    assert row.status is wc.report.Status.failed
    assert row.detail == "the number of its heads is unknown"
    assert "the number of its heads is unknown" in report.table()
    assert report.coverage.failed == 0


def test_unreadable_head_fails_separately() -> None:
    model = made()
    model[0].self_attn.out_proj.to("meta")
    rows = {f.label: f for f in wc.audit(model, heads=True).findings}
    assert rows["0.self_attn:vo2"].status is wc.report.Status.failed
    assert rows["0.self_attn:qk2"].status is wc.report.Status.ok


def test_reading_heads_does_not_change_the_coverage() -> None:
    model = made()
    nn.utils.parametrizations.spectral_norm(model[0].self_attn, "in_proj_weight")
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = {f.label: f for f in wc.audit(model, heads=True).findings}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    W = model[0].self_attn.in_proj_weight.detach().double()
    sigma = torch.linalg.svdvals(W[:4].mT @ W[12:16])
    assert rows["0.self_attn:qk0"].sigma_max == pytest.approx(float(sigma[0]), rel=1e-5)


def test_model_without_heads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="but none were recognised in Linear"):
        wc.audit(nn.Linear(3, 3), heads=True)
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"but none were recognised in .*model.pt"):
        wc.audit(tmp_path / "model.pt", heads=True)


class Grouped(nn.Module):
    """Grouped attention with two queries per key, as in most language models."""

    def __init__(self, head_dim: int = 5) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = 4, 2
        self.q_proj = nn.Linear(12, 4 * head_dim, bias=False)
        self.k_proj = nn.Linear(12, 2 * head_dim, bias=False)
        self.v_proj = nn.Linear(12, 2 * head_dim, bias=False)
        self.o_proj = nn.Linear(4 * head_dim, 12, bias=False)
        self.q_norm = nn.LayerNorm(head_dim, bias=False)


CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 5, "hidden_size": 12}


def stored(path: Path, config: object = None) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict({"0": nn.ModuleDict({"self_attn": Grouped()})})
    torch.save(model.state_dict(), path / "model.pt")
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (path / "config.json").write_text(text)
    return model


@pytest.mark.parametrize("whole", [True, False])
def test_file_and_model_agree(tmp_path: Path, whole: bool) -> None:
    model = stored(tmp_path, CONFIG | {"rope_theta": 1e4})
    path = tmp_path if whole else tmp_path / "model.pt"
    plain, found, expected = wc.audit(path), wc.audit(path, heads=True), wc.audit(model, heads=True)
    assert found.coverage == plain.coverage
    rows = {f.label: f for f in found.findings}
    assert len(rows) == 4 + 8
    for one in expected.findings:
        same = rows[one.label]
        assert same.condition_number == one.condition_number
        assert same.singular_values == one.singular_values
        assert same.shape == one.shape
    assert "without the rotation by position (RoPE)" in rows["0.self_attn:qk3"].detail
    assert "(`q_norm`)" in rows["0.self_attn:qk3"].detail


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (None, "the number of its heads is unknown; there is no config.json in its folder"),
        (
            "[" * 100_000,
            "the number of its heads is unknown; there is no config.json in its folder",
        ),
        ([1, 2], "the number of its heads is unknown; there is no config.json in its folder"),
        ({"hidden_size": 12}, "the number of its heads is unknown"),
        ({"num_attention_heads": "4"}, "the number of its heads is unknown"),
        ({"num_attention_heads": 4, "hidden_size": 12}, "are not 4 equal heads of 3 rows"),
        ({"num_attention_heads": 4}, "the number of its key heads is unknown"),
        (CONFIG | {"num_key_value_heads": 4}, "the 10 rows of its keys are not 4 heads of 5"),
        (CONFIG | {"num_attention_heads": 10**30}, "equal heads of 5 rows"),
    ],
)
def test_file_without_config_has_no_heads(tmp_path: Path, config: object, why: str) -> None:
    stored(tmp_path, config)
    report = wc.audit(tmp_path / "model.pt", heads=True)
    (row,) = (f for f in report.findings if f.name == "0.self_attn")
    assert row.label == "0.self_attn:heads"
    assert why in row.detail
    assert report.coverage.failed == 0


def test_heads_in_a_file_are_found_by_name(tmp_path: Path) -> None:
    """c_attn of GPT-2 is stored as (in, out), c_attn of other models like Linear."""
    torch.manual_seed(0)
    W, out = torch.randn(36, 12), torch.randn(12, 12)
    layers = {
        "as.gpt2": (W.mT, out.mT, "c_attn", "c_proj"),
        "as.linear": (W, out, "c_attn", "c_proj"),
        "as.timm": (W, out, "qkv", "proj"),
    }
    content = {
        f"{name}.{child}.weight": tensor.clone()  # otherwise the tensor shares memory with another
        for name, (*tensors, first, second) in layers.items()
        for child, tensor in zip((first, second), tensors, strict=True)
    }
    q, k, v = W.chunk(3)
    for name, block in {"query": q, "key": k, "value": v}.items():
        content[f"bert.self.{name}.weight"] = block.clone()
    content["bert.output.dense.weight"] = out.clone()
    torch.save(content, tmp_path / "model.pt")
    config = {"n_head": 3, "hidden_size": 12, "architecture": "", "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows = {f.label: f for f in wc.audit(tmp_path, heads=True).findings}
    sigma = torch.linalg.svdvals(q[4:8].double().mT @ k[4:8].double())
    carried = torch.linalg.svdvals(out[:, 4:8].double() @ v[4:8].double())
    for name in (*layers, "bert.self"):
        assert rows[f"{name}:qk1"].singular_values == pytest.approx(sigma[:4].tolist())
        assert rows[f"{name}:vo1"].singular_values == pytest.approx(carried[:4].tolist())
        assert "without a rotation by position, if any" in rows[f"{name}:qk1"].detail


@pytest.mark.parametrize(("kind", "known"), [("gpt_neox", True), ("mine", False), ("", False)])
def test_heads_in_unknown_order_are_not_measured(tmp_path: Path, kind: str, known: bool) -> None:
    content = {"a.query_key_value.weight": torch.randn(36, 12), "a.dense.weight": torch.eye(12)}
    torch.save(content, tmp_path / "model.pt")
    config = {"model_type": kind, "num_attention_heads": 3, "hidden_size": 12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows = {f.label: f for f in wc.audit(tmp_path, heads=True).findings}
    assert ("a:qk0" in rows) == known
    if not known:
        assert "no known class or model_type" in rows["a:heads"].detail


def test_compare_pairs_heads() -> None:
    first, second = (wc.audit(made(), heads=True) for _ in range(2))
    labels = [pair.label for pair in wc.compare(first, second).pairs]
    assert "0.self_attn:vo2" in labels


def test_table_counts_the_possible_rank_of_a_head() -> None:
    report = wc.audit(nn.MultiheadAttention(16, 4), heads=True)
    (line,) = (line for line in report.table().splitlines() if line.startswith("qk0 "))
    assert " 4/4 " in line


def test_command_line_measures_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {f"layers.0.attn.{x}_proj.weight": torch.randn(12, 12) for x in "qkvo"}
    torch.save(state, tmp_path / "model.pt")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 3, "hidden_size": 12}')
    assert main(["audit", str(tmp_path / "model.pt"), "--heads"]) == 0
    rows = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line}
    assert {f"layers.0.attn:{kind}{h}" for kind in ("qk", "vo") for h in range(3)} <= rows
