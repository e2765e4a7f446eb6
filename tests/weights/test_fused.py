"""Tensors with several matrices are split alike in a file and a model, as the model computes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import TIMM, TRANSFORMERS, of_transformers, randomised
from torch import Tensor, nn

import wellcond as wc
from wellcond.report.findings import Finding
from wellcond.weights.fused import find_views_in_file
from wellcond.weights.matrices import ViewsByName

Shapes = dict[str, tuple[int, ...]]


def labels(shapes: Shapes, **config: Any) -> set[str]:
    """The views of the first tensor; "" if it is one matrix."""
    name = next(iter(shapes))
    return set(find_views_in_file(shapes, config)[name].views)


QKV, WHOLE = {"q", "k", "v"}, {""}
# The minimum that the config.json of timm contains.
OF_TIMM: dict[str, Any] = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}}

GPT_OSS: Shapes = {
    "gate_up_proj": (3, 12, 20),
    "down_proj": (3, 10, 12),
    "gate_up_proj_bias": (3, 20),
}

# The shapes of the tensors, the content of config.json, and the views of the first tensor.
CASES: dict[str, tuple[Shapes, dict[str, Any], set[str]]] = {
    "timm": ({"a.qkv.weight": (36, 12), "a.proj.weight": (12, 12)}, OF_TIMM, QKV),
    "in any order": ({"a.qkv.weight": (36, 12), "a.proj.weight": (12, 12)}, {}, WHOLE),
    "of a model that is not known": (
        {"a.qkv.weight": (36, 12), "a.proj.weight": (12, 12)},
        {"model_type": "samoyed", "vision_config": {"model_type": 3}},
        WHOLE,
    ),
    "of a part that is known": (
        {"a.qkv.weight": (36, 12), "a.proj.weight": (12, 12)},
        {"model_type": "other", "vision_config": {"model_type": "qwen2_vl_vision"}},
        QKV,
    ),
    "narrow heads": ({"a.qkv.weight": (36, 20), "a.proj.weight": (20, 12)}, OF_TIMM, QKV),
    "no output": ({"a.qkv.weight": (36, 12)}, OF_TIMM, WHOLE),
    "another output": ({"a.qkv.weight": (36, 12), "b.proj.weight": (12, 12)}, OF_TIMM, WHOLE),
    "output of another width": (
        {"qkv.weight": (36, 12), "proj.weight": (12, 14)},
        OF_TIMM,
        WHOLE,
    ),
    "keys and values alone": ({"qkv.weight": (24, 12), "proj.weight": (12, 12)}, OF_TIMM, WHOLE),
    "as a kernel": (
        {"qkv.weight": (36, 12, 1, 1), "proj.weight": (12, 12, 1, 1)},
        OF_TIMM,
        WHOLE,
    ),
    "TinyViT": (
        {"qkv.weight": (36, 12), "proj.weight": (12, 12), "attention_biases": (3, 9)},
        OF_TIMM,
        WHOLE,
    ),
    "MaxViT": (
        {"attn_block.attn.qkv.weight": (36, 12), "attn_block.attn.proj.weight": (12, 12)},
        OF_TIMM,
        WHOLE,
    ),
    "GPT-2": ({"a.c_attn.weight": (12, 36), "a.c_proj.weight": (12, 12)}, {}, QKV),
    "nanoGPT": ({"a.c_attn.weight": (36, 12), "a.c_proj.weight": (12, 12)}, {}, QKV),
    "across": (
        {"c_attn.weight": (12, 24), "c_proj.weight": (12, 12), "q_attn.weight": (12, 12)},
        {},
        {"k", "v"},
    ),
    "GPTBigCode": (
        {"c_attn.weight": (20, 12), "c_proj.weight": (12, 12)},
        {"multi_query": True},
        QKV,
    ),
    "GPTBigCode, all keys": (
        {"c_attn.weight": (36, 12), "c_proj.weight": (12, 12)},
        {"multi_query": False},
        WHOLE,
    ),
    "GPTBigCode, no config": ({"c_attn.weight": (20, 12), "c_proj.weight": (12, 12)}, {}, WHOLE),
    "NeoX": ({"a.query_key_value.weight": (36, 12), "a.dense.weight": (12, 12)}, {}, WHOLE),
    "Bloom, all heads": (
        {"a.query_key_value.weight": (36, 12), "a.dense.weight": (12, 12)},
        {"model_type": "bloom"},
        WHOLE,
    ),
    "Falcon": (
        {"a.query_key_value.weight": (20, 12), "a.dense.weight": (12, 12)},
        {"multi_query": True},
        QKV,
    ),
    "Falcon, groups": (
        {"a.query_key_value.weight": (20, 12), "a.dense.weight": (12, 12)},
        {"multi_query": True, "new_decoder_architecture": True},
        WHOLE,
    ),
    "Phi-3": (
        {"a.qkv_proj.weight": (20, 12), "a.o_proj.weight": (12, 12)},
        {"model_type": "phi3"},
        QKV,
    ),
    "qkv_proj in any order": (
        {"a.qkv_proj.weight": (20, 12), "a.o_proj.weight": (12, 12)},
        {"model_type": "phi"},
        WHOLE,
    ),
    "MPT": ({"a.Wqkv.weight": (36, 12), "a.out_proj.weight": (12, 12)}, {}, QKV),
    "CodeGen": ({"a.qkv_proj.weight": (36, 12), "a.out_proj.weight": (12, 12)}, {}, WHOLE),
    "torch": ({"a.in_proj_weight": (36, 12), "a.out_proj.weight": (12, 12)}, {}, QKV),
    "no attention": ({"a.in_proj_weight": (36, 12), "a.out_proj.weight": (12, 30)}, {}, WHOLE),
    "PEFT": (
        {"a.qkv.base_layer.weight": (36, 12), "a.proj.base_layer.weight": (12, 12)},
        OF_TIMM,
        QKV,
    ),
    "of several files": (
        {"a.pt/qkv.weight": (36, 12), "a.pt/proj.weight": (12, 12)},
        OF_TIMM,
        QKV,
    ),
    "of two files": (
        {"a.pt/qkv.weight": (36, 12), "b.pt/proj.weight": (12, 12)},
        OF_TIMM,
        WHOLE,
    ),
    "gated": ({"gate_up_proj.weight": (20, 12), "down_proj.weight": (12, 10)}, {}, {"gate", "up"}),
    "not gated": ({"gate_up_proj.weight": (20, 12), "down_proj.weight": (12, 20)}, {}, WHOLE),
    "experts": (
        {"experts.gate_up_proj": (3, 20, 12), "experts.down_proj": (3, 12, 10)},
        {},
        {"gate", "up"},
    ),
    "experts of gpt-oss": (GPT_OSS, {"model_type": "gpt_oss"}, {"gate", "up"}),
    "experts of gpt-oss in a part": (
        {f"model.language_model.{name}": shape for name, shape in GPT_OSS.items()},
        {"text_config": {"model_type": "gpt_oss", "num_attention_heads": 4}},
        {"gate", "up"},
    ),
    "experts with a bias, by a known model": (
        GPT_OSS,
        {"model_type": "openai_privacy_filter"},
        {"gate", "up"},
    ),
    "experts with a bias, by an unknown model": (GPT_OSS, {"model_type": "samoyed"}, WHOLE),
    "experts with a bias": (GPT_OSS, {}, WHOLE),
    "unequal experts": ({"gate_up_proj": (3, 20, 12), "down_proj": (4, 12, 10)}, {}, WHOLE),
    "LSTM": ({"weight_ih_l0": (16, 3), "weight_hh_l0": (16, 4)}, {}, set("ifgo")),
    "LSTM, hidden": ({"weight_hh_l0": (16, 4), "weight_ih_l0": (16, 3)}, {}, set("ifgo")),
    "LSTM, projected": (
        {"weight_hh_l0": (16, 2), "weight_ih_l0": (16, 3), "weight_hr_l0": (2, 4)},
        {},
        set("ifgo"),
    ),
    "GRU, backwards": (
        {"l.weight_ih_l1_reverse": (12, 3), "l.weight_hh_l1_reverse": (12, 4)},
        {},
        set("rzn"),
    ),
    "cell": ({"weight_ih": (12, 3), "weight_hh": (12, 4)}, {}, set("rzn")),
    "RNN": ({"weight_ih_l0": (4, 3), "weight_hh_l0": (4, 4)}, {}, WHOLE),
    "no cell": ({"weight_ih_l0": (16, 3), "weight_hh_l0": (12, 4)}, {}, WHOLE),
    "quantised beside": ({"a.qkv.weight": (36, 12), "a.proj.weight": (72, 1)}, {}, WHOLE),
    "number": ({"a.c_attn.weight": (), "a.c_proj.weight": ()}, {}, WHOLE),
}


@pytest.mark.parametrize("case", CASES)
def test_views_in_file_need_names_shapes_and_config(case: str) -> None:
    shapes, config, expected = CASES[case]
    assert labels(shapes, **config) == expected


@pytest.mark.parametrize("config", [{"multi_query": 5}, {"a_config": {"b_config": []}}, {"": 0}])
def test_odd_configs_are_ignored(config: dict[str, Any]) -> None:
    shapes: Shapes = {"a.qkv.weight": (36, 12), "a.proj.weight": (12, 12)}
    assert labels(shapes, **OF_TIMM, **config) == QKV
    deep: dict[str, Any] = {"num_heads": 2}
    for _ in range(5000):
        deep = {"a_config": deep}
    assert labels({"a.q.weight": (4, 4)}, **deep) == WHOLE


def test_blocks_match_their_names_and_share_memory() -> None:
    shapes: Shapes = {
        "attn.c_attn.weight": (4, 12),
        "attn.c_proj.weight": (4, 4),
        "mlp.c_fc.weight": (4, 16),
        "experts.gate_up_proj": (2, 3, 8),  # as Llama 4 has them
        "experts.down_proj": (2, 4, 3),
        "s.qkv_proj.weight": (8, 4),
        "s.o_proj.weight": (4, 4),
    }
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    found = {
        f"{name}:{view}" if view else name: S
        for name, seen in find_views_in_file(shapes, {"model_type": "phi3"}).items()
        for view, S in ViewsByName(seen.views)(tensors[name]).items()
    }
    attention, experts = tensors["attn.c_attn.weight"], tensors["experts.gate_up_proj"]
    expected = {
        f"attn.c_attn.weight:{x}": attention[:, 4 * i :][:, :4].mT for i, x in enumerate("qkv")
    }
    expected |= {n: tensors[n].mT for n in ("attn.c_proj.weight", "mlp.c_fc.weight")}
    for number in range(2):
        gate, up = experts[number].mT.chunk(2)
        expected[f"experts.gate_up_proj:gate:{number}"] = gate
        expected[f"experts.gate_up_proj:up:{number}"] = up
        expected[f"experts.down_proj:{number}"] = tensors["experts.down_proj"][number].mT
    blocks = tensors["s.qkv_proj.weight"].split([4, 2, 2])
    expected |= {f"s.qkv_proj.weight:{x}": S for x, S in zip("qkv", blocks, strict=True)}
    expected["s.o_proj.weight"] = tensors["s.o_proj.weight"]
    assert found.keys() == expected.keys()
    for name, S in expected.items():
        assert torch.equal(found[name], S), name
        found[name].fill_(7.0)
    assert all((tensor == 7).all() for tensor in tensors.values())


def test_rows_of_gate_and_up_alternate_for_known_models() -> None:
    W = torch.randn(3, 12, 20)
    for kind in ("gpt_oss", "openai_privacy_filter"):
        seen = find_views_in_file(GPT_OSS, {"model_type": kind})["gate_up_proj"]
        assert not seen.note
        found = ViewsByName(seen.views)(W)
        assert list(found) == [f"{one}:{i}" for one in ("gate", "up") for i in range(3)]
        for i in range(3):
            rows = W[i].mT
            gate, up = (rows[::2], rows[1::2]) if kind == "gpt_oss" else rows.chunk(2)
            assert torch.equal(found[f"gate:{i}"], gate)
            assert torch.equal(found[f"up:{i}"], up)
    unknown = find_views_in_file(GPT_OSS, {})["gate_up_proj"]
    assert "whether rows of gate and up are blocks or alternate" in unknown.note


def in_heads(order: str) -> Tensor:
    """Rows of query, key and value with kappa 3, 30 and 300, in another order than q, k, v."""
    torch.manual_seed(0)
    parts = []
    for kappa in (3.0, 30.0, 300.0):
        left, right = (torch.linalg.qr(torch.randn(64, 64)).Q for _ in range(2))
        parts.append(left * torch.logspace(0, -math.log10(kappa), 64) @ right)
    stacked = torch.stack(parts).view(3, 8, 8, 64)  # part, head, channel
    axes = {"head": (1, 0, 2, 3), "channel": (1, 2, 0, 3)}[order]
    return stacked.permute(axes).reshape(192, 64)


@pytest.mark.parametrize("name", ["qkv", "qkv_proj"])
@pytest.mark.parametrize("order", ["head", "channel"])
def test_rows_of_unknown_order_are_one_matrix(tmp_path: Path, order: str, name: str) -> None:
    """Ordered by head as in Megatron or by channel as in EDM, in a file and in a user's class."""
    W, output = in_heads(order), {"qkv": "proj", "qkv_proj": "o_proj"}[name]
    model = nn.ModuleDict({"attn": nn.Module()})
    for child, shape in ((name, (64, 192)), (output, (64, 64))):
        model["attn"].add_module(child, nn.Linear(*shape, bias=False))
    with torch.no_grad():
        model["attn"].get_parameter(f"{name}.weight").copy_(W)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for source in (model, tmp_path / "model.pt"):
        found = rows(wc.audit(source))
        assert found.keys() == {f"attn.{name}.weight", f"attn.{output}.weight"}
        row = found[f"attn.{name}.weight"]
        assert row.condition_number == pytest.approx(float(wc.condition_number(W)))
        assert "no known class or model_type determines the order of its rows" in row.detail


