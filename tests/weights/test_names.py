"""A file and its model agree on which tensors are not weights, such as embeddings and biases."""

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from torch.nn.utils import prune

import wellcond as wc
from wellcond.weights.effective import effective_matrices
from wellcond.weights.names import explain_non_weight, find_non_weights
from wellcond.weights.reasons import Reason

# Names and shapes of timm, of PEFT, and of the original files of Llama, Gemma, Whisper and CLIP,
# with the reason that a model gives, None for a weight.
NAMES: dict[str, tuple[tuple[int, ...], Reason | None]] = {
    "cls_token": ((1, 1, 8), Reason.vector),
    "dist_token": ((1, 1, 8), Reason.vector),
    "reg_token": ((1, 4, 8), Reason.added),
    "pos_embed": ((1, 5, 8), Reason.added),
    "pos_embed_win": ((1, 8, 7, 7), Reason.added),
    "patch_pos": ((1, 5, 8), Reason.added),
    "attn_pool.latent": ((1, 3, 8), Reason.added),
    "absolute_pos_embed": ((1, 5, 8), Reason.added),
    "blocks.0.attn.rel_pos_h": ((9, 8), Reason.added),
    "blocks.0.attn.relative_position_bias_table": ((9, 3), Reason.added),
    "blocks.0.attn.attention_biases": ((4, 9), Reason.added),
    "experts.gate_up_proj_bias": ((4, 9), Reason.added),
    "layers.0.attn.logit_scale": ((3, 1, 1), Reason.vector),
    "stages.0.gamma": ((8, 1, 1), Reason.vector),
    "patch_embed.proj.weight": ((8, 3, 4, 4), None),
    "blocks.0.attn.qkv.weight": ((24, 8), None),
    "blocks.0.linear_tokens.weight": ((5, 5), None),
    "blocks.0.mlp_tokens.fc1.weight": ((5, 5), None),
    "blocks.0.attn.pos_proj.weight": ((5, 3), None),
    "conv.weight": ((8, 1, 1, 1), None),
    "attn.in_proj_weight": ((24, 8), None),
    "time_embed.0.weight": ((8, 8), None),
    "time_embedding.linear_1.weight": ((8, 8), None),
    "x_embedder.weight": ((8, 8), None),
    "context_embedder.weight": ((8, 8), None),
    "base_model.model.embed_tokens.lora_embedding_A": ((2, 9), Reason.added),
    "base_model.model.embed_tokens.base_layer.weight": ((9, 8), Reason.embedding),
    "base_model.model.q_proj.lora_A.weight": ((2, 8), None),
    "base_model.model.q_proj.base_layer.weight": ((8, 8), None),
    "tok_embeddings.weight": ((9, 8), Reason.embedding),
    "step1.pt/wte.weight": ((9, 8), Reason.embedding),
    "embedder.weight": ((9, 8), Reason.embedding),
    "decoder.embed_tokens.0.weight": ((9, 8), Reason.embedding),
    "decoder.token_embedding.weight": ((9, 8), Reason.embedding),
    "decoder.positional_embedding": ((9, 8), Reason.added),
    "visual.proj": ((9, 8), None),
    "text_projection": ((9, 8), None),
    "w": ((9, 8), None),
    "0.weight": ((9, 8), None),
    "weight": ((9, 8), None),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_decide_what_is_a_weight(name: str) -> None:
    shape, expected = NAMES[name]
    found = find_non_weights({name: (shape, "float32")})
    assert {n: why.reason for n, why in found.items()} == ({name: expected} if expected else {})


def test_vector_shaped_parameter_of_model_is_skipped() -> None:
    model = nn.Module()
    model.token = nn.Parameter(torch.randn(1, 1, 8))
    model.linear = nn.Linear(8, 8)
    assert wc.Regularizer(model, wc.ConditionPenalty(0.1)).skipped["token"].reason is Reason.vector
    assert wc.audit(model).coverage.skipped["token"].reason is Reason.vector


MODELS = {
    "AutoModelForCausalLM": "llama mistral mixtral qwen2 gemma gpt2 gpt_neox opt bloom falcon phi",
    "AutoModelForMaskedLM": "bert roberta distilbert albert electra deberta-v2 modernbert",
    "AutoModelForSeq2SeqLM": "t5 bart marian",
    "AutoModelForImageClassification": "vit dinov2 swin swinv2 beit convnext",
    "AutoModel": "deit clip siglip whisper wav2vec2 blip-2 layoutlm sam",
}


@pytest.mark.frameworks
@pytest.mark.parametrize(
    ("auto", "kind"), [(auto, kind) for auto, kinds in MODELS.items() for kind in kinds.split()]
)
def test_names_agree_with_modules(auto: str, kind: str) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    with torch.device("meta"):  # full size, without values
        model = getattr(transformers, auto).from_config(transformers.AutoConfig.for_model(kind))
    _, skipped, _ = effective_matrices(model)
    parameters = {
        name: (tuple(p.shape), str(p.dtype).removeprefix("torch."))
        for name, p in model.named_parameters()
        if ".parametrizations." not in name
    }
    no_matrix = {name for name, kind in parameters.items() if explain_non_weight(*kind) is not None}
    of_file = parameters.keys() - no_matrix - find_non_weights(parameters).keys()
    of_model = {name for name, why in skipped.items() if why.reason is Reason.no_values}
    assert len(of_model) > 5
    assert of_file == of_model & parameters.keys()


@pytest.mark.frameworks
@pytest.mark.parametrize("tied", [True, False])
def test_a_file_of_transformers_and_its_model_agree(tmp_path: Path, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 20}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    config = transformers.LlamaConfig(**sizes, tie_word_embeddings=tied)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    of_model = wc.audit(model)
    for path in (tmp_path / "model.safetensors", tmp_path / "model.pt"):
        of_file = wc.audit(path)
        assert {f.label for f in of_file.findings} == {f.label for f in of_model.findings}
        assert of_file.coverage.parameter_share == of_model.coverage.parameter_share
        skipped = of_file.coverage.skipped
        assert skipped["model.embed_tokens.weight"] == wc.report.Skipped(Reason.embedding)
    assert ("lm_head.weight" in {f.name for f in of_model.findings}) is not tied


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_embedding_in_file_is_included_by_exact_name(tmp_path: Path, kind: str) -> None:
    content = {"wte.weight": torch.randn(9, 4), "l.weight": torch.randn(4, 4)}
    path, fixed = tmp_path / f"a.{kind}", tmp_path / f"fixed.{kind}"
    save_file(content, path) if kind == "safetensors" else torch.save(content, path)
    report = wc.audit(path, include=["wte.weight", "l.*"])
    assert {f.name for f in report.findings} == {"wte.weight", "l.weight"}
    assert report.coverage.parameter_share == 1.0
    assert {f.name for f in wc.audit(path, include=["*"]).findings} == {"l.weight"}
    left_out = wc.audit(path, exclude=["wte.*"]).coverage.skipped["wte.weight"]
    assert left_out.reason is Reason.excluded
    wc.repair(path, fixed, 1.5, include=["wte.weight"])
    after = load_file(fixed) if kind == "safetensors" else torch.load(fixed)
    assert wc.condition_number(after["wte.weight"]) <= 1.5
    assert torch.equal(after["l.weight"], content["l.weight"])


def test_weight_tied_to_embedding_is_skipped_in_any_order(tmp_path: Path) -> None:
    both = torch.randn(9, 4)
    torch.save(
        {"head.weight": both, "wte.weight": both, "l.weight": torch.eye(3)}, tmp_path / "a.pt"
    )
    report = wc.audit(tmp_path / "a.pt")
    assert [f.name for f in report.findings] == ["l.weight"]
    assert report.coverage.skipped["wte.weight"].reason is Reason.embedding
    assert report.coverage.skipped["head.weight"].reason is Reason.same


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.linear = nn.Embedding(9, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.wte.weight  # `save_model` keeps the first name of the alphabet


def test_tie_is_read_from_safetensors_metadata(tmp_path: Path) -> None:
    model, path = Tied(), tmp_path / "a.safetensors"
    save_model(model, str(path), metadata={"format": "pt", "linear.bias": "head.weight"})
    report, of_model = wc.audit(path), wc.audit(model)
    assert [f.name for f in report.findings] == ["linear.weight"]
    assert report.coverage.parameter_share == of_model.coverage.parameter_share
    why = wc.report.Skipped(Reason.embedding, "tied to wte.weight")
    assert report.coverage.skipped["head.weight"] == why
    assert of_model.coverage.skipped["wte.weight"].reason is Reason.embedding
    wc.repair(path, tmp_path / "b.safetensors", 1.5)
    after = load_file(tmp_path / "b.safetensors")
    assert torch.equal(after["head.weight"], model.head.weight)
    for name in ("head.weight", "wte.weight"):  # by either name, as in the model
        assert [f.name for f in wc.audit(path, include=[name]).findings] == ["head.weight"]
    path.rename(tmp_path / "c.safetensors")
    save_file({"w": torch.eye(2)}, path)
    skipped = wc.audit(tmp_path, exclude=["b.*"]).coverage.skipped
    tied = wc.report.Skipped(Reason.embedding, "tied to c.safetensors/wte.weight")
    assert skipped["c.safetensors/head.weight"] == tied


# Tensors that are fixed or act entrywise, from Mamba, S4, RWKV, silero, PANNs, nnAudio, torchaudio,
# Whisper, e3nn, MACE, GPT-2, Swin, YOLO, Llama and fracast.
NO_MAPS: dict[str, tuple[tuple[int, ...], Reason]] = {
    "layers.0.mixer.A_log": ((96, 8), Reason.exponentiated),
    "layers.0.A_logs": ((96, 8), Reason.exponentiated),
    "s4.log_dt": ((8, 2), Reason.exponentiated),
    "s4.log_A_real": ((8, 4), Reason.exponentiated),
    "s4.A_imag": ((8, 4), Reason.exponentiated),
    "att.time_faaaa": ((8, 4), Reason.exponentiated),
    "policy.log_std": ((2, 4), Reason.exponentiated),
    "mlp.up_proj.scales": ((4, 8), Reason.exponentiated),  # GPTQ, with codes in another file
    "experts.down_proj_scale": ((2, 9, 3), Reason.exponentiated),
    "mlp.up_proj.zero": ((8, 2), Reason.exponentiated),
    "layers.0.mixer.dt_bias": ((8, 2), Reason.added),
    "stft.forward_basis_buffer": ((514, 1, 512), Reason.constant),
    "stft_conv.weight": ((258, 1, 256), Reason.constant),
    "extractor.stft.conv_real.weight": ((513, 1, 1024), Reason.constant),
    "logmel_extractor.melW": ((513, 64), Reason.constant),
    "cqt.cqt_kernels_real": ((84, 1, 512), Reason.constant),
    "preprocessor.dft_matrix": ((64, 64), Reason.constant),
    "mfcc.dct_mat": ((80, 40), Reason.constant),
    "mel.mel_scale.fb": ((201, 80), Reason.constant),
    "mel_basis": ((80, 513), Reason.constant),
    "mel_filters": ((80, 201), Reason.constant),
    "frontend.fbank_matrix": ((80, 201), Reason.constant),
    "filterbank": ((80, 201), Reason.constant),
    "filterbank.weight": ((80, 1, 201), Reason.constant),
    "conv._compiled._w3j_1_1_1": ((3, 3, 3), Reason.constant),
    "contraction.U_matrix_2": ((9, 9, 4), Reason.constant),
    "rope.inv_freq": ((2, 8), Reason.constant),
    "rotary_emb.cos_cached": ((64, 8), Reason.constant),
    "freqs_cis": ((64, 8), Reason.constant),
    "stft.hann_window": ((2, 8), Reason.constant),
    "layers.0.attn_mask": ((4, 49, 49), Reason.constant),
    "sa.heads.0.tril": ((8, 8), Reason.constant),
    "made.0.mask": ((8, 6), Reason.constant),
    "head.anchors": ((3, 3, 2), Reason.constant),
    "h.0.attn.bias": ((1, 1, 8, 8), Reason.added),
    "pos_encoder.pe": ((64, 1, 8), Reason.added),
    "queries": ((48, 64), Reason.added),
    "pooler.query": ((4, 64), Reason.added),
    "decoder.object_queries": ((10, 8), Reason.added),
    "resampler.latent_query": ((10, 8), Reason.added),
    "quantizer.codebook": ((64, 8), Reason.added),
}

# Similar names of weights.
MAPS: dict[str, tuple[int, ...]] = {
    "window_attention.qkv.weight": (24, 8),
    "window_attn.weight": (8, 8),
    "window_proj.weight": (8, 8),
    "stft_encoder.0.weight": (8, 8),
    "stft_discriminator.convs.0.weight": (8, 4, 3, 3),
    "stft_proj.weight": (8, 8),
    "cqt_block.weight": (8, 8),
    "dftb.weight": (8, 8),
    "conv_real.weight": (8, 8, 3),
    "fbank_encoder.weight": (8, 8),
    "encoder.filterbank._filters": (16, 1, 8),
    "mel_proj.weight": (8, 80),
    "mel_linear.weight": (8, 80),
    "mask_head.weight": (8, 8),
    "masked_conv.weight": (8, 8, 3, 3),
    "attn.query.weight": (8, 8),
    "attn.W_query": (8, 8),
    "attn.query_proj": (8, 8),
    "attn.w_k": (8, 8),
    "log_layer.weight": (8, 8),
    "upscale.weight": (8, 8),
    "scale.weight": (8, 8),
    "scales": (8, 8),
    "scale_proj": (8, 8),
    "catalog.weight": (8, 8),
    "dialog": (8, 8),
    "time_decay_w1": (8, 8),
    "time_maa_w1": (8, 8),
    "dt_proj.weight": (8, 8),
    "x_proj_weight": (4, 8, 8),
    "D": (8, 8),
    "U": (8, 8),
    "fb": (8, 8),
    "norm1.linear.weight": (8, 8),
    "proj_norm_out.weight": (8, 8),
    "normalise.weight": (8, 8),
    "pe_proj.weight": (8, 8),
    "buffer_proj.weight": (8, 8),
    "anchor_proj.weight": (8, 8),
}


@pytest.mark.parametrize("name", NO_MAPS)
def test_fixed_or_entrywise_tensors_are_skipped(tmp_path: Path, name: str) -> None:
    shape, reason = NO_MAPS[name]
    content = {name: torch.randn(shape), "l.weight": torch.eye(3)}
    torch.save(content, tmp_path / "a.pt")
    report = wc.audit(tmp_path / "a.pt")
    assert [f.name for f in report.findings] == ["l.weight"]
    assert report.coverage.skipped[name].reason is reason
    fixed = reason is Reason.constant  # constants do not count as parameters
    assert (report.coverage.parameter_share == 1) == fixed
    wc.repair(tmp_path / "a.pt", tmp_path / "b.pt", 1.01)
    assert torch.equal(torch.load(tmp_path / "b.pt")[name], content[name])
    insisted = wc.audit(tmp_path / "a.pt", include=[name])
    assert {f.name for f in insisted.findings} == {name}
    assert 0 < insisted.coverage.parameter_share < 1


@pytest.mark.parametrize("name", MAPS)
def test_similar_names_of_weights_are_kept(name: str) -> None:
    assert find_non_weights({name: (MAPS[name], "float32")}) == {}


def test_excluded_constant_is_not_a_parameter(tmp_path: Path) -> None:
    content = {"stft.basis_buffer": torch.randn(64, 1, 64), "l.weight": torch.eye(3)}
    torch.save(content, tmp_path / "a.pt")
    report = wc.audit(tmp_path / "a.pt", exclude=["*stft*"])
    assert report.coverage.parameter_share == 1


@pytest.mark.parametrize("shape", [(6, 264), (1, 8), (3, 8, 8)], ids=str)
def test_normalisation_over_several_axes_is_skipped(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """By its bias, by gamma and beta as in Keras, or only by the name of its layer."""
    model = nn.ModuleDict({"a": nn.LayerNorm(shape), "b": nn.LayerNorm(shape, bias=False)})
    names = {"a.weight": "a.weight", "b.weight": "q_norm.weight", "a.bias": "a.bias"}
    content = {names[name]: tensor for name, tensor in model.state_dict().items()}
    content |= {"c.gamma": torch.randn(shape), "c.beta": torch.randn(shape), "l": torch.eye(3)}
    torch.save(content, tmp_path / "a.pt")
    report = wc.audit(tmp_path / "a.pt")
    assert [f.name for f in report.findings] == ["l", *(["c.beta"] if False else [])]
    reasons = {report.coverage.skipped[n].reason for n in ("a.weight", "q_norm.weight", "c.gamma")}
    assert reasons == {Reason.normalisation}
    assert not [
        f for f in wc.audit(nn.Sequential(model, nn.Linear(3, 3))).findings if f.name != "1.weight"
    ]


def test_linear_with_bias_is_a_weight() -> None:
    tensors = {"l.weight": ((8, 8), "float32"), "l.bias": ((8,), "float32")}
    assert "l.weight" not in find_non_weights(tensors)


def test_d_with_a_log_acts_entrywise() -> None:
    tensors = {"mixer.A_log": ((8, 4), "float32"), "mixer.D": ((8, 4), "float32")}
    assert find_non_weights(tensors)["mixer.D"].reason is Reason.exponentiated


@pytest.mark.parametrize("mask", ["mask", "weight_mask"])
def test_masked_weight_is_parametrized(mask: str) -> None:
    tensors = {"l.weight": ((8, 6), "float32"), f"l.{mask}": ((8, 6), "float32")}
    found = find_non_weights(tensors)
    assert found["l.weight"].reason is Reason.parametrized
    tensors[f"l.{mask}"] = ((8, 8), "float32")  # of something else
    assert "l.weight" not in find_non_weights(tensors)


OLD = ("weight_norm of an LSTM", "weight_norm by one number")


def old(how: str) -> nn.Module:
    module = nn.LSTM(3, 2) if how == OLD[0] else nn.Linear(3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # these functions are deprecated
        if how == OLD[0]:
            return nn.utils.weight_norm(module, "weight_hh_l0")
        if how == OLD[1]:
            return nn.utils.weight_norm(module, dim=None)
        return getattr(nn.utils, how)(module)


PARAMETRIZED = {
    "parametrizations.weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)),
    "pruning": lambda: prune.random_unstructured(nn.Linear(3, 2), "weight", 0.5),
} | {f"old {how}": partial(old, how) for how in ("weight_norm", "spectral_norm", *OLD)}


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize("how", PARAMETRIZED)
def test_effective_weight_of_parametrization_is_measured_and_repaired(
    tmp_path: Path, how: str, kind: str
) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": PARAMETRIZED[how](), "b": nn.Linear(3, 2)}).eval()
    content = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    path, fixed = tmp_path / f"a.{kind}", tmp_path / f"fixed.{kind}"
    save_file(content, path) if kind == "safetensors" else torch.save(content, path)
    report = wc.audit(path)
    found = {(f.name, f.view): f.condition_number for f in report.findings}
    expected = {(f.name, f.view): f.condition_number for f in wc.audit(model).findings}
    assert found == pytest.approx(expected, rel=1e-5)
    (label,) = {f.name for f in report.findings if f.parts}
    parts = next(f.parts for f in report.findings if f.name == label)
    assert report.coverage.skipped.keys().isdisjoint(parts)
    assert {f.name for f in wc.audit(path, include=[parts[0]]).findings} == {label}
    with pytest.raises(ValueError, match="is part of"):
        wc.repair(path, fixed, 1.01, include=sorted(parts[1:]))
    repaired = wc.repair(path, fixed, 1.01)
    after = load_file(fixed) if kind == "safetensors" else torch.load(fixed)
    changed = {name for name, tensor in content.items() if not torch.equal(after[name], tensor)}
    kept = how in ("orthogonal", "pruning")
    assert (repaired.skipped.get(label) is not None) == kept
    assert bool(changed & set(parts)) != kept
    model.load_state_dict(after)
    for name, layer in model.items():
        layer(torch.randn(1, 3))
        left = [f.condition_number for f in wc.audit(layer).findings if name == "b" or not kept]
        assert all(kappa <= 1.01 * (1 + 1e-6) for kappa in left)


def test_unknown_parametrization_has_a_reason(tmp_path: Path) -> None:
    content = nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)).state_dict()
    content["parametrizations.weight.original"][1, 0] = 0.5
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"original.*parametrized.*matrix_exp, cayley or house"):
        wc.audit(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "shapes",
    [
        {"attn.w_v": (4, 4), "attn.w_g": (4, 1)},
        {"l.weight_v": (4, 4), "l.weight_g": (4, 4)},
        {"l.weight_v": (4, 4)},
        {"l.weight_orig": (4, 4)},
        {"l.weight": (4, 4), "l.weight_orig": (4, 4)},
    ],
    ids=str,
)
def test_similar_names_are_not_a_parametrization(shapes: dict[str, tuple[int, ...]]) -> None:
    assert find_non_weights({name: (shape, "float32") for name, shape in shapes.items()}) == {}


@pytest.mark.parametrize("stem", ["attn.in_proj_weight", "cell.kernel", "weight_hh_l0"])
def test_weight_norm_parts_of_any_parameter_are_recognised(stem: str) -> None:
    tensors = {f"{stem}_g": ((12, 1), "float32"), f"{stem}_v": ((12, 4), "float32")}
    found = find_non_weights(tensors)
    assert {found[name].reason for name in tensors} == {Reason.parametrized}
