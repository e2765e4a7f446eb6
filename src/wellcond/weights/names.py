"""Which tensors of a file are no weights, by name, shape and dtype: a file has no classes.

What is looked up or added in a model, fixed transforms, masks, exponentiated parameters and what a
parametrized weight is computed from are known by their names. See `quantised` for what stands
beside codes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from wellcond.text import last_part
from wellcond.weights.matrices import entries, is_vector
from wellcond.weights.quantised import FLOATING, Tensors, codes_and_scales, is_narrow, is_power
from wellcond.weights.reasons import Reason, Skipped

# Of an embedding, and of a parameter that stands for itself: tok_embeddings, embed_in, cls_token.
# Here a dot is any letter: would a line end be none, a long name that has one might take hours.
_WORDS = r"(.*_)?(emb|embeds?|embeddings?|tokens?)\d*(_.*)?"
_LOOKED_UP = re.compile(
    rf"{_WORDS}|w[tp]e|shared|embedder|(row|column|queries)_embedder|relative_attention_bias|codebook",
    re.DOTALL,
)
# embed_tokens.0.weight is one of several embeddings, time_embed.0.weight a layer of a Sequential.
_SEVERAL = re.compile(
    r"(.*_)?(embeddings|tokens|embeds_layers)(_.*)?|w[tp]es|point_embed", re.DOTALL
)
# Linear maps from or to an embedding: patch_embedding, embeddings_project, the heads of detectors,
# that of GPT-NeoX.
_LINEAR = re.compile(
    r".*(patch|proj|linear|dense|mapping|transformation).*"
    r"|(.*_)?class_embed|embed_(return|state|action|out)|vision_embed_tokens|speaker_embeds_layer",
    re.DOTALL,
)
# The last line is of learned queries: `W_query` is a projection.
_ADDED = re.compile(
    rf"{_WORDS}|(.*_)?(pos|positions?|positional|latents?|bias|biases|codebooks?)\d*(_.*)?|pe"
    r"|(.*_)?queries|((learn(ed|able)|object|latent|pool|seed|det|mask|cls|text|audio|image)_)?query"
    r"|query_(feats?|features?|pos)|scale_shift_table|modulation|registers?|layer_scale\w*",
    re.DOTALL,
)

# Fixed transforms: of audio and of images, and the products of spherical harmonics.
_TRANSFORM = r"_?i?(stft|dft|h?cqt|vqt|mdct|dct)s?\d*"
_MEL = r"(.*_)?mel_?(basis|w|fb|filters?|matrix|mat)s?"
_BANK = r"(.*_)?(fbank|filter_?bank)s?\d*"
_CONSTANT = re.compile(
    rf"{_TRANSFORM}(_.*)?|{_MEL}|{_BANK}(_.*)?|.*_buffer|_?(w3j|u_matrix|wigner|clebsch)(_.*)?"
    r"|inv_freq.*|freqs_cis.*|(.*_)?(cos|sin)_(cached?|table)|(.*_)?window\d*"
    r"|(.*_)?masks?|tril|triu|anchors?(_grid|_points)?|running_(mean|var|cov)"
    r"|cos|sin|freqs",
    re.DOTALL,
)
# A layer of such a name is one; `stft_encoder` and `cqt_block` are learned.
_CONSTANT_LAYER = re.compile(
    rf"{_TRANSFORM}(_(basis|bases|conv|kernels?|filters?|matrix|mat|real|imag))?|{_MEL}|{_BANK}",
    re.DOTALL,
)
# A_log of Mamba, log_dt and A_imag of S4, time_decay and time_faaaa of RWKV.
_EXPONENTIATED = re.compile(
    r"log_.*|.*_logs?|inv_dt|a_(real|imag|re|im)|lambda(_re|_im)?|time_(decay|first|faaaa)|r_k",
    re.DOTALL,
)
_STATE_SPACE = ("A_log", "A_logs", "log_dt", "dt_bias")  # beside these D acts entrywise
_NORMED = re.compile(r"^weight|weight$|kernel$")  # what weight_norm is put on
_NORM = re.compile(r"(.*_)?(layer|rms|group|batch|instance)?_?norm_?\d*", re.DOTALL)


def why_no_weight(shape: tuple[int, ...], dtype: str) -> Skipped | None:
    """Why a tensor holds no weight; None if it does."""
    if len(shape) < 2:
        return Skipped((Reason.number, Reason.vector)[len(shape)])
    if 0 in shape:
        return Skipped(Reason.empty, f"shape {shape}")
    if dtype in FLOATING:
        return None
    if is_power(dtype):
        return Skipped(Reason.scales)
    return Skipped(Reason.quantised if is_narrow(dtype) else Reason.packed, dtype)


def no_weights(
    tensors: Tensors, holds_codes: Callable[[str], bool] = lambda _: False
) -> dict[str, Skipped]:
    """The tensors, given by shape and dtype, that by their names are no weights; and why.

    Args:
        tensors: shape and dtype by name.
        holds_codes: looks into a tensor where names and shapes do not decide whether it holds codes
            of a quantised weight.
    """
    measured = {n: shape for n, (shape, dtype) in tensors.items() if dtype in FLOATING}
    named = {name: _by_name(name, shape, tensors) for name, shape in measured.items()}
    found = {name: why for name, why in named.items() if why is not None}
    found |= codes_and_scales(tensors, holds_codes)
    flat = {name for name in tensors if last_part(name).endswith("flat_param")}
    found |= dict.fromkeys(flat, Skipped(Reason.flat))
    parametrized = Skipped(Reason.parametrized, "audit the model instead")
    return found | dict.fromkeys(_originals(tensors), parametrized)


def _by_name(name: str, shape: tuple[int, ...], tensors: Tensors) -> Skipped | None:
    """What a tensor is besides a weight, as far as its name, its shape and its siblings tell."""
    *modules, own = re.split(r"[./]", name.lower())  # of several files: step1.pt/wte.weight
    if len(shape) > 1 and _is_normalisation(name, shape, modules, tensors):
        return Skipped(Reason.normalisation)
    if own != "weight":
        if is_vector(shape):
            return Skipped(Reason.vector)
        return _parameter(name, own, modules, tensors)
    if modules and _is_constant_layer(modules):
        return Skipped(Reason.constant)
    known = _LOOKED_UP
    # What PEFT and a list of modules put between.
    while modules and (modules[-1] in ("base_layer", "original_module") or modules[-1].isdigit()):
        known = _SEVERAL if modules.pop().isdigit() else known
    module = modules[-1] if modules else ""
    if len(shape) == 2 and known.fullmatch(module) and not _LINEAR.fullmatch(module):
        return Skipped(Reason.embedding)
    return None


def _parameter(name: str, own: str, modules: list[str], tensors: Tensors) -> Skipped | None:
    """What a parameter or a buffer is that stands for itself."""
    if _ADDED.fullmatch(own):
        return Skipped(Reason.added)
    of_mel = own == "fb" and bool(modules) and "mel" in modules[-1]  # of torchaudio
    if of_mel or (_CONSTANT.fullmatch(own) and not _LINEAR.fullmatch(own)):
        return Skipped(Reason.constant)
    if _EXPONENTIATED.fullmatch(own) or (own in ("d", "ds") and _of_state_space(name, tensors)):
        return Skipped(Reason.exponentiated)
    return None


def _is_constant_layer(modules: list[str]) -> bool:
    """Whether its weight is a fixed transform: `stft_conv`, or `stft.conv_real` of torchlibrosa."""
    *above, module = modules
    part = re.fullmatch(r"conv_(real|imag)", module) and above[-1:] in (["stft"], ["istft"])
    return bool(part or _CONSTANT_LAYER.fullmatch(module))


def _of_state_space(name: str, tensors: Tensors) -> bool:
    stem = name[: -len(last_part(name))]
    return any(f"{stem}{other}" in tensors for other in _STATE_SPACE)


def _is_normalisation(
    name: str, shape: tuple[int, ...], modules: list[str], tensors: Tensors
) -> bool:
    """Whether it acts entrywise: beside it stands another of its shape, or its layer says so.

    `nn.LayerNorm((6, 264))` has a weight and a bias of these; Keras calls them gamma and beta.
    """
    own = last_part(name)
    beside = {"weight": "bias", "gamma": "beta", "beta": "gamma"}.get(own)
    if beside is None:
        return False
    same = tensors.get(f"{name.removesuffix(own)}{beside}", ((), ""))[0] == shape
    return same or (own == "weight" and bool(modules and _NORM.fullmatch(modules[-1])))


def _originals(tensors: Tensors) -> Iterator[str]:
    """The tensors that a weight is computed from: by a parametrization of torch, or as before it
    by weight_norm (`weight_g`, `weight_v`), spectral_norm (`weight_orig`, `weight_u`) and pruning
    (`weight_orig`, `weight_mask`); by a mask of the same shape.
    """
    for name, (shape, _) in tensors.items():
        if "parametrizations" in re.split(r"[./]", name):
            yield name
        stem, _, part = name.rpartition("_")
        masks = (f"{name.removesuffix('weight')}mask", f"{name}_mask")
        masked = any(mask in tensors and tensors[mask][0] == shape for mask in masks)
        if name.endswith("weight") and masked and f"{name}_orig" not in tensors:
            yield name
        if stem in tensors:  # a weight that is stored itself
            continue
        norms, _ = tensors.get(f"{stem}_g", ((2, 2), ""))
        normed = part == "v" and _NORMED.search(last_part(stem))
        if normed and entries(norms) == max(norms, default=1):
            yield from (name, f"{stem}_g")
        beside = {f"{stem}_u", f"{stem}_mask"} & tensors.keys()
        if part == "orig" and beside:
            yield from (name, *beside)