def rows(report: wc.AuditReport) -> dict[str, Finding]:
    return {finding.label: finding for finding in report.findings}


def same(one: Finding, two: Finding) -> bool:
    if one.shape != two.shape or one.status is not two.status:
        return False
    unknown = math.isnan(one.condition_number) and math.isnan(two.condition_number)
    return unknown or math.isclose(one.condition_number, two.condition_number, rel_tol=1e-12)


@pytest.mark.frameworks
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_file_is_measured_like_its_model(kind: str, tmp_path: Path) -> None:
    """As a state dict with the same names, and as the library saves it, with any names."""
    pytest.importorskip("transformers", minversion="5")
    model = of_transformers(kind)
    plain, saved = tmp_path / "plain", tmp_path / "saved"
    plain.mkdir()
    torch.save(model.state_dict(), plain / "model.pt")
    model.config.to_json_file(plain / "config.json")
    model.save_pretrained(saved)
    heads = kind != "CodeGen"  # CodeGen has its own order of rows
    of_model, of_file, of_saved = (
        rows(wc.audit(one, heads=heads)) for one in (model, plain, saved)
    )
    assert of_file.keys() == of_model.keys()
    assert [name for name, one in of_model.items() if not same(one, of_file[name])] == []
    kappas, of_saved_kappas = (
        sorted(one.condition_number for one in found.values() if one.measured)
        for found in (of_model, of_saved)
    )
    assert of_saved_kappas == pytest.approx(kappas, rel=1e-12)
    assert any(one.view.startswith("qk") for one in of_model.values()) == heads
    assert all(one.measured for one in of_model.values())


