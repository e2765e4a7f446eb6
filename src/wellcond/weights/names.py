"""The tensors in a file that are not weights, by name, shape and dtype.

A file has no classes, so names identify parameters that are looked up or added, fixed transforms,
masks, exponentiated parameters, and the tensors from which a parametrized weight is computed.
`quantised` finds codes and their scales.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from wellcond.text import last_part
from wellcond.weights.matrices import is_vector
from wellcond.weights.parametrized import find_parametrized
from wellcond.weights.quantised import FLOATING, Tensors, find_codes_and_scales, is_narrow, is_power
from wellcond.weights.reasons import Reason, Skipped

# Words in names of embeddings and of added parameters: tok_embeddings, embed_in, cls_token. All
# patterns are DOTALL, because a long name with a line end might otherwise take hours to match.
_WORDS = r"(.*_)?(emb|embd|embeds?|embeddings?|tokens?)\d*(_.*)?"
_LOOKED_UP = re.compile(
    rf"{_WORDS}|w[tp]e|shared|embedder|(row|column|queries)_embedder|relative_attention_bias|codebook"
    r"|(cross_)?attn_rel_b",
    re.DOTALL,
)
# embed_tokens.0.weight is one of several embeddings; time_embed.0.weight is a layer of a
# Sequential.
_SEVERAL = re.compile(
    r"(.*_)?(embeddings|tokens|embeds_layers)(_.*)?|w[tp]es|point_embed", re.DOTALL
)
# Linear maps from or to an embedding: patch_embedding, embeddings_project, the heads of detectors
# and of GPT-NeoX.
_LINEAR = re.compile(
    r".*(patch|proj|linear|dense|mapping|transformation).*"
    r"|(.*_)?class_embed|embed_(return|state|action|out)|vision_embed_tokens|speaker_embeds_layer",
    re.DOTALL,
)
# The last lines are learned queries; `W_query` is a projection.
_ADDED = re.compile(
    rf"{_WORDS}|(.*_)?(pos|positions?|positional|latents?|bias|biases|codebooks?)\d*(_.*)?|pe"
    r"|(.*_)?queries|((learn(ed|able)|object|latent|pool|seed|det|mask|cls|text|audio|image)_)?query"
    r"|query_(feats?|features?|pos)|scale_shift_table|modulation|registers?|layer_scale\w*",
    re.DOTALL,
)

# Fixed transforms of audio and images, and coefficients of spherical harmonics. Keras calls a layer
# of the class CQT2010v2 cq_t2010v2_1.
_TRANSFORM = r"_?i?(stft|dft|h?cq_?t(\d+v\d(_\d+)?)?|vqt|mdct|dct)s?\d*"
_MEL = r"(.*_)?mel_?(basis|w|fb|filters?|matrix|mat)s?"
_BANK = r"(.*_)?(fbank|filter_?bank)s?\d*"
_CONSTANT = re.compile(
    rf"{_TRANSFORM}(_.*)?|{_MEL}|{_BANK}(_.*)?|.*_buffer|_?(w3j|u_matrix|wigner|clebsch)(_.*)?"
    r"|inv_freq.*|freqs_cis.*|(.*_)?(cos|sin)_(cached?|table)|(.*_)?window\d*"
    r"|(.*_)?masks?|tril|triu|anchors?(_grid|_points)?|running_(mean|var|cov)"
    r"|cos|sin|freqs",
    re.DOTALL,
)
# Layers that are fixed transforms; `stft_encoder` and `cqt_block` are learned.
_CONSTANT_LAYER = re.compile(
    rf"{_TRANSFORM}(_(basis|bases|conv|kernels?|filters?|matrix|mat|real|imag))?|{_MEL}|{_BANK}",
    re.DOTALL,
)
# A_log (Mamba), log_dt and A_imag (S4), time_decay and time_faaaa (RWKV).
_EXPONENTIATED = re.compile(
    r"log_.*|.*_logs?|inv_dt|a_(real|imag|re|im)|lambda(_re|_im)?|time_(decay|first|faaaa)|r_k"
    r"|ssm_[ad]",  # of llama.cpp
    re.DOTALL,
)
# The scales of a layer whose codes may be in another file; `dora_scale` belongs to an adapter.
_SCALES = re.compile(r"(?!dora_)(.*_)?scales?|zeros?|zero_points?", re.DOTALL)
_STATE_SPACE = ("A_log", "A_logs", "log_dt", "dt_bias")  # in a module with these, D acts entrywise
_NORM = re.compile(r"(.*_)?(layer|rms|group|batch|instance)?_?norm_?\d*", re.DOTALL)


def explain_non_weight(shape: tuple[int, ...], dtype: str) -> Skipped | None:
    """Why a tensor of this shape and dtype is not a weight; None if it can be one."""
    if len(shape) < 2:
        return Skipped((Reason.number, Reason.vector)[len(shape)])
    if 0 in shape:
        return Skipped(Reason.empty, f"shape {shape}")
    if dtype in FLOATING:
        return None
    if is_power(dtype):
        return Skipped(Reason.scales)
    return Skipped(Reason.quantised if is_narrow(dtype) else Reason.packed, dtype)


def find_non_weights(
    tensors: Tensors, holds_codes: Callable[[str], bool] = lambda _: False
) -> dict[str, Skipped]:
    """The tensors that are not weights according to their names, and why.

    Args:
        tensors: shape and dtype by name.
        holds_codes: reads a tensor and decides whether it contains codes of a quantised weight,
            called if names and shapes do not decide.
    """
    found: dict[str, Skipped] = {}
    for name, (shape, dtype) in tensors.items():
        reason = _find_reason(name, shape, tensors) if dtype in FLOATING else None
        if reason is not None:
            found[name] = Skipped(reason)
    found |= find_codes_and_scales(tensors, holds_codes)
    flat = {name for name in tensors if last_part(name).endswith("flat_param")}
    found |= dict.fromkeys(flat, Skipped(Reason.flat))
    parametrized = Skipped(Reason.parametrized, "audit the model instead")
    return found | dict.fromkeys(_find_originals(tensors), parametrized)


def _find_reason(name: str, shape: tuple[int, ...], tensors: Tensors) -> Reason | None:
    """Why a tensor is not a weight, by its name, its shape and the other tensors of its module."""
    *modules, own = re.split(r"[./]", name.lower())  # also for several files: step1.pt/wte.weight
    if len(shape) > 1 and _is_normalisation(name, shape, modules, tensors):
        return Reason.normalisation
    if own != "weight":
        if is_vector(shape):
            return Reason.vector
        return _find_reason_of_parameter(name, own, modules, tensors)
    if modules and _is_constant_layer(modules):
        return Reason.constant
    pattern = _LOOKED_UP
    # Skip the levels that PEFT and lists of modules insert.
    while modules and (modules[-1] in ("base_layer", "original_module") or modules[-1].isdigit()):
        pattern = _SEVERAL if modules.pop().isdigit() else pattern
    module = modules[-1] if modules else ""
    is_embedding = pattern.fullmatch(module) and not _LINEAR.fullmatch(module)
    return Reason.embedding if len(shape) == 2 and is_embedding else None


def _find_reason_of_parameter(
    name: str, own: str, modules: list[str], tensors: Tensors
) -> Reason | None:
    """Why a parameter or buffer that is not the `weight` of a layer is not a weight."""
    if own in ("embedding", "embeddings"):  # Flax and Keras
        return Reason.embedding
    if _ADDED.fullmatch(own) or _is_bias_of_stack(name, tensors):
        return Reason.added
    of_mel = own == "fb" and bool(modules) and "mel" in modules[-1]  # torchaudio
    if of_mel or (_CONSTANT.fullmatch(own) and not _LINEAR.fullmatch(own)):
        return Reason.constant
    stem = name.removesuffix(last_part(name))
    of_state_space = any(f"{stem}{other}" in tensors for other in _STATE_SPACE)
    acts_entrywise = _EXPONENTIATED.fullmatch(own) or (modules and _SCALES.fullmatch(own))
    if acts_entrywise or (own in ("d", "ds") and of_state_space):
        return Reason.exponentiated
    return None


def is_of_transform(node: str) -> bool:
    """Whether a node of a graph is within a layer that is a fixed transform, by its path."""
    modules = node.lower().split("/")[:-1]
    return any(_CONSTANT_LAYER.fullmatch(module) for module in modules)


def _is_constant_layer(modules: list[str]) -> bool:
    """Whether a layer is a fixed transform: `stft_conv`, or `stft.conv_real` of torchlibrosa."""
    *above, module = modules
    part = re.fullmatch(r"conv_(real|imag)", module) and above[-1:] in (["stft"], ["istft"])
    return bool(part or _CONSTANT_LAYER.fullmatch(module))


def _is_normalisation(
    name: str, shape: tuple[int, ...], modules: list[str], tensors: Tensors
) -> bool:
    """Whether it belongs to a normalisation, by the shape of its bias or the name of its layer.

    `nn.LayerNorm((6, 264))` has a weight and a bias of that shape; Keras calls them gamma and beta.
    """
    own = last_part(name)
    beside = {"weight": "bias", "gamma": "beta", "beta": "gamma"}.get(own)
    if beside is None:
        return False
    same = tensors.get(f"{name.removesuffix(own)}{beside}", ((), ""))[0] == shape
    return same or (own == "weight" and bool(modules and _NORM.fullmatch(modules[-1])))


def _is_bias_of_stack(name: str, tensors: Tensors) -> bool:
    """Whether it is the `b` of a stack `w`, or the `offset` of a `scale`, as in Haiku."""
    shape = tensors[name][0]
    if last_part(name) == "offset":
        return tensors.get(f"{name.removesuffix('offset')}scale", ((), ""))[0] == shape
    beside = (f"{name[:-1]}w", f"{name[:-1]}W", f"{name[:-1]}weights")
    return name[-1:] == "b" and any(
        one in tensors and len(tensors[one][0]) > len(shape) for one in beside
    )


def _find_originals(tensors: Tensors) -> Iterator[str]:
    """The tensors from which a weight is computed: its parts, or a stored weight with a mask."""
    for _, parts in find_parametrized(tensors):
        yield from parts.values()
    for name, (shape, _) in tensors.items():
        if "parametrizations" in re.split(r"[./]", name):
            yield name
        masks = (f"{name.removesuffix('weight')}mask", f"{name}_mask")
        masked = any(mask in tensors and tensors[mask][0] == shape for mask in masks)
        if name.endswith("weight") and masked and f"{name}_orig" not in tensors:
            yield name
