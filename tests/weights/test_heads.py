"""Attention heads are found, and match what the modules compute."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import of_transformers
from torch import Tensor, nn

import wellcond as wc
from wellcond.weights.discover import find_weights, heads_of
from wellcond.weights.effective import acting_tensor
from wellcond.weights.heads import Attention

Products = dict[str, Tensor]


def dense(attention: Attention) -> Products:
    found = attention.products(acting_tensor, lambda view: True)
    return {head.view: S.B @ S.A.mT for head, S in found}


def only(model: nn.Module) -> Attention:
    (attention,) = heads_of(model)
    return attention


def close(found: Products, expected: Products) -> None:
    assert list(found) == list(expected)
    # Products of at most a hundred numbers near 1, in float64.
    for view, S in expected.items():
        torch.testing.assert_close(found[view], S, rtol=0, atol=1e-12, msg=view)


class Attend(nn.Module):
    """Softmax attention whose weights pass through `attn_drop`, where a hook can read them."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.attn_drop = nn.Identity()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of tensors (batch, heads, tokens, size)."""
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        y: Tensor = self.attn_drop(weights) @ v
        return y.transpose(1, 2).flatten(2)


class Timm(Attend):
    """One Linear for all queries, then all keys, then all values, as in timm."""

    __module__ = "timm.layers.attention"  # a library whose order of rows is known

    def __init__(self, dim: int = 12, heads: int = 3, size: int = 5) -> None:
        super().__init__(heads)
        self.head_dim = size
        self.qkv = nn.Linear(dim, 3 * heads * size, bias=False)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.norm = nn.Identity()
        self.proj = nn.Linear(heads * size, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim)
        return self.proj(self.attend(*rows.permute(2, 0, 3, 1, 4)))


class HeadFirst(Timm):
    """Query, key and value of one head after the other, as in timm's MaxViT."""

    head_first = True

    def forward(self, x: Tensor) -> Tensor:
        rows = self.qkv(x).reshape(*x.shape[:2], self.num_heads, 3, self.head_dim)
        return self.proj(self.attend(*rows.permute(3, 0, 2, 1, 4)))


class NanoGPT(Attend):
    """`c_attn` is a Linear, as in nanoGPT."""

    def __init__(self) -> None:
        super().__init__(3)
        del self.num_heads
        self.n_head = 3
        self.c_attn = nn.Linear(12, 36, bias=False)
        self.c_proj = nn.Linear(12, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(2, (3, 4)).transpose(1, 2) for y in self.c_attn(x).chunk(3, -1))
        return self.c_proj(self.attend(q, k, v))