@pytest.mark.frameworks
@pytest.mark.parametrize("kind", TIMM)
def test_timm_file_is_measured_like_its_model(kind: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = randomised(timm.create_model(kind, num_classes=7, **TIMM[kind]))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(json.dumps(OF_TIMM))
    of_model, of_file = rows(wc.audit(model)), rows(wc.audit(tmp_path / "model.pt"))
    assert of_file.keys() == of_model.keys()
    grouped = {
        f"{n}.weight:kernel" for n, m in model.named_modules() if getattr(m, "groups", 1) > 1
    }
    differing = {name for name, one in of_model.items() if not same(one, of_file[name])}
    assert differing <= grouped  # a file does not contain the groups
    assert kind != "convnext_atto" or differing == grouped


def test_recurrent_layers_are_split_alike_in_file_and_model(tmp_path: Path) -> None:
    model = nn.ModuleDict(
        {
            "lstm": nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2),
            "gru": nn.GRU(3, 4),
            "rnn": nn.RNN(3, 4),
            "cell": nn.LSTMCell(3, 4),
            "attention": nn.MultiheadAttention(8, 2),
            "others": nn.MultiheadAttention(8, 2, kdim=6, vdim=5),
        }
    )
    torch.save(model.state_dict(), tmp_path / "model.pt")
    of_model, of_file = rows(wc.audit(model)), rows(wc.audit(tmp_path / "model.pt"))
    assert of_file.keys() == of_model.keys()
    assert all(same(one, of_file[name]) for name, one in of_model.items())
    assert "lstm.weight_hh_l1_reverse:o" in of_file


