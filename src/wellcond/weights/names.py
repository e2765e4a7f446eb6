"""Which tensors of a file are no weights, by name, shape and dtype: a file has no classes.

What stands beside packed integers or float8 belongs to them. What is looked up or added in a model,
and so no weight there, is known by its name, and so is what a parametrized weight is computed from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from wellcond.weights.matrices import entries, is_vector
from wellcond.weights.reasons import Reason, Skipped

_MEASURED = ("float64", "float32", "float16", "bfloat16")
# float8_e4m3fn, or F6_E2M3, which torch has no name for
_NARROW = re.compile(r"(F|float)[864](_|$)")
# As int64 there are positions and counters, as bool masks, but hardly codes of a weight.
_CODES = ("int8", "uint8", "int16", "uint16", "int32", "uint32")
_NO_CODES = re.compile(r"ids?|ind(ex|ices)|mask|bias|positions?|counts?|lengths?|buckets?")
# What only a quantised weight has, and what many others have as well.
_SCALES = re.compile(
    r"(weight|input|output|activation|act|[kvq])_(scales?(_inv|_\d)?|(global|channel)_scale|zero(s|_points?)?)"
    r"|(nested_)?(absmax|quant_map)|SCBt?|scales?_(inv|and_zeros?)|qscales?|qzeros"
)
_PERHAPS_SCALES = re.compile(
    r"(.*_)?(scales?|scalings?|zeros?|zero_points?|codebooks?|luts?|lookup_tables?|biases)"
)

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
    r"|(.*_)?class_embed|embed_(return|state|action|out)|vision_embed_tokens",
    re.DOTALL,
)
_ADDED = re.compile(
    rf"{_WORDS}|(.*_)?(pos|positions?|positional|latents?|bias|biases)\d*(_.*)?", re.DOTALL
)


def why_no_weight(shape: tuple[int, ...], dtype: str) -> Skipped | None:
    """Why a tensor holds no weight; None if it does."""
    if len(shape) < 2:
        return Skipped((Reason.number, Reason.vector)[len(shape)])
    if 0 in shape:
        return Skipped(Reason.empty, f"shape {shape}")
    if dtype in _MEASURED:
        return None
    return Skipped(Reason.quantised if _NARROW.match(dtype) else Reason.packed, dtype)


def no_weights(tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Skipped]:
    """The tensors, given by shape and dtype, that by their names are no weights; and why."""
    measured = {n: shape for n, (shape, dtype) in tensors.items() if dtype in _MEASURED}
    named = {name: _by_name(name, shape) for name, shape in measured.items()}
    found = {name: why for name, why in named.items() if why is not None} | _scales(tensors)
    parametrized = Skipped(Reason.parametrized, "audit the model instead")
    return found | dict.fromkeys(_originals(tensors), parametrized)


def _by_name(name: str, shape: tuple[int, ...]) -> Skipped | None:
    """Whether a tensor is an embedding, or added, as far as its name and shape tell."""
    *modules, own = re.split(r"[./]", name.lower())  # of several files: step1.pt/wte.weight
    if own != "weight":
        if is_vector(shape):
            return Skipped(Reason.vector)
        return Skipped(Reason.added) if _ADDED.fullmatch(own) else None
    known = _LOOKED_UP
    # What PEFT and a list of modules put between.
    while modules and (modules[-1] in ("base_layer", "original_module") or modules[-1].isdigit()):
        known = _SEVERAL if modules.pop().isdigit() else known
    module = modules[-1] if modules else ""
    if len(shape) == 2 and known.fullmatch(module) and not _LINEAR.fullmatch(module):
        return Skipped(Reason.embedding)
    return None


def _originals(tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> Iterator[str]:
    """The tensors that a weight is computed from: by a parametrization of torch, or as before it
    by weight_norm (`weight_g`, `weight_v`), spectral_norm (`weight_orig`, `weight_u`) and pruning
    (`weight_orig`, `weight_mask`).
    """
    for name in tensors:
        if "parametrizations" in re.split(r"[./]", name):
            yield name
        stem, _, part = name.rpartition("_")
        if stem in tensors:  # a weight that is stored itself
            continue
        norms, _ = tensors.get(f"{stem}_g", ((2, 2), ""))
        normed = part == "v" and re.split(r"[./]", stem)[-1].startswith("weight")
        if normed and entries(norms) == max(norms, default=1):
            yield from (name, f"{stem}_g")
        beside = {f"{stem}_u", f"{stem}_mask"} & tensors.keys()
        if part == "orig" and beside:
            yield from (name, *beside)


def _scales(tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Skipped]:
    """The tensors, given by shape and dtype, that belong to a quantised weight; and to which.

    These are what is named like the quantised weight (`weight.absmax` beside `weight`), what is
    named a scale in the same module, and what else is in its module and not called a weight. A
    packed tensor to which more belongs than a bias or a number is surely quantised, and among
    them as well.
    """
    named = {
        name
        for name in tensors
        if any(p.fullmatch(name.rpartition(".")[2]) for p in (_SCALES, _PERHAPS_SCALES))
    }
    first: dict[str, str] = {}  # quantised weights by their module
    stems: dict[str, str] = {}  # and by what their name begins with
    for name, (shape, dtype) in tensors.items():
        module, _, own = name.rpartition(".")
        packed = dtype in _CODES and not any(map(_NO_CODES.fullmatch, own.lower().split("_")))
        if len(shape) > 1 and name not in named and (packed or _NARROW.match(dtype)):
            first.setdefault(module, name)
            stems |= {name: name, re.sub(r"_(packed|blocks|q|int\d)$", "", name): name}

    def owner(name: str) -> str | None:
        module, _, own = name.rpartition(".")
        if module in stems:  # weight.absmax
            return stems[module]
        if _PERHAPS_SCALES.fullmatch(own):
            stem = name.rpartition("_")[0]  # of weight_scale: weight
            return stems.get(stem, first.get(module, "" if _SCALES.fullmatch(own) else None))
        if module in first and module and not own.lower().endswith("weight"):
            return first[module]
        return "" if _SCALES.fullmatch(own) else None

    found: dict[str, Skipped] = {}
    for name, (shape, dtype) in tensors.items():
        of = owner(name) if dtype in _MEASURED or name in named else None
        if of is not None:
            found[name] = Skipped(Reason.scales, of)
            surely = len(shape) > 1 or _SCALES.fullmatch(name.rpartition(".")[2])
            if of and (surely or (shape and name in named)):
                found[of] = Skipped(Reason.quantised, tensors[of][1])
    return found