class Grouped(Attend):
    """Two queries per key, and values of another size."""

    def __init__(self) -> None:
        super().__init__(4)
        self.num_key_value_heads = 2
        self.q_proj = nn.Linear(12, 4 * 5, bias=False)
        self.k_proj = nn.Linear(12, 2 * 5, bias=False)
        self.v_proj = nn.Linear(12, 2 * 3, bias=False)
        self.o_proj = nn.Linear(4 * 3, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(2, (4, 5)).transpose(1, 2)
        k = self.k_proj(x).unflatten(2, (2, 5)).transpose(1, 2).repeat_interleave(2, 1)
        v = self.v_proj(x).unflatten(2, (2, 3)).transpose(1, 2).repeat_interleave(2, 1)
        return self.o_proj(self.attend(q, k, v))


class Torch(nn.Module):
    """Self-attention of torch that returns its weights."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(12, 3, batch_first=True, bias=False, **options)
        self.attn_drop = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y, weights = self.own(x, x, x, average_attn_weights=False)
        self.attn_drop(weights)
        return y


def spectral() -> nn.Module:
    model = Timm()
    nn.utils.parametrizations.spectral_norm(model.qkv)
    return model.eval()


SOFTMAX: dict[str, Callable[[], nn.Module]] = {
    "timm": Timm,
    "timm, heads first": HeadFirst,
    "nanoGPT": NanoGPT,
    "grouped": Grouped,
    "torch": Torch,
    "torch, separate": lambda: Torch(kdim=12, vdim=12),
    "parametrized": spectral,
}


@pytest.mark.parametrize("kind", SOFTMAX)
def test_heads_match_attention_weights_of_the_module(kind: str) -> None:
    """The logarithms of the attention weights are x_i^T S x_j up to one constant per row.

    A single token gives the sum of all "vo" maps. MultiheadAttention has another code path for
    separate parameters, which is also tested.
    """
    torch.manual_seed(0)
    model = SOFTMAX[kind]().double()
    if kind == "torch, separate":
        own = model.own  # type: ignore[union-attr]
        own._qkv_same_embed_dim = False
        for name, block in zip("qkv", own.in_proj_weight.detach().chunk(3), strict=True):
            setattr(own, f"{name}_proj_weight", nn.Parameter(block.clone()))
        own.in_proj_weight = None
    attention = only(model)
    found = dense(attention)
    seen: list[Tensor] = []
    model.attn_drop.register_forward_hook(  # type: ignore[union-attr]
        lambda module, args, output: seen.append(args[0])
    )
    x = torch.eye(12, dtype=torch.float64)
    with torch.no_grad():
        model(x[None])
        alone = model(x[:, None])[:, 0].mT  # one token at a time, which attends only to itself
    logits = seen[0][0].log()
    heads = len(logits)
    size = 5 if kind not in ("nanoGPT", "torch", "torch, separate") else 4
    assert list(found) == [f"{kind}{h}" for kind in ("qk", "vo") for h in range(heads)]
    for h in range(heads):
        S = found[f"qk{h}"] / math.sqrt(size)
        difference = logits[h] - S
        torch.testing.assert_close(
            difference, difference[:, :1].expand_as(difference), rtol=0, atol=1e-12
        )
    total = sum(found[f"vo{h}"] for h in range(heads))
    torch.testing.assert_close(total, alone, rtol=0, atol=1e-12)


def test_names_are_those_of_the_modules() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    assert [one.name for one in heads_of(model)] == ["layers.0.self_attn", "layers.1.self_attn"]
    compiled = torch.compile(nn.Sequential(Timm()))
    assert [one.name for one in heads_of(compiled)] == ["0"]  # type: ignore[arg-type]
    assert only(Timm()).names("qk1") == ("qk1",)
    assert heads_of(nn.Linear(3, 3)) == []


def test_notes_state_what_heads_omit() -> None:
    notes = {head.view: head.note for head in only(Timm()).heads}
    assert set(notes.values()) == {"`qkv` read as q, k, v"}
    model = Timm()
    model.q_norm, model.norm = nn.LayerNorm(5), nn.LayerNorm(15)
    model.rope = object()
    notes = {head.view: head.note for head in only(model).heads}
    assert "without the rotation by position (RoPE)" in notes["qk1"]
    assert "without the norms of queries and keys (`q_norm`)" in notes["qk1"]
    assert "without `norm` between the two factors" in notes["vo1"]
    assert "RoPE" not in notes["vo1"]
    model.logit_scale = nn.Parameter(torch.ones(3))
    assert "(`logit_scale`)" in only(model).heads[0].note
    assert {head.note for head in only(Grouped()).heads[2:4]} == {"keys of head 1 of 2"}


def changed(kind: type[nn.Module], **attributes: Any) -> nn.Module:
    model = kind()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def without(kind: type[nn.Module], *names: str) -> nn.Module:
    model = kind()
    for name in names:
        delattr(model, name)
    return model


UNKNOWN: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "no number": (
        lambda: without(Timm, "num_heads"),
        "heads",
        "the number of its heads is unknown",
    ),
    "key heads": (
        lambda: without(Grouped, "num_key_value_heads"),
        "heads",
        "the number of its key heads is unknown",
    ),
    "wrong key heads": (
        lambda: changed(Grouped, num_key_value_heads=3),
        "heads",
        "the 10 rows of its keys are not 3 heads of 5 for 4 heads of queries",
    ),
    "gated queries": (  # as in Qwen3-Next: each query has as many additional rows for a gate
        lambda: changed(Grouped, head_dim=5, q_proj=nn.Linear(12, 40)),
        "heads",
        "the 40 rows of its queries in `q_proj` are not 4 equal heads of 5 rows",
    ),
    "not divisible": (lambda: changed(NanoGPT, n_head=5), "heads", "are not 5 equal heads"),
    "cut otherwise": (
        lambda: changed(Timm, key_dim=5),
        "heads",
        "`key_dim` means that the order of `qkv`",
    ),
    "over channels": (  # as in XCiT
        lambda: changed(Timm, temperature=1.0),
        "heads",
        "heads of a Timm do not compare one token with another",
    ),
    "not linear": (
        lambda: changed(Grouped, k_proj=nn.Conv1d(1, 10, 1)),
        "heads",
        "`k_proj` is a Conv1d of torch.nn.modules.conv, not a Linear",
    ),
    "lazy": (
        lambda: changed(Grouped, k_proj=nn.LazyLinear(10)),
        "heads",
        "`k_proj` is not initialised yet",
    ),
    "no output": (lambda: without(Grouped, "o_proj"), "vo", "its output projection is unknown"),
    "other output": (
        lambda: changed(Grouped, o_proj=nn.Linear(7, 12)),
        "vo",
        "the 7 columns of `o_proj` are not the 12 rows of the values",
    ),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_heads_have_a_reason(kind: str) -> None:
    model, view, why = UNKNOWN[kind]
    attention = only(model())
    assert list(attention.unknown) == [view]
    assert why in attention.unknown[view]
    assert all(head.view.startswith("qk") for head in attention.heads)
    assert bool(attention.heads) == (view == "vo")


def names_of(model: nn.Module) -> list[str]:
    return [weight.name for weight in find_weights(model).weights]


def test_fused_projections_are_separate_weights() -> None:
    model = Timm()
    assert names_of(model) == ["qkv.weight:q", "qkv.weight:k", "qkv.weight:v", "proj.weight"]
    blocks = model.qkv.weight.detach().clone().chunk(3)
    reg = wc.Regularizer(model, {"qkv.weight:k": wc.ConditionPenalty(0.5)})
    assert reg.names == ["qkv.weight:k"]
    reg.proximal_step(1.0)
    q, k, v = model.qkv.weight.detach().chunk(3)
    assert torch.equal(q, blocks[0])
    assert torch.equal(v, blocks[2])
    torch.testing.assert_close(k, wc.proximal_step(blocks[1], 0.5))
    assert (
        wc.Regularizer(model, {"qkv.weight": wc.ConditionPenalty(0.5)}).names == names_of(model)[:3]
    )


def test_projection_by_head_or_of_unknown_order_is_one_matrix() -> None:
    narrow = changed(Timm, proj=nn.Linear(14, 12))
    for model in (HeadFirst(), narrow, without(Timm, "proj"), changed(Timm, key_dim=5)):
        assert names_of(model)[0] == "qkv.weight"
        assert not any(":" in name for name in names_of(model))
    Timm.__module__, known = __name__, Timm.__module__  # a class whose order is unknown
    try:
        assert names_of(Timm()) == ["qkv.weight", "proj.weight"]
        (attention,) = heads_of(Timm())
        assert not attention.heads
        assert "no known class or model_type" in attention.unknown["heads"]
        assert "no known class" in wc.audit(Timm(), include=["qkv*"]).findings[0].detail
    finally:
        Timm.__module__ = known
    # The number of heads is not needed.
    assert names_of(without(Timm, "num_heads"))[0] == "qkv.weight:q"


def test_parametrized_fused_projection_is_split() -> None:
    report = wc.audit(nn.Sequential(spectral()))
    names = {finding.label: finding for finding in report.findings}
    assert set(names) == {"0.proj.weight", *(f"0.qkv.weight:{x}" for x in "qkv")}


# Models of transformers with random weights: hidden size 24, 4 heads.
SMALL = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 11}
SMALL |= {"intermediate_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 8}
GPT2 = {"n_embd": 24, "n_head": 4, "n_layer": 1, "vocab_size": 11, "add_cross_attention": True}
IMAGES = {"image_size": 8, "patch_size": 4}
DISTILLED = {"dim": 24, "n_heads": 4, "n_layers": 1, "hidden_dim": 16, "vocab_size": 11}
T5 = {"d_model": 24, "d_kv": 5, "d_ff": 16, "num_heads": 4, "num_layers": 1, "vocab_size": 11}
MIXTURE = GROUPED | {"num_local_experts": 2}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("layers.0.self_attn", GROUPED),
    "Mistral": ("layers.0.self_attn", GROUPED),
    "Qwen2": ("layers.0.self_attn", GROUPED),
    "Qwen3": ("layers.0.self_attn", GROUPED),
    "Gemma": ("layers.0.self_attn", GROUPED),
    "Gemma2": ("layers.0.self_attn", GROUPED),
    "Mixtral": ("layers.0.self_attn", MIXTURE),
    "GPTNeoX": ("layers.0.attention", SMALL),
    "GPT2": ("h.0.attn", GPT2),
    "Bert": ("encoder.layer.0.attention.self", SMALL),
    "ViT": ("layers.0.attention", SMALL | IMAGES),
    "CLIPVision": ("encoder.layers.0.self_attn", SMALL | IMAGES),
    "Phi3": ("layers.0.self_attn", SMALL | {"num_key_value_heads": 2}),
    "GPTBigCode": ("h.0.attn", GPT2 | {"add_cross_attention": False, "multi_query": True}),
    "DistilBert": ("transformer.layer.0.attention", DISTILLED),
    "T5": ("encoder.block.0.layer.0.SelfAttention", T5),
}
NOT_ROTATED = ("GPT2", "Bert", "ViT", "CLIPVision", "GPTBigCode", "DistilBert", "T5")


def computed(model: nn.Module, name: str, module: Any) -> Products:
    """Both maps of every head, from running the module on one basis vector at a time.

    A single token at the first position is not rotated. The attention function is replaced by one
    that passes only the values of a single head. The effect of biases is subtracted.
    """
    from transformers import AttentionInterface

    seen: dict[str, Tensor] = {}
    passing = 0

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        seen["q"], seen["k"] = query[:, :, 0], key[:, :, 0].repeat_interleave(groups, dim=1)
        kept = torch.zeros_like(query[..., : value.shape[-1]])
        kept[:, passing] = value.repeat_interleave(groups, dim=1)[:, passing]
        return kept.transpose(1, 2), None

    AttentionInterface.register("one head alone", attend)
    module.config._attn_implementation = "one head alone"
    for norm in ("q_norm", "k_norm"):
        if hasattr(module, norm):
            setattr(module, norm, nn.Identity())
    x = torch.cat([torch.zeros(1, 24), torch.eye(24)])[:, None].double()
    options: dict[str, Any] = {"attention_mask": None}
    if "Attention" in type(module).__name__ and hasattr(module.config, "rope_parameters"):
        rotated = getattr(module, "rotary_ndims", getattr(module, "head_dim", 0))
        one = torch.ones(1, 1, rotated).double()
        options["position_embeddings"] = (one, 0 * one)
    out: list[Tensor] = []
    with torch.no_grad():
        for head in range(4):
            passing = head
            y = module(x, **options)[0]
            if name.endswith(".self"):
                y = model.get_submodule(name.removesuffix("self") + "output").dense(y)
            out.append(y[:, 0])
    q, k = (seen[one][1:] - seen[one][:1] for one in "qk")
    comparing = {f"qk{h}": q[:, h] @ k[:, h].mT for h in range(4)}
    return comparing | {f"vo{h}": (y[1:] - y[:1]).mT for h, y in enumerate(out)}


@pytest.mark.frameworks
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_heads_match_transformers_modules(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(0)
    name, options = TRANSFORMERS[kind]
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, f"{kind}Model")(config).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    found = {attention.name: attention for attention in heads_of(model)}
    # The file as the library saves it, with any names.
    model.save_pretrained(tmp_path)
    rows, saved = (
        sorted(
            (finding.view, finding.condition_number, finding.sigma_max, finding.sigma_min)
            for finding in wc.audit(given, heads=True, include=["*:qk?", "*:vo?"]).findings
        )
        for given in (model, tmp_path)
    )
    assert saved == rows
    assert len(rows) == 8 * len(found)
    attention = found[name]
    notes = {head.view: head.note for head in attention.heads}
    assert ("RoPE" in notes["qk3"]) == (kind not in NOT_ROTATED)
    assert ("norms of queries" in notes["qk3"]) == (kind == "Qwen3")
    assert ("keys of head 1 of 2" in notes["qk3"]) == (options.get("num_key_value_heads") == 2)
    close(dense(attention), computed(model, name, model.get_submodule(name)))
    if kind == "GPT2":
        crossed = dense(found["h.0.crossattention"])
        module = model.get_submodule("h.0.crossattention")
        q = module.q_attn.weight.detach()  # stored as (in, out)
        k, v = module.c_attn.weight.detach().chunk(2, dim=1)
        columns = slice(3 * 6, 4 * 6)
        torch.testing.assert_close(crossed["qk3"], q[:, columns] @ k[:, columns].mT)
        out = module.c_proj.weight.detach()[columns].mT
        torch.testing.assert_close(crossed["vo3"], out @ v[:, columns].mT)
        split = [label for label in names_of(model) if "attn" in label.split(".")[-2]]
        assert split == [f"h.0.attn.c_attn.weight:{x}" for x in "qkv"] + [
            *(f"h.0.crossattention.c_attn.weight:{x}" for x in "kv"),
            "h.0.crossattention.q_attn.weight",
        ]
    if kind == "GPTNeoX":
        assert "layers.0.attention.query_key_value.weight" in names_of(model)


def from_blocks(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Products:
    """Both maps of every head, from q (H, d, n), k and v (G, d, n), and out (m, H d)."""
    each = len(q) // len(k)
    k, v = (one.repeat_interleave(each, 0) for one in (k, v))
    outs = out.unflatten(1, (len(q), -1)).transpose(0, 1)
    comparing = {f"qk{h}": q[h].mT @ k[h] for h in range(len(q))}
    return comparing | {f"vo{h}": outs[h] @ v[h] for h in range(len(q))}


def split_by(module: Any, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The blocks (H, d, n) into which the code of the library splits its fused projection."""
    if kind == "Qwen2-VL":  # `self.qkv(x).reshape(seq_length, 3, self.num_heads, -1)`
        q, k, v = module.qkv.weight.detach().unflatten(0, (3, module.num_heads, -1))
        return q, k, v, module.proj.weight.detach()
    if kind == "MPT":  # `chunk(3, dim=2)`, then heads one after the other
        q, k, v = module.Wqkv.weight.detach().unflatten(0, (3, module.n_heads, -1))
        return q, k, v, module.out_proj.weight.detach()
    rows = module.query_key_value.weight.detach().mT[None]  # one token per basis vector
    if kind == "Bloom":
        q, k, v = (one[0].mT for one in module._reshape(rows))
    else:
        q, k, v = (one[0].permute(1, 2, 0) for one in module._split_heads(rows))
        groups = module.num_kv_heads  # keys and values are repeated for every query
        k, v = (one[:: max(1, len(one) // groups)] for one in (k, v))
    return q, k, v, module.dense.weight.detach()


SPLIT = {
    "Falcon, one key": "transformer.h.1.self_attention",
    "Falcon, groups": "transformer.h.1.self_attention",
    "Falcon, all keys": "transformer.h.1.self_attention",
    "Bloom": "transformer.h.1.self_attention",
    "MPT": "transformer.blocks.1.attn",
    "Qwen2-VL": "model.visual.blocks.0.attn",
}


@pytest.mark.frameworks
@pytest.mark.parametrize("kind", SPLIT)
def test_heads_of_fused_projections_match_the_library(kind: str) -> None:
    pytest.importorskip("transformers", minversion="5")
    model = of_transformers(kind).double()
    found = {attention.name: attention for attention in heads_of(model)}[SPLIT[kind]]
    module = model.get_submodule(SPLIT[kind])
    close(dense(found), from_blocks(*split_by(module, kind)))
    rotated = kind.startswith("Falcon") or kind == "Qwen2-VL"
    assert ("RoPE" in found.heads[0].note) == rotated


@pytest.mark.frameworks
def test_heads_of_peft_model_are_those_of_its_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plain = of_transformers("Llama").double()
    expected = {attention.name: dense(attention) for attention in heads_of(plain)}
    config = plain.config
    model = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["q_proj", "o_proj"]))
    found = {attention.name: attention for attention in heads_of(model)}
    for name, products in expected.items():
        attention = found[f"base_model.model.{name}"]
        close(dense(attention), products)
        assert "without what PEFT adds to the projections" in attention.heads[0].note
    torch.save(model.state_dict(), tmp_path / "model.pt")
    config.to_json_file(tmp_path / "config.json")
    of_model, of_file = (
        {f.label: f.condition_number for f in wc.audit(one, heads=True).findings if f.view}
        for one in (model, tmp_path)
    )
    heads = {name for name in of_model if "self_attn:" in name}
    assert len(heads) == 2 * 8
    assert {name: of_file[name] for name in heads} == {name: of_model[name] for name in heads}