def views_of(model: nn.Module) -> dict[str, Tensor]:
    from wellcond.weights.discover import find_weights

    return {
        one.name: one.view(one.parameters[0].detach())
        for weight in find_weights(model).weights
        if not weight.reason
        for one in weight.members()
    }


@pytest.mark.frameworks
@pytest.mark.parametrize("kind", ["Phi-3", "GLM", "Mixtral", "Qwen3-MoE", "Llama 4"])
def test_gate_and_up_match_the_forward_of_the_module(kind: str) -> None:
    """The module computes down(act(gate x) * up x), for each expert."""
    pytest.importorskip("transformers", minversion="5")
    model = of_transformers(kind).double()
    model.config._experts_implementation = "eager"
    seen = views_of(model)
    stem = next(name.partition(":")[0] for name in seen if "gate_up_proj" in name)
    path = stem.removesuffix(".gate_up_proj.weight").removesuffix(".gate_up_proj")
    stacked = f"{stem}:gate:0" in seen
    layer = model.get_submodule(path)
    act = getattr(layer, "act_fn", None) or layer.activation_fn
    x = torch.randn(5, 24, dtype=torch.float64)
    for number in range(3) if stacked else (None,):
        member = "" if number is None else f":{number}"
        gate, up = (seen[f"{stem}:{one}{member}"] for one in ("gate", "up"))
        down = seen[f"{stem.replace('gate_up', 'down')}{member}"]
        if number is None:
            found = layer(x)
        elif kind == "Llama 4":
            each = torch.zeros(3, 5, 24, dtype=torch.float64)
            each[number] = x
            found = layer(each.flatten(0, 1)).view(3, 5, 24)[number]
        else:
            one = torch.ones(5, 1, dtype=torch.float64)
            found = layer(x, torch.full((5, 1), number), one)
        expected = (act(x @ gate.mT) * (x @ up.mT)) @ down.mT
        # Sums of tens of numbers near 10, in float64.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.frameworks
@pytest.mark.parametrize("kind", ["gpt-oss", "Privacy Filter"])
def test_gate_and_up_with_bias_match_the_forward_of_the_module(kind: str) -> None:
    """Rows of gate and up alternate in gpt-oss and are blocks in the other, similar class."""
    pytest.importorskip("transformers", minversion="5")
    model = of_transformers(kind).double()
    model.config._experts_implementation = "eager"
    (stem, *_) = (name.partition(":")[0] for name in views_of(model) if "gate_up_proj" in name)
    layer = model.get_submodule(stem.removesuffix(".gate_up_proj"))
    for name in ("gate_up_proj_bias", "down_proj_bias"):
        layer.get_parameter(name).detach().zero_()
    seen = views_of(model)
    x = torch.randn(5, 24, dtype=torch.float64)
    for number in range(3):
        gate, up = (x @ seen[f"{stem}:{one}:{number}"].mT for one in ("gate", "up"))
        gate, up = gate.clamp(max=layer.limit), up.clamp(-layer.limit, layer.limit)
        product = (up + 1) * gate * torch.sigmoid(layer.alpha * gate)
        expected = product @ seen[f"{stem.replace('gate_up', 'down')}:{number}"].mT
        one = torch.ones(5, 1, dtype=torch.float64)
        found = layer(x, torch.full((5, 1), number), one)
        # The Privacy Filter computes in float32.
        tolerance = 1e-10 if kind == "gpt-oss" else 1e-4
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


def test_repair_changes_only_alternating_rows_of_gate(tmp_path: Path) -> None:
    torch.manual_seed(0)
    content = {
        f"mlp.experts.{name}": torch.randn(shape).bfloat16() for name, shape in GPT_OSS.items()
    }
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    torch.save(content, source / "model.pt")
    (source / "config.json").write_text('{"model_type": "gpt_oss"}')
    wc.repair(source, target, 2.0, include=["*:gate:1"])
    fixed = torch.load(target / "model.pt")
    W, old = (one["mlp.experts.gate_up_proj"] for one in (fixed, content))
    assert float(wc.condition_number(W[1, :, ::2])) <= 2.0
    assert float(wc.condition_number(old[1, :, ::2])) > 2.0
    W[1, :, ::2] = old[1, :, ::2]
    assert all(torch.equal(fixed[name], one) for name, one in content.items())


@pytest.mark.frameworks
def test_patterns_select_gates_and_experts() -> None:
    pytest.importorskip("transformers", minversion="5")
    model = of_transformers("Phi-3")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    reg = wc.Regularizer(model, {"*gate_up_proj.weight:gate": wc.ConditionLimit(2.0)})
    assert [name.rpartition(":")[2] for name in reg.names] == ["gate"] * 2
    reg.enforce()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {f"model.layers.{i}.mlp.gate_up_proj.weight" for i in range(2)}
    for name in moved:
        new, old = model.get_parameter(name).detach(), before[name]
        assert torch.equal(new[20:], old[20:])
        assert float(wc.condition_number(new[:20])) <= 2.0 < float(wc.condition_number(old[:20]))

    model = of_transformers("Mixtral")
    reg = wc.Regularizer(model, {"*gate_up_proj:up": wc.ConditionLimit(2.0)})
    assert len(reg.names) == 2
    reg.enforce()
    found = {n: f.condition_number for n, f in rows(wc.audit(model)).items()}
    assert all((kappa <= 2.0) == (":up:" in n) for n, kappa in found.items() if "gate_up" in n)
    one = wc.Regularizer(
        model, {"model.layers.1.mlp.experts.gate_up_proj:gate:2": wc.ConditionPenalty(1)}
    )
    assert one.names == ["model.layers.1.mlp.experts.gate_up_proj:gate:2"]


def test_a_state_from_before_the_split_is_refused() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj, self.down_proj = nn.Linear(4, 12), nn.Linear(6, 4)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj, self.down_proj = nn.Linear(4, 12), nn.Linear(12, 4)

    reg = wc.Regularizer(Gated(), wc.ConditionPenalty(0.1))
    assert reg.names == ["gate_up_proj.weight:gate", "gate_up_proj.weight:up", "down_proj.weight"]
    state = wc.Regularizer(Whole(), wc.ConditionPenalty(0.1)).state_dict()
    with pytest.raises(ValueError, match=r"gate_up_proj\.weight"):
        reg.load_state_dict(state)
